"""For the tests of your own sequences: load a file, and see where a subject goes.

from sequencerd.testing import load

onboarding = load("onboarding.yaml", outcomes={"Score": "next"})

def test_a_payment_prevents_the_reminder() -> None:
    journey = onboarding.simulate(
        start="2026-03-02T09:00:00Z",
        data={"email": "ada@example.com"},
        changes={"P2D": {"plan": "pro"}},
    )
    assert journey.status == "completed"
    assert [entry.step for entry in journey.sent] == ["welcome", "thanks"]

What is not in `__all__` is private.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import SecretStr

from sequencerd.core.model import DEFAULT_RETRY, Limits
from sequencerd.core.task import Result, Task
from sequencerd.definitions import files
from sequencerd.definitions.simulate import Simulation, TimelineEntry
from sequencerd.definitions.simulator import Outcome, Simulator
from sequencerd.errors import FileError, UsageError
from sequencerd.runners import Runner, registry
from sequencerd.settings import Settings, UnsubscribeSettings

__all__ = [
    "FileError",
    "Outcome",
    "Settings",
    "Simulation",
    "Simulator",
    "TimelineEntry",
    "UsageError",
    "load",
]

_WITH_LINKS = Settings(
    unsubscribe=UnsubscribeSettings(url="https://example.com", keys=(SecretStr("-" * 32),))
)
"""Settings for messages that need a link to unsubscribe."""


def load(
    *paths: str | os.PathLike[str],
    outcomes: Mapping[str, Outcome] | None = None,
    settings: Settings | None = None,
) -> Simulator:
    """Read files. `outcomes` are the results of side effects by type: next (the default), altNext,
    noop, fail, or an answer such as {"action": "next", "data": {"score": 80}}. Types named there
    need no runner. Without `settings`, links to unsubscribe lead to example.com. Raises FileError.
    """
    runners = make_runners(settings or _WITH_LINKS, outcomes or {})
    found = files.read_all([Path(path) for path in paths], runners)
    definitions = {one.sequence.name: one.seeded({}) for one in found}
    return Simulator(definitions, runners, outcomes or {})


def make_runners(settings: Settings, types: Iterable[str]) -> dict[str, Runner]:
    """Return the runners in the settings, which render messages; and placeholders for further
    types.
    """
    sms = settings.sms
    if sms.provider == "twilio" and not (sms.account_sid and sms.auth_token):
        account = {"account_sid": "unknown", "auth_token": SecretStr("unknown")}
        settings = settings.model_copy(update={"sms": sms.model_copy(update=account)})
    runners = registry.make_runners(settings)
    return {**{type_: _Stub() for type_ in types}, **runners}


class _Stub:
    """Stands in for a runner of which only the outcome is known."""

    limits = Limits()
    retry = DEFAULT_RETRY

    def compile(self, config: Mapping[str, Any]) -> object:
        return config

    async def run(self, program: object, tasks: Sequence[Task]) -> Sequence[Result]:
        raise NotImplementedError(f"a simulation executes nothing, neither {program} for {tasks}")

    async def close(self) -> None:
        pass
