"""Find the causes of an error, and whether this machine has run out of a resource."""

from __future__ import annotations

import errno
import re
import socket
import ssl
from collections.abc import Iterator

from sequencerd.core.task import OutageCause

EXHAUSTION_ERRORS = frozenset(
    {
        errno.EMFILE,
        errno.ENFILE,
        errno.ENOMEM,
        errno.ENOBUFS,
        errno.EADDRNOTAVAIL,  # no local port is free
        socket.EAI_MEMORY,
    }
)

TLS_END_ERRORS = (ssl.SSLEOFError, ssl.SSLZeroReturnError)
"""The server has closed a connection with TLS, properly or not."""

_ALERTS_OF_REFUSAL = re.compile(
    r"ALERT_(\w*CERTIFICATE\w*|UNKNOWN_CA|ACCESS_DENIED|HANDSHAKE_FAIL\w*)"
)


def causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an error, its cause, and so on; for several attempts, the causes of each. The last one
    is the root cause.

    An error's context is not its cause: any error may have been being handled. httpcore passes the
    cause of an error only as an argument.
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


def cause_of_no_connection(error: BaseException) -> OutageCause:
    """Return why there is no connection. A server whose certificate is not accepted, or that does
    not speak TLS, is there: someone must correct it, or a setting.
    """
    is_wrong = any(
        isinstance(one, ssl.SSLError) and not isinstance(one, TLS_END_ERRORS)
        for one in causes(error)
    )
    return "refused" if is_wrong else "unreachable"


def is_refused_client(error: BaseException) -> bool:
    """Return whether the server has refused this client with a TLS alert, for example because it
    demands a certificate. With TLS 1.3, the alert comes after the handshake, when a request may
    have been written; the server has not accepted it.
    """
    return any(
        isinstance(one, ssl.SSLError) and _ALERTS_OF_REFUSAL.search(one.reason or "") is not None
        for one in causes(error)
    )


def is_exhausted(error: BaseException) -> bool:
    """Return whether this machine has run out of descriptors, memory or ports: then no message is
    at fault.
    """
    return any(
        isinstance(one, MemoryError)
        or (isinstance(one, OSError) and one.errno in EXHAUSTION_ERRORS)
        for one in causes(error)
    )
