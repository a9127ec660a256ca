"""Show what happened over time: from the hourly counts, and from the history since the last of
them.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
from starlette.requests import Request
from starlette.responses import Response

from sequencerd.console.all_shards import in_all
from sequencerd.console.context import PageContext, context_of, definition_of, query_of, render
from sequencerd.console.query import NotFoundError, Query, WrongQueryError, as_sentence
from sequencerd.console.summary import Counts
from sequencerd.console.tables import Column, Table, at
from sequencerd.core.enrollment import StepKey
from sequencerd.core.model import ALT_NEXT, NEXT, Sequence, SideEffect, Step
from sequencerd.core.step_types import is_instant
from sequencerd.definitions import drawing
from sequencerd.storage import connections

MEASURES = {
    "entered": "Entered",
    "sent": "Sent or executed",
    "suppressed": "Suppressed",
    "completed": "Completed",
    "failed": "Failed",
    "late": "Began late",
}
LATENESS = {"over_minute": "Over 1 min late", "over_ten_minutes": "Over 10 min late"}
LONGEST_DELAY = "longest"  # delay
UNITS = {"hour": timedelta(hours=1), "day": timedelta(days=1)}
DEFAULT_RANGES = {"hour": timedelta(hours=48), "day": timedelta(days=14)}  # that is shown
MAX_UNITS = 400
MAX_COUNT_ROWS = 100_000  # counts of a sequence that are read
MAX_LATENESS_ROWS = 20_000  # rows of lateness of a sequence that are read


@dataclass(frozen=True)
class TimeRange:
    """What is shown: from and until full hours or days in UTC, of a sequence or step or of all."""

    since: datetime
    until: datetime
    unit: str
    sequence: str | None = None
    step: str | None = None

    def units(self) -> Iterator[datetime]:
        """Yield when each hour or day begins."""
        time = self.since
        while time < self.until:
            yield time
            time += UNITS[self.unit]

    def has(self, step_key: StepKey) -> bool:
        """Return whether a step is shown."""
        return self.sequence in (None, step_key[0]) and self.step in (None, step_key[1])


def range_of(query: Query, now: datetime) -> TimeRange:
    """Return the range in the query parameters. Raises WrongQueryError."""
    unit = query.get("by") or "day"
    if unit not in UNITS:
        raise WrongQueryError("by must be hour or day")
    try:
        until = _floor(query.time("until", now), unit)
        if until < query.time("until", now):
            until += UNITS[unit]
        since = _floor(query.time("from", until - DEFAULT_RANGES[unit]), unit)
        if since >= until:
            raise WrongQueryError("the range ends before it begins")
    except OverflowError as error:
        raise WrongQueryError("the range is outside of the calendar") from error
    if (until - since) / UNITS[unit] > MAX_UNITS:
        more = " or choose days" if unit == "hour" else ""
        raise WrongQueryError(
            f"the range has more than {MAX_UNITS} {unit}s: choose a shorter one{more}"
        )
    return TimeRange(since, until, unit, query.get("sequence"), query.get("step"))


def _floor(time: datetime, unit: str) -> datetime:
    time = time.astimezone(UTC).replace(minute=0, second=0, microsecond=0)
    return time.replace(hour=0) if unit == "day" else time


# --- counts


@dataclass(frozen=True)
class Activity:
    """Counts by hour or day, for each sequence and step."""

    times: Mapping[str, Mapping[StepKey, Counter[datetime]]]  # by measure
    longest: Mapping[StepKey, Mapping[datetime, float]]  # delays, in seconds
    counted_until: datetime | None  # by the daemon
    is_capped: bool

    def sum(self, measure: str) -> Counter[datetime]:
        """Return the counts of all sequences and steps."""
        found: Counter[datetime] = Counter()
        for times in self.times[measure].values():
            found.update(times)
        return found

    def longest_at(self, time: datetime) -> float | None:
        """Return the longest delay in an hour or day."""
        delays = (by_time[time] for by_time in self.longest.values() if time in by_time)
        return max(delays, default=None)


async def read(
    context: PageContext, definitions: Mapping[str, Sequence], chosen: TimeRange
) -> Activity:
    """Return what happened in the range, of a sequence or step or of all."""

    async def of(part: PageContext) -> Activity:
        return await _read_one(part.pool, await part.summary.get(), definitions, chosen)

    return _added_up([*(await in_all(context, of)).values()])


def _added_up(parts: list[Activity]) -> Activity:
    """Add up the activity of several shards."""
    times = _no_times()
    longest: defaultdict[StepKey, dict[datetime, float]] = defaultdict(dict)
    for part in parts:
        for measure, found in part.times.items():
            for key, by_time in found.items():
                times[measure][key].update(by_time)
        for key, delays in part.longest.items():
            known = longest[key]
            known |= {at: max(delay, known.get(at, 0)) for at, delay in delays.items()}
    until = [part.counted_until for part in parts if part.counted_until is not None]
    return Activity(
        times,
        longest,
        min(until) if len(until) == len(parts) else None,
        any(part.is_capped for part in parts),
    )


def _no_times() -> dict[str, defaultdict[StepKey, Counter[datetime]]]:
    """Return counts by measure, to be added to."""
    return {measure: defaultdict(Counter) for measure in (*MEASURES, *LATENESS)}


async def _read_one(
    pool: asyncpg.Pool,
    counts: Counts | None,
    definitions: Mapping[str, Sequence],
    chosen: TimeRange,
) -> Activity:
    sequence = chosen.sequence
    recent_since = counts.recent_since if counts else None
    until = min(chosen.until, recent_since or chosen.until)
    rows: list[Mapping[str, Any]] = []
    if chosen.since < until:
        rows += await connections.read(
            pool, "console_activity", chosen.since, until, chosen.unit, sequence, MAX_COUNT_ROWS
        )
    is_capped = sum(row["times"] > 0 for row in rows) >= MAX_COUNT_ROWS
    for row in counts.recent if counts else ():
        if sequence in (None, row["sequence"]) and chosen.since <= row["at"] < chosen.until:
            rows.append({**row, "at": _floor(row["at"], chosen.unit)})
    arrivals = _Arrivals(definitions)
    times = _no_times()
    for row in rows:
        key = row["sequence"], row["step"]
        if (to := arrivals.of(*key, row["action"])) and chosen.has(to):
            times["entered"][to][row["at"]] += row["times"]
        if (measure := _measure(definitions, *key, row["action"])) and chosen.has(key):
            times[measure][key][row["at"]] += row["times"]
    late = await connections.read(
        pool,
        "console_lateness",
        chosen.since,
        chosen.until,
        chosen.unit,
        sequence,
        MAX_LATENESS_ROWS,
    )
    is_capped = is_capped or sum(row["read"] for row in late) >= MAX_LATENESS_ROWS
    longest: defaultdict[StepKey, dict[datetime, float]] = defaultdict(dict)
    for row in late:
        if chosen.has(key := (row["sequence"], row["step"])):
            for measure in ("late", *LATENESS):
                times[measure][key][row["at"]] += row[measure]
            longest[key][row["at"]] = row["longest"]
    return Activity(times, longest, counts.activity_until if counts else None, is_capped)


def _measure(
    definitions: Mapping[str, Sequence], sequence: str, step: str, action: str
) -> str | None:
    if action in ("completed", "failed", "suppressed"):
        return action
    definition = definitions.get(sequence)
    node = definition.steps.get(step) if definition else None
    is_executed = node is not None and not is_instant(node.type)
    return "sent" if is_executed and action in ("next", "altNext") else None


class _Arrivals:
    """The steps to which events lead according to the present definitions."""

    def __init__(self, definitions: Mapping[str, Sequence]) -> None:
        self._definitions = definitions
        self._exits: dict[tuple[str, str, str], StepKey] = {}
        for name, definition in definitions.items():
            for edge in drawing.edges(definition):
                label = edge.label or NEXT.label
                to = edge.sequence or name
                if edge.target is None or to not in definitions:
                    continue
                action = label if label in _PLAIN else f"branch {label}"
                self._exits[name, edge.source, action] = to, edge.target
                if label == NEXT.label:
                    self._exits[name, edge.source, "jump"] = to, edge.target

    def of(self, sequence: str, step: str, action: str) -> StepKey | None:
        """Return the step that an event enters, or None."""
        if action == "enrolled":
            return sequence, step
        definition = self._definitions.get(sequence)
        if definition is None:
            return None
        if action.startswith("goal "):
            goal = definition.steps.get(action.removeprefix("goal "))
            return (sequence, goal.next_step) if goal and goal.next_step else None
        if action in ("suppressed", "expired", "limited"):
            return _skipped(sequence, definition.steps.get(step), action)
        return self._exits.get((sequence, step, action))


_PLAIN = (NEXT.label, ALT_NEXT.label)


def _skipped(sequence: str, step: Step | None, action: str) -> StepKey | None:
    effect = step.behaviour if step else None
    if step is None or not isinstance(effect, SideEffect):
        return None
    exit_ = effect.on_suppressed if action == "suppressed" else effect.on_expired
    if action == "limited":
        exit_ = "altNext" if effect.limit and effect.limit.then == "altNext" else "next"
    target = {"next": step.next_step, "altNext": step.alt_next_step}.get(exit_)
    return (sequence, target) if target else None


# --- tables

_COLUMNS = (
    *(Column(key, title, "number", optional=key == "late") for key, title in MEASURES.items()),
    *(Column(key, title, "number", optional=True) for key, title in LATENESS.items()),
    Column(LONGEST_DELAY, "Longest delay", "duration", optional=True),
)


def by_time(activity: Activity, chosen: TimeRange, query: Query) -> Table:
    """Return a row for each hour or day."""
    sums = {measure: activity.sum(measure) for measure in activity.times}
    is_day = chosen.unit == "day"
    rows = [
        {
            "at": time.date().isoformat() if is_day else time,
            **{measure: times[time] for measure, times in sums.items()},
            LONGEST_DELAY: activity.longest_at(time),
        }
        for time in chosen.units()
    ]
    columns = (
        Column("at", "Day") if is_day else Column("at", "Hour from", "time"),
        *_COLUMNS,
    )
    return Table("activity", columns, rows, query.given)


def by_step(activity: Activity, definitions: Mapping[str, Sequence], query: Query) -> Table:
    """Return a row for each step of the chosen sequence, or for each sequence."""
    name = query.get("sequence")
    totals: dict[str, Counter[str]] = defaultdict(Counter)
    for measure, by_key in activity.times.items():
        for (sequence, step), times in by_key.items():
            totals[sequence if name is None else step][measure] += times.total()
    longest: dict[str, float] = {}
    for (sequence, step), delays in activity.longest.items():
        key = sequence if name is None else step
        longest[key] = max(longest.get(key, 0), *delays.values())
    order = list(definitions) if name is None else list(definitions[name].steps)
    known = {key: n for n, key in enumerate(order)}
    kept = {key: value for key, value in query.given.items() if key in ("by", "from", "until")}
    rows = [
        {
            "name": key,
            "url": at("/over-time", **kept, sequence=key)
            if name is None
            else at("/over-time", **kept, sequence=name, step=key),
            **{measure: totals[key][measure] for measure in activity.times},
            LONGEST_DELAY: longest.get(key),
        }
        for key in sorted(totals, key=lambda key: (known.get(key, len(known)), key))
    ]
    columns = (
        Column("name", "Sequence" if name is None else "Step", link="url"),
        *_COLUMNS,
    )
    return Table("activity-steps", columns, rows, query.given)


# --- the page


async def over_time(request: Request) -> Response:
    """Show what happened in each hour or day, as charts and as tables."""
    context, query = context_of(request), query_of(request)
    definitions = context.simulator().definitions
    try:
        chosen, activity = await _read(context, query)
    except NotFoundError as error:
        return _form(request, query, 404, wrong=str(error))
    except WrongQueryError as error:
        return _form(request, query, 422, wrong=as_sentence(str(error)))
    shown = by_time(activity, chosen, query)
    totals = None
    if query.get("step") is None:
        totals = by_step(activity, definitions, query).part(query.number("first", 0))
    return _form(
        request,
        query,
        chosen=chosen,
        charts=[
            (measure, title, [(row["at"], row[measure]) for row in shown.rows])
            for measure, title in MEASURES.items()
        ],
        delays=[(row["at"], row[LONGEST_DELAY] or 0) for row in shown.rows],
        by_time=shown,
        totals=totals,
        counted_until=activity.counted_until,
        is_capped=activity.is_capped,
    )


def _form(
    request: Request,
    query: Query,
    status: int = 200,
    *,
    wrong: str | None = None,
    chosen: TimeRange | None = None,
    **given: Any,
) -> Response:
    """Return the page: the form, and its result unless a value is wrong."""
    context = context_of(request)
    definitions = context.simulator().definitions
    sequence = definitions.get(query.get("sequence") or "")
    return render(
        request,
        "over_time.html",
        status,
        title="Over time",
        wrong=wrong,
        range=chosen or range_of(Query({}), context.now()),
        given={name: query.get(name) or "" for name in ("sequence", "step", "from", "until", "by")},
        sequences=sorted(definitions),
        steps=list(sequence.steps) if sequence else [],
        **given,
    )


async def tables(context: PageContext, name: str, query: Query) -> Table:
    """Return one of the tables of the page."""
    chosen, activity = await _read(context, query)
    if name == "activity":
        return by_time(activity, chosen, query)
    return by_step(activity, context.simulator().definitions, query)


async def _read(context: PageContext, query: Query) -> tuple[TimeRange, Activity]:
    sequence, step = query.get("sequence"), query.get("step")
    if sequence is None and step is not None:
        raise WrongQueryError("choose a sequence for the step")
    if sequence is not None:
        definition_of(context, sequence, step)
    chosen = range_of(query, context.now())
    return chosen, await read(context, context.simulator().definitions, chosen)
