"""Limits how often something starts."""

from __future__ import annotations

import asyncio


class Pace:
    """Lets callers pass at an even rate, in the order of their calls; None is no limit."""

    def __init__(self, per_second: float | None) -> None:
        if per_second is not None and not 0 < per_second < float("inf"):
            raise ValueError(f"per_second is {per_second}: write a number above 0")
        self._interval = 0.0 if per_second is None else 1 / per_second
        self._next = 0.0

    def longest_wait(self, callers: int) -> float:
        """Return how many seconds the last of so many callers waits for its turn."""
        return self._interval * callers

    async def turn(self) -> None:
        """Return when it is the caller's turn."""
        if not self._interval:
            return
        now = asyncio.get_running_loop().time()
        begin = max(self._next, now)
        self._next = begin + self._interval
        if begin > now:
            await asyncio.sleep(begin - now)
