"""What expires while it waits: for a runner that is down or full, a rate limit, a pause."""

from __future__ import annotations

import asyncio
import json
from datetime import UTC, datetime, timedelta

import asyncpg
import pytest

from sequencerd.core.backoff import Pauses
from sequencerd.core.model import Limits
from sequencerd.core.task import Answer, Failed, Result, Task
from sequencerd.runners import Runner
from tests.engine.test_outages import DOWN, closed_port, fails
from tests.helpers.engines import ALL_ENDED, Recorder, define, enroll, running_engine, until, way
from tests.helpers.runners import email_runner
from tests.helpers.servers import HOST, smtp_server
from tests.helpers.waiting import PATIENCE

LONG = Pauses(3600.0, 3600.0)  # nothing is tried again within a test
SHORT = Pauses(0.02, 0.05)
SOON = {"expires": {"amount": 2, "unit": "seconds"}}
FROM_DATA = '{"expires": "{{data.over}}"}'
EXPIRED = "SELECT count(*) = $1 FROM sequencer.events WHERE action = 'expired'"


def after(seconds: float) -> str:
    """A date, as data have it."""
    return json.dumps({"over": (datetime.now(UTC) + timedelta(seconds=seconds)).isoformat()})


@pytest.mark.parametrize(
    ("goes", "leads"),
    [
        ("next", ["mail expired", "good next", "good completed"]),
        ("altNext", ["mail expired", "other next", "other completed"]),
        ("end", ["mail expired", "mail completed"]),
    ],
)
@pytest.mark.slow
async def test_a_mail_that_expires_in_an_outage_is_never_sent(
    database: str, connection: asyncpg.Connection, goes: str, leads: list[str]
) -> None:
    port = closed_port()
    email = email_runner(f"smtp://{HOST}:{port}")
    runners: dict[str, Runner] = {"Email": email, "Work": Recorder()}
    mail = {"from": "a@x.test", "to": "b@x.test", "subject": "x", "text": "x"}
    async with running_engine(database, runners, pauses=LONG):
        await define(
            connection,
            "s",
            ("mail", "Email", json.dumps({**mail, **SOON, "onExpired": goes}), "good"),
            ("good", "Work", "{}", None),
            ("other", "Work", "{}", None),
        )
        await connection.execute(
            "UPDATE sequencer.steps SET alt_next_step = 'other' WHERE name = 'mail'"
        )
        ids = [await enroll(connection, "s", f"user-{n}") for n in range(200)]
        await until(connection, DOWN, "Email")
        async with smtp_server(port=port) as box:
            await until(connection, ALL_ENDED)
            assert not box.messages
        await email.close()
    told = await way(connection, ids[-1])
    assert told == ["mail enrolled", *leads]
    assert await connection.fetchval(EXPIRED, 200)


@pytest.mark.slow
@pytest.mark.parametrize("concurrency", [1, 7])
async def test_an_enrollment_that_waits_for_a_full_runner_expires(
    database: str, connection: asyncpg.Connection, concurrency: int
) -> None:
    """However many are executed: with seven, they fill a page of the search."""
    release = asyncio.Event()

    async def slow(_: Task) -> Result:
        await release.wait()
        return Answer()

    work = Recorder(slow, batch_size=1, concurrency=concurrency)
    async with running_engine(database, {"Work": work}, batch=7):
        await define(connection, "s", ("work", "Work", json.dumps(SOON), None))
        await connection.execute(
            "INSERT INTO sequencer.enrollments (sequence, subject)"
            " SELECT 's', 'user-' || n FROM generate_series(1, 60) AS n"
        )
        # as many as are executed are in the executor's queue
        await until(connection, EXPIRED, 60 - 2 * concurrency)
        release.set()
        await until(connection, ALL_ENDED)
    assert await connection.fetchval(EXPIRED, 60 - concurrency)
    assert len(work.keys) == concurrency


async def test_a_date_that_changes_while_a_runner_is_down(
    database: str, connection: asyncpg.Connection
) -> None:
    work = Recorder(fails)
    async with running_engine(database, {"Work": work}, pauses=LONG) as engine:
        await define(connection, "s", ("work", "Work", FROM_DATA, None))
        await enroll(connection, "s", "first", after(3600))
        await until(connection, DOWN, "Work")
        sooner = await enroll(connection, "s", "sooner", after(3600))
        later = await enroll(connection, "s", "later", after(4))
        known = "SELECT expires_at > now() FROM sequencer.enrollments WHERE id = $1"
        await until(connection, known, sooner)
        await until(connection, known, later)
        change = "UPDATE sequencer.enrollments SET data = $2 WHERE id = $1"
        await connection.execute(change, later, after(3600))
        await connection.execute(change, sooner, after(0))
        await until(connection, EXPIRED, 1)
        assert await way(connection, sooner) == [
            "work enrolled",
            "work expired",
            "work completed",
        ]
        # so does a definition
        await until(connection, known, later)
        config = json.dumps({"expires": {"amount": 0.1, "unit": "seconds"}})
        await connection.execute("UPDATE sequencer.steps SET config = $1", config)
        await until(connection, ALL_ENDED)
        assert engine.in_flight == 0
    assert await connection.fetchval(EXPIRED, 3)


async def test_a_waiting_enrollment_keeps_its_turn(
    database: str, connection: asyncpg.Connection
) -> None:
    work = Recorder(fails, batch_size=1, concurrency=1)
    async with running_engine(database, {"Work": work}, pauses=LONG):
        await define(connection, "s", ("work", "Work", FROM_DATA, None))
        await enroll(connection, "s", "first", after(3600))
        await until(connection, DOWN, "Work")
        id_ = await connection.fetchval(
            "INSERT INTO sequencer.enrollments (sequence, subject, data, wake_at)"
            " VALUES ('s', 'late', $1, now() - interval '10 minutes') RETURNING id",
            after(3600),
        )
        mine = "FROM sequencer.enrollments WHERE id = $1"
        await connection.execute('SELECT pg_notify(\'sequencer\', \'{"due": ["s", "work"]}\')')
        await until(connection, f"SELECT expires_at IS NULL {mine}", id_)
        assert await connection.fetchval(
            f"SELECT wake_at < now() - interval '9 minutes' {mine}", id_
        )
        # none is overdue by the daemon's fault
        assert await connection.fetchval("SELECT count(*) FROM sequencer.overdue") == 0
        await connection.execute("UPDATE sequencer.daemons SET alive_until = now() - interval '1h'")
        assert await connection.fetchval("SELECT count(*) FROM sequencer.overdue") == 1


KNOWN = "SELECT expires_at IS NOT NULL FROM sequencer.enrollments WHERE id = $1"


async def test_a_sweep_finds_the_expiry_of_what_was_committed_late(
    database: str, connection: asyncpg.Connection
) -> None:
    async with running_engine(database, {"Work": Recorder(fails)}, pauses=LONG) as engine:
        await define(connection, "s", ("work", "Work", FROM_DATA, None))
        await enroll(connection, "s", "first", after(3600))
        await until(connection, DOWN, "Work")
        await until(connection, KNOWN, await enroll(connection, "s", "second", after(3600)))
        late = await connection.fetchval(
            "INSERT INTO sequencer.enrollments (sequence, subject, data, wake_at)"
            " VALUES ('s', 'late', $1, now() - interval '10 minutes') RETURNING id",
            after(0),
        )
        await engine.sweep()
        await until(connection, EXPIRED, 1)
        assert (await way(connection, late))[-1] == "work completed"


async def test_an_expired_enrollment_that_is_locked_is_tried_again_later(
    database: str, connection: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def claim_nothing(*_: object) -> None:
        """As if another session had locked it."""

    work = Recorder(fails)
    async with running_engine(database, {"Work": work}, pauses=LONG, batch=1) as engine:
        await define(connection, "s", ("work", "Work", FROM_DATA, None))
        await enroll(connection, "s", "first", after(3600))
        await until(connection, DOWN, "Work")
        id_ = await enroll(connection, "s", "ada", after(3600))
        await until(connection, KNOWN, id_)
        with monkeypatch.context() as locked:
            locked.setattr(engine._claims, "claim_some", claim_nothing)
            await connection.execute(
                "UPDATE sequencer.enrollments SET data = $2 WHERE id = $1", id_, after(0)
            )
            async with asyncio.timeout(PATIENCE):
                await engine._expiries.run()
        await until(connection, EXPIRED, 1)


async def test_a_pause_ends_after_the_expiry(database: str, connection: asyncpg.Connection) -> None:
    work = Recorder()
    async with running_engine(database, {"Work": work}):
        await define(connection, "s", ("work", "Work", FROM_DATA, None))
        await connection.execute("UPDATE sequencer.sequences SET status = 'paused'")
        await enroll(connection, "s", "ada", after(0.1))
        await until(
            connection,
            "SELECT now() > (data->>'over')::timestamptz FROM sequencer.enrollments",
        )
        assert await connection.fetchval(EXPIRED, 0)
        await connection.execute("UPDATE sequencer.sequences SET status = 'active'")
        await until(connection, ALL_ENDED)
    assert await connection.fetchval(EXPIRED, 1)
    assert not work.keys


@pytest.mark.slow
async def test_expiry_in_the_queue_of_a_rate_limit(
    database: str, connection: asyncpg.Connection
) -> None:
    async with smtp_server() as box:
        runner = email_runner(f"smtp://{HOST}:{box.port}", limits=Limits(per_second=1))
        config = {"from": "a@x.test", "to": "b@x.test", "subject": "x", "text": "x", **SOON}
        async with running_engine(database, {"Email": runner}):
            await define(connection, "s", ("mail", "Email", json.dumps(config), None))
            await connection.execute(
                "INSERT INTO sequencer.enrollments (sequence, subject)"
                " SELECT 's', 'user-' || n FROM generate_series(1, 8) AS n"
            )
            await until(connection, ALL_ENDED)
        await runner.close()
        sent = len(box.messages)
    assert sent <= 3
    assert await connection.fetchval(EXPIRED, 8 - sent)


async def test_an_attempt_that_failed_is_not_repeated_after_the_expiry(
    database: str, connection: asyncpg.Connection
) -> None:
    async def refuses(_: Task) -> Result:
        return Failed("greylisted")

    work = Recorder(refuses)
    config = {"retry": {"attempts": 1000, "firstDelay": 0.3, "longestDelay": 0.3}, **SOON}
    async with running_engine(database, {"Work": work}, pauses=SHORT):
        await define(connection, "s", ("work", "Work", json.dumps(config), None))
        await enroll(connection, "s", "ada")
        await until(connection, ALL_ENDED)
    assert await connection.fetchval(EXPIRED, 1)
    assert 0 < len(work.keys) < 50
