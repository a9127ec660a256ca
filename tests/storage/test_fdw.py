"""A front on postgres_fdw: three clusters behind one table."""

from __future__ import annotations

import asyncio
import os
import pwd
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack
from pathlib import Path

import asyncpg
import pytest

from sequencerd.core.routing import shard_of
from sequencerd.storage import migrate
from sequencerd.storage.connections import Shard, connect
from sequencerd.storage.fdw import front
from tests.helpers.clusters import cluster, programs_with
from tests.helpers.databases import execute, with_database
from tests.helpers.engines import define

pytestmark = pytest.mark.slow

NAMES = ("north", "south-1", "east")
SUBJECTS = [f"user-{number}" for number in range(60)]
WAIT = ("wait", "WaitForDuration", '{"amount": 3, "unit": "days"}', None)


SCHEMAS = ("sequencer", "sequencer", "East")


@pytest.fixture(scope="module")
def clusters() -> Iterator[list[str]]:
    """The URLs of three servers with our schema; the last one's is of another name."""
    programs = programs_with("postgres_fdw")
    with ExitStack() as stack:
        urls = [stack.enter_context(cluster(programs)) for _ in NAMES]
        for url, schema in zip(urls, SCHEMAS, strict=True):
            asyncio.run(prepare(Shard(url, schema)))
        yield urls


async def prepare(shard: Shard) -> None:
    connection = await connect(shard)
    await migrate.migrate(connection)
    await define(connection, "s", WAIT)
    await connection.close()


@pytest.fixture
async def shards(clusters: list[str]) -> AsyncIterator[dict[str, asyncpg.Connection]]:
    """A connection to each server, without enrollments of former tests."""
    found = {}
    for name, url, schema in zip(NAMES, clusters, SCHEMAS, strict=True):
        found[name] = await connect(Shard(url, schema))
        await found[name].execute("TRUNCATE sequencer.enrollments, sequencer.events")
    yield found
    for connection in found.values():
        await connection.close()


@pytest.fixture(scope="module")
def application_url(clusters: list[str]) -> str:
    """The URL of the front, in a database of the first server."""
    url = with_database(clusters[0], "front")

    async def make() -> None:
        await execute(clusters[0], "CREATE DATABASE front")
        connection = await connect_to_front(url)
        places = map(Shard, clusters, SCHEMAS)
        await connection.execute(front(dict(zip(NAMES, places, strict=True))))
        await connection.close()

    asyncio.run(make())
    return url


async def connect_to_front(url: str) -> asyncpg.Connection:
    """Connect to where the schema is sequencer in any case."""
    return await asyncpg.connect(url, connection_class=asyncpg.Connection)


@pytest.fixture
async def application(
    application_url: str, shards: dict[str, asyncpg.Connection]
) -> AsyncIterator[asyncpg.Connection]:
    """An application's connection to the front."""
    connection = await connect_to_front(application_url)
    yield connection
    await connection.close()


async def subjects(shards: dict[str, asyncpg.Connection], where: str = "true") -> list[set[str]]:
    """The subjects of each shard that a condition holds for."""
    query = f"SELECT subject FROM sequencer.enrollments WHERE {where}"
    return [{row["subject"] for row in await shard.fetch(query)} for shard in shards.values()]


def divided(among: list[str]) -> list[set[str]]:
    """The same as it should be."""
    return [
        {subject for subject in among if shard_of(subject, len(NAMES)) == number}
        for number in range(len(NAMES))
    ]


ENROLL = "INSERT INTO sequencer.enrollments (sequence, subject) SELECT 's', unnest($1::text[])"


async def test_enrolling_a_single_subject_and_many(
    application: asyncpg.Connection, shards: dict[str, asyncpg.Connection]
) -> None:
    insert = "INSERT INTO sequencer.enrollments (sequence, subject, data) VALUES ('s', $1, $2)"
    await application.execute(insert, SUBJECTS[0], '{"plan": "pro"}')
    await application.execute(ENROLL, SUBJECTS[1:50])
    await application.copy_records_to_table(
        "enrollments",
        schema_name="sequencer",
        columns=["sequence", "subject"],
        records=[("s", subject) for subject in SUBJECTS[50:]],
    )
    assert await subjects(shards) == divided(SUBJECTS)
    assert await subjects(shards, "data = '{}'") == divided(SUBJECTS[1:])
    assert await subjects(shards, "status = 'active' AND wake_at <= now()") == divided(SUBJECTS)
    read = "SELECT subject FROM sequencer.enrollments WHERE sequence = 's' AND status = 'active'"
    assert {subject for (subject,) in await application.fetch(read)} == set(SUBJECTS)


async def test_changing_data_and_cancelling_by_subject(
    application: asyncpg.Connection, shards: dict[str, asyncpg.Connection]
) -> None:
    await application.execute(ENROLL, SUBJECTS)
    change = (
        """UPDATE sequencer.enrollments SET data = data || '{"paid": true}' WHERE subject = $1"""
    )
    assert await application.execute(change, "user-7") == "UPDATE 1"
    assert await subjects(shards, "data ? 'paid'") == divided(["user-7"])
    cancel = "UPDATE sequencer.enrollments SET status = 'cancelled' WHERE subject = ANY ($1)"
    assert await application.execute(cancel, SUBJECTS[:20]) == "UPDATE 20"
    assert await subjects(shards, "status = 'cancelled'") == divided(SUBJECTS[:20])


async def test_an_application_needs_privileges_on_the_two_tables_alone(
    application: asyncpg.Connection, shards: dict[str, asyncpg.Connection]
) -> None:
    await application.execute(
        """
        CREATE ROLE app;
        GRANT USAGE ON SCHEMA sequencer TO app;
        GRANT SELECT, INSERT, UPDATE ON sequencer.enrollments TO app;
        GRANT INSERT ON sequencer.reevaluations TO app;
        SET ROLE app
        """
    )
    try:
        await application.execute(ENROLL, SUBJECTS)
        await application.execute("UPDATE sequencer.enrollments SET data = '{}'")
        await application.execute("INSERT INTO sequencer.reevaluations (subject) VALUES ('user-7')")
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await application.execute("DELETE FROM sequencer.enrollments")
    finally:
        await application.execute("RESET ROLE; DROP OWNED BY app; DROP ROLE app")
    assert await subjects(shards) == divided(SUBJECTS)


async def test_no_subject_is_left_in_the_shard_of_another(
    application: asyncpg.Connection, shards: dict[str, asyncpg.Connection]
) -> None:
    await application.execute(ENROLL, SUBJECTS)
    rename = "UPDATE sequencer.enrollments SET subject = 'eve' WHERE subject = 'user-7'"
    with pytest.raises(asyncpg.FeatureNotSupportedError, match="would not move to its shard"):
        await application.execute(rename)
    assert await subjects(shards) == divided(SUBJECTS)


async def test_only_one_shard_is_queried_if_the_condition_names_it(
    application: asyncpg.Connection,
) -> None:
    """A condition on the subject alone is sent to all shards."""
    explain = "EXPLAIN UPDATE sequencer.enrollments SET data = '{}' WHERE subject = 'user-7'"
    number = "sequencer.shard_of(subject, 3) = sequencer.shard_of('user-7', 3)"
    for condition, asked in (("", 3), (f" AND {number}", 1)):
        lines = [line for (line,) in await application.fetch(explain + condition)]
        assert sum("->  Foreign" in line for line in lines) == asked


async def test_a_row_that_changes_meanwhile_is_an_error_to_be_retried(
    application: asyncpg.Connection, shards: dict[str, asyncpg.Connection]
) -> None:
    """The shards are read as of the transaction's first statement."""
    await application.execute(ENROLL, ["user-7"])
    change = "UPDATE sequencer.enrollments SET data = '{}'"
    transaction = application.transaction()
    await transaction.start()
    await application.fetch("SELECT FROM sequencer.enrollments")
    for shard in shards.values():
        await shard.execute(change)
    with pytest.raises(asyncpg.SerializationError):
        await application.execute(change)
    await transaction.rollback()
    assert await application.execute(change) == "UPDATE 1"


async def test_a_single_row_returns_the_id(
    application: asyncpg.Connection, shards: dict[str, asyncpg.Connection]
) -> None:
    insert = "INSERT INTO sequencer.enrollments (sequence, subject) VALUES ('s', $1) RETURNING id"
    id_ = await application.fetchval(insert, "user-7")
    assert await subjects(shards, f"id = {id_}") == divided(["user-7"])


async def test_a_rollback_enrolls_in_no_shard(
    application: asyncpg.Connection, shards: dict[str, asyncpg.Connection]
) -> None:
    transaction = application.transaction()
    await transaction.start()
    await application.execute(ENROLL, SUBJECTS)
    await transaction.rollback()
    assert await subjects(shards) == divided([])


async def test_a_subject_that_is_enrolled_already_is_refused_or_skipped(
    application: asyncpg.Connection, shards: dict[str, asyncpg.Connection]
) -> None:
    await application.execute(ENROLL, SUBJECTS[:10])
    with pytest.raises(asyncpg.UniqueViolationError):
        await application.execute(ENROLL, SUBJECTS)
    assert await subjects(shards) == divided(SUBJECTS[:10])
    assert await application.execute(f"{ENROLL} ON CONFLICT DO NOTHING", SUBJECTS) == "INSERT 0 50"
    assert await subjects(shards) == divided(SUBJECTS)


async def test_a_reevaluation_reaches_each_shard(
    application: asyncpg.Connection, shards: dict[str, asyncpg.Connection]
) -> None:
    await application.execute(ENROLL, SUBJECTS)
    for shard in shards.values():
        await shard.execute(
            "UPDATE sequencer.enrollments"
            " SET wake_at = now() + interval '1 day', entered_at = now()"
        )
    insert = "INSERT INTO sequencer.reevaluations (subject) SELECT unnest($1::text[])"
    await application.execute(insert, SUBJECTS[:5])
    assert await subjects(shards, "wake_at <= now()") == divided(SUBJECTS[:5])


async def test_a_wrong_row_is_refused_by_its_shard(application: asyncpg.Connection) -> None:
    with pytest.raises(asyncpg.PostgresError, match="nope"):
        await application.execute(
            "INSERT INTO sequencer.enrollments (sequence, subject) VALUES ('nope', 'user-7')"
        )


def test_no_password_is_printed_and_names_are_quoted() -> None:
    url = "postgresql://us'er:secret@db1,db2:6543/app?sslmode=require"
    printed = front({"eu-1": Shard(url, 'a"b'), "eu.1": Shard(url)})
    assert "secret" not in printed
    assert "password :'password_eu_1')" in printed
    assert "password :'password_eu_1_1')" in printed
    assert "user 'us''er'" in printed
    assert "host 'db1,db2'" in printed
    assert "sslmode 'require'" in printed
    assert 'CREATE SERVER "sequencer_eu-1"' in printed


def test_what_a_connection_takes_from_files_and_the_environment_is_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "services").write_text("[north]\nhost=db1\ndbname=app\nuser=ada\n")
    (tmp_path / "passwords").write_text("db1:*:*:ada:secret\n")
    (tmp_path / "passwords").chmod(0o600)
    monkeypatch.setenv("PGSERVICEFILE", str(tmp_path / "services"))
    monkeypatch.setenv("PGPASSFILE", str(tmp_path / "passwords"))
    monkeypatch.setenv("PGPORT", "6543")
    url = "service=north fallback_application_name=x"
    server = "OPTIONS (port '6543', host 'db1', dbname 'app', async_capable 'true'"
    printed = front({"a": Shard(url)})
    assert server in printed
    assert "(user 'ada', password :'password_a')" in printed
    monkeypatch.delenv("PGPASSFILE")
    assert "(user 'ada', password_required 'false')" in front({"a": Shard(url)})
    assert f"(user '{pwd.getpwuid(os.geteuid()).pw_name}', " in front(
        {"a": Shard("postgresql://db1/app")}
    )
