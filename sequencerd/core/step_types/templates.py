"""Templates in the configs of steps, ready to be rendered."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import Any

from sequencerd.core.calendar import dates
from sequencerd.core.config import Faults
from sequencerd.core.javascript.templates import compile_template
from sequencerd.core.model import Context, DefinitionError, EvaluationError, KeyPath


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


def compile_value(path: KeyPath, value: Any, faults: Faults) -> Callable[[Context], Any]:
    """Compile a JSON value whose texts are templates; what is wrong with it goes to `faults`."""
    match value:
        case str():
            with faults.at(*path):
                return compile_text(path, value)
        case dict():
            inner = {key: compile_value((*path, key), item, faults) for key, item in value.items()}
            return lambda context: {key: render(context) for key, render in inner.items()}
        case list():
            items = [compile_value((*path, n), item, faults) for n, item in enumerate(value)]
            return lambda context: [render(context) for render in items]
    return lambda _: value


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
    shown = text if len(text) <= 100 else f"{text[:100]}..."
    return f"{shown!r} is not an ISO 8601 date such as 2018-06-08T17:49:31+00:00"
