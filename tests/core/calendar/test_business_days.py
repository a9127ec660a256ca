"""Business days, by their rules and by properties."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sequencerd.core.calendar import dates
from sequencerd.core.calendar.business_days import add_business_days, is_business_day
from sequencerd.core.faults import EvaluationError
from tests.core.calendar.test_dates import ZONES, at, instants

BERLIN = dates.zone("Europe/Berlin")
EASTER = frozenset({date(2026, 4, 3), date(2026, 4, 6)})
holidays = st.frozensets(st.dates(date(2000, 1, 1), date(2036, 1, 1)), max_size=20)
amounts = st.integers(-60, 60)


@pytest.mark.parametrize(
    ("start", "amount", "end"),
    [
        ("2026-04-02T07:00:00Z", 1, "2026-04-07T07:00:00Z"),  # Good Friday to Easter Monday
        ("2026-04-07T07:00:00Z", -1, "2026-04-02T07:00:00Z"),
        ("2026-03-27T08:00:00Z", 1, "2026-03-30T07:00:00Z"),  # 9:00, clocks are set on Sunday
        ("2026-04-04T07:00:00Z", 1, "2026-04-07T07:00:00Z"),  # from Saturday to the next
        ("2026-04-04T07:00:00Z", -1, "2026-04-02T07:00:00Z"),  # and to the last before
        ("2026-04-04T07:00:00Z", 0, "2026-04-07T07:00:00Z"),
        ("2026-04-02T07:00:00Z", 0, "2026-04-02T07:00:00Z"),
    ],
)
def test_weekends_and_holidays_do_not_count(start: str, amount: int, end: str) -> None:
    assert add_business_days(at(start), amount, BERLIN, EASTER) == at(end)


@pytest.mark.parametrize("amount", [1.5, 10_001, -10_001])
def test_an_amount_that_cannot_be_counted_is_bad_data(amount: float) -> None:
    with pytest.raises(EvaluationError, match="business days: write a whole number"):
        add_business_days(at("2026-04-02T07:00:00Z"), amount, BERLIN)


def test_the_end_of_the_calendar_is_bad_data() -> None:
    with pytest.raises(EvaluationError, match="9999"):
        add_business_days(datetime(9999, 12, 30, tzinfo=UTC), 5, BERLIN)


@given(instants, amounts, st.sampled_from(ZONES), holidays)
def test_a_sum_of_business_days_ends_on_a_business_day(
    start: datetime, amount: int, name: str, off: frozenset[date]
) -> None:
    tz = dates.zone(name)
    end = add_business_days(start, amount, tz, off)
    first, last = sorted((start.astimezone(tz).date(), end.astimezone(tz).date()))
    days = [first + timedelta(days=n) for n in range((last - first).days + 1)]
    business = [day for day in days if is_business_day(day, off)]
    assert is_business_day(end.astimezone(tz).date(), off)
    counted = set(business) - {start.astimezone(tz).date()}
    assert len(counted) == abs(amount) or (amount == 0 and end >= start and len(counted) <= 1)


@given(instants, st.timedeltas(timedelta(0), timedelta(days=20)), amounts, holidays)
def test_a_later_start_does_not_end_earlier(
    start: datetime, ahead: timedelta, amount: int, off: frozenset[date]
) -> None:
    tz = dates.zone("UTC")
    end = add_business_days(start, amount, tz, off)
    later = add_business_days(start + ahead, amount, tz, off)
    assert later.date() >= end.date()
