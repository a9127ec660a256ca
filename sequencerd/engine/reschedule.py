"""Evaluate waiting enrollments at steps that have changed, or after a request by NOTIFY.

Their ids are read a page at a time, and evaluated in batches. The transaction of each batch also
records the progress in the step, so that any daemon can continue after a crash. Enrollments that
continue to wait as before are not written. One step is processed at a time, on one connection, so
that all other work continues. A request that arrives in the meantime is recorded too, and causes
another pass.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from functools import partial

from sequencerd.core.advance import is_unchanged
from sequencerd.core.enrollment import StepKey
from sequencerd.engine.background import ERROR_PAUSE, LOCKED_PAUSE, Background, Repeating
from sequencerd.engine.batch import Batch
from sequencerd.engine.catalog import Catalog
from sequencerd.engine.environment import Environment
from sequencerd.engine.jumps import PendingMove
from sequencerd.engine.leases import Leases
from sequencerd.engine.moves import Moves
from sequencerd.engine.quarantine import isolate
from sequencerd.engine.slow_evaluations import SlowEvaluations
from sequencerd.storage import connections, evaluations, locking, wakes
from sequencerd.storage.database_errors import TRANSIENT_ERRORS, brief
from sequencerd.storage.listener import Reevaluate

IDS_PER_READ = 100_000  # ids read at a time, as each read scans all enrollments at the step
ENROLLMENTS_PER_TURN = 50  # enrollments that are evaluated without yielding to the loop
OTHERS_PAUSE = 1.0  # seconds between checks of another daemon's progress
TRANSACTIONS_TIMEOUT = 5.0  # seconds for older transactions, which may use the old definition
TRANSACTIONS_TURN = 0.05
MAX_REQUESTS = 1000  # different requests that may wait; beyond them, one for all enrollments
REQUEST_PAUSE = 1.0  # seconds between passes that NOTIFY requests


class Rescheduling:
    """The changed steps that this daemon knows of, and the work on them."""

    def __init__(
        self,
        env: Environment,
        catalog: Catalog,
        moves: Moves,
        leases: Leases,
        *,
        quarantine: Callable[[int, StepKey, Exception], None],
        background: Background,
    ) -> None:
        """Make it. `quarantine` receives enrollments that the database refuses to write."""
        self._env = env
        self._catalog = catalog
        self._moves = moves
        self._leases = leases
        self._quarantine = quarantine
        self._wanted: dict[StepKey, None] = {}  # a dict as a set that keeps its order
        self._others: dict[StepKey, int] = {}  # the progress of another daemon, as read last
        self._requests: set[Reevaluate] = set()
        self._works = Repeating(self._work, background)
        self._passes = Repeating(self._record_requests, background, REQUEST_PAUSE)
        self._subjects = Repeating(self._evaluate_subjects, background)

    def start(self, step_key: StepKey) -> None:
        """Evaluate the waiting enrollments of a step, soon."""
        self._wanted[step_key] = None
        self._works.request()

    def resume(self, unfinished: Mapping[StepKey, int]) -> None:
        """Continue what another daemon has started, unless it makes progress."""
        for step_key, since in unfinished.items():
            if step_key not in self._wanted and step_key not in self._others:
                self._others[step_key] = since
                asyncio.get_running_loop().call_later(OTHERS_PAUSE, self.start, step_key)

    def request(self, request: Reevaluate) -> None:
        """Evaluate the enrollments that an application requests, soon.

        Equal requests that wait are combined; too many different ones are replaced by one for all
        enrollments.
        """
        self._requests.add(request)
        if len(self._requests) > MAX_REQUESTS:
            self._requests = {Reevaluate()}
            request = Reevaluate()
        (self._passes if request.subject is None else self._subjects).request()

    async def _record_requests(self) -> None:
        """Record requests for all enrollments, sequences and steps in the affected steps."""
        requests = {request for request in self._requests if request.subject is None}
        self._requests -= requests
        wanted = {(request.sequence, request.step) for request in requests}
        try:
            async with connections.borrow(self._env.pool) as connection:
                step_keys = [
                    (sequence, step)
                    for (sequence, step), _ in await wakes.occupied_steps(connection)
                    if not wanted.isdisjoint(
                        [(sequence, step), (sequence, None), (None, step), (None, None)]
                    )
                ]
                marked = await evaluations.request_evaluation(connection, step_keys)
        except BaseException:
            self._requests |= requests
            raise
        for step_key in marked:
            self.start(step_key)
        for sequence, step in set(step_keys).difference(marked):
            if self._catalog.step((sequence, step)):
                self.request(Reevaluate(sequence=sequence, step=step))  # it is locked

    async def _evaluate_subjects(self) -> None:
        """Handle the requests for subjects."""
        requests = {request for request in self._requests if request.subject is not None}
        self._requests -= requests
        try:
            locked = await self._of_subjects(requests)
        except BaseException:
            self._requests |= requests
            raise
        for subject in locked:
            asyncio.get_running_loop().call_later(
                OTHERS_PAUSE, self.request, Reevaluate(subject=subject)
            )

    async def _of_subjects(self, requests: Iterable[Reevaluate]) -> set[str]:
        """Evaluate subjects. Return those with enrollments that another session has locked."""
        wanted = {(request.subject, request.sequence, request.step) for request in requests}
        subjects = list({subject for subject, _, _ in wanted if subject is not None})
        locked: set[str] = set()
        after, page = -1, IDS_PER_READ
        while page == IDS_PER_READ and not self._env.stopping.is_set():
            async with connections.borrow(self._env.pool) as connection:
                rows = await evaluations.waiting_of_subjects(
                    connection, subjects, after, self._env.clock.now(), IDS_PER_READ
                )
            page = len(rows)
            by_step: dict[StepKey, list[int]] = defaultdict(list)
            for id_, subject, sequence, step in rows:
                after = id_
                if not wanted.isdisjoint(
                    (subject, a, b) for a in (sequence, None) for b in (step, None)
                ):
                    by_step[sequence, step].append(id_)
            of = {row["id"]: row["subject"] for row in rows}
            for step_key, ids in by_step.items():
                sequence = self._catalog.sequences.get(step_key[0])
                if sequence is None or sequence.paused:
                    continue
                evaluate = partial(self._evaluate, step_key, sequence.revision)
                for first in range(0, len(ids), self._env.batch):
                    part = ids[first : first + self._env.batch]
                    left = await self._in_parts(evaluate, part, step_key) or []
                    locked.update(of[id_] for id_ in left)
        return locked

    async def _work(self) -> bool:
        """Evaluate the wanted steps. Return that this was useful."""
        outlasted = False
        for step_key in list(self._wanted):
            if self._env.stopping.is_set():
                break
            again = None
            try:
                if not outlasted:
                    await self._outlast_older_transactions()
                    outlasted = True
                self._wanted.pop(step_key, None)
                if not await self._reschedule(step_key):
                    again = OTHERS_PAUSE
            except TRANSIENT_ERRORS as error:
                again = ERROR_PAUSE
                self._env.log.warning("database error, trying again", error=brief(error))
            except Exception:
                again = 60.0
                self._env.log.exception("waiting enrollments could not be evaluated", step=step_key)
            if again is not None:
                self._wanted.pop(step_key, None)
                asyncio.get_running_loop().call_later(again, self.start, step_key)
        return True

    async def _reschedule(self, step_key: StepKey) -> bool:
        """Evaluate a step. Return False if another daemon does."""
        async with connections.borrow(self._env.pool) as connection:
            since = await evaluations.rescheduling_from(connection, step_key)
        seen = self._others.pop(step_key, since)
        if since is None:
            return True
        if since == seen:
            return await self._from(step_key, since)
        self._others[step_key] = since
        return False

    async def _from(self, step_key: StepKey, since: int) -> bool:
        """Evaluate a step from an id on. Return False if another daemon does."""
        count = 0
        while not self._env.stopping.is_set():
            sequence = self._catalog.sequences.get(step_key[0])
            if sequence is None or sequence.paused:
                return True  # it starts again when the sequence is resumed
            async with connections.borrow(self._env.pool) as connection:
                page = await evaluations.active_ids(connection, step_key, since, IDS_PER_READ)
            for first in range(0, len(page), self._env.batch):
                batch = page[first : first + self._env.batch]
                done = await self._batch(step_key, since, batch, sequence.revision)
                if self._env.stopping.is_set():
                    return True
                if done is None:
                    self._others[step_key] = since
                    return False
                since = done
            count += len(page)
            if len(page) == IDS_PER_READ:
                continue
            async with connections.borrow(self._env.pool) as connection:
                again = await evaluations.finish_rescheduling(connection, step_key, since)
            if again is None:
                self._others[step_key] = since
                return False
            if count:
                self._env.log.info(
                    "waiting enrollments of a step were evaluated", step=step_key, count=count
                )
            if again:
                self.start(step_key)
            return True
        return True

    async def _batch(
        self, step_key: StepKey, since: int, ids: list[int], revision: int
    ) -> int | None:
        """Evaluate a batch. Return the id from which enrollments have yet to be evaluated, or None
        if another daemon evaluates the step.
        """
        left: list[int] | None = ids

        async def evaluate(part: Sequence[int]) -> list[int] | None:
            nonlocal since
            until = ids[-1] + 1 if part == left else since
            locked = await self._evaluate(step_key, revision, part, (since, until))
            if locked == []:
                since = until
            return locked

        while left and not self._env.stopping.is_set():
            left = await self._in_parts(evaluate, left, step_key)
            if left is None:
                return None
            if left:
                await asyncio.sleep(LOCKED_PAUSE)
        return since

    async def _in_parts(
        self,
        evaluate: Callable[[Sequence[int]], Awaitable[list[int] | None]],
        ids: list[int],
        step_key: StepKey,
    ) -> list[int] | None:
        """Evaluate a batch, in parts if something cannot be written. Return the enrollments that
        another session has locked, or None if another daemon evaluates the step.
        """
        locked: list[int] = []
        is_ours = True

        async def work(part: Sequence[int]) -> None:
            nonlocal is_ours
            if is_ours:
                others = await evaluate(part)
                is_ours = others is not None
                locked.extend(others or [])

        async def refused(id_: int, error: Exception) -> None:
            self._quarantine(id_, step_key, error)

        _, common = await isolate(ids, work, refused, self._env.probe)
        if common is not None:
            raise common
        return locked if is_ours else None

    async def _evaluate(
        self,
        step_key: StepKey,
        revision: int,
        ids: Sequence[int],
        progress: tuple[int, int] | None = None,
    ) -> list[int] | None:
        """Evaluate enrollments in one transaction, and record the progress if none was locked and
        none is left over by slow evaluations. Return the ids of these; of all, if the definition
        is not the known `revision`.

        `progress` is the id recorded in the step, and the id to record.
        """
        now = self._env.clock.now()
        batch = Batch()
        async with self._leases.writing(batch) as connection:
            if progress is not None:
                since, until = progress
                if not await evaluations.lock_rescheduling(connection, step_key, since, revision):
                    return None
            waiting, locked = await locking.lock_waiting(connection, step_key, ids, now, revision)
            slow = SlowEvaluations()
            for number, enrollment in enumerate(waiting, 1):
                advanced = self._moves.advance(enrollment, now)
                if advanced.is_tentative:
                    again = partial(self._moves.advance, enrollment, now)
                    batch.jumps.append(PendingMove(enrollment, advanced, again))
                elif not is_unchanged(enrollment, advanced):
                    self._moves.add(batch, enrollment, advanced, now)
                if slow.end_batch():
                    locked += [one.id for one in waiting[number:]]
                    break
                if number % ENROLLMENTS_PER_TURN == 0:
                    await asyncio.sleep(0)
                    slow.resume()
            await self._moves.write(connection, batch, now)
            if progress is not None and not locked:
                await evaluations.record_progress(connection, step_key, until)
        return locked

    async def _outlast_older_transactions(self) -> None:
        """Wait for transactions that may move enrollments to a step by its old definition."""
        async with connections.borrow(self._env.pool) as connection:
            newest = await evaluations.new_transaction(connection)
        loop = asyncio.get_running_loop()
        until = loop.time() + TRANSACTIONS_TIMEOUT
        while loop.time() < until and not self._env.stopping.is_set():
            async with connections.borrow(self._env.pool) as connection:
                oldest = await evaluations.oldest_transaction(connection)
                if newest is not None and oldest >= newest:
                    return
            await asyncio.sleep(TRANSACTIONS_TURN)
