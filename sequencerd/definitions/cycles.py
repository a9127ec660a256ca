"""Find cycles without a wait that execute a side effect again or never end, and goals before
cycles.

Remarks follow from the definitions alone, of all sequences together, because GoTo leads from one to
another. A step counts as a wait only if it waits in each round of the cycle.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice, pairwise
from typing import NamedTuple

from sequencerd.core import graph
from sequencerd.core.model import Exit, InstantStep, InvalidStep, Sequence, Step
from sequencerd.core.model import SideEffect as Effect
from sequencerd.core.step_types import written_keys
from sequencerd.core.step_types.condition_config import ConditionConfig, condition_roots
from sequencerd.definitions.check import Remark, constant_result, targets

MAX_STATES = 200_000  # exits that are examined in all; a larger graph is not searched to the end
MAX_ANSWERS = 100  # combinations of answers to conditions that are kept

StepNode = tuple[str, str]
Matching = frozenset[tuple[str, frozenset[int]]]
"""The values of a date's attributes at which a path can be taken without a wait."""
CycleState = tuple[StepNode, Matching]
Answers = Mapping[str, bool]
"""What conditions that combine no others are assumed to give."""
Wanted = list[tuple[ConditionConfig, bool]]


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
    effects = {node for node, step in steps.items() if isinstance(step.behaviour, Effect)}
    same = {node for node, step in steps.items() if _changes_nothing(step)}
    budget = MAX_STATES
    for starts, among, reason in (
        (effects, steps.keys(), "it waits only if a runner answers noop"),
        (same, same, "the conditions on this path may hold at the same time"),
    ):
        inside = {n: [w for w in ways[n] if w.target in among] for n in steps if n in among}
        reported: set[StepNode] = set()
        impossible: set[frozenset[tuple[StepNode, StepNode]]] = set()
        for is_sure in (True, False):
            part = _cyclic({n: [w for w in ws if w.is_sure >= is_sure] for n, ws in inside.items()})
            for node in part:
                if node in starts and node not in reported and budget > 0:
                    path, states = _way_back(node, part, budget)
                    budget -= states
                    if (cycle := frozenset(pairwise(path))) in impossible:
                        continue  # found from another of its steps
                    wanted = [_wanted(steps[n], part[n], to) for n, to in pairwise(path)]
                    if among is same and not _can_hold(wanted):
                        impossible.add(cycle)
                        continue
                    if path:
                        reported.update(path)
                        is_known = is_sure and (among is not same or sum(map(all, wanted)) <= 1)
                        yield node[0], _loop_message(path, part, "" if is_known else reason)


def _changes_nothing(step: Step) -> bool:
    """Return whether a step that is passed at once cannot change what it, or another one, answers
    when the enrollment comes back.
    """
    return (
        isinstance(step.behaviour, InstantStep)
        and written_keys(step.type, step.config) == []
        and not any(exit_.is_optional for exit_ in step.exits)  # taken if a sequence refuses
        and not any(
            exit_.condition and "visit" in condition_roots(exit_.condition) for exit_ in step.exits
        )
    )


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


def _wanted(step: Step, ways: Iterable[UnwaitedExit], target: StepNode) -> list[Wanted]:
    """Return what conditions must give for a step to lead to another one: one of these."""
    exits, found = step.exits, []
    for way in ways:
        if way.target == target:
            before = [(one.condition, False) for one in exits[: exits.index(way.exit)]]
            found.append([one for one in (*before, (way.exit.condition, True)) if one[0]])
    return found


def _can_hold(wanted: list[list[Wanted]]) -> bool:
    """Return whether no condition has to be true and false."""

    def extended(alternatives: list[Wanted], known: list[Answers]) -> list[Answers]:
        found = (one for each in alternatives for one in _answers(each, known))
        return list(islice(found, MAX_ANSWERS))

    known: list[Answers] = [{}]
    # steps without a choice first: what contradicts them is not combined with anything else
    for alternatives in sorted(wanted, key=lambda each: len(extended(each, [{}]))):
        known = extended(alternatives, known)
    return bool(known)


def _answers(wanted: Wanted, known: list[Answers]) -> list[Answers]:
    """Return the known answers, extended by those for which conditions give what is wanted."""
    for config, result in wanted:
        found = (more for one in known for more in _extended(config, result, one))
        known = list(islice(found, MAX_ANSWERS))
    return known


def _extended(config: ConditionConfig, result: bool, known: Answers) -> Iterator[Answers]:
    parts = [part for _, part in config.parts()]
    if config.not_ is not None:
        yield from _extended(config.not_, not result, known)
    elif not parts:
        key = repr((config.lodash_command, config.moment_command, config.granularity))
        key += repr((config.value, config.compare_to))
        if known.get(key, result) is result:
            yield {**known, key: result}
    elif (config.any_ is None) is result:
        yield from _answers([(part, result) for part in parts], [known])
    else:
        for part in parts:
            yield from _extended(part, result, known)


def _loop_message(
    path: list[StepNode], ways: Mapping[StepNode, list[UnwaitedExit]], otherwise: str
) -> Remark:
    """Describe a cycle: `otherwise` says why it may wait if no exit does; empty: it never waits."""
    sequence, name = path[0]
    shown = " → ".join(step if where == sequence else f"{where}/{step}" for where, step in path)
    failing = f"an enrollment that returns to {name} without a wait fails with loop"
    if not otherwise:
        message = f"{shown} never waits: {failing}; add a step that waits to the cycle"
        return Remark(name, (), message, is_error=True)
    reasons = []
    for node, following in pairwise(path):
        taken = [way for way in ways[node] if way.target == following]
        if not any(way.is_sure for way in taken) and (reason := taken[0].exit.reason):
            reasons.append(f"{node[1]} does not wait {reason}")
    if not reasons:
        reasons = [otherwise]
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
