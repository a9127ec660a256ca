"""Compare two definitions, given as documents: the contents of files, and of revisions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from sequencerd.core.config import parse_json
from sequencerd.core.describe import counted
from sequencerd.core.faults import DefinitionError
from sequencerd.core.step_types import language_texts, rename_steps, step_type, used_partials
from sequencerd.core.step_types.durations import in_words
from sequencerd.errors import PlanError

SequenceDocument = Mapping[str, Any]
"""A sequence with the keys of a file; every key is present, `recheck` is in seconds."""

SETTINGS = (
    "description",
    "timezone",
    "status",
    "reentry",
    "lookup",
    "recheck",
    "window",
    "topic",
    "locale",
    "enroll",
    "brake",
)
MAX_NAMED = 5
MAX_SHOWN = 40  # characters of a value that is shown


def parse_document(sequence: str, text: str) -> SequenceDocument:
    """Parse a document from the database. Raises PlanError if Python cannot parse it."""
    try:
        document: SequenceDocument = parse_json(text)
    except DefinitionError as error:
        raise PlanError(f"sequence {sequence!r}: its definition in the database {error}") from error
    return document


def describe_revision(sequence: str, before: str | None, after: str) -> list[str]:
    """Describe the changes of a revision, given the documents before and after it as JSON texts."""
    try:
        known = None if before is None else parse_document(sequence, before)
        return list(compare(known, parse_document(sequence, after)).lines())
    except PlanError as error:
        return [str(error)]


@dataclass(frozen=True, slots=True)
class KeyChange:
    """The values of a key before and after a change; None means that it was absent."""

    before: Any
    after: Any

    def __str__(self) -> str:
        """Return both values, or an empty string if they would be long."""
        values = [_shown(self.before), _shown(self.after)]
        return "" if "" in values else f"{values[0]} → {values[1]}"


def _shown(value: object) -> str:
    match value:
        case {"after": {"amount": amount, "unit": str() as unit}}:
            return f"after {in_words(amount, unit)}"
        case {"at_most": at_most, "per": {"amount": amount, "unit": str() as unit}}:
            return f"{at_most} in {in_words(amount, unit)}"
        case dict() | list():
            return ""
    text = "none" if value is None else str(value)
    return text if len(text) <= MAX_SHOWN and text.isprintable() else ""


@dataclass(frozen=True, slots=True)
class SequenceDiff:
    """The differences between two definitions. Steps are given by name; `renamed` maps new names to
    former names.
    """

    is_new: bool = False
    settings: Mapping[str, KeyChange] = field(default_factory=dict)
    renamed: Mapping[str, str] = field(default_factory=dict)
    added: Mapping[str, str] = field(default_factory=dict)  # name and type
    changed: Mapping[str, Mapping[str, KeyChange]] = field(default_factory=dict)  # by key
    partials: Mapping[str, KeyChange] = field(default_factory=dict)
    messages: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """The steps whose messages contain a changed partial."""
    removed: tuple[str, ...] = ()
    is_reordered: bool = False

    def __bool__(self) -> bool:
        """Return whether anything differs."""
        parts = (
            self.settings,
            self.renamed,
            self.added,
            self.changed,
            self.removed,
            self.partials,
        )
        return self.is_new or self.is_reordered or any(parts)

    def lines(self) -> Iterator[str]:
        """Yield a line for each change."""
        for key, change in self.settings.items():
            yield f"{key}: {change}" if str(change) else f"changed {key}"
        for old, new in self.renamed.items():
            yield f"renamed {old} → {new}"
        for name, type_ in self.added.items():
            yield f"added {name} ({type_})"
        for name, keys in self.changed.items():
            changes = ", ".join(f"{key} {change}".strip() for key, change in keys.items())
            yield f"changed {name}: {changes}"
        for name in self.removed:
            yield f"removed {name}"
        for name, change in self.partials.items():
            verb = "added" if change.before is None else "removed"
            if change.before is not None and change.after is not None:
                verb = "changed"
            count = len(self.messages[name])
            steps = "no message changes"
            if count:
                named = ", ".join(self.messages[name][:MAX_NAMED])
                more = ", ..." if count > MAX_NAMED else ""
                steps = f"a message of {counted(count, 'step')} changes: {named}{more}"
            yield f"{verb} partial {name}: {steps}"
        if self.is_reordered:
            yield "the order of the steps"


def compare(
    before: SequenceDocument | None,
    after: SequenceDocument,
    renames: Mapping[str, Mapping[str, str]] | None = None,
) -> SequenceDiff:
    """Return the changes from `before` to `after`; `renames` are new names of steps by sequence and
    former name.
    """
    renames = renames or {}
    new_names = dict(renames.get(after["name"], {}))
    if before is None:
        added = {step["name"]: step["type"] for step in after["steps"]}
        return SequenceDiff(is_new=True, added=added)
    seeded = [_seeded(before, step) for step in before["steps"]]
    renamed_steps = (_renamed(after["name"], step, renames) for step in seeded)
    was = {step["name"]: step for step in renamed_steps}
    now = {step["name"]: _seeded(after, step) for step in after["steps"]}
    settings = {
        key: KeyChange(before[key], after[key])
        for key in SETTINGS
        if not is_same(before[key], after[key])
    }
    first_before, first_after = next(iter(was), None), next(iter(now), None)
    if first_before != first_after:
        settings["first step"] = KeyChange(first_before, first_after)
    changed = {name: _keys(was[name], now[name]) for name in now if name in was}
    texts_before, texts_after = before["partials"], after["partials"]
    partials = {
        name: KeyChange(texts_before.get(name), texts_after.get(name))
        for name in sorted({*texts_before, *texts_after})
        if texts_before.get(name) != texts_after.get(name)
    }
    return SequenceDiff(
        settings=settings,
        renamed=new_names,
        added={name: step["type"] for name, step in now.items() if name not in was},
        changed={name: keys for name, keys in changed.items() if keys},
        partials=partials,
        messages={name: _using(name, before, after) for name in partials},
        removed=tuple(name for name in was if name not in now),
        is_reordered=[n for n in was if n in now] != [n for n in now if n in was],
    )


def _using(partial: str, before: SequenceDocument, after: SequenceDocument) -> tuple[str, ...]:
    """Return the steps whose messages contain or contained a partial."""
    steps = {step["name"]: step for step in after["steps"]}
    present = {step["name"] for step in before["steps"]}
    return tuple(
        name
        for name, step in steps.items()
        if name in present
        and any(
            partial in used_partials(step["type"], step["config"], document["partials"])
            for document in (before, after)
        )
    )


def seeds(document: SequenceDocument) -> dict[str, str | None]:
    """Return the seed of each step: the original names of a Split; None for other steps."""
    return {step["name"]: _seeded(document, step).get("seed") for step in document["steps"]}


def _seeded(document: SequenceDocument, step: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a step with its seed if it has one."""
    if not step_type(step["type"]).is_seeded:
        return step
    return {**step, "seed": step.get("seed", f"{document['name']}/{step['name']}")}


def _renamed(
    sequence: str, step: Mapping[str, Any], renames: Mapping[str, Mapping[str, str]]
) -> Mapping[str, Any]:
    """Return a step after renames, as the database changes it."""
    new_names = renames.get(sequence, {})
    names = {key: new_names.get(step[key], step[key]) for key in ("name", "next", "altNext")}
    config = rename_steps(step["type"], step["config"], sequence, renames)
    return {**step, **names, "config": config}


def _keys(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, KeyChange]:
    """Return the keys of a step that differ."""
    was, now = _flat(before), _flat(after)
    if "seed" in before and "seed" in after:
        was["seed"], now["seed"] = before["seed"], after["seed"]
    return {
        key: KeyChange(was.get(key), now.get(key))
        for key in sorted(was | now, key=lambda key: key in ("next", "altNext"))
        if not (key in was and key in now and is_same(was[key], now[key]))
    }


def _flat(step: Mapping[str, Any]) -> dict[str, Any]:
    config: dict[str, Any] = {}
    texts = language_texts(step["type"], step["config"])
    for key, value in step["config"].items():
        match texts.get(key):
            case dict(languages):
                config |= {f"config.{key}.{one}": text for one, text in languages.items()}
            case _:
                config[f"config.{key}"] = value
    return {"type": step["type"], **config, "next": step["next"], "altNext": step["altNext"]}


def is_same(one: object, other: object) -> bool:
    """Compare like PostgreSQL's jsonb: 1 equals 1.0, and not true."""
    match one, other:
        case dict(), dict():
            return one.keys() == other.keys() and all(is_same(one[k], other[k]) for k in one)
        case list(), list():
            return len(one) == len(other) and all(map(is_same, one, other))
        case (bool(), _) | (_, bool()):
            return one is other
        case _:
            return one == other
