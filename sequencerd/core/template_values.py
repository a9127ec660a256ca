"""JSON values as handlebars, and JavaScript below it, reads and prints them."""

from __future__ import annotations

import re
from collections.abc import Callable

from sequencerd.core.javascript import in_key_order, number_text
from sequencerd.core.model import EvaluationError

MAX_NESTED_ARRAYS = 100  # arrays within arrays, when printed

# Told how many steps an operation takes before it is done; raises when there are too many.
Spend = Callable[[int], None]

_INDEX = re.compile(r"0|[1-9][0-9]{0,9}")


def own_property(value: object, name: str, spend: Spend) -> object:
    """`value[name]` as handlebars allows it: own properties only, None where there is none.

    Objects have their keys, arrays their indexes, texts their UTF-16 units, and the latter two
    a `length`. Half of a surrogate pair reads as U+FFFD, since it can't be sent.
    Rule: handlebars, runtime option allowProtoPropertiesByDefault, which is off.
    """
    if isinstance(value, dict):
        return value.get(name)
    if isinstance(value, list):
        if name == "length":
            return len(value)
        index = int(name) if _INDEX.fullmatch(name) else len(value)
        return value[index] if index < len(value) else None
    if isinstance(value, str) and (name == "length" or _INDEX.fullmatch(name)):
        return _text_property(value, name, spend)
    return None


def _text_property(text: str, name: str, spend: Spend) -> object:
    spend(len(text))
    units = text.encode("utf-16-le", "surrogatepass")
    if name == "length":
        return len(units) // 2
    start = 2 * int(name)
    return units[start : start + 2].decode("utf-16-le", "replace") or None


def entries(value: dict[str, object], spend: Spend) -> list[tuple[str, object]]:
    """The pairs of an object in JavaScript's order: array indexes ascending, then as inserted."""
    spend(len(value))
    return [(key, value[key]) for key in in_key_order(value)]


def is_empty(value: object) -> bool:
    """handlebars' isEmpty: missing, null, false, "" and []; 0 and {} are not empty."""
    return value is None or value is False or value in ("", [])


def text(value: object, spend: Spend, depth: int = 0) -> str:
    """The text that handlebars prints for a value.

    Nothing for null, "a,b" for arrays (null within is empty), "[object Object]" for objects.
    Raises EvaluationError for an object with a key `toString`, which JavaScript can't convert,
    for arrays nested too deep, and for what is not JSON.
    """
    match value:
        case None:
            return ""
        case str():
            return value
        case bool():
            return "true" if value else "false"
        case int() | float():
            return number_text(value)
        case list():
            if depth == MAX_NESTED_ARRAYS:
                raise EvaluationError("bad_data", f"arrays are nested more than {depth} deep")
            spend(len(value))
            return ",".join([text(item, spend, depth + 1) for item in value])
        case dict() if "toString" not in value:
            return "[object Object]"
        case dict():
            raise EvaluationError("bad_data", "an object with the key toString can't be printed")
        case _:
            raise EvaluationError("bad_data", f"a {type(value).__name__} is not a JSON value")
