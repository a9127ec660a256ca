"""The page that enrolls a subject."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import asyncpg
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from sequencerd.console.changing import reason_of, why
from sequencerd.console.context import PageContext, context_of, query_of, render
from sequencerd.console.query import Query, WrongQueryError, as_sentence
from sequencerd.console.tables import at, at_shard
from sequencerd.core import exact_json
from sequencerd.core.calendar import dates
from sequencerd.core.routing import shard_of
from sequencerd.definitions.options import read_object, read_zone
from sequencerd.errors import DatabaseError, UsageError
from sequencerd.storage import bulk, connections
from sequencerd.storage.bulk import AlreadyEnrolledError
from sequencerd.storage.connections import Shard
from sequencerd.storage.database_errors import brief
from sequencerd.storage.statements import QUERIES

FIELDS = ("sequence", "subject", "email", "data", "timezone", "step", "start", "reason")


async def ask(request: Request) -> Response:
    """Show the form."""
    return _page(request, query_of(request))


def _page(
    request: Request,
    query: Query,
    status: int = 200,
    *,
    wrong: str | None = None,
    blocking: Mapping[str, Any] | None = None,
) -> Response:
    definitions = context_of(request).simulator().definitions
    chosen = definitions.get(query.get("sequence") or "")
    return render(
        request,
        "enroll.html",
        status,
        title="Enroll a subject",
        given={name: query.get(name) or "" for name in FIELDS},
        sequences=sorted(name for name, one in definitions.items() if not one.archived),
        steps=list(chosen.steps) if chosen else [],
        zone=chosen.timezone if chosen else "",
        wrong=wrong,
        blocking=blocking,
    )


async def enroll(request: Request) -> Response:
    """Enroll a subject, or explain why that is not possible."""
    context, query = context_of(request), Query(request.state.form)
    if (reason := reason_of(query)) is None:
        return _page(request, query, 422, wrong="Write a reason: it is recorded.")
    try:
        given = _read(query)
        shard = _shard_of(context, given["subject"])
        id_ = await _enroll(shard.shard, given, why(request, reason))
    except AlreadyEnrolledError as error:
        rows = await connections.read(
            shard.pool, "console_blocking", given["sequence"], given["subject"]
        )
        blocking = [_linked(shard.shard, row["id"]) | {"status": row["status"]} for row in rows]
        return _page(request, query, 409, wrong=f"{error}.", blocking=next(iter(blocking), None))
    except UsageError as error:
        return _page(request, query, 422, wrong=as_sentence(str(error)))
    except (DatabaseError, asyncpg.ReadOnlySQLTransactionError) as error:
        if shard.shard.name is None:
            raise
        cause = str(error) if isinstance(error, DatabaseError) else brief(error)
        wrong = f"Nothing was changed: shard {shard.shard.name}: {cause}."
        return _page(request, query, 503, wrong=wrong)
    return RedirectResponse(_linked(shard.shard, id_)["url"], 303)


def _linked(shard: Shard, id_: int) -> dict[str, str]:
    """Return the label of an enrollment, and its page."""
    if shard.name is None:
        return {"label": str(id_), "url": at(f"/enrollments/{id_}")}
    return {"label": f"{shard.name}/{id_}", "url": at_shard(shard.name, f"/enrollments/{id_}")}


def _shard_of(context: PageContext, subject: str) -> PageContext:
    """Return the shard of a subject, of one database itself. Raises UsageError for one of those
    that are not shown here.
    """
    for part in context.parts.values() or [context]:
        number = part.shard.number
        if number is None or shard_of(subject, number.shards) == number.number:
            return part
    raise UsageError(f"{subject} belongs to another shard")


def _read(query: Query) -> dict[str, Any]:
    """Return the arguments of an enrollment. Raises UsageError."""
    given = {name: (query.get(name) or "").strip() or None for name in FIELDS}
    for name in ("sequence", "subject"):
        if given[name] is None:
            raise UsageError(f"{name} is missing")
    text = given["data"] or "{}"
    read_object(text, "data")
    data = exact_json.loads(text)
    if email := given["email"]:
        if data.get("email", email) != email:
            raise UsageError("the data has another e-mail address: leave out one of them")
        data["email"] = email
    if given["timezone"]:
        read_zone(given["timezone"])
    try:
        content = exact_json.dumps(data)
    except ValueError as error:
        raise UsageError(f"data: {error}") from error
    at = None
    if (start := given["start"]) and (at := dates.parse(start, dates.zone("UTC"))) is None:
        raise UsageError(f"start {start!r} is not an ISO 8601 date")
    kept = {name: given[name] for name in ("sequence", "subject", "timezone", "step")}
    return {**kept, "data": content, "at": at}


async def _enroll(shard: Shard, given: dict[str, Any], cause: str) -> int:
    # not one of the pool's: the daemons are to be notified
    try:
        async with connections.connected(shard) as connection, connection.transaction():
            id_ = await bulk.enroll(connection, **given)
            await connection.execute(QUERIES["console_created"], id_, cause)
    except asyncpg.InsufficientPrivilegeError as error:
        raise WrongQueryError(
            f"the database refuses: {error}. To enroll here, the console's login needs GRANT "
            "sequencer_enroller"
        ) from error
    return id_
