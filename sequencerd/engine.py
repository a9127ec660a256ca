"""The engine: claim, advance, write, execute, write.

The heap holds the next wake time of each step where somebody is. When one is due, its enrollments
are claimed, advanced in memory and written, in one transaction. Those that came to a side effect
are leased in that same write and handed to the lane of their runner. What runners answer flows to
one writer, which takes all there is, locks the rows, advances them again and writes. No transaction
is open while a runner works.

All of it runs in one event loop: state changes between awaits only, so it needs no locks.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import date, datetime, timedelta
from typing import assert_never

import asyncpg
from structlog.typing import FilteringBoundLogger

from sequencerd import store
from sequencerd.clock import Clock
from sequencerd.core import model
from sequencerd.core.advance import advance
from sequencerd.core.heap import Heap
from sequencerd.core.model import (
    NEVER,
    Advanced,
    Answer,
    Decision,
    End,
    Enrollment,
    EvaluationError,
    Event,
    Execute,
    Fail,
    Failed,
    Fence,
    Found,
    LookUp,
    Result,
    SideEffect,
    Step,
    Task,
    Wait,
)
from sequencerd.definitions import Runners, from_rows, problems
from sequencerd.lanes import Lane, LaneKey, Leased, Work
from sequencerd.listener import Changed, Due, Look, Message
from sequencerd.settings import Engine as Settings
from sequencerd.store import Place, Row

PASSING_ERRORS = (
    OSError,
    TimeoutError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,  # a connection that is cut in the middle of an answer
    asyncpg.PostgresConnectionError,
    asyncpg.OperatorInterventionError,
    asyncpg.InsufficientResourcesError,
    asyncpg.TransactionRollbackError,
    asyncpg.InvalidTransactionStateError,
)
"""Of the database: the same work is done again a little later."""

POISON = (asyncpg.PostgresError, ValueError, OverflowError)
"""What a value that cannot be written raises."""

WRITERS = 3  # one computes while the others wait for the database
BEHIND = 4  # batches of results that wait to be written
MAX_SLEEP = 10.0  # seconds: the watchdog wants to see that the loop turns
PAUSE = 1.0  # seconds after a passing error
LOCKED_PAUSE = 0.2  # seconds until a row that somebody else has locked is tried again


@dataclass(slots=True)
class _Batch:
    """What one transaction writes, and what follows from it."""

    rows: list[Row] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    leased: list[Leased] = field(default_factory=list)


class Engine:
    """Moves enrollments until it is stopped; side effects in flight are finished first."""

    def __init__(
        self,
        pool: asyncpg.Pool,
        runners: Runners,
        lookups: Callable[[str], Work],
        *,
        clock: Clock,
        settings: Settings,
        name: str,
        log: FilteringBoundLogger,
        turned: Callable[[], None] = lambda: None,
    ) -> None:
        """`turned` is called in every turn of the loop, at least each MAX_SLEEP seconds."""
        self.definitions: dict[str, model.Sequence] = {}
        self._pool = pool
        self._runners = runners
        self._clock = clock
        self._settings = settings
        self._name = name
        self._log = log
        self._turned = turned
        self._heap: Heap[Place] = Heap()
        self._lookups = lookups
        self._lanes: dict[LaneKey, Lane] = {
            type_: Lane(runner, self._report) for type_, runner in runners.items()
        }
        self._leased: dict[int, Leased] = {}
        self._finished: list[tuple[Leased, Result]] = []
        self._has_finished = asyncio.Event()
        self._wake = asyncio.Event()
        self._stopping = False
        self._loading = asyncio.Lock()
        self._busy: set[Place] = set()
        self._again: set[Place] = set()
        self._retiming: set[Place] = set()
        self._partitions_made: date | None = None
        self._background: set[asyncio.Task[None]] = set()

    # --- the loop

    async def run(self) -> None:
        """Works until `stop`. Raises what can't be mended by trying again."""
        async with asyncio.TaskGroup() as group:
            helpers = [
                group.create_task(self._every(self._settings.sweep, self.sweep)),
                group.create_task(self._every(self._settings.lease / 3, self._extend_leases)),
                *(group.create_task(self._write_results()) for _ in range(WRITERS)),
            ]
            await self._schedule()
            await self._wind_down()
            for helper in helpers:
                helper.cancel()

    def stop(self) -> None:
        """Claims nothing more; `run` returns when what is in flight is written."""
        self._stopping = True
        self._wake.set()

    def receive(self, message: Message) -> None:
        """What the listener hears."""
        match message:
            case Due(due=place):
                self._push(place, self._clock.now())
            case Changed():
                self._spawn(self._until_done(self.reload))
            case Look():
                self._spawn(self._until_done(lambda: self._look(message)))
            case _:
                assert_never(message)

    async def _schedule(self) -> None:
        while not self._stopping:
            # cleared before looking: what is set while we look is not lost
            self._wake.clear()
            self._turned()
            for place in self._heap.pop_due(self._clock.now()):
                self._start(place)
            next_at = self._heap.next_at()
            seconds = MAX_SLEEP if next_at is None else self._clock.seconds_until(next_at)
            with suppress(TimeoutError):
                async with asyncio.timeout(min(max(seconds, 0.0), MAX_SLEEP)):
                    await self._wake.wait()

    def _start(self, place: Place) -> None:
        """Works on a step, once at a time."""
        if place in self._busy:
            self._again.add(place)
        else:
            self._busy.add(place)
            self._spawn(self._work(place))

    async def _work(self, place: Place) -> None:
        try:
            while not self._stopping and await self._claim(place):
                pass
        except PASSING_ERRORS as error:
            self._log.warning("database error, work is done again", step=place, error=str(error))
            self._push(place, self._clock.now() + timedelta(seconds=PAUSE))
        except Exception:
            # one step must not take the others down; the sweep comes back to it
            self._log.exception("step could not be worked on", step=place)
        finally:
            self._busy.discard(place)
            if place in self._again:
                self._again.discard(place)
                self._push(place, self._clock.now())

    def _push(self, place: Place, at: datetime) -> None:
        if at < NEVER and self._heap.push(place, at):
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
            except PASSING_ERRORS as error:
                self._log.warning("database error", error=str(error))

    async def _until_done(self, work: Callable[[], Awaitable[None]]) -> None:
        while not self._stopping:
            try:
                await work()
            except PASSING_ERRORS as error:
                self._log.warning("database error, tried again", error=str(error))
                await asyncio.sleep(PAUSE)
            except Exception:
                self._log.exception("internal error")  # the sweep comes back to it
                return
            else:
                return

    async def _wind_down(self) -> None:
        """Waits for what is in flight, and writes it."""
        if self._leased:
            self._log.info("stopping", in_flight=len(self._leased))
        timeout = self._settings.stop_timeout
        if self._background:
            _, late = await asyncio.wait(self._background, timeout=timeout)
            for work in late:
                work.cancel()
        await asyncio.gather(*(lane.stop(timeout) for lane in self._lanes.values()))
        with suppress(TimeoutError):  # the leases run out if the database is away
            async with asyncio.timeout(timeout + PAUSE):
                while self._leased:
                    self._has_finished.set()
                    await asyncio.sleep(0.01)

    # --- definitions, and what is due

    async def sweep(self) -> None:
        """Finds whatever no notification told: at the start, and regularly after it."""
        async with self._pool.acquire() as connection:
            off = self._clock.measured(await store.server_time(connection))
            if abs(off) > timedelta(seconds=1):
                self._log.warning("the clocks have drifted", by=off.total_seconds())
            today = self._clock.now().date()
            if today != self._partitions_made:
                await store.add_event_partitions(connection)
                self._partitions_made = today
        await self.reload()
        await self.rebuild()

    async def rebuild(self) -> None:
        """Fills the heap from the index. Entries that are too early cost one empty claim."""
        async with self._pool.acquire() as connection:
            wakes = await store.first_wakes(connection)
        for place, at in wakes:
            self._push(place, at)

    async def reload(self) -> None:
        """Reads the definitions that have changed, and looks at those whom it concerns."""
        async with self._loading, self._pool.acquire() as connection:
            revisions = await store.revisions(connection)
            for name in self.definitions.keys() - revisions.keys():
                del self.definitions[name]
            changed = [
                name
                for name, revision in revisions.items()
                if name not in self.definitions or self.definitions[name].revision != revision
            ]
            if not changed:
                return
            await self._load(connection, changed)
        await self.rebuild()

    async def _load(self, connection: asyncpg.Connection, names: Sequence[str]) -> None:
        sequence_rows, step_rows = await store.definitions(connection, names)
        found: dict[Place, str | None] = {}
        for row in sequence_rows:
            steps = [step for step in step_rows if step["sequence"] == row["name"]]
            sequence = from_rows(row, steps, self._runners)
            self.definitions[sequence.name] = sequence
            found |= problems(sequence)
        known = {(row["sequence"], row["name"]): row["problem"] for row in step_rows}
        if news := {place: text for place, text in found.items() if text != known[place]}:
            await store.set_problems(connection, news)
            for place, text in news.items():
                if text is not None:
                    self._log.error(
                        "step has a problem", sequence=place[0], step=place[1], problem=text
                    )
        mended = [place for place, text in found.items() if text is None]
        if count := await store.revive(connection, mended, self._clock.now()):
            self._log.info("failed enrollments go on, their steps are mended", count=count)
        for row in step_rows:
            place = (row["sequence"], row["name"])
            if row["retime"] and place not in self._retiming:
                self._retiming.add(place)
                self._spawn(self._retime(place))

    async def _retime(self, place: Place) -> None:
        """Looks at everybody who waits at a changed step, a batch at a time."""
        size = self._settings.batch

        async def batch_by_batch() -> None:
            count = size
            while count >= size and not self._stopping:
                now = self._clock.now()
                async with self._pool.acquire() as connection:
                    count = await store.retime(connection, place, now, size)
                self._push(place, now)

        try:
            await self._until_done(batch_by_batch)
        finally:
            self._retiming.discard(place)

    async def _look(self, message: Look) -> None:
        """Looks at those who wait, as an application asked by NOTIFY."""
        size = self._settings.batch
        now = self._clock.now()
        count = size
        while count >= size and not self._stopping:
            async with self._pool.acquire() as connection:
                places = await store.look_again(connection, now, size, **message.model_dump())
            count = len(places)
            for place in set(places):
                self._push(place, now)

    # --- claim, advance, write

    async def _claim(self, place: Place) -> bool:
        """Moves the due enrollments of a step, as many as fit. Whether there may be more."""
        if place[0] not in self.definitions:
            await self.reload()
        sequence = self.definitions.get(place[0])
        if sequence is None or sequence.paused or self._waits(place):
            return False
        limit = self._settings.batch
        if lane := self._lane(sequence.steps.get(place[1])):
            limit = 0 if self._is_behind else min(limit, lane.room)
            if limit <= 0:
                lane.waiting.add(place)
                return False
        try:
            count = await self._claim_batch(place, sequence.revision, limit)
        except PASSING_ERRORS:
            raise
        except POISON as error:
            self._log.warning("batch is done one by one", step=place, error=str(error))
            limit = 1
            count = await self._claim_batch(place, sequence.revision, limit, alone=True)
        if count == limit:
            return True
        if count == 0:
            await self.reload()  # nothing is claimed under a definition that has changed
        return False

    async def _claim_batch(
        self, place: Place, revision: int, limit: int, *, alone: bool = False
    ) -> int:
        now = self._clock.now()
        batch = _Batch()
        async with self._writing(batch) as connection:
            claimed = await store.claim(connection, place, now, revision, limit)
            for enrollment in claimed:
                self._add(batch, enrollment, self._advance(enrollment, now), now)
            await self._write(connection, batch, claimed, now, alone=alone)
            if len(claimed) < limit:
                next_at = await store.next_wake(connection, place, now)
                self._push(place, next_at or NEVER)
        return len(claimed)

    def _advance(
        self, enrollment: Enrollment, now: datetime, result: Result | None = None
    ) -> Advanced:
        jitter = random.random()  # noqa: S311 - spreads load, guards nothing
        try:
            return advance(self.definitions, enrollment, now, result, jitter)
        except Exception as error:
            self._log.exception("enrollment could not be evaluated", enrollment=enrollment.id)
            return _failed(enrollment, now, f"internal error: {type(error).__name__}: {error}")

    def _add(self, batch: _Batch, before: Enrollment, advanced: Advanced, now: datetime) -> None:
        """What is to be written of one enrollment; a side effect gets its lease."""
        at, decision = advanced.enrollment, advanced.decision
        events = advanced.events
        status, wake_at = "active", now
        match decision:
            case Wait(until):
                wake_at = until
            case Execute(step, effect, timezone, external):
                if self._has_room(step.type, at):
                    leased = at._replace(
                        attempt=at.attempt + 1, leased_by=self._name, retry_at=None
                    )
                    try:
                        view = model.view(leased, timezone, leased.entered_at or now, external)
                    except EvaluationError as error:
                        failed = _failed(at, now, str(error), error.failure)
                        events += failed.events
                        decision = failed.decision
                    else:
                        at = leased
                        task = Task(at.key, view)
                        self._lease(batch, Leased(at, step, step.type, effect.program, task))
                        wake_at = now + timedelta(seconds=self._settings.lease)
            case LookUp(step, lookup):
                key = ("lookup", lookup)
                if self._has_room(key, at):
                    at = at._replace(leased_by=self._name)
                    task = Task(at.key, {"subject": at.subject})
                    self._lease(batch, Leased(at, step, key, None, task))
                    wake_at = now + timedelta(seconds=self._settings.lease)
            case End(status):
                pass
            case Fail():
                pass
            case _:
                assert_never(decision)
        failure = decision if isinstance(decision, Fail) else None
        if failure:
            status = "failed"
            self._log.warning(
                "enrollment failed",
                enrollment=at.id,
                sequence=at.sequence,
                step=at.step,
                failure=failure.failure,
                error=failure.message,
            )
        batch.events.extend(events)
        batch.rows.append(
            Row(
                at,
                status,
                wake_at if status == "active" else None,
                failure.failure if failure else None,
                failure.message if failure else _last_error(events),
                goals_changed=at.goals_met != before.goals_met,
                data=advanced.data,
            )
        )

    def _has_room(self, key: LaneKey, at: Enrollment) -> bool:
        """Whether one more can be begun; else its step waits for the lane."""
        if isinstance(key, tuple) and key not in self._lanes:
            self._lanes[key] = Lane(self._lookups(key[1]), self._report)
        lane = self._lanes[key]
        if not self._stopping and lane.room > 0:
            return True
        lane.waiting.add((at.sequence, at.step))
        return False

    def _lease(self, batch: _Batch, leased: Leased) -> None:
        self._lanes[leased.lane].take(1)
        batch.leased.append(leased)

    @asynccontextmanager
    async def _writing(self, batch: _Batch) -> AsyncIterator[asyncpg.Connection]:
        """A transaction that writes a batch; side effects begin after its commit.

        Of a commit whose answer was lost, the rows tell whether it has happened.
        """
        try:
            async with self._pool.acquire() as connection, connection.transaction():
                yield connection
        except PASSING_ERRORS:
            held = await self._held(batch.leased)
            self._begin(one for one in batch.leased if one.fence in held)
            self._give_back(one for one in batch.leased if one.fence not in held)
            raise
        except BaseException:
            self._give_back(batch.leased)
            raise
        self._begin(batch.leased)
        self._remember_wakes(batch.rows)

    async def _held(self, leased: Iterable[Leased]) -> set[Fence]:
        """What is leased to us in the database. Asks until it answers."""
        ids = [one.enrollment.id for one in leased]
        while ids:
            try:
                async with self._pool.acquire() as connection:
                    return await store.fences(connection, ids)
            except PASSING_ERRORS:
                await asyncio.sleep(PAUSE)
        return set()

    async def _write(
        self,
        connection: asyncpg.Connection,
        batch: _Batch,
        before: Iterable[Enrollment],
        now: datetime,
        *,
        alone: bool,
    ) -> None:
        """Writes a batch. One that is `alone` and can't be written fails in the database's words
        instead.
        """
        if not alone:
            await store.write(connection, batch.rows, batch.events, now)
            return
        try:
            async with connection.transaction():
                await store.write(connection, batch.rows, batch.events, now)
        except PASSING_ERRORS:
            raise
        except POISON as error:
            self._give_back(batch.leased)
            batch.rows, batch.events, batch.leased = [], [], []
            for enrollment in before:
                text = f"it cannot be written: {error}"
                self._add(batch, enrollment, _failed(enrollment, now, text), now)
            await store.write(connection, batch.rows, batch.events, now)

    def _give_back(self, leased: Iterable[Leased]) -> None:
        for one in leased:
            self._lanes[one.lane].take(-1)

    def _begin(self, leased: Iterable[Leased]) -> None:
        """Starts side effects, by step."""
        by_step: dict[tuple[LaneKey, str, str], list[Leased]] = {}
        for one in leased:
            self._leased[one.enrollment.id] = one
            key = (one.lane, one.enrollment.sequence, one.step.name)
            by_step.setdefault(key, []).append(one)
        for (lane, _, _), group in by_step.items():
            self._lanes[lane].start(group)

    def _remember_wakes(self, rows: Iterable[Row]) -> None:
        """When to look again at the steps of those who wait."""
        wakes: dict[Place, datetime] = {}
        for row in rows:
            if row.wake_at is not None and row.enrollment.leased_by is None:
                place = (row.enrollment.sequence, row.enrollment.step)
                if place not in wakes or row.wake_at < wakes[place]:
                    wakes[place] = row.wake_at
        for place, at in wakes.items():
            if not self._waits(place):
                self._push(place, at)

    def _waits(self, place: Place) -> bool:
        """Whether a step waits for room in a lane."""
        return any(place in lane.waiting for lane in self._lanes.values())

    def _lane(self, step: Step | None) -> Lane | None:
        return self._lanes[step.type] if step and isinstance(step.behaviour, SideEffect) else None

    # --- results

    def _report(self, results: Sequence[tuple[Leased, Result]]) -> None:
        """From the lanes: side effects have ended."""
        self._finished.extend(results)
        self._has_finished.set()
        self._call_waiting(self._lanes[results[0][0].lane])

    @property
    def _is_behind(self) -> bool:
        """Whether so much waits to be written that no more side effects should be begun."""
        return len(self._finished) >= BEHIND * self._settings.batch

    def _call_waiting(self, lane: Lane) -> None:
        """Claims again for a lane that has room again."""
        if lane.waiting and lane.is_roomy and not self._is_behind:
            for place in lane.waiting:
                self._push(place, self._clock.now())
            lane.waiting.clear()

    async def _write_results(self) -> None:
        while True:
            await self._has_finished.wait()
            self._has_finished.clear()
            while self._finished:
                size = self._settings.batch
                was_behind = self._is_behind
                batch, self._finished = self._finished[:size], self._finished[size:]
                if was_behind:
                    for lane in self._lanes.values():
                        self._call_waiting(lane)
                try:
                    await self._settle_all(batch)
                except PASSING_ERRORS as error:
                    self._log.warning("results wait for the database", error=str(error))
                    await asyncio.sleep(PAUSE)
                    # what is not held any more was written, only the answer was lost
                    held = await self._held(leased for leased, _ in batch)
                    self._forget(leased for leased, _ in batch if leased.fence not in held)
                    again = [one for one in batch if one[0].fence in held]
                    self._finished = [*again, *self._finished]

    async def _settle_all(self, batch: Sequence[tuple[Leased, Result]]) -> None:
        try:
            await self._settle(batch)
        except PASSING_ERRORS:
            raise
        except POISON as error:
            self._log.warning("results are written one by one", error=str(error))
            for one in batch:
                await self._settle([one], alone=True)

    async def _settle(
        self, results: Sequence[tuple[Leased, Result]], *, alone: bool = False
    ) -> None:
        """Moves enrollments on by the results of their side effects, if they are still theirs."""
        now = self._clock.now()
        ids = sorted({leased.enrollment.id for leased, _ in results})
        batch, locked = _Batch(), []
        async with self._writing(batch) as connection:
            rows = await store.lock(connection, ids)
            missing = [id_ for id_ in ids if id_ not in rows]
            exist = await store.existing(connection, missing) if missing else set()
            before = []
            for leased, result in results:
                id_ = leased.enrollment.id
                if id_ in exist:
                    locked.append((leased, result))
                elif id_ not in rows:
                    self._log.warning("enrollment was deleted", enrollment=id_)
                elif rows[id_].fence == leased.fence:
                    before.append(rows[id_])
                    found = _of_lookup(result) if isinstance(leased.lane, tuple) else result
                    self._add(batch, rows[id_], self._advance(rows[id_], now, found), now)
                elif isinstance(leased.lane, str):
                    batch.events.append(_late(leased.enrollment, result, now))
            await self._write(connection, batch, before, now, alone=alone)
        wait = {leased.fence for leased, _ in locked}
        self._forget(leased for leased, _ in results if leased.fence not in wait)
        if locked:
            asyncio.get_running_loop().call_later(LOCKED_PAUSE, self._try_again, locked)

    def _forget(self, leased: Iterable[Leased]) -> None:
        """What is no longer ours, unless it was leased anew meanwhile."""
        for one in leased:
            if self._leased.get(one.enrollment.id) is one:
                del self._leased[one.enrollment.id]

    def _try_again(self, results: list[tuple[Leased, Result]]) -> None:
        self._finished.extend(results)
        self._has_finished.set()

    async def _extend_leases(self) -> None:
        if self._leased:
            until = self._clock.now() + timedelta(seconds=self._settings.lease)
            async with self._pool.acquire() as connection:
                await store.extend_leases(connection, list(self._leased), self._name, until)


def _of_lookup(result: Result) -> Result:
    """A lane's own failure, a time-out or a stop, as a lookup's."""
    return Found(None, result.message) if isinstance(result, Failed) else result


def _failed(
    enrollment: Enrollment, now: datetime, message: str, failure: str = "error"
) -> Advanced:
    event = Event(
        enrollment.id,
        now,
        enrollment.sequence,
        enrollment.step,
        enrollment.visit,
        "failed",
        model.printable(message),
    )
    decision: Decision = Fail(failure, model.printable(message))
    return Advanced(enrollment._replace(leased_by=None), decision, (event,))


def _late(leased: Enrollment, result: Result, now: datetime) -> Event:
    """The result of a side effect whose enrollment has gone another way meanwhile."""
    match result:
        case Answer(action, message):
            text = f"{action}: {message}" if message else str(action)
        case Failed(message):
            text = f"failed: {message}"
        case Found():
            text = "found"
        case _:
            assert_never(result)
    return Event(
        leased.id,
        now,
        leased.sequence,
        leased.step,
        leased.visit,
        "late",
        model.printable(f"attempt {leased.attempt} came too late to move it: {text}"),
    )


def _last_error(events: Iterable[Event]) -> str | None:
    """Why the last attempt failed, for who is going to try again."""
    return next((event.message for event in events if event.action == "retry"), None)
