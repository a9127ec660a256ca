"""The circuit breaker of an executor: derive from results whether the server is down, and who is at
fault.

A server that fails is tried again after a pause, with one enrollment (`core/backoff.py`).
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from datetime import timedelta

from sequencerd.core.backoff import MAX_COINCIDENCE, OPEN_GATE, Gate, Pauses, Suspects, VisitKey
from sequencerd.core.retry import MAX_PAUSE
from sequencerd.core.task import Answer, Failed, OutageCause, Result

TIMER_TOLERANCE = 0.001  # seconds by which timers may be early


class Breaker:
    """A circuit breaker. `resumed` is called when a pause is over, `outage_changed` when `outage`
    changes.
    """

    def __init__(
        self,
        capacity: int,
        pauses: Pauses,
        resumed: Callable[[], object],
        outage_changed: Callable[[], object],
    ) -> None:
        self.outage: str | None = None  # the reason for which the server fails, in its own words
        self.cause: OutageCause = "failing"  # the reason as one word
        self._capacity = capacity
        self._pauses = pauses
        self._resumed = resumed
        self._outage_changed = outage_changed
        self._gate = OPEN_GATE
        self._suspects = Suspects()
        self._timer: asyncio.TimerHandle | None = None

    @property
    def allowed(self) -> int:
        """Return how many enrollments may be in flight."""
        if self._gate is OPEN_GATE:  # checked for each lease, and reading the clock takes time
            return self._capacity
        return self._gate.allowed(now(), self._capacity)

    def suspects(self, keys: Iterable[VisitKey]) -> set[VisitKey]:
        """Return the enrollments that should be executed alone, because each may make a whole batch
        fail.
        """
        return self._suspects.among(keys)

    def stop(self) -> None:
        """Cancel all timers."""
        if self._timer is not None:
            self._timer.cancel()

    def judge(
        self, keys: Sequence[VisitKey], results: Sequence[Result], started: float
    ) -> Sequence[Result]:
        """Return the results of a call, with whose fault each failure is and when to retry it."""
        at = now()
        answered = [
            key
            for key, result in zip(keys, results, strict=True)
            if isinstance(result, Answer)
            or (isinstance(result, Failed) and result.fault == "enrollment" and result.asked)
        ]
        if answered:
            self._suspects.succeeded(answered, at)
            self._set_gate(self._gate.succeeded(started, self._capacity))
            self._set_outage(self._gate.cause)
        if len(answered) == len(keys):
            return results
        failed = [one for one in results if isinstance(one, Failed)]
        down = [one for one in failed if one.fault == "server"]
        unclear = [one for one in failed if one.fault == "unclear"]
        together = len(unclear) > 1 and not answered
        if down and not answered:
            self._close(down[0], started, at, max(map(_requested_wait, down)))
        elif together:
            self._suspects.failed_together(keys, at)
            self._set_gate(self._gate.suspected(at))
        judged: list[Result] = []
        postponed: dict[Failed, Failed] = {}  # the same for all that failed in the same way
        for key, result in zip(keys, results, strict=True):
            if not isinstance(result, Failed) or result.fault == "enrollment":
                judged.append(result)
            elif result.fault == "unclear" and not together:
                judged.append(self._judge_alone(key, result, started, at))
            else:
                if result not in postponed:
                    postponed[result] = self._postponed(result, at)
                judged.append(postponed[result])
        return judged

    def _judge_alone(self, key: VisitKey, failed: Failed, started: float, at: float) -> Result:
        """Classify a failure that may be the fault of the server, or of this enrollment."""
        verdict = self._suspects.failed_alone(key, at)
        if verdict.fault != "server":
            return replace(failed, fault=verdict.fault)
        failed = replace(failed, fault="server", refund=verdict.refund)
        if verdict.is_outage:
            self._close(failed, started, at, _requested_wait(failed))
            return self._postponed(failed, at)
        if self._suspects.failures >= MAX_COINCIDENCE and self.outage is None:
            self.cause = failed.cause
            self._set_outage(failed.message)
        pause = self._pauses.after(self._suspects.failures, _jitter())
        return self._postponed(failed, at, pause)

    def _postponed(self, failed: Failed, at: float, pause: float = 0.0) -> Failed:
        """Return a failure that is retried when the runner is."""
        least = max(pause, self._gate.next_at - at, _requested_wait(failed))
        if least <= 0:
            least = self._pauses.after(1, _jitter())
        return replace(failed, fault="server", retry_after=timedelta(seconds=least))

    def _close(self, failed: Failed, started: float, at: float, requested: float) -> None:
        """Start nothing until the next pause is over."""
        pause = self._pauses.after(self._gate.failures + 1, _jitter())
        gate = self._gate.failed(failed.message, started, at, pause, requested)
        if gate.cause != self._gate.cause:
            self.cause = failed.cause
        self._set_gate(gate)

    def _set_gate(self, gate: Gate) -> None:
        if gate is self._gate:
            return
        self._gate = gate
        if self._timer is not None:
            self._timer.cancel()
        loop = asyncio.get_running_loop()
        self._timer = loop.call_at(gate.next_at + TIMER_TOLERANCE, self._resumed)
        self._set_outage(gate.cause)

    def _set_outage(self, cause: str | None) -> None:
        if cause != self.outage:
            self.outage = cause
            self._outage_changed()


def now() -> float:
    """Return the time of the event loop, in seconds."""
    return asyncio.get_running_loop().time()


def _requested_wait(failed: Failed) -> float:
    """Return the wait that a server requests, in seconds, at most a day."""
    requested = failed.retry_after or timedelta(0)
    return min(max(requested, timedelta(0)), MAX_PAUSE).total_seconds()


def _jitter() -> float:
    return random.random()  # noqa: S311 - spreads load, guards nothing
