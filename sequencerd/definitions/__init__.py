"""Definitions as files and rows: read, check, compile, diff, plan, simulate, draw, import.

Imported by the engine, the console and the command line.
"""
