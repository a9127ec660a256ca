"""Read the original's sequences, and make and check the definitions of the new ones."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime

import asyncpg

from sequencerd.core import exact_json, graph, model
from sequencerd.core.config import nearest
from sequencerd.definitions import files, yaml_reader
from sequencerd.definitions.check import targets
from sequencerd.definitions.compiler import Definition, Runners
from sequencerd.definitions.diff import SequenceDocument
from sequencerd.definitions.original.report import ImportedSequence, ImportReport
from sequencerd.definitions.original.translate import (
    ImportChoices,
    OriginalStep,
    in_order,
    leads_to,
    step_name,
    translate,
)
from sequencerd.definitions.yaml_writer import DEFAULTS, to_yaml
from sequencerd.errors import UsageError
from sequencerd.storage import server
from sequencerd.storage.statements import QUERIES

_TABLES = {
    "sequences": {"id", "title", "firstStep"},
    "steps": {
        "id",
        "sequenceId",
        "nextStep",
        "altNextStep",
        "type",
        "config",
        "requiresExternalData",
    },
    "runners": {
        "id",
        "dataLookup",
        "sequenceId",
        "stepId",
        "isActive",
        "startSequence",
        "endSequence",
        "startStep",
    },
}


@dataclass(frozen=True, slots=True)
class ImportSource:
    """Where the original's tables are, and which sequences to import."""

    connection: asyncpg.Connection
    schema: str = "public"
    lookup: str | None = None  # of sequences that require external data
    only: Sequence[str] = ()  # names, titles or ids; empty: all
    choices: ImportChoices = field(default_factory=ImportChoices)

    def query(self, name: str, columns: Mapping[str, str] | None = None) -> str:
        """Return a statement on the tables. `columns` are those that not every version has."""
        schema = '"' + self.schema.replace('"', '""') + '"'
        return QUERIES[name].format(schema=schema, **columns or {})

    async def optional(self) -> dict[str, str]:
        """Return the optional columns that exist. Raises UsageError for a missing required one."""
        rows = await self.connection.fetch(QUERIES["original_columns"], self.schema)
        present = {(row["table"], row["column"]) for row in rows}
        tables = {table for table, _ in present}
        for table, columns in _TABLES.items():
            if missing := sorted(c for c in columns if (table, c) not in present):
                name = f"{self.schema}.{table}"
                fault = f"{name} has no column {', '.join(missing)}"
                raise UsageError(
                    f"{fault if table in tables else f'there is no table {name}'}: name the schema "
                    "of the original's tables with --schema, and their database with --database"
                )
        has_created = ("runners", "createdAt") in present
        has_description = ("sequences", "description") in present
        return {
            "created": 'r."createdAt"' if has_created else "NULL",
            "description": "description" if has_description else "NULL",
        }


async def read(source: ImportSource, ours: asyncpg.Connection, runners: Runners) -> ImportReport:
    """Read and check the definitions. Raises UsageError if the tables do not exist.

    A sequence that cannot be imported is reported, and does not prevent the import of others.
    """
    columns = await source.optional()
    rows: dict[str, list[OriginalStep]] = {}
    for found in await source.connection.fetch(source.query("original_steps")):
        sequence, *values = found
        rows.setdefault(sequence, []).append(OriginalStep(*values))
    sequences = await source.connection.fetch(source.query("original_sequences", columns))
    names = _names(sequences)
    wanted = _wanted(sequences, names, source.only)
    repeated = await source.connection.fetch(source.query("original_repeated"))
    reading = _ImportReader(
        source,
        {id_: in_order(first, rows.get(id_, [])) for id_, _, _, first in sequences},
        {row[0] for row in repeated},
        await server.server_time(ours),
    )
    await reading.find_present(ours, sequences, names)
    reading.result.sequences = {
        row["id"]: reading.present[row["id"]] for row in wanted if row["id"] in reading.present
    }
    reading.result.unwanted = {row["id"] for row in sequences} - {row["id"] for row in wanted}
    for id_, title, description, first in wanted:
        if id_ not in reading.present:
            reading.add(id_, title or "", names[id_], description, first)
    reading.make()
    reading.check(runners)
    return reading.result


def _names(sequences: Iterable[asyncpg.Record]) -> dict[str, str]:
    """Return the name of each sequence by its id: its title, if that is unique."""
    titles = {row["id"]: (row["title"] or "").strip() for row in sequences}
    count = Counter(titles.values())
    numbered = {id_ for id_, title in titles.items() if not title or count[title] > 1}
    while True:
        names = {id_: f"{titles[id_] or 'sequence'} {id_}" for id_ in numbered}
        taken = {*names.values()}  # a title may look like one of these
        same = {id_ for id_, title in titles.items() if id_ not in numbered and title in taken}
        if not same:
            return titles | names
        numbered |= same


def _wanted(
    sequences: Sequence[asyncpg.Record], names: Mapping[str, str], only: Sequence[str]
) -> list[asyncpg.Record]:
    known = [
        name for row in sequences for name in (names[row["id"]], row["title"] or "", row["id"])
    ]
    for name in only:
        if name not in known:
            hint = nearest(name, [*names.values()])
            raise UsageError(f"--only {name}: the original has no such sequence; {hint}")
    return [
        row
        for row in sequences
        if not only or {names[row["id"]], row["title"] or "", row["id"]} & set(only)
    ]


@dataclass(slots=True)
class _NewSequence:
    """A sequence that is not here yet."""

    title: str
    name: str
    description: str | None
    where: str


class _ImportReader:
    """Reads the sequences once: those that are present here, the new ones, and the result."""

    def __init__(
        self,
        source: ImportSource,
        rows: Mapping[str, Sequence[OriginalStep]],
        repeated: set[str],
        now: datetime,
    ) -> None:
        self.result = ImportReport()
        self.present: dict[str, ImportedSequence] = {}
        self._source = source
        self._rows = rows
        self._repeated = repeated
        self._now = now
        self._new: dict[str, _NewSequence] = {}
        self._taken: set[str] = set()  # whose names other sequences have here

    async def find_present(
        self,
        ours: asyncpg.Connection,
        sequences: Sequence[asyncpg.Record],
        names: Mapping[str, str],
    ) -> None:
        """Find the sequences that were imported before, whatever their names are by now."""
        marks = {f"{row['id']} {row['title'] or ''}": row["id"] for row in sequences}
        by_name = {names[row["id"]]: row["id"] for row in sequences}
        present = await ours.fetch(QUERIES["imported_sequences"], list(marks), list(by_name))
        for row in sorted(present, key=lambda row: row["original_id"] is None):
            id_ = marks[row["original_id"]] if row["original_id"] else by_name[row["name"]]
            if id_ in self.present:
                continue
            document = json.loads(row["document"])
            known = {step["name"] for step in document["steps"]}
            by_mark = json.loads(row["steps"])
            own = {step.id: by_mark.get(step.id, step_name(step)) for step in self._rows[id_]}
            step_names = {key: name for key, name in own.items() if name in known}
            if row["original_id"] or step_names:
                self.present[id_] = ImportedSequence(id_, "", True, document, step_names)
            else:
                self._taken.add(id_)

    def add(
        self, id_: str, title: str, name: str, description: str | None, first: str | None
    ) -> None:
        """Add a sequence that does not exist here, unless it is invalid."""
        rows, where = self._rows[id_], f"{name} (sequence {id_})"
        if first is None:
            self.result.warnings.append(f"{where}: a draft without a first step, not imported")
        elif id_ in self._taken:
            self.result.errors.append(
                f"{where}: another sequence has that name here; rename one of them"
            )
        elif problem := self._problem(first, rows):
            self.result.errors.append(f"{where}: {problem}")
        elif any(row.reads_external for row in rows) and self._source.lookup is None:
            self.result.errors.append(
                f"{where} reads external data: specify its lookup with --lookup NAME"
            )
        else:
            self._new[id_] = _NewSequence(title, name, description, where)

    def _problem(self, first: str, rows: Sequence[OriginalStep]) -> str | None:
        """Explain why a row cannot become a sequence."""
        if first not in {row.id for row in rows}:
            return f"its firstStep {first} does not exist there"
        known = {row.id for others in self._rows.values() for row in others}
        for row in rows:
            for column, id_ in (("nextStep", row.next), ("altNextStep", row.alt_next)):
                if id_ is not None and id_ not in known:
                    return f"step {row.id}: its {column} {id_} does not exist there"
            try:
                exact_json.dumps(exact_json.loads(row.config or "{}", exact=False))
            except (ValueError, RecursionError) as error:
                return f"step {row.id}: its config is not JSON: {error}"
        return None

    def make(self) -> None:
        """Make documents of the new sequences."""
        self._drop_dependent()
        elsewhere = {
            row.id: (new.name, step_name(row))
            for id_, new in self._new.items()
            for row in self._rows[id_]
        } | {
            step: (one.name, name)
            for one in self.present.values()
            for step, name in one.step_names.items()
        }
        for id_, new in self._new.items():
            rows = self._rows[id_]
            made = translate(rows, elsewhere, self._source.choices, self._now)
            self.result.warnings += [f"{new.where}: {text}" for text in made.warnings]
            self.result.errors += [f"{new.where}: {text}" for text in made.errors]
            document = {
                **DEFAULTS,
                "name": new.name,
                "description": new.description or None,
                "reentry": "always" if id_ in self._repeated else "after_end",
                "lookup": self._source.lookup if any(row.reads_external for row in rows) else None,
                "steps": made.steps,
            }
            step_names = {row.id: step_name(row) for row in rows}
            if not made.errors:
                self.result.sequences[id_] = ImportedSequence(
                    id_, new.title, False, document, step_names
                )
        self._new = {id_: new for id_, new in self._new.items() if id_ in self.result.sequences}

    def _drop_dependent(self) -> None:
        """Report new sequences that lead to one that is not imported, and to none of their own."""
        while True:
            here = {row.id for id_ in self._new for row in self._rows[id_]}
            here |= {step for one in self.present.values() for step in one.step_names}
            left = {
                id_: (row, target)
                for id_ in self._new
                for row in self._rows[id_]
                for target in leads_to(row, self._source.choices)
                if target is not None and target not in here
            }
            if not left:
                return
            for id_, (row, target) in left.items():
                new = self._new.pop(id_)
                self.result.sequences.pop(id_, None)
                self.result.errors.append(
                    f"{new.where}: step {row.id} leads to step {target} of a sequence that is not "
                    "imported"
                )

    def check(self, runners: Runners) -> None:
        """Check the new sequences as files would be, and all for what the enrollments must know."""
        result = self.result
        made = _check({id_: one.document for id_, one in result.sequences.items()}, runners)
        for id_, (definition, findings) in made.items():
            if id_ in self._new:
                where = self._new[id_].where
                for finding in findings:
                    reported = result.errors if finding.is_error else result.warnings
                    reported.append(": ".join(filter(None, (where, finding.step, finding.message))))
                if definition is None:
                    del result.sequences[id_]
        self._new = {id_: new for id_, new in self._new.items() if id_ in result.sequences}
        self._drop_dependent()
        for id_, one in result.sequences.items():
            definition, _ = made[id_]
            if definition is not None:
                one.goals_met = _goals_met(definition.sequence)
                result.definitions += [definition] if id_ in self._new else []


def _check(
    documents: Mapping[str, SequenceDocument], runners: Runners
) -> dict[str, tuple[Definition | None, list[files.FileFinding]]]:
    """Return each definition without errors, and all findings."""
    written = {id_: yaml_reader.parse(to_yaml(document)) for id_, document in documents.items()}
    definitions, findings = files.check_documents(written, runners)
    by_name = {definition.sequence.name: definition for definition in definitions}
    return {
        id_: (
            by_name.get(document["name"]),
            [finding for finding in findings if finding.origin == id_],
        )
        for id_, document in documents.items()
    }


def _goals_met(sequence: model.Sequence) -> dict[str, list[str]]:
    """Return for each step the goals that an enrollment there must have met on every path.

    The original kept no record of that, and a goal moves an enrollment once.
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
