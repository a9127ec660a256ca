"""`sequencerd import-original` into several shards: each row goes to the shard of its subject."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping

import asyncpg
import pytest

from sequencerd.core.routing import shard_of
from sequencerd.definitions.original import enrollments
from tests.cli.test_shards import COMMITTING, KILL, commits_wait
from tests.definitions.test_import_original import FIRST_ROWS, TABLES, send_reminder
from tests.helpers.command_line import Command
from tests.helpers.engines import until
from tests.helpers.shards import NAMES, NOWHERE, configure

pytestmark = pytest.mark.slow  # commands on three databases

MANY = """
INSERT INTO runners SELECT n, 'user-' || n, 1, 11, true, now(), NULL, now()
  FROM generate_series(100, 119) AS n
"""
SUBJECTS = ["ada", "bob", "eve", *(f"user-{n}" for n in range(100, 120))]
ROWS = "SELECT subject, sequence FROM sequencer.enrollments ORDER BY id"

Shards = Mapping[str, asyncpg.Connection]


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(enrollments, "BATCH_SIZE", 3)


@pytest.fixture
async def original(connection: asyncpg.Connection) -> asyncpg.Connection:
    """A database of the original's, apart from the shards."""
    await connection.execute(TABLES + FIRST_ROWS + MANY)
    return connection


@pytest.fixture
def options(database: str) -> tuple[str, ...]:
    return "import-original", "--database", database


async def check_whole(shards: Shards) -> None:
    """All is there once, each subject in its shard, and the definitions in both."""
    subjects: list[str] = []
    for number, name in enumerate(NAMES):
        rows = await shards[name].fetch(ROWS)
        assert {shard_of(row["subject"], 2) for row in rows} == {number}
        subjects += [row["subject"] for row in rows if row["sequence"] == "Onboarding"]
        known = await shards[name].fetch("SELECT name FROM sequencer.sequences ORDER BY name")
        assert [row["name"] for row in known] == ["Onboarding", "Trial"]
    assert sorted(subjects) == sorted(SUBJECTS)


async def count(shards: Shards) -> int:
    counts = [
        await one.fetchval(
            "SELECT (SELECT count(*) FROM sequencer.enrollments)"
            " + (SELECT count(*) FROM sequencer.sequences)"
        )
        for one in shards.values()
    ]
    return sum(counts)


@pytest.mark.slow
async def test_each_row_is_imported_once_into_the_shard_of_its_subject(
    sharded: Command,
    original: asyncpg.Connection,
    shards: Shards,
    options: tuple[str, ...],
) -> None:
    await original.execute("INSERT INTO runners VALUES (20, NULL, 1, 11, true, now(), NULL, now())")
    dry = sharded(*options).splitlines()
    assert dry[1:] == [
        "Onboarding: would be created; enrollments: 23 active",
        "Trial: would be created; enrollments: 1 completed, 1 cancelled",
        "1 left out: no dataLookup, or a longer one than 1,000 bytes (runners 20)",
        "dry run; stop the original, then repeat the command with --apply",
    ]
    assert await count(shards) == 0
    assert sharded(*options, "--apply").splitlines()[1:] == [
        "Onboarding: is created; enrollments: 23 active",
        "Trial: is created; enrollments: 1 completed, 1 cancelled",
        dry[3],
    ]
    await check_whole(shards)
    for one in shards.values():  # not that of an enrollment of the original in another shard
        assert await one.fetchval("SELECT sequencer.enroll('Trial', 'new')") == 120

    await original.execute("INSERT INTO runners VALUES (120, 'z', 1, 11, true, now(), NULL, now())")
    told = json.loads(sharded(*options, "--apply", "--json"))
    assert told["already_here"] == 25
    assert told["sequences"][0] == {
        "name": "Onboarding",
        "is_here": True,
        "enrollments": {"active": 1, "completed": 0, "cancelled": 0},
    }


async def test_one_shard_gets_its_own_rows_and_the_others_follow(
    sharded: Command, original: asyncpg.Connection, shards: Shards, options: tuple[str, ...]
) -> None:
    sharded(*options, "--apply", "--shard", "a")
    assert await shards["a"].fetchval("SELECT count(*) FROM sequencer.enrollments")
    assert not await shards["b"].fetchval("SELECT count(*) FROM sequencer.sequences")
    sharded(*options, "--apply")
    await check_whole(shards)
    sharded("import-original", code=2)
    assert "specify the original's database: import-original --database URL" in sharded.errors


async def test_questions_are_about_all_shards(
    sharded: Command, original: asyncpg.Connection, shards: Shards, options: tuple[str, ...]
) -> None:
    await send_reminder(original)
    await original.execute(
        "INSERT INTO runners SELECT n, 'late-' || n, 3, 30, true, now(), NULL, now()"
        " FROM generate_series(200, 209) AS n"
    )
    sharded(*options, "--apply", code=1)
    assert "nothing is imported: answer the questions above" in sharded.errors
    assert await count(shards) == 0
    asked = sharded(*options)
    assert asked.count("question: ") == 1
    assert "enrollments at a Conditional: 11 (Reminder/Conditional-30: 11)" in asked


async def test_a_name_that_one_shard_has_is_reported_with_it(
    sharded: Command, original: asyncpg.Connection, options: tuple[str, ...]
) -> None:
    (sharded.folder / "trial.yaml").write_text("name: Trial\nsteps: [{name: other, type: GoTo}]\n")
    sharded("apply", "trial.yaml", "--shard", "b")
    text = sharded(*options, code=1)
    assert "another sequence has that name here; rename one of them (in b)" in text


# --- failures in the middle


async def test_a_shard_that_is_lost_during_the_import_leaves_nothing_in_any_shard(
    sharded: Command,
    original: asyncpg.Connection,
    shards: Shards,
    options: tuple[str, ...],
    shards_url: str,
) -> None:
    await shards["b"].execute(
        """
        CREATE FUNCTION die() RETURNS trigger LANGUAGE plpgsql AS
            $$ BEGIN PERFORM pg_terminate_backend(pg_backend_pid()); RETURN NEW; END $$;
        CREATE TRIGGER die BEFORE INSERT ON sequencer.enrollments
            FOR EACH ROW WHEN (NEW.subject > 'user-11') EXECUTE FUNCTION die();
        """
    )
    sharded(*options, "--apply", code=1)
    assert "shard b: " in sharded.errors
    assert "nothing was changed in any shard" in sharded.errors
    assert await count(shards) == 0
    configure(sharded, a=shards_url, b=NOWHERE)
    sharded(*options, "--apply", code=1)
    assert "shard b: cannot connect to the database" in sharded.errors
    assert await count(shards) == 0
    configure(sharded, a=shards_url, b=shards_url)
    await shards["b"].execute("DROP TRIGGER die ON sequencer.enrollments")
    sharded(*options, "--apply")
    await check_whole(shards)


async def test_a_shard_that_is_lost_before_its_commit_is_completed_by_a_second_run(
    sharded: Command,
    original: asyncpg.Connection,
    shards: Shards,
    options: tuple[str, ...],
    shards_url: str,
) -> None:
    async with commits_wait(shards_url) as slow:
        configure(sharded, a=slow, b=shards_url)
        importing = asyncio.create_task(asyncio.to_thread(sharded, *options, "--apply", code=1))
        await until(shards["b"], COMMITTING)
        assert await shards["b"].fetchval(KILL) == 1
    await importing
    assert "the import is in a, not in b; repeat the command when all shards can be reached" in (
        sharded.errors
    )
    configure(sharded, a=shards_url, b=shards_url)
    assert "Onboarding: is created" in sharded(*options, "--apply")
    await check_whole(shards)
    assert "25 exist already" in sharded(*options, "--apply")
