"""What `advance` decides for an enrollment, and the events that it records."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any, Literal, NamedTuple

from sequencerd.core.enrollment import Enrollment
from sequencerd.core.model import Cancellation, Entry, Reservation, SideEffect, Step
from sequencerd.core.view import Condition, External


class Event(NamedTuple):
    """What happened to an enrollment: a row of the history without its id."""

    at: datetime
    sequence: str
    step: str
    visit: int
    action: str
    message: str | None = None
    revision: int | None = None  # the revision of the definition at that time
    seconds_at_step: float | None = None  # how long it had been at the step


class Wait(NamedTuple):
    """The enrollment remains active and is evaluated again at that time; by other daemons if it is
    `elsewhere`.

    `waits_until` is the end of the wait if it is evaluated earlier, because of external data.
    """

    until: datetime
    elsewhere: bool = False
    waits_until: datetime | None = None


class Execute(NamedTuple):
    """The enrollment needs the side effect of its step."""

    step: Step
    effect: SideEffect
    timezone: str
    external: External
    revision: int  # of its sequence
    expires_at: datetime | None = None  # it does not begin after this time
    closes_at: datetime | None = None  # the end of its window, after which it does not begin
    topic: str | None = None
    reservations: tuple[Reservation, ...] = ()  # reservations that must all succeed first


class QueryLookup(NamedTuple):
    """The enrollment needs external data from this lookup."""

    step: Step
    lookup: str


class End(NamedTuple):
    """The journey has ended."""

    status: Literal["completed"] = "completed"  # a tuple without values would be false


class Fail(NamedTuple):
    """The enrollment cannot continue: a code and a sentence."""

    failure: str
    message: str


Decision = Wait | Execute | QueryLookup | End | Fail


class Advanced(NamedTuple):
    """The enrollment after `advance`, the decision, and what to record.

    If `is_shared`, every enrollment in the same state has the same outcome if its data give the
    same `answers`: each is a condition that was evaluated, in this order, and its result.
    """

    enrollment: Enrollment
    decision: Decision
    events: tuple[Event, ...]
    data: Mapping[str, Any] | None = None  # to be merged into the row's data
    is_shared: bool = False
    entered: tuple[tuple[str, int | None], ...] = ()  # jumps: the sequence, and its known revision
    entries: tuple[Entry, ...] = ()  # enrollments of others, unless they are refused
    cancellations: tuple[Cancellation, ...] = ()  # cancellations of others, once these are locked
    answers: tuple[tuple[Condition, bool], ...] = ()

    @property
    def is_tentative(self) -> bool:
        """Return whether the outcome depends on other enrollments."""
        return bool(self.entered or self.entries or self.cancellations)
