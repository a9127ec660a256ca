"""The record of a step type, and what is read in a config by its place there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from sequencerd.core.config import Config
from sequencerd.core.model import InstantStep, KeyPath

ANY = "*"
"""In a path: every item of a list."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepType:
    """Everything that the project knows of one step type.

    Paths lead into the config. They hold for configs with errors, too, of which the compiled step
    knows nothing.
    """

    name: str
    config: type[Config]
    compile: Callable[[Any], InstantStep] | None = None
    """Compile a parsed config. Raises DefinitionError. None: a runner executes a side effect."""
    describe: Callable[[Mapping[str, Any]], str] = lambda _: ""
    """Describe what an enrollment at such a step waits for; empty for a step that does not wait."""
    never_alt: str = ""
    """What to say of an altNext that is never taken, if there is a way to have it taken."""
    templates: tuple[str, ...] = ()
    """The keys in whose values every text is a template."""
    localised: tuple[str, ...] = ()
    """Those of them that may have a text for each language."""
    conditions: tuple[KeyPath, ...] = ()
    """Where conditions are."""
    paths: Callable[[Mapping[str, Any]], Iterator[tuple[KeyPath, object]]] = lambda _: iter(())
    """Yield the paths that are read beside those of conditions, and where they are."""
    in_a_row: Callable[[Mapping[str, Any], Mapping[str, Any]], str | None] = lambda _, __: None
    """Say what is wrong if such a step follows such a step, whose configs have no errors."""
    steps: tuple[KeyPath, ...] = ()
    """Where steps are named. A key `sequence` beside it names the sequence of the step."""
    writes: str = ""
    """The key whose object is merged into the data."""
    produces: tuple[str, ...] = ()
    """The keys of data that it writes, whatever its config."""
    calendars: tuple[KeyPath, ...] = ()
    """Where calendars of holidays are named."""
    is_goal: bool = False
    is_seeded: bool = False
    """Whether a seed decides where a subject goes."""


def find(value: object, path: KeyPath, prefix: KeyPath = ()) -> Iterator[tuple[KeyPath, Any]]:
    """Yield what is at a path, which may have `ANY` in it, each with the path that leads there."""
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
