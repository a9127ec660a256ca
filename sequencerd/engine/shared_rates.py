"""Take permits for runners whose rates all daemons share."""

from __future__ import annotations

import asyncio

import asyncpg
from structlog.typing import FilteringBoundLogger

from sequencerd.engine.background import ERROR_PAUSE
from sequencerd.storage import connections, limits
from sequencerd.storage.database_errors import TRANSIENT_ERRORS, brief

LOCK_TIMEOUT = 5.0  # seconds for which another session may lock the row


async def take(
    pool: asyncpg.Pool, runner: str, per_second: float, count: int, log: FilteringBoundLogger
) -> tuple[float, float]:
    """Take permits, with as many retries as necessary: nothing is sent without them."""
    is_reported = False
    while True:
        try:
            async with asyncio.timeout(LOCK_TIMEOUT), connections.borrow(pool) as connection:
                return await limits.take_permits(connection, runner, per_second, count)
        except TRANSIENT_ERRORS as error:
            if not is_reported:
                log.warning("no permits for a rate, calls wait", runner=runner, error=brief(error))
            is_reported = True
            await asyncio.sleep(ERROR_PAUSE)
