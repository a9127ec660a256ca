"""lodash's commands on objects. None changes the data: only the truth of the result is used."""

from __future__ import annotations

from sequencerd.core.javascript import (
    UNDEFINED,
    has_property,
    is_nil,
    is_truthy,
    keys_of,
    property_key,
    property_of,
    type_error,
)
from sequencerd.core.lodash.collection import with_shorthand
from sequencerd.core.lodash.equality import shorthand
from sequencerd.core.lodash.paths import compile_get
from sequencerd.core.lodash.table import Command, gives_true, named


def find_key(value: object, predicate: object) -> object:
    """_.findKey: the first key whose value passes; the key "" is false."""
    return _found_key(value, predicate, keys_of(value))


def find_last_key(value: object, predicate: object) -> object:
    """_.findLastKey: the last one."""
    return _found_key(value, predicate, keys_of(value)[::-1])


def _found_key(value: object, predicate: object, keys: list[str]) -> object:
    passes = shorthand(predicate)
    return next((key for key in keys if is_truthy(passes(property_of(value, key)))), UNDEFINED)


def for_own(value: object, iteratee: object) -> object:
    """_.forOwn, _.forIn: the object."""
    shorthand(iteratee)
    return value


def conforms_to(value: object, source: object) -> object:
    """_.conformsTo asks functions, which data can't hold: only sources without any conform."""
    keys = [] if is_nil(source) else keys_of(source)
    if is_nil(value) or not keys:
        return not keys
    if not has_property(value, keys[-1]):
        return False
    raise type_error("conformsTo needs functions, which data can't hold")


def with_paths(value: object, paths: object) -> object:
    """_.at, _.pick, _.omit: an array or an object, by one path or a list of them."""
    if not is_nil(value):
        for path in paths if isinstance(paths, list) else [paths]:
            compile_get(path)
    return True


def invert_by(value: object, iteratee: object) -> object:
    """_.invertBy: as mapKeys, but a value without a text of its own is taken for a plain object."""
    key = shorthand(iteratee)
    for item in (property_of(value, name) for name in keys_of(value)):
        has_text = not isinstance(item, dict) or "toString" not in item
        property_key(key(item if has_text else "[object Object]"))
    return True


def map_keys(value: object, iteratee: object) -> object:
    """_.mapKeys: an object by the text of what the shorthand gives."""
    key = shorthand(iteratee)
    for name in keys_of(value):
        property_key(key(property_of(value, name)))
    return True


COMMANDS: dict[str, Command] = {
    "conformsTo": conforms_to,
    "findKey": find_key,
    "findLastKey": find_last_key,
    "forIn": for_own,
    "forInRight": for_own,
    "forOwn": for_own,
    "forOwnRight": for_own,
    "invertBy": invert_by,
    "mapKeys": map_keys,
    **named("at omit pick", with_paths),
    **named("mapValues omitBy pickBy transform", with_shorthand),
    **named(
        """
        assign assignIn assignInWith assignWith create defaults defaultsDeep entries entriesIn
        extend extendWith functions functionsIn invert keys keysIn merge mergeWith
        toPairs toPairsIn values valuesIn
        """,
        gives_true,
    ),
}
