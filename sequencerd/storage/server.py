"""Query the state of the server: its clock, whether it is a standby, what it hides or refuses."""

from __future__ import annotations

from datetime import datetime
from typing import NamedTuple

import asyncpg

from sequencerd.storage.statements import QUERIES

PROBE_TIMEOUT = 5.0  # seconds


class HiddenTable(NamedTuple):
    """A table from which row-level security hides rows: all, or perhaps some."""

    table: str
    user: str
    hides_all: bool

    def __str__(self) -> str:
        return f"{'all' if self.hides_all else 'some'} of {self.table} from {self.user}"


async def hidden_tables(connection: asyncpg.Connection) -> list[HiddenTable]:
    """Find tables from which row-level security may hide rows, for this user or for triggers."""
    return [HiddenTable(*row) for row in await connection.fetch(QUERIES["row_security"])]


async def is_standby(connection: asyncpg.Connection) -> bool:
    """Return whether the server is a standby, until it is promoted."""
    found: bool = await connection.fetchval(QUERIES["is_standby"])
    return found


async def is_on_citus(connection: asyncpg.Connection) -> bool:
    """Return whether Citus has distributed the tables."""
    found: bool = await connection.fetchval(QUERIES["is_on_citus"])
    return found


async def identity(connection: asyncpg.Connection) -> tuple[object, ...]:
    """Return what differs where the daemon's memory may be that of another state of the database:
    on another server, or after a restore.
    """
    return tuple(await connection.fetchrow(QUERIES["server_identity"]))


async def server_time(connection: asyncpg.Connection) -> datetime:
    """Read the database's clock."""
    now: datetime = await connection.fetchval(QUERIES["server_time"])
    return now


async def probe(connection: asyncpg.Connection) -> None:
    """Raise the error that keeps all enrollments and events from being written."""
    await connection.execute(QUERIES["probe"], timeout=PROBE_TIMEOUT)
