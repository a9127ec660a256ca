"""Missing privileges of the roles: each grant is a statement of its own, is repeated, and is named
if it fails.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

import asyncpg
import pytest

from sequencerd.storage import migrate
from sequencerd.storage.schemas import in_schema
from tests.cli.test_doctor import examine
from tests.helpers.databases import SCHEMA, execute, make_login, with_database, with_login

OWNER = "login_owner"


@pytest.fixture
async def owned(server: str, template: str) -> AsyncIterator[str]:
    """An empty database of an ordinary user, which may create no roles. They exist already."""
    await execute(
        server,
        f"DO $$ BEGIN CREATE ROLE {OWNER} LOGIN; EXCEPTION WHEN duplicate_object THEN END $$",
    )
    await execute(server, f"CREATE DATABASE owned OWNER {OWNER}")
    yield with_database(server, "owned")
    await execute(server, "DROP DATABASE owned WITH (FORCE)")


@pytest.mark.slow
async def test_an_owner_without_superuser_grants_all_that_it_may(server: str, owned: str) -> None:
    await execute(server, "REVOKE sequencer_enroller FROM sequencer_editor")
    owner = await asyncpg.connect(with_login(owned, OWNER))
    try:
        await migrate.migrate(owner)
        # the memberships of roles are an administrator's, the privileges on tables the owner's
        (one,) = await migrate.grant(owner)
        assert one.statement == "GRANT sequencer_enroller TO sequencer_editor;"
        assert "permission denied" in one.reason or "admin option" in one.reason
        found = (await examine(with_login(owned, OWNER)))["roles"]
        assert (found.level, one.statement in found.seen) == ("warning", True)
        assert "sequencerd grants" in found.advice
        administrator = await asyncpg.connect(owned)
        assert await migrate.grant(administrator) == []
        await administrator.close()
        assert await migrate.grant(owner) == []
    finally:
        await owner.close()
        await execute(server, "GRANT sequencer_enroller TO sequencer_editor")


async def test_missing_privileges_of_a_restored_dump_are_granted(
    connection: asyncpg.Connection,
) -> None:
    """As after `pg_restore --no-acl`, or where the roles did not exist."""
    functions = "sequencer.reevaluate"
    await connection.execute(
        "REVOKE ALL ON ALL TABLES IN SCHEMA sequencer FROM sequencer_enroller, sequencer_daemon;"
        "REVOKE ALL ON ALL SEQUENCES IN SCHEMA sequencer FROM sequencer_enroller;"
        f"REVOKE ALL ON FUNCTION {functions} FROM sequencer_daemon;"
        f"GRANT EXECUTE ON FUNCTION {functions} TO PUBLIC;"
        "DROP POLICY sequencer_daemon ON sequencer.events"
    )
    rows = await connection.fetch("SELECT statement FROM sequencer.missing_grants")
    missing = "\n".join(row["statement"] for row in rows)
    for statement in (
        "GRANT SELECT ON sequencer.overview TO sequencer_enroller;",
        "GRANT UPDATE (data, status, timezone) ON sequencer.enrollments TO sequencer_enroller;",
        "GRANT SELECT ON SEQUENCE sequencer.enrollments_id_seq TO sequencer_enroller;",
        "CREATE POLICY sequencer_daemon ON sequencer.events TO sequencer_daemon",
        "REVOKE ALL ON FUNCTION sequencer.reevaluate",
    ):
        assert in_schema(statement, SCHEMA) in missing
    assert await migrate.grant(connection) == []
    assert await connection.fetch("SELECT FROM sequencer.missing_grants") == []


async def test_a_schema_that_an_administrator_made_is_used(server: str, owned: str) -> None:
    """Without the right to create schemas, which only the owner of a database has by default."""
    await execute(
        owned,
        f"REVOKE CREATE ON DATABASE owned FROM {OWNER};"
        "ALTER DATABASE owned OWNER TO CURRENT_USER;"
        f"CREATE SCHEMA sequencer AUTHORIZATION {OWNER}",
    )
    owner = await asyncpg.connect(with_login(owned, OWNER))
    assert await migrate.migrate(owner)
    await owner.close()


async def test_a_login_that_may_only_read_finds_nothing_to_apply(
    database: str, connection: asyncpg.Connection
) -> None:
    reader = await asyncpg.connect(await make_login(connection, database, "login_daemon", "daemon"))
    assert await migrate.migrate(reader) == []
    assert await migrate.grant(reader) == []
    await reader.close()
