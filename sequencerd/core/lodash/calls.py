"""The few of JavaScript's own functions that a path can lead to and `result` then calls."""

from __future__ import annotations

from collections.abc import Callable

from sequencerd.core.inherited import PROTOTYPES, Function
from sequencerd.core.javascript import (
    SPACE,
    UNDEFINED,
    has_own,
    property_of,
    strict_equals,
    to_string,
    type_error,
)

Method = Callable[[object], object]
"""A call without arguments: of the owner makes the result, which need be as true only."""


def _same(owner: object) -> object:
    return owner


def _has_undefined(owner: object) -> bool:
    return has_own(owner, "undefined")


def _first(owner: object) -> object:
    return property_of(owner, "0")


def _last(owner: object) -> object:
    return owner[-1] if isinstance(owner, list) and owner else UNDEFINED


# Functions of the same name differ by the prototype that has them.
_METHODS: dict[str, dict[str, Method]] = {
    "Object": {
        "hasOwnProperty": _has_undefined,
        "isPrototypeOf": lambda _: False,
        "propertyIsEnumerable": _has_undefined,
        "toLocaleString": to_string,
        "toString": lambda _: "[object Object]",
        "valueOf": _same,
    },
    "Array": {
        "at": _first,
        "includes": lambda owner: (
            isinstance(owner, list) and any(item is UNDEFINED for item in owner)
        ),
        "join": to_string,
        "pop": _last,
        "push": lambda owner: property_of(owner, "length"),
        "shift": _first,
        "toLocaleString": to_string,
        "toString": to_string,
        "unshift": lambda owner: property_of(owner, "length"),
    },
    "String": {
        "at": _first,
        "charAt": _first,
        "charCodeAt": lambda owner: not strict_equals(_first(owner), "\0") and bool(owner),
        "codePointAt": lambda owner: not strict_equals(_first(owner), "\0") and bool(owner),
        "concat": _same,
        "endsWith": lambda owner: to_string(owner).endswith("undefined"),
        "includes": lambda owner: "undefined" in to_string(owner),
        "normalize": _same,
        "padEnd": _same,
        "padStart": _same,
        "repeat": lambda _: "",
        "replace": _same,
        "replaceAll": _same,
        "slice": _same,
        "startsWith": lambda owner: to_string(owner).startswith("undefined"),
        "substr": _same,
        "substring": _same,
        "toLocaleLowerCase": _same,
        "toLocaleUpperCase": _same,
        "toLowerCase": _same,
        "toString": _same,
        "toUpperCase": _same,
        "trim": lambda owner: to_string(owner).strip(SPACE),
        "trimEnd": lambda owner: to_string(owner).rstrip(SPACE),
        "trimStart": lambda owner: to_string(owner).lstrip(SPACE),
        "valueOf": _same,
    },
    "Number": {"toFixed": to_string, "toString": to_string, "valueOf": _same},
    "Boolean": {"toString": to_string, "valueOf": _same},
}
_TRUE_FOR_ARRAYS = """
    concat copyWithin entries fill flat indexOf keys lastIndexOf reverse slice sort splice
    toReversed toSorted toSpliced values
"""
_TRUE_FOR_TEXTS = """
    anchor big blink bold fixed fontcolor fontsize italics link match matchAll small split strike
    sub sup
"""
_METHODS["Array"].update(dict.fromkeys(_TRUE_FOR_ARRAYS.split(), lambda _: True))
_METHODS["String"].update(dict.fromkeys(_TRUE_FOR_TEXTS.split(), lambda _: True))

_CALLS = {
    id(PROTOTYPES[owner].properties[name]): method
    for owner, methods in _METHODS.items()
    for name, method in methods.items()
}
_CONSTRUCTED: dict[str, object] = {
    "Object": {},
    "Array": [],
    "String": "",
    "Number": 0,
    "Boolean": False,
    "Function": {},
}


def call(function: object, owner: object) -> object:
    """`owner.function()`. Raises EvaluationError for what is no function, or not one of the few."""
    if not isinstance(function, Function):
        raise type_error("what the path leads to is no function")
    method = _CALLS.get(id(function))
    if method is not None:
        return method(owner)
    if property_of(function, "prototype") is not UNDEFINED:
        return _CONSTRUCTED[function.name]
    raise type_error(f"the function {function.name} can't be called")
