"""Isolate rows that the database refuses to read or write, and quarantine them.

A batch that fails is repeated in halves, down to the row at fault. That row remains unchanged in
the table; in memory it is excluded from claims, with the result of its side effect if there is one,
and retried after growing pauses. If nothing can be written at all, no row is at fault and none is
quarantined.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TypeVar

from structlog.typing import FilteringBoundLogger

from sequencerd.core.enrollment import StepKey
from sequencerd.core.retry import doubled
from sequencerd.core.task import Result
from sequencerd.engine.clock import Clock
from sequencerd.engine.executors import Leased
from sequencerd.engine.problems import OF_ENROLLMENT, Problems
from sequencerd.storage.database_errors import brief, is_data_error, is_environment, is_lost

FIRST_PAUSE = 1.0  # seconds until the first retry; doubled each time
MAX_PAUSE = 120.0  # seconds
MAX_PAUSE_OF_ENVIRONMENT = 30.0  # seconds, for errors that may be temporary
MAX_ROWS = 10_000  # rows: more must have a common cause, and wait at their steps
MAX_LOCK_FAILURES = 3  # by locks or resources before any row is written: not the rows' fault

T = TypeVar("T")


async def isolate(
    items: Sequence[T],
    work: Callable[[list[T]], Awaitable[object]],
    refused: Callable[[T, Exception], Awaitable[None]],
    probe: Callable[[], Awaitable[None]],
) -> tuple[list[T], Exception | None]:
    """Do work in halves if it fails; `refused` receives each item for which it fails alone.

    If `work` fails, it removes from its list the items that are done nevertheless. `probe` raises
    if nothing can be written. Return the items that were not done, and the error if it is no item's
    fault.
    """
    parts = deque([list(items)] if items else [])
    written, suspects = False, 0
    while parts:
        part = parts.popleft()
        try:
            await work(part)
            written = True
        except Exception as error:  # whatever the error is, one item may have caused it
            try:
                if not is_data_error(error):
                    await probe()
                if not part:
                    continue
                if len(part) > 1:
                    half = len(part) // 2
                    parts.extendleft((part[half:], part[:half]))
                    continue
                if is_environment(error) and not written:
                    suspects += 1
                    if suspects == MAX_LOCK_FAILURES:
                        raise
                await refused(part[0], error)
            except Exception as common:
                return [*part, *(one for rest in parts for one in rest)], common
    return [], None


async def refusal_of(work: Awaitable[None]) -> Exception | None:
    """Return the error with which the database refuses work, if it does. Raises if the connection
    is lost.
    """
    try:
        await work
    except Exception as error:
        if is_lost(error) and not isinstance(error, TimeoutError | ValueError):
            raise
        return error
    return None


@dataclass(slots=True)
class Quarantined:
    """An enrollment at a step, with the result of its side effect if that cannot be written."""

    id: int
    step_key: StepKey
    result: tuple[Leased, Result] | None
    since: datetime
    tries: int
    due_at: float  # in the loop's time


class Quarantine:
    """The enrollments that this daemon has quarantined."""

    def __init__(self, problems: Problems, *, clock: Clock, log: FilteringBoundLogger) -> None:
        self._problems = problems
        self._clock = clock
        self._log = log
        self._by_step: dict[StepKey, dict[int, Quarantined]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._by_step.values()))

    def ids(self, step_key: StepKey) -> list[int]:
        """Return the quarantined enrollments of a step."""
        return list(self._by_step.get(step_key, ()))

    @property
    def all(self) -> list[Quarantined]:
        """Return all quarantined enrollments."""
        return [one for there in self._by_step.values() for one in there.values()]

    @property
    def with_result(self) -> set[int]:
        """Return the enrollments for which a result is kept."""
        return {one.id for one in self.all if one.result is not None}

    def add(
        self,
        id_: int,
        step_key: StepKey,
        error: Exception,
        result: tuple[Leased, Result] | None = None,
    ) -> None:
        """Quarantine an enrollment, or do so again after a retry.

        Raises the error if too many are quarantined, because the cause is then a common one.
        """
        known = self._by_step.get(step_key, {}).get(id_)
        if known is None and len(self) >= MAX_ROWS:
            raise error
        tries = known.tries + 1 if known else 1
        since = known.since if known else self._clock.now()
        longest = MAX_PAUSE_OF_ENVIRONMENT if is_environment(error) else MAX_PAUSE
        pause = doubled(FIRST_PAUSE, longest, tries)
        due_at = asyncio.get_running_loop().time() + pause
        one = Quarantined(id_, step_key, result, since, tries, due_at)
        self._by_step.setdefault(step_key, {})[id_] = one
        message = f"{type(error).__name__}: {error}"
        if result is not None:
            message += "; its side effect is done, and is not executed again"
        sequence, step = step_key
        self._problems.report(
            OF_ENROLLMENT, str(id_), message, since=since, sequence=sequence, step=step
        )
        if known is None:
            log = self._log.bind(enrollment=id_, sequence=sequence, step=step)
            log.warning("enrollment is quarantined", error=brief(error))
            log.debug("enrollment is quarantined", error=str(error))

    def release(self, tried: Iterable[Quarantined]) -> None:
        """Release the enrollments that were retried, except for those quarantined again."""
        for one in tried:
            there = self._by_step.get(one.step_key, {})
            if there.get(one.id) is not one:
                continue
            del there[one.id]
            if not there:
                del self._by_step[one.step_key]
            self._problems.clear(OF_ENROLLMENT, str(one.id))
            self._log.info("enrollment is no longer quarantined", enrollment=one.id)

    def due(self, now: float) -> dict[StepKey, list[Quarantined]]:
        """Return the enrollments due for a retry, by step. None is due again within
        FIRST_PAUSE.
        """
        found: dict[StepKey, list[Quarantined]] = {}
        for one in self.all:
            if one.due_at <= now:
                one.due_at = now + FIRST_PAUSE
                found.setdefault(one.step_key, []).append(one)
        return found
