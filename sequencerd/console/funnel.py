"""The page of a funnel: how far enrollments came, for all and for each arm of a Split."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import asyncpg
from starlette.requests import Request
from starlette.responses import Response

from sequencerd.console.context import PageContext, context_of, query_of, render
from sequencerd.console.panel import RANGES, range_of
from sequencerd.console.query import NotFoundError, Query
from sequencerd.console.tables import Column, Table, at
from sequencerd.storage import connections

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
        wrong = "The history of this time is too long to be counted now. Choose a shorter one."
    return render(
        request,
        "funnel.html",
        503 if wrong else 200,
        title=f"Funnel of {name}",
        name=name,
        found=table,
        wrong=wrong,
        ranges=list(RANGES),
        range=range_of(query),
        splits=splits,
        split=query.get("split") or (splits[0] if splits else None),
    )


async def _splits(context: PageContext, name: str) -> list[str]:
    rows = await connections.read(context.pool, "console_splits", name)
    if not rows:
        raise NotFoundError(f"There is no sequence {name}.")
    splits: list[str] = rows[0]["splits"]
    return splits


async def read(context: PageContext, query: Query) -> Table:
    """Return a row for each step and way, and for each arm of the Split."""
    name, split = query.must("sequence"), query.get("split")
    if split not in (None, *await _splits(context, name)):
        raise NotFoundError(f"The sequence {name} has no Split {split}.")
    since = context.now() - RANGES[range_of(query)]
    async with context.counting_history:  # one at a time: it reads all of the history since then
        found = await connections.read(
            context.pool, "console_funnel", name, since, split, seconds=TIMEOUT
        )
    rows = [
        {
            **dict(row),
            "url": at("/sequence", sequence=name, step=row["step"], range=query.get("range")),
            "median": _seconds(row["median"]),
            "p90": _seconds(row["p90"]),
        }
        for row in found
    ]
    columns = (
        Column("step", "Step", link="url"),
        Column("way", "Way", optional=True),
        Column("arm", "Arm", optional=True),
        Column("entered", "Entered", "number"),
        Column("exited", "Left", "number"),
        Column("waiting", "Waiting", "number", optional=True),
        Column("failed", "Failed", "number", optional=True),
        Column("cancelled", "Cancelled", "number", optional=True),
        Column("suppressed", "Suppressed", "number", optional=True),
        Column("goals", "Goals", "number", optional=True),
        Column("median", "Median time", "duration", optional=True),
        Column("p90", "90% within", "duration", optional=True),
    )
    return Table("funnel", columns, rows, query.given)


def _seconds(value: Any) -> float | None:
    return value.total_seconds() if isinstance(value, timedelta) else None
