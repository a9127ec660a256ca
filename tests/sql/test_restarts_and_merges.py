"""Restarts, changed subjects, merges, collected items, and the reentry policy after, all by SQL."""

from __future__ import annotations

import asyncio
import json
from datetime import timedelta
from typing import Any

import asyncpg
import pytest

from tests.helpers.engines import define, enroll, until
from tests.sql.conftest import DAYS

REENTRY_AFTER = "UPDATE sequencer.sequences SET reentry = 'after', reentry_after = $1"
ADD = "SELECT sequencer.collect('s', $1, $2)"
MERGE = "SELECT sequencer.merge('anonymous-7', 'ada')"
TOUCH = "UPDATE sequencer.enrollments SET data = data || '{\"x\": 1}' WHERE id = $1"
IS_WAITING = """
SELECT wait_event IN ('transactionid', 'PgSleep') FROM pg_stat_activity WHERE pid = $1
"""


async def begun(connection: asyncpg.Connection, subject: str) -> int:
    """An enrollment that has waited at its step for a day, as the daemon would write it."""
    id_ = await enroll(connection, "s", subject)
    await connection.execute(
        "UPDATE sequencer.enrollments SET entered_at = now() - interval '1 day',"
        " wake_at = now() + interval '2 days' WHERE id = $1",
        id_,
    )
    return id_


async def events(connection: asyncpg.Connection, id_: int) -> list[str]:
    rows = await connection.fetch(
        "SELECT action, message FROM sequencer.events WHERE enrollment_id = $1 ORDER BY at", id_
    )
    return [f"{row['action']} {row['message']}" for row in rows]


# --- restart


@pytest.mark.parametrize(
    "change", ["step = 'first'", "step = step", 'step = step, data = \'{"plan": "pro"}\'']
)
async def test_setting_the_present_step_restarts_it(
    defined: asyncpg.Connection, change: str
) -> None:
    id_ = await begun(defined, "ada")
    async with defined.transaction():
        await defined.execute("SET LOCAL sequencer.reason = 'the mail was lost'")
        await defined.execute(f"UPDATE sequencer.enrollments SET {change}")
    row = await defined.fetchrow("SELECT *, now() - entered_at AS age FROM sequencer.enrollments")
    assert (row["visit"], row["leased_by"], row["step"]) == (2, None, "first")
    assert row["age"] < timedelta(minutes=5)
    assert row["wake_at"] - row["entered_at"] < timedelta(minutes=5)
    assert await events(defined, id_) == ["moved restarted first by postgres: the mail was lost"]


async def test_a_leased_step_is_restarted_and_its_lease_ends(defined: asyncpg.Connection) -> None:
    await begun(defined, "ada")
    await defined.execute(
        "UPDATE sequencer.enrollments SET leased_by = 'd', leases = 1, attempt = 1"
    )
    await defined.execute("UPDATE sequencer.enrollments SET step = 'first'")
    row = await defined.fetchrow("SELECT * FROM sequencer.enrollments")
    assert (row["visit"], row["leased_by"], row["leases"], row["attempt"]) == (2, None, 0, 0)


async def test_a_failed_enrollment_is_restarted_together_with_its_status(
    defined: asyncpg.Connection,
) -> None:
    await begun(defined, "ada")
    await defined.execute("UPDATE sequencer.enrollments SET status = 'failed'")
    await defined.execute("UPDATE sequencer.enrollments SET step = step")
    assert await defined.fetchval("SELECT visit FROM sequencer.enrollments") == 1
    await defined.execute("UPDATE sequencer.enrollments SET step = step, status = 'active'")
    row = await defined.fetchrow("SELECT * FROM sequencer.enrollments")
    assert (row["visit"], row["status"], row["ended_at"]) == (2, "active", None)


@pytest.mark.parametrize("data", ["data", '\'{"plan": "pro"}\''])
async def test_a_row_that_is_written_as_a_whole_restarts_nothing(
    defined: asyncpg.Connection, data: str
) -> None:
    """As the daemon does, and ORMs that write every column."""
    id_ = await begun(defined, "ada")
    await defined.execute(
        "UPDATE sequencer.enrollments SET sequence = sequence, step = step, status = status,"
        f" wake_at = wake_at, visit = visit, attempt = attempt, data = {data}"
    )
    row = await defined.fetchrow("SELECT * FROM sequencer.enrollments")
    assert (row["visit"], await events(defined, id_)) == (1, [])
    await defined.execute("UPDATE sequencer.enrollments SET step = step")
    assert await defined.fetchval("SELECT visit FROM sequencer.enrollments") == 2


async def test_a_renamed_step_restarts_nothing(defined: asyncpg.Connection) -> None:
    await begun(defined, "ada")
    await defined.execute("UPDATE sequencer.steps SET name = 'one' WHERE name = 'first'")
    await defined.execute("UPDATE sequencer.sequences SET name = 't'")
    row = await defined.fetchrow("SELECT * FROM sequencer.enrollments")
    assert (row["sequence"], row["step"], row["visit"]) == ("t", "one", 1)


async def test_steps_that_enroll_and_cancel_follow_a_renamed_sequence(
    defined: asyncpg.Connection,
) -> None:
    for name, type_ in (("e", "Enroll"), ("c", "Cancel")):
        await define(defined, name, (name, type_, '{"sequence": "s", "subject": "x"}', None))
    await defined.execute("UPDATE sequencer.sequences SET name = 't' WHERE name = 's'")
    configs = await defined.fetch(
        "SELECT config->>'sequence' FROM sequencer.steps WHERE config ? 'sequence'"
    )
    assert [row[0] for row in configs] == ["t", "t"]


# --- the subject


async def test_a_changed_subject_is_recorded_and_wakes_the_enrollment(
    defined: asyncpg.Connection,
) -> None:
    id_ = await begun(defined, "anonymous-7")
    await defined.execute("UPDATE sequencer.enrollments SET subject = 'ada'")
    assert await events(defined, id_) == ["retargeted from anonymous-7 to ada by postgres"]
    assert await defined.fetchval("SELECT wake_at <= now() FROM sequencer.enrollments")
    await defined.execute("UPDATE sequencer.enrollments SET subject = subject")
    assert len(await events(defined, id_)) == 1


async def test_merge_keeps_the_further_enrollment_with_the_data_of_both(
    defined: asyncpg.Connection,
) -> None:
    await define(defined, "t", ("only", "WaitForDuration", DAYS, None))
    further = await begun(defined, "anonymous-7")
    await defined.execute("UPDATE sequencer.enrollments SET step = 'second'")
    other = await begun(defined, "ada")
    alone = await enroll(defined, "t", "anonymous-7")
    for id_, data in ((further, '{"a": 1, "b": 1}'), (other, '{"b": 2, "c": 2}')):
        await defined.execute("UPDATE sequencer.enrollments SET data = $2 WHERE id = $1", id_, data)
    assert await defined.fetchval("SELECT sequencer.merge('anonymous-7', 'ada')") == 2
    rows = await defined.fetch("SELECT * FROM sequencer.enrollments ORDER BY id")
    assert [(r["id"], r["subject"], r["status"]) for r in rows] == [
        (further, "ada", "active"),
        (other, "ada", "cancelled"),
        (alone, "ada", "active"),
    ]
    assert json.loads(rows[0]["data"]) == {"a": 1, "b": 1, "c": 2}
    assert await events(defined, other) == [
        f"cancelled by postgres: merged into enrollment {further}"
    ]
    assert (await events(defined, further))[-1] == "retargeted from anonymous-7 to ada by postgres"
    assert await defined.fetchval("SELECT sequencer.merge('anonymous-7', 'ada')") == 0
    assert await defined.fetchval("SELECT sequencer.merge('ada', 'ada')") == 0


async def test_merge_keeps_the_older_enrollment_after_as_many_visits(
    defined: asyncpg.Connection,
) -> None:
    older, newer = await begun(defined, "ada"), await begun(defined, "anonymous-7")
    await defined.execute("SELECT sequencer.merge('anonymous-7', 'ada')")
    status = dict(map(tuple, await defined.fetch("SELECT id, status FROM sequencer.enrollments")))
    assert status == {older: "active", newer: "cancelled"}


@pytest.mark.parametrize("subject", ["ada", "anonymous-7"])
async def test_merge_with_the_policy_never(defined: asyncpg.Connection, subject: str) -> None:
    """An enrollment that has ended is further than one that has not."""
    await defined.execute("UPDATE sequencer.sequences SET reentry = 'never'")
    ids = {name: await begun(defined, name) for name in ("ada", "anonymous-7")}
    await defined.execute(
        "UPDATE sequencer.enrollments SET status = 'completed' WHERE subject = $1", subject
    )
    assert await defined.fetchval("SELECT sequencer.merge('anonymous-7', 'ada')") == 1
    rows = await defined.fetch("SELECT id, subject, status, entry FROM sequencer.enrollments")
    assert {row["id"]: (row["subject"], row["status"], row["entry"] == 0) for row in rows} == {
        id_: ("ada", "completed" if name == subject else "cancelled", name == subject)
        for name, id_ in ids.items()
    }
    with pytest.raises(asyncpg.UniqueViolationError):
        await enroll(defined, "s", "ada")


@pytest.mark.slow
async def test_merges_and_enrollments_at_the_same_time_lose_nothing(
    defined: asyncpg.Connection, database: str
) -> None:
    others = [await asyncpg.connect(database) for _ in range(4)]

    async def work(number: int, session: asyncpg.Connection) -> None:
        for turn in range(20):
            name = f"anonymous-{turn % 3}"
            await session.execute("SELECT sequencer.collect('s', $1, '1')", name)
            await session.execute("SELECT sequencer.enroll('s', 'ada')")
            pair = (name, "ada") if number % 2 else ("ada", name)
            await session.execute("SELECT sequencer.merge($1, $2)", *pair)

    await asyncio.gather(*(work(n, session) for n, session in enumerate(others)))
    for name in ("anonymous-0", "anonymous-1", "anonymous-2"):
        await defined.execute("SELECT sequencer.merge($1, 'ada')", name)
    rows = await defined.fetch("SELECT * FROM sequencer.enrollments WHERE status = 'active'")
    assert [row["subject"] for row in rows] == ["ada"]
    kept = json.loads(rows[0]["data"])
    assert (len(kept["items"]), kept["collecting"]["count"]) == (80, 80)
    for session in others:
        await session.close()


async def test_a_merge_and_changes_in_another_order_do_not_deadlock(
    defined: asyncpg.Connection, database: str
) -> None:
    """The other session looks for deadlocks at once, and would be the one that fails."""
    await defined.execute("SET deadlock_timeout = '1ms'")
    first, last = await enroll(defined, "s", "anonymous-7"), await enroll(defined, "s", "ada")
    merging = await asyncpg.connect(database)
    async with defined.transaction():
        await defined.execute(TOUCH, last)
        merge = asyncio.create_task(merging.fetchval(MERGE))
        await until(defined, IS_WAITING, merging.get_server_pid())
        await defined.execute(TOUCH, first)
    assert await merge == 1
    assert await merging.fetchval("SHOW lock_timeout") == "0"
    await merging.close()


async def test_a_merge_gives_way_to_a_transaction_that_is_enrolling(
    defined: asyncpg.Connection, database: str
) -> None:
    """It waits for an enrollment with others locked, but not for as long as the other session waits
    before it looks for deadlocks.
    """
    await defined.execute("SET deadlock_timeout = '30ms'")
    first = await enroll(defined, "s", "anonymous-7")
    merging = await asyncpg.connect(database)
    async with defined.transaction():
        await enroll(defined, "s", "ada")
        merge = asyncio.create_task(merging.fetchval(MERGE))
        await until(defined, IS_WAITING, merging.get_server_pid())
        for _ in range(20):
            savepoint = defined.transaction()
            await savepoint.start()
            await defined.execute(TOUCH, first)
            await savepoint.rollback()
    assert await merge == 1
    await merging.close()


@pytest.mark.parametrize("isolation", ["repeatable_read", "serializable"])
async def test_a_merge_reports_an_enrollment_that_its_transaction_cannot_see(
    defined: asyncpg.Connection, database: str, isolation: Any
) -> None:
    await enroll(defined, "s", "anonymous-7")
    merging = await asyncpg.connect(database, server_settings={"statement_timeout": "30s"})
    async with merging.transaction(isolation=isolation):
        assert await merging.fetchval("SELECT count(*) FROM sequencer.enrollments") == 1
        await enroll(defined, "s", "ada")
        with pytest.raises(asyncpg.SerializationError, match="'ada': it was enrolled after"):
            async with merging.transaction():
                await merging.execute(MERGE)
    assert await merging.fetchval(MERGE) == 1
    await merging.close()


async def test_a_merge_that_another_index_forbids_fails_at_once(
    defined: asyncpg.Connection,
) -> None:
    for subject in ("anonymous-7", "ada"):
        await enroll(defined, "s", subject)
    await defined.execute("CREATE UNIQUE INDEX mine ON sequencer.enrollments (subject, sequence)")
    await defined.execute("SET statement_timeout = '30s'")
    with pytest.raises(asyncpg.UniqueViolationError, match="mine"):
        await defined.execute(MERGE)


# --- collect


async def test_collect_enrolls_or_adds(defined: asyncpg.Connection) -> None:
    id_ = await defined.fetchval(ADD, "ada", '{"comment": 7}')
    assert await defined.fetchval(ADD, "ada", '"two"') == id_
    data = json.loads(await defined.fetchval("SELECT data FROM sequencer.enrollments"))
    assert data["items"] == [{"comment": 7}, "two"]
    assert data["collecting"]["count"] == 2
    assert data["collecting"]["since"] < data["collecting"]["last"]
    await defined.execute("UPDATE sequencer.enrollments SET status = 'completed'")
    assert await defined.fetchval(ADD, "ada", "3") != id_
    await defined.execute(
        "UPDATE sequencer.enrollments SET data = '{\"items\": {}}' WHERE status = 'active'"
    )
    with pytest.raises(asyncpg.DatatypeMismatchError, match="not a list"):
        await defined.fetchval(ADD, "ada", "4")
    with pytest.raises(asyncpg.ForeignKeyViolationError, match="does not exist"):
        await defined.fetchval("SELECT sequencer.collect('t', 'ada', '1')")


async def test_collect_follows_the_reentry_policy(defined: asyncpg.Connection) -> None:
    await defined.execute("UPDATE sequencer.sequences SET reentry = 'never'")
    await defined.fetchval(ADD, "ada", "1")
    await defined.execute("UPDATE sequencer.enrollments SET status = 'completed'")
    assert await defined.fetchval(ADD, "ada", "2") is None
    await defined.execute("UPDATE sequencer.sequences SET status = 'archived'")
    with pytest.raises(asyncpg.CheckViolationError, match="archived"):
        await defined.fetchval(ADD, "bob", "2")


async def test_collect_keeps_items_up_to_the_limit_and_counts_the_rest(
    defined: asyncpg.Connection,
) -> None:
    await defined.execute(
        "INSERT INTO sequencer.steps (sequence, name, type, config)"
        " VALUES ('s', 'c', 'Collect', '{\"at_most\": 3}')"
    )
    for number in range(5):
        await defined.fetchval(ADD, "ada", str(number))
    data = json.loads(await defined.fetchval("SELECT data FROM sequencer.enrollments"))
    assert (data["items"], data["collecting"]["count"]) == ([0, 1, 2], 5)


@pytest.mark.parametrize("policy", ["after_end", "always"])
@pytest.mark.slow
async def test_items_of_many_connections_are_all_kept(
    defined: asyncpg.Connection, database: str, policy: str
) -> None:
    """Also while the enrollment ends again and again, which begins the next one."""
    await defined.execute("UPDATE sequencer.sequences SET reentry = $1", policy)
    sessions = [await asyncpg.connect(database) for _ in range(8)]

    async def add(number: int, session: asyncpg.Connection) -> None:
        for turn in range(25):
            assert await session.fetchval(ADD, "ada", json.dumps([number, turn]))

    async def end() -> None:
        for _ in range(20):
            await defined.execute(
                "UPDATE sequencer.enrollments SET status = 'completed' WHERE status = 'active'"
            )

    await asyncio.gather(*(add(n, session) for n, session in enumerate(sessions)), end())
    rows = await defined.fetch("SELECT data, status FROM sequencer.enrollments")
    kept = [tuple(item) for row in rows for item in json.loads(row["data"])["items"]]
    assert sorted(kept) == [(n, turn) for n in range(8) for turn in range(25)]
    assert sum(row["status"] == "active" for row in rows) <= 1
    for session in sessions:
        await session.close()


# --- reentry after


async def test_reentry_after_a_time(defined: asyncpg.Connection) -> None:
    await defined.execute(REENTRY_AFTER, timedelta(days=90))
    first = await enroll(defined, "s", "ada")
    with pytest.raises(asyncpg.UniqueViolationError):
        await enroll(defined, "s", "ada")
    await defined.execute("UPDATE sequencer.enrollments SET status = 'completed'")
    assert await defined.fetchval("SELECT sequencer.enroll('s', 'ada')") is None
    ended = "UPDATE sequencer.enrollments SET ended_at = now() - $1::interval WHERE id = $2"
    await defined.execute(ended, timedelta(days=89), first)
    assert await defined.fetchval("SELECT sequencer.enroll('s', 'ada')") is None
    await defined.execute(ended, timedelta(days=90, seconds=1), first)
    second = await enroll(defined, "s", "ada")
    assert await defined.fetchval("SELECT sequencer.enroll('s', 'ada')") is None
    await defined.execute(
        "UPDATE sequencer.enrollments SET status = 'cancelled' WHERE id = $1", second
    )
    assert await defined.fetchval(ADD, "ada", "1") is None
    # the one that was done with is taken up again: it prevents others once more
    with pytest.raises(asyncpg.UniqueViolationError):
        await defined.execute(
            "UPDATE sequencer.enrollments SET status = 'active' WHERE id = $1", first
        )
    await defined.execute(ended, timedelta(days=91), second)
    assert await defined.fetchval(ADD, "ada", "1") is not None


async def test_reentry_after_a_time_counts_an_end_that_is_not_committed(
    defined: asyncpg.Connection, database: str
) -> None:
    await defined.execute(REENTRY_AFTER, timedelta(days=90))
    await enroll(defined, "s", "ada")
    other = await asyncpg.connect(database)
    async with defined.transaction():
        await defined.execute("UPDATE sequencer.enrollments SET status = 'completed'")
        waiting = asyncio.ensure_future(other.fetchval("SELECT sequencer.enroll('s', 'ada')"))
        await asyncio.wait([waiting], timeout=0.2)
    assert await waiting is None
    await other.close()


async def test_concurrent_entries_after_the_reentry_time_enroll_once(
    defined: asyncpg.Connection, database: str
) -> None:
    await defined.execute(REENTRY_AFTER, timedelta(days=90))
    await enroll(defined, "s", "ada")
    await defined.execute("UPDATE sequencer.enrollments SET status = 'completed'")
    await defined.execute("UPDATE sequencer.enrollments SET ended_at = now() - interval '91 days'")
    sessions = [await asyncpg.connect(database) for _ in range(6)]
    entered = await asyncio.gather(
        *(session.fetchval("SELECT sequencer.enroll('s', 'ada')") for session in sessions)
    )
    assert sum(id_ is not None for id_ in entered) == 1
    for session in sessions:
        await session.close()


async def test_the_policy_after_can_be_set_and_removed(defined: asyncpg.Connection) -> None:
    for _ in range(3):
        await enroll(defined, "s", "ada")
        await defined.execute(
            "UPDATE sequencer.enrollments SET status = 'completed' WHERE status = 'active'"
        )
    await defined.execute(
        "UPDATE sequencer.sequences SET reentry = 'after', reentry_after = '36 hours'"
    )
    entries = await defined.fetch("SELECT entry = 0 FROM sequencer.enrollments ORDER BY id")
    assert [row[0] for row in entries] == [False, False, True]
    document = json.loads(await defined.fetchval("SELECT sequencer.document('s')"))
    assert document["reentry"] == {"after": {"amount": 36, "unit": "hours"}}
    await defined.execute(
        "UPDATE sequencer.sequences SET reentry = 'after_end', reentry_after = NULL"
    )
    assert await enroll(defined, "s", "ada")


@pytest.mark.parametrize(
    "change",
    [
        "reentry = 'after'",
        "reentry_after = '90 days'",
        "reentry = 'after', reentry_after = '0'",
        "reentry = 'after', reentry_after = '-1 day'",
        "reentry = 'after', reentry_after = '1 month 3 days'",
    ],
)
async def test_the_policy_after_needs_a_time_of_one_unit(
    defined: asyncpg.Connection, change: str
) -> None:
    with pytest.raises(asyncpg.CheckViolationError):
        await defined.execute(f"UPDATE sequencer.sequences SET {change}")


async def test_retention_keeps_enrollments_that_reentry_needs(
    defined: asyncpg.Connection,
) -> None:
    await defined.execute(REENTRY_AFTER, timedelta(days=90))
    for subject, days in (("ada", 80), ("bob", 100)):
        id_ = await enroll(defined, "s", subject)
        await defined.execute(
            "UPDATE sequencer.enrollments SET status = 'completed' WHERE id = $1", id_
        )
        await defined.execute(
            "UPDATE sequencer.enrollments SET ended_at = now() - make_interval(days => $2)"
            " WHERE id = $1",
            id_,
            days,
        )
    assert (
        await defined.fetchval(
            "SELECT deleted FROM sequencer.delete_ended(now() - interval '30 days', 10)"
        )
        == 1
    )
    assert await defined.fetchval("SELECT subject FROM sequencer.enrollments") == "ada"
