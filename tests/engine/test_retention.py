"""What retention deletes, and when: partitions of the history and ended enrollments, no more."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta

import asyncpg
import pytest
import structlog
from structlog.testing import capture_logs

from sequencerd.engine import retention
from sequencerd.engine.clock import Clock
from sequencerd.settings import RetentionSettings
from sequencerd.storage import activity, connections, limits
from sequencerd.storage.cleanup import try_lock_retention
from tests.helpers.engines import define, enroll, until
from tests.helpers.waiting import eventually

LOG = structlog.get_logger()
PARTITIONS = (
    "SELECT c.relname::text FROM pg_inherits AS i JOIN pg_class AS c ON c.oid = i.inhrelid"
    " WHERE i.inhparent = 'sequencer.events'::regclass ORDER BY 1"
)
YEAR = timedelta(days=365)


@pytest.fixture
async def defined(connection: asyncpg.Connection) -> asyncpg.Connection:
    await define(connection, "s", ("first", "GoTo", "{}", None))
    return connection


async def partitions(connection: asyncpg.Connection) -> list[str]:
    return [row[0] for row in await connection.fetch(PARTITIONS)]


async def happened(connection: asyncpg.Connection, at: datetime, id_: int = 1) -> None:
    await connection.execute(
        "INSERT INTO sequencer.events (enrollment_id, at, sequence, step, visit, action)"
        " VALUES ($1, $2, 's', 'first', 1, 'next')",
        id_,
        at,
    )


def name(at: datetime) -> str:
    return f"events_{at:%Y_%m}"


def month(number: int) -> datetime:
    """The first of a month, so many after this one."""
    now = datetime.now(UTC)
    years, zero_based = divmod(now.month - 1 + number, 12)
    return datetime(now.year + years, zero_based + 1, 1, tzinfo=UTC)


async def make_past(connection: asyncpg.Connection, number: int) -> str:
    """A partition of a month in the past, with an event in it."""
    first, end = month(-number), month(1 - number)
    await connection.execute(
        f"CREATE TABLE sequencer.{name(first)} PARTITION OF sequencer.events"
        f" FOR VALUES FROM ('{first}') TO ('{end}')"
    )
    await happened(connection, first)
    return name(first)


async def test_without_settings_everything_is_kept(
    defined: asyncpg.Connection, pool: asyncpg.Pool
) -> None:
    old = await make_past(defined, 30)
    await enroll(defined, "s", "ada")
    await defined.execute("UPDATE sequencer.enrollments SET status = 'cancelled'")
    await defined.execute("UPDATE sequencer.enrollments SET ended_at = '1999-01-01Z'")
    await retention.tidy(pool, RetentionSettings(), datetime.now(UTC), LOG)
    assert old in await partitions(defined)
    assert await defined.fetchval("SELECT count(*) FROM sequencer.enrollments") == 1


async def test_partitions_are_created_ahead_and_take_over_earlier_rows(
    defined: asyncpg.Connection, pool: asyncpg.Pool
) -> None:
    ahead = [name(month(n)) for n in range(4)]
    assert await partitions(defined) == sorted([*ahead, "events_other"])
    for partition in ahead:
        await defined.execute(f"DROP TABLE sequencer.{partition}")
    await happened(defined, datetime.now(UTC))
    assert await defined.fetchval("SELECT count(*) FROM sequencer.events_other") == 1
    await retention.tidy(pool, RetentionSettings(), datetime.now(UTC), LOG)
    assert await partitions(defined) == sorted([*ahead, "events_other"])
    assert await defined.fetchval("SELECT count(*) FROM sequencer.events_other") == 0
    assert await defined.fetchval(f"SELECT count(*) FROM sequencer.{ahead[0]}") == 1
    indexes = "SELECT count(*) FROM pg_indexes WHERE tablename = $1 AND schemaname = 'sequencer'"
    assert await defined.fetchval(indexes, ahead[1]) == await defined.fetchval(indexes, "events")


async def test_a_month_is_dropped_when_all_of_it_is_old(
    defined: asyncpg.Connection, pool: asyncpg.Pool
) -> None:
    old, younger, young = [await make_past(defined, n) for n in (14, 13, 1)]
    # in no partition: before them all, and between two
    await happened(defined, datetime(2001, 2, 3, tzinfo=UTC))
    await happened(defined, month(-5))
    # a second before the end of `younger` is as old as the limit
    now = month(-12) - timedelta(seconds=1) + YEAR
    await retention.tidy(pool, RetentionSettings(events=YEAR), now, LOG)
    left = await partitions(defined)
    assert old not in left
    assert younger in left
    assert young in left
    kept = await defined.fetch("SELECT at FROM sequencer.events_other")
    assert [row["at"] for row in kept] == [month(-5)]
    await retention.tidy(pool, RetentionSettings(events=YEAR), now + timedelta(seconds=1), LOG)
    assert younger not in await partitions(defined)


async def test_history_that_is_not_counted_yet_is_kept(
    defined: asyncpg.Connection, pool: asyncpg.Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = await make_past(defined, 14)
    end = month(-13)
    for counted, is_kept in ((end - timedelta(hours=1), True), (end, False)):

        async def counted_until(*_: object, at: datetime = counted) -> datetime:
            return at

        monkeypatch.setattr(activity, "counted_until", counted_until)
        await tidy_all(pool)
        assert (old in await partitions(defined)) is is_kept


async def test_the_present_month_can_not_be_dropped(connection: asyncpg.Connection) -> None:
    before = await partitions(connection)
    await happened(connection, datetime.now(UTC))
    drop = "SELECT sequencer.drop_event_partition($1)"
    for at in (datetime.now(UTC), datetime(2100, 1, 1, tzinfo=UTC)):
        assert await connection.fetchval(drop, at) is None
    assert await partitions(connection) == before
    assert await connection.fetchval("SELECT count(*) FROM sequencer.events") == 1


async def test_retention_delays_no_writer_of_history(
    database: str, defined: asyncpg.Connection, pool: asyncpg.Pool
) -> None:
    old = await make_past(defined, 14)
    async with defined.transaction():
        await defined.fetch("SELECT * FROM sequencer.events")  # another session's long report
        with pytest.raises(asyncpg.LockNotAvailableError):
            await retention.tidy(pool, RetentionSettings(events=YEAR), datetime.now(UTC), LOG)
    await retention.tidy(pool, RetentionSettings(events=YEAR), datetime.now(UTC), LOG)
    assert old not in await partitions(defined)


async def test_enrollments_that_ended_long_ago_are_deleted(
    defined: asyncpg.Connection, pool: asyncpg.Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retention, "BATCH_SIZE", 3)
    await define(defined, "once", ("first", "GoTo", "{}", None))
    await defined.execute("UPDATE sequencer.sequences SET reentry = 'never' WHERE name = 'once'")
    for n in range(10):
        await enroll(defined, "s", f"old-{n}")
    await enroll(defined, "once", "remembered")
    await defined.execute("UPDATE sequencer.enrollments SET status = 'cancelled'")
    await defined.execute(
        "UPDATE sequencer.enrollments SET status = 'failed' WHERE subject = 'old-3'"
    )
    await defined.execute("UPDATE sequencer.enrollments SET ended_at = now() - interval '366 days'")
    await enroll(defined, "s", "active")
    young = await enroll(defined, "s", "young")
    await defined.execute(
        "UPDATE sequencer.enrollments SET status = 'cancelled' WHERE id = $1", young
    )
    await retention.tidy(pool, RetentionSettings(ended=YEAR), datetime.now(UTC), LOG)
    left = await defined.fetch("SELECT subject FROM sequencer.enrollments ORDER BY id")
    assert [row["subject"] for row in left] == ["remembered", "active", "young"]
    assert await defined.fetchval("SELECT count(*) FROM sequencer.events") == 13  # they stay


async def test_no_reentry_policy_keeps_retention_from_other_sequences(
    defined: asyncpg.Connection, pool: asyncpg.Pool
) -> None:
    await define(defined, "forever", ("first", "GoTo", "{}", None))
    policy = (
        "UPDATE sequencer.sequences SET reentry = 'after', reentry_after = $1::text::interval"
        " WHERE name = 'forever'"
    )
    for longest in ("178000000 years", "100000 years"):
        with pytest.raises(asyncpg.CheckViolationError, match="reentry_after"):
            await defined.execute(policy, longest)
    await defined.execute(policy, "700000 days")  # 100,000 weeks, the most that a file may have
    for name in ("s", "forever"):
        await enroll(defined, name, "ada")
    await defined.execute("UPDATE sequencer.enrollments SET status = 'cancelled'")
    await defined.execute("UPDATE sequencer.enrollments SET ended_at = now() - interval '366 days'")
    await retention.tidy(pool, RetentionSettings(ended=YEAR), datetime.now(UTC), LOG)
    left = await defined.fetch("SELECT sequence FROM sequencer.enrollments")
    assert [row["sequence"] for row in left] == ["forever"]


async def test_locked_rows_are_not_waited_for(
    database: str, defined: asyncpg.Connection, pool: asyncpg.Pool
) -> None:
    for subject in ("ada", "bob"):
        await enroll(defined, "s", subject)
    await defined.execute("UPDATE sequencer.enrollments SET status = 'cancelled'")
    await defined.execute("UPDATE sequencer.enrollments SET ended_at = now() - interval '366 days'")
    async with defined.transaction():
        await defined.execute("UPDATE sequencer.enrollments SET data = '{}' WHERE subject = 'ada'")
        await retention.tidy(pool, RetentionSettings(ended=YEAR), datetime.now(UTC), LOG)
    assert await defined.fetchval("SELECT subject FROM sequencer.enrollments") == "ada"


async def test_one_daemon_at_a_time(defined: asyncpg.Connection, pool: asyncpg.Pool) -> None:
    old = await make_past(defined, 14)
    async with defined.transaction():
        assert await try_lock_retention(defined)
        await retention.tidy(pool, RetentionSettings(events=YEAR), datetime.now(UTC), LOG)
        assert old in await partitions(defined)
    await retention.tidy(pool, RetentionSettings(events=YEAR), datetime.now(UTC), LOG)
    assert old not in await partitions(defined)


async def test_errors_of_retention_are_retried(
    defined: asyncpg.Connection, pool: asyncpg.Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retention, "MAX_INTERVAL", 0.01)
    monkeypatch.setattr(retention, "RETRY_INTERVAL", 0.01)
    old = await make_past(defined, 14)
    await defined.execute("ALTER FUNCTION sequencer.drop_event_partition RENAME TO hidden")
    settings = RetentionSettings(events=YEAR)
    with capture_logs() as logs:
        log = structlog.get_logger()
        keeping = asyncio.create_task(
            retention.keep(pool, lambda: settings, clock=Clock(), log=log)
        )
        await eventually(lambda: len(logs) > 1)
        await defined.execute("ALTER FUNCTION sequencer.hidden RENAME TO drop_event_partition")
        await until(defined, "SELECT to_regclass('sequencer.' || $1) IS NULL", old)
        keeping.cancel()
    assert "retention tries again later" in logs[0]["event"]


async def test_nothing_is_deleted_by_a_clock_that_is_years_ahead(
    defined: asyncpg.Connection, pool: asyncpg.Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retention, "MAX_INTERVAL", 0.01)
    old = await make_past(defined, 14)
    settings = RetentionSettings(events=timedelta(days=3000), ended=timedelta(days=3000))
    await enroll(defined, "s", "ada")
    await defined.execute("UPDATE sequencer.enrollments SET status = 'cancelled'")
    clock = Clock()
    clock.measured(datetime.now(UTC) + timedelta(days=4000))
    with capture_logs() as logs:
        log = structlog.get_logger()
        keeping = asyncio.create_task(retention.keep(pool, lambda: settings, clock=clock, log=log))
        await eventually(lambda: len(logs) > 1)
        assert old in await partitions(defined)
        assert await defined.fetchval("SELECT count(*) FROM sequencer.enrollments") == 1
        clock.measured(datetime.now(UTC))
        count = len(logs)
        await until(defined, "SELECT true FROM sequencer.activity_progress")
        keeping.cancel()
    assert {one["event"] for one in logs[:count]} == {
        "nothing is deleted, because the database's clock may be wrong"
    }


@pytest.mark.parametrize("tables", ["ALL TABLES", "TABLES IN SCHEMA sequencer"])
async def test_a_publication_does_not_interfere(
    defined: asyncpg.Connection, pool: asyncpg.Pool, tables: str
) -> None:
    """Rows that no key names can be deleted all the same: by us, and by a command."""
    await defined.execute(f"CREATE PUBLICATION everything FOR {tables}")
    old = await make_past(defined, 14)
    await happened(defined, month(-30))  # without a partition
    await defined.execute(f"DROP TABLE sequencer.{name(month(2))}")
    await happened(defined, month(2))
    await tidy_all(pool)
    assert old not in await partitions(defined)
    assert name(month(2)) in await partitions(defined)
    assert await defined.fetchval("SELECT array_agg(at) FROM sequencer.events") == [month(2)]
    await defined.execute("UPDATE sequencer.events SET message = NULL")
    await defined.execute("DELETE FROM sequencer.events")


async def test_every_table_can_be_published(defined: asyncpg.Connection) -> None:
    """With whatever is to be deleted or changed: by a key, or by the whole row."""
    await defined.execute("SELECT sequencer.add_event_partitions(24)")
    nameless = await defined.fetch(
        "SELECT relname FROM pg_class AS c WHERE relnamespace = 'sequencer'::regnamespace"
        " AND relkind IN ('r', 'p') AND relreplident <> 'f' AND NOT EXISTS"
        " (SELECT FROM pg_index AS i WHERE i.indrelid = c.oid AND i.indisprimary)"
    )
    assert nameless == []


async def test_each_part_of_retention_runs_even_if_another_fails(
    defined: asyncpg.Connection, pool: asyncpg.Pool
) -> None:
    old = await make_past(defined, 14)
    await enroll(defined, "s", "ada")
    await defined.execute("UPDATE sequencer.enrollments SET status = 'cancelled'")
    await defined.execute("UPDATE sequencer.enrollments SET ended_at = now() - interval '366 days'")
    for broken in ("add_event_partitions", "drop_event_partition"):
        await defined.execute(f"ALTER FUNCTION sequencer.{broken} RENAME TO hidden_{broken}")
    with (
        capture_logs() as logs,
        pytest.raises(asyncpg.UndefinedFunctionError, match="add_event_partitions"),
    ):
        await tidy_all(pool)
    assert ["drop_event_partition" in line["error"] for line in logs if "error" in line] == [True]
    assert await defined.fetchval("SELECT count(*) FROM sequencer.enrollments") == 0
    assert old in await partitions(defined)
    await defined.execute(
        "ALTER FUNCTION sequencer.hidden_drop_event_partition RENAME TO drop_event_partition"
    )
    with pytest.raises(asyncpg.UndefinedFunctionError, match="add_event_partitions"):
        await tidy_all(pool)
    assert old not in await partitions(defined)


async def test_an_unexpected_error_of_retention_ends_no_daemon(
    pool: asyncpg.Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as that of a value that Python does not have. All other parts are done."""
    done = asyncio.Event()

    async def fail(*_: object, **__: object) -> bool:
        raise OverflowError("date value out of range")

    async def prune(*_: object) -> None:
        done.set()

    monkeypatch.setattr(activity, "count", fail)
    monkeypatch.setattr(limits, "prune", prune)
    with capture_logs() as logs:
        log = structlog.get_logger()
        keeping = asyncio.create_task(
            retention.keep(pool, RetentionSettings, clock=Clock(), log=log)
        )
        await eventually(lambda: len(logs) > 0)
        assert not keeping.done()
        keeping.cancel()
    assert done.is_set()
    assert logs[0]["error"] == "date value out of range"


ENDED = """
    INSERT INTO sequencer.enrollments (sequence, subject, status, ended_at)
    SELECT name, 'u' || n, 'completed', now() - n * interval '1 day'
      FROM unnest($1::text[]) AS name, generate_series(1, $2::int) AS n
"""


async def test_each_batch_of_deletions_begins_at_the_end_of_the_last_batch(
    database: str, defined: asyncpg.Connection, pool: asyncpg.Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise it reads what is already deleted, while another session keeps a snapshot open."""
    await defined.execute(ENDED, ["s"], 1000)
    other = await asyncpg.connect(database)
    read = "SELECT idx_tup_read FROM pg_stat_user_indexes WHERE indexrelname = 'enrollments_ended'"
    async with other.transaction(isolation="repeatable_read"):
        await other.fetchval("SELECT count(*) FROM sequencer.enrollments")
        monkeypatch.setattr(retention, "BATCH_SIZE", 50)
        await retention.tidy(
            pool, RetentionSettings(ended=timedelta(days=1)), datetime.now(UTC), LOG
        )
        assert await defined.fetchval("SELECT count(*) FROM sequencer.enrollments") == 0
    await other.close()
    async with connections.borrow(pool) as connection:
        await connection.execute("SELECT pg_stat_force_next_flush()")
    await until(defined, f"SELECT ({read}) >= 1000")
    assert await defined.fetchval(read) < 3000


async def test_each_batch_of_deletions_continues_in_the_sequence_of_the_last_batch(
    defined: asyncpg.Connection, pool: asyncpg.Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for sequence in ("r", "t"):
        await define(defined, sequence, ("first", "GoTo", "{}", None))
    await defined.execute(
        "UPDATE sequencer.sequences SET reentry = 'after', reentry_after = '5 days'"
        " WHERE name IN ('r', 't')"
    )
    await defined.execute(ENDED, ["s", "t", "r"], 8)
    monkeypatch.setattr(retention, "BATCH_SIZE", 3)
    await retention.tidy(pool, RetentionSettings(ended=timedelta(days=2.5)), datetime.now(UTC), LOG)
    left = await defined.fetch(
        "SELECT sequence, array_agg(subject::text ORDER BY subject) AS subjects"
        "  FROM sequencer.enrollments GROUP BY 1 ORDER BY 1"
    )
    not_yet = ["u1", "u2", "u3", "u4"]
    assert [tuple(row) for row in left] == [
        ("r", not_yet),
        ("s", ["u1", "u2"]),
        ("t", not_yet),
    ]


async def test_null_deletes_nothing(defined: asyncpg.Connection) -> None:
    old = await make_past(defined, 14)
    await enroll(defined, "s", "ada")
    await defined.execute("UPDATE sequencer.enrollments SET status = 'cancelled'")
    for arguments in ("NULL, NULL", "NULL, 10", "now(), NULL"):
        assert (
            await defined.fetchval(f"SELECT deleted FROM sequencer.delete_ended({arguments})")
            is None
        )
    assert await defined.fetchval("SELECT sequencer.drop_event_partition(NULL)") is None
    assert await defined.fetchval("SELECT count(*) FROM sequencer.enrollments") == 1
    assert old in await partitions(defined)


async def tidy_all(pool: asyncpg.Pool) -> None:
    settings = RetentionSettings(events=YEAR, ended=YEAR)
    await retention.tidy(pool, settings, datetime.now(UTC), LOG)
