"""Compare the engine with a model of it, for any order of operations on enrollments and daemons.
The model, forty lines with hours as its clock, predicts where each enrollment is and how often each
side effect has begun. CHAOS_EXAMPLES is how many orders are tried.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections import Counter
from collections.abc import Coroutine, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, TypeVar

import asyncpg
import pytest
import structlog
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from sequencerd.core.model import Action, Limits, RetryPolicy
from sequencerd.core.task import Answer, Failed, Result, Task
from sequencerd.daemon import daemon_name
from sequencerd.engine.clock import Clock
from sequencerd.engine.lookups import Lookups
from sequencerd.engine.loop import Engine
from sequencerd.service.metrics import Metrics
from sequencerd.settings import EngineSettings
from sequencerd.storage import connections
from sequencerd.storage.listener import listen
from tests.chaos.world import IS_SHORT
from tests.helpers.databases import shard
from tests.helpers.engines import define
from tests.helpers.waiting import PATIENCE

EXAMPLES = int(os.environ.get("CHAOS_EXAMPLES", "20" if IS_SHORT else "40"))
ATTEMPTS = 3
LEASE = 0.01  # hours: less than any step of the clock
T = TypeVar("T")

PAID = {"lodashCommand": "identity", "value": {"type": "get", "value": "data.paid"}}
VIP = {"lodashCommand": "identity", "value": {"type": "get", "value": "data.vip"}}
STEPS: tuple[tuple[str, str, Mapping[str, object], str | None], ...] = (
    ("wait", "WaitForDuration", {"amount": 4, "unit": "hours"}, "task"),
    ("task", "Task", {}, "pause"),
    ("pause", "WaitForDuration", {"amount": 5, "unit": "hours"}, "last"),
    ("paid", "Goal", PAID, "last"),
    ("choice", "Conditional", VIP, "pause"),
    ("last", "Task", {"delivery": "at_most_once"}, None),
)
ALT = {"task": "choice", "choice": None, "last": None}
MODES = ("next", "altNext", "down", "refuse", "hang")


# --- the model


@dataclass
class Expected:
    """Where an enrollment is, by the model. Times are hours since the beginning."""

    id: int
    mode: str
    entered: float
    data: dict[str, bool] = field(default_factory=dict)
    step: str = "wait"
    status: str = "active"
    failure: str | None = None
    visit: int = 1
    attempt: int = 0
    not_before: float = 0.0  # the next attempt
    expiries: list[float] = field(default_factory=list)  # when leases of this visit have expired
    lease_ends: float | None = None  # of a side effect that is under way, or was cut off
    has_begun: bool = False
    is_met: bool = False


@dataclass
class Model:
    """Where each enrollment must be."""

    enrollments: list[Expected] = field(default_factory=list)
    now: float = 0.0
    wait: float = 4.0
    is_paused: bool = False
    begun: Counter[str] = field(default_factory=Counter)  # side effects, by their keys
    hanging: set[int] = field(default_factory=set)  # whose side effect a living daemon executes

    def settle(self) -> None:
        """Let all enrollments go as far as they can."""
        for expected in self.enrollments:
            if not self.is_paused and expected.status == "active":
                expected.has_begun = True
                while expected.status == "active" and self._moves(expected):
                    pass

    def enter(self, expected: Expected, step: str | None, at: float) -> None:
        expected.attempt, expected.not_before, expected.lease_ends = 0, 0.0, None
        expected.expiries.clear()
        if step is None:
            expected.status = "completed"
            return
        expected.step, expected.entered, expected.visit = step, at, expected.visit + 1

    def _moves(self, expected: Expected) -> bool:
        """One move, if there is one to make."""
        if expected.lease_ends is not None and (
            expected.id in self.hanging or self.now < expected.lease_ends
        ):
            return False
        was_cut_off, expected.lease_ends = expected.lease_ends is not None, None
        before = sum(at > self.now - 24 for at in expected.expiries)
        if was_cut_off:
            expected.expiries.append(self.now)
        if expected.data.get("paid") and not expected.is_met:
            expected.is_met = True
            self.enter(expected, "last", self.now)
            return True
        match expected.step:
            case "wait" | "pause":
                hours = self.wait if expected.step == "wait" else 5
                if self.now < expected.entered + hours:
                    return False
                self.enter(expected, "task" if expected.step == "wait" else "last", self.now)
                return True
            case "choice":
                self.enter(expected, "pause" if expected.data.get("vip") else None, self.now)
                return True
            case _:
                return self._executes(expected, before if was_cut_off else None)

    def _executes(self, expected: Expected, expiries: int | None) -> bool:
        """Whether the side effect starts again after so many earlier expired leases."""
        if expiries is not None:
            if expected.step == "last":
                return self._fails(expected, "outcome_unknown")
            expected.attempt -= 1
            expected.not_before = self.now + LEASE if expiries else 0.0
        if self.now < expected.not_before:
            return False
        expected.attempt += 1
        self.begun[f"{expected.id}:{expected.visit}"] += 1
        match expected.mode:
            case "next":
                self.enter(expected, "pause" if expected.step == "task" else None, self.now)
                return True
            case "altNext":
                self.enter(expected, ALT[expected.step], self.now)
                return True
            case "down" if expected.attempt < ATTEMPTS:
                expected.not_before = self.now + LEASE
                return False
            case "hang":
                expected.lease_ends = self.now + LEASE
                self.hanging.add(expected.id)
                return False
            case _:
                return self._fails(expected, "error")

    def _fails(self, expected: Expected, failure: str) -> bool:
        expected.status, expected.failure = "failed", failure
        return False


# --- the engine


class TaskRunner:
    """A runner that returns the result that is set for each enrollment, and counts calls."""

    limits = Limits(1000, 3600.0)
    retry = RetryPolicy(ATTEMPTS, 20, 20)

    def __init__(self) -> None:
        self.begun: Counter[str] = Counter()
        self.modes: dict[int, str] = {}

    def compile(self, config: Mapping[str, Any]) -> object:
        return config

    async def run(self, _program: object, tasks: Sequence[Task]) -> Sequence[Result]:
        (task,) = tasks
        self.begun[":".join(task.key.split(":")[:2])] += 1
        match self.modes[int(task.key.partition(":")[0])]:
            case "down":
                return [Failed("it is down")]
            case "refuse":
                return [Failed("it is refused", permanent=True)]
            case "hang":
                await asyncio.Event().wait()
                raise AssertionError
            case mode:
                return [Answer(Action(mode))]

    async def close(self) -> None:
        pass


class Ahead(Clock):
    """The database's time, and some hours."""

    hours = 0.0

    def now(self) -> datetime:
        return super().now() + timedelta(hours=self.hours)


class Daemon:
    """An engine and its listener, which can be dropped in the middle."""

    def __init__(self, url: str, runner: TaskRunner, clock: Clock) -> None:
        self._url, self._runner, self._clock = url, runner, clock

    async def start(self) -> None:
        log = structlog.get_logger()
        self._pool = await connections.connect_pool(shard(self._url), 5)
        self._heart = await connections.connect_pool(shard(self._url), 1)
        self.engine = Engine(
            self._pool,
            self._heart,
            {"Task": self._runner},
            Lookups(self._pool, {}).get,
            clock=self._clock,
            settings=EngineSettings(),
            name=daemon_name(),
            log=log,
            metrics=Metrics(),
        )
        ready = asyncio.Event()

        async def connected() -> None:
            await self.engine.sweep()
            ready.set()

        self._tasks = [
            asyncio.create_task(
                listen(
                    shard(self._url), self.engine.receive, connected, self.engine.find_due, log=log
                )
            ),
            asyncio.create_task(self.engine.run()),
        ]
        await ready.wait()

    async def crash(self) -> None:
        """It writes nothing more."""
        self._pool.terminate()
        self._heart.terminate()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        _, stuck = await asyncio.wait(tasks, timeout=PATIENCE)
        assert not stuck


# --- both


class World(RuleBasedStateMachine):
    """Does everything to both."""

    url: str

    def __init__(self) -> None:
        super().__init__()
        self.model = Model()
        self.runner, self.clock = TaskRunner(), Ahead()
        self.daemon = Daemon(self.url, self.runner, self.clock)
        self._loop = asyncio.Runner()
        self.is_new = True  # the daemon, which has only read what there was

    @initialize()
    def begin(self) -> None:
        self._wait_for(self._begin())

    async def _begin(self) -> None:
        self.connection = await asyncpg.connect(self.url)
        await self.connection.execute(
            "TRUNCATE sequencer.events, sequencer.enrollments, sequencer.revisions;"
            "DELETE FROM sequencer.sequences"
        )
        steps = [(name, type_, json.dumps(config), next_) for name, type_, config, next_ in STEPS]
        await define(self.connection, "s", *steps)
        await self.connection.executemany(
            "UPDATE sequencer.steps SET alt_next_step = $2 WHERE name = $1", list(ALT.items())
        )
        await self.daemon.start()

    def teardown(self) -> None:
        self._wait_for(self._end())
        self._loop.close()

    async def _end(self) -> None:
        await self.daemon.crash()
        await self.connection.close()

    def _wait_for(self, work: Coroutine[Any, Any, T]) -> T:
        return self._loop.run(work)

    def _do(self, statement: str, *parameters: object) -> Any:
        self.is_new = False
        return self._wait_for(self.connection.fetchval(statement, *parameters))

    @rule(mode=st.sampled_from(MODES), paid=st.booleans(), vip=st.booleans(), told=st.booleans())
    def enroll(self, mode: str, paid: bool, vip: bool, told: bool) -> None:
        """At once, in a transaction that tells the daemon; or later, for the sweep to find."""
        number = len(self.model.enrollments) + 1
        data = {"paid": paid, "vip": vip}
        begins = 0.0 if told else self.model.now  # the database's clock is at the beginning
        self.runner.modes[number] = mode
        id_ = self._do(
            "WITH silent AS MATERIALIZED (SELECT set_config('sequencer.notify', $4, true))"
            " INSERT INTO sequencer.enrollments (id, sequence, subject, data, wake_at)"
            " SELECT $1::bigint, 's', $1::text, $2, now() + $3 * interval '1 hour'"
            " FROM silent RETURNING id",
            number,
            json.dumps(data),
            begins,
            "on" if told else "off",
        )
        if not told:
            self._wait_for(self.daemon.engine.sweep())
        self.model.enrollments.append(Expected(id_, mode, begins, data))

    @precondition(lambda self: not self.model.hanging)
    @rule(hours=st.integers(1, 6))
    def pass_time(self, hours: int) -> None:
        """Unless a lease would run out under a daemon that lives."""
        self.is_new = False
        self.model.now += hours
        self.clock.hours = self.model.now
        self._wait_for(self.daemon.engine.sweep())

    @precondition(lambda self: self.model.enrollments)
    @rule(data=st.data(), key=st.sampled_from(["paid", "vip"]), value=st.booleans())
    def change_data(self, data: st.DataObject, key: str, value: bool) -> None:
        expected = self._somebody(data)
        expected.data[key] = value
        self._do(
            "UPDATE sequencer.enrollments SET data = data || $2 WHERE id = $1",
            expected.id,
            json.dumps({key: value}),
        )

    @precondition(lambda self: self.model.enrollments)
    @rule(data=st.data(), mode=st.sampled_from(MODES))
    def change_mode(self, data: st.DataObject, mode: str) -> None:
        """Of a subject that is not in the sequence already."""
        expected = self._somebody(data)
        self.runner.modes[expected.id] = expected.mode = mode

    @precondition(lambda self: self.model.enrollments)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        expected = self._somebody(data)
        if expected.status == "active":
            expected.status = "cancelled"
            self._let_go(expected)
            self._do(
                "UPDATE sequencer.enrollments SET status = 'cancelled' WHERE id = $1", expected.id
            )

    @precondition(lambda self: self.model.enrollments)
    @rule(data=st.data())
    def retry(self, data: st.DataObject) -> None:
        expected = self._somebody(data)
        if expected.status != "active":
            expected.status, expected.failure = "active", None
            expected.entered = expected.entered if expected.has_begun else 0.0
            expected.attempt, expected.not_before = 0, 0.0
            self._do(
                "UPDATE sequencer.enrollments SET status = 'active' WHERE id = $1", expected.id
            )

    @precondition(lambda self: self.model.enrollments)
    @rule(data=st.data(), step=st.sampled_from(["wait", "task", "pause", "last"]))
    def move(self, data: st.DataObject, step: str) -> None:
        expected = self._somebody(data)
        if expected.step != step:
            self._let_go(expected)
            self.model.enter(expected, step, 0.0 if expected.has_begun else expected.entered)
            self._do("UPDATE sequencer.enrollments SET step = $2 WHERE id = $1", expected.id, step)

    @rule(hours=st.integers(1, 12))
    def edit(self, hours: int) -> None:
        """The first wait is another, for waiting enrollments as well."""
        self.model.wait = hours
        self._do(
            "UPDATE sequencer.steps SET config = config || $1 WHERE name = 'wait'",
            json.dumps({"amount": hours}),
        )

    @rule(paused=st.booleans())
    def pause(self, paused: bool) -> None:
        self.model.is_paused = paused
        status = "paused" if paused else "active"
        self._do("UPDATE sequencer.sequences SET status = $1", status)

    @rule()
    def reevaluate(self) -> None:
        self._do("NOTIFY sequencer")

    @precondition(lambda self: self.model.enrollments and not self.is_new)
    @rule()
    def crash(self) -> None:
        """The daemon is gone, and another one comes: a start costs as much as five other rules."""
        self.model.hanging.clear()
        self._wait_for(self.daemon.crash())
        # its heartbeats are over by the server's clock too, which does not follow the model's
        self._do("UPDATE sequencer.daemons SET alive_until = now()")
        self.is_new = True
        self._wait_for(self.daemon.start())

    def _somebody(self, data: st.DataObject) -> Expected:
        return data.draw(st.sampled_from(self.model.enrollments))

    def _let_go(self, expected: Expected) -> None:
        expected.lease_ends = None
        self.model.hanging.discard(expected.id)

    @invariant()
    def both_agree(self) -> None:
        self.model.settle()
        wanted = {
            one.id: (
                one.step,
                one.status,
                one.failure,
                one.visit,
                one.lease_ends is not None,
                one.has_begun,
            )
            for one in self.model.enrollments
        }
        self._wait_for(self._agree(wanted))

    async def _agree(self, wanted: Mapping[int, tuple[object, ...]]) -> None:
        found: Mapping[int, tuple[object, ...]] = {}
        with suppress(TimeoutError):
            async with asyncio.timeout(PATIENCE):
                while True:
                    rows = await self.connection.fetch(
                        "SELECT id, step, status, failure, visit, leased_by IS NOT NULL,"
                        " entered_at IS NOT NULL FROM sequencer.enrollments"
                    )
                    found = {id_: tuple(state) for id_, *state in rows}
                    if found == wanted and self.runner.begun == self.model.begun:
                        return
                    await asyncio.sleep(0.01)
        rows = await self.connection.fetch("SELECT * FROM sequencer.enrollments")
        events = await self.connection.fetch("SELECT * FROM sequencer.events ORDER BY at")
        told = "\n".join(map(repr, [self.clock.now(), self.model, *rows, *events]))
        assert found == wanted, told
        assert self.runner.begun == self.model.begun


@pytest.mark.usefixtures("connection")  # the schema
def test_the_engine_behaves_like_its_model(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("random.random", lambda: 1.0)  # the whole delay before another attempt
    monkeypatch.setattr(World, "url", database, raising=False)
    run_state_machine_as_test(
        World,
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=30,
            phases=[Phase.explicit, Phase.generate],  # to shrink would take minutes
            deadline=None,
            derandomize="CHAOS_EXAMPLES" not in os.environ,
            suppress_health_check=list(HealthCheck),
        ),
    )
