"""Durations: in words, and as elapsed time."""

from __future__ import annotations

import pytest

from sequencerd.core.faults import DefinitionError
from sequencerd.core.step_types.durations import (
    FixedDuration,
    describe_duration,
    elapsed,
    in_words,
)
from sequencerd.core.window_config import WindowConfig


@pytest.mark.parametrize(
    ("amount", "unit", "words"),
    [
        (1, "hours", "1 hour"),
        (1.0, "day", "1 day"),
        (2, "day", "2 days"),
        (0, "days", "0 days"),
        (1.5, "h", "1.5 hours"),
        (-1, "days", "-1 days"),
        (1, "businessDays", "1 business day"),
        (3, "business day", "3 business days"),
        (1, "M", "1 month"),
        ("{{data.n}}", "weeks", "{{data.n}} weeks"),
        (1, "fortnights", "1 fortnights"),  # a config that nobody has checked
    ],
)
def test_the_unit_agrees_with_the_amount(amount: object, unit: str, words: str) -> None:
    assert in_words(amount, unit) == words


@pytest.mark.parametrize("amount", [367, 1e300, 10**400])
def test_a_period_of_more_than_a_year_is_refused(amount: float) -> None:
    with pytest.raises(DefinitionError, match="is more than a year"):
        elapsed(FixedDuration(amount=amount, unit="days"))


def test_the_time_of_a_window_is_no_elapsed_time() -> None:
    with pytest.raises(DefinitionError, match="is elapsed time: leave within out"):
        elapsed(FixedDuration(amount=1, unit="hours", within=WindowConfig(days=["mon"])))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"amount": 4, "unit": "hours"}, "4 hours"),
        ({"amount": 4, "unit": "h", "within": {"days": ["mon"]}}, "4 hours within mon"),
        ({"amount": 4, "unit": "h", "within": {"days": "mon"}}, "4 hours"),  # nobody checked it
        ({"amount": 4, "unit": "h", "within": "work"}, "4 hours"),
        ({"amount": 4}, ""),
    ],
)
def test_a_duration_is_described(config: dict[str, object], words: str) -> None:
    assert describe_duration(config) == words
