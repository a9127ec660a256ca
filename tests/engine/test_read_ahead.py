"""What wakes next is read shortly before it is due, and written then, unless it has changed."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any

import asyncpg
import pytest
from structlog.testing import capture_logs

from sequencerd.core.enrollment import NEVER, Enrollment
from sequencerd.core.task import Answer, Task
from sequencerd.engine import loop, read_ahead, slow_evaluations
from sequencerd.engine.loop import Engine
from sequencerd.service.metrics import Metrics
from sequencerd.storage import locking
from tests.helpers.engines import ALL_ENDED, Held, Recorder, define, enroll, running_engine, until
from tests.helpers.waiting import eventually

HOUR = timedelta(hours=1)
STEP = ("s", "a")
LEASED = "SELECT count(*) = $1 FROM sequencer.enrollments WHERE leased_by IS NOT NULL"
UNTOUCHED = "SELECT count(*) FROM sequencer.enrollments WHERE entered_at IS NULL"
INSERT = (
    "INSERT INTO sequencer.enrollments (sequence, subject, data, wake_at)"
    " SELECT 's', 'u' || n || now(), jsonb_build_object('odd', n % 2 = 1), $2"
    " FROM generate_series(1, $1::int) AS n"
)
IS_ODD = """{
    "lodashCommand": "eq", "value": {"type": "get", "value": "data.odd"},
    "compareTo": {"type": "raw", "value": true}}"""


@pytest.fixture(autouse=True)
def _any_time_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """What wakes in an hour is read now; it is written then, however slow the machine is."""
    monkeypatch.setattr(loop, "AHEAD", 2 * HOUR.total_seconds())
    monkeypatch.setattr(read_ahead, "VALID_FOR", HOUR)
    monkeypatch.setattr(slow_evaluations, "MAX_SLOW", math.inf)


@pytest.fixture
def claimed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many due enrollments were read when they were due, each time."""
    counts: list[int] = []
    claim, peek = locking.claim, locking.peek

    async def counted_claim(*arguments: Any) -> locking.Claimed:
        found = await claim(*arguments)
        counts.append(len(found.enrollments))
        return found

    async def counted_peek(*arguments: Any, **options: Any) -> locking.Peeked | None:
        found = await peek(*arguments, **options)
        counts.append(len(found.enrollments) if found else 0)
        return found

    monkeypatch.setattr(locking, "claim", counted_claim)
    monkeypatch.setattr(locking, "peek", counted_peek)
    return counts


def let_an_hour_pass(*engines: Engine) -> None:
    for one in engines:
        one._env.clock._offset += HOUR.total_seconds()
        one._wake.set()


def planned(engine: Engine) -> int:
    return sum(len(one.read.versions) for one in engine._read_ahead._planned)


async def enroll_for_later(
    connection: asyncpg.Connection, count: int, *engines: Engine, read: int | None = None
) -> None:
    """Enroll what wakes in an hour. Triggers do not notify of what wakes so late."""
    at = engines[0]._env.clock.now() + HOUR
    await connection.execute(INSERT, count, at)
    for one in engines:
        one._report_wake(STEP, at, False)
        await eventually(lambda one=one: planned(one) == (read or count))  # type: ignore[misc]


@asynccontextmanager
async def waking(
    database: str,
    connection: asyncpg.Connection,
    recorder: Recorder,
    count: int,
    *,
    steps: Sequence[tuple[str, str, str, str | None]] = (("a", "Note", "{}", None),),
    read: int | None = None,
    **settings: Any,
) -> AsyncIterator[Engine]:
    """An engine that has read what wakes in an hour, or the first of it."""
    await define(connection, "s", *steps)
    async with running_engine(database, {"Note": recorder}, sweep=3600, **settings) as one:
        await enroll_for_later(connection, count, one, read=read)
        yield one


@pytest.mark.parametrize("count", [1, 250])
async def test_what_was_read_ahead_is_written_without_a_claim(
    database: str, connection: asyncpg.Connection, claimed: list[int], count: int
) -> None:
    recorder, metrics = Recorder(batch_size=100, concurrency=10), Metrics()
    async with waking(database, connection, recorder, count, batch=100, metrics=metrics) as one:
        assert not recorder.keys
        let_an_hour_pass(one)
        await until(connection, ALL_ENDED)
        assert not planned(one)
    labels = {"sequence": "s", "step": "a"}
    assert metrics.registry.get_sample_value("sequencerd_claims_total", labels) == count
    assert len(recorder.visits) == len(set(recorder.visits)) == count
    assert sum(claimed) == 0


async def test_enrollments_that_differ_are_written_without_a_claim(
    database: str, connection: asyncpg.Connection, claimed: list[int]
) -> None:
    steps = (("a", "Conditional", IS_ODD, "odd"), ("odd", "Note", "{}", None))
    recorder = Recorder(batch_size=100)
    async with waking(database, connection, recorder, 200, steps=steps) as one:
        let_an_hour_pass(one)
        await until(connection, ALL_ENDED)
    assert len(recorder.visits) == len(set(recorder.visits)) == 100
    assert sum(claimed) == 0


@pytest.mark.parametrize(
    ("change", "executed", "seen"),
    [
        (
            "UPDATE sequencer.enrollments SET data = data || '{\"k\": 1}' WHERE subject LIKE 'u1%'",
            5,
            1,
        ),
        ("UPDATE sequencer.enrollments SET status = 'cancelled' WHERE subject LIKE 'u1%'", 4, 0),
        ("DELETE FROM sequencer.enrollments WHERE subject LIKE 'u1%'", 4, 0),
        ("UPDATE sequencer.enrollments SET step = 'end' WHERE subject LIKE 'u1%'", 4, 0),
        ("UPDATE sequencer.steps SET config = '{\"k\": 1}' WHERE name = 'a'", 5, 5),
        ("UPDATE sequencer.sequences SET status = 'paused'", 0, 0),
    ],
)
async def test_changes_after_the_reading_are_respected(
    database: str, connection: asyncpg.Connection, change: str, executed: int, seen: int
) -> None:
    """They are committed a moment before the enrollments are due."""
    recorder = Recorder()
    steps = (
        ("a", "Note", "{}", "end"),
        ("end", "WaitForDuration", '{"amount": 1, "unit": "milliseconds"}', None),
    )
    async with waking(database, connection, recorder, 5, steps=steps) as one:
        await connection.execute("SET sequencer.notify = off")
        await connection.execute(change)
        let_an_hour_pass(one)
        if executed:
            await until(connection, ALL_ENDED)
        else:
            await eventually(lambda: one.catalog.sequences["s"].paused)
    assert len(recorder.visits) == len(set(recorder.visits)) == executed
    changed = [view for view in recorder.views if view["data"].get("k")]
    assert len(changed) + recorder.programs.count({"k": 1}) == seen


async def test_nothing_that_was_read_begins_early(
    database: str, connection: asyncpg.Connection
) -> None:
    """Another enrollment is due at the same step meanwhile."""
    recorder = Recorder()
    async with waking(database, connection, recorder, 5) as one:
        id_ = await enroll(connection, "s", "now")
        await until(
            connection, "SELECT ended_at IS NOT NULL FROM sequencer.enrollments WHERE id = $1", id_
        )
        assert recorder.visits == [f"{id_}:1"]
        let_an_hour_pass(one)
        await until(connection, ALL_ENDED)
    assert len(recorder.visits) == len(set(recorder.visits)) == 6


async def test_what_was_read_occupies_slots_only_while_it_is_executed(
    database: str, connection: asyncpg.Connection
) -> None:
    recorder = Recorder(batch_size=1, concurrency=1)
    async with waking(database, connection, recorder, 2) as one:
        executor = one.executors.by_key["Note"]
        assert executor.free_slots == 2
        let_an_hour_pass(one)
        await until(connection, ALL_ENDED)
        assert executor.free_slots == 2


async def test_a_failure_is_logged_when_it_is_written(
    database: str, connection: asyncpg.Connection
) -> None:
    """One of two enrollments that would fail is deleted a moment before."""
    steps = (("a", "Note", '{"bad": 1}', None),)
    with capture_logs() as logs:
        async with waking(database, connection, Recorder(), 2, steps=steps) as one:
            await connection.execute("DELETE FROM sequencer.enrollments WHERE subject LIKE 'u1%'")
            let_an_hour_pass(one)
            await until(connection, ALL_ENDED)
    failures = [line for line in logs if line["event"] == "enrollment failed"]
    assert len([line for line in failures if line["log_level"] == "warning"]) == 1


async def test_side_effects_start_with_the_runners_of_that_time(
    database: str, connection: asyncpg.Connection
) -> None:
    old, new = Recorder(), Recorder()
    async with waking(database, connection, old, 5) as one:
        await (await one.use({"Note": new}, one.executors.lookups))
        let_an_hour_pass(one)
        await until(connection, ALL_ENDED)
    assert not old.visits
    assert len(new.visits) == len(set(new.visits)) == 5


async def test_a_row_that_cannot_be_written_holds_back_no_other(
    database: str, connection: asyncpg.Connection
) -> None:
    await connection.execute("""
        CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            RAISE check_violation USING MESSAGE = 'not this one';
        END $$;
        CREATE TRIGGER refuse BEFORE UPDATE ON sequencer.enrollments
            FOR EACH ROW WHEN (NEW.subject LIKE 'u1%') EXECUTE FUNCTION refuse()""")
    recorder = Recorder()
    async with waking(database, connection, recorder, 5) as one:
        let_an_hour_pass(one)
        await eventually(lambda: len(one._quarantine))
        await until(
            connection,
            "SELECT count(*) = 4 FROM sequencer.enrollments WHERE ended_at > '-infinity'",
        )
    assert len(recorder.visits) == len(set(recorder.visits)) == 4


async def test_what_another_session_has_locked_is_left_to_a_claim(
    database: str, connection: asyncpg.Connection
) -> None:
    recorder = Recorder()
    async with waking(database, connection, recorder, 5) as one:
        async with connection.transaction():
            await connection.execute(
                "SELECT FROM sequencer.enrollments WHERE subject LIKE 'u1%' FOR UPDATE"
            )
            let_an_hour_pass(one)
            await eventually(lambda: len(recorder.visits) == 4)
        await until(connection, ALL_ENDED)
    assert len(recorder.visits) == len(set(recorder.visits)) == 5


async def test_two_daemons_that_have_read_the_same_execute_each_once(
    database: str, connection: asyncpg.Connection
) -> None:
    recorder = Recorder(batch_size=100, concurrency=10)
    await define(connection, "s", ("a", "Note", "{}", None))
    async with (
        running_engine(database, {"Note": recorder}, sweep=3600, batch=100) as one,
        running_engine(database, {"Note": recorder}, sweep=3600, batch=100) as other,
    ):
        await enroll_for_later(connection, 500, one, other)
        let_an_hour_pass(one, other)
        await until(connection, ALL_ENDED)
    assert len(recorder.visits) == len(set(recorder.visits)) == 500


async def test_the_number_of_enrollments_that_are_read_ahead_is_bounded(
    database: str, connection: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(read_ahead, "MAX_BATCHES", 2)
    recorder = Recorder()
    await define(connection, "s", ("a", "Note", "{}", None))
    async with running_engine(database, {"Note": recorder}, sweep=3600, batch=10) as one:
        at = one._env.clock.now() + HOUR
        await connection.execute(INSERT, 50, at)
        await one._read_ahead.read(STEP, at)
        assert planned(one) == 20
        one._report_wake(STEP, at, False)
        let_an_hour_pass(one)
        await until(connection, ALL_ENDED)
    assert len(recorder.visits) == len(set(recorder.visits)) == 50


async def test_what_was_read_is_written_only_as_slots_are_free(
    database: str, connection: asyncpg.Connection, claimed: list[int]
) -> None:
    """What has no slot yet is still as it was, so a change would be respected."""
    held = Held()
    recorder = Recorder(held, batch_size=1, concurrency=1)
    async with waking(database, connection, recorder, 20) as one:
        let_an_hour_pass(one)
        await held.begun.wait()
        await until(connection, LEASED, 2)
        assert await connection.fetchval(UNTOUCHED) == 18
        held.released.set()
        await until(connection, ALL_ENDED)
    assert len(recorder.visits) == len(set(recorder.visits)) == 20
    assert sum(claimed) == 0


async def test_no_more_is_leased_than_there_are_slots(
    database: str, connection: asyncpg.Connection
) -> None:
    """Of two slots, another enrollment occupies one when batches are due."""
    holding, free = asyncio.Event(), []

    async def note(task: Task) -> Answer:
        free.append(one.executors.by_key["Note"].free_slots)
        if task.view["subject"] == "now":
            await holding.wait()
        return Answer()

    recorder = Recorder(note, batch_size=1, concurrency=1)
    async with waking(database, connection, recorder, 30, read=20) as one:
        await enroll(connection, "s", "now")
        await eventually(lambda: free)
        let_an_hour_pass(one)
        await until(connection, LEASED, 2)
        assert planned(one) == 19
        holding.set()
        await until(connection, ALL_ENDED)
    assert len(recorder.visits) == len(set(recorder.visits)) == 31
    assert min(free) >= 0


async def test_what_is_late_is_claimed_and_not_written_from_memory(
    database: str,
    connection: asyncpg.Connection,
    claimed: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(read_ahead, "VALID_FOR", timedelta(0))
    async with waking(database, connection, Recorder(), 5) as one:
        let_an_hour_pass(one)
        await until(connection, ALL_ENDED)
        await eventually(lambda: not planned(one))
    assert sum(claimed) == 5


async def test_lone_timers_do_not_delay_notifications(
    database: str, connection: asyncpg.Connection
) -> None:
    """Each time, the claim that follows finds nothing."""
    async with waking(database, connection, Recorder(), 1) as one:
        for _ in range(10):
            let_an_hour_pass(one)
            await until(connection, ALL_ENDED)
            one._heap.pop_due(NEVER)  # of the end of the lease, which comes first
            await enroll_for_later(connection, 1, one)
        assert not one._claims.delay(STEP)


async def test_what_cannot_be_read_ahead_is_claimed(
    database: str,
    connection: asyncpg.Connection,
    claimed: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def broken(*_: object) -> AsyncIterator[list[tuple[Enrollment, int]]]:
        raise asyncpg.DataError("unreadable")
        yield []

    monkeypatch.setattr(locking, "read_ahead", broken)
    await define(connection, "s", ("a", "Note", "{}", None))
    async with running_engine(database, {"Note": Recorder()}, sweep=3600) as one:
        at = one._env.clock.now() + HOUR
        await connection.execute(INSERT, 5, at)
        await one._read_ahead.read(STEP, at)  # raises nothing
        one._report_wake(STEP, at, False)
        let_an_hour_pass(one)
        await until(connection, ALL_ENDED)
    assert sum(claimed) == 5


async def test_what_was_read_keeps_no_other_from_a_free_slot(
    database: str, connection: asyncpg.Connection
) -> None:
    """More than there are slots will reach the side effect."""
    steps = (("a", "Conditional", IS_ODD, "odd"), ("odd", "Note", "{}", None))
    recorder = Recorder(batch_size=1, concurrency=1)
    async with waking(database, connection, recorder, 10, steps=steps) as one:
        assert not one.executors.waiting()
        await connection.execute(
            "INSERT INTO sequencer.enrollments (sequence, subject, step) VALUES ('s', 'now', 'odd')"
        )
        await eventually(lambda: recorder.visits)
        let_an_hour_pass(one)
        await until(connection, ALL_ENDED)
    assert len(recorder.visits) == len(set(recorder.visits)) == 6


async def test_what_is_read_twice_at_the_same_time_is_kept_once(
    database: str, connection: asyncpg.Connection
) -> None:
    """As when the loop turns before the first reading has begun."""
    async with waking(database, connection, Recorder(), 5) as one:
        assert one._read_ahead._of is not None
        _, at = one._read_ahead._of
        await asyncio.gather(one._read_ahead.read(STEP, at), one._read_ahead.read(STEP, at))
        assert planned(one) == 5


async def test_a_busy_runner_holds_back_none_that_do_not_need_it(
    database: str, connection: asyncpg.Connection
) -> None:
    """All slots are taken after the reading, by others at a later step."""
    held = Held()
    steps = (("a", "Conditional", IS_ODD, "odd"), ("odd", "Note", "{}", None))
    recorder = Recorder(held, batch_size=1, concurrency=1)
    async with waking(database, connection, recorder, 4, steps=steps) as one:
        await connection.execute(
            "INSERT INTO sequencer.enrollments (sequence, subject, step)"
            " VALUES ('s', 'now', 'odd'), ('s', 'too', 'odd')"
        )
        await eventually(lambda: one.executors.by_key["Note"].free_slots == 0)
        let_an_hour_pass(one)
        try:
            await until(
                connection,
                "SELECT count(*) = 2 FROM sequencer.enrollments WHERE status = 'completed'",
            )
        finally:
            held.released.set()
        await until(connection, ALL_ENDED)
    assert len(recorder.visits) == len(set(recorder.visits)) == 4
