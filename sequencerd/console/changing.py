"""The pages of a change: the question with its exact number, the change, and what became of it."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from sequencerd.console import views
from sequencerd.console.actions import ACTIONS
from sequencerd.console.auth import Visitor
from sequencerd.console.causes import NO_ERROR, causes
from sequencerd.console.context import PageContext, context_of, local, query_of, render
from sequencerd.console.lists import FILTERS, selection_of
from sequencerd.console.live import COUNTS
from sequencerd.console.query import MOST_ROWS, NotFoundError, Query, WrongQueryError
from sequencerd.console.tables import at
from sequencerd.storage import bulk
from sequencerd.storage.bulk import Selection
from sequencerd.storage.connections import reading
from sequencerd.storage.statements import QUERIES

MAX_REASON = 500  # characters
MOST_FOLLOWED = 10_000  # enrollments of a change

VERBS = {"skip": "Skip the step for"}  # others are the name of the action


def reason_of(query: Query) -> str | None:
    """Return the reason that a user gives, in one line; None without one."""
    return " ".join((query.get("reason") or "").split())[:MAX_REASON] or None


def why(request: Request, reason: str) -> str:
    """Return what the history records of a change."""
    return f"{request.state.visitor.user} in the console: {reason}"


async def select(context: PageContext, query: Query) -> Selection:
    """Return what a query selects. Raises WrongQueryError."""
    counts = await context.summary.get() if query.get("cause") else None
    topics = {name: one.topic for name, one in context.simulator().definitions.items()}
    known = causes(counts, context.mask) if counts else []
    selection = selection_of(query, context.settings.mask, known, topics, context.now())
    if selection.prefix is None:
        return selection
    rows, _, _ = await views.by_text(
        context.pool, selection.prefix, context.settings.mask, MOST_ROWS
    )
    return selection._replace(or_ids=[row["id"] for row in rows])


async def question(request: Request) -> Response:
    """Ask before a change: for how many, of which, and why."""
    return await _ask(request, query_of(request), None)


async def _ask(request: Request, query: Query, remark: str | None, status: int = 200) -> Response:
    context, action = context_of(request), _action(query)
    selection = await _chosen(context, query)
    async with reading(context.pool) as connection:
        rows = await bulk.selected(connection, action, selection)
        sequences = sorted({row["sequence"] for row in rows})
        steps = await connection.fetch(QUERIES["steps_of_all"], sequences) if rows else []
    number = sum(row["count"] for row in rows)
    verb = VERBS.get(action, action.capitalize())
    given = {key: query.get(key) for key in ("action", "id", "q", "back", *FILTERS)}
    return render(
        request,
        "question.html",
        status,
        title=f"{verb} {bulk.count(number)}?",
        verb=verb,
        number=number,
        rows=rows,
        steps=[row["name"] for row in steps],
        needs_step=action == "move",
        given={key: value for key, value in given.items() if value is not None},
        # what fails while the question is asked is not part of it
        now=context.now().isoformat(),
        leave=local(query.get("back")),
        remark=remark,
        reason=query.get("reason") or "",
    )


def _action(query: Query) -> str:
    action = query.must("action")
    if action not in ACTIONS:
        raise WrongQueryError(f"unknown action {action!r}")
    return action


async def _chosen(context: PageContext, query: Query) -> Selection:
    """Return the selection of a change, which must select something: ids alone, or filters."""
    if query.get("id"):
        ended = query.time_or_none("ended_by")
        return Selection(ids=query.numbers("id"), ended_by=ended)
    if not any(query.get(name) for name in ("q", *FILTERS)):
        raise WrongQueryError("nothing is selected: tick enrollments, or set a filter")
    return await select(context, query)


async def change(request: Request) -> Response:
    """Make a change that a user has confirmed."""
    context = context_of(request)
    visitor: Visitor = request.state.visitor
    assert visitor.user is not None
    query = Query(request.state.form)
    action, selection = _action(query), await _chosen(context, query)
    if (reason := reason_of(query)) is None:
        return await _ask(request, query, "Write a reason: it is recorded with the change.", 422)
    to = None
    async with reading(context.pool) as connection:
        rows = await bulk.selected(connection, action, selection)
        if action == "move":
            to = query.must("to")
            sequences = sorted({row["sequence"] for row in rows})
            known = await connection.fetch(QUERIES["with_step"], to, sequences)
            if missing := sorted(set(sequences) - {row["sequence"] for row in known}):
                raise WrongQueryError(f"sequence {missing[0]!r} has no step {to!r}")
    if sum(row["count"] for row in rows) > query.number("number", 0):
        return await _ask(request, query, "More enrollments match by now.", 409)
    made = await context.actions.make(
        visitor.nonce, visitor.user, action, selection, reason=reason, to=to
    )
    context.enrollments_read.clear()
    if selection.ids and len(selection.ids) == 1:
        return RedirectResponse(local(query.get("back")), 303)
    return RedirectResponse(at(f"/changes/{made.number}"), 303)


async def follow(request: Request) -> Response:
    """What happened to the enrollments that were changed."""
    context = context_of(request)
    made = context.actions.get(request.path_params["number"])
    if made is None:
        raise NotFoundError("This change is not known. A restart forgets changes; events do not.")
    followed = list(made.ids[:MOST_FOLLOWED])
    outcomes: list[dict[str, Any]] = []
    if made.ended is not None and made.action in ("retry", "skip", "move", "reevaluate"):
        async with reading(context.pool) as connection:
            found = await connection.fetch(QUERIES["outcomes"], followed, made.begun_at)
        outcomes = [_outcome(context, row) for row in found]
    counts = await context.summary.get()
    report = context.mask({"message": made.report})["message"]
    return render(
        request,
        "change.html",
        title=report if made.ended else ACTIONS[made.action],
        report=report,
        live=COUNTS,
        version=context.summary.version,
        made=made,
        reason=context.mask({"message": made.reason})["message"],
        outcomes=outcomes,
        result=_result(outcomes),
        followed=len(followed),
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
        "words": status or row["status"],
        "status": row["status"],
        "cause": (shown["message"] or NO_ERROR) if row["status"] == "failed" else None,
        "enrollments": row["enrollments"],
    }


def _result(outcomes: list[dict[str, Any]]) -> str:
    """Return such as "3 completed, 84 failed again"."""
    numbers: dict[str, int] = {}
    for row in outcomes:
        numbers[row["words"]] = numbers.get(row["words"], 0) + row["enrollments"]
    return ", ".join(f"{number:,} {words}" for words, number in numbers.items())
