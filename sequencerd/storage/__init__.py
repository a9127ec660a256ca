"""PostgreSQL: connections, every statement, migrations, the listener, the embedded server.

Imports the core, settings and errors; never runners. `connections` opens, `statements` loads
queries/*.sql, and a module per kind of work runs them: locking, writes, wakes, entries and so on.
"""
