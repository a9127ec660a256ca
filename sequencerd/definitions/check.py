"""What in a sequence that can be executed is a mistake all the same, or looks like one.

Told is only what can be proved from the definition; docs/files.md says what that is.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from difflib import get_close_matches
from typing import NamedTuple

from sequencerd.core.javascript.conditions import ALWAYS_TRUE, Operand, first_key
from sequencerd.core.javascript.templates import compile_template
from sequencerd.core.model import (
    DefinitionError,
    EvaluationError,
    KeyPath,
    Problem,
    Sequence,
    SideEffect,
    Step,
)
from sequencerd.core.step_types import (
    TEMPLATED,
    ConditionConfig,
    condition_of,
    texts,
)

NAMES = (
    "id", "originalId", "subject", "dataLookup", "sequence", "step", "data", "external", "timezone",
    "visit", "attempt", "startSequence", "startStep",
)  # fmt: skip
"""What a path can begin with: the keys of model.view."""

FORMER = {
    "createdAt": "write startSequence",
    "updatedAt": "write startStep",
    "sequenceId": "write sequence, its name",
    "stepId": "write step, its name",
    "isActive": "it would always be true",
    "endSequence": "it would always be empty",
}
"""The other fields that paths could read in the original, and what to do instead."""

MESSAGES = ("Email", "SMS")  # everything in their configs is a template
_ONE_WAY = (
    "Goal", "WaitForDate", "WaitForDuration", "WaitForDateComparison", "UpdateData",
)  # fmt: skip
_SHOWN = 60  # characters of an operand


class Remark(NamedTuple):
    """What was found: the step, the place within it, what is wrong and what to write instead."""

    step: str
    keys: KeyPath
    message: str
    is_error: bool = False


def check(sequence: Sequence, entered: Collection[str] = ()) -> Iterator[Remark]:
    """All remarks on a sequence; `entered` are the steps to which other sequences lead."""
    reachable = _reachable(sequence, entered)
    for step in sequence.steps.values():
        if step.name not in reachable and step.type != "Goal":
            yield Remark(step.name, (), "unreachable: no step leads here, write its name as a next")
        yield from _check_templates(step, sequence)
        if isinstance(step.behaviour, Problem):
            continue
        if step.alt_next_step is not None and not goes_alt(step):
            yield Remark(step.name, ("altNext",), _never_alt(step))
        if condition := condition_of(step.type, step.config):
            yield from _check_condition(step, condition, sequence)
        is_custom = isinstance(step.behaviour, SideEffect) and step.type not in MESSAGES
        if is_custom and "external" in step.config and sequence.lookup is None:
            yield Remark(step.name, ("config", "external"), _NO_LOOKUP)


# --- ways


def _reachable(sequence: Sequence, entered: Collection[str]) -> set[str]:
    """Where somebody can come: from the first step on, pulled by goals, from other sequences."""
    found: set[str] = set()
    goals = [goal.next_step for goal in sequence.goals]
    ahead = [sequence.first_step, *entered, *(name for name in goals if name is not None)]
    while ahead:
        name = ahead.pop()
        if name not in found and name in sequence.steps:
            found.add(name)
            ahead += ways(sequence.steps[name])
    return found


def ways(step: Step) -> list[str]:
    """The steps of its sequence to which a step leads."""
    found: list[str | None] = [step.next_step]
    if step.type == "GoTo" and "step" in step.config:
        found = [None if step.config.get("sequence") else step.config["step"]]
    if isinstance(step.behaviour, Problem) or goes_alt(step):
        found.append(step.alt_next_step)
    return [name for name in found if isinstance(name, str)]


def goes_alt(step: Step) -> bool:
    """Whether a step may take the other way."""
    if step.type in MESSAGES:
        exits = [key for key in _EXITS if step.config.get(key) == "altNext"]
        return bool(exits) and (exits != ["onExpired"] or step.config.get("expires") is not None)
    if step.type == "WaitForCondition":
        return step.config.get("timeout") is not None
    if step.type == "GoTo":
        return bool(step.config.get("sequence"))
    return step.type not in _ONE_WAY


_EXITS = ("onError", "onSuppressed", "onExpired")


def _never_alt(step: Step) -> str:
    if step.type in MESSAGES:
        return (
            'never taken: write "onError: altNext" (or onSuppressed, or onExpired with expires) '
            "into the config, or leave altNext out"
        )
    if step.type == "WaitForCondition":
        return "never taken without a timeout: write one into the config, or leave altNext out"
    return f"never taken by a {step.type}: leave it out"


# --- conditions


def _check_condition(step: Step, config: ConditionConfig, sequence: Sequence) -> Iterator[Remark]:
    for key, operand in (("value", config.value), ("compareTo", config.compare_to)):
        if (
            operand is not None
            and operand.type == "get"
            and (wrong := _wrong_path(operand.value, first_key(operand), sequence))
        ):
            is_former = first_key(operand) in FORMER
            yield Remark(step.name, ("config", key, "value"), wrong, is_former)
    if answer := always(config, sequence):
        yield _fixed(step, *answer)


def always(config: ConditionConfig, sequence: Sequence) -> tuple[bool | None, str] | None:
    """What the condition answers for everybody, None where it can't be asked; and the reason."""
    predicate = config.predicate()
    view = '{"external":{}}'
    other = config.compare_to
    if (
        config.lodash_command == "eq"
        and other
        and isinstance(other.value, list | dict)
        and other.type == "raw"
    ):
        return False, "eq never holds for a list or an object, write isEqual"
    if config.lodash_command in ALWAYS_TRUE:
        return True, f"what {config.lodash_command} gives is true, even when it is empty"
    if not (_is_fixed(config.value, sequence) and _is_fixed(config.compare_to, sequence)):
        return None
    asked = config.lodash_command
    try:
        operands = predicate.operands(view)
        shown = [_shown(text) for text in operands[: 1 if config.compare_to is None else 2]]
        asked += f"({', '.join(shown)})"
        answer = predicate(view)
    except EvaluationError as error:
        return None, f"{asked} fails: {error}"
    return answer, f"{asked} is {str(answer).lower()}, and nothing in it changes"


def _is_fixed(operand: Operand | None, sequence: Sequence) -> bool:
    """Whether an operand is the same for everybody at all times."""
    if operand is None or operand.type == "raw":
        return True
    root = first_key(operand)
    return root not in NAMES or (root == "external" and sequence.lookup is None)


def _shown(text: str | None) -> str:
    text = "undefined" if text is None else text
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _fixed(step: Step, answer: bool | None, why: str) -> Remark:
    keys = ("config",)
    match step.type, answer:
        case _, None:
            return Remark(step.name, keys, f"this fails for everybody: {why}", is_error=True)
        case "Goal", False:
            return Remark(step.name, keys, f"nothing can meet this goal: {why}", is_error=True)
        case "Goal", _:
            message = f"everybody meets this goal before the first step: {why}"
        case "Conditional", _:
            message = f"always goes to {'next' if answer else 'altNext'}: {why}"
        case _, True:
            message = f"never waits: {why}"
        case _ if step.config.get("timeout") is None:
            return Remark(step.name, keys, f"nobody ever gets past here: {why}", is_error=True)
        case _:
            message = f"always waits for the timeout: {why}"
    return Remark(step.name, keys, message)


# --- paths and templates

_NO_LOOKUP = "external is always empty: the sequence names no lookup"


def _wrong_path(path: object, root: str | None, sequence: Sequence) -> str | None:
    if root == "external" and sequence.lookup is None:
        return _NO_LOOKUP
    if root in NAMES:
        return None
    if not root or not isinstance(path, str):
        return f"no data has this path; it begins with one of {', '.join(NAMES)}"
    if root in FORMER:
        return f"{root!r} is a field of the original Sequencer only: {FORMER[root]}"
    near = get_close_matches(root, NAMES, n=1, cutoff=0.75)
    meant = path.replace(root, near[0], 1) if near else f"data.{path}"
    return f"no data has the path {path!r}; did you mean {meant!r}?"


def _check_templates(step: Step, sequence: Sequence) -> Iterator[Remark]:
    """Their paths; and, of a config that was not read as far as its templates, their errors."""
    problem = step.behaviour if isinstance(step.behaviour, Problem) else None
    told = {("config", *fault.path) for fault in problem.faults if fault.path} if problem else ()
    for keys, source in texts(("config",), step.config if step.type in TEMPLATED else {}):
        try:
            template = compile_template(source, escape=False)
        except DefinitionError as error:
            if problem and not any(keys[: len(other)] == other for other in told):
                yield Remark(step.name, keys, str(error), is_error=True)
            continue
        for path in sorted(template.surely_reads - {"this"}):
            root = path.split(".")[0]
            if wrong := _wrong_path(path, root, sequence):
                yield Remark(step.name, keys, wrong, root in FORMER)
