"""Report runners that are down, and how many enrollments wait for them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime

from sequencerd.core.enrollment import StepKey
from sequencerd.engine.catalog import Catalog
from sequencerd.engine.environment import Environment
from sequencerd.engine.executors import Executor
from sequencerd.engine.problems import Problems
from sequencerd.storage import connections, wakes

PROBLEM_KIND = "runner"


@dataclass(eq=False)
class Outages:
    """Reports outages: as `problems`, which operators read, as metrics, and in the log."""

    _env: Environment
    _catalog: Catalog
    _problems: Problems
    _since: Callable[[StepKey], datetime]  # the time before which nothing is due at a step

    def report(self, executor: Executor) -> None:
        """Report that a runner is down, is down for another reason, or works again."""
        name, outage = executor.name, executor.outage
        self._env.metrics.runner_is_down(name, is_down=outage is not None)
        if outage is None:
            self._env.log.info("runner works again", runner=name)
            self._problems.clear(PROBLEM_KIND, name)
            return
        log = self._env.log.bind(runner=name)
        log.warning("runner is down; enrollments wait", cause=executor.cause)
        log.debug("runner is down; enrollments wait", error=outage)
        self._problems.report(PROBLEM_KIND, name, outage, since=self._env.clock.now())

    async def count(self, executors: Iterable[Executor]) -> None:
        """Report how many enrollments wait for runners that are down."""
        down = {one.name: one for one in executors if one.outage is not None}
        types = {
            (step.sequence, step.name): step.type
            for sequence in self._catalog.sequences.values()
            for step in sequence.steps.values()
            if step.type in down
        }
        if not types:
            return
        async with connections.borrow(self._env.pool) as connection:
            since = {step_key: self._since(step_key) for step_key in types}
            counts = await wakes.count_due(connection, since, self._env.clock.now())
        waiting = dict.fromkeys(down, 0)
        for sequence, step, due, _ in counts:
            waiting[types[sequence, step]] += due
        for name, executor in down.items():
            if executor.outage is not None:  # down as before
                self._env.metrics.runner_waits(name, waiting[name])
                self._problems.report(
                    PROBLEM_KIND,
                    name,
                    executor.outage,
                    since=self._env.clock.now(),
                    waiting=waiting[name],
                )
