"""Personal data that the console must not show."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from sequencerd.errors import UsageError

HIDDEN = "•••"
SHORTEST = 3  # characters: what is shorter is in every text

_ADDRESS = re.compile(r"[^\s<>(),;:\"']+@[^\s<>(),;:\"']+|\+?\d[\d ()/.-]{6,}\d")
"""An e-mail address, or a telephone number: past ones are no longer in the data."""

_NAMED = re.compile(r"""(?<=\bsubject )('(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")""")
"""A subject in the problem of a scheduled run, which names it as repr() writes it."""

_TEXTS = ("subject", "last_error", "message")

Row = dict[str, Any]


def make_mask(paths: Sequence[str]) -> Callable[[Mapping[str, Any]], Row]:
    """Return a function that gives a row as it may be shown.

    Its `data` become a dict, with nothing where the paths lead; what was there is hidden in the
    texts of the row as well. `known` of a row is further data; its values are hidden.
    """
    if not paths:
        return _parsed
    keys = [path.split(".")[1:] for path in paths if path != "subject"]

    def mask(row: Mapping[str, Any]) -> Row:
        shown = _parsed(row)
        values: set[str] = set()
        for kept in (shown.get("data"), json.loads(json.dumps(shown.pop("known", None)))):
            if isinstance(kept, dict):
                for path in keys:
                    values.update(_hide(kept, path))
        texts = sorted((v for v in values if len(v) >= SHORTEST), key=len, reverse=True)

        def hide(text: str) -> str:
            for value in texts:
                text = text.replace(value, HIDDEN)
            return text

        for name in _TEXTS:
            if shown.get(name) is not None:
                is_text = name != "subject"
                text = hide(shown[name])
                shown[name] = _ADDRESS.sub(HIDDEN, text) if is_text else text
                if "subject" in paths and is_text:
                    shown[name] = _NAMED.sub(HIDDEN, shown[name])
        if "subject" in paths and "subject" in shown:
            shown["subject"] = HIDDEN
        return shown

    return mask


def hide_data(data: Mapping[str, Any], paths: Sequence[str]) -> Row:
    """Return a copy of data with HIDDEN where the paths lead."""
    shown = copy.deepcopy(dict(data))
    for path in paths:
        if path != "subject":
            for _ in _hide(shown, path.split(".")[1:]):
                pass
    return shown


def restore_data(
    edited: Mapping[str, Any], original: Mapping[str, Any], paths: Sequence[str]
) -> Row:
    """Return edited data with the original values where HIDDEN is still in their place. Raises
    UsageError where it is elsewhere, or a list with such values has been changed.
    """

    def restore(value: Any, hidden: Any, known: Any) -> Any:
        if value == hidden:
            return known
        if isinstance(value, dict) and isinstance(hidden, dict):
            return {
                key: restore(part, hidden.get(key), known.get(key)) for key, part in value.items()
            }
        if HIDDEN in json.dumps(value, ensure_ascii=False, default=str):
            raise UsageError(f"{HIDDEN} is a masked value, which can only stay where it was")
        return value

    restored: Row = restore(dict(edited), hide_data(original, paths), original)
    return restored


def _parsed(row: Mapping[str, Any]) -> Row:
    shown = dict(row)
    if isinstance(shown.get("data"), str):
        shown["data"] = json.loads(shown["data"])
    return shown


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
        data[key] = HIDDEN


def _texts(value: object) -> Iterator[str]:
    if isinstance(value, dict):
        for part in value.values():
            yield from _texts(part)
    elif isinstance(value, list):
        for part in value:
            yield from _texts(part)
    elif value is not None and not isinstance(value, bool):
        yield str(value)
