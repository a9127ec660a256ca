"""What the service shows of itself: health, metrics, logs, systemd, the HTTP server.

Imported by the engine and above.
"""
