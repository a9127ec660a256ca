"""Count side effects against limits and brakes, in the transaction that leases them, and calls
against the rates of runners.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Rows
from datetime import datetime
from itertools import groupby
from typing import NamedTuple

import asyncpg

from sequencerd.core.model import LimitReached, Reservation
from sequencerd.storage.statements import QUERIES, affected


class Reserved(NamedTuple):
    """Places to reserve or give back for a visit of an enrollment, all or none."""

    enrollment: int
    visit: int
    places: tuple[Reservation, ...]


async def reserve(
    connection: asyncpg.Connection,
    wanted: Rows[Reserved],
    given_back: Rows[Reserved],
    now: datetime,
) -> dict[int, LimitReached]:
    """Give places back, then reserve others. Return which limits have no room and until when, by
    the index in `wanted`.
    """
    groups = [*given_back, *wanted]
    every = [
        (number, index, one, place)
        for number, one in enumerate(groups)
        for index, place in enumerate(one.places)
    ]
    rows = await connection.fetch(
        QUERIES["reserve"],
        [number for number, _, _, _ in every],
        [place.key for _, _, _, place in every],
        [place.topic for _, _, _, place in every],
        [one.enrollment for _, _, one, _ in every],
        [one.visit for _, _, one, _ in every],
        [None if n < len(given_back) else place.at_most for n, _, _, place in every],
        [place.per for _, _, _, place in every],
        now,
    )
    found = sorted((*every[row["entry"] - 1][:2], row["free_at"]) for row in rows)
    return {
        number - len(given_back): LimitReached(full[0][1], max(free_at for _, _, free_at in full))
        for number, full in ((n, list(rows)) for n, rows in groupby(found, lambda one: one[0]))
    }


async def prune(connection: asyncpg.Connection, now: datetime, limit: int) -> int:
    """Delete a batch of the places that no limit counts any more. Return how many."""
    return affected(await connection.execute(QUERIES["prune_reservations"], now, limit))


async def left_by_brakes(
    connection: asyncpg.Connection, sequences: Iterable[str], now: datetime
) -> dict[str, int]:
    """Lock the brakes of sequences. Return how many side effects may begin in each."""
    rows = await connection.fetch(QUERIES["brake_remaining"], list(sequences), now)
    return {row["sequence"]: row["remaining"] for row in rows}


async def count_for_brakes(
    connection: asyncpg.Connection, begun: Mapping[str, tuple[int, bool]], now: datetime
) -> None:
    """Count the side effects that have begun, and pause sequences in which more would."""
    numbers = [number for number, _ in begun.values()]
    over = [is_over for _, is_over in begun.values()]
    await connection.execute(QUERIES["brake"], list(begun), numbers, over, now)


async def take_permits(
    connection: asyncpg.Connection, runner: str, per_second: float, count: int
) -> tuple[float, float]:
    """Take permits for calls of a runner, at a rate that all daemons share. Return the time of the
    first one and the current time, in seconds.
    """
    row = await connection.fetchrow(QUERIES["take_permits"], runner, per_second, count / per_second)
    return row["first"], row["present"]
