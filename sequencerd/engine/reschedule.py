"""Evaluates those who wait again, in step_key: at a step that has changed, or because NOTIFY asked.

They are read by id, a page at a time, and evaluated in batches, each in a transaction that also
notes in the step how far it has come: what a crash interrupts goes on from there, in any daemon.
Who waits on as before is not written at all. One step is done at a time, on one connection, so
that everything else goes on meanwhile. A request that comes while a step is being done is noted
there as well, and is done once more after that.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from functools import partial

import asyncpg
from structlog.typing import FilteringBoundLogger

from sequencerd.core import model
from sequencerd.core.advance import is_unchanged
from sequencerd.engine.background import PAUSE, Background, Repeating
from sequencerd.engine.batch import Batch
from sequencerd.engine.clock import Clock
from sequencerd.engine.jumps import Jump
from sequencerd.engine.leases import Leases
from sequencerd.engine.moves import Moves
from sequencerd.engine.quarantine import isolate
from sequencerd.storage import store
from sequencerd.storage.listener import Reevaluate
from sequencerd.storage.store import TRANSIENT_ERRORS, StepKey

PAGE = 100_000  # ids read at a time: to find them costs a request at everybody who is at the step
SLICE = 50  # enrollments that are evaluated in one turn of the loop
OTHERS_PAUSE = 1.0  # seconds after which we request whether another daemon still goes on
LOCKED_PAUSE = 0.2  # seconds until who is locked by somebody else is tried again
GRACE = 5.0  # seconds for transactions that began before the change; they may bring people here
GRACE_TURN = 0.05
REQUESTS = 1000  # different ones that may wait; for more, all who wait are evaluated
REQUEST_PAUSE = 1.0  # seconds between walks that NOTIFY asks for


class Rescheduling:
    """The changed steps that this daemon knows of, and the work on them."""

    def __init__(
        self,
        pool: asyncpg.Pool,
        sequences: Mapping[str, model.Sequence],
        moves: Moves,
        leases: Leases,
        *,
        quarantine: Callable[[int, StepKey, Exception], None],
        probe: Callable[[], Awaitable[None]],
        background: Background,
        clock: Clock,
        batch: int,
        log: FilteringBoundLogger,
    ) -> None:
        """`sequences` is the catalog's, which changes; `quarantine` gets what the database refuses
        to write, where `probe` finds that it writes others; `spawn` runs what is not waited for.
        """
        self._pool = pool
        self._sequences = sequences
        self._moves = moves
        self._leases = leases
        self._quarantine = quarantine
        self._probe = probe
        self._background = background
        self._stopping = background.stopping
        self._clock = clock
        self._size = batch
        self._log = log
        self._wanted: dict[StepKey, None] = {}  # a set that keeps its order
        self._is_working = False
        self._current: StepKey | None = None
        self._others: dict[StepKey, int] = {}  # how far another daemon had come
        self._requests: set[Reevaluate] = set()
        self._walks = Repeating(self._mark, background, pause=REQUEST_PAUSE)
        self._subjects = Repeating(self._evaluate_subjects, background)

    def start(self, step_key: StepKey) -> None:
        """Notes a step where those who wait are to be evaluated."""
        self._wanted[step_key] = None
        if not self._is_working:
            self._is_working = True
            self._background.spawn(self._work())

    def resume(self, unfinished: Mapping[StepKey, int]) -> None:
        """Goes on with what another daemon began, if it does not."""
        for step_key, since in unfinished.items():
            if (
                step_key not in self._wanted
                and step_key not in self._others
                and step_key != self._current
            ):
                self._others[step_key] = since
                asyncio.get_running_loop().call_later(OTHERS_PAUSE, self.start, step_key)

    def request(self, request: Reevaluate) -> None:
        """Evaluates whom an application means, soon. Equal requests are one, also those that come
        faster than they can be done; of too many different ones become one for all.
        """
        self._requests.add(request)
        if len(self._requests) > REQUESTS:
            self._requests = {Reevaluate()}
            request = Reevaluate()
        (self._walks if request.subject is None else self._subjects).request()

    async def _mark(self) -> None:
        """Notes requests for everybody, sequences and steps in the steps where somebody waits."""
        requests = {request for request in self._requests if request.subject is None}
        self._requests -= requests
        wanted = {(request.sequence, request.step) for request in requests}
        try:
            async with store.connection(self._pool) as connection:
                step_keys = [
                    (sequence, step)
                    for sequence, step in await store.occupied(connection)
                    if not wanted.isdisjoint(
                        [(sequence, step), (sequence, None), (None, step), (None, None)]
                    )
                ]
                marked = await store.request_evaluation(connection, step_keys)
        except BaseException:
            self._requests |= requests
            raise
        for step_key in marked:
            self.start(step_key)
        for sequence, step in set(step_keys).difference(marked):
            if sequence in self._sequences and step in self._sequences[sequence].steps:
                self.request(Reevaluate(sequence=sequence, step=step))  # it is locked

    async def _evaluate_subjects(self) -> None:
        """Does the requests for subjects."""
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
        """Returns those of whom something is locked by somebody else."""
        wanted = {(request.subject, request.sequence, request.step) for request in requests}
        subjects = list({subject for subject, _, _ in wanted if subject is not None})
        locked: set[str] = set()
        after, page = -1, PAGE
        while page == PAGE and not self._stopping.is_set():
            async with store.connection(self._pool) as connection:
                rows = await store.waiting_of_subjects(
                    connection, subjects, after, self._clock.now(), PAGE
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
                if step_key[0] not in self._sequences or self._sequences[step_key[0]].paused:
                    continue
                for first in range(0, len(ids), self._size):
                    left = await self._evaluate_waiting(step_key, ids[first : first + self._size])
                    locked.update(of[id_] for id_ in left)
        return locked

    async def _evaluate_waiting(self, step_key: StepKey, ids: list[int]) -> list[int]:
        """Evaluates some of those who wait at a step. Returns who was locked by somebody else."""

        async def evaluate(part: Sequence[int]) -> list[int] | None:
            return await self._evaluate(step_key, part)

        return await self._in_parts(evaluate, ids, step_key) or []

    async def _work(self) -> None:
        try:
            while self._wanted and not self._stopping.is_set():
                await self._work_on(list(self._wanted))
        finally:
            self._is_working = False

    async def _work_on(self, step_keys: list[StepKey]) -> None:
        outlasted = False
        for step_key in step_keys:
            if self._stopping.is_set():
                return
            again = None
            try:
                if not outlasted:
                    await self._outlast_older_transactions()
                    outlasted = True
                self._wanted.pop(step_key, None)
                self._current = step_key
                if not await self._reschedule(step_key):
                    again = OTHERS_PAUSE
            except TRANSIENT_ERRORS as error:
                again = PAUSE
                self._log.warning("database error, tried again", error=store.brief(error))
            except Exception:
                again = 60.0
                self._log.exception("who waits could not be looked at", step=step_key)
            finally:
                self._current = None
            if again is not None:
                self._wanted.pop(step_key, None)
                asyncio.get_running_loop().call_later(again, self.start, step_key)

    async def _reschedule(self, step_key: StepKey) -> bool:
        """Whether there is nothing more to do; False where another daemon is at it."""
        async with store.connection(self._pool) as connection:
            since = await store.rescheduling_from(connection, step_key)
        seen = self._others.pop(step_key, since)
        if since is None:
            return True
        if since == seen:
            return await self._from(step_key, since)
        self._others[step_key] = since
        return False

    async def _from(self, step_key: StepKey, since: int) -> bool:
        """The same, from this id on."""
        count = 0
        while not self._stopping.is_set():
            sequence = self._sequences.get(step_key[0])
            if sequence is None or sequence.paused:
                return True  # it is begun again when it is resumed
            async with store.connection(self._pool) as connection:
                page = await store.active_ids(connection, step_key, since, PAGE)
            for first in range(0, len(page), self._size):
                batch = page[first : first + self._size]
                done = await self._batch(step_key, since, batch, sequence.revision)
                if self._stopping.is_set():
                    return True
                if done is None:
                    self._others[step_key] = since
                    return False
                since = done
            count += len(page)
            if len(page) == PAGE:
                continue
            async with store.connection(self._pool) as connection:
                again = await store.finish_rescheduling(connection, step_key, since)
            if again is None:
                self._others[step_key] = since
                return False
            if count:
                self._log.info(
                    "who waits at a step was evaluated again", step=step_key, count=count
                )
            if again:
                self.start(step_key)
            return True
        return True

    async def _batch(
        self, step_key: StepKey, since: int, ids: list[int], revision: int
    ) -> int | None:
        """Evaluates a batch, all of it. Returns from which id on others have yet to be evaluated;
        None where it is not ours.
        """
        left: list[int] | None = ids

        async def evaluate(part: Sequence[int]) -> list[int] | None:
            nonlocal since
            until = ids[-1] + 1 if part == left else since
            locked = await self._evaluate(step_key, part, (since, until, revision))
            if locked == []:
                since = until
            return locked

        while left and not self._stopping.is_set():
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
        """Evaluates a batch, in parts where something can't be written. Returns who was locked by
        somebody else; None where it is not ours.
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

        _, common = await isolate(ids, work, refused, self._probe)
        if common is not None:
            raise common
        return locked if is_ours else None

    async def _evaluate(
        self,
        step_key: StepKey,
        ids: Sequence[int],
        progress: tuple[int, int, int] | None = None,
    ) -> list[int] | None:
        """The same in one transaction. Its `progress` is noted in the step, unless another
        transaction has locked one: since which id, and after it from which id on it is to be done,
        and under which revision.
        """
        now = self._clock.now()
        batch = Batch()
        async with self._leases.writing(batch) as connection:
            if progress is not None:
                since, until, revision = progress
                if not await store.lock_rescheduling(connection, step_key, since, revision):
                    return None
            waiting, locked = await store.lock_waiting(connection, step_key, ids, now)
            for number, enrollment in enumerate(waiting, 1):
                advanced = self._moves.advance(enrollment, now)
                if advanced.entered:
                    again = partial(self._moves.advance, enrollment, now, None, None)
                    batch.jumps.append(Jump(enrollment, advanced, again))
                elif not is_unchanged(enrollment, advanced):
                    self._moves.add(batch, enrollment, advanced, now)
                if number % SLICE == 0:
                    await asyncio.sleep(0)
            await self._moves.write(connection, batch, now)
            if progress is not None and not locked:
                await store.record_progress(connection, step_key, until)
        return locked

    async def _outlast_older_transactions(self) -> None:
        """Those of other daemons may still bring people to a step by how it was."""
        async with store.connection(self._pool) as connection:
            newest = await store.new_transaction(connection)
        loop = asyncio.get_running_loop()
        until = loop.time() + GRACE
        while loop.time() < until and not self._stopping.is_set():
            async with store.connection(self._pool) as connection:
                if await store.oldest_transaction(connection) >= newest:
                    return
            await asyncio.sleep(GRACE_TURN)
