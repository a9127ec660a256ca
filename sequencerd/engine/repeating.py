"""Work that is asked for from outside, as often as anybody likes, at a bounded cost."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Protocol

from structlog.typing import FilteringBoundLogger

from sequencerd.storage.store import TRANSIENT_ERRORS, brief

SHARE = 0.2  # of the time, for work that is asked for again and again
RETRY_PAUSE = 1.0  # seconds after an error of the database


class Stopping(Protocol):
    """What tells that nothing more is to be begun."""

    stopping: bool


class Repeating:
    """Does one kind of work, once at a time: what is asked for while it goes on is done once more
    after it, however often it is asked for. There is a pause in between, in seconds; it is longer
    after work that took long, unless that says that it was worth it.
    """

    def __init__(
        self,
        work: Callable[[], Awaitable[object]],
        spawn: Callable[[Awaitable[None]], None],
        owner: Stopping,
        *,
        log: FilteringBoundLogger,
        pause: float = 0.0,
    ) -> None:
        self._work = work
        self._spawn = spawn
        self._owner = owner
        self._log = log
        self._pause = pause
        self._is_requested = False
        self._is_busy = False

    def request(self) -> None:
        """Does the work from its beginning, soon."""
        self._is_requested = True
        self._begin()

    def _begin(self) -> None:
        if self._is_requested and not self._is_busy and not self._owner.stopping:
            self._is_requested, self._is_busy = False, True
            self._spawn(self._once())

    async def _once(self) -> None:
        loop = asyncio.get_running_loop()
        begun, pause = loop.time(), self._pause
        try:
            if await self._work():
                begun = loop.time()
        except TRANSIENT_ERRORS as error:
            self._log.warning("database error, tried again", error=brief(error))
            self._is_requested, pause = True, RETRY_PAUSE
        except Exception:
            self._log.exception("internal error")  # the sweep comes back to it
        finally:
            # not slept here: a stop does not wait for it
            loop.call_later(max(pause, (loop.time() - begun) * (1 / SHARE - 1)), self._rested)

    def _rested(self) -> None:
        self._is_busy = False
        self._begin()
