"""The command line: arguments and printing only."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

import asyncpg
from pydantic import SecretStr
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sequencerd import daemon, definitions, demo, embedded, migrate
from sequencerd.core import dates
from sequencerd.core.model import NEVER
from sequencerd.errors import SequencerdError, UsageError
from sequencerd.logs import make_log
from sequencerd.settings import Settings, load
from sequencerd.store import QUERIES

Command = Callable[[argparse.Namespace, Settings, str], Coroutine[Any, Any, int]]
"""What a command does with its arguments, the settings and the database's URL."""

TAIL_INTERVAL = 0.5  # seconds
TAIL_OVERLAP = timedelta(seconds=10)
"""Rows are committed in another order than they are made; this far back is read again."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one command and exits: 0 done, 1 failed, 2 wrong arguments or settings."""
    try:
        code = _main(_parser().parse_args(arguments))
    except (SequencerdError, embedded.EmbeddedError) as error:
        print(f"sequencerd: {error}", file=sys.stderr)
        code = getattr(error, "exit_code", 1)
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:
        # the reader has gone, as `| head` does: not an error, and nothing more to write
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    sys.exit(code)


def _main(arguments: argparse.Namespace) -> int:
    if arguments.command == "demo":
        return demo.main(arguments.psql)
    settings = load(os.environ, arguments.config)
    if arguments.database:
        database = settings.database.model_copy(update={"url": SecretStr(arguments.database)})
        settings = settings.model_copy(update={"database": database})
    with _database(settings) as url:
        return _run(arguments.run(arguments, settings, url))


def _run(work: Coroutine[Any, Any, int]) -> int:
    """asyncio.run, on uvloop where it is installed."""
    try:
        import uvloop  # noqa: PLC0415 - an extra
    except ImportError:
        return asyncio.run(work)
    return uvloop.run(work)


@contextmanager
def _database(settings: Settings) -> Iterator[str]:
    """The URL of the database: the one that is set, or of an embedded server, started for us."""
    if settings.database.url is not None:
        yield settings.database.url.get_secret_value()
        return
    folder = embedded.default_folder()
    print(f"sequencerd: no database is set, using the embedded one in {folder}", file=sys.stderr)
    with embedded.running(folder) as server:
        asyncio.run(_migrate(server.url))
        yield server.url


# --- commands


async def _run_daemon(_: argparse.Namespace, settings: Settings, url: str) -> int:
    await daemon.run(url, settings, make_log(settings.log))
    return 0


async def _migrate(url: str) -> list[migrate.Migration]:
    connection = await daemon.connect(url)
    try:
        return await migrate.migrate(connection)
    finally:
        await connection.close()


async def _migrate_command(_: argparse.Namespace, __: Settings, url: str) -> int:
    applied = await _migrate(url)
    for migration in applied:
        print(f"applied {migration.name}")
    if not applied:
        print("nothing to apply")
    return 0


async def _apply(arguments: argparse.Namespace, settings: Settings, url: str) -> int:
    runners = daemon.make_runners(settings)
    found = [d for file in arguments.files for d in definitions.read_file(file, runners)]
    connection = await _connect(url)
    try:
        async with connection.transaction():
            applied = [await definitions.apply(connection, definition) for definition in found]
    finally:
        await connection.close()
    for one in applied:
        changes = [
            f"{word} {', '.join(names)}"
            for word, names in (
                ("added", one.added),
                ("changed", one.changed),
                ("removed", one.removed),
            )
            if names
        ]
        print(f"{one.sequence}: {'; '.join(changes) or 'nothing changed'}")
    return 0


async def _enroll(arguments: argparse.Namespace, _: Settings, url: str) -> int:
    try:
        data = json.loads(arguments.data)
    except ValueError as error:
        raise UsageError(f"--data is not JSON: {error}") from error
    if not isinstance(data, dict):
        raise UsageError('--data must be a JSON object such as {"email": "ada@example.com"}')
    at = None
    if arguments.at is not None and (at := dates.parse(arguments.at, dates.zone("UTC"))) is None:
        raise UsageError(f"--at {arguments.at!r} is not an ISO 8601 date")
    connection = await _connect(url)
    try:
        id_ = await connection.fetchval(
            QUERIES["enroll"],
            arguments.sequence,
            arguments.subject,
            json.dumps(data),
            arguments.timezone,
            arguments.step,
            at,
        )
    except (asyncpg.IntegrityConstraintViolationError, asyncpg.DataError) as error:
        raise UsageError(_with_hint(error)) from error
    finally:
        await connection.close()
    if id_ is None:
        raise UsageError(
            f"{arguments.subject} is in {arguments.sequence} already; its reentry policy allows "
            "no second time"
        )
    print(json.dumps({"id": id_}) if arguments.json else f"enrolled as {id_}")
    return 0


async def _status(arguments: argparse.Namespace, _: Settings, url: str) -> int:
    rows = await _fetch(url, "status", arguments.sequence)
    if arguments.sequence and not rows:
        raise UsageError(f"sequence {arguments.sequence!r} does not exist or has no steps")
    _show(rows, arguments.json, empty="no sequences yet; sequencerd apply FILE makes some")
    return 0


async def _list(arguments: argparse.Namespace, _: Settings, url: str) -> int:
    rows = await _fetch(
        url,
        "list",
        arguments.sequence,
        arguments.step,
        arguments.subject,
        arguments.status,
        arguments.limit,
    )
    _show(rows, arguments.json, empty="no such enrollments")
    return 0


async def _show_enrollment(arguments: argparse.Namespace, _: Settings, url: str) -> int:
    found = await _fetch(url, "show", arguments.id)
    if not found:
        raise UsageError(f"enrollment {arguments.id} does not exist")
    history = [dict(row) for row in await _fetch(url, "history", arguments.id)]
    row = dict(found[0])
    row["data"] = json.loads(row["data"])
    row["next"] = _what_next(row)
    if arguments.json:
        print(json.dumps({**row, "history": history}, default=_plain))
        return 0
    table = Table(show_header=False, box=None)
    for key in ("subject", "sequence", "status", "step", "type", "entered_at", "next", "wake_at"):
        table.add_row(key, escape(_text(row[key])))
    for key in ("attempt", "failure", "last_error", "goals_met", "timezone", "data"):
        if row[key]:
            table.add_row(key, escape(_text(row[key])))
    _console().print(table)
    _show(history, as_json=False, empty="no events yet")
    return 0


def _what_next(row: Mapping[str, Any]) -> str:
    """In words: what an enrollment waits for."""
    if row["status"] != "active":
        return f"nothing, it is {row['status']}"
    then = f"then {row['next_step'] or 'the end'}"
    if row["sequence_status"] == "paused":
        return "nothing while the sequence is paused"
    if row["leased_by"]:
        return f"{row['type']} is being executed by {row['leased_by']}, {then}"
    if _is_never(row["wake_at"]):
        return f"waits for a change, {then}"
    if row["entered_at"] is None:
        return f"begins at {_text(row['wake_at'])}"
    return f"is looked at again at {_text(row['wake_at'])}, {then}"


async def _tail(arguments: argparse.Namespace, _: Settings, url: str) -> int:
    connection = await _connect(url)
    try:
        since = await connection.fetchval(QUERIES["server_time"]) - arguments.since
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
        print(json.dumps(dict(row), default=_plain), flush=True)
        return
    message = f"  {row['message']}" if row["message"] else ""
    print(
        f"{_text(row['at'])}  {row['enrollment_id']} {row['subject'] or ''}  "
        f"{row['sequence']}/{row['step']}  {row['action']}{message}",
        flush=True,
    )


# --- the database, for commands


async def _connect(url: str) -> asyncpg.Connection:
    connection = await daemon.connect(url)
    try:
        await migrate.check(connection)
    except BaseException:
        await connection.close()
        raise
    return connection


async def _fetch(url: str, query: str, *parameters: object) -> list[asyncpg.Record]:
    connection = await _connect(url)
    try:
        rows: list[asyncpg.Record] = await connection.fetch(QUERIES[query], *parameters)
    finally:
        await connection.close()
    return rows


def _with_hint(error: asyncpg.PostgresError) -> str:
    hint = getattr(error, "hint", None)
    return f"{error.args[0]}; {hint}" if hint else str(error.args[0])


# --- printing


def _console() -> Console:
    """Tables are never cut where no terminal bounds them."""
    return Console() if sys.stdout.isatty() else Console(width=10_000)


def _show(rows: Sequence[Any], as_json: bool, empty: str) -> None:
    if as_json:
        print(json.dumps([dict(row) for row in rows], default=_plain))
    elif not rows:
        print(empty)
    else:
        table = Table(box=None)
        for name in dict(rows[0]):
            table.add_column(name, overflow="fold")
        for row in rows:
            table.add_row(*(escape(_text(value)) for value in dict(row).values()))
        _console().print(table)


def _text(value: object) -> str:
    match value:
        case None:
            return "-"
        case datetime():
            if _is_never(value):
                return "never"
            return f"{value.astimezone(UTC):%Y-%m-%d %H:%M:%S}Z"
        case list() | tuple():
            return ", ".join(map(str, value))
        case dict():
            return json.dumps(value, ensure_ascii=False)
        case _:
            return str(value)


def _is_never(at: datetime) -> bool:
    """Whether it is what asyncpg makes of PostgreSQL's infinity."""
    return at.year == NEVER.year


def _plain(value: object) -> object:
    """For JSON: times in ISO 8601, "infinity" for never."""
    if isinstance(value, datetime):
        return "infinity" if _is_never(value) else value.astimezone(UTC).isoformat()
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")


# --- arguments


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sequencerd",
        description="Moves enrollments through sequences of steps, on PostgreSQL.",
    )
    parser.add_argument("--version", action="version", version=version("sequencerd"))
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="settings in TOML (or SEQUENCERD_CONFIG)"
    )
    parser.add_argument(
        "--database", metavar="URL", help="postgresql://user@host/name (or SEQUENCERD_DATABASE)"
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, run: Command | None, about: str, example: str) -> argparse.ArgumentParser:
        command = commands.add_parser(
            name,
            help=about,
            description=f"{about[0].upper()}{about[1:]}.",
            epilog=f"Example: sequencerd {example}",
        )
        command.set_defaults(run=run)
        return command

    def add_json(command: argparse.ArgumentParser) -> None:
        command.add_argument("--json", action="store_true", help="print JSON, for a program")

    add("run", _run_daemon, "run the daemon until SIGTERM", "--config sequencerd.toml run")
    add("migrate", _migrate_command, "make or update the schema", "migrate")
    apply = add("apply", _apply, "make the sequences of a file", "apply onboarding.yaml")
    apply.add_argument("files", nargs="+", type=Path, metavar="FILE", help="YAML or JSON")

    enroll = add(
        "enroll",
        _enroll,
        "enroll a subject in a sequence",
        """enroll onboarding user-42 --data '{"email": "ada@example.com"}'""",
    )
    enroll.add_argument("sequence")
    enroll.add_argument("subject")
    enroll.add_argument("--data", default="{}", metavar="JSON", help="what its templates read")
    enroll.add_argument("--timezone", metavar="ZONE", help="the subject's own")
    enroll.add_argument("--step", help="begin there instead of at the first step")
    enroll.add_argument("--at", metavar="TIME", help="begin then, ISO 8601")
    add_json(enroll)

    status = add("status", _status, "show how many are at each step", "status onboarding")
    status.add_argument("sequence", nargs="?")
    add_json(status)

    list_ = add("list", _list, "list enrollments", "list --sequence onboarding --status failed")
    for option in ("sequence", "step", "subject"):
        list_.add_argument(f"--{option}")
    list_.add_argument("--status", choices=["active", "completed", "cancelled", "failed"])
    list_.add_argument("--limit", type=int, default=100)
    add_json(list_)

    show = add("show", _show_enrollment, "show where an enrollment is, and its history", "show 7")
    show.add_argument("id", type=int)
    add_json(show)

    tail = add("tail", _tail, "print events as they happen", "tail --sequence onboarding")
    tail.add_argument("--sequence")
    tail.add_argument("--id", type=int, metavar="ID", help="of one enrollment")
    tail.add_argument(
        "--since",
        type=lambda text: timedelta(seconds=float(text)),
        default=timedelta(0),
        metavar="SECONDS",
        help="begin with the events of the last seconds",
    )
    add_json(tail)

    about = "see it work in twenty seconds, with a database and servers of its own"
    shown = add("demo", None, about, "demo")
    shown.add_argument(
        "--psql",
        nargs=argparse.REMAINDER,
        metavar="ARGUMENT",
        help="open psql on the database that the demo left, with these arguments",
    )
    return parser
