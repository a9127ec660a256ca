"""Commands that install the daemon: migrate, grants, console-password, install-service."""

from __future__ import annotations

import argparse
import getpass
import sys
from collections.abc import Sequence

import asyncpg

from sequencerd import passwords
from sequencerd.cli import install_service
from sequencerd.cli.commands import (
    apply_migrations,
    connected,
    explain,
    on_shards,
    report_missing,
    shards_of,
)
from sequencerd.cli.output import say, say_lines, warn
from sequencerd.errors import DatabaseError, UsageError
from sequencerd.settings import Settings
from sequencerd.storage import connections, migrate
from sequencerd.storage.connections import Shard
from sequencerd.storage.every_shard import ask, ask_each
from sequencerd.storage.statements import QUERIES

MIN_PASSWORD_LENGTH = 8  # characters
NOT_SET_UP = (asyncpg.InvalidAuthorizationSpecificationError, asyncpg.InvalidCatalogNameError)
"""Why the number of a new shard cannot be read."""

MAX_UNGRANTED = 5  # statements that had no effect


def install_service_command(arguments: argparse.Namespace, _: Settings) -> int:
    units = install_service.units(config=arguments.config, user=arguments.user)
    for warning in install_service.warnings(arguments.user):
        warn(f"sequencerd: warning: {warning}")
    if arguments.print:
        for name, text in units.items():
            say(f"# {arguments.to / name}")
            say_lines(text + "\n")
        return 0
    for path in install_service.write(arguments.to, units):
        say(f"wrote {path}")
    say("next: set database.url in /etc/sequencerd/sequencerd.toml, and run: sequencerd migrate")
    say("then: systemctl daemon-reload && systemctl enable --now sequencerd")
    return 0


def console_password_command(_: argparse.Namespace, __: Settings) -> int:
    try:
        password = _read_password()
        password.encode()
    except UnicodeError as error:
        raise UsageError("the password is not valid UTF-8") from error
    except EOFError as error:
        raise UsageError("no password was entered") from error
    if len(password) < MIN_PASSWORD_LENGTH:
        raise UsageError(f"the password must have at least {MIN_PASSWORD_LENGTH} characters")
    say(passwords.make_hash(password))
    return 0


def _read_password() -> str:
    if not sys.stdin.isatty():
        return sys.stdin.readline().rstrip("\n")
    password = getpass.getpass()
    if getpass.getpass("Again: ") != password:
        raise UsageError("the passwords do not match")
    return password


@on_shards
async def migrate_command(
    arguments: argparse.Namespace, settings: Settings, shards: Sequence[Shard]
) -> int:
    unnumbered, unknown = await _numbers(arguments, shards_of(settings, settings.shards))

    async def work(shard: Shard) -> None:
        if unknown and shard in unnumbered:
            raise DatabaseError(
                f"it gets its number when all other shards answer: {'; '.join(unknown)}"
            )
        applied, ungranted = await apply_migrations(shard)
        where = f"{shard.name}: " if shard.name is not None else ""
        for migration in applied:
            say(f"{where}applied {migration.name}")
        if not applied:
            say(f"{where}the schema is up to date")
        if ungranted:
            _warn_of(ungranted)
            warn(
                "the schema's owner needs none of them; other database users lack privileges until "
                "an administrator runs the output of `sequencerd grants`"
            )

    # one after the other, because all shards of a server share the roles
    return report_missing(await ask(explain(arguments), shards, work, at_once=1))


async def _numbers(
    arguments: argparse.Namespace, shards: Sequence[Shard]
) -> tuple[set[Shard], list[str]]:
    """Return the shards that have no number yet, and why others could not be asked. Raises
    SettingsError if one has another number than in the settings: otherwise a new shard would get
    the subjects of another one.
    """

    async def has_number(shard: Shard) -> bool:
        assert shard.number is not None  # a value of the settings
        try:
            connection = await connections.connect(shard)
        except DatabaseError as error:
            if isinstance(error.__cause__, NOT_SET_UP):
                return False
            raise
        try:
            return await migrate.has_number(connection, shard.number)
        except asyncpg.InsufficientPrivilegeError:
            return False
        finally:
            connection.terminate()

    if not shards:
        return set(), []
    answers = await ask_each(explain(arguments), shards, has_number)
    return {
        shard for shard, is_numbered in answers.found.items() if not is_numbered
    }, answers.lines()


@on_shards
async def grants_command(
    arguments: argparse.Namespace, _: Settings, shards: Sequence[Shard]
) -> int:
    async def work(shard: Shard) -> bool:
        if shard.name is not None:
            say(f"-- shard {shard.name}")
        async with connected(shard) as connection:
            if arguments.apply:
                ungranted = await migrate.grant(connection)
                if ungranted:
                    _warn_of(ungranted)
                    return False
                say("the roles have all privileges")
                return True
            missing = await connection.fetch(QUERIES["missing_grants"])
        for (statement,) in missing:
            say(statement)
        if not missing:
            warn("nothing is missing: the roles have all privileges")
        return True

    answers = await ask(explain(arguments), shards, work, at_once=1)
    return report_missing(answers) or int(not all(answers.found.values()))


def _warn_of(ungranted: list[migrate.Ungranted]) -> None:
    warn(f"sequencerd: warning: {len(ungranted):,} statements had no effect:")
    for statement, reason in ungranted[:MAX_UNGRANTED]:
        warn(f"  {statement} -- {reason}")
    if len(ungranted) > MAX_UNGRANTED:
        warn(f"  ... and {len(ungranted) - MAX_UNGRANTED:,} more")
