"""The SQL interface: what an application may do, what is filled in, what is refused."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime, timedelta
from itertools import takewhile
from pathlib import Path
from uuid import uuid4

import asyncpg
import pytest

from sequencerd.core.enrollment import Enrollment, effect_key
from sequencerd.runners.suppression_check import forms
from sequencerd.storage import daemons, migrate
from sequencerd.storage.connections import connected
from sequencerd.storage.daemons import NotifyLock
from sequencerd.storage.listener import DefinitionsChanged, EnrollmentDue, parse
from sequencerd.storage.migrations import available
from sequencerd.storage.schemas import LOCK_CLASS
from sequencerd.storage.statements import QUERIES, AdvisoryLock
from tests.helpers.databases import SCHEMA, Administrator, shard, with_database
from tests.helpers.engines import define, enroll
from tests.helpers.waiting import eventually
from tests.sql.conftest import DAYS


async def test_every_statement_can_be_prepared(connection: asyncpg.Connection) -> None:
    for name, query in QUERIES.items():
        # the one is several statements, others are completed with the names of a user's own
        if name != "create_migrations" and not re.search(r"{schema}|{source}", query):
            await connection.prepare(query)


def test_every_statement_is_described_in_standard_terms() -> None:
    for name, query in QUERIES.items():
        lines = takewhile(lambda line: line.startswith("--"), query.splitlines())
        described = " ".join(line.removeprefix("-- ") for line in lines)
        assert re.fullmatch(r"[A-Z`].+\.", described), f"{name} has no sentence: {described!r}"
        found = re.search(r"\b(people|\w+body|who|whom|bell|looked at)\b", described)
        assert found is None, f"{name} says {found}"


def test_every_statement_is_used(repository: Path) -> None:
    code = "".join(path.read_text() for path in (repository / "sequencerd").rglob("*.py"))
    assert [name for name in QUERIES if f'"{name}"' not in code] == []


async def test_every_table_can_be_replicated(connection: asyncpg.Connection) -> None:
    """With a publication for all tables, and by Citus when it moves a shard."""
    rows = await connection.fetch("""
        SELECT relname FROM pg_class AS c
         WHERE relnamespace = 'sequencer'::regnamespace AND relkind IN ('r', 'p')
           AND relreplident <> 'f'
           AND NOT EXISTS (SELECT FROM pg_index WHERE indrelid = c.oid AND indisprimary)""")
    assert rows == []


def test_every_case_has_conditions() -> None:
    """Citus takes the value of CASE value WHEN ... for NULL."""
    schema = "".join(migration.sql for migration in available())
    for name, query in [*QUERIES.items(), ("the schema", schema)]:
        found = re.search(r"\bCASE\b(?!\s+WHEN\b).*", query)
        assert found is None, f"{name} has {found}"


@pytest.mark.parametrize(
    "name", ["claim", "claim_some", "claim_bare", "lock_waiting", "enrollments_at", "simulated"]
)
async def test_statements_have_the_columns_of_the_model(
    connection: asyncpg.Connection, name: str
) -> None:
    columns = [c.name for c in (await connection.prepare(QUERIES[name])).get_attributes()]
    first = columns.index("id")
    assert columns[first:][: len(Enrollment._fields)] == list(Enrollment._fields)


def test_advisory_locks_have_the_same_numbers_in_sql_and_python(repository: Path) -> None:
    schema = "".join(migration.sql for migration in available())
    listed = re.findall(r"^--   (\d)  (\w+)  ", schema, flags=re.MULTILINE)
    assert listed == [(str(lock.value), lock.name.lower()) for lock in AdvisoryLock]
    numbers = re.findall(r"advisory\w*\((\d.+?)\)", schema)
    assert numbers == [str(AdvisoryLock.NOTIFY), str(AdvisoryLock.FORGETTING)]
    for path in [*(repository / "sequencerd").rglob("*.py"), *(repository / "tests").rglob("*.py")]:
        assert str(LOCK_CLASS) not in path.read_text() or path.name == "schemas.py"
    assert str(LOCK_CLASS) not in "".join(
        p.read_text() for p in (repository / "sequencerd/storage/queries").iterdir()
    )


async def test_omitted_values_of_an_insert_are_filled_in(defined: asyncpg.Connection) -> None:
    row = await defined.fetchrow(
        "INSERT INTO sequencer.enrollments (sequence, subject) VALUES ('s', 'ada') RETURNING *"
    )
    assert (row["step"], row["status"], row["visit"], row["attempt"]) == ("first", "active", 1, 0)
    assert row["wake_at"] == row["created_at"]
    assert row["entered_at"] is None
    assert json.loads(row["data"]) == {}


NONSENSE = [
    ("INSERT INTO sequencer.sequences (name, first_step) VALUES ('', 'a')", "name"),
    ("INSERT INTO sequencer.sequences (name, first_step) VALUES (NULL, 'a')", "name"),
    ("INSERT INTO sequencer.sequences (name, first_step) VALUES ('t', NULL)", "first_step"),
    ("UPDATE sequencer.sequences SET timezone = 'Mars/Base'", "timezone"),
    ("UPDATE sequencer.sequences SET timezone = NULL", "timezone"),
    ("UPDATE sequencer.sequences SET status = 'sleeping'", "status"),
    ("UPDATE sequencer.sequences SET reentry = 'sometimes'", "reentry"),
    ("UPDATE sequencer.sequences SET recheck = '-1 second'", "recheck"),
    ("UPDATE sequencer.sequences SET lookup = ''", "lookup"),
    ("UPDATE sequencer.steps SET name = '' WHERE name = 'second'", "name"),
    ("UPDATE sequencer.steps SET sequence = 'nowhere' WHERE name = 'second'", "sequence"),
    ("UPDATE sequencer.steps SET type = ''", "type"),
    ("UPDATE sequencer.steps SET config = '[]'", "config"),
    ("UPDATE sequencer.steps SET config = NULL", "config"),
    ("UPDATE sequencer.steps SET next_step = 'nowhere'", "next_step"),
    ("UPDATE sequencer.steps SET alt_next_step = 'nowhere'", "alt_next_step"),
    ("UPDATE sequencer.steps SET position = NULL", "position"),
    ("UPDATE sequencer.enrollments SET subject = ''", "subject"),
    ("UPDATE sequencer.enrollments SET subject = NULL", "subject"),
    ("UPDATE sequencer.enrollments SET subject = repeat('x', 1001)", "subject"),
    ("UPDATE sequencer.enrollments SET data = '[]'", "data"),
    ("UPDATE sequencer.enrollments SET data = 'null'", "data"),
    ("UPDATE sequencer.enrollments SET data = NULL", "data"),
    ("UPDATE sequencer.enrollments SET status = 'lost'", "status"),
    ("UPDATE sequencer.enrollments SET wake_at = NULL", "wake_at"),
    ("UPDATE sequencer.enrollments SET wake_at = '-infinity'", "wake_at"),
    ("UPDATE sequencer.enrollments SET wake_at = '12000-01-01'", "wake_at"),
    ("UPDATE sequencer.enrollments SET entered_at = 'infinity'", "entered_at"),
    ("UPDATE sequencer.enrollments SET retry_at = '-infinity'", "retry_at"),
    ("UPDATE sequencer.enrollments SET created_at = '4000-01-01 BC'", "created_at"),
    ("UPDATE sequencer.enrollments SET visit = 0", "visit"),
    ("UPDATE sequencer.enrollments SET attempt = -1", "attempt"),
    ("UPDATE sequencer.enrollments SET step = 'nowhere'", "step"),
    ("UPDATE sequencer.enrollments SET sequence = 'nowhere'", "sequence"),
    ("UPDATE sequencer.enrollments SET goals_met = NULL", "goals_met"),
    ("UPDATE sequencer.enrollments SET reentry = 'x'", "reentry"),
    ("UPDATE sequencer.enrollments SET ended_at = now()", "ended_at"),
    ("UPDATE sequencer.enrollments SET entry = 5", "entry"),
    ("INSERT INTO sequencer.enrollments (sequence, subject) VALUES ('t', 'x')", "sequence"),
    ("INSERT INTO sequencer.enrollments (sequence, subject) VALUES (NULL, 'x')", "sequence"),
    (
        "INSERT INTO sequencer.enrollments (sequence, subject, step) VALUES ('s', 'x', 'y')",
        "step",
    ),
    (
        "INSERT INTO sequencer.suppressions (channel, address) VALUES ('e mail', 'x')",
        "channel",
    ),
    (
        "INSERT INTO sequencer.suppressions (channel, address) VALUES ('sms', '')",
        "address",
    ),
    (
        "INSERT INTO sequencer.suppressions VALUES ('sms', '1', 'a b')",
        "topic",
    ),
    ("INSERT INTO sequencer.topics (name, title) VALUES ('a b', 'x')", "name"),
    ("DELETE FROM sequencer.steps WHERE name = 'first'", "first"),
]


async def test_nonsense_is_refused_by_name(defined: asyncpg.Connection) -> None:
    await enroll(defined, "s", "ada")
    wrong = {}
    for statement, names in NONSENSE:
        try:
            await defined.execute(statement)
        except asyncpg.PostgresError as refused:
            found = f"{refused} {refused.column_name} {refused.detail}"
        else:
            found = "accepted"
        if names not in found:
            wrong[statement] = found
    assert wrong == {}


async def test_each_row_of_an_insert_starts_as_its_sequence_defines(
    defined: asyncpg.Connection,
) -> None:
    await define(defined, "t", ("hello", "WaitForDuration", DAYS, None))
    await defined.execute("UPDATE sequencer.sequences SET reentry = 'always' WHERE name = 't'")
    await defined.execute(
        "INSERT INTO sequencer.enrollments (sequence, subject, step, status)"
        " VALUES ('s', 'a', NULL, 'active'), ('s', 'b', NULL, 'active'),"
        " ('s', 'c', 'second', 'active'), ('s', 'd', NULL, 'completed'),"
        " ('t', 'a', NULL, 'active'), ('t', 'a', NULL, 'active'), ('s', 'e', NULL, 'active')"
    )
    rows = await defined.fetch(
        "SELECT subject, sequence, step, reentry, status FROM sequencer.enrollments ORDER BY id"
    )
    assert [tuple(row) for row in rows] == [
        ("a", "s", "first", "after_end", "active"),
        ("b", "s", "first", "after_end", "active"),
        ("c", "s", "second", "after_end", "active"),
        ("d", "s", "first", "after_end", "completed"),
        ("a", "t", "hello", "always", "active"),
        ("a", "t", "hello", "always", "active"),
        ("e", "s", "first", "after_end", "active"),
    ]
    given = (
        "INSERT INTO sequencer.enrollments (sequence, subject, reentry) VALUES ('s', $1, 'always')"
    )
    await defined.execute(given, "f")
    with pytest.raises(asyncpg.UniqueViolationError):
        await defined.execute(given, "f")


@pytest.mark.parametrize("wrong", ["('', 'x')", "('nowhere', 'x')", "(NULL, 'x')"])
async def test_the_entry_policy_applies_to_its_sequence_alone(
    defined: asyncpg.Connection, wrong: str
) -> None:
    insert = "INSERT INTO sequencer.enrollments (sequence, subject) VALUES"
    for values in (f"('s', 'a'), {wrong}", f"{wrong}, ('s', 'a')"):
        with pytest.raises(asyncpg.ForeignKeyViolationError, match="does not exist"):
            await defined.execute(f"{insert} {values}")
    with pytest.raises(asyncpg.ForeignKeyViolationError, match="does not exist"):
        await defined.execute(f"BEGIN; {insert} ('s', 'a'); {insert} {wrong}")
    await defined.execute("ROLLBACK")


async def test_the_next_statement_reads_the_definitions_again(defined: asyncpg.Connection) -> None:
    async with defined.transaction():
        await enroll(defined, "s", "ada")
        await defined.execute("UPDATE sequencer.sequences SET first_step = 'second'")
        id_ = await enroll(defined, "s", "bob")
        await defined.execute("UPDATE sequencer.sequences SET status = 'archived'")
        with pytest.raises(asyncpg.CheckViolationError, match="archived"):
            async with defined.transaction():
                await enroll(defined, "s", "eve")
    step = "SELECT step FROM sequencer.enrollments WHERE id = $1"
    assert await defined.fetchval(step, id_) == "second"


async def test_a_subject_is_in_a_sequence_once_at_a_time(defined: asyncpg.Connection) -> None:
    id_ = await enroll(defined, "s", "ada")
    with pytest.raises(asyncpg.UniqueViolationError):
        await enroll(defined, "s", "ada")
    ignored = (
        "INSERT INTO sequencer.enrollments (sequence, subject) VALUES ('s', 'ada')"
        " ON CONFLICT DO NOTHING"
    )
    assert await defined.execute(ignored) == "INSERT 0 0"
    assert await defined.fetchval("SELECT sequencer.enroll('s', 'ada')") is None
    await defined.execute("UPDATE sequencer.enrollments SET status = 'cancelled'")
    again = await enroll(defined, "s", "ada")
    assert again != id_
    with pytest.raises(asyncpg.UniqueViolationError):
        await defined.execute("UPDATE sequencer.enrollments SET status = 'active'")


async def test_reentry_always_and_never(defined: asyncpg.Connection) -> None:
    await defined.execute("UPDATE sequencer.sequences SET reentry = 'always'")
    await enroll(defined, "s", "ada")
    await enroll(defined, "s", "ada")
    with pytest.raises(asyncpg.UniqueViolationError):
        await defined.execute("UPDATE sequencer.sequences SET reentry = 'never'")
    await defined.execute("DELETE FROM sequencer.enrollments")
    await defined.execute("UPDATE sequencer.sequences SET reentry = 'never'")
    await enroll(defined, "s", "ada")
    await defined.execute("UPDATE sequencer.enrollments SET status = 'cancelled'")
    with pytest.raises(asyncpg.UniqueViolationError):
        await enroll(defined, "s", "ada")


async def test_an_archived_sequence_admits_no_enrollment(defined: asyncpg.Connection) -> None:
    await defined.execute("UPDATE sequencer.sequences SET status = 'archived'")
    with pytest.raises(asyncpg.CheckViolationError, match="archived"):
        await enroll(defined, "s", "ada")
    with pytest.raises(asyncpg.CheckViolationError, match="archived"):
        await defined.execute(
            "INSERT INTO sequencer.enrollments (sequence, subject, status)"
            " VALUES ('s', 'eve', 'completed'), ('s', 'ada', 'active')"
        )


async def test_manual_updates_are_completed_and_recorded(
    defined: asyncpg.Connection,
) -> None:
    await enroll(defined, "s", "ada")
    await defined.execute("UPDATE sequencer.enrollments SET status = 'cancelled', leased_by = 'x'")
    row = await defined.fetchrow("SELECT * FROM sequencer.enrollments")
    assert (row["wake_at"], row["leased_by"]) == (None, None)
    assert row["ended_at"] is not None
    await defined.execute("UPDATE sequencer.enrollments SET status = 'active'")
    row = await defined.fetchrow("SELECT * FROM sequencer.enrollments")
    assert row["ended_at"] is None
    assert row["wake_at"] is not None
    await defined.execute("UPDATE sequencer.enrollments SET step = 'second'")
    row = await defined.fetchrow("SELECT * FROM sequencer.enrollments")
    assert (row["visit"], row["attempt"]) == (2, 0)
    actions = await defined.fetch("SELECT action, step FROM sequencer.events ORDER BY at")
    assert [tuple(row) for row in actions] == [
        ("cancelled", "first"),
        ("resumed", "first"),
        ("moved", "first"),
    ]


async def test_changed_data_wake_an_enrollment_unless_it_is_leased_or_not_started(
    defined: asyncpg.Connection,
) -> None:
    later = datetime.now(UTC) + timedelta(days=3)
    change = "UPDATE sequencer.enrollments SET data = data || '{\"n\": 1}' RETURNING wake_at"
    await defined.execute(
        "INSERT INTO sequencer.enrollments (sequence, subject, wake_at) VALUES ('s', 'ada', $1)",
        later,
    )
    assert await defined.fetchval(change) == later
    await defined.execute("UPDATE sequencer.enrollments SET entered_at = now(), leased_by = 'd:1'")
    await defined.execute("UPDATE sequencer.enrollments SET data = '{}'")
    assert await defined.fetchval(change) == later
    await defined.execute("UPDATE sequencer.enrollments SET leased_by = NULL, wake_at = 'infinity'")
    await defined.fetchval(change)  # it is the same as before
    assert await defined.fetchval("SELECT wake_at = 'infinity' FROM sequencer.enrollments")
    await defined.execute("UPDATE sequencer.enrollments SET data = '{}'")
    assert await defined.fetchval("SELECT wake_at <= now() FROM sequencer.enrollments")


async def test_renames_keep_the_enrollments_at_a_step(defined: asyncpg.Connection) -> None:
    id_ = await enroll(defined, "s", "ada")
    await defined.execute("UPDATE sequencer.steps SET name = 'start' WHERE name = 'first'")
    await defined.execute("UPDATE sequencer.steps SET name = 'end' WHERE name = 'second'")
    await defined.execute("UPDATE sequencer.sequences SET name = 't'")
    row = await defined.fetchrow("SELECT * FROM sequencer.enrollments WHERE id = $1", id_)
    assert (row["sequence"], row["step"], row["visit"]) == ("t", "start", 1)
    steps = await defined.fetch("SELECT sequence, name, next_step FROM sequencer.steps")
    assert {tuple(row) for row in steps} == {("t", "start", "end"), ("t", "end", None)}
    first = await defined.fetchval("SELECT first_step FROM sequencer.sequences")
    assert first == "start"
    assert await defined.fetchval("SELECT count(*) FROM sequencer.events") == 0


async def test_every_change_of_a_definition_gets_a_new_revision(
    defined: asyncpg.Connection,
) -> None:
    async def revision() -> int:
        number: int = await defined.fetchval("SELECT revision FROM sequencer.sequences")
        return number

    for change in (
        'UPDATE sequencer.steps SET config = \'{"amount": 1, "unit": "day"}\'',
        "UPDATE sequencer.steps SET next_step = NULL",
        "INSERT INTO sequencer.steps (sequence, name, type) VALUES ('s', 'third', 'GoTo')",
        "DELETE FROM sequencer.steps WHERE name = 'third'",
        "UPDATE sequencer.sequences SET status = 'paused'",
    ):
        before = await revision()
        await defined.execute(change)
        assert await revision() > before, change
    before = await revision()
    await defined.execute("UPDATE sequencer.steps SET problem = 'a word from the daemon'")
    assert await revision() == before


RENAME = "UPDATE sequencer.sequences SET name = $2 WHERE name = $1"
NUMBERS = "SELECT name, revision FROM sequencer.sequences"


async def test_a_revision_is_never_drawn_twice(connection: asyncpg.Connection) -> None:
    drawn: set[int] = set()
    for name in ("a", "b", "c"):
        await define(connection, name, ("first", "GoTo", "{}", None))
        await connection.execute("UPDATE sequencer.steps SET config = '{\"step\": null}'")
    changes: tuple[list[tuple[str, ...]], ...] = (
        [("a", "x"), ("b", "a"), ("x", "b")],  # swapped
        [("a", "x"), ("b", "a"), ("c", "b"), ("x", "c")],  # rotated
        [("a", "x")],
        [("x", "a")],
        [("a",)],  # deleted and made again
        [("a",), ("b", "a"), ("c", "b")],
    )
    for renames in changes:
        known = dict(await connection.fetch(NUMBERS))
        assert len(set(known.values())) == len(known)
        drawn |= set(known.values())
        async with connection.transaction():
            for names in renames:
                if len(names) == 2:
                    await connection.execute(RENAME, *names)
                    continue
                await connection.execute("DELETE FROM sequencer.sequences WHERE name = $1", *names)
                if names == renames[-1]:
                    await connection.execute(
                        "INSERT INTO sequencer.sequences (name, first_step, revision)"
                        " VALUES ($1, 'first', 1)",
                        *names,
                    )
        now = dict(await connection.fetch(NUMBERS))
        touched = {names[-1] for names in renames} & now.keys()
        assert drawn.isdisjoint(now[name] for name in touched), renames
        latest = dict(
            await connection.fetch(
                "SELECT sequence, max(revision) FROM sequencer.revisions GROUP BY sequence"
            )
        )
        assert {name: latest[name] for name in touched} == {name: now[name] for name in touched}


async def test_no_edit_removes_a_revision(connection: asyncpg.Connection) -> None:
    kept: dict[int, str] = {}

    async def change(statement: str) -> None:
        await connection.execute(statement)
        rows = await connection.fetch("SELECT revision, document FROM sequencer.revisions")
        now = {row["revision"]: row["document"] for row in rows}
        assert kept.items() <= now.items(), statement
        kept.update(now)

    for name, type_ in (("s", "GoTo"), ("t", "Goal")):
        await define(connection, name, ("first", type_, "{}", None))
    await change("UPDATE sequencer.sequences SET timezone = 'Europe/Berlin'")
    await change("DELETE FROM sequencer.sequences WHERE name = 't'")
    await change("UPDATE sequencer.sequences SET name = 't' WHERE name = 's'")
    await change("UPDATE sequencer.sequences SET revision = 1")
    await change("UPDATE sequencer.sequences SET name = 's'; DELETE FROM sequencer.sequences")
    await change(
        "BEGIN; SET CONSTRAINTS ALL IMMEDIATE;"
        "INSERT INTO sequencer.sequences (name, first_step) VALUES ('t', 'a');"
        "INSERT INTO sequencer.steps (sequence, name, type) VALUES ('t', 'a', 'GoTo');"
        "UPDATE sequencer.steps SET type = 'Goal'; COMMIT"
    )
    revisions = await connection.fetch(QUERIES["revisions_of"], "t")
    assert json.loads(revisions[0]["document"])["steps"][0]["type"] == "Goal"
    assert len(kept) == 6


async def test_settings_set_by_hand_do_not_bypass_the_entry_policy(
    defined: asyncpg.Connection,
) -> None:
    await define(defined, "archived", ("first", "GoTo", "{}", None))
    await defined.execute(
        "UPDATE sequencer.sequences SET status = 'archived' WHERE name = 'archived'"
    )
    right = ("s", "first", "after_end")
    wrong = [
        ("nowhere", "first", "after_end"),
        ("s", "nowhere", "after_end"),
        ("s", "first", "always"),
        ("archived", "first", "after_end"),
    ]
    for settings in wrong:
        await defined.execute("BEGIN")
        await defined.execute(
            "SELECT set_config('sequencer.entry_sequence', $1, true),"
            " set_config('sequencer.entry_step', $2, true),"
            " set_config('sequencer.entry_reentry', $3, true)",
            *settings,
        )
        with pytest.raises(asyncpg.PostgresError, match="no enrollment can enter"):
            await defined.execute(
                "INSERT INTO sequencer.enrollments (sequence, subject)"
                " SELECT CASE n WHEN 1 THEN 's' ELSE $1 END, n::text"
                " FROM generate_series(1, 5) AS n ORDER BY n DESC",
                settings[0],
            )
        await defined.execute("ROLLBACK")
    await defined.execute(
        "INSERT INTO sequencer.enrollments (sequence, subject)"
        " SELECT $1, n::text FROM generate_series(1, 5) AS n",
        right[0],
    )
    assert await defined.fetchval("SELECT count(*) FROM sequencer.enrollments") == 5


async def test_reevaluate_returns_a_count_and_respects_its_filters(
    defined: asyncpg.Connection,
) -> None:
    for name in ("ada", "bob", "eve"):
        await enroll(defined, "s", name)
    await defined.execute(
        "UPDATE sequencer.enrollments SET entered_at = now(), wake_at = now() + interval '1 day'"
    )
    look = "SELECT sequencer.reevaluate"
    assert await defined.fetchval(f"{look}(subject => 'ada')") == 1
    assert await defined.fetchval(f"{look}(sequence => 's', step => 'second')") == 0
    assert await defined.fetchval(f"{look}(sequence => 's')") == 3
    assert await defined.fetchval(f"{look}()") == 3
    await defined.execute("UPDATE sequencer.enrollments SET status = 'cancelled'")
    assert await defined.fetchval(f"{look}()") == 0


async def test_views_show_where_enrollments_are(defined: asyncpg.Connection) -> None:
    for name in ("ada", "bob", "eve"):
        await enroll(defined, "s", name)
    await defined.execute(
        "UPDATE sequencer.enrollments SET wake_at = now() - interval '1 hour' WHERE subject = 'bob'"
    )
    await defined.execute(
        "UPDATE sequencer.enrollments SET status = 'failed', failure = 'error', last_error = 'no'"
        " WHERE subject = 'eve'"
    )
    overview = await defined.fetch("SELECT * FROM sequencer.overview")
    assert [(r["step"], r["active"], r["overdue"], r["failed"]) for r in overview] == [
        ("first", 2, 1, 1),
        ("second", 0, 0, 0),
    ]
    overdue = await defined.fetch("SELECT subject FROM sequencer.overdue")
    assert [row["subject"] for row in overdue] == ["bob"]
    failures = await defined.fetch("SELECT subject, failure, last_error FROM sequencer.failures")
    assert [tuple(row) for row in failures] == [("eve", "error", "no")]


# --- notifications


class Ear:
    """A connection that listens, and what it has heard."""

    def __init__(self, connection: asyncpg.Connection) -> None:
        self.connection = connection
        self.heard: list[str] = []

    def hear(self, _connection: object, _pid: int, _channel: str, payload: object) -> None:
        self.heard.append(str(payload))


@pytest.fixture
async def ear(database: str) -> AsyncIterator[Ear]:
    listening = await asyncpg.connect(database)
    ear = Ear(listening)
    await listening.add_listener(SCHEMA, ear.hear)
    assert await daemons.acquire_notify_lock(listening) is NotifyLock.OURS
    yield ear
    await listening.close()


DUE_EARLIER = '{"due":["s","first"]}'
"""What is notified of enrollments that were due before the transaction began."""


async def heard(ear: Ear, connection: asyncpg.Connection, *statements: str) -> list[str]:
    """What is heard of some statements; a last notification marks the end."""
    ear.heard.clear()
    for statement in statements:
        await connection.execute(statement)
    await connection.execute("SELECT pg_notify('sequencer', 'end')")
    await eventually(lambda: "end" in ear.heard)
    return ear.heard[:-1]


@pytest.mark.slow
async def test_notifications_are_short_and_folded(defined: asyncpg.Connection, ear: Ear) -> None:
    one_by_one = (
        "DO $$ BEGIN FOR n IN 1..1000 LOOP INSERT INTO sequencer.enrollments (sequence, subject)"
        " VALUES ('s', 'u' || n); END LOOP; END $$"
    )
    [payload] = await heard(ear, defined, one_by_one)
    begun = await defined.fetchval("SELECT DISTINCT wake_at FROM sequencer.enrollments")
    assert parse(payload) == EnrollmentDue(due=("s", "first"), since=begun)
    cancel = "UPDATE sequencer.enrollments SET status = 'cancelled'"
    assert await heard(ear, defined, cancel) == []


async def test_reevaluate_wakes_enrollments_after_a_silent_load(
    defined: asyncpg.Connection, ear: Ear
) -> None:
    """Of those that are due; one that starts later keeps its time."""
    load = (
        "BEGIN; SET LOCAL sequencer.notify = off;"
        "INSERT INTO sequencer.enrollments (sequence, subject) VALUES ('s', 'ada'), ('s', 'bob');"
        "INSERT INTO sequencer.enrollments (sequence, subject, wake_at)"
        " VALUES ('s', 'eve', now() + interval '1 day'); COMMIT"
    )
    assert await heard(ear, defined, load) == []
    now = "SELECT sequencer.reevaluate(sequence => 's')"
    assert await heard(ear, defined, now) == [DUE_EARLIER]
    assert await defined.fetchval(now) == 2
    later = "SELECT wake_at > now() FROM sequencer.enrollments WHERE subject = 'eve'"
    assert await defined.fetchval(later)


async def test_a_status_that_is_set_together_with_data_is_completed(
    defined: asyncpg.Connection,
) -> None:
    id_ = await enroll(defined, "s", "ada")
    await defined.execute("UPDATE sequencer.enrollments SET entered_at = now()")
    await defined.execute("UPDATE sequencer.enrollments SET status = 'failed', failure = 'error'")
    row = await defined.fetchrow(
        "UPDATE sequencer.enrollments SET status = 'active', data = '{\"fixed\": true}'"
        " WHERE id = $1 RETURNING wake_at = now() AS is_due, ended_at, failure",
        id_,
    )
    assert tuple(row) == (True, None, None)


async def test_without_the_notify_lock_nothing_is_notified(
    defined: asyncpg.Connection, ear: Ear, database: str
) -> None:
    enroll = (
        "INSERT INTO sequencer.enrollments (sequence, subject, wake_at)"
        " VALUES ('s', '{}', now() - interval '1 second')"
    )
    told = [DUE_EARLIER]
    assert await heard(ear, defined, enroll.format("ada")) == told
    await ear.connection.execute("SELECT pg_advisory_unlock_all()")
    assert await heard(ear, defined, enroll.format("bob")) == []
    other = await asyncpg.connect(database)
    async with other.transaction():
        await other.execute(enroll.format("eve"))
        found = await daemons.acquire_notify_lock(ear.connection)
        assert found is NotifyLock.NOBODYS  # or eve would be missed
        assert await heard(ear, defined, enroll.format("joe")) == []
    assert await daemons.acquire_notify_lock(ear.connection) is NotifyLock.OURS
    assert await daemons.acquire_notify_lock(other) is NotifyLock.ANOTHERS
    await other.close()
    assert await heard(ear, defined, enroll.format("kim")) == told


async def test_a_notification_reports_later_starts(defined: asyncpg.Connection, ear: Ear) -> None:
    start = "INSERT INTO sequencer.enrollments (sequence, subject, wake_at) VALUES ('s', '{}', {})"
    [payload] = await heard(ear, defined, start.format("ada", "now() + interval '1 second'"))
    due = parse(payload)
    assert isinstance(due, EnrollmentDue)
    assert due.since is not None
    assert due.later
    [payload] = await heard(ear, defined, start.format("bob", "now()"))
    due = parse(payload)
    assert isinstance(due, EnrollmentDue)
    assert not due.later


async def test_wakes_after_the_next_sweep_are_not_notified(
    defined: asyncpg.Connection, ear: Ear
) -> None:
    later = (
        "INSERT INTO sequencer.enrollments (sequence, subject, wake_at)"
        " VALUES ('s', 'ada', now() + interval '1 hour')"
    )
    assert await heard(ear, defined, later) == []


async def test_a_bulk_load_can_be_silent(defined: asyncpg.Connection, ear: Ear) -> None:
    load = "INSERT INTO sequencer.enrollments (sequence, subject) VALUES ('s', 'ada')"
    silent = f"BEGIN; SET LOCAL sequencer.notify = off; {load}; COMMIT"
    assert await heard(ear, defined, silent) == []


async def test_changed_definitions_are_notified(defined: asyncpg.Connection, ear: Ear) -> None:
    change = "UPDATE sequencer.steps SET config = '{}'"
    assert await heard(ear, defined, change) == ['{"definitions" : "s"}']
    assert await heard(ear, defined, "UPDATE sequencer.steps SET problem = 'x'") == []
    rename = "UPDATE sequencer.sequences SET name = E'\\n\"s' WHERE name = 's'"
    told = await heard(ear, defined, rename)
    assert [parse(payload) for payload in told] == [
        DefinitionsChanged(definitions="s"),
        DefinitionsChanged(definitions='\n"s'),
    ]
    silent = "BEGIN; SET LOCAL sequencer.notify = off; DELETE FROM sequencer.sequences; COMMIT"
    assert await heard(ear, defined, silent) == []
    emptied = "TRUNCATE sequencer.sequences CASCADE"
    assert await heard(ear, defined, emptied) == ['{"definitions": true}']


# --- roles


PRIVILEGES = [
    (
        "enroller",
        "INSERT INTO sequencer.enrollments (sequence, subject) VALUES ('s', 'bob')",
        True,
    ),
    ("enroller", "UPDATE sequencer.enrollments SET status = 'cancelled'", True),
    ("enroller", "UPDATE sequencer.enrollments SET data = '{}'", True),
    ("enroller", "SELECT sequencer.reevaluate()", True),
    ("enroller", "SELECT sequencer.enroll('s', 'bob')", True),
    ("enroller", "UPDATE sequencer.steps SET config = '{}'", False),
    ("enroller", "UPDATE sequencer.enrollments SET step = 'second'", False),
    ("enroller", "DELETE FROM sequencer.enrollments", False),
    ("enroller", "DELETE FROM sequencer.events", False),
    ("enroller", "SELECT sequencer.add_event_partitions()", False),
    ("editor", "UPDATE sequencer.steps SET config = '{}'", True),
    ("editor", "UPDATE sequencer.enrollments SET step = 'second'", True),
    ("editor", "DROP TABLE sequencer.steps", False),
    ("daemon", "UPDATE sequencer.enrollments SET wake_at = now()", True),
    ("daemon", "SELECT sequencer.add_event_partitions()", True),
    ("daemon", "UPDATE sequencer.steps SET problem = NULL", True),
    ("daemon", "UPDATE sequencer.steps SET config = '{}'", False),
    ("daemon", "DELETE FROM sequencer.enrollments", False),
    ("daemon", "DROP TABLE sequencer.events", False),
]


async def test_roles_have_their_privileges(defined: asyncpg.Connection) -> None:
    await enroll(defined, "s", "ada")
    for role, statement, allowed in PRIVILEGES:
        transaction = defined.transaction()
        await transaction.start()
        await defined.execute(f"SET LOCAL ROLE sequencer_{role}")
        try:
            await defined.execute(statement)
        except asyncpg.InsufficientPrivilegeError:
            assert not allowed, f"{role}: {statement}"
        else:
            assert allowed, f"{role}: {statement}"
        await transaction.rollback()


async def test_a_renamed_step_is_remembered_as_executed(connection: asyncpg.Connection) -> None:
    await define(connection, "a/b", ("mail", "Note", "{}", None), ("next", "Note", "{}", None))
    id_ = await enroll(connection, "a/b", "ada")
    executed = [effect_key("a/b", "mail"), effect_key("a", "b/mail")]
    await connection.execute("UPDATE sequencer.enrollments SET executed = $1", executed)
    await connection.execute("UPDATE sequencer.steps SET name = 'post' WHERE name = 'mail'")
    await connection.execute("UPDATE sequencer.sequences SET name = 'a%/c'")
    row = await connection.fetchrow("SELECT * FROM sequencer.enrollments WHERE id = $1", id_)
    assert row["executed"] == [effect_key("a%/c", "post"), effect_key("a", "b/mail")]


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE sequencer.enrollments SET step = 'second'",
        (
            "UPDATE sequencer.enrollments SET status = 'cancelled';"
            " UPDATE sequencer.enrollments SET status = 'active'"
        ),
    ],
)
async def test_a_manual_move_is_no_part_of_a_loop(defined: asyncpg.Connection, change: str) -> None:
    await enroll(defined, "s", "ada")
    await defined.execute("UPDATE sequencer.enrollments SET executed = '{s/first}'")
    await defined.execute(change)
    assert await defined.fetchval("SELECT executed FROM sequencer.enrollments") == []


async def test_goals_are_of_their_sequence_and_follow_its_name(
    connection: asyncpg.Connection,
) -> None:
    goal = ("paid", "Goal", '{"lodashCommand": "isNil", "value": {"type": "raw", "value": 1}}')
    for name in ("a", "b"):
        await define(connection, name, ("wait", "Note", "{}", None), (*goal, None))
    id_ = await enroll(connection, "a", "ada")
    await connection.execute("UPDATE sequencer.enrollments SET goals_met = '{paid,old}'")

    async def goals() -> tuple[list[str], object]:
        row = await connection.fetchrow(
            "SELECT goals_met, goals_elsewhere FROM sequencer.enrollments WHERE id = $1", id_
        )
        elsewhere = row["goals_elsewhere"]
        return row["goals_met"], elsewhere and json.loads(elsewhere)

    await connection.execute("UPDATE sequencer.enrollments SET sequence = 'b', step = 'wait'")
    assert await goals() == ([], {"a": ["paid", "old"]})
    await connection.execute(
        "UPDATE sequencer.steps SET name = 'won' WHERE name = 'paid' AND sequence = 'a'"
    )
    await connection.execute("UPDATE sequencer.sequences SET name = 'z' WHERE name = 'a'")
    await connection.execute("UPDATE sequencer.enrollments SET goals_met = '{paid}'")
    await connection.execute("UPDATE sequencer.enrollments SET sequence = 'z', step = 'wait'")
    met, elsewhere = await goals()
    assert (set(met), elsewhere) == ({"won", "old"}, {"b": ["paid"]})
    await connection.execute("UPDATE sequencer.enrollments SET goals_met = '{}'")
    await connection.execute("UPDATE sequencer.enrollments SET sequence = 'b', step = 'wait'")
    assert await goals() == (["paid"], None)


async def test_entries_are_stored_in_the_form_that_is_compared(
    connection: asyncpg.Connection,
) -> None:
    await connection.execute(
        "INSERT INTO sequencer.suppressions (channel, address, topic, created_at) VALUES"
        " (' Push ', ' fH7:Xy ', 'news', NULL), ('email', 'A@X.org', NULL, NULL)"
    )
    kept = await connection.fetch(
        "SELECT channel, address, topic FROM sequencer.suppressions ORDER BY channel"
    )
    assert [tuple(row) for row in kept] == [("email", "a@x.org", "*"), ("push", "fH7:Xy", "news")]


async def test_an_entry_with_a_name_is_stored_as_the_address(
    connection: asyncpg.Connection,
) -> None:
    kept = await connection.fetchval(
        "INSERT INTO sequencer.suppressions (channel, address)"
        " VALUES ('email', ' Ada <Ada@X.org> ') RETURNING address"
    )
    assert kept == "ada@x.org"


@pytest.mark.parametrize(
    "written",
    [
        "a\u00e4@x.org\u200b",
        "\ufeffA\u00c4@X.org",
        "\u2003a\u00e4@x.org\v",
        " \u202aAda <a\u00c4@x.org>\u202c",
        "<a\u00ad\u00e4@x.org>",
    ],
)
async def test_an_entry_is_stored_as_the_daemon_compares_it(
    connection: asyncpg.Connection, written: str
) -> None:
    stored = await connection.fetchval(
        "INSERT INTO sequencer.suppressions (channel, address) VALUES ('email', $1)"
        " RETURNING address",
        written,
    )
    assert stored == "a\u00e4@x.org"
    assert stored in forms("email", written.partition("<")[2].rstrip(">\u202c") or written)


@pytest.fixture
def turkish(administrator: Administrator, server: str) -> Iterator[str]:
    """The URL of an empty database in Turkish, in which the lower case of I is not i."""
    name = f"test_{uuid4().hex[:12]}"
    try:
        administrator.execute(
            f"CREATE DATABASE {name} TEMPLATE template0 LOCALE_PROVIDER icu ICU_LOCALE 'tr-TR'"
        )
    except asyncpg.PostgresError as error:
        pytest.skip(f"this server has no such locale: {error}")
    yield with_database(server, name)
    administrator.drop(name)


async def test_entries_do_not_depend_on_the_language_of_the_database(turkish: str) -> None:
    async with connected(shard(turkish)) as connection:
        assert await connection.fetchval("SELECT lower('I')") != "i"
        await migrate.migrate(connection)
        await define(connection, "s", ("first", "Note", "{}", None))
        await enroll(connection, "s", "ada", '{"email": "INFO@X.ORG"}')
        await connection.execute(
            "INSERT INTO sequencer.suppressions (channel, address) VALUES ('EMAIL', 'INFO@X.ORG')"
        )
        kept = await connection.fetchrow("SELECT channel, address FROM sequencer.suppressions")
        assert tuple(kept) == ("email", "info@x.org")
        assert await connection.fetchval("SELECT suppressions FROM sequencer.forget('ada')") == 1


async def test_a_wrong_schedule_does_not_hide_the_others(defined: asyncpg.Connection) -> None:
    await defined.execute('UPDATE sequencer.sequences SET enroll = \'{"from": "app.due"}\'')
    for at_most in ('"many"', "2.5", "1e30", "-1", "{}", "[1]", "null", "true"):
        await defined.execute(
            "INSERT INTO sequencer.sequences (name, first_step, enroll) VALUES ('wrong', 'a', $1)"
            " ON CONFLICT (name) DO UPDATE SET enroll = excluded.enroll",
            f'{{"at_most": {at_most}, "every": 5}}',
        )
        rows = await defined.fetch("SELECT sequence, at_most FROM sequencer.schedules")
        found = {row["sequence"]: row["at_most"] for row in rows}
        assert found == {"s": 1000, "wrong": 1000 if at_most == "null" else None}


async def test_no_role_can_store_a_time_that_daemons_cannot_read(
    connection: asyncpg.Connection,
) -> None:
    """Python's dates end with the year 9999: one such row would hide those beside it."""
    await define(connection, "s", ("first", "WaitForDuration", DAYS, None))
    await enroll(connection, "s", "ada")
    await connection.execute(
        "INSERT INTO sequencer.suppressions (channel, address) VALUES ('email', 'a@example.com');"
        "INSERT INTO sequencer.holidays (calendar, day) VALUES ('DE', '2026-01-01');"
        "INSERT INTO sequencer.scheduled_runs (sequence, definition, next_run_at)"
        " VALUES ('s', '{}', now())"
    )
    # a trigger checks what is inserted into enrollments
    columns = await connection.fetch("""
        SELECT c.relname AS table, a.attname AS column FROM pg_class AS c
          JOIN pg_attribute AS a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
         WHERE c.relnamespace = 'sequencer'::regnamespace AND c.relkind = 'r'
           AND a.atttypid IN ('timestamptz'::regtype, 'date'::regtype)
           AND EXISTS (SELECT FROM unnest('{sequencer_enroller,sequencer_editor}'::text[]) AS r
                        WHERE has_column_privilege(r, c.oid, a.attnum, 'UPDATE')
                           OR has_column_privilege(r, c.oid, a.attnum, 'INSERT')
                              AND c.relname <> 'enrollments')""")
    found = {(row["table"], row["column"]) for row in columns}
    assert found >= {("sequences", "resumed_at"), ("suppressions", "created_at")}
    for table, column in found:
        for time in ("294276-12-31", "4713-01-01 BC"):
            with pytest.raises(asyncpg.CheckViolationError):
                await connection.execute(f"UPDATE sequencer.{table} SET {column} = '{time}'")
