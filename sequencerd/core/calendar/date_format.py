"""Format dates for messages: with the tokens of moment's `format`, and the names of a locale."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from datetime import datetime, timedelta
from functools import cache, lru_cache
from importlib.resources import files
from typing import Any

from pydantic.alias_generators import to_camel

from sequencerd.core.faults import DefinitionError

MAX_FORMAT = 100  # characters
DEFAULT = "YYYY-MM-DDTHH:mm:ssZ"


@dataclass(frozen=True, slots=True)
class DateNames:
    """The names of the parts of a date in a locale."""

    months: tuple[str, ...]
    months_after_day: tuple[str, ...]  # "5 марта", where "март" stands alone
    short_months: tuple[str, ...]
    short_months_after_day: tuple[str, ...]
    days: tuple[str, ...]  # from Monday on
    short_days: tuple[str, ...]
    ordinals: tuple[str, ...]  # from "1st" on
    meridiem: tuple[tuple[int, str, str], ...]  # from this minute of the day on: "AM", "am"


def _hour12(at: datetime) -> int:
    return at.hour % 12 or 12


def _meridiem(at: datetime, names: DateNames, column: int) -> str:
    minute = at.hour * 60 + at.minute
    return str([part for part in names.meridiem if part[0] <= minute][-1][column])


def _offset(at: datetime, separator: str) -> str:
    minutes = round((at.utcoffset() or timedelta()) / timedelta(minutes=1))
    hours, rest = divmod(abs(minutes), 60)
    return f"{'-' if minutes < 0 else '+'}{hours:02}{separator}{rest:02}"


_Write = Callable[[datetime, DateNames], str]

TOKENS: dict[str, _Write] = {
    "YYYY": lambda at, _: f"{at.year:04}",
    "YY": lambda at, _: f"{at.year % 100:02}",
    "Q": lambda at, _: str((at.month + 2) // 3),
    "MMMM": lambda at, names: names.months[at.month - 1],
    "MMM": lambda at, names: names.short_months[at.month - 1],
    "MM": lambda at, _: f"{at.month:02}",
    "M": lambda at, _: str(at.month),
    "Do": lambda at, names: names.ordinals[at.day - 1],
    "DD": lambda at, _: f"{at.day:02}",
    "D": lambda at, _: str(at.day),
    "dddd": lambda at, names: names.days[at.weekday()],
    "ddd": lambda at, names: names.short_days[at.weekday()],
    "HH": lambda at, _: f"{at.hour:02}",
    "H": lambda at, _: str(at.hour),
    "hh": lambda at, _: f"{_hour12(at):02}",
    "h": lambda at, _: str(_hour12(at)),
    "mm": lambda at, _: f"{at.minute:02}",
    "m": lambda at, _: str(at.minute),
    "ss": lambda at, _: f"{at.second:02}",
    "s": lambda at, _: str(at.second),
    "SSS": lambda at, _: f"{at.microsecond // 1000:03}",
    "A": lambda at, names: _meridiem(at, names, 1),
    "a": lambda at, names: _meridiem(at, names, 2),
    "ZZ": lambda at, _: _offset(at, ""),
    "Z": lambda at, _: _offset(at, ":"),
    "z": lambda at, _: at.tzname() or "",
}

_AFTER_DAY: dict[str, _Write] = {
    "MMMM": lambda at, names: names.months_after_day[at.month - 1],
    "MMM": lambda at, names: names.short_months_after_day[at.month - 1],
}
"""The tokens that are written differently if the day of the month is written as well."""

# A run of one letter is one token, as in moment: "YYYYY" is not "YYYY" and "Y".
_PIECES = re.compile(r"\[([^\[\]]*)\]|(Do|([A-Za-z])\3*)|([^A-Za-z\[]+|\[)")
# Letters that mean nothing to moment represent themselves, such as the T of an ISO date.
_PLAIN = frozenset("BCFIJKORTUVbcfijnpqrtuv")


@lru_cache(maxsize=256)
def compile_format(text: str, locale: str = "") -> Callable[[datetime], str]:
    """Compile a moment format such as `D MMMM YYYY [at] HH:mm` to a function that formats a date.

    `locale` is a language such as "de" or "pt-BR"; English where none is given, and for a language
    that is not known, as texts have a default.
    Raises DefinitionError for a letter or run of letters that moment would expand to
    something that is not offered here; text goes into [brackets].
    Rule: momentjs.com/docs, Display, Format.
    """
    if len(text) > MAX_FORMAT:
        raise DefinitionError(f"a date format is longer than {MAX_FORMAT} characters")
    found = _PIECES.findall(text)
    has_day = any(token in ("D", "Do", "DD") for _, token, _, _ in found)
    pieces: list[_Write | str] = []
    for literal, token, letter, other in found:
        if has_day and token in _AFTER_DAY:
            pieces.append(_AFTER_DAY[token])
        elif token in TOKENS:
            pieces.append(TOKENS[token])
        elif token and letter not in _PLAIN:
            raise DefinitionError(
                f"the date format {text!r} has the unknown token {token!r}: write one of "
                f"{', '.join(TOKENS)}, or put text into brackets as in [{token}]"
            )
        else:
            pieces.append(literal or token or other)
    names = _names(_find_locale(locale) or "en")

    def write(at: datetime) -> str:
        return "".join(piece if isinstance(piece, str) else piece(at, names) for piece in pieces)

    return write


def check_locale(locale: str) -> None:
    """Raise DefinitionError for a constant that is not a known locale."""
    if locale and _find_locale(locale) is None:
        raise DefinitionError(
            f"{locale[:60]!r} is not a known locale: write one of {', '.join(sorted(_locales()))}"
        )


def _find_locale(locale: str) -> str | None:
    """Return the name of a known locale: "de" for "de", "de-AT" and "de_DE"."""
    name = locale.strip().lower().replace("_", "-")
    known = _locales()
    return next((one for one in (name, name.partition("-")[0]) if one in known), None)


@cache
def _names(locale: str) -> DateNames:
    found = _locales()[locale]
    return DateNames(
        *(tuple(found[to_camel(field.name)]) for field in fields(DateNames)),
    )


@cache
def _locales() -> Mapping[str, Mapping[str, Any]]:
    """Return the table of bin/vendor: the names of CLDR, the ordinals of moment."""
    table = files("sequencerd.core.javascript").joinpath("vendor", "locales.json")
    locales: Mapping[str, Mapping[str, Any]] = json.loads(table.read_text(encoding="utf-8"))
    return locales
