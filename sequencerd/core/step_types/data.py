"""Steps that change the data of an enrollment: UpdateData."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from decimal import Decimal
from functools import reduce
from math import isfinite
from typing import Any

from pydantic import Field, StrictBool

from sequencerd.core import exact_json
from sequencerd.core.config import Config, Faults
from sequencerd.core.faults import DefinitionError, EvaluationError, KeyPath
from sequencerd.core.javascript.conditions import path_keys
from sequencerd.core.model import InstantStep, Update
from sequencerd.core.step_types.record import StepType
from sequencerd.core.step_types.template_config import compile_number, compile_text, shown
from sequencerd.core.view import REMOVED, Context, parse_data

ReadValue = Callable[[Context], Any]
NewValue = Callable[[Context, Any], Any]
"""Gets the present value of a key, and returns the next."""

OPERATIONS = ("get", "add", "append", "remove")

_INDEX = re.compile(r"0|[1-9][0-9]{0,8}")


class UpdateDataConfig(Config):
    """Merges values into the enrollment's data."""

    data: dict[str, Any] = Field(min_length=1)
    """The values to merge; texts are templates. {get: path} copies a value with its type; {add: 1}
    adds to a number, {append: x} to a list, and {remove: true} removes the key. Instead of keys,
    {get: path} merges all keys of the object at the path."""
    strict: StrictBool = False
    """Whether a missing value is an error. Default: it is empty, or null."""


def _update_data(config: UpdateDataConfig) -> InstantStep:
    if copies_object(config.data):
        whole = compile_object(config.data, strict=config.strict)
        return InstantStep(lambda context: Update(whole(context)))
    faults = Faults()
    changes: dict[str, NewValue] = {}
    for key, value in config.data.items():
        with faults.at("data", key):
            changes[key] = _compile_change(("data", key), value, config.strict)
    faults.check()
    reads = any(_operation(value) in ("add", "append") for value in config.data.values())

    def answer(context: Context) -> Update:
        data = parse_data(context.enrollment.data, exact=True) if reads else {}
        return Update({key: change(context, data.get(key)) for key, change in changes.items()})

    return InstantStep(answer)


def _operation(value: object) -> str | None:
    """Return the operation in a value, or None."""
    if isinstance(value, dict) and len(value) == 1 and (name := next(iter(value))) in OPERATIONS:
        return str(name)
    return None


def copies_object(data: object) -> bool:
    """Return whether the key `data` of a config is {get: path}: all keys of another object."""
    return _operation(data) == "get"


def compile_object(
    data: Mapping[str, Any], *, strict: bool = False
) -> Callable[[Context], dict[str, Any]]:
    """Compile data that is {get: path}, and must be an object. Raises DefinitionError."""
    made = compile_item(("data",), ("data",), data, strict=strict)

    def whole(context: Context) -> dict[str, Any]:
        found = made(context)
        if not isinstance(found, dict):
            raise _unsuitable(("data",), found, "mapping")
        return found

    return whole


def _compile_change(path: KeyPath, value: Any, strict: bool) -> NewValue:
    """Compile the change of a key. Raises DefinitionError, by the place within the value."""
    match _operation(value):
        case "add":
            return _compile_add(path, value["add"], strict)
        case "append":
            item = compile_item(("append",), (*path, "append"), value["append"], strict=strict)
            return lambda context, present: _appended(path, present, item(context))
        case "remove" if value["remove"] is not True:
            raise DefinitionError("remove must be true")
        case "remove":
            return lambda _context, _present: REMOVED
    made = compile_item((), path, value, strict=strict)
    return lambda context, _: made(context)


def compile_item(within: KeyPath, path: KeyPath, value: Any, *, strict: bool = False) -> ReadValue:
    """Compile a JSON value with templates and {get: path} in it. Raises DefinitionError, which
    names the place within the value. With `strict`, a missing value is an error.
    """
    faults = Faults()
    made = _compile_nested(within, path, value, faults, strict)
    faults.check()
    return made


def _compile_nested(
    within: KeyPath, path: KeyPath, value: Any, faults: Faults, strict: bool
) -> ReadValue:
    """Compile a value in which {get: path} can be anywhere; `within` is where it is in it."""
    operation = _operation(value)
    if operation == "get":
        with faults.at(*within):
            found = _compile_get(value["get"])
            return _required(path, value["get"], found) if strict else found
    elif operation is not None:
        with faults.at(*within):
            raise DefinitionError(f"{operation} changes a key of data itself, not one within it")
    match value:
        case dict():
            inner = {
                key: _compile_nested((*within, key), (*path, key), item, faults, strict)
                for key, item in value.items()
            }
            return lambda context: {key: made(context) for key, made in inner.items()}
        case list():
            items = [
                _compile_nested((*within, n), (*path, n), item, faults, strict)
                for n, item in enumerate(value)
            ]
            return lambda context: [made(context) for made in items]
        case str():
            with faults.at(*within):
                return compile_text(path, value, strict=strict)
    return lambda _: value


def _compile_get(path: object) -> ReadValue:
    """Compile the value at a path of the view; null where there is none."""
    if not isinstance(path, str | list) or not path:
        raise DefinitionError("get must be a path such as data.points")
    keys = path_keys(path)
    root = frozenset(keys[:1])
    # not by lodash: numbers of JavaScript have 16 digits, ids may have more
    return lambda context: reduce(_child, keys, parse_data(context.json(root), exact=True))


def _required(path: KeyPath, read: object, found: ReadValue) -> ReadValue:
    """Wrap `found` so that a missing value is an error."""
    where = ".".join(map(str, read)) if isinstance(read, list) else read

    def value(context: Context) -> Any:
        if (value := found(context)) is None:
            place = ".".join(map(str, path))
            raise EvaluationError("bad_data", f"{place}: {where}: the value is missing")
        return value

    return value


def _child(value: Any, key: str) -> Any:
    """Return what is at a key of a JSON value, like lodash's get, but nothing that is inherited."""
    if isinstance(value, dict):
        return value.get(key)
    if isinstance(value, str):
        units = value.encode("utf-16-le")
        value = [units[n : n + 2].decode("utf-16-le", "replace") for n in range(0, len(units), 2)]
    if isinstance(value, list):
        if key == "length":
            return len(value)
        if _INDEX.fullmatch(key) and int(key) < len(value):
            return value[int(key)]
    return None


def _compile_add(path: KeyPath, amount: Any, strict: bool) -> NewValue:
    faults = Faults()
    with faults.at("add"):
        if isinstance(amount, bool) or not isinstance(amount, int | float | str):
            raise DefinitionError("must be a number, or a template that gives one")
        number = compile_number((*path, "add"), amount, strict=strict)
    faults.check()

    def add(context: Context, present: Any) -> Any:
        present = 0 if present is None else present
        if isinstance(present, bool) or not isinstance(present, int | float | Decimal):
            raise _unsuitable(path, present, "number")
        other = number(context)
        if isinstance(present, int) and isinstance(other, int):
            return present + other
        total = float(Decimal(str(present)) + Decimal(str(other)))  # 0.1 and 0.2 are 0.3
        if not isfinite(total):
            raise EvaluationError("bad_data", f"{'.'.join(map(str, path))} becomes too large")
        return total

    return add


def _appended(path: KeyPath, present: Any, item: Any) -> list[Any]:
    if present is not None and not isinstance(present, list):
        raise _unsuitable(path, present, "list")
    return [*(present or []), item]


def _unsuitable(path: KeyPath, present: Any, wanted: str) -> EvaluationError:
    text = exact_json.dumps(present, ensure_ascii=False)
    return EvaluationError(
        "bad_data", f"{'.'.join(map(str, path))} is {shown(text)}, not a {wanted}"
    )


def data_paths(config: Mapping[str, Any]) -> Iterator[tuple[KeyPath, object]]:
    """Yield the paths that the key `data` of a config reads, with their places."""
    yield from _gets(config.get("data"), ("data",))


def _gets(value: object, path: KeyPath) -> Iterator[tuple[KeyPath, object]]:
    """Yield the paths that a value reads, with their places."""
    match value:
        case dict() if _operation(value) == "get":
            yield (*path, "get"), value["get"]
        case dict():
            for key, item in value.items():
                yield from _gets(item, (*path, key))
        case list():
            for number, item in enumerate(value):
                yield from _gets(item, (*path, number))


TYPES = (
    StepType(
        name="UpdateData",
        config=UpdateDataConfig,
        compile=_update_data,
        templates=("data",),
        writes="data",
        paths=data_paths,
    ),
)
