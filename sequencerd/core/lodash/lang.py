"""lodash's type checks and copies."""

from __future__ import annotations

import math
from collections.abc import Callable

from sequencerd.core.inherited import Function
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

Check = Callable[[object], object]

# Types that JavaScript has and JSON lacks.
_NEVER_IN_JSON = """
    isArguments isArrayBuffer isBuffer isDate isElement isError isMap isRegExp isSet isSymbol
    isTypedArray isWeakMap isWeakSet
""".split()


def is_integer(value: object) -> bool:
    """_.isInteger."""
    return is_number(value) and to_double(value).is_integer()


def is_empty(value: object) -> bool:
    """_.isEmpty: true for all but texts, arrays and objects with something in them."""
    return not (isinstance(value, str | list | dict) and value)


def _is_object_like(value: object) -> bool:
    return isinstance(value, dict | list)


_CHECKS: dict[str, Check] = {
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
    "isPlainObject": lambda value: isinstance(value, dict),
    "isSafeInteger": lambda value: is_integer(value) and abs(to_double(value)) < 2**53,  # type: ignore[arg-type]
    "isString": lambda value: isinstance(value, str),
    "isUndefined": lambda value: value is UNDEFINED,
    "clone": lambda value: value,
    "cloneDeep": lambda value: value,
    "cloneDeepWith": lambda value: value,
    "cloneWith": lambda value: value,
    "castArray": lambda value: True,
    "toArray": lambda value: True,
    "toPlainObject": lambda value: True,
    **dict.fromkeys(_NEVER_IN_JSON, lambda value: False),
}


def _of_the_first(check: Check) -> Callable[[object, object], object]:
    return lambda value, _: check(value)


COMMANDS: dict[str, Callable[[object, object], object]] = {
    name: _of_the_first(check) for name, check in _CHECKS.items()
}
