"""The console as a process of its own: away from the daemon, or on a standby."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Mapping
from contextlib import suppress

import asyncpg
from prometheus_client import CollectorRegistry
from structlog.typing import FilteringBoundLogger

from sequencerd.console.app import make_console
from sequencerd.definitions.simulator import Simulator
from sequencerd.definitions.stored import read_sequences
from sequencerd.engine.clock import Clock
from sequencerd.errors import SettingsError
from sequencerd.runners import Runner
from sequencerd.runners.registry import make_runners
from sequencerd.service.http_server import make_app, serving
from sequencerd.service.systemd import notify
from sequencerd.settings import CONSOLE_LISTEN, Console, Http, Settings
from sequencerd.storage import connections, migrate, server
from sequencerd.storage.connections import Shard
from sequencerd.storage.database_errors import TRANSIENT_ERRORS, brief
from sequencerd.storage.sequences import read_revisions

INTERVAL = 2.0  # seconds between looks at the definitions: a standby cannot LISTEN


async def run(
    shard: Shard, settings: Settings, listen: str | None, log: FilteringBoundLogger
) -> None:
    """Serve the console until SIGTERM or SIGINT, at `listen` or at the address in the settings.
    Raises SequencerdError if it cannot start.
    """
    console = (settings.console or Console()).model_copy(update={"enabled": True})
    address = listen or settings.http.listen or CONSOLE_LISTEN
    settings = settings.model_copy(update={"console": console, "http": Http(listen=address)})
    settings.check_console()
    runners = make_runners(settings)
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    connection = await connections.connect(shard)
    try:
        await migrate.check(connection, shard.number)
        is_standby = await server.is_standby(connection)
    finally:
        await connection.close()
    if is_standby and console.write:
        log.warning("the server is a standby: the console changes nothing until its next start")
        console = console.model_copy(update={"write": False})
    pool = await connections.connect_pool(shard, 1, pooled=True, least=0)
    try:
        definitions = _Definitions(pool, runners, log)
        await definitions.read()
        app = make_app(
            list,
            definitions.why_not_ready,
            CollectorRegistry(),
            make_console(
                console,
                shard,
                definitions.simulator,
                definitions.clock.now,
                log,
                runners=lambda: make_runners(settings),
            ),
        )
        async with serving(app, address, _refuse_taken_address):
            log.info("ready", console=f"http://{address}/console/")
            notify("READY=1")
            await definitions.keep(stop)
            notify("STOPPING=1")
    finally:
        pool.terminate()
        for runner in runners.values():
            await runner.close()
    log.info("stopped")


def _refuse_taken_address(listen: str) -> None:
    raise SettingsError(
        f"another process listens on {listen}, perhaps a daemon with the same settings; "
        "use --listen with another address"
    )


class _Definitions:
    """The present definitions, and the database's time."""

    def __init__(
        self, pool: asyncpg.Pool, runners: Mapping[str, Runner], log: FilteringBoundLogger
    ) -> None:
        self.clock = Clock()
        self._pool = pool
        self._runners = runners
        self._log = log
        self._simulator = Simulator({}, runners)
        self._revisions: dict[str, int] = {}
        self._error: str | None = None

    def simulator(self) -> Simulator:
        """Return the definitions and runners, for another thread to read."""
        return self._simulator

    def why_not_ready(self) -> list[str]:
        """Return what keeps the console from reading the database."""
        return [] if self._error is None else [f"the database cannot be read: {self._error}"]

    async def keep(self, stop: asyncio.Event) -> None:
        """Read what has changed, until `stop` is set."""
        while not stop.is_set():
            try:
                await self.read()
            except TRANSIENT_ERRORS as error:
                if self._error is None:
                    self._log.warning("the console cannot read the database", error=brief(error))
                self._error = brief(error)
            else:
                self._error = None
            with suppress(TimeoutError):
                async with asyncio.timeout(INTERVAL):
                    await stop.wait()

    async def read(self) -> None:
        """Read the definitions again if one has changed."""
        async with connections.borrow(self._pool) as connection:
            self.clock.measured(await server.server_time(connection))
            revisions = await read_revisions(connection)
            if revisions != self._revisions:
                sequences = await read_sequences(connection, self._runners)
                self._simulator = Simulator(sequences, self._runners)
                self._revisions = revisions
