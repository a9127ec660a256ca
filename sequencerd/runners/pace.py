"""Limit the rate at which calls begin."""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Awaitable, Callable

from sequencerd.core.model import Limits
from sequencerd.core.permits import Permits

TakePermits = Callable[[str, float, int], Awaitable[tuple[float, float]]]
"""Takes a number of permits for a runner at a rate, which all daemons share. Returns the time of
the first permit and the current time, in seconds of the shared clock.
"""

MIN_WAIT = 30.0
"""The least number of seconds for which a call waits for its turn before it is given back."""

OFFSET_SAMPLES = 50
"""How many of the latest answers are used to estimate the offset of the clocks: the fastest of them
is the most exact.
"""


class Pace:
    """Lets callers pass at an even rate, in the order of their calls; a rate of None is no limit.

    Permits are taken in blocks: from `take`, which all daemons share, or else for this process
    alone.
    """

    def __init__(self, limits: Limits, name: str, take: TakePermits | None = None) -> None:
        rate = limits.per_second
        self.longest_wait = 0.0 if rate is None else max(MIN_WAIT, 4 * limits.concurrency / rate)
        """The greatest number of seconds for which a call waits for its turn. With several daemons,
        it may be a multiple of the time that this runner's own turns take.
        """
        self._name = name
        self._take = take or self._take_alone
        self._rate = rate or 0.0
        self._permits = None if rate is None else Permits(rate)
        self._waiting = 0
        self._next = 0.0
        # offset of this clock to the shared one
        self._ahead: deque[float] = deque(maxlen=OFFSET_SAMPLES)
        self._lock = asyncio.Lock()  # callers pass in the order in which they acquire it

    async def turn(self, expires: float | None = None) -> bool:
        """Wait for the caller's turn and return True, or return False if it does not come in time,
        or before the event loop's time `expires`.
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
                self._permits.give_back(at)  # to another caller with more time
                await asyncio.sleep(end - loop.time())
                return False
            if await self._begun(at, self._permits):
                return True

    async def _begun(self, at: float, permits: Permits) -> bool:
        """Wait until a call with this permit can begin. Return False if the process was too busy
        and the permit has expired.
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
