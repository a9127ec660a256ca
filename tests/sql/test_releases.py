"""From the first release on, files of sql/ are only added, and an upgraded schema is the same as a
new one. Until there is a second file, the tests have a migration of their own.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import asyncpg
import pytest

import sequencerd
from sequencerd.core.routing import ShardNumber
from sequencerd.storage import migrate
from sequencerd.storage.migrations import Migration, available
from tests.helpers.engines import ALL_ENDED, Recorder, define, enroll, running_engine, until
from tests.helpers.releases import (
    RECORDS_FILE,
    Record,
    commit_of,
    copy_release,
    newest_release,
    next_migration,
    previous_release,
    read_records,
    unrecorded,
    wrong_files,
)
from tests.sql.test_golden_schema import describe

# --- the files


def test_released_files_are_unchanged() -> None:
    assert list(wrong_files(read_records(), available())) == []


def test_a_release_has_recorded_its_files(repository: Path) -> None:
    release = newest_release((repository / "CHANGELOG.md").read_text("utf-8"))
    missing = unrecorded(release, read_records(), available())
    if missing and os.environ.get("RENEW"):
        with RECORDS_FILE.open("a", encoding="utf-8") as file:
            file.writelines(" ".join(record) + "\n" for record in missing)
        missing = unrecorded(release, read_records(), available())
    assert not missing, "record them: RENEW=1 make test T=tests/sql/test_releases.py"
    assert release in (None, sequencerd.__version__)


def test_changes_of_released_files_are_found() -> None:
    first, second = available()[0], next_migration()
    released = [Record("1.0.0", one.name, one.checksum) for one in (first, second)]
    assert list(wrong_files(released, [first, second])) == []
    later = replace(second, version=second.version + 1, name=f"{second.version + 1:04}_x.sql")
    assert list(wrong_files(released, [first, second, later])) == []
    for migrations, said in (
        ([first], "is gone"),
        ([first, replace(second, sql=second.sql + "-- a comment\n")], "was changed"),
        ([first, second, replace(first, name="0001_y.sql")], "is numbered below"),
    ):
        (wrong,) = wrong_files(released, migrations)
        assert said in wrong


def test_the_record_of_a_release() -> None:
    first, second = available()[0], next_migration()
    old = Record("1.0.0", first.name, first.checksum)
    assert newest_release("# Changelog\n\n## Unreleased\n\n## 1.0.0 (2027-01-01)\n") is None
    assert newest_release("# Changelog\n\n## 1.1.0 (2027-01-01)\n\n## 1.0.0\n") == "1.1.0"
    assert previous_release("# Changelog\n\n## 1.0.0 (2027-01-01)\n") is None
    assert previous_release("# Changelog\n\n## Unreleased\n\n## 1.0.0 (2027-01-01)\n") == "1.0.0"
    assert unrecorded(None, [], [first]) == []
    assert unrecorded("1.0.0", [], [first]) == [old]
    new = Record("1.1.0", second.name, second.checksum)
    assert unrecorded("1.1.0", [old], [first, second]) == [new]
    assert Record(*" ".join(new).split()) == new


def test_the_package_of_a_release_is_taken_from_git(repository: Path, tmp_path: Path) -> None:
    if not (repository / ".git").exists():
        pytest.skip("this is no clone")
    assert commit_of("0.0.0") is None
    folder = copy_release(commit_of("1.0.0") or "HEAD", tmp_path)
    assert (folder / "sequencerd/__main__.py").exists()
    assert (folder / "sql/0001_sequencer.sql").exists()


# --- the schema

BODIES = """
SELECT p.oid::regprocedure::text, p.prosrc || coalesce(pg_get_function_sqlbody(p.oid), '')
  FROM pg_proc AS p WHERE p.pronamespace = 'sequencer'::regnamespace
UNION ALL
SELECT c.oid::regclass::text, pg_get_viewdef(c.oid)
  FROM pg_class AS c WHERE c.relnamespace = 'sequencer'::regnamespace AND c.relkind = 'v'
UNION ALL
SELECT pg_describe_object(classoid, objoid, objsubid), description FROM pg_description
 WHERE objoid IN (SELECT oid FROM pg_class WHERE relnamespace = 'sequencer'::regnamespace
                  UNION ALL SELECT oid FROM pg_proc WHERE pronamespace = 'sequencer'::regnamespace)
UNION ALL
SELECT conname::text, 'is not validated' FROM pg_constraint
 WHERE connamespace = 'sequencer'::regnamespace AND NOT convalidated
ORDER BY 1, 2
"""
"""What the description of the schema leaves out."""

ROWS = "SELECT FROM sequencer.enrollments"
ALL = [*available(), next_migration()]


async def everything(connection: asyncpg.Connection) -> tuple[str, list[asyncpg.Record]]:
    """The schema with what is in it but for rows."""
    assert await migrate.grant(connection) == []
    return await describe(connection), await connection.fetch(BODIES)


async def upgrade(
    connection: asyncpg.Connection, old: Sequence[Migration], new: Sequence[Migration]
) -> None:
    """Make the schema of an old version, use it, and migrate it."""
    await connection.execute("DROP SCHEMA sequencer CASCADE")
    await migrate.migrate(connection, old, ShardNumber(0, 2))
    await migrate.grant(connection)
    await define(connection, "s", ("note", "Note", "{}", None))
    await enroll(connection, "s", "ada")
    await connection.execute(
        "INSERT INTO sequencer.events (enrollment_id, at, sequence, step, visit, action)"
        " SELECT id, at, 's', 'note', 1, 'enrolled'"
        " FROM sequencer.enrollments, unnest('{2020-01-01Z, 2020-02-01Z}'::timestamptz[]) AS at"
    )
    await connection.execute("ANALYZE sequencer.enrollments")
    assert await migrate.migrate(connection, new, ShardNumber(0, 2)) == list(new[len(old) :])


@pytest.mark.slow
@pytest.mark.parametrize("count", range(1, len(ALL)), ids=[one.name for one in ALL[:-1]])
async def test_an_upgraded_schema_equals_a_new_schema_and_keeps_all_rows(
    connection: asyncpg.Connection, database: str, count: int
) -> None:
    """From the schema of each version that had a last file of its own."""
    await connection.execute("DROP SCHEMA sequencer CASCADE")
    await migrate.migrate(connection, ALL, ShardNumber(0, 2))
    fresh = await everything(connection)
    await upgrade(connection, ALL[:count], ALL)
    assert await everything(connection) == fresh
    old = "SELECT count(*) FROM sequencer.events WHERE at < '2021-01-01Z'"
    assert await connection.fetchval(old) == 2
    # its daemons work on it, with the statements of this version
    async with running_engine(database, {"Note": Recorder()}):
        await enroll(connection, "s", "bob")
        await until(connection, ALL_ENDED)
    assert await connection.fetchval(
        "SELECT array_agg(next ORDER BY id) FROM sequencer.enrollments"
    ) == ["ada", "bob"]


@pytest.mark.slow
async def test_a_migration_whose_result_depends_on_the_rows_is_found(
    connection: asyncpg.Connection,
) -> None:
    *old, last = ALL
    await connection.execute("DROP SCHEMA sequencer CASCADE")
    await migrate.migrate(connection, ALL)
    fresh = await everything(connection)
    for statement in (
        "ALTER TABLE sequencer.enrollments ADD COLUMN more text",
        "COMMENT ON TABLE sequencer.steps IS 'Others.'",
    ):
        depending = f"DO $$ BEGIN IF EXISTS ({ROWS}) THEN {statement}; END IF; END $$"
        await upgrade(connection, old, [*old, replace(last, sql=last.sql + depending)])
        assert await everything(connection) != fresh
