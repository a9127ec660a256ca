"""The record of a step type, and functions that read a config by its paths."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from sequencerd.core.config import Config
from sequencerd.core.faults import KeyPath
from sequencerd.core.model import InstantStep

ANY = "*"
"""In a path: every item of a list."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepType:
    """Everything that the project knows about one step type.

    Paths lead into the config. They also apply to configs with errors, about which the compiled
    step knows nothing.
    """

    name: str
    config: type[Config]
    compile: Callable[[Any], InstantStep] | None = None
    """Compile a parsed config. Raises DefinitionError. None: a runner executes a side effect."""
    describe: Callable[[Mapping[str, Any]], str] = lambda _: ""
    """Describe what an enrollment at such a step waits for; empty for a step that does not wait."""
    never_alt: str = ""
    """What to say about an altNext that is never taken, if there is a way to have it taken."""
    templates: tuple[str, ...] = ()
    """The keys in whose values every text is a template."""
    localised: tuple[str, ...] = ()
    """Those of them that may have a text for each language."""
    conditions: tuple[KeyPath, ...] = ()
    """The paths of conditions."""
    paths: Callable[[Mapping[str, Any]], Iterator[tuple[KeyPath, object]]] = lambda _: iter(())
    """Yields the paths that are read outside of conditions, with their places."""
    in_a_row: Callable[[Mapping[str, Any], Mapping[str, Any]], str | None] = lambda _, __: None
    """Describes the error of two consecutive steps of this type, whose configs have no errors."""
    steps: tuple[KeyPath, ...] = ()
    """The paths of steps' names. A key `sequence` beside one names the sequence of the step."""
    writes: str = ""
    """The key whose object is merged into the data."""
    produces: tuple[str, ...] = ()
    """The keys of data that it writes, whatever its config."""
    calendars: tuple[KeyPath, ...] = ()
    """The paths of names of holiday calendars."""
    is_goal: bool = False
    is_seeded: bool = False
    """Whether a seed decides where a subject goes."""


def find(value: object, path: KeyPath, prefix: KeyPath = ()) -> Iterator[tuple[KeyPath, Any]]:
    """Yield the values at a path, which may contain `ANY`, each with its own path."""
    if not path:
        yield prefix, value
        return
    key, *rest = path
    match value:
        case list():
            for number, item in enumerate(value):
                if key in (ANY, number):
                    yield from find(item, tuple(rest), (*prefix, number))
        case dict() if key in value:
            yield from find(value[key], tuple(rest), (*prefix, key))


def texts(value: object, path: KeyPath = ()) -> Iterator[tuple[KeyPath, str]]:
    """Yield all texts in a value, with their paths."""
    match value:
        case str():
            yield path, value
        case dict():
            for key, item in value.items():
                yield from texts(item, (*path, key))
        case list():
            for number, item in enumerate(value):
                yield from texts(item, (*path, number))
