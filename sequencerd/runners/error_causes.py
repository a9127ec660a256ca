"""Finds what an error was raised from, and whether this machine has run out of something."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator

EXHAUSTED = frozenset(
    {
        errno.EMFILE,
        errno.ENFILE,
        errno.ENOMEM,
        errno.ENOBUFS,
        errno.EADDRNOTAVAIL,  # no local port is free
        socket.EAI_MEMORY,
    }
)


def causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an error, what it was raised from, and so on; of several attempts, those of each. The
    last one is the root cause.

    The context of an error is not its cause: it may be anything that was being handled. httpcore
    passes the cause of an error as an argument only.
    """
    seen: list[BaseException] = []
    below: list[object] = [error]
    while below:
        one = below.pop(0)
        if isinstance(one, BaseException) and not any(one is other for other in seen):
            seen.append(one)
            yield one
            below += one.exceptions if isinstance(one, BaseExceptionGroup) else ()
            below += [one.__cause__, *one.args]


def is_exhausted(error: BaseException) -> bool:
    """Return whether this machine lacks descriptors, memory or ports: no message's fault."""
    return any(
        isinstance(one, MemoryError) or (isinstance(one, OSError) and one.errno in EXHAUSTED)
        for one in causes(error)
    )
