"""The executor gets its slots back whatever a runner returns or raises, and when it stops."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, cast
from uuid import uuid4

import asyncpg
import pytest

from sequencerd.core.backoff import Pauses
from sequencerd.core.enrollment import Enrollment
from sequencerd.core.model import Limits, RetryPolicy
from sequencerd.core.task import Answer, NotStarted, Task
from sequencerd.engine.executors import Executor, Finished, Leased
from sequencerd.service.metrics import Metrics
from tests.helpers.engines import define, running_engine, until
from tests.helpers.waiting import PATIENCE

COMPLETED = "SELECT count(*) = 3 FROM sequencer.enrollments WHERE status = 'completed'"
REPORTED = (
    "SELECT count(*) > 0 FROM sequencer.events WHERE action = 'retry' AND message LIKE $1 || '%'"
)
SHORT = Pauses(0.02, 0.05)


class Aborted(BaseException):
    """As some libraries raise."""


def _raise(error: BaseException) -> None:
    raise error


class Plugin:
    """A runner whose author has made a mistake that shows for some subjects."""

    limits = Limits(1, 60.0, 1)
    retry = RetryPolicy(first_delay=0)

    def __init__(self, mistake: Callable[[], Any]) -> None:
        self._mistake = mistake

    def compile(self, config: Mapping[str, Any]) -> object:
        return config

    async def run(self, _: object, tasks: Sequence[Task]) -> Any:
        if str(tasks[0].view["subject"]).startswith("bad"):
            return self._mistake()
        return [Answer() for _ in tasks]

    async def close(self) -> None:
        pass


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (lambda: None, "the runner returned NoneType instead of a list of results"),
        (lambda: {"action": "next"}, "the runner returned dict instead of a list of results"),
        (lambda: "next", "the runner returned str instead of a list of results"),
        (lambda: iter([Answer()]), "the runner returned % instead of a list of results"),
        (list, "the runner returned 0 results for 1 enrollment"),
        (lambda: [None], "the runner returned NoneType instead of a result"),
        (lambda: ["next"], "the runner returned str instead of a result"),
        (lambda: _raise(Aborted("enough")), "Aborted: enough"),
        (lambda: _raise(SystemExit(3)), "SystemExit: 3"),
        (lambda: _raise(KeyboardInterrupt()), "KeyboardInterrupt: "),
        (lambda: _raise(GeneratorExit()), "GeneratorExit: "),
    ],
)
async def test_a_plug_in_may_return_and_raise_anything(
    database: str, connection: asyncpg.Connection, mistake: Callable[[], Any], message: str
) -> None:
    await define(connection, "s", ("work", "Work", "{}", None))
    async with running_engine(database, {"Work": Plugin(mistake)}, pauses=SHORT):
        for kind in ("bad", "good"):
            await connection.execute(
                "INSERT INTO sequencer.enrollments (sequence, subject)"
                " SELECT 's', $1 || n FROM generate_series(1, 3) AS n",
                kind,
            )
        await until(connection, REPORTED, message)
        await until(connection, COMPLETED)


async def test_a_runner_may_return_any_sequence(
    database: str, connection: asyncpg.Connection
) -> None:
    await define(connection, "s", ("work", "Work", "{}", None))
    async with running_engine(database, {"Work": Plugin(lambda: deque([Answer()]))}):
        await connection.execute(
            "INSERT INTO sequencer.enrollments (sequence, subject)"
            " SELECT 's', 'bad' || n FROM generate_series(1, 3) AS n"
        )
        await until(connection, COMPLETED)
    assert not await connection.fetchval(REPORTED, "")


async def test_a_cancelled_call_ends_the_call(
    database: str, connection: asyncpg.Connection
) -> None:
    await define(connection, "s", ("work", "Work", "{}", None))
    plugin = Plugin(lambda: _raise(asyncio.CancelledError()))
    async with running_engine(database, {"Work": plugin}):
        await connection.execute(
            "INSERT INTO sequencer.enrollments (sequence, subject) VALUES ('s', 'bad')"
        )
        await until(connection, "SELECT count(*) > 0 FROM sequencer.events WHERE action = 'retry'")


def executor(
    limits: Limits = Plugin.limits, finished: Callable[[Sequence[Finished]], None] = lambda _: None
) -> Executor:
    plugin = Plugin(lambda: None)
    plugin.limits = limits
    return Executor(
        "Work",
        plugin,
        finished=finished,
        resumed=lambda _: None,
        outage_changed=lambda _: None,
        redact=str,
        metrics=Metrics(),
        pauses=SHORT,
    )


async def test_a_step_is_claimed_again_once_half_of_the_slots_are_free() -> None:
    one = executor(Limits(2, 60.0, 10))
    one.reserve(40)
    worth = []
    for _ in range(4):
        one.reserve(-10)
        worth.append(one.is_worth_claiming)
    assert worth == [False, True, True, True]
    one.reserve(21)
    assert not one.is_worth_claiming


@pytest.mark.parametrize("turns", [0, 1, 2])
async def test_a_side_effect_that_is_leased_at_the_moment_of_a_stop_is_given_back(
    turns: int,
) -> None:
    """Its lease would be lost, and the stop would wait for it."""
    finished: list[Finished] = []
    one = executor(finished=finished.extend)
    now, nothing = datetime.now(UTC), cast("Any", None)
    enrollment = Enrollment(1, "ada", "{}", now, uuid4(), None, now, "s", "work", None)
    leased = Leased(enrollment, nothing, one, nothing, Task("1", {"subject": "ada"}))
    one.reserve(1)
    stopping = asyncio.create_task(one.stop(PATIENCE))
    for _ in range(turns):
        await asyncio.sleep(0)
    one.start([leased])
    await stopping
    await one.drained()
    assert [(lease.enrollment.id, result) for lease, result in finished] == [(1, NotStarted())]
