"""Apply the files of sql/, each once and in numerical order, under an advisory lock."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import asyncpg

from sequencerd.core.routing import ShardNumber
from sequencerd.errors import DatabaseError, MigrationError, SettingsError
from sequencerd.storage.database_errors import with_hint
from sequencerd.storage.migrations import Migration, available
from sequencerd.storage.schemas import schema_of
from sequencerd.storage.statements import QUERIES

OLDEST_SERVER = 150000  # PostgreSQL 15


class Ungranted(NamedTuple):
    """A statement that had no effect, with the reason."""

    statement: str
    reason: str


async def migrate(
    connection: asyncpg.Connection,
    migrations: Sequence[Migration] | None = None,
    number: ShardNumber | None = None,
) -> list[Migration]:
    """Apply what is missing, all or nothing, and return it; a schema that has no number gets this
    one. Raises MigrationError, and SettingsError if it has another.
    """
    wanted = available() if migrations is None else migrations
    await _check_server(connection)
    await _check_rights(connection)
    async with connection.transaction():
        await connection.fetch(QUERIES["migration_settings"])
        await connection.execute(QUERIES["lock_migrations"])
        await connection.execute(QUERIES["create_migrations"])
        missing = _missing(wanted, await connection.fetch(QUERIES["migrations"]))
        if missing:
            await _become_owner(connection)
        await connection.execute(QUERIES["limit_locks"])
        for migration in missing:
            await _apply(connection, migration)
        if number is not None and not _has_number(await _read_number(connection), number):
            await connection.execute(QUERIES["number_shard"], *number)
    return missing


async def _check_rights(connection: asyncpg.Connection) -> None:
    if await connection.fetchval(QUERIES["is_standby"]):
        raise DatabaseError(
            "this server is a standby: migrate its primary, which database.url finds among all "
            "servers with ?target_session_attrs=read-write"
        )
    if await connection.fetchval(QUERIES["citus_cannot_name"]):
        raise MigrationError(
            f"Citus cannot have the schema {schema_of(connection)}, as it does not quote its name "
            "everywhere; choose a name of lower-case letters, digits and _"
        )
    if statement := await connection.fetchval(QUERIES["grant_to_create"]):
        raise MigrationError(
            f"the login may not create the schema {schema_of(connection)}; as an administrator of "
            f"the database run: {statement}"
        )


async def _become_owner(connection: asyncpg.Connection) -> None:
    """Act as the owner of the tables until the end of the transaction, so that those of a later
    migration have the same. Raises MigrationError.
    """
    owner = await connection.fetchval(QUERIES["other_owner"])
    if owner is None:
        return
    try:
        async with connection.transaction():
            await connection.fetch(QUERIES["act_as"], owner)
    except asyncpg.InsufficientPrivilegeError as error:
        raise MigrationError(
            f"the schema {schema_of(connection)} belongs to {owner}: migrate with that login, or "
            "as a superuser"
        ) from error


async def _apply(connection: asyncpg.Connection, migration: Migration) -> None:
    for line, statement in migration.statements():
        try:
            await connection.execute(statement)
        except asyncpg.PostgresError as error:
            place = f"migration {migration.name} failed at line {line}"
            raise MigrationError(f"{place}: {_explain(error)}") from error
    await connection.execute(
        QUERIES["record_migration"], migration.version, migration.name, migration.checksum
    )


def _explain(error: asyncpg.PostgresError) -> str:
    match error:
        case asyncpg.LockNotAvailableError() | asyncpg.DeadlockDetectedError():
            advice = (
                "run it again when the transactions that hold the tables have ended; "
                "`sequencerd doctor` names old ones"
            )
        case asyncpg.PostgresConnectionError() | asyncpg.OperatorInterventionError():
            advice = "run it again"
        case _:
            return f"{with_hint(error)}; nothing was applied"
    return f"{with_hint(error)}; nothing was applied: {advice}"


async def grant(connection: asyncpg.Connection) -> list[Ungranted]:
    """Grant the roles their missing privileges, each in a statement of its own. Return what is
    still missing.
    """
    errors = {}
    async with connection.transaction():
        await connection.fetch(QUERIES["migration_settings"])
        await connection.execute(QUERIES["lock_migrations"])
        for (statement,) in await connection.fetch(QUERIES["missing_grants"]):
            try:
                async with connection.transaction():
                    await connection.execute(statement)
            except asyncpg.PostgresError as error:
                errors[statement] = with_hint(error)
        missing = await connection.fetch(QUERIES["missing_grants"])
    # a GRANT without the right to it can be a warning, without an error
    return [Ungranted(row[0], errors.get(row[0], "no privilege to grant it")) for row in missing]


async def check(connection: asyncpg.Connection, number: ShardNumber | None = None) -> None:
    """Raise MigrationError unless the schema is the one that this version requires, and has the
    number of its shard. Raises SettingsError if it has another.
    """
    await _check_server(connection)
    if not await connection.fetchval(QUERIES["has_migrations"]):
        schema = schema_of(connection)
        raise MigrationError(f"the database has no schema {schema} yet; run: sequencerd migrate")
    if missing := _missing(available(), await connection.fetch(QUERIES["migrations"])):
        raise MigrationError(
            f"the schema is older than this version ({missing[0].name} is missing); "
            "run: sequencerd migrate"
        )
    if number is not None and not _has_number(await _read_number(connection), number):
        raise MigrationError("the schema has no shard number yet; run: sequencerd migrate")


async def has_number(connection: asyncpg.Connection, number: ShardNumber) -> bool:
    """Return whether the schema has this number, or none yet. Raises SettingsError if it has
    another.
    """
    if not await connection.fetchval(QUERIES["has_shard_number"]):
        return False
    return _has_number(await _read_number(connection), number)


async def _read_number(connection: asyncpg.Connection) -> ShardNumber | None:
    row = await connection.fetchrow(QUERIES["shard_number"])
    return ShardNumber(*row) if row else None


def _has_number(found: ShardNumber | None, number: ShardNumber) -> bool:
    if found is not None and found != number:
        raise SettingsError(
            f"its schema says {found}, the settings say {number}; subjects are found by the order "
            "of [shards]: restore it, leave none out, and let no two lead to the same schema "
            "(names and URLs may change); to grow, move whole shards to other servers"
        )
    return found is not None


async def _check_server(connection: asyncpg.Connection) -> None:
    number = await connection.fetchval(QUERIES["server_version"])
    if number < OLDEST_SERVER:
        raise DatabaseError(f"PostgreSQL 15 or newer is needed, this is {number // 10000}")
    encoding = await connection.fetchval(QUERIES["server_encoding"])
    if encoding != "UTF8":
        raise DatabaseError(
            f"the database's encoding is {encoding}, and must be UTF8; "
            "CREATE DATABASE ... ENCODING 'UTF8' TEMPLATE template0, and move the data there"
        )


def _missing(wanted: Sequence[Migration], applied: Sequence[asyncpg.Record]) -> list[Migration]:
    """Return the migrations that have not been applied. Raises MigrationError if schema and version
    do not match.
    """
    known = {migration.version: migration for migration in wanted}
    for row in applied:
        migration = known.get(row["version"])
        if migration is None:
            raise MigrationError(
                f"the schema is newer than this version of sequencerd: it has {row['name']}; "
                "install the version that made it, or a newer one"
            )
        if migration.checksum != row["checksum"]:
            raise MigrationError(
                f"{row['name']} was changed after it was applied; migrations are never edited: "
                "restore the file and write a new one"
            )
    done = {row["version"] for row in applied}
    return [migration for migration in wanted if migration.version not in done]
