"""The connection that listens: NOTIFY becomes messages. It reconnects, and probes itself."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import asyncpg
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError
from structlog.typing import FilteringBoundLogger

from sequencerd.store import PASSING_ERRORS, brief

CHANNEL = "sequencer"
PROBE_INTERVAL = 5.0  # seconds; with its time-out, a half-open connection is found within 10
PROBE_TIMEOUT = 5.0
LONGEST_PAUSE = 10.0  # seconds between attempts to connect
POLL_INTERVAL = 1.0


class _Message(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Due(_Message):
    """From the triggers: somebody at this step (sequence, step) is due soon."""

    due: tuple[str, str]


class Changed(_Message):
    """From the triggers: definitions have changed."""

    definitions: bool


class Look(_Message):
    """From an application: look again at those who wait; with nothing set, at all of them."""

    subject: str | None = None
    sequence: str | None = None
    step: str | None = None


Message = Due | Changed | Look

_messages: TypeAdapter[Message] = TypeAdapter(Message)


def parse(payload: str) -> Message:
    """A payload of NOTIFY. Raises ValueError for what is none of ours."""
    if not payload:
        return Look()
    try:
        return _messages.validate_json(payload)
    except ValidationError as error:
        raise ValueError(
            'write NOTIFY sequencer, or {"subject": ...}, {"sequence": ..., "step": ...} as payload'
        ) from error


async def listen(
    url: str,
    receive: Callable[[Message], None],
    connected: Callable[[], Awaitable[None]],
    log: FilteringBoundLogger,
    heard: Callable[[bool], None] = lambda _: None,
    **options: Any,
) -> None:
    """Listens for ever. `connected` is awaited after each LISTEN: what was missed before it, is
    found by looking. Comes back after whatever happens to the connection or the server. `heard` is
    told True with each LISTEN and probe that was answered, and False when the connection is lost.
    """
    pause = 0.0
    while True:
        try:
            connection = await asyncpg.connect(
                url,
                timeout=PROBE_TIMEOUT * 2,
                server_settings={"application_name": "sequencerd listener"},
                **options,
            )
        except (*PASSING_ERRORS, asyncpg.PostgresError) as error:
            pause = min(max(pause * 2, 0.1), LONGEST_PAUSE)
            text = str(error) or type(error).__name__
            log.warning("listener cannot connect", error=text, retry_in=pause)
            await asyncio.sleep(pause)
            continue
        try:
            await connection.add_listener(CHANNEL, _receiver(receive, log))
            await connected()
            heard(True)
            pause = 0.0
            await _probe(connection, heard)
        except (*PASSING_ERRORS, asyncpg.PostgresError) as error:
            log.warning("listener lost its connection", error=str(error) or type(error).__name__)
        finally:
            heard(False)
            connection.terminate()
        pause = min(max(pause * 2, 0.1), LONGEST_PAUSE)
        await asyncio.sleep(pause)


async def poll(
    connected: Callable[[], Awaitable[None]],
    look: Callable[[], Awaitable[None]],
    log: FilteringBoundLogger,
    heard: Callable[[bool], None],
) -> None:
    """Looks for ever, where nothing can be heard: `connected` at first, then `look`."""
    log.warning("listens to nothing, looks for what is new instead", every=POLL_INTERVAL)
    while True:
        try:
            await connected()
            heard(True)
            connected = look
        except (*PASSING_ERRORS, asyncpg.PostgresError) as error:
            heard(False)
            log.warning("can't look for what is new", error=brief(error))
        await asyncio.sleep(POLL_INTERVAL)


async def _probe(connection: asyncpg.Connection, heard: Callable[[bool], None]) -> None:
    """Asks now and then, as a quiet connection and a dead one look the same."""
    closed = asyncio.Event()
    connection.add_termination_listener(lambda _: closed.set())
    while not closed.is_set():
        with suppress(TimeoutError):
            async with asyncio.timeout(PROBE_INTERVAL):
                await closed.wait()
        await connection.fetchval("SELECT 1", timeout=PROBE_TIMEOUT)
        heard(True)


def _receiver(
    receive: Callable[[Message], None], log: FilteringBoundLogger
) -> Callable[[object, int, str, object], None]:
    def on_notify(_connection: object, _pid: int, _channel: str, payload: object) -> None:
        try:
            receive(parse(str(payload)))
        except ValueError as error:
            log.warning("notification not understood", length=len(str(payload)), hint=str(error))
            log.debug("notification not understood", payload=str(payload)[:200])

    return on_notify
