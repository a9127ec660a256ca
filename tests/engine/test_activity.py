"""The history by hour: everything counts once, also what is late, dropped, or counted twice."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta

import asyncpg
import pytest
import structlog

from sequencerd.engine import retention
from sequencerd.engine.retention import tidy
from sequencerd.service.metrics import Metrics
from sequencerd.settings import RetentionSettings
from sequencerd.storage import activity, connections
from tests.engine.test_retention import make_past, partitions
from tests.helpers.engines import ALL_ENDED, Recorder, define, running_engine, until

LOG = structlog.get_logger()
HOUR = timedelta(hours=1)


def hours_ago(number: int) -> datetime:
    """The middle of an hour in the past."""
    return datetime.now(UTC).replace(minute=30, second=0, microsecond=0) - number * HOUR


async def happened(
    connection: asyncpg.Connection, at: datetime, action: str = "next", message: str | None = None
) -> None:
    await connection.execute(
        "INSERT INTO sequencer.events (enrollment_id, at, sequence, step, visit, action, message)"
        " VALUES (1, $1, 's', 'first', 1, $2, $3)",
        at,
        action,
        message,
    )


async def counts(connection: asyncpg.Connection) -> dict[tuple[datetime, str], int]:
    rows = await connection.fetch("SELECT * FROM sequencer.activity WHERE sequence = 's'")
    return {(row["hour"], row["action"]): row["times"] for row in rows}


def hour(at: datetime) -> datetime:
    return at.replace(minute=0)


async def test_each_hour_is_counted_once_by_all_daemons(
    connection: asyncpg.Connection, pool: asyncpg.Pool
) -> None:
    at, earlier = hours_ago(3), hours_ago(50)
    for time, action, message in (
        (at, "next", None),
        (at, "next", None),
        (earlier, "next", None),
        (at, "warning", "w"),
        (at, "branch", "blue"),
        (at, "goal", "paid is met; it was unpaid"),
        (hours_ago(0), "next", None),
    ):
        await happened(connection, time, action, message)
    await asyncio.gather(
        *(tidy(pool, RetentionSettings(), datetime.now(UTC), LOG) for _ in range(3))
    )
    await tidy(pool, RetentionSettings(), datetime.now(UTC), LOG)
    assert await counts(connection) == {
        (hour(earlier), "next"): 1,
        (hour(at), "next"): 2,
        (hour(at), "branch blue"): 1,
        (hour(at), "goal paid"): 1,
    }


@pytest.mark.parametrize("wrong", ["infinity", "-infinity", "2099-01-01Z", "294276-01-01Z"])
async def test_counting_begins_again_where_its_progress_cannot_be_right(
    connection: asyncpg.Connection, pool: asyncpg.Pool, wrong: str
) -> None:
    """Such as after the server's clock was years ahead: nothing was counted until that time."""
    await tidy(pool, RetentionSettings(), datetime.now(UTC), LOG)
    at = hours_ago(3)
    await happened(connection, at)
    await connection.execute(
        'UPDATE sequencer.activity_progress SET "until" = $1::text::timestamptz', wrong
    )
    await tidy(pool, RetentionSettings(events=timedelta(days=365)), datetime.now(UTC), LOG)
    assert await counts(connection) == {(hour(at), "next"): 1}


async def test_late_commits_are_counted_later(
    connection: asyncpg.Connection, pool: asyncpg.Pool
) -> None:
    at, now = hours_ago(3), datetime.now(UTC)
    await happened(connection, at)
    await tidy(pool, RetentionSettings(), now, LOG)
    await happened(connection, at)
    await tidy(pool, RetentionSettings(), now + HOUR, LOG)
    assert await counts(connection) == {(hour(at), "next"): 1}
    await tidy(pool, RetentionSettings(), now + 25 * HOUR, LOG)
    assert await counts(connection) == {(hour(at), "next"): 2}


async def test_a_count_that_is_cut_off_is_made_again(
    connection: asyncpg.Connection, pool: asyncpg.Pool
) -> None:
    at, now = hours_ago(3), datetime.now(UTC)
    await happened(connection, at)
    async with pool.acquire() as other:
        transaction = other.transaction()
        await transaction.start()
        while await activity.count(other, now):
            pass
        await transaction.rollback()
    assert await counts(connection) == {}
    await tidy(pool, RetentionSettings(), now, LOG)
    assert await counts(connection) == {(hour(at), "next"): 1}


async def test_dropped_history_stays_counted(
    connection: asyncpg.Connection, pool: asyncpg.Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retention, "ACTIVITY_KEPT_FOR", timedelta(days=100))
    old, day = await make_past(connection, 2), RetentionSettings(events=timedelta(days=1))
    # nothing is dropped before it is counted
    await connection.execute("ALTER TABLE sequencer.activity RENAME TO hidden")
    with pytest.raises(asyncpg.UndefinedTableError):
        await tidy(pool, day, datetime.now(UTC), LOG)
    assert old in await partitions(connection)
    await connection.execute("ALTER TABLE sequencer.hidden RENAME TO activity")
    await tidy(pool, day, datetime.now(UTC), LOG)
    assert old not in await partitions(connection)
    counted = await counts(connection)
    assert sum(counted.values()) == 1
    # its second count, which finds nothing any more, changes nothing
    await tidy(pool, day, datetime.now(UTC) + 30 * HOUR, LOG)
    assert await counts(connection) == counted
    await tidy(pool, day, datetime.now(UTC) + retention.ACTIVITY_KEPT_FOR, LOG)
    assert await counts(connection) == {}


@pytest.mark.parametrize(
    ("minute", "seconds"), [(0, 600), (9, 60), (10, 3600), (11, 3540), (59, 660)]
)
def test_an_hour_is_counted_ten_minutes_after_its_end(minute: int, seconds: float) -> None:
    at = datetime(2030, 1, 1, 12, minute, tzinfo=UTC)
    assert retention._until_next_count(at) == pytest.approx(seconds, abs=1)


async def test_late_claims_are_counted_once_and_on_time_ones_not(
    database: str, connection: asyncpg.Connection, pool: asyncpg.Pool
) -> None:
    await define(connection, "s", ("note", "Note", "{}", None))
    await connection.execute(
        "INSERT INTO sequencer.enrollments (sequence, subject, wake_at)"
        " SELECT 's', n, now() - n * interval '5 seconds' FROM generate_series(0, 20) AS n"
    )
    async with running_engine(database, {"Note": Recorder()}):
        await until(connection, ALL_ENDED)
    (row,) = await connection.fetch(
        "SELECT sequence, step, sum(times) AS times, max(longest) AS longest"
        "  FROM sequencer.lateness GROUP BY 1, 2"
    )
    assert (row["sequence"], row["step"]) == ("s", "note")
    assert 18 <= row["times"] <= 21
    assert row["longest"] >= 100
    # also if several daemons sum up the hours
    await connection.execute("UPDATE sequencer.lateness SET at = at - interval '1 hour'")
    later = datetime.now(UTC) + HOUR
    await asyncio.gather(*(tidy(pool, RetentionSettings(), later, LOG) for _ in range(3)))
    await tidy(pool, RetentionSettings(), later, LOG)
    (summed,) = await connection.fetch("SELECT * FROM sequencer.lateness")
    assert summed["is_hour"]
    assert (summed["times"], summed["longest"]) == (row["times"], row["longest"])
    assert summed["at"] == hour(summed["at"])


async def test_lateness_is_counted_in_classes(
    connection: asyncpg.Connection, pool: asyncpg.Pool
) -> None:
    now = datetime.now(UTC)
    for delays in ((5, 10, 11, 60, 61), (600, 601, 86400)):
        due = [now - timedelta(seconds=seconds) for seconds in delays]
        async with connections.borrow(pool) as one:
            await activity.note_lateness(one, {("s", "a"): due}, now)
    async with connections.borrow(pool) as one:
        await activity.sum_lateness(one, now + HOUR)
    (row,) = await connection.fetch("SELECT * FROM sequencer.lateness")
    assert (row["times"], row["over_minute"], row["over_ten_minutes"]) == (6, 4, 2)
    assert (row["longest"], row["is_hour"]) == (86400, True)


async def test_nothing_is_due_while_its_sequence_is_paused(
    database: str, connection: asyncpg.Connection
) -> None:
    await define(connection, "s", ("note", "Note", "{}", None))
    await connection.execute(
        "UPDATE sequencer.sequences SET status = 'paused';"
        "INSERT INTO sequencer.enrollments (sequence, subject, wake_at)"
        " SELECT 's', n, now() - n * interval '1 minute' FROM generate_series(0, 20) AS n"
    )
    resume = "UPDATE sequencer.sequences SET status = 'active'"
    metrics = Metrics()
    async with running_engine(database, {"Note": Recorder()}, metrics=metrics):
        await connection.execute(resume)
        await until(connection, ALL_ENDED)
        assert await connection.fetchval("SELECT count(*) FROM sequencer.lateness") == 0
        value = metrics.registry.get_sample_value
        assert value("sequencerd_lateness_seconds_bucket", {"le": "60.0"}) == 21
        # what waits longer after that is late
        resumed = await connection.fetchval(
            "UPDATE sequencer.sequences SET resumed_at = now() - interval '70 seconds'"
            " RETURNING resumed_at"
        )
        await connection.execute(
            "INSERT INTO sequencer.enrollments (sequence, subject, wake_at) VALUES"
            " ('s', 'late', now() - interval '1 hour')"
        )
        await until(connection, ALL_ENDED)
    (row,) = await connection.fetch("SELECT * FROM sequencer.lateness")
    assert (row["times"], row["over_minute"], row["over_ten_minutes"]) == (1, 1, 0)
    assert row["longest"] == pytest.approx((row["at"] - resumed).total_seconds(), abs=0.01)


async def test_a_claim_that_is_rolled_back_is_not_late(
    connection: asyncpg.Connection, pool: asyncpg.Pool
) -> None:
    now = datetime.now(UTC)
    begun = connection.transaction()
    await begun.start()
    await activity.note_lateness(connection, {("s", "a"): [now - HOUR]}, now)
    await begun.rollback()
    async with connections.borrow(pool) as other, connections.transaction(other):
        on_time = {("s", "a"): [now, now - activity.ON_TIME]}
        await activity.note_lateness(other, on_time, now)
    assert await connection.fetchval("SELECT count(*) FROM sequencer.lateness") == 0
