"""lodash's deep comparisons, isEqual and isMatch, and the shorthands that are made of them."""

from __future__ import annotations

from collections.abc import Callable

from sequencerd.core.inherited import Function
from sequencerd.core.javascript import (
    MAX_DEPTH,
    UNDEFINED,
    Steps,
    has_own,
    has_property,
    is_nil,
    is_object,
    keys_of,
    property_of,
    same_value_zero,
    strict_equals,
    too_deep,
    type_error,
)
from sequencerd.core.lodash.paths import compile_cast, compile_get, has_in, is_key, to_key
from sequencerd.core.lodash.table import Command, gives_true


def is_equal(value: object, other: object) -> bool:
    """_.isEqual: by content, arrays in order, objects in any; NaN equals NaN."""
    return _equal(value, other, False, 0, Steps())


def is_match(value: object, source: object) -> bool:
    """_.isMatch: whether all of the source's properties are in the value, deeply.

    Within, arrays match in any order and may hold more. A source without properties matches all.
    """
    return value is source or _matches(value, source, Steps())


def _matches(value: object, source: object, steps: Steps) -> bool:
    pairs = [(key, property_of(source, key)) for key in keys_of(source)]
    if is_nil(value):
        return not pairs
    for key, wanted in pairs:  # what is quickly told first, as lodash does
        if not is_object(wanted) and not strict_equals(property_of(value, key), wanted):
            return False
    return all(
        has_property(value, key)
        and (not is_object(wanted) or _equal(wanted, property_of(value, key), True, 0, steps))
        for key, wanted in pairs
    )


def _equal(value: object, other: object, partial: bool, depth: int, steps: Steps) -> bool:
    """lodash's baseIsEqual; `partial`: the value may hold less, and arrays compare as sets."""
    steps.spend()
    if value is other:
        return True
    if depth > MAX_DEPTH:
        raise too_deep()
    if isinstance(value, list) and isinstance(other, list):
        if not partial:
            return len(value) == len(other) and all(
                _equal(left, right, False, depth + 1, steps)
                for left, right in zip(value, other, strict=True)
            )
        return len(value) <= len(other) and _equal_sets(value, other, depth, steps)
    if isinstance(value, dict) and isinstance(other, dict):
        return _equal_objects(value, other, partial, depth, steps)
    return same_value_zero(value, other)


def _equal_sets(value: list[object], other: list[object], depth: int, steps: Steps) -> bool:
    """Each item takes the first equal one that is left of the other list."""
    taken: set[int] = set()
    for item in value:
        for index, candidate in enumerate(other):
            if index not in taken and _equal(item, candidate, True, depth + 1, steps):
                taken.add(index)
                break
        else:
            return False
    return True


def _equal_objects(
    value: dict[str, object], other: dict[str, object], partial: bool, depth: int, steps: Steps
) -> bool:
    """Own properties decide; in a partial comparison the other's may be inherited.

    Objects with different `constructor` differ, unless it is compared as a property.
    """
    if len(value) != len(other) and not partial:
        return False
    has_key = has_property if partial else has_own
    if not all(has_key(other, key) for key in reversed(keys_of(value))):
        return False
    if not all(
        _equal(value[key], property_of(other, key), partial, depth + 1, steps)
        for key in keys_of(value)
    ):
        return False
    return "constructor" in value or "constructor" not in other


def shorthand(iteratee: object) -> Callable[[object], object]:
    """lodash's _.iteratee, the shorthands: what is asked of each item of a collection.

    Nothing is the item itself, a text or number the property at that path, a list [path, value]
    whether the property matches, an object whether the item matches it.
    """
    if is_nil(iteratee):
        return lambda item: item
    if isinstance(iteratee, Function):
        raise type_error(f"the function {iteratee.name} can't be called")
    if isinstance(iteratee, list):
        path, wanted = (*iteratee, UNDEFINED, UNDEFINED)[:2]
        return matches_property(path, wanted)
    return matches(iteratee) if isinstance(iteratee, dict) else compile_get(iteratee)


def matches(source: object) -> Callable[[object], bool]:
    """_.matches: is_match, made once for many items."""
    steps = Steps()
    keys = keys_of(source)
    if len(keys) == 1 and not is_object(property_of(source, keys[0])):
        return _has_value(keys[0], property_of(source, keys[0]))
    return lambda item: item is source or _matches(item, source, steps)


def matches_property(path: object, wanted: object) -> Callable[[object], bool]:
    """_.matchesProperty: whether the property at the path equals or matches the value."""
    if is_key(path) and not is_object(wanted):
        return _has_value(to_key(path), wanted)
    read, cast, steps = compile_get(path), compile_cast(path), Steps()

    def matching(item: object) -> bool:
        found = read(item)
        if found is UNDEFINED and wanted is UNDEFINED:
            return has_in(item, cast(item))
        return _equal(wanted, found, True, 0, steps)

    return matching


def _has_value(key: str, wanted: object) -> Callable[[object], bool]:
    def matching(item: object) -> bool:
        if is_nil(item) or not strict_equals(property_of(item, key), wanted):
            return False
        return wanted is not UNDEFINED or has_property(item, key)

    return matching


def _matcher(source: object, _: object) -> object:
    """_.matches, _.iteratee, _.conforms and the like give a function, so true."""
    shorthand(source)
    return True


COMMANDS: dict[str, Command] = {
    "eq": same_value_zero,
    "isEqual": is_equal,
    "isEqualWith": is_equal,
    "isMatch": is_match,
    "isMatchWith": is_match,
    "iteratee": _matcher,
    "matches": gives_true,
    "matchesProperty": lambda path, wanted: bool(matches_property(path, wanted)),
}
