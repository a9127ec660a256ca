"""Cycles of sequences: those that come back to a side effect without a wait, and goals before them.

What is told follows from the definitions alone, of all sequences at once, as GoTo leads from one to
another. A wait counts as one where it surely waits each time that the cycle is walked.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import NamedTuple

from sequencerd.core.calendar import dates
from sequencerd.core.calendar.next_match import full_name
from sequencerd.core.javascript.templates import compile_template
from sequencerd.core.model import DefinitionError, EvaluationError, Problem, Sequence, Step
from sequencerd.core.model import SideEffect as Effect
from sequencerd.core.step_types import (
    DurationConfig,
    SplitConfig,
    WaitForConditionConfig,
    WaitForDateComparisonConfig,
    WaitForDateConfig,
    condition_of,
)
from sequencerd.definitions.check import MESSAGES, Remark, always, goes_alt, ways

MOST_STATES = 200_000  # looked at in all; a graph beyond that is not searched to its end

Node = tuple[str, str]
Matching = frozenset[tuple[str, frozenset[int]]]
"""What the getters of a date must give for the comparisons on a way to let it pass at once."""


class Way(NamedTuple):
    """From one step to another without a wait: surely, or where the clock or the data say so."""

    target: Node
    is_sure: bool = True
    attribute: str = ""
    values: frozenset[int] = frozenset()


def check(sequences: Mapping[str, Sequence]) -> Iterator[tuple[str, Remark]]:
    """All remarks, each with the name of its sequence."""
    yield from _never_waiting(sequences)
    for sequence in sequences.values():
        for remark in _goals_before_cycles(sequence):
            yield sequence.name, remark


# --- without a wait


def _never_waiting(sequences: Mapping[str, Sequence]) -> Iterator[tuple[str, Remark]]:
    steps = {(s.name, step.name): step for s in sequences.values() for step in s.steps.values()}
    graph = {
        node: [way for way in _passing(step, sequences[node[0]]) if way.target in steps]
        for node, step in steps.items()
    }
    told: set[Node] = set()
    budget = MOST_STATES
    for is_sure in (True, False):
        part = _trimmed({n: [w for w in ws if w.is_sure >= is_sure] for n, ws in graph.items()})
        for node in part:
            if isinstance(steps[node].behaviour, Effect) and node not in told and budget > 0:
                path, states = _way_back(node, part, budget)
                budget -= states
                if path:
                    told.update(path)
                    yield node[0], _told(path, steps, is_sure=is_sure)


def _trimmed(graph: Mapping[Node, list[Way]]) -> dict[Node, list[Way]]:
    """Without what leads to no cycle."""
    left = dict(graph)
    sources: dict[Node, list[Node]] = {}
    for node, found in graph.items():
        for way in found:
            sources.setdefault(way.target, []).append(node)
    count = {node: len(found) for node, found in graph.items()}
    ends = [node for node, number in count.items() if not number]
    while ends:
        node = ends.pop()
        del left[node]
        for source in sources.get(node, ()):
            count[source] -= 1
            if not count[source]:
                ends.append(source)
    return {n: [way for way in found if way.target in left] for n, found in left.items()}


def _way_back(start: Node, graph: Mapping[Node, list[Way]], budget: int) -> tuple[list[Node], int]:
    """The shortest way from a step back to it that can be gone at one time, and what it took."""
    begin: tuple[Node, Matching] = (start, frozenset())
    came: dict[tuple[Node, Matching], tuple[Node, Matching] | None] = {begin: None}
    open_ = deque([begin])
    while open_ and len(came) < budget:
        here = open_.popleft()
        for way in graph[here[0]]:
            matching = _matching(here[1], way)
            if matching is None:
                continue
            if way.target == start:
                path, at = [start], here
                while at is not None:
                    path.append(at[0])
                    at = came[at]  # type: ignore[assignment] # None ends it
                return path[::-1], len(came)
            if (there := (way.target, matching)) not in came:
                came[there] = here
                open_.append(there)
    return [], len(came)


def _matching(matching: Matching, way: Way) -> Matching | None:
    """The same with what one more way asks for; None where both can't be at one time."""
    if not way.attribute:
        return matching
    known = dict(matching)
    values = known.get(way.attribute, way.values) & way.values
    return frozenset({**known, way.attribute: values}.items()) if values else None


def _told(path: list[Node], steps: Mapping[Node, Step], *, is_sure: bool) -> Remark:
    sequence, name = path[0]
    shown = " → ".join(step if where == sequence else f"{where}/{step}" for where, step in path)
    failing = f"whoever comes back to {name} in no time fails as loop, before it is executed again"
    if is_sure:
        message = f"{shown} never waits: {failing}; put a step that waits into the cycle"
        return Remark(name, (), message, is_error=True)
    doubtful = [steps[node] for node in path[1:] if steps[node].type in _REASONS]
    reasons = [f"{step.name} {_REASONS[step.type]}" for step in doubtful]
    if not reasons:
        reasons = ["it waits where a runner answers noop alone"]
    return Remark(name, (), f"{shown} may never wait: {', '.join(reasons)}; {failing}")


_REASONS = {
    "WaitForDateComparison": 'passes at once where it matches already (write "occurrence: next")',
    "WaitForDate": "passes at once where its date is past",
    "WaitForCondition": "passes at once where it holds",
    "Goal": "passes at once where it holds",
}


def _passing(step: Step, sequence: Sequence) -> Iterator[Way]:
    """The ways from a step on which no time may pass."""
    if isinstance(step.behaviour, Problem):
        return
    following = None if step.next_step is None else (sequence.name, step.next_step)
    other = None if step.alt_next_step is None else (sequence.name, step.alt_next_step)
    ahead: tuple[Way | None, Way | None] = (following and Way(following), other and Way(other))
    match step.type:
        case _ if isinstance(step.behaviour, Effect):
            if step.type not in MESSAGES:
                ahead = (_perhaps(ahead[0]), _perhaps(ahead[1]))
        case "GoTo":
            ahead = _jumping(step, sequence, ahead)
        case "Conditional":
            ahead = _fixed(step, sequence, ahead)
        case "Split":
            weights = SplitConfig.model_validate(step.config)
            ahead = (ahead[0] if weights.next else None, ahead[1] if weights.alt_next else None)
        case "Goal":
            known = _fixed(step, sequence, (ahead[0], None))
            ahead = known if _is_fixed(step, sequence) else (_perhaps(ahead[0]), None)
        case "WaitForDuration":
            ahead = (
                None if _is_wait(DurationConfig.model_validate(step.config)) else ahead[0],
                None,
            )
        case "WaitForDate":
            date = WaitForDateConfig.model_validate(step.config).date
            # a date that is written out is past when the cycle is walked again
            is_literal = compile_template(date, escape=False).is_literal
            ahead = (ahead[0] if is_literal else _perhaps(ahead[0]), None)
        case "WaitForDateComparison":
            ahead = (_comparing(step, ahead[0]), None)
        case "WaitForCondition":
            ahead = _waiting(step, sequence, ahead)
    if not goes_alt(step):
        ahead = (ahead[0], None)
    yield from (way for way in ahead if way is not None)


def _perhaps(way: Way | None) -> Way | None:
    return way and way._replace(is_sure=False)


def _jumping(
    step: Step, sequence: Sequence, ahead: tuple[Way | None, Way | None]
) -> tuple[Way | None, Way | None]:
    target, name = step.config.get("step"), step.config.get("sequence")
    if not isinstance(target, str):
        return ahead
    return Way((name if isinstance(name, str) else sequence.name, target)), ahead[1]


def _always(step: Step, sequence: Sequence) -> tuple[bool | None, str] | None:
    condition = condition_of(step.type, step.config)
    return None if condition is None else always(condition, sequence)


def _is_fixed(step: Step, sequence: Sequence) -> bool:
    return _always(step, sequence) is not None


def _fixed(
    step: Step, sequence: Sequence, ahead: tuple[Way | None, Way | None]
) -> tuple[Way | None, Way | None]:
    """What is left of two ways by a condition that is the same for everybody."""
    match _always(step, sequence):
        case (True, _):
            return ahead[0], None
        case (False, _):
            return None, ahead[1]
        case (None, _):
            return None, None
    return ahead


def _waiting(
    step: Step, sequence: Sequence, ahead: tuple[Way | None, Way | None]
) -> tuple[Way | None, Way | None]:
    timeout = WaitForConditionConfig.model_validate(step.config).timeout
    late = None if timeout is None or _is_wait(timeout) else ahead[1]
    known = _fixed(step, sequence, (ahead[0], late))
    return known if _is_fixed(step, sequence) else (_perhaps(ahead[0]), _perhaps(late))


def _comparing(step: Step, way: Way | None) -> Way | None:
    config = WaitForDateComparisonConfig.model_validate(step.config)
    if way is None or config.occurrence == "next":
        return None
    name = full_name(config.attribute) or config.attribute
    lowest, highest = dates.bounds(name)
    values = frozenset(int(value) for value in config.values)
    if len(values) > highest - lowest:
        return way
    if name in ("weekday", "isoWeekday"):
        name, values = "day", frozenset(value % 7 for value in values)
    return way._replace(is_sure=False, attribute=name, values=values)


def _is_wait(duration: DurationConfig) -> bool:
    """Whether it is over later than it begins."""
    arrival = datetime(2026, 1, 1, tzinfo=UTC)
    try:
        end = dates.add(
            arrival, duration.amount, dates.normalise_unit(duration.unit), dates.zone("UTC")
        )
    except (DefinitionError, EvaluationError):
        return True
    return end > arrival


# --- goals


def _goals_before_cycles(sequence: Sequence) -> Iterator[Remark]:
    """Goals that pull once where the way goes round and round."""
    if not any(_is_doubtful(goal) for goal in sequence.goals):
        return
    graph = _trimmed(
        {
            (sequence.name, step.name): [
                Way((sequence.name, name)) for name in ways(step) if name in sequence.steps
            ]
            for step in sequence.steps.values()
        }
    )
    for goal in sequence.goals:
        start = (sequence.name, goal.next_step or "")
        if _is_doubtful(goal) and (cycle := _first_cycle(start, graph)):
            shown = " → ".join(name for _, name in cycle)
            yield Remark(
                goal.name,
                ("config",),
                f"pulls once, and leads into the cycle {shown}: write repeat: true, so that it "
                "pulls whenever it comes to hold, or repeat: false if once is meant",
            )


def _is_doubtful(goal: Step) -> bool:
    return not isinstance(goal.behaviour, Problem) and "repeat" not in goal.config


def _first_cycle(start: Node, graph: Mapping[Node, list[Way]]) -> list[Node]:
    """The cycle that is come to first, from a step of a graph in which all lead to one."""
    if start not in graph:
        return []
    found: list[Node] = []
    at = start
    while at not in found:
        found.append(at)
        at = graph[at][0].target
    return [*found[found.index(at) :], at]
