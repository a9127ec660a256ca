"""What an error was raised from, and whether this machine has run out of something."""

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
    """An error, what it was raised from, and so on; of several attempts, each one's. The last is
    what all began with.

    Not its context, which may be anything that was being handled meanwhile. httpcore gives what an
    error was raised from as an argument only.
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
    """Whether this machine lacks descriptors, memory or ports, which is no message's fault."""
    return any(
        isinstance(one, MemoryError) or (isinstance(one, OSError) and one.errno in EXHAUSTED)
        for one in causes(error)
    )
