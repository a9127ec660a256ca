"""Commands that show what would happen: simulate, graph."""

from __future__ import annotations

import argparse
import json
import os
import re
from collections import ChainMap, Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import asyncpg

from sequencerd.cli.commands import (
    connected,
    explain,
    has_database,
    on_shards,
    reading,
    report_missing,
)
from sequencerd.cli.ids import shard_of_id
from sequencerd.cli.output import say, say_json, say_lines, warn
from sequencerd.core import describe, model
from sequencerd.core.config import nearest
from sequencerd.core.enrollment import StepKey
from sequencerd.core.step_types import is_instant
from sequencerd.definitions import drawing, files
from sequencerd.definitions.check import known_paths, unknown_paths
from sequencerd.definitions.compiler import Definition, calendars
from sequencerd.definitions.options import read_object
from sequencerd.definitions.simulate import Simulation, TimelineEntry
from sequencerd.definitions.simulator import (
    OUTCOME_WORDS,
    Outcome,
    Simulator,
    choose,
    reached,
)
from sequencerd.definitions.started import StartedEnrollment, read_started
from sequencerd.definitions.stored import as_stored, read_sequences
from sequencerd.errors import ArgumentError, SequencerdError, UsageError
from sequencerd.settings import Settings
from sequencerd.storage import server
from sequencerd.storage.connections import Shard
from sequencerd.storage.every_shard import ask
from sequencerd.storage.statements import QUERIES
from sequencerd.testing import load, make_runners

MAX_ROUNDS = 2  # of a cycle


def simulate_command(arguments: argparse.Namespace, settings: Settings) -> int:
    if arguments.from_enrollment is not None:
        for option in ("data", "subject", "timezone", "start"):
            if getattr(arguments, option) is not None:
                raise ArgumentError(f"--{option} does not go with --from-enrollment")
        return on_shards(_simulate_enrollment)(arguments, settings)
    if arguments.file is None:
        raise ArgumentError("simulate needs a NAME or a FILE, or --from-enrollment ID")
    if not is_file(arguments.file):
        check_one_sequence(arguments.file, arguments.sequence)
        return on_shards(_simulate_present)(arguments, settings)
    simulator = load(arguments.file, outcomes=_outcomes(arguments), settings=settings)
    return _simulate(arguments, _with_holidays(simulator, arguments, settings))


def _with_holidays(
    simulator: Simulator, arguments: argparse.Namespace, settings: Settings
) -> Simulator:
    """Return the simulator of a file with the holidays and the limits of topics in the database, if
    one is configured. Warn of calendars without days.
    """
    found: dict[str, model.Sequence] = {}

    async def read(shard: Shard) -> dict[str, model.Sequence]:
        async with connected(shard) as connection:
            return await as_stored(connection, simulator.definitions.values())

    async def read_all(arguments: argparse.Namespace, _: Settings, shards: Sequence[Shard]) -> int:
        answers = await ask(explain(arguments), shards, read)
        found.update(merged_definitions(answers.found.values()))
        return report_missing(answers)

    why = "no database is configured"
    if has_database(settings):
        try:
            on_shards(read_all)(arguments, settings)
            return replace(simulator, definitions=found)
        except SequencerdError as error:
            why = str(error)
    sequences = reached(simulator.definitions, choose(simulator.definitions, arguments.sequence))
    used = {
        name for one in sequences for step in one.steps.values() for name in calendars(step, one)
    }
    if used:
        names = ", ".join(sorted(used))
        warn(f"sequencerd: no day is a holiday of {names}, which only the database knows: {why}")
    return simulator


async def _simulate_present(
    arguments: argparse.Namespace, settings: Settings, shards: Sequence[Shard]
) -> int:
    """Simulate a sequence in the database."""
    outcomes = _outcomes(arguments)
    runners = make_runners(settings, outcomes)

    async def read(shard: Shard) -> dict[str, model.Sequence]:
        async with connected(shard) as connection:
            return await read_sequences(connection, runners)

    answers = await ask(explain(arguments), shards, read)
    definitions = merged_definitions(answers.found.values())
    if str(arguments.file) not in definitions:
        report_missing(answers)
    arguments.sequence = choose(definitions, str(arguments.file))
    return _simulate(arguments, Simulator(definitions, runners, outcomes))


def merged_definitions(
    of_shards: Iterable[Mapping[str, model.Sequence]],
) -> dict[str, model.Sequence]:
    """Return the definitions of all shards: if one differs, that of the first."""
    return dict(ChainMap(*(dict(one) for one in of_shards)))


def _simulate(arguments: argparse.Namespace, simulator: Simulator) -> int:
    _check_types(arguments, simulator.definitions)
    if arguments.data is not None:
        _warn_of_paths(simulator, arguments, _outcomes(arguments))
    simulation = simulator.simulate(
        arguments.sequence,
        start=arguments.start or datetime.now(UTC).replace(microsecond=0),
        until=arguments.until,
        data=read_object(arguments.data or "{}", "--data", exact=True),
        subject=arguments.subject or "subject",
        timezone=arguments.timezone,
        changes=_changes(arguments),
        external=_external(arguments),
    )
    _print(simulation, arguments.json)
    return 0


def _warn_of_paths(
    simulator: Simulator, arguments: argparse.Namespace, outcomes: Mapping[str, Outcome]
) -> None:
    """Warn of paths that the simulation's data do not have."""
    answers = (one.get("data") for one in outcomes.values() if not isinstance(one, str))
    examples = [read_object(arguments.data, "--data"), *_changes(arguments).values()]
    examples += [answer for answer in answers if isinstance(answer, dict)]
    sequence = simulator.definitions[choose(simulator.definitions, arguments.sequence)]
    warn_of_paths(sequence, examples, _external(arguments))


def warn_of_paths(
    sequence: model.Sequence,
    examples: Iterable[Mapping[str, Any]],
    external: Mapping[str, Any] | None,
    step: str | None = None,
) -> None:
    """Warn of paths in a sequence, or in one step, that no example of data has."""
    for remark in unknown_paths(sequence, known_paths(examples, external)):
        if step in (None, remark.step):
            path = ".".join(map(str, remark.keys[1:]))
            warn(f"warning: {sequence.name}/{remark.step}: {path}: {remark.message}")


async def _simulate_enrollment(
    arguments: argparse.Namespace, settings: Settings, shards: Sequence[Shard]
) -> int:
    outcomes = _outcomes(arguments)
    runners = make_runners(settings, outcomes)
    id_ = arguments.from_enrollment
    shard = shard_of_id(shards, id_)
    from_file = [] if arguments.file is None else files.read_all([arguments.file], runners)

    async def read_all(
        shard: Shard,
    ) -> tuple[StartedEnrollment | None, dict[str, model.Sequence], datetime]:
        async with (
            connected(shard) as connection,
            connection.transaction(isolation="repeatable_read", readonly=True),
        ):
            present = await read_sequences(connection, runners)
            changed = [_with_stored_seeds(one, present) for one in from_file]
            return (
                await read_started(connection, id_.number),
                present | await as_stored(connection, changed),
                await server.server_time(connection),
            )

    started, definitions, now = (await ask(explain(arguments), [shard], read_all)).found[shard]
    if started is None:
        raise UsageError(f"enrollment {id_} does not exist")
    _check_types(arguments, definitions)
    simulation = Simulator(definitions, runners, outcomes).follow(
        started.enrollment,
        now,
        arguments.until,
        _changes(arguments),
        _external(arguments),
        enrolled=started.enrolled,
    )
    _print(simulation, arguments.json)
    return 0


def _with_stored_seeds(
    definition: Definition, present: Mapping[str, model.Sequence]
) -> model.Sequence:
    """Return a sequence from a file, with the seeds in the database."""
    known = present.get(definition.sequence.name)
    steps = known.steps if known else {}
    return definition.seeded({name: step.seed for name, step in steps.items()})


def _outcomes(arguments: argparse.Namespace) -> dict[str, Outcome]:
    """Parse --runner TYPE=OUTCOME, where OUTCOME is an action or the JSON object of an answer."""
    outcomes: dict[str, Outcome] = {}
    for given in arguments.runner:
        type_, _, text = given.partition("=")
        word = next((known for known in OUTCOME_WORDS if known == text), None)
        if not type_ or not (word or text.startswith("{")):
            raise ArgumentError(
                f"--runner {given!r}: use TYPE={'|'.join(OUTCOME_WORDS)}, or an answer such as "
                """'Score={"action": "next", "data": {"score": 80}}'"""
            )
        outcomes[type_] = word or read_object(text, "--runner")
    return outcomes


def _check_types(arguments: argparse.Namespace, definitions: Mapping[str, model.Sequence]) -> None:
    """Raise UsageError for a --runner that executes no step."""
    steps = (step for sequence in definitions.values() for step in sequence.steps.values())
    served = {step.type for step in steps if not is_instant(step.type)}
    for type_ in _outcomes(arguments):
        if type_ not in served:
            hint = nearest(type_, sorted(served))
            raise UsageError(f"--runner {type_}: no step has this type of side effect; {hint}")


def _changes(arguments: argparse.Namespace) -> dict[str, Mapping[str, Any]]:
    """Parse --set 'WHEN: JSON'; several for one time are merged."""
    changes: dict[str, Mapping[str, Any]] = {}
    for given in arguments.set:
        found = re.fullmatch(r"(.+?):(?:\s+|(?=\{))(.*)", given, re.DOTALL)
        if not found:
            raise ArgumentError(f"--set {given!r}: use for example 'P3D: {{\"paid\": true}}'")
        when = found[1].strip()
        changes[when] = {**changes.get(when, {}), **read_object(found[2], "--set", exact=True)}
    return changes


def _external(arguments: argparse.Namespace) -> dict[str, Any] | None:
    return None if arguments.lookup is None else read_object(arguments.lookup, "--lookup")


def _print(simulation: Simulation, as_json: bool) -> None:
    if as_json:
        whole = {
            "status": simulation.status,
            "end": simulation.end,
            "ended_at": simulation.ended_at,
            "step": simulation.enrollment.step,
            "data": json.loads(simulation.enrollment.data),
            "entries": [entry._asdict() for entry in simulation.entries],
        }
        say_json(whole)
        return
    zone = ZoneInfo(simulation.timezone)
    width = max((len(entry.step) for entry in simulation.entries), default=0)
    shown, repeated = _without_rounds(simulation)
    sent = None
    for entry in shown:
        at = f"{entry.at.astimezone(zone):%a %Y-%m-%d %H:%M:%S}"
        before, sent = sent, (entry.visit, entry.details) if entry.details else sent
        is_again = bool(entry.details) and sent == before
        say(f"{at}  {entry.step:{width}}  {_line(entry)}{', as before' if is_again else ''}")
        for name, text in () if is_again else entry.details.items():
            for n, line in enumerate(text.splitlines()):
                label = f"{name}:" if n == 0 else ""
                say(f"{'':{len(at) + width}}      {label:9}{line}".rstrip())
    if repeated:
        say(f"... and so on: {repeated:,} more entries")
    at = f"{simulation.ended_at.astimezone(zone):%a %Y-%m-%d %H:%M:%S}"
    say(f"{at}  {simulation.enrollment.step:{width}}  {simulation.end} ({simulation.timezone})")


def _without_rounds(simulation: Simulation) -> tuple[Sequence[TimelineEntry], int]:
    """Return the entries up to the second round of a cycle, and the number of the others."""
    entries = simulation.timeline
    if not (length := len(simulation.cycle)):
        return entries, 0
    steps = simulation.steps
    first = len(steps) - length
    while first and steps[first - 1] == steps[first - 1 + length]:
        first -= 1
    visits = list(dict.fromkeys((entry.visit, entry.step) for entry in entries))
    shown = set(visits[: first + MAX_ROUNDS * length])
    kept = [entry for entry in entries if (entry.visit, entry.step) in shown]
    return kept, len(entries) - len(kept)


def _line(entry: TimelineEntry) -> str:
    action = f"{entry.action} {entry.type}" if entry.action == "execute" else entry.action
    return f"{action}: {entry.message}" if entry.message else action


def check_one_sequence(target: Path, sequence: str | None) -> None:
    """Raise ArgumentError for a second name of a sequence, which only a file can have."""
    if sequence is not None:
        raise ArgumentError(
            f"{target} is not a file, but a sequence in the database: leave out {sequence!r}"
        )


def is_file(path: Path) -> bool:
    """Return whether an argument is a file, and not a sequence in the database."""
    if path.suffix in (".yaml", ".yml", ".json"):
        return True
    # it may be a pipe; not Path.exists, which raises for a name that is too long
    return os.path.exists(path) and not os.path.isdir(path)  # noqa: PTH110, PTH112


def graph_command(arguments: argparse.Namespace, settings: Settings) -> int:
    path = Path(arguments.target)
    reads_file = is_file(path)
    if not reads_file:
        check_one_sequence(path, arguments.sequence)
    runners = make_runners(settings, files.types(path) if reads_file else ())
    read = files.read_file(path, runners) if reads_file else []
    brakes = {
        one.sequence.name: drawing.describe_brake(one.brake["at_most"], _period(one.brake["per"]))
        for one in read
        if one.brake is not None
    }
    definitions = {one.sequence.name: one.sequence for one in read}
    counts: Counter[StepKey] = Counter()

    async def read_one(
        shard: Shard,
    ) -> tuple[dict[str, model.Sequence], list[asyncpg.Record], list[asyncpg.Record]]:
        async with reading(shard) as connection:
            return (
                await read_sequences(connection, runners),
                await connection.fetch(QUERIES["status"], None),
                await connection.fetch(QUERIES["brakes"], None),
            )

    async def read_all(arguments: argparse.Namespace, _: Settings, shards: Sequence[Shard]) -> int:
        answers = await ask(explain(arguments), shards, read_one)
        for stored, rows, braked in answers.found.values():
            if not reads_file:
                definitions.update({**stored, **definitions})
                brakes.update({row["sequence"]: _brake(row) for row in braked})
            counts.update({(row["sequence"], row["step"]): row["active"] for row in rows})
        return report_missing(answers)

    missing = 0
    if has_database(settings) or not reads_file:
        try:
            missing = on_shards(read_all)(arguments, settings)
        except SequencerdError as error:
            if not reads_file:
                raise
            warn(f"sequencerd: enrollments are not counted: {error}")
    _draw(arguments, definitions, counts, brakes)
    return missing


def _draw(
    arguments: argparse.Namespace,
    definitions: Mapping[str, model.Sequence],
    counts: Mapping[StepKey, int],
    brakes: Mapping[str, str],
) -> None:
    in_file = is_file(Path(arguments.target))
    sequence = definitions[choose(definitions, arguments.sequence if in_file else arguments.target)]
    drawn = drawing.FORMATS[arguments.format](sequence, counts, brakes.get(sequence.name, ""))
    if arguments.format == "text":  # the other formats are for programs
        for line in drawn.split("\n"):
            say(line)
    else:
        say_lines(drawn)


def _period(duration: Mapping[str, Any]) -> timedelta:
    return timedelta(**{duration["unit"]: duration["amount"]})


def _brake(row: asyncpg.Record) -> str:
    brake = drawing.describe_brake(row["at_most"], row["per"])
    return f"{brake}, until {describe.text(row['until'])}" if row["until"] else brake
