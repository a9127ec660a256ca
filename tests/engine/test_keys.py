"""Idempotency keys: the same in every attempt, and nowhere else."""

from __future__ import annotations

from collections import Counter
from datetime import timedelta
from urllib.parse import urlsplit
from uuid import uuid4

import asyncpg
import pytest

from sequencerd.core.task import Failed, Result, Task
from tests.core.test_advance import at
from tests.helpers.databases import execute, with_database
from tests.helpers.engines import ALL_ENDED, Recorder, define, enroll, running_engine, until

GO = """{
    "lodashCommand": "eq",
    "value": {"type": "get", "value": "data.go"},
    "compareTo": {"type": "raw", "value": 1}
}"""
STEPS = (
    ("first", "Note", "{}", "pause"),
    ("pause", "WaitForCondition", GO, "second"),
    ("second", "Note", "{}", None),
)
PAUSE = "SELECT bool_and(step = 'pause') FROM sequencer.enrollments"


async def failing(_: Task) -> Result:
    return Failed("not now", retry_after=None)


async def keys(database: str, subjects: int = 3) -> list[str]:
    """What a database that is new makes for its first enrollments."""
    connection = await asyncpg.connect(database)
    recorder = Recorder()
    async with running_engine(database, {"Note": recorder}):
        await define(
            connection, "s", ("work", "Note", "{}", "again"), ("again", "Note", "{}", None)
        )
        for n in range(subjects):
            await enroll(connection, "s", f"u{n}")
        await until(connection, ALL_ENDED)
    await connection.close()
    return recorder.keys


@pytest.mark.slow
async def test_no_two_databases_make_the_same_key(server: str, template: str) -> None:
    made: list[str] = []
    for _ in range(2):
        name = f"test_{uuid4().hex[:12]}"
        await execute(server, f"CREATE DATABASE {name} TEMPLATE {template} STRATEGY file_copy")
        made += await keys(with_database(server, name))
        await execute(server, f"DROP DATABASE {name} WITH (FORCE)")
    assert set(Counter(made).values()) == {1}
    visits = Counter(key.rpartition(":")[0] for key in made)
    assert visits == {f"{id_}:{visit}": 2 for id_ in (1, 2, 3) for visit in (1, 2)}
    assert max(map(len, made)) <= 64


@pytest.mark.slow
async def test_a_restored_database_makes_keys_of_its_own(
    server: str, database: str, connection: asyncpg.Connection
) -> None:
    """Of what it does another way: its wait ends at another time, so the visit is another."""
    recorder = Recorder()
    async with running_engine(database, {"Note": recorder}):
        await define(connection, "s", *STEPS)
        await enroll(connection, "s", "ada")
        await until(connection, PAUSE)
    await connection.close()
    name, backup = urlsplit(database).path[1:], f"test_{uuid4().hex[:12]}"
    await execute(
        server,
        f"SELECT pg_terminate_backend(pid, 60000) FROM pg_stat_activity WHERE datname = '{name}'",
    )
    await execute(server, f"CREATE DATABASE {backup} TEMPLATE {name} STRATEGY file_copy")
    for url in (database, with_database(server, backup)):
        again = await asyncpg.connect(url)
        await again.execute("UPDATE sequencer.enrollments SET data = '{\"go\": 1}'")
        async with running_engine(url, {"Note": recorder}):
            await until(again, ALL_ENDED)
        await again.close()
    await execute(server, f"DROP DATABASE {backup} WITH (FORCE)")
    assert recorder.visits == ["1:1", "1:3", "1:3"]
    assert len(set(recorder.keys)) == 3


@pytest.mark.slow
async def test_the_key_is_the_same_in_every_attempt_of_every_daemon(
    database: str, connection: asyncpg.Connection
) -> None:
    await define(
        connection,
        "s",
        ("work", "Note", '{"retry": {"attempts": 9, "firstDelay": 0.01}}', None),
    )
    id_ = await enroll(connection, "s", "ada")
    recorder, other = Recorder(failing), Recorder()
    async with running_engine(database, {"Note": recorder}):
        await until(connection, "SELECT attempt >= 2 FROM sequencer.enrollments WHERE id = $1", id_)
    # cut off: the lease of a daemon that is gone has run out
    await connection.execute("UPDATE sequencer.enrollments SET leased_by = 'gone', wake_at = now()")
    async with running_engine(database, {"Note": other}):
        await until(connection, ALL_ENDED)
    assert other.keys
    assert len({*recorder.keys, *other.keys}) == 1


def test_the_key_of_the_first_visit_does_not_depend_on_when_it_begins() -> None:
    """After the crash of a server that loses its last commits, it begins again."""
    one = at("work")
    again = one._replace(entered_at=one.created_at + timedelta(seconds=1))
    assert one.key == again.key
    assert one._replace(visit=2).key != again._replace(visit=2).key


async def test_a_row_that_is_written_by_hand_has_a_tag(connection: asyncpg.Connection) -> None:
    await define(connection, "s", *STEPS)
    await connection.execute(
        "INSERT INTO sequencer.enrollments (sequence, subject)"
        " SELECT 's', 'u' || n FROM generate_series(1, 100) AS n"
    )
    query = "SELECT count(DISTINCT tag) FROM sequencer.enrollments"
    assert await connection.fetchval(query) == 100
