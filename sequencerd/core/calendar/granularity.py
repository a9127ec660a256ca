"""The period that contains an instant, such as its day: what moment compares."""

from __future__ import annotations

from datetime import datetime, timedelta
from zoneinfo import ZoneInfo

from sequencerd.core.calendar.zones import EPOCH, to_wall

_LENGTHS = {
    "hour": timedelta(hours=1),
    "minute": timedelta(minutes=1),
    "second": timedelta(seconds=1),
    "millisecond": timedelta(milliseconds=1),
}

GRANULARITIES = ("year", "quarter", "month", "week", "isoWeek", "day", *_LENGTHS)
"""moment's names; a week begins on Sunday, an isoWeek on Monday."""


def period(instant: datetime, unit: str, tz: ZoneInfo) -> int:
    """Return the period of an instant in a zone, as a number that grows with time.

    Years to days are calendar time. Hours and shorter periods are elapsed time: an hour that occurs
    twice is two hours.
    """
    wall = to_wall(instant, tz)
    match unit:
        case "year":
            return wall.year
        case "quarter":
            return wall.year * 4 + (wall.month - 1) // 3
        case "month":
            return wall.year * 12 + wall.month
        case "week":
            return wall.toordinal() // 7  # the first day of the year 1 was a Monday
        case "isoWeek":
            return (wall.toordinal() - 1) // 7
        case "day":
            return wall.toordinal()
    shown = wall.replace(tzinfo=None) - datetime(1, 1, 1)  # noqa: DTZ001 - what a clock shows
    return (instant - shown % _LENGTHS[unit] - EPOCH) // _LENGTHS["millisecond"]
