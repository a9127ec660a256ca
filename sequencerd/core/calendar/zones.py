"""Time zones: their names, and conversions between instants and wall times.

An instant is an aware datetime in UTC. A wall time is an aware datetime in its zone: arithmetic on
it changes the local time, and the offset is determined only when it is converted back.

The rules come from the package tzdata, never from the machine: two daemons of one version must
wake enrollments at the same second, whatever their containers contain. The package is built from
the same sources, including the history before 1970, as moment-timezone's data (0.6.6 has 2026f).
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from difflib import get_close_matches
from functools import cache
from importlib.resources import files
from zoneinfo import ZoneInfo

from sequencerd.core.faults import DefinitionError, EvaluationError

OUT_OF_RANGE = "the date is outside of the years 1 to 9999"
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

_SECOND = timedelta(seconds=1)
_DAY = timedelta(days=1)


def zone(name: str) -> ZoneInfo:
    """Return the zone with an IANA name. Case is ignored: no two IANA names differ in case alone.

    Raises DefinitionError for a name that is not in the IANA list. Nothing else is looked up, so
    a name cannot lead to a file outside of it.
    """
    known = _names().get(name.lower()) if isinstance(name, str) else None
    if known is None:
        raise DefinitionError(f"{name!r} is not a time zone{_suggestion(name)}")
    return _load(known)


def to_wall(instant: datetime, tz: ZoneInfo) -> datetime:
    """Return the wall time of a zone at an instant.

    Raises EvaluationError (bad_data) where that is outside of the years 1 to 9999.
    """
    try:
        return instant.astimezone(tz)
    except OverflowError as error:
        raise EvaluationError("bad_data", OUT_OF_RANGE) from error


def first_showing(wall: datetime, since: datetime) -> datetime:
    """Return the first instant, not before `since`, with this wall time or a later one.

    A time that is skipped gives the end of the gap; one that comes twice gives the first
    occurrence, or the second where the first lies before `since`.
    Raises OverflowError at either end of the calendar.
    """
    before, after = _offsets(wall)
    first = _at_offset(wall, before)
    if before < after:
        tz = wall.tzinfo
        assert isinstance(tz, ZoneInfo)
        return offset_change(_at_offset(wall, after), first, tz)
    return first if first >= since else _at_offset(wall, after)


def next_candidate(wall: datetime, since: datetime, tz: ZoneInfo) -> datetime:
    """Return when to look for a wall time that comes after the present one: when the clock first
    shows it, or when the clock is set back before that, as it may then show an earlier match again.
    """
    showing, again = first_showing(wall, since), set_back(since, tz)
    return showing if again is None else min(showing, again)


def offset_change(start: datetime, end: datetime, tz: ZoneInfo) -> datetime:
    """Return the instant in (start, end] from which on the offset differs from that of `start`.

    There must be one. Offsets change at whole seconds, so bisecting whole seconds finds it.
    """
    origin = start.replace(microsecond=0)
    offset = origin.astimezone(tz).utcoffset()
    same, changed = 0, -((origin - end) // _SECOND)
    while changed - same > 1:
        middle = (same + changed) // 2
        if (origin + timedelta(seconds=middle)).astimezone(tz).utcoffset() == offset:
            same = middle
        else:
            changed = middle
    return origin + timedelta(seconds=changed)


def set_back(instant: datetime, tz: ZoneInfo) -> datetime | None:
    """Return when clocks are set back within a day; no zone has done so by more than a day."""
    tomorrow = instant + _DAY
    now, then = instant.astimezone(tz).utcoffset(), tomorrow.astimezone(tz).utcoffset()
    assert now is not None
    assert then is not None
    return offset_change(instant, tomorrow, tz) if then < now else None


def _at_offset(wall: datetime, offset: timedelta) -> datetime:
    return wall.replace(tzinfo=UTC, fold=0) - offset


def _offsets(wall: datetime) -> tuple[timedelta, timedelta]:
    """Return the offsets of a wall time before and after a change (PEP 495's fold 0 and 1)."""
    before, after = wall.replace(fold=0).utcoffset(), wall.replace(fold=1).utcoffset()
    assert before is not None
    assert after is not None
    return before, after


@cache
def _names() -> Mapping[str, str]:
    """Return all IANA names by their lower-case spelling."""
    listed = files("tzdata").joinpath("zones").read_text(encoding="utf-8")
    return {name.lower(): name for name in listed.split()}


@cache
def _load(name: str) -> ZoneInfo:
    with files("tzdata").joinpath("zoneinfo", *name.split("/")).open("rb") as file:
        return ZoneInfo.from_file(file, key=name)


def _suggestion(name: object) -> str:
    names = _names()
    near = get_close_matches(str(name).lower(), names, n=1)
    if near:
        return f", did you mean {names[near[0]]!r}?"
    return ": write an IANA name such as 'Europe/Berlin' or 'UTC'"
