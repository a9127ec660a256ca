"""What happens to enrollments that wait at steps that change."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from datetime import datetime

import asyncpg

from sequencerd.core.advance import advance, wakes_as_before
from sequencerd.core.decision import Execute, Fail, QueryLookup, Wait
from sequencerd.core.describe import counted, is_never, text
from sequencerd.core.enrollment import Enrollment, effect_key
from sequencerd.core.model import Definitions
from sequencerd.core.step_types import is_instant
from sequencerd.definitions.compiler import Definition, Runners, from_rows
from sequencerd.definitions.diff import SequenceDiff
from sequencerd.definitions.stored import as_stored
from sequencerd.storage import connections, server
from sequencerd.storage.statements import QUERIES

BATCH_SIZE = 5000  # enrollments read at a time


@dataclass(slots=True)
class WaitingCounts:
    """Numbers of enrollments at a changed step, by what happens to them."""

    step: str
    total: int = 0
    at_once: int = 0
    later: int = 0
    for_data: int = 0  # no time ends their waits
    as_before: int = 0
    executing: int = 0
    first: datetime | None = None  # when their waits end, if that changes
    last: datetime | None = None
    unknown: int = 0  # their number depends on external data
    limited: int = 0  # their number depends on limits
    failing: int = 0
    failure: str | None = None  # of the first of them

    def line(self, *, done: bool) -> str:
        """Describe the counts in a sentence, before the change or after it is `done`."""
        continues = ("continues", "continue") if done else ("would continue",) * 2
        fails = ("fails", "fail") if done else ("would fail",) * 2
        parts: list[tuple[int, tuple[str, str], str]] = [
            (self.at_once, continues, " at once"),
            (self.limited, continues, " as soon as the limit has room"),
            (self.later, ("waits", "wait"), f" until another time{self._times()}"),
            (self.for_data, ("waits", "wait"), " until the data changes"),
            (self.as_before, ("waits", "wait"), " as before"),
            (
                self.executing,
                ("is being executed and finishes", "are being executed and finish"),
                " unchanged",
            ),
            (self.unknown, ("depends", "depend"), " on external data"),
            (self.failing, fails, f": {self.failure}"),
        ]
        counts = ", ".join(f"{counted(n, *verb)}{words}" for n, verb, words in parts if n)
        return f"{counted(self.total, 'waits', 'wait')} at {self.step}: {counts}" if counts else ""

    def add_later(self, until: datetime) -> None:
        """Count an enrollment that waits until another time."""
        self.later += 1
        self.first = min(self.first or until, until)
        self.last = max(self.last or until, until)

    def _times(self) -> str:
        if self.first is None or self.last is None:
            return ""
        times = dict.fromkeys(map(text, (self.first, self.last)))
        return f", {' to '.join(times)}"

    def add(self, other: WaitingCounts) -> None:
        """Add the counts for the same step in another shard."""
        for count in fields(self):
            if count.type == "int":
                setattr(self, count.name, getattr(self, count.name) + getattr(other, count.name))
        self.first = min(filter(None, (self.first, other.first)), default=None)
        self.last = max(filter(None, (self.last, other.last)), default=None)
        self.failure = self.failure or other.failure


def rescheduled_steps(changes: SequenceDiff, definition: Definition) -> list[str]:
    """Return the steps whose enrollments will be rescheduled: those that the triggers mark."""
    if changes.is_new:
        return []
    steps = definition.sequence.steps
    altered = {
        name
        for name, keys in changes.changed.items()
        if any(key == "type" or key.startswith("config.") for key in keys)
    }
    goals = {goal.name for goal in definition.sequence.goals}
    concerns_all = changes.settings.keys() & {
        "timezone",
        "lookup",
        "recheck",
        "window",
    } or goals & (altered | changes.added.keys())
    follows_topic = "topic" in changes.settings
    return [
        name
        for name, step in steps.items()
        if name in altered
        or (concerns_all and name not in changes.added)
        or (follows_topic and name not in changes.added and not is_instant(step.type))
    ]


async def changed_definitions(
    connection: asyncpg.Connection,
    names: Iterable[str],
    definitions: Iterable[Definition],
    runners: Runners,
) -> Definitions:
    """Return all sequences as they would be after the change."""
    wanted = list(names)
    steps: dict[str, list[asyncpg.Record]] = {name: [] for name in wanted}
    for row in await connection.fetch(QUERIES["steps"], wanted):
        steps[row["sequence"]].append(row)
    found = {
        row["name"]: replace(from_rows(row, steps[row["name"]], runners), paused=False)
        for row in await connection.fetch(QUERIES["sequences"], wanted)
    }
    return found | await as_stored(
        connection, [replace(one.sequence, paused=False) for one in definitions]
    )


async def count_waiting(
    connection: asyncpg.Connection,
    sequence: str,
    step: str,
    renamed: Mapping[str, str],
    after: Definitions,
) -> WaitingCounts:
    """Evaluate all enrollments at a step with the changed definitions, with one batch in memory at
    a time, and count the outcomes. `renamed` maps present names of steps to the new ones.
    """
    count = WaitingCounts(step)
    before = next((old for old, new in renamed.items() if new == step), step)
    now = await server.server_time(connection)
    async with connection.transaction():  # a cursor needs one
        async for rows in connections.batches(
            connection, "waiting", QUERIES["enrollments_at"], sequence, before, size=BATCH_SIZE
        ):
            for row in rows:
                enrollment = Enrollment(*row)
                if renamed:
                    enrollment = _renamed(enrollment, renamed)
                _classify(count, enrollment, after, now)
    return count


def _renamed(enrollment: Enrollment, new_names: Mapping[str, str]) -> Enrollment:
    """Return an enrollment after renames of steps, as the database changes it."""
    effects = {
        effect_key(enrollment.sequence, old): effect_key(enrollment.sequence, new)
        for old, new in new_names.items()
    }
    return enrollment._replace(
        step=new_names.get(enrollment.step, enrollment.step),
        goals_met=[new_names.get(goal, goal) for goal in enrollment.goals_met],
        executed=[effects.get(key, key) for key in enrollment.executed],
    )


def _classify(
    count: WaitingCounts, before: Enrollment, definitions: Definitions, now: datetime
) -> None:
    count.total += 1
    if before.leased_by is not None:
        count.executing += 1
        return
    after = advance(definitions, before, now)
    match after.decision:
        case Wait() if wakes_as_before(before, after):
            count.as_before += 1
        case Wait(until) if after.enrollment.visit == before.visit and is_never(until):
            count.for_data += 1
        case Wait(until) if after.enrollment.visit == before.visit:
            count.add_later(until)
        case QueryLookup():
            count.unknown += 1
        case Execute() if after.decision.reservations:
            count.limited += 1
        case Fail(failure, message):
            count.failing += 1
            count.failure = count.failure or f"{failure}, {message}"
        case _:
            count.at_once += 1
