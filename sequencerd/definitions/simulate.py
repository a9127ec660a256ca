"""A journey in no time: the daemon's own `advance` under a virtual clock.

Pure: it reads no clock and does no I/O. Side effects are not executed; they end as one says.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any, Literal, NamedTuple

from sequencerd.core.advance import advance
from sequencerd.core.javascript.conditions import Operand
from sequencerd.core.model import (
    NEVER,
    Action,
    Answer,
    Context,
    End,
    Enrollment,
    EvaluationError,
    Event,
    Execute,
    Fail,
    Failed,
    Found,
    Instant,
    LookUp,
    Result,
    Sequence,
    Step,
    Task,
    Update,
    Wait,
    parse_data,
    view,
)
from sequencerd.core.step_types import ConditionConfig, condition_of

MAX_ENTRIES = 10_000
"""A timeline ends here: a journey that goes round and round has no end of its own."""

MAX_SHOWN = 100  # characters of a value

DAEMON = "simulation"

Outcome = Literal["next", "altNext", "noop", "fail"]
"""How a side effect ends."""

Preview = Callable[[Step, Task], Mapping[str, str]]
"""What a side effect would send, field by field. Raises ValueError where it can't be sent."""

_NO_RECHECK = timedelta(days=36500)  # what a lookup gives does not change here


class Entry(NamedTuple):
    """Something that happens. `action` as in the history, or "execute" for a side effect."""

    at: datetime
    sequence: str
    step: str
    type: str
    visit: int
    action: str
    message: str | None = None
    details: Mapping[str, str] = {}  # of "execute": what is sent


class Change(NamedTuple):
    """Data that are merged at a time."""

    at: datetime
    data: Mapping[str, Any]


@dataclass(frozen=True)
class Simulation:
    """What happened, and where it ends: `status` as of an enrollment, or active at `step`."""

    entries: tuple[Entry, ...]
    status: Literal["active", "completed", "failed"]
    enrollment: Enrollment
    ended_at: datetime
    end: str  # in words
    timezone: str

    @property
    def steps(self) -> list[str]:
        """The steps in the order of the visits."""
        visits = {(entry.visit, entry.step): entry.step for entry in self.entries}
        return list(visits.values())

    @property
    def sent(self) -> list[Entry]:
        """The side effects, with what they would send."""
        return [entry for entry in self.entries if entry.action == "execute"]


def simulate(
    sequences: Mapping[str, Sequence],
    enrollment: Enrollment,
    *,
    start: datetime,
    until: datetime,
    changes: Iterable[Change] = (),
    external: Mapping[str, Any] | None = None,
    outcomes: Mapping[str, Outcome] | None = None,
    preview: Preview = lambda _step, _task: {},
    most: int = MAX_ENTRIES,
    enrolled: Collection[str] = (),
) -> Simulation:
    """Follows an enrollment from `start` until it ends, or waits beyond `until`.

    `outcomes` says how the side effects of a type end (default: next), `external` what a lookup
    gives, `most` after how many entries it is given up, `enrolled` which sequences refuse a jump
    into them, as the subject has entered them before.
    """
    definitions = {
        name: replace(sequence, recheck=_NO_RECHECK) for name, sequence in sequences.items()
    }
    refused = dict.fromkeys(enrolled, "already_enrolled")
    journey = _Journey(definitions, enrollment, external or {}, outcomes or {}, preview, refused)
    later = sorted(changes)
    now, result = start, None
    while True:
        decision, result = journey.advance(now, result)
        if isinstance(decision, End):
            return journey.ended("completed", now, "completed")
        if isinstance(decision, Fail):
            return journey.ended("failed", now, f"failed: {decision.message}")
        if len(journey.entries) > most:
            return journey.ended("active", now, f"more than {most} entries: it goes round")
        if result is not None:
            continue
        assert isinstance(decision, Wait)
        if decision.elsewhere:
            return journey.ended("active", now, "goes on at daemons that serve its step's type")
        if later and later[0].at <= decision.until:
            change = later.pop(0)
            now = max(now, change.at)
            if now <= until:
                journey.change(change, now)
                continue
        elif decision.until <= until:
            now = max(now, decision.until)
            continue
        if decision.until >= NEVER:
            return journey.ended("active", min(now, until), "waits for a change")
        return journey.ended("active", until, f"waits until {decision.until.isoformat()}")


@dataclass
class _Journey:
    """Where the enrollment is by now, and what has happened."""

    definitions: Mapping[str, Sequence]
    at: Enrollment
    external: Mapping[str, Any]
    outcomes: Mapping[str, Outcome]
    preview: Preview
    refused: Mapping[str, str]
    entries: list[Entry] = field(default_factory=list)

    def advance(self, now: datetime, result: Result | None) -> tuple[object, Result | None]:
        """One evaluation: what is decided, and what the side effect comes to, if it needs one."""
        before = self.at
        advanced = advance(self.definitions, before, now, result, jitter=1.0, refused=self.refused)
        self.entries += self._entries(before, advanced.events, now)
        self.at = advanced.enrollment
        match advanced.decision:
            case Execute(step, _, timezone, external):
                self.at = self.at.leased_to(DAEMON)
                return advanced.decision, self._execute(step, timezone, external, now)
            case LookUp():
                self.at = self.at._replace(leased_by=DAEMON)
                return advanced.decision, Found(self.external)
        return advanced.decision, None

    def change(self, change: Change, now: datetime) -> None:
        """Merges data, as `data || ...` does."""
        data = {**parse_data(self.at.data), **change.data}
        self.at = self.at._replace(data=json.dumps(data))
        told = json.dumps(dict(change.data), ensure_ascii=False)
        self._add(now, self.at, "data", f"changed by {told}")

    def ended(
        self, status: Literal["active", "completed", "failed"], at: datetime, end: str
    ) -> Simulation:
        """The whole."""
        sequence = self.definitions.get(self.at.sequence)
        timezone = self.at.timezone or (sequence.timezone if sequence else "UTC")
        return Simulation(tuple(self.entries), status, self.at, at, end, timezone)

    def _execute(
        self, step: Step, timezone: str, external: Mapping[str, Any], now: datetime
    ) -> Result:
        here = self.at
        outcome = self.outcomes.get(step.type, "next")
        try:
            task = Task(here.key, view(here, timezone, here.entered_at or now, external))
            details = self.preview(step, task)
        except (EvaluationError, ValueError) as error:
            self._add(now, here, "execute", "cannot be sent")
            return Failed(str(error), permanent=True)
        self._add(now, here, "execute", None, details)
        if outcome == "fail":
            return Failed("a failure that was asked for")
        return Answer(Action(outcome))

    def _entries(
        self, before: Enrollment, events: Iterable[Event], now: datetime
    ) -> Iterator[Entry]:
        """The events, and for branches why: each step sees the data as they were before it."""
        here = before
        for event in events:
            if event.visit != here.visit or here.entered_at is None:
                here = here._replace(entered_at=now)
            here = here._replace(sequence=event.sequence, step=event.step, visit=event.visit)
            message = event.message
            step = self._step(event)
            if step and isinstance(step.behaviour, Instant):
                context = self._look(here, now)
                if condition := condition_of(step.type, step.config):
                    message = _because(condition, context)
                elif event.action == Action.NEXT and step.type == "UpdateData":
                    answer = step.behaviour.answer(context)
                    assert isinstance(answer, Update)
                    data = {**parse_data(here.data), **answer.data}
                    here = here._replace(data=json.dumps(data))
                    message = json.dumps(dict(answer.data), ensure_ascii=False)
            yield self._entry(event.at, event, event.action, message)

    def _look(self, here: Enrollment, now: datetime) -> Context:
        timezone = here.timezone or self.definitions[here.sequence].timezone
        return Context(here, now, timezone, self.external)

    def _step(self, place: Event | Enrollment) -> Step | None:
        sequence = self.definitions.get(place.sequence)
        return sequence.steps.get(place.step) if sequence else None

    def _add(
        self,
        now: datetime,
        here: Enrollment,
        action: str,
        message: str | None,
        details: Mapping[str, str] | None = None,
    ) -> None:
        self.entries.append(self._entry(now, here, action, message, details))

    def _entry(
        self,
        at: datetime,
        place: Event | Enrollment,
        action: str,
        message: str | None,
        details: Mapping[str, str] | None = None,
    ) -> Entry:
        step = self._step(place)
        type_ = step.type if step else "?"
        return Entry(
            at, place.sequence, place.step, type_, place.visit, action, message, details or {}
        )


def _because(condition: ConditionConfig, context: Context) -> str:
    """A condition with the values that it compared, such as "gte(data.score = 10, 50) is false"."""
    predicate = condition.predicate()
    view = context.json(predicate.roots)
    operands = [condition.value, *[condition.compare_to] * (condition.compare_to is not None)]
    shown = ", ".join(map(_operand, operands, predicate.operands(view)))
    return f"{condition.lodash_command}({shown}) is {str(predicate(view)).lower()}"


def _operand(operand: Operand | None, text: str | None) -> str:
    text = "missing" if text is None else text
    text = text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."
    return f"{operand.value} = {text}" if operand and operand.type == "get" else text
