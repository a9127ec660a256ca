"""PostgreSQL: connections, all statements, migrations, the listener, and the embedded server.

Imports the core, settings and errors; never runners. `connections` opens connections, `statements`
loads queries/*.sql, and a module for each kind of work runs the statements: locking, writes, wakes,
entries and so on.
"""
