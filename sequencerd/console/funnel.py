"""The page of a funnel: how far enrollments got, in total and for each arm of a Split."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from datetime import timedelta
from typing import Any

import asyncpg
from starlette.requests import Request
from starlette.responses import Response

from sequencerd.console import views
from sequencerd.console.all_shards import in_all
from sequencerd.console.context import PageContext, context_of, query_of, render
from sequencerd.console.panel import RANGES, range_of
from sequencerd.console.query import NotFoundError, Query
from sequencerd.console.tables import Column, Table, at
from sequencerd.storage import connections

KEY = ("step", "way", "arm")
TIMES = ("median", "p90")
TIMEOUT = 20.0  # seconds: it reads the history of the range


async def funnel(request: Request) -> Response:
    """Show the funnel of a sequence."""
    context, query = context_of(request), query_of(request)
    name = query.must("sequence")
    splits = await _splits(context, name)
    table, wrong = None, None
    try:
        table = await read(context, query)
    except (TimeoutError, asyncpg.QueryCanceledError):
        wrong = "The history of this period is too long to count now. Choose a shorter one."
    return render(
        request,
        "funnel.html",
        503 if wrong else 200,
        title=f"Funnel of {name}",
        name=name,
        found=table,
        arms=table and arms(table),
        wrong=wrong,
        ranges=list(RANGES),
        range=range_of(query),
        splits=splits,
        split=query.get("split") or (splits[0] if splits else None),
    )


async def _splits(context: PageContext, name: str) -> list[str]:
    found = await in_all(context, lambda part: connections.read(part.pool, "console_splits", name))
    if not any(found.values()):
        raise NotFoundError(f"There is no sequence {name}.")
    return list(
        dict.fromkeys(split for rows in found.values() for row in rows for split in row["splits"])
    )


async def read(context: PageContext, query: Query) -> Table:
    """Return a row for each step and exit, and for each arm of the Split."""
    name, split = query.must("sequence"), query.get("split")
    if split not in (None, *await _splits(context, name)):
        raise NotFoundError(f"The sequence {name} has no Split {split}.")
    since = context.now() - RANGES[range_of(query)]

    async def count(part: PageContext) -> list[asyncpg.Record]:
        async with part.counting_history:  # one at a time: each reads all history since then
            try:
                return await connections.read(
                    part.pool, "console_funnel", name, since, split, seconds=TIMEOUT
                )
            except asyncpg.UndefinedObjectError as error:
                raise NotFoundError(f"There is no sequence {name}.") from error

    rows = [
        {
            **row,
            "url": at("/sequence", sequence=name, step=row["step"], range=query.get("range")),
        }
        for row in _added_up(await in_all(context, count))
    ]
    columns = (
        Column("step", "Step", link="url"),
        Column("way", "Exit", optional=True),
        Column("arm", "Arm", optional=True),
        Column("entered", "Entered", "number"),
        Column("exited", "Exited", "number"),
        Column("waiting", "Waiting", "number", optional=True),
        Column("failed", "Failed", "number", optional=True),
        Column("cancelled", "Cancelled", "number", optional=True),
        Column("suppressed", "Suppressed", "number", optional=True),
        Column("goals", "Goals", "number", optional=True),
        Column("median", "Median time", "duration", optional=True),
        Column("p90", "90% within", "duration", optional=True),
    )
    return Table("funnel", columns, rows, query.given)


def arms(table: Table) -> Table:
    """Return a row for each arm of the Split in a funnel: how many enrollments took it, and how
    many goals they met, there and later.
    """
    size: Counter[str] = Counter()
    goals: Counter[str] = Counter()
    for row in table.rows:
        if row["way"] is None and (arm := row["arm"]) is not None:
            size[arm] = max(size[arm], row["entered"])
            goals[arm] += row["goals"]
    rows = [
        {"arm": arm, "enrollments": n, "goals": goals[arm], "share": goals[arm] / n if n else 0.0}
        for arm, n in sorted(size.items())
    ]
    columns = (
        Column("arm", "Arm"),
        Column("enrollments", "Enrollments", "number"),
        Column("goals", "Goals met", "number"),
        Column("share", "Goals per enrollment", "percent"),
    )
    return Table("arms", columns, rows, table.query)


def _added_up(found: Mapping[str | None, Iterable[asyncpg.Record]]) -> list[dict[str, Any]]:
    """Return the rows of several shards as those of one database; what cannot be added up, such as
    a median, is a value for each shard.
    """
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for shard, ours in found.items():
        for one in ours:
            row = dict(one)
            times = {name: _seconds(row.pop(name)) for name in TIMES}
            into = rows.setdefault(
                tuple(row[name] for name in KEY), dict.fromkeys(TIMES) | {n: row[n] for n in KEY}
            )
            for name, count in row.items():
                if name not in KEY:  # what an exit does not have is None
                    into[name] = views.sum_known((into.get(name), count))
            for name, seconds in times.items():
                if shard is None:
                    into[name] = seconds
                elif seconds is not None:
                    into[name] = {**(into[name] or {}), shard: seconds}
    return list(rows.values())


def _seconds(value: Any) -> float | None:
    return value.total_seconds() if isinstance(value, timedelta) else None
