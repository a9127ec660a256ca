"""Templates in the configs of steps, ready to be rendered."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import datetime
from math import isfinite

from sequencerd.core.calendar import dates
from sequencerd.core.config import Faults
from sequencerd.core.javascript.templates import compile_template
from sequencerd.core.model import Context, DefinitionError, EvaluationError, KeyPath

MAX_SHOWN = 100  # characters of a value

_INTEGER = re.compile(r"[+-]?[0-9]{1,30}")
_NUMBER = re.compile(r"[+-]?(?:[0-9]{1,30}(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]{1,3})?")


def compile_text(path: KeyPath, source: str) -> Callable[[Context], str]:
    """Compile a template; errors in rendering name its path. Raises DefinitionError."""
    template = compile_template(source, escape=False)
    if template.is_literal:
        return lambda _: source

    def render(context: Context) -> str:
        try:
            return template.render(context.json(template.roots))
        except EvaluationError as error:
            message = f"{'.'.join(map(str, path))}: {error}"
            raise EvaluationError(error.failure, message) from error

    return render


def compile_number(path: KeyPath, value: float | str) -> Callable[[Context], int | float]:
    """Compile a number that is written out, or that a template gives. Raises DefinitionError."""
    if not isinstance(value, str):
        return lambda _: value
    if "{{" not in value:
        raise DefinitionError("must be a number, or a template that gives one")
    render = compile_text(path, value)

    def number(context: Context) -> int | float:
        text = render(context).strip()
        if not _NUMBER.fullmatch(text) or not isfinite(float(text)):
            raise EvaluationError(
                "bad_data", f"{'.'.join(map(str, path))}: {shown(text)!r} is no number"
            )
        return int(text) if _INTEGER.fullmatch(text) else float(text)

    return number


def shown(text: str) -> str:
    """A text for a message, not endless."""
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


def compile_date(key: str, source: str) -> Callable[[Context], datetime]:
    """Compile a date that a template gives, in the enrollment's zone. Raises DefinitionError."""
    faults = Faults()
    with faults.at(key):
        if "{{" not in source and dates.parse(source, dates.zone("UTC")) is None:
            raise DefinitionError(_no_date(source))
        render = compile_text((key,), source)
    faults.check()

    def date(context: Context) -> datetime:
        text = render(context)
        found = dates.parse(text.strip(), dates.zone(context.timezone))
        if found is None:
            raise EvaluationError("bad_data", f"{key} {_no_date(text)}")
        return found

    return date


def _no_date(text: str) -> str:
    return f"{shown(text)!r} is not an ISO 8601 date such as 2018-06-08T17:49:31+00:00"
