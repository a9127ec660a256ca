"""Steps that wait for a time or a condition."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, time, timedelta
from functools import lru_cache
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from sequencerd.core.calendar import dates, windows
from sequencerd.core.calendar.anniversaries import next_anniversary
from sequencerd.core.calendar.business_days import BUSINESS_DAYS
from sequencerd.core.calendar.next_match import full_name
from sequencerd.core.config import Config, Faults
from sequencerd.core.enrollment import NEVER, effect_key
from sequencerd.core.faults import DefinitionError, EvaluationError
from sequencerd.core.model import ALT_NEXT, NEXT, Action, Exit, InstantStep, Stay, StepAnswer
from sequencerd.core.step_types.condition_config import (
    ConditionConfig,
    compile_condition,
    describe_wait,
)
from sequencerd.core.step_types.durations import (
    DurationConfig,
    calendars_of,
    compile_duration,
    compile_move,
    describe_duration,
    spelled,
)
from sequencerd.core.step_types.in_a_row import in_a_row
from sequencerd.core.step_types.record import StepType
from sequencerd.core.step_types.template_config import (
    MissingDateError,
    compile_date,
    compile_number,
    compile_text,
    literal,
    shown,
)
from sequencerd.core.view import Context
from sequencerd.core.window_config import WindowConfig, describe_window, parse_clock

ON_TIME = timedelta(minutes=1)
"""An enrollment that a WaitForDateComparison wakes later than this has missed the time."""

MAX_DELAY_OF_DATES = timedelta(days=1)
"""A date that has been over for longer than this, after an outage or a change of data, is past."""


def _attribute(name: str) -> str:
    dates.bounds(name)
    return name


# --- durations


def _after(duration: DurationConfig, exit_: Exit) -> Exit:
    """Return an exit that is taken when a duration is over."""
    if isinstance(duration.amount, str):
        return exit_._replace(at_once="sometimes", reason="if its amount is 0 or less")
    if isinstance(duration.amount, int) and duration.amount > 0:
        return _taken(exit_, "never")
    if duration.unit in BUSINESS_DAYS:
        return exit_._replace(at_once="never" if duration.amount > 0 else "always")
    arrival = datetime(2026, 1, 1, tzinfo=UTC)
    unit = dates.normalise_unit(duration.unit)
    try:
        end = dates.add(arrival, duration.amount, unit, dates.zone("UTC"))
    except (DefinitionError, EvaluationError):
        return _taken(exit_, "never")
    return _taken(exit_, "never" if end > arrival else "always")


@lru_cache(maxsize=16)  # equal exits of all waits are stored once
def _taken(exit_: Exit, at_once: Literal["always", "never"]) -> Exit:
    return exit_._replace(at_once=at_once)


class WaitForDurationConfig(DurationConfig):
    """Waits for a duration, counted from the arrival at the step."""


def _wait_for_duration(config: WaitForDurationConfig) -> InstantStep:
    return InstantStep(_WaitUntil(compile_duration(config)), (_after(config, NEXT),))


@dataclass(frozen=True, slots=True)
class _WaitUntil:
    """The answer of a step that waits until a time: as an object, which is smaller than a function
    within another.
    """

    end: Callable[[Context], datetime]

    def __call__(self, context: Context) -> StepAnswer:
        until = self.end(context)
        return Action.NEXT if until <= context.now else Stay(until)


def _describe_duration(config: Mapping[str, Any]) -> str:
    described = describe_duration(config)
    return f"waits for {described}" if described else ""


# --- conditions


class WaitForConditionConfig(ConditionConfig):
    """Waits until the condition is true, then goes to next; after the timeout, to altNext."""

    timeout: DurationConfig | None = None
    """The longest wait, counted from the arrival. Default: unlimited."""


def _wait_for_condition(config: WaitForConditionConfig) -> InstantStep:
    holds = compile_condition(config, waits=True)
    end = compile_duration(config.timeout, ("timeout",)) if config.timeout else lambda _: NEVER

    def answer(context: Context) -> StepAnswer:
        if holds(context):
            return Action.NEXT
        until = end(context)
        return Action.ALT_NEXT if until <= context.now else Stay(until)

    exits = [
        NEXT._replace(condition=config, at_once="sometimes", reason="if its condition is true")
    ]
    if config.timeout is not None:
        exits.append(_after(config.timeout, ALT_NEXT))
    return InstantStep(answer, tuple(exits))


def _describe_condition(config: Mapping[str, Any]) -> str:
    described = describe_wait(config)
    most = describe_duration(config.get("timeout") or {})
    return f"{described}, at most {most}" if described and most else described


# --- dates


def _clock(text: str) -> str:
    if "{{" not in text:
        parse_clock(text)
    return text


class WaitForDateConfig(Config):
    """Waits until a date, or until a time before or after it."""

    date: str
    """An ISO 8601 date, or a template that renders one, such as {{data.due}}."""
    format: Literal["X", "x"] | None = None
    """X: the date is a Unix time in seconds; x: in milliseconds."""
    every: Literal["year", "month"] | None = None
    """year: wait for the next anniversary of the date, such as a birthday; month: for the same day
    of the next month. In a month without that day, it is the last one."""
    offset: DurationConfig | None = None
    """Time to add to the date, such as {amount: -3, unit: days} for three days before it."""
    at: Annotated[str, AfterValidator(_clock)] | None = None
    """The time of that day, such as 09:00, in the enrollment's time zone."""
    past: Literal["next", "altNext"] = "next"
    """The exit if the time has already passed on arrival, or passed more than a day ago. With
    every, altNext is taken if the time of the next anniversary has passed; next waits for the
    anniversary after it."""
    missing: Literal["fail", "altNext"] = "fail"
    """What happens if the date is empty: the enrollment fails, or continues at altNext."""


def _wait_for_date(config: WaitForDateConfig) -> InstantStep:
    end = _compile_end(config)

    def answer(context: Context) -> StepAnswer:
        try:
            until = end(context)
        except MissingDateError:
            if config.missing == "altNext":
                return Action.ALT_NEXT
            raise
        if until > context.now:
            return Stay(until)
        is_past = until <= context.entered_at or until < context.now - MAX_DELAY_OF_DATES
        return Action.ALT_NEXT if is_past and config.past == "altNext" else Action.NEXT

    exits = [NEXT]  # a date that is written out is past whenever an enrollment comes back
    if config.every is not None:
        exits = [NEXT._replace(at_once="never")]
    elif any(map(_is_template, (config.date, config.at, config.offset and config.offset.amount))):
        exits = [NEXT._replace(at_once="sometimes", reason="if its date is past")]
    if config.past == "altNext" or config.missing == "altNext":
        where = "past" if config.past == "altNext" else "missing"
        exits.append(ALT_NEXT._replace(at_once="sometimes", reason=f"if its date is {where}"))
    return InstantStep(answer, tuple(exits))


def _compile_end(config: WaitForDateConfig) -> Callable[[Context], datetime]:
    """Compile the time that a WaitForDate waits for. Raises DefinitionError."""
    faults = Faults()
    with faults.at():
        date = compile_date("date", config.date, config.format)
    with faults.at():
        offset = compile_move(config.offset, ("offset",)) if config.offset else None
    with faults.at("at"):
        clock = _compile_clock(config.at) if config.at is not None else None
    faults.check()

    def end(context: Context) -> datetime:
        first = date(context)
        tz = dates.zone(context.timezone)
        move = offset(context) if offset else None
        time_of_day = clock(context) if clock else None

        def moved(instant: datetime) -> datetime:
            instant = move(instant) if move else instant
            return dates.at_clock(instant, time_of_day, tz) if time_of_day else instant

        if config.every is None:
            return moved(first)
        months = 12 if config.every == "year" else 1
        if config.past == "next":
            since = max(context.entered_at, context.now - MAX_DELAY_OF_DATES)
            return next_anniversary(first, since, tz, moved, months=months)
        # the time before an anniversary that is yet to come may have passed already
        coming = moved(next_anniversary(first, context.entered_at, tz, months=months))
        return min(coming, next_anniversary(first, context.entered_at, tz, moved, months=months))

    return end


def _compile_clock(source: str) -> Callable[[Context], time]:
    render = compile_text(("at",), source)

    def clock(context: Context) -> time:
        text = render(context).strip()
        try:
            return parse_clock(text)
        except ValueError as error:
            raise EvaluationError("bad_data", f"at: {shown(text)!r} {error}") from error

    return clock


def _describe_date(config: Mapping[str, Any]) -> str:
    if "date" not in config:
        return ""
    what = f"the date {config['date']}"
    if every := config.get("every"):
        monthly = "monthly " if every == "month" else ""
        what = f"the next {monthly}anniversary of {config['date']}"
    match config.get("offset"):
        case {"amount": int() | float() as amount}:
            size = describe_duration({**config["offset"], "amount": abs(amount)})
            what = f"{size} {'before' if amount < 0 else 'after'} {what}"
        case dict() as offset:
            what = f"{describe_duration(offset)} from {what}"
    at = config.get("at")
    return f"waits for {what}" + (f" at {at}" if at else "")


class WaitForDateComparisonConfig(Config):
    """Waits until an attribute of the local time, such as the hour, has one of the values."""

    attribute: Annotated[str, AfterValidator(_attribute)] = Field(
        json_schema_extra=spelled(dates.ATTRIBUTES)
    )
    """A getter of moment, such as hour, day (0 is Sunday) or month (0 is January)."""
    values: list[Any] = Field(min_length=1)
    """Whole numbers, or templates that render them, such as {{data.hour}}."""
    occurrence: Literal["current", "next"] = "current"
    """next: a matching hour, day or other period that begins after the arrival; current: also the
    period during which the enrollment arrives."""
    late: Literal["look again", "pass"] = "look again"
    """What happens if the enrollment wakes late, for example after an outage."""


def _wait_for_date_comparison(config: WaitForDateComparisonConfig) -> InstantStep:
    attribute = config.attribute
    lowest, highest = dates.bounds(attribute)
    hint = f"write whole numbers, {lowest} to {highest}"
    faults = Faults()
    wanted: list[Callable[[Context], object]] = []
    for number, value in enumerate(config.values):
        with faults.at("values", number):
            if _is_template(value):
                wanted.append(compile_number(("values", number), value))
            elif dates.impossible(attribute, [value]):
                raise DefinitionError(f"{attribute} is never {literal(value)}: {hint}")
            else:
                wanted.append(_constant(value))
    faults.check()

    def answer(context: Context) -> StepAnswer:
        # From the arrival on, so that a change elsewhere cannot make it miss its time; but a time
        # that was missed by more than a little counts only where the config says so.
        zone = dates.zone(context.timezone)
        values = [value(context) for value in wanted]
        if never := dates.impossible(attribute, values):
            raise EvaluationError(
                "bad_data", f"values: {attribute} is never {literal(never[0])}: {hint}"
            )
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

    return InstantStep(answer, (_comparing(config),))


def _is_template(value: object) -> bool:
    return isinstance(value, str) and "{{" in value


def _constant(value: object) -> Callable[[Context], object]:
    return lambda _: value


def _comparing(config: WaitForDateComparisonConfig) -> Exit:
    """Return the exit, and the times at which it is taken at once."""
    if config.occurrence == "next":
        return NEXT._replace(at_once="never")
    reason = 'if it matches already (write "occurrence: next")'
    if any(map(_is_template, config.values)):
        return NEXT._replace(at_once="sometimes", reason=reason)
    name = full_name(config.attribute) or config.attribute
    lowest, highest = dates.bounds(name)
    values = frozenset(int(value) for value in config.values)
    if len(values) > highest - lowest:
        return NEXT
    if name in ("weekday", "isoWeekday"):
        name, values = "day", frozenset(value % 7 for value in values)
    return NEXT._replace(at_once="sometimes", reason=reason, getter=(name, values))


def _describe_comparison(config: Mapping[str, Any]) -> str:
    match config:
        case {"attribute": attribute, "values": list(values)}:
            wanted = f"{attribute} to be {' or '.join(map(str, values))}"
            is_next = config.get("occurrence") == "next"
            return f"waits for the {wanted}" + (" the next time" if is_next else "")
    return ""


# --- windows


class WaitForWindowConfig(WindowConfig):
    """Waits until a window is open."""


def _wait_for_window(config: WaitForWindowConfig) -> InstantStep:
    window = config.window()

    def begin(context: Context) -> datetime:
        return windows.begin(
            window,
            context.now,
            dates.zone(context.timezone),
            context.holidays(window.holidays),
            since=context.entered_at,
            share=lambda: context.share(
                effect_key(context.enrollment.sequence, context.enrollment.step)
            ),
        )

    exit_ = NEXT._replace(at_once="sometimes", reason="if the window is open")
    return InstantStep(_WaitUntil(begin), (exit_,))


def _describe_window(config: Mapping[str, Any]) -> str:
    described = describe_window(config)
    return f"waits for the window ({described})" if described else ""


TYPES = (
    StepType(
        name="WaitForDuration",
        config=WaitForDurationConfig,
        compile=_wait_for_duration,
        describe=_describe_duration,
        templates=("amount",),
        calendars=calendars_of(()),
    ),
    StepType(
        name="WaitForDate",
        config=WaitForDateConfig,
        compile=_wait_for_date,
        describe=_describe_date,
        templates=("date", "offset", "at"),
        calendars=calendars_of(("offset",)),
        never_alt=(
            'never taken: write "past: altNext" or "missing: altNext" into the config, or leave '
            "altNext out"
        ),
    ),
    StepType(
        name="WaitForDateComparison",
        config=WaitForDateComparisonConfig,
        compile=_wait_for_date_comparison,
        describe=_describe_comparison,
        templates=("values",),
        in_a_row=in_a_row,
    ),
    StepType(
        name="WaitForCondition",
        config=WaitForConditionConfig,
        compile=_wait_for_condition,
        describe=_describe_condition,
        never_alt="never taken without a timeout: write one into the config, or leave altNext out",
        conditions=((),),
        templates=("timeout",),
        calendars=calendars_of(("timeout",)),
    ),
    StepType(
        name="WaitForWindow",
        config=WaitForWindowConfig,
        compile=_wait_for_window,
        describe=_describe_window,
        calendars=(("holidays",),),
    ),
)
