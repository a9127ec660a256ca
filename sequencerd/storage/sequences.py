"""Read definitions for the engine, and write the problems of steps."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Mapping
from collections.abc import Sequence as Rows
from contextlib import asynccontextmanager
from datetime import datetime

import asyncpg

from sequencerd.core.enrollment import StepKey
from sequencerd.storage.connections import transaction, write_in_batches
from sequencerd.storage.statements import QUERIES, columns


async def read_revisions(
    connection: asyncpg.Connection, names: Iterable[str] | None = None
) -> dict[str, int]:
    """Read the revisions of some sequences, or of all."""
    if names is None:
        rows = await connection.fetch(QUERIES["revisions"])
    else:
        rows = await connection.fetch(QUERIES["some_revisions"], list(names))
    return {row["name"]: row["revision"] for row in rows}


async def read_definitions(
    connection: asyncpg.Connection, names: Iterable[str]
) -> tuple[list[asyncpg.Record], list[asyncpg.Record]]:
    """Read some sequences and their steps, from one snapshot."""
    async with snapshot(connection):
        return await read_some(connection, list(names))


@asynccontextmanager
async def snapshot(connection: asyncpg.Connection) -> AsyncIterator[asyncpg.Connection]:
    """Open a transaction that reads from one snapshot. It may take minutes, as what it reads is
    compiled meanwhile, and locks nothing.
    """
    async with transaction(connection, isolation="repeatable_read", readonly=True):
        await connection.execute(QUERIES["allow_long_transaction"])
        yield connection


async def read_some(
    connection: asyncpg.Connection, names: Rows[str]
) -> tuple[list[asyncpg.Record], list[asyncpg.Record]]:
    """Read some sequences and their steps, in the caller's transaction."""
    if not names:
        return [], []
    return (
        await connection.fetch(QUERIES["sequences"], names),
        await connection.fetch(QUERIES["steps"], names),
    )


async def set_problems(
    connection: asyncpg.Connection, problems: Mapping[StepKey, str | None]
) -> None:
    """Write the problems of steps; None clears one."""
    await connection.execute(QUERIES["set_problems"], *columns(problems), list(problems.values()))


async def failed_steps(connection: asyncpg.Connection, names: Iterable[str]) -> list[StepKey]:
    """Find the steps, of these sequences and of those between them, with enrollments that failed
    because their step was invalid.
    """
    ordered = sorted(names)
    rows = await connection.fetch(QUERIES["failed_steps"], ordered[0], ordered[-1])
    return [(row["sequence"], row["step"]) for row in rows]


async def revive(connection: asyncpg.Connection, step_keys: Rows[StepKey], now: datetime) -> int:
    """Resume enrollments that failed at steps that are valid now. Return how many."""
    sequences, steps = columns(step_keys)
    return await write_in_batches(connection, "revive", sequences, steps, now)
