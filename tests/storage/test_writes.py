"""What a batch writes, whether or not its enrollments differ."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import asyncpg
import pytest

from sequencerd.core.model import Event
from sequencerd.storage import writes
from sequencerd.storage.connections import transaction
from tests.helpers.engines import define

NOW = datetime.now(UTC).replace(microsecond=0)
ODD = ("s/a", 'quo"te', "back\\slash", "{brace}", "a,b", "NULL", "", " blank ", "ü€", "new\nline")


@pytest.mark.parametrize("different", [1, writes.FEW, writes.FEW + 1, 40])
async def test_each_enrollment_gets_its_own_state_and_events(
    connection: asyncpg.Connection, different: int
) -> None:
    await define(connection, "s", ("a", "Task", "{}", "b"), ("b", "Task", "{}", None))
    await connection.execute(
        "INSERT INTO sequencer.enrollments (sequence, subject)"
        " SELECT 's', 'u' || n FROM generate_series(1, 40) AS n"
    )
    ids = [row["id"] for row in await connection.fetch("SELECT id FROM sequencer.enrollments")]
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
    async with transaction(connection):
        await writes.write(connection, written, NOW)
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
