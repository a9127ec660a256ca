"""How enrollments affect others: they enter sequences, and cancel enrollments there."""

from __future__ import annotations

import json
from collections.abc import Mapping
from collections.abc import Sequence as Rows
from datetime import datetime

import asyncpg

from sequencerd.core.enrollment import StepKey
from sequencerd.core.model import Entry
from sequencerd.storage.statements import QUERIES


async def refusals(
    connection: asyncpg.Connection, entered: Rows[tuple[int | None, str, str]]
) -> list[tuple[str, str | None, int] | None]:
    """Return, for each entry (id of the enrollment that jumps, subject, sequence), the reentry
    policy, the code of a refusal, and the revision. None if the sequence does not exist.
    """
    rows = await connection.fetch(QUERIES["refusals"], *map(list, zip(*entered, strict=True)))
    return [row["reentry"] and (row["reentry"], row["refusal"], row["revision"]) for row in rows]


async def lock_cancelled(
    connection: asyncpg.Connection, wanted: Rows[tuple[int, str, str]]
) -> list[tuple[int, int | None]]:
    """Lock enrollments to be cancelled (given by id of the cancelling enrollment, subject,
    sequence). Return for each locked one the index in `wanted` and its id, or None if another
    session has locked it.
    """
    rows = await connection.fetch(QUERIES["lock_cancelled"], *map(list, zip(*wanted, strict=True)))
    return [(row["number"] - 1, row["locked"]) for row in rows]


async def cancel(
    connection: asyncpg.Connection, messages: Mapping[int, str], now: datetime
) -> None:
    """Cancel locked enrollments, with a message for the history of each."""
    query = QUERIES["cancel_others"]
    await connection.execute(query, list(messages), list(messages.values()), now)


async def limit_waits(connection: asyncpg.Connection) -> None:
    """Wait only briefly for an application that enrolls the same subjects: it may wait for what
    this transaction has locked.
    """
    await connection.execute(QUERIES["limit_waits"])


async def enter(connection: asyncpg.Connection, entries: Rows[Entry]) -> set[StepKey]:
    """Enroll subjects, and return where they begin. Raises ValueError if one was enrolled after the
    check.
    """
    rows = await connection.fetch(
        QUERIES["enter"],
        [entry.sequence for entry in entries],
        [entry.subject for entry in entries],
        [entry.data for entry in entries],
        [entry.timezone for entry in entries],
        [json.dumps(entry.executed) for entry in entries],
    )
    if len(rows) < len(entries):
        raise ValueError("a subject has been enrolled meanwhile")
    return {(row["sequence"], row["step"]) for row in rows}
