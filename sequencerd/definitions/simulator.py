"""Simulations of loaded sequences: what `simulate`, the console and tests of sequences use."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Literal, get_args
from uuid import UUID
from zoneinfo import ZoneInfo

from sequencerd.core import exact_json, model
from sequencerd.core.calendar import dates
from sequencerd.core.config import nearest
from sequencerd.core.enrollment import Enrollment
from sequencerd.core.faults import EvaluationError
from sequencerd.core.graph import reach
from sequencerd.core.model import SideEffect, Step
from sequencerd.core.task import Answer, Failed, Task
from sequencerd.definitions.options import read_zone
from sequencerd.definitions.simulate import MAX_ENTRIES, DataChange, Simulation, simulate, zone_of
from sequencerd.errors import ArgumentError, UsageError
from sequencerd.runners import Runner
from sequencerd.runners.answers import StrictActionAnswer, read_outcome

A_YEAR = timedelta(days=366)

OutcomeWord = Literal["next", "altNext", "noop", "fail"]
OUTCOME_WORDS: tuple[OutcomeWord, ...] = get_args(OutcomeWord)
Outcome = OutcomeWord | Mapping[str, Any]

YEARS = range(2, 9998)
"""The years of a simulation's times; all waits, and the zones, need some room."""

_NUMBER = r"[0-9]+(?:\.[0-9]+)?"
_DURATION = re.compile(
    rf"P(?=.)(?:(?P<years>[0-9]+)Y)?(?:(?P<months>[0-9]+)M)?(?:(?P<weeks>[0-9]+)W)?"
    rf"(?:(?P<days>[0-9]+)D)?"
    rf"(?:T(?=.)(?:(?P<hours>{_NUMBER})H)?(?:(?P<minutes>{_NUMBER})M)?(?:(?P<seconds>{_NUMBER})S)?)?"
)


@dataclass(frozen=True)
class Simulator:
    """The sequences of a file or a database, ready for simulations."""

    definitions: Mapping[str, model.Sequence]
    runners: Mapping[str, Runner]
    outcomes: Mapping[str, Outcome] = field(default_factory=dict)
    """Results of side effects by step type: an action, or an answer of a runner. Default: next."""
    most: int = MAX_ENTRIES

    def simulate(
        self,
        sequence: str | None = None,
        *,
        start: str | datetime,
        until: str | datetime | None = None,
        data: Mapping[str, Any] | None = None,
        subject: str = "subject",
        timezone: str | None = None,
        changes: Mapping[str, Mapping[str, Any]] | None = None,
        external: Mapping[str, Any] | None = None,
        enrolled: Collection[str] = (),
    ) -> Simulation:
        """Simulate an enrollment that starts at `start`, by default for a year.

        Times are ISO 8601. `changes` are merged into the data: their keys are the names of steps
        (when the enrollment arrives there), durations since the start (P3D, PT90M), or times.
        `external` is the result of the lookup. A GoTo cannot enter the sequences in `enrolled`.
        `sequence` is optional if there is only one. Raises UsageError.
        """
        begun = read_time(start, "start")
        name = choose(self.definitions, sequence)
        if timezone is not None:
            read_zone(timezone)
        enrollment = Enrollment(
            1,
            subject,
            exact_json.dumps(dict(data or {})),
            begun,
            UUID(int=0),
            None,
            begun,
            name,
            self.definitions[name].first_step,
            timezone,
        )
        return self.follow(enrollment, begun, until, changes or {}, external, enrolled=enrolled)

    def follow(
        self,
        enrollment: Enrollment,
        start: datetime,
        until: str | datetime | None,
        changes: Mapping[str, Mapping[str, Any]],
        external: Mapping[str, Any] | None,
        *,
        enrolled: Collection[str] = (),
    ) -> Simulation:
        """Simulate an enrollment that has started. Raises UsageError."""
        if external is not None:
            name = enrollment.sequence
            check_lookup(self.definitions, name, reached(self.definitions, name))
        end = start + A_YEAR if until is None else read_until(until, start)
        steps = {name for sequence in self.definitions.values() for name in sequence.steps}
        zone = zone_of(enrollment, self.definitions)
        return simulate(
            self.definitions,
            enrollment,
            start=start,
            until=end,
            changes=[
                DataChange(read_when(key, start, steps, zone), merged)
                for key, merged in changes.items()
                if key not in steps
            ],
            at_steps={key: merged for key, merged in changes.items() if key in steps},
            external=external,
            outcomes={type_: read_result(type_, one) for type_, one in self.outcomes.items()},
            preview=self._preview,
            most=self.most,
            enrolled=enrolled,
        )

    def _preview(self, step: Step, task: Task) -> Mapping[str, str]:
        assert isinstance(step.behaviour, SideEffect)
        preview = getattr(self.runners[step.type], "preview", None)
        if preview is None:
            return {"config": json.dumps(dict(step.config), ensure_ascii=False)}
        shown: Mapping[str, str] = preview(step.behaviour.program, task)
        return shown


def choose(definitions: Mapping[str, model.Sequence], name: str | None) -> str:
    """Return the name of a sequence; None selects the only one. Raises UsageError."""
    if name is None and len(definitions) == 1:
        return next(iter(definitions))
    if name is None:
        raise UsageError(f"specify a sequence; available: {', '.join(sorted(definitions))}")
    if name not in definitions:
        raise UsageError(f"sequence {name!r} does not exist; {nearest(name, list(definitions))}")
    return name


def reached(definitions: Mapping[str, model.Sequence], name: str) -> list[model.Sequence]:
    """Return a sequence and those that an enrollment can enter from there."""

    def following(name: str) -> set[str]:
        exits = (exit_ for step in definitions[name].steps.values() for exit_ in step.exits)
        entered = {exit_.sequence for exit_ in exits if exit_.target and exit_.sequence}
        return entered & definitions.keys()

    names = reach([name], following) if name in definitions else ()
    return [definitions[name] for name in sorted(names)]


def check_lookup(
    definitions: Mapping[str, model.Sequence], name: str, used: Iterable[model.Sequence]
) -> None:
    """Raise UsageError if none of the sequences `used` has a lookup: nothing would read the result
    that is given for the sequence `name`.
    """
    if any(one.lookup for one in used):
        return
    known = sorted(other for other, one in definitions.items() if one.lookup)
    others = f"those with one: {', '.join(known)}" if known else "no sequence has one"
    raise UsageError(f"sequence {name!r} has no lookup that could return this result; {others}")


def read_time(given: str | datetime, name: str) -> datetime:
    """Parse a time, in UTC if it has no offset. Raises ArgumentError."""
    at = given if isinstance(given, datetime) else dates.parse(given, dates.zone("UTC"))
    if at is None:
        raise ArgumentError(
            f"{name}: {given!r} is not an ISO 8601 time such as 2026-03-02T09:00:00Z"
        )
    if at.year not in YEARS:
        raise ArgumentError(f"{name}: {given!r} is not in the years {YEARS[0]} to {YEARS[-1]}")
    return at if at.tzinfo else at.replace(tzinfo=UTC)


def read_until(given: str | datetime, start: datetime) -> datetime:
    """Parse the end of a simulation. Raises ArgumentError."""
    until = read_time(given, "until")
    if until < start:
        raise ArgumentError(f"until: {until:%Y-%m-%d %H:%M:%S}Z is before the start")
    return until


def read_when(key: str, start: datetime, steps: Collection[str], zone: ZoneInfo) -> datetime:
    """Parse a duration since the start, or a time. Years to days are calendar time in the zone, as
    in waits. Raises UsageError.
    """
    if found := _DURATION.fullmatch(key):
        at = start
        try:
            for unit, amount in found.groupdict(default="0").items():
                at = dates.add(at, float(amount), unit, zone)
        except EvaluationError as error:
            raise ArgumentError(f"{key!r}: {error}") from error
        return at
    if re.fullmatch(r"P[0-9.TYMWDHS]*", key):
        raise ArgumentError(f"{key!r} is not an ISO 8601 duration such as P3D or PT90M")
    if key[:1].isdigit():
        return read_time(key, "change")
    raise UsageError(
        f"{key!r} is not a step, a duration such as P3D, or a time; {nearest(key, sorted(steps))}"
    )


def read_result(type_: str, outcome: Outcome) -> Answer | Failed:
    """Parse the outcome of a step type's side effects. Raises ArgumentError."""
    if outcome == "fail":
        return Failed("simulated failure")
    result = read_outcome(outcome, StrictActionAnswer)
    if not isinstance(result, Answer):
        message = result.message if isinstance(result, Failed) else ""
        words = ", ".join(OUTCOME_WORDS)
        raise ArgumentError(f"outcome of {type_}: {message}; write one of {words}, or an answer")
    return result
