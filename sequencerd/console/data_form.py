"""The page that edits the data of an enrollment."""

from __future__ import annotations

import asyncio
from typing import Any

import asyncpg
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from sequencerd.console.changing import reason_of, why
from sequencerd.console.context import PageContext, context_of, query_of, render
from sequencerd.console.mask import hide_data, restore_data
from sequencerd.console.query import NotFoundError, Query, as_sentence
from sequencerd.console.stored_sequence import side_by_side
from sequencerd.console.tables import at
from sequencerd.core import exact_json
from sequencerd.definitions.options import read_object
from sequencerd.errors import UsageError
from sequencerd.storage import connections
from sequencerd.storage.statements import QUERIES, affected

NAME = "the text"
CHANGED = "The data has changed meanwhile: nothing was written. This is the difference."


async def edit(request: Request) -> Response:
    """Show the data in a form."""
    return await _page(request, query_of(request).number("id", 0))


async def _page(
    request: Request,
    id_: int,
    text: str | None = None,
    status: int = 200,
    *,
    lines: list[dict[str, Any]] | None = None,
    wrong: str | None = None,
) -> Response:
    context = context_of(request)
    row = await _read(context, id_)
    shown = context.mask({"subject": row["subject"]})["subject"]
    return render(
        request,
        "data.html",
        status,
        title=f"Data of {shown}",
        id=id_,
        text=await _shown(context, row) if text is None else text,
        version=row["version"],
        lines=lines,
        reason=(request.state.form or {}).get("reason", ""),
        wrong=wrong,
    )


async def _read(context: PageContext, id_: int) -> asyncpg.Record:
    rows = await connections.read(context.pool, "console_data", id_) if id_ < 2**63 else []
    if not rows:
        raise NotFoundError(f"Enrollment {id_} does not exist.")
    return rows[0]


async def _shown(context: PageContext, row: asyncpg.Record) -> str:
    try:
        hidden = hide_data(exact_json.loads(row["data"]), context.settings.mask)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"the data cannot be read: {error}; change it in SQL") from error
    return await _pretty(context, exact_json.dumps(hidden))


async def _pretty(context: PageContext, text: str) -> str:
    """Format JSON from PostgreSQL over several lines. Raises UsageError."""
    try:
        ((made,),) = await connections.read(context.pool, "console_pretty", text)
    except asyncpg.DataError as error:
        raise UsageError(f"PostgreSQL cannot store this data: {error}") from error
    pretty: str = made
    return pretty


async def change(request: Request) -> Response:
    """Check edited data and show the differences; with a reason, write the data."""
    context, query = context_of(request), Query(request.state.form)
    id_, text = query.number("id", 0), query.get("text") or ""
    row = await _read(context, id_)
    try:
        read_object(text, NAME)
        edited = exact_json.loads(text)
        original = exact_json.loads(row["data"])
        data = restore_data(edited, original, context.settings.mask)
        after = await _pretty(context, text)
        before = await _shown(context, row)
        lines = await asyncio.to_thread(side_by_side, before, after)
    except (UsageError, ValueError) as error:
        return await _page(request, id_, text, 422, wrong=as_sentence(str(error)))
    if query.must("version") != row["version"]:
        return await _page(request, id_, text, 409, lines=lines, wrong=CHANGED)
    if query.get("action") != "apply":
        return await _page(request, id_, text, lines=lines)
    if (reason := reason_of(query)) is None:
        wrong = "Write a reason: it is recorded."
        return await _page(request, id_, text, 422, lines=lines, wrong=wrong)
    keys = sorted(key for key in {*original, *data} if original.get(key) != data.get(key))
    cause = why(request, f"{reason}; changed {', '.join(keys)}")
    # a connection of its own, not one of the pool's: the daemons are to be notified
    async with connections.connected(context.shard) as connection:
        done = await connection.execute(
            QUERIES["console_set_data"], id_, exact_json.dumps(data), row["version"], cause[:2000]
        )
    if not affected(done):
        return await _page(request, id_, text, 409, lines=lines, wrong=CHANGED)
    context.enrollments_read.clear()
    return RedirectResponse(at(f"/enrollments/{id_}"), 303)
