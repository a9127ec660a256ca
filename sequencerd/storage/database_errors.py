"""Classify database errors: transient, a lost connection, or the data of a row."""

from __future__ import annotations

import asyncpg

TRANSIENT_ERRORS = (
    OSError,
    TimeoutError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,  # a connection that was cut in the middle of an answer
    asyncpg.PostgresError,
)
"""Errors after which the same work is repeated a little later. If an error concerns only one row,
or is caused by its data, the row is isolated first.
"""

LOST_ERRORS = (
    OSError,
    TimeoutError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
    asyncpg.PostgresConnectionError,
    asyncpg.AdminShutdownError,
    asyncpg.CrashShutdownError,
    asyncpg.CannotConnectNowError,
)
"""Errors of a lost connection: whether it has committed is unknown."""

READ_ONLY = "the database is read-only: it is a standby, or default_transaction_read_only is on"

_DATA = frozenset({"21", "22", "23", "54"})
_ENVIRONMENT = frozenset({"08", "25", "28", "40", "53", "55", "57", "58"})
_PLAIN = _ENVIRONMENT | {"0A", "26", "3D", "3F", "42", "XX"}


def is_data_error(error: BaseException) -> bool:
    """Return whether the database, or the driver, rejects a row's own data."""
    if isinstance(error, asyncpg.PostgresError):
        return _class(error) in _DATA
    return isinstance(error, (ValueError, OverflowError))


def is_lost(error: BaseException) -> bool:
    """Return whether the connection is lost. The server can report the same codes as an error of a
    statement: of a trigger that writes to another server, for example.
    """
    return isinstance(error, LOST_ERRORS) and getattr(error, "severity_en", None) != "ERROR"


def is_environment(error: BaseException) -> bool:
    """Return whether the cause of an error is a lock, a timeout, a resource or a connection."""
    if isinstance(error, asyncpg.PostgresError):
        return _class(error) in _ENVIRONMENT
    return isinstance(error, (*LOST_ERRORS, MemoryError)) and not is_data_error(error)


def _class(error: asyncpg.PostgresError) -> str:
    # a full queue of notifications has the code of rows that are too large
    if getattr(error, "server_source_function", None) == "PreCommit_Notify":
        return "53"
    return (error.sqlstate or "")[:2]


def brief(error: BaseException) -> str:
    """Describe a database error for the log, without values that it quotes from rows."""
    name = type(error).__name__
    if isinstance(error, asyncpg.ReadOnlySQLTransactionError):
        return READ_ONLY
    if isinstance(error, asyncpg.PostgresError):
        is_plain = _class(error) in _PLAIN
    else:
        is_plain = is_environment(error)
    if is_plain:
        return str(error).partition("\n")[0] or name
    return f"{name} {getattr(error, 'sqlstate', '')}".rstrip()


def with_hint(error: asyncpg.PostgresError) -> str:
    """Return the database's error, with its hint."""
    hint = getattr(error, "hint", None)
    return f"{error.args[0]}; {' '.join(hint.split())}" if hint else str(error.args[0])
