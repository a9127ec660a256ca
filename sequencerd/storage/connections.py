"""Open connections and pools, and borrow connections: one that does not answer is closed."""

from __future__ import annotations

import asyncio
import errno
import os
import re
import socket
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

import asyncpg

from sequencerd.core.enrollment import NEVER
from sequencerd.core.routing import ShardNumber
from sequencerd.errors import DatabaseError, SettingsError
from sequencerd.settings import SCHEMA
from sequencerd.storage import conninfo
from sequencerd.storage.database_errors import TRANSIENT_ERRORS, with_hint
from sequencerd.storage.schemas import connection_class
from sequencerd.storage.statements import QUERIES, affected

CONNECT_TIMEOUT = 10.0  # seconds
_SETTINGS = {"standard_conforming_strings": "on"}
"""Settings of all sessions, without which our functions would read their own texts differently."""
_NOTIFY = "sequencer.notify"
COMMAND_TIMEOUT = 30.0  # seconds; a connection that died silently must not block the engine
WRITE_SIZE = 5000  # rows, which even a slow server writes in much less than that time


class Shard(NamedTuple):
    """The location of the tables: the URL of a database, and a schema in it. Without [shards] in
    the settings, there is one shard without a name and a number.
    """

    url: str
    schema: str = SCHEMA
    name: str | None = None
    number: ShardNumber | None = None


def open_connection(
    shard: Shard, *, name: str, timeout: float, **options: Any
) -> Awaitable[asyncpg.Connection]:
    """Open a connection, with asyncpg's options. Raises SettingsError, and asyncpg's errors."""
    opening: Awaitable[asyncpg.Connection]
    opening = asyncpg.connect(**_arguments(shard, name, timeout), **options)
    return opening


def open_pool(
    shard: Shard,
    *,
    name: str,
    timeout: float,
    settings: Mapping[str, str] | None = None,
    **options: Any,
) -> asyncpg.Pool:
    """Return a pool of connections, to be awaited or entered, with asyncpg's options. `settings`
    are those of its sessions. Raises SettingsError.
    """
    return asyncpg.create_pool(**_arguments(shard, name, timeout, settings), **options)


def _arguments(
    shard: Shard, name: str, timeout: float, settings: Mapping[str, str] | None = None
) -> dict[str, Any]:
    made = conninfo.arguments(
        shard.url, name=name, timeout=timeout, settings={**_SETTINGS, **(settings or {})}
    )
    return made | {"connection_class": connection_class(shard.schema)}


async def connect(shard: Shard, *, seconds: float | None = None) -> asyncpg.Connection:
    """Open a connection for a command, with a limit in seconds for each statement. Raises
    DatabaseError, which does not contain the password.
    """
    try:
        connection = await open_connection(
            shard,
            name="sequencerd",
            timeout=CONNECT_TIMEOUT,
            command_timeout=seconds,
            statement_cache_size=0,  # the URL may be that of a pooler
        )
    except (OSError, asyncpg.PostgresError, TimeoutError) as error:
        raise DatabaseError(f"cannot connect to the database: {explain(error, shard)}") from error
    except (ValueError, asyncpg.InterfaceError) as error:
        reason = str(error).partition("\n")[0]
        raise SettingsError(f"wrong setting of the database: {reason}") from error
    await read_all_times(connection)
    return connection


@asynccontextmanager
async def connected(
    shard: Shard, *, seconds: float | None = None
) -> AsyncIterator[asyncpg.Connection]:
    """Open a connection like `connect`, and close it at the end of the context."""
    connection = await connect(shard, seconds=seconds)
    try:
        yield connection
    finally:
        await connection.close()


async def read_all_times(connection: asyncpg.Connection) -> None:
    """Read times that Python does not have, such as the year 294276, as the first or the last one.
    The owner of the schema may write such times to columns without constraints, and one of them
    must not hide all other rows. For connections whose rows users read: it takes time.
    """
    await connection.set_type_codec(
        "timestamptz", schema="pg_catalog", encoder=_write_time, decoder=_read_time, format="tuple"
    )


_POSTGRES_EPOCH = datetime(2000, 1, 1, tzinfo=UTC)
_FIRST = datetime.min.replace(tzinfo=UTC)
_INFINITY, _MINUS_INFINITY = 2**63 - 1, -(2**63)


def _read_time(microseconds: tuple[int]) -> datetime:
    try:
        return _POSTGRES_EPOCH + timedelta(microseconds=microseconds[0])
    except OverflowError:
        return NEVER if microseconds[0] > 0 else _FIRST


def _write_time(at: datetime) -> tuple[int]:
    if at == NEVER:
        return (_INFINITY,)
    if at == _FIRST:
        return (_MINUS_INFINITY,)
    return ((at - _POSTGRES_EPOCH) // timedelta(microseconds=1),)


def explain(error: BaseException, shard: Shard) -> str:
    """Return why a connection could not be made."""
    if isinstance(error, socket.gaierror):
        hosts = conninfo.arguments(shard.url, name="", timeout=0)["host"]
        return f"{', '.join(hosts)}: {error.strerror}"
    if isinstance(error, asyncpg.PostgresError):
        return "; ".join(filter(None, (with_hint(error), advice_on_pooler(error))))
    # asyncio has one error for all addresses of a name, which has their numbers in its text only
    found = re.match(r"(?:Multiple exceptions: )?\[Errno (\d+)\]", str(error))
    if found and int(found[1]) in _NO_SERVER:
        setting = "SEQUENCERD_DATABASE, --database or database.url"
        if shard.name is not None:
            setting = f"shards.{shard.name}.url"
        return (
            f"no server answers at {_places(shard)} ({os.strerror(int(found[1]))}): it may not be "
            f"running, or {setting} should name another one"
        )
    return str(error) or f"no answer within {CONNECT_TIMEOUT:g} seconds"


_NO_SERVER = frozenset(
    {
        *(errno.ECONNREFUSED, errno.ENOENT, errno.ETIMEDOUT),
        *(errno.EHOSTUNREACH, errno.EHOSTDOWN, errno.ENETUNREACH),
    }
)


def _places(shard: Shard) -> str:
    """Return where the servers of a shard are looked for."""
    made = conninfo.arguments(shard.url, name="", timeout=0)
    hosts = made.get("host", ["localhost"])  # asyncpg's last, after the folders of sockets
    ports = made.get("port", 5432)
    return " or ".join(
        f"{host}/.s.PGSQL.{port}" if host.startswith("/") else f"{host}, port {port}"
        for host, port in zip(
            hosts, ports if isinstance(ports, list) else [ports] * len(hosts), strict=True
        )
    )


def advice_on_pooler(error: asyncpg.PostgresError) -> str | None:
    """Return what to do if a pooler has rejected a setting of the daemon's sessions."""
    if not str(error).endswith(f"startup parameter: {_NOTIFY}"):
        return None
    return (
        "for a pool in transaction mode, set database.listen_url to the server's own address, or "
        f"listen = false; for one in session mode, set ignore_startup_parameters = {_NOTIFY} in "
        "PgBouncer's settings"
    )


async def connect_pool(
    shard: Shard,
    size: int,
    *,
    pooled: bool = False,
    least: int = 1,
    runs_others: bool = False,
) -> asyncpg.Pool:
    """Open connections for the daemon, whose writes send no notifications.

    With `pooled`, for a pooler, nothing is kept from one transaction to the next: no prepared
    statements, and no settings, so writes do send notifications. `least` connections are opened
    immediately. A session is reset after each use only if it `runs_others`, functions of
    applications, which may change it: our own statements do not, and a reset takes a round trip.
    """
    notify = {} if pooled else {_NOTIFY: "off"}
    options: dict[str, Any] = {} if runs_others else {"reset": _keep}
    if pooled:
        options |= {"statement_cache_size": 0}
    else:
        # statements live as long as the connection: a lone timer must not wait for them
        options |= {"max_cached_statement_lifetime": 0, "init": _prepare_session}
    return await open_pool(
        shard,
        name="sequencerd",
        timeout=CONNECT_TIMEOUT,
        settings=notify,
        min_size=least,
        max_size=size,
        command_timeout=COMMAND_TIMEOUT,
        **options,
    )


async def _prepare_session(connection: asyncpg.Connection) -> None:
    """Set what the daemon needs, whatever the defaults of the database and the user are. These are
    statements, as a pooler in session mode rejects settings that it does not know.

    The server ends what waits for a lock on behalf of a connection that was closed, as after
    COMMAND_TIMEOUT: repeated for as long as a table is locked, it would use up the server's
    connections.
    """
    await connection.execute(QUERIES["prepare_session"])
    with suppress(asyncpg.PostgresError):  # a server on Windows cannot do it
        await connection.execute(QUERIES["check_client"])


async def close_pool(pool: asyncpg.Pool, seconds: float) -> None:
    """Close a pool when its connections have been given back; terminate them after some seconds."""
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await pool.close()
    pool.terminate()


async def _keep(_: object) -> None:
    """Leave a session as it is; asyncpg has rolled back an open transaction."""


@asynccontextmanager
async def borrow(pool: asyncpg.Pool) -> AsyncIterator[asyncpg.Connection]:
    """Borrow a connection. One that does not answer is closed.

    A cancellation remains one even if the ROLLBACK after it fails; otherwise a task that repeats
    its work after database errors could not be cancelled.
    """
    waiting, ours = _waiting.setdefault(pool, {}), object()
    waiting[ours] = time.monotonic()
    try:
        async with pool.acquire() as acquired:
            _end_wait(pool, ours)
            with _closed_when_dead(acquired):
                yield acquired
    except TRANSIENT_ERRORS as error:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise asyncio.CancelledError from error
        raise
    finally:
        _end_wait(pool, ours)


_waiting: dict[asyncpg.Pool, dict[object, float]] = {}
"""Since when tasks wait for a connection, for pools that any task waits for."""


def _end_wait(pool: asyncpg.Pool, ours: object) -> None:
    if (waiting := _waiting.get(pool)) is not None:
        waiting.pop(ours, None)
        if not waiting:
            del _waiting[pool]


def longest_wait(pool: asyncpg.Pool) -> float:
    """Return for how many seconds a task has been waiting for a connection. Can be called from any
    thread.
    """
    since = list(_waiting.get(pool, {}).values())
    return time.monotonic() - min(since) if since else 0.0


@asynccontextmanager
async def transaction(on: asyncpg.Connection, **options: Any) -> AsyncIterator[asyncpg.Connection]:
    """Open a transaction. A connection that does not answer is closed, without a ROLLBACK."""
    if not on.is_in_transaction():
        options = {"isolation": "read_committed"} | options
    async with on.transaction(**options):
        with _closed_when_dead(on):
            yield on


@asynccontextmanager
async def counting(on: asyncpg.Connection, **options: Any) -> AsyncIterator[asyncpg.Connection]:
    """Open a read-only transaction for statements that read many rows."""
    async with transaction(on, readonly=True, **options):
        await on.execute(QUERIES["without_jit"])
        yield on


async def batches(
    on: asyncpg.Connection, name: str, statement: str, *parameters: object, size: int
) -> AsyncGenerator[list[asyncpg.Record], None]:
    """Read the rows of a statement in batches, in the present transaction, by a cursor of a name
    that belongs to the statement.

    A cursor of asyncpg has a prepared statement with a name, which a pooler in transaction mode
    leaves in the session for the next client, whose names are the same.
    """
    await on.execute(f"DECLARE {name} NO SCROLL CURSOR FOR {statement}", *parameters)
    while rows := await on.fetch(f"FETCH {size:d} FROM {name}"):
        yield rows
    await on.execute(f"CLOSE {name}")


async def write_in_batches(connection: asyncpg.Connection, name: str, *parameters: object) -> int:
    """Repeat a statement of QUERIES, whose last parameter is the number of rows that it may write,
    until there are no more. Return how many were written.

    Of a million rows at once, none would be written if that takes longer than COMMAND_TIMEOUT, and
    other sessions would wait for all of them.
    """
    written, count = 0, WRITE_SIZE
    while count == WRITE_SIZE:
        count = affected(await connection.execute(QUERIES[name], *parameters, WRITE_SIZE))
        written += count
    return written


@asynccontextmanager
async def reading(pool: asyncpg.Pool, **options: Any) -> AsyncIterator[asyncpg.Connection]:
    """Borrow a connection, in a read-only transaction."""
    async with borrow(pool) as acquired, transaction(acquired, readonly=True, **options):
        yield acquired


async def read(
    pool: asyncpg.Pool, query: str, *arguments: object, seconds: float | None = None
) -> list[asyncpg.Record]:
    """Return the rows of a statement in QUERIES, in a read-only transaction with a time limit."""
    async with reading(pool) as connection:
        rows: list[asyncpg.Record] = await connection.fetch(
            QUERIES[query], *arguments, timeout=seconds
        )
        return rows


@contextmanager
def _closed_when_dead(used: asyncpg.Connection) -> Iterator[None]:
    try:
        yield
    except TimeoutError:
        used.terminate()
        raise
