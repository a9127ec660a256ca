"""The composition root: make the parts from the settings, and run them until a signal."""

from __future__ import annotations

import asyncio
import gc
import os
import resource
import signal
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext, suppress
from datetime import UTC, datetime
from functools import partial
from typing import Any, NamedTuple
from uuid import uuid4

import asyncpg
from structlog.typing import FilteringBoundLogger

from sequencerd.console.app import ServedShard, make_console
from sequencerd.console.shards import make_console_of_shards
from sequencerd.core.describe import counted
from sequencerd.core.step_types.effects import EMAIL, SMS
from sequencerd.definitions.simulator import Simulator
from sequencerd.engine import retention, shared_rates
from sequencerd.engine.clock import Clock
from sequencerd.engine.enrolling import Enrolling
from sequencerd.engine.lookups import Lookups
from sequencerd.engine.loop import Engine
from sequencerd.errors import DatabaseError, SequencerdError, SettingsError
from sequencerd.runners import Runner, tracing
from sequencerd.runners.pace import TakePermits
from sequencerd.runners.protocol import NotNow, close_all
from sequencerd.runners.registry import make_endpoint, make_runners
from sequencerd.runners.suppression_check import SuppressionKey, Suppressions
from sequencerd.service.health import Health
from sequencerd.service.http_server import make_app, serving
from sequencerd.service.logs import make_log
from sequencerd.service.metrics import Metrics, ShardMetrics
from sequencerd.service.public import PublicPages
from sequencerd.service.redaction import MIN_LENGTH_IN_RESULTS, make_redaction
from sequencerd.service.starting import unless_stopped
from sequencerd.service.systemd import notify, notify_reloading
from sequencerd.settings import ConsoleSettings, DatabaseSettings, Settings
from sequencerd.storage import connections, conninfo, migrate, server
from sequencerd.storage.connections import Shard
from sequencerd.storage.database_errors import TRANSIENT_ERRORS, brief
from sequencerd.storage.listener import DefinitionsChanged, Notification, listen, poll
from sequencerd.storage.statements import QUERIES
from sequencerd.storage.suppressions import read_suppressed

CLOSE_TIMEOUT = 5.0  # seconds
AWAY_INTERVAL = 2.0  # seconds between attempts to reach a shard that is unavailable
PROMOTION_INTERVAL = 1.0  # seconds between checks of a standby
MAX_DESCRIPTORS = 65_536
RATES_CONNECTIONS = 4  # for rates, if a runner has one: a locked row delays nothing else
ENROLLING_CONNECTIONS = 4  # one for the retention lock, and for users' queries, which may be slow

RESTART_SECTIONS = ("database", "engine", "http", "console")
"""Sections of the settings that take effect only at a restart."""


def tune_collector() -> None:
    """Let Python collect cycles less often.

    A batch is a hundred thousand short-lived tuples without cycles; with the defaults, a third of
    the time is spent on searching for cycles.
    """
    gc.set_threshold(200_000, 20, 50)


def raise_descriptor_limit() -> None:
    """Allow this process to open as many files as the system permits, within reason."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, MAX_DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with suppress(OSError, ValueError):  # a sandbox may forbid it
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def daemon_name() -> str:
    """Return the name of a lease's holder: host, process, and a unique part."""
    return f"{socket.gethostname()}:{os.getpid()}:{uuid4().hex[:8]}"


class Pools(NamedTuple):
    """The connections of a daemon, by purpose."""

    engine: asyncpg.Pool
    heart: asyncpg.Pool
    lookups: asyncpg.Pool
    enrolling: asyncpg.Pool
    rates: asyncpg.Pool


class ReloadableParts:
    """The parts that can be replaced while the daemon runs: runners and lookups, and their
    settings.
    """

    def __init__(self, settings: Settings, runners: dict[str, Runner], pool: asyncpg.Pool) -> None:
        """Make them; `pool` is for lookups. Raises SettingsError."""
        self.settings = settings
        self.runners = runners
        self.redact = make_redaction(settings, MIN_LENGTH_IN_RESULTS)
        self.lookups = Lookups(pool, settings.lookups, timeout=settings.database.lookup_timeout)
        self._pool = pool

    def renewed(
        self, new: Settings, suppressions: Suppressions, take: TakePermits | None = None
    ) -> ReloadableParts:
        """Return the parts for other settings, with the unchanged ones. Raises SettingsError."""
        old = self.settings
        runners = make_runners(new, suppressions, take)
        links = (old.unsubscribe, new.unsubscribe)
        sections: dict[str, tuple[object, object]] = {
            EMAIL.name: ((old.email, links[0]), (new.email, links[1])),
            SMS.name: ((old.sms, links[0]), (new.sms, links[1])),
        } | {
            name: (old.runners.get(name), new.runners.get(name))
            for name in old.runners.keys() | new.runners.keys()
        }
        for type_, runner in self.runners.items():
            before, after = sections.get(type_, (None, None))  # installed ones have none
            if before == after and type_ in runners:
                runners[type_] = runner
        parts = ReloadableParts(new, runners, self._pool)
        if old.lookups == new.lookups:
            parts.lookups = self.lookups
        return parts

    async def close(self, but: ReloadableParts | None = None) -> None:
        """Close the parts that the others do not use."""
        kept = [] if but is None else list(but.runners.values())
        await close_all(runner for runner in self.runners.values() if runner not in kept)
        if but is None or but.lookups is not self.lookups:
            await self.lookups.close()


def check_settings(settings: Settings) -> None:
    """Check, without a database, what a start or a reload would reject. Raises SettingsError."""
    settings.check_console()
    for lookup, endpoint in settings.lookups.items():
        make_endpoint(f"lookups.{lookup}", endpoint)
    for name in settings.shards or (None,):
        of_shard = settings.of_shard(name)
        make_runners(of_shard)
        for url in (of_shard.database.url, of_shard.database.listen_url):
            if url is None:
                continue
            try:
                conninfo.arguments(url.get_secret_value(), name="", timeout=0)
            except SettingsError as error:
                raise error if name is None else SettingsError(f"shard {name}: {error}") from error


async def run(
    shards: Sequence[Shard],
    settings: Settings,
    log: FilteringBoundLogger,
    read: Callable[[], Settings],
) -> None:
    """Run until SIGTERM or SIGINT; on SIGHUP, `read` returns the new settings. `shards` contains
    the addresses for LISTEN. Raises SequencerdError if the daemon cannot start.
    """
    settings.check_console()
    tune_collector()
    raise_descriptor_limit()
    stop = asyncio.Event()
    process = _Process(shards, settings, log, read, stop)
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(_handle_loop_error(log))
    loop.add_signal_handler(signal.SIGHUP, process.reload)
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    end_tracing = _trace(log)
    try:
        await process.run()
    finally:
        await asyncio.to_thread(end_tracing)


class _Process:
    """The shards that this process serves, and its reports about all of them."""

    def __init__(
        self,
        shards: Sequence[Shard],
        settings: Settings,
        log: FilteringBoundLogger,
        read: Callable[[], Settings],
        stop: asyncio.Event,
    ) -> None:
        self.log = log
        self._settings = settings
        self._stop = stop
        self._shards = [
            _ShardService(
                shard, self, settings.of_shard(shard.name), partial(_reread, read, shard), stop
            )
            for shard in shards
        ]
        self._one = self._shards[0] if shards[0].name is None else None
        self._refusal: SettingsError | None = None

    def reload(self) -> None:
        """Read the settings again, for all shards."""
        for served in self._shards:
            served.reload_requested.set()

    def status(self) -> str:
        """Return one line about all shards."""
        if self._one is not None:
            return self._one.status()
        return "; ".join(f"{served.name}: {served.status()}" for served in self._shards)

    def feed(self) -> None:
        """Reset systemd's watchdog unless an engine is stuck. A shard that is unavailable has no
        engine.
        """
        if not self._why_not_alive():
            notify("WATCHDOG=1")

    def _why_not_alive(self) -> list[str]:
        return [reason for served in self._shards for reason in served.why_not_alive()]

    def _why_not_ready(self) -> list[str]:
        return [reason for served in self._shards for reason in served.why_not_ready()]

    def refuse(self, error: SettingsError) -> None:
        """Shut down because the settings are wrong."""
        self._refusal = error
        self._stop.set()

    async def run(self) -> None:
        """Serve until stopped. An error that keeps a single database from being served ends the
        process; of several shards, an unavailable one is tried again, while the others are served.
        """
        if self._one is not None:
            await self._one.serve(self._serving)
            return
        async with self._serving(), asyncio.TaskGroup() as group:
            for served in self._shards:
                group.create_task(served.keep())
        if self._refusal is not None:
            raise self._refusal

    @asynccontextmanager
    async def _serving(self) -> AsyncIterator[None]:
        """Serve HTTP within the context."""
        settings, current = self._settings, self._shards[0]
        public = PublicPages(
            [served.shard for served in self._shards], lambda: current.settings, self.log
        )
        registry = ShardMetrics(
            lambda: {
                served.name: served.metrics.registry
                for served in self._shards
                if served.name is not None
            }
        ).registry
        if self._one is not None and self._one.daemon is not None:
            registry = self._one.daemon.metrics.registry
        console = None
        if settings.console is not None and settings.console.enabled:
            shards = [served.for_console(settings.console) for served in self._shards]
            console = (
                make_console_of_shards(shards, self.log)
                if self._one is None
                else make_console(shards[0], self.log)
            )
        app = make_app(
            self._why_not_alive,
            self._why_not_ready,
            registry,
            console,
            () if settings.http.public_listen else public.routes,
        )
        report = partial(_report_taken_address, self.log)
        async with (
            serving(app, settings.listen, report),
            serving(
                public.app(), settings.http.public_listen, report, setting="http.public_listen"
            ),
        ):
            yield


def _reread(read: Callable[[], Settings], shard: Shard) -> Settings:
    """Return the new settings of a shard. Raises SettingsError."""
    new = read()
    if shard.name is not None and (
        shard.name not in new.shards or new.shard_number(shard.name) != shard.number
    ):
        names = ", ".join(new.shards)
        raise SettingsError(f"changed shards (now {names}) require a restart")
    return new.of_shard(shard.name)


class _ShardService:
    """A shard: its connections, and the daemon that works on it while it is available."""

    def __init__(
        self,
        shard: Shard,
        process: _Process,
        settings: Settings,
        read: Callable[[], Settings],
        stop: asyncio.Event,
    ) -> None:
        self.name = shard.name
        self.shard = shard
        self.process = process
        self.read = read
        self.log = process.log if shard.name is None else process.log.bind(shard=shard.name)
        self.suppressions = Suppressions(self._suppressed)
        self.daemon: _Daemon | None = None
        self.reload_requested = asyncio.Event()
        self._settings = settings
        self._stop = stop
        self._away = "the database has not answered yet"
        self._none = Metrics(of_process=False)
        make_runners(settings, self.suppressions)  # wrong settings end the process immediately

    @property
    def settings(self) -> Settings:
        """Return the current settings."""
        return self._settings if self.daemon is None else self.daemon.parts.settings

    @property
    def metrics(self) -> Metrics:
        """Return the metrics of the shard; of one that is unavailable, that it is not ready."""
        daemon = self.daemon
        return self._none if daemon is None else daemon.metrics

    def for_console(self, settings: ConsoleSettings) -> ServedShard:
        """Return what a console needs, also while the shard is unavailable."""

        def simulator() -> Simulator:
            daemon = self.daemon
            return Simulator({}, {}) if daemon is None else daemon.simulator()

        def now() -> datetime:
            daemon = self.daemon
            return datetime.now(UTC) if daemon is None else daemon.clock.now()

        return ServedShard(
            self.shard,
            settings,
            simulator,
            now,
            lambda: make_runners(self.settings),
            self._redact,
        )

    def _redact(self, text: str) -> str:
        """Return a text that the console shows without the secrets of the present settings."""
        return make_redaction(self.settings)(text)

    def status(self) -> str:
        """Return the status of the shard."""
        return self._away if self.daemon is None else self.daemon.status()

    def why_not_alive(self) -> list[str]:
        """Return why its engine is not alive."""
        return self._named([] if self.daemon is None else self.daemon.health.why_not_alive())

    def why_not_ready(self) -> list[str]:
        """Return why enrollments of the shard would not be moved in time."""
        return self._named(
            [self._away] if self.daemon is None else self.daemon.health.why_not_ready()
        )

    def _named(self, reasons: list[str]) -> list[str]:
        return reasons if self.name is None else [f"{self.name}: {one}" for one in reasons]

    async def keep(self) -> None:
        """Serve the shard until stopped, whenever its database can be used."""
        is_first = True
        while not self._stop.is_set():
            try:
                await self.serve()
            except (DatabaseError, SettingsError, *TRANSIENT_ERRORS) as error:
                if is_first and isinstance(error, SettingsError):
                    self.process.refuse(SettingsError(f"shard {self.name}: {error}"))
                    return
                cause = str(error) if isinstance(error, SequencerdError) else brief(error)
                if cause != self._away:
                    self.log.error("the shard is unavailable, trying again", error=cause)
                self._away = cause
                # READY for the process, which serves what it can: the start must not time out
                notify("READY=1", f"STATUS={self.process.status()}")
            is_first = False
            with suppress(TimeoutError):
                async with asyncio.timeout(AWAY_INTERVAL):
                    await self._stop.wait()
            self.process.feed()

    async def serve(
        self,
        around: Callable[[], AbstractAsyncContextManager[None]] = nullcontext,
    ) -> None:
        """Serve the shard until stopped, with HTTP `around` it. Raises SequencerdError if that
        cannot begin.
        """
        settings, shard = self._settings, self.shard
        runners = make_runners(settings, self.suppressions, self.take)
        await unless_stopped(self._stop, self._check())
        if self._stop.is_set():
            return
        size = settings.database.connections
        async with (
            _pool(shard, settings.database, size) as pool,
            _pool(shard, settings.database, 1) as heart,
            _pool(
                shard,
                settings.database,
                settings.database.lookup_connections,
                least=0,
                runs_others=True,
            ) as for_lookups,
            _pool(
                shard, settings.database, ENROLLING_CONNECTIONS, least=0, runs_others=True
            ) as for_enrolling,
            _pool(shard, settings.database, RATES_CONNECTIONS, least=0) as for_rates,
        ):
            parts = ReloadableParts(settings, runners, for_lookups)
            pools = self._pools = Pools(pool, heart, for_lookups, for_enrolling, for_rates)
            daemon = self.daemon = _Daemon(pools, parts, self)
            try:
                async with around():
                    await daemon.run(self._stop)
            finally:
                self._settings, self.daemon = daemon.parts.settings, None
                await daemon.parts.close()
        self.log.info("stopped", daemon=daemon.name)

    async def _check(self) -> None:
        """Check the schema and the privileges; on a standby, wait for its promotion first."""
        connection = await connections.connect(self.shard)
        try:
            await _wait_for_promotion(connection, self.log)
            await migrate.check(connection, self.shard.number)
            _check_visible(await server.hidden_tables(connection), self.log)
            await _check_privileges(connection, self.log)
        finally:
            connection.terminate()

    async def _suppressed(self, keys: list[SuppressionKey]) -> set[SuppressionKey]:
        try:
            async with connections.borrow(self._pools.engine) as connection:
                return await read_suppressed(connection, keys)
        except TRANSIENT_ERRORS as error:
            raise NotNow(f"the suppressions cannot be read: {error}") from error

    async def take(self, runner: str, per_second: float, count: int) -> tuple[float, float]:
        """Take permits that all daemons share."""
        return await shared_rates.take(self._pools.rates, runner, per_second, count, self.log)


def _report_taken_address(log: FilteringBoundLogger, listen: str) -> None:
    hint = "another daemon with these settings? set SEQUENCERD_HTTP_LISTEN for each instance"
    log.warning("nothing is served there: address in use", listen=listen, hint=hint)


async def _wait_for_promotion(connection: asyncpg.Connection, log: FilteringBoundLogger) -> None:
    """Wait until the server can be written to, if it is a standby."""
    is_reported = False
    while await server.is_standby(connection):
        if not is_reported:
            log.warning("the server is a standby; waiting for its promotion")
            notify("READY=1", "STATUS=the server is a standby; waiting for its promotion")
            is_reported = True
        notify("WATCHDOG=1")
        await asyncio.sleep(PROMOTION_INTERVAL)


def _check_visible(hidden: list[server.HiddenTable], log: FilteringBoundLogger) -> None:
    """Report row-level security. Raises DatabaseError if it hides all rows."""
    advice = "GRANT sequencer_daemon TO the user, or let its policy be USING (true)"
    blind = [str(one) for one in hidden if one.hides_all]
    if blind:
        raise DatabaseError(f"row-level security hides {', '.join(blind)}; {advice}")
    for one in hidden:
        log.warning("row-level security may hide rows", table=one.table, user=one.user, hint=advice)


async def _check_privileges(connection: asyncpg.Connection, log: FilteringBoundLogger) -> None:
    """Warn if the user lacks privileges of daemons, as one that is to enroll."""
    if await connection.fetch(QUERIES["lacking_privileges"]):
        user = await connection.fetchval(QUERIES["quoted_user"])
        hint = f"GRANT sequencer_daemon TO {user}; `sequencerd doctor` lists what is missing"
        log.warning("the database user lacks privileges of a daemon", user=user, hint=hint)


def _trace(log: FilteringBoundLogger) -> Callable[[], None]:
    try:
        return tracing.start(os.environ)
    except ModuleNotFoundError as error:
        log.warning("no traces: pip install 'sequencerd[otel]'", error=str(error))
        return lambda: None


def _handle_loop_error(
    log: FilteringBoundLogger,
) -> Callable[[asyncio.AbstractEventLoop, dict[str, Any]], None]:
    """Return a handler for the errors that asyncio and asyncpg report.

    The users of a lost connection report it too, and asyncpg reports without an error that its
    transaction has ended.
    """

    def handle(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if error is None or isinstance(error, TRANSIENT_ERRORS):
            log.warning("a connection was lost", error=str(error or context["message"]))
        else:
            loop.default_exception_handler(context)

    return handle


class _Daemon:
    """The engine, and the tasks that run beside it."""

    def __init__(self, pools: Pools, parts: ReloadableParts, service: _ShardService) -> None:
        settings, process, log = parts.settings.engine, service.process, service.log
        self.name = daemon_name()
        self.parts = parts
        self.clock = Clock()
        self._pools = pools
        self._service = service
        self._log = log
        self.metrics = Metrics(of_process=service.name is None)
        self.health = Health(
            self.metrics, process.status, process.feed, sweep=settings.sweep, lease=settings.lease
        )
        self.health.waits = {
            "engine": partial(connections.longest_wait, pools.engine),
            "lookups": partial(connections.longest_wait, pools.lookups),
        }
        for name, seconds in self.health.waits.items():
            self.metrics.connection_wait.labels(name).set_function(seconds)
        self._engine = Engine(
            pools.engine,
            pools.heart,
            parts.runners,
            parts.lookups.get,
            clock=self.clock,
            settings=settings,
            name=self.name,
            log=log,
            metrics=self.metrics,
            turned=self.health.turned,
            redact=self._redact,
        )
        self.health.heartbeat_age = self._engine.heartbeat.age
        self._enrolling = Enrolling(
            pools.enrolling,
            self._engine.problems,
            timeout=parts.settings.database.lookup_timeout,
            clock=self.clock,
            log=log,
        )

    def _redact(self, text: str) -> str:
        """Return a text without the secrets of the present settings."""
        return self.parts.redact(text)

    def simulator(self) -> Simulator:
        """Return the present definitions and runners, for another thread to read."""
        return Simulator(dict(self._engine.catalog.sequences), self.parts.runners)

    async def run(self, stop: asyncio.Event) -> None:
        """Work until `stop` is set."""
        engine = self._engine
        # a task that fails ends the process, which systemd restarts; leases make that safe
        async with asyncio.TaskGroup() as group:
            helpers = [
                group.create_task(work)
                for work in (
                    self._listen(),
                    self._reload_whenever(self._service.reload_requested, group),
                    self._stop_when(stop),
                    retention.keep(
                        self._pools.engine,
                        lambda: self.parts.settings.retention,
                        clock=self.clock,
                        log=self._log,
                    ),
                    self._enrolling.keep(),
                )
            ]
            await engine.run()
            for helper in helpers:
                helper.cancel()

    async def _listen(self) -> None:
        if self.parts.settings.database.listen:
            await listen(
                self._service.shard,
                self._receive,
                self._connected,
                self._engine.find_due,
                log=self._log,
                heard=self.health.heard,
                refused=self.metrics.refused.inc,
            )
        else:
            sweep = partial(self._engine.sweep, whole=False)
            await poll(self._connected, sweep, self._log, self.health.heard)

    def _receive(self, message: Notification) -> None:
        self._engine.receive(message)
        if isinstance(message, DefinitionsChanged):
            self._enrolling.check_soon()

    async def _connected(self) -> None:
        # after a network failure, idle connections may be dead without notice
        for pool in self._pools:
            if pool is not self._pools.heart:
                await pool.expire_connections()
        await self._engine.sweep()
        self._log.info("ready", daemon=self.name, sequences=len(self._engine.catalog.sequences))
        notify("READY=1", f"STATUS={self._service.process.status()}")

    def status(self) -> str:
        """Return the status for systemd."""
        return (
            f"{counted(len(self._engine.catalog.sequences), 'sequence')}, "
            f"{counted(self.metrics.places, 'active step')}, {self.metrics.overdue:,} overdue; "
            f"in flight {self._engine.in_flight:,}"
        )

    async def _stop_when(self, requested: asyncio.Event) -> None:
        await requested.wait()
        notify("STOPPING=1")
        self.health.stopping = True
        self._engine.stop()
        # shutdown does not wait for a database that does not answer
        seconds = self.parts.settings.engine.stop_timeout + CLOSE_TIMEOUT
        for pool in self._pools:
            asyncio.get_running_loop().call_later(seconds, pool.terminate)

    async def _reload_whenever(self, requested: asyncio.Event, group: asyncio.TaskGroup) -> None:
        while await requested.wait():
            requested.clear()
            notify_reloading()
            try:
                service = self._service
                new = self.parts.renewed(self._reread(), service.suppressions, service.take)
            except SettingsError as error:
                self._log.error("invalid settings, the old ones remain", error=str(error))
            else:
                make_log(new.settings)
                drained = await self._engine.use(new.runners, new.lookups.get)
                group.create_task(self._close_when(drained, self.parts, new))
                self.parts = new
                self._log.info("settings reloaded")
            notify("READY=1")

    def _reread(self) -> Settings:
        """Return the new settings, with the old values of those that require a restart. Raises
        SettingsError.
        """
        old, new = self.parts.settings, self._service.read()
        if fixed := old.differences(new, *RESTART_SECTIONS):
            self._log.warning("changed settings require a restart", settings=fixed)
        return new.model_copy(update={name: getattr(old, name) for name in RESTART_SECTIONS})

    async def _close_when(
        self, drained: Awaitable[object], old: ReloadableParts, new: ReloadableParts
    ) -> None:
        await drained
        await old.close(but=new)


@asynccontextmanager
async def _pool(
    shard: Shard, settings: DatabaseSettings, size: int, **options: Any
) -> AsyncIterator[asyncpg.Pool]:
    if settings.url is not None:
        shard = shard._replace(url=settings.url.get_secret_value())
    try:
        pool = await connections.connect_pool(shard, size, pooled=settings.pooled, **options)
    except (OSError, asyncpg.PostgresError, TimeoutError) as error:
        raise DatabaseError(
            f"cannot connect to the database: {connections.explain(error, shard)}"
        ) from error
    try:
        yield pool
    finally:
        await connections.close_pool(pool, CLOSE_TIMEOUT)
