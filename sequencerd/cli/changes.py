"""Commands that change sequences, and show how they have changed: plan, apply, history, export,
import-original.
"""

from __future__ import annotations

import argparse
import asyncio
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from typing import Any

import asyncpg
from asyncpg.transaction import Transaction

from sequencerd.cli.commands import (
    ask,
    ask_all,
    connect,
    fetch,
    on_database,
    on_shards,
    reading,
)
from sequencerd.cli.output import say, say_json, say_lines, warn
from sequencerd.core.describe import text
from sequencerd.definitions import files, plan
from sequencerd.definitions.diff import describe_revision, parse_document
from sequencerd.definitions.original import place
from sequencerd.definitions.original.read import Source, read
from sequencerd.definitions.original.translate import Choices
from sequencerd.definitions.plan import Plan
from sequencerd.definitions.plan_of_shards import merge
from sequencerd.definitions.yaml_writer import to_yaml
from sequencerd.errors import PlanError, SequencerdError, ShardsError, UsageError
from sequencerd.runners import registry
from sequencerd.settings import Settings
from sequencerd.storage import connections
from sequencerd.storage.connections import Shard
from sequencerd.storage.database_errors import TRANSIENT_ERRORS
from sequencerd.storage.statements import QUERIES

COMMITTING = 30.0  # seconds for a commit, and to find out what became of it
CLOSING = 5.0  # seconds
NOTHING = "nothing was changed in any shard"
CHANGES = 2  # the exit code that `plan --detailed-exitcode` has for them, as elsewhere


def _moves(arguments: argparse.Namespace) -> dict[str, str]:
    moves = {}
    for move in arguments.move:
        old, equals, new = move.partition("=")
        if not (old and equals and new):
            raise UsageError(f"--move {move}: use --move OLD=NEW, with the names of two steps")
        moves[old] = new
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

    answers = await ask(arguments, shards, make)
    made = merge({shard.name: one for shard, one in answers.found.items()})
    if arguments.json:
        say_json(made.as_dict())
    else:
        for line in made.lines(done=False):
            say(line)
        if made and not made.refused and not answers.missing:
            say(f"to apply exactly this plan: apply --plan {made.fingerprint}")
    code = answers.tell()
    if made.refused:
        raise PlanError("\n".join(made.refused))
    return code or (CHANGES if made and arguments.detailed_exitcode else 0)


@on_shards
async def apply_command(
    arguments: argparse.Namespace, settings: Settings, shards: Sequence[Shard]
) -> int:
    """Prepare on all shards before committing on any."""
    runners = registry.make_runners(settings)
    found = files.read_all(arguments.files, runners)
    moves = _moves(arguments)
    opened: dict[Shard, tuple[asyncpg.Connection, Transaction]] = {}

    async def begin(shard: Shard) -> None:
        connection = await connect(shard)
        opened[shard] = connection, connection.transaction()
        await opened[shard][1].start()

    async def lock(shard: Shard) -> None:
        await opened[shard][0].execute(QUERIES["lock_definitions"])

    async def make(shard: Shard) -> Plan:
        return await plan.make(opened[shard][0], found, runners, moves=moves, prune=arguments.prune)

    async def write(shard: Shard) -> None:
        connection = opened[shard][0]
        await plan.write(connection, plans[shard], found, brake=arguments.brake)
        await connection.execute(QUERIES["check_constraints"])

    async def transaction_id(shard: Shard) -> str | None:
        id_: str | None = await opened[shard][0].fetchval(QUERIES["transaction_id"])
        return id_

    try:
        await ask_all(arguments, shards, begin, otherwise=NOTHING)
        # in one order, or two at the same time could wait for each other
        await ask_all(arguments, shards, lock, otherwise=NOTHING, at_once=1)
        plans = await ask_all(arguments, shards, make, otherwise=NOTHING)
        done = merge({shard.name: one for shard, one in plans.items()})
        plan.check(done, arguments.plan)
        await ask_all(arguments, shards, write, otherwise=NOTHING)
        ids = await ask_all(arguments, shards, transaction_id, otherwise=NOTHING)
        await _commit(arguments, {shard: (opened[shard][1], ids[shard]) for shard in shards})
    finally:
        for connection, _ in opened.values():
            with suppress(*TRANSIENT_ERRORS):
                await connection.close(timeout=CLOSING)
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


async def _commit(
    arguments: argparse.Namespace, prepared: Mapping[Shard, tuple[Transaction, str | None]]
) -> None:
    """Commit on one shard after the other. Raises ShardsError, with where that leaves them."""
    done: list[str] = []
    failed: dict[str, str] = {}
    unknown: list[str] = []
    for shard, (transaction, id_) in prepared.items():
        try:
            await asyncio.wait_for(transaction.commit(), COMMITTING)
        except asyncio.CancelledError:
            if shard.name is not None:
                left = [str(one.name) for one in prepared if str(one.name) not in done]
                left.remove(shard.name)
                where = _where(done, left, [*unknown, shard.name])
                warn(f"interrupted: {where}; {_again(arguments)}")
            raise
        except TRANSIENT_ERRORS as error:
            if shard.name is None:
                raise
            outcome = await _outcome(shard, id_)
            if outcome != "committed":
                failed[shard.name] = f"shard {shard.name}: {error or 'it does not answer'}"
            if outcome is None:
                unknown.append(shard.name)
            elif outcome == "aborted" and not done and not unknown:
                raise ShardsError(f"{failed[shard.name]}\n{NOTHING}") from error
        if shard.name is not None and shard.name not in failed:
            done.append(shard.name)
    if failed:
        where = f"{_where(done, failed, unknown)}; {_again(arguments)}"
        raise ShardsError("\n".join([*failed.values(), where]))


def _where(done: Collection[str], failed: Collection[str], unknown: Collection[str]) -> str:
    undone = [name for name in failed if name not in unknown]
    parts = (
        ("the revision is in ", done),
        ("not in ", undone),
        ("whether it is in the following is not known: ", unknown),
    )
    return ", ".join(f"{words}{', '.join(names)}" for words, names in parts if names)


def _again(arguments: argparse.Namespace) -> str:
    how = " without --plan" if arguments.plan else ""
    return (
        f"repeat the command{how} when all can be reached: it completes the others, and changes "
        "nothing where the revision is"
    )


async def _outcome(shard: Shard, transaction_id: str | None) -> str | None:
    """Return whether a transaction was committed, or aborted; None if its shard cannot tell."""
    if transaction_id is None:  # it has written nothing
        return "committed"
    with suppress(SequencerdError, *TRANSIENT_ERRORS):
        connection = await connect(shard, seconds=COMMITTING)
        try:
            async with asyncio.timeout(COMMITTING):
                while True:
                    outcome: str | None = await connection.fetchval(
                        QUERIES["transaction_outcome"], transaction_id
                    )
                    if outcome != "in progress":
                        return outcome
                    await asyncio.sleep(0.1)
        finally:
            connection.terminate()
    return None


@on_shards
async def history_command(
    arguments: argparse.Namespace, _: Settings, shards: Sequence[Shard]
) -> int:
    name = arguments.sequence
    answers = await ask(arguments, shards, lambda shard: fetch(shard, "revisions_of", name))
    revisions = _revisions(answers.found)
    if not revisions:
        raise UsageError(f"sequence {name!r} does not exist")
    if arguments.json:
        is_sharded = shards[0].name is not None
        say_json(
            [
                {**_revision(name, row), **({"shards": numbers} if is_sharded else {})}
                for row, numbers in revisions
            ]
        )
        return answers.tell()
    for row, numbers in revisions:
        why = f" ({row['reason']})" if row["reason"] else ""
        title = f"revision {row['revision']}"
        if len({*numbers.values()}) > 1 or len(numbers) < len(answers.found):
            title = ", ".join(f"revision {number} in {shard}" for shard, number in numbers.items())
        say(f"{title}, {text(row['at'])}, by {row['by']}{why}")
        for line in describe_revision(name, row["before"], row["document"]):
            say(f"  {line}")
    return answers.tell()


def _revisions(
    by_shard: Mapping[Shard, Sequence[asyncpg.Record]],
) -> list[tuple[asyncpg.Record, dict[str, int]]]:
    """Return the revisions of all shards, the latest first, each with its number in the shards that
    have it: a change that all have made is one, and may have other numbers in some.
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
        arguments,
        shards,
        lambda shard: fetch(shard, "document", arguments.sequence, arguments.revision),
    )
    found: dict[str | None, list[str]] = {}
    for shard, ((document,),) in answers.found.items():
        found.setdefault(document, []).append(str(shard.name))
    if {*found} == {None}:
        revision = "" if arguments.revision is None else f" in revision {arguments.revision}"
        raise UsageError(f"sequence {arguments.sequence!r} does not exist{revision}")
    document, *others = found
    if document is None or others:
        groups = "; ".join(", ".join(names) for names in found.values())
        raise UsageError(
            f"the shards have different definitions of {arguments.sequence!r}: {groups}; export "
            "that of one with --shard, and apply it to all"
        )
    say_lines(to_yaml(parse_document(arguments.sequence, document)))
    return answers.tell()


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
