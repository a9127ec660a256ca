"""Limits how often something starts."""

from __future__ import annotations

import asyncio

from sequencerd.core.model import Limits


class Pace:
    """Lets callers pass at an even rate, in the order of their calls; None is no limit."""

    def __init__(self, limits: Limits) -> None:
        self.longest_wait = (
            0.0 if limits.per_second is None else limits.concurrency / limits.per_second
        )
        """For how many seconds the last of all concurrent calls waits for its turn."""
        self._interval = 0.0 if limits.per_second is None else 1 / limits.per_second
        self._next = 0.0

    async def turn(self) -> None:
        """Return when it is the caller's turn."""
        if not self._interval:
            return
        now = asyncio.get_running_loop().time()
        begin = max(self._next, now)
        self._next = begin + self._interval
        if begin > now:
            await asyncio.sleep(begin - now)
