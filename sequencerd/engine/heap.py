"""The priority queue of the daemon: one entry for each key, the earliest time first."""

from __future__ import annotations

from datetime import datetime
from heapq import heapify, heappop, heappush
from typing import Generic, TypeVar

K = TypeVar("K", bound=tuple[str, ...])

SLACK = 16  # stale entries that a small heap may hold: to rebuild it for fewer would not pay


class Heap(Generic[K]):
    """Keys with a due time each. A key's time only moves earlier until it is popped.

    An entry that was overtaken by an earlier one stays in the heap and is dropped when it comes
    up, so `push` never searches. Where more entries are stale than are not, all are dropped at
    once: memory stays in proportion to the keys, and each entry pays for its own removal.
    """

    def __init__(self) -> None:
        self._due: dict[K, datetime] = {}
        self._heap: list[tuple[datetime, K]] = []

    def __len__(self) -> int:
        return len(self._due)

    def push(self, key: K, at: datetime) -> bool:
        """Makes the key due at that time, if it isn't earlier. True if it is now the first."""
        known = self._due.get(key)
        if known is not None and known <= at:
            return False
        self._due[key] = at
        heappush(self._heap, (at, key))
        self._prune()
        return self._heap[0][1] == key

    def next_at(self) -> datetime | None:
        """When the first key is due; None when there is none."""
        self._drop_stale()
        return self._heap[0][0] if self._heap else None

    def pop_due(self, now: datetime) -> list[K]:
        """Takes out the keys that are due, the earliest first."""
        due = []
        while (at := self.next_at()) is not None and at <= now:
            key = heappop(self._heap)[1]
            del self._due[key]
            due.append(key)
        self._prune()
        return due

    def clear(self) -> None:
        """Takes everything out."""
        self._due.clear()
        self._heap.clear()

    def _drop_stale(self) -> None:
        while self._heap and self._due.get(self._heap[0][1]) != self._heap[0][0]:
            heappop(self._heap)

    def _prune(self) -> None:
        if len(self._heap) > 2 * len(self._due) + SLACK:
            self._heap = [(at, key) for key, at in self._due.items()]
            heapify(self._heap)
