"""Texts in several languages, and which one a subject reads (BCP 47, RFC 4647)."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, WithJsonSchema

DEFAULT_LOCALE = "data.locale"
"""The path of a subject's language, unless its sequence names another."""

DEFAULT, ENGLISH = "default", "en"
"""The keys of the text for all other languages: the first one that is present."""

FILE = "file"
"""A key that is no language: it names the file with the text."""

_TAG = r"[A-Za-z]{2,8}(?:[-_][A-Za-z0-9]{1,8})*"
_LOCALE = re.compile(r"(?:data|external)(?:\.[^.\s{}\[\]]+)+")

Text = TypeVar("Text")


def _check(texts: dict[str, str]) -> dict[str, str]:
    if FILE in texts:
        raise ValueError(f"{FILE} is read by check, plan and apply, from a file: write the text")
    for tag in texts:
        if not re.fullmatch(_TAG, tag):
            raise ValueError(f"{tag!r} is not a language such as de or pt-BR")
    tags = list(map(normalised, texts))
    if doubled := [tag for tag in texts if tags.count(normalised(tag)) > 1]:
        raise ValueError(f"{doubled[0]!r} and {doubled[-1]!r} are the same language")
    if fallback(texts) is None:
        raise ValueError(
            f"the text for all other languages is missing: write it as {DEFAULT} or {ENGLISH}"
        )
    return texts


def fallback(languages: Collection[str]) -> str | None:
    """Return the key of the text for all other languages. The order of keys is irrelevant, because
    the database does not keep it.
    """
    known = {normalised(tag): tag for tag in languages}
    if len(known) == 1:
        return next(iter(languages))
    return known.get(DEFAULT) or known.get(ENGLISH)


def choose(texts: Mapping[str, Text], language: object) -> tuple[str, Text]:
    """Return the text for a language with its key, by RFC 4647's lookup: de-AT, then de, then the
    fallback. An invalid language also gets the fallback.
    """
    known = {normalised(tag): tag for tag in texts}
    for range_ in _ranges(language if isinstance(language, str) else ""):
        if range_ in known:
            return known[range_], texts[known[range_]]
    key = fallback(texts) or next(iter(texts))
    return key, texts[key]


def _ranges(language: str) -> Iterator[str]:
    """Yield a language with fewer and fewer subtags."""
    subtags = normalised(language.strip()).split("-")
    while subtags:
        yield "-".join(subtags)
        del subtags[-1:]
        if subtags and len(subtags[-1]) == 1:  # of an extension, which means nothing by itself
            del subtags[-1:]


def normalised(tag: str) -> str:
    """Return a tag in a form that is equal for tags of the same language."""
    return tag.lower().replace("_", "-")


def read_locale(view: Mapping[str, Any], path: str) -> object:
    """Return the value at a path of a view, or None."""
    value: object = view
    for key in path.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def check_locale_path(path: str) -> str:
    """Return a path if it can hold a language. Raises ValueError."""
    if not _LOCALE.fullmatch(path):
        raise ValueError("must be a path such as data.language")
    return path


_FILE_SCHEMA = {
    "type": "object",
    "properties": {FILE: {"type": "string"}},
    "required": [FILE],
    "additionalProperties": False,
}
TEXT_SCHEMA = {"anyOf": [{"type": "string"}, _FILE_SCHEMA]}
"""Of a text in a file: written there, or in a file of its own."""

LanguageText = Annotated[
    str | Annotated[dict[str, str], AfterValidator(_check)],
    WithJsonSchema(
        {
            "anyOf": [
                *TEXT_SCHEMA["anyOf"],
                {
                    "type": "object",
                    "minProperties": 1,
                    "propertyNames": {"pattern": f"^{_TAG}$", "not": {"const": FILE}},
                    "additionalProperties": TEXT_SCHEMA,
                },
            ]
        }
    ),
]
"""A text, or one for each language."""
