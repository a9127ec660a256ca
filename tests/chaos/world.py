"""A system to break: a PostgreSQL server, daemons and applications as processes and tasks, and a
sink. The sink takes mail and calls, and remembers every delivery with its key, whether or not the
answer arrives. A seed determines what fails and when.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import signal
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from email import message_from_bytes
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import asyncpg
from aiosmtpd.smtp import SMTP, Envelope

from sequencerd.storage import embedded, migrate
from sequencerd.storage.database_errors import TRANSIENT_ERRORS
from sequencerd.storage.migrations import Migration
from tests.helpers.command_line import start_sequencerd
from tests.helpers.databases import (
    connect_streams,
    execute,
    initialize_server,
    server_folder,
    through_port,
    with_database,
)
from tests.helpers.engines import define, until
from tests.helpers.servers import Answer, Request, all_next, http_server
from tests.helpers.waiting import PATIENCE

IS_SHORT = "CHAOS_SECONDS" not in os.environ
"""Whether it is a part of all tests, which takes seconds for each scenario, or `make chaos`."""

SECONDS = float(os.environ.get("CHAOS_SECONDS", "3"))
FIRST = int(os.environ.get("CHAOS_SEED", "1"))
ROUNDS = int(os.environ.get("CHAOS_ROUNDS", "1"))

LEASE = 3  # seconds
RATE = 6 if IS_SHORT else 80  # enrollments a second
SLOWDOWN = 3 if IS_SHORT else 1
"""How much slower the sink is, so that a small load has as many side effects in flight."""
CONNECT = TRANSIENT_ERRORS

MAIL = '{"from": "a@example.com", "to": "b@example.com", "subject": "x", "text": "x"}'
PAUSE = 400  # milliseconds
STEPS = (
    ("hello", "Email", MAIL, "pause"),
    ("pause", "WaitForDuration", f'{{"amount": {PAUSE}, "unit": "milliseconds"}}', "call"),
    ("call", "Call", "{}", "once"),
    ("once", "Call", '{"delivery": "at_most_once"}', "bye"),
    ("bye", "Email", MAIL, None),
)

SETTINGS = """
[engine]
lease = {lease}
sweep = 1
stop_timeout = 20
[email]
url = "{mail}"
attempts = 100
first_delay = 0.2
longest_delay = 1
timeout = 5
[runners.Call]
url = "{calls}"
timeout = 5
batch_size = 5
concurrency = 4
attempts = 100
first_delay = 0.2
longest_delay = 1
"""


SERVER = {"max_connections": "60"}


class Server:
    """PostgreSQL with its default durability, which can be killed and started again."""

    def __init__(self, folder: Path, stack: ExitStack, **settings: str) -> None:
        self._folder = folder
        self._stack = stack
        self._settings = SERVER | settings
        if not (folder / "data").exists():
            initialize_server(folder)
        self._server = self._started()

    def _started(self) -> embedded.EmbeddedServer:
        return self._stack.enter_context(embedded.running(self._folder, settings=self._settings))

    @property
    def url(self) -> str:
        """Of the server, not of a world's database."""
        return self._server.url

    @property
    def pid(self) -> int:
        """The postmaster's."""
        return int((self._server.data / "postmaster.pid").read_text().split()[0])

    def kill(self, number: signal.Signals) -> None:
        """SIGINT ends it at once, SIGQUIT without a checkpoint, SIGKILL is a crash."""
        os.kill(self.pid, number)

    def control(self, *arguments: str) -> None:
        """Runs pg_ctl."""
        embedded.PostgresPrograms.find().run("pg_ctl", "-D", self._server.data, *arguments)

    @contextmanager
    def standby(self, folder: Path) -> Iterator[Server]:
        """Make a standby, without which the server commits nothing."""
        host = parse_qs(urlsplit(self.url).query)["host"][0]
        folder.mkdir()
        folder.chmod(0o777)
        embedded.PostgresPrograms.find().run(
            "pg_basebackup",
            "-h",
            host,
            "-U",
            "postgres",
            "-D",
            folder / "data",
            "-X",
            "stream",
            "-c",
            "fast",
        )
        (folder / "data" / "standby.signal").touch()
        with ExitStack() as stack:
            standby = Server(folder, stack, primary_conninfo=f"host={host} user=postgres")
            asyncio.run(execute(self.url, "ALTER SYSTEM SET synchronous_standby_names = '*'"))
            self.control("reload")
            yield standby

    def is_alive(self) -> bool:
        """Whether its first process is there."""
        try:
            os.kill(self.pid, 0)
        except (OSError, IndexError, ValueError):
            return False
        return True

    def start(self) -> None:
        """After it was killed."""
        self._server = self._started()


@contextmanager
def serving(folder: Path) -> Iterator[Server]:
    """A server for some worlds."""
    with ExitStack() as stack:
        yield Server(folder, stack)


@contextmanager
def pair_of_servers() -> Iterator[tuple[Server, Server]]:
    """A server and its standby."""
    with server_folder() as folder:
        folder.chmod(0o755)
        with serving(folder / "a") as primary, primary.standby(folder / "b") as standby:
            yield primary, standby


class Sink:
    """The recipient of everything: counts the deliveries of each visit, with their keys."""

    def __init__(self, rng: random.Random) -> None:
        self.mails: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        self.keys: dict[str, set[str]] = defaultdict(set)  # of each visit
        self.first: dict[str, float] = {}  # when, by a monotonic clock
        self.lose = 0.0  # of answers
        self.refuse = 0.0  # of calls and mails
        self.slow = 0.01  # seconds
        self._rng = rng

    async def handle_DATA(  # noqa: N802 - as aiosmtpd calls it
        self, _server: object, _session: object, envelope: Envelope
    ) -> str:
        """A mail."""
        await asyncio.sleep(self.slow * SLOWDOWN)
        if self._rng.random() < self.refuse:
            return "451 4.3.0 not now"
        message = message_from_bytes(envelope.content or b"")  # type: ignore[arg-type]
        mark = re.match(r"<(\d+)\.(\d+)\.(\w+)@", message["Message-ID"])
        assert mark, message["Message-ID"]
        self._took(self.mails, ":".join(mark.groups()))
        if self._rng.random() < self.lose:
            raise ConnectionAbortedError
        return "250 OK"

    def _took(self, deliveries: Counter[str], key: str) -> None:
        visit = key.rpartition(":")[0]
        deliveries[visit] += 1
        self.keys[visit].add(key)
        self.first.setdefault(visit, time.monotonic())

    async def respond(self, request: Request) -> Answer:
        """A call for some enrollments."""
        await asyncio.sleep(self.slow * SLOWDOWN)
        if self._rng.random() < self.refuse:
            return Answer(status=503)
        runners = json.loads(request.body)["runners"]
        for one in runners:
            self._took(self.calls, one["idempotencyKey"])
        if self._rng.random() < self.lose:
            return Answer(raw=b"")
        return await all_next(request)


class Mail(SMTP):
    """A server that hangs up where its handler says so."""

    async def handle_exception(self, error: Exception) -> str:
        """Loses the answer."""
        if isinstance(error, ConnectionAbortedError):
            assert isinstance(self.transport, asyncio.WriteTransport)
            self.transport.abort()
        return "451 4.3.0 internal"


class Daemon:
    """A daemon as a process."""

    def __init__(self, process: asyncio.subprocess.Process, log: Path) -> None:
        self.process = process
        self.log = log

    def send(self, number: signal.Signals) -> None:
        """A signal, if it still runs."""
        with suppress(ProcessLookupError):
            self.process.send_signal(number)


class World:
    """The whole system; `database` is the URL of applications, `used` that of daemons."""

    server: Server  # for the faults

    def __init__(self, database: str, folder: Path, seed: int) -> None:
        self.database = database
        self.used = database
        self.folder = folder
        self.rng = random.Random(seed)
        self.sink = Sink(random.Random(seed + 1))
        self.daemons: list[Daemon] = []
        self.acknowledged: list[str] = []
        self.faulty: set[str] | None = None  # subjects, where all others are blameless
        self.is_enough = False  # of enrollments
        self.plan: list[str] = []  # what was done, for the reader of a failure
        self.settings = ""  # of the daemons, in TOML
        self.environment: dict[str, str] = {}
        self.stderr: Path | None = None  # of the daemons, if it is no file that can be read
        self.code: Path | None = None  # where the daemons' package is, if it is not the one tested
        self._begun = asyncio.get_running_loop().time()

    def note(self, text: str) -> None:
        """Adds a line to what a failure shows."""
        self.plan.append(f"{asyncio.get_running_loop().time() - self._begun:6.2f} s  {text}")

    async def start(self) -> Daemon:
        """One more daemon; it may take a while to be ready."""
        log = self.folder / f"daemon-{len(list(self.folder.glob('daemon-*')))}.log"
        config = self.folder / "chaos.toml"
        config.write_text(self.settings)
        with (self.stderr or log).open("wb") as out:
            process = await start_sequencerd(
                "--config",
                str(config),
                "run",
                env={**os.environ, "SEQUENCERD_DATABASE": self.used, **self.environment},
                cwd=self.code,  # `python -m` looks there first
                stderr=out,
            )
        daemon = Daemon(process, log)
        self.daemons.append(daemon)
        return daemon

    async def started(self, count: int) -> None:
        """Wait until so many daemons are ready: one that loses a connection before that exits."""
        connection = await asyncpg.connect(self.database)
        await until(connection, f"SELECT count(*) >= {count} FROM sequencer.daemons")
        await connection.close()

    async def keep(self, count: int) -> None:
        """Starts daemons again that have ended, as systemd does."""
        for daemon in list(self.daemons):
            if daemon.process.returncode is not None:
                self.daemons.remove(daemon)
        while len(self.daemons) < count:
            await self.start()

    async def enroll(self, seconds: float, rate: float = RATE) -> None:
        """Enroll subjects one after the other, whatever happens to the connection."""
        loop = asyncio.get_running_loop()
        end, number = loop.time() + seconds, 0
        connection: asyncpg.Connection | None = None
        while loop.time() < end and not self.is_enough:
            number += 1
            try:
                if connection is None:
                    connection = await asyncpg.connect(self.database, timeout=5)
                await connection.execute(
                    "INSERT INTO sequencer.enrollments (sequence, subject) VALUES ('chaos', $1)",
                    f"u{number}",
                    timeout=5,
                )
                self.acknowledged.append(f"u{number}")
            except CONNECT:
                if connection is not None:
                    connection.terminate()
                connection = None
                await asyncio.sleep(0.1)
            await asyncio.sleep(1 / rate)
        if connection is not None:
            connection.terminate()

    async def drain(self, daemons: int, seconds: float = 2 * PATIENCE) -> None:
        """Wait until no enrollment is active. Raises TimeoutError."""
        async with asyncio.timeout(seconds):
            while True:
                await self.keep(daemons)
                try:
                    connection = await asyncpg.connect(self.database, timeout=5)
                    try:
                        if not await connection.fetchval(
                            "SELECT count(*) FROM sequencer.enrollments WHERE status = 'active'"
                        ):
                            return
                    finally:
                        connection.terminate()
                except CONNECT:
                    pass
                await asyncio.sleep(0.1)

    async def stop(self) -> None:
        """Stop all daemons gracefully. Raises AssertionError for one that does not stop."""
        for daemon in self.daemons:
            daemon.send(signal.SIGCONT)
            daemon.send(signal.SIGTERM)
        for daemon in self.daemons:
            async with asyncio.timeout(PATIENCE):
                code = await daemon.process.wait()
            ended = (0, 1, -signal.SIGKILL, -signal.SIGTERM)
            assert code in ended, (code, daemon.log.read_text()[-2000:])


async def create(url: str, name: str, migrations: Sequence[Migration] | None = None) -> str:
    """Make a database with the sequence; `migrations`: an older version's. Return its URL."""
    await execute(url, f'CREATE DATABASE "{name}"')
    database = with_database(url, name)
    connection = await asyncpg.connect(database)
    await migrate.migrate(connection, migrations)
    await define(connection, "chaos", *STEPS)
    await connection.close()
    return database


async def copy(url: str, template: str, name: str) -> str:
    """Make a copy of a database. Return its URL."""
    await execute(url, f'CREATE DATABASE "{name}" TEMPLATE {template} STRATEGY file_copy')
    return with_database(url, name)


@asynccontextmanager
async def living(database: str, folder: Path, seed: int) -> AsyncIterator[World]:
    """A world on a database of its own, and no daemons."""
    world = World(database, folder, seed)
    loop = asyncio.get_running_loop()
    mail = await loop.create_server(lambda: Mail(world.sink), "127.0.0.1", 0)
    async with mail, http_server(world.sink.respond) as calls:
        url = f"smtp://127.0.0.1:{mail.sockets[0].getsockname()[1]}"
        world.settings = SETTINGS.format(lease=LEASE, mail=url, calls=calls.url)
        try:
            yield world
            await world.stop()
        finally:
            for daemon in world.daemons:
                if daemon.process.returncode is None:
                    daemon.process.kill()
                    await daemon.process.wait()


class Proxy:
    """A proxy between daemons and the database: it passes data on, or cuts, holds or drops it."""

    def __init__(self, database: str) -> None:
        self._url = database
        self.delay = 0.0
        self.swallow = False  # what comes from now on is lost silently
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[Any]] = set()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[str]:
        """The URL that leads through it."""
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        async with server:
            yield through_port(self._url, port)
            self.cut()
            for task in self._tasks:
                task.cancel()

    def cut(self) -> None:
        """Ends all connections without a word."""
        for writer in self._writers:
            writer.transport.abort()

    def half_close(self) -> None:
        """Ends one direction of all connections."""
        for writer in self._writers:
            with suppress(OSError, RuntimeError):
                writer.write_eof()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            above, below = await connect_streams(self._url)
        except OSError:
            writer.transport.abort()
            return
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self._writers |= {writer, below}
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._pass(reader, below))
                group.create_task(self._pass(above, writer))
        except* (OSError, RuntimeError):
            pass
        finally:
            self._writers -= {writer, below}
            self._tasks.discard(task)
            writer.transport.abort()
            below.transport.abort()

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        lost = False  # a connection that has lost something stays dead
        while data := await reader.read(65536):
            if self.delay:
                await asyncio.sleep(self.delay)
            lost = lost or self.swallow
            if not lost:
                writer.write(data)
                await writer.drain()
        writer.transport.abort()
