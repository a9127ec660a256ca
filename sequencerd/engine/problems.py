"""The problems that the daemon reports to operators, in `status`, `doctor` and the console.

They are kept in memory, and written to sequencer.problems with the heartbeat.
"""

from __future__ import annotations

import asyncio
from datetime import datetime
from typing import NamedTuple

from sequencerd.core.faults import printable

MAX_PROBLEMS = 1000
"""The greatest number of problems that are written, for the sake of operators, who read them."""

OF_ENROLLMENT = "quarantined"
"""The kind of the problem of a single enrollment."""


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
    """The present problems of this daemon, by kind and about. `changed` is set by each change."""

    def __init__(self) -> None:
        self.changed = asyncio.Event()
        self._present: dict[tuple[str, str], Problem] = {}

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
        """Add or update a problem; a known one keeps its `since`."""
        key = (kind, about)
        if known := self._present.get(key):
            since = known.since
        problem = Problem(kind, about, sequence, step, since, printable(message), waiting)
        if problem != known:
            self._present[key] = problem
            self.changed.set()

    def clear(self, kind: str, about: str) -> None:
        """Remove a problem that no longer exists."""
        if self._present.pop((kind, about), None):
            self.changed.set()

    def rows(self) -> list[Problem]:
        """Return the rows to write: the oldest problems, those of single enrollments last."""
        found = sorted(
            self._present.values(), key=lambda one: (one.kind == OF_ENROLLMENT, one.since)
        )
        return found[:MAX_PROBLEMS]
