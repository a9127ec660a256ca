"""The console in the browser: where enrollments are, and why.

An application on the HTTP listener, in the listener's thread and event loop and with its own
database connections: no page occupies the engine's loop. Imported by the daemon and the commands.
"""
