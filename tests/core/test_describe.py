"""Values as text: counts and durations."""

from __future__ import annotations

import pytest

from sequencerd.core.describe import counted, duration


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "0 ms"),
        (0.0123, "12 ms"),
        (1, "1 s"),
        (1.4, "1 s"),
        (59.6, "1 min"),
        (600, "10 min"),
        (3600, "1 h"),
        (3661, "1 h 1 min"),
        (90000, "1 d 1 h"),
        (86400 * 400, "400 d"),
    ],
)
def test_a_duration_has_its_two_greatest_units(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_a_noun_follows_its_number() -> None:
    assert [counted(n, "row") for n in (0, 1, 2, 1240)] == [
        "0 rows",
        "1 row",
        "2 rows",
        "1,240 rows",
    ]
