"""The heartbeat: a row with the time until which this daemon is alive, and the problems it reports.

A daemon's leases are valid while it is alive, so nothing may delay the heartbeat: it has a
connection of its own, and locks no enrollment. A daemon that cannot write it for the duration of a
lease has lost its leases: it starts none of their side effects, and the fence rejects the results
of those that it has started. It considers no other daemon dead meanwhile, and gives the others as
much time when it can write again: what has interrupted its own heartbeat may have interrupted
theirs.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from datetime import datetime, timedelta

import asyncpg
from structlog.typing import FilteringBoundLogger

from sequencerd.engine.problems import Problems
from sequencerd.storage import connections, daemons
from sequencerd.storage.database_errors import brief

RETRY_PAUSE = 1.0  # seconds after a failed heartbeat
COLLECTED_FOR = 0.2  # seconds for which changes of problems are collected


class Heartbeat:
    """Keeps the daemon alive, on the one connection of `pool`."""

    def __init__(
        self,
        pool: asyncpg.Pool,
        problems: Problems,
        *,
        name: str,
        lease: float,
        types: Callable[[], Iterable[str]],
        log: FilteringBoundLogger,
    ) -> None:
        """Make it; `types` returns the step types that the daemon serves."""
        self._pool = pool
        self._problems = problems
        self._name = name
        self._lease = lease
        self._types = types
        self._log = log
        self._started_at: datetime | None = None
        self._had_problems = False
        # of the event loop: since when the daemon has been alive, and until when at least
        self._since, self._until = math.inf, -math.inf
        self._written_at = time.monotonic()

    def age(self) -> float:
        """Return for how many seconds no heartbeat has been written. Any thread may call it."""
        return time.monotonic() - self._written_at

    def lease_expired(self, until: float, now: float) -> bool:
        """Return whether a lease has expired, so that other daemons may have taken it over. Then
        `until`, the time in its row, has passed, and the daemon has not been alive from then on
        without a gap. Both are times of the event loop.
        """
        return now >= until and not (self._since <= until and now < self._until)

    async def keep(self) -> None:
        """Write heartbeats until cancelled: three per lease, and soon after the problems have
        changed.
        """
        while True:
            changed = self._problems.changed
            changed.clear()
            try:
                await self.beat()
            except Exception as error:  # whatever the error is, the next heartbeat may succeed
                self._log.warning("heartbeat failed, trying again", error=brief(error))
                await asyncio.sleep(min(RETRY_PAUSE, self._lease / 3))
                continue
            with suppress(TimeoutError):
                async with asyncio.timeout(self._lease / 3):
                    await changed.wait()
                    await asyncio.sleep(COLLECTED_FOR)

    async def beat(self) -> None:
        """Write one heartbeat with the problems, and remove dead daemons."""
        loop = asyncio.get_running_loop()
        begun = loop.time()
        async with asyncio.timeout(max(self._lease / 3, RETRY_PAUSE)):
            async with connections.borrow(self._pool) as connection:
                lease = timedelta(seconds=self._lease)
                self._started_at = await daemons.beat(
                    connection, self._name, self._started_at, lease, self._types()
                )
                if (now := loop.time()) >= self._until:
                    self._since = now
                self._until = begun + self._lease
                self._written_at = time.monotonic()
                rows = self._problems.rows()
                if rows or self._had_problems:
                    await daemons.write_problems(connection, self._name, rows)
                    self._had_problems = bool(rows)
                await daemons.remove_dead_daemons(connection, self._name)

    async def end(self) -> None:
        """Remove the daemon. If that fails, it counts as dead after the duration of a lease."""
        with suppress(Exception):
            async with asyncio.timeout(RETRY_PAUSE), connections.borrow(self._pool) as connection:
                await daemons.remove_daemon(connection, self._name)
