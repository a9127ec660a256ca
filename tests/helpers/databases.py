"""Servers and databases for tests, and the URLs that lead to them."""

from __future__ import annotations

import asyncio
import functools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import parse_qs, urlsplit, urlunsplit
from uuid import uuid4

import asyncpg
import pytest

from sequencerd import settings
from sequencerd.storage import embedded
from sequencerd.storage.connections import Shard
from sequencerd.storage.embedded import PostgresPrograms

FAST_SETTINGS = {
    "fsync": "off",
    "synchronous_commit": "off",
    "full_page_writes": "off",
    "max_wal_size": "64MB",
    "max_prepared_transactions": "10",
    "shared_buffers": "16MB",  # each connection and each new database costs less
    "autovacuum_naptime": "1d",
}
FIRST_OF_USERS = 16384  # types with lower numbers are the same in all databases
MEMORY_FOLDER = Path("/dev/shm")
MIN_MEMORY = 2 * 1024**3  # bytes; a container's /dev/shm may be small


@contextmanager
def server_folder() -> Iterator[Path]:
    """A folder for a server, in memory where there is room: copying a database takes a quarter.

    It is not within pytest's folder: root runs the server as a user who cannot enter that.
    """
    in_memory = MEMORY_FOLDER.is_dir() and shutil.disk_usage(MEMORY_FOLDER).free > MIN_MEMORY
    folder = Path(tempfile.mkdtemp(prefix="sequencerd-", dir=MEMORY_FOLDER if in_memory else None))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


INITIALIZED = ExitStack()
"""The data that servers are started with, until the end of all tests."""


def initialize_server(folder: Path) -> None:
    """Give the embedded server in a folder its data: a copy takes a tenth of the time of initdb."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    copy_data(_embedded_data(), folder / "data")


@functools.cache
def _embedded_data() -> Path:
    folder = INITIALIZED.enter_context(server_folder())
    with embedded.running(folder, settings=FAST_SETTINGS) as server:
        return server.data


@functools.cache
def cluster_data(programs: PostgresPrograms) -> Path:
    """The data of a new cluster without databases of its own, to be copied."""
    folder = INITIALIZED.enter_context(server_folder())
    if programs.user:
        shutil.chown(folder, programs.user.pw_uid, programs.user.pw_gid)
    data = folder / "data"
    programs.run("initdb", "-D", data, "-U", "postgres", "-A", "trust", "-E", "UTF8", "--no-sync")
    return data


def copy_data(data: Path, target: Path) -> None:
    """Copy the data of a server that does not run, with their owner."""
    subprocess.run(["cp", "-a", data, target], check=True)


def with_database(url: str, name: str) -> str:
    """The URL of another database of the same server."""
    return urlunsplit(urlsplit(url)._replace(path=f"/{name}"))


def address(url: str) -> tuple[str, int]:
    """The host of a server, or the folder of its socket, and the port."""
    parts = urlsplit(url)
    (host,) = parse_qs(parts.query).get("host", [parts.hostname or "localhost"])
    (port,) = parse_qs(parts.query).get("port", [parts.port or 5432])
    return host, int(port)


async def connect_streams(url: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Connect to a server without a login, to pass on what others send."""
    host, port = address(url)
    if host.startswith("/"):
        return await asyncio.open_unix_connection(f"{host}/.s.PGSQL.{port}")
    return await asyncio.open_connection(host, port)


def through_port(url: str, port: int) -> str:
    """The same URL through a proxy at a port of this machine."""
    parts = urlsplit(url)
    netloc = f"{parts.username or 'postgres'}@127.0.0.1:{port}"
    return urlunsplit(parts._replace(netloc=netloc, query="sslmode=disable"))


def with_login(url: str, user: str) -> str:
    """The same URL for another user."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=f"{user}@{parts.netloc.rpartition('@')[2]}"))


async def make_login(connection: asyncpg.Connection, url: str, name: str, *roles: str) -> str:
    """Create a login with roles, and return the URL for it. It belongs to the whole cluster, and
    stays for the next test.
    """
    await connection.execute(
        f"DO $$ BEGIN CREATE ROLE {name} LOGIN;"
        " EXCEPTION WHEN duplicate_object OR unique_violation THEN END $$"
    )
    for role in roles:
        await connection.execute(f"GRANT sequencer_{role} TO {name}")
    return with_login(url, name)


if given := os.environ.pop("SEQUENCERD_TEST_SCHEMA", None):
    os.environ["SEQUENCERD_DATABASE_SCHEMA"] = given  # also for pytest's other processes

SCHEMA = os.environ.get("SEQUENCERD_DATABASE_SCHEMA", settings.SCHEMA)
"""The schema of all tests: another one with SEQUENCERD_TEST_SCHEMA=Other. Tests that name the usual
one elsewhere than in statements have the mark `in_usual_schema`.
"""

QUOTED = '"' + SCHEMA.replace('"', '""') + '"'

in_usual_schema = pytest.mark.skipif(
    SCHEMA != settings.SCHEMA, reason="it names the schema sequencer by itself"
)


def shard(url: str) -> Shard:
    """The schema of the tests in a database."""
    return Shard(url, SCHEMA)


class Administrator:
    """A superuser's connection that outlives tests, on an event loop of its own."""

    def __init__(self, url: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._connection = self._loop.run_until_complete(asyncpg.connect(url))

    @contextmanager
    def database(self) -> Iterator[str]:
        """The name of a new database, for as long as it is used."""
        name = self.create("template1")
        yield name
        self.drop(name)

    def create(self, template: str) -> str:
        """Make a database that is a copy of another one. Return its name."""
        name = f"test_{uuid4().hex[:12]}"
        self.execute(f"CREATE DATABASE {name} TEMPLATE {template} STRATEGY file_copy")
        return name

    def drop(self, name: str) -> None:
        self.execute(f"DROP DATABASE {name} WITH (FORCE)")

    def execute(self, statements: str) -> None:
        self._loop.run_until_complete(self._connection.execute(statements))

    def fetch(self, query: str) -> list[asyncpg.Record]:
        rows: list[asyncpg.Record] = self._loop.run_until_complete(self._connection.fetch(query))
        return rows

    def close(self) -> None:
        with suppress(OSError):  # a test may have ended the session
            self._loop.run_until_complete(self._connection.close())
        self._loop.close()


def introspect_once() -> None:
    """Let connections share what asyncpg learns of PostgreSQL's own types.

    Each connection asks for an array's type when it meets it, which takes as long as to connect.
    """
    introspect, known = asyncpg.Connection._introspect_types, {}

    async def shared(self: asyncpg.Connection, oids: Iterable[int], seconds: float) -> object:
        key = frozenset(oids)
        if key not in known:
            found = await introspect(self, oids, seconds)
            if max(key) >= FIRST_OF_USERS:
                return found
            known[key] = found[0]
            return found
        return known[key], SimpleNamespace(name="known")

    asyncpg.Connection._introspect_types = shared


async def execute(url: str, statement: str) -> None:
    """Execute one statement on a connection of its own."""
    connection = await asyncpg.connect(url)
    try:
        await connection.execute(statement)
    finally:
        await connection.close()
