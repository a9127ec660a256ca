"""What a form changes of a step: how long it waits, and the texts of its message."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

from sequencerd.core.calendar import dates
from sequencerd.core.calendar.business_days import BUSINESS_DAYS
from sequencerd.core.languages import FILE
from sequencerd.core.model import KeyPath
from sequencerd.core.step_types import is_instant

UNITS = ("minutes", "hours", "days", "business days", "weeks", "months", "years")
"""What a form offers; other units stay as they are."""

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
        """Return the name in a form."""
        return ".".join(map(str, self.path))

    def read(self, text: str) -> str | int | float:
        """Return a value as a user has written it: a number where it is one."""
        if self.kind == "amount" and _INTEGER.fullmatch(text):
            return int(text)
        if self.kind == "amount" and _NUMBER.fullmatch(text):
            return float(text)
        return text


def fields(type_: str, config: object) -> list[FormField]:
    """Return what can be changed of a step by a form."""
    if not isinstance(config, Mapping):
        return []
    return list(_waits((), config) if is_instant(type_) else _texts(config))


def _waits(path: KeyPath, value: Any) -> Iterator[FormField]:
    """Yield amounts with their units, wherever they are, and times."""
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
