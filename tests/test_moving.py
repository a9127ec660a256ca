"""A shard moves to another server under load, by the commands of docs/moving-shards.md."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path

import asyncpg
import pytest

from sequencerd.core.routing import shard_of
from sequencerd.storage.connections import Shard, connect
from sequencerd.storage.embedded import PostgresPrograms
from tests.helpers.clusters import stoppable
from tests.helpers.command_line import Command, start_sequencerd
from tests.helpers.databases import execute, with_login
from tests.helpers.engines import ALL_ENDED, define, until
from tests.helpers.servers import Answer, HttpServer, Request, all_next, http_server
from tests.helpers.waiting import PATIENCE, eventually

STEPS = (
    ("first", "Call", "{}", "pause"),
    ("pause", "WaitForDuration", '{"amount": 300, "unit": "milliseconds"}', "second"),
    ("second", "Call", "{}", "rest"),
    ("rest", "WaitForDuration", '{"amount": 2, "unit": "seconds"}', "third"),
    ("third", "Call", "{}", None),
)
ENROLL = "INSERT INTO {}.enrollments (sequence, subject) VALUES ('s', $1) ON CONFLICT DO NOTHING"
PAUSE = 0.25
"""Seconds between the enrollments of an application, each of which costs 10 ms of CPU time."""
WAYS = {"replication": [0, 1, 2, 3, 5], "dump": [0, 2, 4, 5]}
"""Which blocks of the page."""


@pytest.fixture(scope="module")
def urls() -> Iterator[tuple[str, str]]:
    """The superuser's URLs of two servers."""
    programs = PostgresPrograms.find()
    with stoppable(programs, wal_level="logical") as old, stoppable(programs) as new:
        yield old.url, new.url


def recipe(repository: Path, way: str) -> list[list[str]]:
    """The scripts of a way, without the names of its servers, and systemctl's lines apart."""
    page = (repository / "docs/moving-shards.md").read_text()
    blocks = re.findall("^```sh\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 6
    chosen = [blocks[number] for number in WAYS[way]]
    chosen[0] = re.sub("^OLD=.*\n", "", chosen[0])
    return [
        re.split("^((?:systemctl|sequencerd) .*)\n", block, flags=re.MULTILINE) for block in chosen
    ]


class World:
    """Applications, daemons and the settings that they share."""

    def __init__(self, command: Command, folder: Path, url: str, receiver: str) -> None:
        self.command = command
        self.urls = {"a": url, "b": url}
        self.enrolled: list[str] = []
        self.denied = 0
        self.logs: list[Path] = []
        self._receiver = receiver
        self._file = folder / "sequencerd.toml"
        self._daemons: dict[str, asyncio.subprocess.Process] = {}
        command.without_database()
        command.variables["SEQUENCERD_CONFIG"] = str(self._file)
        command.variables["SEQUENCERD_LOG_FORMAT"] = "json"
        self.write_settings()

    def write_settings(self) -> None:
        shards = "".join(
            f'[shards.{name}]\nurl = "{with_login(url, "sequencerd")}"\nschema = "{name}"\n'
            for name, url in self.urls.items()
        )
        call = f'[runners.Call]\nurl = "{self._receiver}"\nallow_private = true\n'
        self._file.write_text(shards + call)

    async def systemctl(self, verb: str, unit: str) -> None:
        name = unit.partition("@")[2]
        if verb == "start":
            self.logs.append(self._file.with_name(f"{len(self.logs)}.log"))
            with self.logs[-1].open("w") as log:
                self._daemons[name] = await start_sequencerd(
                    "run",
                    env={**self.command.variables, "SEQUENCERD_INSTANCE": name},
                    stderr=log,
                )
            await eventually(lambda: '"event": "ready"' in self.logs[-1].read_text())
            return
        daemon = self._daemons.pop(name)
        daemon.send_signal(signal.SIGTERM)
        assert await daemon.wait() == 0

    async def close(self) -> None:
        for name in list(self._daemons):
            await self.systemctl("stop", f"sequencerd@{name}")

    async def follow(self, parts: Sequence[str], variables: dict[str, str]) -> None:
        """Do what a block of the page says."""
        for part in filter(None, parts):
            program, *arguments = part.split()
            if program == "systemctl":
                await self.systemctl(*arguments)
            elif program == "sequencerd":
                await asyncio.to_thread(self.command, *arguments)
            else:
                shell = await asyncio.create_subprocess_exec(
                    *("bash", "-euc", part),
                    env={**os.environ, **variables},
                    cwd=self._file.parent,
                )
                assert await shell.wait() == 0, part

    async def enroll(self, number: int, stop: asyncio.Event) -> None:
        """Enroll one subject after the other in its shard, by an application's login; one that
        the shard denies, again.
        """
        connections: dict[str, asyncpg.Connection] = {}
        subjects = (f"user-{number}-{n}" for n in range(1_000_000))
        subject = next(subjects)
        while not stop.is_set():
            shard = "ab"[shard_of(subject, 2)]
            url = with_login(self.urls[shard], "shop")
            if url not in connections:
                connections[url] = await asyncpg.connect(url)
            try:
                await connections[url].execute(ENROLL.format(shard), subject)
            except asyncpg.InsufficientPrivilegeError:
                self.denied += 1
                await asyncio.sleep(PAUSE)
                continue
            self.enrolled.append(subject)
            subject = next(subjects)
            await asyncio.sleep(PAUSE)
        for connection in connections.values():
            await connection.close()

    async def more(self, count: int) -> None:
        """Wait until so many more have been enrolled."""
        wanted = len(self.enrolled) + count
        await eventually(lambda: len(self.enrolled) >= wanted)


async def respond(request: Request) -> Answer:
    """Answer all calls, and doctor, which asks without a body."""
    return await all_next(request) if request.body else Answer()


@asynccontextmanager
async def shard(url: str, name: str) -> AsyncIterator[asyncpg.Connection]:
    connection = await connect(Shard(url, name))
    yield connection
    await connection.close()


@contextmanager
def clean(old: str, new: str) -> Iterator[None]:
    yield
    for url in (old, new):
        for name in "ab":
            asyncio.run(execute(url, f"DROP SCHEMA IF EXISTS {name} CASCADE"))


@pytest.fixture
def clusters(urls: tuple[str, str]) -> Iterator[tuple[str, str]]:
    with clean(*urls):
        yield urls


@pytest.mark.parametrize("way", WAYS)
async def test_a_shard_moves_under_load(
    clusters: tuple[str, str],
    sequencerd: Command,
    tmp_path: Path,
    repository: Path,
    way: str,
) -> None:
    old, new = clusters
    first, *others = recipe(repository, way)
    programs = f"{PostgresPrograms.find().bin}:{os.environ['PATH']}"
    variables = {"OLD": old, "NEW": new, "SCHEMA": "a", "PATH": programs}
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(http_server(respond))
        world = World(sequencerd, tmp_path, old, server.url)
        stack.push_async_callback(world.close)
        await set_up(world, old)
        for name in "ab":
            await world.systemctl("start", f"sequencerd@{name}")
        stop = asyncio.Event()
        writers = [asyncio.create_task(world.enroll(number, stop)) for number in range(2)]
        await world.more(20)
        async with asyncio.timeout(PATIENCE):
            for parts in (first, *others[:-1]):
                await world.follow(parts, variables)
                await asyncio.sleep(0)
        await eventually(lambda: world.denied)  # as long as they have the old URL
        world.urls["a"] = new
        world.write_settings()
        await world.follow(others[-1], variables)
        await world.more(20)
        stop.set()
        await asyncio.gather(*writers)
        async with shard(new, "a") as a, shard(old, "b") as b, shard(old, "a") as left:
            for connection in (a, b):
                await until(connection, ALL_ENDED)
            await check(world, server, a, b)
            assert await left.fetchval("SELECT count(*) FROM sequencer.daemons") == 0


async def set_up(world: World, url: str) -> None:
    for name in "ab":
        world.command("--database", url, "migrate", "--shard", name)
        async with shard(url, name) as connection:
            await define(connection, "s", *STEPS)
    for login, role in (("sequencerd", "daemon"), ("shop", "enroller")):
        await execute(url, f"DROP ROLE IF EXISTS {login}")
        await execute(url, f"CREATE ROLE {login} LOGIN IN ROLE sequencer_{role}")


async def check(
    world: World, server: HttpServer, a: asyncpg.Connection, b: asyncpg.Connection
) -> None:
    """Nothing is lost, and nothing happened twice."""
    found = Counter[str]()
    for connection in (a, b):
        rows = await connection.fetch(
            "SELECT subject, status, (SELECT count(*) FROM sequencer.events AS v"
            " WHERE v.enrollment_id = e.id) AS events FROM sequencer.enrollments AS e"
        )
        assert {(status, events) for _, status, events in rows} == {("completed", 7)}
        found.update(subject for subject, _, _ in rows)
    assert found == Counter(world.enrolled)
    calls = [json.loads(one.body)["runners"] for one in server.requests if one.body]
    keys = Counter(view["idempotencyKey"] for views in calls for view in views)
    assert set(keys.values()) == {1}
    assert len(keys) == 3 * len(world.enrolled)
    sent = Counter(view["subject"] for views in calls for view in views)
    assert sent == Counter(dict.fromkeys(world.enrolled, 3))


async def test_all_tables_can_be_replicated(connection: asyncpg.Connection) -> None:
    """Each has a key or a whole row as its identity, and no trigger fires for replicated rows."""
    without = await connection.fetch(
        "SELECT relname FROM pg_class AS c WHERE relnamespace = 'sequencer'::regnamespace"
        " AND relkind IN ('r', 'p') AND relreplident <> 'f' AND NOT EXISTS ("
        " SELECT FROM pg_index WHERE indrelid = c.oid AND indisprimary)"
    )
    assert without == []
    fire = await connection.fetch(
        "SELECT tgname FROM pg_trigger AS t JOIN pg_class AS c ON c.oid = tgrelid"
        " WHERE relnamespace = 'sequencer'::regnamespace AND tgenabled <> 'O'"
    )
    assert fire == []
