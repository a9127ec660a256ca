"""The heartbeat and what daemons report, on a real database."""

from __future__ import annotations

import asyncio

import asyncpg

from sequencerd.engine.clock import Clock
from tests.helpers.command_line import Command
from tests.helpers.engines import running_engine, until

ALIVE = "SELECT count(*) = 1 FROM sequencer.daemons WHERE alive_until > now()"
NONE = "SELECT count(*) = 0 FROM sequencer.daemons"
REPORTED = "SELECT count(*) = $1 FROM sequencer.problems"


async def test_a_daemon_is_alive_until_it_ends(
    database: str, connection: asyncpg.Connection
) -> None:
    async with running_engine(database, lease=1.0):
        await until(connection, ALIVE)
        first = await connection.fetchrow("SELECT * FROM sequencer.daemons")
        await until(
            connection,
            "SELECT alive_until > $1 FROM sequencer.daemons",
            first["alive_until"],
        )
        assert (
            await connection.fetchval("SELECT started_at FROM sequencer.daemons")
            == (first["started_at"])
        )
    assert await connection.fetchval(NONE)


async def test_a_dead_daemon_does_not_live_until_the_time_of_a_clock_that_was_ahead(
    database: str, connection: asyncpg.Connection
) -> None:
    await connection.execute(
        "INSERT INTO sequencer.daemons (name, alive_until)"
        " VALUES ('dead', now() + interval '5 years'), ('alive', now() + interval '1 hour')"
    )
    async with running_engine(database, lease=1.0):
        await until(connection, "SELECT count(*) = 2 FROM sequencer.daemons")
        await until(connection, "SELECT count(*) = 0 FROM sequencer.daemons WHERE name = 'dead'")
        assert await connection.fetchval("SELECT true FROM sequencer.daemons WHERE name = 'alive'")


async def test_no_lock_on_enrollments_holds_the_heartbeat_up(
    database: str, connection: asyncpg.Connection
) -> None:
    other = await asyncpg.connect(database)
    async with running_engine(database, lease=1.0):
        await until(connection, ALIVE)
        async with other.transaction():
            await other.execute("LOCK TABLE sequencer.enrollments, sequencer.events")
            since = await connection.fetchval("SELECT now()")
            await until(
                connection,
                "SELECT alive_until > $1::timestamptz + interval '3 seconds'"
                " FROM sequencer.daemons",
                since,
            )
    await other.close()


async def test_problems_are_shown_until_they_end_or_the_daemon_is_dead(
    database: str, connection: asyncpg.Connection, sequencerd: Command
) -> None:
    now = Clock().now()
    async with running_engine(database) as engine:
        await until(connection, ALIVE)
        problems = engine.problems
        problems.report("runner", "Email", "login refused", since=now, waiting=3)
        problems.report("quarantined", "7", "denied", since=now, sequence="s", step="a")
        await until(connection, REPORTED, 2)
        problems.report("runner", "Email", "login refused", since=now, waiting=4)
        problems.clear("quarantined", "7")
        await until(connection, "SELECT waiting = 4 FROM sequencer.problems WHERE about = 'Email'")
        await until(connection, REPORTED, 1)
        out = await asyncio.to_thread(sequencerd, "status")
        assert "login refused" in out
        found = await asyncio.to_thread(sequencerd, "doctor", code=1)
        assert "Email has been down since" in found
        assert "login refused" in found
        # another daemon's, which is dead, counts for nothing, and goes
        await connection.execute(
            "INSERT INTO sequencer.daemons (name, alive_until) VALUES ('dead', now())"
        )
        await connection.execute(
            "INSERT INTO sequencer.problems (daemon, kind, about, since, message)"
            " VALUES ('dead', 'runner', 'SMS', now(), 'gone')"
        )
        assert "gone" not in await asyncio.to_thread(sequencerd, "status")
        problems.clear("runner", "Email")  # and so it beats at once
        await until(connection, "SELECT count(*) = 1 FROM sequencer.daemons")
        await until(connection, REPORTED, 0)
