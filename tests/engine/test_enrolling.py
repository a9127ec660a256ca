"""Enrolling what queries return: by one daemon, once for each time, and within limits."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any

import asyncpg
import pytest
import structlog

from sequencerd.engine import enrolling
from sequencerd.engine.clock import Clock
from sequencerd.engine.enrolling import Enrolling
from sequencerd.engine.problems import Problems
from sequencerd.storage import connections, sources
from tests.helpers.databases import make_login, shard
from tests.helpers.engines import ALL_ENDED, define, enroll, refuse, running_engine, until

HOURLY = {"from": "app.overdue", "every": {"amount": 1, "unit": "hours"}}
RUN = "SELECT * FROM sequencer.schedules"
SUBJECTS = "SELECT array_agg(subject ORDER BY subject) FROM sequencer.enrollments"
RUN_NOW = "UPDATE sequencer.scheduled_runs SET next_run_at = now() - interval '1 second'"


@pytest.fixture
async def defined(connection: asyncpg.Connection) -> asyncpg.Connection:
    """A sequence that enrolls overdue invoices every hour, and a view of three of them."""
    await define(
        connection, "dunning", ("a", "WaitForDuration", '{"amount": 3, "unit": "days"}', None)
    )
    await connection.execute(
        "CREATE SCHEMA app; CREATE TABLE app.invoices (subject text, data jsonb);"
        "CREATE VIEW app.overdue AS SELECT subject, data, 'Europe/Berlin' AS timezone"
        " FROM app.invoices;"
        "INSERT INTO app.invoices SELECT 'invoice-' || n, jsonb_build_object('n', n)"
        " FROM generate_series(1, 3) AS n"
    )
    await schedule(connection, HOURLY)
    return connection


async def schedule(
    connection: asyncpg.Connection, enroll: dict[str, Any], name: str = "dunning"
) -> None:
    await connection.execute(
        "UPDATE sequencer.sequences SET enroll = $2 WHERE name = $1", name, json.dumps(enroll)
    )


class Daemon:
    """What enrolls, and what it reports."""

    def __init__(self, pool: asyncpg.Pool, timeout: float) -> None:
        self.problems = Problems()
        self.enrolling = Enrolling(
            pool, self.problems, timeout=timeout, clock=Clock(), log=structlog.get_logger()
        )

    async def turn(self) -> str:
        """Do what is due; return what is reported then."""
        await self.enrolling.run_due()
        await self.enrolling.run_due()
        return "; ".join(problem.message for problem in self.problems.rows())


@asynccontextmanager
async def daemon(url: str, seconds: float = 30.0) -> AsyncIterator[Daemon]:
    pool = await connections.connect_pool(shard(url), 4, least=0)
    try:
        yield Daemon(pool, seconds)
    finally:
        await pool.close()


async def test_rows_of_a_view_are_enrolled_once_per_run(
    defined: asyncpg.Connection, database: str
) -> None:
    await enroll(defined, "dunning", "invoice-2")
    async with daemon(database) as one:
        assert await one.turn() == ""
        row = await defined.fetchrow(RUN)
        assert (row["found"], row["enrolled"], row["problem"]) == (2, 2, None)
        assert row["duration"] < timedelta(minutes=5)
        ahead = row["next_run_at"] - row["last_run_at"]
        assert timedelta(minutes=59) < ahead < timedelta(minutes=65)
        entered = await defined.fetchrow(
            "SELECT data, timezone FROM sequencer.enrollments WHERE subject = 'invoice-3'"
        )
        assert tuple(entered) == ('{"n": 3}', "Europe/Berlin")
        await defined.execute("INSERT INTO app.invoices VALUES ('invoice-4')")
        assert await one.turn() == ""
        assert len(await defined.fetchval(SUBJECTS)) == 3
        await defined.execute(RUN_NOW)
        await one.turn()
        assert await defined.fetchval(SUBJECTS) == [f"invoice-{n}" for n in range(1, 5)]


async def test_a_function_is_called_and_a_cron_expression_waits(
    defined: asyncpg.Connection, database: str
) -> None:
    await defined.execute(
        "CREATE FUNCTION app.due() RETURNS TABLE (subject bigint) LANGUAGE sql AS 'SELECT 42'"
    )
    await schedule(defined, {"from": "app.due", "schedule": "0 9 * * *"})
    async with daemon(database) as one:
        await one.turn()
        assert await defined.fetchval(SUBJECTS) is None
        row = await defined.fetchrow(RUN)
        assert (row["next_run_at"].hour, row["last_run_at"]) == (9, None)
        # runs that were missed are made up for by one
        await defined.execute(
            "UPDATE sequencer.scheduled_runs SET next_run_at = now() - interval '3 days'"
        )
        await one.turn()
        assert await defined.fetchval(SUBJECTS) == ["42"]
        assert (await defined.fetchrow(RUN))["next_run_at"].hour == 9


@pytest.mark.parametrize("times", [{"schedule": "0 9 * * *"}, HOURLY])
async def test_runs_do_not_wait_for_the_time_of_a_clock_that_was_ahead(
    defined: asyncpg.Connection, database: str, times: dict[str, Any]
) -> None:
    await schedule(defined, {"from": "app.overdue", **times})
    async with daemon(database) as one:
        await one.turn()
        await defined.execute(
            "UPDATE sequencer.scheduled_runs SET last_run_at = now() + interval '5 years',"
            " next_run_at = next_run_at + interval '5 years'"
        )
        await one.turn()
        row = await defined.fetchrow("SELECT *, now() FROM sequencer.schedules")
        assert row["next_run_at"] - row["now"] < timedelta(days=1, minutes=1)
        await defined.execute(RUN_NOW)
        await one.turn()
        assert len(await defined.fetchval(SUBJECTS)) == 3
        # a run that a user has postponed is left alone
        await defined.execute(
            "UPDATE sequencer.scheduled_runs SET next_run_at = now() + interval '1 year'"
        )
        await one.turn()
        row = await defined.fetchrow("SELECT *, now() FROM sequencer.schedules")
        assert row["next_run_at"] - row["now"] > timedelta(days=300)


async def test_a_run_with_more_than_at_most_enrolls_no_subject_until_the_limit_is_raised(
    defined: asyncpg.Connection, database: str
) -> None:
    await schedule(defined, {**HOURLY, "at_most": 2})
    async with daemon(database) as one:
        assert "more than at_most = 2 subjects would enter" in await one.turn()
        assert await defined.fetchval(SUBJECTS) is None
        await schedule(defined, {**HOURLY, "at_most": 3})
        assert await one.turn() == ""
        assert len(await defined.fetchval(SUBJECTS)) == 3
        # what is in already does not count
        await defined.execute("INSERT INTO app.invoices VALUES ('invoice-4')")
        await defined.execute(RUN_NOW)
        assert await one.turn() == ""
        assert len(await defined.fetchval(SUBJECTS)) == 4


async def test_rows_that_cannot_be_enrolled_are_reported_and_the_others_are_enrolled(
    defined: asyncpg.Connection, database: str
) -> None:
    await defined.execute(
        "INSERT INTO app.invoices (subject) VALUES (NULL), (NULL), (''), ('invoice-1');"
        "INSERT INTO app.invoices VALUES ('x', '[1]')"
    )
    await refuse(defined, "no invoice 2 here", "NEW.subject = 'invoice-2'")
    async with daemon(database) as one:
        told = await one.turn()
    assert await defined.fetchval(SUBJECTS) == ["invoice-1", "invoice-3"]
    for words in (
        "2 rows with NULL as the subject",
        "1 row with an empty subject",
        "1 row with a subject that another row has",
        "1 row with data that are not a JSON object",
        "subject 'invoice-2': no invoice 2 here",
    ):
        assert words in told
    assert (await defined.fetchrow(RUN))["enrolled"] == 2


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("app.nothing", "function without arguments is named app.nothing"),
        ("app.slow", "did not end within"),
        ("app.failing", "division by zero"),
        ("app.unnamed", "1 row with no column subject"),
        ("app.writing", "it is read in a transaction that cannot write"),
        ("app.secret", "grant SELECT or EXECUTE on app.secret to the daemon's user"),
    ],
)
async def test_a_query_that_fails_is_reported_and_other_sequences_enroll(
    defined: asyncpg.Connection, database: str, source: str, words: str
) -> None:
    login = await make_login(defined, database, "login_daemon", "daemon")
    await defined.execute(
        "CREATE VIEW app.slow AS SELECT pg_sleep(600)::text AS subject;"
        "CREATE VIEW app.failing AS SELECT (1 / 0)::text AS subject;"
        "CREATE VIEW app.unnamed AS SELECT 'x'::text AS id;"
        "CREATE VIEW app.secret AS SELECT 'x'::text AS subject;"
        "CREATE FUNCTION app.writing() RETURNS SETOF text LANGUAGE sql AS"
        " $$ DELETE FROM app.invoices RETURNING subject $$;"
        "GRANT USAGE ON SCHEMA app TO login_daemon;"
        "GRANT SELECT ON app.overdue, app.slow, app.failing, app.unnamed TO login_daemon;"
    )
    await define(defined, "other", ("a", "WaitForDuration", '{"amount": 3, "unit": "days"}', None))
    await schedule(defined, {**HOURLY, "from": source}, "other")
    async with daemon(login, seconds=0.5) as one:
        told = await one.turn()
        assert words in told
        assert "sequence 'other'" in told
    assert len(await defined.fetchval(SUBJECTS)) == 3
    row = await defined.fetchrow(f"{RUN} WHERE sequence = 'other'")
    assert words in row["problem"]
    if source != "app.unnamed":  # it is tried again soon, and later each time
        waits = row["next_run_at"] - row["last_run_at"]
        assert timedelta(seconds=30) < waits < timedelta(minutes=5)


async def test_a_refusal_of_every_subject_is_one_problem(
    defined: asyncpg.Connection, database: str
) -> None:
    await defined.execute(
        "INSERT INTO app.invoices SELECT 'more-' || n FROM generate_series(1, 500) AS n"
    )
    await refuse(defined, "the shop is closed")
    async with daemon(database) as one:
        assert (await one.turn()).endswith("the shop is closed")
        await defined.execute("DROP TRIGGER refuse ON sequencer.enrollments")
        await defined.execute(RUN_NOW)
        assert await one.turn() == ""
    assert len(await defined.fetchval(SUBJECTS)) == 503


async def test_many_refusals_stop_no_run_that_enrolls_others(
    defined: asyncpg.Connection, database: str
) -> None:
    await defined.execute(
        "INSERT INTO app.invoices SELECT 'more-' || n FROM generate_series(1, 50) AS n"
    )
    await refuse(defined, "no more", "NEW.subject LIKE 'more-%'")
    async with daemon(database) as one:
        assert (await one.turn()).endswith("47 more subjects could not be enrolled")
    assert await defined.fetchval(SUBJECTS) == ["invoice-1", "invoice-2", "invoice-3"]


@pytest.mark.parametrize("enroll", [{}, {**HOURLY, "at_most": "many"}, {"from": 3, "every": "x"}])
async def test_nonsense_in_the_table_is_reported(
    defined: asyncpg.Connection, database: str, enroll: dict[str, Any]
) -> None:
    await schedule(defined, enroll)
    async with daemon(database) as one:
        assert "sequence 'dunning': enroll: " in await one.turn()


@pytest.mark.parametrize("status", ["paused", "archived"])
async def test_a_sequence_that_is_not_active_is_left_alone(
    defined: asyncpg.Connection, database: str, status: str
) -> None:
    await defined.execute("UPDATE sequencer.sequences SET status = $1", status)
    async with daemon(database) as one:
        assert await one.turn() == ""
        assert await defined.fetchval(SUBJECTS) is None
        await defined.execute("UPDATE sequencer.sequences SET status = 'active'")
        await one.turn()
    assert len(await defined.fetchval(SUBJECTS)) == 3


async def test_only_one_of_several_daemons_enrolls(
    defined: asyncpg.Connection, database: str
) -> None:
    await defined.execute("UPDATE sequencer.sequences SET reentry = 'always'")
    async with daemon(database) as one, daemon(database) as other, daemon(database) as third:
        for _ in range(3):
            await asyncio.gather(one.turn(), other.turn(), third.turn())
            await defined.execute(RUN_NOW)
    assert len(await defined.fetchval(SUBJECTS)) == 9


async def test_a_run_that_is_done_elsewhere_meanwhile_enrolls_nothing(
    defined: asyncpg.Connection, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For example by a daemon that had the lock until its connection was lost."""
    read = sources.read_source

    async def read_slowly(*arguments: Any) -> Any:
        found = await read(*arguments)
        await defined.execute(
            "UPDATE sequencer.scheduled_runs SET next_run_at = now() + interval '1 hour'"
        )
        return found

    monkeypatch.setattr(sources, "read_source", read_slowly)
    async with daemon(database) as one:
        assert await one.turn() == ""
    assert await defined.fetchval(SUBJECTS) is None


async def test_the_policies_after_and_always_decide_what_a_run_enrolls(
    defined: asyncpg.Connection, database: str
) -> None:
    await defined.execute(
        "UPDATE sequencer.sequences SET reentry = 'after', reentry_after = '90 days'"
    )
    async with daemon(database) as one:
        await one.turn()
        await defined.execute("UPDATE sequencer.enrollments SET status = 'completed'")
        await defined.execute(
            "UPDATE sequencer.enrollments SET ended_at = now() - interval '91 days'"
            " WHERE subject = 'invoice-1'"
        )
        await defined.execute(RUN_NOW)
        await one.turn()
    assert (await defined.fetchrow(RUN))["found"] == 1
    assert await defined.fetchval(SUBJECTS) == ["invoice-1", "invoice-1", "invoice-2", "invoice-3"]


async def test_scheduled_enrollments_start_at_once(
    defined: asyncpg.Connection, database: str
) -> None:
    await defined.execute("UPDATE sequencer.steps SET type = 'GoTo', config = '{}'")
    async with running_engine(database, sweep=3600), daemon(database) as one:
        await one.turn()
        await until(defined, f"{ALL_ENDED} AND EXISTS (SELECT FROM sequencer.enrollments)")


async def test_a_new_schedule_is_noticed_by_a_notification(
    defined: asyncpg.Connection, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(enrolling, "CHECK_INTERVAL", 3600.0)
    await define(defined, "other", ("a", "WaitForDuration", '{"amount": 3, "unit": "days"}', None))
    async with daemon(database) as one:
        keeping = asyncio.create_task(one.enrolling.keep())
        await until(defined, "SELECT count(*) = 3 FROM sequencer.enrollments")
        await schedule(defined, HOURLY, "other")
        one.enrolling.check_soon()
        await until(defined, "SELECT count(*) = 6 FROM sequencer.enrollments")
        keeping.cancel()
        await asyncio.gather(keeping, return_exceptions=True)
