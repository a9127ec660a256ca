"""Claim the due enrollments of a step, and advance them in the same transaction.

A batch that the database refuses is claimed again in parts, down to the row at fault.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import NamedTuple

import asyncpg

from sequencerd.core.enrollment import NEVER, Enrollment, StepKey
from sequencerd.core.model import ServedElsewhere
from sequencerd.core.retry import doubled
from sequencerd.engine.background import LOCKED_PAUSE
from sequencerd.engine.backpressure import Backlog
from sequencerd.engine.batch import MAX_UNLOCKED, Batch
from sequencerd.engine.catalog import Catalog
from sequencerd.engine.cursors import Claim, Cursors
from sequencerd.engine.environment import Environment
from sequencerd.engine.executors import Executor, Executors
from sequencerd.engine.leases import Leases
from sequencerd.engine.moves import Moves
from sequencerd.engine.quarantine import Quarantine, isolate, refusal_of
from sequencerd.engine.read_ahead import ReadAhead
from sequencerd.engine.slow_evaluations import SlowEvaluations
from sequencerd.storage import activity, connections, locking, wakes, writes
from sequencerd.storage.database_errors import TRANSIENT_ERRORS, brief, is_data_error
from sequencerd.storage.locking import DueEnrollments
from sequencerd.storage.wakes import LeftAtStep
from sequencerd.storage.writes import NO_STATE, EnrollmentWrites, NotWritten, Unchanged

MAX_CLAIMERS = 2  # of a step with much to do: one computes while the other waits for the database
MAX_EMPTY_CLAIMS = 3  # consecutive claims without a result after which notifications are delayed
EMPTY_CLAIMS_PAUSE = 0.5  # seconds, the longest such delay
SEVERAL = 4  # enrollments found by a claim, after which more gather before the next one
GATHER_TIME = 0.01  # seconds
PREPARE_TIME = 1.0  # seconds


class _Ended(NamedTuple):
    """A claim that has written what it found: the enrollments that it has advanced, and how many
    rows it has read to advance them.
    """

    due: DueEnrollments
    claim: Claim
    claimed: list[Enrollment]
    found: int

    @property
    def is_last(self) -> bool:
        """Return whether nothing else is due that can be claimed."""
        return len(self.claimed) < self.due.limit


@dataclass(eq=False)
class Claims:
    """Claims enrollments."""

    _env: Environment
    _catalog: Catalog
    _executors: Executors
    _moves: Moves
    _leases: Leases
    _backlog: Backlog
    _quarantine: Quarantine
    _cursors: Cursors
    _read_ahead: ReadAhead
    _push: Callable[[StepKey, datetime], None]  # schedules a step for a time
    # leased by another daemon, though executed here
    _taken_over: set[int] = field(default_factory=set)
    # until when steps with slow evaluations rest, one after the other, in the loop's time
    _resting: dict[StepKey, float] = field(default_factory=dict)
    _rests_end: float = 0.0

    async def prepare(self) -> None:
        """Prepare the statements of a lone enrollment, on the connection that is borrowed next: in
        a new session, they take ten times as long. This does not wait for long for a locked table.
        """
        now = self._env.clock.now()
        nothing = EnrollmentWrites({NO_STATE: [0]})
        nowhere = DueEnrollments("", "", now, self._env.daemon, [], 0, 1, now)
        # if it fails, nothing but time is lost
        with suppress(NotWritten, *TRANSIENT_ERRORS):
            async with (
                asyncio.timeout(PREPARE_TIME),
                connections.borrow(self._env.pool) as connection,
            ):
                await locking.peek(connection, nowhere, with_ahead=True)
                await writes.write_unchanged(
                    connection, nothing, now, Unchanged({0: 0}, None, [0], "", 0)
                )

    async def claim_all(self, step_key: StepKey) -> None:
        """Claim and advance all due enrollments of a step, in several batches at a time if there
        are many: the second begins when the first is claimed, before it is written.
        """
        if await self._read_ahead.write(step_key):
            self._cursors.found_others(step_key)
        others: list[asyncio.Task[None]] = []

        async def until_none() -> None:
            while not self._env.stopping.is_set() and await self._claim(step_key, MAX_CLAIMERS):
                pass

        def start_others() -> None:
            held.enter_context(self._backlog.hold_while_claiming())
            others.extend(asyncio.create_task(until_none()) for _ in range(MAX_CLAIMERS - 1))

        with ExitStack() as held:
            try:
                if await self._claim(step_key, claimed_many=start_others):
                    await until_none()
            except asyncio.CancelledError:
                for other in others:
                    other.cancel()
                raise
            finally:
                ended = await asyncio.gather(*others, return_exceptions=True)
            for error in ended:
                if isinstance(error, BaseException):
                    raise error

    def delay(self, step_key: StepKey) -> timedelta:
        """Return how long a notification of a step is delayed: longer after many claims without a
        result.
        """
        times = self._cursors.empty_claims(step_key)
        seconds = 0.0 if times < MAX_EMPTY_CLAIMS else doubled(0.002, EMPTY_CLAIMS_PAUSE, times)
        return timedelta(seconds=seconds)

    async def claim_together(self, step_keys: Sequence[StepKey]) -> list[StepKey]:
        """Claim and advance due enrollments of several steps in one transaction: of each, a part of
        a batch. Return the steps that must be claimed alone: more may be due there, or, after an
        error, one of their enrollments may have caused it.
        """
        dues, alone = self._due_together(step_keys)
        if not dues:
            return alone
        try:
            counts = await self._claim_batch(dues)
        except Exception as error:
            if not is_data_error(error):
                await self._env.probe()
            self._env.log.warning("steps are claimed alone", steps=step_keys, error=brief(error))
            return [*step_keys]
        if empty := {due.sequence for due in dues if not counts[due.step_key]}:
            self._catalog.request(empty)
        return alone + [due.step_key for due in dues if counts[due.step_key] == due.limit]

    def _due_together(
        self, step_keys: Sequence[StepKey]
    ) -> tuple[list[DueEnrollments], list[StepKey]]:
        """Return what to claim of several steps, no more than a batch and than there are slots; and
        the steps that must be claimed alone.
        """
        now = self._env.clock.now()
        most = max(self._env.batch // len(step_keys), 1)
        runners = {
            step_key: self._executors.by_key.get(step.type)
            for step_key in step_keys
            if (step := self._catalog.step(step_key)) is not None
        }
        sharing = Counter(runners.values())
        dues, alone = [], []
        reserved = Counter[Executor]()
        for step_key in step_keys:
            executor = runners.get(step_key)
            is_taken = executor is not None and executor in reserved and executor.free_slots <= 0
            if is_taken or step_key in self._resting or self._read_ahead.has(step_key):
                alone.append(step_key)
            elif due := self._claimable(step_key, now, most, sharing[executor]):
                dues.append(due)
                if executor is not None:
                    executor.reserve(due.limit)
                    reserved[executor] += due.limit
        for executor, count in reserved.items():  # the leases reserve what is claimed
            executor.reserve(-count)
        return dues, alone

    async def _claim(
        self,
        step_key: StepKey,
        claimers: int = 1,
        claimed_many: Callable[[], None] = lambda: None,
    ) -> bool:
        """Claim and advance a batch. Return whether more may be due. In that case `claimed_many` is
        called before the batch is written.

        The free slots of an executor are divided among the `claimers` of the step.
        """
        if step_key in self._resting:
            await self._rest(step_key)
        due = self._claimable(step_key, self._env.clock.now(), self._env.batch, claimers)
        if due is None:
            return False
        try:
            count = (await self._claim_batch([due], claimed_many))[step_key]
        except Exception as error:
            count = await self._claim_in_parts(due, error)
            # what it has skipped or left, and what wakes next, was not read
            self._push(step_key, self._env.clock.now() + timedelta(seconds=LOCKED_PAUSE))
        if count == 0:
            # nothing is claimed with a definition that has changed
            self._catalog.request([step_key[0]])
        return count == due.limit

    def _claimable(
        self, step_key: StepKey, now: datetime, most: int, claimers: int = 1
    ) -> DueEnrollments | None:
        """Return what to claim of a step now, at `most` so many; None if nothing can be claimed."""
        self._catalog.request_unknown(step_key[0])
        sequence = self._catalog.sequences.get(step_key[0])
        if sequence is None or sequence.paused or self._executors.is_waited_for(step_key):
            return None
        step = sequence.steps.get(step_key[1])
        if step and isinstance(step.behaviour, ServedElsewhere):
            return None
        limit = self._executors.claimable(step, most, claimers)
        if step and not limit:
            self._executors.by_key[step.type].waiting.add(step_key)
            return None
        return DueEnrollments(
            *step_key,
            now,
            self._env.daemon,
            self.excluded(step_key),
            sequence.revision,
            limit,
            self._cursors.since(step_key),
        )

    async def _claim_batch(
        self, wanted: Sequence[DueEnrollments], claimed_many: Callable[[], None] = lambda: None
    ) -> Counter[StepKey]:
        """Claim and advance a batch of one step, or of several. Return how many rows it has read to
        advance them, by step.
        """
        with ExitStack() as running:
            claims = [
                running.enter_context(
                    self._cursors.claim(due.step_key, frozenset(due.excluding), due.now)
                )
                for due in wanted
            ]
            dues = [
                due._replace(since=claim.start) for due, claim in zip(wanted, claims, strict=True)
            ]
            few = await self._move_few(dues[0], claims[0]) if len(dues) == 1 else None
            if few is not None:
                claimed, counts = {dues[0].step_key: few}, Counter({dues[0].step_key: len(few)})
            else:
                claimed, counts = await self._move_locked(dues, claimed_many)
            await self._finish(
                [
                    _Ended(due, claim, claimed.get(due.step_key, []), counts[due.step_key])
                    for due, claim in zip(dues, claims, strict=True)
                ]
            )
        return counts

    async def _finish(self, ended: Sequence[_Ended]) -> None:
        """Note what claims have found, read what they have left, and schedule the next ones."""
        for _, claim, claimed, found in ended:
            claim.found = found
            if claimed and len(claimed) == found:
                claim.reached = claimed[-1].wake_at
        now = ended[0].due.now
        unknown = {
            one.due.step_key: (one.claim.since, one.is_last and one.claim.ahead is None)
            for one in ended
            if one.claim.left is None and (one.is_last or one.claim.is_to_check)
        }
        left: Mapping[StepKey, LeftAtStep] = {}
        if unknown:
            # after the commit: side effects have started
            async with connections.borrow(self._env.pool) as connection:
                left = await wakes.left_at_steps(
                    connection,
                    unknown,
                    now,
                    daemon=self._env.daemon,
                    excluding={id_ for one in ended for id_ in one.due.excluding},
                )
        for one in ended:
            claim, step_key = one.claim, one.due.step_key
            claim.left = claim.left or left.get(step_key)
            if not one.is_last:
                continue
            if SEVERAL <= one.found <= MAX_UNLOCKED:
                claim.not_before = asyncio.get_running_loop().time() + GATHER_TIME
            if claim.left is not None:
                next_at = min(
                    claim.left.again_at or NEVER, claim.ahead or claim.left.ahead or NEVER
                )
                # the remaining due rows are locked; that may end without a notification
                is_locked = next_at <= now and len(one.claimed) == one.found
                soon = now + timedelta(seconds=LOCKED_PAUSE)
                self._push(step_key, soon if is_locked else next_at)

    async def _move_locked(
        self, dues: Sequence[DueEnrollments], claimed_many: Callable[[], None]
    ) -> tuple[dict[StepKey, list[Enrollment]], Counter[StepKey]]:
        """Claim and advance due enrollments in one transaction. Return them by step, and how many
        rows it has locked there: some are left if their data, or their evaluations, take too much.
        """
        batch = Batch()
        now = dues[0].now
        async with self._leases.writing(batch) as connection:
            found, counts, batch.places, batch.transaction = await locking.claim(connection, dues)
            if counts[dues[0].step_key] == dues[0].limit:
                claimed_many()
            claimed = await self._move_all(connection, batch, found, now)
            for step_key, enrollments in claimed.items():
                self._env.metrics.claimed(step_key, self._due(step_key, enrollments), now)
        return claimed, counts

    async def _move_few(self, wanted: DueEnrollments, claim: Claim) -> list[Enrollment] | None:
        """Advance due enrollments without a lock between reading and writing them.

        Return them, or None if they must be claimed: if there are many of them, one is late, leased
        or has changed since it was read, or more must be written than rows and events. What is left
        at the step is then known without another statement.
        """
        few = min(MAX_UNLOCKED, wanted.limit - 1)
        if claim.found > MAX_UNLOCKED or claim.unsuited == wanted.revision or not few:
            return None
        now, step_key, batch = wanted.now, wanted.step_key, Batch()
        with suppress(NotWritten):
            async with self._leases.without_lock(batch) as connection:
                peeked = await locking.peek(
                    connection,
                    wanted._replace(limit=few + 1, since=claim.since),
                    with_ahead=claim.ahead is None,
                )
                if peeked is None:
                    claim.unsuited = wanted.revision
                    return None
                due, versions, left = peeked
                since = self._due(step_key, due)
                if not due:
                    return []
                if len(due) > few or _is_leased(due) or activity.delays(since, now):
                    return None
                if not self._moves.move_unlocked(batch, due, now):
                    claim.unsuited = wanted.revision
                    raise NotWritten
                leases = {one.leases for one in due}
                known = Unchanged(versions, None, leases, step_key[0], wanted.revision)
                await self._leases.write_unchanged(connection, batch, now, known)
            self._env.metrics.claimed(step_key, since, now)
            claim.left = left
            return due
        return None

    def excluded(self, step_key: StepKey) -> list[int]:
        """Return the ids that must not be claimed: quarantined enrollments, and those that another
        daemon has leased while this one was cut off, until their results arrive here.
        """
        self._taken_over &= self._leases.by_id.keys()
        return [*self._quarantine.ids(step_key), *self._taken_over]

    async def _claim_in_parts(self, due: DueEnrollments, error: Exception) -> int:
        """Claim a batch in parts, after an error that one of its rows may have caused."""
        step_key = due.step_key
        if not is_data_error(error):
            await self._env.probe()
        self._env.log.warning("batch is processed in parts", step=step_key, error=brief(error))
        due = due._replace(
            now=self._env.clock.now(),
            excluding=self.excluded(step_key),
            since=self._cursors.since(step_key),
        )
        async with connections.borrow(self._env.pool) as connection:
            ids = await locking.due_ids(connection, due)
        await self.claim_some(step_key, due.revision, ids)
        return len(ids)

    async def claim_some(self, step_key: StepKey, revision: int, ids: Sequence[int]) -> None:
        """Claim and advance given enrollments of a step.

        If one cannot be advanced, it fails with the database's message. If that cannot be written
        either, it is quarantined.
        """

        async def work(part: list[int]) -> None:
            await self._claim_part(step_key, revision, part)

        async def refused(id_: int, error: Exception) -> None:
            if is_data_error(error):
                failing = self._claim_part(step_key, revision, [id_], failure=error)
                refusal = await refusal_of(failing)
                if refusal is None:
                    return
                error = refusal
            self._quarantine.add(id_, step_key, error)

        _, common = await isolate(ids, work, refused, self._env.probe)
        if common is not None:
            raise common

    async def _claim_part(
        self, step_key: StepKey, revision: int, ids: Sequence[int], failure: Exception | None = None
    ) -> None:
        """Claim and advance given enrollments in one transaction, or let them fail."""
        now = self._env.clock.now()
        batch = Batch()
        async with self._leases.writing(batch) as connection:
            claimed = await locking.claim_some(
                connection,
                step_key,
                now,
                revision,
                ids,
                daemon=self._env.daemon,
                bare=failure is not None,
            )
            if failure is None:
                await self._move_all(connection, batch, claimed, now)
                return
            is_text = isinstance(failure, UnicodeError | asyncpg.CharacterNotInRepertoireError)
            text = f"it cannot be {'read or ' if is_text else ''}written"
            for enrollment in claimed:
                self._moves.fail(batch, enrollment, now, text, failure)
            await self._moves.write(connection, batch, now)

    async def _move_all(
        self,
        connection: asyncpg.Connection,
        batch: Batch,
        claimed: list[Enrollment],
        now: datetime,
    ) -> dict[StepKey, list[Enrollment]]:
        """Advance claimed enrollments, and write them together with their lateness. Return them by
        step. If evaluations are slow, the last ones are left out, and remain due.
        """
        held: set[int] = set()
        expired_leases: Mapping[int, int] = {}
        if leased := [one for one in claimed if one.leased_by is not None]:
            # side effects in this daemon's memory are never started again: their results will come
            held = self._leases.known & {one.id for one in leased}
            self._taken_over |= held
            expired_leases = await locking.count_expired_leases(connection, leased, now)
        slow = SlowEvaluations()
        for number, enrollment in enumerate(claimed, 1):
            if enrollment.id in held:
                continue
            expired = expired_leases.get(enrollment.id, 0)
            is_evaluated = self._moves.move(batch, enrollment, now, expired_leases=expired)
            if is_evaluated and slow.end_batch():
                self._let_rest((enrollment.sequence, enrollment.step), slow.seconds)
                for step_key in _by_step(claimed[number:]):
                    self._push(step_key, now)
                claimed = claimed[:number]
                break
        await self._moves.write(connection, batch, now)
        by_step = _by_step(claimed)
        due = {
            step_key: self._due(step_key, [one for one in here if one.id not in held])
            for step_key, here in by_step.items()
        }
        await activity.note_lateness(connection, due, now)
        return by_step

    def _let_rest(self, step_key: StepKey, seconds: float) -> None:
        """Leave as much time to everything else as the evaluations of a step have taken."""
        self._rests_end = max(self._rests_end, asyncio.get_running_loop().time()) + seconds
        self._resting[step_key] = self._rests_end

    async def _rest(self, step_key: StepKey) -> None:
        """Wait until a step may be claimed again."""
        loop = asyncio.get_running_loop()
        while (end := self._resting.get(step_key, 0.0)) > loop.time():  # noqa: ASYNC110 - a time
            await asyncio.sleep(end - loop.time())
        self._resting.pop(step_key, None)

    def _due(self, step_key: StepKey, claimed: Sequence[Enrollment]) -> list[datetime]:
        """Return since when claimed enrollments were due: not while their sequence was paused."""
        due = [one.wake_at for one in claimed if one.wake_at is not None]
        sequence = self._catalog.sequences.get(step_key[0])
        resumed_at = sequence.resumed_at if sequence else None
        return due if resumed_at is None else [max(at, resumed_at) for at in due]

    async def claim_orphans(self, due: Mapping[StepKey, datetime], now: datetime) -> None:
        """Advance enrollments that are leased to this daemon but not in its memory, as after an
        internal error.

        `due` are the steps with due enrollments, and since when these are due.
        """
        if not due:
            return
        async with connections.borrow(self._env.pool) as connection:
            orphans = await locking.orphans(
                connection, due, now, daemon=self._env.daemon, excluding=list(self._leases.known)
            )
        for step_key, ids in orphans.items():
            if sequence := self._catalog.sequences.get(step_key[0]):
                await self.claim_some(step_key, sequence.revision, ids)


def _by_step(enrollments: Iterable[Enrollment]) -> dict[StepKey, list[Enrollment]]:
    found: dict[StepKey, list[Enrollment]] = {}
    for one in enrollments:
        found.setdefault((one.sequence, one.step), []).append(one)
    return found


def _is_leased(due: Sequence[Enrollment]) -> bool:
    return any(one.leased_by is not None for one in due)
