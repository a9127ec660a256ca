"""The fields of a date as moment's getters give them, and when a field next has a wanted value.

The getters are those of `moment().get(attribute)` in the English locale: months count from 0,
Sunday is day 0, week 1 is the week (Sunday to Saturday) with 1 January. ISO weeks run from Monday
to Sunday; the first is the one with 4 January.
"""

from __future__ import annotations

from calendar import isleap, monthrange
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from datetime import MAXYEAR, MINYEAR, date, datetime, time, timedelta
from difflib import get_close_matches
from typing import NamedTuple
from zoneinfo import ZoneInfo

from sequencerd.core.calendar.zones import OUT_OF_RANGE, next_candidate, to_wall
from sequencerd.core.faults import DefinitionError, EvaluationError

HORIZON_YEARS = 10
"""How far next_match looks. 29 February is at most 8 years away, a week 53 at most 7."""

_DAY = timedelta(days=1)
_HORIZON = timedelta(days=HORIZON_YEARS * 365.25)

# moment's names in full, as getters and as units, each with its short form.
_SHORT_FORMS = {
    "year": "y",
    "quarter": "Q",
    "month": "M",
    "week": "w",
    "isoWeek": "W",
    "weekYear": "gg",
    "isoWeekYear": "GG",
    "dayOfYear": "DDD",
    "date": "D",
    "day": "d",
    "weekday": "e",
    "isoWeekday": "E",
    "hour": "h",
    "minute": "m",
    "second": "s",
    "millisecond": "ms",
}
_NAMES = {
    alias: name
    for name, short in _SHORT_FORMS.items()
    for alias in (short, name.lower(), name.lower() + "s")
}


def aliases(name: str) -> tuple[str, str, str]:
    """Return moment's names for a full name: itself, the plural and the short form."""
    return name, name + "s", _SHORT_FORMS[name]


def full_name(alias: str) -> str | None:
    """Return a unit's full name, like moment's normalizeUnits: the case matters only in short forms
    ("M" is not "m").
    """
    return _NAMES.get(alias) or _NAMES.get(alias.lower())


ATTRIBUTES = frozenset(alias for name in _SHORT_FORMS for alias in aliases(name))
"""The getters' names, as moment's manual spells them."""


def get(instant: datetime, attribute: str, tz: ZoneInfo) -> int:
    """Return moment.tz(instant, tz).get(attribute). Milliseconds are cut off, not rounded.

    Raises DefinitionError for an attribute that moment doesn't know, EvaluationError (bad_data)
    for a date outside of the years 1 to 9999.
    """
    field = _field(attribute)
    wall = to_wall(instant, tz)
    try:
        return field.read(wall)
    except OverflowError as error:
        raise EvaluationError("bad_data", OUT_OF_RANGE) from error


def bounds(attribute: str) -> tuple[int, int]:
    """Return the least and the greatest value of a getter. Raises DefinitionError."""
    field = _field(attribute)
    return field.lowest, field.highest


def impossible(attribute: str, values: Iterable[object]) -> list[object]:
    """Return the `values` that can never occur: a definition with one is rejected.

    The original compared with `===`: only a number in the getter's range can match, so "1", true
    and 1.5 never do, while 1.0 is 1. Raises DefinitionError for an unknown attribute.
    """
    field = _field(attribute)
    return [value for value in values if _in_range(value, field) is None]


def next_match(
    after: datetime, attribute: str, values: Collection[object], tz: ZoneInfo
) -> datetime | None:
    """Return the first instant, not before `after`, at which a getter has one of the values.

    That is `after` itself, to the microsecond, if it matches already. Return None if there is no
    such instant within HORIZON_YEARS, as with values that never occur. Raises DefinitionError for
    an unknown attribute.
    """
    field = _field(attribute)
    if not (wanted := _possible(values, field)):
        return None
    try:
        return _search(after, field, wanted, tz)
    except (OverflowError, ValueError):
        return None  # datetime's calendar ends before the next match


def next_start(
    after: datetime, attribute: str, values: Collection[object], tz: ZoneInfo
) -> datetime | None:
    """Return the first instant after `after` at which a period with one of the values begins.

    A period lasts for as long as the getter returns the same value: an hour that occurs twice is a
    single period. Returns None and raises errors like next_match.
    """
    field = _field(attribute)
    if not (wanted := _possible(values, field)):
        return None
    try:
        present = field.read(after.astimezone(tz))
        if present in wanted:
            others = [present + 1] if field.highest == MAXYEAR else _all_values_but(present, field)
            ended = _search(after, field, others, tz)
            if ended is None:
                return None
            after = ended
    except (OverflowError, ValueError):
        return None
    return next_match(after, attribute, values, tz)


def _all_values_but(value: int, field: _DateField) -> list[int]:
    return [other for other in range(field.lowest, field.highest + 1) if other != value]


class _DateField(NamedTuple):
    """The range of a moment getter, its value at a wall time, and the next wall time with a value.

    `following` takes a wall time whose own value is not wanted, and the wanted values in order.
    """

    lowest: int
    highest: int
    read: Callable[[datetime], int]
    following: Callable[[datetime, Sequence[int]], datetime | None]


def _search(
    after: datetime, field: _DateField, wanted: Sequence[int], tz: ZoneInfo
) -> datetime | None:
    """Search the next match, from one candidate wall time to the next: usually one, two at a gap.

    If the clock skips a candidate, the search continues from the end of the gap.
    """
    instant = after
    while instant - after <= _HORIZON:
        wall = instant.astimezone(tz)
        if field.read(wall) in wanted:
            return instant
        target = field.following(wall, wanted)
        if target is None:
            return None
        instant = next_candidate(target, instant, tz)
    return None


def _field(attribute: str) -> _DateField:
    name = full_name(attribute) if isinstance(attribute, str) else None
    if name is None:
        near = get_close_matches(str(attribute), ATTRIBUTES, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"write one of {', '.join(_FIELDS)}"
        raise DefinitionError(f"moment has no getter {attribute!r}, {hint}")
    return _FIELDS[name]


def _in_range(value: object, field: _DateField) -> int | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if not field.lowest <= value <= field.highest or value != int(value):
        return None
    return int(value)


def _possible(values: Iterable[object], field: _DateField) -> list[int]:
    """Return the values that can occur, in order."""
    found = (_in_range(value, field) for value in values)
    return sorted({value for value in found if value is not None})


def _of_clock(unit: timedelta, count: int) -> Callable[[datetime, Sequence[int]], datetime]:
    """Return a function to the next start of a wanted unit, which is counted modulo `count`."""

    def following(wall: datetime, wanted: Sequence[int]) -> datetime:
        midnight = datetime.combine(wall.date(), time.min, tzinfo=wall.tzinfo)
        passed = (wall - midnight) // unit
        ahead = min((value - passed) % count for value in wanted)
        return midnight + (passed + ahead) * unit

    return following


def _of_day(
    rule: Callable[[date, Sequence[int]], date | None],
) -> Callable[[datetime, Sequence[int]], datetime | None]:
    """Return a function to the midnight of the day that the rule returns."""

    def following(wall: datetime, wanted: Sequence[int]) -> datetime | None:
        day = rule(wall.date(), wanted)
        return None if day is None else datetime.combine(day, time.min, tzinfo=wall.tzinfo)

    return following


def _next_weekday(day: date, wanted: Sequence[int]) -> date:
    """Return the next day with a wanted weekday; Sunday is 0, or 7 as in ISO 8601."""
    return day + _DAY * min((value - day.isoweekday()) % 7 for value in wanted)


def _next_day_of_month(day: date, wanted: Sequence[int]) -> date | None:
    """Return the next day with a wanted number, which comes within two months: no two consecutive
    months are short.
    """
    for months in range(day.month - 1, day.month + 2):
        year, month = day.year + months // 12, months % 12 + 1
        for value in wanted:
            if value <= monthrange(year, month)[1] and date(year, month, value) > day:
                return date(year, month, value)
    return None


def _in_years(
    starts: Callable[[int, Sequence[int]], Iterable[date]],
) -> Callable[[date, Sequence[int]], date | None]:
    """Return the first start of a wanted period after a day, given the ordered starts of a year."""

    def rule(day: date, wanted: Sequence[int]) -> date | None:
        for year in range(day.year, min(day.year + HORIZON_YEARS, MAXYEAR) + 1):
            for start in starts(year, wanted):
                if start > day:
                    return start
        return None

    return rule


def _years(year: int, wanted: Sequence[int]) -> Iterator[date]:
    return (date(year, 1, 1) for value in wanted if value == year)


def _quarters(year: int, wanted: Sequence[int]) -> Iterator[date]:
    return (date(year, 3 * value - 2, 1) for value in wanted)


def _months(year: int, wanted: Sequence[int]) -> Iterator[date]:
    return (date(year, value + 1, 1) for value in wanted)


def _days_of_year(year: int, wanted: Sequence[int]) -> Iterator[date]:
    days = 366 if isleap(year) else 365
    return (date(year, 1, 1) + _DAY * (value - 1) for value in wanted if value <= days)


def _first_week(year: int) -> date:
    """Return the Sunday on which the week with 1 January begins."""
    first = date(year, 1, 1)
    return first - _DAY * (first.isoweekday() % 7)


def _first_iso_week(year: int) -> date:
    """Return the Monday on which the week with 4 January begins."""
    return date.fromisocalendar(year, 1, 1)


def _weeks(first_week: Callable[[int], date]) -> Callable[[int, Sequence[int]], Iterator[date]]:
    """Return the starts of the wanted weeks of a week year. Week 53 may belong to the next."""

    def starts(year: int, wanted: Sequence[int]) -> Iterator[date]:
        for value in wanted:
            start = first_week(year) + _DAY * 7 * (value - 1)
            if value < 53 or start < first_week(year + 1):
                yield start

    return starts


def _week_years(
    first_week: Callable[[int], date],
) -> Callable[[int, Sequence[int]], Iterator[date]]:
    return lambda year, wanted: (first_week(year) for value in wanted if value == year)


def _saturday(wall: datetime) -> date:
    """Return the end of the English week, whose year is the week's year, since it has 1 January."""
    return wall.date() + _DAY * (6 - wall.isoweekday() % 7)


def _day_of_year(day: date) -> int:
    return day.timetuple().tm_yday


_MILLISECOND = timedelta(milliseconds=1)
_SECOND = timedelta(seconds=1)
_MINUTE = timedelta(minutes=1)
_HOUR = timedelta(hours=1)

_FIELDS = {
    "year": _DateField(MINYEAR, MAXYEAR, lambda wall: wall.year, _of_day(_in_years(_years))),
    "quarter": _DateField(1, 4, lambda wall: (wall.month + 2) // 3, _of_day(_in_years(_quarters))),
    "month": _DateField(0, 11, lambda wall: wall.month - 1, _of_day(_in_years(_months))),
    "week": _DateField(
        1,
        53,
        lambda wall: (_day_of_year(_saturday(wall)) + 6) // 7,
        _of_day(_in_years(_weeks(_first_week))),
    ),
    "isoWeek": _DateField(
        1,
        53,
        lambda wall: wall.isocalendar().week,
        _of_day(_in_years(_weeks(_first_iso_week))),
    ),
    "weekYear": _DateField(
        MINYEAR,
        MAXYEAR,
        lambda wall: _saturday(wall).year,
        _of_day(_in_years(_week_years(_first_week))),
    ),
    "isoWeekYear": _DateField(
        MINYEAR,
        MAXYEAR,
        lambda wall: wall.isocalendar().year,
        _of_day(_in_years(_week_years(_first_iso_week))),
    ),
    "dayOfYear": _DateField(1, 366, _day_of_year, _of_day(_in_years(_days_of_year))),
    "date": _DateField(1, 31, lambda wall: wall.day, _of_day(_next_day_of_month)),
    "day": _DateField(0, 6, lambda wall: wall.isoweekday() % 7, _of_day(_next_weekday)),
    "weekday": _DateField(0, 6, lambda wall: wall.isoweekday() % 7, _of_day(_next_weekday)),
    "isoWeekday": _DateField(1, 7, lambda wall: wall.isoweekday(), _of_day(_next_weekday)),
    "hour": _DateField(0, 23, lambda wall: wall.hour, _of_clock(_HOUR, 24)),
    "minute": _DateField(0, 59, lambda wall: wall.minute, _of_clock(_MINUTE, 60)),
    "second": _DateField(0, 59, lambda wall: wall.second, _of_clock(_SECOND, 60)),
    "millisecond": _DateField(
        0, 999, lambda wall: wall.microsecond // 1000, _of_clock(_MILLISECOND, 1000)
    ),
}
