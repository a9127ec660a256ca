"""Conditions in the configs of steps: lodash's commands, moment's, and their combinations."""

from __future__ import annotations

import json
import operator
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field

from sequencerd.core.calendar import dates
from sequencerd.core.calendar.granularity import GRANULARITIES, period
from sequencerd.core.config import Config, Faults
from sequencerd.core.faults import DefinitionError, EvaluationError, Fault, KeyPath
from sequencerd.core.javascript.conditions import (
    COMMANDS,
    Operand,
    Predicate,
    compile_predicate,
    first_key,
    known_command,
)
from sequencerd.core.step_types.durations import FixedOffset, compile_move, describe_duration
from sequencerd.core.step_types.template_config import no_date, parse_date, shown
from sequencerd.core.view import Context

MAX_DEPTH = 50

_COMPARISONS: Mapping[str, Callable[[int, int], bool]] = {
    "isBefore": operator.lt,
    "isAfter": operator.gt,
    "isSame": operator.eq,
    "isSameOrBefore": operator.le,
    "isSameOrAfter": operator.ge,
}
"""moment's comparisons of two times; isBetween compares with both ends, which are excluded."""

MomentCommand = Literal[
    "isBefore", "isAfter", "isSame", "isSameOrBefore", "isSameOrAfter", "isBetween"
]


def _granularity(name: str) -> str:
    if name not in GRANULARITIES:
        raise ValueError(f"must be one of {', '.join(GRANULARITIES)}")
    return name


class ConditionOperand(Operand):
    """An operand of a condition."""

    offset: FixedOffset | None = None
    """For momentCommand: time to add to the operand, such as {amount: -30, unit: days}."""


class ConditionConfig(Config):
    """A condition: Boolean(_[lodashCommand](value, compareTo)), a comparison of times with
    momentCommand, or a combination of conditions with all, any and not.
    """

    model_config = ConfigDict(
        json_schema_extra={
            "anyOf": [
                {"required": ["lodashCommand", "value"]},
                {"required": ["momentCommand", "value", "compareTo"]},
                {"required": ["all"]},
                {"required": ["any"]},
                {"required": ["not"]},
            ]
        }
    )

    lodash_command: (
        Annotated[
            str,
            AfterValidator(known_command),
            Field(json_schema_extra={"enum": [*sorted(COMMANDS)]}),
        ]
        | None
    ) = None
    """lodash's command, such as eq, gte, isEqual, includes."""
    moment_command: MomentCommand | None = None
    """moment's command, which compares points in time, also across time zones."""
    value: ConditionOperand | None = None
    """The first operand."""
    compare_to: ConditionOperand | list[ConditionOperand] | None = None
    """The second operand, if the command takes one; for isBetween a list of two."""
    granularity: (
        Annotated[
            str,
            AfterValidator(_granularity),
            Field(json_schema_extra={"enum": [*GRANULARITIES]}),
        ]
        | None
    ) = None
    """For momentCommand: the unit that is compared, such as day, in the enrollment's time zone."""
    all_: Annotated[list[ConditionConfig], Field(min_length=1)] | None = Field(None, alias="all")
    """Conditions that must all be true."""
    any_: Annotated[list[ConditionConfig], Field(min_length=1)] | None = Field(None, alias="any")
    """Conditions of which at least one must be true."""
    not_: ConditionConfig | None = Field(None, alias="not")
    """A condition that must be false."""

    def predicate(self) -> Predicate:
        """Compile the condition of the lodashCommand."""
        assert self.lodash_command is not None
        assert self.value is not None
        assert not isinstance(self.compare_to, list)
        return compile_predicate(self.lodash_command, self.value, self.compare_to)

    def parts(self) -> list[tuple[KeyPath, ConditionConfig]]:
        """Return the conditions that it combines, with their paths."""
        parts: list[tuple[KeyPath, ConditionConfig]] = []
        for key, conditions in (("all", self.all_), ("any", self.any_)):
            parts += [((key, number), one) for number, one in enumerate(conditions or ())]
        return [*parts, (("not",), self.not_)] if self.not_ else parts

    def operands(self) -> list[tuple[KeyPath, ConditionOperand]]:
        """Return its own operands, with their paths."""
        found: list[tuple[KeyPath, ConditionOperand]] = []
        if self.value:
            found.append((("value",), self.value))
        match self.compare_to:
            case ConditionOperand():
                found.append((("compareTo",), self.compare_to))
            case list():
                found += [(("compareTo", n), operand) for n, operand in enumerate(self.compare_to)]
        return found


_KEYS = frozenset(field.alias or name for name, field in ConditionConfig.model_fields.items())
_KINDS = ("lodashCommand", "momentCommand", "all", "any", "not")


def read_condition(config: Mapping[str, Any]) -> ConditionConfig:
    """Read the condition in a mapping, whatever its other keys. Raises ValidationError."""
    return ConditionConfig.model_validate({key: config[key] for key in config.keys() & _KEYS})


def commands(
    config: ConditionConfig, path: KeyPath = ()
) -> Iterator[tuple[KeyPath, ConditionConfig]]:
    """Yield the commands in a condition, with their paths."""
    if not (parts := config.parts()):
        yield path, config
    for keys, part in parts:
        yield from commands(part, (*path, *keys))


def condition_roots(config: ConditionConfig) -> frozenset[str]:
    """Return the first keys of all paths that a condition may read. Raises DefinitionError."""
    read = [operand for _, one in commands(config) for _, operand in one.operands()]
    roots = {first_key(operand) for operand in read if operand.type == "get"}
    return frozenset(root for root in roots if root is not None)


def condition_calendars(config: ConditionConfig) -> frozenset[str]:
    """Return the calendars of holidays that a condition names."""
    offsets = [operand.offset for _, one in commands(config) for _, operand in one.operands()]
    return frozenset(offset.calendar for offset in offsets if offset and offset.calendar)


# --- compiled

Holds = Callable[[Context], bool]


def compile_condition(config: ConditionConfig, *, waits: bool = False) -> Holds:
    """Compile a condition to a function of the evaluation context. If the step `waits` for it,
    nothing in it may depend on the present time. Raises DefinitionError.
    """
    return _compile(config, 0, waits=waits)


def _compile(config: ConditionConfig, depth: int, *, waits: bool) -> Holds:
    if depth > MAX_DEPTH:
        raise DefinitionError(f"conditions are nested more than {MAX_DEPTH} levels deep")
    faults = Faults()
    _check_keys(config, faults, waits=waits)
    parts: list[Holds] = []
    for path, part in config.parts():
        with faults.at(*path):
            parts.append(_compile(part, depth + 1, waits=waits))
    faults.check()
    if config.all_ is not None:
        return lambda context: all(part(context) for part in parts)
    if config.any_ is not None:
        return lambda context: any(part(context) for part in parts)
    if config.not_ is not None:
        [inner] = parts
        return lambda context: not inner(context)
    if config.moment_command is not None:
        return _compile_moment(config)
    predicate = config.predicate()
    return lambda context: context.holds(predicate, predicate.roots)


def _check_keys(config: ConditionConfig, faults: Faults, *, waits: bool) -> None:
    """Find keys that contradict each other, and operands that a command does not take."""
    given = {
        field.alias or name
        for name, field in ConditionConfig.model_fields.items()
        if getattr(config, name) is not None
    }
    kinds = [key for key in _KINDS if key in given]
    if len(kinds) != 1:
        raise DefinitionError(f"write one of {', '.join(_KINDS)} in a condition")
    [kind] = kinds
    is_moment = kind == "momentCommand"
    wanted = (
        {"value", "compareTo"} if is_moment else {"value"} if kind == "lodashCommand" else set()
    )
    taken = {*wanted, "compareTo", *({"granularity"} & given if is_moment else ())}
    faults.found += [Fault((key,), "is missing") for key in sorted(wanted - given)]
    for key in sorted(given - set(_KINDS) - (taken if wanted else set())):
        owner = "momentCommand" if key == "granularity" else "lodashCommand or momentCommand"
        faults.found.append(Fault((key,), f"belongs to {owner}, not to {kind}"))
    is_between = config.moment_command == "isBetween"
    if "compareTo" in given and wanted:
        count = len(config.compare_to) if isinstance(config.compare_to, list) else None
        if is_between and count != 2:
            faults.found.append(Fault(("compareTo",), "must be a list of two operands"))
        elif not is_between and count is not None:
            faults.found.append(Fault(("compareTo",), "must be one operand: isBetween takes two"))
    for path, operand in config.operands():
        if operand.type == "now" and not is_moment:
            faults.found.append(Fault((*path, "type"), "now can be compared by momentCommand only"))
        elif operand.type == "now" and waits:
            faults.found.append(Fault((*path, "type"), _NOT_WOKEN))
        elif operand.type == "raw" and is_moment and _instant(operand.value) is None:
            faults.found.append(Fault((*path, "value"), no_date(operand.value)))
        if operand.offset is not None and kind == "lodashCommand":
            faults.found.append(
                Fault((*path, "offset"), f"belongs to momentCommand, not to {kind}")
            )


_NOT_WOKEN = (
    "nothing wakes an enrollment when the time has come: wait for it with a WaitForDate, "
    "or compare with now in a Conditional or a Switch"
)


def _instant(value: object, timezone: str = "UTC") -> datetime | None:
    return parse_date(value.strip(), timezone) if isinstance(value, str) else None


def _compile_moment(config: ConditionConfig) -> Holds:
    readers = [_compile_operand(config, path, operand) for path, operand in config.operands()]
    unit = config.granularity or "millisecond"

    def holds(context: Context) -> bool:
        zone = dates.zone(context.timezone)
        found = [read(context) for read in readers]
        instants = [period(at, unit, zone) for at in found if at is not None]
        if len(instants) < len(found):
            return False  # as moment answers without a date
        value, *others = instants
        if config.moment_command == "isBetween":
            return others[0] < value < others[1]
        return _COMPARISONS[config.moment_command or ""](value, others[0])

    return holds


def _compile_operand(
    config: ConditionConfig, path: KeyPath, operand: ConditionOperand
) -> Callable[[Context], datetime | None]:
    """Compile the time in an operand, moved by its offset; None if it has no value."""
    instant = _compile_instant(config, path, operand)
    if operand.offset is None:
        return instant
    offset = compile_move(operand.offset, (*path, "offset"))

    def moved(context: Context) -> datetime | None:
        found = instant(context)
        return None if found is None else offset(context)(found)

    return moved


def _compile_instant(
    config: ConditionConfig, path: KeyPath, operand: Operand
) -> Callable[[Context], datetime | None]:
    """Compile the time in an operand; None if it has no value."""
    if operand.type == "now":
        return lambda context: context.now
    if operand.type == "raw":
        return lambda context: _instant(operand.value, context.timezone)
    predicate = compile_predicate("isNil", operand, None)

    def read(context: Context) -> datetime | None:
        found, _ = predicate.operands(context.json(predicate.roots))
        value = None if found is None else json.loads(found)
        if value is None:
            return None
        if (instant := _instant(value, context.timezone)) is None:
            where = ".".join(map(str, path))
            message = f"momentCommand {config.moment_command}: {where}: {no_date(value)}"
            raise EvaluationError("bad_data", message)
        return instant

    return read


# --- described


def explain(config: ConditionConfig, context: Context) -> str:
    """Describe a condition with its values, such as "gte(data.score = 10, 50) is false"."""
    holds = compile_condition(config)(context)
    return f"{_with_values(config, context)} is {str(holds).lower()}"


def _with_values(config: ConditionConfig, context: Context) -> str:
    name = config.lodash_command or config.moment_command
    if name is None:
        [kind] = {str(path[0]) for path, _ in config.parts()}
        parts = ", ".join(_with_values(part, context) for _, part in config.parts())
        return f"{kind}({parts})"
    texts = [_operand_with_value(operand, context) for _, operand in config.operands()]
    texts += [config.granularity] if config.granularity else []
    return f"{name}({', '.join(texts)})"


def _operand_with_value(operand: ConditionOperand, context: Context) -> str:
    moved = ""
    if operand.offset is not None:
        moved = _describe_offset(operand.offset.model_dump(by_alias=True))
    if operand.type == "now":
        return f"now = {context.now:%Y-%m-%dT%H:%M:%SZ}{moved}"
    predicate = compile_predicate("isNil", operand, None)
    text, _ = predicate.operands(context.json(predicate.roots))
    text = "missing" if text is None else shown(text)
    return (f"{operand.value} = {text}" if operand.type == "get" else text) + moved


def describe_wait(config: Mapping[str, Any]) -> str:
    """Describe a wait for a condition; empty if there is none."""
    described = describe_condition(config)
    return f"waits until {described} is true" if described else ""


def describe_condition(config: Any) -> str:
    """Describe a condition, such as "gte(data.score, 50)"; empty if there is none."""
    match config:
        case {"lodashCommand": str(command), "value": value} | {
            "momentCommand": str(command),
            "value": value,
        }:
            others = config.get("compareTo", [])
            operands = [value, *(others if isinstance(others, list) else [others])]
            texts = [_describe_operand(operand) for operand in operands]
            texts += [config["granularity"]] if config.get("granularity") else []
            return f"{command}({', '.join(map(str, texts))})"
        case {"all": list(parts)} | {"any": list(parts)}:
            kind = "all" if "all" in config else "any"
            return f"{kind}({', '.join(map(describe_condition, parts))})"
        case {"not": part}:
            return f"not({describe_condition(part)})"
    return ""


def _describe_operand(operand: object) -> str:
    match operand:
        case {"offset": {"amount": int() | float()} as offset, **rest}:
            return _describe_operand(rest) + _describe_offset(offset)
        case {"type": "now"}:
            return "now"
        case {"type": "get", "value": path}:
            return str(path)
        case {"value": value}:
            return json.dumps(value, ensure_ascii=False)
    return "?"


def _describe_offset(offset: Mapping[str, Any]) -> str:
    """Describe an offset, such as " - 30 days"."""
    size = describe_duration({**offset, "amount": abs(offset["amount"])})
    return f" {'-' if offset['amount'] < 0 else '+'} {size}" if size else ""
