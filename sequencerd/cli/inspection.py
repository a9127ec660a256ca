"""Commands that read: status, watch, list, show, tail."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg

from sequencerd.cli.commands import check_names, connect, on_database, reading
from sequencerd.cli.output import is_terminal, laid_out, say, say_json, say_lines, show, warn
from sequencerd.core.config import parse_json
from sequencerd.core.describe import text
from sequencerd.core.model import DefinitionError
from sequencerd.errors import UsageError
from sequencerd.settings import Settings
from sequencerd.storage import connections
from sequencerd.storage.connections import Shard
from sequencerd.storage.statements import QUERIES

NO_SEQUENCES = "no sequences yet; create one with sequencerd apply FILE"
PROBLEMS = 20  # that are shown below the steps
TAIL_INTERVAL = 0.5  # seconds
TAIL_OVERLAP = timedelta(seconds=10)
"""Rows are committed in another order than they are made; this far back is read again."""


@on_database
async def status_command(arguments: argparse.Namespace, _: Settings, shard: Shard) -> int:
    async with reading(shard) as connection:
        rows = await connection.fetch(QUERIES["status"], arguments.sequence)
        description = await connection.fetchval(QUERIES["description"], arguments.sequence)
        problems = await connection.fetch(
            QUERIES["reported_problems"], arguments.sequence, PROBLEMS
        )
    _check_found(rows, arguments.sequence)
    if description and not arguments.json:
        say_lines(description)
    show(rows, arguments.json, empty=NO_SEQUENCES)
    if problems and not arguments.json:
        say()
        show(problems, as_json=False, empty="")
    return 0


def _check_found(rows: Sequence[object], sequence: str | None) -> None:
    if sequence and not rows:
        raise UsageError(f"sequence {sequence!r} does not exist or has no steps")


@on_database
async def watch_command(arguments: argparse.Namespace, _: Settings, shard: Shard) -> int:
    connection = await connect(shard)
    loop = asyncio.get_running_loop()
    before: dict[tuple[str, str], int] = {}
    try:
        with _screen() as draw:
            while True:
                begun = loop.time()
                async with connections.counting(connection):
                    found = await connection.fetch(QUERIES["status"], arguments.sequence)
                _check_found(found, arguments.sequence)
                rows = [dict(row) for row in found]
                for row in rows:
                    place = row["sequence"], row["step"]
                    row["change"] = f"{row['active'] - before.get(place, row['active']):+}"
                    before[place] = row["active"]
                draw(rows)
                await asyncio.sleep(max(arguments.interval, loop.time() - begun))
    finally:
        connection.terminate()


@contextmanager
def _screen() -> Iterator[Callable[[Sequence[Any]], None]]:
    """Return what draws rows: on a terminal in place of those before, otherwise below them."""
    if not is_terminal(sys.stdout):
        yield lambda rows: show(rows, as_json=False, empty=NO_SEQUENCES)
        return
    from rich.console import Console  # noqa: PLC0415 - only a terminal needs it
    from rich.live import Live  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    screen = Console()
    with Live(console=screen, auto_refresh=False, screen=True) as live:

        def draw(rows: Sequence[Any]) -> None:
            lines = laid_out(rows, screen.width, datetime.now(UTC)) if rows else [NO_SEQUENCES]
            live.update(Text("\n".join(lines), no_wrap=True), refresh=True)

        yield draw


@on_database
async def list_command(arguments: argparse.Namespace, _: Settings, shard: Shard) -> int:
    async with reading(shard) as connection:
        await check_names(connection, arguments.sequence, arguments.step)
        rows = await connection.fetch(
            QUERIES["list"],
            arguments.sequence,
            arguments.step,
            arguments.subject,
            arguments.status,
            arguments.failure,
            arguments.overdue,
            arguments.after,
            arguments.limit,
        )
    show(rows, arguments.json, empty="no matching enrollments")
    if len(rows) == arguments.limit and not arguments.json:
        warn(f"there may be more; next page: --after {rows[-1]['id']}")
    return 0


@on_database
async def show_enrollment_command(arguments: argparse.Namespace, _: Settings, shard: Shard) -> int:
    from sequencerd.core.step_types import is_instant  # noqa: PLC0415 - only this one needs them
    from sequencerd.core.what_next import what_next  # noqa: PLC0415 - as above

    async with reading(shard) as connection:
        found = await connection.fetchrow(QUERIES["show"], arguments.id)
        history = [dict(row) for row in await connection.fetch(QUERIES["history"], arguments.id)]
    if not found:
        raise UsageError(f"enrollment {arguments.id} does not exist")
    row = dict(found)
    row["next"] = what_next(row)
    if is_instant(row["type"] or ""):
        row["topic"] = None  # which is of side effects
    for key in ("data", "config"):
        try:
            row[key] = parse_json(row[key] or "null")
        except DefinitionError as error:  # what Python can't read stays a text
            row["problem"] = row["problem"] or f"{key} {error}"
    if arguments.json:
        say_json({**row, "history": history})
        return 0
    for key in ("subject", "sequence", "status", "step", "type", "entered_at", "next", "wake_at"):
        say(f"{key:11}  {text(row[key])}")
    others = ("problem", "topic", "waits_until", "attempt", "failure", "last_error", "goals_met")
    for key in (*others, "timezone", "original_id", "data"):
        if row[key]:
            say(f"{key:11}  {text(row[key])}")
    say()
    show(history, as_json=False, empty="no events yet")
    return 0


@on_database
async def tail_command(arguments: argparse.Namespace, _: Settings, shard: Shard) -> int:
    connection = await connect(shard)
    try:
        await check_names(connection, arguments.sequence)
        if arguments.id is not None and not await connection.fetch(QUERIES["show"], arguments.id):
            raise UsageError(f"enrollment {arguments.id} does not exist")
        since = await connection.fetchval(QUERIES["server_time"])
        since -= timedelta(seconds=arguments.since)
        seen: dict[tuple[Any, ...], datetime] = {}
        while True:
            rows = await connection.fetch(
                QUERIES["events_since"], since, arguments.sequence, arguments.id
            )
            for row in rows:
                key = (row["enrollment_id"], row["at"], row["action"])
                if key not in seen:
                    seen[key] = row["at"]
                    _print_event(row, arguments.json)
            if rows:
                since = max(since, rows[-1]["at"] - TAIL_OVERLAP)
                seen = {key: at for key, at in seen.items() if at > since}
            await asyncio.sleep(TAIL_INTERVAL)
    finally:
        connection.terminate()


def _print_event(row: asyncpg.Record, as_json: bool) -> None:
    if as_json:
        say_json(dict(row))
        return
    message = f"  {row['message']}" if row["message"] else ""
    say(
        f"{text(row['at'])}  {row['enrollment_id']} {row['subject'] or ''}  "
        f"{row['sequence']}/{row['step']}  {row['action']}{message}"
    )
