"""The row of a daemon, the problems that it reports, and the locks that only one daemon holds."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Rows
from datetime import datetime, timedelta
from enum import Enum

import asyncpg

from sequencerd.storage.statements import QUERIES

PROBLEM_COLUMNS = 7  # of sequencer.problems, besides the daemon


async def beat(
    connection: asyncpg.Connection,
    daemon: str,
    started_at: datetime | None,
    lease: timedelta,
    types: Iterable[str],
) -> datetime:
    """Extend the time for which a daemon is alive by the duration of a lease. Return when it
    started.
    """
    since: datetime = await connection.fetchval(
        QUERIES["beat"], daemon, started_at, lease, sorted(types)
    )
    return since


async def types_elsewhere(connection: asyncpg.Connection, daemon: str) -> frozenset[str]:
    """Read the step types that other living daemons serve."""
    return frozenset(row[0] for row in await connection.fetch(QUERIES["types_elsewhere"], daemon))


async def remove_dead_daemons(connection: asyncpg.Connection, daemon: str) -> None:
    """Remove daemons that have sent no heartbeat for too long, while this one is alive."""
    await connection.execute(QUERIES["remove_dead_daemons"], daemon)


async def remove_daemon(connection: asyncpg.Connection, daemon: str) -> None:
    """Remove a daemon that ends."""
    await connection.execute(QUERIES["remove_daemon"], daemon)


async def write_problems(
    connection: asyncpg.Connection, daemon: str, problems: Rows[tuple[object, ...]]
) -> None:
    """Replace the problems that a daemon reports, given in the order of the columns."""
    columns = list(zip(*problems, strict=True)) or [()] * PROBLEM_COLUMNS
    await connection.execute(QUERIES["remove_problems"], daemon, *columns[:2])
    if problems:
        await connection.execute(QUERIES["write_problems"], daemon, *columns)


class NotifyLock(Enum):
    """Who holds the notify lock, as the statement answers."""

    OURS = True
    ANOTHERS = False
    NOBODYS = None
    """Transactions in progress that have skipped their notification keep daemons from it."""


async def acquire_notify_lock(connection: asyncpg.Connection) -> NotifyLock:
    """Try to acquire the notify lock, for as long as the connection lasts. Return who holds it."""
    return NotifyLock(await connection.fetchval(QUERIES["acquire_notify_lock"]))


async def release_notify_lock(connection: asyncpg.Connection) -> None:
    """Release the notify lock, and notify the other daemons."""
    await connection.execute(QUERIES["release_notify_lock"])


async def acquire_requests_lock(connection: asyncpg.Connection) -> bool:
    """Try to become the daemon that handles requests, for as long as the connection lasts."""
    is_ours: bool = await connection.fetchval(QUERIES["acquire_requests_lock"])
    return is_ours
