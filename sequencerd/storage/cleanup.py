"""Delete what is older than its retention."""

from __future__ import annotations

from datetime import UTC, datetime

import asyncpg

from sequencerd.storage.statements import QUERIES

CleanupStart = tuple[str, datetime]
"""Where a batch of ended enrollments starts: a sequence, and a time."""
FIRST_START: CleanupStart = ("", datetime(1, 1, 1, tzinfo=UTC))


async def try_lock_retention(connection: asyncpg.Connection) -> bool:
    """Try to become the only daemon that runs retention, until the end of the transaction."""
    is_alone: bool = await connection.fetchval(QUERIES["try_lock_retention"])
    return is_alone


async def add_event_partitions(connection: asyncpg.Connection) -> None:
    """Create the partitions of the history that are needed soon."""
    await connection.execute(QUERIES["add_event_partitions"])


async def drop_event_partition(connection: asyncpg.Connection, before: datetime) -> str | None:
    """Drop the oldest partition of the history if all of it is old enough. Return its name."""
    name: str | None = await connection.fetchval(QUERIES["drop_event_partition"], before)
    return name


async def delete_ended(
    connection: asyncpg.Connection, before: datetime, limit: int, start: CleanupStart
) -> tuple[int, CleanupStart]:
    """Delete a batch of the enrollments that ended before a time. Return how many, and where the
    next batch starts.
    """
    query = QUERIES["delete_ended"]
    count, *ended = await connection.fetchrow(query, before, limit, *start)
    return count, (ended[0], ended[1])
