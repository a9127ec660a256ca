"""The built-in step types: one record each, from which everything else is derived.

A family of types has a file: their configs, and what they do. Names and keys are the original's.
All other packages look up step types by name here.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

from pydantic import ValidationError

from sequencerd.core.config import Config, in_order, parse_config
from sequencerd.core.faults import DefinitionError, KeyPath
from sequencerd.core.javascript.conditions import Operand, first_key
from sequencerd.core.javascript.templates import called_partials, compile_template
from sequencerd.core.model import ALT_NEXT, InstantStep
from sequencerd.core.step_types import branches, data, effects, journeys, waits
from sequencerd.core.step_types.condition_config import condition_roots, read_condition
from sequencerd.core.step_types.record import StepType, find, texts

BUILT_IN: Mapping[str, StepType] = {
    type_.name: type_
    for type_ in (*branches.TYPES, *waits.TYPES, *data.TYPES, *journeys.TYPES, *effects.TYPES)
}
"""All built-in types by name, in the order of the documentation."""

_CUSTOM = StepType(name="", config=Config)


def step_type(name: str | None) -> StepType:
    """Return the record of a step type: an empty one for the type of a custom runner."""
    return BUILT_IN.get(name or "", _CUSTOM)


def is_instant(type_: str) -> bool:
    """Return whether a type is built in and has no side effect."""
    return step_type(type_).compile is not None


def is_message(type_: str) -> bool:
    """Return whether a type is built in and has a side effect."""
    return type_ in BUILT_IN and not is_instant(type_)


def compile_step(type_: str, config: Mapping[str, Any]) -> InstantStep:
    """Compile a step without a side effect. Raises DefinitionError."""
    record = BUILT_IN[type_]
    assert record.compile is not None
    return record.compile(parse_config(record.config, config, type_))


def config_in_order(type_: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config with its keys in the order of the documentation, which jsonb does not keep.
    The keys of all side effects follow those of the type.
    """
    own = [BUILT_IN[type_].config] if type_ in BUILT_IN else []
    ordered: dict[str, Any] = in_order(
        dict(config), *own, *(() if is_instant(type_) else (effects.EffectConfig,))
    )
    return ordered


def may_take_alt_next(type_: str, config: Mapping[str, Any]) -> bool:
    """Return whether a step with a side effect may continue at altNext; False for other steps."""
    if is_instant(type_):
        return False
    given = {key: config[key] for key in effects.EFFECT_KEYS & config.keys()}
    with suppress(DefinitionError):
        common = parse_config(effects.EffectConfig, given)
        exits = effects.effect_exits(common, is_message=is_message(type_))
        return any(exit_.path == ALT_NEXT.path for exit_ in exits)
    return False


def named_steps(type_: str, config: object) -> Iterator[tuple[KeyPath, str, str | None]]:
    """Yield the steps that a config names, with their paths, and with their sequences if it names
    these.
    """
    for path in step_type(type_).steps:
        for where, holder in find(config, path[:-1]):
            step = holder.get(path[-1]) if isinstance(holder, dict) else None
            if isinstance(step, str):
                sequence = holder.get("sequence")
                yield (*where, path[-1]), step, sequence if isinstance(sequence, str) else None


def rename_steps(
    type_: str, config: Mapping[str, Any], sequence: str, names: Mapping[str, Mapping[str, str]]
) -> Mapping[str, Any]:
    """Return a step's config with new names of steps; `names` maps sequence and former name to
    these.
    """
    renamed: dict[str, Any] = copy.deepcopy({**config})
    for path, step, other in named_steps(type_, config):
        if (new := names.get(other or sequence, {}).get(step)) is not None:
            [(_, holder)] = find(renamed, path[:-1])
            holder[path[-1]] = new
    return renamed


def template_texts(type_: str, config: Mapping[str, Any]) -> Iterator[tuple[KeyPath, str]]:
    """Yield the templates in a config, with their paths."""
    custom = ("address",) if "channel" in config else ()
    for key in BUILT_IN[type_].templates if type_ in BUILT_IN else custom:
        yield from texts(config.get(key), (key,))


def language_texts(type_: str, config: Mapping[str, Any]) -> Mapping[str, str | dict[str, str]]:
    """Return the texts of a config that may be in several languages, by key."""
    keys = step_type(type_).localised
    return {key: config[key] for key in keys if isinstance(config.get(key), str | dict)}


def used_partials(
    type_: str, config: Mapping[str, Any], partials: Mapping[str, str]
) -> frozenset[str]:
    """Return the partials that the texts of a message use, also within others."""
    sources = texts(dict(language_texts(type_, config))) if partials else ()
    return frozenset().union(*(called_partials(text, partials) for _, text in sources))


def has_languages(type_: str, config: Mapping[str, Any]) -> bool:
    """Return whether a message has a text for each language."""
    return any(isinstance(text, dict) for text in language_texts(type_, config).values())


def written_keys(type_: str, config: Mapping[str, Any]) -> list[str] | None:
    """Return the keys of the data that a step writes; None if they may be any."""
    record = step_type(type_)
    written = config.get(record.writes)
    if data.copies_object(written):
        return None
    return [*record.produces, *(written if isinstance(written, dict) else ())]


def calendars(type_: str, config: Mapping[str, Any]) -> set[str]:
    """Return the calendars of holidays that a built-in step without a side effect needs."""
    found = (name for path in step_type(type_).calendars for _, name in find(config, path))
    return {name for name in found if isinstance(name, str)}


def roots(type_: str, config: Mapping[str, Any]) -> frozenset[str] | None:
    """Return the first keys of the view that a step reads; None for the whole view.

    For a config with errors, return what can be determined.
    """
    found: set[str] = set()
    for path in step_type(type_).conditions:
        for _, condition in find(config, path):
            if not isinstance(condition, dict):
                continue
            with suppress(DefinitionError, ValidationError):
                found |= condition_roots(read_condition(condition))
    try:
        for _, target in step_type(type_).paths(config):
            with suppress(DefinitionError):
                found.add(first_key(Operand(type="get", value=target)) or "")
        for _, source in template_texts(type_, config):
            with suppress(DefinitionError):
                read = compile_template(source, escape=False).roots
                if read is None:
                    return None
                found |= read
    except RecursionError:
        return None
    return frozenset(found)
