"""`sequencerd import-original`: the original's tables, with enrollments in every state."""

from __future__ import annotations

import json
import re
from collections.abc import Awaitable, Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from sequencerd.definitions.original import enrollments
from sequencerd.runners.email.runner import write
from sequencerd.runners.fields import RenderError
from sequencerd.runners.registry import make_runners
from sequencerd.settings_file import load
from tests.helpers import servers
from tests.helpers.aws import ARN, aws, score, use_credentials
from tests.helpers.command_line import Command
from tests.helpers.copies import Copies
from tests.helpers.databases import Administrator, with_database
from tests.helpers.engines import ALL_ENDED, Recorder, define, running_engine, until, way
from tests.helpers.runners import email_runner
from tests.helpers.servers import HOST, http_server, smtp_server, task

pytestmark = pytest.mark.slow  # commands on the tables of two systems: a tenth of `make quick`

TABLES = """
CREATE TABLE sequences (
    id serial PRIMARY KEY, title varchar(255), description varchar(255),
    "createdAt" timestamptz NOT NULL DEFAULT now(), "updatedAt" timestamptz NOT NULL DEFAULT now(),
    "firstStep" integer);
CREATE TABLE steps (
    id serial PRIMARY KEY, "sequenceId" integer, "nextStep" integer, "altNextStep" integer,
    type varchar(255), config json, "requiresExternalData" boolean,
    "createdAt" timestamptz NOT NULL DEFAULT now(), "updatedAt" timestamptz NOT NULL DEFAULT now());
CREATE TABLE runners (
    id serial PRIMARY KEY, "dataLookup" varchar(255), "sequenceId" integer, "stepId" integer,
    "isActive" boolean, "startSequence" timestamptz, "endSequence" timestamptz,
    "startStep" timestamptz, "createdAt" timestamptz NOT NULL DEFAULT now(),
    "updatedAt" timestamptz NOT NULL DEFAULT now());
"""
FIRST_ROWS = """
INSERT INTO sequences (id, title, description, "firstStep")
VALUES (1, 'Onboarding', 'For new users', 12), (2, 'Trial', NULL, 20);
INSERT INTO steps (id, "sequenceId", "nextStep", "altNextStep", type, config) VALUES
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
    (4, 'ada', 2, NULL, false, now() - interval '9 days', now() - interval '8 days', NULL),
    (5, 'bob', 2, 20, false, now() - interval '9 days', NULL, now() - interval '9 days');
"""
EMAIL = {"from": "a@example.com", "to": "b@example.com", "subject": "Last reminder", "text": "!"}
SETTINGS = '[runners.Letter]\nurl = "http://127.0.0.1:9/letter"\n'
BRANCHES = (
    "warning: Trial (sequence 2): Conditional-20: goes to altNextStep while its condition is false,"
    " as the original's README says; its code waits there: see --conditional"
)
ROWS = (
    "SELECT subject, sequence, step, status, entered_at < now() - interval '36 hours' AS long,"
    " goals_met, ended_at IS NULL AS open FROM sequencer.enrollments ORDER BY id"
)


@pytest.fixture(scope="module")
def copies(server: str, administrator: Administrator, template: str) -> Iterator[Copies]:
    """Copies with the original's tables."""
    name = administrator.create(template)
    session = Administrator(with_database(server, name))
    session.execute(TABLES)
    session.close()
    made = Copies(administrator, server, name)
    yield made
    made.close()
    administrator.drop(name)


@pytest.fixture
async def original(connection: asyncpg.Connection) -> asyncpg.Connection:
    await connection.execute(FIRST_ROWS)
    return connection


async def test_a_dry_run_reports_everything_and_changes_nothing(
    sequencerd: Command, original: asyncpg.Connection
) -> None:
    lines = sequencerd("import-original").splitlines()
    assert lines == [
        BRANCHES,
        "Onboarding: would be created; enrollments: 3 active",
        "Trial: would be created; enrollments: 1 completed, 1 cancelled",
        "dry run; stop the original, then repeat the command with --apply",
    ]
    for table in ("sequences", "enrollments", "events"):
        assert not await original.fetchval(f"SELECT count(*) FROM sequencer.{table}")


async def test_enrollments_continue_where_they_were(
    sequencerd: Command, original: asyncpg.Connection, database: str
) -> None:
    assert "Onboarding: is created; enrollments: 3 active" in sequencerd(
        "import-original", "--apply"
    )
    assert [tuple(row) for row in await original.fetch(ROWS)] == [
        ("ada", "Onboarding", "WaitForDuration-11", "active", True, [], True),
        ("bob", "Onboarding", "WaitForDuration-11", "active", True, [], True),
        ("eve", "Onboarding", "WaitForDuration-14", "active", True, ["Goal-13"], True),
        ("ada", "Trial", "Conditional-20", "completed", True, [], False),
        ("bob", "Trial", "Conditional-20", "cancelled", True, [], False),
    ]
    exported = sequencerd("export", "Onboarding")
    assert "description: For new users" in exported
    names = [line.split()[-1] for line in exported.splitlines() if "- name:" in line]
    assert names == [
        "WaitForDuration-12",
        "WaitForDuration-11",
        "GoTo-10",
        "Goal-13",
        "WaitForDuration-14",
    ]
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
    assert trial.splitlines()[1] == "Onboarding: would be created; enrollments: 3 active"
    assert done.splitlines()[1] == "Onboarding: is created; enrollments: 3 active"


async def test_nothing_is_imported_twice(sequencerd: Command, original: asyncpg.Connection) -> None:
    sequencerd("import-original", "--apply")
    # what was changed here since stays so, and subjects that have begun there since follow
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
        "enrollments": {"active": 1, "completed": 0, "cancelled": 0},
    }
    assert await original.fetchval("SELECT count(*) FROM sequencer.enrollments") == 6
    assert "amount: 5" in sequencerd("export", "Onboarding")
    again = sequencerd("import-original", "--apply")
    assert "Onboarding: exists already and is not changed; enrollments: none" in again
    assert "6 exist already" in again


@pytest.mark.parametrize(
    ("statement", "words"),
    [
        (
            "UPDATE steps SET type = 'Scoar' WHERE id = 10",
            "type: no runner serves the type 'Scoar'",
        ),
        ('UPDATE steps SET config = \'{"unit": "days"}\' WHERE id = 11', "WaitForDuration-11: "),
        ('UPDATE steps SET "nextStep" = 99 WHERE id = 11', "step 11: its nextStep 99"),
        ('UPDATE sequences SET "firstStep" = 99 WHERE id = 1', "its firstStep 99"),
        ('UPDATE steps SET "requiresExternalData" = true WHERE id = 13', "--lookup NAME"),
        ("UPDATE steps SET type = 'Split' WHERE id = 10", "Split is a custom type there"),
        ("UPDATE steps SET config = '[1]' WHERE id = 10", "its config is not a JSON object"),
        (
            "ALTER TABLE steps ALTER config TYPE text; UPDATE steps SET config = 'x' WHERE id = 11",
            "step 11: its config is not JSON",
        ),
        (
            "UPDATE steps SET config = (repeat('[', 999) || repeat(']', 999))::json WHERE id = 11",
            "step 11: its config is not JSON: it is nested",
        ),
    ],
)
async def test_invalid_sequences_are_reported_and_the_others_imported(
    sequencerd: Command, original: asyncpg.Connection, statement: str, words: str
) -> None:
    await original.execute(statement)
    text = sequencerd("import-original", "--apply", code=1)
    assert words in text
    assert "in no sequence that is imported (runners 1, 2, 3)" in text
    assert "the others are imported; fix the errors above" in sequencerd.errors
    assert await original.fetchval("SELECT array_agg(name) FROM sequencer.sequences") == ["Trial"]


async def test_rows_that_cannot_be_enrollments_are_omitted_and_reported(
    sequencerd: Command, original: asyncpg.Connection
) -> None:
    await original.execute(
        """
        INSERT INTO runners VALUES
            (20, NULL, 1, 11, true, now(), NULL, now()),
            (21, 'x', 9, 99, true, now(), NULL, now()),
            (22, 'x', 1, 99, true, now(), NULL, now()),
            (23, 'x', 2, NULL, true, now(), NULL, now()),
            (25, 'x', 1, 11, true, 'infinity', NULL, now()),
            (26, 'x', 1, 11, true, now(), NULL, '20000-01-01');
        """
    )
    lines = sequencerd("import-original", "--apply").splitlines()
    assert set(lines[3:]) == {
        "1 left out: no dataLookup, or a longer one than 1,000 bytes (runners 20)",
        "1 left out: in no sequence that is imported (runners 21)",
        "1 left out: active, at a step that is not imported, or was removed here (runners 22)",
        "1 left out: active, at no step, and without a goal to wait for (runners 23)",
        "2 left out: a time before 1900 or after 9998 (runners 26, 25)",
    }
    assert await original.fetchval("SELECT count(*) FROM sequencer.enrollments") == 5


async def test_starts_and_steps_that_are_missing(
    sequencerd: Command, original: asyncpg.Connection
) -> None:
    await original.execute(
        """
        INSERT INTO runners VALUES
            (20, 'new', 1, 12, true, NULL, NULL, NULL, '2020-01-01Z'),
            (21, 'goal', 1, NULL, true, NULL, NULL, NULL, '2021-01-01Z'),
            (22, 'jumped', 2, 11, true, now(), NULL, now(), now());
        """
    )
    text = sequencerd("import-original", "--apply")
    assert "1 at a step of another sequence, imported into that one" in text
    rows = await original.fetch(
        "SELECT subject, sequence, step, extract(year FROM created_at)::int AS year"
        " FROM sequencer.enrollments WHERE original_id::int >= 20 ORDER BY original_id"
    )
    assert [tuple(row)[:3] for row in rows] == [
        ("new", "Onboarding", "WaitForDuration-12"),
        ("goal", "Onboarding", "Goal-13"),
        ("jumped", "Onboarding", "WaitForDuration-11"),
    ]
    assert [row["year"] for row in rows[:2]] == [2020, 2021]
    # without the columns that an older version of the tables lacks
    await original.execute(
        'ALTER TABLE runners DROP "createdAt"; ALTER TABLE sequences DROP description'
    )
    assert "left out: neither startSequence" in sequencerd("import-original")


async def test_names_are_unique_and_a_subject_may_be_in_a_sequence_twice(
    sequencerd: Command, original: asyncpg.Connection
) -> None:
    await original.execute("UPDATE sequences SET title = 'Same'")
    await original.execute("INSERT INTO runners VALUES (6, 'ada', 1, 11, true, now(), NULL, now())")
    text = sequencerd("import-original", "--apply")
    assert "Same 1: is created; enrollments: 4 active" in text
    policies = await original.fetch("SELECT name, reentry FROM sequencer.sequences ORDER BY name")
    assert [tuple(row) for row in policies] == [("Same 1", "always"), ("Same 2", "after_end")]


async def test_a_title_may_be_the_name_of_another_sequence(
    sequencerd: Command, original: asyncpg.Connection
) -> None:
    await original.execute(
        """
        UPDATE sequences SET title = 'Same';
        INSERT INTO sequences (id, title, "firstStep")
        VALUES (3, 'Same 1', 30), (4, 'Same 1 3', 40), (5, NULL, 50), (6, 'sequence 5', 60);
        INSERT INTO steps (id, "sequenceId", type) SELECT id, id / 10, 'GoTo'
          FROM unnest(ARRAY[30, 40, 50, 60]) AS id;
        INSERT INTO runners SELECT id, 'zoe', id / 10, id, false, now(), now(), now()
          FROM unnest(ARRAY[30, 40, 50, 60]) AS id;
        """
    )
    sequencerd("import-original", "--apply")
    rows = await original.fetch(
        "SELECT sequence, step FROM sequencer.enrollments WHERE subject = 'zoe' ORDER BY step"
    )
    assert [tuple(row) for row in rows] == [
        ("Same 1 3", "GoTo-30"),
        ("Same 1 3 4", "GoTo-40"),
        ("sequence 5", "GoTo-50"),
        ("sequence 5 6", "GoTo-60"),
    ]
    assert "9 exist already and are not changed" in sequencerd("import-original", "--apply")


async def test_the_original_may_be_in_another_database(
    sequencerd: Command, original: asyncpg.Connection, database: str
) -> None:
    await original.execute(
        "CREATE SCHEMA old; ALTER TABLE sequences SET SCHEMA old;"
        " ALTER TABLE steps SET SCHEMA old; ALTER TABLE runners SET SCHEMA old"
    )
    sequencerd("import-original", "--database", database, code=1)
    assert "there is no table public.sequences: name the schema" in sequencerd.errors
    await original.execute("CREATE TABLE sequences (id integer)")
    sequencerd("import-original", "--database", database, code=1)
    assert "public.sequences has no column firstStep, title: name" in sequencerd.errors
    await original.execute('UPDATE old.steps SET "requiresExternalData" = true')
    text = sequencerd(
        "import-original",
        "--database",
        database,
        "--schema",
        "old",
        "--lookup",
        "app.plans",
        "--apply",
    )
    assert "Onboarding: is created" in text
    assert await original.fetchval("SELECT lookup FROM sequencer.sequences LIMIT 1") == "app.plans"


# --- where the original's code and its README differ


async def send_reminder(original: asyncpg.Connection, alt_next: int | None = 31) -> None:
    """A Conditional that is false for gus, and an e-mail on its other path."""
    await original.execute(
        """
        INSERT INTO sequences (id, title, "firstStep") VALUES (3, 'Reminder', 30);
        INSERT INTO runners
        VALUES (30, 'gus', 3, 30, true, now(), NULL, now() - interval '40 days');
        """
    )
    never = {
        "lodashCommand": "eq",
        "value": {"type": "get", "value": "data.paid"},
        "compareTo": {"type": "raw", "value": True},
    }
    await original.executemany(
        'INSERT INTO steps (id, "sequenceId", "altNextStep", type, config)'
        " VALUES ($1, 3, $2, $3, $4)",
        [(30, alt_next, "Conditional", json.dumps(never)), (31, None, "Email", json.dumps(EMAIL))],
    )


async def test_the_altnextstep_of_a_step_that_waits_leads_nowhere(
    sequencerd: Command, original: asyncpg.Connection
) -> None:
    await send_reminder(original)
    await original.execute(
        """
        UPDATE steps SET "altNextStep" = 40 WHERE id = 30;
        INSERT INTO sequences (id, title, "firstStep") VALUES (4, 'Wrong', 40);
        INSERT INTO steps (id, "sequenceId", type) VALUES (40, 4, 'Nothing')
        """
    )
    leads = "step 30 leads to step 40 of a sequence that is not imported"
    assert leads in sequencerd("import-original", code=1)
    text = sequencerd("import-original", "--conditional", "wait", code=1)
    assert leads not in text
    assert "Reminder (sequence 3): Conditional-30: its altNextStep is never taken" in text
    assert "GoTo-40" not in text
    assert "Reminder: would be created; enrollments: 1 active" in text


@pytest.mark.parametrize("alt_next", [31, None])
async def test_a_conditional_with_enrollments_needs_a_choice(
    sequencerd: Command, original: asyncpg.Connection, database: str, alt_next: int | None
) -> None:
    await send_reminder(original, alt_next)
    dry = sequencerd("import-original")
    assert "1 at the Conditional Reminder/Conditional-30" in dry
    assert "Decide with --conditional wait, or --conditional branch" in dry
    sequencerd("import-original", "--apply", code=1)
    assert "nothing is imported: answer the questions above" in sequencerd.errors
    assert not await original.fetchval("SELECT count(*) FROM sequencer.sequences")

    sequencerd("import-original", "--apply", "--conditional", "wait")
    assert "type: WaitForCondition" in sequencerd("export", "Reminder")
    recorder = Recorder()
    gus = "SELECT {} FROM sequencer.enrollments WHERE subject = 'gus'"
    async with running_engine(database, {"Email": recorder}):
        await until(original, gus.format("wake_at = 'infinity'"))
        await original.execute("UPDATE sequencer.enrollments SET data = '{\"paid\": true}'")
        await until(original, gus.format("status = 'completed'"))
    assert recorder.keys == []


async def test_a_conditional_may_branch_as_the_readme_says(
    sequencerd: Command, original: asyncpg.Connection, database: str
) -> None:
    await send_reminder(original)
    told = json.loads(sequencerd("import-original", "--apply", "--conditional", "branch", "--json"))
    assert told["at_conditionals"] == [
        {"sequence": "Reminder", "step": "Conditional-30", "count": 1}
    ]
    recorder = Recorder()
    async with running_engine(database, {"Email": recorder}):
        gus = "SELECT status = 'completed' FROM sequencer.enrollments WHERE subject = 'gus'"
        await until(original, gus)
    assert [view["originalId"] for view in recorder.views] == [30]
    # later rows there are asked about as well, and wait only if the step is changed first
    await original.execute(
        "INSERT INTO runners VALUES (31, 'hal', 3, 30, true, now(), NULL, now())"
    )
    sequencerd("import-original", "--apply", code=1)
    text = sequencerd("import-original", "--apply", "--conditional", "wait", code=1)
    assert "Reminder/Conditional-30: 1: imported before, as Conditional" in text
    sequencerd("import-original", "--apply", "--conditional", "branch")


async def wait_for_past(original: asyncpg.Connection) -> None:
    await original.execute(
        """
        INSERT INTO sequences (id, title, "firstStep") VALUES (4, 'Sale', 40);
        INSERT INTO runners VALUES (40, 'gus', 4, 40, true, now(), NULL, now());
        """
    )
    await original.executemany(
        'INSERT INTO steps (id, "sequenceId", "nextStep", type, config) VALUES ($1, 4, $2, $3, $4)',
        [
            (40, 41, "WaitForDate", '{"date": "2018-06-08T17:49:31+00:00"}'),
            (41, 42, "Email", json.dumps(EMAIL)),
            (42, None, "WaitForDuration", '{"amount": 1, "unit": "year"}'),
        ],
    )


@pytest.mark.parametrize(
    "case",
    [
        ("send", "WaitForDuration-42", 1),
        ("skip", "WaitForDuration-42", 0),
        ("hold", "WaitForDate-40", 0),
    ],
)
async def test_a_date_in_the_past_needs_a_choice(
    sequencerd: Command, original: asyncpg.Connection, database: str, case: tuple[str, str, int]
) -> None:
    choice, step, sent = case
    await wait_for_past(original)
    text = sequencerd("import-original", "--apply", code=1)
    assert "enrollments at a WaitForDate whose day is over: 1 (Sale/WaitForDate-40: 1)" in text
    assert not await original.fetchval("SELECT count(*) FROM sequencer.sequences")
    sequencerd("import-original", "--apply", "--past-dates", choice)
    recorder = Recorder()
    at_rest = (
        "SELECT step = $1 AND wake_at > now() + interval '300 days' AND status = 'active'"
        " FROM sequencer.enrollments WHERE subject = 'gus'"
    )
    async with running_engine(database, {"Email": recorder}):
        await until(original, at_rest, step)
    assert len(recorder.keys) == sent
    if choice == "skip":
        assert (
            await original.fetchval("SELECT message FROM sequencer.events WHERE action = 'moved'")
            == "its date was over at the import; Email-41 is skipped"
        )


async def test_the_day_of_a_date_is_not_over_before_midnight(
    sequencerd: Command, original: asyncpg.Connection
) -> None:
    await wait_for_past(original)
    await original.execute(
        "UPDATE steps SET config = json_build_object('date',"
        " to_char(date_trunc('day', now() AT TIME ZONE 'UTC'), 'YYYY-MM-DD') || 'T00:00:00Z')"
        " WHERE id = 40"
    )
    assert "Sale: is created; enrollments: 1 active" in sequencerd("import-original", "--apply")


# --- again


async def test_another_import_follows_renames(
    sequencerd: Command, original: asyncpg.Connection
) -> None:
    sequencerd("import-original", "--apply")
    await original.execute("UPDATE sequencer.sequences SET name = 'Welcome' WHERE name <> 'Trial'")
    await original.execute(
        "UPDATE sequencer.steps SET name = 'three days' WHERE name = 'WaitForDuration-11'"
    )
    await original.execute("UPDATE sequencer.steps SET name = 'a' || name WHERE sequence = 'Trial'")
    await original.execute(
        """
        INSERT INTO runners VALUES (6, 'zoe', 1, 11, true, now(), NULL, now()),
                                   (7, 'zoe', 2, NULL, false, now(), now(), NULL)
        """
    )
    text = sequencerd("import-original", "--apply")
    assert "Welcome: exists already and is not changed; enrollments: 1 active" in text
    assert "Trial: exists already and is not changed; enrollments: 1 completed" in text
    assert "5 exist already" in text
    zoe = await original.fetch(
        "SELECT sequence, step FROM sequencer.enrollments WHERE subject = 'zoe'"
        " ORDER BY original_id"
    )
    assert [tuple(row) for row in zoe] == [("Welcome", "three days"), ("Trial", "aConditional-20")]


async def test_a_refused_row_names_itself_and_the_others_come(
    sequencerd: Command, original: asyncpg.Connection
) -> None:
    await original.execute(
        """
        CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS
            $$ BEGIN RAISE EXCEPTION 'no % here', NEW.subject; END $$;
        CREATE TRIGGER no_bob BEFORE INSERT ON sequencer.enrollments
            FOR EACH ROW WHEN (NEW.subject = 'bob' AND NEW.status = 'active')
            EXECUTE FUNCTION refuse();
        """
    )
    text = sequencerd("import-original", "--apply")
    assert "1 left out: the database refuses it: no bob here (runners 2)" in text
    assert await original.fetchval("SELECT count(*) FROM sequencer.enrollments") == 4


async def test_equal_rows_are_all_imported_and_none_twice(
    sequencerd: Command, original: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where they are on both sides of a batch's border."""
    monkeypatch.setattr(enrollments, "BATCH_SIZE", 2)
    await original.execute(
        "INSERT INTO runners SELECT n, 'twin', 1, 11, true, '2020-01-01', NULL, now()"
        " FROM generate_series(100, 104) AS n"
    )
    assert "enrollments: 8 active" in sequencerd("import-original", "--apply")
    assert "10 exist already" in sequencerd("import-original", "--apply")
    assert await original.fetchval("SELECT count(*) FROM sequencer.enrollments") == 10


async def test_the_reentry_policy_decides_about_a_second_enrollment(
    sequencerd: Command, original: asyncpg.Connection
) -> None:
    sequencerd("import-original", "--apply")
    await original.execute("UPDATE sequencer.sequences SET reentry = 'never' WHERE name = 'Trial'")
    await original.execute(
        """
        INSERT INTO runners VALUES (6, 'ada', 1, 11, true, now(), NULL, now()),
                                   (7, 'ada', 2, 21, true, now(), NULL, now()),
                                   (8, 'zoe', 2, 21, true, now(), NULL, now())
        """
    )
    text = sequencerd("import-original", "--apply")
    for name, row in (("Onboarding", 6), ("Trial", 7)):
        assert (
            f"1 left out: the reentry policy of {name} allows their subjects no second "
            f"enrollment (runners {row})" in text
        )
    assert await original.fetchval("SELECT count(*) FROM sequencer.enrollments") == 6


# --- partly


async def test_only_selected_sequences_are_imported(
    sequencerd: Command, original: asyncpg.Connection
) -> None:
    await original.execute("UPDATE steps SET type = 'Scoar' WHERE id = 10")
    text = sequencerd("import-original", "--apply", "--only", "Trial", "--conditional", "branch")
    assert text == "Trial: is created; enrollments: 1 completed, 1 cancelled\n"
    sequencerd("import-original", "--only", "Trail", code=1)
    assert "--only Trail: the original has no such sequence; did you mean 'Trial'?" in (
        sequencerd.errors
    )
    assert "Trial: exists already" in sequencerd("import-original", "--only", "2")


async def test_a_draft_does_not_prevent_the_import(
    sequencerd: Command, original: asyncpg.Connection
) -> None:
    await original.execute(
        "INSERT INTO sequences (id, title, \"firstStep\") VALUES (3, 'New', NULL)"
    )
    text = sequencerd("import-original", "--apply")
    assert "warning: New (sequence 3): a draft without a first step, not imported" in text
    assert "Onboarding: is created" in text


async def test_a_step_of_another_sequence_becomes_a_goto(
    sequencerd: Command, original: asyncpg.Connection, database: str
) -> None:
    await original.execute('UPDATE steps SET "nextStep" = 21 WHERE id = 11')
    sequencerd("import-original", "--apply", "--only", "Onboarding", code=1)
    text = sequencerd("import-original", "--apply")
    assert "WaitForDuration-11: its nextStep is a step of Trial: GoTo-21 leads there" in text
    assert "step: GoTo-21\n      sequence: Trial" in sequencerd("export", "Onboarding")
    async with running_engine(database):
        bob = "SELECT sequence || status = 'Trialcompleted' FROM sequencer.enrollments WHERE id = 2"
        await until(original, bob)
    # into one that was imported before
    await original.execute(
        "INSERT INTO sequences (id, title, \"firstStep\") VALUES (3, 'Late', 30)"
    )
    await original.execute(
        'INSERT INTO steps (id, "sequenceId", "nextStep", type) VALUES (30, 3, 10, \'GoTo\')'
    )
    text = sequencerd("import-original", "--apply", "--only", "Late")
    assert "GoTo-30: its nextStep is a step of Onboarding: GoTo-10 leads there" in text


async def test_a_step_of_a_sequence_that_is_not_imported_is_reported(
    sequencerd: Command, original: asyncpg.Connection
) -> None:
    await original.execute('UPDATE steps SET "nextStep" = 21 WHERE id = 11')
    await original.execute("UPDATE steps SET type = 'Scoar' WHERE id = 21")
    text = sequencerd("import-original", "--apply", code=1)
    assert "step 11 leads to step 21 of a sequence that is not imported" in text
    assert not await original.fetchval("SELECT count(*) FROM sequencer.sequences")


async def test_another_sequence_of_the_same_name_is_left_alone(
    sequencerd: Command, original: asyncpg.Connection
) -> None:
    await define(
        original, "Trial", ("wait", "WaitForDuration", '{"amount": 1, "unit": "day"}', None)
    )
    text = sequencerd("import-original", "--apply", code=1)
    assert "error: Trial (sequence 2): another sequence has that name here" in text
    assert "Onboarding: is created" in text


# --- what configs mean


@pytest.fixture
async def letters(
    sequencerd: Command, original: asyncpg.Connection, tmp_path: Path
) -> Callable[..., Awaitable[dict[str, Any]]]:
    """Imports one step of a type and a config, and returns the config that it has here."""
    (tmp_path / "settings.toml").write_text(SETTINGS)
    sequencerd.variables["SEQUENCERD_CONFIG"] = str(tmp_path / "settings.toml")
    sequencerd.variables["SEQUENCERD_SMS_ACCOUNT_SID"] = "AC0123456789"
    sequencerd.variables["SEQUENCERD_SMS_AUTH_TOKEN"] = "secret"

    async def imported(type_: str, config: Any, *, external: bool = False) -> dict[str, Any]:
        await original.execute("DELETE FROM runners; DELETE FROM sequences; DELETE FROM steps")
        await original.execute(
            "INSERT INTO sequences (id, title, \"firstStep\") VALUES (1, 'S', 1)"
        )
        await original.execute(
            'INSERT INTO steps (id, "sequenceId", type, config, "requiresExternalData")'
            " VALUES (1, 1, $1, $2, $3)",
            *(type_, json.dumps(config), external),
        )
        imported.text = sequencerd("import-original", "--apply", "--lookup", "app.plans")  # type: ignore[attr-defined]
        found = await original.fetchval("SELECT config FROM sequencer.steps")
        await original.execute("DELETE FROM sequencer.sequences")
        return json.loads(found)  # type: ignore[no-any-return]

    return imported


async def test_external_data_arrive_where_they_were_required(letters: Any) -> None:
    assert await letters("Letter", {"text": "Hello"}, external=True) == {
        "text": "Hello",
        "external": True,
    }
    assert "Letter-1: requires external data, so its config gets external: true" in letters.text
    plain = {"text": "for external eyes"}
    assert await letters("Letter", plain, external=True) == plain
    assert await letters("Letter", {"text": "Hello"}) == {"text": "Hello"}


async def test_an_amount_may_be_a_number_as_text(
    sequencerd: Command, original: asyncpg.Connection
) -> None:
    for id_, amount in ((11, '"-3"'), (12, '"2.5"'), (14, '"{{data.n}}"')):
        config = f'{{"amount": {amount}, "unit": "days"}}'
        await original.execute("UPDATE steps SET config = $2 WHERE id = $1", id_, config)
    sequencerd("import-original", "--apply")
    amounts = "SELECT original_id, config->'amount' FROM sequencer.steps WHERE config ? 'amount'"
    found = dict(await original.fetch(amounts))
    assert found == {"11": "-3", "12": "2.5", "14": '"{{data.n}}"'}


async def test_keys_that_the_original_ignores_are_dropped_and_reported(letters: Any) -> None:
    config = {"amount": 1, "unit": "days", "note": "x", "timeout": 3}
    assert await letters("WaitForDuration", config) == {"amount": 1, "unit": "days"}
    assert "dropped from its config, as the original ignores it: 'note', 'timeout'" in letters.text
    condition = {
        "lodashCommand": "eq",
        "value": {"type": "get", "value": "external.plan", "label": "Plan"},
        "compareTo": {"type": "raw", "value": "pro"},
    }
    goal = await letters("Goal", condition | {"repeat": True}, external=True)
    assert goal == condition | {"value": {"type": "get", "value": "external.plan"}}
    assert "'repeat', 'value.label'" in letters.text


@pytest.mark.parametrize("key", ["delivery", "retry", "expires"])
async def test_settings_of_ours_in_a_custom_config_are_reported(
    sequencerd: Command, original: asyncpg.Connection, tmp_path: Path, key: str
) -> None:
    (tmp_path / "settings.toml").write_text(SETTINGS)
    sequencerd.variables["SEQUENCERD_CONFIG"] = str(tmp_path / "settings.toml")
    await original.execute(
        "UPDATE steps SET type = 'Letter', config = json_build_object($1::text, 'express')"
        " WHERE id = 10",
        key,
    )
    text = sequencerd("import-original", "--apply", code=1)
    assert f"Letter-10: the key '{key}' of its config is a setting of the step here" in text
    assert await original.fetchval("SELECT array_agg(name) FROM sequencer.sequences") == ["Trial"]


async def test_templates_and_paths_read_the_original_ids(letters: Any) -> None:
    sms = {
        "from": "+4915112345678",
        "to": "{{external.phone}}",
        "message": "x.org/{{id}}?{{createdAt}}",
    }
    assert (await letters("SMS", sms))["message"] == "x.org/{{originalId}}?{{startSequence}}"
    lines = "{{#each external.items}}{{id}} of {{../id}} {{/each}}{{updatedAt}}"
    assert (await letters("Email", EMAIL | {"text": lines}))["text"] == (
        "{{#each external.items}}{{id}} of {{../originalId}} {{/each}}{{startStep}}"
    )
    for path, renamed in (
        ("id", "originalId"),
        (["createdAt"], ["startSequence"]),
        ("ideas.id", "ideas.id"),
    ):
        condition = {
            "lodashCommand": "gt",
            "value": {"type": "get", "value": path},
            "compareTo": {"type": "raw", "value": 100},
        }
        assert (await letters("Conditional", condition))["value"]["value"] == renamed


async def test_later_ids_differ_from_the_original_ids(
    sequencerd: Command, original: asyncpg.Connection
) -> None:
    await original.execute("UPDATE runners SET id = id + 1000")
    sequencerd("import-original", "--apply")
    assert await original.fetchval("SELECT sequencer.enroll('Trial', 'new')") > 1005


@pytest.mark.parametrize(
    ("text", "addresses"),
    [
        (
            '[{{#each external.l}}"{{{this}}}"{{#unless @last}},{{/unless}}{{/each}}]',
            ["a@example.com", "b@example.com"],
        ),
        ('["x@example.com", "Y <y@example.com>"]', ["x@example.com", "y@example.com"]),
        (
            '{{#if external.l}}[ "{{external.l.[0]}}" ]{{else}}["z@example.com"]{{/if}}',
            ["a@example.com"],
        ),
        ("{{external.l.[1]}}", ["b@example.com"]),
    ],
)
async def test_addresses_as_json_text_are_several(
    letters: Any, text: str, addresses: list[str]
) -> None:
    config = await letters("Email", EMAIL | {"to": text})
    assert ("a list as JSON text" in letters.text) == ('"' in text)
    program = email_runner("smtp://127.0.0.1:9").compile(config)

    def to(external: list[str]) -> tuple[str, ...]:
        view = {**task(7).view, "external": {"l": external}}
        return write(program, task(7)._replace(view=view), datetime.now(UTC)).to

    assert list(to(["a@example.com", "b@example.com"])) == addresses
    if "each" in text:  # a value is one address, whatever it holds
        with pytest.raises(RenderError):
            to(['a@example.com", "evil@example.com'])


# --- from the original's database to the day after


ACCOUNTS = ARN.replace("Score", "FetchExternalData")


async def fetch_external_data(event: Any) -> servers.Answer:
    """The original's function for external data, as deployed."""
    found = [
        {"id": id_, "name": f"Runner {id_}", "email": f"{id_}@example.com"}
        for id_ in event["runners"]
    ]
    return servers.Answer(body=json.dumps(found).encode())


@pytest.mark.slow
async def test_the_first_day_after(
    sequencerd: Command,
    original: asyncpg.Connection,
    database: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Functions that were deployed for the original work unchanged, and more comes from there."""
    (tmp_path / "settings.toml").write_text(
        f'[runners.Score]\nlambda = "{ARN}"\n[lookups.accounts]\nlambda = "{ACCOUNTS}"\n'
    )
    sequencerd.variables["SEQUENCERD_CONFIG"] = str(tmp_path / "settings.toml")
    mail = {"from": "us@example.com", "to": "{{external.email}}", "subject": "Hello"}
    mail |= {"text": "{{external.name}}, see x.org/{{id}}"}
    await original.execute(
        """
        INSERT INTO sequences (id, title, "firstStep") VALUES (5, 'Digest', 50);
        INSERT INTO runners VALUES (500, 'u1', 5, 50, true, now(), NULL, now());
        """
    )
    await original.executemany(
        'INSERT INTO steps (id, "sequenceId", "nextStep", type, config, "requiresExternalData")'
        " VALUES ($1, 5, $2, $3, $4, true)",
        [(50, 51, "Score", '{"model": "x"}'), (51, None, "Email", json.dumps(mail))],
    )
    options = ("import-original", "--apply", "--only", "Digest", "--lookup", "accounts")
    assert "Digest: is created; enrollments: 1 active" in sequencerd(*options)

    events: list[Any] = []

    async def scores(event: Any) -> servers.Answer:
        events.append(event)
        return await score(event)

    use_credentials(monkeypatch, tmp_path)
    functions = {ARN: scores, ACCOUNTS: fetch_external_data}
    async with http_server(aws(functions)) as server, smtp_server() as mailbox:
        monkeypatch.setenv("AWS_ENDPOINT_URL_LAMBDA", server.url)
        settings = load({}, tmp_path / "settings.toml")
        email = email_runner(f"smtp://{HOST}:{mailbox.port}")
        runners = make_runners(settings) | {"Email": email}
        async with running_engine(database, runners, settings.lookups):
            await until(original, ALL_ENDED)
            # renamed here, and begun there meanwhile
            (tmp_path / "digest.yaml").write_text(
                sequencerd("export", "Digest").replace("Email-51", "digest")
                + "    renamedFrom: Email-51\n"
            )
            sequencerd("apply", "digest.yaml")
            await original.execute(
                "INSERT INTO runners VALUES (501, 'u2', 5, 51, true, now(), NULL, now())"
            )
            again = sequencerd(*options)
            assert "Digest: exists already and is not changed; enrollments: 1 active" in again
            await until(original, ALL_ENDED)
        for runner in runners.values():
            await runner.close()
    (event,) = events
    assert event["config"] == {"model": "x", "external": True}
    (given,) = event["runners"]
    assert (given["originalId"], given["dataLookup"]) == (500, "u1")
    assert given["external"]["email"] == "u1@example.com"
    texts = [mailbox.parsed(n).get_content().strip() for n in range(2)]
    assert texts == ["Runner u1, see x.org/500", "Runner u2, see x.org/501"]
