"""Anniversaries: a date that recurs each year, such as a birthday, or each month."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from zoneinfo import ZoneInfo

from dateutil.relativedelta import relativedelta

from sequencerd.core.calendar.zones import OUT_OF_RANGE, to_wall
from sequencerd.core.faults import EvaluationError


def next_anniversary(
    first: datetime,
    after: datetime,
    tz: ZoneInfo,
    moved: Callable[[datetime], datetime] = lambda at: at,
    *,
    months: int = 12,
) -> datetime:
    """Return the first anniversary of a date, the date itself included, that comes `after`.

    Anniversaries are some `months` apart, on the same day and at the same time of the zone; in a
    month that is too short, on its last day: that of 29 February is 28 February in common years.
    `moved` is what counts instead of each, such as three days before it; it must keep their order.
    Raise EvaluationError (bad_data) beyond the year 9999.
    """
    wall, end = to_wall(first, tz), to_wall(after, tz)

    def anniversary(number: int) -> datetime:
        if number == 0:  # it may have been the second of a time that occurs twice
            return moved(first)
        try:
            on_day = wall + relativedelta(months=number * months)
            return moved(on_day.replace(fold=0).astimezone(UTC))
        except (OverflowError, ValueError) as error:
            raise EvaluationError("bad_data", OUT_OF_RANGE) from error

    number = max(0, ((end.year - wall.year) * 12 + end.month - wall.month) // months)
    while number > 0 and anniversary(number) > after:
        number -= 1
    while (found := anniversary(number)) <= after:
        number += 1
    return found
