"""Anniversaries, by their rules and by properties."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sequencerd.core.calendar import dates
from sequencerd.core.calendar.anniversaries import next_anniversary
from sequencerd.core.faults import EvaluationError
from tests.core.calendar.test_dates import ZONES, at, instants

BERLIN = dates.zone("Europe/Berlin")


@pytest.mark.parametrize(
    ("first", "after", "found"),
    [
        ("1990-05-04T22:00:00Z", "2026-01-01T00:00:00Z", "2026-05-04T22:00:00Z"),  # 5 May, 0:00
        ("1990-05-04T22:00:00Z", "2026-05-04T22:00:00Z", "2027-05-04T22:00:00Z"),  # after it
        ("1990-01-05T09:00:00Z", "2026-05-01T00:00:00Z", "2027-01-05T09:00:00Z"),
        ("2024-02-28T23:00:00Z", "2026-01-01T00:00:00Z", "2026-02-27T23:00:00Z"),  # 29 February
        ("2024-02-28T23:00:00Z", "2028-01-01T00:00:00Z", "2028-02-28T23:00:00Z"),
        ("2030-05-04T22:00:00Z", "2026-01-01T00:00:00Z", "2030-05-04T22:00:00Z"),  # not before it
        ("1990-03-29T01:30:00Z", "2026-01-01T00:00:00Z", "2026-03-29T01:30:00Z"),  # 3:30 is shown
        # the second 2:30 of its day, and from then on the first
        ("2026-10-25T01:30:00Z", "2026-01-01T00:00:00Z", "2026-10-25T01:30:00Z"),
        ("2015-10-25T01:30:00Z", "2026-01-01T00:00:00Z", "2026-10-25T00:30:00Z"),
    ],
)
def test_the_next_anniversary_comes_after_the_arrival(first: str, after: str, found: str) -> None:
    assert next_anniversary(at(first), at(after), BERLIN) == at(found)


@pytest.mark.parametrize(
    ("first", "after", "found"),
    [
        ("2019-01-31", "2026-02-01", "2026-02-28"),
        ("2019-01-31", "2026-02-28", "2026-03-31"),
        ("2019-01-31", "2028-02-01", "2028-02-29"),
        ("2019-12-05", "2026-12-05", "2027-01-05"),
        ("2030-01-31", "2026-02-01", "2030-01-31"),  # not before it
        ("2026-09-25T02:30", "2026-10-01", "2026-10-25T02:30"),  # the first of two
        ("2026-02-28T02:30", "2026-03-28T12:00", "2026-04-28T02:30"),
        ("2026-01-29T02:30", "2026-03-01", "2026-03-29T03:30"),  # skipped
    ],
)
def test_a_date_recurs_each_month(first: str, after: str, found: str) -> None:
    begun, since, end = (dates.parse(text, BERLIN) for text in (first, after, found))
    assert begun is not None
    assert since is not None
    assert next_anniversary(begun, since, BERLIN, months=1) == end


def test_the_moved_date_is_compared() -> None:
    def week_before(instant: datetime) -> datetime:
        return dates.add(instant, -7, "days", BERLIN)

    birthday = at("1990-01-04T23:00:00Z")
    for after, found in (
        ("2026-12-01T00:00:00Z", "2026-12-28T23:00:00Z"),
        ("2026-12-28T23:00:00Z", "2027-12-28T23:00:00Z"),
    ):
        assert next_anniversary(birthday, at(after), BERLIN, week_before) == at(found)


def test_the_end_of_the_calendar_is_bad_data() -> None:
    with pytest.raises(EvaluationError, match="9999"):
        next_anniversary(at("1990-05-05"), datetime(9999, 12, 30, tzinfo=UTC), BERLIN)


@given(instants, instants, st.integers(-800, 800), st.sampled_from(ZONES), st.sampled_from([1, 12]))
def test_the_anniversary_is_the_first_one_after_the_date(
    first: datetime, after: datetime, days: int, name: str, months: int
) -> None:
    tz = dates.zone(name)

    def moved(instant: datetime) -> datetime:
        return dates.add(instant, days, "days", tz)

    found = next_anniversary(first, after, tz, moved, months=months)
    assert found > after
    all_of_them = [
        moved(dates.add(first, number, "months", tz)).astimezone(tz).date()
        for number in range(0, 45 * 12, months)
    ]
    assert found.astimezone(tz).date() in all_of_them
    earlier = [day for day in all_of_them if day < found.astimezone(tz).date()]
    assert not earlier or earlier[-1] <= after.astimezone(tz).date()
    later = after + timedelta(days=40)
    assert next_anniversary(first, later, tz, moved, months=months) >= found
