"""Read which addresses are suppressed, and suppress addresses."""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Rows

import asyncpg

from sequencerd.core.faults import printable
from sequencerd.core.task import Undeliverable
from sequencerd.storage import bulk
from sequencerd.storage.statements import QUERIES, affected


async def read_suppressed(
    connection: asyncpg.Connection, keys: Rows[tuple[str, str, str]]
) -> set[tuple[str, str, str]]:
    """Return which of the (channel, address, topic) are suppressed."""
    columns = [[key[number] for key in keys] for number in range(3)]
    rows = await connection.fetch(QUERIES["suppressed"], *columns)
    return {(row["channel"], row["address"], row["topic"]) for row in rows}


async def remove(
    connection: asyncpg.Connection,
    channel: str,
    addresses: Iterable[str],
    topics: Iterable[str],
    source: str,
    *,
    reason: str,
) -> None:
    """Remove the suppression of an address, in all its forms, if it has this source, and record the
    reason.
    """
    async with connection.transaction():
        await bulk.set_reason(connection, reason)
        await connection.execute(QUERIES["unsuppress"], channel, [*addresses], [*topics], source)


async def topic_titles(connection: asyncpg.Connection) -> dict[str, str]:
    """Return the titles of topics by name."""
    return {row["name"]: row["title"] for row in await connection.fetch(QUERIES["titles"])}


async def sent_messages(
    connection: asyncpg.Connection, enrollment: int, visit: int, tag: str
) -> list[str]:
    """Return the events of a message in the history; none if the tag is wrong."""
    rows = await connection.fetch(QUERIES["sent_messages"], enrollment, visit, tag)
    return [row["message"] for row in rows]


async def add(
    connection: asyncpg.Connection, addresses: Rows[Undeliverable], topic: str = "*"
) -> int:
    """Suppress addresses, for all topics or one. Return how many were not suppressed before."""
    if not addresses:
        return 0
    done = await connection.execute(
        QUERIES["suppress"],
        [one.channel for one in addresses],
        [one.address for one in addresses],
        [printable(one.reason) for one in addresses],
        [one.source for one in addresses],
        topic,
    )
    return affected(done)
