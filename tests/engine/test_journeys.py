"""Enroll, Cancel and Collect steps in a running engine, with what others do at the same time."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence

import asyncpg
import pytest

from tests.helpers.databases import make_login
from tests.helpers.engines import Held, Recorder, define, enroll, refuse, running_engine, until, way
from tests.helpers.waiting import PATIENCE

NO_BAD_ONE = (
    "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
    " RAISE check_violation USING MESSAGE = 'no bad one'; END $$;"
    "CREATE TRIGGER refuse BEFORE INSERT ON sequencer.enrollments FOR EACH ROW"
    " WHEN (NEW.subject LIKE 'bad%' AND NEW.sequence = 'b') EXECUTE FUNCTION refuse()"
)
DAYS = ("wait", "WaitForDuration", '{"amount": 3, "unit": "days"}', None)
STATUS = "SELECT subject, sequence, status FROM sequencer.enrollments ORDER BY id"
ENDED = (
    "SELECT NOT EXISTS (SELECT FROM sequencer.enrollments"
    " WHERE sequence = 'a' AND status = 'active')"
)


async def rows(connection: asyncpg.Connection) -> list[tuple[str, ...]]:
    return [tuple(row) for row in await connection.fetch(STATUS)]


async def message(connection: asyncpg.Connection, id_: int, action: str) -> str:
    query = "SELECT message FROM sequencer.events WHERE enrollment_id = $1 AND action = $2"
    found: str = await connection.fetchval(query, id_, action)
    return found


async def test_a_step_enrolls_and_cancels_others(
    connection: asyncpg.Connection, database: str
) -> None:
    """With the rights of the daemon's role alone."""
    login = await make_login(connection, database, "login_daemon", "daemon")
    await define(connection, "b", ("note", "Note", "{}", "wait"), DAYS)
    await define(connection, "c", DAYS)
    await define(
        connection,
        "a",
        ("go", "Enroll", '{"sequence": "b", "data": {"plan": "{{data.plan}}"}}', "other"),
        ("other", "Enroll", '{"sequence": "b", "subject": "account-{{data.n}}"}', "stop"),
        ("stop", "Cancel", '{"sequence": "c"}', None),
    )
    stopped = await enroll(connection, "c", "ada")
    runner = Recorder()
    async with running_engine(login, {"Note": runner}):
        id_ = await enroll(connection, "a", "ada", '{"plan": "pro", "n": 7}')
        await until(
            connection,
            "SELECT count(*) = 2 FROM sequencer.enrollments"
            " WHERE sequence = 'b' AND step = 'wait' AND leased_by IS NULL",
        )
        await until(connection, ENDED)
    assert await rows(connection) == [
        ("ada", "c", "cancelled"),
        ("ada", "a", "completed"),
        ("ada", "b", "active"),
        ("account-7", "b", "active"),
    ]
    assert await way(connection, id_) == [
        "go enrolled",
        "go next",
        "other next",
        "stop next",
        "stop completed",
    ]
    told = f"by step stop of a, enrollment {id_}"
    assert await message(connection, stopped, "cancelled") == told
    assert [view["data"] for view in runner.views] == [{"plan": "pro"}, {}]


async def test_enrollments_that_share_an_outcome_each_enroll_another_subject(
    connection: asyncpg.Connection, database: str
) -> None:
    await define(connection, "b", DAYS)
    await define(connection, "a", ("go", "Enroll", '{"sequence": "b"}', None))
    await connection.execute(
        "INSERT INTO sequencer.enrollments (sequence, subject)"
        " SELECT 'a', 'x' || n FROM generate_series(1, 300) AS n"
    )
    async with running_engine(database):
        await until(connection, ENDED)
    counts = (
        "SELECT count(*), count(DISTINCT subject) FROM sequencer.enrollments WHERE sequence = $1"
    )
    assert tuple(await connection.fetchrow(counts, "b")) == (300, 300)


@pytest.mark.parametrize(
    ("spoil", "failure", "words"),
    [
        (
            "UPDATE sequencer.sequences SET status = 'archived' WHERE name = 'b'",
            "archived",
            "archi",
        ),
        ("DELETE FROM sequencer.sequences WHERE name = 'b'", "invalid_step", "does not exist"),
        (
            NO_BAD_ONE,
            "error",
            "no bad one",
        ),
    ],
)
async def test_an_invalid_enroll_step_fails_its_own_enrollment(
    connection: asyncpg.Connection, database: str, spoil: str, failure: str, words: str
) -> None:
    await define(connection, "b", DAYS)
    await define(connection, "a", ("go", "Enroll", '{"sequence": "b"}', None))
    await connection.execute(spoil)
    await connection.execute(
        "INSERT INTO sequencer.enrollments (sequence, subject)"
        " SELECT 'a', CASE WHEN n % 10 = 0 THEN 'bad' ELSE 'x' END || n"
        "   FROM generate_series(1, 40) AS n"
    )
    async with running_engine(database):
        await until(connection, ENDED)
    failed = await connection.fetch(
        "SELECT subject, failure, last_error FROM sequencer.enrollments WHERE status = 'failed'"
    )
    assert {row["failure"] for row in failed} == {failure}
    assert all(words in row["last_error"] for row in failed)
    assert len(failed) == (4 if failure == "error" else 40)
    entered = "SELECT count(*) FROM sequencer.enrollments WHERE sequence = 'b'"
    assert await connection.fetchval(entered) == 40 - len(failed)


async def test_a_trigger_that_refuses_sets_one_enrollment_aside(
    connection: asyncpg.Connection, database: str
) -> None:
    await define(connection, "b", DAYS)
    await define(connection, "a", ("go", "Enroll", '{"sequence": "b"}', None))
    await refuse(connection, "not now", "NEW.subject = 'bad' AND NEW.sequence = 'b'")
    async with running_engine(database) as engine:
        for subject in ("x", "bad", "y"):
            await enroll(connection, "a", subject)
        done = "SELECT count(*) = 2 FROM sequencer.enrollments WHERE sequence = 'b'"
        await until(connection, done)
        async with asyncio.timeout(PATIENCE):
            while "not now" not in str(engine.problems.rows()):
                await engine.problems.changed.wait()
                engine.problems.changed.clear()
        await connection.execute("DROP TRIGGER refuse ON sequencer.enrollments")
        await until(connection, ENDED)
    assert await connection.fetchval(
        "SELECT count(*) = 3 FROM sequencer.enrollments WHERE sequence = 'b'"
    )


async def test_a_subject_in_the_sequence_already_continues_or_takes_altnext(
    connection: asyncpg.Connection, database: str
) -> None:
    await define(connection, "b", DAYS)
    await define(connection, "a", ("go", "Enroll", '{"sequence": "b"}', None), DAYS)
    async with running_engine(database):
        first = await enroll(connection, "a", "ada")
        await until(connection, ENDED)
        again = await enroll(connection, "a", "ada")
        await until(connection, ENDED)
        await connection.execute(
            "UPDATE sequencer.steps SET alt_next_step = 'wait' WHERE name = 'go'"
        )
        other = await enroll(connection, "a", "ada")
        await until(
            connection, "SELECT step = 'wait' FROM sequencer.enrollments WHERE id = $1", other
        )
    assert await message(connection, first, "next") == "enrolled 'ada' in b"
    assert "reentry policy refuses" in await message(connection, again, "next")
    assert "reentry policy refuses" in await message(connection, other, "altNext")
    assert (await rows(connection)).count(("ada", "b", "active")) == 1


async def test_concurrent_enroll_steps_enroll_a_subject_once(
    connection: asyncpg.Connection, database: str
) -> None:
    """In a batch, and against other sessions."""
    await define(connection, "b", DAYS)
    await define(connection, "a", ("go", "Enroll", '{"sequence": "b", "subject": "shop"}', None))
    await connection.execute(
        "INSERT INTO sequencer.enrollments (sequence, subject)"
        " SELECT 'a', 'x' || n FROM generate_series(1, 50) AS n"
    )
    async with running_engine(database), running_engine(database):
        await until(connection, ENDED)
    assert await connection.fetchval(
        "SELECT count(*) FILTER (WHERE sequence = 'b') = 1 AND bool_and(status <> 'failed')"
        "  FROM sequencer.enrollments"
    )


@pytest.mark.parametrize(
    ("type_", "config"),
    [("Enroll", '{"sequence": "b"}'), ("GoTo", '{"sequence": "b", "step": "wait"}')],
)
async def test_an_open_transaction_that_enrolls_a_subject_delays_that_one_alone(
    connection: asyncpg.Connection, database: str, type_: str, config: str
) -> None:
    """And whatever it writes next, no deadlock ends it."""
    await define(connection, "b", DAYS)
    await define(connection, "a", ("go", type_, config, None))
    other = await asyncpg.connect(database)
    async with running_engine(database):
        async with other.transaction():
            await enroll(other, "b", "x")
            await connection.execute(
                "INSERT INTO sequencer.enrollments (sequence, subject)"
                " VALUES ('a', 'x'), ('a', 'y')"
            )
            entered = "SELECT count(*) = 1 FROM sequencer.enrollments WHERE sequence = 'b'"
            await until(connection, entered)
            await other.execute("UPDATE sequencer.enrollments SET data = '{}' WHERE subject = 'x'")
        await until(connection, ENDED)
    await other.close()
    assert ("x", "b", "active") in await rows(connection)


async def test_sequences_that_enroll_in_each_other_are_stopped(
    connection: asyncpg.Connection, database: str
) -> None:
    for name, other in (("a", "b"), ("b", "a")):
        await define(connection, name, ("go", "Enroll", json.dumps({"sequence": other}), None))
    async with running_engine(database):
        await enroll(connection, "a", "ada")
        await until(
            connection,
            "SELECT count(*) FILTER (WHERE failure = 'loop') = 1"
            " AND count(*) FILTER (WHERE status = 'active') = 0 FROM sequencer.enrollments",
        )
    assert len(await rows(connection)) == 3


async def test_a_cancelled_side_effect_in_flight_moves_nothing_and_locks_are_waited_for(
    connection: asyncpg.Connection, database: str
) -> None:
    await define(connection, "b", ("note", "Note", "{}", "wait"), DAYS)
    await define(connection, "a", ("stop", "Cancel", '{"sequence": "b"}', None))
    held = Held()
    other = await asyncpg.connect(database)
    async with running_engine(database, {"Note": Recorder(held)}):
        target = await enroll(connection, "b", "ada")
        await held.begun.wait()
        async with other.transaction():
            await other.execute(
                "SELECT FROM sequencer.enrollments WHERE id = $1 FOR UPDATE", target
            )
            id_ = await enroll(connection, "a", "ada")
            await enroll(connection, "a", "bob")  # whose turn does not depend on that lock
            await until(
                connection,
                "SELECT count(*) = 1 FROM sequencer.enrollments"
                " WHERE sequence = 'a' AND status = 'completed'",
            )
        await until(connection, ENDED)
        held.released.set()
        await until(
            connection,
            "SELECT EXISTS (SELECT FROM sequencer.events"
            " WHERE enrollment_id = $1 AND message LIKE '%too late%')",
            target,
        )
    assert await rows(connection) == [
        ("ada", "b", "cancelled"),
        ("ada", "a", "completed"),
        ("bob", "a", "completed"),
    ]
    assert str(id_) in await message(connection, target, "cancelled")
    await other.close()


# --- items


async def collected(
    connection: asyncpg.Connection, url: str, rounds: Sequence[int], config: str
) -> list[list[int]]:
    """Collect items from several connections, while digests go out; the batches that were sent."""
    await define(
        connection, "digest", ("collect", "Collect", config, "mail"), ("mail", "Note", "{}", None)
    )
    sessions = [await asyncpg.connect(url) for _ in range(4)]
    runner = Recorder()

    async def add(session: asyncpg.Connection, number: int) -> None:
        for item in rounds:
            await session.execute(
                "SELECT sequencer.collect('digest', 'ada', $1)", str(number * 1000 + item)
            )
            await asyncio.sleep(0)

    async with running_engine(url, {"Note": runner}):
        await asyncio.gather(*(add(session, n) for n, session in enumerate(sessions)))
        await until(
            connection,
            "SELECT NOT EXISTS (SELECT FROM sequencer.enrollments WHERE status = 'active')",
        )
    for session in sessions:
        await session.close()
    return [view["data"]["batch"] for view in runner.views]


@pytest.mark.slow
async def test_every_item_is_in_one_batch(connection: asyncpg.Connection, database: str) -> None:
    batches = await collected(
        connection,
        database,
        range(40),
        '{"quiet": {"milliseconds": 5}, "most": {"milliseconds": 20}}',
    )
    found = sorted(item for batch in batches for item in batch)
    assert found == sorted(number * 1000 + item for number in range(4) for item in range(40))
    assert await connection.fetchval(
        "SELECT bool_and(status = 'completed' AND data->'items' = '[]') FROM sequencer.enrollments"
    )


async def test_items_that_arrive_during_the_send_are_sent_next(
    connection: asyncpg.Connection, database: str
) -> None:
    await define(
        connection,
        "digest",
        ("collect", "Collect", '{"quiet": {"milliseconds": 1}}', "mail"),
        ("mail", "Note", "{}", None),
    )
    held = Held()
    runner = Recorder(held)
    add = "SELECT sequencer.collect('digest', 'ada', $1)"
    async with running_engine(database, {"Note": runner}):
        id_ = await connection.fetchval(add, '"first"')
        await held.begun.wait()
        assert await connection.fetchval(add, '"second"') == id_
        held.released.set()
        await until(connection, "SELECT bool_and(status = 'completed') FROM sequencer.enrollments")
    assert [view["data"]["batch"] for view in runner.views] == [["first"], ["second"]]


async def test_a_changed_limit_or_time_applies_to_waiting_collections(
    connection: asyncpg.Connection, database: str
) -> None:
    await define(
        connection,
        "digest",
        ("collect", "Collect", '{"quiet": {"days": 1}, "at_most": 2}', "mail"),
        ("mail", "Note", "{}", None),
    )
    runner = Recorder()
    async with running_engine(database, {"Note": runner}):
        for item in range(3):
            await connection.execute("SELECT sequencer.collect('digest', 'ada', $1)", str(item))
        await until(connection, "SELECT wake_at > now() FROM sequencer.enrollments")
        await connection.execute(
            'UPDATE sequencer.steps SET config = \'{"quiet": {"milliseconds": 1}}\''
            " WHERE name = 'collect'"
        )
        await until(connection, "SELECT bool_and(status = 'completed') FROM sequencer.enrollments")
    [view] = runner.views
    assert view["data"]["batch"] == [0, 1]
    assert (view["data"]["collected"]["count"], view["data"]["collected"]["omitted"]) == (3, 1)
