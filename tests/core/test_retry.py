"""How long the waits between attempts are, and which attempt is the last one."""

from __future__ import annotations

from datetime import timedelta
from itertools import count

import pytest

from sequencerd.core.model import RetryPolicy
from sequencerd.core.retry import DEFAULT_PAUSE, delay, gives_up
from sequencerd.core.task import Failed

COUNTED = RetryPolicy(attempts=4, first_delay=10.0, longest_delay=40.0)
SPAN = RetryPolicy(None, 60.0, 3600.0, give_up_after=7200.0)
REFUSED = Failed("refused")


@pytest.mark.parametrize(
    ("policy", "jitter", "seconds"),
    [
        (COUNTED, 1.0, [10, 20, 40, 40]),
        (COUNTED, 0.5, [5, 10, 20, 20]),
        (COUNTED, 0.0, [0, 0, 0, 0]),
        # the span is never cut short
        (SPAN, 0.0, [60, 120, 240, 480]),
        (SPAN, 1.0, [75, 150, 300, 600]),
        (RetryPolicy(None, 0.0, 0.0, 10.0), 0.0, [1, 1, 1, 1]),
    ],
)
def test_delays_are_doubled_up_to_the_longest(
    policy: RetryPolicy, jitter: float, seconds: list[float]
) -> None:
    delays = [delay(policy, attempt, REFUSED, jitter) for attempt in range(1, 5)]
    assert [one.total_seconds() for one in delays] == seconds


@pytest.mark.parametrize(
    ("asked", "refused", "down"),
    [
        (None, timedelta(seconds=10), DEFAULT_PAUSE),
        (timedelta(seconds=3), timedelta(seconds=10), timedelta(seconds=3)),
        (timedelta(minutes=3), timedelta(minutes=3), timedelta(minutes=3)),
        (timedelta(days=30), timedelta(days=1), timedelta(days=1)),
        (timedelta(days=-30), timedelta(seconds=10), timedelta(0)),
    ],
)
def test_what_a_server_asks_for_is_the_least(
    asked: timedelta | None, refused: timedelta, down: timedelta
) -> None:
    assert delay(COUNTED, 1, Failed("x", retry_after=asked), 1.0) == refused
    assert delay(COUNTED, 1, Failed("x", retry_after=asked, fault="server"), 1.0) == down


@pytest.mark.parametrize(
    ("policy", "last"),
    [(COUNTED, 4), (SPAN, 8), (RetryPolicy(None, 0.0, 0.0, 10.0), 11), (RetryPolicy(1), 1)],
)
def test_the_last_attempt(policy: RetryPolicy, last: int) -> None:
    assert next(number for number in count(1) if gives_up(policy, number, REFUSED)) == last


def test_only_the_fault_of_an_enrollment_ends_the_attempts() -> None:
    for fault in ("server", "unclear"):
        assert not gives_up(COUNTED, 99, Failed("x", fault=fault))
    assert gives_up(COUNTED, 1, Failed("x", permanent=True))
