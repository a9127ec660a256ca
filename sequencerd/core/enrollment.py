"""An enrollment: where it is, since when, and its lease."""

from __future__ import annotations

from datetime import UTC, datetime
from functools import lru_cache
from typing import NamedTuple
from uuid import UUID

NEVER = datetime.max.replace(tzinfo=UTC)
"""The wake time of enrollments that only wake by a change; PostgreSQL's 'infinity'."""

MAX_NAME = 200  # bytes of a name of a sequence, step or calendar, as in the schema
MAX_SUBJECT = 1000  # bytes, as in the schema


StepKey = tuple[str, str]
"""A step of a sequence, by the names of both: where enrollments are, and a key of the heap."""

Fence = tuple[int, int, int, str | None]
"""Identifies a lease of an enrollment: id, visit, number of the lease in it, and the daemon. The
attempt would not suffice: it is given back if the enrollment is not at fault.
"""


class Enrollment(NamedTuple):
    """A subject's journey: where it is and since when. `entered_at` is None until it has begun.

    A tuple in the order of the columns that are read. Everything that is made for each move of each
    enrollment is a tuple, because tuples are made several times faster than frozen dataclasses.
    """

    # its own values
    id: int
    subject: str
    data: str  # JSON text: most moves don't read it
    created_at: datetime
    tag: UUID  # random
    original_id: str | None  # in the original, of one that was imported
    wake_at: datetime | None  # as it was read
    # its state
    sequence: str
    step: str
    timezone: str | None
    entered_at: datetime | None = None
    visit: int = 1
    attempt: int = 0
    leases: int = 0  # the number of its latest lease in this visit
    retry_at: datetime | None = None  # the side effect is not started before
    leased_by: str | None = None  # the daemon that executes the side effect until wake_at
    last_error: str | None = None  # of this visit
    goals_met: tuple[str, ...] | list[str] = ()  # in its sequence
    goals_elsewhere: str | None = None  # JSON text: the goals met by sequence that it has left
    executed: tuple[str, ...] | list[str] = ()  # side effects since it last waited, see effect_key

    @property
    def key(self) -> str:
        """The idempotency key of the side effect of this visit.

        Id and visit are for readers. Half of the random tag distinguishes it from keys of other
        databases. The microsecond at which the visit began distinguishes it from keys that this
        database made before it was restored: then, the visit begins at another time. The key of the
        first visit is the same after a restore, even if the visit begins later.
        """
        begun = self.created_at if self.visit == 1 else self.entered_at
        return f"{self.id}:{self.visit}:{self.tag.hex[:16]}{_microseconds(begun) if begun else ''}"

    @property
    def fence(self) -> Fence:
        """Return values that are unchanged until the enrollment is moved or leased again."""
        return (self.id, self.visit, self.leases, self.leased_by)

    @property
    def goals(self) -> tuple[tuple[str, ...] | list[str], str | None]:
        """Return the goals that it has met, in its sequence and in others."""
        return self.goals_met, self.goals_elsewhere

    @property
    def state(self) -> tuple[object, ...]:
        """Return all values that are not its own, without its wake time."""
        return self[_STATE_BEGINS:]

    @property
    def hashable_state(self) -> tuple[object, ...]:
        """Return its state, hashable."""
        lists = tuple(self.goals_met), tuple(self.executed)
        # flat, it would take twice as long
        return self[_STATE_BEGINS:_LISTS], self.goals_elsewhere, lists

    def in_state_of(self, other: Enrollment) -> Enrollment:
        """Return the same enrollment in the state of another."""
        # `_make` takes twice as long
        return tuple.__new__(Enrollment, self[:_WAKE_AT] + other[_WAKE_AT:])

    # what most moves do is written out: `_replace` takes twice as long

    def entering(
        self, sequence: str, step: str, now: datetime, executed: tuple[str, ...] | list[str]
    ) -> Enrollment:
        """Return it at another step: a new visit, in which nothing has been tried."""
        visit = sequence, step, self.timezone, now, self.visit + 1
        untried = 0, 0, None, None, None  # no attempts, leases, retry, holder and error
        goals = self.goals_met, self.goals_elsewhere
        parts = (*self[:_WAKE_AT], None, *visit, *untried, *goals, executed)
        return tuple.__new__(Enrollment, parts)

    def leased_to(self, daemon: str, number: int) -> Enrollment:
        """Return it with one more attempt, leased by this daemon with this number."""
        visit = self[_STATE_BEGINS:_ATTEMPT]
        lease = self.attempt + 1, number, None, daemon
        parts = (*self[:_WAKE_AT], None, *visit, *lease, *self[_LAST_ERROR:])
        return tuple.__new__(Enrollment, parts)


_WAKE_AT = Enrollment._fields.index("wake_at")
_STATE_BEGINS = Enrollment._fields.index("sequence")
_ATTEMPT = Enrollment._fields.index("attempt")
_LAST_ERROR = Enrollment._fields.index("last_error")
_LISTS = Enrollment._fields.index("goals_met")


def effect_key(sequence: str, step: str) -> str:
    """Return the name of a step with a side effect, unique among all sequences; SQL has the same
    function.
    """
    if "/" in sequence or "%" in sequence:
        sequence = sequence.replace("%", "%25").replace("/", "%2F")
    return f"{sequence}/{step}"


@lru_cache(maxsize=16)  # the enrollments of a batch enter their steps at one time
def _microseconds(time: datetime) -> str:
    """Format a time as 16 hexadecimal digits."""
    return f"{int(time.timestamp() * 1_000_000) % 2**64:016x}"
