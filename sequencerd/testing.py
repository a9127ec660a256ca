"""For the tests of your own sequences: load a file, and see where a subject goes.

from sequencerd.testing import load

onboarding = load("onboarding.yaml", outcomes={"Score": "next"})

def test_who_pays_gets_no_reminder() -> None:
    journey = onboarding.simulate(
        start="2026-03-02T09:00:00Z",
        data={"email": "ada@example.com"},
        changes={"P2D": {"plan": "pro"}},
    )
    assert journey.status == "completed"
    assert [entry.step for entry in journey.sent] == ["welcome", "thanks"]
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from pydantic import SecretStr, TypeAdapter, ValidationError

from sequencerd import daemon, files
from sequencerd.core import dates, model
from sequencerd.core.config import nearest
from sequencerd.core.model import RETRY, Enrollment, Result, SideEffect, Step, Task
from sequencerd.errors import UsageError
from sequencerd.runners import Runner
from sequencerd.settings import Settings
from sequencerd.simulate import Change, Outcome, Simulation, simulate

__all__ = ["Sequences", "Simulation", "load"]

A_YEAR = timedelta(days=366)

_DURATION = TypeAdapter(timedelta)


@dataclass(frozen=True)
class Sequences:
    """The sequences of a file or a database, ready to be simulated."""

    definitions: Mapping[str, model.Sequence]
    runners: Mapping[str, Runner]
    outcomes: Mapping[str, Outcome] = field(default_factory=dict)

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
    ) -> Simulation:
        """Where a subject goes that is enrolled at `start`, for a year if `until` is not given.

        Times are ISO 8601. The keys of `changes` are durations since the start, such as P3D or
        PT90M, or times; their data are merged then. `external` is what a lookup gives. The sequence
        can be left out where there is one. Raises UsageError.
        """
        begun = _time(start, "start")
        name = choose(self.definitions, sequence)
        enrollment = Enrollment(
            1,
            name,
            self.definitions[name].first_step,
            subject,
            json.dumps(dict(data or {})),
            timezone,
            created_at=begun,
            wake_at=begun,
        )
        return self.follow(enrollment, begun, until, changes or {}, external)

    def follow(
        self,
        enrollment: Enrollment,
        start: datetime,
        until: str | datetime | None,
        changes: Mapping[str, Mapping[str, Any]],
        external: Mapping[str, Any] | None,
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
        )

    def _preview(self, step: Step, task: Task) -> Mapping[str, str]:
        assert isinstance(step.behaviour, SideEffect)
        preview = getattr(self.runners[step.type], "preview", None)
        if preview is None:
            return {"config": json.dumps(dict(step.config), ensure_ascii=False)}
        shown: Mapping[str, str] = preview(step.behaviour.program, task)
        return shown


def load(
    *paths: str | os.PathLike[str],
    outcomes: Mapping[str, Outcome] | None = None,
    settings: Settings | None = None,
) -> Sequences:
    """Reads files. `outcomes` says how the side effects of a type end, where not with next: it may
    name types whose runners are not set up here. Raises FileError.
    """
    runners = make_runners(settings or Settings(), outcomes or {})
    found = files.read_all([Path(path) for path in paths], runners)
    definitions = {one.sequence.name: one.sequence for one in found}
    return Sequences(definitions, runners, outcomes or {})


def choose(definitions: Mapping[str, model.Sequence], name: str | None) -> str:
    """The name of one of the sequences; it can be left out where there is one. UsageError."""
    if name is None and len(definitions) == 1:
        return next(iter(definitions))
    if name is None:
        raise UsageError(f"which sequence? There are {', '.join(sorted(definitions))}")
    if name not in definitions:
        raise UsageError(f"sequence {name!r} does not exist; {nearest(name, list(definitions))}")
    return name


def make_runners(settings: Settings, types: Iterable[str]) -> dict[str, Runner]:
    """The runners of the settings, for what they would send; others for further types."""
    sms = settings.sms
    if sms.provider == "twilio" and not (sms.account_sid and sms.auth_token):
        account = {"account_sid": "unknown", "auth_token": SecretStr("unknown")}
        settings = settings.model_copy(update={"sms": sms.model_copy(update=account)})
    runners = daemon.make_runners(settings)
    return {**{type_: _Stub() for type_ in types}, **runners}


class _Stub:
    """Stands for a runner of which only the outcome is known."""

    batch_size = concurrency = 1
    timeout = 1.0
    retry = RETRY

    def compile(self, config: Mapping[str, Any]) -> object:
        return config

    async def run(self, program: object, tasks: Sequence[Task]) -> Sequence[Result]:
        raise NotImplementedError(f"a simulation executes nothing, neither {program} for {tasks}")

    async def close(self) -> None:
        pass


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
