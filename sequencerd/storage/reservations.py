"""Reserves places for side effects with a limit, in the transaction that leases them."""

from __future__ import annotations

from collections.abc import Sequence as Rows
from datetime import datetime
from typing import NamedTuple

import asyncpg

from sequencerd.core.model import Reservation
from sequencerd.storage.statements import QUERIES


class Reserved(NamedTuple):
    """What is reserved, or given back: a place for a visit of an enrollment."""

    enrollment: int
    visit: int
    place: Reservation


async def reserve(
    connection: asyncpg.Connection,
    wanted: Rows[Reserved],
    given_back: Rows[Reserved],
    now: datetime,
) -> dict[int, datetime]:
    """Give places back, then reserve others. Return when there is room for those that found none,
    by their index in `wanted`.
    """
    every = [*given_back, *wanted]
    rows = await connection.fetch(
        QUERIES["reserve"],
        [one.place.key for one in every],
        [one.place.topic for one in every],
        [one.enrollment for one in every],
        [one.visit for one in every],
        [None] * len(given_back) + [one.place.at_most for one in wanted],
        [one.place.per for one in every],
        now,
    )
    return {row["number"] - len(given_back) - 1: row["free_at"] for row in rows}


async def prune(connection: asyncpg.Connection, now: datetime) -> None:
    """Delete what no limit counts any more."""
    await connection.execute(QUERIES["prune_reservations"], now)
