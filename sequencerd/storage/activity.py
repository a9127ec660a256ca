"""Counts the history by hour, for what it looks like over time."""

from __future__ import annotations

from datetime import datetime, timedelta

import asyncpg

from sequencerd.storage.statements import QUERIES

PASSES = (timedelta(minutes=10), timedelta(hours=25))
"""How long after its end an hour is counted. A daemon records events of the last day only, so the
second count has what was committed late.
"""

FURTHEST = timedelta(days=92)  # in the past, when counting begins
SPAN = timedelta(days=1)  # that is counted in one transaction while catching up
HOUR = timedelta(hours=1)


async def count(connection: asyncpg.Connection, now: datetime) -> bool:
    """Count hours that are to be counted, at most a day. Return whether there were any."""
    rows = await connection.fetch(QUERIES["activity_progress"])
    if [row["after"] for row in rows] != list(PASSES):
        await connection.execute(QUERIES["begin_activity"], list(PASSES), now, FURTHEST)
        rows = await connection.fetch(QUERIES["activity_progress"])
    for after, since in rows:
        until = min(_hour(now - after), since + SPAN)
        if since < until:
            await connection.execute(QUERIES["count_activity"], since, until)
            await connection.execute(QUERIES["note_activity"], after, until)
            return True
    return False


async def counted_until(connection: asyncpg.Connection) -> datetime | None:
    """Return up to when the history has been counted; None if it never was."""
    rows = await connection.fetch(QUERIES["activity_progress"])
    return max((row["until"] for row in rows), default=None)


async def prune(connection: asyncpg.Connection, before: datetime) -> None:
    """Delete the counts of older hours."""
    await connection.execute(QUERIES["prune_activity"], before)


def _hour(time: datetime) -> datetime:
    return time.replace(minute=0, second=0, microsecond=0)
