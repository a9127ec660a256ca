"""The leases of this daemon: from the transaction that leases to the write of the result.

Side effects start when that transaction has committed; until then they only reserve their slots.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime

import asyncpg

from sequencerd.core.enrollment import Fence, StepKey
from sequencerd.engine.background import ERROR_PAUSE
from sequencerd.engine.batch import Batch, Failure
from sequencerd.engine.environment import Environment
from sequencerd.engine.executors import Executor, Executors, Leased
from sequencerd.engine.quarantine import isolate
from sequencerd.storage import connections, locking, writes
from sequencerd.storage.database_errors import LOST_ERRORS, TRANSIENT_ERRORS
from sequencerd.storage.writes import Unchanged

MAX_TRANSACTIONS = 1000  # transactions that are remembered


@dataclass(eq=False)
class Leases:
    """The side effects that this daemon has leased."""

    _env: Environment
    _executors: Executors
    # of each step to which a batch has moved enrollments: the first wake time, and whether others
    # wake later
    _report_wake: Callable[[StepKey, datetime, bool], None]
    _report_invalid: Callable[[StepKey], None]  # at which enrollments have failed as invalid
    by_id: dict[int, Leased] = field(default_factory=dict)  # by enrollment
    transactions: dict[int, int] = field(default_factory=dict)
    """The latest transactions that wrote leases and no data, as far as they are known, by the
    number of the leases. None whose rows triggers of others may have changed.
    """
    _writing: dict[int, Batch] = field(default_factory=dict)  # by the numbers of their leases

    def __len__(self) -> int:
        return len(self.by_id)

    @property
    def known(self) -> set[int]:
        """Return the enrollments that this daemon has leased, or may have leased: the answer to a
        commit may arrive long after the lease has expired, or never.
        """
        batches = self._writing.values()
        return self.by_id.keys() | {one.enrollment.id for each in batches for one in each.leased}

    @property
    def is_writing(self) -> bool:
        """Return whether a batch is being written. A task that is cancelled meanwhile may leave
        leases of which nothing knows.
        """
        return bool(self._writing)

    @asynccontextmanager
    async def writing(self, batch: Batch) -> AsyncIterator[asyncpg.Connection]:
        """Open a transaction that writes a batch, and start its side effects after the commit.

        If the answer to the commit is lost, the rows show whether it has happened.
        """
        async with (
            self.starting(batch),
            connections.borrow(self._env.pool) as connection,
            connections.transaction(connection),
        ):
            yield connection
            if len(batch.leased) >= locking.MANY_LEASES and not batch.data:
                number = batch.transaction or await writes.number_of_writes(connection)
                self._note(batch, number)

    @asynccontextmanager
    async def without_lock(self, batch: Batch) -> AsyncIterator[asyncpg.Connection]:
        """Borrow a connection, to write a batch by `write_unchanged`."""
        async with self.starting(batch), connections.borrow(self._env.pool) as connection:
            yield connection

    async def write_unchanged(
        self, connection: asyncpg.Connection, batch: Batch, now: datetime, known: Unchanged
    ) -> None:
        """Write a plain batch whose rows are not locked, in a statement that is its transaction,
        and start its side effects. Raises NotWritten.
        """
        number = await writes.write_unchanged(connection, batch, now, known)
        if batch.leased:
            self._note(batch, number)
            # they start while the connection is given back
            leased, batch.leased = batch.leased, []
            self._start(leased)

    def _note(self, batch: Batch, transaction: int | None) -> None:
        if transaction is not None:
            self.transactions[batch.lease_number] = transaction % 2**32
        if len(self.transactions) > MAX_TRANSACTIONS:
            del self.transactions[next(iter(self.transactions))]

    @asynccontextmanager
    async def starting(self, batch: Batch) -> AsyncIterator[None]:
        """Start the side effects of a batch that is written within, or give their slots back."""
        self._writing[batch.lease_number] = batch
        try:
            yield
        except LOST_ERRORS:
            held = await self.held(batch.leased, written_together=True)
            self._start(one for one in batch.leased if one.fence in held)
            self.give_back(one for one in batch.leased if one.fence not in held)
            self._report(batch, batch.failures())
            raise
        except BaseException:
            self.give_back(batch.leased)
            raise
        else:
            self._start(batch.leased)
            failures = batch.failures()
            self._report(batch, failures)
            written = sum(map(len, batch.rows.values()))
            self._env.metrics.written(written, batch.events, [one[1:4] for one in failures])
        finally:
            del self._writing[batch.lease_number]

    def _report(self, batch: Batch, failures: Iterable[Failure]) -> None:
        for id_, sequence, step, failure, message in failures:
            log = self._env.log.bind(enrollment=id_, sequence=sequence, step=step)
            log.warning("enrollment failed", failure=failure)
            log.debug("enrollment failed", error=message)
        for step_key, (first, last) in batch.wakes().items():
            self._report_wake(step_key, first, last > first)
        for step_key in batch.invalid_steps():
            self._report_invalid(step_key)

    def _start(self, leased: Iterable[Leased]) -> None:
        """Start side effects, by step."""
        by_step: dict[tuple[Executor, str, str], list[Leased]] = {}
        for one in leased:
            self.by_id[one.enrollment.id] = one
            key = (one.executor, one.enrollment.sequence, one.step.name)
            by_step.setdefault(key, []).append(one)
        for (executor, _, _), group in by_step.items():
            executor.start(group)

    def give_back(self, leased: Iterable[Leased]) -> None:
        """Give back the slots of side effects that do not start, also to the steps that have found
        none meanwhile: no result will wake these.
        """
        for one in leased:
            one.executor.reserve(-1)
        self._executors.resume()

    async def held(self, leased: Iterable[Leased], *, written_together: bool = False) -> set[Fence]:
        """Read which leases are valid in the database, `written_together` by one transaction or
        not. Repeat the query until it is answered.
        """
        ids = [one.enrollment.id for one in leased]
        while ids:
            try:
                async with connections.borrow(self._env.pool) as connection:
                    return await locking.fences(connection, ids, written_together=written_together)
            except TRANSIENT_ERRORS:
                await asyncio.sleep(ERROR_PAUSE)
        return set()

    def forget(self, leased: Iterable[Leased]) -> None:
        """Remove leases that have ended, unless the enrollment has been leased again."""
        for one in leased:
            if self.by_id.get(one.enrollment.id) is one:
                del self.by_id[one.enrollment.id]

    async def extend(self, excluding: set[int]) -> None:
        """Extend the leases of side effects in flight, `excluding` enrollments whose side effects
        have ended. A row that cannot be written remains leased by the heartbeat.
        """

        async def refused(_id: int, _error: Exception) -> None:
            pass

        if ids := list(self.by_id.keys() - excluding):
            _, common = await isolate(ids, self._extend, refused, self._env.probe)
            if common is not None:
                raise common

    async def _extend(self, ids: Sequence[int]) -> None:
        until = self._env.clock.now() + self._env.lease_time
        async with connections.borrow(self._env.pool) as connection:
            await writes.extend_leases(connection, ids, self._env.daemon, until)
