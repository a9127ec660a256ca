"""The helpers of templates: handlebars' `lookup` and `log`, and `date`, `default` and `json`."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from sequencerd.core import dates
from sequencerd.core.javascript import is_truthy
from sequencerd.core.model import DefinitionError, EvaluationError
from sequencerd.core.template_dates import DEFAULT, compile_format
from sequencerd.core.template_values import Spend, is_empty, own_property, text


@dataclass(frozen=True, slots=True)
class Request:
    """What a helper gets: {{name args options}} with their values."""

    args: list[object]
    options: dict[str, object]
    label: str  # the first argument as it is written, for messages
    timezone: object  # the context's
    html: bool
    spend: Spend


@dataclass(frozen=True, slots=True)
class Helper:
    """A helper and the arguments that it takes; `options` None means any."""

    run: Callable[[Request], object]
    usage: str
    least: int
    most: int
    options: frozenset[str] | None = frozenset()


def lookup(request: Request) -> object:
    """handlebars' lookup: `object[key]`, own properties only; null, false, 0 and "" as they are."""
    value, key = request.args
    if not is_truthy(value):
        return value
    name = "undefined" if key is None else text(key, request.spend)
    return own_property(value, name, request.spend)


def log(_request: Request) -> object:
    """Handlebars' log writes to a console; there is none here."""
    return None


def default(request: Request) -> object:
    """The first argument that is not empty: missing, null, false, "" and [] are, 0 is not."""
    return next((value for value in request.args if not is_empty(value)), None)


def to_json(request: Request) -> object:
    """The value as JSON. For HTML, `<`, `>` and `&` become \\u escapes: it is safe in a script."""
    try:
        written = json.dumps(request.args[0], ensure_ascii=False, separators=(",", ":"))
    except (TypeError, ValueError, RecursionError) as error:
        raise EvaluationError("bad_data", f"{request.label} can't be JSON: {error}") from error
    request.spend(len(written))
    return written.translate(_SCRIPT_SAFE) if request.html else written


_SCRIPT_SAFE: Final = {ord(char): f"\\u{ord(char):04x}" for char in "<>&\u2028\u2029"}


def date(request: Request) -> object:
    """An ISO 8601 text in moment's `format`, in `zone`, else in the enrollment's time zone."""
    value = request.args[0]
    zone = text(request.options.get("zone") or request.timezone or "UTC", request.spend)
    pattern = text(request.options.get("format", DEFAULT), request.spend)
    try:
        tz = dates.zone(zone)
        at = dates.parse(value, tz) if isinstance(value, str) else None
        written = compile_format(pattern)(at.astimezone(tz)) if at else None
    except (DefinitionError, OverflowError) as error:
        raise EvaluationError("bad_data", f"{{{{date {request.label}}}}}: {error}") from error
    if written is None:
        found = "missing" if value is None else f"{text(value, request.spend)[:60]!r}"
        raise EvaluationError(
            "bad_data", f"{request.label} is {found}: {{{{date}}}} needs an ISO 8601 text"
        )
    request.spend(len(written))
    return written


HELPERS: Final = {
    "lookup": Helper(lookup, "{{lookup object key}}", 2, 2, options=None),
    "log": Helper(log, "{{log ...}}", 0, 1000, options=None),
    "date": Helper(
        date,
        '{{date value format="D MMMM YYYY" zone="Europe/Berlin"}}',
        1,
        1,
        frozenset({"format", "zone"}),
    ),
    "default": Helper(default, '{{default value "otherwise"}}', 1, 1000),
    "json": Helper(to_json, "{{json value}}", 1, 1),
}


def check_option(helper: str, option: str, value: str) -> None:
    """Raises DefinitionError for an option written in the template that can't work."""
    if (helper, option) == ("date", "format"):
        compile_format(value)
    if (helper, option) == ("date", "zone"):
        dates.zone(value)
