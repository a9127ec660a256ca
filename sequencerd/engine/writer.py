"""What decisions mean: rows that are written, and side effects that begin when they are.

Whoever comes to a side effect or a lookup is leased in the transaction that brings it there, and
handed to its executor after the commit.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import NamedTuple, assert_never

import asyncpg
from structlog.typing import FilteringBoundLogger

from sequencerd.core import model
from sequencerd.core.backoff import Pauses
from sequencerd.core.model import (
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
    NotStarted,
    Result,
    Suppressed,
    Task,
    Wait,
)
from sequencerd.definitions.compiler import Runners
from sequencerd.engine.clock import Clock
from sequencerd.engine.executors import TICK, Executor, ExecutorKey, Leased, Owner, Work
from sequencerd.engine.jumps import Jump, decide
from sequencerd.service.metrics import Metrics
from sequencerd.settings import Engine as Settings
from sequencerd.storage import store
from sequencerd.storage.store import LOST_ERRORS, TRANSIENT_ERRORS, Row, StepKey, Written

PAUSE = 1.0  # seconds after a transient error


class Gone(NamedTuple):
    """Where somebody has gone in a batch: whoever was in the same position is written likewise."""

    ids: Sequence[list[int]]  # of its row and its events, to which others are added
    at: Enrollment
    execute: Execute | None


@dataclass(slots=True)
class Batch(Written):
    """What one transaction writes, and what follows from it."""

    leased: list[Leased] = field(default_factory=list)
    jumps: list[Jump] = field(default_factory=list)  # into other sequences, yet to be decided
    gone: dict[tuple[object, ...], Gone] = field(default_factory=dict)
    elsewhere: set[StepKey] = field(default_factory=set)  # steps that other daemons go on with


class Writer:
    """Writes batches of advanced enrollments, and owns the executors of what they come to.

    `owner` gets the results of the executors, `push` is told when to look at a step again.
    """

    def __init__(
        self,
        pool: asyncpg.Pool,
        runners: Runners,
        lookups: Callable[[str], Work],
        owner: Owner,
        push: Callable[[StepKey, datetime], None],
        *,
        clock: Clock,
        settings: Settings,
        name: str,
        log: FilteringBoundLogger,
        metrics: Metrics,
        pauses: Pauses,
    ) -> None:
        self._owner = owner
        self._metrics = metrics
        self._pauses = pauses
        self.executors: dict[ExecutorKey, Executor] = {
            type_: self._new_executor(type_, runner) for type_, runner in runners.items()
        }
        self.retired: set[Executor] = set()
        self.leased: dict[int, Leased] = {}
        self._doubtful: set[int] = set()  # perhaps leased, by a commit whose answer was lost
        self.stopping = False
        self._lookups = lookups
        self._pool = pool
        self._push = push
        self._clock = clock
        self._lease_time = timedelta(seconds=settings.lease)
        self._name = name
        self._log = log

    def _new_executor(self, key: ExecutorKey, runner: Work) -> Executor:
        return Executor(key, runner, self._owner, self._metrics, self._pauses)

    def use(self, runners: Runners, lookups: Callable[[str], Work]) -> set[Executor]:
        """Takes over other runners and lookups. Returns the executors of those that are replaced:
        what is in flight there ends as it has begun.
        """
        before, self.executors = self.executors, {}
        for type_, runner in runners.items():
            executor = before.get(type_)
            if executor is None or executor.runner is not runner:
                executor = self._new_executor(type_, runner)
            self.executors[type_] = executor
        if lookups == self._lookups:
            self.executors |= {
                key: executor for key, executor in before.items() if executor.is_lookup
            }
        self._lookups = lookups
        replaced = set(before.values()) - set(self.executors.values())
        for executor in replaced:
            for step_key in executor.waiting:
                self._push(step_key, self._clock.now())
            executor.waiting.clear()
        self.retired |= replaced
        return replaced

    def add(
        self, batch: Batch, before: Enrollment, advanced: Advanced, now: datetime
    ) -> Gone | None:
        """What is to be written of one enrollment; a side effect gets its lease. Returns what may
        be done with all who are in the same position.
        """
        at, decision, events = advanced.enrollment, advanced.decision, advanced.events
        status, wake_at = "active", now
        is_shared = advanced.is_shared
        execute: Execute | None = None
        match decision:
            case Wait(wake_at, elsewhere):
                if elsewhere:
                    batch.elsewhere.add((at.sequence, at.step))
            case Execute(step):
                leased = at.leased_to(self._name)
                try:
                    if self._has_free_slot(step.type, at):
                        self._execute(batch, leased, decision)
                        at, execute = leased, decision
                        wake_at = now + self._lease_time
                    else:
                        # there may be, for the next
                        is_shared, wake_at = False, _due_since(before, at, now)
                except EvaluationError as error:
                    unable = failed(at, now, str(error), error.failure)
                    events += unable.events
                    decision = unable.decision
            case LookUp(step, lookup):
                is_shared = False
                key = ("lookup", lookup)
                if self._has_free_slot(key, at):
                    at = at._replace(leased_by=self._name, leases=at.leases + 1)
                    task = Task(at.key, {"subject": at.subject})
                    self._lease(batch, Leased(at, step, self.executors[key], None, task))
                    wake_at = now + self._lease_time
            case End(status):
                pass
            case Fail():
                pass
            case _:
                assert_never(decision)
        failure = decision if isinstance(decision, Fail) else None
        if failure:
            is_shared = False  # each is told in the log
            status = "failed"
            self._tell(at, failure)
        if advanced.data:
            batch.data[at.id] = advanced.data
        if at.goals != before.goals:
            batch.goals_met[at.id] = at.goals
            is_shared = False
        row = Row(
            at.sequence,
            at.step,
            status,
            wake_at if status == "active" else None,
            at.entered_at,
            at.visit,
            at.attempt,
            at.leases,
            at.retry_at,
            at.leased_by,
            failure.failure if failure else None,
            failure.message if failure else at.last_error,
            tuple(at.executed),
            decision.expires_at if isinstance(decision, Execute) else None,
            decision.waits_until if isinstance(decision, Wait) else None,
        )
        ids = [batch.rows.setdefault(row, [])]
        ids += [batch.events.setdefault(event, []) for event in events]
        for one in ids:
            one.append(at.id)
        return Gone(ids, at, execute) if is_shared else None

    def _tell(self, at: Enrollment, failure: Fail) -> None:
        log = self._log.bind(enrollment=at.id, sequence=at.sequence, step=at.step)
        log.warning("enrollment failed", failure=failure.failure)
        log.debug("enrollment failed", error=failure.message)

    def follow(self, batch: Batch, enrollment: Enrollment, gone: Gone) -> bool:
        """The same for one who was in the position of another before. False, and nothing is done,
        where `add` has to see to it.
        """
        if gone.execute is not None:
            if not self._has_free_slot(gone.execute.step.type, gone.at):
                return False
            try:
                self._execute(batch, enrollment.in_state_of(gone.at), gone.execute)
            except EvaluationError:
                return False
        for ids in gone.ids:
            ids.append(enrollment.id)
        return True

    def _execute(self, batch: Batch, leased: Enrollment, execute: Execute) -> None:
        """Leases one. Raises EvaluationError for data that can't be read."""
        step, effect, timezone, external, revision, *ends = execute
        assert leased.entered_at is not None
        view = model.view(leased, timezone, leased.entered_at, external)
        expires = None
        if end := min((at for at in ends if at is not None), default=None):
            seconds = self._clock.seconds_until(end) + TICK
            expires = asyncio.get_running_loop().time() + seconds
        task = Task(leased.key, view, expires)
        executor = self.executors[step.type]
        self._lease(batch, Leased(leased, step, executor, effect.program, task, revision))

    def _has_free_slot(self, key: ExecutorKey, at: Enrollment) -> bool:
        """Whether one more can be begun; else its step waits for the executor."""
        if isinstance(key, tuple) and key not in self.executors:
            self.executors[key] = self._new_executor(key, self._lookups(key[1]))
        executor = self.executors[key]
        if not self.stopping and executor.free_slots > 0:
            return True
        executor.waiting.add((at.sequence, at.step))
        return False

    def _lease(self, batch: Batch, leased: Leased) -> None:
        leased.executor.reserve(1)
        batch.leased.append(leased)

    @asynccontextmanager
    async def writing(self, batch: Batch) -> AsyncIterator[asyncpg.Connection]:
        """A transaction that writes a batch; side effects begin after its commit.

        Of a commit whose answer was lost, the rows tell whether it has happened.
        """
        try:
            async with store.connection(self._pool) as connection, store.transaction(connection):
                yield connection
        except LOST_ERRORS:
            ids = {one.enrollment.id for one in batch.leased}
            self._doubtful |= ids
            try:
                held = await self.held(batch.leased)
            finally:
                self._doubtful -= ids
            self._begin(one for one in batch.leased if one.fence in held)
            self._give_back(one for one in batch.leased if one.fence not in held)
            raise
        except BaseException:
            self._give_back(batch.leased)
            raise
        self._begin(batch.leased)
        self._remember_wakes(batch.rows)
        failures = [
            (row.sequence, row.step, row.failure)
            for row, ids in batch.rows.items()
            if row.failure
            for _ in ids
        ]
        self._metrics.written(sum(map(len, batch.rows.values())), batch.events, failures)

    async def held(self, leased: Iterable[Leased]) -> set[Fence]:
        """What is leased to us in the database. Asks until it answers."""
        ids = [one.enrollment.id for one in leased]
        while ids:
            try:
                async with store.connection(self._pool) as connection:
                    return await store.fences(connection, ids)
            except TRANSIENT_ERRORS:
                await asyncio.sleep(PAUSE)
        return set()

    async def write(self, connection: asyncpg.Connection, batch: Batch, now: datetime) -> None:
        """Writes a batch, once it is decided who may jump where."""
        for jumped, advanced in await decide(connection, batch.jumps):
            self.add(batch, jumped, advanced, now)
        await store.write(connection, batch, now)
        if batch.elsewhere:
            await store.notify_due(connection, batch.elsewhere)

    def _give_back(self, leased: Iterable[Leased]) -> None:
        for one in leased:
            one.executor.reserve(-1)

    def _begin(self, leased: Iterable[Leased]) -> None:
        """Starts side effects, by step."""
        by_step: dict[tuple[Executor, str, str], list[Leased]] = {}
        for one in leased:
            self.leased[one.enrollment.id] = one
            key = (one.executor, one.enrollment.sequence, one.step.name)
            by_step.setdefault(key, []).append(one)
        for (executor, _, _), group in by_step.items():
            executor.start(group)

    def _remember_wakes(self, rows: Iterable[Row]) -> None:
        """When to look again at the steps of those who wait."""
        wakes: dict[StepKey, datetime] = {}
        for row in rows:
            if row.wake_at is not None and row.leased_by is None:
                step_key = (row.sequence, row.step)
                if step_key not in wakes or row.wake_at < wakes[step_key]:
                    wakes[step_key] = row.wake_at
        for step_key, at in wakes.items():
            if not self.waits(step_key):
                self._push(step_key, at)

    def waits(self, step_key: StepKey) -> bool:
        """Whether a step waits for room in a executor."""
        return any(step_key in executor.waiting for executor in self.executors.values())

    @property
    def known(self) -> set[int]:
        """The enrollments that are leased, or perhaps leased, and in memory."""
        return self.leased.keys() | self._doubtful

    def forget(self, leased: Iterable[Leased]) -> None:
        """What is no longer ours, unless it was leased anew meanwhile."""
        for one in leased:
            if self.leased.get(one.enrollment.id) is one:
                del self.leased[one.enrollment.id]

    async def extend_leases(self, ids: Sequence[int]) -> None:
        """Keeps some of what this daemon has leased from falling due."""
        until = self._clock.now() + self._lease_time
        async with store.connection(self._pool) as connection:
            await store.extend_leases(connection, ids, self._name, until)


def _due_since(before: Enrollment, at: Enrollment, now: datetime) -> datetime:
    """Who finds no room keeps the step_key in the queue."""
    if before.wake_at is None or before.visit != at.visit:
        return now
    return min(before.wake_at, now)


def of_lookup(result: Result) -> Result:
    """A executor's own failure, a time-out or a stop, as a lookup's."""
    return Found(None, result.message) if isinstance(result, Failed) else result


def failed(enrollment: Enrollment, now: datetime, message: str, failure: str = "error") -> Advanced:
    event = Event(
        now,
        enrollment.sequence,
        enrollment.step,
        enrollment.visit,
        "failed",
        model.printable(message),
    )
    decision: Decision = Fail(failure, model.printable(message))
    return Advanced(enrollment._replace(leased_by=None), decision, (event,))


def failure_code(error: Exception) -> str:
    """Of an enrollment that can't be written: perhaps its subject has entered meanwhile."""
    entered = getattr(error, "constraint_name", None) == "one_entry"
    return "already_enrolled" if entered else "error"


def late(leased: Leased, result: Result, now: datetime) -> Event:
    """The result of a side effect whose enrollment has gone another way meanwhile."""
    match result:
        case Answer(action, message):
            text = f"{action}: {message}" if message else str(action)
        case Suppressed(message):
            text = f"suppressed: {message}"
        case Failed(message):
            text = f"failed: {message}"
        case NotStarted():
            text = "not started"
        case Found():
            text = "found"
        case _:
            assert_never(result)
    was = leased.enrollment
    return Event(
        now,
        was.sequence,
        was.step,
        was.visit,
        "stale_result",
        model.printable(f"attempt {was.attempt} came too late to move it: {text}"),
        leased.revision,
    )
