"""Call the views and functions of applications: lookups, and queries that enroll subjects."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from collections.abc import Sequence as Rows
from typing import Any, NamedTuple

import asyncpg

from sequencerd.core.schedule import SOURCE
from sequencerd.storage.connections import COMMAND_TIMEOUT
from sequencerd.storage.schemas import schema_of
from sequencerd.storage.statements import QUERIES


async def look_up(
    connection: asyncpg.Connection, function: str, subjects: Rows[str], seconds: float
) -> dict[str, Mapping[str, Any]]:
    """Call an SQL function `schema.name(subjects text[])` and return data by subject.

    The function cannot write, and the server cancels it after some seconds. Raises ValueError for
    an invalid function name, or a schema that applications cannot use.
    """
    name = SOURCE.fullmatch(function)
    reserved = rf"pg_|information_schema$|(sequencer|{re.escape(schema_of(connection))})$"
    if name is None or re.match(reserved, name["schema"]):
        raise ValueError(
            f"{function!r} is neither set up as [lookups.{function}] nor installed, "
            "nor an SQL function's name such as app.of_subjects"
        )
    query = QUERIES["look_up"].format(**name.groupdict())
    async with connection.transaction(readonly=True):
        # for this transaction only, so that it also works through a pooler
        await connection.execute(QUERIES["limit_statement"], f"{seconds * 1000:.0f}")
        rows = await connection.fetch(query, subjects, timeout=seconds + COMMAND_TIMEOUT)
    return {row["subject"]: json.loads(row["data"] or "{}") for row in rows}


class Candidate(NamedTuple):
    """A subject that a user's query returns and that may be enrolled."""

    subject: str
    data: str | None
    timezone: str | None


async def read_source(
    connection: asyncpg.Connection, source: str, sequence: str, limit: int, seconds: float
) -> tuple[list[Candidate], Counter[str]]:
    """Read the subjects that a user's view or function returns, without those that the sequence
    refuses, and count the rows that cannot be enrolled, by error.

    This uses a savepoint in the caller's transaction: nothing can be written, and the server
    cancels the query after so many seconds. Raises ValueError if the view or function does not
    exist.
    """
    name = SOURCE.fullmatch(source)
    assert name is not None  # it was checked with the definition
    limited = connection.transaction()
    await limited.start()
    try:
        await connection.execute(QUERIES["read_only"], f"{seconds * 1000:.0f}")
        kind = await connection.fetchval(QUERIES["source_kind"], *name.groups())
        if kind is None:
            raise ValueError(f"no view, table or function without arguments is named {source}")
        called = "" if kind == "relation" else "()"
        query = QUERIES["read_source"].replace(
            "{source}", '"{schema}"."{name}"'.format(**name.groupdict()) + called
        )
        rows = await connection.fetch(query, sequence, limit, timeout=seconds + COMMAND_TIMEOUT)
    finally:
        if not connection.is_closed():
            await limited.rollback()  # which also resets the settings
    valid = [Candidate(*row[:3]) for row in rows if row["fault"] is None]
    return valid, Counter(row["fault"] for row in rows if row["fault"] is not None)
