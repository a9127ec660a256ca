"""Write the original's enrollments at their steps, each in the shard of its subject, in batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, Literal, NamedTuple

import asyncpg

from sequencerd.core.describe import visible
from sequencerd.core.enrollment import MAX_SUBJECT
from sequencerd.core.routing import ShardNumber, shard_of
from sequencerd.core.step_types import is_instant, step_type
from sequencerd.definitions import apply_plan
from sequencerd.definitions.compiler import Runners
from sequencerd.definitions.original.read import ImportSource
from sequencerd.definitions.original.report import ImportedSequence, ImportReport, StepPlace, merge
from sequencerd.definitions.original.translate import ImportChoices, is_past
from sequencerd.storage import server
from sequencerd.storage.change_of_shards import Change
from sequencerd.storage.connections import Shard, batches
from sequencerd.storage.statements import QUERIES

BATCH_SIZE = 5000  # enrollments in memory

_NOT_A_ROWS = (
    asyncpg.PostgresConnectionError,
    asyncpg.InsufficientPrivilegeError,
    asyncpg.InsufficientResourcesError,
    asyncpg.OperatorInterventionError,
    asyncpg.TransactionRollbackError,
    asyncpg.UndefinedColumnError,
    asyncpg.UndefinedTableError,
)
"""Errors of the database that would meet every row."""


class ImportedEnrollment(NamedTuple):
    """An enrollment to create, in the columns of `import_enrollments`."""

    original_id: str
    sequence: str
    step: str
    subject: str
    status: str
    created_at: datetime
    entered_at: datetime | None
    ended_at: datetime | None
    goals_met: str  # a line each
    note: str | None  # for the history


class Placement(NamedTuple):
    """An enrollment to create, and where it was in the original."""

    placed: ImportedEnrollment
    at: StepPlace
    is_elsewhere: bool  # at a step of another sequence than its own


class OriginalEnrollment(NamedTuple):
    """A row of `runners`."""

    id: str
    subject: str | None
    sequence: str | None
    step: str | None
    is_active: bool
    possible: bool
    started_at: datetime | None
    ended_at: datetime | None
    entered_at: datetime | None
    made_at: datetime | None


async def apply(
    source: ImportSource, change: Change, found: Mapping[Shard, ImportReport], runners: Runners
) -> ImportReport:
    """Write the enrollments of each shard, for the caller to commit, count them, and collect the
    open questions. If only some shards are given, the rows of the others are skipped.
    """

    async def begin(shard: Shard) -> _Writer:
        ours, result = change.connections[shard], found[shard]
        await apply_plan.apply(ours, result.definitions, runners)
        for one in result.sequences.values():
            if not one.is_here:
                mark = f"{one.original_id} {one.title}"
                steps = one.step_names
                await ours.execute(QUERIES["mark_sequence"], one.name, mark)
                await ours.execute(QUERIES["mark_steps"], one.name, [*steps.values()], [*steps])
        return _Writer(ours, result, source.choices, await server.server_time(ours))

    writers = await change.on_each(begin)
    numbers = {shard: shard.number or ShardNumber(0, 1) for shard in found}
    by_number = {number: shard for shard, (number, _) in numbers.items()}
    shards = next(iter(numbers.values())).shards
    query = source.query("original_runners", await source.optional())
    async with source.connection.transaction(readonly=True):
        await source.connection.execute(QUERIES["use_utc"])
        async for rows in batches(source.connection, "runners", query, size=BATCH_SIZE):
            for row in map(OriginalEnrollment._make, rows):
                shard = by_number.get(shard_of(row.subject or "", shards))
                if shard is not None and writers[shard].add(row):
                    await change.on(shard, writers[shard].flush)
    for shard, writer in writers.items():
        await change.on(shard, writer.flush)
    result = merge({str(shard.name): one for shard, one in found.items()})
    result.questions += _questions(result, source.choices)
    return result


async def reserve_original_ids(change: Change) -> None:
    """Let later enrollments in any shard get ids that none of the original has in another."""

    async def read(shard: Shard) -> int | None:
        highest: int | None = await change.connections[shard].fetchval(
            QUERIES["highest_original_id"]
        )
        return highest

    highest = max(filter(None, (await change.on_each(read)).values()), default=None)

    async def write(shard: Shard) -> None:
        await change.connections[shard].execute(QUERIES["leave_original_ids"], highest)

    if highest is not None:
        await change.on_each(write)


def _questions(found: ImportReport, choices: ImportChoices) -> list[str]:
    """Return the questions that the operator must answer before the import."""
    asked = []
    if count := found.at_conditionals.total():
        steps = _named(found.at_conditionals)
        if choices.conditional is None:
            asked.append(
                f"enrollments at a Conditional: {count:,} ({steps}). While its condition is false, "
                "the original's code keeps them there; its README says that they go to "
                "altNextStep. Decide with --conditional wait, or --conditional branch"
            )
        elif choices.conditional == "wait":
            asked.append(
                f"{steps}: imported before, as Conditional. To let them wait, change the type to "
                "WaitForCondition first; or use --conditional branch"
            )
    if count := found.at_past_dates.total():
        steps = _named(found.at_past_dates)
        if choices.past_dates is None:
            asked.append(
                f"enrollments at a WaitForDate whose day is over: {count:,} ({steps}). The "
                "original keeps them there forever; here they would continue at once. Decide with "
                "--past-dates send, --past-dates skip (without the step that follows), or "
                "--past-dates hold"
            )
        elif choices.past_dates == "hold":
            asked.append(
                f"{steps}: imported before. To hold enrollments there, change the date first; or "
                "use --past-dates skip or send"
            )
    return asked


def _named(counts: Mapping[StepPlace, int]) -> str:
    return ", ".join(f"{name}/{step}: {count:,}" for (name, step), count in sorted(counts.items()))


class _Writer:
    """Finds the place of each row, and writes them in batches."""

    def __init__(
        self, ours: asyncpg.Connection, found: ImportReport, choices: ImportChoices, now: datetime
    ) -> None:
        self._ours = ours
        self._found = found
        self._choices = choices
        self._now = now
        self._sequences = found.sequences
        self._steps: dict[StepPlace, Mapping[str, Any]] = {
            (one.name, name): step
            for one in found.sequences.values()
            for name, step in one.steps.items()
        }
        self._places = {
            id_: (one, name)
            for one in found.sequences.values()
            for id_, name in one.step_names.items()
        }
        self._past = {
            at
            for at, step in self._steps.items()
            if step["type"] == "WaitForDate" and is_past(step["config"], now)
        }
        self._batch: list[Placement] = []

    def add(self, row: OriginalEnrollment) -> bool:
        """Place a row, or say why it has no place. Return whether the batch is to be written."""
        if row.sequence in self._found.unwanted and row.step not in self._places:
            return False
        placed = self._place(row)
        if isinstance(placed, str):
            self._leave_out(placed, row.id)
            return False
        self._batch.append(placed)
        return len(self._batch) == BATCH_SIZE

    def _leave_out(self, reason: str, id_: str) -> None:
        self._found.left_out.setdefault(reason, []).append(id_)

    def _place(self, row: OriginalEnrollment) -> Placement | str:
        own = self._sequences.get(row.sequence or "")
        created_at = row.started_at or row.made_at or row.entered_at
        place = self._places.get(row.step or "")
        if place is None and own is not None and row.step is None:
            place = _without_step(own, is_active=row.is_active)
        if own is None and (place is None or not row.is_active):
            return "in no sequence that is imported"
        if not row.is_active:
            assert own is not None
            if place is None or place[0] is not own:
                place = own, own.document["steps"][0]["name"]
        if place is None:
            if row.step is None:
                return "active, at no step, and without a goal to wait for"
            return "active, at a step that is not imported, or was removed here"
        if not 1 <= len((row.subject or "").encode()) <= MAX_SUBJECT:
            return "no dataLookup, or a longer one than 1,000 bytes"
        if not row.possible:
            return "a time before 1900 or after 9998"
        if created_at is None:
            return "neither startSequence, createdAt nor startStep"
        there, step = place
        if row.is_active and there.document["status"] == "archived":
            return f"active, and {there.name} is archived here"
        status: Literal["active", "completed", "cancelled"] = (
            "active" if row.is_active else "completed" if row.ended_at else "cancelled"
        )
        ended_at = row.ended_at or row.entered_at or created_at
        placed = ImportedEnrollment(
            row.id,
            there.name,
            step,
            row.subject or "",
            status,
            created_at,
            row.entered_at or created_at,
            None if row.is_active else ended_at,
            "\n".join(there.goals_met.get(step, ())),
            None,
        )
        at = (there.name, step)
        if row.is_active and at in self._past and self._choices.past_dates == "skip":
            placed = self._beyond(placed, there)
        return Placement(placed, at, there is not own)

    def _beyond(self, placed: ImportedEnrollment, there: ImportedSequence) -> ImportedEnrollment:
        """Skip a WaitForDate, and the side effect that follows: it would be too late."""
        target = self._steps[there.name, placed.step]["next"]
        skipped = None
        step = self._steps.get((there.name, target or ""))
        for _ in there.steps:  # no longer, as there may be a cycle
            if step is not None and step["type"] == "GoTo" and not step["config"]:
                step = self._steps.get((there.name, step["next"] or ""))
        if step is not None and not is_instant(step["type"]):
            skipped, target = step["name"], step["next"]
        note = "its date was over at the import" + (f"; {skipped} is skipped" if skipped else "")
        if target is None:
            return placed._replace(status="completed", ended_at=self._now, note=note)
        return placed._replace(
            step=target,
            entered_at=self._now,
            goals_met="\n".join(there.goals_met.get(target, ())),
            note=note,
        )

    async def flush(self, _: Shard) -> None:
        """Write the batch."""
        batch, self._batch = self._batch, []
        await self._write(batch)

    async def _write(self, batch: Sequence[Placement]) -> None:
        """Write a part of a batch; where the database refuses it, each half of it."""
        if not batch:
            return
        columns = map(list, zip(*(entry.placed for entry in batch), strict=True))
        try:
            async with self._ours.transaction():
                rows = await self._ours.fetch(QUERIES["import_enrollments"], *columns)
        except _NOT_A_ROWS:
            raise
        except asyncpg.PostgresError as error:
            if len(batch) == 1:
                self._leave_out(
                    f"the database refuses it: {visible(str(error))}", batch[0].placed.original_id
                )
                return
            half = len(batch) // 2
            await self._write(batch[:half])
            await self._write(batch[half:])
            return
        self._count(batch, {row["original_id"]: row["is_written"] for row in rows})

    def _count(self, batch: Sequence[Placement], written: Mapping[str, bool]) -> None:
        found = self._found
        for placed, at, is_elsewhere in batch:
            if placed.original_id not in written:
                found.already_here += 1
            elif not written[placed.original_id]:
                self._leave_out(
                    f"the reentry policy of {placed.sequence} allows their subjects no second "
                    "enrollment",
                    placed.original_id,
                )
            else:
                found.counts[placed.sequence, placed.status] += 1
                found.elsewhere += is_elsewhere
                if placed.status == "active" or placed.note:
                    found.at_past_dates[at] += at in self._past
                    found.at_conditionals[at] += self._steps[at]["type"] == "Conditional"
        found.at_past_dates = +found.at_past_dates
        found.at_conditionals = +found.at_conditionals


def _without_step(own: ImportedSequence, *, is_active: bool) -> tuple[ImportedSequence, str] | None:
    """Return the step of an enrollment without one: the last goal, because only goals move it."""
    if not is_active:
        return None
    goals = [name for name, step in own.steps.items() if step_type(step["type"]).is_goal]
    return (own, goals[-1]) if goals else None
