"""Change enrollments manually: select their ids once, then change them in batches.

The triggers complete each change, record it, and notify the daemons. A change does not wait for
side effects in progress: the fence rejects their results, which are recorded but have no effect.
"""

from __future__ import annotations

import asyncio
import getpass
import os
import re
import socket
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple

import asyncpg

from sequencerd.core.describe import counted
from sequencerd.core.enrollment import MAX_SUBJECT
from sequencerd.errors import ArgumentError, UsageError
from sequencerd.storage.connections import batches, counting
from sequencerd.storage.database_errors import with_hint
from sequencerd.storage.statements import QUERIES

BATCH_SIZE = 1000  # enrollments in a transaction
FETCH_SIZE = 10_000
LAST_BATCH_TIMEOUT = 10.0  # seconds in which an interrupted batch may end
GROUP_COLUMNS = ("sequence", "step", "status", "failure")

STATUSES = {
    "retry": ("failed",),
    "skip": ("failed",),
    "cancel": ("active", "failed"),
    "move": ("active", "failed"),
    "reevaluate": ("active",),
}
"""The statuses to which an action applies; actions are named after their statements."""


class Selection(NamedTuple):
    """The enrollments that a change applies to; None does not restrict."""

    ids: Sequence[int] | None = None
    subject: str | None = None
    sequence: str | None = None
    step: str | None = None
    failure: str | None = None
    status: str | None = None
    prefix: str | None = None  # beginning of the subject
    sequences: Sequence[str] | None = None
    wakes_from: datetime | None = None
    wakes_before: datetime | None = None
    entered_before: datetime | None = None  # its step
    ended_by: datetime | None = None  # if it has ended
    path: Sequence[str] | None = None  # path in the data, and the value there as text
    value: str | None = None
    causes: Sequence[str] | None = None  # of the failure, as the queries have them
    or_ids: Sequence[int] | None = None  # that match like the prefix

    def parameters(self) -> tuple[object, ...]:
        """Return the parameters of the queries' part "matching"."""
        likes = None if self.causes is None else [_like(cause) for cause in self.causes]
        return (*self, likes)


def _like(cause: str) -> str:
    """Return a pattern that all errors with this cause match."""
    escaped = re.sub(r"([\\%_])", r"\\\1", cause)
    return re.sub('<address>|"…"|…', "%", escaped) + "%"


def count(number: int) -> str:
    """Format a number, such as "3 enrollments"."""
    return counted(number, "enrollment")


class BulkResult(NamedTuple):
    """How many enrollments of a batch were changed, were executing a side effect, or could not be
    changed because their subjects are in the sequence again.
    """

    changed: int = 0
    executing: int = 0
    entered_again: int = 0

    def plus(self, other: BulkResult) -> BulkResult:
        """Add another result."""
        return BulkResult(*(a + b for a, b in zip(self, other, strict=True)))

    def remarks(self, selected: int) -> list[str]:
        """Describe enrollments that were not changed, or that were executing a side effect."""
        unchanged = selected - self.changed - self.entered_again
        remarks = (
            (self.executing, "were executing a side effect, which is not undone"),
            (self.entered_again, "unchanged: the subject has entered the sequence again"),
            (unchanged, "unchanged: moved on meanwhile, or cannot be changed"),
        )
        return [f"{number:,} {text}" for number, text in remarks if number]


class AlreadyEnrolledError(UsageError):
    """The reentry policy does not allow another enrollment of the subject."""


async def enroll(
    connection: asyncpg.Connection,
    sequence: str,
    subject: str,
    data: str,
    *,
    timezone: str | None = None,
    step: str | None = None,
    at: datetime | None = None,
) -> int:
    """Enroll a subject and return the id. `data` is a JSON object. Raises UsageError, and
    AlreadyEnrolledError where the reentry policy refuses.
    """
    size = len(subject.encode())
    if not 1 <= size <= MAX_SUBJECT:
        raise ArgumentError(f"the subject has {size:,} bytes; it must have 1 to {MAX_SUBJECT:,}")
    if at is not None and not 1900 <= at.year < 9999:
        raise ArgumentError("the start time must be in the years 1900 to 9998")
    try:
        id_: int | None = await connection.fetchval(
            QUERIES["enroll"], sequence, subject, data, timezone, step, at
        )
    except (asyncpg.IntegrityConstraintViolationError, asyncpg.DataError) as error:
        raise UsageError(with_hint(error)) from error
    if id_ is None:
        raise AlreadyEnrolledError(
            f"{subject} has already been enrolled in {sequence}; the reentry policy does not allow "
            "another enrollment"
        )
    return id_


async def select(
    connection: asyncpg.Connection, action: str, selection: Selection, to: str | None = None
) -> array[int]:
    """Return the ids that an action applies to, in order, without enrollments at `to`."""
    found: list[int] = []
    async with counting(connection):
        async for rows in batches(
            connection,
            "selected_ids",
            QUERIES["select"],
            *_parameters(action, selection, to),
            size=FETCH_SIZE,
        ):
            found.extend(row[0] for row in rows)
    return array("q", sorted(found))


async def selected(
    connection: asyncpg.Connection, action: str, selection: Selection, to: str | None = None
) -> list[asyncpg.Record]:
    """Count the enrollments that `select` would return, by sequence, step, status and failure."""
    async with counting(connection):
        rows: list[asyncpg.Record] = await connection.fetch(
            QUERIES["selected"], *_parameters(action, selection, to)
        )
    return rows


def added_up(groups: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Add up the counts of several shards, as `selected` returns them."""
    counts: Counter[tuple[str | None, ...]] = Counter()
    for group in groups:
        counts[tuple(group[name] for name in GROUP_COLUMNS)] += group["count"]
    in_order = sorted(counts, key=lambda group: [(value is None, value or "") for value in group])
    return [
        {**dict(zip(GROUP_COLUMNS, group, strict=True)), "count": counts[group]}
        for group in in_order
    ]


async def without_step(
    connection: asyncpg.Connection, sequences: Iterable[str], step: str
) -> list[str]:
    """Return which of the sequences have no step of this name, in order."""
    names = set(sequences)
    rows = await connection.fetch(QUERIES["with_step"], step, list(names))
    return sorted(names - {row["sequence"] for row in rows})


def _parameters(action: str, selection: Selection, to: str | None) -> list[object]:
    return [*selection.parameters(), list(STATUSES[action]), to]


async def change(
    connection: asyncpg.Connection,
    action: str,
    ids: Sequence[int],
    *,
    reason: str,
    to: str | None = None,
    progress: Callable[[BulkResult], None],
) -> None:
    """Change enrollments, a batch at a time; `progress` is called after each commit.

    Enrollments that have moved since the selection are not changed. If this is cancelled, a batch
    that has started is finished first.
    """
    for first in range(0, len(ids), BATCH_SIZE):
        batch = asyncio.create_task(
            _change_batch(connection, action, list(ids[first : first + BATCH_SIZE]), reason, to)
        )
        try:
            progress(await asyncio.shield(batch))
        except asyncio.CancelledError:
            await asyncio.wait([batch], timeout=LAST_BATCH_TIMEOUT)
            if batch.done():
                progress(batch.result())
            else:
                batch.cancel()
            raise


async def _change_batch(
    connection: asyncpg.Connection, action: str, ids: list[int], reason: str, to: str | None
) -> BulkResult:
    while True:
        try:
            async with connection.transaction():
                await set_reason(connection, reason)
                try:
                    return await _run(connection, action, ids, to)
                except asyncpg.UniqueViolationError:
                    done = BulkResult()
                    for id_ in ids:
                        done = done.plus(await _run_alone(connection, action, id_, to))
                    return done
        except asyncpg.TransactionRollbackError:
            continue  # a deadlock with another transaction: nothing has been done yet


async def _run_alone(
    connection: asyncpg.Connection, action: str, id_: int, to: str | None
) -> BulkResult:
    try:
        return await _run(connection, action, [id_], to)
    except asyncpg.UniqueViolationError:
        return BulkResult(entered_again=1)


async def _run(
    connection: asyncpg.Connection, action: str, ids: list[int], to: str | None
) -> BulkResult:
    parameters = [ids] if to is None else [ids, to]
    async with connection.transaction():
        rows = await connection.fetch(QUERIES[action], *parameters)
    return BulkResult(len(rows), sum(row["executing"] for row in rows))


class StatusChange(NamedTuple):
    """A status of sequences, and its meaning for their enrollments: a verb, and what follows it."""

    status: str
    verb: str
    consequence: str

    def effect(self, number: int | None = None) -> str:
        """Describe what so many enrollments do, by default all."""
        return f"{self.verb}{'s' if number == 1 else ''}{self.consequence}"


SEQUENCE_STATUSES = {
    "pause": StatusChange("paused", "wait", "; nothing is executed, time continues to pass"),
    "resume": StatusChange("active", "continue", ""),
    "archive": StatusChange("archived", "continue", "; no new enrollments"),
}


async def set_status(
    connection: asyncpg.Connection, names: Sequence[str], status: str, reason: str
) -> list[asyncpg.Record]:
    """Set the status of sequences, and return the previous status of each. Raises UsageError."""
    async with connection.transaction():
        await set_reason(connection, reason)
        rows: list[asyncpg.Record] = await connection.fetch(
            QUERIES["set_sequence_status"], list(names), status
        )
        if missing := sorted(set(names) - {row["name"] for row in rows}):
            raise UsageError(f"sequence {missing[0]!r} does not exist; nothing was changed")
    return rows


async def count_active(connection: asyncpg.Connection, names: Iterable[str]) -> dict[str, int]:
    """Count the active enrollments of sequences: after a change, as it may take minutes."""
    async with counting(connection):
        rows = await connection.fetch(QUERIES["count_active"], list(names))
    return {row["name"]: row["active"] for row in rows}


async def set_reason(connection: asyncpg.Connection, reason: str) -> None:
    """Set the reason that the events of this transaction record."""
    await connection.execute(await connection.fetchval(QUERIES["set_reason"], reason))


def changed_by(reason: str | None) -> str:
    """Return what events record in addition to the database user: the operator, and the reason."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # the user of a container may have no name
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}" + (f": {reason}" if reason else "")
