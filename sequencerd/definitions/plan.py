"""Plans: what applying definitions changes."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import asyncpg

from sequencerd.core.config import nearest
from sequencerd.core.describe import counted
from sequencerd.core.model import Definitions, InvalidStep, Limit, SideEffect
from sequencerd.core.schedule import SOURCE
from sequencerd.core.step_types import is_instant
from sequencerd.core.view import no_holidays
from sequencerd.definitions import affected
from sequencerd.definitions.affected import WaitingCounts
from sequencerd.definitions.compiler import (
    Definition,
    Runners,
    calendars,
    parse_holidays,
    parse_topic_limits,
)
from sequencerd.definitions.diff import (
    SequenceDiff,
    SequenceDocument,
    compare,
    parse_document,
    seeds,
)
from sequencerd.definitions.drawing import Edge, edges
from sequencerd.errors import FileError
from sequencerd.storage import sources
from sequencerd.storage.statements import QUERIES

QUERY_TIMEOUT = 30.0  # seconds for the query of the key `enroll`


@dataclass(frozen=True, slots=True)
class ScheduledEntries:
    """The number of enrollments that a scheduled run would create now."""

    source: str
    found: int
    at_most: int
    faults: Mapping[str, int]  # of rows, with how many have them

    def __str__(self) -> str:
        text = f"{self.found:,} of {self.source} would enter now"
        if self.found > self.at_most:
            text = (
                f"more than at_most = {self.at_most} of {self.source} would enter now: none would"
            )
        return "; ".join(
            [text, *(f"{counted(count, 'row')} {fault}" for fault, count in self.faults.items())]
        )


@dataclass(frozen=True, slots=True)
class StepReference:
    """A step of another sequence that names a removed step in its config."""

    sequence: str
    step: str
    target: str


@dataclass(frozen=True, slots=True)
class SequencePlan:
    """The plan for one sequence."""

    sequence: str
    revision: int | None  # before; None where the sequence is new
    changes: SequenceDiff
    after: SequenceDocument
    moves: Mapping[str, str] = field(default_factory=dict)  # new step by removed step
    at_step: Mapping[str, int] = field(default_factory=dict)  # enrollments at removed steps
    named: tuple[StepReference, ...] = ()  # removed steps that other sequences name
    waiting: tuple[WaitingCounts, ...] = ()
    empty_calendars: tuple[str, ...] = ()  # holiday calendars that are missing
    missing: tuple[str, ...] = ()  # sequences and steps that it names and that do not exist
    entering: ScheduledEntries | str | None = None  # by its schedule; or why the number is unknown
    unlisted_topics: tuple[str, ...] = ()  # as sentences
    limits: tuple[str, ...] = ()  # limits that begin, end or change, as sentences
    shards: tuple[str, ...] = ()  # the shards to which the plan applies, if there are several

    def lines(self, *, done: bool) -> Iterator[str]:
        """Yield a line for each change, and one for the enrollments at each changed step."""
        yield from self.changes.lines()
        yield from map(no_holidays, self.empty_calendars)
        yield from self.missing
        yield from self.unlisted_topics
        yield from self.limits
        for old, count in self.at_step.items():
            if new := self.moves.get(old):
                moves = counted(count, "moves", "move")
                yield f"{moves} from {old} to {new}, where a new visit begins"
        yield from filter(None, (waiting.line(done=done) for waiting in self.waiting))
        if self.entering:
            yield str(self.entering)
        if self.waiting and self.after["status"] == "paused":
            yield "nothing is executed while it is paused"


@dataclass(frozen=True, slots=True)
class Plan:
    """The changes that applying some definitions makes."""

    sequences: tuple[SequencePlan, ...]
    archived: tuple[str, ...]
    refused: tuple[str, ...]
    fingerprint: str
    differing: frozenset[str] = frozenset()  # sequences that differ between shards

    def __bool__(self) -> bool:
        """Return whether anything changes."""
        return bool(self.archived) or any(one.changes for one in self.sequences)

    def lines(self, *, done: bool) -> Iterator[str]:
        """Yield the plan as text."""
        for one in self.sequences:
            heading = "new" if one.changes.is_new else "" if one.changes else "nothing changed"
            where = f" in {', '.join(one.shards)}" if one.sequence in self.differing else ""
            yield f"{one.sequence}{where}: {heading}".rstrip()
            yield from (f"  {line}" for line in one.lines(done=done))
        for name in self.archived:
            yield f"{name}:\n  archived, because it is in none of the files"
        if self.differing and not done:
            names = ", ".join(sorted(self.differing))
            yield f"the shards have different definitions of {names}"

    def as_dict(self) -> dict[str, Any]:
        """Return the plan for JSON."""
        return {
            "plan": self.fingerprint,
            "sequences": [
                {
                    "sequence": one.sequence,
                    "revision": one.revision,
                    **asdict(one.changes),
                    "moves": dict(one.moves),
                    "at_step": dict(one.at_step),
                    "entering": one.entering and str(one.entering),
                    "waiting": [asdict(waiting) for waiting in one.waiting],
                    "empty_calendars": one.empty_calendars,
                    "missing": one.missing,
                    "unlisted_topics": one.unlisted_topics,
                    "limits": one.limits,
                    **({"shards": one.shards} if one.shards else {}),
                }
                for one in self.sequences
            ],
            "archived": self.archived,
            "refused": self.refused,
        }


async def make(
    connection: asyncpg.Connection,
    definitions: Sequence[Definition],
    runners: Runners,
    *,
    moves: Mapping[str, str] | None = None,
    prune: bool = False,
) -> Plan:
    """Return what `apply` would do. Only reads, in the caller's transaction.

    `moves` maps removed steps to the steps to which their enrollments move. `prune` archives
    sequences that were applied from files and are not among the definitions. Raises FileError for
    values that PostgreSQL cannot store.
    """
    names = [definition.sequence.name for definition in definitions]
    rows = await connection.fetch(QUERIES["documents"], names)
    known = {row["name"]: row for row in rows}
    renames = {
        name: definition.pending_renames(seeds(parse_document(name, known[name]["document"])))
        for name, definition in zip(names, definitions, strict=True)
        if name in known
    }
    made = [
        replace(
            await _make_one(connection, definition, known.get(name), moves or {}, renames),
            missing=await _missing(connection, definition, names),
        )
        for name, definition in zip(names, definitions, strict=True)
    ]
    everything: Definitions | None = None
    for number, (one, definition) in enumerate(zip(made, definitions, strict=True)):
        if steps := affected.rescheduled_steps(one.changes, definition):
            if everything is None:  # enrollments may continue in other sequences
                seeded = [
                    replace(d, sequence=d.seeded(seeds(m.after)))
                    for d, m in zip(definitions, made, strict=True)
                ]
                everything = await affected.changed_definitions(connection, known, seeded, runners)
            waiting = [
                await affected.count_waiting(
                    connection, one.sequence, step, one.changes.renamed, everything
                )
                for step in steps
            ]
            made[number] = replace(one, waiting=tuple(w for w in waiting if w.total))
    archived = [
        name
        for name, row in known.items()
        if prune and row["from_file"] and row["status"] != "archived" and name not in names
    ]
    facts = [[s.sequence, s.revision, s.after, s.changes.renamed, s.moves] for s in made]
    facts += [[name, known[name]["revision"]] for name in archived]
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    return Plan(
        tuple(made),
        tuple(archived),
        tuple(refusals(made, names, moves or {})),
        digest[:12],
    )


async def _make_one(
    connection: asyncpg.Connection,
    definition: Definition,
    row: asyncpg.Record | None,
    moves: Mapping[str, str],
    renames: Mapping[str, Mapping[str, str]],
) -> SequencePlan:
    before = parse_document(row["name"], row["document"]) if row else None
    after = await _document(connection, definition, before)
    changes = compare(before, after, renames)
    at_step = {}
    for name in changes.removed:
        at_step[name] = await connection.fetchval(QUERIES["count_at"], after["name"], name)
    return SequencePlan(
        sequence=after["name"],
        revision=row["revision"] if row else None,
        changes=changes,
        after=after,
        moves={old: new for old, new in moves.items() if old in changes.removed},
        at_step={name: count for name, count in at_step.items() if count},
        named=tuple(
            StepReference(*row)
            for row in await connection.fetch(
                QUERIES["named_elsewhere"], after["name"], changes.removed
            )
        ),
        empty_calendars=await _empty_calendars(connection, definition),
        entering=await _entering(connection, definition),
        unlisted_topics=await _unlisted_topics(connection, definition),
        limits=await _limits(connection, before, after, changes.renamed),
    )


async def _empty_calendars(
    connection: asyncpg.Connection, definition: Definition
) -> tuple[str, ...]:
    sequence = definition.sequence
    wanted = {name for step in sequence.steps.values() for name in calendars(step, sequence)}
    if not wanted:
        return ()
    known = parse_holidays(await connection.fetchval(QUERIES["holidays"]))
    return tuple(sorted(wanted - known.keys()))


async def _missing(
    connection: asyncpg.Connection, definition: Definition, planned: Collection[str]
) -> tuple[str, ...]:
    """Describe which steps lead to a sequence or step that does not exist, and a lookup that is no
    SQL function, although it is named like one. Names in `planned` sequences were already checked
    with their files.
    """
    found = [edge for edge in edges(definition.sequence) if edge.sequence not in (None, *planned)]
    rows = await connection.fetch(
        QUERIES["missing_targets"],
        [edge.sequence for edge in found],
        [edge.target for edge in found],
    )
    missing = dict.fromkeys(_missing_target(found[number - 1]) for (number,) in rows)
    lookup = SOURCE.fullmatch(definition.sequence.lookup or "")
    if lookup and not await connection.fetchval(QUERIES["is_lookup"], *lookup.groups()):
        name = lookup[0]
        missing[f"lookup {name!r} does not exist: create the function {name}(text[])"] = None
    return tuple(missing)


def _missing_target(edge: Edge) -> str:
    does = edge.label if edge.target is None else "leads to"
    step = "" if edge.target is None else f"step {edge.target!r} of "
    return f"{edge.source} {does} {step}sequence {edge.sequence!r}, which does not exist"


async def _unlisted_topics(
    connection: asyncpg.Connection, definition: Definition
) -> tuple[str, ...]:
    """Describe topics missing from sequencer.topics, if it has any: they may be misspelt."""
    behaviours = (step.behaviour for step in definition.sequence.steps.values())
    effects = [one for one in behaviours if isinstance(one, SideEffect)]
    used = {effect.topic for effect in effects} | {definition.sequence.topic}
    used = (used | {effect.limit.topic for effect in effects if effect.limit}) - {None}
    listed = [row["name"] for row in await connection.fetch(QUERIES["topics"])] if used else []
    if not listed:
        return ()
    return tuple(
        f"topic {name!r} is not in the table topics; {nearest(str(name), listed)}"
        for name in sorted(used - {*listed}, key=str)
    )


async def _limits(
    connection: asyncpg.Connection,
    before: SequenceDocument | None,
    after: SequenceDocument,
    renamed: Mapping[str, str],
) -> tuple[str, ...]:
    """Describe the limits that begin, end or change, with their steps."""
    old, new = ({} if one is None else _limited(one) for one in (before, after))
    old = {renamed.get(name, name): one for name, one in old.items()}
    of_topics = parse_topic_limits(await connection.fetchval(QUERIES["topic_limits"]))
    lines: dict[str, list[str]] = defaultdict(list)
    for step, (limit, topic) in new.items():
        known, before_topic = old.get(step, (None, None))
        if limit != known:
            change = "limits" if known is None else "limits otherwise"
            lines["no longer limits" if limit is None else change].append(step)
        of_topic = of_topics.get(topic or "")
        if isinstance(of_topic, Limit) and (step not in old or topic != before_topic):
            lines[f"the limit of the topic {topic} ({of_topic.description}) applies to"].append(
                step
            )
        elif isinstance(of_topic, InvalidStep):
            lines[f"{of_topic.message}; it stops"].append(step)
    return tuple(
        f"{words} {counted(len(steps), 'step')}: {', '.join(steps)}"
        for words, steps in lines.items()
    )


def _limited(document: SequenceDocument) -> dict[str, tuple[Any, str | None]]:
    """Return the limits and topics of side effects, by step."""
    return {
        step["name"]: (
            step["config"].get("limit"),
            step["config"].get("topic", document.get("topic")),
        )
        for step in document["steps"]
        if not is_instant(step["type"])
    }


async def _entering(
    connection: asyncpg.Connection, definition: Definition
) -> ScheduledEntries | str | None:
    """Return the number of enrollments that a scheduled run would create now."""
    if (enroll := definition.enroll) is None:
        return None
    try:
        found, faults = await sources.read_source(
            connection, enroll.source, definition.sequence.name, enroll.at_most + 1, QUERY_TIMEOUT
        )
    except (asyncpg.PostgresError, ValueError) as error:
        return f"{enroll.source} cannot be read: {error}"
    return ScheduledEntries(enroll.source, len(found), enroll.at_most, faults)


async def _document(
    connection: asyncpg.Connection, definition: Definition, before: SequenceDocument | None
) -> SequenceDocument:
    """Return the document that the database will contain for a definition, as PostgreSQL makes it
    from the same values.
    """
    sequence = definition.sequence
    status = definition.status
    if status is None:  # a deployment does not end a manual pause
        status = "paused" if before and before["status"] == "paused" else "active"
    steps = sorted(sequence.steps.values(), key=lambda step: step.position)
    known_seeds = definition.seeds(seeds(before) if before else {})
    document = {
        "name": sequence.name,
        "description": definition.description,
        "timezone": sequence.timezone,
        "status": status,
        "reentry": definition.reentry,
        "lookup": sequence.lookup,
        "recheck": sequence.recheck.total_seconds(),
        "window": definition.window,
        "topic": sequence.topic,
        "locale": sequence.shared.locale,
        "partials": dict(sequence.shared.partials),
        "enroll": definition.enroll and definition.enroll.document(),
        "brake": definition.brake,
        "steps": [
            {
                "name": step.name,
                "type": step.type,
                "config": step.config,
                "next": step.next_step,
                "altNext": step.alt_next_step,
                **_seed(sequence.name, step.name, known_seeds),
            }
            for step in steps
        ],
    }
    try:
        # in a transaction of its own: a value that cannot be stored must not abort the caller's
        async with connection.transaction():
            text = await connection.fetchval(QUERIES["as_jsonb"], json.dumps(document))
    except asyncpg.DataError as error:
        raise FileError(f"{definition.where}: {error}") from error
    kept: SequenceDocument = json.loads(text)
    return kept


def _seed(sequence: str, step: str, known_seeds: Mapping[str, str]) -> dict[str, str]:
    """Return the seed of a Split whose seed differs from its present names."""
    seed = known_seeds.get(step)
    return {} if seed in (None, f"{sequence}/{step}") else {"seed": seed}


def refusals(
    sequences: Iterable[SequencePlan], planned: Collection[str], moves: Mapping[str, str]
) -> Iterator[str]:
    """Yield the reasons why plans cannot be applied. Names in `planned` sequences were already
    checked with their files.
    """
    removed: set[str] = set()
    for one in sequences:
        yield from _refusals(one, planned)
        removed.update(one.changes.removed)
    for old, new in moves.items():
        if old not in removed:
            hint = f"; {nearest(old, sorted(removed))}" if removed else ""
            yield f"--move {old}={new}: these files do not remove a step {old!r}{hint}"


def _refusals(one: SequencePlan, planned: Collection[str]) -> Iterator[str]:
    names = [kept["name"] for kept in one.after["steps"]]
    for old, count in one.at_step.items():
        if old not in one.moves:
            yield (
                f"{one.sequence}: {counted(count, 'enrollment')} at {old}, which is removed; "
                f"specify where to continue: --move {old}=STEP"
            )
    for old, new in one.moves.items():
        if new not in names:
            hint = nearest(new, names)
            yield f"{one.sequence}: --move {old}={new}: step {new!r} does not exist; {hint}"
    for naming in one.named:
        if naming.sequence not in planned:
            yield (
                f"{one.sequence}: step {naming.target} is removed, but {naming.sequence}/"
                f"{naming.step} leads to it: change that sequence before, or in the same plan"
            )
