"""lodash's remaining commands: defaults, constants, ranges, and those that make functions."""

from __future__ import annotations

from sequencerd.core.inherited import Function
from sequencerd.core.javascript import (
    MAX_ARRAY_LENGTH,
    UNDEFINED,
    is_nan,
    is_nil,
    property_of,
    to_finite,
    type_error,
)
from sequencerd.core.lodash.collection import items_of
from sequencerd.core.lodash.equality import shorthand
from sequencerd.core.lodash.paths import to_key
from sequencerd.core.lodash.table import Command, gives_true, named
from sequencerd.core.lodash.text import text_of


def identity(value: object, _: object) -> object:
    """_.identity: the value itself."""
    return value


def default_to(value: object, default: object) -> object:
    """_.defaultTo: the default for null, undefined and NaN."""
    return default if is_nil(value) or is_nan(value) else value


def range_(value: object, end: object) -> object:
    """_.range: an array, unless it would be longer than arrays can be."""
    first, last = to_finite(value), to_finite(end)
    if abs(last - first) > MAX_ARRAY_LENGTH:
        raise type_error("the range is too long")
    return True


def bind_all(value: object, names: object) -> object:
    """_.bindAll: the object, if what is at the names are functions."""
    for name in names if isinstance(names, list) else [names]:
        if not isinstance(property_of(value, to_key(name)), Function):
            raise type_error("bindAll needs functions, which data can't hold")
    return value


def flow(value: object, other: object) -> object:
    """_.flow: a function made of functions, which data can't hold."""
    given = [
        item for part in (value, other) for item in (part if isinstance(part, list) else [part])
    ]
    if not all(isinstance(item, Function) for item in given):
        raise type_error("flow needs functions, which data can't hold")
    return True


def cond(pairs: object, _: object) -> object:
    """_.cond: a function made of pairs of functions, which data can't hold."""
    if items_of(pairs):
        raise type_error("cond needs functions, which data can't hold")
    return True


def times(count: object, iteratee: object) -> object:
    """_.times: an array."""
    to_finite(count)
    shorthand(iteratee)
    return True


def unique_id(prefix: object, _: object) -> object:
    """_.uniqueId: a text with a number at its end, so true."""
    text_of(prefix)
    return True


COMMANDS: dict[str, Command] = {
    "bindAll": bind_all,
    "cond": cond,
    "defaultTo": default_to,
    "flow": flow,
    "flowRight": flow,
    "identity": identity,
    "noop": lambda _, __: UNDEFINED,
    "range": range_,
    "rangeRight": range_,
    "stubArray": gives_true,
    "stubFalse": lambda _, __: False,
    "stubObject": gives_true,
    "stubString": lambda _, __: "",
    "stubTrue": gives_true,
    "times": times,
    "uniqueId": unique_id,
    **named(
        """
        attempt bindKey chain conforms constant method methodOf now nthArg over overArgs
        overEvery overSome propertyOf wrap
        """,
        gives_true,
    ),
}
