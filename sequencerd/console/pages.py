"""The pages: each function answers a request of a user who has access."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import replace
from typing import Any
from urllib.parse import parse_qsl

from starlette.requests import Request
from starlette.responses import (
    FileResponse,
    Response,
    StreamingResponse,
)

from sequencerd.console import (
    funnel,
    html,
    over_time,
    panel,
    simulating,
    suppressing,
    views,
)
from sequencerd.console.all_shards import grouped, in_all
from sequencerd.console.causes import FailureCause, causes
from sequencerd.console.changing import select
from sequencerd.console.context import (
    WITH_FRAMES,
    PageContext,
    context_of,
    definition_of,
    missing,
    query_of,
    render,
    to_its_shard,
)
from sequencerd.console.lists import (
    COLUMNS,
    DEFAULT_COLUMNS,
    FILTERS,
    EnrollmentPage,
    enrollments,
    without_usual_columns,
)
from sequencerd.console.live import COUNTS_TOPIC
from sequencerd.console.mask import MASKED_VALUE, OF_OTHERS, MaskedRow
from sequencerd.console.merging import found_in_all, revisions_in_all, waiting_in_all
from sequencerd.console.query import (
    MAX_ROWS,
    ROWS_PER_PAGE,
    NotFoundError,
    Query,
    WrongQueryError,
    as_sentence,
)
from sequencerd.console.stored_sequence import read_stored
from sequencerd.console.summary import MAX_CAUSES, MAX_GROUPS, MAX_PROBLEMS, Counts
from sequencerd.console.tables import Column, Table, as_csv, as_json, at, at_shard
from sequencerd.console.views import EnrollmentHistory
from sequencerd.core.model import NEXT, Sequence
from sequencerd.core.what_next import what_next
from sequencerd.definitions import drawing

MAX_FORM = 100_000  # bytes, before the login
MAX_FORM_OF_USERS = 4_000_000  # a megabyte of YAML can take three in a form
MAX_DRAWN = 500  # steps of a graph: a browser takes a second or two for its layout
PROGRAMS_WAIT = 10.0  # seconds, for the first counts

OF_ENROLLMENTS = {"events": "id", "simulation": "enrollment"}
"""The tables about an enrollment, with the query parameter that names it."""

COUNTED = ("overview", "steps", "failures", "health", "coming")
"""The tables made from the counts."""


def _since(counts: Counts | None) -> str:
    if counts is None or counts.flow_since is None:
        return "the first count, which is under way"
    return f"{counts.flow_since:%Y-%m-%d}"


# --- counts


def _render_counts(
    request: Request, template: str, title: str, counts: Counts | None, **given: Any
) -> Response:
    """Return a page that is refreshed by each new count."""
    return render(
        request,
        template,
        title=title,
        live=COUNTS_TOPIC,
        version=context_of(request).summary.version,
        counts=counts,
        **given,
    )


def _problems(
    context: PageContext, counts: Counts | None, definition: Sequence | None = None
) -> list[MaskedRow]:
    """Return the problems that daemons report: all, or of the enrollments of a sequence and of the
    runners that its steps use. With masks, only the pages of enrollments have errors that may quote
    their data, which is not known here.
    """
    rows = counts.problems if counts else []
    if definition is not None:
        types = {step.type for step in definition.steps.values()}
        rows = [
            row
            for row in rows
            if (row["kind"] == "runner" and row["about"] in types)
            or (row["kind"] == "quarantined" and row["sequence"] == definition.name)
        ]
    return [
        context.mask(
            {
                **row,
                "last_error": MASKED_VALUE
                if context.is_masked and row["kind"] in OF_OTHERS
                else row["message"],
            }
        )
        for row in rows
    ]


async def overview(request: Request) -> Response:
    """Show all sequences."""
    context, query = context_of(request), query_of(request)
    counts = await context.summary.get()
    every = views.overview(counts, query) if counts else None
    return _render_counts(
        request,
        "overview.html",
        "Overview",
        counts,
        since=_since(counts),
        every=every and every.rows,
        overview=every and every.part(query.number("first", 0)),
        coming=views.coming(counts, Query({})) if counts else None,
        problems=_problems(context, counts),
        most_problems=MAX_PROBLEMS,
    )


async def failures(request: Request) -> Response:
    """Show failed enrollments by step and failure."""
    context, query = context_of(request), query_of(request)
    counts = await context.summary.get()
    every = views.failures(counts, query, context.mask) if counts else None
    return _render_counts(
        request,
        "failures.html",
        "Failures",
        counts,
        failures=every and every.part(query.number("first", 0)),
        most=(MAX_CAUSES, MAX_GROUPS),
        has_more=counts is not None and counts.has_more_causes,
    )


async def health(request: Request) -> Response:
    """Show what doctor finds, and the problems that daemons report."""
    context = context_of(request)
    counts = await context.summary.get()
    return _render_counts(
        request,
        "health.html",
        "Health",
        counts,
        health=_health(context, counts, query_of(request)) if counts else None,
        problems=_problems(context, counts),
        most_problems=MAX_PROBLEMS,
    )


def _health(context: PageContext, counts: Counts, query: Query) -> Table:
    return views.health(counts, query, context.mask, is_masked=context.is_masked)


async def sequence(request: Request) -> Response:
    """Show a sequence: its graph and steps, and the enrollments at the chosen step."""
    context, query = context_of(request), query_of(request)
    name, step = query.must("sequence"), query.get("step")
    definition = definition_of(context, name, step)
    node = definition.steps[step] if step else None
    counts = await context.summary.get()
    chosen_range = panel.range_of(query)
    flow = await panel.flow(context, name, chosen_range)
    enrollments = await waiting_in_all(context, query) if step else None
    revisions = await revisions_in_all(context, query)
    is_first = not any(key.startswith("before") for key in query.given)  # page of revisions
    schedules = await in_all(context, lambda part: views.schedule(part.pool, name, part.mask))
    brakes = await in_all(context, lambda part: views.brake(part.pool, name))
    known = counts.sequences if counts else []
    row = next((row for row in known if row["name"] == name), {})
    steps = views.steps(counts, query) if counts else None
    beside = None
    if node:
        counted = next((row for row in steps.rows if row["step"] == step), {}) if steps else {}
        beside = await panel.panel(
            context, counts, definition, node, flow=flow, row=counted, query=query
        )
    answer = _render_counts(
        request,
        "sequence.html",
        name,
        counts,
        since=_since(counts),
        name=name,
        description=row.get("description"),
        problems=_problems(context, counts, definition),
        status=(await read_stored(context, name)).status,  # also just after it was changed
        definition=definition,
        schedules=grouped(schedules),
        brakes=grouped(brakes),
        is_same=_is_same(context, name),
        places=await _places(context, query) if context.parts else None,
        graph=json.dumps(_graph(definition, steps, step, flow, query))
        if len(definition.steps) <= MAX_DRAWN
        else None,
        most_drawn=MAX_DRAWN,
        panel=beside,
        ranges=list(panel.RANGES),
        range=chosen_range,
        home=at("/sequence", sequence=name, range=query.get("range")),
        steps=steps and steps.part(query.number("first", 0)),
        step=step,
        enrollments=enrollments,
        revisions=revisions,
        changed=next(iter(revisions.rows), None) if is_first else None,
    )
    answer.headers.update(WITH_FRAMES)
    return answer


async def _places(context: PageContext, query: Query) -> Table:
    """Return what each shard has of a sequence, with the address of its page there."""
    found = await in_all(context, lambda part: part.summary.get())
    rows = [
        {**row, "shard": shard, "url": at_shard(shard, "/sequence", **query.given)}
        for shard, counts in found.items()
        if counts
        for row in views.overview(counts, query).rows
        if row["sequence"] == query.must("sequence")
    ]
    columns = (
        Column("shard", "Shard", link="url"),
        Column("status", "Status", "code"),
        Column("active", "Active", "number"),
        Column("overdue", "Overdue", "number", optional=True),
        Column("failed", "Failed", "number", optional=True),
    )
    return Table("shards", columns, rows, query.given)


def _is_same(context: PageContext, name: str) -> bool:
    """Return whether all shards have the same definition of a sequence."""
    found = [part.simulator().definitions.get(name) for part in context.parts.values()]
    return len({one and _signature(one) for one in found}) <= 1


def _signature(definition: Sequence) -> str:
    steps = [
        (one.name, one.type, one.config, one.next_step, one.alt_next_step)
        for one in definition.steps.values()
    ]
    shown = definition.first_step, definition.timezone, steps
    return json.dumps(shown, default=str, sort_keys=True)


def _graph(
    definition: Sequence,
    steps: Table | None,
    chosen: str | None,
    flow: panel.StepFlow,
    query: Query,
) -> dict[str, Any]:
    """Return the graph for the browser: edges with their counts, and the goals separately."""
    counted = {row["step"]: row for row in steps.rows} if steps else {}
    shown = {"sequence": definition.name, "range": query.get("range")}
    nodes = []
    for step in definition.steps.values():
        row = counted.get(step.name, {})
        nodes.append(
            {
                "name": step.name,
                "type": step.type,
                "url": at("/sequence", **shown, step=step.name),
                "first": step.name == definition.first_step,
                "goal": step in definition.goals,
                "chosen": step.name == chosen,
                "active": html.number(row.get("active")),
                "failed": html.number(row["failed"]) if row.get("failed") else "",
                "limit": " · ".join(text for _, text in drawing.limits(definition, step)),
                "stay": html.duration(row.get("median_stay")),
                "problem": bool(row.get("problem")),
            }
        )
    edges = []
    for edge in drawing.edges(definition):
        times = panel.times(flow, edge)
        way = edge.label or NEXT.label
        edges.append(
            {
                "from": edge.source,
                "to": edge.target,
                "elsewhere": edge.sequence,
                "label": edge.label,
                "times": html.number(times) if times else "",
                "url": at("/sequence", **shown, step=edge.source, way=way),
                "chosen": edge.source == chosen and query.get("way") == way,
            }
        )
    return {"nodes": nodes, "edges": edges}


# --- enrollments


async def enrollment(request: Request) -> Response:
    """Show an enrollment: its state and its history."""
    found = await _journey(request, request.path_params["id"], query_of(request))
    zone = found.row["timezone"] or "UTC"
    row = {**found.row, "timezone": zone}
    return render(
        request,
        "enrollment.html",
        title=row["subject"],
        live=row["id"],
        version=found.version,
        row=row,
        why=html.sentence(lambda at: what_next(row, at), zone),
        events=found.events,
    )


async def _journey(request: Request, id_: int, query: Query) -> EnrollmentHistory:
    """Read an enrollment once for all open pages of it."""
    context = context_of(request)
    if id_ >= 2**63:
        raise NotFoundError(f"Enrollment {id_} does not exist.")
    version = context.live.version(id_)
    is_shared = version is not None and not query.given and query.rows == ROWS_PER_PAGE
    key, read = (id_, context.is_masked), context.enrollments_read
    if is_shared and (kept := read.get(key)) and kept[0] == version:
        return kept[1]
    found = await views.journey(context.pool, id_, query, context.mask)
    if is_shared:
        for known, kept in list(read.items()):
            if context.live.version(known[0]) != kept[0]:
                del read[known]
        read[key] = (found.version, found)
    return found


async def search(request: Request) -> Response:
    """Find and filter enrollments."""
    context, query = context_of(request), without_usual_columns(query_of(request))
    wrong = None
    try:
        found = await _found(context, query)
    except WrongQueryError as error:  # the filters remain, to be corrected
        wrong = as_sentence(str(error))
        found = EnrollmentPage(
            Table("search", [COLUMNS[name] for name in DEFAULT_COLUMNS], [], query.given)
        )
    counts = await context.summary.get()
    definitions = context.simulator().definitions
    chosen = definitions.get(query.get("sequence") or "")
    answer = render(
        request,
        "search.html",
        422 if wrong else 200,
        title="Enrollments",
        wrong=wrong,
        given={name: query.get(name) or "" for name in ("q", "sort", "columns", *FILTERS)},
        found=found.table,
        remark=found.table.remark,
        advice=found.advice,
        sequences=sorted(definitions),
        steps=list(chosen.steps) if chosen else [],
        topics=sorted({one.topic for one in definitions.values() if one.topic}),
        cause=_cause(counts, context, query.get("cause")),
        columns=COLUMNS,
        chosen=[column.key for column in found.table.columns],
        filters=[(name, query.get(name)) for name in ("q", *FILTERS) if query.get(name)],
        times={}
        if wrong
        else {name: query.time_or_none(name) for name in ("wakes_from", "wakes_before")},
        is_filtered=any(query.get(name) for name in FILTERS),
        further=found.further,
    )
    answer.headers["HX-Replace-Url"] = at("/search", **query.given)  # without empty fields
    return answer


async def _found(context: PageContext, query: Query) -> EnrollmentPage:
    """Return the list for the filters, or the enrollments that a search text finds."""
    if context.parts:
        return await found_in_all(context, query, _found)
    if query.get("q") and not any(query.get(name) for name in (*FILTERS, "sort", "columns")):
        return await views.search(context.pool, query, context.mask, context.settings.mask)
    selection = await select(context, query)
    found = await enrollments(context.pool, query, selection, context.mask)
    if not (wanted := query.get("q")):
        return found
    _, remark, advice = await views.by_text(context.pool, wanted, context.settings.mask, 1)
    remarks = [text for text in (remark, found.table.remark) if text]
    return EnrollmentPage(replace(found.table, remark=" ".join(reversed(remarks)) or None), advice)


def _cause(counts: Counts | None, context: PageContext, key: str | None) -> FailureCause | None:
    known = causes(counts, context.mask) if counts and key else []
    return next((cause for cause in known if cause.key == key), None)


# --- tables


async def table(request: Request) -> Response:
    """Return a table as JSON or CSV."""
    context = context_of(request)
    limit = query_of(request).number("limit", ROWS_PER_PAGE)
    query = query_of(request, max(1, min(limit, MAX_ROWS)))
    name, form = request.path_params["name"], request.path_params["form"]
    if name in OF_ENROLLMENTS and (elsewhere := to_its_shard(request, OF_ENROLLMENTS[name])):
        return elsewhere
    write = {"json": as_json, "csv": as_csv}.get(form)
    made = await _table(request, context, name, query)
    if write is None or made is None:
        raise NotFoundError("There is no such table.")
    answer = write(made)
    if without := {**context.summary.missing, **missing.get()}:
        answer.headers["X-Missing-Shards"] = ", ".join(without)
    return answer


async def _table(request: Request, context: PageContext, name: str, query: Query) -> Table | None:
    counts = None
    if name in COUNTED:
        counts = await context.summary.get(PROGRAMS_WAIT)
        if counts is None:
            raise NotYetError
    match name:
        case "overview" if counts:
            return views.overview(counts, query)
        case "steps" if counts:
            return views.steps(counts, query)
        case "failures" if counts:
            return views.failures(counts, query, context.mask)
        case "coming" if counts:
            return views.coming(counts, query)
        case "health" if counts:
            return _health(context, counts, query)
        case "funnel":
            return await funnel.read(context, query)
        case "arms":
            return funnel.arms(await funnel.read(context, query))
        case "enrollments":
            return await waiting_in_all(context, query)
        case "revisions":
            return await revisions_in_all(context, query)
        case "search":
            return _with_remark(await _found(context, without_usual_columns(query)))
        case "shards" if context.parts:
            return await _places(context, query)
        case "events" if not context.parts:
            found_journey = await _journey(request, query.number("id", 0), query)
            return found_journey.events
        case "suppressions":
            return (await suppressing.read(context, request.state.visitor, query)).table
        case "activity" | "activity-steps":
            return await over_time.tables(context, name, query)
        case "simulation":
            return (await simulating.run(context, query)).table
    return None


def _with_remark(page: EnrollmentPage) -> Table:
    """Return the table of a list, which says in which shards there are more matches."""
    if not page.further:
        return page.table
    urls = [url.replace("/search?", "/tables/search.json?", 1) for url in page.further.values()]
    remark = f"These are the first matches of each shard. More are at {' and '.join(urls)}"
    return replace(page.table, remark=" ".join(filter(None, (page.table.remark, remark))))


class NotYetError(Exception):
    """The first count has not finished."""


# --- live


async def stream(request: Request) -> Response:
    """Notify a page of changes."""
    context, query = context_of(request), query_of(request)
    topic = COUNTS_TOPIC if context.parts else query.number("topic", COUNTS_TOPIC)
    known = request.headers.get("last-event-id") or query.get("version") or ""
    if request.method == "HEAD":  # no client would close the stream
        return Response(media_type="text/event-stream")

    async def events() -> AsyncIterator[str]:
        async for event in context.live.stream(topic, known):
            if await context.auth.has_ended(request, request.state.visitor):
                return
            yield event

    return StreamingResponse(
        events(),
        media_type="text/event-stream",
        headers={"X-Accel-Buffering": "no"},
    )


# --- forms


async def read_form(request: Request, most: int) -> None:
    """Read the form of a request into its state. Raises WrongQueryError."""
    request.state.form = {}  # a body that is too large cannot be read again
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > most:
            raise WrongQueryError("the form is too large")
    try:
        request.state.form = dict(parse_qsl(body.decode(), keep_blank_values=True, errors="strict"))
    except ValueError as error:
        raise WrongQueryError("the form cannot be read") from error


# --- files


async def static(request: Request) -> Response:
    """Return styles and scripts."""
    name = request.path_params["name"]
    if name not in FILES:
        raise NotFoundError("There is no such file.")
    answer = FileResponse(str(html.STATIC / name), media_type=FILES[name])
    answer.headers["Cache-Control"] = "public, max-age=31536000, immutable"
    return answer


FILES = {
    "console.css": "text/css",
    "console.js": "text/javascript",
    "editor.js": "text/javascript",
    "completion.js": "text/javascript",
    "graph.js": "text/javascript",
    "viewport.js": "text/javascript",
    "icon.svg": "image/svg+xml",
    "vendor/codemirror.js": "text/javascript",
    "vendor/htmx.js": "text/javascript",
    "vendor/dagre.js": "text/javascript",
}

Page = Callable[[Request], Coroutine[Any, Any, Response]]
