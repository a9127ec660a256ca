"""Many steps that become due at once are claimed in common transactions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import asyncpg
import pytest

from sequencerd.engine import loop
from sequencerd.storage import locking
from sequencerd.storage.locking import DueEnrollments
from tests.helpers.engines import ALL_ENDED, LOCK_IS_HELD, Recorder, running_engine, until

pytestmark = pytest.mark.usefixtures("no_polls")

STEPS = 100
NO_OP = '{"amount": 0, "unit": "ms"}'


async def define_many(connection: asyncpg.Connection, type_: str = "Note") -> None:
    """As many sequences as STEPS, named s1, s2, ..., each with one step."""
    async with connection.transaction():
        await connection.execute(
            "INSERT INTO sequencer.sequences (name, first_step)"
            " SELECT 's' || n, 'a' FROM generate_series(1, $1) AS n",
            STEPS,
        )
        await connection.execute(
            "INSERT INTO sequencer.steps (sequence, name, type, config)"
            " SELECT 's' || n, 'a', $2, '{}' FROM generate_series(1, $1) AS n",
            STEPS,
            type_,
        )


async def enroll_in_each(
    connection: asyncpg.Connection, count: int = 1, late: str = "0 seconds"
) -> None:
    """So many subjects in each sequence, due since some time."""
    await connection.execute(
        "INSERT INTO sequencer.enrollments (sequence, subject, wake_at)"
        " SELECT 's' || n, 'u' || m, now() - $3::text::interval"
        " FROM generate_series(1, $1) AS n, generate_series(1, $2) AS m",
        STEPS,
        count,
        late,
    )


@pytest.fixture
def claims(monkeypatch: pytest.MonkeyPatch) -> list[Sequence[DueEnrollments]]:
    """What each transaction that locks due enrollments wants to claim."""
    wanted: list[Sequence[DueEnrollments]] = []
    claim = locking.claim

    async def noted(connection: asyncpg.Connection, dues: Sequence[DueEnrollments]) -> Any:
        wanted.append(dues)
        return await claim(connection, dues)

    monkeypatch.setattr(locking, "claim", noted)
    return wanted


def each_once(recorder: Recorder, count: int) -> bool:
    return len(recorder.keys) == len({*recorder.keys}) == count


@pytest.mark.parametrize("late", ["0 seconds", "1 hour"])
async def test_steps_that_are_due_at_once_share_transactions(
    database: str,
    connection: asyncpg.Connection,
    claims: list[Sequence[DueEnrollments]],
    late: str,
) -> None:
    await define_many(connection)
    await enroll_in_each(connection, 3, late)
    recorder = Recorder(concurrency=100)
    async with running_engine(database, {"Note": recorder}, sweep=3600):
        await until(connection, ALL_ENDED)
    assert each_once(recorder, 3 * STEPS)
    together = [len(dues) for dues in claims if len(dues) > 1]
    assert sum(together) >= STEPS / 2
    assert len(claims) - len(together) <= 3 * loop.MAX_ALONE
    rows = await connection.fetch("SELECT sequence, sum(times) FROM sequencer.lateness GROUP BY 1")
    late_at = dict(rows)
    assert late_at == ({} if late == "0 seconds" else {f"s{n}": 3 for n in range(1, STEPS + 1)})


async def test_a_step_with_more_due_than_its_part_continues_alone(
    database: str, connection: asyncpg.Connection, claims: list[Sequence[DueEnrollments]]
) -> None:
    await define_many(connection)
    await enroll_in_each(connection)
    await connection.execute(
        "INSERT INTO sequencer.enrollments (sequence, subject, wake_at)"
        " SELECT 's90', 'more' || n, now() FROM generate_series(1, 500) AS n"
    )
    recorder = Recorder(concurrency=100)
    async with running_engine(database, {"Note": recorder}, batch=100, sweep=3600):
        await until(connection, ALL_ENDED)
    assert each_once(recorder, STEPS + 500)
    assert all(sum(due.limit for due in dues) <= 100 for dues in claims)


async def test_few_slots_are_shared_and_none_is_left_unused(
    database: str, connection: asyncpg.Connection
) -> None:
    """No step waits for a slot that nothing will free."""
    await define_many(connection)
    await enroll_in_each(connection, 2)
    recorder = Recorder(concurrency=2, batch_size=1)
    async with running_engine(database, {"Note": recorder}, sweep=3600):
        await until(connection, ALL_ENDED)
    assert each_once(recorder, 2 * STEPS)


async def test_the_fault_of_one_enrollment_concerns_no_other_step(
    database: str, connection: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "ERROR_PAUSE", 3600.0)  # nothing waits for a repetition
    await define_many(connection)
    await connection.execute(
        "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
        " RAISE 'refused' USING ERRCODE = 'check_violation'; END $$;"
        "CREATE TRIGGER refuse BEFORE UPDATE ON sequencer.enrollments FOR EACH ROW"
        " WHEN (new.sequence = 's90' AND new.status <> 'failed') EXECUTE FUNCTION refuse()"
    )
    recorder = Recorder(concurrency=100)
    async with running_engine(database, {"Note": recorder}, sweep=3600):
        await until(connection, LOCK_IS_HELD)  # before, only a poll finds what is inserted
        await enroll_in_each(connection, late="-2 seconds")
        await until(connection, ALL_ENDED)
    rows = await connection.fetch("SELECT sequence, status, last_error FROM sequencer.enrollments")
    assert Counter(row["status"] for row in rows) == {"completed": STEPS - 1, "failed": 1}
    (failed,) = (row for row in rows if row["status"] == "failed")
    assert (failed["sequence"], "refused" in failed["last_error"]) == ("s90", True)
    assert each_once(recorder, STEPS - 1)


async def test_paused_and_unknown_steps_are_left_out(
    database: str, connection: asyncpg.Connection
) -> None:
    await define_many(connection)
    await connection.execute("UPDATE sequencer.sequences SET status = 'paused' WHERE name = 's95'")
    await connection.execute("UPDATE sequencer.steps SET type = 'Unknown' WHERE sequence = 's80'")
    await enroll_in_each(connection)
    recorder = Recorder(concurrency=100)
    async with running_engine(database, {"Note": recorder}, sweep=3600):
        await until(
            connection,
            "SELECT array_agg(sequence) = '{s95}' FROM sequencer.enrollments"
            " WHERE status = 'active'",
        )
        await connection.execute(
            "UPDATE sequencer.sequences SET status = 'active' WHERE name = 's95'"
        )
        await until(connection, ALL_ENDED)
    failed = "SELECT sequence, failure FROM sequencer.enrollments WHERE status = 'failed'"
    assert [tuple(row) for row in await connection.fetch(failed)] == [("s80", "invalid_step")]
    assert each_once(recorder, STEPS - 1)


async def test_rows_that_are_locked_among_others_follow(
    database: str, connection: asyncpg.Connection
) -> None:
    await define_many(connection)
    await enroll_in_each(connection)
    other = await asyncpg.connect(database)
    recorder = Recorder(concurrency=100)
    rest = "SELECT count(*) = 1 FROM sequencer.enrollments WHERE status = 'active'"
    begun = other.transaction()
    await begun.start()
    await other.execute("SELECT FROM sequencer.enrollments WHERE sequence = 's50' FOR UPDATE")
    async with running_engine(database, {"Note": recorder}, sweep=3600):
        await until(connection, rest)
        await begun.rollback()
        await until(connection, ALL_ENDED)
    await other.close()
    assert each_once(recorder, STEPS)


async def test_a_later_wake_time_among_many_is_known(
    database: str, connection: asyncpg.Connection
) -> None:
    """What a claim leaves at each of its steps is scheduled without a sweep."""
    await define_many(connection)
    await enroll_in_each(connection)
    await connection.execute(
        "INSERT INTO sequencer.enrollments (sequence, subject, wake_at)"
        " SELECT 's' || n, 'later', now() + interval '2 seconds'"
        " FROM generate_series(1, $1) AS n",
        STEPS,
    )
    recorder = Recorder(concurrency=100)
    async with running_engine(database, {"Note": recorder}, sweep=3600):
        await until(connection, ALL_ENDED)
        early = await connection.fetchval(
            "SELECT count(*) FROM sequencer.events AS v JOIN sequencer.enrollments AS e"
            " ON e.id = v.enrollment_id WHERE e.subject = 'later' AND v.at < e.created_at"
            " + interval '1.9 seconds'"
        )
    assert early == 0
    assert each_once(recorder, 2 * STEPS)
