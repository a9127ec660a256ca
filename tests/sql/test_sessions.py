"""Applications' sessions: whatever they have set, and two-phase commit."""

from __future__ import annotations

from typing import Any

import asyncpg
import pytest

from sequencerd.storage import daemons
from tests.helpers.databases import SCHEMA, make_login
from tests.helpers.engines import ALL_ENDED, define, enroll, running_engine, until

HIJACK = """
    CREATE SCHEMA evil;
    CREATE DOMAIN evil.text AS integer;
    CREATE FUNCTION evil.no(pg_catalog.text, pg_catalog.text) RETURNS boolean LANGUAGE plpgsql AS
        $$ BEGIN RAISE 'this is not ours'; END $$;
    CREATE FUNCTION evil.no(timestamptz, timestamptz) RETURNS boolean LANGUAGE plpgsql AS
        $$ BEGIN RAISE 'this is not ours'; END $$;
    CREATE FUNCTION evil.now() RETURNS timestamptz LANGUAGE plpgsql AS
        $$ BEGIN RAISE 'this is not ours'; END $$;
    CREATE OPERATOR evil.= (LEFTARG = pg_catalog.text, RIGHTARG = pg_catalog.text,
        FUNCTION = evil.no);
    CREATE OPERATOR evil.<> (LEFTARG = pg_catalog.text, RIGHTARG = pg_catalog.text,
        FUNCTION = evil.no);
    CREATE OPERATOR evil.< (LEFTARG = timestamptz, RIGHTARG = timestamptz, FUNCTION = evil.no);
    GRANT USAGE ON SCHEMA evil TO PUBLIC;
"""
SETTINGS = [
    "search_path = ''",
    "search_path = evil, pg_catalog",
    "search_path = pg_temp, evil",
    "plpgsql.extra_errors = 'all'",
    "DateStyle = 'SQL, DMY'",
    "IntervalStyle = 'sql_standard'",
    "TimeZone = 'Pacific/Chatham'",
    "standard_conforming_strings = off",
    "backslash_quote = off",
    "transform_null_equals = on",
    "array_nulls = off",
    "quote_all_identifiers = on",
    *(["client_encoding = 'LATIN1'"] if SCHEMA.isascii() else []),  # asyncpg sends UTF-8 anyway
    "bytea_output = 'escape'",
    "default_transaction_isolation = 'serializable'",
    "row_security = off",
    "enable_indexscan = off",
]
STATEMENTS = [
    "INSERT INTO sequencer.enrollments (sequence, subject) VALUES ('s', 'b'), ('s', 'c')",
    "INSERT INTO sequencer.enrollments (id, sequence, subject, data) VALUES (NULL, 's', 'd', NULL)",
    "SELECT sequencer.enroll('s', 'e')",
    "UPDATE sequencer.enrollments SET data = '{\"a\": 1}'",
    "UPDATE sequencer.enrollments SET status = 'cancelled'",
    "UPDATE sequencer.enrollments SET status = 'active'",
    "UPDATE sequencer.enrollments SET step = 'second'",
    "SELECT sequencer.reevaluate()",
    "INSERT INTO sequencer.suppressions (channel, address) VALUES ('sms', '+49 151 1')",
    "UPDATE sequencer.sequences SET timezone = 'Europe/Berlin', reentry = 'always'",
    'UPDATE sequencer.steps SET config = \'{"amount": 4, "unit": "days"}\', next_step = NULL',
    "UPDATE sequencer.sequences SET name = 't'",
    "INSERT INTO sequencer.steps (sequence, name, type) VALUES ('t', 'third', 'GoTo')",
    "SET CONSTRAINTS ALL IMMEDIATE",
    "UPDATE sequencer.enrollments SET status = 'cancelled'",
    "DELETE FROM sequencer.steps",
    "DELETE FROM sequencer.sequences",
]


@pytest.fixture
async def editor(connection: asyncpg.Connection, database: str) -> str:
    """The URL of a login that is an editor's, and a sequence to edit."""
    await define(
        connection,
        "s",
        ("first", "WaitForDuration", '{"amount": 3, "unit": "days"}', "second"),
        ("second", "GoTo", "{}", None),
    )
    await enroll(connection, "s", "ada")
    await connection.execute(HIJACK)
    return await make_login(connection, database, "login_editor", "editor")


@pytest.mark.slow
async def test_no_setting_of_a_session_fails_a_trigger(
    editor: str, connection: asyncpg.Connection
) -> None:
    # as a daemon, to be notified
    assert await daemons.acquire_notify_lock(connection) is daemons.NotifyLock.OURS
    for setting in SETTINGS:
        session = await asyncpg.connect(editor)
        await session.execute(f"SET {setting}")
        transaction = session.transaction()
        await transaction.start()
        for statement in STATEMENTS:
            try:
                await session.execute(statement)
            except asyncpg.PostgresError as error:
                raise AssertionError(f"with {setting}: {statement}: {error!r}") from error
        await transaction.rollback()
        await session.close()


ADDRESSES = [("sms", "+49 (0)151.23-45"), ("email", "Ada <ADA.L@x.org>"), ("sms", "tel:+1 2/3")]


async def privacy(connection: asyncpg.Connection) -> tuple[Any, ...]:
    """Suppress and forget an address, and return all that follows."""
    await enroll(
        connection, "s", "customer-1.a", '{"email": "ada.l@x.org", "phone": "+49 151 2345"}'
    )
    await connection.executemany(
        "INSERT INTO sequencer.suppressions (channel, address, reason)"
        " VALUES ($1, $2, 'to ada.l@x.org, customer-1.a and +49 151 23 45, not adaxl@x.org')",
        ADDRESSES,
    )
    stored = await connection.fetch("SELECT address FROM sequencer.suppressions ORDER BY 1")
    exported = await connection.fetchval(
        "SELECT jsonb_array_length(sequencer.export_subject('customer-1.a')->'suppressions')"
    )
    done = await connection.fetchrow("SELECT * FROM sequencer.forget('customer-1.a')")
    left = await connection.fetch("SELECT address, reason FROM sequencer.suppressions ORDER BY 1")
    return stored, exported, done, left


async def test_no_setting_of_a_session_affects_privacy(editor: str, database: str) -> None:
    found = {}
    for setting in ("standard_conforming_strings = on", *SETTINGS):
        session = await asyncpg.connect(database)  # without the plans of another
        await session.execute(f"SET {setting}")
        transaction = session.transaction()
        await transaction.start()
        found[setting] = await privacy(session)
        await transaction.rollback()
        await session.close()
    usual, *others = found.items()
    stored, exported, done, left = usual[1]
    assert [row["address"] for row in stored] == ["+123", "+491512345", "ada.l@x.org"]
    assert (exported, done["suppressions"]) == (2, 2)
    assert left[0]["reason"] == "to [forgotten], [forgotten] and +[forgotten], not adaxl@x.org"
    for setting, result in others:
        assert result == usual[1], setting


# --- two-phase commit


async def prepare(connection: asyncpg.Connection, subject: str, setting: str = "") -> None:
    """Enrolls in a transaction that is prepared."""
    await connection.execute(
        f"BEGIN; {setting}; INSERT INTO sequencer.enrollments (sequence, subject)"
        f" VALUES ('s', '{subject}'); PREPARE TRANSACTION '{subject}'"
    )


@pytest.fixture
async def defined(connection: asyncpg.Connection) -> asyncpg.Connection:
    if await connection.fetchval("SHOW max_prepared_transactions") == "0":
        pytest.skip("this server prepares no transactions")
    await define(connection, "s", ("a", "GoTo", "{}", None))
    return connection


async def test_a_prepared_transaction_enrolls_without_notifying(
    database: str, defined: asyncpg.Connection
) -> None:
    async with running_engine(database) as engine:
        await prepare(defined, "told", "SET LOCAL sequencer.notify = off")
        await defined.execute("COMMIT PREPARED 'told'")
        await defined.execute("""SELECT pg_notify('sequencer', '{"due": ["s", "a"]}')""")
        await until(defined, ALL_ENDED)
        await prepare(defined, "found", "SET LOCAL sequencer.notify = off")
        locks = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND mode = 'ShareLock'"
        assert await defined.fetchval(locks) == 0  # it keeps no daemon from being told
        await defined.execute("COMMIT PREPARED 'found'")
        await engine.sweep()
        await until(defined, ALL_ENDED)
    assert await defined.fetchval("SELECT count(*) FROM sequencer.enrollments") == 2


async def test_a_transaction_prepared_without_a_daemon_is_found(
    database: str, defined: asyncpg.Connection
) -> None:
    await prepare(defined, "early")
    async with running_engine(database):
        await defined.execute("COMMIT PREPARED 'early'")
        await until(
            defined, "SELECT count(*) = 1 FROM sequencer.enrollments WHERE status = 'completed'"
        )
