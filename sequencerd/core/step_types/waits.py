"""Steps that wait for a time or a condition."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, JsonValue, StrictFloat, StrictInt
from pydantic.config import JsonDict

from sequencerd.core.calendar import dates
from sequencerd.core.calendar.next_match import full_name
from sequencerd.core.config import Config
from sequencerd.core.javascript.templates import compile_template
from sequencerd.core.model import (
    ALT_NEXT,
    NEVER,
    NEXT,
    Action,
    Context,
    DefinitionError,
    EvaluationError,
    Exit,
    Fault,
    Instant,
    Stay,
    StepAnswer,
)
from sequencerd.core.step_types.conditions import (
    ConditionConfig,
    compile_condition,
    describe_wait,
)
from sequencerd.core.step_types.record import StepType
from sequencerd.core.step_types.templates import compile_date

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


# --- durations


class DurationConfig(Config):
    """An amount of a unit of time."""

    amount: StrictInt | StrictFloat
    """How many."""
    unit: Annotated[str, AfterValidator(_unit)] = Field(json_schema_extra=_spelled(dates.UNITS))
    """Years to milliseconds. Years to days move the wall clock, the others are elapsed time."""


def compile_duration(duration: DurationConfig) -> Callable[[Context], datetime]:
    """Compile the end of a duration that begins with the arrival at the step."""
    unit = dates.normalise_unit(duration.unit)
    return lambda context: dates.add(
        context.entered_at, duration.amount, unit, dates.zone(context.timezone)
    )


def _after(duration: DurationConfig, exit_: Exit) -> Exit:
    """An exit that is taken when a duration is over."""
    arrival = datetime(2026, 1, 1, tzinfo=UTC)
    unit = dates.normalise_unit(duration.unit)
    try:
        end = dates.add(arrival, duration.amount, unit, dates.zone("UTC"))
    except (DefinitionError, EvaluationError):
        return exit_._replace(at_once="never")
    return exit_._replace(at_once="never" if end > arrival else "always")


class WaitForDurationConfig(DurationConfig):
    """Waits from its arrival on."""


def _wait_for_duration(config: WaitForDurationConfig) -> Instant:
    return Instant(_wait_until(compile_duration(config)), (_after(config, NEXT),))


def _wait_until(end: Callable[[Context], datetime]) -> Callable[[Context], StepAnswer]:
    def answer(context: Context) -> StepAnswer:
        until = end(context)
        return Action.NEXT if until <= context.now else Stay(until)

    return answer


def _describe_duration(config: Mapping[str, Any]) -> str:
    match config:
        case {"amount": amount, "unit": unit}:
            return f"waits for {amount} {unit}"
    return ""


# --- conditions


class WaitForConditionConfig(ConditionConfig):
    """Waits until the condition holds, then next; when the timeout is over, altNext."""

    timeout: DurationConfig | None = None
    """How long, counted from the arrival; without it for ever."""


def _wait_for_condition(config: WaitForConditionConfig) -> Instant:
    holds = compile_condition(config)
    end = compile_duration(config.timeout) if config.timeout else lambda _: NEVER

    def answer(context: Context) -> StepAnswer:
        if holds(context):
            return Action.NEXT
        until = end(context)
        return Action.ALT_NEXT if until <= context.now else Stay(until)

    exits = [NEXT._replace(condition=config, at_once="sometimes", reason="where it holds")]
    if config.timeout is not None:
        exits.append(_after(config.timeout, ALT_NEXT))
    return Instant(answer, tuple(exits))


def _describe_condition(config: Mapping[str, Any]) -> str:
    described = describe_wait(config)
    match config.get("timeout"):
        case {"amount": amount, "unit": unit} if described:
            return f"{described}, at most {amount} {unit}"
    return described


# --- dates


class WaitForDateConfig(Config):
    """Waits until a date."""

    date: str
    """An ISO 8601 date, or a template that gives one, such as {{data.due}}."""


def _wait_for_date(config: WaitForDateConfig) -> Instant:
    exit_ = NEXT
    if not compile_template(config.date, escape=False).is_literal:
        exit_ = NEXT._replace(at_once="sometimes", reason="where its date is past")
    # a date that is written out is past whenever an enrollment comes back
    return Instant(_wait_until(compile_date("date", config.date)), (exit_,))


def _describe_date(config: Mapping[str, Any]) -> str:
    return f"waits for the date {config['date']}" if "date" in config else ""


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


def _wait_for_date_comparison(config: WaitForDateComparisonConfig) -> Instant:
    attribute = config.attribute
    values = config.values
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
        if config.occurrence == "next":
            since = dates.next_start(context.entered_at, attribute, values, zone)
        if since is not None and config.late == "look again":
            since = max(since, context.now - ON_TIME)
        until = since and dates.next_match(since, attribute, values, zone)
        if until is None:
            raise EvaluationError(
                "unsatisfiable", f"{attribute} will not be any of {values} within ten years"
            )
        return Action.NEXT if until <= context.now else Stay(until)

    return Instant(answer, (_comparing(config),))


def _comparing(config: WaitForDateComparisonConfig) -> Exit:
    """The exit, and at which times it is taken at once."""
    if config.occurrence == "next":
        return NEXT._replace(at_once="never")
    name = full_name(config.attribute) or config.attribute
    lowest, highest = dates.bounds(name)
    values = frozenset(int(value) for value in config.values)
    if len(values) > highest - lowest:
        return NEXT
    if name in ("weekday", "isoWeekday"):
        name, values = "day", frozenset(value % 7 for value in values)
    reason = 'where it matches already (write "occurrence: next")'
    return NEXT._replace(at_once="sometimes", reason=reason, getter=(name, values))


def _describe_comparison(config: Mapping[str, Any]) -> str:
    match config:
        case {"attribute": attribute, "values": list(values)}:
            wanted = f"{attribute} to be {' or '.join(map(str, values))}"
            is_next = config.get("occurrence") == "next"
            return f"waits for the {wanted}" + (" the next time" if is_next else "")
    return ""


TYPES = (
    StepType(
        name="WaitForDuration",
        config=WaitForDurationConfig,
        compile=_wait_for_duration,
        describe=_describe_duration,
    ),
    StepType(
        name="WaitForDate",
        config=WaitForDateConfig,
        compile=_wait_for_date,
        describe=_describe_date,
        templates=("date",),
    ),
    StepType(
        name="WaitForDateComparison",
        config=WaitForDateComparisonConfig,
        compile=_wait_for_date_comparison,
        describe=_describe_comparison,
    ),
    StepType(
        name="WaitForCondition",
        config=WaitForConditionConfig,
        compile=_wait_for_condition,
        describe=_describe_condition,
        never_alt="never taken without a timeout: write one into the config, or leave altNext out",
        conditions=((),),
    ),
)
