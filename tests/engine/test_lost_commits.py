"""A server that has lost its latest commits, as an asynchronous standby that was promoted: ids and
numbers of transactions are used again, while a daemon remembers the lost ones.
"""

from __future__ import annotations

import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import asyncpg
import pytest

from sequencerd.storage import migrate
from sequencerd.storage.embedded import PostgresPrograms
from tests.helpers.clusters import Cluster, stoppable
from tests.helpers.databases import copy_data, with_login
from tests.helpers.engines import (
    ALL_ENDED,
    Held,
    Recorder,
    define,
    enroll,
    running_engine,
    until,
)

TURN_TO = """
    DO $$ BEGIN
        WHILE pg_current_xact_id()::text::bigint < {before} LOOP COMMIT; END LOOP;
    END $$
"""


class Losing:
    """A server whose present state can be restored later."""

    def __init__(self, cluster: Cluster, copy: Path) -> None:
        self._cluster = cluster
        self._copy = copy

    def keep(self) -> None:
        """What is committed from now on will be lost."""
        self._cluster.programs.run("pg_ctl", "-D", self._cluster.data, "-m", "fast", "-w", "stop")
        copy_data(self._cluster.data, self._copy)
        self._cluster.start()

    def lose(self) -> None:
        self._cluster.stop()
        subprocess.run(["rm", "-r", self._cluster.data], check=True)
        copy_data(self._copy, self._cluster.data)
        self._cluster.start()


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    with stoppable(PostgresPrograms.find()) as made:
        yield made


@pytest.fixture
def losing(cluster: Cluster, tmp_path: Path) -> Losing:
    return Losing(cluster, tmp_path / "copy")


@asynccontextmanager
async def session(cluster: Cluster) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(cluster.url)
    yield connection
    await connection.close()


async def test_definitions_are_not_taken_for_lost_ones_with_the_same_revisions(
    cluster: Cluster, losing: Losing
) -> None:
    async with session(cluster) as connection:
        await migrate.migrate(connection)
        await connection.execute("CREATE ROLE daemon SUPERUSER NOLOGIN")
    losing.keep()
    call = Recorder()
    revision = "SELECT revision FROM sequencer.sequences"
    async with session(cluster) as connection:
        await define(connection, "s", ("call", "Call", '{"text": "lost"}', None))
        lost = await connection.fetchval(revision)
        await connection.execute("ALTER ROLE daemon LOGIN")
        async with running_engine(with_login(cluster.url, "daemon"), {"Call": call}):
            losing.lose()
            async with session(cluster) as after:
                await define(after, "s", ("call", "Call", '{"text": "present"}', None))
                assert await after.fetchval(revision) == lost
                await after.execute("ALTER ROLE daemon LOGIN")
                # it is read when the daemon listens again
                await until(
                    after,
                    "SELECT EXISTS (SELECT FROM pg_locks WHERE mode = 'ExclusiveLock'"
                    " AND locktype = 'advisory')",
                )
                await enroll(after, "s", "ada")
                await until(after, ALL_ENDED)
    assert call.programs == [{"text": "present"}]


@pytest.mark.parametrize("count", [1, 60])
async def test_a_result_is_not_taken_for_that_of_a_row_with_the_same_numbers(
    cluster: Cluster, losing: Losing, count: int
) -> None:
    """The subject enrolled after the loss gets the id of one whose side effect is in flight, and
    the last transaction that has written its row the number of the one that leased the other.
    """
    async with session(cluster) as connection:
        await migrate.migrate(connection)
        await define(connection, "s", ("call", "Call", "{}", None))
        # the daemon stays away until all numbers are as the test needs them
        await connection.execute("CREATE ROLE daemon SUPERUSER NOLOGIN")
    losing.keep()
    held = Held()
    insert = (
        "INSERT INTO sequencer.enrollments (sequence, subject, wake_at)"
        f" SELECT 's', $1 || n, $2 FROM generate_series(1, {count}) AS n"
    )
    async with session(cluster) as connection:
        await connection.execute("ALTER ROLE daemon LOGIN")
        for _ in range(100):
            await connection.execute("SELECT pg_current_xact_id()")
        await connection.execute(insert, "ada", None)
        call = Recorder(held, batch_size=100, concurrency=100)
        url = with_login(cluster.url, "daemon")
        async with running_engine(url, {"Call": call}) as engine:
            await until(
                connection,
                f"SELECT count(*) = {count} FROM sequencer.enrollments WHERE leased_by IS NOT NULL",
            )
            await held.begun.wait()
            numbers = await connection.fetch("SELECT DISTINCT xmin FROM sequencer.enrollments")
            assert len(numbers) == 1
            losing.lose()
            async with session(cluster) as after:
                await after.execute(TURN_TO.format(before=numbers[0]["xmin"] - 1))
                never = await after.fetchval("SELECT 'infinity'::timestamptz")
                await after.execute(insert, "bob", never)
                rows = await after.fetch("SELECT id, subject, xmin FROM sequencer.enrollments")
                assert {row["xmin"] for row in rows} == {numbers[0]["xmin"]}
                assert {row["id"] for row in rows} == set(range(1, count + 1))
                await after.execute("ALTER ROLE daemon LOGIN")
                held.released.set()
                await until(
                    after,
                    f"SELECT count(*) >= {count} FROM sequencer.events WHERE action <> 'enrolled'",
                )
                assert await after.fetchval(
                    f"SELECT count(*) = {count} FROM sequencer.enrollments"
                    " WHERE status = 'active' AND entered_at IS NULL"
                )
                await until(
                    after,
                    f"SELECT count(*) = {count} FROM sequencer.events"
                    " WHERE action = 'stale_result'",
                )
            assert not engine.in_flight
    assert len(call.keys) == count
