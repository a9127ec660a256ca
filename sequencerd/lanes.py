"""Side effects in flight: a lane for each runner and lookup, so that a slow one delays no other."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import NamedTuple, Protocol

from sequencerd import tracing
from sequencerd.core.model import (
    Attribution,
    Enrollment,
    Failed,
    Fence,
    NotStarted,
    Result,
    Step,
    Task,
)
from sequencerd.metrics import Metrics
from sequencerd.runners import NotNow
from sequencerd.runners.causes import is_exhausted
from sequencerd.store import Place

INTERRUPTED = Failed(
    "interrupted: the daemon stopped", retry_after=timedelta(0), fault="server", unknown=True
)


LaneKey = str | tuple[str, str]
"""The type of the steps, or ("lookup", its name)."""


class Work(Protocol):
    """What a lane executes: a runner, or a lookup."""

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
    lane: Lane
    program: object
    task: Task
    revision: int | None = None  # of the definition that it was begun under

    @property
    def fence(self) -> Fence:
        """What the row shows while it is still leased as it was, to this daemon."""
        return self.enrollment.fence


Report = Callable[[Sequence[tuple[Leased, Result]]], None]


class Lane:
    """The side effects of one runner. `report` is called with the results, in the event loop.

    A lane takes on twice what runs at the same time, so that a runner finds work when it is done,
    and no more: what nobody works on is left to other daemons.
    """

    def __init__(self, key: LaneKey, runner: Work, report: Report, metrics: Metrics) -> None:
        self.is_lookup = isinstance(key, tuple)
        self.runner = runner
        self.waiting: set[Place] = set()  # steps whose enrollments found no room
        self._kind = "lookup" if isinstance(key, tuple) else key
        self._report = report
        self._metrics = metrics
        self._capacity = 2 * runner.concurrency * runner.batch_size
        self._taken = 0
        self._turn = asyncio.Semaphore(runner.concurrency)
        self._queued: set[asyncio.Task[None]] = set()
        self._running: set[asyncio.Task[None]] = set()

    @property
    def room(self) -> int:
        """How many more can be taken on."""
        return self._capacity - self._taken

    @property
    def is_roomy(self) -> bool:
        """Whether it is worth while to claim again: one by one would cost a claim for each."""
        return self.room * 2 >= self._capacity

    def take(self, count: int) -> None:
        """Reserves room; each is to be started or given back."""
        self._taken += count

    def start(self, leased: Sequence[Leased]) -> None:
        """Executes side effects of one step, in batches of the runner's size."""
        self._metrics.begun(self._kind, len(leased))
        size = self.runner.batch_size
        for first in range(0, len(leased), size):
            batch = leased[first : first + size]
            task = asyncio.create_task(self._execute(batch))
            self._queued.add(task)
            task.add_done_callback(self._queued.discard)
            task.add_done_callback(self._running.discard)

    async def drained(self) -> None:
        """Returns when nothing is taken on any more."""
        while self._taken:  # noqa: ASYNC110 - rare, and each lease would pay for an event
            await asyncio.sleep(0.1)

    async def stop(self, seconds: float) -> None:
        """Gives back what has not begun, waits for the rest, and interrupts what takes longer."""
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
            async with self._turn:
                task = asyncio.current_task()
                assert task is not None
                self._queued.discard(task)
                self._running.add(task)
                interrupted = INTERRUPTED
                begun = time.monotonic()
                enrollments = () if self.is_lookup else [leased.enrollment for leased in batch]
                with tracing.executing(self._kind, enrollments) as ended:
                    results = await self._run(batch)
                    ended(results)
        except asyncio.CancelledError:
            results = [interrupted] * len(batch)
        self._taken -= len(batch)
        seconds = None if begun is None else time.monotonic() - begun
        self._metrics.ended(self._kind, results, seconds)
        self._report(list(zip(batch, results, strict=True)))

    async def _run(self, batch: Sequence[Leased]) -> Sequence[Result]:
        """One call of the runner. What it does wrong is a failure of the batch, never of ours."""
        timeout = self.runner.timeout
        tasks = [leased.task for leased in batch]
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
