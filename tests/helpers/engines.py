"""Engines for tests, and a runner that records what it is given."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import asyncpg
import pytest
import structlog

from sequencerd.core.backoff import Pauses
from sequencerd.core.faults import DefinitionError
from sequencerd.core.model import Limits, RetryPolicy
from sequencerd.core.task import Answer, Result, Task
from sequencerd.daemon import daemon_name
from sequencerd.engine.clock import Clock
from sequencerd.engine.lookups import Lookups
from sequencerd.engine.loop import Engine
from sequencerd.runners import Runner
from sequencerd.service.metrics import Metrics
from sequencerd.settings import EngineSettings, LookupSettings
from sequencerd.storage import connections
from sequencerd.storage.connections import Shard
from sequencerd.storage.listener import listen
from sequencerd.storage.statements import AdvisoryLock
from tests.helpers.databases import connect_streams, shard, through_port
from tests.helpers.waiting import PATIENCE, eventually

Behaviour = Callable[[Task], Awaitable[Result]]


class Held:
    """The behaviour of a side effect that has `begun`, and ends when it is `released`."""

    def __init__(self, result: Result | None = None) -> None:
        self.begun, self.released = asyncio.Event(), asyncio.Event()
        self._result = result or Answer()

    async def __call__(self, _: Task) -> Result:
        self.begun.set()
        await self.released.wait()
        return self._result


class HeldWrites:
    """The writes of an engine's claims: one has `begun`, and all wait until they are `released`."""

    def __init__(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun, self.released = asyncio.Event(), asyncio.Event()
        write = engine._moves.write

        async def hold(*arguments: Any) -> None:
            self.begun.set()
            await self.released.wait()
            await write(*arguments)

        monkeypatch.setattr(engine._moves, "write", hold)


class Recorder:
    """A runner that keeps the keys it was given, and answers what the test wants."""

    def __init__(
        self, behaviour: Behaviour | None = None, *, batch_size: int = 10, concurrency: int = 4
    ) -> None:
        self.behaviour = behaviour
        self.limits = Limits(concurrency, PATIENCE, batch_size)
        self.retry = RetryPolicy()
        self.keys: list[str] = []
        self.programs: list[object] = []
        self.views: list[Mapping[str, Any]] = []

    @property
    def visits(self) -> list[str]:
        """Of what it was given, as "id:visit"."""
        return [key.rpartition(":")[0] for key in self.keys]

    def compile(self, config: Mapping[str, Any]) -> object:
        if "bad" in config:
            raise DefinitionError("bad: this key is not known")
        return config

    async def run(self, program: object, tasks: Sequence[Task]) -> Sequence[Result]:
        results = []
        for task in tasks:
            self.keys.append(task.key)
            self.programs.append(program)
            self.views.append(task.view)
            results.append(await self.behaviour(task) if self.behaviour else Answer())
        return results

    async def close(self) -> None:
        pass


@asynccontextmanager
async def running_engine(
    url: str | Shard,
    runners: Mapping[str, Runner] | None = None,
    endpoints: Mapping[str, LookupSettings] | None = None,
    lookup_timeout: float = 30.0,
    pauses: Pauses = Pauses(),  # noqa: B008 - a tuple
    *,
    metrics: Metrics | None = None,
    redact: Callable[[str], str] = str,
    **settings: Any,
) -> AsyncIterator[Engine]:
    """A daemon in the test's own loop: engine and listener, ready."""
    at = url if isinstance(url, Shard) else shard(url)
    pool, heart = await connections.connect_pool(at, 5), await connections.connect_pool(at, 1)
    log = structlog.get_logger()
    for_lookups = await connections.connect_pool(at, 3, least=0, runs_others=True)
    lookups = Lookups(for_lookups, endpoints or {}, timeout=lookup_timeout)
    engine = Engine(
        pool,
        heart,
        runners or {},
        lookups.get,
        clock=Clock(),
        settings=EngineSettings(**settings),
        name=daemon_name(),
        log=log,
        metrics=metrics or Metrics(),
        redact=redact,
        pauses=pauses,
    )
    ready = asyncio.Event()

    async def connected() -> None:
        await engine.sweep()
        ready.set()

    listener = asyncio.create_task(listen(at, engine.receive, connected, engine.find_due, log=log))
    working = asyncio.create_task(engine.run())
    try:
        async with asyncio.timeout(PATIENCE):
            await ready.wait()
        yield engine
    finally:
        engine.stop()
        await working
        listener.cancel()
        with suppress(asyncio.CancelledError):
            await listener
        await lookups.close()
        await for_lookups.close()
        await pool.close()
        await heart.close()


@asynccontextmanager
async def losing_answers(url: str) -> AsyncIterator[tuple[str, list[bool]]]:
    """The URL of a proxy to a database. For each item in the list it loses the answer to one
    COMMIT, or to a statement that is a transaction by itself, and the connection with it.
    """
    lose: list[bool] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        above, below = await connect_streams(url)

        async def pass_answers() -> None:
            while data := await above.read(65536):
                writer.write(data)
            writer.close()

        answers = asyncio.create_task(pass_answers())
        committing: list[bytes] = [b"COMMIT;"]
        while data := await reader.read(65536):
            # a Parse names the statement, and a Bind then executes it
            if prepared := re.search(rb"^P.{4}(\w+\0)[^\0]*xmin = [^\0]*INSERT ", data, re.DOTALL):
                committing.append(b"\0" + prepared[1])
                is_lost = False
            else:
                is_lost = bool(lose) and any(name in data for name in committing)
            if is_lost:
                lose.pop()
                answers.cancel()
            below.write(data)
            if is_lost:
                await asyncio.sleep(0.1)  # the server has done it without a notification
                break
        answers.cancel()
        below.close()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with server:
        yield through_port(url, port), lose


async def until(connection: asyncpg.Connection, query: str, *parameters: object) -> None:
    """Waits until a query answers true; on time-out fails with what there is instead."""
    try:
        await eventually(lambda: connection.fetchval(query, *parameters))
    except TimeoutError:
        rows = await connection.fetch("SELECT * FROM sequencer.enrollments ORDER BY id LIMIT 5")
        events = await connection.fetch("SELECT * FROM sequencer.events ORDER BY at LIMIT 50")
        text = "\n".join(map(repr, [*rows, *events]))
        raise AssertionError(f"not within {PATIENCE} s: {query}\n{text}") from None


async def define(
    connection: asyncpg.Connection, sequence: str, *steps: tuple[str, str, str, str | None]
) -> None:
    """A sequence of (name, type, config as JSON, next step)."""
    async with connection.transaction():
        await connection.execute(
            "INSERT INTO sequencer.sequences (name, first_step) VALUES ($1, $2)",
            sequence,
            steps[0][0],
        )
        await connection.executemany(
            "INSERT INTO sequencer.steps (sequence, name, type, config, next_step)"
            " VALUES ($1, $2, $3, $4, $5)",
            [(sequence, *step) for step in steps],
        )


async def enroll(
    connection: asyncpg.Connection, sequence: str, subject: str, data: str = "{}"
) -> int:
    id_: int = await connection.fetchval(
        "INSERT INTO sequencer.enrollments (sequence, subject, data) VALUES ($1, $2, $3)"
        " RETURNING id",
        sequence,
        subject,
        data,
    )
    return id_


NOTIFY_LOCK = f"""FROM pg_locks
    WHERE locktype = 'advisory' AND (classid, objid) = ({AdvisoryLock.NOTIFY})
      AND mode = 'ExclusiveLock' AND granted
      AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
"""
LOCK_IS_HELD = f"SELECT EXISTS (SELECT {NOTIFY_LOCK})"
ALL_ENDED = "SELECT NOT EXISTS (SELECT FROM sequencer.enrollments WHERE status = 'active')"


async def refuse(connection: asyncpg.Connection, reason: str, when: str = "true") -> None:
    """Refuse enrollments by a user's trigger."""
    await connection.execute(
        "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS"
        f" $$ BEGIN RAISE '{reason}'; END $$;"
        "CREATE TRIGGER refuse BEFORE INSERT ON sequencer.enrollments FOR EACH ROW"
        f" WHEN ({when}) EXECUTE FUNCTION refuse()"
    )


async def way(connection: asyncpg.Connection, id_: int) -> list[str]:
    """The history of an enrollment, as "step action"."""
    rows = await connection.fetch(
        "SELECT step, action FROM sequencer.events WHERE enrollment_id = $1 ORDER BY visit, at", id_
    )
    return [f"{row['step']} {row['action']}" for row in rows]


def stuck_package(folder: Path) -> Path:
    """A runner that blocks the event loop, as no async function should."""
    package = folder / "site/stuck-1.dist-info"
    package.mkdir(parents=True)
    (package / "METADATA").write_text("Name: stuck\nVersion: 1\n")
    (package / "entry_points.txt").write_text("[sequencerd.runners]\nStuck = stuck:run\n")
    (folder / "site/stuck.py").write_text(
        "import pathlib, time\n"
        "async def run(config, runner):\n"
        "    pathlib.Path(config['go'] + '.begun').touch()\n"
        "    while not pathlib.Path(config['go']).exists():\n"
        "        time.sleep(0.1)\n"
    )
    return folder / "site"
