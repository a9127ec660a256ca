"""The rate of a runner, which all daemons share, measured by its permits in the database."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import AsyncExitStack
from datetime import timedelta

import asyncpg
import pytest
import structlog

from sequencerd.core.model import Limits
from sequencerd.core.task import Answer, Result, Task
from sequencerd.engine import shared_rates
from sequencerd.runners.pace import Pace
from sequencerd.storage import connections
from tests.helpers.databases import make_login, shard
from tests.helpers.engines import ALL_ENDED, Recorder, define, running_engine, until
from tests.helpers.waiting import PATIENCE

RATE = 100.0
LOG = structlog.get_logger()


class Paced(Recorder):
    """A runner with a rate that it shares, which keeps when its calls began."""

    def __init__(self, pool: asyncpg.Pool, taken: list[int]) -> None:
        super().__init__(batch_size=1, concurrency=20)
        self.begun: list[float] = []

        async def take(runner: str, per_second: float, count: int) -> tuple[float, float]:
            taken.append(count)
            return await shared_rates.take(pool, runner, per_second, count, LOG)

        self._pace = Pace(Limits(20, per_second=RATE), "Paced", take)

    async def run(self, program: object, tasks: Sequence[Task]) -> Sequence[Result]:
        assert await self._pace.turn()
        self.begun.append(asyncio.get_running_loop().time())
        return [Answer() for _ in tasks]


@pytest.mark.slow
async def test_four_daemons_keep_a_rate_together(
    connection: asyncpg.Connection, database: str
) -> None:
    await define(connection, "s", ("call", "Paced", "{}", None))
    url = await make_login(connection, database, "login_daemon", "daemon")
    taken: list[int] = []
    async with AsyncExitStack() as stack:
        runners = []
        start = await connection.fetchval("SELECT clock_timestamp()")
        for _ in range(4):
            pool = await connections.connect_pool(shard(url), 1)
            stack.push_async_callback(pool.close)
            runners.append(Paced(pool, taken))
        for runner in runners:
            await stack.enter_async_context(running_engine(url, {"Paced": runner}))
        await connection.execute(
            "INSERT INTO sequencer.enrollments (sequence, subject)"
            " SELECT 's', 'u' || n FROM generate_series(1, 300) AS n"
        )
        await until(connection, ALL_ENDED)
    begun = sorted(at for runner in runners for at in runner.begun)
    assert len(begun) == 300
    assert all(runner.begun for runner in runners)
    # from no point on more calls than the rate allows, but for what the last second may add
    for number, at in enumerate(begun):
        assert number <= RATE * (at - begun[0]) + 0.05 * RATE + 1
    row = await connection.fetchrow("SELECT * FROM sequencer.rates")
    permits = sum(taken)
    # a block begins where another one ends: together they are as long as their permits
    assert permits / RATE <= (row["next_at"] - start).total_seconds() + 0.03
    assert len(taken) < 150  # in blocks
    assert (row["runner"], row["per_second"]) == ("Paced", RATE)
    assert row["reached_at"] > start


async def permits_of(database: str, calls: int, count: int, per_second: float) -> list[float]:
    """Take blocks in four sessions at the same time. Return when each begins."""
    pools = [await connections.connect_pool(shard(database), 1) for _ in range(4)]

    async def session(pool: asyncpg.Pool) -> list[float]:
        blocks = [
            await shared_rates.take(pool, "Email", per_second, count, LOG) for _ in range(calls)
        ]
        return [first for first, _ in blocks]

    try:
        return [at for one in await asyncio.gather(*map(session, pools)) for at in one]
    finally:
        for pool in pools:
            await pool.close()


@pytest.mark.parametrize(("count", "per_second"), [(20, 100.0), (1, 4.0), (200, 1000.0)])
async def test_the_whole_rate_is_used_while_calls_wait(
    connection: asyncpg.Connection, database: str, count: int, per_second: float
) -> None:
    start = await connection.fetchval("SELECT clock_timestamp()")
    begins = await permits_of(database, 10, count, per_second)
    end = await connection.fetchval("SELECT next_at FROM sequencer.rates")
    wanted = timedelta(seconds=len(begins) * count / per_second)
    assert (
        wanted - timedelta(milliseconds=30) <= end - start <= wanted / 0.95 + timedelta(seconds=9)
    )
    # without a gap: each begins when the one before ends
    gaps = [b - a for a, b in zip(sorted(begins), sorted(begins)[1:], strict=False)]
    assert gaps == pytest.approx([count / per_second] * len(gaps), abs=1e-5)


async def test_nothing_passes_while_the_row_is_locked_or_the_database_refuses(
    connection: asyncpg.Connection, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_rates, "LOCK_TIMEOUT", 0.2)
    monkeypatch.setattr(shared_rates, "ERROR_PAUSE", 0.01)
    pool = await connections.connect_pool(shard(database), 1)
    try:
        await shared_rates.take(pool, "Email", 10, 1, LOG)
        async with connection.transaction():
            await connection.execute("SELECT FROM sequencer.rates FOR UPDATE")
            waiting = asyncio.create_task(shared_rates.take(pool, "Email", 10, 1, LOG))
            await until(
                connection,
                "SELECT count(*) >= 1 FROM pg_stat_activity WHERE wait_event = 'tuple'"
                " OR wait_event = 'transactionid'",
            )
            locked_until = await connection.fetchval("SELECT clock_timestamp()")
            assert not waiting.done()
        first, present = await waiting
        next_at = await connection.fetchval("SELECT next_at FROM sequencer.rates")
        # not of the time for which it was locked
        assert next_at >= locked_until - timedelta(milliseconds=25) + timedelta(seconds=0.1)
        assert first > present - 0.1
        await connection.execute("ALTER TABLE sequencer.rates RENAME TO gone")
        waiting = asyncio.create_task(shared_rates.take(pool, "Email", 10, 1, LOG))
        done, _ = await asyncio.wait([waiting], timeout=0.3)
        assert not done
        await connection.execute("ALTER TABLE sequencer.gone RENAME TO rates")
        async with asyncio.timeout(PATIENCE):
            await waiting
    finally:
        await pool.close()


async def test_a_rate_that_is_raised_takes_effect_within_seconds(
    connection: asyncpg.Connection, database: str
) -> None:
    pool = await connections.connect_pool(shard(database), 1)
    try:
        await shared_rates.take(pool, "Email", 0.0001, 1, LOG)
        for rate, least, most in ((0.0001, 9000, 10_000), (100, 9, 10)):
            first, present = await shared_rates.take(pool, "Email", rate, 1, LOG)
            assert least < first - present <= most
    finally:
        await pool.close()
