"""The schema of the tables. All SQL is written for the schema `sequencer`; a connection to another
schema executes the same statements there.

Session settings (`search_path`) would not suffice: a pooler in transaction mode does not keep them,
and triggers run in the sessions of applications.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache, lru_cache, wraps
from typing import Any
from zlib import crc32

import asyncpg

from sequencerd.settings import SCHEMA

LOCK_CLASS = 7364528
"""The first number of each advisory lock; other applications use other numbers."""

_STATEMENTS = (
    "cursor",
    "execute",
    "executemany",
    "fetch",
    "fetchmany",
    "fetchrow",
    "fetchval",
    "prepare",
)
"""The methods of a connection whose first argument is a statement."""

_MENTION = re.compile(
    rf"""
    (?<![\w"$.]) {SCHEMA} (?= \.(?:entry_|renaming\b|sets_visit\b|texts\b) ) (?P<setting>)
  | (?<![\w"$.]) {SCHEMA} (?= \.(?! (?:max_data|notify|reason)\b(?!\() ) [\w%'] ) (?P<name>)
  | (?: (?<= SCHEMA\ ) | (?<= NOTIFY\ ) ) {SCHEMA} \b (?P<command>)
  | (?: (?<= to_regnamespace\() '{SCHEMA}' | '{SCHEMA}' (?= ::regnamespace) ) (?P<identifier>)
  | '{SCHEMA}' (?P<text>)
  | \b {LOCK_CLASS} \b (?P<lock>)
    """,
    re.VERBOSE,
)


@lru_cache(maxsize=2000)
def in_schema(sql: str, schema: str) -> str:
    """Return a statement, or another text that names tables, for another schema.

    The NOTIFY channel has the name of the schema. The advisory locks, and the settings that
    triggers set for each other, belong to the schema, so that several schemas in a database do not
    affect each other; the settings that users set apply to all of them.
    """
    if schema == SCHEMA:
        return sql
    # settings.DatabaseSettings has checked the name: it is the same within a literal and a format
    quoted = '"' + schema.replace('"', '""') + '"'
    number = crc32(schema.encode())
    replacements = {
        "setting": f"{SCHEMA}_{number:08x}",
        "name": quoted,
        "command": quoted,
        "identifier": f"'{quoted}'",
        "text": f"'{schema}'",
        "lock": str(number >> 1),  # an integer has 31 bits
    }
    return _MENTION.sub(lambda found: replacements[str(found.lastgroup)], sql)


def schema_of(connection: asyncpg.Connection) -> str:
    """Return the schema of a connection."""
    schema: str = getattr(connection, "schema", SCHEMA)
    return schema


@cache
def connection_class(schema: str) -> type[asyncpg.Connection]:
    """Return the class of connections to a schema; for the default schema, asyncpg's own."""
    if schema == SCHEMA:
        usual: type[asyncpg.Connection] = asyncpg.Connection
        return usual
    methods = {name: _in_schema(getattr(asyncpg.Connection, name), schema) for name in _STATEMENTS}
    return type("Connection", (asyncpg.Connection,), {"__slots__": (), "schema": schema, **methods})


def _in_schema(method: Callable[..., Any], schema: str) -> Callable[..., Any]:
    @wraps(method)
    def call(self: asyncpg.Connection, statement: str, *arguments: Any, **options: Any) -> Any:
        return method(self, in_schema(statement, schema), *arguments, **options)

    return call
