"""Conditions and templates, evaluated by lodash and handlebars themselves in an embedded QuickJS.

JSON text goes in, and a boolean or a text comes out. `sandbox` runs the libraries, within limits;
the rest of the package uses only `conditions` and `templates`.
"""
