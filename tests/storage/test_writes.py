"""What a batch writes, whether or not its enrollments differ."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import asyncpg
import pytest

from sequencerd.core.decision import Event
from sequencerd.storage import writes
from sequencerd.storage.connections import transaction
from tests.helpers.engines import define, enroll

NOW = datetime.now(UTC).replace(microsecond=0)
ODD = ("s/a", 'quo"te', "back\\slash", "{brace}", "a,b", "NULL", "", " blank ", "ü€", "new\nline")


@pytest.mark.parametrize(
    ("count", "different", "is_locked"),
    [
        (40, 1, True),
        (40, writes.MAX_SEPARATE_STATEMENTS, True),
        (40, writes.MAX_SEPARATE_STATEMENTS + 1, True),
        (40, 40, False),
        (1, 1, False),
    ],
)
async def test_each_enrollment_gets_its_own_state_and_events(
    connection: asyncpg.Connection, count: int, different: int, *, is_locked: bool
) -> None:
    await define(connection, "s", ("a", "Task", "{}", "b"), ("b", "Task", "{}", None))
    await connection.execute(
        "INSERT INTO sequencer.enrollments (sequence, subject)"
        f" SELECT 's', 'u' || n FROM generate_series(1, {count}) AS n"
    )
    ids = [
        row["id"]
        for row in await connection.fetch("SELECT id FROM sequencer.enrollments ORDER BY id")
    ]
    written = writes.EnrollmentWrites()
    for number, id_ in enumerate(ids):
        kind = number % different
        row = writes.EnrollmentState(
            "s",
            "b",
            "active" if kind % 2 else "failed",
            (NOW + timedelta(seconds=kind) if kind % 3 else datetime.max.replace(tzinfo=UTC))
            if kind % 2
            else None,
            NOW - timedelta(seconds=kind),
            2,
            kind,
            0,
            NOW if kind % 5 else None,
            None,
            None if kind % 2 else "error",
            f"error {kind}",
            writes.text_array(ODD[: kind % len(ODD)]),
            None,
            NOW if kind % 7 else None,
        )
        written.rows.setdefault(row, []).append(id_)
        for event in (
            Event(NOW, "s", "a", 1, "next", f"message {kind}", 1, float(kind)),
            Event(NOW, "s", "b", 2, "warning"),
        ):
            written.events.setdefault(event, []).append(id_)
    if is_locked:
        async with transaction(connection):
            await writes.write(connection, written, NOW)
    else:
        await writes.write_unchanged(connection, written, NOW, await known(connection))
    rows = await connection.fetch(
        "SELECT e.*, wake_at = 'infinity' AS is_asleep FROM sequencer.enrollments AS e ORDER BY id"
    )
    for number, row in enumerate(rows):
        kind = number % different
        assert row["entered_at"] == NOW - timedelta(seconds=kind)
        assert (row["step"], row["visit"], row["attempt"]) == ("b", 2, kind)
        assert row["last_error"] == f"error {kind}"
        assert tuple(row["executed"]) == ODD[: kind % len(ODD)]
        assert row["retry_at"] == (NOW if kind % 5 else None)
        assert row["waits_until"] == (NOW if kind % 7 else None)
        if kind % 2:
            assert (row["status"], row["ended_at"]) == ("active", None)
            assert row["is_asleep"] == (kind % 3 == 0)
            assert kind % 3 == 0 or row["wake_at"] == NOW + timedelta(seconds=kind)
        else:
            assert (row["status"], row["failure"], row["ended_at"]) == ("failed", "error", NOW)
            assert row["wake_at"] is None
    history = await connection.fetch(
        "SELECT enrollment_id, action, message, revision, seconds_at_step FROM sequencer.events"
        " ORDER BY enrollment_id, action"
    )
    assert [tuple(event) for event in history] == [
        event
        for number, id_ in enumerate(ids)
        for event in (
            (id_, "next", f"message {number % different}", 1, float(number % different)),
            (id_, "warning", None, None, None),
        )
    ]


async def test_events_alone_are_written(connection: asyncpg.Connection) -> None:
    """Of results that came too late: they move nothing."""
    event = Event(NOW, "s", "a", 1, "stale_result")
    await writes.write(connection, writes.EnrollmentWrites(events={event: [7, 8]}), NOW)
    assert await connection.fetchval("SELECT count(*) FROM sequencer.events") == 2
    await writes.write(connection, writes.EnrollmentWrites(), NOW)
    assert await connection.fetchval("SELECT count(*) FROM sequencer.events") == 2


async def known(connection: asyncpg.Connection) -> writes.Unchanged:
    """What a daemon knows that has just read all enrollments and the sequence."""
    rows = await connection.fetch(
        "SELECT id, leases, leased_by, xmin::text FROM sequencer.enrollments"
    )
    revision = await connection.fetchval("SELECT revision FROM sequencer.sequences")
    versions = {row["id"]: int(row["xmin"]) for row in rows}
    (leased_by,) = {row["leased_by"] for row in rows}
    return writes.Unchanged(versions, leased_by, {row["leases"] for row in rows}, "s", revision)


async def complete(connection: asyncpg.Connection, known: writes.Unchanged) -> int | None:
    row = writes.EnrollmentState("s", "a", "completed", None, NOW, 1, 1, 0, None, None)
    ids = list(known.versions)
    event = Event(NOW, "s", "a", 1, "completed")
    written = writes.EnrollmentWrites(rows={row: ids}, events={event: ids})
    return await writes.write_unchanged(connection, written, NOW, known)


async def enrolled(connection: asyncpg.Connection, *subjects: str) -> writes.Unchanged:
    """Enroll subjects, each in a transaction of its own; names in one text in the same."""
    await define(connection, "s", ("a", "Task", "{}", None))
    for together in subjects:
        async with connection.transaction():
            for subject in together.split():
                await enroll(connection, "s", subject)
    return await known(connection)


ONE_OR_TWO = pytest.mark.parametrize("subjects", [["bob"], ["ada", "bob"], ["ada bob"]])


COMPLETED = """SELECT count(*) FROM sequencer.enrollments AS e
     JOIN sequencer.events AS v ON v.enrollment_id = e.id
    WHERE e.status = 'completed' AND v.action = 'completed'"""


@ONE_OR_TWO
async def test_unchanged_rows_are_written_by_a_known_transaction(
    connection: asyncpg.Connection, subjects: list[str]
) -> None:
    number = await complete(connection, await enrolled(connection, *subjects))
    assert await connection.fetchval(COMPLETED) == len(" ".join(subjects).split())
    assert set((await known(connection)).versions.values()) == {number and number % 2**32}


@ONE_OR_TWO
@pytest.mark.parametrize(
    "change",
    [
        "UPDATE sequencer.enrollments SET data = '{\"k\": 1}' WHERE subject = 'bob'",
        "UPDATE sequencer.enrollments SET status = 'cancelled' WHERE subject = 'bob'",
        "DELETE FROM sequencer.enrollments WHERE subject = 'bob'",
        "UPDATE sequencer.steps SET config = '{\"a\": 1}'",
        "UPDATE sequencer.sequences SET status = 'paused'",
    ],
)
async def test_nothing_is_written_if_anything_has_changed(
    connection: asyncpg.Connection, change: str, subjects: list[str]
) -> None:
    before = await enrolled(connection, *subjects)
    await connection.execute(change)
    with pytest.raises(writes.NotWritten):
        await complete(connection, before)
    assert await connection.fetchval(COMPLETED) == 0


@ONE_OR_TWO
async def test_nothing_is_written_or_waited_for_if_a_row_is_locked(
    database: str, connection: asyncpg.Connection, subjects: list[str]
) -> None:
    before = await enrolled(connection, *subjects)
    other = await asyncpg.connect(database)
    async with other.transaction():
        await other.execute(
            "UPDATE sequencer.enrollments SET timezone = 'UTC' WHERE subject = 'bob'"
        )
        with pytest.raises(writes.NotWritten):
            await complete(connection, before)
    await other.close()
    assert await connection.fetchval(COMPLETED) == 0


@ONE_OR_TWO
async def test_no_transaction_is_returned_if_triggers_of_others_may_change_the_rows(
    connection: asyncpg.Connection, subjects: list[str]
) -> None:
    before = await enrolled(connection, *subjects)
    await connection.execute(
        """
        CREATE SCHEMA app;
        CREATE FUNCTION app.touch() RETURNS trigger LANGUAGE plpgsql AS
            $$ BEGIN NEW.data := NEW.data || '{"touched": true}'; RETURN NEW; END $$;
        CREATE TRIGGER touch BEFORE UPDATE ON sequencer.enrollments
            FOR EACH ROW EXECUTE FUNCTION app.touch();
        """
    )
    assert await complete(connection, before) is None
    assert await connection.fetchval(COMPLETED) == len(" ".join(subjects).split())


@pytest.mark.parametrize("returned", ["NULL", "OLD"])
@pytest.mark.parametrize("different", [1, 2, writes.MAX_SEPARATE_STATEMENTS + 1])
async def test_nothing_is_written_if_a_trigger_discards_a_row(
    connection: asyncpg.Connection, returned: str, different: int
) -> None:
    """Locked or not, whether or not the rows differ."""
    before = await enrolled(connection, *(f"u{n}" for n in range(4)), "bob")
    await connection.execute(
        f"""
        CREATE FUNCTION discard() RETURNS trigger LANGUAGE plpgsql AS
            $$ BEGIN RETURN {returned}; END $$;
        CREATE TRIGGER discard BEFORE UPDATE ON sequencer.enrollments
            FOR EACH ROW WHEN (OLD.subject = 'bob') EXECUTE FUNCTION discard()
        """
    )
    written = writes.EnrollmentWrites()
    event = Event(NOW, "s", "a", 1, "next")
    for number, id_ in enumerate(before.versions):
        wake_at = NOW + timedelta(hours=number % different)
        row = writes.EnrollmentState("s", "a", "active", wake_at, NOW, 1, 1, 7, None, "me")
        written.rows.setdefault(row, []).append(id_)
        written.events.setdefault(event, []).append(id_)
    with pytest.raises(writes.NotWritten):
        await writes.write_unchanged(connection, written, NOW, before)
    with pytest.raises(writes.NotStored):
        async with transaction(connection):
            await writes.write(connection, written, NOW)
    assert (await known(connection)).versions == before.versions
    assert await connection.fetchval("SELECT count(*) FROM sequencer.events") == 0
