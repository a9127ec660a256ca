"""The rows and events that one transaction writes, each once with the ids that it applies to.

This module makes no decisions and does no I/O.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from itertools import count
from typing import Any

from sequencerd.core.decision import Decision, End, Event, Execute, Fail, Wait
from sequencerd.core.enrollment import Enrollment, StepKey
from sequencerd.core.model import Entry
from sequencerd.engine.executors import Leased
from sequencerd.engine.jumps import PendingMove
from sequencerd.engine.shared_outcome import SharedOutcomes
from sequencerd.storage.limits import Reserved
from sequencerd.storage.writes import EnrollmentState, EnrollmentWrites, text_array

MAX_UNLOCKED = 100  # enrollments that are read without a lock, and then written by one statement
MAX_NUMBER = 1_000_000_000  # the limit of the column
_NUMBERS = count()

Failure = tuple[int, str, str, str, str | None]
"""An enrollment that fails: its id, sequence and step, the code of the failure, and the message."""


@dataclass(slots=True)
class Batch(EnrollmentWrites):
    """The writes of one transaction, and the work that follows them."""

    lease_number: int = field(default_factory=lambda: next(_NUMBERS) % MAX_NUMBER + 1)
    """The number of all leases in this transaction, unique within this process.

    If the answer to a commit is lost, the number tells whether the rows contain this lease, or one
    of a later transaction after this one was rolled back.
    """
    transaction: int | None = None  # the number of the transaction, if it is known
    leased: list[Leased] = field(default_factory=list)  # executed after the commit
    jumps: list[PendingMove] = field(default_factory=list)  # into other sequences, to be decided
    limited: list[PendingMove] = field(default_factory=list)  # side effects to be reserved
    given_back: list[Reserved] = field(default_factory=list)
    outcomes: SharedOutcomes = field(default_factory=SharedOutcomes)
    elsewhere: set[StepKey] = field(default_factory=set)  # steps that other daemons execute
    entries: list[Entry] = field(default_factory=list)  # of other subjects, by Enroll steps
    entered: dict[StepKey, datetime] = field(default_factory=dict)  # where these start, and when

    def add(
        self,
        before: Enrollment,
        at: Enrollment,
        decision: Decision,
        wake_at: datetime,
        events: Iterable[Event],
        *,
        data: Mapping[str, Any] | None,
    ) -> list[list[int]]:
        """Add an enrollment that has been advanced to `at`. Return the lists to which its id was
        added.
        """
        failure = decision if isinstance(decision, Fail) else None
        status = "active"
        if failure:
            status = "failed"
        elif isinstance(decision, End):
            status = decision.status
        if data:
            self.data[at.id] = data
        if at.goals != before.goals:
            self.goals_met[at.id] = at.goals
        row = EnrollmentState(
            at.sequence,
            at.step,
            status,
            wake_at if status == "active" else None,
            at.entered_at,
            at.visit,
            at.attempt,
            at.leases,
            at.retry_at,
            at.leased_by,
            failure.failure if failure else None,
            failure.message if failure else at.last_error,
            text_array(at.executed),
            decision.expires_at if isinstance(decision, Execute) else None,
            decision.waits_until if isinstance(decision, Wait) else None,
        )
        ids = [self.rows.setdefault(row, [])]
        ids += [self.events.setdefault(event, []) for event in events]
        for one in ids:
            one.append(at.id)
        return ids

    @property
    def is_plain(self) -> bool:
        """Whether nothing but rows and events is to be written."""
        return bool(self.rows) and not (
            self.data
            or self.goals_met
            or self.jumps
            or self.limited
            or self.given_back
            or self.elsewhere
            or self.entries
        )

    def lease(self, leased: Leased) -> None:
        """Reserve a slot, until the transaction has committed or failed."""
        leased.executor.reserve(1)
        self.leased.append(leased)

    def wakes(self) -> dict[StepKey, tuple[datetime, datetime]]:
        """Return the first and the last wake time of the waiting enrollments at each step."""
        wakes = {step_key: (at, at) for step_key, at in self.entered.items()}
        for row in self.rows:
            if (at := row.wake_at) is not None and row.leased_by is None:
                first, last = wakes.get((row.sequence, row.step), (at, at))
                wakes[row.sequence, row.step] = min(first, at), max(last, at)
        return wakes

    def invalid_steps(self) -> set[StepKey]:
        """Return the steps at which enrollments fail because these are invalid."""
        return {(row.sequence, row.step) for row in self.rows if row.failure == "invalid_step"}

    def failures(self) -> list[Failure]:
        """Return the enrollments that fail."""
        return [
            (id_, row.sequence, row.step, row.failure, row.last_error)
            for row, ids in self.rows.items()
            if row.failure
            for id_ in ids
        ]
