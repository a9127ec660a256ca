"""Commands that look: status, watch, list, show, tail, doctor."""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime, timedelta
from typing import Any

import asyncpg
from rich.live import Live
from rich.table import Table

from sequencerd import doctor
from sequencerd.cli.commands import (
    Commands,
    add_json,
    connect,
    fetch,
    on_database,
    positive,
)
from sequencerd.cli.output import cell, console, say, say_json, show, table, warn
from sequencerd.errors import UsageError
from sequencerd.settings import Settings
from sequencerd.store import QUERIES
from sequencerd.words import text, what_next

PROBLEMS = 20  # that are shown below the steps
TAIL_INTERVAL = 0.5  # seconds
MOST_SECONDS = 10 * 365 * 86400
TAIL_OVERLAP = timedelta(seconds=10)
"""Rows are committed in another order than they are made; this far back is read again."""


def add_to(commands: Commands) -> None:
    """Adds these commands."""
    status = commands.add(
        "status", on_database(_status), "show how many are at each step", "status onboarding"
    )
    status.add_argument("sequence", nargs="?")
    add_json(status)

    watch = commands.add(
        "watch", on_database(_watch), "show the same, again and again", "watch onboarding"
    )
    watch.add_argument("sequence", nargs="?")
    watch.add_argument(
        "--interval",
        type=_seconds,
        default=2.0,
        metavar="SECONDS",
        help="default: %(default)g; never less than the last look took",
    )

    list_ = commands.add(
        "list", on_database(_list), "list enrollments", "list --sequence onboarding --status failed"
    )
    for option in ("sequence", "step", "subject"):
        list_.add_argument(f"--{option}")
    list_.add_argument("--status", choices=["active", "completed", "cancelled", "failed"])
    list_.add_argument("--failure", metavar="CODE", help="who failed with it, such as error")
    list_.add_argument(
        "--overdue", action="store_true", help="who should have been looked at a minute ago"
    )
    list_.add_argument(
        "--after", type=positive, default=0, metavar="ID", help="the next page: after this one"
    )
    list_.add_argument("--limit", type=positive, default=100, help="default: %(default)s")
    add_json(list_)

    show = commands.add(
        "show",
        on_database(_show_enrollment),
        "show where an enrollment is, and its history",
        "show 7",
    )
    show.add_argument("id", type=positive)
    add_json(show)

    tail = commands.add(
        "tail", on_database(_tail), "print events as they happen", "tail --sequence onboarding"
    )
    tail.add_argument("--sequence")
    tail.add_argument("--id", type=positive, metavar="ID", help="of one enrollment")
    tail.add_argument(
        "--since",
        type=_seconds,
        default=0.0,
        metavar="SECONDS",
        help="begin with the events of the last seconds",
    )
    add_json(tail)

    examine = commands.add(
        "doctor",
        on_database(_doctor),
        "look for what would keep a daemon from its work",
        "doctor",
    )
    add_json(examine)


def _seconds(value: str) -> float:
    try:
        seconds = float(value)
    except ValueError:
        seconds = -1
    if not 0 <= seconds <= MOST_SECONDS:
        raise argparse.ArgumentTypeError(f"{value!r} is not a number of seconds")
    return seconds


async def _status(arguments: argparse.Namespace, _: Settings, url: str) -> int:
    rows = await fetch(url, "status", arguments.sequence)
    _check_found(rows, arguments.sequence)
    show(rows, arguments.json, empty="no sequences yet; sequencerd apply FILE makes some")
    if not arguments.json and (
        problems := await fetch(url, "reported_problems", arguments.sequence, PROBLEMS)
    ):
        say()
        show(problems, as_json=False, empty="")
    return 0


def _check_found(rows: Sequence[object], sequence: str | None) -> None:
    if sequence and not rows:
        raise UsageError(f"sequence {sequence!r} does not exist or has no steps")


async def _watch(arguments: argparse.Namespace, _: Settings, url: str) -> int:
    connection = await connect(url)
    loop = asyncio.get_running_loop()
    screen = console()
    before: dict[tuple[str, str], int] = {}
    try:
        with Live(console=screen, auto_refresh=False, screen=screen.is_terminal) as live:
            while True:
                begun = loop.time()
                rows = [
                    dict(row)
                    for row in await connection.fetch(QUERIES["status"], arguments.sequence)
                ]
                _check_found(rows, arguments.sequence)
                for row in rows:
                    place = row["sequence"], row["step"]
                    row["change"] = f"{row['active'] - before.get(place, row['active']):+}"
                    before[place] = row["active"]
                if screen.is_terminal:
                    live.update(table(rows), refresh=True)
                else:
                    screen.print(table(rows))
                await asyncio.sleep(max(arguments.interval, loop.time() - begun))
    finally:
        connection.terminate()


async def _list(arguments: argparse.Namespace, _: Settings, url: str) -> int:
    rows = await fetch(
        url,
        "list",
        arguments.sequence,
        arguments.step,
        arguments.subject,
        arguments.status,
        arguments.failure,
        arguments.overdue,
        arguments.after,
        arguments.limit,
    )
    show(rows, arguments.json, empty="no such enrollments")
    if len(rows) == arguments.limit and not arguments.json:
        warn(f"there may be more: --after {rows[-1]['id']}")
    return 0


async def _show_enrollment(arguments: argparse.Namespace, _: Settings, url: str) -> int:
    found = await fetch(url, "show", arguments.id)
    if not found:
        raise UsageError(f"enrollment {arguments.id} does not exist")
    history = [dict(row) for row in await fetch(url, "history", arguments.id)]
    row = dict(found[0])
    row["data"] = json.loads(row["data"])
    row["next"] = what_next(row)
    row["config"] = json.loads(row["config"] or "null")
    if arguments.json:
        say_json({**row, "history": history})
        return 0
    facts = Table(show_header=False, box=None)
    for key in ("subject", "sequence", "status", "step", "type", "entered_at", "next", "wake_at"):
        facts.add_row(key, cell(row[key]))
    for key in ("attempt", "failure", "last_error", "goals_met", "timezone", "data"):
        if row[key]:
            facts.add_row(key, cell(row[key]))
    console().print(facts)
    show(history, as_json=False, empty="no events yet")
    return 0


async def _tail(arguments: argparse.Namespace, _: Settings, url: str) -> int:
    connection = await connect(url)
    try:
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


async def _doctor(arguments: argparse.Namespace, settings: Settings, url: str) -> int:
    findings = []
    async for finding in doctor.examine(url, settings):
        findings.append(finding)
        if not arguments.json:
            mark = {"ok": "ok     ", "warning": "WARNING", "error": "ERROR  "}[finding.level]
            say(f"{mark}  {finding.about}: {finding.seen}")
            if finding.advice:
                say(f"         {finding.advice}")
    if arguments.json:
        say_json([asdict(finding) for finding in findings])
    return int(any(finding.level == "error" for finding in findings))
