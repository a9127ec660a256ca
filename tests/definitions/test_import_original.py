"""`sequencerd import-original`: tables as the original has them, with people in every state."""

from __future__ import annotations

import json
import re
from pathlib import Path

import asyncpg
import pytest

from tests.helpers.commands import Command
from tests.helpers.engines import running_engine, until, way

TABLES = """
CREATE TABLE sequences (id serial PRIMARY KEY, title varchar(255), "firstStep" integer);
CREATE TABLE steps (
    id serial PRIMARY KEY, "sequenceId" integer, "nextStep" integer, "altNextStep" integer,
    type varchar(255), config json, "requiresExternalData" boolean DEFAULT false);
CREATE TABLE runners (
    id serial PRIMARY KEY, "dataLookup" varchar(255), "sequenceId" integer, "stepId" integer,
    "isActive" boolean, "startSequence" timestamptz, "endSequence" timestamptz,
    "startStep" timestamptz);
INSERT INTO sequences VALUES (1, 'Onboarding', 12), (2, 'Trial', 20);
INSERT INTO steps VALUES
    (10, 1, NULL, NULL, 'GoTo', '{}'),
    (11, 1, 10, NULL, 'WaitForDuration', '{"amount": 3, "unit": "days"}'),
    (12, 1, 11, NULL, 'WaitForDuration', '{"amount": 1, "unit": "hours"}'),
    (13, 1, 14, NULL, 'Goal', '{"lodashCommand": "eq", "value": {"type": "get",
        "value": "data.paid"}, "compareTo": {"type": "raw", "value": true}}'),
    (14, 1, NULL, NULL, 'WaitForDuration', '{"amount": 10, "unit": "years"}'),
    (20, 2, NULL, 21, 'Conditional', '{"lodashCommand": "isString", "value": {"type": "get",
        "value": "subject"}}'),
    (21, 2, NULL, NULL, 'GoTo', NULL);
INSERT INTO runners VALUES
    (1, 'ada', 1, 11, true, now() - interval '9 days', NULL, now() - interval '2 days'),
    (2, 'bob', 1, 11, true, now() - interval '9 days', NULL, now() - interval '4 days'),
    (3, 'eve', 1, 14, true, now() - interval '9 days', NULL, now() - interval '5 days'),
    (4, 'ada', 2, 21, false, now() - interval '9 days', now() - interval '8 days', NULL),
    (5, 'bob', 2, 20, false, now() - interval '9 days', NULL, now() - interval '9 days');
"""
ROWS = (
    "SELECT subject, sequence, step, status, entered_at < now() - interval '36 hours' AS long,"
    " goals_met, ended_at IS NULL AS open FROM sequencer.enrollments ORDER BY id"
)


@pytest.fixture
async def original(connection: asyncpg.Connection) -> asyncpg.Connection:
    await connection.execute(TABLES)
    return connection


async def test_a_trial_says_all_and_does_nothing(
    sequencerd: Command, original: asyncpg.Connection
) -> None:
    lines = sequencerd("import-original").splitlines()
    assert lines == [
        "Onboarding: would be made; people: 3 active",
        "Trial: would be made; people: 1 completed, 1 cancelled",
        "dry run; stop the original, then repeat the command with --apply",
    ]
    for table in ("sequences", "enrollments", "events"):
        assert not await original.fetchval(f"SELECT count(*) FROM sequencer.{table}")


async def test_everybody_goes_on_where_they_were(
    sequencerd: Command, original: asyncpg.Connection, database: str
) -> None:
    assert "Onboarding: is made; people: 3 active" in sequencerd("import-original", "--apply")
    assert [tuple(row) for row in await original.fetch(ROWS)] == [
        ("ada", "Onboarding", "WaitForDuration-11", "active", True, [], True),
        ("bob", "Onboarding", "WaitForDuration-11", "active", True, [], True),
        ("eve", "Onboarding", "WaitForDuration-14", "active", True, ["Goal-13"], True),
        ("ada", "Trial", "GoTo-21", "completed", True, [], False),
        ("bob", "Trial", "Conditional-20", "cancelled", True, [], False),
    ]
    exported = sequencerd("export", "Onboarding")
    names = [line.split()[-1] for line in exported.splitlines() if "- name:" in line]
    assert names == [
        "WaitForDuration-12", "WaitForDuration-11", "GoTo-10", "Goal-13", "WaitForDuration-14",
    ]  # fmt: skip
    async with running_engine(database):
        await until(original, "SELECT status = 'completed' FROM sequencer.enrollments WHERE id = 2")
        ada = "SELECT wake_at - entered_at = '3 days' FROM sequencer.enrollments WHERE id = 1"
        await until(original, ada)
        # eve has met the goal, and is not pulled again
        await original.execute("UPDATE sequencer.enrollments SET data = '{\"paid\": true}'")
        pulled = "SELECT step = 'WaitForDuration-14' FROM sequencer.enrollments WHERE id = 1"
        await until(original, pulled)
        assert await way(original, 3) == []


async def test_the_page_can_be_followed(
    sequencerd: Command, original: asyncpg.Connection, repository: Path
) -> None:
    (block,) = re.findall(
        r"```sh\n(.*?)```", (repository / "docs/import.md").read_text(), re.DOTALL
    )
    trial, done = [sequencerd(*line.split()[1:]) for line in block.splitlines()]
    assert trial.splitlines()[0] == "Onboarding: would be made; people: 3 active"
    assert done.splitlines()[0] == "Onboarding: is made; people: 3 active"


async def test_nothing_is_brought_over_twice(
    sequencerd: Command, original: asyncpg.Connection
) -> None:
    sequencerd("import-original", "--apply")
    # what was changed here since stays so, and who has begun there since follows
    await original.execute(
        'UPDATE sequencer.steps SET config = \'{"amount": 5, "unit": "days"}\''
        " WHERE name = 'WaitForDuration-11'"
    )
    await original.execute("INSERT INTO runners VALUES (6, 'zoe', 1, 11, true, now(), NULL, now())")
    told = json.loads(sequencerd("import-original", "--apply", "--json"))
    assert told["already_here"] == 5
    assert told["sequences"][0] == {
        "name": "Onboarding",
        "is_here": True,
        "people": {"active": 1, "completed": 0, "cancelled": 0},
    }
    assert await original.fetchval("SELECT count(*) FROM sequencer.enrollments") == 6
    assert "amount: 5" in sequencerd("export", "Onboarding")
    again = sequencerd("import-original", "--apply")
    assert "Onboarding: is here already and stays as it is; people: none" in again
    assert "6 people are here already" in again


@pytest.mark.parametrize(
    ("statement", "words"),
    [
        ("UPDATE steps SET type = 'Scoar' WHERE id = 10", "type: 'Scoar' is served by no runner"),
        ('UPDATE steps SET config = \'{"unit": "days"}\' WHERE id = 11', "WaitForDuration-11: "),
        ('UPDATE steps SET "nextStep" = 99 WHERE id = 11', "step 11: its nextStep 99"),
        ('UPDATE sequences SET "firstStep" = NULL WHERE id = 2', "its firstStep None"),
        ('UPDATE steps SET "requiresExternalData" = true', "--lookup NAME"),
        (
            "ALTER TABLE steps ALTER config TYPE text; UPDATE steps SET config = 'x' WHERE id = 11",
            "step 11: its config is no JSON",
        ),
    ],
)
async def test_what_cannot_be_a_sequence_is_told_and_nothing_done(
    sequencerd: Command, original: asyncpg.Connection, statement: str, words: str
) -> None:
    await original.execute(statement)
    assert words in sequencerd("import-original", "--apply", code=1)
    assert "import aborted" in sequencerd.errors
    assert not await original.fetchval("SELECT count(*) FROM sequencer.sequences")


async def test_people_who_cannot_be_are_left_out_and_told(
    sequencerd: Command, original: asyncpg.Connection
) -> None:
    await original.execute(
        """
        INSERT INTO runners VALUES
            (20, NULL, 1, 11, true, now(), NULL, now()),
            (21, 'x', 9, 11, true, now(), NULL, now()),
            (22, 'x', 1, 20, true, now(), NULL, now()),
            (23, 'x', 1, NULL, true, now(), NULL, now()),
            (24, 'x', 1, 11, true, NULL, NULL, NULL),
            (25, 'x', 1, 11, true, 'infinity', NULL, now()),
            (26, 'x', 1, 11, true, now(), NULL, '20000-01-01');
        """
    )
    lines = sequencerd("import-original", "--apply").splitlines()
    assert set(lines[2:]) == {
        "1 are left out: no dataLookup, or a longer one than 1,000 bytes (runners 20)",
        "1 are left out: in no sequence that is brought over (runners 21)",
        "2 are left out: active, and at no step of the sequence (runners 22, 23)",
        "1 are left out: neither startSequence nor startStep (runners 24)",
        "2 are left out: a time before 1900 or after 9998 (runners 26, 25)",
    }
    assert await original.fetchval("SELECT count(*) FROM sequencer.enrollments") == 5


async def test_names_are_unique_and_who_is_in_it_twice_stays_so(
    sequencerd: Command, original: asyncpg.Connection
) -> None:
    await original.execute("UPDATE sequences SET title = 'Same'")
    await original.execute("INSERT INTO runners VALUES (6, 'ada', 1, 11, true, now(), NULL, now())")
    text = sequencerd("import-original", "--apply")
    assert "Same 1: is made; people: 4 active" in text
    policies = await original.fetch("SELECT name, reentry FROM sequencer.sequences ORDER BY name")
    assert [tuple(row) for row in policies] == [("Same 1", "always"), ("Same 2", "after_end")]


async def test_the_original_may_be_elsewhere(
    sequencerd: Command, original: asyncpg.Connection, database: str
) -> None:
    await original.execute(
        "CREATE SCHEMA old; ALTER TABLE sequences SET SCHEMA old;"
        " ALTER TABLE steps SET SCHEMA old; ALTER TABLE runners SET SCHEMA old"
    )
    sequencerd("import-original", "--database", database, code=1)
    assert "public.sequences has no column firstStep, id, title" in sequencerd.errors
    await original.execute('UPDATE old.steps SET "requiresExternalData" = true')
    text = sequencerd(
        "import-original", "--database", database, "--schema", "old", "--lookup", "app.plans",
        "--apply",
    )  # fmt: skip
    assert "Onboarding: is made" in text
    assert await original.fetchval("SELECT lookup FROM sequencer.sequences LIMIT 1") == "app.plans"
