"""The priority queue of the loop: one live entry per key, the earliest time first."""

from __future__ import annotations

from datetime import datetime
from heapq import heapify, heappop, heappush
from typing import Generic, TypeVar

K = TypeVar("K", bound=tuple[str, ...])

MAX_STALE = 16  # stale entries for which a small heap is not rebuilt


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

    def next_at(self) -> datetime | None:
        """Return when the first key is due; None if the heap is empty."""
        self._drop_stale()
        return self._heap[0][0] if self._heap else None

    def pop_due(self, now: datetime) -> list[K]:
        """Remove and return the keys that are due, the earliest first."""
        due = []
        while (at := self.next_at()) is not None and at <= now:
            key = heappop(self._heap)[1]
            del self._due[key]
            due.append(key)
        self._prune()
        return due

    def clear(self) -> None:
        """Remove all keys."""
        self._due.clear()
        self._heap.clear()

    def _drop_stale(self) -> None:
        while self._heap and self._due.get(self._heap[0][1]) != self._heap[0][0]:
            heappop(self._heap)

    def _prune(self) -> None:
        if len(self._heap) > 2 * len(self._due) + MAX_STALE:
            self._heap = [(at, key) for key, at in self._due.items()]
            heapify(self._heap)
