"""Reads which addresses are suppressed."""

from __future__ import annotations

from collections.abc import Sequence as Rows

import asyncpg

from sequencerd.storage.statements import QUERIES


async def read_suppressed(
    connection: asyncpg.Connection, addresses: Rows[tuple[str, str]]
) -> set[tuple[str, str]]:
    """Return which of the (channel, address) are suppressed."""
    channels, texts = [a[0] for a in addresses], [a[1] for a in addresses]
    rows = await connection.fetch(QUERIES["suppressed"], channels, texts)
    return {(row["channel"], row["address"]) for row in rows}
