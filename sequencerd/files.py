"""Files of sequences: YAML or JSON, read and checked as a whole."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.alias_generators import to_camel

from sequencerd.core.model import Step
from sequencerd.core.steps import describe, nearest
from sequencerd.definitions import (
    Definition,
    Runners,
    build,
    compile_behaviour,
    problems,
    reads_external,
)
from sequencerd.errors import FileError


class _FileStep(BaseModel):
    model_config = ConfigDict(extra="forbid", alias_generator=to_camel, allow_inf_nan=False)
    name: str = Field(min_length=1, max_length=200)
    type: str = Field(min_length=1, max_length=200)
    config: dict[str, Any] = {}
    next: str | None = None
    alt_next: str | None = None


class _FileSequence(BaseModel):
    model_config = ConfigDict(extra="forbid", alias_generator=to_camel)
    name: str = Field(min_length=1, max_length=200)
    timezone: str = "UTC"
    status: Literal["active", "paused", "archived"] = "active"
    reentry: Literal["after_end", "always", "never"] = "after_end"
    lookup: str | None = None
    recheck: timedelta = timedelta(minutes=1)
    steps: list[_FileStep] = Field(min_length=1)


class _Loader(yaml.SafeLoader):
    """YAML whose values are JSON's: dates stay text, yes and no are words, no key stands twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Refuses a key that stands twice: the second would silently win."""
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} must be text, in quotes", key_node.start_mark
                )
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} stands twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [
        (tag, pattern)
        for tag, pattern in resolvers
        if tag != "tag:yaml.org,2002:timestamp"
        and (tag != "tag:yaml.org,2002:bool" or first in "tTfF")
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def read_file(path: Path, runners: Runners) -> list[Definition]:
    """The sequences of a YAML or JSON file. Raises FileError with everything that is wrong."""
    try:
        text = path.read_text(encoding="utf-8")
        documents = list(yaml.load_all(text, _Loader))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise FileError(f"{path}: {error}") from error
    found = [_read_document(document, path, runners) for document in documents if document]
    if not found:
        raise FileError(f"{path}: no sequence in it")
    names = [definition.sequence.name for definition in found]
    if twice := {name for name in names if names.count(name) > 1}:
        raise FileError(f"{path}: sequence {min(twice)!r} stands twice")
    return found


def _read_document(document: object, path: Path, runners: Runners) -> Definition:
    try:
        parsed = _FileSequence.model_validate(document)
        TypeAdapter(dict[str, Any]).dump_json(parsed.model_dump())
    except (ValidationError, ValueError) as error:
        message = describe(error) if isinstance(error, ValidationError) else str(error)
        raise FileError(f"{path}: {message}") from error
    place = f"{path}: sequence {parsed.name!r}"
    names = [step.name for step in parsed.steps]
    errors = [f"step {name!r} stands twice" for name in sorted(set(names)) if names.count(name) > 1]
    steps = []
    for position, step in enumerate(parsed.steps):
        following = names[position + 1] if position + 1 < len(names) else None
        next_step = step.next if "next" in step.model_fields_set else following
        for key, target in (("next", next_step), ("altNext", step.alt_next)):
            if target is not None and target not in names:
                hint = nearest(target, names)
                errors.append(f"step {step.name!r}: {key} {target!r} does not exist; {hint}")
        steps.append(
            Step(
                sequence=parsed.name,
                name=step.name,
                type=step.type,
                config=step.config,
                next_step=next_step,
                alt_next_step=step.alt_next,
                behaviour=compile_behaviour(step.type, step.config, runners),
                position=position,
                reads_external=reads_external(step.config),
            )
        )
    sequence = build(parsed.name, names[0], parsed.timezone, steps)
    errors += [
        f"step {name!r}: {message}" for (_, name), message in problems(sequence).items() if message
    ]
    if errors:
        raise FileError("\n".join(f"{place}: {error}" for error in errors))
    return Definition(sequence, parsed.reentry, parsed.status, parsed.lookup, parsed.recheck, place)
