"""Draw a sequence: as text, for Mermaid, for Graphviz."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from typing import NamedTuple

from sequencerd.core.model import NEXT, InstantStep, Limit, Sequence, SideEffect, Step
from sequencerd.core.step_types.durations import in_words

StepCounts = Mapping[tuple[str, str], int]
"""Numbers of enrollments by sequence and step."""

END = "end"


class Edge(NamedTuple):
    """A connection from one step to another, to None for the end, or to a step of another sequence;
    or, without a target, an effect of the step on another sequence.
    """

    source: str
    target: str | None
    label: str = ""
    sequence: str | None = None


def edges(sequence: Sequence) -> Iterator[Edge]:
    """Yield the edges in the order of the definition."""
    for step in sequence.steps.values():
        for exit_ in step.exits:
            label = "" if exit_.label == NEXT.label else exit_.label
            yield Edge(step.name, exit_.target, label, exit_.sequence)
        if isinstance(step.behaviour, InstantStep):
            for verb, name in step.behaviour.concerns:
                yield Edge(step.name, None, verb, name)


def describe_brake(at_most: int, per: timedelta) -> str:
    """Describe a brake: "at most 500 in 1 hour"."""
    seconds = round(per.total_seconds())
    sizes = (("hours", 3600), ("minutes", 60), ("seconds", 1))
    unit, size = next(one for one in sizes if seconds % one[1] == 0)
    return f"at most {at_most:,} in {in_words(seconds // size, unit)}"


def limits(sequence: Sequence, step: Step) -> Iterator[tuple[Limit, str]]:
    """Yield the limits of a step's side effect, its own and that of its topic, each with a
    description: "at most 3 in 7 days (topic marketing)".
    """
    effect = step.behaviour
    if not isinstance(effect, SideEffect):
        return
    topic = sequence.topic_of(effect)
    of_topic = (sequence.topic_limits or {}).get(topic or "")
    for limit in (effect.limit, of_topic):
        if isinstance(limit, Limit):
            counted = limit.topic or topic
            about = f" (topic {counted})" if counted else ""
            yield limit, f"at most {limit.description}{about}"


def text(sequence: Sequence, counts: StepCounts, brake: str = "") -> str:
    """Draw a line for each step, below the brake: its count, name and type, where it leads, and
    its limits.
    """
    every_edge = list(edges(sequence))
    names = [_one_line(name) for name in sequence.steps]
    width = max(map(len, names), default=0)
    kinds = max((len(_one_line(step.type)) for step in sequence.steps.values()), default=0)
    lines = [f"brake: {brake}"] if brake else []
    for name, step in sequence.steps.items():
        targets = ", ".join(
            f"{edge.label or 'next'} {_target(edge)}" for edge in every_edge if edge.source == name
        )
        count = f"{counts.get((sequence.name, name), 0):>8}  " if counts else ""
        limited = "".join(f"; {description}" for _, description in limits(sequence, step))
        lines.append(
            f"{count}{_one_line(name):{width}}  {_one_line(step.type):{kinds}}  {targets}{limited}"
        )
    return "\n".join(lines)


def mermaid(sequence: Sequence, counts: StepCounts, brake: str = "") -> str:
    """Draw a flowchart for Mermaid."""
    ids = {name: f"s{n}" for n, name in enumerate(sequence.steps)}
    lines = ["flowchart TD"]
    for name, step in sequence.steps.items():
        left, right = ("{{", "}}") if step in sequence.goals else ("[", "]")
        label = "<br/>".join(map(_for_mermaid, _label(sequence, step, counts)))
        lines.append(f'  {ids[name]}{left}"{label}"{right}')
    if brake:
        lines.append(f'  brake>"{_for_mermaid(f"brake: {brake}")}"] -.- {ids[sequence.first_step]}')
    others: dict[str, str] = {}
    for edge in edges(sequence):
        target = ids.get(edge.target or "") if edge.sequence is None else None
        if target is None:
            shown = _target(edge)
            if shown not in others:
                others[shown] = f"o{len(others)}"
                lines.append(f'  {others[shown]}(["{_for_mermaid(shown)}"])')
            target = others[shown]
        arrow = f"-- {edge.label} -->" if edge.label else "-->"
        lines.append(f"  {ids[edge.source]} {arrow} {target}")
    return "\n".join(lines)


def dot(sequence: Sequence, counts: StepCounts, brake: str = "") -> str:
    """Draw a digraph for Graphviz."""
    lines = [f"digraph {_for_dot(sequence.name)} {{", "  node [shape=box];"]
    if brake:
        lines.append(f"  labelloc=t; label={_for_dot(f'brake: {brake}')};")
    for name, step in sequence.steps.items():
        label = _for_dot("\n".join(_label(sequence, step, counts)))
        shape = ", shape=hexagon" if step in sequence.goals else ""
        lines.append(f"  {_for_dot('step ' + name)} [label={label}{shape}];")
    others = set()
    for edge in edges(sequence):
        target = f"step {edge.target}"
        if edge.target is None or edge.sequence is not None:
            target = f"other {_target(edge)}"
            if target not in others:
                others.add(target)
                lines.append(f"  {_for_dot(target)} [label={_for_dot(_target(edge))}, shape=oval];")
        label = f" [label={_for_dot(edge.label)}]" if edge.label else ""
        lines.append(f"  {_for_dot('step ' + edge.source)} -> {_for_dot(target)}{label};")
    return "\n".join([*lines, "}"])


FORMATS: Mapping[str, Callable[[Sequence, StepCounts, str], str]] = {
    "text": text,
    "mermaid": mermaid,
    "dot": dot,
}


def _target(edge: Edge) -> str:
    if edge.target is None:
        return END if edge.sequence is None else f"sequence {_one_line(edge.sequence)}"
    return _one_line(f"{edge.sequence}/{edge.target}" if edge.sequence else edge.target)


def _label(sequence: Sequence, step: Step, counts: StepCounts) -> list[str]:
    count = counts.get((sequence.name, step.name), 0)
    limited = [description for _, description in limits(sequence, step)]
    return [
        _one_line(step.name),
        _one_line(step.type),
        *([f"{count} here"] if count else []),
        *limited,
    ]


def _one_line(name: str) -> str:
    """Return a name as one line."""
    return " ".join(name.split())


def _for_mermaid(name: str) -> str:
    """Quote a text: Mermaid interprets HTML entities, and its own, which begin with #."""
    return "".join(c if c.isalnum() or c in " _-.,:/" else f"#{ord(c)};" for c in name)


def _for_dot(name: str) -> str:
    """Quote a text, with \n for line ends."""
    escaped = name.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'
