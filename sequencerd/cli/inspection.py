"""Commands that read: status, watch, list, show, tail."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

import asyncpg

from sequencerd.cli.commands import (
    STATEMENT_TIMEOUT,
    check_names,
    check_sequence,
    connect,
    explain,
    on_shards,
    reading,
    report_missing,
)
from sequencerd.cli.ids import Id, labelled, shard_of_id
from sequencerd.cli.output import laid_out, say, say_json, show, warn
from sequencerd.core.config import parse_json
from sequencerd.core.describe import text
from sequencerd.core.faults import DefinitionError
from sequencerd.errors import UsageError
from sequencerd.settings import Settings
from sequencerd.storage import connections
from sequencerd.storage.connections import Shard
from sequencerd.storage.every_shard import ShardAnswers, ask, differences
from sequencerd.storage.statements import QUERIES

NO_SEQUENCES = "no sequences yet; create one with sequencerd apply FILE"
MAX_PROBLEMS = 20  # that are shown below the steps
TAIL_INTERVAL = 0.5  # seconds
TAIL_OVERLAP = timedelta(seconds=10)
"""Rows are not committed in the order of their times, so this much of the past is read again."""


class _Status(NamedTuple):
    """What `status` reads of one shard."""

    steps: list[asyncpg.Record]
    description: str | None
    problems: list[asyncpg.Record]
    definitions: dict[str, str]


@on_shards
async def status_command(
    arguments: argparse.Namespace, _: Settings, shards: Sequence[Shard]
) -> int:
    name = arguments.sequence

    async def read(shard: Shard) -> _Status:
        async with reading(shard) as connection:
            return _Status(
                await connection.fetch(QUERIES["status"], name),
                await connection.fetchval(QUERIES["description"], name),
                await connection.fetch(QUERIES["reported_problems"], name, MAX_PROBLEMS),
                dict(await connection.fetch(QUERIES["definition_digests"], name))
                if len(shards) > 1
                else {},
            )

    answers = await ask(explain(arguments), shards, read)
    rows = added_up({shard: found.steps for shard, found in answers.found.items()})
    await _check_found(arguments, answers, rows)
    descriptions = [found.description for found in answers.found.values() if found.description]
    if descriptions and not arguments.json:
        for line in descriptions[0].splitlines():
            say(line, hang=0)
    show(rows, arguments.json, empty=NO_SEQUENCES)
    problems = [
        labelled(shard, row, arguments.json)
        for shard, found in answers.found.items()
        for row in found.problems
    ]
    if problems and not arguments.json:
        say()
        show(problems[:MAX_PROBLEMS], as_json=False, empty="")
    definitions = {str(shard.name): found.definitions for shard, found in answers.found.items()}
    if differing := differences(definitions):
        warn(f"sequencerd: the shards have different definitions of {'; '.join(differing)}")
    return report_missing(answers)


_COUNTS = ("active", "due", "overdue", "failed", "rescheduling")


def added_up(by_shard: Mapping[Shard, Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Add up the status of steps in several shards. Differences between the shards, such as a pause
    in one of them, are shown for each.
    """
    if [shard.name for shard in by_shard] == [None]:
        return [dict(row) for rows in by_shard.values() for row in rows]
    steps: dict[tuple[str, str], dict[Shard, Mapping[str, Any]]] = {}
    for shard, rows in by_shard.items():
        for row in rows:
            steps.setdefault((row["sequence"], row["step"]), {})[shard] = row
    in_order = sorted(steps.values(), key=lambda found: next(iter(found.values()))["sequence"])
    return [
        {
            **{name: _merge_values(name, found) for name in dict(next(iter(found.values())))},
            "shards": [str(shard.name) for shard in found],
        }
        for found in in_order
    ]


def _merge_values(name: str, rows: Mapping[Shard, Mapping[str, Any]]) -> Any:
    values = [row[name] for row in rows.values() if row[name] is not None]
    if name in _COUNTS:
        return sum(values) if values else None
    if name == "next_wake_at":
        return min(values, default=None)
    if len({*values}) <= 1:
        return values[0] if values else None
    return "; ".join(f"{shard.name}: {row[name]}" for shard, row in rows.items() if row[name])


async def _check_found(
    arguments: argparse.Namespace, answers: ShardAnswers[Any], rows: Sequence[object]
) -> None:
    if arguments.sequence is not None and not rows:
        await check_sequence(arguments, answers)
        name = arguments.sequence
        raise UsageError(f"sequence {name!r} was removed; its enrollments: list --sequence {name}")


@on_shards
async def watch_command(arguments: argparse.Namespace, _: Settings, shards: Sequence[Shard]) -> int:
    loop = asyncio.get_running_loop()
    before: dict[tuple[str, str], int] = {}
    with _kept_connections() as connected, _screen() as draw:

        async def read(shard: Shard) -> list[asyncpg.Record]:
            connection = await connected(shard)
            async with connections.counting(connection):
                rows: list[asyncpg.Record] = await connection.fetch(
                    QUERIES["status"], arguments.sequence
                )
            return rows

        while True:
            begun = loop.time()
            answers = await ask(explain(arguments), shards, read)
            rows = added_up(answers.found)
            if not answers.missing:  # which may have the sequence
                await _check_found(arguments, answers, rows)
            for row in rows:
                row.pop("shards", None)
                place = row["sequence"], row["step"]
                row["change"] = f"{row['active'] - before.get(place, row['active']):+}"
                before[place] = row["active"]
            draw(rows, answers.lines())
            await asyncio.sleep(max(arguments.interval, loop.time() - begun))


@contextmanager
def _kept_connections() -> Iterator[Callable[[Shard], Awaitable[asyncpg.Connection]]]:
    """Provide a connection to a shard, which is kept for as long as it works."""
    kept: dict[Shard, asyncpg.Connection] = {}

    async def connected(shard: Shard) -> asyncpg.Connection:
        if shard not in kept or kept[shard].is_closed():
            kept[shard] = await connect(
                shard, seconds=None if shard.name is None else STATEMENT_TIMEOUT
            )
        return kept[shard]

    try:
        yield connected
    finally:
        for connection in kept.values():
            connection.terminate()


@contextmanager
def _screen() -> Iterator[Callable[[Sequence[Any], Sequence[str]], None]]:
    """Return the function that prints rows and lines: on a terminal in place of the previous ones,
    otherwise below them.
    """
    if not sys.stdout.isatty():

        def add(rows: Sequence[Any], notes: Sequence[str]) -> None:
            show(rows, as_json=False, empty=NO_SEQUENCES)
            for note in notes:
                warn(note)

        yield add
        return
    from rich.console import Console  # noqa: PLC0415 - only a terminal needs it
    from rich.live import Live  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    screen = Console()
    with Live(console=screen, auto_refresh=False, screen=True) as live:

        def draw(rows: Sequence[Any], notes: Sequence[str]) -> None:
            lines = laid_out(rows, screen.width, datetime.now(UTC)) if rows else [NO_SEQUENCES]
            live.update(Text("\n".join([*lines, *notes]), no_wrap=True), refresh=True)

        yield draw


@on_shards
async def list_command(arguments: argparse.Namespace, _: Settings, shards: Sequence[Shard]) -> int:
    after = _after(shards, arguments.after)

    async def read(shard: Shard) -> list[asyncpg.Record]:
        async with reading(shard) as connection:
            await check_names(connection, arguments.sequence, arguments.step, arguments.failure)
            rows: list[asyncpg.Record] = await connection.fetch(
                QUERIES["list"],
                arguments.sequence,
                arguments.step,
                arguments.subject,
                arguments.status,
                arguments.failure,
                arguments.overdue,
                after[shard],
                arguments.limit,
            )
            return rows

    answers = await ask(explain(arguments), shards, read)
    found = ((shard, row) for shard, rows in answers.found.items() for row in rows)
    page = sorted(found, key=lambda one: one[1]["id"])[: arguments.limit]  # the sort is stable
    rows = [labelled(shard, row, arguments.json) for shard, row in page]
    show(rows, arguments.json, empty="no matching enrollments")
    if len(rows) == arguments.limit and not arguments.json:
        warn(f"there may be more; next page: --after {rows[-1]['id']}")
    return report_missing(answers)


def _after(shards: Sequence[Shard], id_: Id) -> dict[Shard, int]:
    """Return the id after which a page continues in each shard: pages are in the order of ids and,
    for each id, of the shards.
    """
    if id_.shard is None:
        return dict.fromkeys(shards, id_.number)
    place = shards.index(shard_of_id(shards, id_))
    return {shard: id_.number - (number > place) for number, shard in enumerate(shards)}


@on_shards
async def show_enrollment_command(
    arguments: argparse.Namespace, _: Settings, shards: Sequence[Shard]
) -> int:
    from sequencerd.core.step_types import (  # noqa: PLC0415 - only this one needs them
        config_in_order,
        is_instant,
    )
    from sequencerd.core.what_next import what_next  # noqa: PLC0415 - as above

    shard, number = shard_of_id(shards, arguments.id), arguments.id.number

    async def read(shard: Shard) -> tuple[asyncpg.Record | None, list[asyncpg.Record]]:
        async with reading(shard) as connection:
            return (
                await connection.fetchrow(QUERIES["show"], number),
                await connection.fetch(QUERIES["history"], number),
            )

    found, events = (await ask(explain(arguments), [shard], read)).found[shard]
    if not found:
        raise UsageError(f"enrollment {arguments.id} does not exist")
    history = [dict(event) for event in events]
    row = dict(found)
    row["next"] = what_next(row)
    if is_instant(row["type"] or ""):
        row["topic"] = None  # which is of side effects
    for key in ("data", "config"):
        try:
            row[key] = parse_json(row[key] or "null")
        except DefinitionError as error:  # values that Python cannot parse remain texts
            row["problem"] = row["problem"] or f"{key} {error}"
    if isinstance(row["config"], dict):
        row["config"] = config_in_order(row["type"] or "", row["config"])
    if arguments.json:
        say_json({**labelled(shard, row, True), "history": history})
        return 0
    if shard.name is not None:
        say(f"{'shard':11}  {shard.name}")
    for key in ("subject", "sequence", "status", "step", "type", "entered_at", "next", "wake_at"):
        say(f"{key:11}  {text(row[key])}")
    others = ("problem", "topic", "waits_until", "attempt", "failure", "last_error", "goals_met")
    for key in (*others, "timezone", "original_id", "data"):
        if row[key]:
            say(f"{key:11}  {text(row[key])}")
    say()
    show(history, as_json=False, empty="no events yet")
    return 0


@on_shards
async def tail_command(arguments: argparse.Namespace, _: Settings, shards: Sequence[Shard]) -> int:
    if arguments.id is not None:
        shards = [shard_of_id(shards, arguments.id)]
    number = None if arguments.id is None else arguments.id.number
    since: dict[Shard, datetime] = {}
    seen: dict[Shard, dict[tuple[Any, ...], datetime]] = {shard: {} for shard in shards}
    with _kept_connections() as connected:

        async def begin(shard: Shard) -> None:
            connection = await connected(shard)
            await check_names(connection, arguments.sequence)
            if number is not None and not await connection.fetch(QUERIES["show"], number):
                raise UsageError(f"enrollment {arguments.id} does not exist")
            now = await connection.fetchval(QUERIES["server_time"])
            since[shard] = now - timedelta(seconds=arguments.since)

        async def read(shard: Shard) -> tuple[datetime, list[asyncpg.Record]]:
            if shard not in since:
                await begin(shard)
            connection = await connected(shard)
            return (
                await connection.fetchval(QUERIES["server_time"]),
                await connection.fetch(
                    QUERIES["events_since"], since[shard], arguments.sequence, number
                ),
            )

        away: AbstractSet[Shard] = frozenset()
        while True:
            answers = await ask(explain(arguments), shards, read)
            new = []
            for shard, (now, rows) in answers.found.items():
                for row in rows:
                    key = tuple(value for name, value in row.items() if name != "subject")
                    if key not in seen[shard]:
                        seen[shard][key] = row["at"]
                        new.append((shard, row))
                if rows:  # an event of the future must not hide those until then
                    last = min(rows[-1]["at"], now)
                    since[shard] = max(since[shard], last - TAIL_OVERLAP)
                    seen[shard] = {k: at for k, at in seen[shard].items() if at > since[shard]}
            for shard, row in sorted(new, key=lambda one: one[1]["at"]):
                _print_event(labelled(shard, row, arguments.json, "enrollment_id"), arguments.json)
            if answers.missing.keys() != away:
                report_missing(answers)
                for shard in away - answers.missing.keys():
                    warn(f"sequencerd: shard {shard.name} is back")
            away = answers.missing.keys()
            await asyncio.sleep(TAIL_INTERVAL)


def _print_event(row: Mapping[str, Any], as_json: bool) -> None:
    if as_json:
        say_json(row)
        return
    message = f"  {row['message']}" if row["message"] else ""
    say(
        f"{text(row['at'])}  {row['enrollment_id']} {row['subject'] or ''}  "
        f"{row['sequence']}/{row['step']}  {row['action']}{message}"
    )
