"""Advance once all enrollments that differ in nothing that is read.

Most enrollments of a batch are in the same state and have the same result. The first of them is
advanced; if `advance` has read nothing else, the others share its outcome (`Advanced.is_shared`).
If it has evaluated conditions on the data, an enrollment shares the outcome if its data give the
same answers.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from datetime import datetime
from typing import Any, NamedTuple

from sequencerd.core.enrollment import Enrollment
from sequencerd.core.faults import EvaluationError
from sequencerd.core.model import Reservation, Step
from sequencerd.core.task import Answer, NotStarted, Result, Suppressed
from sequencerd.core.view import Condition, StateView, data_view
from sequencerd.engine.executors import Executor

OutcomeKey = tuple[Hashable, ...]
"""Everything that a shared outcome depends on."""


class Start(NamedTuple):
    """How a side effect is started: the same for all enrollments in a state."""

    executor: Executor
    step: Step
    program: object
    view: StateView
    expires: float | None  # a time of the event loop's clock
    topic: str | None
    revision: int
    reservations: tuple[Reservation, ...]
    lease_expired: Callable[[float], bool]


class SharedOutcome(NamedTuple):
    """The writes for an enrollment, which apply to all others with the same key."""

    ids: Sequence[list[int]]  # lists of ids, of its row and events, to which others are added
    at: Enrollment  # the state that the others get
    start: Start | None  # of the side effect, which each executes with its own data


class _Question(NamedTuple):
    """The next condition on the data, and the outcomes for each answer so far."""

    condition: Condition
    answers: dict[bool, _Question | SharedOutcome]


class SharedOutcomes:
    """The shared outcomes of one batch.

    The first condition depends only on the key, and each further one on the answers before it. So
    the outcomes of a key form a tree of conditions.
    """

    def __init__(self) -> None:
        self._by_key: dict[OutcomeKey, _Question | SharedOutcome] = {}
        # the latest of each, as most enrollments of a batch are like the one before: to compare
        # two states takes much less time than to look one up, which hashes its dates
        self._result: Result | None = None
        self._result_key: Hashable = None
        self._state: tuple[object, ...] = ()
        self._others: tuple[object, ...] = ()
        self._key: OutcomeKey | None = None
        self._key_found: OutcomeKey | None = None
        self._found: _Question | SharedOutcome | None = None

    def key(
        self,
        enrollment: Enrollment,
        result: Result | None,
        started_revision: int | None,
        expired_leases: int,
        begins_at: datetime | None = None,
    ) -> OutcomeKey | None:
        """Return the key of an outcome, unless it depends on values that cannot be shared.
        `begins_at` is when the enrollment enters its first step.
        """
        if result is not self._result:
            self._result, self._result_key = result, _result_key(result)
        if self._result_key is _UNSHARED:
            return None
        state = enrollment.state
        others = self._result_key, started_revision, expired_leases, begins_at
        if self._key is None or state != self._state or others != self._others:
            self._key, self._state = (enrollment.hashable_state, *others), state
            self._others = others
        return self._key

    def get(self, key: OutcomeKey, enrollment: Enrollment) -> SharedOutcome | None:
        """Return the outcome of an earlier enrollment with this key and the same answers."""
        if key is not self._key_found:
            self._key_found, self._found = key, self._by_key.get(key)
        found = self._found
        if isinstance(found, _Question):
            view = data_view(enrollment)
            try:
                while isinstance(found, _Question):
                    found = found.answers.get(found.condition(view))
            except EvaluationError:
                return None
        return found

    @property
    def has_asked(self) -> bool:
        """Return whether `get` has evaluated conditions for the latest enrollment."""
        return isinstance(self._found, _Question)

    def add(
        self, key: OutcomeKey, answers: Iterable[tuple[Condition, bool]], outcome: SharedOutcome
    ) -> None:
        """Share an outcome with later enrollments that have this key and these answers."""
        self._key_found = None
        place: dict[Any, _Question | SharedOutcome] = self._by_key
        at: Hashable = key
        for condition, answer in answers:
            question = place.setdefault(at, _Question(condition, {}))
            assert isinstance(question, _Question)
            place, at = question.answers, answer
        place[at] = outcome


_UNSHARED = object()


def _result_key(result: Result | None) -> Hashable:
    """Return the values of a result that enrollments can have in common.

    Data are merged into those of each enrollment, the wait after a failure is random, and external
    data belong to one subject.
    """
    match result:
        case None | Suppressed() | NotStarted():
            return result
        case Answer(action, message, data, wake_at, retry_after) if not data:
            return action, message, wake_at, retry_after
        case _:
            return _UNSHARED
