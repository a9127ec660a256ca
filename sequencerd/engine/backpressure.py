"""The queue of results to be written: when to hold results back, and when to stop claiming.

Enrollments that are late to start take precedence: while several batches of one step are claimed,
results wait for up to a second. If too many results wait, no more side effects are claimed.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from sequencerd.engine.executors import Finished

MAX_RESULT_BATCHES = 20  # batches of results that may wait to be written
MAX_HOLD = 1.0  # seconds for which results wait while many enrollments are late to start


class Backlog:
    """The queue of results. `changed` is set when there may be results to write."""

    def __init__(self, batch: int) -> None:
        self.changed = asyncio.Event()
        self._results: deque[Finished] = deque()
        self._most = MAX_RESULT_BATCHES * batch
        self._claimed_steps = 0  # which are being claimed batch after batch
        self._hold_until = 0.0  # a time of the event loop

    def __iter__(self) -> Iterator[Finished]:
        return iter(self._results)

    @property
    def is_full(self) -> bool:
        """Return whether so many results wait that no more side effects should be claimed."""
        return len(self._results) >= self._most

    @property
    def is_ready(self) -> bool:
        """Return whether there are results that should be written now."""
        return bool(self._results) and (self.is_full or not self._is_held)

    @property
    def _is_held(self) -> bool:
        return self._claimed_steps > 0 and asyncio.get_running_loop().time() < self._hold_until

    def add(self, results: Sequence[Finished]) -> None:
        """Add results that executors have reported."""
        self._results.extend(results)
        self.changed.set()

    def put_back(self, results: Sequence[Finished]) -> None:
        """Put back results that could not be written, before all others."""
        self._results.extendleft(reversed(results))
        self.changed.set()

    def take(self, most: int) -> list[Finished]:
        """Remove and return the oldest results."""
        return [self._results.popleft() for _ in range(min(most, len(self._results)))]

    @contextmanager
    def hold_while_claiming(self) -> Iterator[None]:
        """Hold results back while a step is claimed batch after batch, for MAX_HOLD at most."""
        loop = asyncio.get_running_loop()
        if not self._claimed_steps and loop.time() >= self._hold_until:
            self._hold_until = loop.time() + MAX_HOLD
            loop.call_later(MAX_HOLD, self.changed.set)
        self._claimed_steps += 1
        try:
            yield
        finally:
            self._claimed_steps -= 1
            self.changed.set()
