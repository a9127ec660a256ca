"""The database's time, by its measured offset from this machine's clock.

Between measurements the machine's monotonic clock advances it, so a wall clock that is wrong or set
while the daemon runs has no effect.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

SMALL_CHANGE = timedelta(seconds=1)


class Clock:
    """A clock whose `now()` is the database's time: at most a round trip behind, and never ahead of
    it.
    """

    def __init__(self, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._monotonic = monotonic
        self._offset = time.time() - monotonic()
        self._last = datetime.min.replace(tzinfo=UTC)  # that was returned

    def now(self) -> datetime:
        """Return the time, aware, in UTC. A small correction stops the clock, and never sets it
        back, so that later events have later times.
        """
        now = self._corrected()
        if timedelta(0) < self._last - now < SMALL_CHANGE:
            return self._last
        self._last = now
        return now

    def seconds_until(self, at: datetime) -> float:
        """Return the seconds until a time; negative if it has passed."""
        return (at - self.now()).total_seconds()

    def ahead(self) -> timedelta:
        """Return how far the database's clock is ahead of this machine's wall clock."""
        return self._corrected() - datetime.now(UTC)

    def measured(self, server_time: datetime) -> timedelta:
        """Set the clock to the time that a query has just returned. Return the correction.

        The answer has taken a part of the round trip, so the database's clock is slightly ahead:
        whatever is due according to this clock is also due according to the database's.
        """
        off = server_time - self._corrected()
        self._offset += off.total_seconds()
        return off

    def _corrected(self) -> datetime:
        return datetime.fromtimestamp(self._monotonic() + self._offset, UTC)
