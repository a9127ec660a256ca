"""The few of JavaScript's own functions that a path can lead to and `result` then calls."""

from __future__ import annotations

from collections.abc import Callable

from sequencerd.core.inherited import PROTOTYPES, Function
from sequencerd.core.javascript import (
    SPACE,
    UNDEFINED,
    is_number,
    number_text,
    property_of,
    to_double,
    to_string,
    type_error,
)

# Without arguments. Functions of the same name differ by the prototype that has them.
_METHODS: dict[tuple[str, str], Callable[[object], object]] = {
    ("Object", "toString"): lambda _: "[object Object]",
    ("Object", "valueOf"): lambda owner: owner,
    ("Array", "concat"): lambda owner: owner,
    ("Array", "keys"): lambda _: [],
    ("Array", "entries"): lambda _: [],
    ("Array", "values"): lambda _: [],
    ("Array", "slice"): lambda owner: owner,
    ("Array", "reverse"): lambda owner: owner,
    ("Array", "flat"): lambda owner: owner,
    ("Array", "join"): to_string,
    ("Array", "toString"): to_string,
    ("Array", "pop"): lambda owner: owner[-1] if isinstance(owner, list) and owner else UNDEFINED,
    ("Array", "shift"): lambda owner: owner[0] if isinstance(owner, list) and owner else UNDEFINED,
    ("String", "toString"): lambda owner: owner,
    ("String", "valueOf"): lambda owner: owner,
    ("String", "trim"): lambda owner: to_string(owner).strip(SPACE),
    ("String", "trimStart"): lambda owner: to_string(owner).lstrip(SPACE),
    ("String", "trimEnd"): lambda owner: to_string(owner).rstrip(SPACE),
    ("String", "toUpperCase"): lambda owner: to_string(owner).upper(),
    ("String", "toLowerCase"): lambda owner: to_string(owner).lower(),
    ("Number", "toString"): to_string,
    ("Number", "valueOf"): lambda owner: owner,
    ("Number", "toFixed"): lambda owner: number_text(to_double(owner) if is_number(owner) else 0),
    ("Boolean", "toString"): to_string,
    ("Boolean", "valueOf"): lambda owner: owner,
}

_CALLS = {
    id(PROTOTYPES[owner].properties[name]): method for (owner, name), method in _METHODS.items()
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
