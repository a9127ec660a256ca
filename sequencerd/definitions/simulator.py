"""Journeys through sequences that are loaded, in no time: what `simulate` and the console show."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

from pydantic import TypeAdapter, ValidationError

from sequencerd.core import model
from sequencerd.core.calendar import dates
from sequencerd.core.config import nearest
from sequencerd.core.model import Enrollment, SideEffect, Step, Task
from sequencerd.definitions.simulate import MAX_ENTRIES, Change, Outcome, Simulation, simulate
from sequencerd.errors import UsageError
from sequencerd.runners import Runner

A_YEAR = timedelta(days=366)

_DURATION = TypeAdapter(timedelta)


@dataclass(frozen=True)
class Simulator:
    """The sequences of a file or a database, ready to be simulated."""

    definitions: Mapping[str, model.Sequence]
    runners: Mapping[str, Runner]
    outcomes: Mapping[str, Outcome] = field(default_factory=dict)
    most: int = MAX_ENTRIES

    def simulate(
        self,
        sequence: str | None = None,
        *,
        start: str | datetime,
        until: str | datetime | None = None,
        data: Mapping[str, Any] | None = None,
        subject: str = "somebody",
        timezone: str | None = None,
        changes: Mapping[str, Mapping[str, Any]] | None = None,
        external: Mapping[str, Any] | None = None,
        enrolled: Collection[str] = (),
    ) -> Simulation:
        """Where a subject goes that is enrolled at `start`, for a year if `until` is not given.

        Times are ISO 8601. The keys of `changes` are durations since the start, such as P3D or
        PT90M, or times; their data are merged then. `external` is what a lookup gives, `enrolled`
        the sequences that refuse a jump, as the subject has entered them before. The sequence can
        be left out where there is one. Raises UsageError.
        """
        begun = _time(start, "start")
        name = choose(self.definitions, sequence)
        enrollment = Enrollment(
            1,
            subject,
            json.dumps(dict(data or {})),
            begun,
            UUID(int=0),
            name,
            self.definitions[name].first_step,
            timezone,
            wake_at=begun,
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
        """Where an enrollment goes that has begun."""
        return simulate(
            self.definitions,
            enrollment,
            start=start,
            until=start + A_YEAR if until is None else _time(until, "until"),
            changes=[Change(_when(key, start), merged) for key, merged in changes.items()],
            external=external,
            outcomes=self.outcomes,
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
    """The name of one of the sequences; it can be left out where there is one. UsageError."""
    if name is None and len(definitions) == 1:
        return next(iter(definitions))
    if name is None:
        raise UsageError(f"which sequence? There are {', '.join(sorted(definitions))}")
    if name not in definitions:
        raise UsageError(f"sequence {name!r} does not exist; {nearest(name, list(definitions))}")
    return name


def _time(given: str | datetime, name: str) -> datetime:
    at = given if isinstance(given, datetime) else dates.parse(given, dates.zone("UTC"))
    if at is None:
        raise UsageError(f"{name}: {given!r} is not an ISO 8601 time such as 2026-03-02T09:00:00Z")
    return at if at.tzinfo else at.replace(tzinfo=UTC)


def _when(key: str, start: datetime) -> datetime:
    """A duration since the start, or a time."""
    if not key.startswith("P"):
        return _time(key, "change")
    try:
        return start + _DURATION.validate_python(key)
    except (ValidationError, OverflowError) as error:
        raise UsageError(f"{key!r} is not an ISO 8601 duration such as P3D or PT90M") from error
