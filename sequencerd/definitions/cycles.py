"""Find cycles that return to a side effect without a wait, and goals before cycles.

Remarks follow from the definitions alone, of all sequences together, because GoTo leads from one to
another. A step counts as a wait only if it waits in each round of the cycle.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import NamedTuple

from sequencerd.core import graph
from sequencerd.core.model import Exit, InstantStep, InvalidStep, Sequence, Step
from sequencerd.core.model import SideEffect as Effect
from sequencerd.definitions.check import Remark, constant_result, targets

MAX_STATES = 200_000  # exits that are examined in all; a larger graph is not searched to the end

StepNode = tuple[str, str]
Matching = frozenset[tuple[str, frozenset[int]]]
"""The values of a date's attributes at which a path can be taken without a wait."""
CycleState = tuple[StepNode, Matching]


class UnwaitedExit(NamedTuple):
    """An exit that may be taken without a wait; `is_sure` if it always is."""

    target: StepNode
    exit: Exit
    is_sure: bool


def check(sequences: Mapping[str, Sequence]) -> Iterator[tuple[str, Remark]]:
    """Yield all remarks, each with the name of its sequence."""
    yield from _never_waiting(sequences)
    for sequence in sequences.values():
        for remark in _goals_before_cycles(sequence):
            yield sequence.name, remark


# --- without a wait


def _never_waiting(sequences: Mapping[str, Sequence]) -> Iterator[tuple[str, Remark]]:
    steps = {(s.name, step.name): step for s in sequences.values() for step in s.steps.values()}
    ways = {
        node: [way for way in _immediate_exits(step, sequences[node[0]]) if way.target in steps]
        for node, step in steps.items()
    }
    reported: set[StepNode] = set()
    budget = MAX_STATES
    for is_sure in (True, False):
        part = _cyclic({n: [w for w in ws if w.is_sure >= is_sure] for n, ws in ways.items()})
        for node in part:
            if isinstance(steps[node].behaviour, Effect) and node not in reported and budget > 0:
                path, states = _way_back(node, part, budget)
                budget -= states
                if path:
                    reported.update(path)
                    yield node[0], _loop_message(path, part, is_sure=is_sure)


def _cyclic(ways: Mapping[StepNode, list[UnwaitedExit]]) -> dict[StepNode, list[UnwaitedExit]]:
    """Return the part of a graph that leads to cycles."""
    left = graph.without_ends({node: [way.target for way in ws] for node, ws in ways.items()})
    return {n: [way for way in ws if way.target in left] for n, ws in ways.items() if n in left}


def _way_back(
    start: StepNode, ways: Mapping[StepNode, list[UnwaitedExit]], budget: int
) -> tuple[list[StepNode], int]:
    """Return the shortest path from a step back to itself that can be taken at one time, with its
    condition.
    """

    def following(state: CycleState) -> Iterator[CycleState]:
        for way in ways[state[0]]:
            if (matching := _matching(state[1], way.exit)) is not None:
                yield way.target, matching

    before: dict[CycleState, CycleState | None] = {}
    begin: CycleState = (start, frozenset())
    for state, origin in graph.walk(following(begin), following):
        before[state] = origin
        if state[0] == start:
            path, at = [start], before[state]
            while at is not None:
                path.append(at[0])
                at = before[at]
            return [start, *path[::-1]], len(before)
        if len(before) >= budget:
            break
    return [], len(before)


def _matching(matching: Matching, exit_: Exit) -> Matching | None:
    """Return the condition extended by one more exit; None if both cannot hold at the same time."""
    if exit_.getter is None:
        return matching
    known = dict(matching)
    name, values = exit_.getter
    both = known.get(name, values) & values
    return frozenset({**known, name: both}.items()) if both else None


def _loop_message(
    path: list[StepNode], ways: Mapping[StepNode, list[UnwaitedExit]], *, is_sure: bool
) -> Remark:
    sequence, name = path[0]
    shown = " → ".join(step if where == sequence else f"{where}/{step}" for where, step in path)
    failing = f"an enrollment that returns to {name} without a wait fails with loop"
    if is_sure:
        message = f"{shown} never waits: {failing}; add a step that waits to the cycle"
        return Remark(name, (), message, is_error=True)
    reasons = []
    for node, following in pairwise(path):
        taken = [way for way in ways[node] if way.target == following]
        if not any(way.is_sure for way in taken) and (reason := taken[0].exit.reason):
            reasons.append(f"{node[1]} does not wait {reason}")
    if not reasons:
        reasons = ["it waits only if a runner answers noop"]
    return Remark(name, (), f"{shown} may never wait: {', '.join(reasons)}; {failing}")


def _immediate_exits(step: Step, sequence: Sequence) -> Iterator[UnwaitedExit]:
    """Yield the exits of a step that may be taken on arrival."""
    if isinstance(step.behaviour, InvalidStep):
        return
    for exit_ in step.exits:
        known = exit_.condition and constant_result(exit_.condition, sequence)
        if exit_.target is not None and exit_.at_once != "never" and (not known or known[0]):
            target = (exit_.sequence or sequence.name, exit_.target)
            is_sure = exit_.at_once == "always" or bool(known)
            yield UnwaitedExit(target, exit_, is_sure)
        if known and known[0] is not False:
            return


# --- goals


def _goals_before_cycles(sequence: Sequence) -> Iterator[Remark]:
    """Yield goals that move an enrollment only once and lead into a cycle."""
    if not any(_is_doubtful(goal) for goal in sequence.goals):
        return
    ahead = {name: targets(name, sequence) for name in sequence.steps}
    endless = graph.without_ends(ahead)
    for goal in sequence.goals:
        if _is_doubtful(goal) and goal.next_step in endless:
            at, cycle = goal.next_step, []
            while at not in cycle:
                cycle.append(at)
                at = next(name for name in ahead[at] if name in endless)
            shown = " → ".join([*cycle[cycle.index(at) :], at])
            yield Remark(
                goal.name,
                ("config",),
                f"moves an enrollment only once, but leads into the cycle {shown}: write "
                "repeat: true if it can be met again, or repeat: false if once is intended",
            )


def _is_doubtful(goal: Step) -> bool:
    return isinstance(goal.behaviour, InstantStep) and "repeat" not in goal.config
