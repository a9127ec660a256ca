"""Two shards in two schemas of one database, for tests of what works on several."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import asyncpg
import pytest

from sequencerd.core.routing import ShardNumber
from sequencerd.storage import connections, migrate
from sequencerd.storage.connections import Shard
from tests.helpers.command_line import Command
from tests.helpers.copies import Copies
from tests.helpers.databases import Administrator, with_database

SEQUENCE = """
name: s
description: Reminds of nothing.
steps:
  - {name: first, type: WaitForDuration, config: {amount: 3, unit: days}}
  - {name: second, type: GoTo}
"""
NAMES = ("a", "b")
NOWHERE = "postgresql://127.0.0.1:1/app"


def place(url: str, name: str) -> Shard:
    return Shard(url, f"shard-{name}", name, ShardNumber(NAMES.index(name), len(NAMES)))


@pytest.fixture(scope="session")
def shards_template(server: str, administrator: Administrator) -> Iterator[str]:
    """The name of a database with two shards."""
    with administrator.database() as name:

        async def make() -> None:
            for shard in NAMES:
                made = place(with_database(server, name), shard)
                connection = await connections.connect(made)
                await migrate.migrate(connection, number=made.number)
                await migrate.grant(connection)
                await connection.close()

        asyncio.run(make())
        yield name


@pytest.fixture(scope="session")
def copies_of_shards(
    server: str, administrator: Administrator, shards_template: str
) -> Iterator[Copies]:
    made = Copies(administrator, server, shards_template)
    yield made
    made.close()


@pytest.fixture
def shards_url(copies_of_shards: Copies) -> Iterator[str]:
    with copies_of_shards.one() as url:
        yield url


@pytest.fixture
async def shards(shards_url: str) -> AsyncIterator[dict[str, asyncpg.Connection]]:
    """A connection to each of the two."""
    async with connections_to_shards(shards_url) as made:
        yield made


@asynccontextmanager
async def connections_to_shards(url: str) -> AsyncIterator[dict[str, asyncpg.Connection]]:
    made = {name: await connections.connect(place(url, name)) for name in NAMES}
    yield made
    for connection in made.values():
        await connection.close()


@pytest.fixture
def sharded(shards_url: str, tmp_path: Path) -> Command:
    """The command, with a sequence in the folder that is not applied yet."""
    command = Command(shards_url, tmp_path)
    command.without_database()
    command.variables["SEQUENCERD_CONFIG"] = str(tmp_path / "sequencerd.toml")
    configure(command, a=shards_url, b=shards_url)
    (tmp_path / "s.yaml").write_text(SEQUENCE)
    return command


def configure(command: Command, **urls: str) -> None:
    """Write the settings of shards."""
    text = "".join(
        f'[shards.{name}]\nurl = "{url}"\nschema = "shard-{name}"\n' for name, url in urls.items()
    )
    (command.folder / "sequencerd.toml").write_text(text)


@pytest.fixture
def filled(sharded: Command) -> Command:
    """With the sequence, and enrollments a/1, a/2, b/1, b/2 of the subjects a1, a2, b1, b2."""
    sharded("apply", "s.yaml")
    for name in NAMES:
        for number in (1, 2):
            sharded("enroll", "s", f"{name}{number}", "--shard", name, "--data", '{"x": 1}')
    return sharded
