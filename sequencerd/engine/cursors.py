"""Where the claims of each step begin: nothing that is due there has an earlier wake time.

Without that, a claim begins at the earliest wake time that the step has ever had, and reads each
version of a row since then that VACUUM cannot remove yet: while another session keeps a snapshot
open, each claim takes longer than the one before.

A claim skips rows that another session has locked, so a cursor keeps two times. Claims begin at
`next`, where the last one ended. With the last claim and every second, a check reads what is due
from `since` on, and moves both times to the first row that was left. Whatever becomes due at an
earlier time is reported: by the daemon's own writes, by notifications, by polls and by the sweep.

The next wake time is not read with each claim either. Each lease that has ended leaves a dead row
version whose wake time is the end of the lease, so there may be as many of these as side effects in
that time.
"""

from __future__ import annotations

from collections.abc import Iterator, Set
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from sequencerd.core.enrollment import NEVER, StepKey
from sequencerd.storage.wakes import LeftAtStep

EARLIEST_WAKE = datetime(1900, 1, 1, tzinfo=UTC)  # no row wakes before this time
CHECK_INTERVAL = timedelta(seconds=1)
OVERLAP = timedelta(seconds=0.2)
"""How far a cursor stays behind the time of its check. What another daemon, or a writer that does
not notify, commits within this time is found by the next claim; what takes longer, by a poll or by
the sweep.
"""
KEPT_FOR = timedelta(minutes=10)  # after its last check, an unused cursor is removed


@dataclass(slots=True, eq=False)
class Claim:
    """One claim of a step, while it runs."""

    now: datetime  # what is due by this time is claimed
    since: datetime  # where the check begins
    start: datetime  # where the claim begins
    is_to_check: bool  # even if the claim returned as many as requested
    ahead: datetime | None  # the next wake time that is not due yet, if known
    found: int  # how many were due: by the claim before, until this one knows
    unsuited: int | None  # the revision of which enrollments must be locked to be written
    reached: datetime | None = None  # the last wake time that was claimed
    left: LeftAtStep | None = None  # the result of the check
    not_before: float = 0.0  # the next claim, in the loop's time, so that it finds more
    lowered: datetime = NEVER  # the earliest wake time that was reported in the meantime
    later: datetime = NEVER  # the earliest reported wake time that is not due yet


@dataclass(slots=True)
class _Cursor:
    since: datetime = EARLIEST_WAKE
    next: datetime = EARLIEST_WAKE
    checked_at: datetime = EARLIEST_WAKE
    ahead: datetime = EARLIEST_WAKE  # the next wake time; unknown if it has passed
    excluded: Set[int] = frozenset()
    found: int = 0
    unsuited: int | None = None
    empty_claims: int = 0  # consecutive claims that have found nothing
    not_before: float = 0.0
    claims: list[Claim] = field(default_factory=list)

    def lower(self, at: datetime) -> None:
        self.since = min(self.since, at)
        self.next = min(self.next, at)
        for claim in self.claims:  # the check may not have seen what is reported
            claim.lowered = min(claim.lowered, at)

    def lower_ahead(self, at: datetime) -> None:
        self.ahead = min(self.ahead, at)
        for claim in self.claims:
            claim.later = min(claim.later, at)

    def finish(self, claim: Claim) -> None:
        self.found, self.unsuited = claim.found, claim.unsuited
        self.not_before = claim.not_before
        self.empty_claims = 0 if claim.found else self.empty_claims + 1
        if claim.left is None:
            if claim.reached is not None:
                self.next = min(claim.reached, claim.lowered)
            return
        # by the slower clock: what is due only according to the other was not checked
        self.checked_at = min(claim.left.now, claim.now)
        until = self.checked_at - OVERLAP
        self.since = self.next = min(claim.left.first_due or until, until, claim.lowered)
        if claim.left.ahead is not None:
            self.ahead = min(claim.left.ahead, claim.later)


_UNKNOWN = _Cursor()  # of a step without recent claims


class Cursors:
    """The cursors of steps with recent claims."""

    def __init__(self) -> None:
        self._by_step: dict[StepKey, _Cursor] = {}

    def __len__(self) -> int:
        return len(self._by_step)

    @property
    def known(self) -> dict[StepKey, datetime]:
        """Return, for each step, the time before which nothing is due, as far as is known."""
        return {key: one.since for key, one in self._by_step.items() if one.since > EARLIEST_WAKE}

    def since(self, step_key: StepKey) -> datetime:
        """Return the time before which nothing is due at a step, as far as is known."""
        return self._by_step.get(step_key, _UNKNOWN).since

    def empty_claims(self, step_key: StepKey) -> int:
        """Return how many consecutive claims of a step have found nothing."""
        return self._by_step.get(step_key, _UNKNOWN).empty_claims

    def found_others(self, step_key: StepKey) -> None:
        """Report that enrollments of a step were due, which were advanced without a claim."""
        if (cursor := self._by_step.get(step_key)) is not None:
            cursor.empty_claims = 0

    def not_before(self, step_key: StepKey) -> float:
        """Return the time before which a step is not claimed again, in the loop's time: the clock
        may be set back.
        """
        return self._by_step.get(step_key, _UNKNOWN).not_before

    def report(
        self, step_key: StepKey, at: datetime | None, now: datetime, *, is_later: bool = False
    ) -> None:
        """Report that an enrollment at a step is, or will be, due from a time on, and whether
        others may be due later: by then, the first one may have been claimed. `at` is None if
        nothing is known about the times. The database's clock may be ahead of `now`.
        """
        if (cursor := self._by_step.get(step_key)) is not None:
            cursor.lower(max(at or EARLIEST_WAKE, EARLIEST_WAKE))
            if is_later or at is None:
                cursor.lower_ahead(EARLIEST_WAKE)
            elif at > now:
                cursor.lower_ahead(at)

    def forget(self) -> None:
        """Remove all cursors, because the clock was set back: what is inserted from now on may wake
        before them. A claim in progress keeps its own to its end.
        """
        self._by_step.clear()

    def forget_ahead(self) -> None:
        """Report that enrollments may wake at any step."""
        for cursor in self._by_step.values():
            cursor.lower_ahead(EARLIEST_WAKE)

    @contextmanager
    def claim(self, step_key: StepKey, excluded: Set[int], now: datetime) -> Iterator[Claim]:
        """Claim at a step, without some enrollments. The transaction ends within the context."""
        cursor = self._by_step.setdefault(step_key, _Cursor())
        if not cursor.excluded <= excluded:  # what is no longer excluded may be due at any time
            cursor.lower(EARLIEST_WAKE)
        cursor.excluded = excluded
        is_to_check = now - cursor.checked_at >= CHECK_INTERVAL
        ahead = cursor.ahead if cursor.ahead > now else None
        found, unsuited = cursor.found, cursor.unsuited
        claim = Claim(now, cursor.since, cursor.next, is_to_check, ahead, found, unsuited)
        cursor.claims.append(claim)
        try:
            yield claim
        except BaseException:
            cursor.claims.remove(claim)
            cursor.lower(claim.start)  # the rows it locked are due; others may have skipped them
            raise
        cursor.claims.remove(claim)
        cursor.finish(claim)

    def forget_unused(self, now: datetime) -> None:
        """Remove the cursors of steps without recent claims. The next claim begins at the start."""
        self._by_step = {
            step_key: cursor
            for step_key, cursor in self._by_step.items()
            if cursor.claims or now - cursor.checked_at < KEPT_FOR
        }
