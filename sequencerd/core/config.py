"""The base of step configs: parse them, and describe their errors."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from types import UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.alias_generators import to_camel

from sequencerd.core import exact_json
from sequencerd.core.faults import DefinitionError, Fault, KeyPath

MAX_KNOWN = 20  # names in a hint
MAPPING = "must be a mapping, key: value"

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
        return exact_json.loads(text, exact=False)
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
    of_types: set[KeyPath] = set()  # where the value is only of another type
    for detail in error.errors(include_url=False, include_input=False):
        path, message = _within(detail["loc"], value), detail["msg"].removeprefix("Value error, ")
        kind = detail["type"]
        match kind:
            case "extra_forbidden":
                message = _unknown_key(model, path, name)
            case "missing":
                path = (*_within(detail["loc"][:-1], value), detail["loc"][-1])
                message = "is missing"
            case "model_type":
                message = _mapping(model, path, detail["ctx"]["class_name"])
            case "time_delta_type" | "time_delta_parsing":
                message = "must be a duration such as PT5M, or a number of seconds"
            case _:
                message = _plain(kind, detail.get("ctx", {})) or message
                message = re.sub("^(Input|String) should", "must", message)
        is_of_type = kind.endswith("_type") or kind == "literal_error"
        if path not in found and is_of_type:
            of_types.add(path)
        elif not is_of_type:
            of_types.discard(path)
        found.setdefault(path, []).append(message)
    return [
        Fault(path, _either(texts))
        for path, texts in found.items()
        if path not in of_types or not _has_errors_within(path, found)
    ]


def _has_errors_within(path: KeyPath, found: Iterable[KeyPath]) -> bool:
    """Return whether there are errors within a value. Pydantic reports an error of a union for each
    of its types, also for those that the value does not have.
    """
    return any(len(other) > len(path) and other[: len(path)] == path for other in found)


def _either(texts: Iterable[str]) -> str:
    """Combine what the types of a union require; an error of another kind is that of the type which
    the value has.
    """
    texts = list(dict.fromkeys(texts))
    if others := [text for text in texts if not text.startswith("must be ")]:
        return " or ".join(others)
    first, *others = texts
    if not others:
        return first
    *forms, last = (text.removeprefix("must be ") for text in others)
    listed = first.replace(" or ", ", ") if first.startswith("must be '") else first
    # a field for whole numbers and others reports both
    return f"{', '.join([listed, *forms])} or {last}".replace(
        "a whole number or a number", "a number"
    ).replace("a whole number, a number", "a number")


def _mapping(model: type[BaseModel], path: KeyPath, class_name: str) -> str:
    """Name the keys that a mapping must have."""
    for known in _models_at(model, path):
        required = [
            f"{field.alias or own}: ..."
            for own, field in known.model_fields.items()
            if field.is_required()
        ]
        if known.__name__ == class_name and required:
            return f"must be a mapping such as {{{', '.join(required)}}}"
    return MAPPING


def _plain(kind: str, limits: Mapping[str, Any]) -> str | None:
    """Describe an error of pydantic in the terms of a file; None if its message is good."""
    match kind:
        case "dict_type":
            return MAPPING
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
            return f"must be more than {_limit(limits['gt'])}"
        case "greater_than_equal":
            return f"must be {_limit(limits['ge'])} or more"
        case "less_than":
            return f"must be less than {_limit(limits['lt'])}"
        case "less_than_equal":
            return f"must be {_limit(limits['le'])} or less"
        case "too_short" | "string_too_short":
            least, unit = limits["min_length"], _UNITS[kind]
            return "must not be empty" if least == 1 else f"must have at least {least:,} {unit}"
        case "too_long" | "string_too_long":
            return f"must have at most {limits['max_length']:,} {_UNITS[kind]}"
    return None


def _limit(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


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


_MEANT = {
    "and": "all",
    "command": "lodashCommand",
    "condition": "when",
    "if": "when",
    "or": "any",
}
"""Keys of other languages, which may resemble a key with another meaning."""


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
    message = f"{owner} has no key {str(key)!r}"
    known = [
        field.alias or own
        for holder in _models_at(model, path[:-1])
        for own, field in holder.model_fields.items()
    ]
    meant = _MEANT.get(str(key))
    hint = f"did you mean {meant!r}?" if meant in known else nearest(str(key), known)
    return f"{message}; {hint}"


def _models_at(model: type[BaseModel], path: KeyPath) -> list[type[BaseModel]]:
    """Return the models that the value at a path may have."""
    at: list[Any] = [model]
    for part in path:
        at = [inner for annotation in at for inner in _inside(annotation, part)]
    return _models(at)


def _models(annotations: Iterable[Any]) -> list[type[BaseModel]]:
    """Return the models among the types of some unions."""
    types = dict.fromkeys(type_ for one in annotations for type_ in _alternatives(one))
    return [type_ for type_ in types if isinstance(type_, type) and issubclass(type_, BaseModel)]


def _alternatives(annotation: Any) -> Iterator[Any]:
    """Yield the types of a union."""
    origin = get_origin(annotation)
    if origin is Annotated:
        yield from _alternatives(get_args(annotation)[0])
    elif origin in (Union, UnionType):
        for type_ in get_args(annotation):
            yield from _alternatives(type_)
    else:
        yield annotation


def _inside(annotation: Any, part: str | int) -> Iterator[Any]:
    """Yield the types that the value at a key or an index may have."""
    for type_ in _alternatives(annotation):
        if isinstance(type_, type) and issubclass(type_, BaseModel):
            for name, field in type_.model_fields.items():
                if (field.alias or name) == part:
                    yield field.annotation
        elif get_args(type_):  # of a list or a mapping
            yield get_args(type_)[-1]


def in_order(value: Any, *annotations: Any) -> Any:
    """Return a value of one of these types with its keys in the order of the models' fields; keys
    without a field precede them.
    """
    if isinstance(value, list):
        inner = [type_ for one in annotations for type_ in _inside(one, 0)]
        return [in_order(item, *inner) for item in value]
    if not isinstance(value, dict):
        return value
    fields = [
        field.alias or name
        for model in _models(annotations)
        for name, field in model.model_fields.items()
    ]
    known = [key for key in dict.fromkeys(fields) if key in value]
    return {
        key: in_order(value[key], *(type_ for one in annotations for type_ in _inside(one, key)))
        for key in (*(key for key in value if key not in known), *known)
    }


def nearest(name: str, known: list[str]) -> str:
    """Return a hint for an unknown name, as the end of a sentence."""
    near = get_close_matches(name, known, n=1)
    if near:
        return f"did you mean {near[0]!r}?"
    if not known:
        return "there are none"
    names = sorted(set(known))
    return f"available: {', '.join(names[:MAX_KNOWN])}{', ...' if names[MAX_KNOWN:] else ''}"
