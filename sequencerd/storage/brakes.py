"""Count side effects of sequences with a brake, in the transaction that leases them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime

import asyncpg

from sequencerd.storage.statements import QUERIES


async def remaining(
    connection: asyncpg.Connection, sequences: Iterable[str], now: datetime
) -> dict[str, int]:
    """Lock the brakes of sequences. Return how many side effects may begin in each."""
    rows = await connection.fetch(QUERIES["brake_remaining"], list(sequences), now)
    return {row["sequence"]: row["remaining"] for row in rows}


async def count(
    connection: asyncpg.Connection, begun: Mapping[str, tuple[int, bool]], now: datetime
) -> None:
    """Count the side effects that have begun, and pause sequences in which more would."""
    numbers = [number for number, _ in begun.values()]
    over = [is_over for _, is_over in begun.values()]
    await connection.execute(QUERIES["brake"], list(begun), numbers, over, now)
