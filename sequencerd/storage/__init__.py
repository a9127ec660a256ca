"""PostgreSQL: connections, every statement, migrations, the listener, the embedded server.

Imports the core, settings and errors; never runners.
"""
