"""The panel beside the graph of a sequence: a step, its exits, and its enrollments."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import asyncpg

from sequencerd.console import mail
from sequencerd.console.all_shards import in_all
from sequencerd.console.causes import causes
from sequencerd.console.context import PageContext
from sequencerd.console.query import Query, WrongQueryError
from sequencerd.console.summary import Counts
from sequencerd.console.tables import at
from sequencerd.core.model import ALT_NEXT, NEXT, Sequence, Step
from sequencerd.core.step_types import config_in_order, step_type
from sequencerd.core.step_types.condition_config import describe_condition
from sequencerd.core.window_config import describe_window
from sequencerd.definitions import drawing
from sequencerd.definitions.form_fields import fields
from sequencerd.storage import connections

RANGES = {"24h": timedelta(hours=24), "7d": timedelta(days=7), "30d": timedelta(days=30)}
DEFAULT_RANGE = "7d"
MAX_COUNT_ROWS = 50_000
"""Hourly counts that are read: those of 30 days for 23 steps with three exits."""
MAX_WAKES = 2000  # enrollments whose wake times are shown
MAX_BARS = 24
MAX_ERRORS = 3

StepFlow = Mapping[tuple[str, str], int]
"""Counts by step and action."""


def range_of(query: Query) -> str:
    """Return the range of the flow. Raises WrongQueryError."""
    name = query.get("range") or DEFAULT_RANGE
    if name not in RANGES:
        raise WrongQueryError(f"range must be one of {', '.join(RANGES)}")
    return name


async def flow(context: PageContext, sequence: str, name: str) -> StepFlow:
    """Return what happened in a range: from the counts by hour, and the history since these. Where
    no daemon has counted by hour yet, it is counted by day, for two weeks.
    """
    total: Counter[tuple[str, str]] = Counter()
    for found in (await in_all(context, lambda part: _flow(part, sequence, name))).values():
        total.update(found)
    return total


async def _flow(context: PageContext, sequence: str, name: str) -> Counter[tuple[str, str]]:
    counts, now = await context.summary.get(), context.now()
    since = (now - RANGES[name]).replace(minute=0, second=0, microsecond=0)
    found: Counter[tuple[str, str]] = Counter()
    if counts and counts.activity_until is None:
        for (of, step, action), days in counts.flow.items():
            if of == sequence:
                found[step, action] += sum(n for day, n in days.items() if day >= since.date())
        return found
    until = min(now, counts.recent_since) if counts and counts.recent_since else now
    if since < until:
        rows = await connections.read(
            context.pool, "console_activity", since, until, "hour", sequence, MAX_COUNT_ROWS
        )
        for row in rows:
            found[row["step"], row["action"]] += row["times"]
    for row in counts.recent if counts else ():
        if row["sequence"] == sequence and row["at"] >= since:
            found[row["step"], row["action"]] += row["times"]
    return found


def times(flow: StepFlow, edge: drawing.Edge) -> int:
    """Return how often an edge was taken."""
    label = edge.label or NEXT.label
    if label == NEXT.label:
        return flow.get((edge.source, "next"), 0) + flow.get((edge.source, "jump"), 0)
    if label == ALT_NEXT.label:
        return flow.get((edge.source, "altNext"), 0)
    return flow.get((edge.source, f"branch {label}"), 0)


_NOT_COUNTED = dict.fromkeys(("active", "failed", "median_stay", "overdue", "problem"))


@dataclass(frozen=True)
class ExitFlow:
    """An exit of a step, and how often it was taken."""

    label: str
    target: str | None
    url: str | None
    condition: str
    times: int
    share: float  # of all exits of the step


@dataclass(frozen=True)
class WakeBar:
    """The number of enrollments with a wake time between two times."""

    since: datetime
    until: datetime
    number: int


@dataclass(frozen=True)
class StepPanel:
    """The contents of the panel."""

    step: Step
    description: list[str]
    config: Any
    ways: list[ExitFlow]
    way: str | None  # that is chosen
    goals: int
    bars: list[WakeBar]
    never: int  # that wait for a change, of those that were read
    is_capped: bool
    errors: list[dict[str, Any]]
    message: str | None  # the address of its page
    has_form: bool  # that changes its waits or texts
    row: Mapping[str, Any]  # of the table of steps
    waiting: str
    failed: str


async def panel(
    context: PageContext,
    counts: Counts | None,
    definition: Sequence,
    step: Step,
    *,
    flow: StepFlow,
    row: Mapping[str, Any],
    query: Query,
) -> StepPanel:
    """Return the panel of a step."""
    place = {"sequence": definition.name, "step": step.name}
    bars, never, is_capped = _added_up(
        (await in_all(context, lambda part: _wakes(part.pool, *place.values()))).values()
    )
    found = causes(counts, context.mask) if counts else []
    here: list[dict[str, Any]] = [
        {
            "text": cause.text,
            "failed": cause.steps[definition.name, step.name],
            "latest": cause.latest,
            "url": at("/search", **place, status="failed", cause=cause.key),
        }
        for cause in found
        if cause.steps.get((definition.name, step.name))
    ]
    goals = sum(
        number
        for (name, action), number in flow.items()
        if name == step.name and action.partition(" ")[0] == "goal"
    )
    return StepPanel(
        step,
        _describe(definition, step),
        config_in_order(step.type, step.config) if isinstance(step.config, dict) else step.config,
        _ways(definition, step, flow, query),
        query.get("way"),
        goals,
        bars,
        never,
        is_capped,
        sorted(here, key=lambda one: -one["failed"])[:MAX_ERRORS],
        at("/message", **place) if mail.sends(context, step) else None,
        bool(fields(step.type, step.config)),
        _NOT_COUNTED | dict(row),
        at("/search", **place, status="active"),
        at("/search", **place, status="failed"),
    )


_REACHED = {"wait": "waits", "skip": "is skipped", "altNext": "goes to altNext"}


def _describe(definition: Sequence, step: Step) -> list[str]:
    """Describe a step: its wait, and when and how often its side effect may begin."""
    config = dict(step.config) if isinstance(step.config, Mapping) else {}
    found = [step_type(step.type).describe(config)]
    if isinstance(window := config.get("window"), dict) and (described := describe_window(window)):
        found.append(f"begins only in its window: {described}")
    for limit, text in drawing.limits(definition, step):
        found.append(f"{text}, else it {_REACHED[limit.then]}")
    for key, form in (("to", "to {}"), ("subject", "subject: {}"), ("message", "{}")):
        if isinstance(config.get(key), str):
            found.append(form.format(config[key]))
    return [f"{text[:1].upper()}{text[1:]}" for text in found if text]


def _ways(definition: Sequence, step: Step, flow: StepFlow, query: Query) -> list[ExitFlow]:
    edges = [edge for edge in drawing.edges(definition) if edge.source == step.name]
    every = sum(times(flow, edge) for edge in edges)
    conditions = {
        exit_.label: describe_condition(
            exit_.condition.model_dump(by_alias=True, exclude_none=True)
        )
        for exit_ in step.exits
        if exit_.condition is not None
    }
    ways = []
    for edge in edges:
        to = edge.sequence or definition.name
        target = edge.target and (edge.target if edge.sequence is None else f"{to}/{edge.target}")
        kept = {"range": query.get("range")} if edge.sequence is None else {}
        url = at("/sequence", sequence=to, step=edge.target, **kept) if edge.target else None
        label = edge.label or NEXT.label
        number = times(flow, edge)
        share = number / every if every else 0.0
        ways.append(ExitFlow(label, target, url, conditions.get(label, ""), number, share))
    return ways


async def _wakes(pool: asyncpg.Pool, sequence: str, step: str) -> tuple[list[WakeBar], int, bool]:
    """Return when enrollments at a step are next checked, how many only after a change, and
    whether there are more than were read.
    """
    rows = await connections.read(pool, "console_wakes", sequence, step, MAX_WAKES, MAX_BARS)
    bars = [
        WakeBar(row["since"], row["until"], row["number"]) for row in rows if row["bar"] is not None
    ]
    never = sum(row["number"] for row in rows if row["bar"] is None)
    return bars, never, sum(bar.number for bar in bars) + never >= MAX_WAKES


def _added_up(
    parts: Collection[tuple[list[WakeBar], int, bool]],
) -> tuple[list[WakeBar], int, bool]:
    """Return the same for several shards, whose periods differ: each bar is counted in the period
    that contains its middle.
    """
    if len(parts) == 1:
        return next(iter(parts))
    every = [bar for bars, _, _ in parts for bar in bars]
    never, is_capped = sum(part[1] for part in parts), any(part[2] for part in parts)
    if not every:
        return [], never, is_capped
    least = min(bar.since for bar in every)
    width = (max(bar.until for bar in every) - least) / MAX_BARS
    numbers: Counter[int] = Counter()
    for bar in every:
        middle = bar.since + (bar.until - bar.since) / 2
        numbers[min(int((middle - least) / width), MAX_BARS - 1)] += bar.number
    bars = [
        WakeBar(least + n * width, least + (n + 1) * width, number)
        for n, number in sorted(numbers.items())
    ]
    return bars, never, is_capped
