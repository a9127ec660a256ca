"""The clock follows the database's, and never runs ahead of what was measured."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from pathlib import Path

import asyncpg

from sequencerd.engine.clock import Clock
from tests.helpers.engines import Recorder, define, enroll, running_engine, until


def test_the_clock_continues_from_the_measured_time() -> None:
    seconds = 1000.0
    clock = Clock(monotonic=lambda: seconds)
    server = datetime(2031, 5, 5, 12, 0, tzinfo=UTC)
    off = clock.measured(server)
    assert off > timedelta(days=1)
    assert clock.now() == server
    seconds += 90
    assert clock.now() == server + timedelta(seconds=90)
    assert clock.seconds_until(server + timedelta(seconds=100)) == 10
    assert clock.measured(server + timedelta(seconds=90)) == timedelta(0)


def test_small_corrections_do_not_move_the_clock_back() -> None:
    seconds = 1000.0
    clock = Clock(monotonic=lambda: seconds)
    server = datetime(2031, 5, 5, 12, 0, tzinfo=UTC)
    clock.measured(server)
    assert clock.now() == server
    clock.measured(server - timedelta(seconds=0.5))
    assert clock.now() == server
    assert clock.measured(server - timedelta(seconds=0.5)) == timedelta(0)
    seconds += 0.5
    assert clock.now() == server
    seconds += 0.25
    assert clock.now() == server + timedelta(seconds=0.25)
    # a clock that was put right by an hour is followed
    clock.measured(server - timedelta(hours=1))
    assert clock.now() == server - timedelta(hours=1)


async def test_what_moved_while_the_clock_was_ahead_can_be_continued(
    database: str, connection: asyncpg.Connection
) -> None:
    """By the statement in the documentation."""
    text = (Path(__file__).parent.parent.parent / "docs/reliability.md").read_text()
    (statement,) = re.findall(r"UPDATE[^`]*created_at > now\(\)[^`]*", text)
    await define(
        connection,
        "s",
        ("wait", "WaitForDuration", '{"amount": 1, "unit": "hours"}', "call"),
        ("call", "Call", "{}", None),
    )
    for subject in ("new", "waits", "interrupted", "other"):
        await enroll(connection, "s", subject)
    await connection.execute(
        "UPDATE sequencer.enrollments SET entered_at = now(), wake_at = now() + interval '1 hour'"
        " WHERE subject <> 'new';"
        "UPDATE sequencer.enrollments SET step = 'call', wake_at = now(), leased_by = 'dead',"
        " leases = 1, attempt = 1 WHERE subject = 'interrupted';"
        "UPDATE sequencer.enrollments SET created_at = created_at + interval '5 years',"
        " entered_at = entered_at + interval '5 years', wake_at = wake_at + interval '5 years'"
        " WHERE subject <> 'other'"
    )
    others = await connection.fetchrow(
        "SELECT * FROM sequencer.enrollments WHERE subject = 'other'"
    )
    call = Recorder()
    async with running_engine(database, {"Call": call}):
        await connection.execute(statement)
        await until(
            connection,
            "SELECT count(*) = 2 FROM sequencer.enrollments WHERE subject IN ('new', 'waits')"
            " AND wake_at BETWEEN now() + interval '50 minutes' AND now() + interval '1 hour'",
        )
        await until(
            connection,
            "SELECT status = 'completed' FROM sequencer.enrollments WHERE subject = 'interrupted'",
        )
    assert len(call.keys) == 1
    now = await connection.fetchrow("SELECT * FROM sequencer.enrollments WHERE subject = 'other'")
    assert now == others
