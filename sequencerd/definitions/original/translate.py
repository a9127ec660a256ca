"""Convert the original's steps to steps of sequencerd. Pure: rows in, steps and remarks out."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import chain
from typing import Any, Literal

from sequencerd.core import graph
from sequencerd.core.calendar import dates
from sequencerd.core.faults import DefinitionError
from sequencerd.core.javascript.templates import with_renamed_keys
from sequencerd.core.step_types import BUILT_IN, is_message, template_texts
from sequencerd.core.step_types.effects import EFFECT_KEYS

HELD_UNTIL = "9998-12-31T00:00:00Z"
"""The date of a step that no enrollment passes."""

_CONDITION = ("lodashCommand", "value", "compareTo")
_KEYS = {
    "GoTo": (),
    "Conditional": _CONDITION,
    "Goal": _CONDITION,
    "WaitForDate": ("date",),
    "WaitForDuration": ("amount", "unit"),
    "WaitForDateComparison": ("attribute", "values"),
    "Email": ("from", "to", "cc", "bcc", "text", "html", "subject"),
    "SMS": ("from", "to", "message"),
}
"""The original's own types, and the keys of their configs; it ignores all others."""

_RENAMED = {"id": "originalId", "createdAt": "startSequence", "updatedAt": "startStep"}
"""The fields of the original that have other names here."""

_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]{0,15})(?:\.[0-9]{1,15})?")
_TAG = re.compile(r"\{\{\{.*?\}\}\}|\{\{.*?\}\}", re.DOTALL)


@dataclass(frozen=True, slots=True)
class OriginalStep:
    """A step of the original."""

    id: str
    type: str
    config: str | None
    next: str | None
    alt_next: str | None
    reads_external: bool


@dataclass(frozen=True, slots=True)
class ImportChoices:
    """What the operator decides where the original's code and its README differ."""

    conditional: Literal["wait", "branch"] | None = None
    past_dates: Literal["send", "skip", "hold"] | None = None


@dataclass(slots=True)
class TranslatedSteps:
    """The steps of a sequence, and remarks, each with the name of its step."""

    steps: list[dict[str, Any]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


def step_name(row: OriginalStep) -> str:
    """Return the name for a step."""
    return f"{row.type}-{row.id}"


def in_order(first: str | None, rows: Sequence[OriginalStep]) -> list[OriginalStep]:
    """Return the steps along the paths from the first one; then those on no path, such as goals."""
    by_id = {row.id: row for row in rows}

    def following(id_: str) -> list[str]:
        row = by_id[id_]
        return [there for there in (row.next, row.alt_next) if there in by_id]

    starts = [id_ for id_ in (first, *by_id) if id_ in by_id]
    return [by_id[id_] for id_, _ in graph.walk(starts, following, depth_first=True)]


def translate(
    rows: Sequence[OriginalStep],
    elsewhere: Mapping[str, tuple[str, str]],
    choices: ImportChoices,
    now: datetime,
) -> TranslatedSteps:
    """Translate the steps of a sequence. `elsewhere` maps the ids of other sequences' steps to the
    names of sequence and step; a link to one becomes a GoTo.
    """
    made = TranslatedSteps()
    names = {row.id: step_name(row) for row in rows}
    jumps: dict[str, dict[str, Any]] = {}

    def target(row: OriginalStep, column: str, id_: str | None) -> str | None:
        if id_ is None or id_ in names:
            return names.get(id_ or "")
        sequence, step = elsewhere[id_]
        jump = f"GoTo-{id_}"
        config = {"sequence": sequence, "step": step}
        jumps[jump] = {
            "name": jump,
            "type": "GoTo",
            "config": config,
            "next": None,
            "altNext": None,
        }
        made.warnings.append(
            f"{names[row.id]}: its {column} is a step of {sequence}: {jump} leads there, if the "
            "reentry policy of that sequence allows it"
        )
        return jump

    for row in rows:
        type_, config = _translate_step(row, choices, now, names[row.id], made)
        following, alternative = leads_to(row, choices)
        if row.alt_next is not None and alternative is None:
            made.warnings.append(f"{names[row.id]}: its altNextStep is never taken, and dropped")
        made.steps.append(
            {
                "name": names[row.id],
                "type": type_,
                "config": config,
                "next": target(row, "nextStep", following),
                "altNext": target(row, "altNextStep", alternative),
            }
        )
    made.steps += jumps.values()
    return made


def leads_to(row: OriginalStep, choices: ImportChoices) -> tuple[str | None, str | None]:
    """Return nextStep and altNextStep of a step. One that waits does not take the latter."""
    waits = row.type == "Conditional" and choices.conditional == "wait"
    return row.next, None if waits else row.alt_next


def _translate_step(
    row: OriginalStep, choices: ImportChoices, now: datetime, name: str, made: TranslatedSteps
) -> tuple[str, dict[str, Any]]:
    config = json.loads(row.config or "null") or {}
    if not isinstance(config, dict):
        made.errors.append(f"{name}: its config is not a JSON object")
        return row.type, {}
    if row.type not in _KEYS:
        return row.type, _custom(row, config, name, made)
    config = _known(row.type, config, name, made)
    if is_message(row.type):
        for path, text in list(template_texts(row.type, config)):
            with suppress(DefinitionError):  # what is wrong with it, `check` says
                _set(config, path, with_renamed_keys(text, _RENAMED))
    if row.type == "Email":
        _split_lists(config, name, made)
    amount = config.get("amount")
    if isinstance(amount, str) and _NUMBER.fullmatch(amount):
        config["amount"] = json.loads(amount)
    if row.type == "Conditional":
        return _conditional(config, choices, name, made)
    if row.type == "WaitForDate" and is_past(config, now):
        return row.type, _past_date(config, choices, name, made)
    return row.type, config


def _conditional(
    config: dict[str, Any], choices: ImportChoices, name: str, made: TranslatedSteps
) -> tuple[str, dict[str, Any]]:
    if choices.conditional is None:
        made.warnings.append(
            f"{name}: goes to altNextStep while its condition is false, as the original's README "
            "says; its code waits there: see --conditional"
        )
    return "WaitForCondition" if choices.conditional == "wait" else "Conditional", config


def _past_date(
    config: dict[str, Any], choices: ImportChoices, name: str, made: TranslatedSteps
) -> dict[str, Any]:
    passed = f"{name}: its date {config['date']} has passed"
    if choices.past_dates is None:
        made.warnings.append(
            f"{passed}: enrollments that arrive continue at once; in the original, they never do:"
            " see --past-dates"
        )
    if choices.past_dates != "hold":
        return config
    made.warnings.append(
        f"{passed}, and becomes {HELD_UNTIL}: no enrollment passes it, as in the original"
    )
    return {**config, "date": HELD_UNTIL}


def _known(
    type_: str, config: Mapping[str, Any], name: str, made: TranslatedSteps
) -> dict[str, Any]:
    """Return the keys that the original reads of the config of a built-in type."""
    found = {}
    dropped = [key for key in config if key not in _KEYS[type_]]
    for key in _KEYS[type_]:
        if key in config:
            found[key] = config[key]
    for key in ("value", "compareTo"):
        if isinstance(operand := found.get(key), dict):
            dropped += [f"{key}.{inner}" for inner in operand if inner not in ("type", "value")]
            found[key] = {k: operand[k] for k in ("type", "value") if k in operand}
            if operand.get("type") == "get":
                found[key]["value"] = _renamed(operand.get("value"))
    if dropped:
        keys = ", ".join(map(repr, dropped))
        made.warnings.append(f"{name}: dropped from its config, as the original ignores it: {keys}")
    return found


def _renamed(path: object) -> object:
    """Rename the keys in the path of a `get`, a text or a list of keys."""
    if isinstance(path, list) and path:
        return [_RENAMED.get(str(path[0]), path[0]), *path[1:]]
    if isinstance(path, str):
        return re.sub(r"^\w+", lambda found: _RENAMED.get(found[0], found[0]), path)
    return path


def _set(config: Any, path: Sequence[str | int], value: str) -> None:
    for key in path[:-1]:
        config = config[key]
    config[path[-1]] = value


def _custom(
    row: OriginalStep, config: dict[str, Any], name: str, made: TranslatedSteps
) -> dict[str, Any]:
    """Return the config of a custom type, with the key that requests external data."""
    if row.type in BUILT_IN:
        made.errors.append(
            f"{name}: {row.type} is a custom type there and a built-in one here: give it another "
            "name, in steps.type and in the settings"
        )
    for key in sorted(EFFECT_KEYS & config.keys()):
        made.errors.append(
            f"{name}: the key {key!r} of its config is a setting of the step here and would not "
            "reach the function: give it another name in both"
        )
    if row.reads_external and not re.search(r"\bexternal\b", json.dumps(config)):
        made.warnings.append(f"{name}: requires external data, so its config gets external: true")
        return {**config, "external": True}
    return config


def _split_lists(config: dict[str, Any], name: str, made: TranslatedSteps) -> None:
    """Write addresses as JSON text, `[{{#each external.l}}"{{{this}}}",{{/each}}]`, with commas.

    The original parses as JSON what has a bracket. Here the brackets and quotation marks of the
    template's own text are left out, so that what a value holds stays one address.
    """
    for key in ("to", "cc", "bcc"):
        text = config.get(key)
        if isinstance(text, str) and "[" in _TAG.sub("", text):
            literal = [re.sub(r'[\[\]"]', "", part) for part in _TAG.split(text)]
            tags = [*_TAG.findall(text), ""]
            config[key] = "".join(chain.from_iterable(zip(literal, tags, strict=True))).strip()
            made.warnings.append(f"{name}: {key}, a list as JSON text, is written with commas")


def is_past(config: Mapping[str, Any], now: datetime) -> bool:
    """Return whether the day of a WaitForDate is over in UTC; then the original never passes it."""
    date = config.get("date")
    if not isinstance(date, str) or "{{" in date:
        return False
    found = dates.parse(date, dates.zone("UTC"))
    today = now.astimezone(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    return found is not None and found < today
