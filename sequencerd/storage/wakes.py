"""Read when steps are due, and notify other daemons of due steps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Rows
from datetime import datetime
from sys import intern
from typing import Any, NamedTuple

import asyncpg

from sequencerd.core.enrollment import NEVER, StepKey
from sequencerd.storage.statements import QUERIES, columns

STEPS_PER_SEARCH = 20_000
MAX_DUE = 10_000  # enrollments that are counted at each step
LAST_NAME = chr(0x10FFFF) * 51
FIRST_KEY, LAST_KEY = ("", ""), (LAST_NAME, "")
"""Keys before and after all step keys: names have 1 to 200 bytes."""


async def notify_due(
    connection: asyncpg.Connection, step_keys: Iterable[StepKey], since: datetime
) -> None:
    """Notify other daemons of due steps."""
    await connection.execute(QUERIES["notify_due"], *columns(step_keys), since)


async def first_wakes(
    connection: asyncpg.Connection, since: Mapping[StepKey, datetime]
) -> list[tuple[StepKey, datetime]]:
    """Read the earliest wake time of each step that has active enrollments; at some steps, the
    earliest from a time on.
    """
    if not since:
        every = await occupied_steps(connection)
        return [(step_key, at) for step_key, at in every if at is not None]
    known = sorted(since)
    return await _first_wakes(connection, since, [FIRST_KEY, *known], [*known, LAST_KEY])


async def first_wakes_of(
    connection: asyncpg.Connection, sequences: Iterable[str]
) -> list[tuple[StepKey, datetime]]:
    """Read the earliest wake time of each step of some sequences that has active enrollments."""
    names = sorted(sequences)
    before, after = [(name, FIRST_KEY[1]) for name in names], [(name, LAST_NAME) for name in names]
    return await _first_wakes(connection, {}, before, after)


async def _first_wakes(
    connection: asyncpg.Connection,
    since: Mapping[StepKey, datetime],
    before: Rows[StepKey],
    after: Rows[StepKey],
) -> list[tuple[StepKey, datetime]]:
    """Read the first wake times at some steps, from a time on, and at all steps in some gaps."""
    rows = await connection.fetch(
        QUERIES["first_wakes"],
        *columns(since),
        list(since.values()),
        *columns(before),
        *columns(after),
    )
    return _with_keys(rows)


async def occupied_steps(
    connection: asyncpg.Connection,
) -> list[tuple[StepKey, datetime | None]]:
    """Read the steps that have active enrollments, and when the first of each wakes; None if only a
    change can wake it. It reads pages: a single statement for a million steps would run into its
    time limit on a busy server, again and again.
    """
    found: list[tuple[StepKey, datetime | None]] = []
    after = FIRST_KEY
    rows = None
    while rows is None or len(rows) == STEPS_PER_SEARCH:
        rows = await connection.fetch(QUERIES["occupied_steps"], *after, STEPS_PER_SEARCH)
        found += _with_keys(rows)
        if rows:
            after, _ = found[-1]
    return found


def _with_keys(rows: Iterable[asyncpg.Record]) -> list[tuple[StepKey, Any]]:
    """Return the rows of a search. Names are stored once, as in the definitions: they would take
    more memory than all else.
    """
    return [((intern(sequence), intern(step)), wake_at) for sequence, step, wake_at in rows]


async def count_due(
    connection: asyncpg.Connection, since: Mapping[StepKey, datetime], now: datetime
) -> list[tuple[str, str, int, int]]:
    """Count due and overdue enrollments of steps, from a time on and at most MAX_DUE of each."""
    rows = await connection.fetch(
        QUERIES["count_due"], *columns(since), list(since.values()), now, MAX_DUE
    )
    return [tuple(row) for row in rows]


class LeftAtStep(NamedTuple):
    """What a claim has left at a step."""

    now: datetime  # time of the database's clock
    first_due: datetime | None
    again_at: datetime | None  # when to claim again
    ahead: datetime | None  # the next wake time that is not due yet; None if it was not read


async def left_at_steps(
    connection: asyncpg.Connection,
    wanted: Mapping[StepKey, tuple[datetime, bool]],
    now: datetime,
    *,
    daemon: str,
    excluding: Iterable[int],
) -> dict[StepKey, LeftAtStep]:
    """Read what claims have left at steps from a time on, `excluding` some enrollments, and whether
    with the next wake time.
    """
    rows = await connection.fetch(
        QUERIES["left"],
        *columns(wanted),
        now,
        daemon,
        list(excluding),
        *map(list, zip(*wanted.values(), strict=True)),
    )
    return {
        (sequence, step): LeftAtStep(
            at, first_due, again_at, (ahead or NEVER) if wanted[sequence, step][1] else None
        )
        for sequence, step, at, first_due, again_at, ahead in rows
    }
