"""Windows and holidays in the daemon: what waits in a queue, and what changes while it waits."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import pytest

from sequencerd.core.model import Limits
from sequencerd.core.task import Failed, Result, Task
from tests.helpers.databases import make_login
from tests.helpers.engines import ALL_ENDED, Held, Recorder, define, enroll, running_engine, until
from tests.helpers.runners import email_runner
from tests.helpers.servers import HOST, smtp_server

ALL_WAIT = (
    "SELECT count(*) = $1 FROM sequencer.enrollments"
    " WHERE leased_by IS NULL AND entered_at IS NOT NULL AND wake_at > now() + interval '1 hour'"
)
TOMORROW = "SELECT min(wake_at) > now() + interval '20 hours' FROM sequencer.enrollments"


def clock(at: datetime) -> str:
    return f"{at:%H:%M:%S}"


async def set_window(connection: asyncpg.Connection, window: dict[str, Any] | None) -> None:
    await connection.execute(
        "UPDATE sequencer.sequences SET time_window = $1", window and json.dumps(window)
    )


@pytest.mark.slow
async def test_queued_side_effects_wait_when_the_window_closes(
    database: str, connection: asyncpg.Connection
) -> None:
    held = Held()
    runner = Recorder(held, batch_size=1, concurrency=1)
    async with running_engine(database, {"Work": runner}):
        await define(connection, "s", ("work", "Work", "{}", None))
        closes = datetime.now(UTC) + timedelta(seconds=5)
        await set_window(
            connection, {"from": clock(closes - timedelta(hours=2)), "to": clock(closes)}
        )
        for n in range(6):
            await enroll(connection, "s", f"user-{n}")
        await held.begun.wait()
        await until(connection, "SELECT count(*) > 1 FROM sequencer.enrollments WHERE attempt = 1")
        await until(connection, "SELECT clock_timestamp() > $1", closes)
        held.released.set()
        await until(connection, "SELECT count(*) = 5 FROM sequencer.enrollments WHERE attempt = 0")
        await until(connection, ALL_WAIT, 5)
        assert await connection.fetchval(TOMORROW)
        assert len(runner.keys) == 1
        # without a window they begin at once
        await set_window(connection, None)
        await until(connection, ALL_ENDED)


@pytest.mark.slow
async def test_rate_limited_side_effects_wait_when_the_window_closes(
    database: str, connection: asyncpg.Connection
) -> None:
    async with smtp_server() as box:
        runner = email_runner(f"smtp://{HOST}:{box.port}", limits=Limits(4, per_second=2))
        config = {"from": "a@x.test", "to": "b@x.test", "subject": "x", "text": "x"}
        async with running_engine(database, {"Email": runner}):
            await define(connection, "s", ("mail", "Email", json.dumps(config), None))
            closes = datetime.now(UTC) + timedelta(seconds=4)
            await set_window(
                connection, {"from": clock(closes - timedelta(hours=2)), "to": clock(closes)}
            )
            await connection.execute(
                "INSERT INTO sequencer.enrollments (sequence, subject)"
                " SELECT 's', 'user-' || n FROM generate_series(1, 40) AS n"
            )
            await until(connection, "SELECT clock_timestamp() > $1", closes)
            await until(
                connection,
                "SELECT count(*) = 0 FROM sequencer.enrollments"
                " WHERE status = 'active' AND NOT (wake_at > now() + interval '20 hours'"
                " AND leased_by IS NULL AND attempt = 0)",
            )
        await runner.close()
        sent = len(box.messages)
    assert sent < 40
    ended = "SELECT count(*) FROM sequencer.enrollments WHERE status = 'completed'"
    assert await connection.fetchval(ended) == sent


async def test_a_retry_waits_for_the_next_opening(
    database: str, connection: asyncpg.Connection
) -> None:
    async def fails(_task: Task) -> Result:
        return Failed("not now", retry_after=timedelta(minutes=30))

    async with running_engine(database, {"Work": Recorder(fails)}):
        await define(connection, "s", ("work", "Work", "{}", None))
        closes = datetime.now(UTC) + timedelta(minutes=10)
        await set_window(
            connection, {"from": clock(closes - timedelta(hours=2)), "to": clock(closes)}
        )
        await enroll(connection, "s", "ada")
        await until(connection, "SELECT count(*) = 1 FROM sequencer.events WHERE action = 'retry'")
        await until(connection, TOMORROW)
        assert await connection.fetchval("SELECT attempt FROM sequencer.enrollments") == 1


async def test_a_holiday_is_followed_while_enrollments_wait(
    database: str, connection: asyncpg.Connection
) -> None:
    """By any user with the editor's role; and the calendar that is missing at first."""
    login = await make_login(connection, database, "login_editor", "editor")
    runner = Recorder()
    today = datetime.now(UTC).date()
    async with running_engine(database, {"Work": runner}):
        await define(connection, "s", ("work", "Work", "{}", None))
        await set_window(connection, {"holidays": "DE"})
        id_ = await enroll(connection, "s", "ada")
        await until(connection, "SELECT failure = 'invalid_step' FROM sequencer.enrollments")
        problem = await connection.fetchval("SELECT problem FROM sequencer.steps")
        assert "calendar 'DE' has no holidays" in problem
        editor = await asyncpg.connect(login)
        for day in (today, today + timedelta(days=1)):  # it may be midnight
            await editor.execute("INSERT INTO sequencer.holidays VALUES ('DE', $1, 'a day')", day)
        await until(
            connection,
            "SELECT status = 'active' AND wake_at > now() + interval '1 minute'"
            " FROM sequencer.enrollments WHERE id = $1",
            id_,
        )
        assert not runner.keys
        # a day of another calendar, and a name, are no change
        revision = await connection.fetchval("SELECT revision FROM sequencer.sequences")
        await editor.execute("INSERT INTO sequencer.holidays VALUES ('FR', $1)", today)
        await editor.execute("UPDATE sequencer.holidays SET name = 'another'")
        assert revision == await connection.fetchval("SELECT revision FROM sequencer.sequences")
        await editor.execute(
            "UPDATE sequencer.holidays SET day = '2001-01-01' WHERE day = $1 AND calendar = 'DE'",
            today,
        )
        await editor.execute("DELETE FROM sequencer.holidays WHERE day > '2001-01-01'")
        await editor.close()
        await until(connection, ALL_ENDED)
        assert len(runner.keys) == 1


async def test_a_window_that_is_no_window_is_a_problem_of_the_steps(
    database: str, connection: asyncpg.Connection
) -> None:
    async with running_engine(database, {"Work": Recorder()}):
        await define(
            connection,
            "s",
            ("free", "Work", '{"window": null}', "held"),
            ("held", "Work", "{}", None),
        )
        await set_window(connection, {"from": "noon"})
        await until(
            connection,
            "SELECT problem LIKE '%window of the sequence%time of day%'"
            " FROM sequencer.steps WHERE name = 'held'",
        )
        assert await connection.fetchval(
            "SELECT problem IS NULL FROM sequencer.steps WHERE name = 'free'"
        )
