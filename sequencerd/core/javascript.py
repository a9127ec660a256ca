"""JavaScript's rules for JSON values: conversions, comparisons, properties.

Values are JSON as Python reads it (None, bool, int, float, str, list, dict), UNDEFINED for what
is not there, and what JavaScript's values inherit (`inherited`). Numbers are doubles, texts are
sequences of UTF-16 units. Rule: ECMAScript 2024; the chapter is named where it helps.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from decimal import Decimal
from typing import TypeGuard

from sequencerd.core.inherited import PROTOTYPES, Function, Prototype
from sequencerd.core.model import EvaluationError

MAX_DEPTH = 200  # of nested data that is compared or printed
MAX_STEPS = 1_000_000  # of one condition: items walked and values compared
MAX_SAFE_INTEGER = 2**53 - 1
MAX_ARRAY_LENGTH = 2**32 - 1
MAX_TEXT_LENGTH = 2**29 - 24  # of V8's strings


class Undefined:
    """JavaScript's undefined: what is read where nothing is."""

    def __bool__(self) -> bool:
        return False

    def __repr__(self) -> str:
        return "undefined"


UNDEFINED = Undefined()

INDEX = re.compile(r"0|[1-9][0-9]*")
_ARRAY_INDEX = re.compile(r"0|[1-9][0-9]{0,9}")
SPACE = "\t\n\v\f\r \u00a0\u1680\u2028\u2029\u202f\u205f\u3000\ufeff" + "".join(
    map(chr, range(0x2000, 0x200B))
)
_DECIMAL = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
_RADIX = re.compile(r"0[xX]([0-9a-fA-F]+)|0[oO]([0-7]+)|0[bB]([01]+)")
_RADIXES = {1: 16, 2: 8, 3: 2}  # by group of the expression above
_INFINITIES = {"Infinity": math.inf, "+Infinity": math.inf, "-Infinity": -math.inf}


def type_error(message: str) -> EvaluationError:
    """What JavaScript throws as a TypeError or a RangeError."""
    return EvaluationError("error", message)


def too_deep() -> EvaluationError:
    """The answer to data that is nested more than MAX_DEPTH deep."""
    return EvaluationError("bad_data", f"the data is nested more than {MAX_DEPTH} deep")


def too_much() -> EvaluationError:
    """The answer to a condition that takes more than MAX_STEPS."""
    return EvaluationError("bad_data", f"the condition takes more than {MAX_STEPS} steps")


class Steps:
    """What one condition may still do; raises EvaluationError when that is nothing."""

    __slots__ = ("left",)

    def __init__(self) -> None:
        self.left = MAX_STEPS

    def spend(self, steps: int = 1) -> None:
        self.left -= steps
        if self.left < 0:
            raise too_much()


# --- kinds of values


def is_number(value: object) -> TypeGuard[int | float]:
    """typeof value === "number"; Python's booleans are no numbers."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_nil(value: object) -> bool:
    """value == null."""
    return value is None or value is UNDEFINED


def is_object(value: object) -> bool:
    """Arrays, objects and functions: what has an identity."""
    return isinstance(value, dict | list | Function)


def is_truthy(value: object) -> bool:
    """JavaScript's truthiness: arrays and objects are true, empty or not; NaN is false."""
    return isinstance(value, dict | list) or (bool(value) and value == value)  # noqa: PLR0124 -- NaN


# --- texts


def units(text: str) -> str:
    """A text with one character for each of its UTF-16 units, which JavaScript counts."""
    if text.isascii() or max(text) < "\U00010000":
        return text
    data = text.encode("utf-16-le", "surrogatepass")
    return "".join(chr(data[i] | data[i + 1] << 8) for i in range(0, len(data), 2))


def number_text(number: float) -> str:
    """JavaScript's Number::toString, in base ten (6.1.6.1.20)."""
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


def to_string(value: object, depth: int = 0) -> str:
    """ToString (7.1.17), `"" + value`: null and undefined within an array print nothing.

    Raises EvaluationError for an object with a key `toString`, which JavaScript can't convert,
    and for arrays nested too deep.
    """
    if isinstance(value, str):
        return value
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return number_text(value)
    if isinstance(value, list):
        if depth == MAX_DEPTH:
            raise too_deep()
        return ",".join(["" if is_nil(item) else to_string(item, depth + 1) for item in value])
    if isinstance(value, dict):
        if "toString" in value:
            raise type_error("an object with the key toString can't be converted to a text")
        return _PRINTED.get(value.name, "") if isinstance(value, Prototype) else "[object Object]"
    if isinstance(value, Function):
        return f"function {value.name}() {{ [native code] }}"
    return "undefined"


_PRINTED = {"Object": "[object Object]", "Number": "0", "Boolean": "false"}  # prototypes' texts


# --- numbers


def to_number(value: object) -> float:
    """ToNumber (7.1.4), and lodash's _.toNumber: null and "" are 0, objects go through a text."""
    if isinstance(value, bool | int | float):
        return to_double(value)
    if value is None:
        return 0.0
    if value is UNDEFINED:
        return math.nan
    text = to_string(value).strip(SPACE)
    if not text:
        return 0.0
    if match := _RADIX.fullmatch(text):
        group = match.lastindex or 0
        return to_double(int(match[group], _RADIXES[group]))
    if _DECIMAL.fullmatch(text):
        return float(text)
    return _INFINITIES.get(text, math.nan)


def to_double(number: float) -> float:
    """The double that JavaScript would hold for a number of Python's."""
    try:
        return float(number)
    except OverflowError:
        return math.inf if number > 0 else -math.inf


def to_integer(value: object) -> float:
    """lodash's _.toInteger: towards zero; NaN is 0, infinity the largest number."""
    number = to_finite(value)
    return float(math.trunc(number))


def to_finite(value: object) -> float:
    """lodash's _.toFinite: NaN is 0, infinity the largest number."""
    number = to_number(value)
    if math.isnan(number):
        return 0.0
    return max(min(number, 1.7976931348623157e308), -1.7976931348623157e308)


def is_length(value: object) -> bool:
    """lodash's _.isLength: a whole number from 0 to the largest safe integer."""
    if not is_number(value):
        return False
    number = to_double(value)
    return 0 <= number <= MAX_SAFE_INTEGER and number.is_integer()


def plus(left: object, right: object) -> object:
    """The operator + (13.15.3): joins as soon as one side is a text, arrays and objects too."""
    if isinstance(left, str | list | dict | Function) or isinstance(
        right, str | list | dict | Function
    ):
        joined = to_string(left) + to_string(right)
        if len(joined) > MAX_STEPS * 10:
            raise too_much()
        return joined
    return to_number(left) + to_number(right)


# --- comparisons


def strict_equals(left: object, right: object) -> bool:
    """left === right: identity for arrays and objects, NaN equals nothing."""
    if isinstance(left, str):
        return isinstance(right, str) and left == right
    if is_number(left):
        return is_number(right) and to_double(left) == to_double(right)
    return left is right


def same_value_zero(left: object, right: object) -> bool:
    """lodash's _.eq: as ===, and NaN equals NaN."""
    return strict_equals(left, right) or (is_nan(left) and is_nan(right))


def is_nan(value: object) -> bool:
    """value !== value."""
    return isinstance(value, float) and math.isnan(value)


def less_than(left: object, right: object) -> bool:
    """left < right (7.2.13): two texts, which arrays and objects become, by UTF-16 units."""
    left, right = _primitive(left), _primitive(right)
    if isinstance(left, str) and isinstance(right, str):
        return units(left) < units(right)
    return to_number(left) < to_number(right)


def less_or_equal(left: object, right: object) -> bool:
    """left <= right."""
    left, right = _primitive(left), _primitive(right)
    if isinstance(left, str) and isinstance(right, str):
        return units(left) <= units(right)
    return to_number(left) <= to_number(right)


def _primitive(value: object) -> object:
    return to_string(value) if is_object(value) else value


# --- properties


def prototype_of(value: object) -> Prototype | None:
    """What a value inherits from, None for null, undefined and Object.prototype itself."""
    if isinstance(value, dict):
        is_last = value is PROTOTYPES["Object"]
        return None if is_last else PROTOTYPES["Object"]
    if isinstance(value, str):
        return PROTOTYPES["String"]
    if isinstance(value, list):
        return PROTOTYPES["Array"]
    if isinstance(value, bool):
        return PROTOTYPES["Boolean"]
    if isinstance(value, int | float):
        return PROTOTYPES["Number"]
    return PROTOTYPES["Function"] if isinstance(value, Function) else None


def own_property(value: object, key: str) -> object:
    """`value[key]` if the value itself has it, else UNDEFINED."""
    if isinstance(value, Prototype):
        if key == "__proto__" and value.name == "Object":
            return None
        return value.properties.get(key, UNDEFINED)
    if isinstance(value, dict):
        return value.get(key, UNDEFINED)
    if isinstance(value, list):
        if _ARRAY_INDEX.fullmatch(key):
            return value[int(key)] if int(key) < len(value) else UNDEFINED
        return len(value) if key == "length" else UNDEFINED
    if isinstance(value, str):
        if _ARRAY_INDEX.fullmatch(key):
            text = units(value)
            return text[int(key)] if int(key) < len(text) else UNDEFINED
        return len(units(value)) if key == "length" else UNDEFINED
    if isinstance(value, Function):
        own: dict[str, object] = {"name": value.name, "length": value.length}
        return own.get(key, value.properties.get(key, UNDEFINED))
    return UNDEFINED


def property_of(value: object, key: str) -> object:
    """`value[key]`, own or inherited; UNDEFINED also for a property of null and undefined."""
    found = own_property(value, key)
    return inherited_property(value, key) if found is UNDEFINED else found


def inherited_property(value: object, key: str) -> object:
    """`value[key]` of what the value inherits from."""
    prototype = prototype_of(value)
    if key == "__proto__" and not is_nil(value):
        return prototype
    while prototype is not None:
        if key in prototype.properties:
            return prototype.properties[key]
        prototype = prototype_of(prototype)
    return UNDEFINED


def has_own(value: object, key: str) -> bool:
    """Object.prototype.hasOwnProperty.call(value, key)."""
    if isinstance(value, dict) and not isinstance(value, Prototype):
        return key in value
    if value is PROTOTYPES["Object"] and key == "__proto__":
        return True
    return own_property(value, key) is not UNDEFINED


def has_property(value: object, key: str) -> bool:
    """key in Object(value)."""
    return has_own(value, key) or inherited_property(value, key) is not UNDEFINED


def property_key(value: object) -> str:
    """ToPropertyKey (7.1.19): what `object[value]` looks for."""
    return value if isinstance(value, str) else to_string(value)


def in_key_order(keys: Iterable[str]) -> list[str]:
    """An object's keys in JavaScript's order (10.1.11): array indexes ascending, then as given."""
    names = list(keys)
    indexes = [key for key in names if is_array_index(key)]
    if not indexes:
        return names
    indexes.sort(key=int)
    return indexes + [key for key in names if not is_array_index(key)]


def is_array_index(key: str) -> bool:
    """A whole number from 0 to 2**32 - 2, written plainly."""
    return _ARRAY_INDEX.fullmatch(key) is not None and int(key) < MAX_ARRAY_LENGTH


def keys_of(value: object) -> list[str]:
    """Object.keys(value): own names, for arrays and texts the indexes."""
    if isinstance(value, dict):
        return in_key_order(value)
    if isinstance(value, list | str):
        count = len(units(value) if isinstance(value, str) else value)
        return [str(index) for index in range(count)]
    return []


def is_array_like(value: object) -> bool:
    """lodash's _.isArrayLike: has a length, and is no function."""
    if isinstance(value, list | str):
        return True
    return isinstance(value, dict) and is_length(own_property(value, "length"))
