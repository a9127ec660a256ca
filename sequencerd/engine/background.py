"""Tasks beside the loop: work that is repeated after database errors, and work on request."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from structlog.typing import FilteringBoundLogger

from sequencerd.storage.database_errors import TRANSIENT_ERRORS, brief

ERROR_PAUSE = 1.0  # seconds after a transient error
LOCKED_PAUSE = 0.2  # seconds until a row that another session has locked is tried again
MAX_SHARE_OF_TIME = 0.2  # of the time, for work that is requested again and again

T = TypeVar("T")


@asynccontextmanager
async def concurrently(work: Coroutine[Any, Any, T]) -> AsyncIterator[asyncio.Task[T]]:
    """Do work in a task of its own within the context, which may await it."""
    task = asyncio.create_task(work)
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@dataclass(eq=False)
class Background:
    """The background tasks of an engine. Once `stopping` is set, work is no longer repeated after
    errors.
    """

    stopping: asyncio.Event
    log: FilteringBoundLogger
    is_over: bool = False
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)

    def spawn(self, work: Awaitable[None]) -> None:
        """Do work in a new task."""
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def every(self, seconds: float, work: Callable[[], Awaitable[None]]) -> None:
        """Repeat work until stopped, whether or not it succeeds."""
        while True:
            await asyncio.sleep(seconds)
            try:
                await work()
            except TRANSIENT_ERRORS as error:
                self.log.warning("database error", error=brief(error))
            except Exception:  # the next attempt may succeed
                self.log.exception("internal error")

    async def until_done(self, work: Callable[[], Awaitable[None]]) -> None:
        """Repeat work until the database is available."""
        while not self.stopping.is_set():
            try:
                await work()
            except TRANSIENT_ERRORS as error:
                self.log.warning("database error, trying again", error=brief(error))
                await asyncio.sleep(ERROR_PAUSE)
            except Exception:
                self.log.exception("internal error")  # the sweep does it later
                return
            else:
                return

    async def ended(self, at: float) -> None:
        """Wait for the tasks until a time of the event loop."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=at - asyncio.get_running_loop().time())

    def cancel(self) -> None:
        """Cancel the tasks that have not ended, and begin no more requested work."""
        self.is_over = True
        for task in self._tasks:
            task.cancel()


@dataclass(eq=False)
class Repeating:
    """Work that any user can request, as often as they like, at a limited cost.

    It runs once at a time: requests that arrive in the meantime cause one more run. Each run is
    followed by a pause in seconds, which is longer after a long run unless the work returns that it
    was useful. A stop ends none of it: results that are written meanwhile may need it.
    """

    _work: Callable[[], Awaitable[object]]
    _background: Background
    _pause: float = 0.0
    _is_requested: bool = False
    _is_busy: bool = False

    def request(self) -> None:
        """Request a run soon, from the beginning of the work."""
        self._is_requested = True
        self._start()

    def _start(self) -> None:
        if self._is_requested and not self._is_busy and not self._background.is_over:
            self._is_requested, self._is_busy = False, True
            self._background.spawn(self._once())

    async def _once(self) -> None:
        loop = asyncio.get_running_loop()
        started, pause = loop.time(), self._pause
        log = self._background.log
        try:
            if await self._work():
                started = loop.time()
        except TRANSIENT_ERRORS as error:
            log.warning("database error, trying again", error=brief(error))
            self._is_requested, pause = True, ERROR_PAUSE
        except Exception:
            log.exception("internal error")  # the sweep does it later
        finally:
            # a timer instead of a sleep, so that a stop does not wait for it
            loop.call_later(
                max(pause, (loop.time() - started) * (1 / MAX_SHARE_OF_TIME - 1)), self._rested
            )

    def _rested(self) -> None:
        self._is_busy = False
        self._start()
