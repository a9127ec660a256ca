"""Addresses that a runner's result names as undeliverable are suppressed with that result."""

from __future__ import annotations

import asyncpg

from sequencerd.core.task import Answer, Failed, Result, Task, Undeliverable
from tests.helpers.engines import ALL_ENDED, Held, Recorder, define, enroll, running_engine, until

GONE = Undeliverable("email", "Ada@X.org", "550 5.1.1 User unknown")
ENTRIES = "SELECT channel, address, topic, reason, source FROM sequencer.suppressions ORDER BY 2"


async def test_suppressions_are_written_with_the_result(
    database: str, connection: asyncpg.Connection
) -> None:
    async def answer(task: Task) -> Result:
        if task.view["subject"] == "fails":
            return Failed("refused", permanent=True, undeliverable=(GONE,))
        bob = GONE._replace(address="bob@x.org")
        return Answer(message="sent", undeliverable=(bob, GONE, bob._replace(address="x" * 1001)))

    async with running_engine(database, {"Work": Recorder(answer)}):
        await define(connection, "s", ("work", "Work", "{}", None))
        await enroll(connection, "s", "fails")
        await until(connection, ALL_ENDED)
        await enroll(connection, "s", "works")
        await until(connection, ALL_ENDED)
    said = "550 5.1.1 User unknown (enrollment {})"
    assert [tuple(row) for row in await connection.fetch(ENTRIES)] == [
        ("email", "ada@x.org", "*", said.format(1), "refused"),  # the first one stays
        ("email", "bob@x.org", "*", said.format(2), "refused"),
    ]
    assert await connection.fetchval(
        "SELECT bool_and(s.xmin = v.xmin) FROM sequencer.suppressions AS s"
        " JOIN sequencer.events AS v ON s.reason LIKE '%enrollment ' || v.enrollment_id || ')'"
        " WHERE v.action IN ('next', 'failed')"
    )


async def test_a_stale_result_suppresses_the_address(
    database: str, connection: asyncpg.Connection
) -> None:
    held = Held(Failed("refused", permanent=True, undeliverable=(GONE,)))
    async with running_engine(database, {"Work": Recorder(held)}):
        await define(connection, "s", ("work", "Work", "{}", None))
        await enroll(connection, "s", "ada")
        await held.begun.wait()
        await connection.execute("UPDATE sequencer.enrollments SET status = 'cancelled'")
        held.released.set()
        await until(
            connection, "SELECT EXISTS (SELECT FROM sequencer.events WHERE action = 'stale_result')"
        )
        assert len(await connection.fetch(ENTRIES)) == 1


async def test_an_entry_that_the_database_refuses_loses_no_result(
    database: str, connection: asyncpg.Connection
) -> None:
    await connection.execute(
        "CREATE FUNCTION no() RETURNS trigger LANGUAGE plpgsql AS"
        " $$BEGIN RAISE check_violation USING MESSAGE = 'not this one'; END$$;"
        "CREATE TRIGGER no BEFORE INSERT ON sequencer.suppressions"
        " FOR EACH ROW EXECUTE FUNCTION no()"
    )

    async def answer(task: Task) -> Result:
        gone = (GONE,) if task.view["subject"] == "gone" else ()
        return Answer(message="sent", undeliverable=gone)

    recorder = Recorder(answer)
    async with running_engine(database, {"Work": recorder}):
        await define(connection, "s", ("work", "Work", "{}", None))
        for subject in ("ada", "gone", "bob"):
            await enroll(connection, "s", subject)
        await until(connection, ALL_ENDED)
    assert len(recorder.keys) == 3
    rows = await connection.fetch("SELECT subject, status, last_error FROM sequencer.enrollments")
    assert {row["subject"]: row["status"] for row in rows} == {
        "ada": "completed",
        "gone": "failed",
        "bob": "completed",
    }
    assert any("its side effect is done" in (row["last_error"] or "") for row in rows)


async def test_the_reason_contains_no_secret(database: str, connection: asyncpg.Connection) -> None:
    async def answer(_: Task) -> Result:
        return Answer(undeliverable=(GONE._replace(reason="550 not with hunter22"),))

    async with running_engine(
        database, {"Work": Recorder(answer)}, redact=lambda text: text.replace("hunter22", "***")
    ):
        await define(connection, "s", ("work", "Work", "{}", None))
        await enroll(connection, "s", "ada")
        await until(connection, ALL_ENDED)
    (entry,) = await connection.fetch(ENTRIES)
    assert entry["reason"].startswith("550 not with *** (enrollment ")
