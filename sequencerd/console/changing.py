"""The pages of a change: the question with the exact number, the change, and its result."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import asyncpg
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from sequencerd.console import views
from sequencerd.console.actions import ACTIONS, recorded
from sequencerd.console.all_shards import in_all
from sequencerd.console.auth import Visitor
from sequencerd.console.causes import NO_ERROR, causes
from sequencerd.console.context import (
    PageContext,
    context_of,
    local,
    missing,
    query_of,
    render,
)
from sequencerd.console.lists import FILTERS, selection_of
from sequencerd.console.live import COUNTS_TOPIC
from sequencerd.console.query import MAX_ROWS, NotFoundError, Query, WrongQueryError
from sequencerd.console.tables import at
from sequencerd.storage import bulk, connections
from sequencerd.storage.bulk import Selection
from sequencerd.storage.connections import Shard, reading
from sequencerd.storage.statements import QUERIES

MAX_REASON = 500  # characters
MAX_FOLLOWED = 10_000  # enrollments of a change

VERBS = {"skip": "Skip the step for"}  # other verbs are the name of the action


def reason_of(query: Query) -> str | None:
    """Return the reason that a user entered, as one line; None if it is missing."""
    return " ".join((query.get("reason") or "").split())[:MAX_REASON] or None


def why(request: Request, reason: str) -> str:
    """Return what the history records about a change by the user of a request."""
    return recorded(request.state.visitor.user, reason)


async def select(context: PageContext, query: Query) -> Selection:
    """Return the selection in a query. Raises WrongQueryError."""
    counts = await context.summary.get() if query.get("cause") else None
    topics = {name: one.topic for name, one in context.simulator().definitions.items()}
    known = causes(counts, context.mask) if counts else []
    selection = selection_of(query, context.settings.mask, known, topics, context.now())
    if selection.prefix is None:
        return selection
    rows, _, _ = await views.by_text(
        context.pool, selection.prefix, context.settings.mask, MAX_ROWS
    )
    return selection._replace(or_ids=[row["id"] for row in rows])


async def question(request: Request) -> Response:
    """Ask before a change: show how many enrollments it affects, and ask for a reason."""
    return await _ask(request, query_of(request), None)


async def _ask(request: Request, query: Query, remark: str | None, status: int = 200) -> Response:
    context, action = context_of(request), _action(query)
    found = await _selected(context, query)
    rows = bulk.added_up(row for one in found.values() for row in one.rows)
    steps = dict.fromkeys(step for one in found.values() for step in one.steps)
    number = sum(row["count"] for row in rows)
    verb = VERBS.get(action, action.capitalize())
    given = {key: query.get(key) for key in ("action", "id", "q", "back", *FILTERS)}
    return render(
        request,
        "question.html",
        status,
        title=f"{verb} {bulk.count(number)}?",
        number=number,
        rows=rows,
        steps=list(steps),
        needs_step=action == "move",
        given={key: value for key, value in given.items() if value is not None},
        # enrollments that fail after the question are not part of the change
        now=context.now().isoformat(),
        leave=local(query.get("back")),
        remark=remark,
        reason=query.get("reason") or "",
        to=query.get("to"),
    )


def _action(query: Query) -> str:
    action = query.must("action")
    if action not in ACTIONS:
        raise WrongQueryError(f"unknown action {action!r}")
    return action


class Selected(NamedTuple):
    """The enrollments in one shard that a change affects."""

    selection: Selection
    rows: list[asyncpg.Record]  # counts
    steps: list[str]  # of the sequences


async def _selected(context: PageContext, query: Query) -> dict[Shard, Selected]:
    """Count what a change applies to, by shard. Raises WrongQueryError, also for ids in a shard
    that is away or read-only.
    """
    action = _action(query)
    asked = {
        name: ours
        for name in context.parts
        if (ours := query.of_shard(name, context.parts)) is not None
    }

    async def find(part: PageContext) -> tuple[Shard, Selected]:
        ours = asked[str(part.shard.name)] if context.parts else query
        selection = await _chosen(part, ours)
        async with reading(part.pool) as connection:
            if await connection.fetchval(QUERIES["is_read_only"]):
                raise asyncpg.ReadOnlySQLTransactionError
            rows = await bulk.selected(connection, action, selection)
            sequences = sorted({row["sequence"] for row in rows})
            steps = await connection.fetch(QUERIES["steps_of_all"], sequences) if rows else []
        return part.shard, Selected(selection, rows, [row["name"] for row in steps])

    found = dict((await in_all(context, find, only=asked)).values())
    if missing.get() and query.get("id"):
        reasons = "; ".join(f"{name}: {reason}" for name, reason in missing.get().items())
        raise WrongQueryError(f"some of the chosen enrollments cannot be changed: shard {reasons}")
    return found


async def _chosen(context: PageContext, query: Query) -> Selection:
    """Return the selection of a change, which must not be empty: either ids or filters."""
    if query.get("id"):
        ended = query.time_or_none("ended_by")
        return Selection(ids=query.numbers("id"), ended_by=ended)
    if not any(query.get(name) for name in ("q", *FILTERS)):
        raise WrongQueryError("nothing is selected: select enrollments, or set a filter")
    return await select(context, query)


async def change(request: Request) -> Response:
    """Make a change that a user has confirmed."""
    context = context_of(request)
    visitor: Visitor = request.state.visitor
    assert visitor.user is not None
    query = Query(request.state.form)
    action, found = _action(query), await _selected(context, query)
    if (reason := reason_of(query)) is None:
        return await _ask(request, query, "Write a reason: it is recorded with the change.", 422)
    to = None
    if action == "move":
        to = query.must("to")
        await _check_step(context, found, to)
    if sum(row["count"] for one in found.values() for row in one.rows) > query.number("number", 0):
        return await _ask(request, query, "More enrollments match now.", 409)
    selections = {shard: one.selection for shard, one in found.items()}
    made = await context.actions.make(
        visitor.nonce,
        visitor.user,
        action,
        selections,
        reason=reason,
        to=to,
        without=missing.get(),
    )
    for one in (context, *context.parts.values()):
        one.enrollments_read.clear()
    if sum(len(one.ids or ()) for one in selections.values()) == 1 and query.get("id"):
        made.page = local(query.get("back"))
        return RedirectResponse(made.page, 303)
    return RedirectResponse(at(f"/changes/{made.number}"), 303)


async def _check_step(context: PageContext, found: Mapping[Shard, Selected], step: str) -> None:
    """Raise WrongQueryError if a sequence has no such step."""

    async def check(part: PageContext) -> None:
        rows = found[part.shard].rows if part.shard in found else []
        async with reading(part.pool) as connection:
            unknown = await bulk.without_step(connection, (row["sequence"] for row in rows), step)
        if unknown:
            raise WrongQueryError(f"sequence {unknown[0]!r} has no step {step!r}")

    await in_all(context, check)


async def follow(request: Request) -> Response:
    """Show what happened to the enrollments after a change."""
    context = context_of(request)
    made = context.actions.get(request.path_params["number"])
    if made is None:
        raise NotFoundError(
            "Unknown change: changes are not kept across a restart, but their events are."
        )
    followed = {shard: list(ids[:MAX_FOLLOWED]) for shard, ids in made.ids.items()}

    async def find(part: PageContext) -> list[asyncpg.Record]:
        ids = followed.get(part.shard, [])
        return await connections.read(part.pool, "outcomes", ids, made.begun_at)

    outcomes: list[dict[str, Any]] = []
    if made.ended is not None and made.action in ("retry", "skip", "move", "reevaluate"):
        found = await in_all(context, find)
        outcomes = _by_outcome(_outcome(context, row) for rows in found.values() for row in rows)
    counts = await context.summary.get()
    report = context.mask({"message": made.report})["message"]
    return render(
        request,
        "change.html",
        title=report if made.ended else ACTIONS[made.action],
        report=report,
        live=COUNTS_TOPIC,
        version=context.summary.version,
        made=made,
        reason=context.mask({"message": made.reason})["message"],
        outcomes=outcomes,
        result=_result(outcomes),
        followed=sum(map(len, followed.values())),
        counts=counts,
    )


def _outcome(context: PageContext, row: Any) -> dict[str, Any]:
    status = {"active": "waiting or executing", "failed": "failed again"}.get(row["status"])
    if row["status"] == "failed" and not row["is_after"]:
        status = "not changed"
    shown = context.mask(
        {"message": row["cause"], "data": row["data"], "known_subject": row["subject"]}
    )
    return {
        "outcome": status or row["status"],
        "status": row["status"],
        "cause": (shown["message"] or NO_ERROR) if row["status"] == "failed" else None,
        "enrollments": row["enrollments"],
    }


def _by_outcome(outcomes: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add up the outcomes of several shards."""
    merged: dict[tuple[Any, ...], dict[str, Any]] = {}
    for one in outcomes:
        key = one["status"], one["outcome"], one["cause"]
        known = merged.setdefault(key, {**one, "enrollments": 0})
        known["enrollments"] += one["enrollments"]
    return sorted(merged.values(), key=lambda one: -one["enrollments"])


def _result(outcomes: list[dict[str, Any]]) -> str:
    """Describe outcomes, such as "3 completed, 84 failed again"."""
    numbers: dict[str, int] = {}
    for row in outcomes:
        numbers[row["outcome"]] = numbers.get(row["outcome"], 0) + row["enrollments"]
    return ", ".join(f"{number:,} {outcome}" for outcome, number in numbers.items())
