"""The composition root: makes the parts from the settings, and runs them until a signal."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import socket
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any, NoReturn
from uuid import uuid4

import asyncpg
from pydantic import SecretStr
from structlog.typing import FilteringBoundLogger

from sequencerd import migrate, retention, store
from sequencerd.clock import Clock
from sequencerd.core.config import Faults, parse_config
from sequencerd.core.model import RETRY, DefinitionError, Failed, Fault, Result, Task
from sequencerd.engine import Engine
from sequencerd.errors import DatabaseError, SettingsError
from sequencerd.listener import listen
from sequencerd.lookups import Lookups
from sequencerd.runners import NotNow, Runner
from sequencerd.runners.email import EmailRunner
from sequencerd.runners.http import HttpRunner
from sequencerd.runners.python import load
from sequencerd.runners.sms import HttpSmsRunner, SmsConfig, TwilioRunner
from sequencerd.runners.suppressions import Key, Suppressions
from sequencerd.settings import Settings, Sms
from sequencerd.systemd import notify

CONNECT_TIMEOUT = 10.0  # seconds
CLOSE_TIMEOUT = 5.0


def make_runners(settings: Settings, suppressions: Suppressions | None = None) -> dict[str, Runner]:
    """Every runner that is installed or set up, by the type of its steps. Raises SettingsError.

    Messages are sent to nobody whom `suppressions` names; without it, definitions can be read.
    """
    email = settings.email
    try:
        runners: dict[str, Runner] = {
            "Email": EmailRunner(
                _secret(email.url) or "smtp://localhost:25",
                concurrency=email.concurrency,
                timeout=email.timeout,
                per_second=email.per_second,
                list_unsubscribe=email.list_unsubscribe,
                suppressions=suppressions,
                retry=email.retry,
            ),
            "SMS": _sms_runner(settings.sms, suppressions),
        }
        runners |= load()
        for name, endpoint in settings.runners.items():
            runners[name] = HttpRunner(
                endpoint.url,
                name=name,
                timeout=endpoint.timeout,
                batch_size=endpoint.batch_size,
                concurrency=endpoint.concurrency,
                per_second=endpoint.per_second,
                secret=_secret(endpoint.secret),
                headers=_secrets(endpoint.headers),
                allow_private=endpoint.allow_private,
                retry=endpoint.retry,
            )
    except ValueError as error:
        raise SettingsError(f"wrong setting: {error}") from error
    return runners


def _sms_runner(sms: Sms, suppressions: Suppressions | None) -> Runner:
    if sms.provider == "http":
        if not sms.url or not sms.body:
            return _NotSetUp("SMS needs a gateway: set sms.url and sms.body")
        return HttpSmsRunner(
            sms.url,
            body=sms.body,
            headers=_secrets(sms.headers),
            concurrency=sms.concurrency,
            timeout=sms.timeout,
            per_second=sms.per_second,
            allow_private=sms.allow_private,
            suppressions=suppressions,
            retry=sms.retry,
        )
    token = _secret(sms.auth_token)
    if not sms.account_sid or not token:
        return _NotSetUp("SMS needs an account: set sms.account_sid and sms.auth_token")
    return TwilioRunner(
        sms.account_sid,
        token,
        base_url=sms.base_url,
        concurrency=sms.concurrency,
        timeout=sms.timeout,
        per_second=sms.per_second,
        suppressions=suppressions,
        retry=sms.retry,
    )


def _secret(value: SecretStr | None) -> str | None:
    return value.get_secret_value() if value else None


def _secrets(values: Mapping[str, SecretStr]) -> dict[str, str]:
    return {key: value.get_secret_value() for key, value in values.items()}


class _NotSetUp:
    """Stands for the SMS runner where the settings say too little: its steps have a problem."""

    batch_size = concurrency = 1
    timeout = 1.0
    retry = RETRY

    def __init__(self, problem: str) -> None:
        self._problem = problem

    def compile(self, config: Mapping[str, Any]) -> NoReturn:
        faults = Faults()
        with faults.at():
            parse_config(SmsConfig, config)
        raise DefinitionError([*faults.found, Fault((), self._problem)])

    async def run(self, _program: object, tasks: Sequence[Task]) -> Sequence[Result]:
        return [Failed(self._problem)] * len(tasks)

    async def close(self) -> None:
        pass


async def connect(url: str) -> asyncpg.Connection:
    """One connection for a command. Raises DatabaseError without the password in it."""
    try:
        connection = await asyncpg.connect(
            url, timeout=CONNECT_TIMEOUT, server_settings={"application_name": "sequencerd"}
        )
    except (OSError, asyncpg.PostgresError, TimeoutError) as error:
        raise DatabaseError(f"cannot connect to the database: {_in_words(error)}") from error
    except (ValueError, asyncpg.InterfaceError) as error:
        raise SettingsError("the database's URL is wrong; write postgresql://user@host/name") from (
            error
        )
    return connection


def _in_words(error: BaseException) -> str:
    return str(error) or f"no answer within {CONNECT_TIMEOUT:g} seconds"


def tune_collector() -> None:
    """Lets Python look for cycles less often: batches are a hundred thousand short-lived tuples and
    no cycle, and with the defaults a third of the time goes into looking.
    """
    gc.set_threshold(200_000, 20, 50)


def daemon_name() -> str:
    """Who holds a lease: the host and process, for a person, and a part that never comes again."""
    return f"{socket.gethostname()}:{os.getpid()}:{uuid4().hex[:8]}"


async def run(url: str, settings: Settings, log: FilteringBoundLogger) -> None:
    """Runs until SIGTERM or SIGINT. Raises SequencerdError if it can't begin."""

    async def suppressed(keys: list[Key]) -> set[Key]:
        try:
            async with pool.acquire() as connection:
                return await store.suppressed(connection, keys)
        except store.PASSING_ERRORS as error:
            raise NotNow(f"the suppressions can't be read: {error}") from error

    runners = make_runners(settings, Suppressions(suppressed))
    tune_collector()
    connection = await connect(url)
    try:
        await migrate.check(connection)
    finally:
        await connection.close()
    async with _pool(url, settings.database.connections) as pool:
        name = daemon_name()
        lookups = Lookups(pool, settings.lookups)
        clock = Clock()
        engine = Engine(
            pool,
            runners,
            lookups.get,
            clock=clock,
            settings=settings.engine,
            name=name,
            log=log,
            turned=lambda: notify("WATCHDOG=1"),
        )

        async def connected() -> None:
            await engine.sweep()
            log.info("ready", daemon=name, sequences=len(engine.catalog.sequences))
            notify("READY=1")

        def stop() -> None:
            notify("STOPPING=1")
            engine.stop()

        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop)
        try:
            # whatever dies takes the process down: it is started again, and leases run out
            async with asyncio.TaskGroup() as group:
                helpers = [
                    group.create_task(listen(url, engine.receive, connected, log)),
                    group.create_task(
                        retention.keep(pool, settings.retention, clock=clock, log=log)
                    ),
                ]
                await engine.run()
                for helper in helpers:
                    helper.cancel()
        finally:
            for runner in runners.values():
                await runner.close()
            await lookups.close()
    log.info("stopped", daemon=name)


@asynccontextmanager
async def _pool(url: str, size: int) -> AsyncIterator[asyncpg.Pool]:
    try:
        pool = await store.connect_pool(url, size)
    except (OSError, asyncpg.PostgresError, TimeoutError) as error:
        raise DatabaseError(f"cannot connect to the database: {_in_words(error)}") from error
    try:
        yield pool
    finally:
        with suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_TIMEOUT):
                await pool.close()
        pool.terminate()
