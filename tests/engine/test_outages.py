"""Servers that are down, throttle, or fail for one enrollment: what waits, what spends attempts."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import pairwise
from typing import Any

import asyncpg
import pytest

from sequencerd.core.backoff import Pauses
from sequencerd.core.task import Answer, Failed, Result, Task
from sequencerd.engine.breaker import Breaker
from sequencerd.runners import Runner
from sequencerd.runners.http import BatchRunner
from tests.helpers import servers
from tests.helpers.engines import ALL_ENDED, Recorder, define, running_engine, until
from tests.helpers.runners import email_runner, http_runner
from tests.helpers.servers import HOST, Request, http_server, smtp_server
from tests.helpers.waiting import eventually

SHORT = Pauses(0.02, 0.05)
COUNT = "SELECT count(*) FROM sequencer.enrollments WHERE status = '{}'"
COMPLETED, FAILED, ACTIVE = (COUNT.format(s) for s in ("completed", "failed", "active"))
ENROLL = (
    "INSERT INTO sequencer.enrollments (sequence, subject)"
    " SELECT 's', 'user-' || n FROM generate_series(1, $1::int) AS n"
)
RETRIES = "SELECT count(*) FROM sequencer.events WHERE action = 'retry'"
TWICE = '{"retry": {"attempts": 2, "firstDelay": 0}}'
MAIL = (
    '{"from": "a@x.test", "to": "b@x.test", "subject": "x", "text": "x",'
    ' "retry": {"attempts": 2, "firstDelay": 0}}'
)
DOWN = "SELECT EXISTS (SELECT FROM sequencer.problems WHERE kind = 'runner' AND about = $1)"


class Endpoint:
    """A custom runner's endpoint: each call is answered by `status`, or by what it holds."""

    def __init__(self) -> None:
        self.status = 200
        self.headers: dict[str, str] = {}
        self.poisoned: set[str] = set()
        self.calls: list[list[str]] = []  # the subjects
        self.times: list[float] = []
        self.turn = asyncio.Condition()

    async def respond(self, request: Request) -> servers.Answer:
        runners = json.loads(request.body)["runners"]
        subjects = [one["subject"] for one in runners]
        async with self.turn:
            self.calls.append(subjects)
            self.times.append(asyncio.get_running_loop().time())
            self.turn.notify_all()
        if self.poisoned & set(subjects):
            return servers.Answer(500, b"cannot cope with this one")
        if self.status != 200:
            return servers.Answer(self.status, b"no", self.headers)
        return await servers.all_next(request)

    async def called(self, times: int) -> None:
        """Wait for so many more calls."""
        wanted = len(self.calls) + times
        async with self.turn:
            await self.turn.wait_for(lambda: len(self.calls) >= wanted)


@asynccontextmanager
async def endpoint(**options: Any) -> AsyncIterator[tuple[Endpoint, BatchRunner]]:
    made = Endpoint()
    async with http_server(made.respond) as server:
        runner = http_runner(server.url, name="Score", **options)
        yield made, runner
        await runner.close()


class Counted:
    """Count each call before another runner handles it."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self.limits, self.retry = runner.limits, runner.retry
        self.compile, self.close = runner.compile, runner.close
        self.calls = 0
        self.turn = asyncio.Condition()

    async def run(self, program: object, tasks: Any) -> Any:
        results = await self._runner.run(program, tasks)
        async with self.turn:
            self.calls += 1
            self.turn.notify_all()
        return results

    async def called(self, times: int) -> None:
        """Waits until there were so many calls more."""
        wanted = self.calls + times
        async with self.turn:
            await self.turn.wait_for(lambda: self.calls >= wanted)


async def versions(connection: asyncpg.Connection) -> dict[int, str]:
    """Which version each row is of: another one after each UPDATE."""
    rows = await connection.fetch("SELECT id, xmin::text FROM sequencer.enrollments")
    return {row["id"]: row["xmin"] for row in rows}


def closed_port() -> int:
    """A port without a listener."""
    with socket.socket() as made:
        made.bind((HOST, 0))
        port: int = made.getsockname()[1]
        return port


@pytest.mark.slow
async def test_a_mail_server_that_is_down_fails_no_enrollment(
    database: str, connection: asyncpg.Connection
) -> None:
    port = closed_port()
    runner = Counted(email_runner(f"smtp://{HOST}:{port}"))
    async with running_engine(database, {"Email": runner}, pauses=SHORT) as engine:
        await define(connection, "s", ("mail", "Email", MAIL, None))
        await connection.execute(ENROLL, 100)
        await until(connection, DOWN, "Email")
        tried = runner.calls
        before = await versions(connection)
        await runner.called(20)  # ten times the attempts that a step has
        after = await versions(connection)
        assert await connection.fetchval(ACTIVE) == 100
        assert await connection.fetchval("SELECT max(attempt) FROM sequencer.enrollments") <= 1
        changed = sum(before[id_] != version for id_, version in after.items())
        tried_since = runner.calls - tried
        # One may be leased whose call is not counted yet, and 20 may have been given back.
        assert changed <= tried_since + 1 + 20
        assert await connection.fetchval(RETRIES) <= runner.calls
        problem = await connection.fetchrow("SELECT * FROM sequencer.problems")
        assert problem["about"] == "Email"
        assert f"{HOST}:{port}" in problem["message"]
        await until(connection, "SELECT waiting > 50 FROM sequencer.problems")
        executor = engine.executors.by_key["Email"]
        assert executor.outage == problem["message"]
        async with smtp_server(port=port) as box:
            await until(connection, ALL_ENDED)
            await runner.close()
            while box.open:
                box.alone.clear()
                await box.alone.wait()
        assert await connection.fetchval(COMPLETED) == 100
        await until(connection, "SELECT NOT EXISTS (SELECT FROM sequencer.problems)")
    assert len(box.messages) == 100
    twice = f"SELECT max(n) FROM ({RETRIES} GROUP BY enrollment_id) AS r(n)"
    assert await connection.fetchval(twice) == 1  # the same reason is reported once


@pytest.mark.parametrize("count", [1, 2, 3, 60])
@pytest.mark.slow
async def test_an_endpoint_that_answers_500_to_every_call_fails_no_enrollment(
    database: str, connection: asyncpg.Connection, count: int
) -> None:
    async with endpoint(batch_size=10) as (server, runner):
        server.status = 500
        async with running_engine(database, {"Score": runner}, pauses=SHORT):
            await define(connection, "s", ("score", "Score", TWICE, None))
            await connection.execute(ENROLL, count)
            await server.called(25)
            assert await connection.fetchval(FAILED) == 0
            await until(connection, DOWN, "Score")
            server.status = 200
            await until(connection, ALL_ENDED)
        assert await connection.fetchval(COMPLETED) == count


@pytest.mark.slow
async def test_a_new_outage_fails_no_enrollment(
    database: str, connection: asyncpg.Connection
) -> None:
    async with endpoint(batch_size=1) as (server, runner):
        async with running_engine(database, {"Score": runner}, pauses=SHORT):
            await define(connection, "s", ("score", "Score", TWICE, None))
            await connection.execute(ENROLL, 20)
            await until(connection, ALL_ENDED)
            server.status = 503
            await connection.execute(ENROLL, 5)
            await server.called(40)
            assert await connection.fetchval(FAILED) == 0
            assert await connection.fetchval(ACTIVE) == 5
            server.status = 200
            await until(connection, ALL_ENDED)
        assert await connection.fetchval(COMPLETED) == 25


@pytest.mark.parametrize("batch", [1, 100])
@pytest.mark.parametrize("poisoned", ["user-1", "user-11", "user-21"])
async def test_an_enrollment_that_crashes_the_endpoint_fails_alone(
    database: str, connection: asyncpg.Connection, batch: int, poisoned: str
) -> None:
    async with endpoint(batch_size=batch) as (server, runner):
        server.poisoned = {poisoned}
        async with running_engine(database, {"Score": runner}, pauses=SHORT):
            await define(connection, "s", ("score", "Score", TWICE, None))
            await connection.execute(ENROLL, 21)
            await until(connection, ALL_ENDED)
        failed = await connection.fetch(
            "SELECT subject, attempt, last_error FROM sequencer.enrollments WHERE status = 'failed'"
        )
    assert [(row["subject"], row["attempt"]) for row in failed] == [(poisoned, 2)]
    assert "cannot cope" in failed[0]["last_error"]
    assert await connection.fetchval(COMPLETED) == 20


async def test_a_failure_in_an_idle_system_delays_no_other_enrollment(
    database: str, connection: asyncpg.Connection
) -> None:
    async with endpoint(batch_size=1) as (server, runner):
        server.poisoned = {"user-1"}
        pauses = Pauses(0.05, 3600.0)
        async with running_engine(database, {"Score": runner}, pauses=pauses):
            await define(connection, "s", ("score", "Score", TWICE, None))
            await connection.execute(ENROLL, 1)
            await server.called(4)
            await until(connection, DOWN, "Score")
            await connection.execute(
                "INSERT INTO sequencer.enrollments (sequence, subject) VALUES ('s', 'user-2')"
            )
            await until(connection, COMPLETED.replace("count(*)", "count(*) = 1"))
            await until(connection, f"SELECT NOT ({DOWN.removeprefix('SELECT ')})", "Score")


@pytest.mark.parametrize("header", ["0", "-1", "Mon, 01 Jan 2001 00:00:00 GMT", None])
@pytest.mark.slow
async def test_throttling_is_no_hot_loop(
    database: str, connection: asyncpg.Connection, header: str | None
) -> None:
    async with endpoint(batch_size=1) as (server, runner):
        server.status = 429
        server.headers = {} if header is None else {"Retry-After": header}
        async with running_engine(database, {"Score": runner}, pauses=Pauses(0.02, 1.0)):
            await define(connection, "s", ("score", "Score", TWICE, None))
            await connection.execute(ENROLL, 30)
            await server.called(12)
            # Up to four run at the same time, and a busy server may count those before late.
            gaps = [b - a for a, b in pairwise(server.times[4:])]
            assert gaps[-1] >= 0.02 * 2**4 * 0.75
            assert await connection.fetchval(ACTIVE) == 30
            server.status = 200
            await until(connection, ALL_ENDED)
        assert await connection.fetchval(COMPLETED) == 30
    most = f"SELECT max(n) FROM ({RETRIES} GROUP BY enrollment_id) AS r(n)"
    assert await connection.fetchval(most) == 1


async def test_a_single_free_slot_is_not_divided_among_claimers(
    database: str, connection: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after an outage; this runner answers before the claimers go on, so nothing wakes them."""
    monkeypatch.setattr(Breaker, "allowed", 1)
    async with running_engine(database, {"Note": Recorder()}, sweep=3600):
        await define(connection, "s", ("note", "Note", "{}", None))
        await connection.execute(ENROLL, 5)
        await until(connection, ALL_ENDED)


async def test_the_reason_is_recorded_again_when_it_changes(
    database: str, connection: asyncpg.Connection
) -> None:
    said = ["refused", "refused", "login failed", "login failed", "refused"]

    async def behaviour(_: Task) -> Result:
        return Failed(said.pop(0), fault="server") if said else Answer()

    recorder = Recorder(behaviour)
    async with running_engine(database, {"Work": recorder}, pauses=SHORT):
        await define(connection, "s", ("work", "Work", TWICE, None))
        await connection.execute(ENROLL, 1)
        await until(connection, ALL_ENDED)
    rows = await connection.fetch(
        "SELECT message FROM sequencer.events WHERE action = 'retry' ORDER BY at"
    )
    assert [row["message"] for row in rows] == ["refused", "login failed", "refused"]
    assert len(recorder.keys) == 6
    assert len(set(recorder.keys)) == 1


async def test_a_runner_that_is_down_delays_no_other(
    database: str, connection: asyncpg.Connection
) -> None:
    down = Recorder(fails)
    async with running_engine(database, {"Down": down, "Well": Recorder()}, pauses=SHORT):
        await define(connection, "s", ("work", "Down", "{}", None))
        await define(connection, "t", ("work", "Well", "{}", None))
        await connection.execute(ENROLL, 50)
        await until(connection, DOWN, "Down")
        await connection.execute(ENROLL.replace("'s'", "'t'"), 50)
        await until(connection, COMPLETED.replace("count(*)", "count(*) = 50"))
        assert await connection.fetchval(ACTIVE) == 50
        down.behaviour = None
        await until(connection, ALL_ENDED)


async def fails(_: Task) -> Result:
    return Failed("refuses connections", fault="server")


async def test_a_step_that_needs_another_runner_does_not_wait_for_one_that_is_down(
    database: str, connection: asyncpg.Connection
) -> None:
    runners = {"Down": Recorder(fails), "Well": Recorder()}
    async with running_engine(database, runners, pauses=Pauses(3600, 3600)) as engine:
        await define(connection, "s", ("work", "Down", "{}", None))
        await define(connection, "t", ("work", "Down", "{}", None))
        await connection.execute(ENROLL, 1)
        await until(connection, DOWN, "Down")
        await connection.execute(ENROLL.replace("'s'", "'t'"), 3)
        await eventually(lambda: ("t", "work") in engine.executors.waiting())
        await connection.execute("UPDATE sequencer.steps SET type = 'Well' WHERE sequence = 't'")
        await until(connection, COMPLETED.replace("count(*)", "count(*) = 3"))
