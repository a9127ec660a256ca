"""Enrollments that have yet to be evaluated because a definition or data elsewhere have changed."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Rows
from datetime import datetime

import asyncpg

from sequencerd.core.enrollment import StepKey
from sequencerd.storage.statements import QUERIES, columns


async def request_evaluation(
    connection: asyncpg.Connection, step_keys: Iterable[StepKey]
) -> list[StepKey]:
    """Request the evaluation of all enrollments that wait at steps. Return the steps that were not
    locked.
    """
    sequences, steps = columns(step_keys)
    rows = await connection.fetch(QUERIES["request_evaluation"], sequences, steps)
    return [(row["sequence"], row["name"]) for row in rows]


async def waiting_of_subjects(
    connection: asyncpg.Connection, subjects: Rows[str], after: int, now: datetime, limit: int
) -> list[asyncpg.Record]:
    """Read id, subject, sequence and step of the waiting enrollments of subjects, after an id."""
    query = QUERIES["waiting_of_subjects"]
    rows: list[asyncpg.Record] = await connection.fetch(query, subjects, after, now, limit)
    return rows


async def unfinished_rescheduling(connection: asyncpg.Connection) -> dict[StepKey, int]:
    """Read the steps with enrollments that have yet to be evaluated, with the first such id."""
    rows = await connection.fetch(QUERIES["unfinished_rescheduling"])
    return {(row["sequence"], row["name"]): row["reschedule_from"] for row in rows}


async def rescheduling_from(connection: asyncpg.Connection, step_key: StepKey) -> int | None:
    """Read the id from which on enrollments at a step have yet to be evaluated; None if there are
    none.
    """
    since: int | None = await connection.fetchval(QUERIES["rescheduling_from"], *step_key)
    return since


async def active_ids(
    connection: asyncpg.Connection, step_key: StepKey, since: int, limit: int
) -> list[int]:
    """Read the ids of the enrollments at a step, in order, from one on."""
    rows = await connection.fetch(QUERIES["active_ids"], *step_key, since, limit)
    return [row["id"] for row in rows]


async def lock_rescheduling(
    connection: asyncpg.Connection, step_key: StepKey, since: int, revision: int
) -> bool:
    """Lock a step, so that this daemon alone evaluates it until the end of the transaction.

    Return False if another daemon has locked it, or the definition is not the known one.
    """
    query = QUERIES["lock_rescheduling"]
    return await connection.fetchval(query, *step_key, since, revision) is not None


async def record_progress(connection: asyncpg.Connection, step_key: StepKey, until: int) -> None:
    """Record the id up to which a step is done."""
    await connection.execute(QUERIES["record_progress"], *step_key, until)


async def finish_rescheduling(
    connection: asyncpg.Connection, step_key: StepKey, since: int
) -> bool | None:
    """Record that a step is done. Return whether to do it again; None if another daemon did it."""
    again: bool | None = await connection.fetchval(QUERIES["finish_rescheduling"], *step_key, since)
    return again


async def new_transaction(connection: asyncpg.Connection) -> int | None:
    """Draw a number greater than those of all transactions that have written until now.

    None where the numbers of several servers cannot be compared.
    """
    number: int | None = await connection.fetchval(QUERIES["new_transaction"])
    return number


async def oldest_transaction(connection: asyncpg.Connection) -> int:
    """Read the number of the oldest transaction in progress that has written."""
    number: int = await connection.fetchval(QUERIES["oldest_transaction"])
    return number
