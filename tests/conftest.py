"""Databases for tests: a real server, a migrated template, a clone of it for each test.

The server is the embedded one, started for the session, or the one that SEQUENCERD_TEST_DATABASE
names (a superuser's URL).
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit
from uuid import uuid4

import asyncpg
import pytest

from sequencerd.storage import embedded, migrate

# a shell's background jobs ignore it, and so would every program that tests interrupt
signal.signal(signal.SIGINT, signal.default_int_handler)

FAST = {
    "fsync": "off",
    "synchronous_commit": "off",
    "full_page_writes": "off",
    "max_prepared_transactions": "10",
}


def with_database(url: str, name: str) -> str:
    """The URL of another database of the same server."""
    return urlunsplit(urlsplit(url)._replace(path=f"/{name}"))


def with_login(url: str, user: str) -> str:
    """The same URL for another user."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=f"{user}@{parts.netloc.rpartition('@')[2]}"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what `make quick` leaves out: tests that start programs, and chaos."""
    for item in items:
        fixtures = getattr(item, "fixturenames", ())
        module = getattr(item, "module", None)
        starts = "sequencerd" in fixtures or hasattr(module, "subprocess")
        if starts or "chaos" in item.path.parts:
            item.add_marker("slow")


# taken out of the environment: to the programs that tests start it is no setting
SERVER = os.environ.pop("SEQUENCERD_TEST_DATABASE", None)


@pytest.fixture(scope="session")
def server() -> Iterator[str]:
    if url := SERVER:
        yield url
        return
    # not within pytest's folder: root runs the server as a user who can't enter that
    folder = Path(tempfile.mkdtemp(prefix="sequencerd-"))
    try:
        with embedded.running(folder, settings=FAST) as started:
            yield started.url
    finally:
        shutil.rmtree(folder)


@pytest.fixture(scope="session")
def template(server: str) -> Iterator[str]:
    """The name of a database with the schema in it."""
    name = f"template_{uuid4().hex[:12]}"

    async def make() -> None:
        await execute(server, f"CREATE DATABASE {name}")
        connection = await asyncpg.connect(with_database(server, name))
        await migrate.migrate(connection)
        await migrate.grant(connection)
        await connection.close()

    asyncio.run(make())
    yield name
    asyncio.run(execute(server, f"DROP DATABASE {name} WITH (FORCE)"))


@pytest.fixture
async def database(server: str, template: str) -> AsyncIterator[str]:
    """The URL of a database of its own for one test."""
    name = f"test_{uuid4().hex[:12]}"
    await execute(server, f"CREATE DATABASE {name} TEMPLATE {template}")
    yield with_database(server, name)
    await execute(server, f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
async def connection(database: str) -> AsyncIterator[asyncpg.Connection]:
    """An application's connection."""
    connection = await asyncpg.connect(database)
    yield connection
    await connection.close()


async def execute(url: str, statement: str) -> None:
    connection = await asyncpg.connect(url)
    try:
        await connection.execute(statement)
    finally:
        await connection.close()


@pytest.fixture
def repository() -> Path:
    return Path(__file__).parent.parent


# --- the command line

SEQUENCE = """
name: s
steps:
  - {name: first, type: WaitForDuration, config: {amount: 3, unit: days}}
  - {name: second, type: GoTo}
"""


class Command:
    """Runs `sequencerd` on a test's database."""

    def __init__(self, database: str, folder: Path) -> None:
        self.variables = {**os.environ, "SEQUENCERD_DATABASE": database}
        self.folder = folder
        self.errors = ""

    def __call__(self, *arguments: str, code: int = 0) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "sequencerd", *arguments],
            env=self.variables,
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        assert done.returncode == code, done.stdout + done.stderr
        self.errors = done.stderr
        return done.stdout


@pytest.fixture
def sequencerd(database: str, tmp_path: Path) -> Command:
    return Command(database, tmp_path)


@pytest.fixture
def applied(sequencerd: Command, tmp_path: Path) -> Command:
    (tmp_path / "s.yaml").write_text(SEQUENCE)
    added = "s: new\n  added first (WaitForDuration)\n  added second (GoTo)\n"
    assert sequencerd("apply", "s.yaml") == added
    assert sequencerd("apply", "s.yaml") == "s: nothing changed\n"
    return sequencerd
