"""Commands that change enrollments and sequences: enroll; retry, cancel, move, reevaluate; pause,
resume, archive.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import asyncpg

from sequencerd.cli.commands import check_names, connected, explain, on_shards, report_missing
from sequencerd.cli.ids import Id, by_shard, labelled
from sequencerd.cli.output import busy, progress_bar, say, say_json, show, warn
from sequencerd.core.calendar import dates
from sequencerd.core.routing import shard_of
from sequencerd.definitions.options import read_object, read_zone
from sequencerd.errors import ArgumentError, UsageError
from sequencerd.settings import Settings
from sequencerd.storage import bulk, connections
from sequencerd.storage.bulk import BulkResult, Selection
from sequencerd.storage.connections import Shard
from sequencerd.storage.database_errors import with_hint
from sequencerd.storage.every_shard import ShardAnswers, ask, ask_all
from sequencerd.storage.statements import QUERIES


@on_shards
async def enroll_command(
    arguments: argparse.Namespace, _: Settings, shards: Sequence[Shard]
) -> int:
    if arguments.shard and len(shards) > 1:
        raise ArgumentError("leave out --shard, or specify the single shard of the subject")
    shard = shards[0] if arguments.shard else shards[shard_of(arguments.subject, len(shards))]
    read_object(arguments.data, "--data")
    if arguments.timezone is not None:
        read_zone(arguments.timezone)
    at = None
    if arguments.at is not None and (at := dates.parse(arguments.at, dates.zone("UTC"))) is None:
        raise ArgumentError(f"--at {arguments.at!r} is not an ISO 8601 date")

    async def work(shard: Shard) -> int:
        async with connected(shard) as connection:
            await check_names(connection, arguments.sequence, arguments.step)
            return await bulk.enroll(
                connection,
                arguments.sequence,
                arguments.subject,
                arguments.data,
                timezone=arguments.timezone,
                step=arguments.step,
                at=at,
            )

    try:
        id_ = (await ask(explain(arguments), [shard], work)).found[shard]
    except ArgumentError:  # the shard does not matter
        raise
    except UsageError as error:
        if len(shards) == 1:
            raise
        raise UsageError(f"shard {shard.name}: {error}") from error
    if arguments.json:
        say_json(labelled(shard, {"id": id_}, as_json=True))
    else:
        say(f"enrolled as {Id(shard.name, id_)}")
    return 0


# --- many enrollments


@on_shards
async def change_command(
    arguments: argparse.Namespace, _: Settings, shards: Sequence[Shard]
) -> int:
    action = "skip" if arguments.command == "retry" and arguments.skip else arguments.command
    selection = _selection(arguments)
    to = arguments.to if action == "move" else None
    wanted = by_shard(shards, arguments.ids)

    async def select(shard: Shard) -> tuple[Sequence[int], list[asyncpg.Record]]:
        ours = selection._replace(ids=wanted.get(shard))
        async with connected(shard) as connection:
            await check_names(connection, ours.sequence, ours.step, ours.failure)
            ids, groups = await _select(connection, action, ours, to, arguments.dry_run)
            if ours.ids is not None:
                await _check_ids(connection, shard, ours.ids, ids, arguments.command)
            if to is not None:
                await _check_step(connection, to, groups, ours.sequence)
        return ids, groups

    if wanted:  # all or nothing, as with one database
        found = await ask_all(explain(arguments), wanted, select, otherwise="nothing was changed")
        answers = ShardAnswers(found, {})
    else:
        answers = await ask(explain(arguments), shards, select)
    groups = bulk.added_up(group for _, found in answers.found.values() for group in found)
    selected = sum(group["count"] for group in groups)
    if (selected > 1 or arguments.dry_run) and not arguments.json:
        show(groups, as_json=False, empty="no matching enrollments")
    if arguments.dry_run:
        _report(arguments, selected, BulkResult())
        return report_missing(answers)
    code = report_missing(answers)
    if selected > 1 and not arguments.yes:
        confirm(f"{arguments.command} {bulk.count(selected)}?")
    ids = {shard: found for shard, (found, _) in answers.found.items() if found}
    done, failed = await _change(arguments, action, ids, to)
    _report(arguments, sum(map(len, ids.values())), done)
    return failed or code


async def _select(
    connection: asyncpg.Connection,
    action: str,
    selection: Selection,
    to: str | None,
    is_dry_run: bool,
) -> tuple[Sequence[int], list[asyncpg.Record]]:
    """Return the ids of the selected enrollments, and their counts. A dry run needs ids only to
    report wrong ones among those that were given.
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
    return Selection(None, *filters)


async def _check_ids(
    connection: asyncpg.Connection,
    shard: Shard,
    wanted: Sequence[int],
    found: Sequence[int],
    command: str,
) -> None:
    """Reject ids that the command does not apply to, so that scripts notice wrong ids."""
    if missing := sorted(set(wanted) - set(found)):
        existing = {row["id"] for row in await connection.fetch(QUERIES["existing"], missing)}
        if absent := next((number for number in missing if number not in existing), None):
            raise UsageError(f"enrollment {Id(shard.name, absent)} does not exist")
        ids = [str(Id(shard.name, number)) for number in missing]
        names = ", ".join(ids[:10]) + (", ..." if len(ids) > 10 else "")
        takes = " and ".join(bulk.STATUSES[command])
        elsewhere = " at another step" if command == "move" else ""
        raise UsageError(
            f"{command} applies to {takes} enrollments{elsewhere}, not to {names}; "
            f"see: sequencerd show {ids[0]}"
        )


async def _check_step(
    connection: asyncpg.Connection,
    step: str,
    groups: Sequence[asyncpg.Record],
    sequence: str | None,
) -> None:
    sequences = {group["sequence"] for group in groups} or ({sequence} if sequence else set())
    if not sequences:
        await check_names(connection, None, step)
    if missing := await bulk.without_step(connection, sequences, step):
        await check_names(connection, missing[0], step)
        raise UsageError(f"sequence {missing[0]!r} has no step {step!r}")


def confirm(question: str) -> None:
    """Ask the user for confirmation. Raises UsageError without it."""
    if not sys.stdin.isatty():
        raise ArgumentError(f"{question} Standard input is not a terminal: use --yes, or --dry-run")
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # this blocks the loop
    try:
        say(f"{question} [y/N] ", end="", to=sys.stderr)
        answer = sys.stdin.readline()
    finally:
        signal.signal(signal.SIGINT, before)
    if answer.strip().lower() not in ("y", "yes"):
        raise UsageError("nothing was changed")


async def _change(
    arguments: argparse.Namespace, action: str, ids: Mapping[Shard, Sequence[int]], to: str | None
) -> tuple[BulkResult, int]:
    """Change enrollments in batches. Return the result, and the exit code."""
    total = BulkResult()
    selected = sum(map(len, ids.values()))
    with progress_bar(action, selected) as advance:

        def progress(done: BulkResult) -> None:
            nonlocal total
            total = total.plus(done)
            advance(bulk.BATCH_SIZE)

        async def change(shard: Shard) -> None:
            reason = bulk.changed_by(arguments.reason)
            try:
                async with connected(shard) as connection:
                    await bulk.change(
                        connection, action, ids[shard], reason=reason, to=to, progress=progress
                    )
            except (asyncpg.IntegrityConstraintViolationError, asyncpg.DataError) as error:
                raise UsageError(f"{with_hint(error)}; {total.changed:,} were changed") from error

        try:
            code = (
                report_missing(await ask(explain(arguments), ids, change), refusals=True)
                if ids
                else 0
            )
        except asyncio.CancelledError:
            warn(f"interrupted: {total.changed:,} of {bulk.count(selected)} done")
            raise
    return total, code


def _report(arguments: argparse.Namespace, selected: int, done: BulkResult) -> None:
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
        return
    if arguments.dry_run:
        say(f"would {arguments.command} {bulk.count(selected)}")
        return
    say(f"{arguments.command}: {bulk.count(done.changed)}")
    for remark in done.remarks(selected):
        say(remark)


# --- sequences


@on_shards
async def set_status_command(
    arguments: argparse.Namespace, _: Settings, shards: Sequence[Shard]
) -> int:
    change = bulk.SEQUENCE_STATUSES[arguments.command]
    names = sorted(set(arguments.sequences))

    async def work(shard: Shard) -> list[dict[str, Any]]:
        async with connected(shard) as connection:
            for name in names:
                await check_names(connection, name)
            reason = bulk.changed_by(arguments.reason)
            rows = await bulk.set_status(connection, names, change.status, reason)
            active = await bulk.count_active(connection, names)
            return [{**row, "active": active[row["name"]]} for row in rows]

    # an unavailable shard must not prevent a pause in the others
    answers = await ask(explain(arguments), shards, work, warn=warn)
    rows = [(shard, row) for shard, found in answers.found.items() for row in found]
    if arguments.json:
        say_json([{**labelled(*one, as_json=True), "status": change.status} for one in rows])
        return report_missing(answers, refusals=True)
    for name in names:
        ours = [row for _, row in rows if row["name"] == name]
        already = " already" if all(row["before"] == change.status for row in ours) else ""
        active = sum(row["active"] for row in ours)
        where = f" in {', '.join(str(shard.name) for shard in answers.found)}"
        say(
            f"{name} is {change.status}{already}{where if answers.missing else ''}: "
            f"{bulk.count(active)} {change.effect(active)}"
        )
    return report_missing(answers, refusals=True)
