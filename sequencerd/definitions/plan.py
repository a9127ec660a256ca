"""Plan and apply: the changes to definitions, and their effect on enrollments."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import datetime
from typing import Any

import asyncpg

from sequencerd.core.advance import advance, is_unchanged
from sequencerd.core.config import nearest
from sequencerd.core.decision import Execute, Fail, QueryLookup, Wait
from sequencerd.core.describe import counted, text
from sequencerd.core.enrollment import Enrollment
from sequencerd.core.model import Definitions, InvalidStep, Limit, SideEffect
from sequencerd.core.schedule import SOURCE
from sequencerd.core.step_types import is_instant
from sequencerd.core.view import no_holidays
from sequencerd.definitions.compiler import (
    Definition,
    Runners,
    calendars,
    from_rows,
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
from sequencerd.definitions.stored import as_stored
from sequencerd.errors import FileError, PlanError
from sequencerd.storage import connections, server, sources
from sequencerd.storage.statements import QUERIES

BATCH_SIZE = 5000  # enrollments read at a time
QUERY_TIMEOUT = 30.0  # seconds for the query of the key `enroll`


@dataclass(slots=True)
class WaitingCounts:
    """Numbers of enrollments at a changed step, by what happens to them."""

    step: str
    total: int = 0
    at_once: int = 0
    later: int = 0
    as_before: int = 0
    executing: int = 0
    first: datetime | None = None  # when their waits end, if that changes
    last: datetime | None = None
    unknown: int = 0  # their number depends on external data
    limited: int = 0  # their number depends on limits
    failing: int = 0
    failure: str | None = None  # of the first of them

    def line(self, *, done: bool) -> str:
        """Describe the counts in a sentence, before the change or after it is `done`."""
        continues = ("continues", "continue") if done else ("would continue",) * 2
        fails = ("fails", "fail") if done else ("would fail",) * 2
        parts: list[tuple[int, tuple[str, str], str]] = [
            (self.at_once, continues, " at once"),
            (self.limited, continues, " as soon as the limit has room"),
            (self.later, ("waits", "wait"), f" until another time{self._times()}"),
            (self.as_before, ("waits", "wait"), " as before"),
            (
                self.executing,
                ("is being executed and finishes", "are being executed and finish"),
                " unchanged",
            ),
            (self.unknown, ("depends", "depend"), " on external data"),
            (self.failing, fails, f": {self.failure}"),
        ]
        counts = ", ".join(f"{counted(n, *verb)}{words}" for n, verb, words in parts if n)
        return f"{counted(self.total, 'waits', 'wait')} at {self.step}: {counts}" if counts else ""

    def add_later(self, until: datetime) -> None:
        """Count an enrollment that waits until another time."""
        self.later += 1
        self.first = min(self.first or until, until)
        self.last = max(self.last or until, until)

    def _times(self) -> str:
        if self.first is None or self.last is None:
            return ""
        times = dict.fromkeys(map(text, (self.first, self.last)))
        return f", {' to '.join(times)}"

    def add(self, other: WaitingCounts) -> None:
        """Add the counts for the same step in another shard."""
        for count in fields(self):
            if count.type == "int":
                setattr(self, count.name, getattr(self, count.name) + getattr(other, count.name))
        self.first = min(filter(None, (self.first, other.first)), default=None)
        self.last = max(filter(None, (self.last, other.last)), default=None)
        self.failure = self.failure or other.failure


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
        if concerned := _concerned(one.changes, definition):
            if everything is None:  # enrollments may continue in other sequences
                seeded = [
                    replace(d, sequence=d.seeded(seeds(m.after)))
                    for d, m in zip(definitions, made, strict=True)
                ]
                everything = await _everything(connection, known, seeded, runners)
            waiting = [await _count(connection, one, step, everything) for step in concerned]
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


# --- the enrollments


def _concerned(changes: SequenceDiff, definition: Definition) -> list[str]:
    """Return the steps whose enrollments will be rescheduled: those that the triggers mark."""
    if changes.is_new:
        return []
    steps = definition.sequence.steps
    altered = {
        name
        for name, keys in changes.changed.items()
        if any(key == "type" or key.startswith("config.") for key in keys)
    }
    goals = {goal.name for goal in definition.sequence.goals}
    concerns_all = changes.settings.keys() & {
        "timezone",
        "lookup",
        "recheck",
        "window",
    } or goals & (altered | changes.added.keys())
    follows_topic = "topic" in changes.settings
    return [
        name
        for name, step in steps.items()
        if name in altered
        or (concerns_all and name not in changes.added)
        or (follows_topic and name not in changes.added and not is_instant(step.type))
    ]


async def _everything(
    connection: asyncpg.Connection,
    names: Iterable[str],
    definitions: Iterable[Definition],
    runners: Runners,
) -> Definitions:
    """Return all sequences as they would be after the change."""
    wanted = list(names)
    steps: dict[str, list[asyncpg.Record]] = {name: [] for name in wanted}
    for row in await connection.fetch(QUERIES["steps"], wanted):
        steps[row["sequence"]].append(row)
    found = {
        row["name"]: replace(from_rows(row, steps[row["name"]], runners), paused=False)
        for row in await connection.fetch(QUERIES["sequences"], wanted)
    }
    return found | await as_stored(
        connection, [replace(one.sequence, paused=False) for one in definitions]
    )


async def _count(
    connection: asyncpg.Connection, one: SequencePlan, name: str, definitions: Definitions
) -> WaitingCounts:
    """Evaluate all enrollments at a step, with one batch in memory at a time, and count the
    outcomes.
    """
    old_names = {new: old for old, new in one.changes.renamed.items()}
    old_name = old_names.get(name, name)
    count = WaitingCounts(name)
    now = await server.server_time(connection)
    async with connection.transaction():  # a cursor needs one
        async for rows in connections.batches(
            connection,
            "waiting",
            QUERIES["enrollments_at"],
            one.sequence,
            old_name,
            size=BATCH_SIZE,
        ):
            for row in rows:
                enrollment = Enrollment(*row)
                if name != old_name:
                    enrollment = enrollment._replace(step=name)
                _classify(count, enrollment, definitions, now)
    return count


def _classify(
    count: WaitingCounts, before: Enrollment, definitions: Definitions, now: datetime
) -> None:
    count.total += 1
    if before.leased_by is not None:
        count.executing += 1
        return
    after = advance(definitions, before, now)
    match after.decision:
        case Wait() if after.enrollment.visit == before.visit and is_unchanged(before, after):
            count.as_before += 1
        case Wait(until) if after.enrollment.visit == before.visit:
            count.add_later(until)
        case QueryLookup():
            count.unknown += 1
        case Execute() if after.decision.reservations:
            count.limited += 1
        case Fail(failure, message):
            count.failing += 1
            count.failure = count.failure or f"{failure}, {message}"
        case _:
            count.at_once += 1


# --- apply

MAX_REMOVALS = 10  # attempts to remove steps at which enrollments arrive


async def apply(
    connection: asyncpg.Connection,
    definitions: Sequence[Definition],
    runners: Runners,
) -> Plan:
    """Change the database's sequences to the definitions, in the caller's transaction. Raises
    PlanError if the plan cannot be applied; FileError if the database rejects a definition.
    """
    await connection.execute(QUERIES["lock_definitions"])
    plan = await make(connection, definitions, runners)
    check(plan)
    await write(connection, plan, definitions)
    return plan


def check(plan: Plan, expected: str | None = None) -> None:
    """Raise PlanError if a plan cannot be applied, or does not have the `expected` fingerprint."""
    if expected is not None and plan.fingerprint != expected:
        raise PlanError(
            f"plan {expected} no longer holds: the files, the options or the sequences have "
            "changed since; make a new one with sequencerd plan"
        )
    if plan.refused:
        raise PlanError("\n".join(plan.refused))


async def write(
    connection: asyncpg.Connection,
    plan: Plan,
    definitions: Sequence[Definition],
    *,
    brake: int | None = None,
    from_files: bool = True,
) -> None:
    """Apply a plan of `make`, in the same transaction, which has locked the definitions. `brake` is
    the number of side effects that may begin in an hour, for a day, in the sequences that change.
    Raises FileError if the database rejects a definition.
    """
    written = zip(plan.sequences, definitions, strict=True)
    # by name, like the brakes that daemons lock
    for one, definition in sorted(written, key=lambda pair: pair[0].sequence):
        if one.changes:
            try:
                await _write(connection, one, definition)
            except (asyncpg.IntegrityConstraintViolationError, asyncpg.DataError) as error:
                raise FileError(f"{definition.where}: {error}") from error
    if brake is not None:
        changed = [one.sequence for one in plan.sequences if one.changes]
        await connection.execute(QUERIES["set_apply_brake"], changed, brake)
    if plan.archived:
        await connection.execute(QUERIES["archive"], plan.archived)
    if from_files:
        await connection.execute(QUERIES["mark_from_file"], [s.sequence for s in plan.sequences])


async def _write(connection: asyncpg.Connection, one: SequencePlan, definition: Definition) -> None:
    steps = one.after["steps"]
    names = [kept["name"] for kept in steps]
    reentry, brake = one.after["reentry"], one.after["brake"]
    await connection.execute(
        QUERIES["apply_sequence"],
        one.sequence,
        names[0],
        one.after["timezone"],
        one.after["status"],
        "after" if isinstance(reentry, dict) else reentry,
        one.after["lookup"],
        definition.sequence.recheck,
        one.after["description"],
        "{amount} {unit}".format(**reentry["after"]) if isinstance(reentry, dict) else None,
        None if one.after["window"] is None else json.dumps(one.after["window"]),
        json.dumps(one.after["enroll"]) if one.after["enroll"] else None,
        one.after["topic"],
        one.after["locale"],
        json.dumps(one.after["partials"]) if one.after["partials"] else None,
        brake and brake["at_most"],
        brake and brake["per"]["amount"] * (3600.0 if brake["per"]["unit"] == "hours" else 1.0),
    )
    for old, new in one.changes.renamed.items():
        await connection.execute(QUERIES["rename_step"], one.sequence, old, new)
    await connection.execute(
        QUERIES["apply_steps"],
        one.sequence,
        names,
        list(range(len(steps))),
        [kept["type"] for kept in steps],
        [json.dumps(kept["config"]) for kept in steps],
        [kept["next"] for kept in steps],
        [kept["altNext"] for kept in steps],
        [seeds(one.after).get(name) for name in names],
    )
    await _remove_steps(connection, one, names)


async def _remove_steps(
    connection: asyncpg.Connection, one: SequencePlan, names: Sequence[str]
) -> None:
    """Delete the steps that are not in `names`, and move their enrollments as planned. Daemons may
    move more enrollments there at any time. Raises PlanError if one that has arrived since the plan
    cannot be moved.
    """
    for attempt in range(1, MAX_REMOVALS + 1):
        for old, new in one.moves.items():
            while await connection.fetchval(QUERIES["move_enrollments"], one.sequence, old, new):
                pass
        try:
            async with connection.transaction():
                await connection.execute(QUERIES["remove_steps"], one.sequence, names)
        except asyncpg.ForeignKeyViolationError as error:
            if (error.table_name, error.column_name) != ("steps", "name"):
                raise  # not of guard_step
            if not one.moves or attempt == MAX_REMOVALS:
                raise PlanError(
                    f"{one.sequence}: {error.args[0]}; they arrived after the plan was made: "
                    "specify where to continue (--move OLD=STEP), or apply it again"
                ) from error
        else:
            return
