"""Commands that change sequences, and show how they have changed: plan, apply, history, export,
import-original.
"""

from __future__ import annotations

import argparse
from typing import Any

import asyncpg

from sequencerd.cli.commands import connect, fetch, on_database
from sequencerd.cli.output import say, say_json, say_lines
from sequencerd.core.describe import text
from sequencerd.definitions import files, plan
from sequencerd.definitions.diff import describe_revision, parse_document
from sequencerd.definitions.original import place
from sequencerd.definitions.original.read import Source, read
from sequencerd.definitions.original.translate import Choices
from sequencerd.definitions.yaml_writer import to_yaml
from sequencerd.errors import PlanError, UsageError
from sequencerd.runners import registry
from sequencerd.settings import Settings
from sequencerd.storage import connections
from sequencerd.storage.connections import Shard
from sequencerd.storage.statements import QUERIES

CHANGES = 2  # the exit code that `plan --detailed-exitcode` has for them, as elsewhere


def _moves(arguments: argparse.Namespace) -> dict[str, str]:
    moves = {}
    for move in arguments.move:
        old, equals, new = move.partition("=")
        if not (old and equals and new):
            raise UsageError(f"--move {move}: use --move OLD=NEW, with the names of two steps")
        moves[old] = new
    return moves


@on_database
async def plan_command(arguments: argparse.Namespace, settings: Settings, shard: Shard) -> int:
    runners = registry.make_runners(settings)
    found = files.read_all(arguments.files, runners)
    moves = _moves(arguments)
    connection = await connect(shard)
    try:
        async with connection.transaction(isolation="repeatable_read", readonly=True):
            made = await plan.make(connection, found, runners, moves=moves, prune=arguments.prune)
    finally:
        await connection.close()
    if arguments.json:
        say_json(made.as_dict())
    else:
        for line in made.lines(done=False):
            say(line)
        if made and not made.refused:
            say(f"to apply exactly this plan: apply --plan {made.fingerprint}")
    if made.refused:
        raise PlanError("\n".join(made.refused))
    return CHANGES if made and arguments.detailed_exitcode else 0


@on_database
async def apply_command(arguments: argparse.Namespace, settings: Settings, shard: Shard) -> int:
    runners = registry.make_runners(settings)
    found = files.read_all(arguments.files, runners)
    moves = _moves(arguments)
    connection = await connect(shard)
    try:
        async with connection.transaction():
            done = await plan.apply(
                connection,
                found,
                runners,
                moves=moves,
                prune=arguments.prune,
                expected=arguments.plan,
                brake=arguments.brake,
            )
    finally:
        await connection.close()
    if arguments.json:
        say_json(done.as_dict())
    else:
        for line in done.lines(done=True):
            say(line)
        if arguments.brake is not None and any(one.changes for one in done.sequences):
            say(
                f"for a day, more than {arguments.brake} side effects in an hour pause a sequence "
                "that has changed"
            )
    return 0


@on_database
async def history_command(arguments: argparse.Namespace, _: Settings, shard: Shard) -> int:
    rows = await fetch(shard, "revisions_of", arguments.sequence)
    if not rows:
        raise UsageError(f"sequence {arguments.sequence!r} does not exist")
    name = arguments.sequence
    if arguments.json:
        say_json([_revision(name, row) for row in rows])
        return 0
    for row in rows:
        why = f" ({row['reason']})" if row["reason"] else ""
        say(f"revision {row['revision']}, {text(row['at'])}, by {row['by']}{why}")
        for line in describe_revision(name, row["before"], row["document"]):
            say(f"  {line}")
    return 0


def _revision(sequence: str, row: asyncpg.Record) -> dict[str, Any]:
    before, after = (
        document and parse_document(sequence, document)
        for document in (row["before"], row["document"])
    )
    changes = describe_revision(sequence, row["before"], row["document"])
    return {**row, "before": before, "document": after, "changes": changes}


@on_database
async def export_command(arguments: argparse.Namespace, _: Settings, shard: Shard) -> int:
    ((document,),) = await fetch(shard, "document", arguments.sequence, arguments.revision)
    if document is None:
        revision = "" if arguments.revision is None else f" in revision {arguments.revision}"
        raise UsageError(f"sequence {arguments.sequence!r} does not exist{revision}")
    say_lines(to_yaml(parse_document(arguments.sequence, document)))
    return 0


@on_database
async def import_command(arguments: argparse.Namespace, settings: Settings, shard: Shard) -> int:
    runners = registry.make_runners(settings)
    ours = await connect(shard)
    there = None
    try:
        there = await connections.connect(Shard(arguments.original or shard.url))
        source = Source(
            there,
            schema=arguments.schema,
            lookup=arguments.lookup,
            only=arguments.only,
            choices=Choices(arguments.conditional, arguments.past_dates),
        )
        found = await read(source, ours, runners)
        transaction = ours.transaction()
        await transaction.start()
        try:
            await place.apply(source, ours, found, runners)
            if arguments.apply and not found.questions:
                await ours.execute(QUERIES["leave_original_ids"])
        except BaseException:
            await transaction.rollback()
            raise
        is_done = arguments.apply and not found.questions
        await (transaction.commit() if is_done else transaction.rollback())
    finally:
        for connection in filter(None, (ours, there)):
            await connection.close()
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
