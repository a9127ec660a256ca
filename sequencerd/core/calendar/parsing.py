"""Dates as text: what moment reads without guessing, and how JavaScript writes it.

moment reads ISO 8601, RFC 2822 (the date of an e-mail) and ASP.NET's Date(...). It passes any other
text to JavaScript's Date, which guesses, ignores the zone and differs between engines: here, such
text is not a date.
"""

from __future__ import annotations

import re
from calendar import isleap
from datetime import UTC, date, datetime, time, timedelta
from re import Match, Pattern
from zoneinfo import ZoneInfo

from sequencerd.core.calendar.zones import EPOCH

# JavaScript's \s: without the control characters that Python's takes as well, with the BOM.
_SPACE = r"[\t\n\v\f\r \xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000\ufeff]"


def _iso_style(dash: str, colon: str) -> Pattern[str]:
    """Return a pattern for ISO 8601 as moment reads it. A text does not mix the two styles."""
    return re.compile(
        rf"""{_SPACE}*
        (?P<year>[+-][0-9]{{6}}|[0-9]{{4}})
        (?: {dash}(?P<month>[0-9]{{2}})(?:{dash}(?P<day>[0-9]{{2}}))?
          | {dash}W(?P<week>[0-9]{{2}})(?:{dash}(?P<weekday>[0-9]))?
          | {dash}(?P<ordinal>[0-9]{{3}})
        )?
        (?: [T\ ](?P<hour>[0-9]{{2}})
            (?: {colon}(?P<minute>[0-9]{{2}})
                (?: {colon}(?P<second>[0-9]{{2}})(?:[.,](?P<fraction>[0-9]+))? )?
            )?
            (?P<offset>[+-][0-9]{{2}}(?::?[0-9]{{2}})? | {_SPACE}*Z)?
        )?""",
        re.VERBOSE,
    )


_ISO_STYLES = _iso_style("-", ":"), _iso_style("", "")

# As Ruby writes it, and Go: 2026-12-01 10:00:00 UTC, 2026-12-01 10:00:00 +0100 CET m=+0.5. Without
# an offset, the name of a zone is not enough: several may have it.
_SPACED_OFFSET = re.compile(
    r"(?P<wall>[0-9]{4}-[0-9]{2}-[0-9]{2}\ [0-9]{2}:[0-9]{2}:[0-9]{2}(?:\.[0-9]+)?)"
    r"\ (?P<offset>UTC|GMT|[+-][0-9]{2}:?[0-9]{2})"
    r"(?:(?<=[0-9])\ (?:[A-Z]{2,5}|[+-][0-9]{2,4})(?:\ m=[+-][0-9.]+)?)?"
)

_NUMBER = re.compile(r"[+-]?[0-9]+(?:\.[0-9]+)?")
_BASIC_DATE = re.compile(r"[0-9]{8}")

_ASP_NET = re.compile(r"/?Date\((-?[0-9]+)", re.IGNORECASE | re.ASCII)

_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
_WEEKDAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
_COMMENT = re.compile(r"\([^()]*\)|[\n\t]")
_SPACES = re.compile(rf"{_SPACE}{{2,}}")
_ENDS = re.compile(rf"\A{_SPACE}|{_SPACE}\Z")
_RFC_2822 = re.compile(
    rf"""(?:(?P<weekday>{"|".join(_WEEKDAYS)}),?{_SPACE})?
    (?P<day>[0-9]{{1,2}}){_SPACE}(?P<month>{"|".join(_MONTHS)}){_SPACE}(?P<year>[0-9]{{2,4}})
    {_SPACE}(?P<hour>[0-9]{{2}}):(?P<minute>[0-9]{{2}})(?::(?P<second>[0-9]{{2}}))?
    {_SPACE}(?P<offset>UT|GMT|[ECMP][SD]T|[Zz]|[+-][0-9]{{4}})""",
    re.VERBOSE,
)
_HOURS_WEST = {"E": 5, "C": 6, "M": 7, "P": 8}


def parse(text: str, tz: ZoneInfo) -> datetime | None:
    """Parse a text to an instant in UTC, to the millisecond; without an offset, in the zone.

    ISO 8601 as moment takes it (YYYY, YYYY-MM, YYYY-MM-DD, YYYY-DDD, YYYY-Www, YYYY-Www-D, the
    basic forms without dashes and colons; after a whole date T or a space and HH, HH:mm, HH:mm:ss,
    HH:mm:ss.SSS and Z or an offset), the same as Ruby writes it with a space before UTC or the
    offset, RFC 2822, and ASP.NET's /Date(milliseconds)/.
    A time in a gap is moved forward by the gap; of a time that occurs twice, the first is returned.
    Return None for everything else: invalid text, text at which JavaScript's Date would guess, and
    years outside of 1 to 9999.
    """
    try:
        if match := _ASP_NET.match(text):
            return EPOCH + timedelta(milliseconds=int(match[1]))
        if spaced := _SPACED_OFFSET.fullmatch(text):
            text = spaced["wall"] + spaced["offset"].replace("UTC", "Z").replace("GMT", "Z")
        for style in _ISO_STYLES:
            if match := style.fullmatch(text):
                return _from_iso(match, tz)
        if match := _RFC_2822.fullmatch(_without_comments(text)):
            return _from_rfc_2822(match)
    except (ValueError, OverflowError):
        return None  # a number that the calendar or the clock doesn't have
    return None


def parse_unix(text: str, unit: timedelta) -> datetime | None:
    """Parse a number of units since 1970 to an instant in UTC; None for everything else."""
    if not _NUMBER.fullmatch(text):
        return None
    try:
        return EPOCH + float(text) * unit
    except OverflowError:
        return None


def is_bare_number(text: str) -> bool:
    """Return whether a text is a number and not a date: moment reads 1767225, a truncated time in
    seconds, as the 225th day of 1767. A number of eight digits is a date such as 20261201.
    """
    return bool(_NUMBER.fullmatch(text)) and not _BASIC_DATE.fullmatch(text)


def format_iso(instant: datetime) -> str:
    """Format an instant like JavaScript's toISOString: 2018-06-08T17:49:31.000Z.

    Milliseconds are cut off, not rounded, so that nothing reads as later than it is.
    """
    return instant.astimezone(UTC).replace(tzinfo=None).isoformat(timespec="milliseconds") + "Z"


def _from_iso(match: Match[str], tz: ZoneInfo) -> datetime | None:
    whole_date = bool(match["day"] or match["weekday"] or match["ordinal"])
    if match["hour"] and not whole_date:
        return None
    if len(match["year"]) > 4 and not match["day"]:
        return None  # moment takes some of the six digits for the year
    wall = _iso_day(match)
    hour, minute, second = (int(match[part] or 0) for part in ("hour", "minute", "second"))
    millisecond = int(float(f"0.{match['fraction'] or 0}") * 1000)
    if (hour, minute, second, millisecond) == (24, 0, 0, 0):
        hour, wall = 0, wall + timedelta(days=1)
    clock = time(hour, minute, second, millisecond * 1000)
    if match["offset"] is None:
        return datetime.combine(wall, clock, tzinfo=tz).astimezone(UTC)
    return datetime.combine(wall, clock, tzinfo=UTC) - _iso_offset(match["offset"])


def _iso_day(match: Match[str]) -> date:
    year = int(match["year"])
    if match["week"]:
        return date.fromisocalendar(year, int(match["week"]), int(match["weekday"] or 1))
    if match["ordinal"]:
        ordinal = int(match["ordinal"])
        if not 1 <= ordinal <= (366 if isleap(year) else 365):
            raise ValueError
        return date(year, 1, 1) + timedelta(days=ordinal - 1)
    return date(year, int(match["month"] or 1), int(match["day"] or 1))


def _iso_offset(text: str) -> timedelta:
    """East of Greenwich. moment 2.31 takes -12:00 to +14:00."""
    if text.endswith("Z"):
        return timedelta()
    minutes = int(text[-2:]) if len(text) > 3 else 0
    total = int(text[1:3]) * 60 + minutes
    if minutes > 59 or total > (14 if text[0] == "+" else 12) * 60:
        raise ValueError
    return timedelta(minutes=-total if text[0] == "-" else total)


def _without_comments(text: str) -> str:
    return _ENDS.sub("", _SPACES.sub(" ", _COMMENT.sub(" ", text)))


def _from_rfc_2822(match: Match[str]) -> datetime:
    day = date(
        _whole_year(int(match["year"])), _MONTHS.index(match["month"]) + 1, int(match["day"])
    )
    if match["weekday"] and _WEEKDAYS.index(match["weekday"]) != day.weekday():
        raise ValueError
    clock = time(int(match["hour"]), int(match["minute"]), int(match["second"] or 0))
    return datetime.combine(day, clock, tzinfo=UTC) - _rfc_offset(match["offset"])


def _whole_year(year: int) -> int:
    """RFC 2822, 4.3: two digits up to 49 are of this century, other short years of the last."""
    if year <= 49:
        return 2000 + year
    return 1900 + year if year <= 999 else year


def _rfc_offset(text: str) -> timedelta:
    """East of Greenwich: +0200, a zone of North America, or Greenwich itself."""
    if text[0] in "+-":
        offset = timedelta(hours=int(text[1:3]), minutes=int(text[3:]))
        return -offset if text[0] == "-" else offset
    if text[0] in _HOURS_WEST:
        return timedelta(hours=(text[1] == "D") - _HOURS_WEST[text[0]])
    return timedelta()
