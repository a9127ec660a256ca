"""Dates as people write them in messages: the tokens of moment's `format`, English names."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import datetime, timedelta
from functools import lru_cache

from sequencerd.core.model import DefinitionError

MAX_FORMAT = 100  # characters
DEFAULT = "YYYY-MM-DDTHH:mm:ssZ"

_MONTHS = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
]
_WEEKDAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
_ORDINALS = {1: "st", 2: "nd", 3: "rd", 21: "st", 22: "nd", 23: "rd", 31: "st"}


def _hour12(at: datetime) -> int:
    return at.hour % 12 or 12


def _meridiem(at: datetime) -> str:
    return "AM" if at.hour < 12 else "PM"


def _offset(at: datetime, separator: str) -> str:
    minutes = round((at.utcoffset() or timedelta()) / timedelta(minutes=1))
    hours, rest = divmod(abs(minutes), 60)
    return f"{'-' if minutes < 0 else '+'}{hours:02}{separator}{rest:02}"


TOKENS: dict[str, Callable[[datetime], str]] = {
    "YYYY": lambda at: f"{at.year:04}",
    "YY": lambda at: f"{at.year % 100:02}",
    "Q": lambda at: str((at.month + 2) // 3),
    "MMMM": lambda at: _MONTHS[at.month - 1],
    "MMM": lambda at: _MONTHS[at.month - 1][:3],
    "MM": lambda at: f"{at.month:02}",
    "M": lambda at: str(at.month),
    "Do": lambda at: f"{at.day}{_ORDINALS.get(at.day, 'th')}",
    "DD": lambda at: f"{at.day:02}",
    "D": lambda at: str(at.day),
    "dddd": lambda at: _WEEKDAYS[at.weekday()],
    "ddd": lambda at: _WEEKDAYS[at.weekday()][:3],
    "HH": lambda at: f"{at.hour:02}",
    "H": lambda at: str(at.hour),
    "hh": lambda at: f"{_hour12(at):02}",
    "h": lambda at: str(_hour12(at)),
    "mm": lambda at: f"{at.minute:02}",
    "m": lambda at: str(at.minute),
    "ss": lambda at: f"{at.second:02}",
    "s": lambda at: str(at.second),
    "SSS": lambda at: f"{at.microsecond // 1000:03}",
    "A": _meridiem,
    "a": lambda at: _meridiem(at).lower(),
    "ZZ": lambda at: _offset(at, ""),
    "Z": lambda at: _offset(at, ":"),
    "z": lambda at: at.tzname() or "",
}

# A run of one letter is one token, as in moment: "YYYYY" is not "YYYY" and "Y".
_PIECES = re.compile(r"\[([^\[\]]*)\]|(Do|([A-Za-z])\3*)|([^A-Za-z\[]+|\[)")
# Letters that mean nothing to moment stand for themselves, such as the T of an ISO date.
_PLAIN = frozenset("BCFIJKORTUVbcfijnpqrtuv")


@lru_cache(maxsize=256)
def compile_format(text: str) -> Callable[[datetime], str]:
    """A moment format such as `D MMMM YYYY [at] HH:mm` → a function that writes a date in it.

    Raises DefinitionError for a letter or run of letters that moment would expand to
    something that is not offered here; text goes into [brackets].
    Rule: momentjs.com/docs, Display, Format.
    """
    if len(text) > MAX_FORMAT:
        raise DefinitionError(f"a date format is longer than {MAX_FORMAT} characters")
    pieces: list[Callable[[datetime], str] | str] = []
    for literal, token, letter, other in _PIECES.findall(text):
        if token in TOKENS:
            pieces.append(TOKENS[token])
        elif token and letter not in _PLAIN:
            raise DefinitionError(
                f"the date format {text!r} has the unknown token {token!r}: write one of "
                f"{', '.join(TOKENS)}, or put text into brackets as in [{token}]"
            )
        else:
            pieces.append(literal or token or other)

    def write(at: datetime) -> str:
        return "".join(piece if isinstance(piece, str) else piece(at) for piece in pieces)

    return write
