"""Notify systemd (sd_notify(3)), and recognise journald. Without systemd, these functions do
nothing.
"""

from __future__ import annotations

import os
import socket
import sys
import time

_unsent: dict[str, str] = {}
"""Messages for which systemd's socket had no room: the latest of each kind."""


def notify(*states: str) -> None:
    """Send systemd states such as "READY=1" or "WATCHDOG=1" in one message. This never waits for
    systemd: a message for which its socket has no room is sent with the next one.
    """
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]  # an abstract socket
    kind = states[0].partition("=")[0]
    _unsent.pop(kind, None)
    _unsent[kind] = "\n".join(states)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.setblocking(False)
        try:
            sock.connect(address)
            for kind, message in list(_unsent.items()):
                sock.send(message.encode())
                del _unsent[kind]
        except BlockingIOError:
            pass
        except OSError:
            _unsent.clear()


def notify_reloading() -> None:
    """Report that the settings are being reloaded, with the time, as systemd requires; READY=1 ends
    it.
    """
    notify("RELOADING=1", f"MONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")


def is_service() -> bool:
    """Return whether systemd has started this process as a service with notifications."""
    return bool(os.environ.get("NOTIFY_SOCKET"))


def is_journal() -> bool:
    """Return whether standard error goes to journald: systemd.exec(5) on $JOURNAL_STREAM."""
    try:
        there = os.fstat(sys.stderr.fileno())
    except (OSError, ValueError, AttributeError):  # None if it was closed before the start
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{there.st_dev}:{there.st_ino}"
