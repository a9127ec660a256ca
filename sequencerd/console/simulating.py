"""The page Simulate."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from sequencerd.console.context import PageContext, context_of, query_of, render
from sequencerd.console.query import NotFoundError, Query
from sequencerd.console.tables import Column, Table
from sequencerd.definitions.options import read_object
from sequencerd.definitions.simulate import Simulation
from sequencerd.definitions.simulator import WORDS, Outcome, Simulator
from sequencerd.definitions.started import read_started
from sequencerd.errors import UsageError
from sequencerd.storage import connections

MOST_ENTRIES = 500  # of a simulation, which takes turns with the engine


async def simulate(request: Request) -> Response:
    """Return the page that simulates an enrollment."""
    context, query = context_of(request), query_of(request)
    given = {
        "sequences": sorted(context.simulator().definitions),
        "chosen": query.get("sequence"),
        "timezone": query.get("timezone") or "",
        "outcome": query.get("outcome") or "next",
        "outcomes": WORDS,
        "data": query.get("data") or "{}",
        "enrollment": query.get("enrollment"),
    }
    wrong, simulation, table = None, None, None
    if query.get("sequence") or query.get("enrollment"):
        try:
            simulation, table = await simulated(context, query)
        except UsageError as error:
            wrong = str(error)
    end = ""
    if simulation:
        end = simulation.end
        given["chosen"] = simulation.enrollment.sequence
    return render(
        request,
        "simulate.html",
        422 if wrong else 200,
        title="Simulate",
        wrong=wrong,
        simulation=simulation,
        simulated=table,
        end=context.mask({"message": end})["message"],
        **given,
    )


async def simulated(context: PageContext, query: Query) -> tuple[Simulation, Table]:
    """Simulate as the query asks. Raises UsageError."""
    simulator = context.simulator()
    if (outcome := query.get("outcome") or "next") not in WORDS:
        raise UsageError(f"side effects can't end with {outcome!r}")
    outcomes: dict[str, Outcome] = dict.fromkeys(simulator.runners, outcome)
    simulator = Simulator(simulator.definitions, simulator.runners, outcomes, MOST_ENTRIES)
    now = context.now().replace(microsecond=0)
    known: Mapping[str, Any] = {}
    work: Callable[[], Simulation]
    if query.get("enrollment"):
        id_ = query.number("enrollment", 0)
        async with connections.reading(context.pool) as connection:
            started = await read_started(connection, id_)
        if started is None:
            raise NotFoundError(f"Enrollment {id_} does not exist.")
        start, enrolled = started
        known = json.loads(start.data)

        def work() -> Simulation:
            return simulator.follow(start, now, None, {}, None, enrolled=enrolled)
    else:
        data, zone = read_object(query.get("data") or "{}", "data"), query.get("timezone")
        name = query.must("sequence")

        def work() -> Simulation:
            return simulator.simulate(name, start=now, data=data, timezone=zone)

    async with context.simulating:  # one at a time: it takes a core
        simulation = await asyncio.to_thread(work)
    rows = [_entry(context, entry._asdict(), known) for entry in simulation.timeline]
    columns_shown = (
        Column("at", "When", "time"),
        Column("sequence", "Sequence"),
        Column("step", "Step"),
        Column("type", "Type"),
        Column("visit", "Visit", "number"),
        Column("action", "What", "code"),
        Column("message", "Message"),
        Column("details", "What is sent", "json"),
    )
    return simulation, Table("simulation", columns_shown, rows, query.given)


def _entry(context: PageContext, entry: dict[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    """Mask an entry of an existing enrollment."""
    if not known:
        return entry
    details = {
        key: context.mask({"message": text, "known": known})["message"]
        for key, text in entry["details"].items()
    }
    shown = context.mask({"message": entry["message"], "known": known})
    return {**entry, "message": shown["message"], "details": details}
