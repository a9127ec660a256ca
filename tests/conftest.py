"""Databases for tests: a real server, a migrated template, a clone of it for each test.

The server is the embedded one, started for the session, or the one that SEQUENCERD_TEST_DATABASE
names (a superuser's URL).
"""

from __future__ import annotations

import asyncio
import gc
import os
import re
import signal
import sys
from collections.abc import AsyncIterator, Iterator
from functools import partial
from itertools import groupby
from pathlib import Path

import asyncpg
import hypothesis
import pytest

from sequencerd import settings
from sequencerd.storage import embedded, migrate
from sequencerd.storage.connections import connect
from sequencerd.storage.schemas import connection_class
from tests.helpers import costs, forked_programs, leftovers, shared
from tests.helpers.command_line import Command
from tests.helpers.copies import Copies
from tests.helpers.databases import (
    FAST_SETTINGS,
    INITIALIZED,
    SCHEMA,
    Administrator,
    initialize_server,
    introspect_once,
    server_folder,
    shard,
    with_database,
)

# A shell's background jobs ignore SIGINT, and nohup's SIGHUP: so would every program that tests
# interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# Programs that tests start keep their bytecode, outside of the clone: it saves half of their time.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
os.environ.setdefault("PYTHONPYCACHEPREFIX", str(Path(sys.prefix) / "bytecode"))
# As for most users: without a buffer, Python has nothing left to write at exit.
os.environ.pop("PYTHONUNBUFFERED", None)

# Deadlines are off, because the machine may be busy. `make quick` tries a third of the examples,
# and `make test THOROUGH=1` ten times as many.
PATIENT = hypothesis.settings(
    deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow], max_examples=30
)
hypothesis.settings.register_profile("brief", PATIENT)
hypothesis.settings.register_profile("quick", PATIENT, max_examples=10)
hypothesis.settings.register_profile("thorough", PATIENT, max_examples=300)
hypothesis.settings.load_profile("brief")

gc.disable()  # until all tests are collected: their modules stay
introspect_once()
shared.read_entry_points_once()
shared.make_parser_once()
shared.trust_one_authority()
shared.hash_passwords_once()
forked_programs.use()

pytest_plugins = ("tests.helpers.packages", "tests.helpers.shards")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(leftovers)
    config.add_cleanup(INITIALIZED.close)
    if config.getoption("durations"):
        config.pluginmanager.register(costs)
        config.pluginmanager.register(costs.Costs())


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say loudly that a run was without a browser."""
    for skipped in terminalreporter.stats.get("skipped", ()):
        if "test_browser.py" in skipped.nodeid:
            _, _, reason = skipped.longrepr
            terminalreporter.section("THE BROWSER TESTS DID NOT RUN", red=True, bold=True)
            terminalreporter.line(reason, red=True, bold=True)
            return


STARTS_PROGRAMS = re.compile(r"subprocess|start_sequencerd|\bbeside\(")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what `make quick` leaves out: modules whose tests start programs, chaos, and tests of
    the console on a database.

    Tests that start programs or take 0.3 s of CPU time have the mark themselves.
    """
    for path, of_module in groupby(items, lambda item: item.path):
        all_are_slow = "chaos" in path.parts or STARTS_PROGRAMS.search(path.read_text())
        for item in of_module:
            fixtures = getattr(item, "fixturenames", ())
            if all_are_slow or ("console" in path.parts and "server" in fixtures):
                item.add_marker("slow")


def pytest_collection_finish() -> None:
    shared.collect_garbage_rarely()


# with SEQUENCERD_TEST_SCHEMA, the statements of tests are executed in that schema as well
if SCHEMA != settings.SCHEMA:
    asyncpg.connect = partial(asyncpg.connect, connection_class=connection_class(SCHEMA))

# renamed, because to the programs that tests start it is no setting
if given := os.environ.pop("SEQUENCERD_TEST_DATABASE", None):
    os.environ["SERVER_OF_TESTS"] = given  # also for pytest's other processes
SERVER = os.environ.get("SERVER_OF_TESTS")


@pytest.fixture(scope="session")
def server(request: pytest.FixtureRequest) -> Iterator[str]:
    if url := SERVER:
        yield url
        return
    with server_folder() as folder:
        initialize_server(folder)
        with embedded.running(folder, settings=FAST_SETTINGS) as started:
            costs.watch_postgresql(request.config, started.data)
            yield started.url


@pytest.fixture(scope="session")
def administrator(server: str) -> Iterator[Administrator]:
    made = Administrator(server)
    yield made
    made.close()


@pytest.fixture(scope="session")
def template(server: str, administrator: Administrator) -> Iterator[str]:
    """The name of a database with the schema in it."""
    with administrator.database() as name:

        async def make() -> None:
            connection = await connect(shard(with_database(server, name)))
            await migrate.migrate(connection)
            await migrate.grant(connection)
            await connection.close()

        asyncio.run(make())
        yield name


@pytest.fixture(scope="session")
def copies(server: str, administrator: Administrator, template: str) -> Iterator[Copies]:
    made = Copies(administrator, server, template)
    yield made
    made.close()


@pytest.fixture
def database(copies: Copies) -> Iterator[str]:
    """The URL of a database that no other test uses meanwhile."""
    with copies.one() as url:
        yield url


@pytest.fixture
async def connection(database: str) -> AsyncIterator[asyncpg.Connection]:
    """An application's connection."""
    connection = await asyncpg.connect(database)
    yield connection
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
