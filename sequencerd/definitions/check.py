"""Find mistakes in sequences that can be executed.

Reports only what follows from the definition, as documented in docs/files.md.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Set
from contextlib import suppress
from dataclasses import dataclass, field
from difflib import get_close_matches
from itertools import accumulate
from typing import Any, NamedTuple

from sequencerd.core import graph
from sequencerd.core.faults import DefinitionError, EvaluationError, KeyPath
from sequencerd.core.javascript.conditions import (
    ALWAYS_FALSE,
    ALWAYS_TRUE,
    Operand,
    first_key,
    path_keys,
)
from sequencerd.core.javascript.templates import (
    compile_template,
    missing_layouts,
    surely_used,
)
from sequencerd.core.languages import DEFAULT, fallback, normalised
from sequencerd.core.model import (
    ALT_NEXT,
    Exit,
    InvalidStep,
    MessageContext,
    Sequence,
    SideEffect,
    Step,
)
from sequencerd.core.step_types import (
    BUILT_IN,
    has_languages,
    is_message,
    language_texts,
    step_type,
    template_texts,
    written_keys,
)
from sequencerd.core.step_types.condition_config import ConditionConfig, commands
from sequencerd.core.step_types.record import texts
from sequencerd.runners import unsubscribe

ROOT_KEYS = (
    "id",
    "originalId",
    "subject",
    "dataLookup",
    "sequence",
    "step",
    "data",
    "external",
    "timezone",
    "visit",
    "attempt",
    "startSequence",
    "startStep",
)
"""The first keys of paths: those of model.view."""

FORMER_KEYS = {
    "createdAt": "write startSequence",
    "updatedAt": "write startStep",
    "sequenceId": "write sequence, its name",
    "stepId": "write step, its name",
    "isActive": "it would always be true",
    "endSequence": "it would always be empty",
}
"""The other fields that paths could read in the original, with what to write instead."""

_MAX_SHOWN = 60  # characters of an operand


class Remark(NamedTuple):
    """A finding: the step, the path within its config, and what to write instead."""

    step: str
    keys: KeyPath
    message: str
    is_error: bool = False


def check(sequence: Sequence, entered: Collection[str] = ()) -> Iterator[Remark]:
    """Yield all findings in a sequence; `entered` are the steps to which other sequences lead."""
    starts = [sequence.first_step, *entered, *(goal.name for goal in sequence.goals)]
    present = (name for name in starts if name in sequence.steps)
    reachable = graph.reach(present, lambda name: targets(name, sequence))
    for step in sequence.steps.values():
        if step.name not in reachable:
            yield Remark(
                step.name,
                (),
                "unreachable: no step leads here; name it as the next of another step",
            )
        yield from _check_templates(step, sequence)
        yield from _check_styles(step)
        yield from _check_tags(step)
        if isinstance(step.behaviour, InvalidStep):
            continue
        yield from _check_languages(step)
        if step.alt_next_step is not None and all(e.path != ALT_NEXT.path for e in step.exits):
            message = BUILT_IN[step.type].never_alt or f"never taken by a {step.type}: leave it out"
            yield Remark(step.name, ("altNext",), message)
        if wrong := _wrong_in_a_row(step, sequence):
            yield Remark(step.name, ("next",), wrong)
        for exit_ in step.exits:
            if exit_.condition is not None:
                yield from _check_condition(step, exit_, sequence)
        for key in written_keys(step.type, step.config) or ():
            if "." in key:
                yield Remark(step.name, ("config", "data"), _dotted(key))
        if not isinstance(step.behaviour, SideEffect):
            continue
        if "onExpired" in step.config and step.behaviour.expires is None:
            yield Remark(step.name, ("config", "onExpired"), "has no effect without expires")
        is_custom = not is_message(step.type)
        if is_custom and "external" in step.config and sequence.lookup is None:
            yield Remark(step.name, ("config", "external"), _NO_LOOKUP)


def _dotted(key: str) -> str:
    first, _, rest = key.partition(".")
    return (
        f"writes one key named {key!r}, which the path 'data.{key}' does not read: write an "
        f"object, {{{first}: {{{rest}: ...}}}}, which replaces 'data.{first}'"
    )


def _check_languages(step: Step) -> Iterator[Remark]:
    """Yield texts of a message that do not exist in all of its languages."""
    if not has_languages(step.type, step.config):
        return
    texts = language_texts(step.type, step.config)
    languages = {
        key: set(map(normalised, text)) if isinstance(text, dict) else {DEFAULT}
        for key, text in texts.items()
    }
    for key, own in languages.items():
        for other, more in languages.items():
            known = {fallback(own), fallback(more)} if DEFAULT in own | more else set()
            if missing := sorted(more - own - known - {DEFAULT}):
                what = ", ".join(missing)
                message = f"has no text in {what}, as {other} has: write it in the same languages"
                yield Remark(step.name, ("config", key), message)
                break


def _wrong_in_a_row(step: Step, sequence: Sequence) -> str | None:
    following = sequence.steps.get(step.next_step or "")
    if (
        following is None
        or step.type != following.type
        or isinstance(following.behaviour, InvalidStep)
    ):
        return None
    wrong = step_type(step.type).in_a_row(step.config, following.config)
    return wrong and f"before {following.name}: {wrong}"


def targets(name: str, sequence: Sequence) -> list[str]:
    """Return the steps of the same sequence to which a step leads."""
    exits = sequence.steps[name].exits
    found = [one.target for one in exits if one.sequence in (None, sequence.name)]
    return [target for target in found if target is not None and target in sequence.steps]


# --- conditions


def _check_condition(step: Step, exit_: Exit, sequence: Sequence) -> Iterator[Remark]:
    for path, command in commands(exit_.condition, exit_.condition_path):
        for keys, operand in command.operands():
            if operand.type != "get":
                continue
            root = first_key(operand)
            if wrong := _wrong_path(operand.value, root, sequence):
                yield Remark(step.name, (*path, *keys, "value"), wrong, root in FORMER_KEYS)
        if command.lodash_command in _TEXT_ORDER and _compares_times(command):
            meant = _TEXT_ORDER[command.lodash_command]
            yield Remark(
                step.name,
                (*path, "lodashCommand"),
                f"{command.lodash_command} compares times as texts, which is wrong if they are "
                f"written in different zones or forms: write momentCommand: {meant}",
            )
    if answer := constant_result(exit_.condition, sequence):
        yield _constant_remark(step, exit_, *answer)


_TEXT_ORDER = {
    "gt": "isAfter",
    "gte": "isSameOrAfter",
    "lt": "isBefore",
    "lte": "isSameOrBefore",
}
"""lodash's commands that compare texts character by character, with moment's commands for times."""

_TIME = re.compile(r"\d{4}-\d{2}(-\d{2}.*)?")
_NAME_OF_TIME = re.compile(
    r"(.*[._])?(date|time|at|due|on)|.*[a-z](At|Date|Time)|start(Step|Sequence)"
)


def _compares_times(command: ConditionConfig) -> bool:
    """Return whether an operand looks like a time, and no operand like anything else."""
    looks: list[bool] = []
    for _, operand in command.operands():
        if operand.type == "raw":
            text = operand.value
            looks.append(isinstance(text, str) and bool(_TIME.fullmatch(text)))
            if not looks[-1]:
                return False
        else:
            looks.append(bool(_NAME_OF_TIME.fullmatch(str(operand.value))))
    return any(looks)


def constant_result(config: ConditionConfig, sequence: Sequence) -> tuple[bool | None, str] | None:
    """Return the result of a constant condition (None: it always fails), and the reason."""
    if config.lodash_command is not None:
        return _constant_command(config, sequence)
    if config.not_ is not None:
        known = constant_result(config.not_, sequence)
        return known and (None if known[0] is None else not known[0], known[1])
    decides = config.any_ is not None  # the result that ends the evaluation
    reasons: list[str] | None = []
    for _, part in config.parts():
        known = constant_result(part, sequence)
        if known is None:
            reasons = None
        elif known[0] is decides:
            return known
        elif known[0] is None:
            return known if reasons is not None else None
        elif reasons is not None:
            reasons.append(known[1])
    return (not decides, "; ".join(reasons)) if reasons else None


def _constant_command(
    config: ConditionConfig, sequence: Sequence
) -> tuple[bool | None, str] | None:
    predicate = config.predicate()
    view = '{"external":{}}'
    other = config.compare_to
    assert not isinstance(other, list)
    if (
        config.lodash_command == "eq"
        and other
        and isinstance(other.value, list | dict)
        and other.type == "raw"
    ):
        return False, "eq is never true for a list or an object: write isEqual"
    if not (_is_constant(config.value, sequence) and _is_constant(other, sequence)):
        if config.lodash_command in ALWAYS_TRUE:
            return True, f"the result of {config.lodash_command} is true, even when it is empty"
        if config.lodash_command in ALWAYS_FALSE:
            return False, f"{config.lodash_command} is false for all data"
        return None
    asked = config.lodash_command or ""
    try:
        operands = predicate.operands(view)
        shown = [_shown(text) for text in operands[: 1 if other is None else 2]]
        asked += f"({', '.join(shown)})"
        answer = predicate(view)
    except EvaluationError as error:
        return None, f"{asked} fails: {error}"
    return answer, f"{asked} is always {str(answer).lower()}"


def _is_constant(operand: Operand | None, sequence: Sequence) -> bool:
    """Return whether an operand is constant."""
    if operand is None or operand.type == "raw":
        return True
    root = first_key(operand)
    return root not in ROOT_KEYS or (root == "external" and sequence.lookup is None)


def _shown(text: str | None) -> str:
    text = "undefined" if text is None else text
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."


def _constant_remark(step: Step, exit_: Exit, answer: bool | None, why: str) -> Remark:
    """Return the remark on an exit whose condition has the same result for every enrollment."""
    index = step.exits.index(exit_)
    following = step.exits[index + 1 :]
    waits = exit_.at_once == "sometimes"
    is_error = answer is None or (not answer and waits and not following)
    if answer is None:
        message = f"this fails for every enrollment: {why}"
    elif step_type(step.type).is_goal:
        does = "every enrollment meets this goal before the first step"
        message = f"{does if answer else 'this goal can never be met'}: {why}"
    elif waits:
        does = "always waits for the timeout" if following else "no enrollment ever gets past here"
        message = f"{'never waits' if answer else does}: {why}"
    elif answer:
        message = f"{'never goes beyond' if index else 'always goes to'} {exit_.label}: {why}"
    elif index or len(following) > 1:
        message = f"never goes to {exit_.label}: {why}"
    else:
        message = f"always goes to {following[0].label}: {why}"
    return Remark(step.name, exit_.condition_path, message, is_error)


# --- paths and templates

_NO_LOOKUP = "external is always empty: the sequence names no lookup"


def _wrong_path(path: object, root: str | None, sequence: Sequence) -> str | None:
    if root == "external" and sequence.lookup is None:
        return _NO_LOOKUP
    if root in ROOT_KEYS:
        return None
    if isinstance(path, str) and "{{" in path:
        return "a path is not a template: write it without braces, such as data.name"
    if not root or not isinstance(path, str):
        return f"no data has this path; it begins with one of {', '.join(ROOT_KEYS)}"
    if root in FORMER_KEYS:
        return f"{root!r} is a field of the original Sequencer only: {FORMER_KEYS[root]}"
    near = get_close_matches(root, ROOT_KEYS, n=1, cutoff=0.75)
    meant = path.replace(root, near[0], 1) if near else f"data.{path}"
    return f"no data has the path {path!r}; did you mean {meant!r}?"


def _check_templates(step: Step, sequence: Sequence) -> Iterator[Remark]:
    """Yield remarks on the paths in templates, and the errors of configs that were not compiled."""
    for path, target in step_type(step.type).paths(step.config):
        with suppress(DefinitionError):  # the step's problem reports these
            root = first_key(Operand(type="get", value=target))
            if wrong := _wrong_path(target, root, sequence):
                yield Remark(step.name, ("config", *path), wrong, root in FORMER_KEYS)
    problem = step.behaviour if isinstance(step.behaviour, InvalidStep) else None
    reported = (
        {("config", *fault.path) for fault in problem.faults if fault.path} if problem else ()
    )
    partials = dict(sequence.shared.partials)
    for path, source in template_texts(step.type, step.config):
        keys = ("config", *path)
        known = partials if path[0] in step_type(step.type).localised else {}
        try:
            template = compile_template(source, escape=False, partials=known)
            for missing in missing_layouts(source, known):
                yield Remark(step.name, keys, missing, is_error=True)
        except DefinitionError as error:
            if problem and not any(keys[: len(other)] == other for other in reported):
                yield Remark(step.name, keys, str(error), is_error=True)
            continue
        others = {unsubscribe.NAME} if is_message(step.type) else set()
        yield from _check_reads(step.name, keys, source, template.surely_reads - others, sequence)


def _check_reads(
    step: str, keys: KeyPath, source: str, reads: Set[str], sequence: Sequence
) -> Iterator[Remark]:
    in_css = dict(_in_css(source))
    for read in sorted(reads - {"this"}):
        root = read.split(".")[0]
        if (wrong := _wrong_path(read, root, sequence)) and read not in in_css:
            yield Remark(step, keys, wrong, root in FORMER_KEYS)


_STYLE = re.compile(r"<style\b[^<>]*>((?:(?!<style\b).)*?)</style\b", re.DOTALL | re.IGNORECASE)
_TAG = re.compile(r"\{\{~?\s*([^\s~{}#/>!&^\"'()]+)\s*~?\}\}")
_DATA = ("@root", "@key", "@index", "@first", "@last")


def _in_css(source: str) -> Iterator[tuple[str, int]]:
    """Yield each tag within a style that prints nothing, with its line."""
    for style in _STYLE.finditer(source):
        for tag in _TAG.finditer(style[1]):
            root = re.split(r"[./]", tag[1])[0]
            if root in ROOT_KEYS or root in ("this", "else", "") or tag[1].startswith(_DATA):
                continue
            if ":" in tag[1] or "@" in tag[1]:
                yield tag[1], source.count("\n", 0, style.start(1) + tag.start()) + 1


def _check_styles(step: Step) -> Iterator[Remark]:
    """Yield CSS within two braces, which is a tag that prints nothing."""
    for path, source in template_texts(step.type, step.config):
        for text, line in _in_css(source):
            yield Remark(step.name, ("config", *path), _css_without_effect(text, line))


_LIQUID = re.compile(r"\{%.{0,200}?%\}")


def _check_tags(step: Step) -> Iterator[Remark]:
    """Yield tags of Liquid, Jinja or Twig in messages, which would be sent as they are."""
    if is_message(step.type):
        for path, source in template_texts(step.type, step.config):
            if found := _LIQUID.search(source):
                line = source.count("\n", 0, found.start()) + 1
                message = (
                    f"line {line}: {found[0]} is no tag here, and is sent as it is: write "
                    "{{#if data.paid}}...{{/if}} or {{#each data.items}}...{{/each}}"
                )
                yield Remark(step.name, ("config", *path), message)


def _css_without_effect(text: str, line: int) -> str:
    return (
        f"line {line}: {{{{{text}}}}} in a style is a tag that prints nothing: write CSS in one "
        "brace"
    )


def check_partials(sequence: Sequence) -> Iterator[Remark]:
    """Yield findings in the partials of a sequence, which belong to no step."""
    partials = dict(sequence.shared.partials)
    sure: set[str] = set()
    for step in sequence.steps.values():
        for _, source in texts(dict(language_texts(step.type, step.config))):
            with suppress(DefinitionError):
                sure |= surely_used(source, partials)
    for name, source in partials.items():
        keys = ("partials", name)
        for text, line in _in_css(source):
            yield Remark("", keys, _css_without_effect(text, line))
        if name in sure:
            with suppress(DefinitionError):
                template = compile_template(source, escape=False, partials=partials)
                reads = template.surely_reads - {unsubscribe.NAME}
                yield from _check_reads("", keys, source, reads, sequence)


# --- paths that no data has


@dataclass(frozen=True, slots=True)
class KnownPaths:
    """The paths in examples of data. Below a value that is not an object, every path is known."""

    objects: set[str] = field(default_factory=set)
    values: set[str] = field(default_factory=set)

    def add(self, value: object, path: str) -> None:
        """Add the paths of an example that is located at `path`."""
        if isinstance(value, dict):
            self.objects.add(path)
            for key, item in value.items():
                self.add(item, f"{path}.{key}")
        else:
            self.values.add(path)

    def has(self, path: str) -> bool:
        """Return whether an example has the path."""
        if path in self.objects or path in self.values:
            return True
        parents = accumulate(path.split("."), "{}.{}".format)
        return any(parent in self.values for parent in parents)


def known_paths(
    examples: Iterable[Mapping[str, Any]], external: Mapping[str, Any] | None = None
) -> KnownPaths:
    """Collect the paths in examples of data, and in the result of a lookup."""
    known = KnownPaths()
    for example in examples:
        known.add(example, "data")
    if external is not None:
        known.add(external, "external")
    return known


def unknown_paths(sequence: Sequence, known: KnownPaths) -> Iterator[Remark]:
    """Yield paths that no example of data and no step of the sequence has. Custom runners, and
    steps that copy an object, may add any data: with one, only likely typing errors are reported.
    """
    known = KnownPaths(set(known.objects), set(known.values))
    roots = {path for path in known.objects if "." not in path}
    is_open = False
    for step in sequence.steps.values():
        written = written_keys(step.type, step.config)
        if isinstance(step.behaviour, SideEffect) and not is_message(step.type):
            is_open = True
        is_open = is_open or written is None
        known.values.update(f"data.{key}" for key in written or ())
    for step in sequence.steps.values():
        for keys, path in _paths(step, sequence.shared):
            if path.split(".")[0] not in roots or known.has(path):
                continue
            root, _, rest = path.partition(".")
            others = [p.removeprefix(f"{root}.") for p in known.objects | known.values]
            if near := get_close_matches(rest, sorted(others), n=1, cutoff=0.7):
                message = f"no data has the path {path!r}; did you mean '{root}.{near[0]}'?"
                yield Remark(step.name, keys, message)
            elif not is_open:
                yield Remark(step.name, keys, f"no data has the path {path!r}")


def _paths(step: Step, shared: MessageContext) -> Iterator[tuple[KeyPath, str]]:
    """Yield the constant paths in the conditions and templates of a step, separated by dots."""
    for keys, read in (*_read_by_conditions(step), *step_type(step.type).paths(step.config)):
        with suppress(DefinitionError):
            yield ("config", *keys), ".".join(path_keys(read))
    for keys, source in template_texts(step.type, step.config):
        with suppress(DefinitionError):
            partials = dict(shared.partials) if keys[0] in step_type(step.type).localised else {}
            template = compile_template(source, escape=False, partials=partials)
            for read in sorted(template.surely_reads):
                yield ("config", *keys), read


def _read_by_conditions(step: Step) -> Iterator[tuple[KeyPath, object]]:
    for exit_ in step.exits:
        if exit_.condition is None:
            continue
        for path, command in commands(exit_.condition, exit_.condition_path):
            for keys, operand in command.operands():
                if operand.type == "get":
                    yield (*path[1:], *keys, "value"), operand.value
