"""lodash's property paths: `a.b`, `a[0]["b c"]`, lists of keys; and the commands that take them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

from sequencerd.core.inherited import Function
from sequencerd.core.javascript import (
    INDEX,
    MAX_ARRAY_LENGTH,
    UNDEFINED,
    has_own,
    has_property,
    is_nil,
    is_number,
    is_object,
    property_of,
    to_number,
    to_string,
    type_error,
)
from sequencerd.core.lodash.calls import call
from sequencerd.core.lodash.table import Command

# A text with none of these is one key, whatever else is in it.
_DEEP = re.compile(r"\.|\[(?:[^\[\]]*|([\"'])(?:(?!\1)[^\\]|\\[^\n\r\u2028\u2029])*?\1)\]")
_KEY = re.compile(
    r"(?P<name>[^.\[\]]+)"
    r"|\[(?:(?P<number>-?[0-9]+(?:\.[0-9]+)?)"
    r"|(?P<quote>[\"'])(?P<quoted>(?:(?!(?P=quote))[^\\]|\\[^\n\r\u2028\u2029])*?)(?P=quote))\]"
    r"|(?=(?:\.|\[\])(?:\.|\[\]|\Z))"  # nothing between two dots, or within brackets: the key ""
)
_ESCAPED = re.compile(r"\\(\\)?")


def to_path(text: str) -> list[str]:
    """The keys of a path (lodash's _.toPath for a text)."""
    keys = [""] if text.startswith(".") else []
    for match in _KEY.finditer(text):
        if match["quote"]:
            keys.append(_ESCAPED.sub(lambda escape: escape[1] or "", match["quoted"]))
        else:
            keys.append(match["number"] or match[0])
    return keys


def to_key(value: object) -> str:
    """A path's part as a key: its text, and "-0" for -0."""
    if is_number(value) and value == 0 and math.copysign(1, value) < 0:
        return "-0"
    return to_string(value)


def is_key(path: object) -> bool:
    """Whether a path is one key for every object: no list, and no text with dots or brackets."""
    if isinstance(path, list):
        return False
    if not isinstance(path, str | dict | Function):
        return True
    return _DEEP.search(to_string(path)) is None


def compile_cast(path: object) -> Callable[[object], list[object]]:
    """The keys to follow from a subject: the whole text is one, if the subject has such a key.

    The text is split once, however many subjects are asked.
    """
    if isinstance(path, list):
        return lambda _: path
    if is_key(path):
        return lambda _: [path]
    whole = to_string(path)
    parts = list[object](to_path(whole))
    return lambda subject: [whole] if has_property(subject, whole) else parts


def cast_path(path: object, subject: object) -> list[object]:
    """`compile_cast` for a path that is used once."""
    return compile_cast(path)(subject)


def compile_get(path: object) -> Callable[[object], object]:
    """lodash's _.get for one path: "a.b", "a['b c'][0]", ["a", 0]; UNDEFINED where nothing is.

    A key that is spelled like the whole path wins. The function never raises, whatever JSON it is
    given; `compile_get` raises EvaluationError for a path that has no text.
    """
    whole = None
    if isinstance(path, list):
        keys = [to_key(part) for part in path]
    elif is_key(path):
        keys = [to_key(path)]
    else:
        whole = to_string(path)
        keys = to_path(whole)

    def get_path(subject: object) -> object:
        if whole is not None and isinstance(subject, dict) and whole in subject:
            return subject[whole]
        found = subject
        for key in keys:
            if type(found) is dict and key in found:
                found = found[key]
            elif found is None or found is UNDEFINED:
                return UNDEFINED
            else:
                found = property_of(found, key)
        return found if keys else UNDEFINED

    return get_path


def first_key(path: object) -> str | None:
    """The key that `compile_get` reads first; None for a path without keys."""
    keys = path if isinstance(path, list) else cast_path(path, None)
    return to_key(keys[0]) if keys else None


def get(value: object, path: object) -> object:
    """_.get: what is at the path."""
    return compile_get(path)(value)


def has(value: object, path: object) -> bool:
    """_.has: whether the path leads along own properties."""
    return _has_path(value, path, has_own)


def has_in(value: object, path: object) -> bool:
    """_.hasIn: whether the path leads along properties, own or inherited."""
    return _has_path(value, path, has_property)


def _has_path(value: object, path: object, has_key: Callable[[object, str], bool]) -> bool:
    parts = cast_path(path, value)
    for part in parts:
        key = to_key(part)
        if is_nil(value) or not has_key(value, key):
            return False
        value = property_of(value, key)
    return bool(parts)


def is_index(value: object, length: float) -> bool:
    """Whether a value is a whole number from 0 to below the length, or a text that spells one."""
    if isinstance(value, str) and not INDEX.fullmatch(value):
        return False
    if isinstance(value, str) or is_number(value):
        number = to_number(value)
        return -1 < number < length and number.is_integer()
    return False


def result(value: object, path: object) -> object:
    """_.result: as get, but a function on the way is called."""
    parts = cast_path(path, value)
    found = value if parts else UNDEFINED
    for part in parts:
        owner, found = found, property_of(found, to_key(part))
        if isinstance(found, Function):
            found = call(found, owner)
        if found is UNDEFINED:
            break
    return found


def invoke(value: object, path: object) -> object:
    """_.invoke: calls what is at the path; undefined if nothing is. Data holds no functions."""
    parts = cast_path(path, value)
    owner = get(value, parts[:-1]) if len(parts) > 1 else value
    if is_nil(owner):
        return owner
    function = property_of(owner, to_key(parts[-1] if parts else UNDEFINED))
    return function if is_nil(function) else call(function, owner)


def unset(value: object, path: object) -> object:
    """_.unset: whether the property can be removed; the data stays as it is."""
    if is_nil(value):
        return True
    parts = cast_path(path, value)
    keys = [to_key(part) for part in parts]
    if any(key == "__proto__" and not has_own(value, key) for key in keys):
        return False
    if any(key in ("constructor", "prototype") for key in keys[:-1]) or not keys:
        return not keys
    owner = get(value, parts[:-1]) if len(parts) > 1 else value
    fixed = isinstance(owner, str) and has_own(owner, keys[-1])
    return not fixed and not (isinstance(owner, list) and keys[-1] == "length")


def set_(value: object, path: object) -> object:
    """_.set: the object that would be changed; the data stays as it is."""
    _check_change(value, path, may_end_at_length=False)
    return value


def update(value: object, path: object) -> object:
    """_.update: the same, after a look at what is there."""
    if not is_nil(value):
        get(value, path)
        _check_change(value, path, may_end_at_length=True)
    return value


def _check_change(value: object, path: object, *, may_end_at_length: bool) -> None:
    """What would be set is undefined or what is there already: the length of an array can't be."""
    parts = cast_path(path, value) if is_object(value) else []
    for place, part in enumerate(parts):
        key = to_key(part)
        if not is_object(value) or key in ("__proto__", "constructor", "prototype"):
            return
        is_last = place == len(parts) - 1
        is_allowed = may_end_at_length if is_last else is_index(parts[place + 1], MAX_ARRAY_LENGTH)
        if isinstance(value, list) and key == "length" and not is_allowed:
            raise type_error("the length of an array can't be set to that")
        value = property_of(value, key)


def property_(path: object, _: object) -> object:
    """_.property: a function, so true."""
    compile_get(path)
    return True


COMMANDS: dict[str, Command] = {
    "get": get,
    "has": has,
    "hasIn": has_in,
    "invoke": invoke,
    "property": property_,
    "result": result,
    "set": set_,
    "setWith": set_,
    "unset": unset,
    "update": update,
    "updateWith": update,
}
