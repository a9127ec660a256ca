"""lodash's commands on numbers: comparisons, arithmetic, conversions, sums."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from decimal import Decimal

from sequencerd.core.javascript import (
    MAX_ARRAY_LENGTH,
    MAX_SAFE_INTEGER,
    SPACE,
    UNDEFINED,
    is_nan,
    is_nil,
    is_truthy,
    less_than,
    number_text,
    plus,
    property_of,
    to_double,
    to_finite,
    to_integer,
    to_number,
    units,
)
from sequencerd.core.lodash.collection import items_of
from sequencerd.core.lodash.equality import shorthand
from sequencerd.core.lodash.table import Command, of_value
from sequencerd.core.lodash.text import base_to_string, text_of

_DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"


def _relational(
    numbers: Callable[[float, float], bool], texts: Callable[[str, str], bool]
) -> Callable[[object, object], bool]:
    """lodash's rule: two texts compare by UTF-16 units, everything else as numbers."""

    def compared(value: object, other: object) -> bool:
        if isinstance(value, str) and isinstance(other, str):
            return texts(units(value), units(other))
        return numbers(to_number(value), to_number(other))

    return compared


gt = _relational(operator.gt, operator.gt)
gte = _relational(operator.ge, operator.ge)
lt = _relational(operator.lt, operator.lt)
lte = _relational(operator.le, operator.le)


def in_range(value: object, bound: object) -> bool:
    """_.inRange with one bound: between 0 and the bound, whichever is larger."""
    end = to_finite(bound)
    return min(0.0, end) <= to_number(value) < max(0.0, end)


def clamp(value: object, upper: object) -> float:
    """_.clamp with one bound: at most that; a bound that is no number is 0."""
    bound = math.inf if upper is UNDEFINED else to_number(upper)
    number = to_number(value)
    if math.isnan(number):
        return number
    return min(number, 0.0 if math.isnan(bound) else bound)


def _arithmetic(operate: Callable[[float, float], float], default: float) -> Command:
    """lodash's rule: a missing operand gives the other one, two missing the default."""

    def calculated(value: object, other: object) -> object:
        if value is UNDEFINED or other is UNDEFINED:
            given = other if value is UNDEFINED else value
            return default if given is UNDEFINED else given
        if isinstance(value, str) or isinstance(other, str):  # then true is "true", not 1
            value, other = base_to_string(value), base_to_string(other)
        return operate(to_number(value), to_number(other))

    return calculated


def add(value: object, other: object) -> object:
    """_.add: texts are joined."""
    given = value is not UNDEFINED and other is not UNDEFINED
    if given and (isinstance(value, str) or isinstance(other, str)):
        return base_to_string(value) + base_to_string(other)
    return _arithmetic(operator.add, 0)(value, other)


def divided(value: float, other: float) -> float:
    """The operator /: by zero it is infinite, and 0 / 0 is NaN."""
    if other:
        return value / other
    return math.nan if value == 0 or math.isnan(value) else math.inf


def to_length(value: object, _: object) -> float:
    """_.toLength: a whole number from 0 to the largest length of an array."""
    return max(0.0, min(to_integer(value), MAX_ARRAY_LENGTH))


def to_safe_integer(value: object, _: object) -> float:
    """_.toSafeInteger: a whole number of at most 53 bits."""
    return max(-MAX_SAFE_INTEGER, min(to_integer(value), MAX_SAFE_INTEGER))


def parse_int(value: object, radix: object) -> float:
    """_.parseInt: the digits at the start of the text, in base ten, or 16 after 0x."""
    given = 0.0 if is_nil(radix) else to_number(radix)
    base = int(given) if math.isfinite(given) else 0
    base = (base + 2**31) % 2**32 - 2**31  # ToInt32
    text = text_of(value).strip(SPACE)
    is_negative = text.startswith("-")
    text = text[1:] if text.startswith(("-", "+")) else text
    if base in (0, 16) and text.startswith(("0x", "0X")):
        text, base = text[2:], 16
    base = base or 10
    if not 2 <= base <= 36:
        return math.nan
    digits = text[: next((i for i, d in enumerate(text) if not _is_digit(d, base)), len(text))]
    if not digits:
        return math.nan
    number = to_double(int(digits[:1000], base))  # more digits are infinite anyway
    return -number if is_negative else number


def _is_digit(character: str, base: int) -> bool:
    return character.isascii() and character.lower() in _DIGITS[:base]


def _rounded(operate: Callable[[float], float]) -> Command:
    """_.ceil, _.floor and _.round, to a number of decimal places (may be negative)."""

    def rounded(value: object, precision: object) -> float:
        number = to_number(value)
        places = 0 if is_nil(precision) else int(max(min(to_integer(precision), 292), -1000))
        if not math.isfinite(number):
            return number
        if not places:
            return operate(number)
        return _shifted(operate(_shifted(number, places)), -places)

    return rounded


def _shifted(number: float, places: int) -> float:
    """A number times ten to the places, by its decimal text as lodash does it: infinity is NaN."""
    if not math.isfinite(number):
        return math.nan
    return float(Decimal(number_text(number)).scaleb(places))


def _ceil(number: float) -> float:
    return float(math.ceil(number)) if math.isfinite(number) else number


def _floor(number: float) -> float:
    return float(math.floor(number)) if math.isfinite(number) else number


def _round(number: float) -> float:
    """Math.round: halves go up."""
    if not math.isfinite(number):
        return number
    below = math.floor(number)
    return float(below + 1 if number - below >= 0.5 else below)


def _extreme(
    array: object, iteratee: object, is_better: Callable[[object, object], bool]
) -> object:
    """The item with the best value; null, undefined and a NaN at first are passed over."""
    read = shorthand(iteratee)
    found = best = UNDEFINED  # type: object
    for item in items_of(array):
        value = read(item)
        if is_nil(value):
            continue
        if not is_nan(value) if best is UNDEFINED else is_better(value, best):
            found, best = item, value
    return found


def maximum(array: object, _: object) -> object:
    """_.max: by the operator >, so two texts compare as texts."""
    return _extreme(array, None, lambda value, best: less_than(best, value))


def minimum(array: object, _: object) -> object:
    """_.min: by the operator <."""
    return _extreme(array, None, less_than)


def max_by(array: object, iteratee: object) -> object:
    """_.maxBy: the item whose value is the largest."""
    return _extreme(array, iteratee, lambda value, best: less_than(best, value))


def min_by(array: object, iteratee: object) -> object:
    """_.minBy: the item whose value is the smallest."""
    return _extreme(array, iteratee, less_than)


def sum_by(array: object, iteratee: object) -> object:
    """_.sumBy: by the operator +, which joins texts; what is undefined is passed over."""
    if not is_truthy(UNDEFINED if is_nil(array) else property_of(array, "length")):
        return 0
    read = shorthand(iteratee)
    total: object = UNDEFINED
    for item in items_of(array):
        value = read(item)
        if value is not UNDEFINED:
            total = value if total is UNDEFINED else plus(total, value)
    return total


def mean_by(array: object, iteratee: object) -> float:
    """_.meanBy: the sum by the length."""
    shorthand(iteratee)
    length = UNDEFINED if is_nil(array) else property_of(array, "length")
    if not is_truthy(length):
        return math.nan
    return divided(to_number(sum_by(array, iteratee)), to_number(length))


COMMANDS: dict[str, Command] = {
    "add": add,
    "ceil": _rounded(_ceil),
    "clamp": clamp,
    "divide": _arithmetic(divided, 1),
    "floor": _rounded(_floor),
    "gt": gt,
    "gte": gte,
    "inRange": in_range,
    "lt": lt,
    "lte": lte,
    "max": maximum,
    "maxBy": max_by,
    "mean": lambda array, _: mean_by(array, None),
    "meanBy": mean_by,
    "min": minimum,
    "minBy": min_by,
    "multiply": _arithmetic(operator.mul, 1),
    "parseInt": parse_int,
    "round": _rounded(_round),
    "subtract": _arithmetic(operator.sub, 0),
    "sum": lambda array, _: sum_by(array, None),
    "sumBy": sum_by,
    "toFinite": of_value(to_finite),
    "toInteger": of_value(to_integer),
    "toLength": to_length,
    "toNumber": of_value(to_number),
    "toSafeInteger": to_safe_integer,
}
