"""Suppressions that are removed, in whatever way, are recorded with the user and the reason."""

from __future__ import annotations

import asyncpg
import pytest

from sequencerd.runners.suppression_check import hashed
from tests.helpers.engines import define, enroll

ADA = "ada@example.com"
Recorded = list[tuple[str, str, str, str]]


@pytest.fixture(autouse=True)
async def _suppressed(connection: asyncpg.Connection) -> None:
    await connection.execute(
        "INSERT INTO sequencer.suppressions (channel, address, topic, source, created_at) VALUES"
        " ('email', $1, '*', 'unsubscribe', '2026-01-01Z'), ('email', $1, 'news', 'stop', now()),"
        " ('push', $1, '*', 'application', now())",
        ADA,
    )


async def recorded(connection: asyncpg.Connection) -> Recorded:
    rows = await connection.fetch(
        "SELECT channel, address, topic, reason FROM sequencer.removed_suppressions ORDER BY id"
    )
    return [tuple(row) for row in rows]


async def test_a_delete_by_an_application(connection: asyncpg.Connection) -> None:
    async with connection.transaction():
        await connection.execute("SET LOCAL sequencer.reason = 'asked by phone'")
        await connection.execute("SET LOCAL ROLE sequencer_enroller")
        await connection.execute(
            "DELETE FROM sequencer.suppressions WHERE address = $1 AND topic = '*'", ADA
        )
    rows = await connection.fetch("SELECT * FROM sequencer.removed_suppressions ORDER BY channel")
    assert [(row["channel"], row["source"]) for row in rows] == [
        ("email", "unsubscribe"),
        ("push", "application"),
    ]
    assert rows[0]["created_at"].year == 2026
    assert {row["address"] for row in rows} == {hashed(ADA)}
    assert {row["reason"] for row in rows} == {"by postgres: asked by phone"}


async def test_a_truncate_is_recorded(connection: asyncpg.Connection) -> None:
    async with connection.transaction():
        await connection.execute("SET LOCAL sequencer.reason = 'a new provider'")
        await connection.execute("TRUNCATE sequencer.suppressions")
    reason = "by postgres: a new provider"
    assert await recorded(connection) == [
        ("email", hashed(ADA), "*", reason),
        ("email", hashed(ADA), "news", reason),
        ("push", hashed(ADA), "*", reason),
    ]
    await connection.execute("TRUNCATE sequencer.suppressions")
    assert len(await recorded(connection)) == 3


@pytest.mark.parametrize(
    "change",
    ["address = 'bob@example.com'", "topic = 'offers'", "channel = 'sms'"],
)
async def test_an_update_that_frees_an_address_is_recorded(
    connection: asyncpg.Connection, change: str
) -> None:
    await connection.execute(f"UPDATE sequencer.suppressions SET {change} WHERE topic = 'news'")
    assert await recorded(connection) == [("email", hashed(ADA), "news", "by postgres")]


async def test_entries_that_stay_suppressed_are_not_recorded(
    connection: asyncpg.Connection,
) -> None:
    await connection.execute(
        "UPDATE sequencer.suppressions SET reason = 'x', address = upper(address)"
        " WHERE channel = 'email'"
    )
    await connection.execute(
        "INSERT INTO sequencer.suppressions (channel, address) VALUES ('push', $1);", hashed(ADA)
    )
    await connection.execute(
        "DELETE FROM sequencer.suppressions WHERE channel = 'push' AND address !~ 'sha256'"
    )
    await define(connection, "s", ("wait", "WaitForDuration", '{"amount": 1, "unit": "day"}', None))
    await enroll(connection, "s", ADA)
    await connection.execute("SELECT FROM sequencer.forget($1)", ADA)
    assert await recorded(connection) == []
    # by its hash, it is removed once
    await connection.execute("DELETE FROM sequencer.suppressions WHERE topic = 'news'")
    assert await recorded(connection) == [("email", hashed(ADA), "news", "by postgres")]


async def test_a_removal_that_is_rolled_back(connection: asyncpg.Connection) -> None:
    transaction = connection.transaction()
    await transaction.start()
    await connection.execute("DELETE FROM sequencer.suppressions")
    assert len(await recorded(connection)) == 3
    await transaction.rollback()
    assert await recorded(connection) == []
