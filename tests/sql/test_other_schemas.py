"""Everything in another schema, and two schemas in one database that don't disturb each other."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import asyncpg
import pytest

from sequencerd.errors import MigrationError
from sequencerd.settings import SCHEMA
from sequencerd.storage import connections, migrate, migrations
from sequencerd.storage.connections import Shard
from sequencerd.storage.schemas import in_schema
from sequencerd.storage.statements import QUERIES
from tests.helpers.command_line import Command
from tests.helpers.copies import Copies
from tests.helpers.databases import Administrator, in_usual_schema, with_database
from tests.helpers.engines import ALL_ENDED, Recorder, define, enroll, running_engine, until, way
from tests.sql.test_golden_schema import GOLDEN, describe

pytestmark = pytest.mark.slow  # each test migrates a schema

NAME = 'My "Größe" {x} №1; --. /*'.ljust(59, "x")
"""What is allowed in a name, and in 63 bytes as many as there can be."""
QUOTED = '"' + NAME.replace('"', '""') + '"'


@pytest.fixture(scope="module")
def copies_with_other(server: str, administrator: Administrator, template: str) -> Iterator[Copies]:
    """Copies of a database with the usual schema and the other one."""
    name = administrator.create(template)

    async def make() -> None:
        opened = await connections.connect(Shard(with_database(server, name), NAME))
        await migrate.migrate(opened)
        await migrate.grant(opened)
        await opened.close()

    asyncio.run(make())
    made = Copies(administrator, server, name)
    yield made
    made.close()
    administrator.drop(name)


@pytest.fixture
def database(request: pytest.FixtureRequest) -> Iterator[str]:
    """With the other schema if the test uses it."""
    name = "copies_with_other" if "other" in request.fixturenames else "copies"
    with request.getfixturevalue(name).one() as url:
        yield url


@pytest.fixture
async def other(database: str) -> AsyncIterator[asyncpg.Connection]:
    """A connection to another schema of the test's database."""
    opened = await connections.connect(Shard(database, NAME))
    yield opened
    await opened.close()


async def test_the_schema_is_the_same_under_another_name(other: asyncpg.Connection) -> None:
    text = await describe(other)
    assert text.replace(QUOTED, SCHEMA) == in_schema(
        GOLDEN.read_text(encoding="utf-8"), NAME
    ).replace(QUOTED, SCHEMA)
    assert await other.fetch(QUERIES["missing_grants"]) == []


async def test_nothing_names_the_usual_schema(other: asyncpg.Connection) -> None:
    own = re.compile(r"\bsequencer\b(?!\.(reason|notify|max_data)\b)")
    sources = await other.fetch(
        "SELECT prosrc FROM pg_proc WHERE pronamespace = 'sequencer'::regnamespace"
    )
    comments = await other.fetch(
        "SELECT description FROM pg_description AS d JOIN pg_class AS c ON c.oid = d.objoid"
        " WHERE c.relnamespace = 'sequencer'::regnamespace"
    )
    assert len(sources) > 40
    assert len(comments) > 100
    for (text,) in (*sources, *comments):
        assert not own.search(re.sub("--.*", "", text)), text


async def test_every_statement_runs_in_another_schema(
    connection: asyncpg.Connection, other: asyncpg.Connection
) -> None:
    await connection.execute("DROP SCHEMA sequencer CASCADE")  # what names it fails
    for name, query in QUERIES.items():
        if name != "create_migrations" and not re.search(r"{schema}|{source}", query):
            await other.prepare(query)
    assert await other.fetchval(QUERIES["has_migrations"])


async def test_a_rejection_names_the_schema(other: asyncpg.Connection) -> None:
    with pytest.raises(asyncpg.ForeignKeyViolationError) as raised:
        await enroll(other, "nothing", "ada")
    assert raised.value.schema_name == NAME
    assert raised.value.hint == f"SELECT name FROM {QUOTED}.sequences lists all sequences."


async def test_a_database_without_the_schema_is_recognised(server: str, template: str) -> None:
    connection = await connections.connect(Shard(with_database(server, template), "nowhere"))
    with pytest.raises(MigrationError, match="no schema nowhere yet"):
        await migrate.check(connection)
    await connection.close()


@in_usual_schema
async def test_settings_of_triggers_are_those_of_the_schema(
    connection: asyncpg.Connection, other: asyncpg.Connection
) -> None:
    await define(connection, "s", ("first", "GoTo", "{}", None))
    await define(other, "s", ("another", "GoTo", "{}", None))
    await asyncpg.Connection.execute(
        other,
        "WITH here AS (INSERT INTO sequencer.enrollments (sequence, subject) VALUES ('s', 'ada'))"
        f" INSERT INTO {QUOTED}.enrollments (sequence, subject) VALUES ('s', 'ada')",
    )
    read = "SELECT step FROM sequencer.enrollments"
    assert (await connection.fetchval(read), await other.fetchval(read)) == ("first", "another")


async def test_two_daemons_in_one_database_do_not_disturb_each_other(
    connection: asyncpg.Connection, other: asyncpg.Connection, database: str
) -> None:
    ours, theirs = Recorder(), Recorder()
    async with (
        running_engine(database, {"Note": ours}, sweep=3600) as engine,
        running_engine(Shard(database, NAME), {"Note": theirs}, sweep=3600) as there,
    ):
        # each holds the notify lock of its schema, or else its triggers would send nothing
        await until(
            connection,
            "SELECT count(*) = 2 FROM pg_locks WHERE objid = 4 AND granted",
        )
        await define(connection, "s", ("note", "Note", "{}", None))
        await define(other, "s", ("remark", "Note", "{}", None))
        mine = await enroll(connection, "s", "ada")
        foreign = await enroll(other, "s", "ada")
        assert mine == foreign
        await until(connection, ALL_ENDED)
        await until(other, ALL_ENDED)
        assert len(engine.catalog.sequences) == len(there.catalog.sequences) == 1
        assert (len(ours.keys), len(theirs.keys)) == (1, 1)
        assert ours.keys != theirs.keys  # the same id and visit, and yet never the same key
        assert await way(connection, mine) == ["note enrolled", "note next", "note completed"]
        assert await way(other, foreign) == ["remark enrolled", "remark next", "remark completed"]
        daemons = "SELECT name FROM sequencer.daemons"
        assert await connection.fetch(daemons) != await other.fetch(daemons)

    assert (await other.fetchrow(QUERIES["forget"], "ada"))["enrollments"] == 1
    assert await connection.fetchval("SELECT count(*) FROM sequencer.enrollments") == 1
    future = "SELECT deleted FROM sequencer.delete_ended(now() + interval '1 day', 10)"
    assert await connection.fetchval(future) == 1
    assert await other.fetchval(future) == 0


async def test_dropping_a_schema_does_not_affect_another(
    connection: asyncpg.Connection, other: asyncpg.Connection, database: str
) -> None:
    before, ours = await describe(connection), Recorder()
    async with (
        running_engine(database, {"Note": ours}, sweep=3600),
        running_engine(Shard(database, NAME)),
    ):
        await define(connection, "s", ("note", "Note", "{}", None))
        await other.execute("DROP SCHEMA sequencer CASCADE")
        await enroll(connection, "s", "ada")
        await until(connection, ALL_ENDED)
    assert len(ours.keys) == 1
    assert await describe(connection) == before
    assert await connection.fetch(QUERIES["missing_grants"]) == []
    with pytest.raises(MigrationError, match="sequencerd migrate"):
        await migrate.check(other)
    assert len(await migrate.migrate(other)) == len(migrations.available())  # it starts over
    assert await migrate.grant(other) == []


async def test_several_schemas_are_created_at_the_same_time(database: str) -> None:
    async def make(schema: str) -> list[migrate.Ungranted]:
        opened = await connections.connect(Shard(database, schema))
        try:
            await migrate.migrate(opened)
            return await migrate.grant(opened)
        finally:
            await opened.close()

    assert await asyncio.gather(*map(make, ("a", "b", "A"))) == [[], [], []]


async def test_locks_and_notifications_are_those_of_the_schema(
    connection: asyncpg.Connection, other: asyncpg.Connection
) -> None:
    heard: list[str] = []
    await other.add_listener(NAME, lambda *call: heard.append(call[-1]))
    for lock in ("lock_migrations", "acquire_requests_lock"):
        async with connection.transaction(), other.transaction():  # neither waits for the other
            await connection.fetch(QUERIES[lock])
            await other.fetch(QUERIES[lock])
    await connection.execute("SELECT sequencer.reevaluate(subject => 'ours')")
    await connection.execute("SELECT pg_notify('sequencer', 'ours')")
    await other.execute("SELECT pg_notify('sequencer', 'theirs')")
    await until(other, "SELECT true")
    assert heard == ["theirs"]


async def test_commands_work_in_the_schema_that_is_set(
    sequencerd: Command, connection: asyncpg.Connection, tmp_path: Path
) -> None:
    sequencerd.variables["SEQUENCERD_DATABASE_SCHEMA"] = NAME
    (tmp_path / "s.yaml").write_text("name: s\nsteps:\n  - {name: note, type: GoTo}\n")
    sequencerd("status", code=1)
    assert f"no schema {NAME} yet; run: sequencerd migrate" in sequencerd.errors
    assert "applied 0001" in sequencerd("migrate")
    assert sequencerd("migrate") == "the schema is up to date\n"
    assert sequencerd("grants") == ""
    sequencerd("apply", "s.yaml")
    sequencerd("enroll", "s", "ada")
    assert "ada" in sequencerd("list")
    assert await connection.fetchval("SELECT count(*) FROM sequencer.sequences") == 0
    drop = f"DROP TRIGGER notify_on_insert ON {QUOTED}.enrollments"
    await asyncpg.Connection.execute(connection, drop)
    advice = f"ALTER TABLE {QUOTED}.TABLE ENABLE TRIGGER ALL; create dropped triggers again"
    assert advice in sequencerd("doctor", code=1)
