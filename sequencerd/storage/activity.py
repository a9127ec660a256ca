"""Count the history by hour, and record how late steps begin, for the pages about activity."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime, timedelta

import asyncpg

from sequencerd.core.enrollment import StepKey
from sequencerd.storage.statements import QUERIES, affected

COUNTING_DELAYS = (timedelta(minutes=10), timedelta(hours=25))
"""How long after its end an hour is counted. A daemon records only events of the last day, so the
second count includes what was committed late.
"""

MAX_PAST = timedelta(days=92)  # how far in the past counting begins
CATCH_UP_SPAN = timedelta(days=1)  # counted in one transaction while catching up
MINUTE = timedelta(minutes=1)
ON_TIME = timedelta(seconds=10)  # delay from which on a step begins late
MAX_LATENESS_ROWS = 10_000  # rows of lateness that one transaction sums up


async def count(connection: asyncpg.Connection, now: datetime) -> bool:
    """Count hours that have not been counted, at most a day. Return whether there were any."""
    rows = await _progress(connection, now)
    if len(rows) < len(COUNTING_DELAYS):
        await connection.execute(QUERIES["begin_activity"], list(COUNTING_DELAYS), now, MAX_PAST)
        rows = await _progress(connection, now)
    for after, since in rows:
        until = min(_hour(now - after), since + CATCH_UP_SPAN)
        if since < until:
            await connection.execute(QUERIES["count_activity"], since, until)
            await connection.execute(QUERIES["note_activity"], after, until)
            return True
    return False


async def counted_until(connection: asyncpg.Connection, now: datetime) -> datetime | None:
    """Return the time up to which the history has been counted; None if it never was."""
    return max((until for _, until in await _progress(connection, now)), default=None)


async def _progress(connection: asyncpg.Connection, now: datetime) -> list[asyncpg.Record]:
    rows: list[asyncpg.Record] = await connection.fetch(
        QUERIES["activity_progress"], list(COUNTING_DELAYS), now, MAX_PAST
    )
    return rows


def delays(due: Iterable[datetime], now: datetime) -> list[timedelta]:
    """Return how late those of enrollments that were `due` begin that are not on time."""
    limit = now - ON_TIME
    return [now - at for at in due if at < limit]


async def note_lateness(
    connection: asyncpg.Connection, due: Mapping[StepKey, Iterable[datetime]], now: datetime
) -> None:
    """Record how late enrollments begin that were `due` at steps, in the transaction that claims
    them, so that each counts once. This costs nothing while they are on time.
    """
    rows = [
        (
            *step_key,
            len(late),
            sum(delay > MINUTE for delay in late),
            sum(delay > 10 * MINUTE for delay in late),
            max(late).total_seconds(),
        )
        for step_key, at in due.items()
        if (late := delays(at, now))
    ]
    if rows:
        columns = map(list, zip(*rows, strict=True))
        await connection.execute(QUERIES["note_lateness"], now, *columns)


async def sum_lateness(connection: asyncpg.Connection, now: datetime) -> bool:
    """Sum up some of the lateness of past hours. Return whether there was any."""
    done = await connection.execute(QUERIES["sum_lateness"], _hour(now), MAX_LATENESS_ROWS)
    return affected(done) > 0


async def prune(connection: asyncpg.Connection, before: datetime) -> None:
    """Delete the counts of older hours."""
    await connection.execute(QUERIES["prune_activity"], before)
    await connection.execute(QUERIES["prune_lateness"], before)


def _hour(time: datetime) -> datetime:
    return time.replace(minute=0, second=0, microsecond=0)
