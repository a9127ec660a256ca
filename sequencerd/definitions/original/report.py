"""The report of an import: what is imported, what is left out and why, and open questions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from sequencerd.definitions.compiler import Definition
from sequencerd.definitions.diff import SequenceDocument
from sequencerd.definitions.plan_of_shards import sentences

MAX_EXAMPLES = 5
STATUSES = ("active", "completed", "cancelled")

StepPlace = tuple[str, str]
"""A step here: the names of its sequence and its own."""


@dataclass(slots=True)
class ImportedSequence:
    """A sequence of the original, as it is here, or will be."""

    original_id: str
    title: str
    is_here: bool  # and is left as it is
    document: SequenceDocument
    step_names: Mapping[str, str]  # by the original's id
    goals_met: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """The goals that an enrollment at a step must have met."""

    @property
    def name(self) -> str:
        """Return its name here."""
        name: str = self.document["name"]
        return name

    @property
    def steps(self) -> Mapping[str, Mapping[str, Any]]:
        """Return the steps of its document, by name."""
        return {step["name"]: step for step in self.document["steps"]}


@dataclass(slots=True)
class ImportReport:
    """What is imported, and what is not and why."""

    definitions: list[Definition] = field(default_factory=list)
    sequences: dict[str, ImportedSequence] = field(default_factory=dict)  # by the original's id
    unwanted: set[str] = field(default_factory=set)  # sequences that --only does not name
    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    counts: Counter[tuple[str, str]] = field(default_factory=Counter)  # by sequence and status
    already_here: int = 0
    elsewhere: int = 0  # at a step of another sequence than their own
    at_conditionals: Counter[StepPlace] = field(default_factory=Counter)
    at_past_dates: Counter[StepPlace] = field(default_factory=Counter)
    left_out: dict[str, list[str]] = field(default_factory=dict)  # ids, by reason
    questions: list[str] = field(default_factory=list)

    def lines(self, *, done: bool) -> Iterator[str]:
        """Yield lines for a terminal: what was `done`, or else what would be."""
        yield from (f"warning: {text}" for text in self.warnings)
        yield from (f"error: {text}" for text in self.errors)
        is_ = "is" if done else "would be"
        for sequence in self.sequences.values():
            counts = [
                f"{count:,} {status}"
                for status in STATUSES
                if (count := self.counts[sequence.name, status])
            ]
            new = "exists already and is not changed" if sequence.is_here else f"{is_} created"
            yield f"{sequence.name}: {new}; enrollments: {', '.join(counts) or 'none'}"
        if self.already_here:
            yield f"{self.already_here:,} exist already and are not changed"
        if self.elsewhere:
            yield f"{self.elsewhere:,} at a step of another sequence, imported into that one"
        for (name, step), count in sorted(self.at_conditionals.items()):
            yield f"{count:,} at the Conditional {name}/{step}"
        for (name, step), count in sorted(self.at_past_dates.items()):
            yield f"{count:,} at the past date of {name}/{step}"
        for reason, ids in self.left_out.items():
            shown = ", ".join(ids[:MAX_EXAMPLES]) + (", ..." if len(ids) > MAX_EXAMPLES else "")
            yield f"{len(ids):,} left out: {reason} (runners {shown})"
        yield from (f"question: {text}" for text in self.questions)

    def as_dict(self) -> dict[str, Any]:
        """Return the report for JSON."""
        return {
            "sequences": [
                {
                    "name": sequence.name,
                    "is_here": sequence.is_here,
                    "enrollments": {
                        status: self.counts[sequence.name, status] for status in STATUSES
                    },
                }
                for sequence in self.sequences.values()
            ],
            "already_here": self.already_here,
            "at_conditionals": _by_step(self.at_conditionals),
            "at_past_dates": _by_step(self.at_past_dates),
            "left_out": self.left_out,
            "questions": self.questions,
            "errors": self.errors,
            "warnings": self.warnings,
        }


def merge(parts: Mapping[str, ImportReport]) -> ImportReport:
    """Return the imports of several shards as one; of one, it is the same."""
    first, *others = parts.values()
    if not others:
        return first
    result = ImportReport(
        errors=[*sentences({shard: one.errors for shard, one in parts.items()})],
        warnings=[*sentences({shard: one.warnings for shard, one in parts.items()})],
    )
    for part in parts.values():
        for id_, one in part.sequences.items():
            key = f"{id_} {one.name}"  # it may have been renamed in some
            known = result.sequences.get(key, one)
            result.sequences[key] = replace(one, is_here=one.is_here and known.is_here)
        result.counts += part.counts
        result.already_here += part.already_here
        result.elsewhere += part.elsewhere
        result.at_conditionals += part.at_conditionals
        result.at_past_dates += part.at_past_dates
        for reason, ids in part.left_out.items():
            result.left_out.setdefault(reason, []).extend(ids)
    return result


def _by_step(counts: Counter[StepPlace]) -> list[dict[str, Any]]:
    return [
        {"sequence": sequence, "step": step, "count": count}
        for (sequence, step), count in sorted(counts.items())
    ]
