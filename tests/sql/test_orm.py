"""What ORMs and drivers send: NULL for what was left out, DEFAULT for each column, upserts.

The statements are those that each of them has been seen to send; docs/orm.md has the models.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

import asyncpg
import pytest

from tests.helpers.databases import QUOTED, make_login
from tests.helpers.engines import define

WRITABLE = """SELECT array_agg(attname::text ORDER BY attnum) FROM pg_attribute
    WHERE attrelid = 'sequencer.enrollments'::regclass AND attnum > 0 AND NOT attisdropped
      AND attgenerated = ''"""
BEGUN = """SELECT (step, data, status, wake_at, visit, attempt, goals_met, executed, reentry, entry)
    = ('first', '{}', 'active', now(), 1, 0, '{}', '{}', 'after_end', 0)
    AND created_at = now() AND id > 0 AND tag IS NOT NULL AND ended_at IS NULL
    FROM sequencer.enrollments WHERE subject = $1"""


@pytest.fixture(params=["owner", "enroller"])
async def session(
    request: pytest.FixtureRequest, connection: asyncpg.Connection, database: str
) -> AsyncIterator[asyncpg.Connection]:
    """An application's connection, as the owner or as `sequencer_enroller`."""
    await define(connection, "s", ("first", "GoTo", "{}", None))
    url = await make_login(connection, database, "login_enroller", "enroller")
    if request.param == "owner":
        url = database
    session = await asyncpg.connect(url)
    yield session
    await session.close()


async def test_every_column_may_be_left_out_by_name(session: asyncpg.Connection) -> None:
    columns = await session.fetchval(WRITABLE)
    given = {"sequence": "'s'", "subject": "$1"}
    for left_out in ("NULL", "DEFAULT"):
        values = ", ".join(given.get(column, left_out) for column in columns)
        insert = f"INSERT INTO sequencer.enrollments ({', '.join(columns)}) VALUES ({values})"
        async with session.transaction():
            for name in ("ada", "bob"):  # the second is filled in from the first
                subject = f"{name} {left_out}"
                assert await session.fetchval(f"{insert} RETURNING id", subject)
                assert await session.fetchval(BEGUN, subject), left_out


async def test_one_column_may_be_null(session: asyncpg.Connection) -> None:
    for column in ("id", "step", "data", "timezone", "status", "wake_at", "tag"):
        subjects = [f"ada {column}", f"bob {column}"]
        async with session.transaction():
            await session.execute(
                f"INSERT INTO sequencer.enrollments (sequence, subject, {column})"
                " SELECT 's', subject, NULL FROM unnest($1::text[]) AS subject",
                subjects,
            )
            for subject in subjects:
                assert await session.fetchval(BEGUN, subject), column


async def test_json_null_is_no_data(session: asyncpg.Connection) -> None:
    async with session.transaction():
        await session.execute(
            "INSERT INTO sequencer.enrollments (sequence, subject, data) VALUES ('s', 'ada', $1)",
            "null",
        )
        assert await session.fetchval(BEGUN, "ada")


async def test_null_as_an_argument_of_enroll_means_not_given(session: asyncpg.Connection) -> None:
    async with session.transaction():
        assert await session.fetchval(
            "SELECT sequencer.enroll('s', 'ada', data => NULL, timezone => NULL, wake_at => NULL,"
            " step => NULL)"
        )
        assert await session.fetchval(BEGUN, "ada")


async def test_an_ended_enrollment_has_no_wake_time(connection: asyncpg.Connection) -> None:
    await define(connection, "s", ("first", "GoTo", "{}", None))
    await connection.execute(
        "INSERT INTO sequencer.enrollments (sequence, subject, status, wake_at, data)"
        " VALUES ('s', 'ada', 'completed', NULL, NULL)"
    )
    row = await connection.fetchrow("SELECT wake_at, ended_at, data FROM sequencer.enrollments")
    assert (row["wake_at"], row["data"]) == (None, "{}")
    assert row["ended_at"] is not None


@pytest.mark.parametrize(
    "target", ["(subject, sequence, entry)", "ON CONSTRAINT one_entry"], ids=["columns", "name"]
)
async def test_an_upsert_finds_the_existing_enrollment(
    session: asyncpg.Connection, target: str
) -> None:
    upsert = (
        "INSERT INTO sequencer.enrollments AS e (sequence, subject, data) VALUES ('s', 'ada', $1)"
        f" ON CONFLICT {target} DO UPDATE SET data = e.data || excluded.data RETURNING id, data"
    )
    first = await session.fetchrow(upsert, '{"a": 1}')
    second = await session.fetchrow(upsert, '{"b": 2}')
    assert first["id"] == second["id"]
    assert second["data"] == '{"a": 1, "b": 2}'
    await session.execute("UPDATE sequencer.enrollments SET status = 'cancelled'")
    third = await session.fetchrow(upsert, '{"c": 3}')  # a new enrollment after the end
    assert (third["id"] > first["id"], third["data"]) == (True, '{"c": 3}')


async def test_bulk_inserts_enroll(session: asyncpg.Connection) -> None:
    async with session.transaction():
        rows = await session.fetch(
            f'INSERT INTO {QUOTED}."enrollments" ("id", "sequence", "subject", "data", "wake_at")'
            " VALUES (default, 's', 'ada', null, default), (default, 's', 'bob', default, null)"
            ' RETURNING "id"'
        )
        assert len({row["id"] for row in rows}) == 2
        assert await session.fetchval(BEGUN, "ada")
        assert await session.fetchval(BEGUN, "bob")
