"""JSON values as handlebars, and JavaScript below it, reads and prints them."""

from __future__ import annotations

import re
from collections.abc import Callable
from decimal import Decimal

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
    indexes = sorted((key for key in value if _INDEX.fullmatch(key)), key=int)
    if not indexes:
        return list(value.items())
    rest = [key for key in value if not _INDEX.fullmatch(key)]
    return [(key, value[key]) for key in indexes + rest]


def is_empty(value: object) -> bool:
    """handlebars' isEmpty: missing, null, false, "" and []; 0 and {} are not empty."""
    return value is None or value is False or value in ("", [])


def is_truthy(value: object) -> bool:
    """JavaScript's truthiness: arrays and objects are true, empty or not."""
    return isinstance(value, dict | list) or bool(value)


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


def number_text(number: float) -> str:
    """JavaScript's Number::toString, in base ten (ECMAScript 2024, 6.1.6.1.20)."""
    if isinstance(number, int) and abs(number) <= 2**53:
        return str(number)
    try:
        rounded = float(number)
    except OverflowError:
        return "Infinity" if number > 0 else "-Infinity"
    shortest = Decimal(repr(rounded))
    if not shortest.is_finite():
        return str(shortest)  # Infinity, -Infinity, NaN: JavaScript's own words
    if rounded == 0:
        return "0"
    if 1e-6 <= abs(rounded) < 1e21:
        fixed = f"{shortest:f}"
        return fixed.rstrip("0").rstrip(".") if "." in fixed else fixed
    mantissa, exponent = repr(rounded).split("e")
    return f"{mantissa}e{exponent[0]}{exponent[1:].lstrip('0')}"
