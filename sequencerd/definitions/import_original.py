"""Brings sequences and people over from the tables of the original Sequencer.

Its tables are `sequences`, `steps`, and `runners`, its word for enrollments.
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import asyncpg

from sequencerd.core import graph, model
from sequencerd.definitions import files, plan
from sequencerd.definitions.check import targets
from sequencerd.definitions.compiler import Definition, Runners
from sequencerd.definitions.diff import Document
from sequencerd.definitions.yaml_writer import DEFAULTS, to_yaml
from sequencerd.errors import UsageError
from sequencerd.storage.store import QUERIES

BATCH = 5000  # people in memory
LONGEST_SUBJECT = 1000  # bytes
SHOWN = 5

_TABLES = {
    "sequences": {"id", "title", "firstStep"},
    "steps": {
        "id", "sequenceId", "nextStep", "altNextStep", "type", "config", "requiresExternalData",
    },
    "runners": {
        "id", "dataLookup", "sequenceId", "stepId", "isActive", "startSequence", "endSequence",
        "startStep",
    },
}  # fmt: skip


@dataclass(slots=True)
class Sequenced:
    """A sequence of the original, as it will be here."""

    name: str
    is_here: bool  # and is left as it is
    step_names: Mapping[str, str]  # by the original's id
    goals_met: Mapping[str, Sequence[str]]  # who stands at a step has met them


@dataclass(slots=True)
class Import:
    """What is brought over, and what is not and why."""

    definitions: list[Definition] = field(default_factory=list)
    sequences: dict[str, Sequenced] = field(default_factory=dict)  # by the original's id
    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    people: Counter[tuple[str, str]] = field(default_factory=Counter)  # by sequence and status
    already_here: int = 0
    left_out: dict[str, list[str]] = field(default_factory=dict)  # ids, by reason

    def lines(self, *, done: bool) -> Iterator[str]:
        """For people to read; of what was `done`, or else would be."""
        yield from (f"warning: {text}" for text in self.warnings)
        yield from (f"error: {text}" for text in self.errors)
        if self.errors:
            return
        is_, are = ("is", "are") if done else ("would be", "would be")
        for sequence in self.sequences.values():
            counts = [
                f"{count:,} {status}"
                for status in ("active", "completed", "cancelled")
                if (count := self.people[sequence.name, status])
            ]
            new = "is here already and stays as it is" if sequence.is_here else f"{is_} made"
            yield f"{sequence.name}: {new}; people: {', '.join(counts) or 'none'}"
        if self.already_here:
            yield f"{self.already_here:,} people are here already and stay as they are"
        for reason, ids in self.left_out.items():
            shown = ", ".join(ids[:SHOWN]) + (", ..." if len(ids) > SHOWN else "")
            yield f"{len(ids):,} {are} left out: {reason} (runners {shown})"

    def as_dict(self) -> dict[str, Any]:
        """For a program."""
        return {
            "sequences": [
                {
                    "name": sequence.name,
                    "is_here": sequence.is_here,
                    "people": {
                        status: self.people[sequence.name, status]
                        for status in ("active", "completed", "cancelled")
                    },
                }
                for sequence in self.sequences.values()
            ],
            "already_here": self.already_here,
            "left_out": self.left_out,
            "errors": self.errors,
            "warnings": self.warnings,
        }


async def read(
    original: asyncpg.Connection,
    ours: asyncpg.Connection,
    runners: Runners,
    *,
    schema: str = "public",
    lookup: str | None = None,
) -> Import:
    """The definitions, made and checked. Raises UsageError where the tables are not there.

    `lookup` is where sequences with external data get them from.
    """
    rows = await original.fetch(QUERIES["original_columns"], schema)
    for table, columns in _TABLES.items():
        present = {row["column"] for row in rows if row["table"] == table}
        if missing := sorted(columns - present):
            raise UsageError(
                f"{schema}.{table} has no column {', '.join(missing)}: name the schema of the "
                "original's tables with --schema, and their database with --database"
            )
    steps: dict[str, list[asyncpg.Record]] = {}
    for row in await original.fetch(_query("original_steps", schema)):
        steps.setdefault(row["sequence"], []).append(row)
    repeated = {row[0] for row in await original.fetch(_query("original_repeated", schema))}
    sequences = await original.fetch(_query("original_sequences", schema))
    names = _names(sequences)
    present = await ours.fetch(QUERIES["documents"], list(names.values()))
    here = {row["name"]: json.loads(row["document"]) for row in present}
    found = Import()
    for row in sequences:
        name, own = names[row["id"]], _in_order(row["first_step"], steps.get(row["id"], []))
        where = f"{name} (sequence {row['id']})"
        if wrong := _wrong(row["first_step"], own):
            found.errors.append(f"{where}: {wrong}")
            continue
        step_names = {step["id"]: f"{step['type']}-{step['id']}" for step in own}
        document = here.get(name)
        if document is None:
            reads_external = any(step["reads_external"] for step in own)
            if reads_external and lookup is None:
                found.errors.append(f"{where} reads external data: say from where, --lookup NAME")
                continue
            document = {
                **DEFAULTS,
                "name": name,
                "reentry": "always" if row["id"] in repeated else "after_end",
                "lookup": lookup if reads_external else None,
                "steps": _steps(own, step_names),
            }
        definition, findings = _check(document, runners)
        if name not in here:
            for finding in findings:
                told = found.errors if finding.is_error else found.warnings
                told.append(": ".join(filter(None, (where, finding.step, finding.message))))
            found.definitions += [definition] if definition else []
        known = {step["name"] for step in document["steps"]}
        found.sequences[row["id"]] = Sequenced(
            name,
            name in here,
            {id_: step for id_, step in step_names.items() if step in known},
            _goals_met(definition.sequence) if definition else {},
        )
    return found


def _query(name: str, schema: str) -> str:
    return QUERIES[name].format(schema='"' + schema.replace('"', '""') + '"')


def _names(sequences: Iterable[asyncpg.Record]) -> dict[str, str]:
    """Of each sequence by its id: its title, if no other has the same."""
    titles = {row["id"]: (row["title"] or "").strip() for row in sequences}
    count = Counter(titles.values())
    return {
        id_: title if title and count[title] == 1 else f"{title or 'sequence'} {id_}"
        for id_, title in titles.items()
    }


def _in_order(first: str | None, rows: Sequence[asyncpg.Record]) -> list[asyncpg.Record]:
    """Along the ways, the first step first; what none of them reaches, such as goals, behind it."""
    by_id = {row["id"]: row for row in rows}

    def following(id_: str) -> list[str]:
        row = by_id[id_]
        return [there for there in (row["next"], row["alt_next"]) if there in by_id]

    starts = [id_ for id_ in (first, *by_id) if id_ in by_id]
    return [by_id[id_] for id_, _ in graph.walk(starts, following, depth_first=True)]


def _wrong(first: str | None, steps: Sequence[asyncpg.Record]) -> str | None:
    """Why it can't be a sequence at all."""
    ids = {step["id"] for step in steps}
    if first not in ids:
        return f"its firstStep {first} does not exist there"
    for step in steps:
        for column, id_ in (("nextStep", step["next"]), ("altNextStep", step["alt_next"])):
            if id_ is not None and id_ not in ids:
                return f"step {step['id']}: its {column} {id_} does not exist there"
        try:
            json.loads(step["config"] or "{}")
        except ValueError as error:
            return f"step {step['id']}: its config is no JSON: {error}"
    return None


def _steps(rows: Sequence[asyncpg.Record], names: Mapping[str, str]) -> list[dict[str, Any]]:
    return [
        {
            "name": names[row["id"]],
            "type": row["type"],
            "config": json.loads(row["config"] or "{}"),
            "next": names.get(row["next"] or ""),
            "altNext": names.get(row["alt_next"] or ""),
        }
        for row in rows
    ]


def _check(
    document: Document, runners: Runners
) -> tuple[Definition | None, Sequence[files.Finding]]:
    """As a file would be."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "sequence.yaml")
        file.write_text(to_yaml(document), encoding="utf-8")
        definitions, findings = files.read_files([file], runners)
    return definitions[0] if definitions else None, findings


def _goals_met(sequence: model.Sequence) -> dict[str, list[str]]:
    """For each step, the goals that whoever stands there must have met: no way leads around them.

    The original kept no record of that, and a goal pulls once.
    """

    def reached(start: str, but: str | None = None) -> set[str]:
        starts = [] if start == but else [start]
        return graph.reach(starts, lambda name: [t for t in targets(name, sequence) if t != but])

    met: dict[str, list[str]] = {}
    for goal in reversed(sequence.goals):
        around = reached(sequence.first_step, but=goal.name)
        for name in reached(goal.name) - around - {goal.name}:
            met.setdefault(name, []).append(goal.name)
    return met


# --- the people


class Person(NamedTuple):
    """An enrollment to be, in the columns of `import_people`."""

    sequence: str
    step: str
    subject: str
    status: str
    created_at: datetime
    entered_at: datetime | None
    ended_at: datetime | None
    goals_met: str  # a line each


async def apply(
    original: asyncpg.Connection,
    ours: asyncpg.Connection,
    found: Import,
    runners: Runners,
    *,
    schema: str = "public",
) -> None:
    """Writes all that was read, in a transaction of the caller's, and counts the people."""
    await plan.apply(ours, found.definitions, runners)
    batch: list[Person] = []
    async with original.transaction(readonly=True):
        await original.execute(QUERIES["use_utc"])
        async for row in original.cursor(_query("original_runners", schema), prefetch=BATCH):
            person = _person(row, found.sequences)
            if isinstance(person, str):
                found.left_out.setdefault(person, []).append(row["id"])
                continue
            batch.append(person)
            if len(batch) == BATCH:
                await _write(ours, batch, found)
                batch.clear()
    if batch:
        await _write(ours, batch, found)


async def _write(ours: asyncpg.Connection, batch: Sequence[Person], found: Import) -> None:
    columns = map(list, zip(*batch, strict=True))
    for row in await ours.fetch(QUERIES["import_people"], *columns):
        found.people[row["sequence"], row["status"]] += row["count"]
        found.already_here -= row["count"]
    found.already_here += len(batch)


def _person(row: asyncpg.Record, sequences: Mapping[str, Sequenced]) -> Person | str:
    """Of a row of `runners`; or why there can be none."""
    sequence = sequences.get(row["sequence"] or "")
    created_at = row["started_at"] or row["entered_at"]
    ended_at = row["ended_at"] or row["entered_at"] or created_at
    if sequence is None:
        return "in no sequence that is brought over"
    step = sequence.step_names.get(row["step"] or "")
    if row["is_active"] and step is None:
        return "active, and at no step of the sequence"
    if not 1 <= len((row["subject"] or "").encode()) <= LONGEST_SUBJECT:
        return "no dataLookup, or a longer one than 1,000 bytes"
    if not row["possible"]:
        return "a time before 1900 or after 9998"
    if created_at is None:
        return "neither startSequence nor startStep"
    step = step or next(iter(sequence.step_names.values()))
    status = "active" if row["is_active"] else "completed" if row["ended_at"] else "cancelled"
    return Person(
        sequence.name,
        step,
        row["subject"],
        status,
        created_at,
        row["entered_at"] or created_at,
        None if row["is_active"] else ended_at,
        "\n".join(sequence.goals_met.get(step, ())),
    )
