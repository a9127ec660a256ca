"""Simulate an enrollment: the daemon's own `advance` under a virtual clock.

Pure: reads no clock and does no I/O. Side effects are not executed; their results are given.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from collections.abc import Sequence as Sequence_
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from functools import partial
from typing import Any, Literal, NamedTuple
from zoneinfo import ZoneInfo

from sequencerd.core import exact_json
from sequencerd.core.advance import advance
from sequencerd.core.calendar import dates
from sequencerd.core.decision import Advanced, End, Event, Execute, Fail, QueryLookup, Wait
from sequencerd.core.enrollment import NEVER, Enrollment
from sequencerd.core.faults import DefinitionError, EvaluationError
from sequencerd.core.model import (
    Action,
    InstantStep,
    LimitReached,
    Sequence,
    SideEffect,
    Stay,
    Step,
    Update,
)
from sequencerd.core.step_types.condition_config import ConditionConfig, explain
from sequencerd.core.task import Answer, Failed, LookupAnswer, Result, Task, may_have_taken_place
from sequencerd.core.view import REMOVED, Context, merge_data, parse_data, view

MAX_ENTRIES = 10_000
"""The number of entries after which a simulation ends, because a sequence may loop for ever."""

DAEMON = "simulation"

ROUNDS_OF_CYCLE = 3
"""The number of equal rounds at the end of a simulation that make a cycle."""

Preview = Callable[[Step, Task], Mapping[str, str]]
"""Returns what a side effect would send, by field. Raises ValueError if it cannot be sent."""

_NEXT = Answer()
_NO_RECHECK = timedelta(days=36500)  # the result of a lookup is constant in a simulation


class TimelineEntry(NamedTuple):
    """An event at a time. `action` is that of the event, or "execute" for a side effect."""

    at: datetime
    sequence: str
    step: str
    type: str
    visit: int
    action: str
    message: str | None = None
    details: Mapping[str, str] = {}  # of "execute": what is sent


class DataChange(NamedTuple):
    """Data that is merged at a given time."""

    at: datetime
    data: Mapping[str, Any]


@dataclass(frozen=True)
class Simulation:
    """The entries of a simulation, and the enrollment at its end."""

    entries: tuple[TimelineEntry, ...]
    status: Literal["active", "completed", "failed"]
    enrollment: Enrollment
    ended_at: datetime
    end: str  # why it ended, as a sentence
    timezone: str
    cycle: tuple[str, ...] = ()  # the steps of each round if it ends in a cycle

    @property
    def timeline(self) -> tuple[TimelineEntry, ...]:
        """Return the entries before the end."""
        is_end = bool(self.entries) and self.entries[-1].action == self.status
        return self.entries[:-1] if is_end else self.entries

    @property
    def steps(self) -> list[str]:
        """Return the steps in the order of the visits."""
        visits = {(entry.visit, entry.step): entry.step for entry in self.entries}
        return list(visits.values())

    @property
    def sent(self) -> list[TimelineEntry]:
        """Return the side effects, with what they would send."""
        return [entry for entry in self.entries if entry.action == "execute"]


def simulate(
    sequences: Mapping[str, Sequence],
    enrollment: Enrollment,
    *,
    start: datetime,
    until: datetime,
    changes: Iterable[DataChange] = (),
    external: Mapping[str, Any] | None = None,
    outcomes: Mapping[str, Answer | Failed] | None = None,
    at_steps: Mapping[str, Mapping[str, Any]] | None = None,
    preview: Preview = lambda _step, _task: {},
    most: int = MAX_ENTRIES,
    enrolled: Collection[str] = (),
) -> Simulation:
    """Simulate an enrollment from `start` until it ends, or waits beyond `until`.

    `changes` are merged into the data at their times, `at_steps` when the enrollment first arrives
    at the named step. `outcomes` are the results of side effects by type (default: next),
    `external` is the result of the lookup. Pauses of sequences are ignored, because the simulation
    would never end. It ends after `most` entries. A GoTo cannot enter the sequences in `enrolled`,
    because the subject has been enrolled there before.
    """
    definitions = {
        name: replace(sequence, recheck=_NO_RECHECK, paused=False)
        for name, sequence in sequences.items()
    }
    refused = dict.fromkeys(enrolled, "already_enrolled")
    held = dict(at_steps or {})
    journey = _SimulatedEnrollment(
        _holding(definitions, held), enrollment, external or {}, outcomes or {}, preview, refused
    )
    later = sorted(changes, key=lambda change: change.at)
    now, result = start, None
    while True:
        decision, result = journey.advance(now, result)
        if isinstance(decision, End):
            return journey.ended("completed", now, "completed")
        if isinstance(decision, Fail):
            return journey.ended("failed", now, f"failed: {decision.message}")
        if len(journey.entries) > most:
            return journey.ended("active", now, f"stopped after {most} entries")
        if result is not None:
            continue
        assert isinstance(decision, Wait)
        if (data := held.pop(journey.at.step, None)) is not None:
            journey.definitions = _holding(definitions, held)
            journey.change(data, now)
            continue
        if decision.elsewhere:
            return journey.ended(
                "active", now, "continues at daemons that serve the type of its step"
            )
        if later and later[0].at <= decision.until:
            change = later.pop(0)
            now = max(now, change.at)
            if now <= until:
                journey.change(change.data, now)
                continue
        elif decision.until <= until:
            now = max(now, decision.until)
            continue
        if decision.until >= NEVER:
            return journey.ended("active", min(now, until), "waits for a change")
        waits = f"waits until {decision.until.astimezone(journey.zone):%a %Y-%m-%d %H:%M:%S}"
        return journey.ended("active", until, waits)


def zone_of(enrollment: Enrollment, definitions: Mapping[str, Sequence]) -> ZoneInfo:
    """Return the time zone of an enrollment, else of its sequence, else UTC. Unknown ones, which
    SQL can write, are ignored.
    """
    sequence = definitions.get(enrollment.sequence)
    for name in (enrollment.timezone, sequence.timezone if sequence else None):
        with suppress(DefinitionError):
            if name is not None:
                return dates.zone(name)
    return dates.zone("UTC")


def _holding(definitions: Mapping[str, Sequence], names: Collection[str]) -> dict[str, Sequence]:
    """Return the definitions with steps of these names at which an enrollment only waits."""
    hold = InstantStep(lambda context: Stay(context.now))
    return {
        name: replace(
            sequence,
            steps={
                **sequence.steps,
                **{
                    step: replace(sequence.steps[step], behaviour=hold, reads_external=False)
                    for step in names
                    if step in sequence.steps
                },
            },
        )
        for name, sequence in definitions.items()
    }


def _cycle(steps: Sequence_[str]) -> tuple[str, ...]:
    """Return the shortest list of steps that repeats at the end, from its first step on."""
    for length in range(1, len(steps) // ROUNDS_OF_CYCLE + 1):
        last = steps[-ROUNDS_OF_CYCLE * length :]
        if last[length:] == last[:-length]:
            first = last.index(min(last[:length], key=steps.index))
            return tuple(last[first : first + length])
    return ()


@dataclass
class _SimulatedEnrollment:
    """The state of the simulated enrollment, and its entries so far."""

    definitions: Mapping[str, Sequence]
    at: Enrollment
    external: Mapping[str, Any]
    outcomes: Mapping[str, Answer | Failed]
    preview: Preview
    refused: Mapping[str, str]
    entries: list[TimelineEntry] = field(default_factory=list)
    reserved: dict[bytes, dict[int, datetime]] = field(default_factory=dict)
    """When side effects with a limit began, by limit key and by visit."""

    def advance(self, now: datetime, result: Result | None) -> tuple[object, Result | None]:
        """Evaluate once. Return the decision, and the result of a side effect or lookup."""
        before = self.at
        if result is not None and not may_have_taken_place(result):
            for reserved in self.reserved.values():
                reserved.pop(before.visit, None)
        again = partial(
            advance, self.definitions, before, now, result, jitter=1.0, refused=self.refused
        )
        advanced = again()
        if full := self._full(advanced, now):
            advanced = again(full=full)
        if isinstance(result, Answer) and result.data:
            before = before._replace(data=_merged(before.data, result.data))
        self.entries += self._entries(before, advanced.events, now)
        self.at = advanced.enrollment
        match advanced.decision:
            case Execute(step, _, timezone, external):
                self.at = self.at.leased_to(DAEMON, self.at.leases + 1)
                return advanced.decision, self._execute(step, timezone, external, now)
            case QueryLookup():
                self.at = self.at._replace(leased_by=DAEMON)
                return advanced.decision, LookupAnswer(self.external)
        return advanced.decision, None

    def _full(self, advanced: Advanced, now: datetime) -> LimitReached | None:
        """Reserve places for a side effect in its limits. Return the limit that has no room, if
        any.
        """
        decision = advanced.decision
        if not isinstance(decision, Execute):
            return None
        visit = advanced.enrollment.visit
        full = []
        for number, (key, _, at_most, per) in enumerate(decision.reservations):
            before = self.reserved.get(key, {})
            counted = sorted(at for of, at in before.items() if of != visit and at > now - per)
            if len(counted) >= at_most:
                full.append(LimitReached(number, counted[-at_most] + per))
        if full:
            return LimitReached(full[0].limit, max(one.until for one in full))
        for key, *_ in decision.reservations:
            self.reserved.setdefault(key, {})[visit] = now
        return None

    def change(self, change: Mapping[str, Any], now: datetime) -> None:
        """Merge data like `data || ...` in SQL."""
        self.at = self.at._replace(data=_merged(self.at.data, change))
        message = f"changed by {exact_json.dumps(dict(change), ensure_ascii=False)}"
        # steps that follow each other at one time are recorded microseconds apart
        at = max([now, *(entry.at for entry in self.entries[-1:])])
        self.entries.append(self._entry(at, self.at, "data", message))

    @property
    def zone(self) -> ZoneInfo:
        """Return the time zone that applies to the enrollment."""
        return zone_of(self.at, self.definitions)

    def ended(
        self, status: Literal["active", "completed", "failed"], at: datetime, end: str
    ) -> Simulation:
        """Return the complete simulation."""
        made = Simulation(tuple(self.entries), status, self.at, at, end, self.zone.key)
        if status == "active" and (cycle := _cycle(made.steps)):
            end = f"{end}; it loops: {' → '.join([*cycle, cycle[0]])}"
            return replace(made, end=end, cycle=cycle)
        return made

    def _execute(
        self, step: Step, timezone: str, external: Mapping[str, Any], now: datetime
    ) -> Result:
        here, effect = self.at, step.behaviour
        assert isinstance(effect, SideEffect)
        topic = self.definitions[here.sequence].topic_of(effect)
        try:
            seen = view(here, timezone, here.entered_at or now, external)
            task = Task(here.key, seen, topic=topic)
            details = self.preview(step, task)
        except (EvaluationError, ValueError) as error:
            self.entries.append(self._entry(now, here, "execute", "cannot be sent"))
            return Failed(str(error), permanent=True)
        self.entries.append(self._entry(now, here, "execute", None, details))
        return self.outcomes.get(step.type, _NEXT)

    def _entries(
        self, before: Enrollment, events: Iterable[Event], now: datetime
    ) -> Iterator[TimelineEntry]:
        """Yield an entry for each event; for branches with the conditions, evaluated on the data of
        that time.
        """
        here = before
        for event in events:
            if event.visit != here.visit or here.entered_at is None:
                here = here._replace(entered_at=now)
            here = here._replace(sequence=event.sequence, step=event.step, visit=event.visit)
            message = event.message
            step = self._step(event)
            if step and isinstance(step.behaviour, InstantStep):
                context = self._context(here, now)
                if event.action not in (Action.NEXT, Action.ALT_NEXT, "branch"):
                    pass
                elif conditions := _evaluated(step, event):
                    because = "; ".join(explain(one, context) for one in conditions)
                    message = f"{message}: {because}" if message else because
                elif isinstance(answer := step.behaviour.answer(context), Update):
                    here = here._replace(data=_merged(here.data, answer.data))
                    message = _changes(answer.data)
            yield self._entry(event.at, event, event.action, message)

    def _context(self, here: Enrollment, now: datetime) -> Context:
        timezone = zone_of(here, self.definitions).key
        holidays = self.definitions[here.sequence].holidays
        return Context(here, now, timezone, self.external, holidays)

    def _step(self, place: Event | Enrollment) -> Step | None:
        sequence = self.definitions.get(place.sequence)
        return sequence.steps.get(place.step) if sequence else None

    def _entry(
        self,
        at: datetime,
        place: Event | Enrollment,
        action: str,
        message: str | None,
        details: Mapping[str, str] | None = None,
    ) -> TimelineEntry:
        step = self._step(place)
        type_ = step.type if step else "?"
        return TimelineEntry(
            at, place.sequence, place.step, type_, place.visit, action, message, details or {}
        )


def _merged(data: str, changes: Mapping[str, Any]) -> str:
    return exact_json.dumps(merge_data(parse_data(data, exact=True), changes))


def _changes(data: Mapping[str, Any]) -> str:
    """Describe changes of data, such as {"tries": 2}, note removed."""
    parts = [f"{key} removed" for key, value in data.items() if value is REMOVED]
    if set_ := merge_data({}, data):
        parts.insert(0, exact_json.dumps(set_, ensure_ascii=False))
    return ", ".join(parts)


def _evaluated(step: Step, event: Event) -> list[ConditionConfig]:
    """Return the conditions that led to an event, in the order of evaluation."""
    found = []
    for exit_ in step.exits:
        if exit_.condition is not None:
            found.append(exit_.condition)
        if event.message == exit_.label:
            break
    return found
