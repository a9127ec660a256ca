"""Row-level security on our tables: the daemon sees all of them, or says that it does not."""

from __future__ import annotations

import asyncpg
import pytest

from sequencerd.storage import server
from sequencerd.storage.schemas import in_schema
from tests.cli.test_doctor import examine
from tests.helpers.command_line import Command
from tests.helpers.databases import SCHEMA, make_login
from tests.helpers.engines import ALL_ENDED, define, enroll, until
from tests.sql.test_roles import daemon

HIDDEN = in_schema("sequencer.enrollments", SCHEMA)

TABLES = """SELECT relname::text FROM pg_class WHERE relnamespace = 'sequencer'::regnamespace
    AND relkind IN ('r', 'p') AND NOT relispartition"""


async def enable(connection: asyncpg.Connection, *, force: bool = False) -> None:
    for row in await connection.fetch(TABLES):
        for what in ("ENABLE", "FORCE")[: 1 + force]:
            await connection.execute(f"ALTER TABLE sequencer.{row[0]} {what} ROW LEVEL SECURITY")


@pytest.fixture
async def login(connection: asyncpg.Connection, database: str) -> str:
    """The URL of a login that is a daemon's."""
    return await make_login(connection, database, "login_daemon", "daemon")


@pytest.mark.slow
async def test_a_daemon_sees_everything_as_before(
    connection: asyncpg.Connection, login: str
) -> None:
    await define(connection, "s", ("a", "GoTo", "{}", None))
    await enable(connection)
    assert "this user has the privileges of a daemon" in (await examine(login))["roles"].seen
    async with daemon(login):
        await enroll(connection, "s", "ada")
        await until(connection, ALL_ENDED)
    kept = "SELECT count(*) > 0 FROM sequencer.events WHERE action = 'completed'"
    assert await connection.fetchval(kept)


async def test_the_policy_applies_to_no_other_role(
    connection: asyncpg.Connection, database: str
) -> None:
    login = await make_login(connection, database, "login_enroller", "enroller")
    await define(connection, "s", ("a", "GoTo", "{}", None))
    await enroll(connection, "s", "ada")
    session = await asyncpg.connect(login)
    count = "SELECT count(*) FROM sequencer.enrollments"
    assert await session.fetchval(count) == 1
    await enable(connection)
    assert await session.fetchval(count) == 0
    await session.close()


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        ("DROP POLICY sequencer_daemon ON sequencer.enrollments", "all of"),
        (
            "CREATE POLICY mine ON sequencer.enrollments AS RESTRICTIVE USING (subject > 'b')",
            "some of",
        ),
    ],
)
@pytest.mark.slow
async def test_rows_hidden_by_row_security_are_reported(
    connection: asyncpg.Connection, login: str, sequencerd: Command, policy: str, words: str
) -> None:
    await connection.execute(policy)
    found = (await examine(login))["roles"]
    assert "row-level" not in found.seen  # it hides nothing yet
    await enable(connection)
    found = (await examine(login))["roles"]
    assert (found.level, words in found.seen) == ("error", True)
    assert f"{HIDDEN} from login_daemon" in found.seen
    if words == "all of":
        sequencerd.variables["SEQUENCERD_DATABASE"] = login
        sequencerd.program("run", code=1)
        assert f"row-level security hides all of {HIDDEN}" in sequencerd.errors
        assert "GRANT sequencer_daemon" in sequencerd.errors


async def test_an_owner_under_forced_row_security_is_reported(
    connection: asyncpg.Connection, database: str
) -> None:
    """As a daemon, and where triggers and functions work with its rights."""
    owning = await make_login(connection, database, "login_owner")
    await connection.execute("GRANT CREATE ON SCHEMA public TO login_owner")
    await connection.execute("ALTER SCHEMA sequencer OWNER TO login_owner")
    for row in await connection.fetch(TABLES):
        await connection.execute(f"ALTER TABLE sequencer.{row[0]} OWNER TO login_owner")
    owner = await asyncpg.connect(owning)
    await enable(connection)
    assert await server.hidden_tables(owner) == []
    await enable(connection, force=True)
    hidden = await server.hidden_tables(owner)
    assert (HIDDEN, "login_owner", True) in hidden
    login = await make_login(connection, database, "login_daemon", "daemon")
    other = await asyncpg.connect(login)
    assert {one.user for one in await server.hidden_tables(other)} == {"login_owner"}
    await connection.execute("GRANT sequencer_daemon TO login_owner")
    assert await server.hidden_tables(owner) == []
    await owner.close()
    await other.close()
    await connection.execute("REVOKE sequencer_daemon FROM login_owner")
