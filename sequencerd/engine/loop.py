"""The engine: claim, advance, write, execute, write.

The heap holds the next wake time of each step that has enrollments. When it comes, they are
claimed, advanced in memory and written, in one transaction. Those that need a side effect are
leased by the same write and then executed. Results are written in batches: the rows are locked,
advanced again and written. No transaction is open during a side effect.

All of it runs in one event loop: state changes between awaits only, so it needs no locks.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime, timedelta
from functools import partial
from typing import assert_never

import asyncpg
from structlog.typing import FilteringBoundLogger

from sequencerd.core.advance import advance
from sequencerd.core.backoff import Pauses
from sequencerd.core.model import (
    NEVER,
    Advanced,
    Answer,
    Elsewhere,
    Enrollment,
    Result,
    SideEffect,
    outcome,
)
from sequencerd.core.retry import doubled
from sequencerd.definitions.compiler import Runners
from sequencerd.engine.catalog import Catalog
from sequencerd.engine.clock import Clock
from sequencerd.engine.executors import Executor, Leased, Work
from sequencerd.engine.expiries import TURN as EXPIRY_TURN
from sequencerd.engine.expiries import Expiries
from sequencerd.engine.heap import Heap
from sequencerd.engine.heartbeat import Heartbeat
from sequencerd.engine.jumps import Jump
from sequencerd.engine.problems import Problems
from sequencerd.engine.quarantine import Quarantine, isolate
from sequencerd.engine.repeating import Repeating
from sequencerd.engine.reschedule import Rescheduling
from sequencerd.engine.writer import PAUSE, Batch, Writer, failed, failure_code, late, of_lookup
from sequencerd.service.metrics import Metrics
from sequencerd.settings import Engine as Settings
from sequencerd.storage import store
from sequencerd.storage.listener import Changed, Due, DueSteps, Message, Reevaluate
from sequencerd.storage.store import LOST_ERRORS, TRANSIENT_ERRORS, StepKey

WRITERS = 3  # one computes while the others wait for the database
CLAIMERS = 2  # of a step with much to do, for the same reason
BEHIND = 20  # batches of results that may wait to be written
HOLD = 1.0  # seconds for which they wait where many others are late to begin
MAX_SLEEP = 1.0  # seconds: the watchdog wants to see that the loop turns
TICK = (
    0.001  # seconds by which timers of the loop may be late: it wakes before, and turns meanwhile
)
MAX_DUE = 10_000  # so many are counted at each step that is due
FRUITLESS = 3  # claims in a row that find nobody, until notifications may wait
FRUITLESS_PAUSE = 0.5  # seconds for which they wait at most
LOCKED_PAUSE = 0.2  # seconds until a row that somebody else has locked is tried again
QUARANTINE_TURN = 1.0  # seconds between looks for what is to be tried again


Finished = tuple[Leased, Result]


class Engine:
    """Moves enrollments until it is stopped; side effects in flight are finished first."""

    def __init__(
        self,
        pool: asyncpg.Pool,
        heart: asyncpg.Pool,
        runners: Runners,
        lookups: Callable[[str], Work],
        *,
        clock: Clock,
        settings: Settings,
        name: str,
        log: FilteringBoundLogger,
        metrics: Metrics,
        turned: Callable[[], None] = lambda: None,
        pauses: Pauses = Pauses(),  # noqa: B008 - a tuple
    ) -> None:
        """`heart` is the heartbeat's own connection. `turned` is called in every turn of the loop,
        at least each MAX_SLEEP seconds. `pauses` are those of runners whose server fails.
        """
        self._pool = pool
        self.problems = Problems()
        self._heartbeat = Heartbeat(
            heart,
            self.problems,
            name=name,
            lease=settings.lease,
            types=lambda: self.catalog.served,
            log=log,
        )
        self._quarantine = Quarantine(self.problems, clock=clock, log=log)
        metrics.quarantined.set_function(lambda: len(self._quarantine))
        self._clock = clock
        self._settings = settings
        self._name = name
        self._log = log
        self._metrics = metrics
        self._turned = turned
        self._heap: Heap[StepKey] = Heap()
        self.catalog = Catalog(
            pool, runners, self._start_rescheduling, daemon=name, clock=clock, log=log
        )
        self._writer = Writer(
            pool,
            runners,
            lookups,
            self,
            self._push,
            clock=clock,
            settings=settings,
            name=name,
            log=log,
            metrics=metrics,
            pauses=pauses,
        )
        self._finished: deque[Finished] = deque()
        self._has_finished = asyncio.Event()
        self._taken_over: set[int] = set()  # leased by another daemon, though we execute it
        self._wake = asyncio.Event()
        self._trying = asyncio.Lock()  # what was set aside is tried by one at a time
        self._stopping = False
        self._busy: set[StepKey] = set()
        self._floods = 0  # steps that are being claimed batch after batch
        self._hold_until = 0.0  # in the loop's time
        self._again: set[StepKey] = set()
        self._fruitless: dict[StepKey, int] = {}  # claims in a row that found nobody
        self._background: set[asyncio.Task[None]] = set()
        self._reloads = Repeating(self.reload, self._spawn, self._writer, log=log)
        self._expiries = Expiries(
            pool,
            self.catalog,
            self._writer,
            self._claim_some,
            self._excluded,
            daemon=name,
            clock=clock,
            batch=settings.batch,
        )
        self._rescheduling = Rescheduling(
            pool,
            self.catalog.sequences,
            self._writer,
            advance=self._advance,
            quarantine=self._quarantine.add,
            probe=self._probe,
            spawn=self._spawn,
            clock=clock,
            batch=settings.batch,
            log=log,
        )

    # --- the loop

    async def run(self) -> None:
        """Works until `stop`. Raises what can't be fixed by trying again."""
        async with asyncio.TaskGroup() as group:
            helpers = [
                group.create_task(self._heartbeat.keep()),
                group.create_task(self._every(self._settings.sweep, self.sweep)),
                group.create_task(self._every(self._settings.lease / 3, self._extend_leases)),
                group.create_task(self._every(QUARANTINE_TURN, self._try_quarantined)),
                group.create_task(self._every(EXPIRY_TURN, self._expiries.turn)),
                *(group.create_task(self._write_results()) for _ in range(WRITERS)),
            ]
            await self._schedule()
            await self._wind_down()
            for helper in helpers:
                helper.cancel()
        await self._heartbeat.end()

    def stop(self) -> None:
        """Claims nothing more; `run` returns when what is in flight is written."""
        self._stopping = self._writer.stopping = True
        self._wake.set()

    @property
    def in_flight(self) -> int:
        """How many enrollments are leased to this daemon."""
        return len(self._writer.leased)

    async def use(self, runners: Runners, lookups: Callable[[str], Work]) -> Awaitable[object]:
        """Takes over other runners and lookups. What is in flight ends with those that it began
        with: wait for what this returns before they are closed.
        """
        replaced: set[Executor] = set()

        async def take_over() -> None:
            await self.catalog.use(
                runners, lambda: replaced.update(self._writer.use(runners, lookups))
            )
            await self.rebuild()

        await self._until_done(take_over)

        async def drained() -> None:
            for executor in replaced:
                await executor.drained()
            self._writer.retired -= replaced

        return drained()

    def receive(self, message: Message) -> None:
        """What the listener hears."""
        match message:
            case Due(due=step_key):
                self._hint(step_key)
            case Changed():
                self._reloads.request()
            case Reevaluate():
                self._rescheduling.request(message)
            case _:
                assert_never(message)

    async def _schedule(self) -> None:
        while not self._stopping:
            # cleared before looking: what is set while we look is not lost
            self._wake.clear()
            self._turned()
            for step_key in self._heap.pop_due(self._clock.now()):
                self._start(step_key)
            next_at = self._heap.next_at()
            seconds = MAX_SLEEP if next_at is None else self._clock.seconds_until(next_at)
            with suppress(TimeoutError):
                async with asyncio.timeout(min(max(seconds - TICK, 0.0), MAX_SLEEP)):
                    await self._wake.wait()

    def _start(self, step_key: StepKey) -> None:
        """Works on a step, once at a time."""
        if step_key in self._busy:
            self._again.add(step_key)
        else:
            self._busy.add(step_key)
            self._spawn(self._work(step_key))

    async def _work(self, step_key: StepKey) -> None:
        try:
            if await self._claim(step_key):
                await self._claim_many(step_key)
        except TRANSIENT_ERRORS as error:
            self._log.warning(
                "database error, work is done again", step=step_key, error=store.brief(error)
            )
            self._push(step_key, self._clock.now() + timedelta(seconds=PAUSE))
        except Exception:
            # one step must not take the others down; the sweep comes back to it
            self._log.exception("step could not be worked on", step=step_key)
        finally:
            self._busy.discard(step_key)
            if step_key in self._again:
                self._again.discard(step_key)
                self._push(step_key, self._clock.now())

    async def _claim_many(self, step_key: StepKey) -> None:
        """Goes on where more than a batch is due: who is late begins before results are written."""

        async def until_none() -> None:
            while not self._stopping and await self._claim(step_key, CLAIMERS):
                pass

        loop = asyncio.get_running_loop()
        if not self._floods and loop.time() >= self._hold_until:
            self._hold_until = loop.time() + HOLD
            loop.call_later(HOLD, self._has_finished.set)
        self._floods += 1
        try:
            claimers = (until_none() for _ in range(CLAIMERS))
            for ended in await asyncio.gather(*claimers, return_exceptions=True):
                if isinstance(ended, BaseException):
                    raise ended
        finally:
            self._floods -= 1
            self._has_finished.set()

    def _hint(self, step_key: StepKey) -> None:
        """Looks whether somebody is due at a step, as anybody can ask by NOTIFY. Where nobody is
        again and again, it is done less often.
        """
        if self.catalog.step(step_key) is None:
            if self.catalog.should_load(step_key[0]):
                self._reloads.request()
            return
        times = self._fruitless.get(step_key, 0)
        pause = 0.0 if times < FRUITLESS else doubled(0.002, FRUITLESS_PAUSE, times)
        self._push(step_key, self._clock.now() + timedelta(seconds=pause))

    def _push(self, step_key: StepKey, at: datetime) -> None:
        if at < NEVER and self._heap.push(step_key, at):
            self._wake.set()

    def _spawn(self, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def _every(self, seconds: float, work: Callable[[], Awaitable[None]]) -> None:
        while True:
            await asyncio.sleep(seconds)
            try:
                await work()
            except TRANSIENT_ERRORS as error:
                self._log.warning("database error", error=store.brief(error))
            except Exception:  # the next turn may go well
                self._log.exception("internal error")

    async def _until_done(self, work: Callable[[], Awaitable[None]]) -> None:
        while not self._stopping:
            try:
                await work()
            except TRANSIENT_ERRORS as error:
                self._log.warning("database error, tried again", error=store.brief(error))
                await asyncio.sleep(PAUSE)
            except Exception:
                self._log.exception("internal error")  # the sweep comes back to it
                return
            else:
                return

    async def _wind_down(self) -> None:
        """Waits for what is in flight, and writes it."""
        if self._writer.leased:
            self._log.info("stopping", in_flight=len(self._writer.leased))
        loop = asyncio.get_running_loop()
        end = loop.time() + self._settings.stop_timeout
        if self._background:
            _, late = await asyncio.wait(self._background, timeout=end - loop.time())
            for work in late:
                work.cancel()
        executors = {*self._writer.executors.values(), *self._writer.retired}
        await asyncio.gather(*(executor.stop(max(end - loop.time(), 0)) for executor in executors))
        with suppress(TimeoutError):  # the leases run out if the database is away
            async with asyncio.timeout_at(max(end, loop.time()) + PAUSE):
                await self._try_kept_results()
                while self._writer.leased.keys() - self._kept_results:
                    self._has_finished.set()
                    await asyncio.sleep(0.01)
        kept = [one.result for one in self._quarantine.all if one.result is not None]
        results = {leased.enrollment.id: result for leased, result in (*self._finished, *kept)}
        for id_, leased in self._writer.leased.items():
            known = outcome(results[id_]) if id_ in results else "unknown"
            self._log.error(
                "a result could not be written",
                enrollment=id_,
                sequence=leased.enrollment.sequence,
                step=leased.enrollment.step,
                outcome=known,
            )

    async def _try_kept_results(self) -> None:
        """Once more, as the last before they are forgotten."""
        try:
            await self._try_quarantined(kept_only=True)
        except Exception as error:
            self._log.warning("kept results cannot be written", error=store.brief(error))

    # --- definitions, and what is due

    async def sweep(self) -> None:
        """Finds whatever no notification told: at the start, and regularly after it."""
        async with store.connection(self._pool) as connection:
            off = self._clock.measured(await store.server_time(connection))
            if abs(off) > timedelta(seconds=1):
                self._log.warning("the clocks have drifted", by=off.total_seconds())
        await self.reload()
        async with store.connection(self._pool) as connection:
            self._rescheduling.resume(await store.unfinished_rescheduling(connection))
        wakes = await self.rebuild()
        now = self._clock.now()
        due = self._due(wakes, now)
        counts = []
        if due:
            async with store.connection(self._pool) as connection:
                counts = await store.count_due(connection, due, now, MAX_DUE)
        await self._claim_orphans(due, now)
        self._expiries.forget()
        await self._count_waiting(list(self._writer.executors.values()))
        # who waits for a runner that is down is counted there
        late = {step_key: at for step_key, at in due.items() if not self._is_held(step_key)}
        oldest = min(late.values(), default=None)
        counts = [
            (sequence, step, count, overdue if (sequence, step) in late else 0)
            for sequence, step, count, overdue in counts
        ]
        self._metrics.clock_offset.set(self._clock.ahead().total_seconds())
        self._metrics.swept(self._clock.now, len(wakes), oldest, counts)

    def _is_held(self, step_key: StepKey) -> bool:
        """Whether the runner of a step is down."""
        step = self.catalog.step(step_key)
        executor = self._writer.executors.get(step.type) if step else None
        return executor is not None and executor.trouble is not None

    async def rebuild(self) -> list[tuple[StepKey, datetime]]:
        """Fills the heap from the index. Entries that are too early cost one empty claim."""
        async with store.connection(self._pool) as connection:
            wakes = await store.first_wakes(connection)
        for step_key, at in wakes:
            self._push(step_key, at)
        return wakes

    async def find_due(self) -> DueSteps:
        """Finds who is due, where nobody tells."""
        wakes = await self.rebuild()
        return DueSteps(len(wakes), frozenset(self._due(wakes, self._clock.now()).items()))

    def _due(
        self, wakes: Iterable[tuple[StepKey, datetime]], now: datetime
    ) -> dict[StepKey, datetime]:
        """Where somebody is due, unless paused."""
        paused = {name for name, known in self.catalog.sequences.items() if known.paused}
        return {step_key: at for step_key, at in wakes if at <= now and step_key[0] not in paused}

    async def reload(self) -> bool:
        """Reads the definitions that have changed, and looks at those whom it concerns. Whether
        there are any.
        """
        has_changed = await self.catalog.reload()
        if has_changed:
            await self.rebuild()
        return has_changed

    def _start_rescheduling(self, step_key: StepKey) -> None:
        self._rescheduling.start(step_key)

    # --- claim, advance, write

    async def _claim(self, step_key: StepKey, claimers: int = 1) -> bool:
        """Moves the due enrollments of a step, as many as fit. Whether there may be more.

        The room of a executor is shared by the `claimers` that are at it.
        """
        if self.catalog.should_load(step_key[0]):
            await self.reload()
        sequence = self.catalog.sequences.get(step_key[0])
        if sequence is None or sequence.paused or self._writer.waits(step_key):
            return False
        limit = self._settings.batch
        step = sequence.steps.get(step_key[1])
        if step and isinstance(step.behaviour, Elsewhere):
            return False
        if step and isinstance(step.behaviour, SideEffect):
            executor = self._writer.executors[step.type]
            limit = 0 if self._is_behind else min(limit, executor.free_slots // claimers)
            if limit <= 0:
                executor.waiting.add(step_key)
                return False
        try:
            count = await self._claim_batch(step_key, sequence.revision, limit)
        except Exception as error:
            count = await self._claim_in_parts(step_key, sequence.revision, limit, error)
        if count:
            self._fruitless.pop(step_key, None)
        if count == limit:
            return True
        if count == 0:
            self._fruitless[step_key] = self._fruitless.get(step_key, 0) + 1
            await self.reload()  # nothing is claimed under a definition that has changed
        return False

    async def _claim_batch(self, step_key: StepKey, revision: int, limit: int) -> int:
        """At one go. Returns how many it has locked."""
        now = self._clock.now()
        batch = Batch()
        excluded = self._excluded(step_key)
        async with self._writer.writing(batch) as connection:
            claimed, count = await store.claim(
                connection, step_key, now, revision, limit, daemon=self._name, excluding=excluded
            )
            self._metrics.claimed(step_key, claimed, now)
            await self._move_all(connection, batch, claimed, now)
            if len(claimed) < limit:
                # who is due still is locked; that may end without a notification
                soon = now + timedelta(seconds=LOCKED_PAUSE)
                next_at = await store.next_wake(
                    connection, step_key, now, daemon=self._name, excluding=excluded
                )
                if next_at is not None:
                    is_locked = next_at <= now and len(claimed) == count
                    self._push(step_key, soon if is_locked else next_at)
        return count

    def _excluded(self, step_key: StepKey) -> list[int]:
        """What is not to be claimed: what is set aside, and what others had while we were away,
        as long as we wait for its result.
        """
        self._taken_over &= self._writer.leased.keys()
        return [*self._quarantine.ids(step_key), *self._taken_over]

    async def _claim_in_parts(
        self, step_key: StepKey, revision: int, limit: int, error: Exception
    ) -> int:
        """The same in parts, after an error that one of them may be to blame for."""
        if not store.is_data_error(error):
            await self._probe()
        self._log.warning("batch is done in parts", step=step_key, error=store.brief(error))
        async with store.connection(self._pool) as connection:
            ids = await store.due_ids(
                connection,
                step_key,
                self._clock.now(),
                limit,
                daemon=self._name,
                excluding=self._excluded(step_key),
            )
        await self._claim_some(step_key, revision, ids)
        return len(ids)

    async def _claim_some(self, step_key: StepKey, revision: int, ids: Sequence[int]) -> None:
        """Claims these. One that can't be moved fails in the database's words; one that can't be
        written even so is set aside.
        """

        async def work(part: list[int]) -> None:
            await self._claim_part(step_key, revision, part)

        async def refused(id_: int, error: Exception) -> None:
            if store.is_data_error(error):
                refusal = await _refusal(self._claim_part(step_key, revision, [id_], failure=error))
                if refusal is None:
                    return
                error = refusal
            self._quarantine.add(id_, step_key, error)

        _, common = await isolate(ids, work, refused, self._probe)
        if common is not None:
            raise common

    async def _claim_part(
        self, step_key: StepKey, revision: int, ids: Sequence[int], failure: Exception | None = None
    ) -> None:
        """Moves some enrollments of a step on, or lets them fail."""
        now = self._clock.now()
        batch = Batch()
        async with self._writer.writing(batch) as connection:
            claimed = await store.claim_some(
                connection,
                step_key,
                now,
                revision,
                ids,
                daemon=self._name,
                bare=failure is not None,
            )
            if failure is None:
                await self._move_all(connection, batch, claimed, now)
                return
            for enrollment in claimed:
                is_text = isinstance(failure, UnicodeError | asyncpg.CharacterNotInRepertoireError)
                verb = "read or written" if is_text else "written"
                text = f"it cannot be {verb}: {failure}"
                unwritten = failed(enrollment, now, text, failure_code(failure))
                self._writer.add(batch, enrollment, unwritten, now)
            await self._writer.write(connection, batch, now)

    async def _move_all(
        self,
        connection: asyncpg.Connection,
        batch: Batch,
        claimed: Sequence[Enrollment],
        now: datetime,
    ) -> None:
        """Advances what was claimed, and writes it."""
        expired_leases: Mapping[int, int] = {}
        if lapsed := [one for one in claimed if one.leased_by is not None]:
            # what we hold in memory is never started again: its result is on its way
            held = self._writer.known & {one.id for one in lapsed}
            claimed = [one for one in claimed if one.id not in held]
            self._taken_over |= held
            expired_leases = await store.count_expired_leases(connection, lapsed, now)
        for enrollment in claimed:
            self._move(batch, enrollment, now, expired_leases=expired_leases.get(enrollment.id, 0))
        await self._writer.write(connection, batch, now)

    async def _claim_orphans(self, step_keys: Iterable[StepKey], now: datetime) -> None:
        """What is leased to this daemon, and unknown to it, as after an error of its own."""
        if not step_keys:
            return
        async with store.connection(self._pool) as connection:
            orphans = await store.orphans(
                connection, step_keys, now, daemon=self._name, excluding=list(self._writer.known)
            )
        for step_key, ids in orphans.items():
            if sequence := self.catalog.sequences.get(step_key[0]):
                await self._claim_some(step_key, sequence.revision, ids)

    def _advance(
        self,
        enrollment: Enrollment,
        now: datetime,
        result: Result | None = None,
        started_revision: int | None = None,
        refused: Mapping[str, str] | None = None,
        *,
        expired_leases: int = 0,
        result_only: bool = False,
    ) -> Advanced:
        jitter = random.random()  # noqa: S311 - spreads load, guards nothing
        try:
            return advance(
                self.catalog.sequences,
                enrollment,
                now,
                result,
                jitter,
                started_revision=started_revision,
                refused=refused,
                expired_leases=expired_leases,
                result_only=result_only,
            )
        except Exception as error:
            self._log.exception("enrollment could not be evaluated", enrollment=enrollment.id)
            return failed(enrollment, now, f"internal error: {type(error).__name__}: {error}")

    def _move(
        self,
        batch: Batch,
        enrollment: Enrollment,
        now: datetime,
        result: Result | None = None,
        started_revision: int | None = None,
        *,
        expired_leases: int = 0,
        result_only: bool = False,
    ) -> None:
        """Advances one. Most of a batch differ from each other in nothing that is looked at on the
        way: they follow the first of them.
        """
        # ids are not used again: what can be common is an answer, which lives as long as the batch
        key = (enrollment.state, id(result), started_revision, expired_leases)
        gone = batch.gone.get(key)
        if gone is None or not self._writer.follow(batch, enrollment, gone):
            advanced = self._advance(
                enrollment,
                now,
                result,
                started_revision,
                expired_leases=expired_leases,
                result_only=result_only,
            )
            if advanced.entered:
                again = partial(
                    self._advance,
                    enrollment,
                    now,
                    result,
                    started_revision,
                    expired_leases=expired_leases,
                )
                batch.jumps.append(Jump(enrollment, advanced, again))
                return
            gone = self._writer.add(batch, enrollment, advanced, now)
            if gone is not None:
                batch.gone[key] = gone

    # --- results

    def report(self, results: Sequence[Finished]) -> None:
        """From the executors: side effects have ended."""
        self._finished.extend(results)
        self._has_finished.set()
        self.resumed(results[0][0].executor)

    def trouble_changed(self, executor: Executor) -> None:
        """From the executors: a runner is down, or works again."""
        self._metrics.runner_is_down(executor.name, is_down=executor.trouble is not None)
        if executor.trouble is None:
            self._log.info("runner works again", runner=executor.name)
            self.problems.clear("runner", executor.name)
            return
        log = self._log.bind(runner=executor.name)
        log.warning("runner is down; nobody fails for it", cause=executor.cause)
        log.debug("runner is down; nobody fails for it", error=executor.trouble)
        self.problems.report("runner", executor.name, executor.trouble, since=self._clock.now())
        self._spawn(self._until_done(lambda: self._count_waiting([executor])))

    async def _count_waiting(self, executors: Sequence[Executor]) -> None:
        """Reports how many wait for runners that are down."""
        down = {executor.name: 0 for executor in executors if executor.trouble is not None}
        step_keys = {
            (step.sequence, step.name): step.type
            for sequence in self.catalog.sequences.values()
            for step in sequence.steps.values()
            if step.type in down
        }
        if not step_keys:
            return
        async with store.connection(self._pool) as connection:
            counts = await store.count_due(connection, step_keys, self._clock.now(), MAX_DUE)
        for sequence, step, due, _ in counts:
            down[step_keys[sequence, step]] += due
        for executor in executors:
            if executor.trouble is not None:  # by now
                waiting = down[executor.name]
                self._metrics.runner_waits(executor.name, waiting)
                self.problems.report(
                    "runner",
                    executor.name,
                    executor.trouble,
                    since=self._clock.now(),
                    waiting=waiting,
                )

    @property
    def _is_behind(self) -> bool:
        """Whether so much waits to be written that no more side effects should be begun."""
        return len(self._finished) >= BEHIND * self._settings.batch

    @property
    def _holds_results(self) -> bool:
        return self._floods > 0 and asyncio.get_running_loop().time() < self._hold_until

    def resumed(self, executor: Executor) -> None:
        """Claims again for a executor that has room again."""
        if executor.waiting and executor.is_worth_claiming and not self._is_behind:
            for step_key in executor.waiting:
                self._push(step_key, self._clock.now())
            executor.waiting.clear()

    async def _write_results(self) -> None:
        while True:
            await self._has_finished.wait()
            self._has_finished.clear()
            while self._finished and (self._is_behind or not self._holds_results):
                was_behind = self._is_behind
                size = min(self._settings.batch, len(self._finished))
                batch = [self._finished.popleft() for _ in range(size)]
                if was_behind:
                    for executor in self._writer.executors.values():
                        self.resumed(executor)
                await self._settle_all(batch)

    async def _settle_all(self, batch: Sequence[Finished]) -> None:
        """Writes results, in parts where that is needed. Whatever happens, none is lost: what can't
        be written now comes back to the others.
        """
        left, common = await isolate(batch, self._settle, self._refused, self._probe)
        if common is not None:
            self._log.warning("results wait for the database", error=store.brief(common))
            await asyncio.sleep(PAUSE)
            if isinstance(common, LOST_ERRORS):
                left = await self._still_held(left)
            self._finished.extendleft(reversed(left))
            self._has_finished.set()

    async def _refused(self, finished: Finished, error: Exception) -> None:
        """A result that can't be written with what follows is written alone, as it must not be
        lost: what follows then fails by itself. Else the enrollment fails, or is set aside.
        """
        leased, _ = finished
        refusal: Exception | None = error
        if not leased.executor.is_lookup:
            refusal = await _refusal(self._settle([finished], result_only=True))
        if refusal is not None and store.is_data_error(refusal):
            refusal = await _refusal(self._settle([finished], failure=refusal))
        if refusal is not None:
            at = leased.enrollment
            self._quarantine.add(at.id, (at.sequence, at.step), refusal, finished)

    async def _settle(
        self,
        results: list[Finished],
        *,
        result_only: bool = False,
        failure: Exception | None = None,
    ) -> None:
        """Moves enrollments on by the results of their side effects, if they are still theirs: as
        far as these say, or as far as they get; or lets them fail.
        """
        try:
            while not await self._settle_under(results, result_only=result_only, failure=failure):
                await self.reload()
        except LOST_ERRORS:
            results[:] = await self._still_held(results)
            raise

    async def _still_held(self, results: Sequence[Finished]) -> list[Finished]:
        """Without what was written by a commit whose answer was lost."""
        held = await self._writer.held(leased for leased, _ in results)
        self._writer.forget(leased for leased, _ in results if leased.fence not in held)
        return [one for one in results if one[0].fence in held]

    async def _settle_under(
        self, results: Sequence[Finished], *, result_only: bool, failure: Exception | None
    ) -> bool:
        """By the definitions that are known; False, and nothing is done, if they have changed."""
        now = self._clock.now()
        known = [leased.enrollment for leased, _ in results]
        batch, waiting = Batch(), []
        async with self._writer.writing(batch) as connection:
            locked, ours, revisions = await store.lock(connection, known)
            if any(self._revision(name) != revision for name, revision in revisions.items()):
                return False
            missing = [enrollment.id for enrollment in known if enrollment.id not in locked]
            exist = await store.existing(connection, missing) if missing else set()
            for leased, result in results:
                if enrollment := ours.get(leased.fence):
                    if failure is not None:
                        text = _of_result(result, failure)
                        unwritten = failed(enrollment, now, text, failure_code(failure))
                        self._writer.add(batch, enrollment, unwritten, now)
                        continue
                    found = of_lookup(result) if leased.executor.is_lookup else result
                    begun = leased.revision
                    self._move(batch, enrollment, now, found, begun, result_only=result_only)
                elif leased.enrollment.id in exist:
                    waiting.append((leased, result))
                elif leased.enrollment.id not in locked:
                    self._log.warning("enrollment was deleted", enrollment=leased.enrollment.id)
                elif not leased.executor.is_lookup:
                    event = late(leased, result, now)
                    batch.events.setdefault(event, []).append(leased.enrollment.id)
            await self._writer.write(connection, batch, now)
        wait = {leased.fence for leased, _ in waiting}
        self._writer.forget(leased for leased, _ in results if leased.fence not in wait)
        if waiting:
            asyncio.get_running_loop().call_later(LOCKED_PAUSE, self._try_again, waiting)
        return True

    def _revision(self, name: str) -> int | None:
        sequence = self.catalog.sequences.get(name)
        return sequence.revision if sequence else None

    def _try_again(self, results: list[Finished]) -> None:
        self._finished.extend(results)
        self._has_finished.set()

    # --- what the database refuses

    async def _probe(self) -> None:
        """Raises what keeps everything from being written, and so is no row's fault."""
        async with store.connection(self._pool) as connection:
            await store.probe(connection)

    async def _extend_leases(self) -> None:
        """Keeps what is executed from falling due. A row that can't be written does, and is ours
        still by the heartbeat.
        """

        async def refused(_id: int, _error: Exception) -> None:
            pass

        if ids := list(self._writer.leased.keys() - self._kept_results):
            _, common = await isolate(ids, self._writer.extend_leases, refused, self._probe)
            if common is not None:
                raise common

    async def _try_quarantined(self, *, kept_only: bool = False) -> None:
        """Tries again what was set aside, where it is time for it; or what is kept of results, at
        any time.
        """
        async with self._trying:
            await self._try_due(kept_only=kept_only)

    async def _try_due(self, *, kept_only: bool) -> None:
        now = math.inf if kept_only else asyncio.get_running_loop().time()
        for step_key, due in self._quarantine.due(now).items():
            tried = [one for one in due if one.result is not None or not kept_only]
            results = [one.result for one in tried if one.result is not None]
            ids = [one.id for one in tried if one.result is None]
            sequence = self.catalog.sequences.get(step_key[0])
            if results:
                _, common = await isolate(results, self._settle, self._refused, self._probe)
                if common is not None:
                    raise common
            if ids and sequence is not None:
                await self._claim_some(step_key, sequence.revision, ids)
            self._quarantine.release(tried)

    @property
    def _kept_results(self) -> set[int]:
        """The enrollments of which results are set aside."""
        return {one.id for one in self._quarantine.all if one.result is not None}


async def _refusal(work: Awaitable[None]) -> Exception | None:
    """What the database says to it; nothing if it takes it. Raises where the connection is lost."""
    try:
        await work
    except Exception as error:
        if isinstance(error, LOST_ERRORS) and not isinstance(error, TimeoutError | ValueError):
            raise
        return error
    return None


def _of_result(result: Result, failure: Exception) -> str:
    """Why an enrollment fails whose result can't be written."""
    if isinstance(result, Answer):
        return f"its side effect is done ({result.action}), but it cannot be written: {failure}"
    return f"it cannot be written: {failure}"
