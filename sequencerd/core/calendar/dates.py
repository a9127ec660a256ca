"""The calendar of the steps that wait, with the results of moment and moment-timezone.

Instants are aware datetimes in UTC. PostgreSQL has microseconds where moment has milliseconds: the
getters ignore the rest, `add` keeps it, and `next_match` never returns an instant before the given
one.
"""

from __future__ import annotations

from datetime import UTC, datetime, time, timedelta
from difflib import get_close_matches
from math import floor, trunc
from zoneinfo import ZoneInfo

from dateutil.relativedelta import relativedelta

from sequencerd.core.calendar.next_match import (
    ATTRIBUTES,
    aliases,
    bounds,
    full_name,
    get,
    impossible,
    next_match,
    next_start,
)
from sequencerd.core.calendar.parsing import format_iso, is_bare_number, parse, parse_unix
from sequencerd.core.calendar.zones import EPOCH, OUT_OF_RANGE, to_wall, zone
from sequencerd.core.faults import DefinitionError, EvaluationError

__all__ = [
    "ATTRIBUTES",
    "UNITS",
    "add",
    "at_clock",
    "bounds",
    "format_iso",
    "get",
    "impossible",
    "is_bare_number",
    "is_elapsed",
    "next_match",
    "next_start",
    "normalise_unit",
    "parse",
    "parse_unix",
    "zone",
]

_MONTHS = {"month": 1, "quarter": 3, "year": 12}
_DAYS = {"day": 1, "week": 7, "isoWeek": 7}
_MILLISECONDS = {
    "millisecond": (1,),
    "second": (1000,),
    "minute": (60_000,),
    "hour": (1000, 60, 60),  # one after the other, as the rounding of fractions depends on it
}

UNITS = frozenset(
    alias for units in (_MONTHS, _DAYS, _MILLISECONDS) for name in units for alias in aliases(name)
)
"""The names of the units that `add` takes, as moment's manual spells them."""

_MILLISECOND = timedelta(milliseconds=1)


def normalise_unit(unit: str) -> str:
    """Return the full name of a unit: "year", "quarter", "month", "week", "day", "hour" ...
    "millisecond".

    Capitals matter only in short forms ("M" months, "m" minutes), as in moment. Raises
    DefinitionError for all other names: moment would silently add nothing.
    """
    name = full_name(unit) if isinstance(unit, str) else None
    if name in _DAYS:
        return "day" if name == "day" else "week"
    if name is None or name not in (_MONTHS | _MILLISECONDS):
        near = get_close_matches(str(unit), UNITS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "write days, hours or the like"
        raise DefinitionError(f"{unit!r} is not a unit of time, {hint}")
    return name


def is_elapsed(unit: str) -> bool:
    """Return whether a unit is elapsed time: hours to milliseconds. Raises DefinitionError."""
    return normalise_unit(unit) in _MILLISECONDS


def add(instant: datetime, amount: float, unit: str, tz: ZoneInfo) -> datetime:
    """Return moment.tz(instant, tz).add(amount, unit).

    Years to days change the wall time: to the last day of a shorter month, and forward by the gap
    if the clock skips the time. They are rounded to whole months and days, half away from zero.
    Hours to milliseconds are elapsed time; fractions of a millisecond are dropped.
    Raises DefinitionError for an unknown unit and an amount that is not a number, EvaluationError
    (bad_data) where the result is outside of the years 1 to 9999.
    """
    unit = normalise_unit(unit)
    if isinstance(amount, bool) or not isinstance(amount, int | float):
        raise DefinitionError(f"the amount must be a number, not {amount!r}")
    wall = to_wall(instant, tz)
    try:
        if unit in _MILLISECONDS:
            return instant + _elapsed(wall, float(amount), unit)
        if unit in _MONTHS:
            moved = wall + relativedelta(months=_rounded(float(amount) * _MONTHS[unit]))
        else:
            moved = wall + timedelta(days=_rounded(float(amount) * _DAYS[unit]))
        return instant if moved == wall else _settled(moved, wall, tz)
    except (OverflowError, ValueError) as error:
        raise EvaluationError("bad_data", OUT_OF_RANGE) from error


def at_clock(instant: datetime, clock: time, tz: ZoneInfo) -> datetime:
    """Return the same day in a time zone at a time of day: after the gap if the clock skips that
    time, the first if it occurs twice. Raises EvaluationError (bad_data) beyond the year 9999.
    """
    day = to_wall(instant, tz).date()
    try:
        return datetime.combine(day, clock, tzinfo=tz).astimezone(UTC)
    except OverflowError as error:
        raise EvaluationError("bad_data", OUT_OF_RANGE) from error


def _elapsed(wall: datetime, amount: float, unit: str) -> timedelta:
    """Return an amount in whole milliseconds, as the difference of two JavaScript dates.

    moment's date is the wall time counted from 1970, and JavaScript truncates it towards 1970.
    """
    for factor in _MILLISECONDS[unit]:
        amount *= factor
    shown = (wall.replace(tzinfo=UTC) - EPOCH) // _MILLISECOND
    return timedelta(milliseconds=trunc(shown + amount) - shown)


def _rounded(number: float) -> int:
    """Round to the nearest whole number, half away from zero."""
    size = abs(number)
    whole = floor(size)
    whole += size - whole >= 0.5
    return whole if number > 0 else -whole


def _settled(moved: datetime, wall: datetime, tz: ZoneInfo) -> datetime:
    """Return the instant of a wall time to which `wall` was moved.

    moment guesses with the offset before the move, and uses the offset at that guess: if a time
    occurs twice, this is the first occurrence, or the second if standard time was in effect before.
    A time that the clock skips is moved forward by the gap.
    """
    as_utc = moved.replace(tzinfo=UTC)
    offset = (as_utc - _offset(wall)).astimezone(tz).utcoffset()
    assert offset is not None
    settled = as_utc - offset
    if settled.astimezone(tz).utcoffset() == offset:
        return settled
    return moved.replace(fold=0).astimezone(UTC)


def _offset(wall: datetime) -> timedelta:
    offset = wall.utcoffset()
    assert offset is not None
    return offset
