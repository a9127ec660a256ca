"""Decide how many permits for calls at a limited rate to request, and when to use them."""

from __future__ import annotations

from bisect import bisect_right
from collections import deque

BLOCK_SECONDS = 0.2
"""The most permits in a block, as seconds of the rate; at least one permit."""

WINDOW_SECONDS = 1.0
"""The time in which a daemon begins no more calls than it had permits, with `MAX_LATE_SECONDS`
before.
"""

MAX_LATE_SECONDS = 0.05
"""How many seconds later a call may begin without any effect on others. All daemons together
then begin no more calls in a second than the rate allows in 1.05.
"""


class Permits:
    """Instants at which calls may begin, in blocks, by the caller's clock.

    A block is as large as the demand: twice the last one if that was used up, otherwise the used
    part of it. A permit can be used late, for example after the process was paused, as long as the
    daemon begins no more calls in a second than it had permits.
    """

    def __init__(self, per_second: float) -> None:
        self.interval = 1 / per_second
        self._most = max(1, int(per_second * BLOCK_SECONDS))
        self._left: deque[float] = deque()
        self._granted: list[float] = []  # all instants that still count
        self._begun: deque[float] = deque()  # calls, by when they have begun
        self._given = 0  # in the last block
        self._used = 0  # of these

    def wanted(self, waiting: int) -> int:
        """Return how many permits to request while so many calls wait."""
        size = 2 * self._given if self._used == self._given else self._used
        return max(1, min(max(size, waiting), self._most))

    def add(self, first: float, count: int) -> None:
        """Add a block whose first permit can be used from a time on."""
        block = [first + number * self.interval for number in range(count)]
        self._left.extend(block)
        self._granted = sorted(self._granted + block)
        self._given, self._used = count, 0

    def next(self, now: float) -> float | None:
        """Return the instant of the next permit, if there is one."""
        while self._left:
            at = self._left.popleft()
            if at > now - WINDOW_SECONDS - MAX_LATE_SECONDS:
                self._used += 1
                return at
        return None

    def give_back(self, at: float) -> None:
        """Give back the permit that `next` has returned last."""
        self._left.appendleft(at)
        self._used -= 1

    def begin(self, at: float, now: float) -> float | None:
        """Begin a call with the permit of an instant that has come. Return 0 if it has begun, or
        after how many seconds to try again; None if the permit has expired.
        """
        if at <= now - WINDOW_SECONDS - MAX_LATE_SECONDS:
            return None
        while self._begun and self._begun[0] <= now - WINDOW_SECONDS:
            self._begun.popleft()
        del self._granted[: bisect_right(self._granted, now - WINDOW_SECONDS - MAX_LATE_SECONDS)]
        if len(self._begun) >= bisect_right(self._granted, now):
            return self._begun[0] + WINDOW_SECONDS - now if self._begun else self.interval
        self._begun.append(now)
        return 0
