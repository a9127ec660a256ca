"""When a runner with a failing server is tried again, with how many enrollments, and which failures
spend an attempt.

Pure: it reads no clock. Times are seconds of any monotonic clock.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from sequencerd.core.retry import doubled
from sequencerd.core.task import Attribution

SUCCESS_COUNTS_FOR = 60.0  # seconds for which a success proves that the server works
MAX_COINCIDENCE = 3  # consecutive failures of enrollments that are no coincidence
MAX_ENROLLMENTS = 10_000  # enrollments that are remembered


class Pauses(NamedTuple):
    """The pauses after consecutive failures, in seconds: each is twice the one before."""

    first: float = 1.0
    longest: float = 900.0

    def after(self, failures: int, jitter: float) -> float:
        """Return the next pause; `jitter` (0 to 1) subtracts up to a quarter, so that daemons do
        not retry in step.
        """
        return doubled(self.first, self.longest, failures) * (1 - jitter / 4)


@dataclass(frozen=True, slots=True)
class Gate:
    """The number of enrollments that a runner may begin. It is unlimited until the server fails;
    then one enrollment is let through after each pause and, after a success, twice as many each
    time until it is unlimited again.

    Of simultaneous calls, only the first failure counts: calls that began before a pause give no
    new information.
    """

    cause: str | None = None  # of the outage, until the first success after it
    failures: int = 0  # consecutive failures
    closed_at: float = 0.0
    next_at: float = 0.0  # nothing begins before this time
    limit: int | None = None  # limit of enrollments in flight; None: unlimited

    def allowed(self, now: float, capacity: int) -> int:
        """Return how many enrollments may be in flight, given how many there is room for."""
        if self.limit is None:
            return capacity
        return 0 if now < self.next_at else min(self.limit, capacity)

    def failed(self, cause: str, begun: float, now: float, pause: float, asked: float) -> Gate:
        """Record that a call that began at `begun` has failed through the server's fault. `pause`
        is the pause after this many failures, `asked` the least wait that the server asks for.
        """
        if self._is_known(begun):
            return replace(self, next_at=max(self.next_at, now + asked))
        return Gate(cause, self.failures + 1, now, now + max(pause, asked), 1)

    def suspected(self, now: float) -> Gate:
        """Record that a call for several enrollments has failed, perhaps because of one of them:
        they are tried one by one.
        """
        return self if self.cause is not None else Gate(None, 0, now, now, 1)

    def succeeded(self, begun: float, capacity: int) -> Gate:
        """Record that a call has shown that the server works."""
        if self.limit is None or self._is_known(begun):
            return self
        limit = 2 * self.limit
        if limit >= capacity:
            return OPEN_GATE
        return Gate(None, 0, self.closed_at, self.next_at, limit)

    def _is_known(self, begun: float) -> bool:
        return self.limit is not None and begun < self.closed_at


OPEN_GATE = Gate()

VisitKey = tuple[int, int]
"""An enrollment and its visit."""


class Verdict(NamedTuple):
    """The cause of an unclear failure. "unclear": an attempt is spent, but it is not the last one.

    `refund` is the number of attempts spent before that are given back. `is_outage`: all calls
    fail.
    """

    fault: Attribution
    refund: int = 0
    is_outage: bool = False


class _Failing(NamedTuple):
    at: float
    spent: int = 0  # attempts since the last success
    is_guilty: bool = False  # it failed before and after others succeeded


class Suspects:
    """Attribute failures that may be the server's or the enrollment's fault, such as a 500.

    An attempt is spent if there is evidence that the server works: another call was answered since
    the enrollment's last failure, or within the last minute. None is spent if others fail as well
    and nothing has succeeded since, or if there is no evidence; attempts that the enrollment has
    spent since the last success are given back then.
    """

    def __init__(self) -> None:
        self.failures = 0  # consecutive failures
        self._succeeded_at: float | None = None
        self._failing: dict[VisitKey, _Failing] = {}
        self._innocent: set[VisitKey] = set()  # failed alone since the last success, not at fault

    def among(self, keys: Iterable[VisitKey]) -> set[VisitKey]:
        """Return the enrollments that should be executed alone, as they may make others fail."""
        return self._failing.keys() & keys if self._failing else set()

    def succeeded(self, keys: Sequence[VisitKey], now: float) -> None:
        """Record that the server has answered for some enrollments."""
        self._succeeded_at = now
        self.failures = 0
        self._innocent.clear()
        for key in self.among(keys):
            del self._failing[key]

    def failed_together(self, keys: Sequence[VisitKey], now: float) -> None:
        """Record that a call for several enrollments has failed: any may be at fault."""
        self.failures += 1
        for key in keys:
            self._remember(key, _Failing(now))

    def failed_alone(self, key: VisitKey, now: float) -> Verdict:
        """Record that a call for one enrollment has failed, and attribute the failure."""
        self.failures += 1
        before = self._failing.get(key)
        last = self._succeeded_at
        spent, is_guilty = (before.spent, before.is_guilty) if before else (0, False)
        if before is None or (last is not None and last > before.at):
            spent = 0  # attempts spent before a success remain spent
        is_guilty = is_guilty or (before is not None and last is not None and last > before.at)
        if len(self._innocent) < MAX_ENROLLMENTS and not is_guilty:
            self._innocent.add(key)
        others = len(self._innocent) - (key in self._innocent)
        fault: Attribution = "server"
        if not others and (is_guilty or (last is not None and now - last <= SUCCESS_COUNTS_FOR)):
            fault = "unclear" if before is None else "enrollment"
            self._remember(key, _Failing(now, spent + 1, is_guilty))
            return Verdict(fault)
        self._remember(key, _Failing(now, 0, is_guilty))
        return Verdict(fault, spent, len(self._innocent) >= MAX_COINCIDENCE)

    def _remember(self, key: VisitKey, failing: _Failing) -> None:
        self._failing.pop(key, None)  # the latest last
        self._failing[key] = failing
        if len(self._failing) > MAX_ENROLLMENTS:
            del self._failing[next(iter(self._failing))]
