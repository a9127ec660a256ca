"""Permits for calls of a runner, at a rate that all daemons share."""

from __future__ import annotations

import asyncpg

from sequencerd.storage.statements import QUERIES


async def take(
    connection: asyncpg.Connection, runner: str, per_second: float, count: int
) -> tuple[float, float]:
    """Take permits. Return the time of the first one and the current time, in seconds."""
    row = await connection.fetchrow(QUERIES["take_permits"], runner, per_second, count / per_second)
    return row["first"], row["present"]
