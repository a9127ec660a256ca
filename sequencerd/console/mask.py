"""Mask personal data that the console must not show."""

from __future__ import annotations

import copy
import html
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import quote, quote_plus

from sequencerd.core import exact_json
from sequencerd.errors import UsageError
from sequencerd.runners.unsubscribe import PATH as UNSUBSCRIBE

MASKED_VALUE = "•••"
MIN_MASKED_LENGTH = 3  # characters; shorter values occur in every text
CUT_OFF = 40  # characters after which a text may have been truncated

_ADDRESS = re.compile(
    r"(?P<date>\b(?:19|20)\d\d-[01]\d-[0-3]\d\b)"
    r"|[^\s<>(),;:\"'/=?&]{1,256}(?:@|%40|&#64;)[^\s<>(),;:\"'&]+"
    r"|\+?\d[\d ()/.-]{6,}\d"
)
"""An e-mail address or a telephone number, which may no longer be in the data. Not a date. In a
long word, each character is read a limited number of times.
"""

_TOKEN = re.compile(rf"(?<={re.escape(UNSUBSCRIBE)})[\w.=-]+")
"""The token of an unsubscribe link: it contains the address, and could be used to unsubscribe it.
"""

_NAMED = re.compile(r"""(?<=\bsubject )('(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")""")
"""The subject in the problem of a scheduled run, as repr() writes it."""

UNREADABLE = "data that cannot be read"
"""The only key of data in place of those that Python cannot parse, with the reason."""


OF_OTHERS = frozenset({"quarantined", "runner"})
"""Problems whose message may quote data of an enrollment that is not known where it is shown."""

_TEXTS = ("subject", "last_error", "message", "reported_message")

MaskedRow = dict[str, Any]
MaskRow = Callable[[Mapping[str, Any]], MaskedRow]


def make_mask(paths: Sequence[str]) -> Callable[[Mapping[str, Any]], MaskedRow]:
    """Return a function that masks a row.

    Its `data` become a dict without the values at the paths, and these values are also hidden in
    the texts of the row. `known` and `known_subject` of a row are further data and the subject that
    they belong to; their values are hidden in its texts.
    """
    if not paths:
        return _without_known
    keys = [path.split(".")[1:] for path in paths if path != "subject"]

    def mask(row: Mapping[str, Any]) -> MaskedRow:
        known, known_subject = row.get("known"), row.get("known_subject")
        shown = _without_known(row)
        values: set[str] = set()
        for kept in (shown.get("data"), copy.deepcopy(known)):
            if isinstance(kept, dict):
                for path in keys:
                    values.update(_hide(kept, path))
        if "subject" in paths:
            values.update(filter(None, (known_subject, shown.get("subject"))))
        if shown.get("reported") == "runner":
            shown["reported_message"] = MASKED_VALUE
        hide = _hiding(values, [shown[name] for name in _TEXTS if shown.get(name) is not None])
        for name in _TEXTS:
            if shown.get(name) is not None:
                shown[name] = hide(shown[name])
                if name != "subject":
                    shown[name] = _without_addresses(shown[name])
                    if "subject" in paths:
                        shown[name] = _NAMED.sub(MASKED_VALUE, shown[name])
        if "subject" in paths and "subject" in shown:
            shown["subject"] = MASKED_VALUE
        return shown

    return mask


def _without_addresses(text: str) -> str:
    text = _TOKEN.sub(MASKED_VALUE, text)
    return _ADDRESS.sub(lambda found: found["date"] or MASKED_VALUE, text)


def _hiding(values: Iterable[str], texts: Iterable[str]) -> Callable[[str], str]:
    """Return a function that hides values in these texts, in whatever form they contain them."""
    patterns = []
    searched = "\n".join(texts).casefold()
    for value in sorted({*values}, key=len, reverse=True):
        for word in (value, *_words(value)):
            if len(word) < MIN_MASKED_LENGTH:
                continue
            # data may have a hundred thousand words, which all forms contain as they are
            if word.isascii() and word.isalnum() and word[:CUT_OFF].casefold() not in searched:
                continue
            edge = "" if word == value else r"\b"
            for form in _forms(word):
                # a long value may have been truncated
                rest = r"[^\s\"']*" if len(form) > CUT_OFF else ""
                patterns.append(f"{edge}{re.escape(form[:CUT_OFF])}{rest or edge}")
    if not patterns:
        return lambda text: text
    pattern = re.compile("|".join(patterns), re.IGNORECASE)
    return lambda text: pattern.sub(MASKED_VALUE, text)


def _words(text: str) -> set[str]:
    """Return the words of a text, because a message may contain only the first name."""
    if "@" in text:
        return set()
    parts = {part for part in text.split() if re.search(r"[^\W\d_]", part)}
    return parts | {*re.findall(r"[^\W\d_]+", text)}


def _forms(text: str) -> set[str]:
    """Return a text in the forms that messages, JSON, Python, HTML and URLs contain."""
    return {
        text,
        json.dumps(text)[1:-1],
        json.dumps(text, ensure_ascii=False)[1:-1],
        repr(text)[1:-1],
        text.replace("'", "\\'"),
        html.escape(text),
        html.escape(text).replace("`", "&#x60;").replace("=", "&#x3D;"),
        html.escape(text, quote=False),
        quote(text, safe=""),
        quote(text),
        quote_plus(text),
    }


def hide_data(data: Mapping[str, Any], paths: Sequence[str]) -> MaskedRow:
    """Return a copy of data with MASKED_VALUE where the paths lead."""
    shown = copy.deepcopy(dict(data))
    for path in paths:
        if path != "subject":
            for _ in _hide(shown, path.split(".")[1:]):
                pass
    return shown


def restore_data(
    edited: Mapping[str, Any], original: Mapping[str, Any], paths: Sequence[str]
) -> MaskedRow:
    """Return edited data with the original values where MASKED_VALUE is still in their place.
    Raises UsageError where it is elsewhere, or a list with such values has been changed.
    """

    def restore(value: Any, hidden: Any, known: Any) -> Any:
        if value == hidden:
            return known
        if isinstance(value, dict) and isinstance(hidden, dict):
            return {
                key: restore(part, hidden.get(key), known.get(key)) for key, part in value.items()
            }
        if MASKED_VALUE in json.dumps(value, ensure_ascii=False, default=str):
            raise UsageError(f"{MASKED_VALUE} is a masked value, which can only stay where it was")
        return value

    restored: MaskedRow = restore(dict(edited), hide_data(original, paths), original)
    return restored


def _without_known(row: Mapping[str, Any]) -> MaskedRow:
    shown = {key: value for key, value in row.items() if key not in ("known", "known_subject")}
    if isinstance(shown.get("data"), str):
        shown["data"] = read_data(shown["data"])
    return shown


def read_data(text: str) -> Any:
    """Parse data. Any application may write data that PostgreSQL takes and Python does not, such as
    thousands of brackets or of digits: they keep no page from showing the other enrollments.
    """
    try:
        return exact_json.loads(text, exact=False)
    except (ValueError, RecursionError) as error:
        return {UNREADABLE: str(error)}


def _hide(data: Any, path: Sequence[str]) -> Iterator[str]:
    """Replace what is at a path, and return the texts that were there.

    A part of a path leads to a key, to an item of a list by its number, and through all its items.
    """
    first, *others = path
    key: str | int = first
    if isinstance(data, list):
        for item in data:
            yield from _hide(item, path)
        if not first.isdecimal() or int(first) >= len(data):
            return
        key = int(first)
    elif not isinstance(data, dict) or key not in data:
        return
    if others:
        yield from _hide(data[key], others)
    else:
        yield from _texts(data[key])
        data[key] = MASKED_VALUE


def _texts(value: object) -> Iterator[str]:
    if isinstance(value, dict):
        for part in value.values():
            yield from _texts(part)
    elif isinstance(value, list):
        for part in value:
            yield from _texts(part)
    elif value is not None and not isinstance(value, bool):
        yield str(value)
