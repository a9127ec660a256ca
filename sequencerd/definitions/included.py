"""Read texts of messages from separate files beside the file of their sequence."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from sequencerd.core.faults import KeyPath
from sequencerd.core.javascript.templates import MAX_SOURCE
from sequencerd.core.languages import FILE
from sequencerd.core.step_types import step_type, used_partials

FOLDER = "partials"
"""A folder beside the file of a sequence: each file in it is a partial, named without the suffix.
"""

SUFFIXES = (".html", ".htm", ".txt", ".md", ".hbs", ".handlebars")


class IncludedError(ValueError):
    """A text that cannot be read. The message names the file and the reason."""


def read(folder: Path, name: object) -> tuple[Path, str]:
    """Read a file in or below a folder. Return its path and text. Raises IncludedError."""
    if not isinstance(name, str):
        raise IncludedError("must be the name of a file, such as welcome.html")
    path = folder / name
    try:
        if not path.resolve().is_relative_to(folder.resolve()):
            raise IncludedError(f"{name!r} is outside of the folder {folder.resolve()}")
        with path.open("rb") as file:
            content = file.read(4 * MAX_SOURCE + 1)
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise IncludedError(f"{name!r} is not in UTF-8: save it in this encoding") from error
    except (OSError, ValueError) as error:
        if isinstance(error, IncludedError):
            raise
        reason = getattr(error, "strerror", None) or error
        raise IncludedError(f"{name!r} cannot be read: {reason}") from error
    if len(text) > MAX_SOURCE:
        raise IncludedError(f"{name!r} has more than {MAX_SOURCE} characters")
    if "\0" in text:
        raise IncludedError(f"{name!r} has a character that PostgreSQL cannot hold, \\u0000")
    return path, text.replace("\r\n", "\n")


def places(document: object) -> Iterator[tuple[KeyPath, dict[str, Any]]]:
    """Yield the places where a sequence names files: the path, and the object that contains its
    last key.
    """
    if not isinstance(document, dict):
        return
    yield from _named((FOLDER,), document.get(FOLDER))
    steps = document.get("steps")
    for number, step in enumerate(steps if isinstance(steps, list) else ()):
        config = step.get("config") if isinstance(step, dict) else None
        if isinstance(config, dict) and isinstance(step.get("type"), str):
            path: KeyPath = ("steps", number, "config")
            keys = step_type(step["type"]).localised
            yield from _named(path, config, keys)
            for key in keys:
                yield from _named((*path, key), config.get(key))


def _named(
    path: KeyPath, holder: object, keys: Iterable[str] | None = None
) -> Iterator[tuple[KeyPath, dict[str, Any]]]:
    """Yield the values that name a file."""
    if isinstance(holder, dict):
        for key in list(holder) if keys is None else keys:
            value = holder.get(key)
            if isinstance(value, dict) and set(value) == {FILE}:
                yield (*path, key), holder


def partials_beside(folder: Path, document: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the partials of the folder that messages of a sequence use but the sequence does not
    define: their names and file names. Raises IncludedError.
    """
    try:
        found = sorted(path for path in (folder / FOLDER).iterdir() if path.suffix in SUFFIXES)
    except OSError:
        return
    named: dict[str, str] = {}
    for path in found:
        if path.stem in named:
            raise IncludedError(f"{named[path.stem]} and {path.name} are the same partial")
        named[path.stem] = path.name
    own = document.get(FOLDER)
    texts = {name: text for name, text in (own or {}).items() if isinstance(text, str)}
    others = {name: file for name, file in named.items() if name not in (own or {})}
    for name, file in others.items():
        texts[name] = read(folder / FOLDER, file)[1]
    used: set[str] = set()
    for step in document.get("steps", ()):
        if isinstance(step, dict) and isinstance(step.get("config"), dict):
            used |= used_partials(str(step.get("type")), step["config"], texts)
    yield from ((name, f"{FOLDER}/{file}") for name, file in others.items() if name in used)
