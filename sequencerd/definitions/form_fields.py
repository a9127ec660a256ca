"""The values of a step that a form can change: the length of a wait, and the texts of a message."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

from sequencerd.core.calendar import dates
from sequencerd.core.calendar.business_days import BUSINESS_DAYS
from sequencerd.core.faults import KeyPath
from sequencerd.core.languages import FILE
from sequencerd.core.step_types import is_instant

UNITS = ("minutes", "hours", "days", "business days", "weeks", "months", "years")
"""The units that a form offers; other units are left as they are."""

TEXTS = ("subject", "text", "html", "message")
TIMES = ("at", "date")

_INTEGER = re.compile(r"[-+]?[0-9]{1,15}")
_NUMBER = re.compile(r"[-+]?[0-9]{1,15}\.[0-9]{1,15}")


class FormField(NamedTuple):
    """A value of a step's config."""

    path: KeyPath  # in the config
    kind: Literal["amount", "unit", "line", "text"]
    value: str | int | float

    @property
    def name(self) -> str:
        """Return the field's name in the form."""
        return ".".join(map(str, self.path))

    def read(self, text: str) -> str | int | float:
        """Parse a value that a user has entered: a number if it looks like one."""
        if self.kind == "amount" and _INTEGER.fullmatch(text):
            return int(text)
        if self.kind == "amount" and _NUMBER.fullmatch(text):
            return float(text)
        return text


def fields(type_: str, config: object) -> list[FormField]:
    """Return the values of a step that a form can change."""
    if not isinstance(config, Mapping):
        return []
    return list(_waits((), config) if is_instant(type_) else _texts(config))


def _waits(path: KeyPath, value: Any) -> Iterator[FormField]:
    """Yield all amounts with their units, and all times."""
    match value:
        case {"amount": int() | float() | str() as amount, "unit": str(unit)}:
            yield FormField((*path, "amount"), "amount", amount)
            yield FormField((*path, "unit"), "unit", unit)
        case Mapping():
            for key, part in value.items():
                if _is_unit(key) and len(value) == 1 and isinstance(part, int | float):
                    yield FormField((*path, key), "amount", part)
                elif key in TIMES and isinstance(part, str) and not path:
                    yield FormField((*path, key), "line", part)
                else:
                    yield from _waits((*path, key), part)


def _is_unit(key: str) -> bool:
    return key in dates.UNITS or key in BUSINESS_DAYS


def _texts(config: Mapping[str, Any]) -> Iterator[FormField]:
    """Yield the texts of a message, each in every language."""
    for key in TEXTS:
        value = config.get(key)
        languages = value if isinstance(value, Mapping) else {}
        kind: Literal["line", "text"] = "line" if key == "subject" else "text"
        if isinstance(value, str):
            yield FormField((key,), kind, value)
        for language, text in languages.items():
            if isinstance(text, str) and language != FILE:
                yield FormField((key, language), kind, text)
