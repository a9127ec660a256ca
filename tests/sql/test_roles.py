"""The roles, from outside: logins that have been granted one of them, and nothing else."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import asyncpg
import pytest

from tests.helpers.command_line import Command, start_sequencerd
from tests.helpers.databases import make_login
from tests.helpers.engines import define, enroll, until
from tests.helpers.servers import Answer, Request, all_next, http_server
from tests.helpers.waiting import PATIENCE

ROLES = ("enroller", "editor", "daemon", "privacy")
DENIED = asyncpg.InsufficientPrivilegeError


@pytest.fixture
async def logins(connection: asyncpg.Connection, database: str) -> dict[str, str]:
    return await make_logins(connection, database)


async def make_logins(connection: asyncpg.Connection, database: str) -> dict[str, str]:
    """URLs, by role."""
    return {role: await make_login(connection, database, f"login_{role}", role) for role in ROLES}


@pytest.fixture
async def sessions(
    logins: dict[str, str], connection: asyncpg.Connection
) -> AsyncIterator[dict[str, asyncpg.Connection]]:
    """Connections, by role, to a database with a sequence and an enrollment."""
    await define(
        connection,
        "s",
        ("first", "WaitForDuration", '{"amount": 3, "unit": "days"}', "second"),
        ("second", "GoTo", "{}", None),
    )
    await enroll(connection, "s", "ada")
    await connection.execute("CREATE SCHEMA app CREATE TABLE app.invoices (id integer)")
    opened = {role: await asyncpg.connect(url) for role, url in logins.items()}
    yield opened
    for session in opened.values():
        await session.close()


# --- what each may do, and nothing else

MAY = {
    "enroller": [
        (
            "INSERT INTO sequencer.enrollments (sequence, subject, data, timezone, wake_at, step)"
            " VALUES ('s', 'bob', '{}', 'UTC', now(), 'second')"
        ),
        (
            "INSERT INTO sequencer.enrollments (sequence, subject, status, visit, goals_met, id)"
            " VALUES ('s', 'bob', DEFAULT, NULL, '{}', DEFAULT)"
        ),
        "SELECT sequencer.enroll('s', 'bob')",
        "SELECT sequencer.reevaluate(subject => 'ada')",
        "SELECT sequencer.collect('s', 'ada', '1'), sequencer.collect('s', 'bob', '1')",
        "SELECT sequencer.merge('ada', 'bob')",
        "UPDATE sequencer.enrollments SET data = '{\"paid\": true}', timezone = 'UTC'",
        "UPDATE sequencer.enrollments SET status = 'cancelled'",
        "INSERT INTO sequencer.suppressions (channel, address) VALUES ('email', 'a@b.c')",
        "INSERT INTO sequencer.suppressions (channel, address, topic) VALUES ('push', 'x', 'news')",
        "DELETE FROM sequencer.suppressions",
        "SELECT * FROM sequencer.overview, sequencer.overdue, sequencer.events, sequencer.steps",
        "NOTIFY sequencer",
    ],
    "editor": [
        "INSERT INTO sequencer.steps (sequence, name, type) VALUES ('s', 'third', 'GoTo')",
        "UPDATE sequencer.sequences SET status = 'paused'",
        "UPDATE sequencer.steps SET name = 'renamed' WHERE name = 'first'",
        (
            "UPDATE sequencer.steps SET next_step = NULL; DELETE FROM sequencer.steps"
            " WHERE name = 'second'"
        ),
        "INSERT INTO sequencer.topics (name, title) VALUES ('news', 'News')",
        "UPDATE sequencer.enrollments SET step = 'second'",
        "UPDATE sequencer.enrollments SET step = step",
        "UPDATE sequencer.enrollments SET subject = 'bob'",
        "UPDATE sequencer.enrollments SET status = 'cancelled'",
    ],
    "daemon": [
        "UPDATE sequencer.enrollments SET wake_at = now(), leased_by = 'd', attempt = 1",
        (
            "INSERT INTO sequencer.events (enrollment_id, at, sequence, step, visit, action)"
            " VALUES (1, now() + interval '1 hour', 's', 'first', 1, 'next')"
        ),
        "UPDATE sequencer.steps SET problem = 'x'",
        "INSERT INTO sequencer.suppressions (channel, address) VALUES ('email', 'a@b.c')",
        "DELETE FROM sequencer.suppressions",
        "SELECT sequencer.add_event_partitions()",
        "SELECT sequencer.delete_ended(now(), 10)",
    ],
    "privacy": [
        "SELECT * FROM sequencer.forget('ada')",
        "SELECT sequencer.export_subject('ada')",
    ],
}
ON_A_TABLE_OF_ONES_OWN = [
    "CREATE TEMP TABLE sequences (name text) ON COMMIT DROP;"
    f"CREATE TRIGGER mine AFTER UPDATE ON sequences"
    f" FOR EACH ROW EXECUTE FUNCTION sequencer.{name}()"
    for name in ("follow_rename", "record_revision", "normalise_status", "mark_reschedule")
]
MAY_NOT = {
    "enroller": [
        "UPDATE sequencer.enrollments SET step = 'second'",
        "UPDATE sequencer.enrollments SET wake_at = now()",
        "UPDATE sequencer.enrollments SET leased_by = 'me'",
        "UPDATE sequencer.enrollments SET visit = 9",
        "UPDATE sequencer.enrollments SET subject = 'bob'",
        "INSERT INTO sequencer.enrollments (sequence, subject, goals_met) VALUES ('s', 'b', '{x}')",
        "INSERT INTO sequencer.enrollments (sequence, subject, status) VALUES ('s', 'b', 'failed')",
        *(
            f"INSERT INTO sequencer.enrollments (sequence, subject, {column})"
            f" VALUES ('s', 'b', {value})"
            for column, value in {
                "id": "1000000",
                "visit": "2",
                "attempt": "1",
                "leases": "1",
                "entered_at": "now()",
                "ended_at": "now()",
                "retry_at": "now()",
                "expires_at": "now()",
                "leased_by": "'me'",
                "failure": "'error'",
                "last_error": "'x'",
            }.items()
        ),
        "INSERT INTO sequencer.enrollments (sequence, subject, id) VALUES ('s', 'b', -1)",
        "SELECT nextval('sequencer.enrollments_id_seq')",
        "DELETE FROM sequencer.enrollments",
        "INSERT INTO sequencer.sequences (name, first_step) VALUES ('t', 'a')",
        "UPDATE sequencer.sequences SET status = 'paused'",
        "UPDATE sequencer.steps SET config = '{}'",
        "DELETE FROM sequencer.revisions",
        "UPDATE sequencer.events SET message = 'forged'",
        (
            "INSERT INTO sequencer.events (enrollment_id, at, sequence, step, visit, action)"
            " VALUES (1, now(), 's', 'first', 1, 'next')"
        ),
        "INSERT INTO sequencer.migrations VALUES (9, 'x', 'x')",
        "SELECT * FROM app.invoices",
        "SELECT sequencer.delete_ended(now(), 10)",
        "SELECT sequencer.drop_event_partition(now())",
        "SELECT sequencer.forget('ada')",
        "SELECT sequencer.export_subject('ada')",
    ],
    "editor": [
        "SELECT sequencer.forget('ada')",
        "UPDATE sequencer.enrollments SET visit = 9",
        "UPDATE sequencer.revisions SET by = 'somebody else'",
        "DELETE FROM sequencer.revisions",
        "TRUNCATE sequencer.revisions",
        "SELECT setval('sequencer.revision_numbers', 1)",
        "SELECT nextval('sequencer.revision_numbers')",
        *ON_A_TABLE_OF_ONES_OWN,
        "DELETE FROM sequencer.events",
        "DROP TABLE sequencer.steps",
        "ALTER TABLE sequencer.steps DISABLE TRIGGER ALL",
        "CREATE FUNCTION sequencer.mine() RETURNS integer LANGUAGE sql AS 'SELECT 1'",
        "SELECT * FROM app.invoices",
        "SELECT sequencer.delete_ended(now(), 10)",
    ],
    "daemon": [
        "DROP TABLE sequencer.events",
        "TRUNCATE sequencer.enrollments",
        "DELETE FROM sequencer.enrollments",
        "INSERT INTO sequencer.enrollments (sequence, subject) VALUES ('s', 'bob')",
        "UPDATE sequencer.steps SET config = '{}'",
        "UPDATE sequencer.sequences SET status = 'paused'",
        *(
            f"UPDATE sequencer.enrollments SET {column} = DEFAULT"
            for column in ("id", "subject", "timezone", "reentry", "created_at", "tag")
        ),
        *(
            "INSERT INTO sequencer.events (enrollment_id, at, sequence, step, visit, action)"
            f" VALUES (1, {at}, 's', 'first', 1, 'next')"
            for at in ("'1900-01-01'", "now() - interval '2 days'", "now() + interval '2 days'")
        ),
        "UPDATE sequencer.events SET message = 'forged'",
        "DELETE FROM sequencer.events",
        "CREATE TABLE sequencer.mine (id integer)",
        "SELECT * FROM app.invoices",
        "SELECT sequencer.forget('ada')",
    ],
    "privacy": [
        "SELECT * FROM sequencer.enrollments",
        "SELECT * FROM sequencer.suppressions",
        "DELETE FROM sequencer.enrollments",
        "SELECT sequencer.enroll('s', 'bob')",
        "SELECT sequencer.mentions_of('ada')",
    ],
}


@pytest.mark.parametrize("role", ROLES)
async def test_each_role_has_only_its_privileges(
    sessions: dict[str, asyncpg.Connection], role: str
) -> None:
    session = sessions[role]
    for statement in MAY[role]:
        transaction = session.transaction()
        await transaction.start()
        await session.execute(statement)
        await session.execute("SET CONSTRAINTS ALL IMMEDIATE")
        await transaction.rollback()
    for statement in MAY_NOT[role]:
        try:
            await session.execute(statement)
        except DENIED:
            continue
        raise AssertionError(f"{role} may {statement}")


async def test_a_view_is_enough_to_enroll(
    sessions: dict[str, asyncpg.Connection], connection: asyncpg.Connection, database: str
) -> None:
    login = await make_login(connection, database, "login_of_a_view")
    await connection.execute(
        "CREATE VIEW app.people AS SELECT sequence, subject FROM sequencer.enrollments;"
        "GRANT USAGE ON SCHEMA app TO login_of_a_view;"
        "GRANT INSERT ON app.people TO login_of_a_view"
    )
    session = await asyncpg.connect(login)
    await session.execute("INSERT INTO app.people VALUES ('s', 'bob'), ('s', 'eve')")
    with pytest.raises(DENIED):
        await session.execute(
            "INSERT INTO sequencer.enrollments (sequence, subject) VALUES ('s', 'x')"
        )
    await session.close()


async def test_functions_with_more_rights_are_pinned(connection: asyncpg.Connection) -> None:
    """What they name is found in no schema of the caller's; a temporary one comes last."""
    rows = await connection.fetch(
        "SELECT proname, proconfig, prosecdef FROM pg_proc"
        " WHERE pronamespace = 'sequencer'::regnamespace"
        " AND prosqlbody IS NULL"  # parsed by the migration
    )
    assert any(row["prosecdef"] for row in rows)
    pinned = "search_path=pg_catalog, pg_temp"
    loose = [row for row in rows if pinned not in (row["proconfig"] or [])]
    # these have no more rights than their callers, and name the schema of everything
    assert {row["proname"] for row in loose} == {
        "reuse_entry_policy",
        "check_columns",
        "notify_due",
    }
    assert not any(row["prosecdef"] for row in loose)


async def test_an_editor_cannot_move_enrollments_without_a_record(
    connection: asyncpg.Connection, database: str
) -> None:
    """By the setting that tells the trigger of a rename."""
    await define(connection, "s", ("first", "Note", "{}", None), ("second", "Note", "{}", None))
    await enroll(connection, "s", "ada")
    editor = await asyncpg.connect(await make_login(connection, database, "login_editor", "editor"))
    await editor.execute("SET sequencer.renaming = 'on'")
    with pytest.raises(asyncpg.ForeignKeyViolationError):
        await editor.execute("UPDATE sequencer.enrollments SET step = 'nowhere'")
    await editor.execute("UPDATE sequencer.enrollments SET step = 'second'")
    await editor.close()
    row = await connection.fetchrow("SELECT visit, action FROM sequencer.events")
    assert tuple(row) == (1, "moved")


async def test_no_user_can_shadow_names_in_functions(
    sessions: dict[str, asyncpg.Connection], connection: asyncpg.Connection
) -> None:
    session = sessions["enroller"]
    await session.execute("CREATE TEMP TABLE enrollments (id integer)")
    await session.execute("CREATE TEMP TABLE sequences (name text, first_step text)")
    await session.execute(
        "CREATE FUNCTION pg_temp.now() RETURNS timestamptz LANGUAGE plpgsql AS"
        " $$ BEGIN RAISE 'in the rights of %', current_user; END $$"
    )
    await session.execute("SET search_path = pg_temp, pg_catalog, public")
    assert await session.fetchval("SELECT sequencer.reevaluate()") == 1
    assert await session.fetchval("SELECT sequencer.enroll('s', 'bob')")
    await session.execute("UPDATE sequencer.enrollments SET status = 'cancelled'")
    by = await connection.fetchval("SELECT DISTINCT message FROM sequencer.events")
    assert by == "by login_enroller"


async def test_no_other_role_has_access(connection: asyncpg.Connection, database: str) -> None:
    session = await asyncpg.connect(await make_login(connection, database, "login_nobody"))
    for statement in ("SELECT * FROM sequencer.steps", "SELECT sequencer.enroll('s', 'x')"):
        with pytest.raises(DENIED):
            await session.execute(statement)
    await session.close()


# --- an editor and the daemon


async def test_an_editor_cannot_make_the_daemon_call_an_address(
    logins: dict[str, str], sessions: dict[str, asyncpg.Connection], tmp_path: Path
) -> None:
    """Whatever a config holds: the address is the settings'."""

    async def never(_: Request) -> Answer:
        raise AssertionError

    async with http_server(all_next) as server, http_server(never) as secret:
        settings = tmp_path / "settings.toml"
        settings.write_text(f'[runners.Crm]\nurl = "{server.url}/crm"\nallow_private = true\n')
        config = json.dumps(
            dict.fromkeys(("url", "endpoint", "base_url", "proxy", "headers", "auth"), secret.url)
        )
        editor = sessions["editor"]
        await define(editor, "t", ("call", "Crm", config, None))
        for lookup in (secret.url, f"{secret.url}/x", "http.get", "pg_catalog.pg_ls_dir"):
            await define(editor, f"look {lookup}", ("call", "GoTo", "{}", None))
            await editor.execute(
                "UPDATE sequencer.sequences SET lookup = $1 WHERE name = $2",
                lookup,
                f"look {lookup}",
            )
            await editor.execute(
                "UPDATE sequencer.steps SET type = 'Conditional', config = $1 WHERE sequence = $2",
                *(READS_EXTERNAL, f"look {lookup}"),
            )
            await enroll(editor, f"look {lookup}", "ada")
        id_ = await enroll(editor, "t", "ada")
        async with daemon(logins["daemon"], SEQUENCERD_CONFIG=str(settings)):
            done = "SELECT status = 'completed' FROM sequencer.enrollments WHERE id = $1"
            await until(editor, done, id_)
            told = (
                "SELECT count(DISTINCT sequence) = 4 FROM sequencer.events WHERE action = 'retry'"
            )
            await until(editor, told)
        assert [request.target for request in server.requests] == ["/crm"]
        assert not secret.connections


READS_EXTERNAL = json.dumps(
    {
        "lodashCommand": "eq",
        "value": {"type": "get", "value": "external.plan"},
        "compareTo": {"type": "raw", "value": "pro"},
    }
)


class daemon:  # noqa: N801 - used as a function
    """`sequencerd run` as a login; ended in good order."""

    def __init__(self, url: str, **variables: str) -> None:
        self._variables = {
            **os.environ,
            "SEQUENCERD_DATABASE": url,
            "SEQUENCERD_LOG_FORMAT": "json",
            **variables,
        }

    async def __aenter__(self) -> None:
        self._process = await start_sequencerd(
            "run",
            env=self._variables,
            stderr=asyncio.subprocess.PIPE,
        )
        stderr = self._process.stderr
        assert stderr is not None
        async with asyncio.timeout(PATIENCE):
            while b'"ready"' not in (line := await stderr.readline()):
                assert line, "it has ended"
        self._rest = asyncio.create_task(stderr.read())

    async def __aexit__(self, *_: object) -> None:
        self._process.send_signal(signal.SIGTERM)
        assert await self._process.wait() == 0
        errors = (await self._rest).decode()
        assert "permission denied" not in errors, errors


async def test_the_roles_suffice_for_a_whole_day(
    logins: dict[str, str],
    connection: asyncpg.Connection,
    sequencerd: Command,
    tmp_path: Path,
) -> None:
    """Each command by the login that should give it, with a daemon that has its role only."""

    def as_(role: str, *arguments: str) -> str:
        sequencerd.variables["SEQUENCERD_DATABASE"] = logins[role]
        return sequencerd(*arguments)

    file = tmp_path / "s.yaml"
    file.write_text(
        "name: s\nsteps:\n"
        "  - {name: pause, type: WaitForDuration, config: {amount: 3, unit: days}}\n"
        "  - {name: other, type: WaitForDuration, config: {amount: 3, unit: days}}\n"
    )
    at = "SELECT step = $2 AND entered_at IS NOT NULL FROM sequencer.enrollments WHERE id = $1"
    assert "this user has the privileges of a daemon" in as_("daemon", "doctor")
    assert "s: new" in as_("editor", "apply", "s.yaml")
    settings = {"SEQUENCERD_RETENTION_EVENTS": "30 days", "SEQUENCERD_RETENTION_ENDED": "1 days"}
    async with daemon(logins["daemon"], **settings):
        id_ = json.loads(as_("enroller", "enroll", "s", "ada", "--json"))["id"]
        await until(connection, at, id_, "pause")
        file.write_text(file.read_text().replace("amount: 3", "amount: 0", 1))
        assert "1 waits at pause: 1 would continue at once" in as_("editor", "plan", "s.yaml")
        as_("editor", "apply", "s.yaml")
        await until(connection, at, id_, "other")
        as_("enroller", "reevaluate", str(id_))
        as_("editor", "pause", "s")
        as_("editor", "resume", "s")
        as_("enroller", "cancel", str(id_))
        other = json.loads(as_("enroller", "enroll", "s", "bob", "--json"))["id"]
        await until(connection, at, other, "other")
        file.write_text(file.read_text().replace("name: other", "name: later, renamedFrom: other"))
        as_("editor", "apply", "s.yaml")
        await until(connection, at, other, "later")
        as_("editor", "move", str(other), "--to", "pause")
        await until(connection, at, other, "later")
        await connection.execute(
            "UPDATE sequencer.enrollments SET status = 'failed', failure = 'error' WHERE id = $1",
            other,
        )
        as_("enroller", "retry", str(other))
        assert "added later (WaitForDuration)" in as_("enroller", "history", "s")
        for command in (["status"], ["list"], ["show", str(other)], ["export", "s"]):
            as_("enroller", *command)
        as_("editor", "archive", "s")
    for role, *command in (
        ("enroller", "apply", "s.yaml"),
        ("enroller", "pause", "s"),
        ("enroller", "move", str(other), "--to", "pause"),
        ("daemon", "enroll", "s", "eve"),
    ):
        sequencerd.variables["SEQUENCERD_DATABASE"] = logins[role]
        sequencerd(*command, code=1)
        assert "GRANT" in sequencerd.errors
