"""lodash's commands on collections: arrays, texts, objects, and objects with a length."""

from __future__ import annotations

import math

from sequencerd.core.javascript import (
    MAX_STEPS,
    UNDEFINED,
    Steps,
    is_array_like,
    is_nil,
    is_truthy,
    keys_of,
    property_key,
    property_of,
    same_value_zero,
    to_number,
    to_string,
    too_much,
    units,
)
from sequencerd.core.lodash.equality import shorthand
from sequencerd.core.lodash.paths import compile_cast, invoke
from sequencerd.core.lodash.table import Command, gives_true, named

Pair = tuple[str, object]


def items_of(array: object) -> list[object]:
    """What lodash walks when it takes a value for an array: from 0 to below its `length`."""
    if isinstance(array, list):
        return array
    if isinstance(array, str):
        return list[object](units(array))
    length = UNDEFINED if is_nil(array) else property_of(array, "length")
    count = max(to_number(length), 0.0) if is_truthy(length) else 0.0
    if count > MAX_STEPS:
        raise too_much()
    indexes = range(math.ceil(count) if count > 0 else 0)  # not for NaN
    return [property_of(array, str(index)) for index in indexes]


def pairs_of(collection: object) -> list[Pair]:
    """What lodash walks when it takes a value for a collection: the indexes or the own keys."""
    if is_array_like(collection):
        return [(str(index), item) for index, item in enumerate(items_of(collection))]
    return [(key, property_of(collection, key)) for key in keys_of(collection)]


def values_of(collection: object) -> list[object]:
    """The values of pairs_of."""
    if is_array_like(collection):
        return items_of(collection)
    return [value for _, value in pairs_of(collection)]


def includes(collection: object, value: object) -> bool:
    """_.includes: a part of a text, an item of an array, a value of an object."""
    if isinstance(collection, str):
        return units(to_string(value)) in units(collection)
    return any(same_value_zero(item, value) for item in values_of(collection))


def size(collection: object, _: object) -> object:
    """_.size: the length, or how many keys an object has."""
    if is_array_like(collection):
        return property_of(collection, "length")
    return len(keys_of(collection))


def some(collection: object, predicate: object) -> bool:
    """_.some: whether any item passes."""
    passes = shorthand(predicate)
    return any(is_truthy(passes(item)) for item in values_of(collection))


def every(collection: object, predicate: object) -> bool:
    """_.every: whether all items pass; none do too."""
    passes = shorthand(predicate)
    return all(is_truthy(passes(item)) for item in values_of(collection))


def find(collection: object, predicate: object) -> object:
    """_.find: the first item that passes."""
    passes = shorthand(predicate)
    found = (item for item in values_of(collection) if is_truthy(passes(item)))
    return next(found, UNDEFINED)


def find_last(collection: object, predicate: object) -> object:
    """_.findLast: the last item that passes."""
    passes = shorthand(predicate)
    found = (item for item in reversed(values_of(collection)) if is_truthy(passes(item)))
    return next(found, UNDEFINED)


def reduce(collection: object, iteratee: object) -> object:
    """_.reduce without a start: the first item, and the shorthand asked of it for each other."""
    return _reduced(values_of(collection), iteratee)


def reduce_right(collection: object, iteratee: object) -> object:
    """_.reduceRight: as reduce, from the last item."""
    return _reduced(values_of(collection)[::-1], iteratee)


def _reduced(items: list[object], iteratee: object) -> object:
    step = shorthand(iteratee)
    if not items:
        return UNDEFINED
    result = items[0]
    for _ in items[1:]:
        result = step(result)
    return result


def for_each(collection: object, iteratee: object) -> object:
    """_.forEach: the collection."""
    shorthand(iteratee)
    return collection


def with_shorthand(_collection: object, iteratee: object) -> object:
    """filter, map, sortBy and the like give an array or an object, empty or not: true."""
    shorthand(iteratee)
    return True


def _keyed(collection: object, iteratee: object) -> object:
    """_.groupBy, _.countBy, _.keyBy: an object by the text of what the shorthand gives."""
    key = shorthand(iteratee)
    for item in values_of(collection):
        property_key(key(item))
    return True


def invoke_map(collection: object, path: object) -> object:
    """_.invokeMap: an array of what is called at the path of each item."""
    cast, steps = compile_cast(path), Steps()
    for item in values_of(collection):
        parts = cast(item)
        steps.spend(1 + len(parts))
        invoke(item, parts)
    return True


COMMANDS: dict[str, Command] = {
    "countBy": _keyed,
    "each": for_each,
    "eachRight": for_each,
    "every": every,
    "find": find,
    "findLast": find_last,
    "forEach": for_each,
    "forEachRight": for_each,
    "groupBy": _keyed,
    "includes": includes,
    "invokeMap": invoke_map,
    "keyBy": _keyed,
    "reduce": reduce,
    "reduceRight": reduce_right,
    "size": size,
    "some": some,
    **named("filter flatMap flatMapDeep flatMapDepth map partition reject", with_shorthand),
    **named("orderBy sampleSize shuffle sortBy", gives_true),
}
