"""The page that simulates an enrollment."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response

from sequencerd.console.context import (
    WITH_FRAMES,
    PageContext,
    context_of,
    query_of,
    render,
)
from sequencerd.console.mail import framed
from sequencerd.console.mask import read_data
from sequencerd.console.query import NotFoundError, Query, as_sentence
from sequencerd.console.tables import Column, Table, at
from sequencerd.core.calendar import dates
from sequencerd.core.enrollment import Enrollment
from sequencerd.core.model import Sequence, SideEffect
from sequencerd.definitions.options import read_object, read_zone
from sequencerd.definitions.simulate import Simulation
from sequencerd.definitions.simulator import (
    OUTCOME_WORDS,
    Outcome,
    OutcomeWord,
    Simulator,
    choose,
    reached,
    read_result,
    read_time,
    read_until,
    read_when,
)
from sequencerd.definitions.started import read_started
from sequencerd.errors import UsageError
from sequencerd.storage import connections

MAX_ENTRIES_SHOWN = 500  # of a simulation, which takes turns with the engine
MAX_CHANGES = 20
MAX_PERIOD = timedelta(days=366 * 10)  # that is simulated
MAX_KEPT = 4  # simulations, for the frames of their messages

COLUMNS = (
    Column("at", "When", "time"),
    Column("sequence", "Sequence"),
    Column("step", "Step"),
    Column("type", "Type"),
    Column("visit", "Visit", "number"),
    Column("action", "What", "code"),
    Column("message", "Message"),
    Column("details", "What is sent", "json"),
)

Value = TypeVar("Value")
Fallback = TypeVar("Fallback")


class WrongFieldsError(UsageError):
    """The errors in a form, by field."""

    def __init__(self, fields: Mapping[str, str]) -> None:
        super().__init__(
            "; ".join(
                text if text.startswith(f"{name}:") else f"{name}: {text}"
                for name, text in fields.items()
            )
        )
        self.fields = fields


@dataclass(frozen=True)
class _SimulationForm:
    """The values of the form, checked."""

    sequence: str
    start: datetime
    until: datetime | None
    timezone: str | None
    data: Mapping[str, Any]
    external: Mapping[str, Any] | None
    outcomes: Mapping[str, Outcome]
    changes: Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class ShownSimulation:
    """A simulation with masks applied."""

    simulation: Simulation
    end: str
    table: Table


# --- the form


async def simulate(request: Request) -> Response:
    """Return the page that simulates an enrollment."""
    context, query = context_of(request), query_of(request)
    wrong: Mapping[str, str] = {}
    simulated = None
    if query.get("sequence") or query.get("enrollment"):
        try:
            simulated = await run(context, query)
        except WrongFieldsError as error:
            wrong = error.fields
        except UsageError as error:
            wrong = {"": str(error)}
    definitions = context.simulator().definitions
    chosen = query.get("sequence") or min(definitions, default="")
    if simulated:
        query = Query({**simulated.table.query}, query.rows)
        chosen = simulated.simulation.enrollment.sequence
    answer = render(
        request,
        "simulate.html",
        422 if wrong else 200,
        title="Simulate",
        wrong={name: as_sentence(text) for name, text in wrong.items()},
        given=query.given,
        start=query.get("start") or _shown(context.now()),
        sequences=sorted(definitions),
        chosen=chosen,
        enrollment=query.get("enrollment"),
        outcomes=OUTCOME_WORDS,
        types=_types(definitions, chosen, query),
        has_lookup=any(one.lookup for one in reached(definitions, chosen))
        or query.get("external") is not None,
        steps=list(definitions[chosen].steps) if chosen in definitions else [],
        changes=_rows(query),
        simulated=simulated,
        frames=at("/simulate/frame", **query.given),
    )
    answer.headers.update(WITH_FRAMES)
    answer.headers["HX-Replace-Url"] = at("/simulate", **query.given)  # without empty fields
    return answer


def _types(definitions: Mapping[str, Sequence], name: str, query: Query) -> list[str]:
    """Return the step types whose side effects need answers in a simulation."""
    steps = (step for one in reached(definitions, name) for step in one.steps.values())
    used = {step.type for step in steps if isinstance(step.behaviour, SideEffect)}
    given = {key.removeprefix("answer.") for key in query.given if key.startswith("answer.")}
    return sorted(used | given)


def _rows(query: Query) -> list[int]:
    """Return the numbers of the fields for changes: those with a value, and two more."""
    filled = [
        n for n in range(1, MAX_CHANGES + 1) if query.get(f"when.{n}") or query.get(f"set.{n}")
    ]
    return list(range(1, min(max(filled, default=0) + 2, MAX_CHANGES) + 1))


def _shown(time: datetime) -> str:
    return f"{time.astimezone(UTC):%Y-%m-%d %H:%M:%S}"


def _read(context: PageContext, query: Query) -> _SimulationForm:
    """Read the form. Raises WrongFieldsError with all errors."""
    wrong: dict[str, str] = {}

    def read(name: str, parse: Callable[[str], Value], default: Fallback) -> Value | Fallback:
        if (text := query.get(name)) is None:
            return default
        try:
            return parse(text)
        except UsageError as error:
            wrong[name] = str(error)
            return default

    present = context.simulator()
    name = read("sequence", lambda text: choose(present.definitions, text), "")
    now = context.now().replace(microsecond=0)
    start = read("start", lambda text: read_time(text, "start"), now)
    until = read("until", lambda text: _until(text, start), None)
    zone = read("timezone", read_zone, None)
    data = read("data", lambda text: read_object(text, "data", exact=True), {})
    external = read("external", lambda text: read_object(text, "external data"), None)
    every = read("outcome", _word, OUTCOME_WORDS[0])
    outcomes = {
        type_: read(f"answer.{type_}", partial(_answer, type_), every) for type_ in present.runners
    }
    steps = {name for one in present.definitions.values() for name in one.steps}
    changes: dict[str, Mapping[str, Any]] = {}
    for n in _rows(query):
        when = read(f"when.{n}", lambda text: _when(text, start, steps), None)
        merged = read(f"set.{n}", lambda text: read_object(text, "the data", exact=True), None)
        if when is not None and merged is not None:
            changes[when] = {**changes.get(when, {}), **merged}
        elif when is not None and f"set.{n}" not in wrong:
            wrong[f"set.{n}"] = "write the data to merge at this time"
        elif merged is not None and f"when.{n}" not in wrong:
            wrong[f"when.{n}"] = "write when the data changes"
    if wrong:
        raise WrongFieldsError(wrong)
    return _SimulationForm(name, start, until, zone, data, external, outcomes, changes)


def _until(text: str, start: datetime) -> datetime:
    until = read_until(text, start)
    if until - start > MAX_PERIOD:
        raise UsageError("at most ten years are simulated")
    return until


def _when(text: str, start: datetime, steps: set[str]) -> str:
    if text not in steps:
        read_when(text, start, steps, dates.zone("UTC"))
    return text


def _word(text: str) -> OutcomeWord:
    for word in OUTCOME_WORDS:
        if word == text:
            return word
    raise UsageError(f"side effects cannot end with {text!r}")


def _answer(type_: str, text: str) -> Outcome:
    """Read an action, or an answer as JSON."""
    if text in OUTCOME_WORDS:
        return _word(text)
    if not text.startswith("{"):
        raise UsageError(
            f"{text!r} is none of {', '.join(OUTCOME_WORDS)}, and not an answer such as "
            '{"action": "next", "data": {"score": 80}}'
        )
    answer = read_object(text, "the answer")
    read_result(type_, answer)
    return answer


# --- the simulation


async def run(context: PageContext, query: Query) -> ShownSimulation:
    """Simulate according to the query. Raises UsageError."""
    asked = _read(context, query)
    present = context.simulator()
    simulator = Simulator(present.definitions, present.runners, asked.outcomes, MAX_ENTRIES_SHOWN)
    enrollment = None
    if query.get("enrollment"):
        id_ = query.number("enrollment", 0)
        async with connections.reading(context.pool) as connection:
            started = await read_started(connection, id_)
        if started is None:
            raise NotFoundError(f"Enrollment {id_} does not exist.")
        enrollment, enrolled = started
        work = partial(
            simulator.follow,
            enrollment,
            asked.start,
            asked.until,
            asked.changes,
            asked.external,
            enrolled=enrolled,
        )
    else:
        work = partial(
            simulator.simulate,
            query.must("sequence"),
            start=asked.start,
            until=asked.until,
            data=asked.data,
            subject=query.get("subject") or "subject",
            timezone=asked.timezone,
            changes=asked.changes,
            external=asked.external,
        )

    async with context.simulating:  # one at a time, because it uses a core
        simulation = await asyncio.to_thread(work)
    # with the start in it, an address always gives the same result
    given = {"start": _shown(asked.start), **query.given}
    simulated = _masked(context, simulation, enrollment, given)
    key = _key(context, given)
    context.simulated.pop(key, None)
    context.simulated[key] = simulated
    for old in list(context.simulated)[:-MAX_KEPT]:
        del context.simulated[old]
    return simulated


def _masked(
    context: PageContext,
    simulation: Simulation,
    enrollment: Enrollment | None,
    given: Mapping[str, str],
) -> ShownSimulation:
    """Return a simulation, without the data to be masked if it is that of a real enrollment."""
    known = {}
    if enrollment is not None:
        known = {"known": read_data(enrollment.data), "known_subject": enrollment.subject}

    def masked(text: str | None) -> Any:
        return context.mask({"message": text, **known})["message"] if known else text

    rows = [
        {
            **entry._asdict(),
            "message": masked(entry.message),
            "details": {name: masked(text) for name, text in entry.details.items()},
        }
        for entry in simulation.timeline
    ]
    table = Table("simulation", COLUMNS, rows, given)
    return ShownSimulation(simulation, masked(simulation.end), table)


def _key(context: PageContext, given: Mapping[str, str]) -> str:
    return json.dumps([context.is_masked, sorted(given.items())])


async def frame(request: Request) -> Response:
    """Return the HTML of a message in a simulation, for a frame."""
    context, query = context_of(request), query_of(request)
    given = {name: value for name, value in query.given.items() if name != "entry"}
    simulated = context.simulated.get(_key(context, given)) or await run(context, Query(given))
    rows, number = simulated.table.rows, query.number("entry", 0)
    return framed(rows[number]["details"].get("html") if number < len(rows) else None)
