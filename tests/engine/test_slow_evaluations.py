"""Conditions and templates that compute for long leave time to everything else."""

from __future__ import annotations

import asyncpg
import pytest

from sequencerd.engine import results, slow_evaluations
from tests.helpers.engines import ALL_ENDED, Recorder, define, enroll, running_engine, until

CONDITION = '{"lodashCommand": "times", "value": {"type": "get", "value": "data.n"}}'
ENROLL = (
    "INSERT INTO sequencer.enrollments (sequence, subject, data) SELECT 's', 'u' || n,"
    " jsonb_build_object('n', $2::bigint + n) FROM generate_series(1, $1::int) AS n"
)
TRANSACTIONS = "SELECT count(DISTINCT xmin::text) FROM sequencer.enrollments"


@pytest.fixture
def all_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each evaluation counts as a slow one that leaves no time for another in its batch."""
    monkeypatch.setattr(slow_evaluations, "SLOW_SECONDS", 0.0)
    monkeypatch.setattr(slow_evaluations, "MAX_SLOW", 0.0)
    monkeypatch.setattr(results, "SLOW_PAUSE", 0.01)


async def test_others_proceed_while_conditions_compute(
    database: str, connection: asyncpg.Connection
) -> None:
    await define(connection, "s", ("a", "Conditional", CONDITION, None))
    await define(connection, "other", ("a", "GoTo", "{}", "b"), ("b", "GoTo", "{}", None))
    await connection.execute(ENROLL, 5, 10**9)
    async with running_engine(database):
        id_ = await enroll(connection, "other", "ada")
        ended = "SELECT status = 'completed' FROM sequencer.enrollments WHERE id = $1"
        await until(connection, ended, id_)
        active = "SELECT count(*) FROM sequencer.enrollments WHERE status = 'active'"
        assert await connection.fetchval(active) > 0
        await until(connection, ALL_ENDED)
    assert await connection.fetchval(
        "SELECT bool_and(failure = 'bad_data') FROM sequencer.enrollments WHERE sequence = 's'"
    )


@pytest.mark.parametrize("count", [20, 200])  # read without a lock, and claimed
@pytest.mark.usefixtures("all_slow")
async def test_a_claim_ends_early_and_the_rest_remains_due(
    database: str, connection: asyncpg.Connection, count: int
) -> None:
    await define(connection, "s", ("a", "Conditional", CONDITION, None))
    await connection.execute(ENROLL, count, 0)
    async with running_engine(database):
        await until(connection, ALL_ENDED)
    assert await connection.fetchval(TRANSACTIONS) == count


@pytest.mark.usefixtures("all_slow")
async def test_results_are_written_later_and_none_is_lost(
    database: str, connection: asyncpg.Connection
) -> None:
    note = Recorder(batch_size=20)
    await define(connection, "s", ("a", "Note", "{}", "b"), ("b", "Conditional", CONDITION, None))
    await connection.execute(ENROLL, 20, 0)
    async with running_engine(database, {"Note": note}):
        await until(connection, ALL_ENDED)
    assert await connection.fetchval(TRANSACTIONS) == 20
    assert len(note.keys) == len({*note.keys}) == 20


@pytest.mark.usefixtures("all_slow")
async def test_a_changed_step_is_rescheduled_in_several_transactions(
    database: str, connection: asyncpg.Connection
) -> None:
    await define(connection, "s", ("a", "WaitForDuration", '{"amount": 1, "unit": "days"}', None))
    await connection.execute(ENROLL, 4, 0)
    waiting = "SELECT bool_and(entered_at IS NOT NULL) FROM sequencer.enrollments"
    async with running_engine(database):
        await until(connection, waiting)
        await connection.execute(
            'UPDATE sequencer.steps SET config = \'{"amount": 2, "unit": "days"}\''
        )
        await until(connection, "SELECT reschedule_from IS NULL FROM sequencer.steps")
    assert await connection.fetchval(TRANSACTIONS) == 4
    assert await connection.fetchval(
        "SELECT bool_and(wake_at = entered_at + interval '2 days') FROM sequencer.enrollments"
    )
