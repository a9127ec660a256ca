"""Compile definitions: make sequences from rows, check them as a whole, make rows from them."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import date
from difflib import get_close_matches
from functools import lru_cache
from sys import intern
from typing import Any, TypeGuard

import asyncpg

from sequencerd.core import graph, step_types
from sequencerd.core.calendar import dates
from sequencerd.core.config import Faults, nearest, parse_config, parse_json
from sequencerd.core.enrollment import StepKey
from sequencerd.core.faults import DefinitionError, Fault, printable
from sequencerd.core.javascript import sandbox
from sequencerd.core.model import (
    ALT_NEXT,
    NEXT_AND_ALT_NEXT,
    NOTHING_SHARED,
    Behaviour,
    Exit,
    InstantStep,
    InvalidStep,
    Limit,
    MessageContext,
    Sequence,
    ServedElsewhere,
    SideEffect,
    Step,
    StoredConfig,
    TopicLimits,
    Window,
)
from sequencerd.core.schedule import EnrollConfig
from sequencerd.core.step_types import BUILT_IN, step_type
from sequencerd.core.step_types.condition_config import condition_calendars
from sequencerd.core.step_types.effects import (
    EFFECT_KEYS,
    EffectConfig,
    TopicLimitConfig,
    compile_expiry,
    effect_exits,
)
from sequencerd.core.view import Holidays, no_holidays
from sequencerd.core.window_config import WindowConfig
from sequencerd.runners import Runner
from sequencerd.runners.protocol import MessageRunner

Runners = Mapping[str, Runner]

MAX_HINTS = 20  # misspelt names of steps in configs, each of which is compared with all names


# --- steps


def served_types(runners: Runners) -> frozenset[str]:
    """Return the step types that can be executed: not those of runners without settings."""
    return frozenset(
        type_ for type_, runner in runners.items() if not getattr(runner, "lacks_settings", False)
    )


def compile_behaviour(
    type_: str, config: Mapping[str, Any], runners: Runners, shared: MessageContext = NOTHING_SHARED
) -> InstantStep | SideEffect | InvalidStep:
    """Compile what a step does, or its error."""
    refusals = sandbox.refusals()
    try:
        if step_types.is_instant(type_):
            return step_types.compile_step(type_, config)
        if type_ not in runners:
            raise DefinitionError(_unknown_type(type_, runners))
        return _compile_effect(type_, config, runners[type_], shared)
    except DefinitionError as error:
        may_pass = sandbox.refusals() > refusals
        return InvalidStep(str(error), error.faults, _named_exits(type_, config), may_pass)
    except RecursionError as error:
        return InvalidStep(str(error), (Fault((), str(error)),))


def _named_exits(type_: str, config: Mapping[str, Any]) -> tuple[Exit, ...]:
    """Return the exits that a step with an error names in its config."""
    named = step_types.named_steps(type_, config)
    return (
        *NEXT_AND_ALT_NEXT,
        *(Exit("next", ("config", *path), step, other) for path, step, other in named),
    )


def _unknown_type(type_: str, runners: Runners) -> str:
    known = sorted({*BUILT_IN, *runners})
    return (
        f"no runner serves the type {type_!r}; {nearest(type_, known)}; configure your own runner "
        f"as [runners.{type_}] in the settings, or install it as a Python package"
    )


def _compile_effect(
    type_: str, config: Mapping[str, Any], runner: Runner, shared: MessageContext
) -> SideEffect:
    faults = Faults()
    common, expires, limit = _no_effect_keys(), None, None
    with faults.at():
        if given := {k: config[k] for k in EFFECT_KEYS & config.keys()}:
            common = parse_config(EffectConfig, given)
        if common.limit is not None:
            with faults.at():
                limit = common.limit.compile(common.limit.topic)
        if common.expires is not None:
            expires = compile_expiry(common.expires)
    with faults.at():
        ours = EFFECT_KEYS if step_types.is_message(type_) else EFFECT_KEYS - {"topic"}
        own = {k: v for k, v in config.items() if k not in ours}
        program = runner.compile(own, shared) if _writes_messages(runner) else runner.compile(own)
    faults.found = [_with_hint(fault) for fault in faults.found]
    faults.check()
    return SideEffect(
        program=program,
        retry=common.retry.applied(runner.retry),
        on_error=common.on_error,
        at_most_once=common.delivery == "at_most_once",
        on_suppressed=common.on_suppressed,
        expires=expires,
        on_expired=common.on_expired,
        window=common.window.window() if common.window else None,
        follows_window="window" not in common.model_fields_set,
        topic=common.topic,
        follows_topic="topic" not in common.model_fields_set,
        limit=limit,
        exits=effect_exits(common, is_message=step_types.is_message(type_)),
    )


_no_effect_keys = lru_cache(maxsize=1)(EffectConfig)  # not created by an import


def _writes_messages(runner: Runner) -> TypeGuard[MessageRunner]:
    """Return whether a runner is a MessageRunner; `isinstance` would take longer than compiling a
    config.
    """
    return hasattr(runner, "as_test")


def _with_hint(fault: Fault) -> Fault:
    """Add the nearest common key to the error of a runner, which does not know the keys of all side
    effects.
    """
    key, *deeper = fault.path or ("",)
    near = get_close_matches(str(key), EFFECT_KEYS, n=1, cutoff=0.75)
    if deeper or not near or key in EFFECT_KEYS:
        return fault
    known, _, _ = fault.message.partition("; available: ")
    return Fault(fault.path, f"{known.partition('; did you mean')[0]}; did you mean {near[0]!r}?")


def build(sequence: Sequence, window: Mapping[str, Any] | str | None = None) -> Sequence:
    """Return a sequence with its window, its goals, and its steps in their order. Errors of the
    whole sequence become problems of its steps.
    """
    ordered = sorted(sequence.steps.values(), key=lambda step: step.position)
    if sequence.topic_limits != {}:
        ordered = [_with_topic_limit(step, sequence) for step in ordered]
    opens, window_fault = _window_of(window)
    made = replace(sequence, steps={step.name: step for step in ordered}, window=opens)
    faults = _faults(made, window_fault)
    return replace(
        made,
        steps={
            name: _with_problems(step, faults.get(name, ())) for name, step in made.steps.items()
        },
        goals=tuple(step for step in reversed(ordered) if step_type(step.type).is_goal),
        collects=next((step.name for step in ordered if _collects(step)), None),
    )


def _collects(step: Step) -> bool:
    return isinstance(step.behaviour, InstantStep) and step.behaviour.collects


def _faults(sequence: Sequence, window_fault: str) -> dict[str, list[Fault]]:
    """Find the errors of the whole sequence, by the steps that they affect."""
    steps = sequence.steps
    faults: defaultdict[str, list[Fault]] = defaultdict(list)
    for stuck in _never_waiting(sequence.name, steps):
        message = "it is part of a cycle that never waits: add a step that waits to it"
        faults[stuck].append(Fault((), message))
    hints = MAX_HINTS
    for step in steps.values():
        for exit_ in step.behaviour.exits:  # without next and altNext, which are foreign keys
            is_own = exit_.path[0] == "config" and exit_.sequence in (None, sequence.name)
            if is_own and exit_.target is not None and exit_.target not in steps:
                hint = f"; {nearest(exit_.target, list(steps))}" if hints else ""
                hints = max(hints - 1, 0)
                message = f"step {exit_.target!r} does not exist{hint}"
                faults[step.name].append(Fault(exit_.path[1:], message))
    try:
        dates.zone(sequence.timezone)
    except DefinitionError as error:
        for name in steps:
            faults[name].append(Fault((), str(error)))
    for name, step in steps.items():
        effect = step.behaviour
        if window_fault and isinstance(effect, SideEffect) and effect.follows_window:
            faults[name].append(Fault((), window_fault))
        for calendar in calendars(step, sequence):
            if sequence.holidays is not None and calendar not in sequence.holidays:
                faults[name].append(Fault((), no_holidays(calendar)))
    return faults


def _with_topic_limit(step: Step, sequence: Sequence) -> Step:
    """Return the step with the limit of its topic: it adds an exit, or a problem."""
    effect, limits = step.behaviour, sequence.topic_limits
    if not isinstance(effect, SideEffect):
        return step
    topic = sequence.topic_of(effect)
    limit = None if limits is None or topic is None else limits.get(topic)
    if isinstance(limit, InvalidStep):
        return _with_problems(step, limit.faults)
    may_lead = limits is None and topic is not None
    may_lead = may_lead or (limit is not None and limit.then == "altNext")
    if may_lead and all(exit_.path != ALT_NEXT.path for exit_ in effect.exits):
        exits = (*effect.exits, ALT_NEXT._replace(is_optional=True))
        return replace(step, behaviour=replace(effect, exits=exits))
    return step


def _window_of(config: Mapping[str, Any] | str | None) -> tuple[Window | None, str]:
    """Compile the window of a sequence, or return its error: SQL accepts any object."""
    try:
        read = parse_json(config) if isinstance(config, str) else config
        return (None if read is None else parse_config(WindowConfig, read, "window").window()), ""
    except DefinitionError as error:
        return None, f"the window of the sequence is wrong: {error}"


def calendars(step: Step, sequence: Sequence) -> set[str]:
    """Return the holiday calendars that a step of a sequence needs."""
    found, effect = set(step.calendars), step.behaviour
    window = sequence.window_of(effect) if isinstance(effect, SideEffect) else None
    if window is not None and window.holidays is not None:
        found.add(window.holidays)
    for exit_ in step.behaviour.exits:
        if exit_.condition is not None:
            found |= condition_calendars(exit_.condition)
    return found


_NO_CALENDARS = frozenset[str]()  # frozenset(found) would make another empty one for each step


def named_calendars(type_: str, config: Mapping[str, Any]) -> frozenset[str]:
    """Return the holiday calendars that a config names, other than that of its window."""
    found = step_types.calendars(type_, config)
    match config.get("expires"):
        case {"holidays": str(calendar)} | {"within": {"holidays": str(calendar)}}:
            found.add(calendar)
    return frozenset(found) if found else _NO_CALENDARS


def _with_problems(step: Step, faults: Iterable[Fault]) -> Step:
    """Return the step with further errors in addition to its own."""
    if not (found := list(faults)):
        return step
    before = step.behaviour.faults if isinstance(step.behaviour, InvalidStep) else ()
    error = DefinitionError([*before, *found])
    return replace(step, behaviour=InvalidStep(str(error), error.faults, step.behaviour.exits))


def _never_waiting(name: str, steps: Mapping[str, Step]) -> set[str]:
    """Return the steps all of whose exits lead in cycles without a wait or a side effect."""
    exits = {  # of the steps that may be left on arrival only
        step.name: step.exits
        for step in steps.values()
        if isinstance(step.behaviour, InstantStep) and _is_always_passed(step.behaviour)
    }
    others = [
        step
        for step, ways in exits.items()
        if all(
            exit_.at_once == "always" and exit_.target in steps and exit_.sequence in (None, name)
            for exit_ in ways
        )
    ]
    if not others:
        return set()
    left = steps.keys() - set(others)  # steps with an exit to a step outside
    sources: dict[str, list[str]] = defaultdict(list)
    for other in others:
        for exit_ in exits[other]:
            assert exit_.target is not None
            sources[exit_.target].append(other)
    escaping = graph.reach(left, lambda step: sources[step])
    return set(others) - escaping


def _is_always_passed(behaviour: InstantStep) -> bool:
    """Return whether every exit that a step must have is taken on arrival."""
    return all(exit_.at_once == "always" or exit_.is_optional for exit_ in behaviour.exits)


def compile_row(
    row: asyncpg.Record, runners: Runners, shared: MessageContext, elsewhere: Collection[str] = ()
) -> StoredConfig:
    """Compile the type and config in a row of sequencer.steps, with the shared parts of the
    messages of its sequence. `elsewhere` are the types that only other daemons serve.
    """
    type_, text = row["type"], row["config"]
    try:
        config = parse_json(text)
    except DefinitionError as error:
        return StoredConfig(text, InvalidStep(f"config {error}"))
    behaviour: Behaviour = compile_behaviour(type_, config, runners, shared)
    if type_ in elsewhere and isinstance(behaviour, InvalidStep):
        behaviour = ServedElsewhere(behaviour.message)
    return StoredConfig(
        text,
        behaviour,
        reads_external=reads_external(type_, config, shared),
        calendars=named_calendars(type_, config),
    )


def make_step(row: asyncpg.Record, config: StoredConfig) -> Step:
    """Make a step from its row in sequencer.steps. Equal names are stored once, because they take
    more memory than the step.
    """
    following, alternative = row["next_step"], row["alt_next_step"]
    return Step(
        intern(row["sequence"]),
        intern(row["name"]),
        intern(row["type"]),
        config,
        None if following is None else intern(following),
        None if alternative is None else intern(alternative),
        config.behaviour,
        row["position"],
        config.reads_external,
        row["seed"],
        config.calendars,
    )


def make_sequence(row: asyncpg.Record, steps: Iterable[Step]) -> Sequence:
    """Make a sequence from its row in sequencer.sequences."""
    sequence = Sequence(
        row["name"],
        row["first_step"],
        row["timezone"],
        {step.name: step for step in steps},
        paused=row["status"] == "paused",
        archived=row["status"] == "archived",
        revision=row["revision"],
        lookup=row["lookup"],
        recheck=row["recheck"],
        holidays=parse_holidays(row["holidays"]),
        topic=row["topic"],
        topic_limits=parse_topic_limits(row["topic_limits"]),
        shared=shared_of(row),
        braked_until=row["braked_until"],
        is_stopped=row["is_stopped"],
        resumed_at=row["resumed_at"],
    )
    return build(sequence, row["time_window"])


def shared_of(row: asyncpg.Record) -> MessageContext:
    """Return the shared parts of a sequence's messages, from its row in sequencer.sequences. A
    partial that is no text, as the table allows lists of texts, counts as missing.
    """
    partials = parse_json(row["partials"]) if row["partials"] else {}
    texts = [(name, text) for name, text in partials.items() if isinstance(text, str)]
    return MessageContext(row["locale"], tuple(texts))


@lru_cache(maxsize=8)  # all sequences that are read together have the same value
def parse_holidays(text: str) -> Holidays:
    """Parse holidays as the database returns them."""
    return {
        calendar: frozenset(map(date.fromisoformat, days))
        for calendar, days in json.loads(text).items()
    }


@lru_cache(maxsize=8)  # all sequences that are read together have the same value
def parse_topic_limits(text: str) -> TopicLimits:
    """Parse the limits of topics, which the database returns as JSON strings: an error in one
    concerns only its topic.
    """
    return {topic: _topic_limit(topic, limit) for topic, limit in json.loads(text).items()}


def _topic_limit(topic: str, text: str) -> Limit | InvalidStep:
    try:
        config = parse_config(TopicLimitConfig, parse_json(text), "the limit")
        if re.search(r"\bexternal\b", config.key):
            raise DefinitionError(
                "key: external data belongs to one sequence, the limit applies to all"
            )
        return config.compile(topic)
    except (DefinitionError, RecursionError) as error:
        wrong = f"the limit of the topic {topic!r} in the table topics is wrong: {error}"
        return InvalidStep(wrong, (Fault((), wrong),))


def from_rows(
    sequence: asyncpg.Record, steps: Iterable[asyncpg.Record], runners: Runners
) -> Sequence:
    """Make a sequence from its rows in the database."""
    shared = shared_of(sequence)
    made = [make_step(row, compile_row(row, runners, shared)) for row in steps]
    return make_sequence(sequence, made)


def reads_external(
    type_: str, config: Mapping[str, Any], shared: MessageContext = NOTHING_SHARED
) -> bool:
    """Return whether a step's condition or one of its templates reads external data, or all data.

    For a step with a side effect: whether the word occurs anywhere in its config.
    """
    read = step_types.roots(type_, config)
    if read is None or "external" in read:
        return True
    if (shared.locale or "").startswith("external.") and step_types.has_languages(type_, config):
        return True
    if step_types.is_instant(type_):
        return False
    used = step_types.used_partials(type_, config, dict(shared.partials))
    sources = [json.dumps(config), *(text for name, text in shared.partials if name in used)]
    return any(re.search(r"\bexternal\b", source) for source in sources)


def problems(sequence: Sequence, known: Mapping[StepKey, str]) -> dict[StepKey, str | None]:
    """Return the problems of steps, limited in length, and None for those with a `known` problem
    that is over.
    Problems of a step that other daemons execute are reported by those, unless it is only known
    that this daemon cannot execute it.
    """
    found: dict[StepKey, str | None] = {}
    for step in sequence.steps.values():
        behaviour = step.behaviour
        if isinstance(behaviour, InvalidStep):
            found[step.sequence, step.name] = printable(behaviour.message)
        elif (
            known  # is empty in most cases
            and (problem := known.get((step.sequence, step.name))) is not None
            and not (isinstance(behaviour, ServedElsewhere) and behaviour.problem != problem)
        ):
            found[step.sequence, step.name] = None
    return found


@dataclass(frozen=True, slots=True)
class Definition:
    """A checked sequence from a file. A `status` of None does not change a pause; `renames` maps
    new names of steps to their former names.
    """

    sequence: Sequence
    reentry: str | Mapping[str, Any]  # as written in the document
    status: str | None
    where: str = field(compare=False)
    description: str | None = None
    window: Mapping[str, Any] | None = None
    renames: Mapping[str, str] = field(default_factory=dict)
    enroll: EnrollConfig | None = None
    brake: Mapping[str, Any] | None = None  # as written in the document

    def pending_renames(self, present: Collection[str]) -> dict[str, str]:
        """Return new names by former names, for the steps that are `present`, in an order in which
        each new name is free. Renames that have already been applied are omitted.
        """
        names, found = set(present), {}
        open_ = dict(self.renames)
        while ready := [n for n, old in open_.items() if old in names and n not in names]:
            new = ready[0]
            old = open_.pop(new)
            names = names - {old} | {new}
            found[old] = new
        return found

    def seeds(self, present: Mapping[str, str | None]) -> dict[str, str]:
        """Return the seeds of the Splits: the one in the file, else the `present` one, else the
        first name that the file contains.
        """
        old_names = {new: old for old, new in self.pending_renames(present).items()}
        found = {}
        for name, step in self.sequence.steps.items():
            if step_type(step.type).is_seeded:
                known = present.get(old_names.get(name, name))
                first = f"{self.sequence.name}/{self.renames.get(name, name)}"
                while not known and first in present.values():  # of a renamed step
                    first += "'"
                found[name] = step.seed or known or first
        return found

    def seeded(self, present: Mapping[str, str | None]) -> Sequence:
        """Return the sequence with the seeds that it has in a database with those `present`."""
        seeds = self.seeds(present)
        steps = {
            name: replace(step, seed=seeds.get(name)) for name, step in self.sequence.steps.items()
        }
        return replace(self.sequence, steps=steps)
