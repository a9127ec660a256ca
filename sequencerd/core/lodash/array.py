"""lodash's commands on arrays. A text counts as one, and so does an object with a length."""

from __future__ import annotations

import math
from collections.abc import Callable

from sequencerd.core.javascript import (
    UNDEFINED,
    is_array_like,
    is_nan,
    is_nil,
    is_number,
    is_truthy,
    less_or_equal,
    less_than,
    number_text,
    property_key,
    property_of,
    same_value_zero,
    to_integer,
    to_number,
    to_string,
    type_error,
)
from sequencerd.core.lodash.collection import items_of, with_shorthand
from sequencerd.core.lodash.equality import shorthand
from sequencerd.core.lodash.paths import is_index
from sequencerd.core.lodash.table import Command, gives_true, named


def _length(array: object) -> object:
    return UNDEFINED if is_nil(array) else property_of(array, "length")


def head(array: object, _: object) -> object:
    """_.head, _.first: the first item."""
    return property_of(array, "0") if is_truthy(_length(array)) else UNDEFINED


def last(array: object, _: object) -> object:
    """_.last: the last item."""
    length = _length(array)
    return (
        property_of(array, number_text(to_number(length) - 1)) if is_truthy(length) else UNDEFINED
    )


def nth(array: object, n: object) -> object:
    """_.nth: the item at an index, from the end where it is negative."""
    length = _length(array)
    if not is_truthy(length):
        return UNDEFINED
    count, index = to_number(length), to_integer(n)
    index += count if index < 0 else 0
    return property_of(array, number_text(index)) if is_index(index, count) else UNDEFINED


def index_of(array: object, value: object) -> int:
    """_.indexOf: the index of the first item that is the value, else -1, which is true."""
    return _first_index(items_of(array), lambda item: same_value_zero(item, value))


def last_index_of(array: object, value: object) -> float:
    """_.lastIndexOf: as indexOf, from the end; NaN, which is false, if the length is no number."""
    length = _length(array)
    if is_truthy(length) and math.isnan(to_number(length)):
        return math.nan
    return _last_index(items_of(array), lambda item: same_value_zero(item, value))


def find_index(array: object, predicate: object) -> int:
    """_.findIndex: the index of the first item that passes, else -1, which is true."""
    return _first_index(items_of(array), shorthand(predicate))


def find_last_index(array: object, predicate: object) -> int:
    """_.findLastIndex: as findIndex, from the end."""
    return _last_index(items_of(array), shorthand(predicate))


def _first_index(items: list[object], passes: Callable[[object], object]) -> int:
    return next((index for index, item in enumerate(items) if is_truthy(passes(item))), -1)


def _last_index(items: list[object], passes: Callable[[object], object]) -> int:
    found = (i for i in range(len(items) - 1, -1, -1) if is_truthy(passes(items[i])))
    return next(found, -1)


def _sorted_index(array: object, value: object, *, highest: bool = False) -> int:
    """Where the value would go in a sorted array, by halving: the items need not be sorted."""
    items = items_of(array)
    low, high = 0, len(items)
    while low < high:
        middle = (low + high) // 2
        if _goes_after(items[middle], value, highest):
            low = middle + 1
        else:
            high = middle
    return high


def _goes_after(item: object, value: object, highest: bool) -> bool:
    """Numbers and texts first, then null, undefined and NaN."""
    if is_number(value) and not is_nan(value):
        return item is not None and _ordered(item, value, highest)
    if is_nan(value):
        return highest or not is_nan(item)
    if value is UNDEFINED:
        return not is_nan(item) and (highest or item is not UNDEFINED)
    if value is None:
        return not is_nan(item) and item is not UNDEFINED and (highest or item is not None)
    return item is not None and _ordered(item, value, highest)


def _ordered(item: object, value: object, highest: bool) -> bool:
    return less_or_equal(item, value) if highest else less_than(item, value)


def sorted_index(array: object, value: object) -> int:
    """_.sortedIndex: the lowest index at which the value keeps the array sorted."""
    return _sorted_index(array, value)


def sorted_last_index(array: object, value: object) -> int:
    """_.sortedLastIndex: the highest one."""
    return _sorted_index(array, value, highest=True)


def sorted_index_of(array: object, value: object) -> int:
    """_.sortedIndexOf: as indexOf, by halving."""
    items = items_of(array)
    index = _sorted_index(array, value)
    return index if index < len(items) and same_value_zero(items[index], value) else -1


def sorted_last_index_of(array: object, value: object) -> int:
    """_.sortedLastIndexOf: as lastIndexOf, by halving."""
    items = items_of(array)
    index = _sorted_index(array, value, highest=True) - 1
    return index if items and same_value_zero(items[index], value) else -1


def join(array: object, separator: object) -> str:
    """_.join: the items' texts, null and undefined as nothing, with the separator between."""
    if is_nil(array):
        return ""
    between = "," if separator is UNDEFINED else to_string(separator)
    return between.join("" if is_nil(item) else to_string(item) for item in items_of(array))


def reverse(array: object, _: object) -> object:
    """_.reverse: the array; a text of two letters or more can't be changed, which throws."""
    if isinstance(array, str) and len(array) > 1:
        raise type_error("a text can't be reversed")
    return array if is_nil(array) else True


def _pulled(array: object, is_pulled: Callable[[object], object]) -> object:
    """The array that items are removed from. A text has none to remove, which throws."""
    if isinstance(array, str) and any(is_truthy(is_pulled(unit)) for unit in items_of(array)):
        raise type_error("a text has no items to remove")
    return array


def pull(array: object, value: object) -> object:
    """_.pull: the array without the value."""
    return _pulled(array, lambda item: same_value_zero(item, value))


def pull_all(array: object, values: object) -> object:
    """_.pullAll, _.pullAllBy, _.pullAllWith: the array without the values."""
    wanted = {value for value in items_of(values) if isinstance(value, str)}
    return _pulled(array, lambda unit: unit in wanted)


def remove(array: object, predicate: object) -> object:
    """_.remove: what was removed, an array."""
    if is_truthy(_length(array)):
        _pulled(array, shorthand(predicate))
    return True


def pull_at(array: object, indexes: object) -> object:
    """_.pullAt: what was removed, an array."""
    wanted = indexes if isinstance(indexes, list) else [indexes]
    if isinstance(array, str) and any(is_index(index, 2**53) for index in wanted):
        raise type_error("a text has no items to remove")
    return True


def sized(array: object, count: object) -> object:
    """_.take, _.drop and the like: an array."""
    if is_truthy(_length(array)):
        to_integer(count)
    return True


def unzip_with(array: object, iteratee: object) -> object:
    """_.unzipWith asks a function, which data can't hold, of each group there is."""
    groups = items_of(array) if not is_nil(iteratee) else []
    if any(
        not isinstance(group, str) and is_array_like(group) and is_truthy(_length(group))
        for group in groups
    ):
        raise type_error("unzipWith needs a function, which data can't hold")
    return True


def chunk(_array: object, size: object) -> object:
    """_.chunk: an array."""
    to_integer(size)
    return True


def from_pairs(pairs: object, _: object) -> object:
    """_.fromPairs: an object of [key, value]."""
    for pair in items_of(pairs):
        if is_nil(pair):
            raise type_error("a pair is missing")
        property_key(property_of(pair, "0"))
    return True


COMMANDS: dict[str, Command] = {
    "chunk": chunk,
    "findIndex": find_index,
    "findLastIndex": find_last_index,
    "first": head,
    "fromPairs": from_pairs,
    "head": head,
    "indexOf": index_of,
    "join": join,
    "last": last,
    "lastIndexOf": last_index_of,
    "nth": nth,
    "pull": pull,
    "pullAll": pull_all,
    "pullAllBy": pull_all,
    "pullAllWith": pull_all,
    "pullAt": pull_at,
    "remove": remove,
    "reverse": reverse,
    "sortedIndex": sorted_index,
    "sortedIndexBy": sorted_index,
    "sortedIndexOf": sorted_index_of,
    "sortedLastIndex": sorted_last_index,
    "sortedLastIndexBy": sorted_last_index,
    "sortedLastIndexOf": sorted_last_index_of,
    "unzipWith": unzip_with,
    **named("drop dropRight flattenDepth take takeRight", sized),
    **named(
        "dropRightWhile dropWhile takeRightWhile takeWhile uniqBy sortedUniqBy", with_shorthand
    ),
    **named(
        """
        compact concat difference differenceBy differenceWith fill flatten
        flattenDeep initial intersection intersectionBy intersectionWith slice
        sortedUniq tail union unionBy unionWith uniq uniqWith unzip
        without xor xorBy xorWith zip zipObject zipObjectDeep zipWith
        """,
        gives_true,
    ),
}
