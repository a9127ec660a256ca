"""Report on the service: health, metrics, logs, systemd, and the HTTP server.

Imported by the engine and above.
"""
