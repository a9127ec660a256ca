"""Conditions and templates, evaluated by lodash and handlebars themselves in an embedded QuickJS.

JSON text goes in, a boolean or a text comes out; what is in between is theirs. `sandbox` runs
them, within limits; `conditions` and `templates` are what the rest of the package sees of it.
"""
