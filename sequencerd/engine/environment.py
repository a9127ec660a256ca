"""What all parts of the engine work with, so that each constructor names only what is its own."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from datetime import timedelta

import asyncpg
from structlog.typing import FilteringBoundLogger

from sequencerd.engine.clock import Clock
from sequencerd.service.metrics import Metrics
from sequencerd.storage import connections, server


@dataclass(frozen=True, slots=True)
class Environment:
    """The daemon's name and connections, its clock, limits, log and metrics. Once `stopping` is
    set, nothing more is claimed.
    """

    daemon: str
    pool: asyncpg.Pool
    clock: Clock
    batch: int  # enrollments in a transaction
    lease_time: timedelta
    stopping: asyncio.Event
    log: FilteringBoundLogger
    metrics: Metrics

    async def probe(self) -> None:
        """Raise the error that keeps every row from being written: no enrollment's fault."""
        async with connections.borrow(self.pool) as connection:
            await server.probe(connection)
