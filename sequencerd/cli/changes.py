"""Commands that change sequences or show their changes: plan, apply, history, export,
import-original.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import asyncpg

from sequencerd.cli.commands import (
    check_sequence,
    connect,
    explain,
    fetch,
    on_shards,
    reading,
    report_missing,
)
from sequencerd.cli.output import say, say_json, say_lines, use_utf8, warn
from sequencerd.core.describe import text
from sequencerd.definitions import files, plan, plan_of_shards
from sequencerd.definitions.diff import describe_revision, parse_document
from sequencerd.definitions.original import enrollments
from sequencerd.definitions.original.read import ImportSource, read
from sequencerd.definitions.original.report import ImportReport
from sequencerd.definitions.original.translate import ImportChoices
from sequencerd.definitions.plan import Plan
from sequencerd.definitions.plan_of_shards import how_to_complete
from sequencerd.definitions.yaml_writer import to_yaml
from sequencerd.errors import ArgumentError, PlanError, UsageError
from sequencerd.runners import registry
from sequencerd.settings import Settings
from sequencerd.storage import connections
from sequencerd.storage.bulk import changed_by
from sequencerd.storage.change_of_shards import ChangeTexts, changing
from sequencerd.storage.connections import Shard
from sequencerd.storage.every_shard import ask

REPEAT_IMPORT = (
    "repeat the command when all shards can be reached: it imports what is missing, and nothing "
    "twice"
)
EXIT_CODE_OF_CHANGES = 2
"""The exit code of `plan --detailed-exitcode` for changes, as in other tools."""


def _moves(arguments: argparse.Namespace) -> dict[str, str]:
    moves: dict[str, str] = {}
    for move in arguments.move:
        old, equals, new = move.partition("=")
        if not (old and equals and new):
            raise ArgumentError(f"--move {move}: use --move OLD=NEW, with the names of two steps")
        if moves.setdefault(old, new) != new:
            raise ArgumentError(f"--move {move}: {old} already moves to {moves[old]}")
    return moves


@on_shards
async def plan_command(
    arguments: argparse.Namespace, settings: Settings, shards: Sequence[Shard]
) -> int:
    runners = registry.make_runners(settings)
    found = files.read_all(arguments.files, runners)
    moves = _moves(arguments)

    async def make(shard: Shard) -> Plan:
        async with reading(shard) as connection:
            return await plan.make(connection, found, runners, moves=moves, prune=arguments.prune)

    answers = await ask(explain(arguments), shards, make)
    made = plan_of_shards.merge(answers.found, moves)
    if arguments.json:
        say_json(made.as_dict())
    else:
        for line in made.lines(done=False):
            say(line)
        if made and not made.refused and not answers.missing:
            say(f"to apply exactly this plan: apply --plan {made.fingerprint}")
    code = report_missing(answers)
    if made.refused:
        raise PlanError("\n".join(made.refused))
    return code or (EXIT_CODE_OF_CHANGES if made and arguments.detailed_exitcode else 0)


@on_shards
async def apply_command(
    arguments: argparse.Namespace, settings: Settings, shards: Sequence[Shard]
) -> int:
    runners = registry.make_runners(settings)
    found = files.read_all(arguments.files, runners)
    moves = _moves(arguments)
    async with changing(explain(arguments), shards, connect, warn) as change:
        done = await plan_of_shards.apply(
            change,
            found,
            runners,
            moves=moves,
            reason=changed_by(arguments.reason),
            prune=arguments.prune,
            expected=arguments.plan,
            brake=arguments.brake,
        )
        how = "the command without --plan" if arguments.plan else "the command"
        await change.commit(ChangeTexts("the revision", how_to_complete(how)))
    if arguments.json:
        say_json(done.as_dict())
    else:
        for line in done.lines(done=True):
            say(line)
        if arguments.brake is not None and any(one.changes for one in done.sequences):
            say(
                "for a day, each changed sequence is paused if more than "
                f"{arguments.brake} side effects would begin in an hour"
            )
    return 0


@on_shards
async def history_command(
    arguments: argparse.Namespace, _: Settings, shards: Sequence[Shard]
) -> int:
    name = arguments.sequence
    answers = await ask(
        explain(arguments), shards, lambda shard: fetch(shard, "revisions_of", name)
    )
    revisions = _revisions(answers.found)
    if not revisions:
        await check_sequence(arguments, answers)
        raise UsageError(f"sequence {name!r} has no revisions")
    if arguments.json:
        is_sharded = shards[0].name is not None
        say_json(
            [
                {**_revision(name, row), **({"shards": numbers} if is_sharded else {})}
                for row, numbers in revisions
            ]
        )
        return report_missing(answers)
    for row, numbers in revisions:
        why = f" ({row['reason']})" if row["reason"] else ""
        title = f"revision {row['revision']}"
        if len({*numbers.values()}) > 1 or len(numbers) < len(answers.found):
            title = ", ".join(f"revision {number} in {shard}" for shard, number in numbers.items())
        say(f"{title}, {text(row['at'])}, by {row['by']}{why}")
        for line in describe_revision(name, row["before"], row["document"]):
            say(f"  {line}")
    return report_missing(answers)


def _revisions(
    by_shard: Mapping[Shard, Sequence[asyncpg.Record]],
) -> list[tuple[asyncpg.Record, dict[str, int]]]:
    """Return the revisions of all shards, the latest first, each with its number in the shards that
    have it: a change that all have made is one revision, although its number may differ between
    them.
    """
    found: dict[tuple[object, ...], tuple[asyncpg.Record, dict[str, int]]] = {}
    for shard, rows in by_shard.items():
        times: Counter[tuple[str | None, str]] = Counter()
        for row in reversed(rows):
            change = row["before"], row["document"]
            times[change] += 1
            _, numbers = found.setdefault((*change, times[change]), (row, {}))
            numbers[str(shard.name)] = row["revision"]
    return sorted(found.values(), key=lambda one: one[0]["at"], reverse=True)


def _revision(sequence: str, row: asyncpg.Record) -> dict[str, Any]:
    before, after = (
        document and parse_document(sequence, document)
        for document in (row["before"], row["document"])
    )
    changes = describe_revision(sequence, row["before"], row["document"])
    return {**row, "before": before, "document": after, "changes": changes}


@on_shards
async def export_command(
    arguments: argparse.Namespace, _: Settings, shards: Sequence[Shard]
) -> int:
    answers = await ask(
        explain(arguments),
        shards,
        lambda shard: fetch(shard, "document", arguments.sequence, arguments.revision),
    )
    found: dict[str | None, list[str]] = {}
    for shard, ((document,),) in answers.found.items():
        found.setdefault(document, []).append(str(shard.name))
    if {*found} == {None}:
        await check_sequence(arguments, answers)
        missing = "definition" if arguments.revision is None else f"revision {arguments.revision}"
        name = arguments.sequence
        raise UsageError(f"sequence {name!r} has no {missing}; see: history {name}")
    document, *others = found
    if document is None or others:
        groups = "; ".join(", ".join(names) for names in found.values())
        raise UsageError(
            f"the shards have different definitions of {arguments.sequence!r}: {groups}; export "
            "one of them with --shard, and apply it to all"
        )
    use_utf8()
    say_lines(to_yaml(parse_document(arguments.sequence, document)))
    return report_missing(answers)


@on_shards
async def import_command(
    arguments: argparse.Namespace, settings: Settings, shards: Sequence[Shard]
) -> int:
    if len(shards) > 1 and arguments.original is None:
        raise ArgumentError("specify the original's database: import-original --database URL")
    runners = registry.make_runners(settings)
    async with changing(explain(arguments), shards, connect, warn) as change:
        async with connections.connected(Shard(arguments.original or shards[0].url)) as there:
            source = ImportSource(
                there,
                schema=arguments.schema,
                lookup=arguments.lookup,
                only=arguments.only,
                choices=ImportChoices(arguments.conditional, arguments.past_dates),
            )

            async def read_for(shard: Shard) -> ImportReport:
                return await read(source, change.connections[shard], runners)

            parts = await change.on_each(read_for, at_once=1)  # by one connection there
            found = await enrollments.apply(source, change, parts, runners)
        is_done = arguments.apply and not found.questions
        if is_done:
            await enrollments.reserve_original_ids(change)
            await change.commit(ChangeTexts("the import", REPEAT_IMPORT))
    if arguments.json:
        say_json(found.as_dict())
    else:
        for line in found.lines(done=is_done):
            say(line)
    if arguments.apply and found.questions:
        raise UsageError("nothing is imported: answer the questions above")
    if found.errors:
        others = "the others are imported" if is_done else "the others would be"
        raise UsageError(
            f"sequences with errors are not imported, {others}; fix the errors above, and repeat "
            "the command"
        )
    if not (arguments.apply or arguments.json):
        say("dry run; stop the original, then repeat the command with --apply")
    return 0
