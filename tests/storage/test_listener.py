"""What NOTIFY may carry, and what it may cost."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, suppress
from datetime import UTC, datetime
from typing import Any

import asyncpg
import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from sequencerd.core.advance import advance
from sequencerd.engine import background, moves, reschedule
from sequencerd.storage import evaluations, listener, locking, sequences
from sequencerd.storage.listener import (
    DefinitionsChanged,
    DueSteps,
    EnrollmentDue,
    Notification,
    Reevaluate,
    listen,
    parse,
    poll,
)
from tests.helpers.databases import shard
from tests.helpers.engines import ALL_ENDED, Recorder, define, enroll, running_engine, until
from tests.helpers.waiting import PATIENCE, eventually

DAYS = '{"amount": 3, "unit": "days"}'
NOTIFY = "SELECT pg_notify('sequencer', $1)"
NONE_LEFT = "SELECT bool_and(reschedule_from IS NULL AND NOT reschedule_again) FROM sequencer.steps"


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        ("", Reevaluate()),
        ("{}", Reevaluate()),
        ('{"subject": "ada"}', Reevaluate(subject="ada")),
        ('{"sequence": "s", "step": "a"}', Reevaluate(sequence="s", step="a")),
        ('{"due" : ["s", "a"]}', EnrollmentDue(due=("s", "a"))),
        (
            '{"due":["s","a"],"since":"2026-01-01T01:00:00.5+01:00","later":true}',
            EnrollmentDue(
                due=("s", "a"), since=datetime(2026, 1, 1, 0, 0, 0, 500_000, tzinfo=UTC), later=True
            ),
        ),
        ('{"definitions": true}', DefinitionsChanged(definitions=True)),
        ('{"definitions": "s"}', DefinitionsChanged(definitions="s")),
    ],
)
def test_payloads_are_parsed(payload: str, message: Notification) -> None:
    assert parse(payload) == message


@pytest.mark.parametrize(
    "payload", ["nonsense", "[]", "null", '{"subject": 5}', '{"sbject": "x"}', '{"due": ["a"]}']
)
def test_nonsense_is_refused_with_a_hint(payload: str) -> None:
    with pytest.raises(ValueError, match="send no payload, or"):
        parse(payload)


@given(st.text())
def test_every_payload_is_a_message_or_rejected(payload: str) -> None:
    with suppress(ValueError):
        parse(payload)


# --- requests to evaluate waiting enrollments


@pytest.fixture
def evaluated(monkeypatch: pytest.MonkeyPatch) -> Counter[int]:
    """How often each enrollment was evaluated, in any engine."""
    counter: Counter[int] = Counter()
    original = advance

    def counting(definitions: Any, enrollment: Any, *arguments: Any, **options: Any) -> Any:
        counter[enrollment.id] += 1
        return original(definitions, enrollment, *arguments, **options)

    monkeypatch.setattr(moves, "advance", counting)
    return counter


async def wait_in(connection: asyncpg.Connection, sequence: str, count: int) -> None:
    """Enrollments that wait at the first step of a sequence."""
    await define(
        connection,
        sequence,
        ("pause", "WaitForDuration", DAYS, "end"),
        ("end", "GoTo", "{}", None),
    )
    async with connection.transaction():
        await connection.execute(
            "INSERT INTO sequencer.enrollments (sequence, subject, wake_at)"
            " SELECT $1, 'u' || n, 'infinity' FROM generate_series(1, $2::int) AS n",
            *(sequence, count),
        )
        await connection.execute(
            "UPDATE sequencer.enrollments SET entered_at = now(),"
            " wake_at = now() + interval '3 days' WHERE sequence = $1",
            sequence,
        )


async def times(evaluated: Counter[int], total: int) -> None:
    await eventually(lambda: evaluated.total() >= total)


@pytest.mark.slow
async def test_each_enrollment_is_evaluated_once_for_a_request_and_not_written(
    database: str, connection: asyncpg.Connection, evaluated: Counter[int]
) -> None:
    count = 2_000
    await wait_in(connection, "s", count)
    before = await connection.fetchval("SELECT sum(xmin::text::bigint) FROM sequencer.enrollments")
    async with AsyncExitStack() as stack:
        for _ in range(3):
            await stack.enter_async_context(running_engine(database, batch=100))
        await connection.execute("NOTIFY sequencer")
        await times(evaluated, count // 10)
        for _ in range(5):  # while it goes on: once more for all of them
            await connection.execute("NOTIFY sequencer")
        await times(evaluated, 2 * count)
        await until(connection, NONE_LEFT)
        assert len(evaluated) == count
        assert set(evaluated.values()) == {2}
        enrolled = await enroll(connection, "s", "one more")
        await until(
            connection,
            "SELECT entered_at IS NOT NULL FROM sequencer.enrollments WHERE id = $1",
            enrolled,
        )
    assert before == await connection.fetchval(
        "SELECT sum(xmin::text::bigint) FROM sequencer.enrollments WHERE id <> $1", enrolled
    )


async def test_a_request_applies_to_the_enrollments_that_it_names(
    database: str, connection: asyncpg.Connection, evaluated: Counter[int]
) -> None:
    for name in ("s", "t", "paused"):
        await wait_in(connection, name, 3)
    await connection.execute("UPDATE sequencer.sequences SET status='paused' WHERE name='paused'")
    ids = {
        (row["sequence"], row["subject"]): row["id"]
        for row in await connection.fetch("SELECT id, sequence, subject FROM sequencer.enrollments")
    }
    async with running_engine(database):
        for payload, named in (
            ('{"subject": "u1"}', {("s", "u1"), ("t", "u1")}),
            ('{"subject": "u1", "sequence": "t"}', {("t", "u1")}),
            ('{"subject": "u1", "step": "end"}', set()),
            ('{"sequence": "s"}', {("s", f"u{n}") for n in (1, 2, 3)}),
            ('{"sequence": "t", "step": "end"}', set()),
            ('{"step": "pause"}', {(s, f"u{n}") for s in "st" for n in (1, 2, 3)}),
        ):
            evaluated.clear()
            await connection.execute(NOTIFY, payload)
            wanted = {ids[one]: 1 for one in named}
            await times(evaluated, len(wanted))
            await until(connection, NONE_LEFT.replace("steps", "steps WHERE sequence <> 'paused'"))
            assert dict(evaluated) == wanted, payload


async def test_too_many_requests_become_one_request_for_all_enrollments(
    database: str,
    connection: asyncpg.Connection,
    evaluated: Counter[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(reschedule, "MAX_REQUESTS", 10)
    await wait_in(connection, "s", 20)
    async with running_engine(database) as one:
        async with connection.transaction():
            for n in range(1000):
                await connection.execute(NOTIFY, f'{{"subject": "nobody-{n}"}}')
        await times(evaluated, 20)
        assert len(one._rescheduling._requests) <= 10
    assert max(evaluated.values()) <= 3


def failing_once(function: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    errors = [asyncpg.InterfaceError("the connection is lost")]

    async def call(*arguments: Any) -> Any:
        if errors:
            raise errors.pop()
        return await function(*arguments)

    return call


@pytest.mark.parametrize("payload", ["", '{"subject": "u1"}'])
async def test_a_request_is_repeated_after_a_database_error(
    database: str,
    connection: asyncpg.Connection,
    evaluated: Counter[int],
    monkeypatch: pytest.MonkeyPatch,
    payload: str,
) -> None:
    monkeypatch.setattr(background, "ERROR_PAUSE", 0.05)
    for name in ("request_evaluation", "waiting_of_subjects"):
        monkeypatch.setattr(evaluations, name, failing_once(getattr(evaluations, name)))
    await wait_in(connection, "s", 1)
    async with running_engine(database):
        await connection.execute(NOTIFY, payload)
        await times(evaluated, 1)


async def test_a_request_for_a_step_that_is_locked_is_repeated(
    database: str,
    connection: asyncpg.Connection,
    evaluated: Counter[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    request, marked = evaluations.request_evaluation, asyncio.Queue[list[tuple[str, str]]]()

    async def request_evaluation(*arguments: Any) -> list[tuple[str, str]]:
        found = await request(*arguments)
        marked.put_nowait(found)
        return found

    monkeypatch.setattr(evaluations, "request_evaluation", request_evaluation)
    monkeypatch.setattr(reschedule, "REQUEST_PAUSE", 0.05)
    await wait_in(connection, "s", 1)
    other = await asyncpg.connect(database)
    async with running_engine(database):
        async with other.transaction():
            await other.execute("SELECT FROM sequencer.steps WHERE name = 'pause' FOR UPDATE")
            await connection.execute("NOTIFY sequencer")
            assert await marked.get() == []
        await times(evaluated, 1)
    await other.close()


async def test_another_daemon_serves_the_remaining_requests(
    database: str, connection: asyncpg.Connection, evaluated: Counter[int]
) -> None:
    await wait_in(connection, "s", 20)
    async with AsyncExitStack() as stack:
        first = await stack.enter_async_context(AsyncExitStack())
        await first.enter_async_context(running_engine(database))
        await stack.enter_async_context(running_engine(database))
        await connection.execute("NOTIFY sequencer")
        await times(evaluated, 20)
        await first.aclose()
        await connection.execute("NOTIFY sequencer")
        await times(evaluated, 40)
        await until(connection, NONE_LEFT)


async def test_an_abandoned_pass_is_found_by_the_sweep(
    database: str, connection: asyncpg.Connection, evaluated: Counter[int]
) -> None:
    await wait_in(connection, "s", 20)
    async with running_engine(database) as one:
        await connection.execute(
            "UPDATE sequencer.steps"
            " SET reschedule_from = (SELECT max(id) FROM sequencer.enrollments)"
            " WHERE name = 'pause'"
        )
        await one.sweep()
        await until(connection, NONE_LEFT)
    assert evaluated.total() == 1


# --- floods


async def test_nonsense_is_counted_and_logged_with_equal_warnings(database: str) -> None:
    """Of those, `service/logs.py` writes one in a minute."""
    refused = asyncio.Queue[None]()
    with capture_logs() as logs:
        log = structlog.get_logger()
        ready = asyncio.Event()

        async def connected() -> None:
            ready.set()

        async def find_due(_whole: bool) -> listener.DueSteps:
            return listener.DueSteps(0, frozenset())

        def refuse() -> None:
            refused.put_nowait(None)

        listening = asyncio.create_task(
            listen(shard(database), lambda _: None, connected, find_due, log=log, refused=refuse)
        )
        await ready.wait()
        sender = await asyncpg.connect(database)
        await sender.execute(
            "SELECT pg_notify('sequencer', 'nonsense ' || n) FROM generate_series(1, 500) AS n"
        )
        for _ in range(500):
            await refused.get()
        listening.cancel()
        with suppress(asyncio.CancelledError):
            await listening
        await sender.close()
    warnings = [entry for entry in logs if entry["log_level"] == "warning"]
    assert len(warnings) == 500
    assert all(entry == warnings[0] for entry in warnings)
    assert "send no payload" in warnings[0]["error"]


@pytest.mark.slow
async def test_a_flood_of_notifications_delays_no_enrollment_and_costs_little(
    database: str, connection: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = Counter[str]()
    for module, name in ((sequences, "read_revisions"), (locking, "claim")):
        original = getattr(module, name)

        def counting(
            *arguments: Any, name: str = name, original: Any = original, **options: Any
        ) -> Any:
            reads[name] += 1
            return original(*arguments, **options)

        monkeypatch.setattr(module, name, counting)
    recorder = Recorder()
    await define(connection, "s", ("send", "Note", "{}", None))
    await define(connection, "idle", ("a", "Note", "{}", None))
    sender = await asyncpg.connect(database)
    async with running_engine(database, {"Note": recorder}):
        reads.clear()
        for n in range(50):
            await sender.execute(
                "SELECT pg_notify('sequencer', payload) FROM generate_series(1, 100) AS n, "
                'LATERAL (VALUES (\'{"due": ["no-\' || n || \'", "a"]}\'),'
                ' (\'{"due": ["idle", "no-\' || n || \'"]}\'),'
                ' (\'{"due": ["idle", "a"]}\'), (\'{"definitions": true}\'),'
                " ('garbage')) AS p (payload)"
            )
            await enroll(connection, "s", f"u{n}")
        await until(connection, ALL_ENDED)
    await sender.close()
    assert len(recorder.keys) == 50
    # 20,000 notifications that could have asked for something
    assert reads["claim"] < 1000, reads
    assert reads["read_revisions"] < 1500, reads


async def test_an_unknown_name_is_searched_once(
    database: str, connection: asyncpg.Connection
) -> None:
    await define(connection, "s", ("a", "GoTo", "{}", None))
    async with running_engine(database) as one:
        await one.reload()
        assert one.catalog.should_load("later")
        assert not one.catalog.should_load("later")
        assert not one.catalog.should_load("s")
        await define(connection, "later", ("a", "WaitForDuration", DAYS, None))
        await one.reload()
        assert one.catalog.step(("later", "a"))
        await connection.execute("DELETE FROM sequencer.sequences WHERE name = 'later'")
        await one.reload()
        assert one.catalog.should_load("later")


@pytest.mark.parametrize("polls", [False, True])
async def test_an_unexpected_error_ends_no_daemon(
    database: str, monkeypatch: pytest.MonkeyPatch, polls: bool
) -> None:
    """What is loaded goes on, and the next attempt may succeed."""
    monkeypatch.setattr(listener, "POLL_INTERVAL", 0.01)
    again = asyncio.Event()
    failures = iter([OverflowError("date value out of range")])

    async def connected() -> None:
        for failure in failures:
            raise failure
        again.set()

    async def find_due(_whole: bool) -> DueSteps:
        return DueSteps(0, frozenset())

    with capture_logs() as logs:
        log = structlog.get_logger()
        work = (
            poll(connected, connected, log, lambda _: None)
            if polls
            else listen(shard(database), lambda _: None, connected, find_due, log=log)
        )
        listening = asyncio.create_task(work)
        await asyncio.wait_for(again.wait(), PATIENCE)
        listening.cancel()
        with suppress(asyncio.CancelledError):
            await listening
    assert "internal error" in [line["event"] for line in logs]


def test_one_slow_poll_does_not_delay_the_next() -> None:
    """A busy machine may slow any of them; a table with many steps slows all."""
    assert listener.pause_after(0.01, 0.001, 0.05) == 0.01
    assert listener.pause_after(0.01, 0.05, 0.001) == 0.01
    assert listener.pause_after(0.01, 0.04, 0.05) == 0.04 / listener.POLL_SHARE
