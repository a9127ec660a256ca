"""Anniversaries: a date that recurs each year, such as a birthday."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from zoneinfo import ZoneInfo

from dateutil.relativedelta import relativedelta

from sequencerd.core.calendar.zones import OUT_OF_RANGE, to_wall
from sequencerd.core.model import EvaluationError


def next_anniversary(
    first: datetime,
    after: datetime,
    tz: ZoneInfo,
    moved: Callable[[datetime], datetime] = lambda at: at,
) -> datetime:
    """Return the first anniversary of a date, the date itself included, that comes `after`.

    An anniversary is on the same day and at the same time of its zone; that of 29 February is 28
    February in common years. `moved` is what counts instead of each, such as three days before it;
    it must keep their order. Raise EvaluationError (bad_data) beyond the year 9999.
    """
    wall = to_wall(first, tz)

    def of(year: int) -> datetime:
        if year == wall.year:  # it may have been the second of a time that occurs twice
            return moved(first)
        try:
            return moved((wall + relativedelta(year=year)).replace(fold=0).astimezone(UTC))
        except (OverflowError, ValueError) as error:
            raise EvaluationError("bad_data", OUT_OF_RANGE) from error

    year = max(to_wall(after, tz).year, wall.year)
    while year > wall.year and of(year) > after:
        year -= 1
    while (found := of(year)) <= after:
        year += 1
    return found
