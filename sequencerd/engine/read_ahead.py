"""Read the enrollments that wake next shortly before they are due, so that at that time they only
have to be written.

Nothing is locked meanwhile. What has changed since it was read, or cannot be written by a single
statement, is left to a claim.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from contextlib import aclosing, nullcontext, suppress
from datetime import datetime, timedelta

import asyncpg

from sequencerd.core.model import Enrollment, StepKey
from sequencerd.engine.backpressure import Backlog
from sequencerd.engine.batch import Batch
from sequencerd.engine.catalog import Catalog
from sequencerd.engine.clock import Clock
from sequencerd.engine.executors import Executors
from sequencerd.engine.leases import Leases
from sequencerd.engine.moves import Moves
from sequencerd.engine.quarantine import Quarantine
from sequencerd.service.metrics import Metrics
from sequencerd.storage import connections, locking
from sequencerd.storage.locking import DueEnrollments
from sequencerd.storage.writes import NotWritten, Unchanged

AHEAD = 1.0  # seconds before they are due
TOO_LATE = 0.05  # seconds before they are due, from which on reading would not end in time
VALID_FOR = timedelta(seconds=1)  # after they are due; they are not late then
MAX_BATCHES = 20
WRITERS = 3  # one computes while the others wait for the database


class ReadAhead:
    """The enrollments that were read before they are due, all of one step and one time."""

    def __init__(
        self,
        pool: asyncpg.Pool,
        catalog: Catalog,
        executors: Executors,
        moves: Moves,
        leases: Leases,
        *,
        backlog: Backlog,
        quarantine: Quarantine,
        stopping: asyncio.Event,
        daemon: str,
        clock: Clock,
        batch: int,
        metrics: Metrics,
    ) -> None:
        self._pool = pool
        self._catalog = catalog
        self._executors = executors
        self._moves = moves
        self._leases = leases
        self._backlog = backlog
        self._quarantine = quarantine
        self._stopping = stopping
        self._daemon = daemon
        self._clock = clock
        self._batch = batch
        self._metrics = metrics
        self._of: tuple[StepKey, datetime] | None = None
        self._read: deque[tuple[Enrollment, int]] = deque()

    def is_of(self, step_key: StepKey, at: datetime) -> bool:
        """Return whether what wakes at a step at a time was read last, or is being read."""
        return self._of == (step_key, at)

    async def read(self, step_key: StepKey, at: datetime) -> None:
        """Read what wakes at a step at a time, in batches, until that time."""
        self._of = step_key, at
        self._read.clear()
        sequence = self._catalog.sequences.get(step_key[0])
        size = self._batch_size(step_key)
        if sequence is None or sequence.paused or not size:
            return
        waking = DueEnrollments(
            *step_key,
            at,
            self._daemon,
            self._quarantine.ids(step_key),
            sequence.revision,
            MAX_BATCHES * size,
            at,
        )
        with suppress(Exception):  # what cannot be read is claimed, and then reported
            async with (
                connections.borrow(self._pool) as connection,
                aclosing(locking.read_ahead(connection, waking, size)) as batches,
            ):
                async for batch in batches:
                    is_over = self._stopping.is_set() or self._clock.now() >= at
                    if is_over or not batch or not self.is_of(step_key, at):
                        break
                    self._read += batch

    async def write(self, step_key: StepKey) -> bool:
        """Advance and write what was read of a step if it is due, several batches at a time. Return
        whether there was any.
        """
        if not self._read or self._of is None or self._of[0] != step_key:
            return False
        at, now = self._of[1], self._clock.now()
        if at > now or not self._batch_size(step_key):
            return False
        if now - at > VALID_FOR:
            self._read.clear()
            return False
        writers = min(WRITERS, math.ceil(len(self._read) / self._batch))
        with self._backlog.hold_while_claiming() if writers > 1 else nullcontext():
            async with asyncio.TaskGroup() as group:
                for _ in range(writers):
                    group.create_task(self._write_all(step_key, at))
        return True

    async def _write_all(self, step_key: StepKey, at: datetime) -> None:
        with suppress(Exception):  # what cannot be written is claimed, and then reported
            while (
                not self._stopping.is_set()
                and self.is_of(step_key, at)
                and (size := min(self._batch_size(step_key), len(self._read)))
            ):
                read = [self._read.popleft() for _ in range(size)]
                if not await self._write_batch(step_key, at, read):
                    self._read.clear()

    def _batch_size(self, step_key: StepKey) -> int:
        """Return how many enrollments of a step can be written at a time."""
        if self._executors.is_waited_for(step_key):
            return 0
        return self._executors.claimable(self._catalog.step(step_key), self._batch)

    async def _write_batch(
        self, step_key: StepKey, at: datetime, read: list[tuple[Enrollment, int]]
    ) -> bool:
        """Advance and write a batch, unless any of it has changed. Return False if the others
        cannot be written so either.
        """
        sequence = self._catalog.sequences.get(step_key[0])
        if sequence is None or sequence.paused:
            return False
        now, batch = self._clock.now(), Batch()
        with suppress(NotWritten):
            async with self._leases.without_lock(batch) as connection:
                is_suited = self._moves.move_unlocked(batch, (one for one, _ in read), now)
                if not is_suited:
                    raise NotWritten
                versions = {one.id: version for one, version in read}
                known = Unchanged(versions, step_key[0], sequence.revision)
                await self._leases.write_unchanged(connection, batch, now, known)
            self._metrics.claimed(step_key, [at] * len(read), now)
        return is_suited
