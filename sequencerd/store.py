"""Every statement that runs against the database, as a typed function; SQL in queries.sql."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Rows
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from importlib.resources import files
from typing import Any

import asyncpg

from sequencerd.core.model import NEVER, Enrollment, Event

Place = tuple[str, str]
"""A step of a sequence: its key in the heap."""


def _load_queries() -> dict[str, str]:
    text = (files("sequencerd") / "queries.sql").read_text(encoding="utf-8")
    parts = re.split(r"^-- name: (\w+)\n", text, flags=re.MULTILINE)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


QUERIES: Mapping[str, str] = _load_queries()
"""The statements by name."""


@dataclass(frozen=True, slots=True)
class Row:
    """What is written of one enrollment: where it is now."""

    enrollment: Enrollment
    status: str
    wake_at: datetime | None
    failure: str | None = None
    last_error: str | None = None
    goals_changed: bool = False
    data: Mapping[str, Any] | None = None  # merged into what is there


async def connect_pool(url: str, size: int, **options: Any) -> asyncpg.Pool:
    """Connections for the daemon's statements, whose writes notify nobody."""
    return await asyncpg.create_pool(
        url,
        min_size=1,
        max_size=size,
        init=set_codecs,
        server_settings={"application_name": "sequencerd", "sequencer.notify": "off"},
        **options,
    )


async def set_codecs(connection: asyncpg.Connection) -> None:
    """PostgreSQL's infinity is NEVER; JSON stays text until somebody reads it."""
    await connection.set_type_codec(
        "timestamptz",
        schema="pg_catalog",
        encoder=_encode_time,
        decoder=_decode_time,
        format="tuple",
    )


_EPOCH = datetime(2000, 1, 1, tzinfo=UTC)
_INFINITY = 2**63 - 1
_MICROSECOND = timedelta(microseconds=1)


def _encode_time(at: datetime) -> tuple[int]:
    return (_INFINITY,) if at >= NEVER else ((at - _EPOCH) // _MICROSECOND,)


def _decode_time(value: tuple[int]) -> datetime:
    try:
        return _EPOCH + timedelta(microseconds=value[0])
    except OverflowError:
        return NEVER if value[0] > 0 else datetime.min.replace(tzinfo=UTC)


# --- definitions


async def revisions(connection: asyncpg.Connection) -> dict[str, int]:
    """The revision of every sequence."""
    rows = await connection.fetch(QUERIES["revisions"])
    return {row["name"]: row["revision"] for row in rows}


async def definitions(
    connection: asyncpg.Connection, names: Iterable[str]
) -> tuple[list[asyncpg.Record], list[asyncpg.Record]]:
    """The rows of some sequences and of their steps, from one snapshot."""
    wanted = list(names)
    async with connection.transaction(isolation="repeatable_read", readonly=True):
        return (
            await connection.fetch(QUERIES["sequences"], wanted),
            await connection.fetch(QUERIES["steps"], wanted),
        )


async def set_problems(
    connection: asyncpg.Connection, problems: Mapping[Place, str | None]
) -> None:
    """Writes what is wrong with steps; None clears it."""
    await connection.execute(
        QUERIES["set_problems"],
        [place[0] for place in problems],
        [place[1] for place in problems],
        list(problems.values()),
    )


# --- the engine


async def server_time(connection: asyncpg.Connection) -> datetime:
    """The database's clock."""
    now: datetime = await connection.fetchval(QUERIES["server_time"])
    return now


async def first_wakes(connection: asyncpg.Connection) -> list[tuple[Place, datetime]]:
    """The earliest wake time of each step where somebody is."""
    rows = await connection.fetch(QUERIES["first_wakes"])
    return [((row["sequence"], row["step"]), row["wake_at"]) for row in rows]


async def claim(
    connection: asyncpg.Connection, place: Place, now: datetime, revision: int, limit: int
) -> list[Enrollment]:
    """Locks due enrollments of a step until the end of the transaction."""
    rows = await connection.fetch(QUERIES["claim"], *place, now, revision, limit)
    return [_enrollment(row) for row in rows]


async def lock(connection: asyncpg.Connection, ids: Rows[int]) -> dict[int, Enrollment]:
    """Locks enrollments by id; those that somebody else has locked are left out."""
    rows = await connection.fetch(QUERIES["lock"], ids)
    return {row["id"]: _enrollment(row) for row in rows}


async def existing(connection: asyncpg.Connection, ids: Rows[int]) -> set[int]:
    """Which of the enrollments are not deleted."""
    return {row["id"] for row in await connection.fetch(QUERIES["existing"], ids)}


def _enrollment(row: asyncpg.Record) -> Enrollment:
    return Enrollment(
        id=row["id"],
        sequence=row["sequence"],
        step=row["step"],
        subject=row["subject"],
        data=row["data"],
        timezone=row["timezone"],
        created_at=row["created_at"],
        wake_at=row["wake_at"] or NEVER,
        entered_at=row["entered_at"],
        visit=row["visit"],
        attempt=row["attempt"],
        goals_met=tuple(row["goals_met"]),
        retry_at=row["retry_at"],
        leased_by=row["leased_by"],
    )


async def next_wake(
    connection: asyncpg.Connection, place: Place, after: datetime
) -> datetime | None:
    """The earliest wake time of a step after that time."""
    at: datetime | None = await connection.fetchval(QUERIES["next_wake"], *place, after)
    return at


async def write(
    connection: asyncpg.Connection, rows: Rows[Row], events: Rows[Event], now: datetime
) -> None:
    """Writes where a batch of locked enrollments is now, and what happened to them."""
    for row in rows:
        if row.data:
            text = json.dumps(row.data)
            await connection.execute(QUERIES["merge_data"], row.enrollment.id, text)
        if row.goals_changed:
            goals = list(row.enrollment.goals_met)
            await connection.execute(QUERIES["write_goals"], row.enrollment.id, goals)
    if rows:
        at = [row.enrollment for row in rows]
        await connection.execute(
            QUERIES["write"],
            [e.id for e in at],
            [e.sequence for e in at],
            [e.step for e in at],
            [row.status for row in rows],
            [row.wake_at for row in rows],
            [e.entered_at for e in at],
            [e.visit for e in at],
            [e.attempt for e in at],
            [e.retry_at for e in at],
            [e.leased_by for e in at],
            [row.failure for row in rows],
            [row.last_error for row in rows],
            now,
        )
    if events:
        await record(connection, events)


async def record(connection: asyncpg.Connection, events: Rows[Event]) -> None:
    """Appends to the history."""
    await connection.copy_records_to_table(
        "events",
        schema_name="sequencer",
        columns=["enrollment_id", "at", "sequence", "step", "visit", "action", "message"],
        records=[
            (e.enrollment_id, e.at, e.sequence, e.step, e.visit, e.action, e.message)
            for e in events
        ],
    )


async def extend_leases(
    connection: asyncpg.Connection, ids: Rows[int], daemon: str, until: datetime
) -> None:
    """Keeps what a daemon is executing from falling due."""
    await connection.execute(QUERIES["extend_leases"], ids, daemon, until)


async def look_again(
    connection: asyncpg.Connection,
    now: datetime,
    limit: int,
    *,
    subject: str | None = None,
    sequence: str | None = None,
    step: str | None = None,
) -> list[Place]:
    """Makes some of those due who wait: the step of each."""
    rows = await connection.fetch(QUERIES["look_again"], now, subject, sequence, step, limit)
    return [(row["sequence"], row["step"]) for row in rows]


async def retime(connection: asyncpg.Connection, place: Place, now: datetime, limit: int) -> int:
    """Makes a batch of those due who wait at a changed step. Returns how many."""
    count: int = await connection.fetchval(QUERIES["retime"], *place, now, limit)
    return count


async def revive(connection: asyncpg.Connection, places: Rows[Place], now: datetime) -> int:
    """Lets those go on who failed at steps that have been mended. Returns how many."""
    sequences, steps = [place[0] for place in places], [place[1] for place in places]
    return _count(await connection.execute(QUERIES["revive"], sequences, steps, now))


async def suppressed(
    connection: asyncpg.Connection, addresses: Rows[tuple[str, str]]
) -> set[tuple[str, str]]:
    """Which of the (channel, address) get no messages."""
    channels, texts = [a[0] for a in addresses], [a[1] for a in addresses]
    rows = await connection.fetch(QUERIES["suppressed"], channels, texts)
    return {(row["channel"], row["address"]) for row in rows}


async def add_event_partitions(connection: asyncpg.Connection) -> None:
    """Makes the partitions of the history that will be needed soon."""
    await connection.execute(QUERIES["add_event_partitions"])


def _count(tag: str) -> int:
    """The number in a command tag such as "INSERT 0 5"."""
    return int(tag.rsplit(" ", 1)[-1])
