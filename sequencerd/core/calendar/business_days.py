"""Business days: Monday to Friday, except for the holidays of a calendar."""

from __future__ import annotations

from collections.abc import Collection
from datetime import date, datetime, timedelta
from zoneinfo import ZoneInfo

from sequencerd.core.calendar.zones import OUT_OF_RANGE, to_wall
from sequencerd.core.faults import EvaluationError

BUSINESS_DAYS = frozenset({"business day", "business days", "businessDay", "businessDays"})
"""The unit's names."""

MAX_AMOUNT = 10_000  # some forty years, which are counted day by day

_DAY = timedelta(days=1)
_SATURDAY = 5


def is_business_day(day: date, holidays: Collection[date] = ()) -> bool:
    """Return whether a day is neither on a weekend nor a holiday."""
    return day.weekday() < _SATURDAY and day not in holidays


def add_business_days(
    instant: datetime, amount: float, tz: ZoneInfo, holidays: Collection[date] = ()
) -> datetime:
    """Move an instant by business days of its zone, at the same time of day.

    From a day off, one business day ahead is the next business day, and one back is the last
    before it; 0 stays on a business day, and otherwise moves to the next. A time that the clock
    skips is moved on by the gap. Raise EvaluationError (bad_data) for a fraction, for more than
    MAX_AMOUNT, and outside of the years 1 to 9999.
    """
    if amount != int(amount) or abs(amount) > MAX_AMOUNT:
        raise EvaluationError(
            "bad_data", f"{amount:g} business days: write a whole number, at most {MAX_AMOUNT:,}"
        )
    wall = to_wall(instant, tz)
    step = _DAY if amount >= 0 else -_DAY
    day, left = wall.date(), abs(int(amount))
    try:
        while not amount and not is_business_day(day, holidays):
            day += step
        while left:
            day += step
            left -= is_business_day(day, holidays)
        if day == wall.date():
            return instant
        return wall.replace(day.year, day.month, day.day, fold=0).astimezone(instant.tzinfo)
    except (OverflowError, ValueError) as error:
        raise EvaluationError("bad_data", OUT_OF_RANGE) from error
