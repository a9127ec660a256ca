"""Permits for calls of a runner at a rate that all daemons share."""

from __future__ import annotations

import asyncpg

from sequencerd.storage.statements import QUERIES


async def take(connection: asyncpg.Connection, runner: str, per_second: float, count: int) -> float:
    """Take permits. Return in how many seconds the first can be used; it may be a little late."""
    seconds: float = await connection.fetchval(
        QUERIES["take_permits"], runner, per_second, count / per_second
    )
    return seconds
