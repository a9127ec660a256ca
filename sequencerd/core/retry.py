"""How long to wait before a side effect is tried again."""

from __future__ import annotations

from datetime import timedelta

from sequencerd.core.model import Failed, RetryPolicy

THROTTLED = timedelta(seconds=5)
"""After a failure that spent no attempt and named no time of its own."""

LONGEST = timedelta(days=1)
"""Whatever a server asks for, it is asked again after a day."""


def delay(policy: RetryPolicy, attempt: int, failed: Failed, jitter: float) -> timedelta:
    """The time until the next attempt, after `attempt` of them (1 after the first).

    Exponential backoff with full jitter: a random part (`jitter`, 0 to 1) of the first delay
    doubled for each attempt, up to the longest. What the server asks for is the least.
    """
    asked = min(max(failed.retry_after or timedelta(0), timedelta(0)), LONGEST)
    if failed.fault == "server":
        return asked if failed.retry_after is not None else THROTTLED * (0.5 + jitter / 2)
    doubled = policy.first_delay * 2.0 ** min(max(attempt - 1, 0), 50)
    return max(asked, timedelta(seconds=min(doubled, policy.longest_delay) * jitter))


def gives_up(policy: RetryPolicy, attempt: int, failed: Failed) -> bool:
    """Whether the failure after this attempt is the last."""
    return failed.permanent or (failed.fault != "server" and attempt >= policy.attempts)
