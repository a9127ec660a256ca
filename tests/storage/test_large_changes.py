"""Changes of many rows: in batches, and neither they nor other sessions wait for each other."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta

import asyncpg
import pytest

from sequencerd.core.model import Reservation
from sequencerd.storage import bulk, connections, limits, locking, sequences
from tests.helpers.engines import define

NOW = datetime.now(UTC)
HERE = ("s", "a")


@pytest.fixture
async def other(database: str, connection: asyncpg.Connection) -> AsyncIterator[asyncpg.Connection]:
    """Another session, in a transaction. Waits of the first one for its locks are errors."""
    await connection.execute("SET lock_timeout = '1s'")
    session = await asyncpg.connect(database)
    async with session.transaction():
        yield session
    await session.close()


async def enroll_some(connection: asyncpg.Connection, change: str) -> None:
    await define(connection, "s", ("a", "Work", "{}", None))
    await connection.execute(
        "INSERT INTO sequencer.enrollments (sequence, subject)"
        " SELECT 's', 'u' || n FROM generate_series(1, 5) AS n"
    )
    await connection.execute(f"UPDATE sequencer.enrollments SET {change}")


async def test_failed_enrollments_are_resumed_in_batches(
    connection: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a million at once, none would be resumed in the time that a statement may take."""
    await enroll_some(connection, "status = 'failed', failure = 'invalid_step'")
    monkeypatch.setattr(connections, "WRITE_SIZE", 2)
    assert await sequences.revive(connection, [("s", "none"), HERE], NOW) == 5
    found = await connection.fetchrow(
        "SELECT count(DISTINCT xmin::text), bool_and(status = 'active' AND failure IS NULL)"
        " FROM sequencer.enrollments"
    )
    assert tuple(found) == (3, True)
    resumed = "SELECT count(*) FROM sequencer.events WHERE message = 'the step was fixed'"
    assert await connection.fetchval(resumed) == 5


async def test_expiries_are_forgotten_in_batches_without_waiting(
    connection: asyncpg.Connection, other: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    await enroll_some(connection, "expires_at = now()")
    monkeypatch.setattr(connections, "WRITE_SIZE", 2)
    await other.execute("SELECT FROM sequencer.enrollments WHERE subject = 'u2' FOR UPDATE")
    await locking.forget_expiries(connection, HERE)
    kept = "SELECT subject FROM sequencer.enrollments WHERE expires_at > '-infinity'"
    assert await connection.fetchval(f"SELECT ARRAY({kept})") == ["u2"]


async def test_reservations_are_pruned_in_batches_without_waiting(
    connection: asyncpg.Connection, other: asyncpg.Connection
) -> None:
    """A daemon that reserves places has locked some of the rows, and may want others."""
    hour = timedelta(hours=1)
    for key in (b"a", b"b", b"c", b"d"):
        places = (Reservation(key, "news", 1, hour),)
        assert not await limits.reserve(connection, [limits.Reserved(1, 1, places)], [], NOW)
    await other.execute("SELECT FROM sequencer.reservations WHERE key = 'a' FOR UPDATE")
    later = NOW + 2 * hour
    assert [await limits.prune(connection, later, 2) for _ in range(2)] == [2, 1]
    assert await connection.fetchval("SELECT key FROM sequencer.reservations") == b"a"


async def test_a_pause_does_not_wait_until_the_enrollments_are_counted(
    connection: asyncpg.Connection, other: asyncpg.Connection
) -> None:
    await enroll_some(connection, "data = '{}'")
    await other.execute("LOCK TABLE sequencer.enrollments IN ACCESS EXCLUSIVE MODE")
    (row,) = await bulk.set_status(connection, ["s"], "paused", "wrong text")
    assert dict(row) == {"name": "s", "before": "active"}
    assert await connection.fetchval("SELECT status FROM sequencer.sequences") == "paused"
