"""Sessions of PostgreSQL that outlive a test.

A new session knows nothing of tables and functions: to read their definitions takes most of the
server's time in a test. So the session of a closed connection is kept for a later test that is
given the same database, and has forgotten what its user has set. Within a test, each connection
still begins a session that no other one has used.
"""

from __future__ import annotations

import asyncio
import os
import select
import socket
import struct
from contextlib import suppress
from typing import Any, NamedTuple

import asyncpg
from asyncpg import connect_utils, protocol

FORGET = """
    SELECT pg_advisory_unlock_all(), pg_stat_force_next_flush(); RESET SESSION AUTHORIZATION;
    RESET ROLE; CLOSE ALL; UNLISTEN *; RESET ALL; DEALLOCATE ALL; DISCARD TEMP; DISCARD SEQUENCES
"""
"""What a pooler executes, and a report of the changed rows to the statistics, as at the end of a
session.
"""
MAX_KEPT = 6  # of a kind
PARAMETERS = (
    *("client_encoding", "server_encoding", "server_version", "TimeZone", "DateStyle"),
    *("IntervalStyle", "integer_datetimes", "standard_conforming_strings", "is_superuser"),
    *("session_authorization", "application_name", "in_hot_standby", "search_path"),
    *("default_transaction_read_only", "scram_iterations"),
)  # that the server reports when a session begins

_Kind = tuple[str, frozenset[tuple[str, str]]]
"""The server and the settings of a session."""


class _Session(NamedTuple):
    kind: _Kind
    socket: socket.socket
    process: int
    greeting: bytes  # with which the server would begin it


class Sessions:
    """The sessions of a user in a database: those for this test, and those that it has closed."""

    def __init__(self) -> None:
        self._usable: list[_Session] = []
        self._closed: list[_Session] = []

    @property
    def processes(self) -> list[int]:
        """The server's processes of the sessions that no connection uses."""
        return [session.process for session in (*self._usable, *self._closed)]

    def next_test(self) -> None:
        """Let the next test use the sessions that this one has closed."""
        self._usable += self._closed
        self._closed.clear()

    def end(self) -> None:
        for session in (*self._usable, *self._closed):
            session.socket.close()

    def take(self, kind: _Kind) -> _Session | None:
        """Return a session, unless there is none, or the server has ended it."""
        for session in self._usable:
            if session.kind == kind:
                self._usable.remove(session)
                if not select.select([session.socket], [], [], 0)[0]:
                    return session
                session.socket.close()
                return None
        return None

    def has_room(self, kind: _Kind) -> bool:
        kinds = [session.kind for session in (*self._usable, *self._closed)]
        return kinds.count(kind) < MAX_KEPT

    async def add(self, kind: _Kind, connection: asyncpg.Connection) -> None:
        """Keep the session of a connection, which is closed without a message to the server."""
        transport, settings = connection._transport, connection.get_settings()
        process, secret = connection.get_server_pid(), connection._protocol.backend_secret
        parameters = [(name, getattr(settings, name, None)) for name in PARAMETERS]
        greeting = (
            _message(b"R", struct.pack("!i", 0)),
            *(_message(b"S", f"{name}\0{value}\0".encode()) for name, value in parameters if value),
            _message(b"K", struct.pack("!ii", process, secret)),
            _message(b"Z", b"I"),
        )
        own = socket.socket(fileno=os.dup(transport.get_extra_info("socket").fileno()))
        self._closed.append(_Session(kind, own, process, b"".join(greeting)))
        transport.abort()
        while not connection.is_closed():  # noqa: ASYNC110 - in the loop's next turn
            await asyncio.sleep(0)


def _message(kind: bytes, content: bytes) -> bytes:
    return kind + struct.pack("!i", len(content) + 4) + content


kept: dict[tuple[str, str | None], Sessions] = {}
"""By the database and the user. No other sessions are kept."""


def keep() -> None:
    """Let connections keep their sessions, and use those that are kept."""
    connect, close = connect_utils._connect_addr, asyncpg.Connection.close

    def place(server: Any, parameters: Any) -> tuple[Sessions | None, _Kind]:
        settings = frozenset((parameters.server_settings or {}).items())
        sessions = kept.get((parameters.database, parameters.user))
        return sessions if isinstance(server, str) else None, (server, settings)

    async def connect_or_use(**given: Any) -> asyncpg.Connection:
        sessions, kind = place(given["addr"], given["params"])
        session = sessions.take(kind) if sessions else None
        return await (_connect(session, **given) if session else connect(**given))

    async def close_or_keep(self: asyncpg.Connection, **limit: float | None) -> None:
        if not self.is_closed() and not self.is_in_transaction():
            sessions, kind = place(self._addr, self._params)
            if sessions and sessions.has_room(kind):
                with suppress(asyncpg.PostgresError, asyncpg.InterfaceError, OSError):
                    await self.execute(FORGET, **limit)
                    await sessions.add(kind, self)
                    return
        await close(self, **limit)

    connect_utils._connect_addr = connect_or_use
    asyncpg.Connection.close = close_or_keep


class _Begun:
    """A transport that does not write the first message, which would begin the session."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport

    def write(self, _: object) -> None:
        vars(self)["write"] = self._transport.write

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


async def _connect(
    session: _Session,
    *,
    addr: str,
    loop: asyncio.AbstractEventLoop,
    params: Any,
    config: Any,
    connection_class: type[asyncpg.Connection],
    record_class: type[asyncpg.Record],
) -> asyncpg.Connection:
    """Connect to a session that has begun already."""
    transport, _ = await loop.create_unix_connection(asyncio.Protocol, sock=session.socket)
    begun = loop.create_future()
    made = protocol.Protocol(addr, begun, params, record_class, loop)
    made.connection_made(_Begun(transport))
    made.data_received(session.greeting)
    transport.set_protocol(made)
    await begun
    connection = connection_class(made, transport, loop, addr, config, params)
    made.set_connection(connection)
    return connection
