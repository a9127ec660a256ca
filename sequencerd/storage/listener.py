"""The connection that listens: NOTIFY becomes messages. It reconnects, and probes itself.

A commit that notifies waits for the one before it, so many writers would hold each other up.
Triggers notify only while a daemon has the bell, a lock. Where it rings very often, the daemon lets
go of it for a while, and all daemons look again and again instead. It is taken when no transaction
is under way any more that has told nobody; another look then finds what those have written.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import suppress
from datetime import datetime
from typing import Any, NamedTuple

import asyncpg
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError
from structlog.typing import FilteringBoundLogger

from sequencerd.storage.store import (
    TRANSIENT_ERRORS,
    Place,
    acquire_notify_lock,
    acquire_requests_lock,
    brief,
    release_notify_lock,
)

CHANNEL = "sequencer"
PROBE_INTERVAL = 5.0  # seconds; with its time-out, a half-open connection is found within 10
PROBE_TIMEOUT = 5.0
LONGEST_PAUSE = 10.0  # seconds between attempts to connect
POLL_INTERVAL = 1.0
KEEPALIVE = """
    SET tcp_keepalives_idle = 60; SET tcp_keepalives_interval = 10; SET tcp_keepalives_count = 3
"""  # or else the server keeps the bell for hours for a daemon whose machine is gone
OFTEN, WITHIN = 20, 0.1  # so many rings within so many seconds
QUIET = 1.0  # seconds for which the bell is off then
LOOK_INTERVALS = (0.01, 0.1)  # seconds between looks meanwhile: at first, and where nothing is new
LOOK_SHARE = 0.2  # of the time, for looks that take long
REFUSED_INTERVAL = 60.0  # seconds between lines of the log about notifications that mean nothing
HEARD = 1000  # requests that are kept for the daemon that sees to them, in case it is gone
HEARD_FOR = 120.0  # seconds; after so long the server knows that a machine is gone
TOO_MANY = 10_000  # steps where somebody is: who has more wants to be told
OTHERS_INTERVAL = 1.0  # seconds until it is seen that a daemon that had the bell is gone


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


class Quiet(_Message):
    """From a daemon: for a while nobody is told."""

    quiet: bool


Message = Due | Changed | Look


class Looked(NamedTuple):
    """What a look has found: at how many steps somebody is, and at which somebody is due."""

    places: int
    due: frozenset[tuple[Place, datetime]]


HINT = 'write NOTIFY sequencer, or {"subject": ...}, {"sequence": ..., "step": ...} as payload'

_messages: TypeAdapter[Message | Quiet] = TypeAdapter(Message | Quiet)


def parse(payload: str) -> Message | Quiet:
    """A payload of NOTIFY. Raises ValueError for what is none of ours."""
    if not payload:
        return Look()
    try:
        return _messages.validate_json(payload)
    except ValidationError as error:
        raise ValueError(HINT) from error


class _Refusals:
    """Counts notifications that mean nothing, and tells of them in the log once a minute."""

    def __init__(self, refused: Callable[[], None], log: FilteringBoundLogger) -> None:
        self._refused = refused
        self._log = log
        self._count = 0
        self._sample = ""
        self._is_waiting = False

    def add(self, payload: str) -> None:
        self._refused()
        self._count += 1
        if self._is_waiting:
            return
        self._sample = payload[:200]
        self._tell()

    def _tell(self) -> None:
        self._is_waiting = self._count > 0
        if self._count:
            self._log.warning("notifications not understood", count=self._count, hint=HINT)
            self._log.debug("notifications not understood", payload=self._sample)
            self._count = 0
            asyncio.get_running_loop().call_later(REFUSED_INTERVAL, self._tell)


async def listen(
    url: str,
    receive: Callable[[Message], None],
    connected: Callable[[], Awaitable[None]],
    look: Callable[[], Awaitable[Looked]],
    *,
    log: FilteringBoundLogger,
    heard: Callable[[bool], None] = lambda _: None,
    refused: Callable[[], None] = lambda: None,
    **options: Any,
) -> None:
    """Listens for ever. `connected` is awaited after each LISTEN: what was missed before it, is
    found by looking; `look` does that where nobody tells. Comes back after whatever happens to the
    connection or the server. `heard` is told True with each LISTEN and probe that was answered, and
    False when the connection is lost. `refused` is called for each notification that means nothing.
    """
    pause = 0.0
    refusals = _Refusals(refused, log)
    while True:
        try:
            connection = await asyncpg.connect(
                url,
                timeout=PROBE_TIMEOUT * 2,
                command_timeout=PROBE_TIMEOUT,
                server_settings={"application_name": "sequencerd listener"},
                **options,
            )
        except TRANSIENT_ERRORS as error:
            pause = min(max(pause * 2, 0.1), LONGEST_PAUSE)
            text = str(error) or type(error).__name__
            log.warning("listener cannot connect", error=text, retry_in=pause)
            await asyncio.sleep(pause)
            continue
        try:
            watch = _Watch(connection, receive, look, heard, refusals=refusals, log=log)
            await connection.execute(KEEPALIVE)
            await connection.add_listener(CHANNEL, watch.on_notify)
            await connected()
            heard(True)
            pause = 0.0
            await watch.keep()
        except TRANSIENT_ERRORS as error:
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
        except TRANSIENT_ERRORS as error:
            heard(False)
            log.warning("can't look for what is new", error=brief(error))
        await asyncio.sleep(POLL_INTERVAL)


class _Watch:
    """Sees to it that nothing is missed while a connection lasts: it is told, or looks."""

    def __init__(
        self,
        connection: asyncpg.Connection,
        receive: Callable[[Message], None],
        look: Callable[[], Awaitable[Looked]],
        heard: Callable[[bool], None],
        *,
        refusals: _Refusals,
        log: FilteringBoundLogger,
    ) -> None:
        self._connection = connection
        self._receive = receive
        self._look = look
        self._heard = heard
        self._refusals = refusals
        self._log = log
        self._leads = False  # the daemon that sees to requests
        self._next_lead = 0.0
        self._requests: dict[Look, float] = {}  # of late, while another one does
        self._called = asyncio.Event()  # there is something to do before the next probe
        self._has_bell: bool | None = None  # False: another daemon has it
        self._is_quiet = False  # another daemon has let go of it
        self._rings: deque[float] = deque(maxlen=OFTEN)
        self._last = Looked(0, frozenset())
        self._pause = LOOK_INTERVALS[0]
        connection.add_termination_listener(lambda _: self._called.set())

    def on_notify(self, _connection: object, _pid: int, _channel: str, payload: object) -> None:
        """Called by asyncpg."""
        try:
            message = parse(str(payload))
        except ValueError:
            self._refusals.add(str(payload))
            return
        if isinstance(message, Look) and not self._leads:
            self._keep(message)
            return
        if isinstance(message, Quiet):
            self._is_quiet = True
            self._called.set()
            return
        if self._has_bell and isinstance(message, Due):
            self._rings.append(asyncio.get_running_loop().time())
            if self._rings_often:
                self._called.set()
        self._receive(message)

    def _keep(self, request: Look) -> None:
        """Each daemon hears every request: that of another daemon is done if that one goes away."""
        if len(self._requests) >= HEARD:
            self._requests = {Look(): asyncio.get_running_loop().time()}
        self._requests[request] = asyncio.get_running_loop().time()

    async def _lead(self) -> None:
        """Sees to requests from now on, if no other daemon does."""
        now = asyncio.get_running_loop().time()
        if self._leads or now < self._next_lead:
            return
        self._next_lead = now + OTHERS_INTERVAL
        self._leads = await acquire_requests_lock(self._connection)
        if self._leads:
            requests, self._requests = self._requests, {}
            for request, at in requests.items():
                if at >= now - HEARD_FOR:
                    self._receive(request)

    @property
    def _rings_often(self) -> bool:
        rings = self._rings
        is_often = len(rings) == OFTEN and rings[-1] - rings[0] < WITHIN
        return is_often and self._last.places <= TOO_MANY

    async def keep(self) -> None:
        """Until the connection is lost, which raises."""
        while True:
            had_bell = self._has_bell
            if had_bell:
                await self._probe()
            else:
                self._has_bell = await acquire_notify_lock(self._connection)
                self._heard(True)
            await self._lead()
            if self._has_bell is None:
                await self._look_and_pause()
                continue
            if self._has_bell is not had_bell:
                self._is_quiet = False
                self._rings.clear()
                await self._look_once()
            with suppress(TimeoutError):
                async with asyncio.timeout(PROBE_INTERVAL if self._has_bell else OTHERS_INTERVAL):
                    await self._called.wait()
            self._called.clear()
            if self._has_bell and self._rings_often:
                await release_notify_lock(self._connection)
            elif self._has_bell or not self._is_quiet:
                continue
            self._has_bell, self._pause = None, LOOK_INTERVALS[0]
            loop = asyncio.get_running_loop()
            end = loop.time() + QUIET
            while loop.time() < end:
                await self._look_and_pause()

    async def _probe(self) -> None:
        await self._connection.fetchval("SELECT 1")
        self._heard(True)

    async def _look_and_pause(self) -> None:
        loop = asyncio.get_running_loop()
        begun, known = loop.time(), self._last.due
        await self._look_once()
        shortest, longest = LOOK_INTERVALS
        self._pause = shortest if self._last.due - known else min(2 * self._pause, longest)
        await asyncio.sleep(max(self._pause, (loop.time() - begun) / LOOK_SHARE))

    async def _look_once(self) -> None:
        """Until it succeeds; probes the connection meanwhile, which may be lost."""
        while True:
            looking = asyncio.ensure_future(self._look())
            try:
                while not (await asyncio.wait([looking], timeout=PROBE_INTERVAL))[0]:
                    await self._probe()
                self._last = looking.result()
            except TRANSIENT_ERRORS as error:
                if not looking.done():
                    raise  # the probe's
                self._log.warning("can't look for what is new", error=brief(error))
            else:
                return
            finally:
                looking.cancel()
            await asyncio.sleep(POLL_INTERVAL)
            await self._probe()
