"""Migrations are applied once, in order, by one process at a time; other schemas are refused."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import asyncpg
import pytest

from sequencerd.errors import DatabaseError, MigrationError
from sequencerd.storage import migrate, migrations
from sequencerd.storage.connections import Shard, connect
from sequencerd.storage.migrations import Migration
from sequencerd.storage.statements import QUERIES
from tests.helpers.command_line import Command
from tests.helpers.databases import execute, make_login, shard, with_database
from tests.helpers.engines import until

MORE = Migration(9001, "9001_more.sql", "CREATE TABLE sequencer.more (id integer)")


def test_line_endings_do_not_change_a_migration() -> None:
    """A checkout on Windows may have others."""
    text = "CREATE TABLE a ();\nCREATE TABLE b ();\n"
    known, other = (Migration(1, "a", sql) for sql in (text, text.replace("\n", "\r\n")))
    assert known.checksum == other.checksum != Migration(1, "a", text + " ").checksum


async def test_migrations_are_applied_once(connection: asyncpg.Connection) -> None:
    assert await migrate.migrate(connection) == []
    await migrate.check(connection)


async def test_concurrent_migrations_apply_once(server: str) -> None:
    name = "migrate_race"
    await execute(server, f"CREATE DATABASE {name}")
    connections = [await asyncpg.connect(with_database(server, name)) for _ in range(3)]
    try:
        applied = await asyncio.gather(*(migrate.migrate(c) for c in connections))
        assert sorted(len(one) for one in applied) == [0, 0, len(migrations.available())]
    finally:
        for connection in connections:
            await connection.close()
        await execute(server, f"DROP DATABASE {name} WITH (FORCE)")


async def test_a_database_without_the_schema_is_recognised(server: str) -> None:
    connection = await asyncpg.connect(server)
    with pytest.raises(MigrationError, match="run: sequencerd migrate"):
        await migrate.check(connection)
    await connection.close()


async def test_a_newer_schema_is_refused(connection: asyncpg.Connection) -> None:
    await migrate.migrate(connection, [*migrations.available(), MORE])
    with pytest.raises(MigrationError, match=r"newer than this version.*9001_more"):
        await migrate.migrate(connection)
    with pytest.raises(MigrationError, match="newer"):
        await migrate.check(connection)


async def test_a_changed_file_is_refused(connection: asyncpg.Connection) -> None:
    first, *rest = migrations.available()
    with pytest.raises(MigrationError, match=r"0001_sequencer.sql was changed"):
        await migrate.migrate(connection, [replace(first, sql=first.sql + "-- more"), *rest])


async def test_an_older_schema_is_reported(
    connection: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    newer = [*migrations.available(), MORE]
    monkeypatch.setattr(migrate, "available", lambda: newer)
    with pytest.raises(MigrationError, match=r"9001_more.sql is missing.*sequencerd migrate"):
        await migrate.check(connection)


async def test_a_migration_that_fails_leaves_nothing(connection: asyncpg.Connection) -> None:
    wrong = replace(MORE, sql=MORE.sql + "; SELECT nonsense")
    with pytest.raises(MigrationError, match=r"9001_more.sql failed at line 1: .*nonsense"):
        await migrate.migrate(connection, [*migrations.available(), wrong])
    assert await connection.fetchval("SELECT to_regclass('sequencer.more') IS NULL")
    await migrate.check(connection)


SLOW = replace(MORE, sql=f"{MORE.sql};\nSELECT pg_sleep(1)")
HAS_MORE = "SELECT to_regclass('sequencer.more') IS NOT NULL"


async def test_the_time_limits_of_a_login_do_not_end_a_migration(
    connection: asyncpg.Connection, database: str
) -> None:
    limits = dict.fromkeys(("statement_timeout", "lock_timeout"), "100ms")
    if connection.get_server_version().major >= 17:
        limits["transaction_timeout"] = "100ms"
    limited = await asyncpg.connect(database, server_settings=limits)
    async with connection.transaction():
        await connection.execute(QUERIES["lock_migrations"])
        waiting = asyncio.create_task(migrate.migrate(limited, [*migrations.available(), SLOW]))
        await until(connection, "SELECT count(*) = 1 FROM pg_locks WHERE NOT granted")
        await asyncio.sleep(0.2)  # longer than the limits
    assert await waiting == [SLOW]
    assert await limited.fetchval("SHOW statement_timeout") == "100ms"
    await limited.close()


async def test_a_schema_is_created_whatever_the_settings_of_the_database(server: str) -> None:
    await execute(server, "CREATE DATABASE strict")
    try:
        await execute(server, "ALTER DATABASE strict SET plpgsql.extra_errors = 'all'")
        strict = await asyncpg.connect(with_database(server, "strict"))
        assert await migrate.migrate(strict) == migrations.available()
        assert await strict.fetchval("SHOW plpgsql.extra_errors") == "all"
        await strict.close()
    finally:
        await execute(server, "DROP DATABASE strict WITH (FORCE)")


async def test_a_migration_gives_up_a_locked_table_soon(
    connection: asyncpg.Connection, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(QUERIES, "limit_locks", "SET LOCAL lock_timeout = '50ms'")
    alter = replace(MORE, sql=f"{MORE.sql};\nALTER TABLE sequencer.enrollments ADD more text")
    wanted = [*migrations.available(), alter]
    other = await asyncpg.connect(database)
    async with other.transaction():
        await other.execute("SELECT FROM sequencer.enrollments")
        with pytest.raises(MigrationError, match=r"line 2: .*nothing was applied: run it again"):
            await migrate.migrate(connection, wanted)
    assert not await connection.fetchval(HAS_MORE)
    assert await migrate.migrate(connection, wanted) == [alter]
    await other.close()


SLEEPS = "SELECT count(*) = 1 FROM pg_stat_activity WHERE wait_event = 'PgSleep' AND datname = $1"


async def test_a_connection_that_is_lost_leaves_nothing(
    connection: asyncpg.Connection, sequencerd: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    endless = replace(MORE, sql=f"{MORE.sql};\nSELECT pg_sleep(600)")
    monkeypatch.setattr(migrate, "available", lambda: [*migrations.available(), endless])
    name = await connection.fetchval("SELECT current_database()")
    work = asyncio.create_task(asyncio.to_thread(sequencerd, "migrate", code=1))
    await until(connection, SLEEPS, name)
    await connection.fetch(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE wait_event = 'PgSleep'"
        " AND datname = $1",
        name,
    )
    await work
    assert "migration 9001_more.sql failed at line 2: connection was" in sequencerd.errors
    assert "nothing was applied: run it again" in sequencerd.errors
    assert not await connection.fetchval(HAS_MORE)
    assert await migrate.migrate(connection, [*migrations.available(), MORE]) == [MORE]


async def test_a_process_that_is_killed_leaves_nothing(
    connection: asyncpg.Connection, database: str
) -> None:
    """Nor does it keep the next one from its work: the server notices that the client is gone."""
    wanted = [*migrations.available(), SLOW]
    killed = await asyncpg.connect(database)
    work = asyncio.create_task(migrate.migrate(killed, wanted))
    await until(connection, SLEEPS, await connection.fetchval("SELECT current_database()"))
    killed.terminate()
    with pytest.raises(asyncpg.InterfaceError):
        await work
    assert await migrate.migrate(connection, wanted) == [SLOW]


async def test_a_standby_is_refused(
    connection: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(QUERIES, "is_standby", "SELECT true")
    with pytest.raises(DatabaseError, match="is a standby: migrate its primary"):
        await migrate.migrate(connection)


@pytest.fixture
async def logins(connection: asyncpg.Connection, database: str) -> dict[str, str]:
    """The URLs of two ordinary logins."""
    names = ("login_owner", "login_none")
    return {name: await make_login(connection, database, name) for name in names}


@pytest.mark.slow
async def test_all_tables_have_the_same_owner_for_any_migrating_user(
    connection: asyncpg.Connection, logins: dict[str, str]
) -> None:
    await connection.execute("DROP SCHEMA sequencer CASCADE")
    await connection.execute("CREATE SCHEMA sequencer AUTHORIZATION login_owner")
    owner = await connect(shard(logins["login_owner"]))
    await migrate.migrate(owner)
    await migrate.grant(owner)
    await owner.close()
    wanted = [*migrations.available(), MORE]
    await connection.execute("GRANT sequencer_daemon TO login_none")
    other = await connect(shard(logins["login_none"]))
    with pytest.raises(MigrationError, match=r"belongs to login_owner: migrate with that login"):
        await migrate.migrate(other, wanted)
    await other.close()
    await connection.execute("REVOKE sequencer_daemon FROM login_none")
    assert await migrate.migrate(connection, wanted) == [MORE]
    owners = "SELECT DISTINCT relowner::regrole::text FROM pg_class WHERE relnamespace = $1"
    assert await connection.fetch(owners.replace("$1", "'sequencer'::regnamespace")) == [
        ("login_owner",)
    ]
    assert await connection.fetchval("SELECT current_user") != "login_owner"


async def test_the_reason_of_a_statement_without_effect_is_a_line(
    logins: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """PostgreSQL 18 adds a second line, with details."""
    monkeypatch.setitem(QUERIES, "missing_grants", "SELECT 'CREATE ROLE nobody_may'")
    other = await connect(shard(logins["login_none"]))
    assert await migrate.grant(other) == [
        ("CREATE ROLE nobody_may", "permission denied to create role")
    ]
    await other.close()


async def test_a_login_that_may_not_create_the_schema_gets_the_grant(
    logins: dict[str, str], database: str
) -> None:
    other = await connect(Shard(logins["login_none"], "new"))
    name = await other.fetchval("SELECT current_database()")
    with pytest.raises(MigrationError) as raised:
        await migrate.migrate(other)
    assert str(raised.value).endswith(f"run: GRANT CREATE ON DATABASE {name} TO login_none")
    await other.close()


def test_a_file_is_divided_into_statements() -> None:
    sql = """-- first; not a statement

CREATE FUNCTION f() AS $$ -- it's one
BEGIN; END $$;
COMMENT ON FUNCTION f IS 'a; b''s "c';
CREATE TABLE "a;b" (id text DEFAULT $x$;$$;$x$); /* the
last ; */
ANALYZE
"""
    statements = list(Migration(1, "0001_x.sql", sql).statements())
    assert [line for line, _ in statements] == [3, 5, 6, 8]
    assert [text.split()[0] for _, text in statements] == ["CREATE", "COMMENT", "CREATE", "ANALYZE"]
    assert list(Migration(1, "0001_x.sql", "-- nothing;\n").statements()) == []
