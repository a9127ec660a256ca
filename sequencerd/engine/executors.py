"""Runs side effects: one executor per runner and lookup, so that a slow one delays no other.

A server that is down stops its own executor only.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from typing import NamedTuple, Protocol

from sequencerd.core.backoff import OPEN, SEVERAL, Gate, Key, Pauses, Suspects
from sequencerd.core.model import (
    Answer,
    Attribution,
    Cause,
    Enrollment,
    Failed,
    Fence,
    NotStarted,
    Result,
    Step,
    Task,
)
from sequencerd.core.retry import LONGEST
from sequencerd.runners import tracing
from sequencerd.runners.causes import is_exhausted
from sequencerd.runners.protocol import NotNow
from sequencerd.service.metrics import Metrics
from sequencerd.storage.store import StepKey

INTERRUPTED = Failed(
    "interrupted: the daemon stopped", retry_after=timedelta(0), fault="server", unknown=True
)

TICK = 0.001  # seconds by which timers may be early

ExecutorKey = str | tuple[str, str]
"""The type of the steps, or ("lookup", its name)."""


class Work(Protocol):
    """What a executor executes: a runner, or a lookup."""

    batch_size: int
    concurrency: int
    timeout: float

    async def run(self, program: object, tasks: Sequence[Task]) -> Sequence[Result]:
        """One result for each task, in their order."""
        ...


class Leased(NamedTuple):
    """An enrollment whose side effect or lookup this daemon executes: as written with its lease."""

    enrollment: Enrollment
    step: Step
    executor: Executor
    program: object
    task: Task
    revision: int | None = None  # of the definition that it was begun under

    @property
    def fence(self) -> Fence:
        """What the row shows while it is still leased as it was, to this daemon."""
        return self.enrollment.fence


class Owner(Protocol):
    """What a executor tells, in the event loop."""

    def report(self, results: Sequence[tuple[Leased, Result]]) -> None:
        """Side effects have ended."""
        ...

    def resumed(self, executor: Executor) -> None:
        """The pause of a runner that is down is over: one may be tried."""
        ...

    def trouble_changed(self, executor: Executor) -> None:
        """A runner is down, or for another reason, or works again."""
        ...


class Executor:
    """The side effects of one runner.

    An executor has twice as many slots as enrollments that run at the same time, so that a runner
    that is done finds work; everything else is left to other daemons. While its server fails, it
    takes one enrollment after each pause; the others wait at their step.
    """

    def __init__(
        self, key: ExecutorKey, runner: Work, owner: Owner, metrics: Metrics, pauses: Pauses
    ) -> None:
        self.is_lookup = isinstance(key, tuple)
        self.runner = runner
        self.waiting: set[StepKey] = set()  # steps whose enrollments found no room
        self._kind = "lookup" if isinstance(key, tuple) else key
        self.trouble: str | None = None  # why the runner is down, in its server's words
        self.cause: Cause = "failing"  # the same in a word
        self.name = key[1] if isinstance(key, tuple) else key
        self._owner = owner
        self._metrics = metrics
        self._pauses = pauses
        self._gate = OPEN
        self._suspects = Suspects()
        self._resume: asyncio.TimerHandle | None = None
        self._capacity = 2 * runner.concurrency * runner.batch_size
        self._reserved = 0
        self._running_slots = asyncio.Semaphore(runner.concurrency)
        self._queued: set[asyncio.Task[None]] = set()
        self._running: set[asyncio.Task[None]] = set()

    @property
    def free_slots(self) -> int:
        """How many more can be taken on."""
        return self._allowed - self._reserved

    @property
    def _allowed(self) -> int:
        if self._gate is OPEN:  # each lease asks, and reading the clock takes time
            return self._capacity
        return self._gate.allowed(_now(), self._capacity)

    @property
    def is_worth_claiming(self) -> bool:
        """Whether it is worth while to claim again: one by one would cost a claim for each."""
        return self.free_slots > 0 and self.free_slots * 2 >= self._allowed

    def reserve(self, count: int) -> None:
        """Reserves room; each is to be started or given back."""
        self._reserved += count

    def start(self, leased: Sequence[Leased]) -> None:
        """Executes side effects of one step, in batches of the runner's size."""
        self._metrics.begun(self._kind, len(leased))
        size = self.runner.batch_size
        alone = [one for one in leased if size > 1 and self._suspects.is_suspect(_key(one))]
        if alone:  # it may be what makes the whole batch fail
            suspects = set(map(_key, alone))
            leased = [one for one in leased if _key(one) not in suspects]
        batches = [leased[first : first + size] for first in range(0, len(leased), size)]
        for batch in (*batches, *([one] for one in alone)):
            task = asyncio.create_task(self._execute(batch))
            self._queued.add(task)
            task.add_done_callback(self._queued.discard)
            task.add_done_callback(self._running.discard)

    async def drained(self) -> None:
        """Returns when nothing is taken on any more."""
        while self._reserved:  # noqa: ASYNC110 - rare, and each lease would pay for an event
            await asyncio.sleep(0.1)

    async def stop(self, seconds: float) -> None:
        """Gives back what has not begun, waits for the rest, and interrupts what takes longer."""
        if self._resume is not None:
            self._resume.cancel()
        await asyncio.sleep(0)  # a task that is cancelled before it begins would report nothing
        for task in list(self._queued):
            task.cancel()
        tasks = self._queued | self._running
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=seconds)
            for task in late:
                task.cancel()
            if late:
                await asyncio.wait(late)

    async def _execute(self, batch: Sequence[Leased]) -> None:
        results: Sequence[Result]
        interrupted: Result = NotStarted()
        begun: float | None = None
        try:
            async with self._running_slots:
                task = asyncio.current_task()
                assert task is not None
                self._queued.discard(task)
                self._running.add(task)
                if self._allowed > 0:
                    interrupted = INTERRUPTED
                    begun = _now()
                    enrollments = () if self.is_lookup else [leased.enrollment for leased in batch]
                    with tracing.executing(self._kind, enrollments) as ended:
                        results = self._judge(batch, await self._run(batch), begun)
                        ended(results)
                else:
                    results = [interrupted] * len(batch)
        except asyncio.CancelledError:
            results = [interrupted] * len(batch)
        self._reserved -= len(batch)
        seconds = None if begun is None else _now() - begun
        self._metrics.ended(self._kind, results, seconds)
        self._owner.report(list(zip(batch, results, strict=True)))

    async def _run(self, batch: Sequence[Leased]) -> Sequence[Result]:
        """One call of the runner. What it does wrong is a failure of the batch, never of ours."""
        timeout = self.runner.timeout
        tasks = [leased.task for leased in batch]
        now = _now()
        if any(task.is_late(now) for task in tasks):
            begun = [leased for leased in batch if not leased.task.is_late(now)]
            answers = iter(await self._run(begun) if begun else ())
            return [NotStarted() if task.is_late(now) else next(answers) for task in tasks]
        try:
            async with asyncio.timeout(timeout):
                results = await self.runner.run(batch[0].program, tasks)
        except TimeoutError:
            text = f"no answer within {timeout:g} seconds"
            return [Failed(text, fault="unclear", unknown=True)] * len(batch)
        except NotNow as error:
            return [Failed(str(error), fault="server", asked=False)] * len(batch)
        except Exception as error:  # whatever a plug-in raises
            text = f"{type(error).__name__}: {error}"
            fault: Attribution = "server" if is_exhausted(error) else "unclear"
            return [Failed(text, fault=fault, unknown=True)] * len(batch)
        if len(results) != len(batch):
            text = f"the runner answered {len(results)} results for {len(batch)} enrollments"
            return [Failed(text, fault="unclear", unknown=True)] * len(batch)
        return results

    # --- what results say of the server

    def _judge(
        self, batch: Sequence[Leased], results: Sequence[Result], begun: float
    ) -> Sequence[Result]:
        """The results of a call, each with whose fault it is and when it may be tried again."""
        if self.is_lookup:
            return results
        now = _now()
        answered = [
            _key(one)
            for one, result in zip(batch, results, strict=True)
            if isinstance(result, Answer)
            or (isinstance(result, Failed) and result.fault == "enrollment" and result.asked)
        ]
        if answered:
            self._suspects.succeeded(answered, now)
            self._set_gate(self._gate.succeeded(begun, self._capacity))
            self._set_trouble(self._gate.cause)
        if len(answered) == len(batch):
            return results
        failed = [one for one in results if isinstance(one, Failed)]
        down = [one for one in failed if one.fault == "server"]
        unclear = [one for one in failed if one.fault == "unclear"]
        together = len(unclear) > 1 and not answered
        if down and not answered:
            self._close(down[0], begun, now, max(map(_asked, down)))
        elif together:
            self._suspects.failed_together(list(map(_key, batch)), now)
            self._set_gate(self._gate.suspected(now))
        judged: list[Result] = []
        distinct: dict[int, Result] = {}  # most results of a batch are one and the same object
        for one, result in zip(batch, results, strict=True):
            if not isinstance(result, Failed) or result.fault == "enrollment":
                judged.append(result)
            elif result.fault == "unclear" and not together:
                judged.append(self._judge_alone(_key(one), result, begun, now))
            else:
                if id(result) not in distinct:
                    distinct[id(result)] = self._postponed(result, now)
                judged.append(distinct[id(result)])
        return judged

    def _judge_alone(self, key: Key, failed: Failed, begun: float, now: float) -> Result:
        """A failure that may be the server's fault, or this enrollment's."""
        verdict = self._suspects.failed_alone(key, now)
        if verdict.fault != "server":
            return replace(failed, fault=verdict.fault)
        failed = replace(failed, fault="server", refund=verdict.refund)
        if verdict.is_outage:
            self._close(failed, begun, now, _asked(failed))
            return self._postponed(failed, now)
        if self._suspects.failures >= SEVERAL and self.trouble is None:
            self.cause = failed.cause
            self._set_trouble(failed.message)
        pause = self._pauses.after(self._suspects.failures, _jitter())
        return self._postponed(failed, now, pause)

    def _postponed(self, failed: Failed, now: float, pause: float = 0.0) -> Failed:
        """To be tried again when the runner is."""
        least = max(pause, self._gate.next_at - now, _asked(failed))
        if least <= 0:
            least = self._pauses.after(1, _jitter())
        return replace(failed, fault="server", retry_after=timedelta(seconds=least))

    def _close(self, failed: Failed, begun: float, now: float, asked: float) -> None:
        """Lets nothing begin until the next pause is over."""
        pause = self._pauses.after(self._gate.failures + 1, _jitter())
        gate = self._gate.failed(failed.message, begun, now, pause, asked)
        if gate.cause != self._gate.cause:
            self.cause = failed.cause
        self._set_gate(gate)

    def _set_gate(self, gate: Gate) -> None:
        if gate is self._gate:
            return
        self._gate = gate
        if self._resume is not None:
            self._resume.cancel()
        self._resume = asyncio.get_running_loop().call_at(
            gate.next_at + TICK, self._owner.resumed, self
        )
        self._set_trouble(gate.cause)

    def _set_trouble(self, cause: str | None) -> None:
        if cause != self.trouble:
            self.trouble = cause
            self._owner.trouble_changed(self)


def _key(leased: Leased) -> Key:
    return leased.enrollment.id, leased.enrollment.visit


def _asked(failed: Failed) -> float:
    """The seconds that a server asks for, which is believed for a day."""
    asked = failed.retry_after or timedelta(0)
    return min(max(asked, timedelta(0)), LONGEST).total_seconds()


def _jitter() -> float:
    return random.random()  # noqa: S311 - spreads load, guards nothing


def _now() -> float:
    return asyncio.get_running_loop().time()
