"""Reads when steps are due, and notifies of due ones."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Rows
from datetime import datetime

import asyncpg

from sequencerd.core.model import StepKey
from sequencerd.storage.statements import QUERIES, columns


async def notify_due(connection: asyncpg.Connection, step_keys: Iterable[StepKey]) -> None:
    """Notify other daemons of due steps."""
    await connection.execute(QUERIES["notify_due"], *columns(step_keys))


async def first_wakes(connection: asyncpg.Connection) -> list[tuple[StepKey, datetime]]:
    """Read the earliest wake time of each step that has active enrollments."""
    rows = await connection.fetch(QUERIES["first_wakes"])
    return [((row["sequence"], row["step"]), row["wake_at"]) for row in rows]


async def count_due(
    connection: asyncpg.Connection, step_keys: Iterable[StepKey], now: datetime, limit: int
) -> list[tuple[str, str, int, int]]:
    """Count due and overdue enrollments of steps, up to a limit each."""
    sequences, steps = columns(step_keys)
    rows = await connection.fetch(QUERIES["count_due"], sequences, steps, now, limit)
    return [tuple(row) for row in rows]


async def next_wake(
    connection: asyncpg.Connection,
    step_key: StepKey,
    now: datetime,
    *,
    daemon: str,
    excluding: Rows[int],
) -> datetime | None:
    """Read when to claim at a step again, `excluding` some enrollments."""
    query = QUERIES["next_wake"]
    at: datetime | None = await connection.fetchval(query, *step_key, now, daemon, excluding)
    return at


async def occupied(connection: asyncpg.Connection) -> list[StepKey]:
    """Read the steps that have active enrollments."""
    rows = await connection.fetch(QUERIES["occupied"])
    return [(row["sequence"], row["step"]) for row in rows]
