"""The base of step configs: parse them, and describe their errors."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.alias_generators import to_camel

from sequencerd.core.model import DefinitionError, Fault, KeyPath

MAX_KNOWN = 20  # names in a hint

Model = TypeVar("Model", bound=BaseModel)


class Config(BaseModel):
    """A step's config: camelCase keys, no others. Docstrings are the descriptions of the schema."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        alias_generator=to_camel,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        defer_build=True,  # most commands use few of them, or none
    )


def parse_json(text: str) -> Any:
    """Parse the JSON of a definition. Raises DefinitionError for what PostgreSQL takes and Python
    does not, such as thousands of brackets or of digits.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DefinitionError(f"cannot be read: {error}") from error


def parse_config(model: type[Model], config: Mapping[str, Any], name: str = "") -> Model:
    """Parse a config with this model. Raises DefinitionError with all of its errors, which call it
    by `name`, its step type.
    """
    try:
        return model.model_validate(config)
    except ValidationError as error:
        raise DefinitionError(faults(error, model, config, name)) from error


class Faults:
    """Collects the errors in the parts of a config, so that all of them are reported at once."""

    def __init__(self) -> None:
        self.found: list[Fault] = []

    @contextmanager
    def at(self, *path: str | int) -> Iterator[None]:
        """Collect a DefinitionError for `check`: its errors are at this place."""
        try:
            yield
        except DefinitionError as error:
            self.found += [Fault((*path, *fault.path), fault.message) for fault in error.faults]

    def check(self) -> None:
        """Raise DefinitionError if there were errors."""
        if self.found:
            raise DefinitionError(self.found)


def faults(
    error: ValidationError, model: type[BaseModel], value: object, name: str = ""
) -> list[Fault]:
    """Return pydantic's errors by place, without the values, which may be secret or long."""
    found: dict[KeyPath, list[str]] = {}
    for detail in error.errors(include_url=False, include_input=False):
        path, message = _within(detail["loc"], value), detail["msg"].removeprefix("Value error, ")
        match detail["type"]:
            case "extra_forbidden":
                message = _unknown_key(model, path, name)
            case "missing":
                path = (*_within(detail["loc"][:-1], value), detail["loc"][-1])
                message = "is missing"
            case "model_type" | "dict_type":
                message = "must be a mapping, key: value"
            case "time_delta_type" | "time_delta_parsing":
                message = "must be a duration such as PT5M, or a number of seconds"
            case _:
                message = _plain(detail["type"], detail.get("ctx", {})) or message.replace(
                    "Input should", "must"
                )
        texts = found.setdefault(path, [])
        # pydantic reports an error of a union once for each of its types
        message = message.removeprefix("must be ") if texts else message
        if message not in texts:
            texts.append(message)
    # a field for whole numbers and others reports both
    told = {
        path: " or ".join(texts).replace("a whole number or a number", "a number")
        for path, texts in found.items()
    }
    return [Fault(path, text) for path, text in told.items()]


def _plain(kind: str, limits: Mapping[str, Any]) -> str | None:
    """Describe an error of pydantic in the terms of a file; None if its message is good."""
    match kind:
        case "string_type":
            return "must be a text"
        case "string_pattern_mismatch":
            return _pattern_in_words(limits["pattern"])
        case "list_type" | "tuple_type" | "set_type" | "frozen_set_type":
            return "must be a list"
        case "bool_type" | "bool_parsing":
            return "must be true or false"
        case "int_type" | "int_parsing" | "int_from_float" | "int_parsing_size":
            return "must be a whole number"
        case "float_type" | "float_parsing" | "finite_number":
            return "must be a number"
        case "none_required":
            return "must be null"
        case "greater_than":
            return f"must be more than {limits['gt']}"
        case "greater_than_equal":
            return f"must be {limits['ge']} or more"
        case "less_than":
            return f"must be less than {limits['lt']}"
        case "less_than_equal":
            return f"must be {limits['le']} or less"
        case "too_short" | "string_too_short":
            least, unit = limits["min_length"], _UNITS[kind]
            return "must not be empty" if least == 1 else f"must have at least {least:,} {unit}"
        case "too_long" | "string_too_long":
            return f"must have at most {limits['max_length']:,} {_UNITS[kind]}"
    return None


_KINDS = {"A-Za-z": "letter", "A-Z": "capital letter", "a-z": "lower-case letter", "0-9": "digit"}


def _pattern_in_words(pattern: str) -> str:
    """Say what a pattern allows: a URL, or characters of which the first may be restricted."""
    if pattern.startswith("^https?://"):
        return "must be a URL such as https://example.com"
    found = re.fullmatch(r"\^(?:\[([^]]+)\])?\[([^]]+)\](?:\+|\{0,(\d+)\})\$", pattern)
    if found is None:
        return f"must match {pattern}"
    first, others, most = found.groups()
    length = "" if most is None else f"1 to {int(most) + 1} "
    text = f"must be {length}{_characters(others, 's')}"
    return text if first is None else f"{text}, and begin with {_characters(first, '')}"


def _characters(allowed: str, plural: str) -> str:
    """Name the characters of a class, such as "letters, digits or any of ._-"."""
    names, symbols = [], allowed
    for span, kind in _KINDS.items():
        if span in symbols:
            symbols = symbols.replace(span, "")
            names.append(kind + plural if plural else f"a {kind}")
    if symbols:
        names.append(f"any of {symbols}" if len(symbols) > 1 else symbols)
    *others, last = names
    return f"{', '.join(others)} or {last}" if others else last


_UNITS = {
    "too_short": "items",
    "string_too_short": "characters",
    "too_long": "items",
    "string_too_long": "characters",
}


def _within(location: KeyPath, value: Any) -> KeyPath:
    """Return the keys and indexes in a location: pydantic inserts the names of types."""
    path: KeyPath = ()
    for part in location:
        is_key = isinstance(value, dict) and part in value
        if is_key or (isinstance(value, list) and isinstance(part, int) and part < len(value)):
            value = value[part]
            path = (*path, part)
    return path


def _unknown_key(model: type[BaseModel], path: KeyPath, name: str) -> str:
    """Describe an unknown key, with the known keys of its place."""
    *outer, key = path
    match outer:
        case []:
            owner = name or "this"
        case [*_, str() as last]:
            owner = last
        case [*_, str() as last, int()]:
            owner = f"{'an' if last[0] in 'aeiou' else 'a'} {last.removesuffix('s')}"
        case _:
            owner = "an item"
    holder = _model_at(model, path[:-1])
    message = f"{owner} has no key {str(key)!r}"
    if holder is None:
        return message
    known = [field.alias or own for own, field in holder.model_fields.items()]
    return f"{message}; {nearest(str(key), known)}"


def _model_at(model: type[BaseModel], path: KeyPath) -> type[BaseModel] | None:
    """Return the model of the value at a path; None if that is ambiguous."""
    for part in path:
        if isinstance(part, str):
            fields = {field.alias or name: field for name, field in model.model_fields.items()}
            models = _models(fields[part].annotation) if part in fields else []
            if len(models) != 1:
                return None
            [model] = models
    return model


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in _models(argument)]


def describe(error: ValidationError) -> str:
    """Describe pydantic's errors in one line, without the values, which may be secret or long."""
    parts = []
    for detail in error.errors(include_url=False, include_input=False):
        path = ".".join(str(part) for part in detail["loc"])
        message = detail["msg"].removeprefix("Value error, ")
        parts.append(f"{path}: {message}" if path else message)
    return "; ".join(parts)


def nearest(name: str, known: list[str]) -> str:
    """Return a hint for an unknown name, as the end of a sentence."""
    near = get_close_matches(name, known, n=1)
    if near:
        return f"did you mean {near[0]!r}?"
    names = sorted(set(known))
    return f"available: {', '.join(names[:MAX_KNOWN])}{', ...' if names[MAX_KNOWN:] else ''}"
