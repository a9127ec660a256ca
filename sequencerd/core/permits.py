"""Which permits for calls at a limited rate a daemon asks for, and which it may still use."""

from __future__ import annotations

from collections import deque

BLOCK = 0.2
"""Seconds of the rate that a block of permits holds at most; at least one permit."""

LATEST = 0.05
"""Seconds after its instant for which a permit can be used: so many more calls than the rate allows
may begin in a second.
"""


class Permits:
    """Instants at which calls may begin, in blocks, by the caller's clock.

    A block is as large as the demand: twice the last one if that was used up, otherwise what was
    used of it. Permits that are not used in time lapse.
    """

    def __init__(self, per_second: float) -> None:
        self.interval = 1 / per_second
        self._most = max(1, int(per_second * BLOCK))
        self._left: deque[float] = deque()
        self._given = 0  # in the last block
        self._used = 0  # of these

    def wanted(self, waiting: int) -> int:
        """Return how many permits to ask for, with so many calls that wait."""
        size = 2 * self._given if self._used == self._given else self._used
        return max(1, min(max(size, waiting), self._most))

    def add(self, first: float, count: int) -> None:
        """Add a block, of which the first can be used from that time on."""
        self._left.extend(first + number * self.interval for number in range(count))
        self._given, self._used = count, 0

    def next(self, now: float) -> float | None:
        """Return when the next call may begin, if there is a permit left."""
        while self._left:
            at = self._left.popleft()
            if now <= at + LATEST:
                self._used += 1
                return at
        return None

    def give_back(self, at: float) -> None:
        """Give back the permit that `next` has returned last."""
        self._left.appendleft(at)
        self._used -= 1
