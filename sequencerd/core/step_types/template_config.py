"""Compile templates in the configs of steps."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from datetime import datetime, timedelta
from math import isfinite
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from sequencerd.core.calendar import dates
from sequencerd.core.config import Faults
from sequencerd.core.faults import DefinitionError, EvaluationError, KeyPath
from sequencerd.core.javascript.templates import compile_template
from sequencerd.core.view import Context


def _template(text: str) -> str:
    if "{{" not in text:
        raise ValueError("must be a template such as {{data.days}}")
    return text


TemplateText = Annotated[
    str, AfterValidator(_template), Field(json_schema_extra={"pattern": r"\{\{"})
]
"""A text with a template in it, where a number or the like can be written out."""

MAX_SHOWN = 100  # characters of a value

_INTEGER = re.compile(r"[+-]?[0-9]{1,30}")
_PATH = re.compile(r"(?:data|external)\.[\w.]+")
_NUMBER = re.compile(r"[+-]?(?:[0-9]{1,30}(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]{1,3})?")


def compile_text(path: KeyPath, source: str, *, strict: bool = False) -> Callable[[Context], str]:
    """Compile a template; errors in rendering name its path. Raises DefinitionError."""
    template = compile_template(source, escape=False, strict=strict)
    if template.is_literal:
        return lambda _: source

    def render(context: Context) -> str:
        try:
            return template.render(context.json(template.roots))
        except EvaluationError as error:
            message = f"{'.'.join(map(str, path))}: {error}"
            raise EvaluationError(error.failure, message) from error

    return render


def compile_number(
    path: KeyPath, value: float | str, *, strict: bool = False
) -> Callable[[Context], int | float]:
    """Compile a number that is written out, or that a template gives. Raises DefinitionError."""
    if not isinstance(value, str):
        return lambda _: value
    if "{{" not in value:
        raise DefinitionError("must be a number, or a template that gives one")
    render = compile_text(path, value, strict=strict)

    def number(context: Context) -> int | float:
        text = render(context).strip()
        if not _NUMBER.fullmatch(text) or not isfinite(float(text)):
            raise EvaluationError(
                "bad_data", f"{'.'.join(map(str, path))}: {shown(text)!r} is not a number"
            )
        return int(text) if _INTEGER.fullmatch(text) else float(text)

    return number


def shown(text: str) -> str:
    """Return a text for a message, limited in length."""
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


class MissingDateError(EvaluationError):
    """A date that is empty, as opposed to one that cannot be parsed."""


_UNIX = {"X": timedelta(seconds=1), "x": timedelta(milliseconds=1)}


def compile_date(
    key: str, source: str, unix: Literal["X", "x"] | None = None
) -> Callable[[Context], datetime]:
    """Compile a date that a template gives, in the enrollment's zone; `unix` is the token of
    moment's for a number of seconds or milliseconds. Raises DefinitionError.
    """
    faults = Faults()
    with faults.at(key):
        if "{{" not in source and parse_date(source, "UTC", unix) is None:
            hint = f"; write {{{{{source}}}}} for a value" if _PATH.fullmatch(source) else ""
            raise DefinitionError(f"{_no_date(source, unix)}{hint}")
        render = compile_text((key,), source)
    faults.check()

    def date(context: Context) -> datetime:
        text = render(context).strip()
        found = parse_date(text, context.timezone, unix)
        if found is None:
            kind = EvaluationError if text else MissingDateError
            raise kind("bad_data", f"{key} {_no_date(text, unix)}")
        return found

    return date


def parse_date(text: str, timezone: str, unix: Literal["X", "x"] | None = None) -> datetime | None:
    """Parse a date, without an offset in the zone. Return None if it is none, such as a number
    without `unix`.
    """
    if unix is not None:
        return dates.parse_unix(text, _UNIX[unix])
    return None if dates.is_bare_number(text) else dates.parse(text, dates.zone(timezone))


def literal(value: object) -> str:
    """Return a value for a message as it is written in a file, limited in length."""
    return repr(shown(value)) if isinstance(value, str) else shown(json.dumps(value))


def no_date(value: object) -> str:
    """Return the error for a value that is not a date."""
    return f"{literal(value)} is not an ISO 8601 date such as 2018-06-08T17:49:31+00:00"


def _no_date(text: str, unix: Literal["X", "x"] | None) -> str:
    if unix is not None:
        unit = "seconds" if unix == "X" else "milliseconds"
        return f"{shown(text)!r} is not a number of {unit} since 1970 (format {unix})"
    if dates.is_bare_number(text):
        hint = "of a Unix time, write format: X for seconds, or format: x for milliseconds"
        return f"{no_date(text)}; {hint}"
    return no_date(text)
