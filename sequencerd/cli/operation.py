"""Commands that change enrollments and sequences: enroll; retry, cancel, move, reevaluate; pause,
resume, archive.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
from collections.abc import Sequence

import asyncpg

from sequencerd.cli.commands import check_names, connect, on_database, on_shards
from sequencerd.cli.output import busy, is_terminal, progress_bar, say, say_json, show, warn
from sequencerd.core.calendar import dates
from sequencerd.core.routing import shard_of
from sequencerd.definitions.options import read_object
from sequencerd.errors import ArgumentError, UsageError
from sequencerd.settings import Settings
from sequencerd.storage import bulk, connections
from sequencerd.storage.bulk import Done, Selection
from sequencerd.storage.connections import Shard
from sequencerd.storage.database_errors import with_hint
from sequencerd.storage.statements import QUERIES


@on_shards
async def enroll_command(
    arguments: argparse.Namespace, _: Settings, shards: Sequence[Shard]
) -> int:
    if arguments.shard and len(shards) > 1:
        raise ArgumentError("specify one shard, or leave out --shard: the subject has its own")
    shard = shards[0] if arguments.shard else shards[shard_of(arguments.subject, len(shards))]
    read_object(arguments.data, "--data")
    at = None
    if arguments.at is not None and (at := dates.parse(arguments.at, dates.zone("UTC"))) is None:
        raise UsageError(f"--at {arguments.at!r} is not an ISO 8601 date")
    connection = await connect(shard)
    try:
        id_ = await bulk.enroll(
            connection,
            arguments.sequence,
            arguments.subject,
            arguments.data,
            timezone=arguments.timezone,
            step=arguments.step,
            at=at,
        )
    finally:
        await connection.close()
    if arguments.json:
        say_json({"id": id_} if shard.name is None else {"id": id_, "shard": shard.name})
    else:
        say(f"enrolled as {id_}" if shard.name is None else f"enrolled as {shard.name}/{id_}")
    return 0


# --- many enrollments


@on_database
async def change_command(arguments: argparse.Namespace, _: Settings, shard: Shard) -> int:
    action = "skip" if arguments.command == "retry" and arguments.skip else arguments.command
    selection = _selection(arguments)
    to = arguments.to if action == "move" else None
    connection = await connect(shard)
    try:
        await check_names(connection, selection.sequence, selection.step)
        ids, groups = await _select(connection, action, selection, to, arguments.dry_run)
        selected = sum(group["count"] for group in groups)
        if selection.ids is not None:
            _check_ids(arguments.command, action, selection.ids, ids)
        if to is not None:
            await _check_step(connection, to, groups, selection.sequence)
        if (selected > 1 or arguments.dry_run) and not arguments.json:
            show(groups, as_json=False, empty="no matching enrollments")
        if arguments.dry_run:
            return _report(arguments, selected, Done())
        if selected > 1 and not arguments.yes:
            confirm(f"{arguments.command} {bulk.count(selected)}?")
        done = await _in_batches(connection, action, ids, to, arguments.reason)
    finally:
        await connection.close()
    return _report(arguments, len(ids), done)


async def _select(
    connection: asyncpg.Connection,
    action: str,
    selection: Selection,
    to: str | None,
    is_dry_run: bool,
) -> tuple[Sequence[int], list[asyncpg.Record]]:
    """Return the ids of the selected enrollments, and how many there are of what. A dry run needs
    no ids, unless to say which of those that were given are wrong.
    """
    with busy("selecting"):
        async with connections.counting(connection, isolation="repeatable_read"):
            groups = await bulk.selected(connection, action, selection, to)
            if is_dry_run and selection.ids is None:
                return (), groups
            return await bulk.select(connection, action, selection, to), groups


def _selection(arguments: argparse.Namespace) -> Selection:
    filters = (arguments.subject, arguments.sequence, arguments.step, arguments.failure)
    is_filtered = any(value is not None for value in filters)
    if arguments.ids and is_filtered:
        raise ArgumentError("give either ids or filters, not both")
    if not arguments.ids and not is_filtered:
        raise ArgumentError(
            "nothing selected: give ids, --subject, --sequence, --step or --failure"
        )
    return Selection(sorted(set(arguments.ids)) or None, *filters)


def _check_ids(command: str, action: str, wanted: Sequence[int], found: Sequence[int]) -> None:
    """Reject ids that the command does not apply to, so that scripts notice wrong ids."""
    if missing := sorted(set(wanted) - set(found)):
        names = ", ".join(map(str, missing[:10])) + (", ..." if len(missing) > 10 else "")
        takes = " and ".join(bulk.STATUSES[action])
        elsewhere = " at another step" if command == "move" else ""
        raise UsageError(
            f"{command} applies to {takes} enrollments{elsewhere}, not to {names}; "
            f"see: sequencerd show {missing[0]}"
        )


async def _check_step(
    connection: asyncpg.Connection,
    step: str,
    groups: Sequence[asyncpg.Record],
    sequence: str | None,
) -> None:
    sequences = {group["sequence"] for group in groups} or ({sequence} if sequence else set())
    known = await connection.fetch(QUERIES["with_step"], step, list(sequences))
    if missing := sorted(sequences - {row["sequence"] for row in known}):
        raise UsageError(f"sequence {missing[0]!r} has no step {step!r}")


def confirm(question: str) -> None:
    """Ask the user for confirmation. Raises UsageError without it."""
    if not is_terminal(sys.stdin):
        raise ArgumentError(f"{question} Standard input is not a terminal: use --yes, or --dry-run")
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # the loop is blocked here
    try:
        say(f"{question} [y/N] ", end="", to=sys.stderr)
        answer = sys.stdin.readline()
    finally:
        signal.signal(signal.SIGINT, before)
    if answer.strip().lower() not in ("y", "yes"):
        raise UsageError("nothing was changed")


async def _in_batches(
    connection: asyncpg.Connection,
    action: str,
    ids: Sequence[int],
    to: str | None,
    reason: str | None,
) -> Done:
    total = Done()
    try:
        with progress_bar(action, len(ids)) as advance:

            def progress(done: Done) -> None:
                nonlocal total
                total = total.plus(done)
                advance(bulk.BATCH)

            await bulk.change(
                connection, action, ids, reason=bulk.changed_by(reason), to=to, progress=progress
            )
    except asyncio.CancelledError:
        warn(f"interrupted: {total.changed:,} of {bulk.count(len(ids))} done")
        raise
    except (asyncpg.IntegrityConstraintViolationError, asyncpg.DataError) as error:
        raise UsageError(f"{with_hint(error)}; {total.changed:,} were changed") from error
    return total


def _report(arguments: argparse.Namespace, selected: int, done: Done) -> int:
    unchanged = 0 if arguments.dry_run else selected - done.changed - done.entered_again
    if arguments.json:
        report = {
            "action": arguments.command,
            "dry_run": arguments.dry_run,
            "selected": selected,
            **done._asdict(),
            "unchanged": unchanged,
        }
        say_json(report)
        return 0
    if arguments.dry_run:
        say(f"would {arguments.command} {bulk.count(selected)}")
        return 0
    say(f"{arguments.command}: {bulk.count(done.changed)}")
    for remark in done.remarks(selected):
        say(remark)
    return 0


# --- sequences


@on_database
async def set_status_command(arguments: argparse.Namespace, _: Settings, shard: Shard) -> int:
    words = bulk.SEQUENCE_STATUSES[arguments.command]
    names = sorted(set(arguments.sequences))
    connection = await connect(shard)
    try:
        reason = bulk.changed_by(arguments.reason)
        rows = await bulk.set_status(connection, names, words.status, reason)
    finally:
        await connection.close()
    if arguments.json:
        told = [{**row, "status": words.status} for row in rows]
        say_json(told)
        return 0
    for row in rows:
        already = " already" if row["before"] == words.status else ""
        say(f"{row['name']} is {words.status}{already}: {bulk.count(row['active'])} {words.inside}")
    return 0
