"""Connections: how sessions are reset, and how times are written."""

from __future__ import annotations

import asyncio
import socket
from contextlib import suppress
from pathlib import Path
from typing import cast

import asyncpg
import pytest

from sequencerd.storage import connections, migrate
from sequencerd.storage.statements import QUERIES
from tests.helpers.databases import shard
from tests.helpers.engines import ALL_ENDED, define, enroll, running_engine, until
from tests.helpers.pooler import pgbouncer
from tests.helpers.waiting import eventually
from tests.sql.test_golden_schema import describe


@pytest.mark.parametrize("runs_others", [True, False])
async def test_a_transaction_that_was_left_open_is_rolled_back(
    database: str, runs_others: bool
) -> None:
    pool = await connections.connect_pool(shard(database), 1, runs_others=runs_others)
    async with connections.borrow(pool) as connection:
        await connection.execute("BEGIN; SET LOCAL work_mem = '1234kB'")
    async with connections.borrow(pool) as connection:
        assert not connection.is_in_transaction()
        assert await connection.fetchval("SHOW work_mem") != "1234kB"
    await pool.close()


def test_a_name_that_cannot_be_resolved_is_reported() -> None:
    error = socket.gaierror(socket.EAI_NONAME, "Name or service not known")
    for url in ("postgresql://db1,db2/app", "host=db1,db2 dbname=app"):
        explained = connections.explain(error, shard(url))
        assert explained == "db1, db2: Name or service not known"


async def test_times_are_written_as_they_were_read(database: str) -> None:
    """A page begins where the last one ended."""
    async with connections.connected(shard(database)) as connection:
        for text in ("-infinity", "infinity", "2026-03-02 09:00:00.000001+00"):
            await connection.execute("SET timezone = 'UTC'")
            read = await connection.fetchval("SELECT $1::text::timestamptz", text)
            assert await connection.fetchval("SELECT $1::timestamptz::text", read) == text


async def test_settings_changed_by_functions_of_applications_are_reset(database: str) -> None:
    pool = await connections.connect_pool(shard(database), 1, runs_others=True)
    async with connections.borrow(pool) as connection:
        await connection.execute("SELECT set_config('search_path', '', false)")
    async with connections.borrow(pool) as connection:
        assert await connection.fetchval("SHOW search_path") != '""'
    await pool.close()


async def test_the_longest_wait_for_a_connection_is_known(database: str) -> None:
    pool = await connections.connect_pool(shard(database), 1)

    async def borrow() -> None:
        async with connections.borrow(pool):
            pass

    async with connections.borrow(pool):
        assert connections.longest_wait(pool) == 0
        first = asyncio.create_task(borrow())
        await eventually(lambda: connections.longest_wait(pool) > 0.1)
        second = asyncio.create_task(borrow())
        await asyncio.sleep(0)
        assert connections.longest_wait(pool) > 0.1
    await asyncio.gather(first, second)
    assert connections.longest_wait(pool) == 0
    await pool.close()


async def test_a_cancellation_remains_one_if_its_rollback_fails(database: str) -> None:
    pool = await connections.connect_pool(shard(database), 1)
    begun = asyncio.Event()

    async def work() -> None:
        async with connections.borrow(pool):
            begun.set()
            try:
                await asyncio.Event().wait()
            finally:
                raise asyncpg.InterfaceError("the connection is lost")

    task = asyncio.create_task(work())
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await pool.close()


def test_the_reason_of_a_failed_connection_is_a_line() -> None:
    error = asyncpg.PostgresError("no more connections")
    error.detail, error.hint = "others hold them", "Close some."
    assert "\n" in str(error)
    assert connections.explain(error, shard("")) == "no more connections; Close some."


async def test_the_server_ends_what_was_abandoned_while_it_waits_for_a_lock(
    database: str, connection: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the table stays locked, so that repeated statements do not use up all connections."""
    soon = QUERIES["check_client"].replace("5s", "50ms")
    monkeypatch.setitem(cast("dict[str, str]", QUERIES), "check_client", soon)
    monkeypatch.setattr(connections, "COMMAND_TIMEOUT", 0.3)
    await connection.execute("CREATE TABLE held ()")
    pool = await connections.connect_pool(shard(database), 1)
    other = await asyncpg.connect(database)
    async with other.transaction():
        await other.execute("LOCK TABLE held")
        pids = []
        with suppress(TimeoutError):
            async with connections.borrow(pool) as borrowed:
                pids.append(borrowed.get_server_pid())
                await borrowed.execute("SELECT FROM held")
                pids.clear()
        assert pids
        await until(
            connection,
            "SELECT NOT EXISTS (SELECT FROM pg_stat_activity WHERE pid = ANY ($1))",
            pids,
        )
    await other.close()
    await pool.close()


async def test_a_pool_in_session_mode_needs_a_setting(
    database: str, connection: asyncpg.Connection, tmp_path: Path
) -> None:
    with (
        pgbouncer(database, tmp_path, mode="session") as through,
        pytest.raises(asyncpg.ProtocolViolationError) as refused,
    ):
        await connections.connect_pool(shard(through), 1)
    setting = "ignore_startup_parameters = sequencer.notify"
    assert f"in session mode, set {setting}" in connections.explain(refused.value, shard(through))
    enough = f"{setting}\ndefault_pool_size = 12"
    await define(connection, "s", ("a", "GoTo", "{}", None))
    with pgbouncer(database, tmp_path, mode="session", settings=enough) as through:
        async with running_engine(through):
            await enroll(connection, "s", "ada")
            await until(connection, ALL_ENDED)


@pytest.mark.parametrize("pooled", [True, False])
async def test_transactions_have_the_level_of_isolation_that_claims_need(
    database: str, connection: asyncpg.Connection, pooled: bool
) -> None:
    """Whatever the default of the database is: with others, statements that skip locked rows fail
    beside each other.
    """
    show = "SHOW transaction_isolation"
    name = await connection.fetchval("SELECT current_database()")
    await connection.execute(
        f"ALTER DATABASE \"{name}\" SET default_transaction_isolation = 'serializable'"
    )
    pool = await connections.connect_pool(shard(database), 1, pooled=pooled)
    async with connections.borrow(pool) as borrowed:
        async with connections.transaction(borrowed):
            assert await borrowed.fetchval(show) == "read committed"
        async with connections.transaction(borrowed, isolation="repeatable_read"):
            assert await borrowed.fetchval(show) == "repeatable read"
        if not pooled:
            assert await borrowed.fetchval(show) == "read committed"
    await pool.close()


async def test_the_schema_is_the_same_where_backslashes_in_strings_are_escapes(
    connection: asyncpg.Connection, database: str
) -> None:
    """A database that was upgraded from a very old version may have the setting."""
    await migrate.grant(connection)
    usual = await describe(connection)
    name = await connection.fetchval("SELECT quote_ident(current_database())")
    await connection.execute("DROP SCHEMA sequencer CASCADE")
    await connection.execute(f"ALTER DATABASE {name} SET standard_conforming_strings = off")
    async with connections.connected(shard(database)) as other:
        await migrate.migrate(other)
        await migrate.grant(other)
    assert await describe(connection) == usual
