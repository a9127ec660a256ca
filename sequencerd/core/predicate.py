"""Conditions by lodash's commands: Boolean(_[command](value, compareTo)), JavaScript's way.

A part of lodash: the commands in the tables below. Every other name is rejected when the
definition is read. Names are looked up in a table and nowhere else, and data is read as data:
names that JavaScript's objects inherit ("constructor", "toString") are not seen by `get`.
"""

from __future__ import annotations

import math
import operator
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Literal, TypeGuard

from pydantic import BaseModel, ConfigDict, model_validator

from sequencerd.core.model import DefinitionError, EvaluationError
from sequencerd.core.template_values import number_text

MAX_DEPTH = 200  # of nested data that is compared or printed


class _Undefined:
    """JavaScript's undefined: what `get` gives where nothing is."""

    def __bool__(self) -> bool:
        return False

    def __repr__(self) -> str:
        return "undefined"


UNDEFINED = _Undefined()

_SPACE = "\t\n\v\f\r \u00a0\u1680\u2028\u2029\u202f\u205f\u3000\ufeff" + "".join(
    map(chr, range(0x2000, 0x200B))
)
_DECIMAL = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
_RADIX = re.compile(r"0[xX]([0-9a-fA-F]+)|0[oO]([0-7]+)|0[bB]([01]+)")
_KEY = re.compile(r"\[(?:\"([^\"]*)\"|'([^']*)'|([^\[\]]*))\]|([^.\[\]]+)|(\.(?=\.|$|\[\]))")


class Operand(BaseModel):
    """`{"type": "get", "value": path}` reads the enrollment, `{"type": "raw", ...}` is itself."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    type: Literal["get", "raw"]
    value: object = None

    @model_validator(mode="after")
    def _path_is_text(self) -> Operand:
        if self.type == "get" and not isinstance(self.value, str):
            raise ValueError('an operand of type "get" needs a path such as "data.paid"')
        return self


def compile_get(path: str) -> Callable[[object], object]:
    """lodash's _.get for one path: "a.b", "a[0].b", "a['b c']"; UNDEFINED where nothing is.

    A key that is spelled like the whole path wins. Never raises, whatever JSON it is given.
    """
    keys = [next((k for k in match.groups() if k is not None), "") for match in _KEY.finditer(path)]
    keys = ["" if key == "." else key for key in keys]
    if path.startswith("."):
        keys.insert(0, "")

    def get_path(subject: object) -> object:
        if isinstance(subject, dict) and path in subject:
            return subject[path]
        found = subject
        for key in keys:
            found = found.get(key, UNDEFINED) if isinstance(found, dict) else _member(found, key)
            if found is UNDEFINED:
                return UNDEFINED
        return found if keys else UNDEFINED

    return get_path


def get(subject: object, path: str) -> object:
    """`compile_get` for a path that is used once."""
    return compile_get(path)(subject)


def _member(value: object, key: str) -> object:
    """`value[key]` of an array or a text: its indexes and its length."""
    if not isinstance(value, list | str):
        return UNDEFINED
    items = _units(value) if isinstance(value, str) else value
    if key == "length":
        return len(items)
    is_index = key.isascii() and key.isdigit() and key == (key.lstrip("0") or "0")
    return items[int(key)] if is_index and len(key) < 11 and int(key) < len(items) else UNDEFINED


def _units(text: str) -> list[str]:
    """A text's UTF-16 units, which JavaScript counts and compares."""
    data = text.encode("utf-16-le", "surrogatepass")
    return [chr(int.from_bytes(data[i : i + 2], "little")) for i in range(0, len(data), 2)]


def is_number(value: object) -> TypeGuard[int | float]:
    """typeof value === "number"; Python's booleans are no numbers."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def to_number(value: object) -> float:
    """lodash's _.toNumber: null and "" are 0, arrays and objects go through their text."""
    if isinstance(value, bool | int | float):
        try:
            return float(value)
        except OverflowError:
            return math.inf if value > 0 else -math.inf
    if value is None:
        return 0.0
    if value is UNDEFINED:
        return math.nan
    text = (value if isinstance(value, str) else _joined(value, 0)).strip(_SPACE)
    if not text:
        return 0.0
    if match := _RADIX.fullmatch(text):
        return float(int(match[match.lastindex or 0], {1: 16, 2: 8, 3: 2}[match.lastindex or 0]))
    if _DECIMAL.fullmatch(text):
        return float(text)
    signs = {"Infinity": math.inf, "+Infinity": math.inf, "-Infinity": -math.inf}
    return signs.get(text, math.nan)


def _joined(value: object, depth: int) -> str:
    """JavaScript's own text of a value: null and undefined within an array print nothing."""
    if depth > MAX_DEPTH:
        raise EvaluationError("bad_data", f"the data is nested more than {MAX_DEPTH} deep")
    if isinstance(value, list):
        return ",".join("" if item is None else _joined(item, depth + 1) for item in value)
    if isinstance(value, dict):
        if "toString" in value:
            raise EvaluationError("error", "an object with the key toString has no text")
        return "[object Object]"
    return number_text(value) if is_number(value) else to_text(value)


def to_text(value: object, depth: int = 0) -> str:
    """lodash's text of a value: "null", "undefined", "-0", arrays joined by commas."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return "-0" if value == 0 and math.copysign(1, value) < 0 else number_text(value)
    if isinstance(value, list) and depth <= MAX_DEPTH:
        return ",".join(to_text(item, depth + 1) for item in value)
    if isinstance(value, list | dict):
        return _joined(value, depth)
    return "null" if value is None else "undefined"


def is_truthy(value: object) -> bool:
    """JavaScript's truthiness: arrays and objects are true, empty or not; NaN is false."""
    return isinstance(value, dict | list) or (bool(value) and value == value)  # noqa: PLR0124 -- NaN


def same_value_zero(value: object, other: object) -> bool:
    """lodash's _.eq: identity for arrays and objects, and NaN equals NaN."""
    if is_number(value) and is_number(other):
        left, right = to_number(value), to_number(other)
        return left == right or (math.isnan(left) and math.isnan(right))
    if isinstance(value, str) and isinstance(other, str):
        return value == other
    return value is other


def is_equal(value: object, other: object, depth: int = 0) -> bool:
    """lodash's _.isEqual on JSON: by content, arrays in order, objects in any."""
    if depth > MAX_DEPTH:
        raise EvaluationError("bad_data", f"the data is nested more than {MAX_DEPTH} deep")
    if isinstance(value, list) and isinstance(other, list):
        return len(value) == len(other) and all(
            is_equal(left, right, depth + 1) for left, right in zip(value, other, strict=True)
        )
    if isinstance(value, dict) and isinstance(other, dict):
        return value.keys() == other.keys() and all(
            is_equal(value[key], other[key], depth + 1) for key in value
        )
    return same_value_zero(value, other)


def includes(collection: object, value: object) -> bool:
    """lodash's _.includes: a part of a text, an item of an array, a value of an object."""
    if isinstance(collection, str):
        return _joined(value, 0) in collection
    if isinstance(collection, dict):
        length = collection.get("length")
        if _is_length(length):  # an object with a length counts as an array
            count = int(to_number(length))
            kept = [v for k, v in collection.items() if k.isdecimal() and int(k) < count]
            return any(same_value_zero(v, value) for v in kept) or (
                value is UNDEFINED and len(kept) < count
            )
        return any(same_value_zero(item, value) for item in collection.values())
    return isinstance(collection, list) and any(same_value_zero(i, value) for i in collection)


def size(value: object) -> float:
    """lodash's _.size."""
    if isinstance(value, dict) and _has_length(value):
        return to_number(value["length"])
    return len(value) if isinstance(value, str | list | dict) else 0


def starts_with(value: object, target: object) -> bool:
    """lodash's _.startsWith; a missing target reads as the text "undefined"."""
    return _text_or_empty(value).startswith(to_text(target))


def ends_with(value: object, target: object) -> bool:
    """lodash's _.endsWith; a missing target reads as the text "undefined"."""
    return _text_or_empty(value).endswith(to_text(target))


def _text_or_empty(value: object) -> str:
    return "" if value is None or value is UNDEFINED else to_text(value)


def _is_whole(value: object) -> bool:
    return is_number(value) and to_number(value).is_integer()


def _is_length(value: object) -> bool:
    return _is_whole(value) and 0 <= to_number(value) < 2**53


def in_range(value: object, bound: object) -> bool:
    """lodash's _.inRange with one bound: between 0 and the bound, whichever is larger."""
    end = to_number(bound)
    end = 0.0 if math.isnan(end) else max(min(end, sys.float_info.max), -sys.float_info.max)
    return min(0.0, end) <= to_number(value) < max(0.0, end)


def _arithmetic(
    operate: Callable[[float, float], float], default: float
) -> Callable[[object, object], object]:
    """lodash's rule: a missing operand gives the other one, two missing the default."""

    def calculated(value: object, other: object) -> object:
        if value is UNDEFINED or other is UNDEFINED:
            given = other if value is UNDEFINED else value
            return default if given is UNDEFINED else given
        if isinstance(value, str) or isinstance(other, str):  # then true is "true", not 1
            value, other = to_text(value), to_text(other)
        return operate(to_number(value), to_number(other))

    return calculated


def _add(value: object, other: object) -> object:
    """lodash's _.add: texts are joined."""
    given = value is not UNDEFINED and other is not UNDEFINED
    if given and (isinstance(value, str) or isinstance(other, str)):
        return to_text(value) + to_text(other)
    return _arithmetic(operator.add, 0)(value, other)


def _divided(value: float, other: float) -> float:
    """JavaScript's division: by zero it is infinite, and 0 / 0 is NaN."""
    if other:
        return value / other
    return math.nan if value == 0 or math.isnan(value) else math.inf


def _has_length(value: object) -> bool:
    return isinstance(value, dict) and _is_length(value.get("length"))


def _item(value: object, index: int) -> object:
    items = _units(value) if isinstance(value, str) else value
    return items[index] if isinstance(items, list) and items else UNDEFINED


def _relational(
    compare: Callable[[Any, Any], bool],  # operator's, on two numbers or two lists of texts
) -> Callable[[object, object], bool]:
    """lodash's rule: two texts compare by UTF-16 units, everything else as numbers."""

    def compared(value: object, other: object) -> bool:
        if isinstance(value, str) and isinstance(other, str):
            return compare(_units(value), _units(other))
        return compare(to_number(value), to_number(other))

    return compared


_TWO_OPERANDS: dict[str, Callable[[object, object], object]] = {
    "gt": _relational(operator.gt),
    "gte": _relational(operator.ge),
    "lt": _relational(operator.lt),
    "lte": _relational(operator.le),
    "eq": same_value_zero,
    "isEqual": is_equal,
    "includes": includes,
    "startsWith": starts_with,
    "endsWith": ends_with,
    "inRange": in_range,
    "add": _add,
    "subtract": _arithmetic(operator.sub, 0),
    "multiply": _arithmetic(operator.mul, 1),
    "divide": _arithmetic(_divided, 1),
}

# Types that JavaScript has and JSON lacks.
_NEVER_IN_JSON = (
    "isArguments",
    "isArrayBuffer",
    "isBuffer",
    "isDate",
    "isElement",
    "isError",
    "isFunction",
    "isMap",
    "isNative",
    "isRegExp",
    "isSet",
    "isSymbol",
    "isTypedArray",
    "isWeakMap",
    "isWeakSet",
)

_ONE_OPERAND: dict[str, Callable[[object], object]] = {
    "first": lambda value: _item(value, 0),
    "head": lambda value: _item(value, 0),
    "identity": lambda value: value,
    "isArray": lambda value: isinstance(value, list),
    "isArrayLike": lambda value: isinstance(value, str | list) or _has_length(value),
    "isArrayLikeObject": lambda value: isinstance(value, list) or _has_length(value),
    "isBoolean": lambda value: isinstance(value, bool),
    "isEmpty": lambda value: not (isinstance(value, str | list | dict) and value),
    "isFinite": lambda value: is_number(value) and math.isfinite(to_number(value)),
    "isInteger": _is_whole,
    "isLength": _is_length,
    "isNaN": lambda value: is_number(value) and math.isnan(to_number(value)),
    "isNil": lambda value: value is None or value is UNDEFINED,
    "isNull": lambda value: value is None,
    "isNumber": is_number,
    "isObject": lambda value: isinstance(value, dict | list),
    "isObjectLike": lambda value: isinstance(value, dict | list),
    "isPlainObject": lambda value: isinstance(value, dict),
    "isSafeInteger": lambda value: _is_whole(value) and abs(to_number(value)) < 2**53,
    "isString": lambda value: isinstance(value, str),
    "isUndefined": lambda value: value is UNDEFINED,
    "last": lambda value: _item(value, -1),
    "size": size,
    "toNumber": to_number,
    **dict.fromkeys(_NEVER_IN_JSON, lambda _: False),
}


def _ignoring_the_second(
    function: Callable[[object], object],
) -> Callable[[object, object], object]:
    return lambda value, _: function(value)


_FUNCTIONS = _TWO_OPERANDS | {name: _ignoring_the_second(f) for name, f in _ONE_OPERAND.items()}

COMMANDS = frozenset(_FUNCTIONS)
"""The commands that a definition may name."""


@dataclass(frozen=True, slots=True)
class Predicate:
    """A condition, ready to be asked of a subject."""

    command: str
    function: Callable[[object, object], object]
    value: Callable[[object], object]
    compare_to: Callable[[object], object]

    def __call__(self, subject: object) -> bool:
        """The answer. Raises EvaluationError where the command can't work with the data."""
        return is_truthy(self.function(self.value(subject), self.compare_to(subject)))

    def operands(self, subject: object) -> tuple[object, object]:
        """What is compared, for whoever explains the answer."""
        return self.value(subject), self.compare_to(subject)


def compile_predicate(command: str, value: Operand, compare_to: Operand | None) -> Predicate:
    """Looks the command up and the paths through. Raises DefinitionError for an unknown command."""
    function = _FUNCTIONS.get(command)
    if function is None:
        near = get_close_matches(str(command), COMMANDS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else f"; known are {sorted(COMMANDS)}"
        raise DefinitionError(f"lodashCommand {command!r} is not known{hint}")
    return Predicate(command, function, _reader(value), _reader(compare_to))


def _reader(operand: Operand | None) -> Callable[[object], object]:
    if operand is None:
        return lambda _: UNDEFINED
    if operand.type == "get":
        return compile_get(str(operand.value))
    raw = operand.value
    return lambda _: raw
