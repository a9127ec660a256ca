"""Commands that change sequences, and tell how they have changed: plan, apply, history, export,
import-original.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import asyncpg

from sequencerd import daemon, files, original, plan
from sequencerd.changes import compare
from sequencerd.cli.commands import Commands, add_json, connect, fetch, on_database
from sequencerd.cli.output import say, say_json, say_lines
from sequencerd.errors import PlanError, UsageError
from sequencerd.export import to_yaml
from sequencerd.settings import Settings
from sequencerd.words import text

CHANGES = 2  # the exit code that `plan --detailed-exitcode` has for them, as elsewhere


def add_to(commands: Commands) -> None:
    """Adds these commands."""
    planned = commands.add(
        "plan", on_database(_plan), "show what apply would change", "plan onboarding.yaml"
    )
    _add_files(planned)
    planned.add_argument(
        "--detailed-exitcode", action="store_true", help="exit with 2 if anything would change"
    )
    add_json(planned)

    applied = commands.add(
        "apply", on_database(_apply), "make the sequences of files", "apply onboarding.yaml"
    )
    _add_files(applied)
    applied.add_argument(
        "--plan", metavar="PLAN", help="only if this plan, as `plan` has named it, still holds"
    )
    add_json(applied)

    history = commands.add(
        "history",
        on_database(_history),
        "show who has changed a sequence, when and how",
        "history onboarding",
    )
    history.add_argument("sequence")
    add_json(history)

    export = commands.add(
        "export",
        on_database(_export),
        "print a sequence as a file that apply takes",
        "export onboarding --revision 3",
    )
    export.add_argument("sequence")
    export.add_argument("--revision", type=int, metavar="N", help="as it was then")

    brought = commands.add(
        "import-original",
        on_database(_import),
        "bring sequences and people over from the tables of the original Sequencer",
        "import-original --database postgresql://localhost/old",
    )
    brought.add_argument(
        "--database",
        dest="original",
        metavar="URL",
        help="where those tables are; if not said, beside ours",
    )
    brought.add_argument("--schema", default="public", help="default: %(default)s")
    brought.add_argument(
        "--lookup", metavar="NAME", help="where sequences that need external data get them from"
    )
    brought.add_argument(
        "--apply", action="store_true", help="do it; without, it is tried and taken back"
    )
    add_json(brought)


def _add_files(command: argparse.ArgumentParser) -> None:
    command.add_argument("files", nargs="+", type=Path, metavar="FILE", help="YAML or JSON")
    command.add_argument(
        "--move",
        action="append",
        default=[],
        metavar="OLD=NEW",
        help="where those go on who are at a step that is removed; may be repeated",
    )
    command.add_argument(
        "--prune",
        action="store_true",
        help="archive what was applied from files and is in none of these",
    )


def _moves(arguments: argparse.Namespace) -> dict[str, str]:
    moves = {}
    for move in arguments.move:
        old, equals, new = move.partition("=")
        if not (old and equals and new):
            raise UsageError(f"--move {move}: write --move OLD=NEW, the names of two steps")
        moves[old] = new
    return moves


async def _plan(arguments: argparse.Namespace, settings: Settings, url: str) -> int:
    runners = daemon.make_runners(settings)
    found = files.read_all(arguments.files, runners)
    moves = _moves(arguments)
    connection = await connect(url)
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
            say(f"to apply exactly this: the same with apply --plan {made.fingerprint}")
    if made.refused:
        raise PlanError("\n".join(made.refused))
    return CHANGES if made and arguments.detailed_exitcode else 0


async def _apply(arguments: argparse.Namespace, settings: Settings, url: str) -> int:
    runners = daemon.make_runners(settings)
    found = files.read_all(arguments.files, runners)
    moves = _moves(arguments)
    connection = await connect(url)
    try:
        async with connection.transaction():
            done = await plan.apply(
                connection,
                found,
                runners,
                moves=moves,
                prune=arguments.prune,
                expected=arguments.plan,
            )
    finally:
        await connection.close()
    if arguments.json:
        say_json(done.as_dict())
    else:
        for line in done.lines(done=True):
            say(line)
    return 0


async def _history(arguments: argparse.Namespace, _: Settings, url: str) -> int:
    rows = await fetch(url, "revisions_of", arguments.sequence)
    if not rows:
        raise UsageError(f"sequence {arguments.sequence!r} does not exist")
    shown = [_revision(row) for row in rows]
    if arguments.json:
        say_json(shown)
        return 0
    for row in shown:
        say(f"revision {row['revision']}, {text(row['at'])}, by {row['by']}")
        for line in row["changes"]:
            say(f"  {line}")
    return 0


def _revision(row: asyncpg.Record) -> dict[str, Any]:
    before = json.loads(row["before"]) if row["before"] else None
    after = json.loads(row["document"])
    lines = list(compare(before, after).lines())
    return {**row, "before": before, "document": after, "changes": lines}


async def _export(arguments: argparse.Namespace, _: Settings, url: str) -> int:
    ((document,),) = await fetch(url, "document", arguments.sequence, arguments.revision)
    if document is None:
        revision = "" if arguments.revision is None else f" in revision {arguments.revision}"
        raise UsageError(f"sequence {arguments.sequence!r} does not exist{revision}")
    say_lines(to_yaml(json.loads(document)))
    return 0


async def _import(arguments: argparse.Namespace, settings: Settings, url: str) -> int:
    runners = daemon.make_runners(settings)
    ours = await connect(url)
    there = None
    try:
        there = await daemon.connect(arguments.original or url)
        found = await original.read(
            there, ours, runners, schema=arguments.schema, lookup=arguments.lookup
        )
        transaction = ours.transaction()
        await transaction.start()
        try:
            if not found.errors:
                await original.apply(there, ours, found, runners, schema=arguments.schema)
        except BaseException:
            await transaction.rollback()
            raise
        if arguments.apply and not found.errors:
            await transaction.commit()
        else:
            await transaction.rollback()
    finally:
        for connection in filter(None, (ours, there)):
            await connection.close()
    if arguments.json:
        say_json(found.as_dict())
    else:
        for line in found.lines(done=arguments.apply):
            say(line)
    if found.errors:
        raise UsageError("nothing is brought over until the errors are mended")
    if not (arguments.apply or arguments.json):
        say("this was a trial: the same with --apply does it, once the original is stopped")
    return 0
