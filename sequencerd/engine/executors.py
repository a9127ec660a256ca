"""Execute side effects: with one executor per runner and lookup, so that a slow one delays no
other.

An executor has a limited number of slots. A server that is down stops only its own executor.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from datetime import timedelta
from functools import partial
from typing import NamedTuple, Protocol

from sequencerd.core.backoff import Pauses, VisitKey
from sequencerd.core.describe import counted
from sequencerd.core.enrollment import Enrollment, Fence, StepKey
from sequencerd.core.model import Limits, Reservation, SideEffect, Step
from sequencerd.core.task import (
    Answer,
    Attribution,
    Failed,
    LookupAnswer,
    NotStarted,
    OutageCause,
    Result,
    Task,
)
from sequencerd.definitions.compiler import Runners
from sequencerd.engine.breaker import Breaker, now
from sequencerd.engine.environment import Environment
from sequencerd.runners import tracing
from sequencerd.runners.error_causes import is_exhausted
from sequencerd.runners.fields import text_of
from sequencerd.runners.protocol import NotNow
from sequencerd.service.metrics import Metrics

INTERRUPTED = Failed(
    "interrupted: the daemon stopped", retry_after=timedelta(0), fault="server", unknown=True
)

ExecutorKey = str | tuple[str, str]
"""The type of the steps, or ("lookup", its name)."""


class Executable(Protocol):
    """What an executor runs: a runner, or a lookup."""

    limits: Limits

    async def run(self, program: object, tasks: Sequence[Task]) -> Sequence[Result]:
        """Return one result for each task, in the same order."""
        ...


class Leased(NamedTuple):
    """An enrollment whose side effect or lookup this daemon executes, as written with its lease."""

    enrollment: Enrollment
    step: Step
    executor: Executor
    program: object
    task: Task
    revision: int | None = None  # the revision of the definition with which it was started
    reservations: tuple[Reservation, ...] = ()

    @property
    def fence(self) -> Fence:
        """Return the values that the row has for as long as this lease is valid."""
        return self.enrollment.fence


Finished = tuple[Leased, Result]
"""A side effect or lookup that has ended, with its result."""


class Executor:
    """Executes the side effects of one runner.

    An executor has twice as many slots as enrollments that run at the same time, so that a runner
    always has work; everything else is left to other daemons. While its server fails, it takes one
    enrollment after each pause; the others wait at their step.
    """

    def __init__(
        self,
        key: ExecutorKey,
        runner: Executable,
        *,
        finished: Callable[[Sequence[Finished]], None],
        resumed: Callable[[Executor], None],
        outage_changed: Callable[[Executor], None],
        redact: Callable[[str], str],
        metrics: Metrics,
        pauses: Pauses,
    ) -> None:
        """Make an executor. `finished` receives results. `resumed` is called when the pause of a
        failing server is over, `outage_changed` when the server fails, fails for another reason, or
        works again. `redact` removes secrets from the texts of results: a server may repeat what
        another one was sent.
        """
        self.is_lookup = isinstance(key, tuple)
        self.name = key[1] if isinstance(key, tuple) else key
        self.runner = runner
        self.waiting: set[StepKey] = set()  # steps with enrollments that found no free slot
        self._kind = "lookup" if isinstance(key, tuple) else key
        self._finished = finished
        self._redact = redact
        self._metrics = metrics
        self._capacity = 2 * runner.limits.concurrency * runner.limits.batch_size
        self._breaker = Breaker(
            self._capacity, pauses, lambda: resumed(self), lambda: outage_changed(self)
        )
        self._reserved = 0
        self._running_slots = asyncio.Semaphore(runner.limits.concurrency)
        self._queued: set[asyncio.Task[None]] = set()
        self._running: set[asyncio.Task[None]] = set()
        self._is_stopped = False

    @property
    def outage(self) -> str | None:
        """Return why the runner is down, in its server's words."""
        return self._breaker.outage

    @property
    def cause(self) -> OutageCause:
        """Return why the runner is down, as one word."""
        return self._breaker.cause

    @property
    def free_slots(self) -> int:
        """Return how many more enrollments can be leased."""
        return self._breaker.allowed - self._reserved

    @property
    def is_worth_claiming(self) -> bool:
        """Return whether enough slots are free: with few, each enrollment would cost a claim of its
        own.
        """
        allowed = self._breaker.allowed
        free = allowed - self._reserved
        return free > 0 and free * 2 >= allowed

    def reserve(self, count: int) -> None:
        """Reserve slots, or release them if negative. `start` releases them at the end."""
        self._reserved += count

    def start(self, leased: Sequence[Leased]) -> None:
        """Execute side effects of one step, in batches of the runner's size."""
        self._metrics.begun(self._kind, len(leased))
        size = self.runner.limits.batch_size
        alone: Sequence[Leased] = ()
        if size > 1 and (suspects := self._breaker.suspects(map(_key, leased))):
            alone = [one for one in leased if _key(one) in suspects]
            leased = [one for one in leased if _key(one) not in suspects]
        batches = [leased[first : first + size] for first in range(0, len(leased), size)]
        for batch in (*batches, *([one] for one in alone)):
            task = asyncio.create_task(self._execute(batch))
            task.add_done_callback(self._queued.discard)
            task.add_done_callback(self._running.discard)

    async def drained(self) -> None:
        """Wait until no slot is reserved."""
        while self._reserved:  # noqa: ASYNC110 - rare, and each lease would pay for an event
            await asyncio.sleep(0.1)

    async def stop(self, seconds: float) -> None:
        """Give back the side effects that have not started, also those leased from now on,
        wait for the others, and cancel those that take longer. Lookups have no effect: cancel them
        at once.
        """
        self._breaker.stop()
        self._is_stopped = True
        tasks = self._queued | self._running
        for task in tasks if self.is_lookup else set(self._queued):
            task.cancel()
        if tasks:
            _, overdue = await asyncio.wait(tasks, timeout=seconds)
            for task in overdue:
                task.cancel()
            if overdue:
                await asyncio.wait(overdue)

    async def _execute(self, batch: Sequence[Leased]) -> None:
        results: Sequence[Result]
        not_started = NotStarted(attempts=0 if self.is_lookup else 1)
        interrupted: Result = not_started
        started: float | None = None
        task = asyncio.current_task()
        assert task is not None
        # not before: a task that is cancelled before its first step would report nothing
        self._queued.add(task)
        try:
            if self._is_stopped:
                raise asyncio.CancelledError
            async with self._running_slots:
                self._queued.discard(task)
                self._running.add(task)
                if self._breaker.allowed > 0:
                    interrupted = not_started if self.is_lookup else INTERRUPTED
                    started = now()
                    enrollments = () if self.is_lookup else [leased.enrollment for leased in batch]
                    with tracing.executing(self._kind, enrollments) as ended:
                        results = [self._redacted(one) for one in await self._run(batch)]
                        if self.is_lookup:
                            results = [
                                LookupAnswer(None, one.message) if isinstance(one, Failed) else one
                                for one in results
                            ]
                        else:
                            results = self._breaker.judge([*map(_key, batch)], results, started)
                        ended(results)
                else:
                    results = [interrupted] * len(batch)
        except asyncio.CancelledError:
            results = [interrupted] * len(batch)
        self._reserved -= len(batch)
        seconds = None if started is None else now() - started
        self._metrics.ended(self._kind, results, seconds)
        self._finished(list(zip(batch, results, strict=True)))

    def _redacted(self, result: Result) -> Result:
        """Return a result without secrets; usually the same object, so that results are shared."""
        if isinstance(result, NotStarted):
            return result
        if result.message and (message := self._redact(result.message)) != result.message:
            result = replace(result, message=message)
        if isinstance(result, Answer | Failed) and result.undeliverable:
            found = tuple(
                one._replace(reason=self._redact(one.reason)) for one in result.undeliverable
            )
            result = replace(result, undeliverable=found)
        return result

    async def _run(self, batch: Sequence[Leased]) -> Sequence[Result]:
        """Call the runner once. Any exception is a failure of the batch."""
        timeout = self.runner.limits.timeout
        tasks = [leased.task for leased in batch]
        at = now()
        if any(task.is_late(at) for task in tasks):
            in_time = [leased for leased in batch if not leased.task.is_late(at)]
            answers = iter(await self._run(in_time) if in_time else ())
            return [NotStarted() if task.is_late(at) else next(answers) for task in tasks]
        try:
            async with asyncio.timeout(timeout):
                results = await self.runner.run(batch[0].program, tasks)
        except TimeoutError:
            text = f"no answer within {timeout:g} seconds"
            return [Failed(text, fault="unclear", unknown=True)] * len(batch)
        except NotNow as error:
            return [Failed(str(error), fault="server", asked=False)] * len(batch)
        except asyncio.CancelledError:
            raise
        except BaseException as error:  # a plug-in may raise anything
            text = f"{type(error).__name__}: {text_of(error)}"
            fault: Attribution = "server" if is_exhausted(error) else "unclear"
            return [Failed(text, fault=fault, unknown=True)] * len(batch)
        if wrong := _why_unusable(results, len(batch)):
            return [Failed(wrong, fault="unclear", unknown=True)] * len(batch)
        return results


def _why_unusable(results: object, count: int) -> str | None:
    """Return what is wrong with what a runner has returned: a plug-in may return anything."""
    if not isinstance(results, Sequence) or isinstance(results, str):
        return f"the runner returned {type(results).__name__} instead of a list of results"
    if len(results) != count:
        given, wanted = counted(len(results), "result"), counted(count, "enrollment")
        return f"the runner returned {given} for {wanted}"
    for one in results:
        if not isinstance(one, Result):
            return f"the runner returned {type(one).__name__} instead of a result"
    return None


def _key(leased: Leased) -> VisitKey:
    return leased.enrollment.id, leased.enrollment.visit


class Executors:
    """The executors of the present runners and lookups, and of those that were replaced.

    Results go to `finished`. `wake` is called for steps that waited for a free slot, unless
    `is_full` says that too many results wait to be written.
    """

    def __init__(
        self,
        env: Environment,
        runners: Runners,
        lookups: Callable[[str], Executable],
        *,
        finished: Callable[[Sequence[Finished]], None],
        is_full: Callable[[], bool],
        wake: Callable[[StepKey], None],
        outage_changed: Callable[[Executor], None],
        redact: Callable[[str], str],
        pauses: Pauses,
    ) -> None:
        self._env = env
        self.lookups = lookups
        self._finished = finished
        self._is_full = is_full
        self._wake = wake
        self._new = partial(
            Executor,
            finished=self._add_finished,
            resumed=self._resume,
            outage_changed=outage_changed,
            redact=redact,
            metrics=env.metrics,
            pauses=pauses,
        )
        self._replaced: set[Executor] = set()
        self.by_key: dict[ExecutorKey, Executor] = {
            type_: self._new(type_, runner) for type_, runner in runners.items()
        }

    def free(self, key: ExecutorKey, step_key: StepKey) -> Executor | None:
        """Return an executor with a free slot. If it has none, the step waits for one."""
        executor = self.by_key.get(key)
        if executor is None:
            assert isinstance(key, tuple)  # a lookup: its executor is made at the first request
            executor = self.by_key[key] = self._new(key, self.lookups(key[1]))
        if executor.free_slots > 0 and not self._env.stopping.is_set():
            return executor
        executor.waiting.add(step_key)
        return None

    def claimable(self, step: Step | None, most: int, claimers: int = 1) -> int:
        """Return how many enrollments of a step can be claimed at a time, at `most`. If it has a
        side effect, its free slots are divided among its `claimers`; there are none if too many
        results wait.
        """
        if step is None or not isinstance(step.behaviour, SideEffect):
            return most
        free = 0 if self._is_full() else max(self.by_key[step.type].free_slots, 0)
        # a single slot is not divided: with nothing in flight, nothing would wake the step
        return min(most, free // claimers or min(free, 1))

    def is_waited_for(self, step_key: StepKey) -> bool:
        """Return whether a step waits for a free slot."""
        return any(step_key in executor.waiting for executor in self.by_key.values())

    def waiting(self) -> set[StepKey]:
        """Return all steps that wait for a free slot."""
        return {step_key for one in self.by_key.values() for step_key in one.waiting}

    def forget_waiting(self, sequences: Iterable[str]) -> None:
        """Let no step of changed sequences wait for a slot: it may need another runner now."""
        names = {*sequences}
        for executor in self.by_key.values():
            executor.waiting = {one for one in executor.waiting if one[0] not in names}

    def use(self, runners: Runners, lookups: Callable[[str], Executable]) -> set[Executor]:
        """Use other runners and lookups from now on.

        Return the executors that are replaced: side effects in flight end there.
        """
        before, self.by_key = self.by_key, {}
        for type_, runner in runners.items():
            executor = before.get(type_)
            if executor is None or executor.runner is not runner:
                executor = self._new(type_, runner)
            self.by_key[type_] = executor
        if lookups == self.lookups:
            self.by_key |= {key: one for key, one in before.items() if one.is_lookup}
        self.lookups = lookups
        replaced = set(before.values()) - set(self.by_key.values())
        for executor in replaced:
            self._wake_waiting(executor)
        self._replaced |= replaced
        return replaced

    async def drained(self, replaced: set[Executor]) -> None:
        """Wait until nothing is in flight in the executors that `use` has replaced."""
        for executor in replaced:
            await executor.drained()
        self._replaced -= replaced

    async def stop(self, end: float) -> None:
        """Stop all executors until a time of the event loop."""
        every = {*self.by_key.values(), *self._replaced}
        await asyncio.gather(*(one.stop(max(end - now(), 0)) for one in every))

    def resume(self) -> None:
        """Wake the steps that wait for slots if slots are free."""
        for executor in self.by_key.values():
            self._resume(executor)

    def _add_finished(self, results: Sequence[Finished]) -> None:
        self._finished(results)
        self._resume(results[0][0].executor)

    def _resume(self, executor: Executor) -> None:
        if executor.waiting and executor.is_worth_claiming and not self._is_full():
            self._wake_waiting(executor)

    def _wake_waiting(self, executor: Executor) -> None:
        for step_key in executor.waiting:
            self._wake(step_key)
        executor.waiting.clear()
