"""Retention: create partitions of the history in advance, count the history by hour, drop old
partitions, and delete ended enrollments.

One daemon at a time does this, beside the engine: in short transactions with pauses between them,
which wait only briefly for the locks of other sessions.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import datetime, timedelta
from typing import Concatenate, ParamSpec, TypeVar

import asyncpg
from structlog.typing import FilteringBoundLogger

from sequencerd.engine.clock import Clock
from sequencerd.settings import RetentionSettings
from sequencerd.storage import activity, cleanup, connections, limits
from sequencerd.storage.database_errors import TRANSIENT_ERRORS

MAX_INTERVAL = 3600.0  # seconds, at most
ACTIVITY_KEPT_FOR = timedelta(days=400)  # for which hourly counts are kept
MAX_CLOCK_OFFSET = timedelta(days=1)  # beyond which one of the clocks is wrong
RETRY_INTERVAL = 60.0  # seconds, after a lock or a transient error
BATCH_SIZE = 1000  # enrollments
PRUNED_AT_ONCE = 10_000  # reservations, for which each batch reads the table from its beginning
BATCH_PAUSE = 0.05  # seconds between batches, and at least as long as a batch took

P = ParamSpec("P")
T = TypeVar("T")


async def keep(
    pool: asyncpg.Pool,
    settings: Callable[[], RetentionSettings],
    *,
    clock: Clock,
    log: FilteringBoundLogger,
) -> None:
    """Run retention until cancelled. Errors are logged, and it is tried again."""
    while True:
        try:
            if abs(clock.ahead()) < MAX_CLOCK_OFFSET:
                await tidy(pool, settings(), clock.now(), log)
            else:  # with a clock that is years ahead, everything would be too old
                log.warning("nothing is deleted, because the database's clock may be wrong")
                await _add_partitions(pool)
            pause = min(MAX_INTERVAL, _until_next_count(clock.now()))
        except Exception as error:  # whatever a table contains, the daemon goes on
            pause = _report(error, log)
        await asyncio.sleep(pause)


def _until_next_count(now: datetime) -> float:
    """Return the seconds until the next hour can be counted."""
    past = now - activity.COUNTING_DELAYS[0]
    return 3600.5 - (past.minute * 60 + past.second)


def _report(error: Exception, log: FilteringBoundLogger) -> float:
    """Log an error. Return in how many seconds to try again."""
    if isinstance(error, asyncpg.LockNotAvailableError):
        log.info("the history is locked, retention tries again later")
        return RETRY_INTERVAL
    if isinstance(error, TRANSIENT_ERRORS):
        log.warning("database error, retention tries again later", error=str(error))
        return RETRY_INTERVAL
    log.error("retention failed", error=str(error))
    return MAX_INTERVAL


async def tidy(
    pool: asyncpg.Pool, settings: RetentionSettings, now: datetime, log: FilteringBoundLogger
) -> None:
    """Create the partitions of the coming months, and delete what is older than its retention.

    Nothing is done while another daemon does it. Each part is done even if another one fails; then
    the first error is raised.
    """
    failed: list[Exception] = []
    for part in (
        _add_partitions,
        _count_activity,
        _drop_history,
        _delete_ended,
        _prune_reservations,
    ):
        try:
            await part(pool, settings, now, log)
        except Exception as error:
            failed.append(error)
    for other in failed[1:]:
        _report(other, log)
    if failed:
        raise failed[0]


async def _add_partitions(pool: asyncpg.Pool, *_: object) -> None:
    await _alone(pool, cleanup.add_event_partitions)


async def _count_activity(
    pool: asyncpg.Pool, _settings: RetentionSettings, now: datetime, _log: FilteringBoundLogger
) -> None:
    loop = asyncio.get_running_loop()
    started = loop.time()
    for count in (activity.count, activity.sum_lateness):
        while await _alone(pool, count, now):
            await asyncio.sleep(loop.time() - started)  # at most half of one connection
            started = loop.time()
    await _alone(pool, activity.prune, now - ACTIVITY_KEPT_FOR)


async def _drop_history(
    pool: asyncpg.Pool, settings: RetentionSettings, now: datetime, log: FilteringBoundLogger
) -> None:
    if settings.events is None:
        return
    async with connections.borrow(pool) as connection:
        counted = await activity.counted_until(connection, now)
    if counted is None:  # events that are not counted yet are kept
        return
    before = min(now - settings.events, counted)
    while name := await _alone(pool, cleanup.drop_event_partition, before):
        log.info("old history was dropped", partition=name)


async def _delete_ended(
    pool: asyncpg.Pool, settings: RetentionSettings, now: datetime, log: FilteringBoundLogger
) -> None:
    if settings.ended is None:
        return
    until, deleted = now - settings.ended, 0
    loop = asyncio.get_running_loop()
    started = loop.time()
    # in each pass, so that rows that were locked in the last one are found
    start = cleanup.FIRST_START
    delete = cleanup.delete_ended
    while (ended := await _alone(pool, delete, until, BATCH_SIZE, start)) and ended[0]:
        count, start = ended
        deleted += count
        await asyncio.sleep(max(BATCH_PAUSE, loop.time() - started))
        started = loop.time()
    if deleted:
        log.info("ended enrollments were deleted", count=deleted)


async def _prune_reservations(
    pool: asyncpg.Pool, _settings: RetentionSettings, now: datetime, _log: FilteringBoundLogger
) -> None:
    loop = asyncio.get_running_loop()
    started = loop.time()
    while await _alone(pool, limits.prune, now, PRUNED_AT_ONCE) == PRUNED_AT_ONCE:
        await asyncio.sleep(max(BATCH_PAUSE, loop.time() - started))
        started = loop.time()


async def _alone(
    pool: asyncpg.Pool,
    work: Callable[Concatenate[asyncpg.Connection, P], Awaitable[T]],
    *args: P.args,
    **kwargs: P.kwargs,
) -> T | None:
    """Do work in a transaction, unless another daemon runs retention."""
    async with connections.borrow(pool) as connection, connections.transaction(connection):
        is_ours = await cleanup.try_lock_retention(connection)
        return await work(connection, *args, **kwargs) if is_ours else None
