"""What the daemon reports for operators: kept in memory, written to sequencer.problems with the
heartbeat, shown by `status`, `doctor` and the console.
"""

from __future__ import annotations

import asyncio
from datetime import datetime
from typing import NamedTuple

from sequencerd.core.model import printable

MOST = 1000
"""More are not written: a table that an operator reads."""


class Problem(NamedTuple):
    """A row of sequencer.problems. `about` is an enrollment's id, or a runner's name."""

    kind: str
    about: str
    sequence: str | None
    step: str | None
    since: datetime
    message: str
    waiting: int | None


class Problems:
    """The present problems of this daemon, by kind and about. `changed` is set with each change."""

    def __init__(self) -> None:
        self.changed = asyncio.Event()
        self._present: dict[tuple[str, str], Problem] = {}

    def __len__(self) -> int:
        return len(self._present)

    def report(
        self,
        kind: str,
        about: str,
        message: str,
        *,
        since: datetime,
        sequence: str | None = None,
        step: str | None = None,
        waiting: int | None = None,
    ) -> None:
        """Adds a problem, or brings it up to date; one that is known keeps its `since`."""
        key = (kind, about)
        if known := self._present.get(key):
            since = known.since
        problem = Problem(kind, about, sequence, step, since, printable(message), waiting)
        if problem != known:
            self._present[key] = problem
            self.changed.set()

    def clear(self, kind: str, about: str) -> None:
        """Removes a problem that is over; nothing happens where there is none."""
        if self._present.pop((kind, about), None):
            self.changed.set()

    def rows(self) -> list[Problem]:
        """What is to be written: the oldest of them."""
        return sorted(self._present.values(), key=lambda problem: problem.since)[:MOST]
