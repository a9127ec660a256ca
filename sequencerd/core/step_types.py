"""The built-in steps without a side effect: their configs, and what they do.

Names and keys are the original's. Each `compile` function makes of a config what the step does,
checked once when the definition is read. Raises DefinitionError.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from datetime import datetime, timedelta
from hashlib import sha256
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    Field,
    JsonValue,
    StrictBool,
    StrictFloat,
    StrictInt,
    ValidationError,
)
from pydantic.config import JsonDict

from sequencerd.core.calendar import dates
from sequencerd.core.calendar.next_match import full_name
from sequencerd.core.config import Config, Faults, parse_config
from sequencerd.core.javascript.conditions import (
    COMMANDS,
    Operand,
    Predicate,
    compile_predicate,
    known_command,
)
from sequencerd.core.javascript.templates import compile_template
from sequencerd.core.model import (
    NEVER,
    Action,
    Context,
    DefinitionError,
    EvaluationError,
    Fault,
    Instant,
    Jump,
    KeyPath,
    Stay,
    StepAnswer,
    Update,
)

ON_TIME = timedelta(minutes=1)
"""Who is woken later than this by a WaitForDateComparison has missed the time."""


def _spelled(names: Iterable[str]) -> JsonDict:
    """For the schema: moment's names as its manual spells them, or with capitals anywhere."""
    lower = sorted({name.lower() for name in names if full_name(name.lower())})
    letters = ("".join(f"[{letter}{letter.upper()}]" for letter in name) for name in lower)
    known: list[JsonValue] = [*sorted(names)]
    return {"anyOf": [{"enum": known}, {"pattern": f"^(?:{'|'.join(letters)})$"}]}


def _unit(name: str) -> str:
    dates.normalise_unit(name)
    return name


def _attribute(name: str) -> str:
    dates.bounds(name)
    return name


class GoToConfig(Config):
    """Goes to its next step, or to the named step, of the named sequence; altNext if it refuses."""

    step: str | None = None
    """Where to go; its next step if nothing is said."""
    sequence: str | None = None
    """The sequence that has the step, where it is another one."""


class ConditionConfig(Config):
    """A condition, Boolean(_[lodashCommand](value, compareTo))."""

    lodash_command: Annotated[str, AfterValidator(known_command)] = Field(
        json_schema_extra={"enum": [*sorted(COMMANDS)]}
    )
    """lodash's command, such as eq, gte, isEqual, includes."""
    value: Operand
    """The first operand."""
    compare_to: Operand | None = None
    """The second operand, of those commands that have one."""

    def predicate(self) -> Predicate:
        """The condition, ready to be asked."""
        return compile_predicate(self.lodash_command, self.value, self.compare_to)


class ConditionalConfig(ConditionConfig):
    """Goes to next if the condition holds, else to altNext."""


class GoalConfig(ConditionConfig):
    """Pulls to its next from wherever somebody stands, as soon as the condition holds."""

    repeat: StrictBool = False
    """Pulls again each time that the condition holds after it did not; else once."""


class DurationConfig(Config):
    """An amount of a unit of time."""

    amount: StrictInt | StrictFloat
    """How many."""
    unit: Annotated[str, AfterValidator(_unit)] = Field(json_schema_extra=_spelled(dates.UNITS))
    """Years to milliseconds. Years to days move the wall clock, the others are elapsed time."""


class WaitForDurationConfig(DurationConfig):
    """Waits from its arrival on."""


class WaitForConditionConfig(ConditionConfig):
    """Waits until the condition holds, then next; when the timeout is over, altNext."""

    timeout: DurationConfig | None = None
    """How long, counted from the arrival; without it for ever."""


class SplitConfig(Config):
    """Sends a part of the subjects each way, always the same ones: the weights of the two ways."""

    next: StrictInt | StrictFloat = Field(ge=0, le=1e9)
    """The weight of next."""
    alt_next: StrictInt | StrictFloat = Field(ge=0, le=1e9)
    """The weight of altNext."""


class UpdateDataConfig(Config):
    """Merges into the enrollment's data."""

    data: dict[str, Any] = Field(min_length=1)
    """What is merged; texts are templates."""


class WaitForDateConfig(Config):
    """Waits until a date."""

    date: str
    """An ISO 8601 date, or a template that gives one, such as {{data.due}}."""


class WaitForDateComparisonConfig(Config):
    """Waits until moment's getter gives one of the values."""

    attribute: Annotated[str, AfterValidator(_attribute)] = Field(
        json_schema_extra=_spelled(dates.ATTRIBUTES)
    )
    """The getter, such as hour, day (0 is Sunday), month (0 is January)."""
    values: list[Any] = Field(min_length=1)
    """Whole numbers that it can give."""
    occurrence: Literal["current", "next"] = "current"
    """next: a matching hour, day or other period that begins after the arrival; current: also the
    one in which it arrives."""
    late: Literal["look again", "pass"] = "look again"
    """What follows when it is woken late, after an outage."""


def _go_to(config: Mapping[str, Any]) -> Instant:
    parsed = parse_config(GoToConfig, config)
    if parsed.sequence is not None and parsed.step is None:
        raise DefinitionError([Fault(("sequence",), "needs a step beside it: where to go in it")])
    answer = Action.NEXT if parsed.step is None else Jump(parsed.step, parsed.sequence)
    return Instant(lambda _: answer)


def _conditional(config: Mapping[str, Any]) -> Instant:
    holds = _holds(parse_config(ConditionalConfig, config))
    return Instant(lambda context: Action.NEXT if holds(context) else Action.ALT_NEXT)


def _holds(config: ConditionConfig) -> Callable[[Context], bool]:
    predicate = config.predicate()
    return lambda context: predicate(context.json(predicate.roots))


def _goal(config: Mapping[str, Any]) -> Instant:
    parsed = parse_config(GoalConfig, config)
    is_met = _holds(parsed)
    return Instant(
        lambda context: Action.NEXT if is_met(context) else Stay(NEVER),
        met=is_met,
        repeats=parsed.repeat,
    )


def _wait_for_duration(config: Mapping[str, Any]) -> Instant:
    end = _end_of(parse_config(WaitForDurationConfig, config))

    def answer(context: Context) -> StepAnswer:
        until = end(context)
        return Action.NEXT if until <= context.now else Stay(until)

    return Instant(answer)


def _end_of(duration: DurationConfig) -> Callable[[Context], datetime]:
    """When a duration that began with the arrival at the step is over."""
    unit = dates.normalise_unit(duration.unit)
    return lambda context: dates.add(
        context.entered_at, duration.amount, unit, dates.zone(context.timezone)
    )


def _wait_for_condition(config: Mapping[str, Any]) -> Instant:
    parsed = parse_config(WaitForConditionConfig, config)
    holds = _holds(parsed)
    end = _end_of(parsed.timeout) if parsed.timeout else lambda _: NEVER

    def answer(context: Context) -> StepAnswer:
        if holds(context):
            return Action.NEXT
        until = end(context)
        return Action.ALT_NEXT if until <= context.now else Stay(until)

    return Instant(answer)


def _split(config: Mapping[str, Any]) -> Instant:
    parsed = parse_config(SplitConfig, config)
    if not parsed.next + parsed.alt_next:
        raise DefinitionError("next and altNext are weights, of which one must be above 0")
    share = parsed.next / (parsed.next + parsed.alt_next)

    def answer(context: Context) -> StepAnswer:
        # the same for a subject whenever it comes by, and independent of the other splits
        here = context.enrollment
        seed = context.seed or f"{here.sequence}/{here.step}"
        key = f"{seed}\0{here.subject}".encode("utf-8", "replace")
        point = int.from_bytes(sha256(key).digest()[:6]) / 2**48
        return Action.NEXT if point < share else Action.ALT_NEXT

    return Instant(answer)


def _update_data(config: Mapping[str, Any]) -> Instant:
    faults = Faults()
    render = _compile_value(("data",), parse_config(UpdateDataConfig, config).data, faults)
    faults.check()
    return Instant(lambda context: Update(render(context)))


def _compile_value(path: KeyPath, value: Any, faults: Faults) -> Callable[[Context], Any]:
    """What gives a JSON value with the templates in it rendered."""
    match value:
        case str():
            with faults.at(*path):
                return _rendered(path, value)
        case dict():
            inner = {key: _compile_value((*path, key), item, faults) for key, item in value.items()}
            return lambda context: {key: render(context) for key, render in inner.items()}
        case list():
            items = [_compile_value((*path, n), item, faults) for n, item in enumerate(value)]
            return lambda context: [render(context) for render in items]
    return lambda _: value


def _rendered(path: KeyPath, source: str) -> Callable[[Context], str]:
    """What renders a template. Raises DefinitionError."""
    template = compile_template(source, escape=False)
    if template.is_literal:
        return lambda _: source

    def render(context: Context) -> str:
        try:
            return template.render(context.json(template.roots))
        except EvaluationError as error:
            message = f"{'.'.join(map(str, path))}: {error}"
            raise EvaluationError(error.failure, message) from error

    return render


def _wait_for_date(config: Mapping[str, Any]) -> Instant:
    date = _compile_date("date", parse_config(WaitForDateConfig, config).date)

    def answer(context: Context) -> StepAnswer:
        until = date(context)
        return Action.NEXT if until <= context.now else Stay(until)

    return Instant(answer)


def _compile_date(key: str, source: str) -> Callable[[Context], datetime]:
    """What reads the date of a template, in the enrollment's zone. Raises DefinitionError."""
    faults = Faults()
    with faults.at(key):
        if "{{" not in source and dates.parse(source, dates.zone("UTC")) is None:
            raise DefinitionError(_no_date(source))
        render = _rendered((key,), source)
    faults.check()

    def date(context: Context) -> datetime:
        text = render(context)
        found = dates.parse(text.strip(), dates.zone(context.timezone))
        if found is None:
            raise EvaluationError("bad_data", f"{key} {_no_date(text)}")
        return found

    return date


def compile_expiry(expires: str | DurationConfig) -> Callable[[Context], datetime]:
    """When a side effect is too late: a date, or a duration from the arrival. DefinitionError."""
    if isinstance(expires, str):
        return _compile_date("expires", expires)
    return _end_of(expires)


def _no_date(text: str) -> str:
    shown = text if len(text) <= 100 else f"{text[:100]}..."
    return f"{shown!r} is not an ISO 8601 date such as 2018-06-08T17:49:31+00:00"


def _wait_for_date_comparison(config: Mapping[str, Any]) -> Instant:
    parsed = parse_config(WaitForDateComparisonConfig, config)
    attribute = parsed.attribute
    values = parsed.values
    lowest, highest = dates.bounds(attribute)
    hint = f"write whole numbers, {lowest} to {highest}"
    if never := [
        Fault(("values", n), f"{attribute} is never {value!r}: {hint}")
        for n, value in enumerate(values)
        if dates.impossible(attribute, [value])
    ]:
        raise DefinitionError(never)

    def answer(context: Context) -> StepAnswer:
        # From the arrival on, so that a change elsewhere can't make it miss its time; but a time
        # that was missed by more than a little counts only where the config says so.
        zone = dates.zone(context.timezone)
        since: datetime | None = context.entered_at
        if parsed.occurrence == "next":
            since = dates.next_start(context.entered_at, attribute, values, zone)
        if since is not None and parsed.late == "look again":
            since = max(since, context.now - ON_TIME)
        until = since and dates.next_match(since, attribute, values, zone)
        if until is None:
            raise EvaluationError(
                "unsatisfiable", f"{attribute} will not be any of {values} within ten years"
            )
        return Action.NEXT if until <= context.now else Stay(until)

    return Instant(answer)


CONFIGS: Mapping[str, type[Config]] = {
    "GoTo": GoToConfig,
    "Conditional": ConditionalConfig,
    "Goal": GoalConfig,
    "WaitForDate": WaitForDateConfig,
    "WaitForDuration": WaitForDurationConfig,
    "WaitForDateComparison": WaitForDateComparisonConfig,
    "WaitForCondition": WaitForConditionConfig,
    "Split": SplitConfig,
    "UpdateData": UpdateDataConfig,
}
"""The models of the configs, by type."""

COMPILERS: Mapping[str, Callable[[Mapping[str, Any]], Instant]] = {
    "GoTo": _go_to,
    "Conditional": _conditional,
    "Goal": _goal,
    "WaitForDate": _wait_for_date,
    "WaitForDuration": _wait_for_duration,
    "WaitForDateComparison": _wait_for_date_comparison,
    "WaitForCondition": _wait_for_condition,
    "Split": _split,
    "UpdateData": _update_data,
}


def compile_step(type_: str, config: Mapping[str, Any]) -> Instant:
    """What a built-in step of this type does. Raises DefinitionError."""
    return COMPILERS[type_](config)


def condition_of(type_: str, config: Mapping[str, Any]) -> ConditionConfig | None:
    """Return the condition in the config of a step, of those types that have one. ValidationError
    where it is wrong, whatever else is.
    """
    if not issubclass(CONFIGS.get(type_, Config), ConditionConfig):
        return None
    keys = ("lodashCommand", "value", "compareTo")
    return ConditionConfig.model_validate({key: config[key] for key in keys if key in config})


TEMPLATED = ("Email", "SMS", "UpdateData", "WaitForDate")
"""The types in whose configs every text is a template."""


def roots(type_: str, config: Mapping[str, Any]) -> frozenset[str] | None:
    """The first keys of what a built-in step, or a message, reads of the view; None for all of it.

    Of a config with errors it is what can be told.
    """
    found: set[str] = set()
    with suppress(DefinitionError, ValidationError):
        if condition := condition_of(type_, config):
            found |= condition.predicate().roots
    try:
        for _, source in texts((), config if type_ in TEMPLATED else {}):
            with suppress(DefinitionError):
                read = compile_template(source, escape=False).roots
                if read is None:
                    return None
                found |= read
    except RecursionError:
        return None
    return frozenset(found)


def texts(path: KeyPath, value: object) -> Iterator[tuple[KeyPath, str]]:
    """All texts in a config, with their places."""
    match value:
        case str():
            yield path, value
        case dict():
            for key, item in value.items():
                yield from texts((*path, key), item)
        case list():
            for number, item in enumerate(value):
                yield from texts((*path, number), item)
