"""Tell whether the daemon is alive and ready, and describe its state in one line.

Written in the daemon's event loop, read in the thread of the HTTP listener.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from sequencerd.service.metrics import Metrics
from sequencerd.service.systemd import notify
from sequencerd.storage.listener import PROBE_INTERVAL, PROBE_TIMEOUT

BEAT_INTERVAL = 1.0  # seconds: the engine's loop runs at least once in this time
MAX_BLOCKED = 5.0  # seconds
STATUS_INTERVAL = 5.0  # seconds
MAX_WITHOUT_CONNECTION = 5.0  # seconds without a free connection
MAX_LISTEN_SILENCE = 2 * PROBE_INTERVAL + PROBE_TIMEOUT  # seconds for which LISTEN may be silent


class Health:
    """The state of the running daemon.

    `waits` returns, by purpose of connections, how many seconds a caller has been waiting for one;
    `heartbeat_age` for how many seconds no heartbeat has been written. `sweep` is the time between
    sweeps and `lease` the duration of a lease, in seconds. `status` returns the line for systemd,
    `feed` resets systemd's watchdog.
    """

    def __init__(
        self,
        metrics: Metrics,
        status: Callable[[], str],
        feed: Callable[[], None],
        *,
        sweep: float,
        lease: float,
    ) -> None:
        self.stopping = False
        self.waits: Mapping[str, Callable[[], float]] = {}
        self.heartbeat_age: Callable[[], float] = float
        self._metrics = metrics
        self._status = status
        self._feed = feed
        self._longest_pause = 2 * sweep + 10
        self._lease = lease
        self._beat = time.monotonic()
        self._fed = self._reported_at = float("-inf")
        self._reported = ""
        self._heard: float | None = None
        self._connections = 0
        metrics.ready.set_function(lambda: float(not self.why_not_ready()))

    def turned(self) -> None:
        """Record that the engine's loop runs: reset the watchdog, and send a changed status."""
        self._beat = now = time.monotonic()
        if now - self._fed >= BEAT_INTERVAL:
            self._fed = now
            self._feed()
        if now - self._reported_at >= STATUS_INTERVAL and not self.stopping:
            self._reported_at = now
            if (status := self._status()) != self._reported:
                self._reported = status
                notify(f"STATUS={status}")

    def heard(self, alive: bool) -> None:
        """Record that the listening connection has answered, or is lost."""
        if alive and self._heard is None:
            self._connections += 1
            if self._connections > 1:
                self._metrics.reconnects.inc()
        self._heard = time.monotonic() if alive else None

    def why_not_alive(self) -> list[str]:
        """Return why the process is not alive. While it stops, it waits for side effects and its
        loop does not run.
        """
        still = time.monotonic() - self._beat
        if still < MAX_BLOCKED or self.stopping:
            return []
        return [f"the event loop has been blocked for {still:.0f} s"]

    def why_not_ready(self) -> list[str]:
        """Return why enrollments would not be moved in time, as sentences; none if the daemon is
        ready.
        """
        now, swept, heard = time.monotonic(), self._metrics.swept_at, self._heard
        reasons = self.why_not_alive()
        if self.stopping:
            reasons.append("the daemon is stopping")
        if heard is None:
            reasons.append("the database cannot be reached: LISTEN is not on")
        elif now - heard > MAX_LISTEN_SILENCE:
            reasons.append(f"the listening connection has not answered for {now - heard:.0f} s")
        if swept is None:
            reasons.append("no sweep has finished yet")
        elif now - swept > self._longest_pause:
            reasons.append(f"the last sweep was {now - swept:.0f} s ago")
        if (age := self.heartbeat_age()) > self._lease:
            reasons.append(f"the database has accepted no heartbeat for {age:.0f} s")
        for name, seconds in self.waits.items():
            if (waited := seconds()) >= MAX_WITHOUT_CONNECTION:
                reasons.append(f"all connections for {name} have been in use for {waited:.0f} s")
        return reasons
