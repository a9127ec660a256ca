"""The engine's loop: decide which step to work on, and when.

The heap contains the next wake time of each step that has enrollments. At that time, data flow one
way: `claims` locks the due enrollments, `moves` advances them into a `batch`, one transaction
writes it (`leases`), `executors` run the side effects that it has leased, and their results wait in
`backpressure` until `results` advances and writes those enrollments in turn.

All of it runs in one event loop: state changes only between awaits, so it needs no locks.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from datetime import datetime, timedelta
from functools import partial
from typing import assert_never

import asyncpg
from structlog.typing import FilteringBoundLogger

from sequencerd.core.backoff import Pauses
from sequencerd.core.enrollment import NEVER, StepKey
from sequencerd.core.task import outcome
from sequencerd.definitions.compiler import Runners
from sequencerd.engine.background import ERROR_PAUSE, Background, Repeating, concurrently
from sequencerd.engine.backpressure import Backlog
from sequencerd.engine.breaker import TIMER_TOLERANCE
from sequencerd.engine.catalog import Catalog
from sequencerd.engine.claims import Claims
from sequencerd.engine.clock import Clock
from sequencerd.engine.cursors import Cursors
from sequencerd.engine.environment import Environment
from sequencerd.engine.executors import Executable, Executor, Executors
from sequencerd.engine.expiries import SEARCH_INTERVAL as EXPIRY_INTERVAL
from sequencerd.engine.expiries import Expiries
from sequencerd.engine.heap import Heap
from sequencerd.engine.heartbeat import Heartbeat
from sequencerd.engine.leases import Leases
from sequencerd.engine.moves import Moves
from sequencerd.engine.outages import Outages
from sequencerd.engine.problems import Problems
from sequencerd.engine.quarantine import Quarantine
from sequencerd.engine.read_ahead import AHEAD, TOO_LATE, ReadAhead
from sequencerd.engine.reschedule import Rescheduling
from sequencerd.engine.results import Results
from sequencerd.service.metrics import Metrics
from sequencerd.settings import EngineSettings
from sequencerd.storage import connections, evaluations, server
from sequencerd.storage.database_errors import TRANSIENT_ERRORS, brief
from sequencerd.storage.listener import (
    DefinitionsChanged,
    DueSteps,
    EnrollmentDue,
    Notification,
    Reevaluate,
)
from sequencerd.storage.wakes import count_due, first_wakes, first_wakes_of

WRITERS = 3  # of results: one computes while the others wait for the database
MAX_ALONE = 32  # steps that are claimed alone at the same time
MAX_TOGETHER = 100  # steps that are claimed in one transaction
GATHERERS = 2  # one computes while the other waits for the database
MAX_SLEEP = 1.0  # seconds: the watchdog checks that the loop runs
QUARANTINE_TURN = 1.0  # seconds between checks for work to be repeated
SCAN_SHARE = 0.1  # of the time, for scans of the whole index


class Engine:
    """Moves enrollments until it is stopped; side effects in flight are finished first."""

    def __init__(
        self,
        pool: asyncpg.Pool,
        heart: asyncpg.Pool,
        runners: Runners,
        lookups: Callable[[str], Executable],
        *,
        clock: Clock,
        settings: EngineSettings,
        name: str,
        log: FilteringBoundLogger,
        metrics: Metrics,
        turned: Callable[[], None] = lambda: None,
        redact: Callable[[str], str] = str,
        pauses: Pauses = Pauses(),  # noqa: B008 - a tuple
    ) -> None:
        """Make an engine. `heart` is the heartbeat's own pool. `turned` is called in every
        iteration of the loop, at least every MAX_SLEEP seconds. `redact` removes secrets from what
        servers say. `pauses` are those after failures of a server.
        """
        self._settings = settings
        self._turned = turned
        self._wake = asyncio.Event()
        self._trying = asyncio.Lock()  # quarantined enrollments are retried by one task at a time
        self._heap: Heap[StepKey] = Heap()
        self._busy: set[StepKey] = set()
        self._again: set[StepKey] = set()  # busy steps that are to be worked on once more
        self._gathered: deque[StepKey] = deque()  # busy steps that are to be claimed together
        self._gatherers = 0
        self._scan_at = 0.0  # when to scan the whole index again, in the loop's time
        self._env = env = Environment(
            daemon=name,
            pool=pool,
            clock=clock,
            batch=settings.batch,
            lease_time=timedelta(seconds=settings.lease),
            stopping=asyncio.Event(),
            log=log,
            metrics=metrics,
        )
        self._background = Background(env.stopping, log)
        self.problems = Problems()
        self._cursors = Cursors()
        self._reloads = Repeating(partial(self.reload, ()), self._background)
        self.catalog = Catalog(env, runners, self._reschedule, self._reloads.request)
        self.heartbeat = Heartbeat(
            heart,
            self.problems,
            name=name,
            lease=settings.lease,
            types=lambda: self.catalog.served_types,
            log=log,
        )
        self._quarantine = Quarantine(self.problems, clock=clock, log=log)
        metrics.quarantined.set_function(lambda: len(self._quarantine))
        self._outages = Outages(env, self.catalog, self.problems, self._cursors.since)
        self._backlog = Backlog(settings.batch)
        self.executors = Executors(
            env,
            runners,
            lookups,
            finished=self._backlog.add,
            is_full=lambda: self._backlog.is_full,
            wake=self._push_now,
            outage_changed=self._outage_changed,
            redact=redact,
            pauses=pauses,
        )
        self._moves = Moves(env, self.catalog, self.executors, self.heartbeat.lease_expired)
        self._leases = Leases(env, self.executors, self._report_wake, self._report_invalid)
        writing = (  # what all that write batches need
            env,
            self.catalog,
            self.executors,
            self._moves,
            self._leases,
            self._backlog,
            self._quarantine,
        )
        self._read_ahead = ReadAhead(*writing)
        self._claims = Claims(*writing, self._cursors, self._read_ahead, self._push)
        self._results = Results(*writing)
        self._expiries = Expiries(env, self.catalog, self.executors, self._claims)
        self._rescheduling = Rescheduling(
            env,
            self.catalog,
            self._moves,
            self._leases,
            quarantine=self._quarantine.add,
            background=self._background,
        )
        self._changed: set[str] = set()  # changed sequences whose wake times are to be read
        self._fixed: set[StepKey] = set()  # steps that have changed before a failure was written

    # --- the loop

    async def run(self) -> None:
        """Work until stopped. Raises errors that a retry cannot fix."""
        every = self._background.every
        async with asyncio.TaskGroup() as group:
            helpers = [
                group.create_task(work)
                for work in (
                    self.heartbeat.keep(),
                    every(self._settings.sweep, partial(self.sweep, whole=False)),
                    every(self._settings.lease / 3, self._extend_leases),
                    every(QUARANTINE_TURN, self._try_quarantined),
                    every(EXPIRY_INTERVAL, self._expiries.run),
                    *(self._results.write() for _ in range(WRITERS)),
                )
            ]
            await self._schedule()
            await self._wind_down()
            # without an await in between, so that no batch is being written
            self._background.cancel()
            for helper in helpers:
                helper.cancel()
        await self.heartbeat.end()

    def stop(self) -> None:
        """Claim nothing more; `run` returns when results of side effects in flight are written."""
        self._env.stopping.set()
        self._wake.set()

    @property
    def in_flight(self) -> int:
        """Return how many enrollments are leased to this daemon."""
        return len(self._leases)

    async def use(
        self, runners: Runners, lookups: Callable[[str], Executable]
    ) -> Awaitable[object]:
        """Use other runners and lookups from now on.

        Side effects in flight end with the runners that they started with: await the return value
        before closing these.
        """
        replaced: set[Executor] = set()

        async def use() -> None:
            await self.catalog.use(
                runners, lambda: replaced.update(self.executors.use(runners, lookups))
            )
            await self.rebuild()

        await self._background.until_done(use)
        return self.executors.drained(replaced)

    def receive(self, message: Notification) -> None:
        """Handle a notification."""
        match message:
            case EnrollmentDue(due=step_key, since=since, later=is_later):
                self._cursors.report(step_key, since, self._env.clock.now(), is_later=is_later)
                self._check_soon(step_key)
            case DefinitionsChanged(definitions=name):
                self.catalog.request(None if name is True else [name])
            case Reevaluate():
                self._rescheduling.request(message)
            case _:
                assert_never(message)

    async def _schedule(self) -> None:
        while not self._env.stopping.is_set():
            # cleared first, so that nothing that is set from now on is lost
            self._wake.clear()
            self._turned()
            for step_key in self._heap.pop_due(self._env.clock.now()):
                self._start(step_key)
            seconds = self._next_in()
            with suppress(TimeoutError):
                async with asyncio.timeout(min(max(seconds - TIMER_TOLERANCE, 0.0), MAX_SLEEP)):
                    await self._wake.wait()

    def _next_in(self) -> float:
        """Return in how many seconds there is something to do, and read ahead what wakes next."""
        if (first := self._heap.first()) is None:
            return MAX_SLEEP
        at, step_key = first
        seconds = self._env.clock.seconds_until(at)
        if seconds > AHEAD + TIMER_TOLERANCE:
            return seconds - AHEAD
        if seconds > TOO_LATE and not self._read_ahead.is_of(step_key, at):
            self._background.spawn(self._read_ahead.read(step_key, at))
        return seconds

    def _start(self, step_key: StepKey) -> None:
        """Work on a step, in one task at a time. If enrollments arrive one after the other, some
        gather before they are claimed: the fewer claims, the less each enrollment costs.
        """
        rest = self._cursors.not_before(step_key) - asyncio.get_running_loop().time()
        if step_key in self._busy:
            self._again.add(step_key)
        elif rest > 0:
            self._push(step_key, self._env.clock.now() + timedelta(seconds=rest))
        else:
            self._busy.add(step_key)
            if len(self._busy) <= MAX_ALONE:
                self._work_alone(step_key)
                return
            self._gathered.append(step_key)
            if self._gatherers < GATHERERS:
                self._gatherers += 1
                self._background.spawn(self._work_together())

    async def _work_together(self) -> None:
        """Work on steps that have become due while many others were worked on."""
        try:
            while self._gathered and not self._env.stopping.is_set():
                count = min(len(self._gathered), MAX_TOGETHER)
                together = [self._gathered.popleft() for _ in range(count)]
                await self._work(together, partial(self._claims.claim_together, together))
        finally:
            self._gatherers -= 1

    def _work_alone(self, step_key: StepKey) -> None:
        """Work on a busy step, in a task of its own."""
        self._background.spawn(self._work([step_key], partial(self._claims.claim_all, step_key)))

    async def _work(
        self, step_keys: Sequence[StepKey], claim: Callable[[], Awaitable[Sequence[StepKey] | None]]
    ) -> None:
        """Claim at busy steps. Those that `claim` returns, if any, are then claimed alone."""
        self._again -= {*step_keys}  # what was requested until now is about to be claimed
        alone: Sequence[StepKey] = ()
        try:
            alone = await claim() or ()
        except TRANSIENT_ERRORS as error:
            self._env.log.warning(
                "database error, repeating the work", steps=step_keys, error=brief(error)
            )
            for step_key in step_keys:
                self._push(step_key, self._env.clock.now() + timedelta(seconds=ERROR_PAUSE))
        except Exception:  # the other steps continue, and the sweep returns to these
            self._env.log.exception("steps could not be processed", steps=step_keys)
        finally:
            for step_key in alone:
                self._work_alone(step_key)
            for step_key in {*step_keys}.difference(alone):
                self._busy.discard(step_key)
                if step_key in self._again:
                    self._again.discard(step_key)
                    self._push_now(step_key)

    def _check_soon(self, step_key: StepKey) -> None:
        """Claim at a step soon. Any database user can request that, so it is done less often after
        claims without a result.
        """
        if self.catalog.step(step_key) is None:
            self.catalog.request_unknown(step_key[0])
            return
        delay = self._claims.delay(step_key)
        if delay:
            self._push(step_key, self._env.clock.now() + delay)
        elif not self._env.stopping.is_set():
            self._start(step_key)

    def _push(self, step_key: StepKey, at: datetime) -> None:
        if at < NEVER and self._heap.push(step_key, at):
            self._wake.set()

    def _report_wake(self, step_key: StepKey, at: datetime, is_later: bool) -> None:
        """Record that enrollments have been moved to a step, when the first one wakes, and whether
        others wake later.
        """
        self._cursors.report(step_key, at, self._env.clock.now(), is_later=is_later)
        if not self.executors.is_waited_for(step_key):
            self._push(step_key, at)

    def _push_now(self, step_key: StepKey) -> None:
        self._push(step_key, self._env.clock.now())

    async def _wind_down(self) -> None:
        """Wait for side effects in flight, and for batches that may lease others; write results."""
        if self._leases:
            self._env.log.info("stopping", in_flight=len(self._leases))
        loop = asyncio.get_running_loop()
        end = loop.time() + self._settings.stop_timeout
        await self._background.ended(end)
        await self.executors.stop(end)
        with suppress(TimeoutError):  # if the database is unavailable, the leases expire
            async with asyncio.timeout_at(max(end, loop.time()) + ERROR_PAUSE):
                try:
                    await self._try_quarantined(results_only=True)
                except Exception as error:
                    self._env.log.warning("kept results cannot be written", error=brief(error))
                while (
                    self._leases.is_writing
                    or self._leases.by_id.keys() - self._quarantine.with_result
                ):
                    self._backlog.changed.set()
                    await asyncio.sleep(0.01)
        kept = [one.result for one in self._quarantine.all if one.result is not None]
        results = {leased.enrollment.id: result for leased, result in (*self._backlog, *kept)}
        for id_, leased in self._leases.by_id.items():
            self._env.log.error(
                "a result could not be written",
                enrollment=id_,
                sequence=leased.enrollment.sequence,
                step=leased.enrollment.step,
                outcome=outcome(results[id_]) if id_ in results else "unknown",
            )

    # --- definitions and due steps

    async def sweep(self, *, whole: bool = True) -> None:
        """Find what no notification has reported: at the start, and regularly afterwards."""
        async with connections.borrow(self._env.pool) as connection:
            off = self._env.clock.measured(await server.server_time(connection))
            if abs(off) > timedelta(seconds=1):
                self._env.log.warning("the clocks have drifted", by=off.total_seconds())
        if off < timedelta(seconds=-1):
            self._cursors.forget()
        self._cursors.forget_ahead()  # triggers do not notify about what wakes after a sweep
        # the server searches while the definitions are compiled
        async with concurrently(self._first_wakes(whole=whole)) as searching:
            self.catalog.mark_for_reload()
            self.catalog.mark_refused()
            changed = await self._read_definitions()
            self._report_braked()
            # enrollments may have come to new steps since the search; at the start, a poll finds
            # them
            if changed and not whole:
                self._changed.update(changed)
                self._reloads.request()
            async with connections.borrow(self._env.pool) as connection:
                self._rescheduling.resume(await evaluations.unfinished_rescheduling(connection))
            wakes = await searching
        self._report_wakes(wakes)
        now = self._env.clock.now()
        due = self._due(wakes, now)
        counts = []
        if due:
            async with connections.borrow(self._env.pool) as connection:
                counts = await count_due(connection, due, now)
        await self._claims.claim_orphans(due, now)
        self.executors.resume()
        self._expiries.forget()
        await self._outages.count(list(self.executors.by_key.values()))
        # enrollments that wait for a runner that is down are counted there
        late = {step_key: at for step_key, at in due.items() if not self._is_held(step_key)}
        oldest = min(late.values(), default=None)
        counts = [
            (sequence, step, count, overdue if (sequence, step) in late else 0)
            for sequence, step, count, overdue in counts
        ]
        self._env.metrics.clock_offset.set(self._env.clock.ahead().total_seconds())
        self._env.metrics.swept(self._env.clock.now, len(wakes), oldest, counts)
        if whole:
            await self._claims.prepare()

    def _is_held(self, step_key: StepKey) -> bool:
        """Return whether the runner of a step is down."""
        step = self.catalog.step(step_key)
        executor = self.executors.by_key.get(step.type) if step else None
        return executor is not None and executor.outage is not None

    async def rebuild(self, *, whole: bool = True) -> list[tuple[StepKey, datetime]]:
        """Fill the heap from the index. An entry that is too early costs one claim without a
        result.
        """
        wakes = await self._first_wakes(whole=whole)
        self._report_wakes(wakes)
        return wakes

    async def _first_wakes(self, *, whole: bool) -> list[tuple[StepKey, datetime]]:
        """Read when the first enrollment of each step wakes.

        While a snapshot is held open, scanning the `whole` index takes long because of its dead
        entries. So frequent calls begin at the cursors, except for a part of the time.
        """
        loop = asyncio.get_running_loop()
        whole = whole or loop.time() >= self._scan_at
        async with connections.borrow(self._env.pool) as connection:
            started = loop.time()
            wakes = await first_wakes(connection, {} if whole else self._cursors.known)
            ended = loop.time()
        if whole:
            self._cursors.forget_ahead()
            self._scan_at = ended + (ended - started) * (1 / SCAN_SHARE - 1)
            self._cursors.forget_unused(self._env.clock.now())
        return wakes

    def _report_wakes(
        self, wakes: Sequence[tuple[StepKey, datetime]], *, is_later: bool = False
    ) -> None:
        now = self._env.clock.now()
        for step_key, at in wakes:
            self._cursors.report(step_key, at, now, is_later=is_later)
        if self._heap.push_all(wakes):
            self._wake.set()

    async def find_due(self, whole: bool) -> DueSteps:
        """Find the due steps while notifications are off."""
        wakes = await self.rebuild(whole=whole)
        return DueSteps(len(wakes), frozenset(self._due(wakes, self._env.clock.now()).items()))

    def _due(
        self, wakes: Iterable[tuple[StepKey, datetime]], now: datetime
    ) -> dict[StepKey, datetime]:
        """Return the steps with due enrollments, unless their sequence is paused."""
        paused = {name for name, known in self.catalog.sequences.items() if known.paused}
        return {step_key: at for step_key, at in wakes if at <= now and step_key[0] not in paused}

    async def reload(self, names: Iterable[str] | None = None) -> bool:
        """Read the definitions of these sequences that have changed, and of those that were
        requested; by default, of all. Return whether any have changed, or remain to be read.
        """
        self.catalog.mark_for_reload(names)
        self._changed.update(await self._read_definitions())
        # what is reported from now on is read the next time
        changed, self._changed = self._changed, set()
        fixed, self._fixed = self._fixed, set()
        if changed:
            self._report_braked()
        try:
            if changed or fixed:
                async with connections.borrow(self._env.pool) as connection:
                    await self.catalog.revive(connection, fixed)
                    names = changed | {sequence for sequence, _ in fixed}
                    self._report_wakes(await first_wakes_of(connection, names), is_later=True)
        except BaseException:
            self._changed |= changed
            self._fixed |= fixed
            raise
        return bool(changed) or self.catalog.is_due

    async def _read_definitions(self) -> list[str]:
        """Read the wanted definitions, and request what remains to be read."""
        changed = await self.catalog.reload()
        self.executors.forget_waiting(changed)
        if self.catalog.is_due:
            self._reloads.request()
        return changed

    def _report_braked(self) -> None:
        sequences = self.catalog.sequences
        self._env.metrics.braked(name for name, known in sequences.items() if known.is_stopped)

    def _report_invalid(self, step_key: StepKey) -> None:
        """Resume enrollments that have failed by a definition that had been replaced meanwhile:
        its successor has resumed only those whose failures were committed before.
        """
        known = self._moves.invalid.pop(step_key, None)
        if self.catalog.step(step_key) is not known:
            self._fixed.add(step_key)
            self._reloads.request()
        elif known is None:
            self.catalog.request_unknown(step_key[0])

    def _reschedule(self, step_key: StepKey) -> None:
        self._rescheduling.start(step_key)

    # --- errors

    def _outage_changed(self, executor: Executor) -> None:
        self._outages.report(executor)
        if executor.outage is not None:
            counting = partial(self._outages.count, [executor])
            self._background.spawn(self._background.until_done(counting))

    async def _extend_leases(self) -> None:
        await self._leases.extend(self._quarantine.with_result)

    async def _try_quarantined(self, *, results_only: bool = False) -> None:
        """Retry quarantined enrollments that are due; or `results_only`, whether or not they are
        due.
        """
        async with self._trying:
            now = math.inf if results_only else asyncio.get_running_loop().time()
            for step_key, due in self._quarantine.due(now).items():
                results = [one.result for one in due if one.result is not None]
                left, common = await self._results.write_in_parts(results)
                kept = {leased.fence for leased, _ in left}
                # also if nothing more can be written: those that were are not tried again
                self._quarantine.release(
                    one for one in due if one.result and one.result[0].fence not in kept
                )
                if common is not None:
                    raise common
                others = [] if results_only else [one for one in due if one.result is None]
                sequence = self.catalog.sequences.get(step_key[0])
                if others and sequence is not None:
                    ids = [one.id for one in others]
                    await self._claims.claim_some(step_key, sequence.revision, ids)
                self._quarantine.release(others)
                if others:  # one that another session has locked was skipped
                    self._push_now(step_key)
