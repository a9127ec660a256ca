"""The engine on a real database."""

from __future__ import annotations

import asyncio
import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Iterable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import pytest

from sequencerd.core.backoff import Pauses
from sequencerd.core.enrollment import Fence, StepKey
from sequencerd.core.model import Action
from sequencerd.core.task import Answer, Failed, NotStarted, Result, Task
from sequencerd.core.view import View
from sequencerd.engine import claims, loop, results
from sequencerd.engine.batch import MAX_UNLOCKED, Batch
from sequencerd.engine.executors import Leased
from sequencerd.engine.leases import Leases
from sequencerd.engine.loop import Engine
from sequencerd.engine.results import Results
from sequencerd.storage import connections, listener, locking, sequences, wakes, writes
from sequencerd.storage.daemons import NotifyLock, acquire_notify_lock
from sequencerd.storage.database_errors import TRANSIENT_ERRORS
from sequencerd.storage.statements import QUERIES
from tests.core.test_advance import at
from tests.helpers import servers
from tests.helpers.databases import SCHEMA, shard
from tests.helpers.engines import (
    ALL_ENDED,
    LOCK_IS_HELD,
    NOTIFY_LOCK,
    Held,
    HeldWrites,
    Recorder,
    define,
    enroll,
    losing_answers,
    running_engine,
    until,
    way,
)
from tests.helpers.runners import http_runner
from tests.helpers.waiting import PATIENCE, eventually

PAID = """{
    "lodashCommand": "eq",
    "value": {"type": "get", "value": "data.paid"},
    "compareTo": {"type": "raw", "value": true}
}"""
DAYS = '{"amount": 3, "unit": "days"}'
SHORT = '{"amount": 30, "unit": "milliseconds"}'


@pytest.mark.slow
async def test_all_enrollments_complete(database: str, connection: asyncpg.Connection) -> None:
    recorder = Recorder(batch_size=100)
    await define(
        connection,
        "s",
        ("hello", "Note", "{}", "pause"),
        ("pause", "WaitForDuration", SHORT, "bye"),
        ("bye", "Note", "{}", None),
    )
    async with running_engine(database, {"Note": recorder}):
        await connection.execute(
            "INSERT INTO sequencer.enrollments (sequence, subject)"
            " SELECT 's', 'u' || n FROM generate_series(1, 1500) AS n"
        )
        await until(connection, ALL_ENDED)
    assert set(Counter(recorder.keys).values()) == {1}
    assert len(recorder.keys) == 3000
    statuses = await connection.fetch("SELECT DISTINCT status FROM sequencer.enrollments")
    assert [row["status"] for row in statuses] == ["completed"]
    assert await way(connection, 1) == [
        "hello enrolled",
        "hello next",
        "pause next",
        "bye next",
        "bye completed",
    ]


async def test_a_shared_outcome_keeps_each_enrollments_own_data(
    database: str, connection: asyncpg.Connection
) -> None:
    done = Answer()

    async def answer(_: Task) -> Result:
        return done

    await define(connection, "s", ("hello", "Note", "{}", "bye"), ("bye", "Note", "{}", None))
    # a number that PostgreSQL takes and Python does not
    await connection.execute(
        "INSERT INTO sequencer.enrollments (sequence, subject, data)"
        " SELECT 's', 'u' || n, jsonb_build_object("
        "   'n', CASE n WHEN 7 THEN repeat('7', 5000)::numeric ELSE n END)"
        " FROM generate_series(1, 20) AS n"
    )
    recorder = Recorder(answer, batch_size=20)
    async with running_engine(database, {"Note": recorder}):
        await until(connection, ALL_ENDED)
    others = [n for n in range(1, 21) if n != 7]
    assert {(view["subject"], view["data"]["n"], view["step"]) for view in recorder.views} == {
        (f"u{n}", n, step) for n in others for step in ("hello", "bye")
    }
    assert sorted(recorder.visits) == sorted(f"{n}:{visit}" for n in others for visit in (1, 2))
    for n in others:
        assert await way(connection, n) == [
            "hello enrolled",
            "hello next",
            "bye next",
            "bye completed",
        ]
    assert await way(connection, 7) == ["hello enrolled", "hello failed"]
    failed = "SELECT id, failure FROM sequencer.failures"
    assert [tuple(row) for row in await connection.fetch(failed)] == [(7, "bad_data")]


async def test_enrollments_whose_data_give_the_same_answers_move_together(
    database: str, connection: asyncpg.Connection
) -> None:
    def gets(path: str) -> dict[str, str]:
        return {"type": "get", "value": path}

    vip = json.dumps({"lodashCommand": "identity", "value": gets("data.vip")})
    many = json.dumps(
        {"lodashCommand": "gt", "value": gets("data.n"), "compareTo": {"type": "raw", "value": 10}}
    )
    await define(
        connection,
        "s",
        ("many", "Conditional", many, "hello"),
        ("hello", "Note", "{}", None),
        ("vip", "Goal", vip, None),
    )
    await connection.execute(
        "INSERT INTO sequencer.enrollments (sequence, subject, data)"
        " SELECT 's', 'u' || n, jsonb_build_object('n', n, 'vip', n % 5 = 0)"
        " FROM generate_series(1, 20) AS n"
    )
    recorder = Recorder(batch_size=20)
    async with running_engine(database, {"Note": recorder}):
        await until(connection, ALL_ENDED)
    greeted = {n for n in range(11, 21) if n % 5}
    assert {view["data"]["n"] for view in recorder.views} == greeted
    for n in range(1, 21):
        met = ["many enrolled", "many goal", "many completed"]
        passed = ["many enrolled", "many next", "hello next", "hello completed"]
        fewer = ["many enrolled", "many altNext", "many completed"]
        assert await way(connection, n) == (passed if n in greeted else fewer if n % 5 else met)


async def test_a_commit_whose_answer_is_lost_is_detected(
    database: str, connection: asyncpg.Connection
) -> None:
    recorder = Recorder()
    await define(connection, "s", ("one", "Note", "{}", "two"), ("two", "Note", "{}", None))
    async with (
        losing_answers(database) as (url, lose),
        running_engine(url, {"Note": recorder}, lease=3600),
    ):
        # of a claim, and then of the write of a result that begins the next side effect as well
        for lost, subject in enumerate(("ada", "bob", "eve", "zoe")):
            lose.extend([True] * lost)
            await enroll(connection, "s", subject)
            await until(connection, ALL_ENDED)
            assert not lose
    assert set(Counter(recorder.keys).values()) == {1}
    for id_ in range(1, 5):
        assert await way(connection, id_) == [
            "one enrolled",
            "one next",
            "two next",
            "two completed",
        ]


async def test_a_lost_answer_starts_no_side_effect_twice_that_was_returned_and_leased_again(
    database: str, connection: asyncpg.Connection
) -> None:
    """A side effect that was not started is leased again, with the same attempt, another number."""
    recorder = Recorder()
    await define(connection, "s", ("one", "Note", "{}", None))
    async with (
        losing_answers(database) as (url, lose),
        running_engine(url, {"Note": recorder}, lease=3600),
    ):

        async def not_at_first(_: Task) -> Result:
            if len(recorder.keys) > 1:
                return Answer()
            lose.append(True)  # of the write of what is returned now
            return NotStarted()

        recorder.behaviour = not_at_first
        id_ = await enroll(connection, "s", "ada")
        await until(connection, ALL_ENDED)
        assert not lose
    assert len(recorder.keys) == 2  # not started, and then done once
    assert await way(connection, id_) == ["one enrolled", "one next", "one completed"]


async def test_side_effects_whose_leases_are_in_doubt_do_not_wait_for_other_sessions(
    database: str, connection: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that has waited for a row of the claim holds it afterwards."""
    recorder = Recorder()
    await define(connection, "s", ("one", "Note", "{}", None))
    other = await asyncpg.connect(database)
    async with (
        losing_answers(database) as (url, lose),
        running_engine(url, {"Note": recorder}, lease=3600) as engine,
    ):
        writes = HeldWrites(engine, monkeypatch)
        # late, so that they are locked
        await connection.execute(
            "INSERT INTO sequencer.enrollments (sequence, subject, wake_at)"
            " SELECT 's', u, now() - interval '1 hour' FROM unnest('{a,b}'::text[]) AS u"
        )
        await writes.begun.wait()
        async with other.transaction():
            locking = asyncio.create_task(
                other.execute("SELECT FROM sequencer.enrollments WHERE subject = 'b' FOR UPDATE")
            )
            await until(
                connection,
                "SELECT wait_event_type = 'Lock' FROM pg_stat_activity WHERE pid = $1",
                other.get_server_pid(),
            )
            lose.append(True)
            writes.released.set()
            await locking
            await eventually(lambda: len(recorder.keys) == 2)
            assert not lose
        await until(connection, ALL_ENDED)
    await other.close()
    assert set(Counter(recorder.keys).values()) == {1}


@pytest.mark.parametrize("config", ["{}", '{"delivery": "at_most_once"}'])
async def test_an_orphan_with_a_doubtful_lease_is_not_executed_twice(
    database: str, connection: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch, config: str
) -> None:
    """The answer to the COMMIT of a lease is lost, and the daemon learns the outcome only after the
    lease has expired. A sweep runs meanwhile.
    """
    recorder = Recorder()
    asked, told = asyncio.Event(), asyncio.Event()
    held = Leases.held

    async def slowly(self: Leases, leased: Iterable[Leased], **options: Any) -> set[Fence]:
        asked.set()
        await told.wait()
        return await held(self, leased, **options)

    monkeypatch.setattr(Leases, "held", slowly)
    await define(connection, "s", ("one", "Note", config, "two"), ("two", "Note", "{}", None))
    async with (
        losing_answers(database) as (url, lose),
        running_engine(url, {"Note": recorder}, lease=1.0) as engine,
    ):
        lose.append(True)
        await sweep_after_expiry(connection, engine, asked, told)
    assert Counter(recorder.keys).most_common(1)[0][1] == 1


@pytest.mark.parametrize("config", ["{}", '{"delivery": "at_most_once"}'])
async def test_a_lease_whose_answer_is_late_is_not_taken_for_an_orphan(
    database: str, connection: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch, config: str
) -> None:
    """The answer to the write of a lease arrives only after the lease has expired and a sweep has
    found it.
    """
    recorder = Recorder()
    written, told = asyncio.Event(), asyncio.Event()
    write = writes.write_unchanged

    async def slowly(*arguments: Any) -> int | None:
        number = await write(*arguments)
        written.set()
        await told.wait()
        return number

    monkeypatch.setattr(writes, "write_unchanged", slowly)
    await define(connection, "s", ("one", "Note", config, "two"), ("two", "Note", "{}", None))
    async with running_engine(database, {"Note": recorder}, lease=1.0) as engine:
        await sweep_after_expiry(connection, engine, written, told)
    assert Counter(recorder.keys).most_common(1)[0][1] == 1


async def sweep_after_expiry(
    connection: asyncpg.Connection,
    engine: Engine,
    leased: asyncio.Event,
    told: asyncio.Event,
) -> None:
    """Enroll, and sweep when the lease has expired that was `leased`. Only then, `told` lets the
    daemon know of it. The journey goes on as if the answer had not been late.
    """
    id_ = await enroll(connection, "s", "ada")
    await asyncio.wait_for(leased.wait(), PATIENCE)
    await until(connection, "SELECT wake_at < now() FROM sequencer.enrollments")
    await engine.sweep()
    told.set()
    await until(connection, ALL_ENDED)
    assert await way(connection, id_) == ["one enrolled", "one next", "two next", "two completed"]


@pytest.mark.slow
async def test_a_claim_beside_a_held_snapshot_skips_finished_rows(
    database: str, connection: asyncpg.Connection
) -> None:
    """Nor do they when a notification claims anything about the past or the future."""
    await define(connection, "s", ("a", "Note", "{}", None))
    other = await asyncpg.connect(database)
    await other.execute("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT 1")
    async with running_engine(database, {"Note": Recorder(batch_size=100)}) as engine:
        await connection.execute(
            "INSERT INTO sequencer.enrollments (sequence, subject, data)"
            " SELECT 's', 'u' || n, '{}' FROM generate_series(1, 1000) AS n"
        )
        await until(connection, ALL_ENDED)
        await until(
            connection, "SELECT max(at) < now() - interval '0.3 second' FROM sequencer.events"
        )
        for since in ("0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-14:00"):
            payload = json.dumps({"due": ["s", "a"], "since": since, "later": True})
            await connection.execute("SELECT pg_notify('sequencer', $1)", payload)
        await enroll(connection, "s", "last")
        await until(connection, ALL_ENDED)
    await other.close()
    assert await connection.fetchval(
        "SELECT max(created_at) < $1 FROM sequencer.enrollments WHERE subject <> 'last'",
        engine._cursors.since(("s", "a")),
    )


async def test_a_lease_that_was_rolled_back_is_not_mistaken_for_a_later_lease(
    database: str, connection: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the daemon reads the rows to learn the outcome of one transaction, another leases the
    same enrollment, with the same visit and daemon.
    """
    asked, told, answered, finish = (asyncio.Event() for _ in range(4))
    held, write = Leases.held, writes.write_unchanged

    async def slowly(self: Leases, leased: Iterable[Leased], **options: Any) -> set[Fence]:
        asked.set()
        await told.wait()
        try:
            return await held(self, leased, **options)
        finally:
            answered.set()

    async def cut_off_once(*arguments: Any) -> int | None:
        if not asked.is_set():
            raise ConnectionResetError("cut off")
        return await write(*arguments)

    async def wait(_: Task) -> Result:
        await finish.wait()
        return Answer()

    monkeypatch.setattr(Leases, "held", slowly)
    monkeypatch.setattr(writes, "write_unchanged", cut_off_once)
    recorder = Recorder(wait)
    await define(connection, "s", ("one", "Note", "{}", None))
    async with running_engine(database, {"Note": recorder}) as engine:
        id_ = await enroll(connection, "s", "ada")
        await asyncio.wait_for(asked.wait(), PATIENCE)
        key = ("s", "one")
        revision = engine.catalog.sequences["s"].revision
        claiming = asyncio.create_task(engine._claims.claim_some(key, revision, [id_]))
        await asyncio.wait_for(claiming, PATIENCE)
        told.set()
        await asyncio.wait_for(answered.wait(), PATIENCE)
        finish.set()
        await until(connection, ALL_ENDED)
    assert len(recorder.keys) == 1
    assert await way(connection, id_) == ["one enrolled", "one next", "one completed"]


async def sleeper(connection: asyncpg.Connection, then: str | None = None) -> int:
    """An enrollment that waits three days, in a sequence with the goal of paying."""
    await define(
        connection,
        "s",
        ("pause", "WaitForDuration", DAYS, then),
        ("paid", "Goal", PAID, "thanks"),
        ("thanks", "Note", "{}", None),
    )
    return await enroll(connection, "s", "ada")


ASLEEP = (
    "SELECT entered_at IS NOT NULL AND wake_at > now() + interval '1 day'"
    " FROM sequencer.enrollments"
)
ENDED = "SELECT status = 'completed' FROM sequencer.enrollments WHERE id = $1"


async def test_changed_data_are_evaluated_at_once(
    database: str, connection: asyncpg.Connection
) -> None:
    async with running_engine(database, {"Note": Recorder()}):
        id_ = await sleeper(connection)
        await until(connection, ASLEEP)
        await connection.execute("UPDATE sequencer.enrollments SET data = '{\"paid\": true}'")
        await until(connection, ENDED, id_)
    assert await way(connection, id_) == [
        "pause enrolled",
        "pause goal",
        "thanks next",
        "thanks completed",
    ]


@pytest.mark.parametrize(
    "statement",
    [
        "NOTIFY sequencer",
        "SELECT pg_notify('sequencer', '{\"subject\": \"ada\"}')",
        'SELECT pg_notify(\'sequencer\', \'{"sequence": "s", "step": "pause"}\')',
        "SELECT sequencer.reevaluate(subject => 'ada')",
        "SELECT sequencer.reevaluate(sequence => 's', step => 'pause')",
    ],
)
async def test_a_reevaluation_can_be_requested(
    database: str, connection: asyncpg.Connection, statement: str
) -> None:
    async with running_engine(database, {"Note": Recorder()}):
        id_ = await sleeper(connection)
        await until(connection, ASLEEP)
        # as if the daemon had not been notified: the trigger that reevaluates is off
        await connection.execute("ALTER TABLE sequencer.enrollments DISABLE TRIGGER wake_on_change")
        await connection.execute("UPDATE sequencer.enrollments SET data = '{\"paid\": true}'")
        await connection.execute(statement)
        await until(connection, ENDED, id_)


async def test_a_changed_step_reschedules_its_enrollments(
    database: str, connection: asyncpg.Connection
) -> None:
    async with running_engine(database, {"Note": Recorder()}, batch=7):
        await sleeper(connection)
        await connection.execute(
            "INSERT INTO sequencer.enrollments (sequence, subject)"
            " SELECT 's', 'u' || n FROM generate_series(1, 50) AS n"
        )
        await until(connection, f"SELECT bool_and(asleep) FROM ({ASLEEP}) AS e (asleep)")
        await connection.execute(
            'UPDATE sequencer.steps SET config = \'{"amount": 5, "unit": "ms"}\''
            " WHERE name = 'pause'"
        )
        await until(connection, ALL_ENDED)
        await until(connection, "SELECT bool_and(reschedule_from IS NULL) FROM sequencer.steps")


async def test_a_new_goal_is_checked_for_all_enrollments(
    database: str, connection: asyncpg.Connection
) -> None:
    async with running_engine(database, {"Note": Recorder()}):
        await define(connection, "s", ("pause", "WaitForDuration", DAYS, None))
        await enroll(connection, "s", "ada", '{"paid": true}')
        await until(connection, ASLEEP)
        await connection.execute(
            "INSERT INTO sequencer.steps (sequence, name, type, config)"
            " VALUES ('s', 'paid', 'Goal', $1)",
            PAID,
        )
        await until(connection, ALL_ENDED)


async def test_without_notifications_the_sweep_finds_everything(
    database: str, connection: asyncpg.Connection
) -> None:
    for table, trigger in (
        ("enrollments", "notify_on_insert"),
        ("enrollments", "notify_on_update"),
        ("sequences", "notify_definitions"),
    ):
        await connection.execute(f"DROP TRIGGER {trigger} ON sequencer.{table}")
    async with running_engine(database, {"Note": Recorder()}, sweep=0.2):
        id_ = await sleeper(connection)
        await until(connection, ASLEEP)
        await connection.execute("UPDATE sequencer.enrollments SET data = '{\"paid\": true}'")
        await until(connection, ENDED, id_)
        other = await enroll(connection, "s", "bob")
        await until(connection, f"{ASLEEP} WHERE id = $1", other)
        await connection.execute(
            'UPDATE sequencer.steps SET config = \'{"amount": 5, "unit": "ms"}\''
            " WHERE name = 'pause'"
        )
        await until(connection, ENDED, other)


async def test_a_row_that_is_locked_when_due_is_claimed_soon_after(
    database: str, connection: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Locked by a session that changes nothing, and so sends no notification."""
    left_at_steps, is_left = wakes.left_at_steps, asyncio.Event()

    async def noticed(*arguments: Any, **options: Any) -> dict[StepKey, wakes.LeftAtStep]:
        left = await left_at_steps(*arguments, **options)
        if any(one.again_at is not None for one in left.values()):
            is_left.set()
        return left

    monkeypatch.setattr(wakes, "left_at_steps", noticed)
    await define(connection, "s", ("pause", "WaitForDuration", DAYS, None))
    other = await asyncpg.connect(database)
    async with running_engine(database, sweep=3600) as one:
        id_ = await enroll(connection, "s", "ada")
        await until(connection, ASLEEP)
        async with other.transaction():
            await other.execute("SELECT FROM sequencer.enrollments WHERE id = $1 FOR UPDATE", id_)
            one._env.clock._offset += timedelta(days=3).total_seconds()
            one._wake.set()
            await asyncio.wait_for(is_left.wait(), PATIENCE)
        await until(connection, ENDED, id_)
    await other.close()


async def test_a_lone_enrollment_is_leased_and_written_without_a_claim(
    database: str, connection: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lock, a transaction around it and the end of that would be round trips before its start.
    The next one, shortly afterwards, costs no more.
    """
    left_at_steps, checks = wakes.left_at_steps, 0

    async def refused(*_: object, **__: object) -> None:
        raise AssertionError

    async def counted(*arguments: Any, **options: Any) -> Any:
        nonlocal checks
        checks += 1
        return await left_at_steps(*arguments, **options)

    recorder = Recorder()
    await define(connection, "s", ("one", "Note", "{}", "two"), ("two", "Note", "{}", None))
    async with running_engine(database, {"Note": recorder}):
        monkeypatch.setattr(locking, "claim", refused)
        monkeypatch.setattr(locking, "lock", refused)
        monkeypatch.setattr(wakes, "left_at_steps", counted)
        ids = []
        for number in range(5):
            ids.append(await enroll(connection, "s", f"u{number}"))
            await until(connection, ENDED, ids[-1])
    for id_ in ids:
        passed = ["one enrolled", "one next", "two next", "two completed"]
        assert await way(connection, id_) == passed
    assert checks < len(ids)  # none but that of a poll, if one comes by


async def many_answered(
    database: str, connection: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> list[list[str]]:
    """Enroll twice as many as are written without a lock if their outcomes differ, two times.
    Return the steps of the results that were locked, for each time.
    """
    answer, lock = Answer(), locking.lock
    locked: list[list[str]] = [[], []]

    async def next_(_: Task) -> Result:
        return answer

    async def counted(on: asyncpg.Connection, known: Any, transactions: Any) -> Any:
        locked[times].append(known[0].step)
        return await lock(on, known, transactions)

    monkeypatch.setattr(locking, "lock", counted)
    runners = {"Note": Recorder(next_, batch_size=1000)}
    async with running_engine(database, runners):
        for times in range(2):
            await connection.execute(
                "INSERT INTO sequencer.enrollments (sequence, subject, data)"
                " SELECT 's', $1 || n, jsonb_build_object('paid', n % 2 = 0)"
                " FROM generate_series(1, $2::int) AS n",
                f"time {times}, ",
                2 * MAX_UNLOCKED,
            )
            await until(connection, ALL_ENDED)
    return locked


async def test_many_equal_results_with_one_outcome_are_written_without_a_lock_before(
    database: str, connection: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    await define(connection, "s", ("one", "Note", "{}", "two"), ("two", "Note", "{}", None))
    assert await many_answered(database, connection, monkeypatch) == [[], []]
    ids = await connection.fetch("SELECT id FROM sequencer.enrollments")
    passed = ["one enrolled", "one next", "two next", "two completed"]
    assert {tuple(await way(connection, row["id"])) for row in ids} == {tuple(passed)}
    assert len(ids) == 4 * MAX_UNLOCKED


async def test_many_equal_results_with_several_outcomes_are_tried_together_only_once(
    database: str, connection: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried, write_unlocked = [], Results._write_unlocked

    async def counted(self: Results, finished: Any, now: datetime) -> bool:
        known = dict(self._differing_until)
        is_written = await write_unlocked(self, finished, now)
        tried.append(known != self._differing_until)
        return is_written

    monkeypatch.setattr(Results, "_write_unlocked", counted)
    monkeypatch.setattr(results, "DIFFERING_FOR", timedelta(days=1))
    await define(
        connection, "s", ("one", "Note", "{}", "paid"), ("paid", "Conditional", PAID, None)
    )
    locked = await many_answered(database, connection, monkeypatch)
    assert [set(steps) for steps in locked] == [{"one"}, {"one"}]
    assert tried.count(True) == 1
    assert (
        await connection.fetchval(
            "SELECT count(*) FROM sequencer.enrollments WHERE status = 'completed'"
        )
        == 4 * MAX_UNLOCKED
    )


async def test_the_first_lone_enrollment_finds_its_statements_prepared(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claims, "PREPARE_TIME", PATIENCE)
    prepared = "SELECT array_agg(statement) FROM pg_prepared_statements"
    async with running_engine(database) as one, AsyncExitStack() as stack:
        sessions = [
            await stack.enter_async_context(connections.borrow(one._env.pool)) for _ in "12345"
        ]
        found = [await session.fetchval(prepared) for session in sessions]
    assert any({QUERIES["peek"], QUERIES["write_one_unchanged"]} <= {*one} for one in found)


async def test_enrollments_that_arrive_one_after_the_other_are_claimed_together(
    database: str, connection: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A claim that has found several lets more gather; none of what arrives is lost."""
    peek, counts = locking.peek, []

    async def counted(*arguments: Any, **options: Any) -> Any:
        peeked = await peek(*arguments, **options)
        assert peeked is not None
        counts.append(len(peeked.enrollments))
        return peeked

    monkeypatch.setattr(locking, "peek", counted)
    monkeypatch.setattr(claims, "GATHER_TIME", 3600.0)
    insert = (  # due by the daemon's clock as well, which may be a little behind
        "INSERT INTO sequencer.enrollments (sequence, subject, wake_at)"
        " SELECT 's', $1 || n, now() - interval '1 second' FROM generate_series(1, $2::int) AS n"
    )
    await define(connection, "s", ("a", "Note", "{}", None))
    async with running_engine(database, {"Note": Recorder()}) as one:
        await connection.execute(insert, "u", claims.SEVERAL)
        await until(connection, ALL_ENDED)
        await eventually(lambda: one._cursors.not_before(("s", "a")) > 0)
        soon = datetime.now(UTC) + timedelta(minutes=30)
        for number in range(20):
            await connection.execute(insert, f"v{number}-", 1)
        await eventually(lambda: (one._heap.next_at() or soon) > soon)
        assert sum(counts) == claims.SEVERAL
        one._cursors._by_step["s", "a"].not_before = 0.0
        one._push_now(("s", "a"))
        await until(connection, ALL_ENDED)
    assert [count for count in counts if count] == [claims.SEVERAL, 20]


async def test_a_step_does_not_rest_for_as_long_as_the_clock_is_set_back(
    database: str, connection: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server's: the daemon is ahead of it until it measures it again."""
    monkeypatch.setattr(claims, "GATHER_TIME", 2.0)
    await define(connection, "s", ("a", "Note", "{}", None))
    insert = (
        "INSERT INTO sequencer.enrollments (sequence, subject)"
        " SELECT 's', $1 || n FROM generate_series(1, $2::int) AS n"
    )
    async with running_engine(database, {"Note": Recorder()}) as one:
        one._env.clock._offset += 3600
        await connection.execute(insert, "u", claims.SEVERAL)
        await until(connection, ALL_ENDED)
        await eventually(lambda: ("s", "a") not in one._busy)
        await one.sweep()
        await connection.execute(insert, "v", 1)
        await until(connection, ALL_ENDED)


async def test_a_sweep_after_the_clock_was_set_back_finds_what_has_arrived_since(
    database: str, connection: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the cursor, which is by the old time."""

    async def nothing(**_: Any) -> list[Any]:
        return []

    await define(connection, "s", ("a", "Note", "{}", None))
    await connection.execute("SET sequencer.notify = off")
    async with running_engine(database, {"Note": Recorder()}, sweep=3600) as one:
        monkeypatch.setattr(one, "rebuild", nothing)  # no poll finds it
        await until(connection, LOCK_IS_HELD)
        one._env.clock._offset += 3600
        with one._cursors.claim(("s", "a"), frozenset(), one._env.clock.now()) as claim:
            claim.left = wakes.LeftAtStep(one._env.clock.now(), None, None, None)
        one._scan_at = math.inf  # other sweeps may scan the whole index
        await enroll(connection, "s", "ada")
        await one.sweep(whole=False)
        await until(connection, ALL_ENDED)


@pytest.mark.parametrize("late", [0, 5])
async def test_enrollments_that_begin_together_share_an_outcome_if_they_begin_on_time(
    database: str, connection: asyncpg.Connection, late: int
) -> None:
    """Each was inserted at a time of its own."""
    await define(connection, "s", ("a", "Note", "{}", None), ("w", "WaitForDuration", SHORT, None))
    now, batch = datetime.now(UTC), Batch()
    async with running_engine(database, {"Note": Recorder()}) as one:
        for number in range(1, 4):
            wake_at = now - timedelta(seconds=late, milliseconds=number)
            for step in ("a", "w"):
                moved = at(step)._replace(id=number, wake_at=wake_at, entered_at=None)
                one._moves.move(batch, moved, now)
        for leased in batch.leased:
            leased.executor.reserve(-1)
    begun = {row.entered_at for row in batch.rows if row.step == "a"}
    assert len(begun) == (3 if late else 1)
    assert len({row.entered_at for row in batch.rows if row.step == "w"}) == 3  # waits are exact


@pytest.mark.parametrize("step", ["Note", "Conditional"])
async def test_changes_between_reading_and_writing_are_respected(
    database: str, connection: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    peek, other = locking.peek, await asyncpg.connect(database)

    async def change_after_it(*arguments: Any, **options: Any) -> Any:
        peeked = await peek(*arguments, **options)
        if peeked and peeked[0]:
            monkeypatch.setattr(locking, "peek", peek)
            await other.execute("""UPDATE sequencer.enrollments SET data = '{"paid": true}'""")
        return peeked

    monkeypatch.setattr(locking, "peek", change_after_it)
    recorder = Recorder()
    config = PAID if step == "Conditional" else "{}"
    await define(connection, "s", ("one", step, config, "two"), ("two", "Note", "{}", None))
    async with running_engine(database, {"Note": recorder}):
        id_ = await enroll(connection, "s", "ada")
        await until(connection, ENDED, id_)
    await other.close()
    assert [view["data"] for view in recorder.views] == [{"paid": True}] * len(recorder.views)
    assert len(recorder.keys) == len(set(recorder.keys)) == (1 if step == "Conditional" else 2)


@pytest.mark.slow
async def test_many_concurrent_inserts_are_found_without_notifications(
    database: str, connection: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sequencerd.storage.listener.WITHIN", 10.0)  # however slow the machine
    await define(connection, "s", ("a", "Note", "{}", None))
    others = [await asyncpg.connect(database) for _ in range(8)]
    received = 0

    def receive(*_: object) -> None:
        nonlocal received
        received += 1

    async def enroll_some(number: int) -> None:
        for n in range(300):
            await others[number].execute(
                "INSERT INTO sequencer.enrollments (sequence, subject) VALUES ('s', $1)",
                f"{number}-{n}",
            )

    async with running_engine(database, {"Note": Recorder(batch_size=100)}, sweep=3600):
        await connection.add_listener(SCHEMA, receive)
        await until(connection, LOCK_IS_HELD)
        await asyncio.gather(*map(enroll_some, range(8)))
        await until(connection, ALL_ENDED)
        assert received < 8 * 300 / 2
        await until(connection, LOCK_IS_HELD)
        received = 0
        id_ = await enroll(connection, "s", "ada")
        await until(connection, ENDED, id_)
        assert received == 1
        await connection.remove_listener(SCHEMA, receive)
    for other in others:
        await other.close()


async def test_a_skipped_notification_is_found_when_its_transaction_ends(
    database: str, connection: asyncpg.Connection
) -> None:
    await define(connection, "s", ("a", "Note", "{}", None))
    other = await asyncpg.connect(database)
    transaction = other.transaction()
    await transaction.start()
    bob = await enroll(other, "s", "bob")
    async with running_engine(database, {"Note": Recorder()}, sweep=3600):
        ada = await enroll(connection, "s", "ada")
        await until(connection, ENDED, ada)
        await transaction.commit()
        await until(connection, ENDED, bob)
        await until(connection, LOCK_IS_HELD)
    await other.close()


async def test_the_notify_lock_goes_to_another_daemon(
    database: str, connection: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_refused = asyncio.Event()

    async def acquire_and_tell(one: asyncpg.Connection) -> NotifyLock:
        held = await acquire_notify_lock(one)
        if held is NotifyLock.ANOTHERS:
            is_refused.set()
        return held

    monkeypatch.setattr(listener, "acquire_notify_lock", acquire_and_tell)
    await define(connection, "s", ("a", "Note", "{}", None))
    async with AsyncExitStack() as first:
        await first.enter_async_context(running_engine(database, {"Note": Recorder()}, sweep=3600))
        await until(connection, LOCK_IS_HELD)
        async with running_engine(database, {"Note": Recorder()}, sweep=3600):
            await asyncio.wait_for(is_refused.wait(), PATIENCE)
            await first.aclose()
            for number in range(4):
                id_ = await enroll(connection, "s", f"u{number}")
                await until(connection, ENDED, id_)
                await until(connection, LOCK_IS_HELD)
                await connection.execute(f"SELECT pg_terminate_backend(pid) {NOTIFY_LOCK}")


async def test_a_cancelled_transaction_ends_though_its_connection_is_dead(database: str) -> None:
    pool = await connections.connect_pool(shard(database), 1)
    begun = asyncio.Event()

    async def work() -> None:
        while True:
            with suppress(*TRANSIENT_ERRORS):
                async with (
                    connections.borrow(pool) as connection,
                    connections.transaction(connection),
                ):
                    connection.terminate()
                    begun.set()
                    await asyncio.Event().wait()

    task = asyncio.create_task(work())
    await begun.wait()
    task.cancel()
    await asyncio.wait([task], timeout=PATIENCE)
    assert task.cancelled()
    pool.terminate()


async def test_a_side_effect_is_finished_before_goals_are_checked(
    database: str, connection: asyncpg.Connection
) -> None:
    held = Held(Answer(message="done"))
    recorder = Recorder(held)
    async with running_engine(database, {"Slow": recorder}):
        await define(
            connection,
            "s",
            ("work", "Slow", "{}", "pause"),
            ("pause", "WaitForDuration", DAYS, None),
            ("paid", "Goal", PAID, None),
        )
        id_ = await enroll(connection, "s", "ada")
        await held.begun.wait()
        await connection.execute("UPDATE sequencer.enrollments SET data = '{\"paid\": true}'")
        held.released.set()
        await until(connection, ENDED, id_)
    assert recorder.visits == [f"{id_}:1"]
    assert await way(connection, id_) == [
        "work enrolled",
        "work next",
        "pause goal",
        "pause completed",
    ]


async def test_a_result_after_a_cancel_is_recorded_and_moves_nothing(
    database: str, connection: asyncpg.Connection
) -> None:
    held = Held(Answer(message="sent to ada"))
    async with running_engine(database, {"Slow": Recorder(held)}):
        await define(connection, "s", ("work", "Slow", "{}", None))
        id_ = await enroll(connection, "s", "ada")
        await held.begun.wait()
        await connection.execute("UPDATE sequencer.enrollments SET status = 'cancelled'")
        held.released.set()
        await until(
            connection, "SELECT EXISTS (SELECT FROM sequencer.events WHERE action = 'stale_result')"
        )
    # sorted: the daemon's clock may be behind the database's by a round trip
    assert sorted(await way(connection, id_)) == [
        "work cancelled",
        "work enrolled",
        "work stale_result",
    ]
    late = await connection.fetchval(
        "SELECT message FROM sequencer.events WHERE action = 'stale_result'"
    )
    assert "sent to ada" in late
    assert await connection.fetchval("SELECT status FROM sequencer.enrollments") == "cancelled"


async def test_a_late_result_among_others_moves_nothing(
    database: str, connection: asyncpg.Connection
) -> None:
    """An enrollment is restarted twice during its side effect, and then leased together with one
    that has entered the step with it. The results of both are written at once.
    """
    released: defaultdict[str, asyncio.Event] = defaultdict(asyncio.Event)  # by id and visit

    async def hold(task: Task) -> Result:
        await released[task.key.rpartition(":")[0]].wait()
        return Answer()

    await define(
        connection,
        "s",
        ("start", "WaitForDuration", '{"amount": 0, "unit": "ms"}', "work"),
        ("work", "Slow", "{}", "rest"),
        ("rest", "WaitForDuration", '{"amount": 1, "unit": "hour"}', None),
    )
    await connection.execute(
        "INSERT INTO sequencer.enrollments (id, sequence, subject, wake_at)"
        " SELECT n, 's', n, now() FROM generate_series(1, 9) AS n"
    )
    slow = Recorder(hold, batch_size=1, concurrency=4)  # there are slots for eight
    leased = "FROM sequencer.enrollments WHERE leased_by IS NOT NULL"
    async with running_engine(database, {"Slow": slow}):
        await until(connection, f"SELECT count(*) = 8 {leased}")
        await eventually(lambda: slow.keys)
        restarted, _, _ = slow.keys[0].split(":")
        last = await connection.fetchval(
            "SELECT id::text FROM sequencer.enrollments WHERE leased_by IS NULL"
        )
        for _ in range(2):
            await connection.execute(
                "UPDATE sequencer.enrollments SET step = step WHERE id::text = $1", restarted
            )
        for id_ in {*map(str, range(1, 10))} - {restarted, last}:
            released[f"{id_}:2"].set()
        await until(connection, f"SELECT count(*) = 2 AND count(DISTINCT leases) = 1 {leased}")
        await eventually(lambda: f"{last}:2" in slow.visits)
        released[f"{restarted}:2"].set()
        released[f"{last}:2"].set()
        await until(connection, f"SELECT count(*) = 1 {leased}")
        released[f"{restarted}:4"].set()
        await until(connection, "SELECT bool_and(step = 'rest') FROM sequencer.enrollments")
    assert await way(connection, int(last)) == ["start enrolled", "start next", "work next"]
    assert sorted(await way(connection, int(restarted))) == [
        "start enrolled",
        "start next",
        "work moved",
        "work moved",
        "work next",
        "work stale_result",
    ]


@pytest.mark.slow
async def test_a_failure_is_retried_and_finally_recorded(
    database: str, connection: asyncpg.Connection
) -> None:
    async def broken(task: Task) -> Result:
        if task.view["data"].get("raise"):
            raise RuntimeError("a bug in the plug-in")
        return Failed("the server is down")

    retry = '{"retry": {"attempts": 3, "firstDelay": 0.01}}'
    async with running_engine(database, {"Broken": Recorder(broken, batch_size=1)}):
        await define(connection, "s", ("work", "Broken", retry, None))
        ids = [
            await enroll(connection, "s", "ada"),
            await enroll(connection, "s", "bob", '{"raise": true}'),
        ]
        await until(connection, ALL_ENDED)
    for id_, words in zip(ids, ["the server is down", "a bug in the plug-in"], strict=True):
        row = await connection.fetchrow("SELECT * FROM sequencer.enrollments WHERE id = $1", id_)
        assert (row["status"], row["failure"], row["attempt"]) == ("failed", "error", 3)
        assert words in row["last_error"]
        assert await way(connection, id_) == [
            "work enrolled",
            "work retry",
            "work retry",
            "work failed",
        ]


async def test_an_unwritable_enrollment_does_not_delay_the_others(
    database: str, connection: asyncpg.Connection
) -> None:
    async with running_engine(database, {"Note": Recorder()}) as engine:
        await define(
            connection,
            "s",
            ("work", "Note", "{}", "leave"),
            ("leave", "GoTo", '{"step": "x", "sequence": "other"}', None),
        )
        await define(connection, "other", ("x", "WaitForDuration", DAYS, None))
        while "other" not in engine.catalog.sequences:
            await engine.reload()
        await enroll(connection, "other", "ada")
        # ada is in "other" already, so her row cannot be moved there a second time
        ids = [await enroll(connection, "s", name) for name in ("eve", "ada", "bob")]
        await until(
            connection,
            "SELECT count(*) = 0 FROM sequencer.enrollments"
            " WHERE sequence = 's' AND status = 'active'",
        )
    row = await connection.fetchrow("SELECT * FROM sequencer.enrollments WHERE id = $1", ids[1])
    assert (row["status"], row["failure"]) == ("failed", "already_enrolled")
    there = await connection.fetch(
        "SELECT subject FROM sequencer.enrollments"
        " WHERE sequence = 'other' AND status = 'active' ORDER BY subject"
    )
    assert [row["subject"] for row in there] == ["ada", "bob", "eve"]


async def test_a_problem_is_reported_and_cleared_when_it_is_fixed(
    database: str, connection: asyncpg.Connection
) -> None:
    async with running_engine(database, {"Note": Recorder()}):
        await define(
            connection, "s", ("work", "Note", '{"bad": 1}', "odd"), ("odd", "Nothing", "{}", None)
        )
        id_ = await enroll(connection, "s", "ada")
        await until(connection, "SELECT status = 'failed' FROM sequencer.enrollments")
        row = await connection.fetchrow("SELECT * FROM sequencer.enrollments")
        assert (row["failure"], row["step"]) == ("invalid_step", "work")
        assert "bad: this key is not known" in row["last_error"]
        told = await connection.fetch("SELECT name, problem FROM sequencer.steps ORDER BY name")
        assert "no runner serves the type" in told[0]["problem"]
        await connection.execute("UPDATE sequencer.steps SET type = 'Note', config = '{}'")
        await until(connection, ENDED, id_)
    assert await connection.fetchval("SELECT count(problem) FROM sequencer.steps") == 0
    assert "work resumed" in await way(connection, id_)


async def test_answers_may_contain_data_and_a_time_for_the_next_execution(
    database: str, connection: asyncpg.Connection
) -> None:
    async def twice(task: Task) -> Result:
        if task.view["data"].get("seen"):
            return Answer(Action.ALT_NEXT, "seen already")
        return Answer(
            Action.NOOP, "first time", data={"seen": True}, retry_after=timedelta(milliseconds=20)
        )

    async with running_engine(database, {"Twice": Recorder(twice)}):
        await define(connection, "s", ("work", "Twice", "{}", None))
        id_ = await enroll(connection, "s", "ada", '{"name": "Ada"}')
        await until(connection, ENDED, id_)
    assert json.loads(await connection.fetchval("SELECT data FROM sequencer.enrollments")) == {
        "name": "Ada",
        "seen": True,
    }
    assert await way(connection, id_) == [
        "work enrolled",
        "work noop",
        "work altNext",
        "work completed",
    ]


async def test_enrollments_that_wake_later_than_their_batch_are_found_without_a_sweep(
    database: str, connection: asyncpg.Connection
) -> None:
    """The first one is due already when the batch has been written."""

    seen = set()

    async def come_again(task: Task) -> Result:
        if (id_ := task.view["id"]) in seen:
            return Answer(Action.NEXT)
        seen.add(id_)
        pause = timedelta(seconds=task.view["data"]["pause"])
        return Answer(Action.NOOP, "first time", retry_after=pause)

    async with running_engine(database, {"Twice": Recorder(come_again)}, sweep=3600):
        await define(connection, "s", ("work", "Twice", "{}", None))
        await connection.execute(
            "INSERT INTO sequencer.enrollments (sequence, subject, data)"
            """ VALUES ('s', 'ada', '{"pause": 0.0001}'), ('s', 'bob', '{"pause": 0.3}')"""
        )
        await until(connection, ALL_ENDED)


async def test_numbers_come_back_from_a_runner_to_the_last_digit(
    database: str, connection: asyncpg.Connection
) -> None:
    data = '{"a": 12345678901234567890.123456789, "b": 1e400, "c": 0.1, "d": 98765432109876543210}'

    async def echo(request: servers.Request) -> servers.Answer:
        (enrollment,) = re.findall(rb'"id": (\d+)', request.body)[:1]
        (numbers,) = re.findall(rb'"data":({.*?})', request.body)
        answer = b'[{"id": %b, "action": "next", "data": {"copy": %b}}]' % (enrollment, numbers)
        return servers.Answer(body=answer)

    later = Recorder()
    async with servers.http_server(echo) as server:
        call = http_runner(server.url, name="Call")
        async with running_engine(database, {"Call": call, "Note": later}):
            await define(
                connection, "s", ("call", "Call", "{}", "note"), ("note", "Note", "{}", None)
            )
            id_ = await enroll(connection, "s", "ada", data)
            await until(connection, ENDED, id_)
        await call.close()
    stored = "SELECT data - 'copy' = data -> 'copy', (data -> 'copy')::text"
    is_same, text = await connection.fetchrow(f"{stored} FROM sequencer.enrollments")
    assert is_same, text
    (view,) = later.views
    assert isinstance(view, View)
    assert view.text.count("12345678901234567890.123456789") == 2


async def test_a_stop_releases_unfinished_leases_without_an_attempt(
    database: str, connection: asyncpg.Connection
) -> None:
    started = asyncio.Event()

    async def endless(task: Task) -> Result:
        started.set()
        await asyncio.sleep(3600)
        return Answer()

    await define(connection, "s", ("work", "Slow", "{}", None))
    await connection.execute(
        "INSERT INTO sequencer.enrollments (sequence, subject)"
        " SELECT 's', 'u' || n FROM generate_series(1, 50) AS n"
    )
    slow = Recorder(endless, batch_size=2, concurrency=2)
    async with running_engine(database, {"Slow": slow}, stop_timeout=0.1):
        await started.wait()
    rows = await connection.fetch("SELECT * FROM sequencer.enrollments")
    assert {(row["status"], row["attempt"], row["leased_by"]) for row in rows} == {
        ("active", 0, None)
    }
    assert await connection.fetchval("SELECT bool_and(wake_at <= now()) FROM sequencer.enrollments")
    async with running_engine(database, {"Slow": Recorder()}):
        await until(connection, ALL_ENDED)


async def test_a_result_is_written_if_its_sequence_is_edited_during_a_stop(
    database: str, connection: asyncpg.Connection
) -> None:
    work = Held()
    await define(connection, "s", ("work", "Work", "{}", None))
    await enroll(connection, "s", "ada")
    async with running_engine(database, {"Work": Recorder(work)}) as engine:
        await work.begun.wait()
        engine.stop()
        await connection.execute("UPDATE sequencer.sequences SET status = 'paused'")
        work.released.set()
    row = await connection.fetchrow("SELECT status, leased_by FROM sequencer.enrollments")
    assert tuple(row) == ("completed", None)


@pytest.mark.parametrize("is_expired", [True, False])
async def test_a_stop_waits_for_the_answer_to_a_lease(
    database: str, connection: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch, is_expired: bool
) -> None:
    """The lease is that of the search for expired enrollments, or of a task that works on a step.
    The database has committed it: if the answer were not read, it would be left to expire.
    """
    committed, answered = asyncio.Event(), asyncio.Event()
    transaction, write_unchanged = connections.transaction, writes.write_unchanged
    leased = (
        "SELECT count(*) > 0 FROM sequencer.enrollments WHERE leased_by IS NOT NULL AND step = 'b'"
    )

    async def answer(from_: asyncpg.Connection) -> None:
        if await from_.fetchval(leased):
            committed.set()
            await answered.wait()

    @asynccontextmanager
    async def answered_late(on: asyncpg.Connection) -> AsyncIterator[asyncpg.Connection]:
        async with transaction(on):
            yield on
        await answer(on)

    async def written_late(on: asyncpg.Connection, *arguments: Any) -> int | None:
        number = await write_unchanged(on, *arguments)
        await answer(on)
        return number

    async def fails(_: Task) -> Result:
        return Failed("refuses connections", fault="server")

    monkeypatch.setattr(loop, "ERROR_PAUSE", PATIENCE)  # after stop_timeout
    monkeypatch.setattr(connections, "transaction", answered_late)
    monkeypatch.setattr(writes, "write_unchanged", written_late)
    work = Recorder()
    runners = {"Down": Recorder(fails), "Work": work}
    pauses = Pauses(3600.0, 3600.0)
    async with running_engine(database, runners, pauses=pauses, stop_timeout=0) as engine:
        await define(
            connection,
            "s",
            ("a", "Down", '{"expires": {"amount": 1, "unit": "hours"}}', "b"),
            ("b", "Work", "{}", None),
        )
        if is_expired:
            await enroll(connection, "s", "ada")
            down = "SELECT EXISTS (SELECT FROM sequencer.problems WHERE kind = 'runner')"
            await until(connection, down)
        await connection.execute(
            "INSERT INTO sequencer.enrollments (sequence, subject, step, wake_at)"
            " VALUES ('s', 'bob', $1, now() - interval '2 hours')",
            "a" if is_expired else "b",
        )
        await asyncio.wait_for(committed.wait(), PATIENCE)
        stop = engine.executors.stop

        async def stop_and_answer(seconds: float) -> None:
            await stop(seconds)
            answered.set()

        monkeypatch.setattr(engine.executors, "stop", stop_and_answer)
    row = await connection.fetchrow("SELECT * FROM sequencer.enrollments WHERE subject = 'bob'")
    assert (row["step"], row["leased_by"], row["attempt"]) == ("b", None, 0)
    assert not work.keys


@pytest.mark.slow
async def test_several_daemons_share_the_work(
    database: str, connection: asyncpg.Connection
) -> None:
    one, two = Recorder(), Recorder()
    await define(
        connection,
        "s",
        ("hello", "Note", "{}", "pause"),
        ("pause", "WaitForDuration", SHORT, "bye"),
        ("bye", "Note", "{}", None),
    )
    async with (
        running_engine(database, {"Note": one}, batch=50),
        running_engine(database, {"Note": two}, batch=50),
    ):
        await connection.execute(
            "INSERT INTO sequencer.enrollments (sequence, subject)"
            " SELECT 's', 'u' || n FROM generate_series(1, 800) AS n"
        )
        await until(connection, ALL_ENDED)
    assert set(Counter(one.keys + two.keys).values()) == {1}
    assert one.keys
    assert two.keys


@pytest.mark.slow
async def test_a_lease_is_extended_during_the_side_effect(
    database: str, connection: asyncpg.Connection
) -> None:
    go_on = asyncio.Event()

    async def slow(task: Task) -> Result:
        await go_on.wait()
        return Answer()

    recorder = Recorder(slow)
    async with running_engine(database, {"Slow": recorder}, lease=3.0):
        await define(connection, "s", ("work", "Slow", "{}", None))
        id_ = await enroll(connection, "s", "ada")
        await until(connection, "SELECT leased_by IS NOT NULL FROM sequencer.enrollments")
        begun = await connection.fetchval("SELECT now()")
        await until(connection, "SELECT now() > $1::timestamptz + interval '4 seconds'", begun)
        go_on.set()
        await until(connection, ENDED, id_)
    assert recorder.visits == [f"{id_}:1"]


async def test_a_lease_of_a_dead_daemon_expires(
    database: str, connection: asyncpg.Connection
) -> None:
    await define(connection, "s", ("work", "Note", "{}", None))
    id_ = await enroll(connection, "s", "ada")
    await connection.execute(
        "UPDATE sequencer.enrollments SET leased_by = 'dead:1', attempt = 1, entered_at = now(),"
        " wake_at = now() + interval '0.3 seconds'"
    )
    async with running_engine(database, {"Note": Recorder()}):
        await until(connection, ENDED, id_)
    assert await way(connection, id_) == ["work lease_expired", "work next", "work completed"]


async def test_a_locked_row_is_not_waited_for(
    database: str, connection: asyncpg.Connection
) -> None:
    started, go_on = asyncio.Event(), asyncio.Event()

    async def slow(task: Task) -> Result:
        if task.view["subject"] == "held":
            started.set()
            await go_on.wait()
        return Answer()

    async with running_engine(database, {"Slow": Recorder(slow, batch_size=1)}):
        await define(connection, "s", ("work", "Slow", "{}", None))
        held = await enroll(connection, "s", "held")
        await started.wait()
        async with connection.transaction():
            await connection.execute(
                "SELECT FROM sequencer.enrollments WHERE id = $1 FOR UPDATE", held
            )
            go_on.set()
            other = await asyncpg.connect(database)
            await enroll(other, "s", "free")
            await until(
                other,
                "SELECT status = 'completed' FROM sequencer.enrollments WHERE subject = 'free'",
            )
            await other.close()
        await until(connection, ENDED, held)


async def test_all_enrollments_at_a_missing_step_fail_with_a_message(
    database: str, connection: asyncpg.Connection
) -> None:
    await define(connection, "s", ("work", "Note", "{}", None), ("other", "Note", "{}", None))
    await enroll(connection, "s", "ada")
    await connection.execute("ALTER TABLE sequencer.steps DISABLE TRIGGER guard_delete")
    await connection.execute("DELETE FROM sequencer.steps WHERE name = 'work'")
    async with running_engine(database, {"Note": Recorder()}):
        await until(connection, ALL_ENDED)
    row = await connection.fetchrow("SELECT failure, last_error FROM sequencer.enrollments")
    assert row["failure"] == "invalid_step"
    assert "'work' does not exist" in row["last_error"]


async def test_a_loop_through_a_side_effect_is_executed_once(
    database: str, connection: asyncpg.Connection
) -> None:
    """Every day at that hour, as the original would have looped: one message, then it fails."""
    recorder = Recorder()
    hours = json.dumps({"attribute": "hour", "values": list(range(24))})
    await define(
        connection,
        "s",
        ("at-nine", "WaitForDateComparison", hours, "mail"),
        ("mail", "Note", "{}", "sms"),
        ("sms", "Note", "{}", "over"),
        ("over", "GoTo", '{"step": "again", "sequence": "t"}', None),
    )
    await define(connection, "t", ("again", "GoTo", '{"step": "at-nine", "sequence": "s"}', None))
    id_ = await enroll(connection, "s", "ada")
    async with running_engine(database, {"Note": recorder}):
        await until(connection, ALL_ENDED)
        assert len(recorder.keys) == 2
        row = await connection.fetchrow("SELECT * FROM sequencer.enrollments WHERE id = $1", id_)
        assert (row["status"], row["failure"], row["step"]) == ("failed", "loop", "mail")
        assert "s/mail → s/sms → s/mail" in row["last_error"]
        # one that is resumed by hand is executed once more
        await connection.execute("UPDATE sequencer.enrollments SET status = 'active'")
        await until(connection, ALL_ENDED)
        assert len(recorder.keys) == 4


async def test_a_wait_between_side_effects_makes_no_loop(
    database: str, connection: asyncpg.Connection
) -> None:
    recorder = Recorder()
    await define(
        connection,
        "s",
        ("mail", "Note", "{}", "sms"),
        ("sms", "Note", "{}", "pause"),
        ("pause", "WaitForDuration", SHORT, "mail"),
    )
    id_ = await enroll(connection, "s", "ada")
    async with running_engine(database, {"Note": recorder}):
        await until(connection, "SELECT visit > 10 FROM sequencer.enrollments WHERE id = $1", id_)
    assert len(recorder.keys) >= 6


async def test_a_goal_of_another_sequence_with_the_same_name_moves_the_enrollment(
    database: str, connection: asyncpg.Connection
) -> None:
    recorder = Recorder()
    days = ("days", "WaitForDuration", DAYS)
    await define(
        connection,
        "a",
        (*days, None),
        ("paid", "Goal", PAID, "over"),
        ("over", "GoTo", '{"step": "days", "sequence": "b"}', None),
    )
    await define(
        connection,
        "b",
        (*days, "dun"),
        ("dun", "Note", "{}", None),
        ("paid", "Goal", PAID, "thanks"),
        ("thanks", "Note", "{}", None),
    )
    id_ = await enroll(connection, "a", "ada", '{"paid": true}')
    async with running_engine(database, {"Note": recorder}):
        await until(connection, ALL_ENDED)
    row = await connection.fetchrow("SELECT * FROM sequencer.enrollments WHERE id = $1", id_)
    assert (row["sequence"], row["step"], row["goals_met"]) == ("b", "thanks", ["paid"])
    assert json.loads(row["goals_elsewhere"]) == {"a": ["paid"]}


OVER = ("over", "GoTo", '{"step": "mail", "sequence": "t"}', None)


async def define_jump(connection: asyncpg.Connection, reentry: str = "after_end") -> None:
    """From "s", after a mail, into "t"; "else" is the GoTo's altNext."""
    await define(
        connection, "s", ("mail", "Note", "{}", "over"), OVER, ("else", "Note", "{}", None)
    )
    days = ("days", "WaitForDuration", DAYS, None)
    await define(connection, "t", days, ("mail", "Note", "{}", "days"))
    await connection.execute(
        "UPDATE sequencer.sequences SET reentry = $1 WHERE name = 't'", reentry
    )


async def gone(connection: asyncpg.Connection, id_: int) -> tuple[str | None, ...]:
    row = await connection.fetchrow("SELECT * FROM sequencer.enrollments WHERE id = $1", id_)
    return row["sequence"], row["step"], row["status"], row["failure"]


IS_OVER = """SELECT status <> 'active' OR sequence = 't' AND leased_by IS NULL AND step = 'days'
    FROM sequencer.enrollments WHERE id = $1"""


@pytest.mark.parametrize("reentry", ["after_end", "never", "always"])
@pytest.mark.parametrize("before", ["active", "completed", None])
@pytest.mark.parametrize("otherwise", [True, False])
async def test_a_jump_is_refused_as_an_insert_would_be(
    database: str,
    connection: asyncpg.Connection,
    reentry: str,
    before: str | None,
    otherwise: bool,
) -> None:
    recorder = Recorder()
    await define_jump(connection, reentry)
    if otherwise:
        await connection.execute(
            "UPDATE sequencer.steps SET alt_next_step = 'else' WHERE name = 'over'"
        )
    if before:
        await connection.execute(
            "INSERT INTO sequencer.enrollments (sequence, subject, status) VALUES ('t', 'ada', $1)",
            before,
        )
    id_ = await enroll(connection, "s", "ada")
    async with running_engine(database, {"Note": recorder}):
        await until(connection, IS_OVER, id_)
    is_refused = (reentry, before) in {
        ("after_end", "active"),
        ("never", "active"),
        ("never", "completed"),
    }
    expected: tuple[str | None, ...]
    if not is_refused:
        expected = ("t", "days", "active", None)
    elif otherwise:
        expected = ("s", "else", "completed", None)
    else:
        expected = ("s", "over", "failed", "already_enrolled")
    assert await gone(connection, id_) == expected
    assert len(set(recorder.keys)) == len(recorder.keys) == (1 if expected[2] == "failed" else 2)
    assert (await way(connection, id_))[:2] == ["mail enrolled", "mail next"]


async def test_an_archived_sequence_is_not_entered_by_a_jump(
    database: str, connection: asyncpg.Connection
) -> None:
    recorder = Recorder()
    await define_jump(connection)
    async with running_engine(database, {"Note": recorder}) as engine:
        # also where the daemon has not heard of it yet
        nothing: list[str] = []
        engine.catalog.reload = lambda: asyncio.sleep(0, nothing)  # type: ignore[method-assign]
        await connection.execute(
            "UPDATE sequencer.sequences SET status = 'archived' WHERE name = 't'"
        )
        id_ = await enroll(connection, "s", "ada")
        await until(connection, IS_OVER, id_)
    assert await gone(connection, id_) == ("s", "over", "failed", "archived")


async def test_one_of_several_simultaneous_jumps_is_admitted(
    database: str, connection: asyncpg.Connection
) -> None:
    await define_jump(connection)
    await connection.execute("UPDATE sequencer.sequences SET reentry = 'always' WHERE name = 's'")
    await connection.execute(
        "INSERT INTO sequencer.enrollments (sequence, step, subject)"
        " SELECT 's', 'over', 'u' || n % 50 FROM generate_series(1, 200) AS n"
    )
    async with running_engine(database, {"Note": Recorder()}):
        await until(
            connection,
            "SELECT count(*) = 50 FROM sequencer.enrollments WHERE sequence = 't' AND step = 'days'"
            " AND leased_by IS NULL",
        )
        await until(
            connection,
            "SELECT count(*) = 150 FROM sequencer.enrollments WHERE failure = 'already_enrolled'",
        )


async def test_an_insert_during_a_jump_comes_first(
    database: str, connection: asyncpg.Connection
) -> None:
    """The insert commits between the check and the write."""
    recorder = Recorder()
    await define_jump(connection)
    id_ = await enroll(connection, "s", "ada")
    other = await asyncpg.connect(database)
    entering = other.transaction()
    await entering.start()
    await enroll(other, "t", "ada")
    try:
        async with running_engine(database, {"Note": recorder}):
            await until(
                connection,
                "SELECT EXISTS (SELECT FROM pg_stat_activity"
                " WHERE wait_event_type = 'Lock' AND datname = current_database())",
            )
            await entering.commit()
            await until(connection, IS_OVER, id_)
    finally:
        await other.close()
    assert await gone(connection, id_) == ("s", "over", "failed", "already_enrolled")
    assert len(recorder.keys) == 1
    assert (await way(connection, id_))[:2] == ["mail enrolled", "mail next"]


async def test_a_failure_that_is_written_after_its_step_was_defined_is_resumed(
    database: str, connection: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reload has resumed what had failed at the step before."""
    is_failing, is_defined, write = asyncio.Event(), asyncio.Event(), writes.write

    async def write_later(connection: asyncpg.Connection, batch: Batch, now: datetime) -> None:
        if batch.invalid_steps():
            is_failing.set()
            await is_defined.wait()
        await write(connection, batch, now)

    monkeypatch.setattr(writes, "write", write_later)
    async with running_engine(database) as engine:
        await define(connection, "s", ("leave", "GoTo", '{"step": "x", "sequence": "other"}', None))
        await engine.reload()
        id_ = await enroll(connection, "s", "ada")
        await is_failing.wait()
        await define(connection, "other", ("x", "WaitForDuration", DAYS, None))
        while "other" not in engine.catalog.sequences:
            await engine.reload()
        is_defined.set()
        await until(
            connection,
            "SELECT status = 'active' AND sequence = 'other' AND wake_at > now() + interval '1 day'"
            " FROM sequencer.enrollments",
        )
    actions = await way(connection, id_)
    assert actions == ["leave enrolled", "leave jump", "x failed", "x resumed"]


async def test_an_enrollment_in_a_new_sequence_is_claimed_though_a_sweep_reads_the_definition(
    database: str, connection: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It arrives after the sweep has read the wake times, and before it reads the definition."""
    searched, notified, read_on = asyncio.Event(), asyncio.Event(), asyncio.Event()
    search, read = wakes.first_wakes, sequences.read_revisions

    async def searching(*arguments: Any) -> Any:
        try:
            return await search(*arguments)
        finally:
            searched.set()

    async def reading(*arguments: Any) -> Any:
        await read_on.wait()
        return await read(*arguments)

    async with running_engine(database, sweep=3600) as engine:
        await until(connection, LOCK_IS_HELD)
        check = engine._check_soon

        def checking(step_key: StepKey) -> None:
            check(step_key)
            notified.set()

        monkeypatch.setattr(engine, "_check_soon", checking)
        monkeypatch.setattr(loop, "first_wakes", searching)
        monkeypatch.setattr(sequences, "read_revisions", reading)
        sweeping = asyncio.create_task(engine.sweep(whole=False))
        async with asyncio.timeout(PATIENCE):
            await searched.wait()
            await define(connection, "s", ("a", "GoTo", "{}", None))
            await enroll(connection, "s", "ada")
            await notified.wait()
        read_on.set()
        await sweeping
        await until(connection, ALL_ENDED)


async def test_it_is_ready_while_the_history_is_locked(
    database: str, connection: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "COMMAND_TIMEOUT", 2 * PATIENCE)
    async with connection.transaction():
        await connection.execute("LOCK TABLE sequencer.events")
        async with running_engine(database):
            pass


async def test_a_second_batch_is_claimed_while_the_first_is_written(
    database: str, connection: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "COMMAND_TIMEOUT", 2 * PATIENCE)  # the first is not repeated
    await define(connection, "s", ("wait", "WaitForDuration", DAYS, None))
    other = await asyncpg.connect(database)
    writing = (
        "SELECT count(*) > 1 FROM pg_stat_activity"
        " WHERE datname = current_database() AND wait_event_type = 'Lock'"
        " AND query LIKE '%WITH written AS%'"
    )
    async with running_engine(database, {}, batch=10):
        async with other.transaction():
            await other.execute("LOCK TABLE sequencer.events IN SHARE MODE")
            await connection.execute(
                "INSERT INTO sequencer.enrollments (sequence, subject)"
                " SELECT 's', 'u' || n FROM generate_series(1, 30) AS n"
            )
            await until(connection, writing)
        await until(
            connection, "SELECT bool_and(entered_at IS NOT NULL) FROM sequencer.enrollments"
        )
    await other.close()
