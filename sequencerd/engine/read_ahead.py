"""Read and advance the enrollments that wake next shortly before they are due, so that at that time
they only have to be written.

Nothing is locked or reserved meanwhile. What has changed since it was read, cannot be written by a
single statement or finds no free slots is left to a claim.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from contextlib import aclosing, nullcontext, suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import NamedTuple

from sequencerd.core.enrollment import Enrollment, StepKey
from sequencerd.core.model import Sequence
from sequencerd.engine.backpressure import Backlog
from sequencerd.engine.batch import Batch
from sequencerd.engine.catalog import Catalog
from sequencerd.engine.environment import Environment
from sequencerd.engine.executors import Executors
from sequencerd.engine.leases import Leases
from sequencerd.engine.moves import Moves
from sequencerd.engine.quarantine import Quarantine
from sequencerd.storage import connections, locking
from sequencerd.storage.locking import DueEnrollments
from sequencerd.storage.writes import NotWritten, Unchanged

AHEAD = 1.0  # seconds before they are due
TOO_LATE = 0.05  # seconds before they are due, from which on reading would not end in time
VALID_FOR = timedelta(seconds=1)  # after they are due; they are not late then
MAX_BATCHES = 20
WRITERS = 3  # one computes while the others wait for the database


class _Planned(NamedTuple):
    """Enrollments as they will be written when they are due."""

    batch: Batch
    read: Unchanged
    sequence: Sequence


@dataclass(eq=False)
class ReadAhead:
    """The enrollments that were read before they are due, all of one step and one time."""

    _env: Environment
    _catalog: Catalog
    _executors: Executors
    _moves: Moves
    _leases: Leases
    _backlog: Backlog
    _quarantine: Quarantine
    _of: tuple[StepKey, datetime] | None = None
    _planned: deque[_Planned] = field(default_factory=deque)

    def is_of(self, step_key: StepKey, at: datetime) -> bool:
        """Return whether what wakes at a step at a time was read last, or is being read."""
        return self._of == (step_key, at)

    def has(self, step_key: StepKey) -> bool:
        """Return whether anything that was read of a step is still to be written."""
        return bool(self._planned) and self._of is not None and self._of[0] == step_key

    async def read(self, step_key: StepKey, at: datetime) -> None:
        """Read what wakes at a step at a time, in batches, until that time."""
        self._of = step_key, at
        # a reading that is still in progress is not continued, also if it is of the same
        plans = self._planned = deque()
        sequence, step = self._catalog.sequences.get(step_key[0]), self._catalog.step(step_key)
        if sequence is None or sequence.paused or self._executors.is_waited_for(step_key):
            return
        # of a side effect, half of the slots: for so many, a step is woken that waits for slots
        page = self._executors.claimable(step, self._env.batch, 2)
        if not page:
            return
        waking = DueEnrollments(
            *step_key,
            at,
            self._env.daemon,
            self._quarantine.ids(step_key),
            sequence.revision,
            MAX_BATCHES * page,
            at,
        )
        with suppress(Exception):  # what cannot be read is claimed, and then reported
            async with (
                connections.borrow(self._env.pool) as connection,
                aclosing(locking.read_ahead(connection, waking, page)) as batches,
            ):
                async for batch in batches:
                    is_over = self._env.stopping.is_set() or self._env.clock.now() >= at
                    if is_over or not batch or self._planned is not plans:
                        break
                    planned = self._plan(batch, sequence, at)
                    if planned is None:
                        break
                    plans.append(planned)

    def _plan(
        self, read: list[tuple[Enrollment, int]], sequence: Sequence, at: datetime
    ) -> _Planned | None:
        """Advance enrollments to the time at which they are due. Return None if they must be
        claimed.
        """
        batch = Batch()
        try:
            is_suited = self._moves.move_unlocked(batch, (one for one, _ in read), at)
        finally:  # they are reserved when it is written
            self._leases.give_back(batch.leased)
        if not is_suited:
            return None
        versions = {one.id: version for one, version in read}
        leases = {one.leases for one, _ in read}
        unchanged = Unchanged(versions, None, leases, sequence.name, sequence.revision)
        return _Planned(batch, unchanged, sequence)

    async def write(self, step_key: StepKey) -> bool:
        """Write what was read of a step if it is due, several batches at a time. Return whether
        there was any.
        """
        if not self.has(step_key) or self._of is None:
            return False
        at, now = self._of[1], self._env.clock.now()
        if at > now:
            return False
        if now - at > VALID_FOR:
            self._planned.clear()
            return False
        writers = min(WRITERS, len(self._planned))
        with self._backlog.hold_while_claiming() if writers > 1 else nullcontext():
            async with asyncio.TaskGroup() as group:
                for _ in range(writers):
                    group.create_task(self._write_all(step_key, at))
        return True

    async def _write_all(self, step_key: StepKey, at: datetime) -> None:
        with suppress(Exception):  # what cannot be written is claimed, and then reported
            while not self._env.stopping.is_set() and self.is_of(step_key, at) and self._planned:
                planned = self._planned[0]
                sequence = planned.sequence
                if self._catalog.sequences.get(sequence.name) is not sequence:
                    self._planned.clear()
                if not self._planned or not self._reserve(step_key, planned):
                    return
                self._planned.popleft()
                with suppress(NotWritten):
                    now = self._env.clock.now()
                    async with self._leases.without_lock(planned.batch) as connection:
                        await self._leases.write_unchanged(
                            connection, planned.batch, now, planned.read
                        )
                    self._env.metrics.claimed(step_key, [at] * len(planned.read.versions), now)

    def _reserve(self, step_key: StepKey, planned: _Planned) -> bool:
        """Reserve the slots of a batch. If some are missing, return False: the step then waits for
        those of its own runner, or what was read is left to claims, which take fewer. Others at the
        step may not need the runner of a later one.
        """
        needed = Counter(leased.executor for leased in planned.batch.leased)
        step = planned.sequence.steps.get(step_key[1])
        own = self._executors.by_key.get(step.type) if step else None
        for executor, count in needed.items():
            if self._backlog.is_full or executor.free_slots < count:
                can_claim = executor.is_worth_claiming and not self._backlog.is_full
                if can_claim or executor is not own:
                    self._planned.clear()
                else:
                    executor.waiting.add(step_key)
                return False
        for executor, count in needed.items():
            executor.reserve(count)
        return True
