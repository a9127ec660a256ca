"""lodash's type checks and copies."""

from __future__ import annotations

import math
from collections.abc import Callable

from sequencerd.core.inherited import Function, Prototype
from sequencerd.core.javascript import (
    UNDEFINED,
    is_array_like,
    is_length,
    is_nan,
    is_nil,
    is_number,
    is_object,
    to_double,
)
from sequencerd.core.lodash.table import Command, gives_true, named, of_value

# Types that JavaScript has and JSON lacks.
_NEVER_IN_JSON = """
    isArguments isArrayBuffer isBuffer isDate isElement isError isMap isRegExp isSet isSymbol
    isTypedArray isWeakMap isWeakSet
"""


def is_integer(value: object) -> bool:
    """_.isInteger: a number without a fraction; infinity is none."""
    return is_number(value) and to_double(value).is_integer()


def is_safe_integer(value: object) -> bool:
    """_.isSafeInteger: a whole number of at most 53 bits."""
    return is_number(value) and is_integer(value) and abs(to_double(value)) < 2**53


def is_empty(value: object) -> bool:
    """_.isEmpty: true for all but texts, arrays and objects with something in them."""
    return not (isinstance(value, str | list | dict) and value)


def is_plain_object(value: object) -> bool:
    """_.isPlainObject: any object of data; of JavaScript's own only what all inherit from."""
    return isinstance(value, dict) and not (isinstance(value, Prototype) and value.name != "Object")


def _is_object_like(value: object) -> bool:
    return isinstance(value, dict | list)


_CHECKS: dict[str, Callable[[object], object]] = {
    "isArray": lambda value: isinstance(value, list),
    "isArrayLike": is_array_like,
    "isArrayLikeObject": lambda value: _is_object_like(value) and is_array_like(value),
    "isBoolean": lambda value: isinstance(value, bool),
    "isEmpty": is_empty,
    "isFinite": lambda value: is_number(value) and math.isfinite(to_double(value)),
    "isFunction": lambda value: isinstance(value, Function),
    "isInteger": is_integer,
    "isLength": is_length,
    "isNaN": is_nan,
    "isNative": lambda value: isinstance(value, Function),
    "isNil": is_nil,
    "isNull": lambda value: value is None,
    "isNumber": is_number,
    "isObject": is_object,
    "isObjectLike": _is_object_like,
    "isPlainObject": is_plain_object,
    "isSafeInteger": is_safe_integer,
    "isString": lambda value: isinstance(value, str),
    "isUndefined": lambda value: value is UNDEFINED,
}


COMMANDS: dict[str, Command] = {
    **{name: of_value(check) for name, check in _CHECKS.items()},
    **named(_NEVER_IN_JSON, lambda _, __: False),
    **named("clone cloneDeep cloneDeepWith cloneWith", lambda value, _: value),
    **named("castArray toArray toPlainObject", gives_true),
}
