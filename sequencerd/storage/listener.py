"""The connection that listens: it converts NOTIFY to messages, reconnects, and probes itself.

Commits that notify wait for each other, so triggers notify only while a daemon holds the notify
lock. If notifications are very frequent, the daemon releases the lock for a while, and all daemons
poll instead. The lock can be acquired again when no transaction is in progress that has skipped its
notification; one more poll then finds what those transactions have written.

If Citus has distributed the tables, triggers run on other servers, and the daemon always polls.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import suppress
from datetime import datetime
from time import monotonic
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

import asyncpg
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from sequencerd.core.enrollment import StepKey
from sequencerd.storage.connections import Shard, open_connection
from sequencerd.storage.daemons import (
    NotifyLock,
    acquire_notify_lock,
    acquire_requests_lock,
    release_notify_lock,
)
from sequencerd.storage.database_errors import TRANSIENT_ERRORS, brief
from sequencerd.storage.server import is_on_citus

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger

PROBE_INTERVAL = 5.0  # seconds; with its time-out, a half-open connection is found within 10
PROBE_TIMEOUT = 5.0
MAX_PAUSE = 10.0  # seconds between attempts to connect
POLL_INTERVAL = 1.0
KEEPALIVE = """
    SET tcp_keepalives_idle = 60; SET tcp_keepalives_interval = 10; SET tcp_keepalives_count = 3
"""  # otherwise the server keeps the notify lock of a machine that is gone for hours
OFTEN, WITHIN = 20, 0.1  # so many notifications within so many seconds release the lock
OFF_FOR = 1.0  # seconds for which notifications are then off
POLL_INTERVALS = (0.01, 0.1)  # seconds between polls meanwhile: at first, and if nothing is new
POLL_SHARE = 0.2  # of the time that slow polls may take
KEPT_REQUESTS = 1000  # requests kept in case the daemon that handles them has died
KEPT_FOR = 120.0  # seconds after which the server has noticed that a machine is gone
MAX_POLLED_STEPS = 10_000  # with more occupied steps, a poll costs more than notifications
LOCK_INTERVAL = 1.0  # seconds between attempts to acquire a lock of another daemon


class _Payload(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class EnrollmentDue(_Payload):
    """From the triggers: an enrollment at this step (sequence, step) is due soon.

    None of those that the notification is about wakes before `since`, if that is set; and all are
    due at that time, unless some are `later`.
    """

    due: tuple[str, str]
    since: AwareDatetime | None = None
    later: bool = False


class DefinitionsChanged(_Payload):
    """From the triggers: the definition of this sequence has changed, or any (True)."""

    definitions: Literal[True] | str


class Reevaluate(_Payload):
    """From an application: evaluate waiting enrollments; if nothing is set, all of them."""

    subject: str | None = None
    sequence: str | None = None
    step: str | None = None


class NotificationsOff(_Payload):
    """From a daemon that has released the notify lock: poll for a while."""

    notifications: Literal["off"]


Notification = EnrollmentDue | DefinitionsChanged | Reevaluate


class DueSteps(NamedTuple):
    """The result of a poll: the number of occupied steps, and those with due enrollments."""

    occupied: int
    due: frozenset[tuple[StepKey, datetime]]


_messages: TypeAdapter[Notification | NotificationsOff] = TypeAdapter(
    Annotated[
        EnrollmentDue | DefinitionsChanged | NotificationsOff | Reevaluate,
        Field(union_mode="left_to_right"),  # the first is by far the most frequent
    ]
)


def parse(payload: str) -> Notification | NotificationsOff:
    """Parse a payload of NOTIFY. Raises ValueError if it is not one of ours."""
    if not payload:
        return Reevaluate()
    try:
        return _messages.validate_json(payload)
    except ValidationError as error:
        raise ValueError(
            'send no payload, or {"subject": ...}, {"sequence": ..., "step": ...}'
        ) from error


async def listen(
    shard: Shard,
    receive: Callable[[Notification], None],
    connected: Callable[[], Awaitable[None]],
    find_due: Callable[[bool], Awaitable[DueSteps]],
    *,
    log: FilteringBoundLogger,
    heard: Callable[[bool], None] = lambda _: None,
    refused: Callable[[], None] = lambda: None,
) -> None:
    """Listen for ever, and reconnect whatever happens to the connection or the server.

    `connected` is awaited after each LISTEN, to find what was missed before it. `find_due` polls
    while notifications are off; with True, it has to find all that was written without one. `heard`
    is called with True after each LISTEN and probe, and with False when the connection is lost.
    `refused` is called for each invalid notification.
    """
    pause = 0.0
    while True:
        try:
            connection = await open_connection(
                shard,
                name="sequencerd listener",
                timeout=PROBE_TIMEOUT * 2,
                command_timeout=PROBE_TIMEOUT,
            )
        except TRANSIENT_ERRORS as error:
            pause = min(max(pause * 2, 0.1), MAX_PAUSE)
            text = str(error) or type(error).__name__
            log.warning("listener cannot connect", error=text, retry_in=pause)
            await asyncio.sleep(pause)
            continue
        try:
            watch = _Watch(connection, receive, find_due, heard, refused=refused, log=log)
            await connection.execute(KEEPALIVE)
            await connection.add_listener(shard.schema, watch.on_notify)
            await connected()
            heard(True)
            pause = 0.0
            if await is_on_citus(connection):
                await watch.poll()
            await watch.keep()
        except TRANSIENT_ERRORS as error:
            log.warning("listener lost its connection", error=str(error) or type(error).__name__)
        except Exception:  # of `connected`: the next attempt may succeed
            log.exception("internal error")
        finally:
            heard(False)
            connection.terminate()
        pause = min(max(pause * 2, 0.1), MAX_PAUSE)
        await asyncio.sleep(pause)


async def poll(
    connected: Callable[[], Awaitable[None]],
    sweep: Callable[[], Awaitable[None]],
    log: FilteringBoundLogger,
    heard: Callable[[bool], None],
) -> None:
    """Poll for ever, for connections that cannot LISTEN: call `connected` once, then `sweep`."""
    log.warning("polling instead of listening, by database.listen", every=POLL_INTERVAL)
    while True:
        try:
            await connected()
            heard(True)
            connected = sweep
        except TRANSIENT_ERRORS as error:
            heard(False)
            log.warning("poll failed, trying again", error=brief(error))
        except Exception:
            heard(False)
            log.exception("internal error")
        await asyncio.sleep(POLL_INTERVAL)


class _Watch:
    """Misses nothing while a connection lasts: it is notified, or polls."""

    def __init__(
        self,
        connection: asyncpg.Connection,
        receive: Callable[[Notification], None],
        find_due: Callable[[bool], Awaitable[DueSteps]],
        heard: Callable[[bool], None],
        *,
        refused: Callable[[], None],
        log: FilteringBoundLogger,
    ) -> None:
        self._connection = connection
        self._receive = receive
        self._find_due = find_due
        self._heard = heard
        self._refused = refused
        self._log = log
        self._requests = _Requests(connection, receive)
        self._wake = asyncio.Event()  # there is something to do before the next probe
        self._notify_lock = NotifyLock.NOBODYS
        self._is_off = False  # whether another daemon has released it
        self._notified_at: deque[float] = deque(maxlen=OFTEN)
        self._last = DueSteps(0, frozenset())
        self._pause = POLL_INTERVALS[0]
        self._took = 0.0  # seconds, the last poll
        self._whole_took = deque([0.0, 0.0], maxlen=2)  # seconds, the last two whole polls
        connection.add_termination_listener(lambda _: self._wake.set())

    def on_notify(self, _connection: object, _pid: int, _channel: str, payload: object) -> None:
        """Called by asyncpg."""
        try:
            message = parse(str(payload))
        except ValueError as error:
            self._refused()
            self._log.warning("notifications not understood", error=str(error))
            self._log.debug("notification not understood", payload=str(payload)[:200])
            return
        match message:
            case Reevaluate():
                self._requests.add(message)
                return
            case NotificationsOff():
                self._is_off = True
                self._wake.set()
                return
            case EnrollmentDue() if self._notify_lock is NotifyLock.OURS:
                self._notified_at.append(monotonic())
                if self._is_notified_often:
                    self._wake.set()
        self._receive(message)

    @property
    def _is_notified_often(self) -> bool:
        times = self._notified_at
        is_often = len(times) == OFTEN and times[-1] - times[0] < WITHIN
        return is_often and self._last.occupied <= MAX_POLLED_STEPS

    async def keep(self) -> None:
        """Work until the connection is lost, which raises."""
        while True:
            await self._requests.try_to_handle()
            await self._hold_notify_lock()
            match self._notify_lock:
                case NotifyLock.NOBODYS:
                    await self._poll_and_pause()
                case NotifyLock.OURS:
                    await self._wait(PROBE_INTERVAL)
                    if self._is_notified_often:
                        await release_notify_lock(self._connection)
                        await self._poll_for_a_while()
                case NotifyLock.ANOTHERS:
                    await self._wait(LOCK_INTERVAL)
                    if self._is_off:
                        await self._poll_for_a_while()

    async def _hold_notify_lock(self) -> None:
        """Try to acquire the notify lock, and find what was written without a notification."""
        before = self._notify_lock
        if before is NotifyLock.OURS:
            await self._probe()
            return
        self._notify_lock = await acquire_notify_lock(self._connection)
        self._heard(True)
        if self._notify_lock not in (before, NotifyLock.NOBODYS):
            self._is_off = False
            self._notified_at.clear()
            started = monotonic()
            await self._poll_once(whole=True)
            self._whole_took.append(monotonic() - started)

    async def _wait(self, seconds: float) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._wake.wait()
        self._wake.clear()

    async def _probe(self) -> None:
        await self._connection.fetchval("SELECT 1")
        self._heard(True)

    async def poll(self) -> None:
        """Poll until the connection is lost, which raises: nothing but requests is notified."""
        while True:
            await self._probe()
            await self._requests.try_to_handle()
            self._receive(DefinitionsChanged(definitions=True))
            await self._poll_until(monotonic() + POLL_INTERVAL)

    async def _poll_for_a_while(self) -> None:
        """Poll while notifications are off."""
        self._notify_lock, self._pause = NotifyLock.NOBODYS, POLL_INTERVALS[0]
        # a whole poll reads all dead entries of the index: many while a snapshot is held open
        await self._poll_until(monotonic() + pause_after(OFF_FOR, *self._whole_took))

    async def _poll_until(self, end: float) -> None:
        while monotonic() < end:
            await self._poll_and_pause()

    async def _poll_and_pause(self) -> None:
        started, known = monotonic(), self._last.due
        await self._poll_once(whole=False)
        shortest, longest = POLL_INTERVALS
        self._pause = shortest if self._last.due - known else min(2 * self._pause, longest)
        took, self._took = self._took, monotonic() - started
        await asyncio.sleep(pause_after(self._pause, took, self._took))

    async def _poll_once(self, *, whole: bool) -> None:
        """Poll until it succeeds, and probe the connection meanwhile."""
        while True:
            polling = asyncio.ensure_future(self._find_due(whole))
            try:
                while not (await asyncio.wait([polling], timeout=PROBE_INTERVAL))[0]:
                    await self._probe()
                self._last = polling.result()
            except TRANSIENT_ERRORS as error:
                if not polling.done():
                    raise  # the probe's
                self._log.warning("poll failed, trying again", error=brief(error))
            else:
                return
            finally:
                polling.cancel()
            await asyncio.sleep(POLL_INTERVAL)
            await self._probe()


def pause_after(pause: float, *took: float) -> float:
    """Return how long to pause after the last two polls, which took so many seconds: longer if both
    were slow. What slowed only one of them is not what they read.
    """
    return max(pause, min(took) / POLL_SHARE)


class _Requests:
    """Requests to reevaluate, which one daemon handles; the others keep them in case it dies."""

    def __init__(
        self, connection: asyncpg.Connection, handle: Callable[[Reevaluate], None]
    ) -> None:
        self._connection = connection
        self._handle = handle
        self._is_ours = False  # whether this daemon handles them
        self._next_attempt = 0.0
        self._kept: dict[Reevaluate, float] = {}  # with the time at which each came

    def add(self, request: Reevaluate) -> None:
        """Handle a request, or keep it."""
        if self._is_ours:
            self._handle(request)
            return
        if len(self._kept) >= KEPT_REQUESTS:
            self._kept = {Reevaluate(): monotonic()}
        self._kept[request] = monotonic()

    async def try_to_handle(self) -> None:
        """Handle requests from now on, unless another daemon does."""
        now = monotonic()
        if self._is_ours or now < self._next_attempt:
            return
        self._next_attempt = now + LOCK_INTERVAL
        self._is_ours = await acquire_requests_lock(self._connection)
        if self._is_ours:
            kept, self._kept = self._kept, {}
            for request, at in kept.items():
                if at >= now - KEPT_FOR:
                    self._handle(request)
