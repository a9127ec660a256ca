"""Limits how often something starts."""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Awaitable, Callable

from sequencerd.core.model import Limits
from sequencerd.core.permits import Permits

TakePermits = Callable[[str, float, int], Awaitable[tuple[float, float]]]
"""Takes a number of permits of a runner at a rate, which all daemons share. Returns the time of the
first, and the present one, in seconds by the clock of those who share it.
"""

PATIENCE = 30.0
"""Seconds for which a call waits for its turn at least, before it is given back."""

ANSWERS = 50
"""The latest answers that tell how the clocks differ: the fastest of them does best."""


class Pace:
    """Lets callers pass at an even rate, in the order of their calls; None is no limit.

    Permits are taken in blocks: by `take` from what all daemons share, else of this process alone.
    """

    def __init__(self, limits: Limits, name: str = "", take: TakePermits | None = None) -> None:
        rate = limits.per_second
        self.longest_wait = 0.0 if rate is None else max(PATIENCE, 4 * limits.concurrency / rate)
        """For how many seconds a call waits for its turn at most. With several daemons, it may be
        as many times the turns of its own runner.
        """
        self._name = name
        self._take = take or self._take_alone
        self._rate = rate or 0.0
        self._permits = None if rate is None else Permits(rate)
        self._waiting = 0
        self._next = 0.0
        self._ahead: deque[float] = deque(maxlen=ANSWERS)  # this clock of the shared one
        self._lock = asyncio.Lock()  # callers pass it in their order

    async def turn(self, expires: float | None = None) -> bool:
        """Return True when it is the caller's turn. Return False if it does not come in time, or
        before the event loop's time `expires`.
        """
        if self._permits is None:
            return True
        loop = asyncio.get_running_loop()
        end = min(loop.time() + self.longest_wait, math.inf if expires is None else expires)
        while True:
            self._waiting += 1
            try:
                async with asyncio.timeout_at(end), self._lock:
                    at = await self._next_permit(self._permits)
            except TimeoutError:
                return False
            finally:
                self._waiting -= 1
            if at > end:
                self._permits.give_back(at)  # to another, whose time is longer
                await asyncio.sleep(end - loop.time())
                return False
            if await self._begun(at, self._permits):
                return True

    async def _begun(self, at: float, permits: Permits) -> bool:
        """Wait until a call with this permit can begin. Return False if the process was too busy,
        so that the permit has lapsed.
        """
        loop = asyncio.get_running_loop()
        wait: float | None = max(at - loop.time(), 0)
        while wait is not None:
            await asyncio.sleep(wait)
            if (wait := permits.begin(at, loop.time())) == 0:
                return True
        return False

    async def _next_permit(self, permits: Permits) -> float:
        loop = asyncio.get_running_loop()
        while (at := permits.next(loop.time())) is None:
            count = permits.wanted(self._waiting)
            first, present = await self._take(self._name, self._rate, count)
            self._ahead.append(loop.time() - present)
            permits.add(first + min(self._ahead), count)
        return at

    async def _take_alone(self, _name: str, rate: float, count: int) -> tuple[float, float]:
        now = asyncio.get_running_loop().time()
        first = max(self._next, now)
        self._next = first + count / rate
        return first, now
