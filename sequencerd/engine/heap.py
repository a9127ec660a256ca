"""The priority queue of the loop: one live entry per key, the earliest time first."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from heapq import heapify, heappop, heappush
from typing import Generic, TypeVar

K = TypeVar("K", bound=tuple[str, ...])

MAX_STALE = 16  # stale entries for which a small heap is not rebuilt
PUSHED_SHARE = 0.1  # of the keys, up to which pushing keys takes less time than a rebuild


class Heap(Generic[K]):
    """Keys with due times, which only move earlier until the key is popped.

    When a key gets an earlier time, its old entry becomes stale and is dropped when it reaches the
    top, so `push` never searches. If more entries are stale than live, all stale ones are dropped
    at once: memory stays proportional to the keys, at a constant amortised cost per push.
    """

    def __init__(self) -> None:
        self._due: dict[K, datetime] = {}
        self._heap: list[tuple[datetime, K]] = []

    def __len__(self) -> int:
        return len(self._due)

    def push(self, key: K, at: datetime) -> bool:
        """Make a key due at a time, unless it is due earlier. Return whether it is the first."""
        known = self._due.get(key)
        if known is not None and known <= at:
            return False
        self._due[key] = at
        heappush(self._heap, (at, key))
        self._prune()
        return self._heap[0][1] == key

    def push_all(self, items: Sequence[tuple[K, datetime]]) -> bool:
        """Make keys due at times, unless they are due earlier: all at once if there are many.
        Return whether the first time has changed.
        """
        first = self.next_at()
        if len(items) < len(self._due) * PUSHED_SHARE:
            for key, at in items:
                self.push(key, at)
        else:
            for key, at in items:
                known = self._due.get(key)
                if known is None or at < known:
                    self._due[key] = at
            self._rebuild()
        return self.next_at() != first

    def first(self) -> tuple[datetime, K] | None:
        """Return the first key and when it is due; None if the heap is empty."""
        self._drop_stale()
        return self._heap[0] if self._heap else None

    def next_at(self) -> datetime | None:
        """Return when the first key is due; None if the heap is empty."""
        first = self.first()
        return first[0] if first else None

    def pop_due(self, now: datetime) -> list[K]:
        """Remove and return the keys that are due, the earliest first."""
        due = []
        while (at := self.next_at()) is not None and at <= now:
            key = heappop(self._heap)[1]
            del self._due[key]
            due.append(key)
        self._prune()
        return due

    def _drop_stale(self) -> None:
        while self._heap and self._due.get(self._heap[0][1]) != self._heap[0][0]:
            heappop(self._heap)

    def _prune(self) -> None:
        if len(self._heap) > 2 * len(self._due) + MAX_STALE:
            self._rebuild()

    def _rebuild(self) -> None:
        self._heap = [(at, key) for key, at in self._due.items()]
        heapify(self._heap)
