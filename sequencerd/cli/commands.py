"""The common part of all commands: how they are registered, and how they access the database."""

from __future__ import annotations

import argparse
import asyncio
import os
from collections.abc import (
    AsyncIterator,
    Callable,
    Collection,
    Coroutine,
    Iterator,
    Sequence,
)
from contextlib import asynccontextmanager, contextmanager, nullcontext, suppress
from functools import partial
from typing import Any, TypeVar

import asyncpg
from pydantic import SecretStr

from sequencerd.cli.output import busy, warn
from sequencerd.core.config import nearest
from sequencerd.core.faults import FAILURES
from sequencerd.errors import (
    ArgumentError,
    DatabaseError,
    SequencerdError,
    SettingsError,
    UsageError,
)
from sequencerd.service.dns import ResolvingLoop
from sequencerd.service.systemd import is_service
from sequencerd.settings import Settings
from sequencerd.settings_file import load
from sequencerd.storage import connections, conninfo, migrate, migrations
from sequencerd.storage.connections import Shard
from sequencerd.storage.database_errors import READ_ONLY, TRANSIENT_ERRORS, with_hint
from sequencerd.storage.every_shard import Explain, ShardAnswers, ask
from sequencerd.storage.statements import QUERIES

_T = TypeVar("_T")

STATEMENT_TIMEOUT = 60.0
"""Seconds that a reading command waits for a statement on one of several shards."""

Command = Callable[[argparse.Namespace, Settings], int]
"""Does the work of a command and returns the exit code: 0 done, 1 failed."""

ShardsCommand = Callable[[argparse.Namespace, Settings, Sequence[Shard]], Coroutine[Any, Any, int]]
"""The same, with the shards, or the one database."""


def read_settings(arguments: argparse.Namespace, *secrets: str) -> Settings:
    """Return the settings, with the options of the command line. Raises SettingsError, and
    UsageError for an unknown shard.

    `secrets` names the sections whose secrets the command reads; commands that call servers read
    all.
    """
    wanted: set[str] | None = None if arguments.command in ("run", "doctor") else set(secrets)
    if wanted and arguments.command == "console":
        wanted.add("console")
    if wanted and arguments.database and not arguments.shard:
        wanted -= {"database", "shards"}
    settings = load(os.environ, arguments.config, secrets=wanted)
    for name in arguments.shard or ():
        if name not in settings.shards:
            hint = nearest(name, [*settings.shards])
            raise UsageError(f"there is no shard {name!r} in the settings; {hint}")
    if not arguments.database:
        return settings
    url = {"url": SecretStr(arguments.database), "listen_url": None}
    if not arguments.shard:
        database = settings.database.model_copy(update=url)
        return settings.model_copy(update={"database": database, "shards": {}})
    if len(arguments.shard) > 1:
        raise ArgumentError(
            "--database is the URL of a single shard: specify the shard with --shard"
        )
    shards = {
        name: shard.model_copy(update=url) if name in arguments.shard else shard
        for name, shard in settings.shards.items()
    }
    return settings.model_copy(update={"shards": shards})


_OWNER = "the schema's owner"
_ROLES = {
    **dict.fromkeys(
        ("apply", "archive", "holidays", "move", "pause", "resume"), "sequencer_editor"
    ),
    **dict.fromkeys(("console", "doctor", "run"), "sequencer_daemon"),
    **dict.fromkeys(("export-subject", "forget"), "sequencer_privacy"),
    **dict.fromkeys(("migrate", "grants", "import-original"), _OWNER),
}
"""The roles that commands need in addition to sequencer_enroller; the whole table is in
docs/security.md.
"""


_READING = frozenset(
    {
        *("export", "graph", "history", "list", "preview", "send-test"),
        *("show", "simulate", "status", "tail", "watch"),
    }
)
"""The commands for which sequencer_daemon suffices as well."""


def roles_for(arguments: argparse.Namespace) -> list[str]:
    """Return the roles of which a command needs one; the first is the one to grant."""
    if getattr(arguments, "skip", False):  # it moves enrollments
        return ["sequencer_editor"]
    role = _ROLES.get(arguments.command, "sequencer_enroller")
    return [role, "sequencer_daemon"] if arguments.command in _READING else [role]


def on_shards(run: ShardsCommand) -> Command:
    """Return a command that works on all shards, or on those that --shard names."""

    def command(arguments: argparse.Namespace, _: Settings) -> int:
        settings = read_settings(arguments, "database", "shards")
        wanted = wanted_shards(arguments, settings)
        with nullcontext(shards_of(settings, wanted)) if wanted else _database(settings) as shards:
            try:
                return _run(run(arguments, settings, shards))
            except BrokenPipeError:
                raise  # the error is that of the output: the reader is gone
            except (asyncpg.PostgresError, asyncpg.InterfaceError, ConnectionError) as error:
                raise _run(_explained(arguments, shards[0], error)) from error

    return command


# --- all shards


def report_missing(answers: ShardAnswers[_T], *, refusals: bool = False) -> int:
    """Report what is missing, and return the exit code."""
    lines = answers.lines(refusals=refusals)
    for line in lines:
        warn(f"sequencerd: {line}")
    return int(bool(lines))


def explain(arguments: argparse.Namespace) -> Explain:
    """Return the function that explains errors to the user of a command."""
    return partial(_explained, arguments)


async def _explained(
    arguments: argparse.Namespace, shard: Shard, error: BaseException
) -> SequencerdError:
    """Explain an error to the user of a command."""
    match error:
        case SequencerdError():
            return error
        case asyncpg.InterfaceError(
            __context__=SequencerdError() | asyncpg.PostgresError() as cause
        ):
            return await _explained(arguments, shard, cause)  # the rollback failed as well
        case asyncpg.PostgresConnectionError():
            pass
        case asyncpg.InsufficientPrivilegeError():
            return DatabaseError(f"{with_hint(error)}; {await _advice(arguments, shard)}")
        case asyncpg.ReadOnlySQLTransactionError():
            return DatabaseError(READ_ONLY)
        case asyncpg.QueryCanceledError():
            advice = "if statement_timeout is set for this user or database, set it to 0"
            return DatabaseError(f"{error.args[0]}; {advice}")
        case asyncpg.TransactionRollbackError():  # such as a deadlock
            advice = "another transaction changed the same rows: repeat the command"
            return DatabaseError(f"{error.args[0]}; {advice}")
        case asyncpg.PostgresError():
            return DatabaseError(f"the database rejected the command: {with_hint(error)}")
        case TimeoutError() | asyncpg.InterfaceError(__context__=TimeoutError()):
            return DatabaseError(
                f"the database did not answer within {STATEMENT_TIMEOUT:g} seconds"
            )
    return DatabaseError(f"lost the connection to the database: {error}")


def wanted_shards(arguments: argparse.Namespace, settings: Settings) -> Collection[str]:
    """Return the names of the shards that a command works on: those that --shard names, or that of
    the unit sequencerd@NAME, or all. Raises SettingsError for a unit of an unknown name.
    """
    wanted: Collection[str] = arguments.shard or ()
    instance = os.environ.get("SEQUENCERD_INSTANCE")
    if arguments.command == "run" and instance and settings.shards and not wanted:
        if instance not in settings.shards:
            raise SettingsError(
                f"sequencerd@{instance} serves the shard {instance!r}, which is not in the "
                f"settings; available: {', '.join(settings.shards)}"
            )
        wanted = [instance]
    return wanted or settings.shards


def shards_of(settings: Settings, names: Collection[str]) -> list[Shard]:
    """Return shards of the settings, in the order of these."""
    found = []
    for name in settings.shards:
        if name not in names:
            continue
        database = settings.of_shard(name).database
        url = database.listen_url or database.url
        assert url is not None  # it is required
        number = settings.shard_number(name)
        found.append(Shard(url.get_secret_value(), database.schema_name, name, number))
    return found


async def _advice(arguments: argparse.Namespace, shard: Shard) -> str:
    roles = roles_for(arguments)
    role = roles[0]
    if role == _OWNER:
        return f"run `{arguments.command}` as the schema's owner"
    user = "the login"
    with suppress(SequencerdError, *TRANSIENT_ERRORS):
        connection = await connections.connect(shard)
        try:
            user = await connection.fetchval(QUERIES["quoted_user"])
            for held in roles:
                if await connection.fetchval(QUERIES["has_role"], held):
                    advice = "run `sequencerd grants --apply` as an administrator"
                    return f"{held} lacks privileges: {advice}"
        finally:
            connection.terminate()
    return (
        f"`{arguments.command}` needs a database user with the role {role}: use --database, or "
        f"GRANT {role} TO {user}"
    )


def has_database(settings: Settings) -> bool:
    """Return whether a database is configured: in the settings, or by libpq's variables."""
    return bool(settings.database.url or settings.shards) or conninfo.is_set(os.environ)


def _run(work: Coroutine[Any, Any, _T]) -> _T:
    """Call asyncio.run with a loop that resolves names in threads of their own."""
    with asyncio.Runner(loop_factory=ResolvingLoop) as runner:
        return runner.run(work)


@contextmanager
def _database(settings: Settings) -> Iterator[list[Shard]]:
    """Provide the one database: the configured one, without its pooler if possible; or an embedded
    server, started on demand.
    """
    schema = settings.database.schema_name
    url = settings.database.listen_url or settings.database.url
    if url is not None:
        yield [Shard(url.get_secret_value(), schema)]
        return
    if conninfo.is_set(os.environ):
        yield [Shard("", schema)]  # all of it comes from libpq's variables
        return
    if is_service():
        raise SettingsError(
            "no database is configured: set database.url in /etc/sequencerd/sequencerd.toml, or "
            "SEQUENCERD_DATABASE in /etc/sequencerd/sequencerd.env"
        )
    from sequencerd.storage import embedded  # noqa: PLC0415 - most commands need none

    folder = embedded.default_folder()
    warn(f"sequencerd: no database is configured, using the embedded one in {folder}")
    with embedded.running(folder) as server:
        shard = Shard(server.url, schema)
        asyncio.run(apply_migrations(shard))
        yield [shard]


async def apply_migrations(
    shard: Shard,
) -> tuple[list[migrations.Migration], list[migrate.Ungranted]]:
    """Create or update the schema and grant its roles their missing privileges. Return the
    migrations that were applied, and the privileges that could not be granted.
    """
    async with connections.connected(shard) as connection:
        applied = await migrate.migrate(connection, number=shard.number)
        return applied, await migrate.grant(connection)


async def connect(shard: Shard, *, seconds: float | None = None) -> asyncpg.Connection:
    """Connect to a database with our schema; `seconds` limits each statement. Raises
    SequencerdError.
    """
    connection = await connections.connect(shard, seconds=seconds)
    try:
        await migrate.check(connection, shard.number)
    except BaseException:
        connection.terminate()
        raise
    return connection


@asynccontextmanager
async def connected(
    shard: Shard, *, seconds: float | None = None
) -> AsyncIterator[asyncpg.Connection]:
    """Connect like `connect`, and close the connection at the end of the context."""
    async with connections.connected(shard, seconds=seconds) as connection:
        await migrate.check(connection, shard.number)
        yield connection


@asynccontextmanager
async def reading(shard: Shard) -> AsyncIterator[asyncpg.Connection]:
    """Connect to a database with our schema, to read a consistent state. If there are several
    shards, those that do not answer are left out.
    """
    seconds = None if shard.name is None else STATEMENT_TIMEOUT
    async with connected(shard, seconds=seconds) as connection:
        with busy("reading"):
            async with connections.counting(connection, isolation="repeatable_read"):
                yield connection


async def fetch(shard: Shard, query: str, *parameters: object) -> list[asyncpg.Record]:
    """Return the rows of a named query."""
    async with reading(shard) as connection:
        rows: list[asyncpg.Record] = await connection.fetch(QUERIES[query], *parameters)
    return rows


async def check_sequence(arguments: argparse.Namespace, answers: ShardAnswers[Any]) -> None:
    """Raise UsageError if the sequence that a command names exists in none of the shards that
    answered; report the others.
    """
    report_missing(answers)

    async def check(shard: Shard) -> None:
        async with reading(shard) as connection:
            await check_names(connection, arguments.sequence)

    await ask(explain(arguments), answers.found, check)


async def check_names(
    connection: asyncpg.Connection,
    sequence: str | None,
    step: str | None = None,
    failure: str | None = None,
) -> None:
    """Raise UsageError for a sequence, a step or a code of failures that a command names and that
    does not exist. Enrollments may be in a sequence, or at a step, that was removed.
    """
    if sequence is not None:
        known = [row["name"] for row in await connection.fetch(QUERIES["known_sequences"])]
        if sequence not in known and not await _has_enrollments(connection, sequence, None):
            raise UsageError(f"sequence {sequence!r} does not exist; {nearest(sequence, known)}")
    if step is not None:
        known = [row["name"] for row in await connection.fetch(QUERIES["known_steps"], sequence)]
        if step not in known and not await _has_enrollments(connection, sequence, step):
            where = f"sequence {sequence!r} has no step" if sequence else "no sequence has a step"
            raise UsageError(f"{where} {step!r}; {nearest(step, known)}")
    if failure in (None, *FAILURES) or await connection.fetchval(QUERIES["has_failures"], failure):
        return
    raise UsageError(f"no failure has the code {failure!r}; {nearest(str(failure), [*FAILURES])}")


async def _has_enrollments(
    connection: asyncpg.Connection, sequence: str | None, step: str | None
) -> bool:
    found: bool = await connection.fetchval(QUERIES["has_enrollments"], sequence, step)
    return found
