"""The console as a separate process: on another machine than the daemon, or on a standby."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack, suppress

import asyncpg
from prometheus_client import CollectorRegistry
from structlog.typing import FilteringBoundLogger

from sequencerd.console.app import ServedShard, make_console
from sequencerd.console.shards import make_console_of_shards
from sequencerd.definitions.simulator import Simulator
from sequencerd.definitions.stored import read_sequences
from sequencerd.engine.clock import Clock
from sequencerd.errors import DatabaseError, SequencerdError, SettingsError
from sequencerd.runners import Runner
from sequencerd.runners.protocol import close_all
from sequencerd.runners.registry import make_runners
from sequencerd.service.http_server import make_app, serving
from sequencerd.service.redaction import make_redaction
from sequencerd.service.starting import unless_stopped
from sequencerd.service.systemd import notify
from sequencerd.settings import CONSOLE_LISTEN, ConsoleSettings, HttpSettings, Settings
from sequencerd.storage import connections, migrate, server
from sequencerd.storage.connections import Shard
from sequencerd.storage.database_errors import TRANSIENT_ERRORS, brief
from sequencerd.storage.sequences import read_revisions

CHECK_INTERVAL = 2.0  # seconds between checks of the definitions: a standby cannot LISTEN


async def run(
    shards: Sequence[Shard], settings: Settings, listen: str | None, log: FilteringBoundLogger
) -> None:
    """Serve the console until SIGTERM or SIGINT, at `listen` or at the address in the settings.
    Raises SequencerdError if it cannot start; of several shards, some may be away.
    """
    console = (settings.console or ConsoleSettings()).model_copy(update={"enabled": True})
    address = listen or settings.http.listen or CONSOLE_LISTEN
    settings = settings.model_copy(
        update={"console": console, "http": HttpSettings(listen=address)}
    )
    settings.check_console()
    runners = make_runners(settings)
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with AsyncExitStack() as stack:
        stack.push_async_callback(close_all, runners.values())
        found = [_PresentDefinitions(shard, runners, log) for shard in shards]
        for definitions in found:
            stack.callback(definitions.close)
            try:
                await unless_stopped(stop, definitions.begin())
            except (DatabaseError, *TRANSIENT_ERRORS) as error:
                if len(shards) == 1:
                    raise
                cause = str(error) if isinstance(error, DatabaseError) else brief(error)
                definitions.log.warning("the shard is unavailable", error=cause)
            if stop.is_set():
                return
            if console.write and definitions.is_standby:
                definitions.log.warning(
                    "the server is a standby: the console changes nothing until its next start"
                )
        served = [
            ServedShard(
                definitions.shard,
                console.model_copy(update={"write": console.write and not definitions.is_standby}),
                definitions.simulator,
                definitions.clock.now,
                lambda: make_runners(settings),
                make_redaction(settings),
            )
            for definitions in found
        ]
        made = (
            make_console_of_shards(served, log) if len(served) > 1 else make_console(served[0], log)
        )
        app = make_app(
            list,
            lambda: [reason for definitions in found for reason in definitions.why_not_ready()],
            CollectorRegistry(),
            made,
        )
        async with serving(app, address, _refuse_taken_address):
            log.info("ready", console=f"http://{address}/console/")
            notify("READY=1")
            await asyncio.gather(*(definitions.keep(stop) for definitions in found))
            notify("STOPPING=1")
    log.info("stopped")


def _refuse_taken_address(listen: str) -> None:
    raise SettingsError(
        f"another process listens on {listen}, perhaps a daemon with the same settings; "
        "use --listen with another address"
    )


class _PresentDefinitions:
    """The present definitions, and the time of the database."""

    def __init__(
        self, shard: Shard, runners: Mapping[str, Runner], log: FilteringBoundLogger
    ) -> None:
        self.shard = shard
        self.clock = Clock()
        self.is_standby = False
        self._pool: asyncpg.Pool | None = None
        self._runners = runners
        self.log = log if shard.name is None else log.bind(shard=shard.name)
        self._simulator = Simulator({}, runners)
        self._revisions: dict[str, int] = {}
        self._error: str | None = None

    async def begin(self) -> None:
        """Connect, and read the definitions for the first time. Raises SequencerdError."""
        async with connections.connected(self.shard) as connection:
            await migrate.check(connection, self.shard.number)
            self.is_standby = await server.is_standby(connection)
        self._pool = await connections.connect_pool(self.shard, 1, pooled=True, least=0)
        await self.read()

    def close(self) -> None:
        """Close the connection."""
        if self._pool is not None:
            self._pool.terminate()

    def simulator(self) -> Simulator:
        """Return the definitions and runners, for another thread to read."""
        return self._simulator

    def why_not_ready(self) -> list[str]:
        """Return why the console cannot read the database, as sentences."""
        where = "" if self.shard.name is None else f"{self.shard.name}: "
        reason = f"{where}the database cannot be read: {self._error}"
        return [] if self._error is None else [reason]

    async def keep(self, stop: asyncio.Event) -> None:
        """Read changed definitions until `stop` is set."""
        while not stop.is_set():
            try:
                await (self.begin() if self._pool is None else self.read())
            except (SequencerdError, *TRANSIENT_ERRORS) as error:
                cause = str(error) if isinstance(error, SequencerdError) else brief(error)
                if self._error is None:
                    self.log.warning("the console cannot read the database", error=cause)
                self._error = cause
            else:
                self._error = None
            notify("WATCHDOG=1")  # and what systemd has not received yet
            with suppress(TimeoutError):
                async with asyncio.timeout(CHECK_INTERVAL):
                    await stop.wait()

    async def read(self) -> None:
        """Read the definitions again if one has changed."""
        assert self._pool is not None
        async with connections.borrow(self._pool) as connection:
            self.clock.measured(await server.server_time(connection))
            revisions = await read_revisions(connection)
            if revisions != self._revisions:
                sequences = await read_sequences(connection, self._runners)
                self._simulator = Simulator(sequences, self._runners)
                self._revisions = revisions
