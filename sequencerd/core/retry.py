"""How long to wait before a side effect is tried again."""

from __future__ import annotations

from datetime import timedelta

from sequencerd.core.model import RetryPolicy
from sequencerd.core.task import Failed

DEFAULT_PAUSE = timedelta(seconds=5)
"""After a failure of the server that does not say how long it lasts."""

MAX_PAUSE = timedelta(days=1)
"""The longest pause, even if a server requests a longer one."""


def delay(policy: RetryPolicy, attempt: int, failed: Failed, jitter: float) -> timedelta:
    """Return the time until the next attempt, after `attempt` attempts.

    Exponential backoff: the first delay, doubled for each attempt, up to the longest. If attempts
    are counted, the delay is a random part (`jitter`, 0 to 1) of that; if a time span is given, up
    to a quarter is added, so that the span is never cut short. The time that the server requests is
    a minimum.
    """
    asked = min(max(failed.retry_after or timedelta(0), timedelta(0)), MAX_PAUSE)
    if failed.fault == "server":
        return DEFAULT_PAUSE if failed.retry_after is None else asked
    factor = jitter if policy.give_up_after is None else 1 + jitter / 4
    return max(asked, timedelta(seconds=_doubled(policy, attempt) * factor))


def gives_up(policy: RetryPolicy, attempt: int, failed: Failed) -> bool:
    """Return whether the failure after this attempt is the last one."""
    return failed.permanent or (failed.fault == "enrollment" and is_last(policy, attempt))


def is_last(policy: RetryPolicy, attempt: int) -> bool:
    """Return whether no attempt follows this one."""
    if policy.attempts is not None and attempt >= policy.attempts:
        return True
    if policy.give_up_after is None:
        return False
    waited = sum(_doubled(policy, number) for number in range(1, attempt))
    return waited >= policy.give_up_after


def _doubled(policy: RetryPolicy, attempt: int) -> float:
    seconds = doubled(policy.first_delay, policy.longest_delay, attempt)
    return seconds if policy.give_up_after is None else max(seconds, 1.0)  # or it would never end


def doubled(first: float, longest: float, number: int) -> float:
    """Return the pause of this number: the first (1), doubled each time, up to the longest."""
    return min(first * 2.0 ** min(max(number - 1, 0), 50), longest)
