"""Locking rows whose side effects have ended: what is read again, and what is not."""

from __future__ import annotations

from datetime import UTC, datetime

import asyncpg

from sequencerd.core.decision import Event
from sequencerd.core.enrollment import Enrollment
from sequencerd.engine.cursors import EARLIEST_WAKE
from sequencerd.storage import evaluations, locking, writes
from sequencerd.storage.connections import transaction
from tests.helpers.engines import define

COUNT = locking.MANY_LEASES + 4
NUMBER = 7


async def lease(connection: asyncpg.Connection) -> tuple[list[Enrollment], dict[int, int]]:
    """Lease many enrollments, and return them with the number of the transaction."""
    await define(connection, "s", ("call", "Task", "{}", None))
    await connection.execute(
        "INSERT INTO sequencer.enrollments (sequence, subject)"
        f" SELECT 's', 'u' || n FROM generate_series(1, {COUNT}) AS n"
    )
    revision = await connection.fetchval("SELECT revision FROM sequencer.sequences")
    now = datetime.now(UTC)
    async with transaction(connection):
        due = locking.DueEnrollments("s", "call", now, "me", [], revision, COUNT, EARLIEST_WAKE)
        claimed, _, places, number = await locking.claim(connection, [due])
        leased = [one._replace(entered_at=now).leased_to("me", NUMBER) for one in claimed]
        at = leased[0]
        row = writes.EnrollmentState(
            at.sequence, at.step, "active", now, now, at.visit, 1, NUMBER, None, at.leased_by
        )
        written = writes.EnrollmentWrites(rows={row: [one.id for one in leased]}, places=places)
        await writes.write(connection, written, now)
        assert number == await writes.number_of_writes(connection)
        transaction_number = await evaluations.new_transaction(connection)
    assert transaction_number is not None
    assert number in (None, transaction_number)
    assert places.keys() == ({one.id for one in leased} if number else set())
    return leased, {NUMBER: transaction_number % 2**32}


async def test_only_rows_changed_since_the_lease_are_read_again(
    database: str, connection: asyncpg.Connection
) -> None:
    leased, transactions = await lease(connection)
    edited, moved, cancelled, locked, *others = leased
    await connection.execute(
        "UPDATE sequencer.enrollments SET data = '{\"k\": 1}' WHERE id = $1", edited.id
    )
    await connection.execute(
        "UPDATE sequencer.enrollments SET step = 'call' WHERE id = $1", moved.id
    )
    await connection.execute(
        "UPDATE sequencer.enrollments SET status = 'cancelled' WHERE id = $1", cancelled.id
    )
    other = await asyncpg.connect(database)
    async with other.transaction(), connection.transaction():
        await other.execute("SELECT FROM sequencer.enrollments WHERE id = $1 FOR UPDATE", locked.id)
        ids, now, revisions, *_ = await locking.lock(connection, leased, transactions)
    await other.close()
    assert ids == {one.id for one in leased} - {locked.id}
    assert now.keys() == {one.id for one in (edited, *others)}
    assert now[edited.id].data == '{"k": 1}'
    assert all(now[one.id] is one for one in others)
    assert revisions == {"s": await connection.fetchval("SELECT revision FROM sequencer.sequences")}


async def test_rows_are_read_again_if_other_triggers_may_have_changed_them(
    connection: asyncpg.Connection,
) -> None:
    await connection.execute(
        """
        CREATE SCHEMA app;
        CREATE FUNCTION app.touch() RETURNS trigger LANGUAGE plpgsql AS
            $$ BEGIN NEW.data := NEW.data || '{"touched": true}'; RETURN NEW; END $$;
        CREATE TRIGGER touch BEFORE UPDATE ON sequencer.enrollments
            FOR EACH ROW EXECUTE FUNCTION app.touch();
        """
    )
    leased, transactions = await lease(connection)
    async with connection.transaction():
        _, now, *_ = await locking.lock(connection, leased, transactions)
    assert len(now) == COUNT
    assert {one.data for one in now.values()} == {'{"touched": true}'}


COMPLETED = writes.EnrollmentState("s", "call", "completed", None, None, 1, 1, 0, None, None)


async def completed(connection: asyncpg.Connection) -> list[int]:
    rows = await connection.fetch(
        "SELECT id FROM sequencer.enrollments WHERE status = 'completed' ORDER BY id"
    )
    return [row["id"] for row in rows]


async def test_rows_are_written_where_they_were_locked(connection: asyncpg.Connection) -> None:
    leased, transactions = await lease(connection)
    now = datetime.now(UTC)
    half = [one.id for one in leased[::2]]
    async with connection.transaction():
        locked = await locking.lock(connection, leased, transactions)
        assert locked.transaction == await evaluations.new_transaction(connection)
        written = writes.EnrollmentWrites(rows={COMPLETED: half}, places=locked.places)
        await writes.write(connection, written, now)
    assert await completed(connection) == half


async def test_rows_that_have_been_written_since_they_were_locked_are_found_by_id(
    connection: asyncpg.Connection,
) -> None:
    leased, transactions = await lease(connection)
    now = datetime.now(UTC)
    ids = [one.id for one in leased]
    async with connection.transaction():
        locked = await locking.lock(connection, leased, transactions)
        written = writes.EnrollmentWrites(
            rows={COMPLETED: ids}, data={ids[0]: {"k": 1}}, places=locked.places
        )
        await writes.write(connection, written, now)
    assert await completed(connection) == ids
    changed = "SELECT id FROM sequencer.enrollments WHERE data = '{\"k\": 1}'"
    assert await connection.fetchval(changed) == ids[0]


async def test_a_row_that_a_trigger_has_moved_since_it_was_locked_is_written(
    connection: asyncpg.Connection,
) -> None:
    """As a trigger of an application does that updates others when an event is recorded."""
    leased, transactions = await lease(connection)
    now = datetime.now(UTC)
    ids = [one.id for one in leased]
    event = Event(now, "s", "call", 1, "next")
    async with connection.transaction():
        locked = await locking.lock(connection, leased, transactions)
        await connection.execute(
            "UPDATE sequencer.enrollments SET data = '{\"k\": 1}' WHERE id = $1", ids[0]
        )
        written = writes.EnrollmentWrites(
            rows={COMPLETED: ids}, events={event: ids}, places=locked.places
        )
        await writes.write(connection, written, now)
    assert await completed(connection) == ids
    recorded = "SELECT count(*) FROM sequencer.events WHERE action = 'next'"
    assert await connection.fetchval(recorded) == len(ids)
