"""Describe values: as text for users, as JSON for programs."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from unicodedata import category

from sequencerd.core.enrollment import NEVER


def text(value: object) -> str:
    """Format a value on one line."""
    match value:
        case None:
            return "-"
        case datetime():
            if is_never(value):
                return "never"
            return f"{value.astimezone(UTC):%Y-%m-%d %H:%M:%S}Z"
        case list() | tuple():
            return ", ".join(map(str, value))
        case dict():
            return json.dumps(value, ensure_ascii=False)
        case _:
            return str(value)


def counted(number: int, one: str, many: str | None = None) -> str:
    """Format a count, such as "1 row" or "1,240 rows"; `many` is the plural if it is irregular, as
    of verbs: "1 waits", "3 wait".
    """
    return f"{number:,} {one if number == 1 else many or f'{one}s'}"


_UNITS = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))


def duration(seconds: float) -> str:
    """Format a duration with its two greatest units, such as "1 h 5 min"."""
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    parts: list[str] = []
    rest = round(seconds)
    for name, size in _UNITS:
        count, rest = divmod(rest, size)
        if count or parts:
            parts.append(f"{count} {name}")
    return " ".join(part for part in parts[:2] if not part.startswith("0 "))


_HIDDEN = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
"""Categories of Unicode: controls, characters without width or that change the direction of text,
surrogates, and line and paragraph separators.
"""


def visible(text: str) -> str:
    """Escape characters that control a terminal or end the line: `\x1b` for an escape."""
    if text.isprintable():
        return text
    return "".join(_escape(one) if category(one) in _HIDDEN else one for one in text)


def _escape(character: str) -> str:
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")


def is_never(at: datetime) -> bool:
    """Return whether the time is PostgreSQL's infinity as asyncpg reads it."""
    return at.year == NEVER.year


def plain(value: object) -> object:
    """Convert a value for JSON: times to ISO 8601, infinity to "infinity"."""
    if isinstance(value, datetime):
        return "infinity" if is_never(value) else value.astimezone(UTC).isoformat()
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")
