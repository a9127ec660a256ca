"""Migrations: applied once, in order, by one at a time; refused where they don't belong."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import asyncpg
import pytest

from sequencerd.errors import MigrationError
from sequencerd.storage import migrate, migrations
from sequencerd.storage.migrations import Migration
from tests.helpers.databases import execute, with_database

MORE = Migration(9001, "9001_more.sql", "CREATE TABLE sequencer.more (id integer)")


async def test_applied_once(connection: asyncpg.Connection) -> None:
    assert await migrate.migrate(connection) == []
    await migrate.check(connection)


async def test_two_at_the_same_time_apply_it_once(server: str) -> None:
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


def test_a_file_is_divided_into_statements() -> None:
    sql = """-- first; not a statement

CREATE FUNCTION f() AS $$ -- it's one
BEGIN; END $$;
COMMENT ON FUNCTION f IS 'a; b''s "c';
CREATE TABLE "a;b" (id text DEFAULT $x$;$$;$x$); -- the last ;
ANALYZE
"""
    statements = list(Migration(1, "0001_x.sql", sql).statements())
    assert [line for line, _ in statements] == [3, 5, 6, 7]
    assert [text.split()[0] for _, text in statements] == ["CREATE", "COMMENT", "CREATE", "ANALYZE"]
    assert list(Migration(1, "0001_x.sql", "-- nothing;\n").statements()) == []
