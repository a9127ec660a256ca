"""Amounts of time in the configs of steps: years to milliseconds, and business days."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from sys import intern
from typing import Annotated, Any, Self

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    JsonValue,
    StrictFloat,
    StrictInt,
    WithJsonSchema,
    model_validator,
)
from pydantic.config import JsonDict

from sequencerd.core.calendar import dates
from sequencerd.core.calendar.business_days import BUSINESS_DAYS, MAX_AMOUNT, add_business_days
from sequencerd.core.calendar.next_match import full_name
from sequencerd.core.calendar.windows import open_for
from sequencerd.core.config import Config, Faults
from sequencerd.core.faults import DefinitionError, EvaluationError, KeyPath
from sequencerd.core.model import Window
from sequencerd.core.step_types.template_config import TemplateText, compile_number
from sequencerd.core.view import Context
from sequencerd.core.window_config import CalendarName, WindowConfig, describe_window

MAX_PERIOD = timedelta(days=366)


def spelled(names: Iterable[str], others: Iterable[str] = ()) -> JsonDict:
    """Return the schema of moment's names, as its manual spells them or with any capitals."""
    lower = sorted({name.lower() for name in names if full_name(name.lower())})
    letters = ("".join(f"[{letter}{letter.upper()}]" for letter in name) for name in lower)
    known: list[JsonValue] = [*sorted(names), *sorted(others)]
    return {"anyOf": [{"enum": known}, {"pattern": f"^(?:{'|'.join(letters)})$"}]}


_BUSINESS_DAYS = re.compile(r"(business|work|working|week)[ _-]?days?", re.IGNORECASE)
"""What others call business days, which must not be taken for days or weeks."""


def _unit(name: str) -> str:
    if name not in BUSINESS_DAYS:
        if _BUSINESS_DAYS.fullmatch(name):
            raise ValueError(f"{name!r} is not a unit of time, did you mean 'business days'?")
        dates.normalise_unit(name)
    return name


class DurationConfig(Config):
    """An amount of a unit of time."""

    amount: StrictInt | StrictFloat | TemplateText
    """A number, or a template that renders one, such as {{data.days}}."""
    unit: Annotated[str, AfterValidator(_unit)] = Field(
        json_schema_extra=spelled(dates.UNITS, BUSINESS_DAYS)
    )
    """Years to milliseconds, or business days. Days and longer units are calendar time, the others
    are elapsed time."""
    holidays: CalendarName | None = None
    """For business days: the calendar of sequencer.holidays to skip, such as DE."""
    within: WindowConfig | None = None
    """For hours and shorter units: the window in which time counts, such as working hours."""

    @property
    def calendar(self) -> str | None:
        """The calendar of holidays that it needs."""
        return self.holidays if self.within is None else self.within.holidays

    @model_validator(mode="before")
    @classmethod
    def _is_not_short(cls, value: Any) -> Any:
        if isinstance(value, dict) and not value.keys() & {"amount", "unit"}:
            match [key for key in value if key in BUSINESS_DAYS or full_name(str(key))]:
                case [unit]:
                    raise ValueError(f"write {{amount: {value[unit]}, unit: {unit}}}")
                case [_, *_]:
                    raise ValueError(
                        "takes one unit: write for example {amount: 90, unit: minutes}"
                    )
        return value

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.within is not None:
            if self.unit in BUSINESS_DAYS or not dates.is_elapsed(self.unit):
                raise ValueError("within is for hours and shorter units")
            if self.within.spread is not None:
                raise ValueError("within has no spread")
            if not isinstance(self.amount, str) and self.amount <= 0:
                raise ValueError("amount must be more than 0 with within")
        if self.unit not in BUSINESS_DAYS:
            if self.holidays is not None:
                raise ValueError("holidays are for the unit business days")
        elif not isinstance(self.amount, str) and (
            self.amount != int(self.amount) or abs(self.amount) > MAX_AMOUNT
        ):
            raise ValueError(f"amount must be a whole number of days, at most {MAX_AMOUNT:,}")
        return self


def calendars_of(path: tuple[str, ...]) -> tuple[tuple[str, ...], ...]:
    """Return the paths of the calendars that the duration at a path of a config may name."""
    return ((*path, "holidays"), (*path, "within", "holidays"))


MoveTime = Callable[[datetime], datetime]


@dataclass(frozen=True, slots=True)
class _CompiledDuration:
    """A compiled duration: there may be one for each step, and nested functions, or the config,
    would take several times as much memory.
    """

    amount: Callable[[Context], float] | float
    name: str  # of its unit, as in the config
    unit: str  # the full name; "" for business days
    calendar: str | None
    window: Window | None  # in which time counts
    path: KeyPath

    def bind(self, context: Context) -> MoveTime:
        """Return the function that moves instants of an enrollment by the duration."""
        tz = dates.zone(context.timezone)
        number = self.amount(context) if callable(self.amount) else self.amount
        off = context.holidays(self.calendar)
        unit, window = self.unit, self.window

        def move(instant: datetime) -> datetime:
            try:
                if not unit:
                    return add_business_days(instant, number, tz, off)
                moved = dates.add(instant, number, unit, tz)
                if window is None:
                    return moved
                if moved < instant:
                    raise EvaluationError("bad_data", "must not be negative with within")
                return open_for(window, moved - instant, instant, tz, off)
            except EvaluationError as error:
                where = ".".join(map(str, (*self.path, "amount")))
                message = f"{where} {number:g} {self.name}: {error}"
                raise EvaluationError(error.failure, message) from error

        return move

    def end(self, context: Context) -> datetime:
        """Return the end of the duration if it begins with the arrival at the step."""
        return self.bind(context)(context.entered_at)


def _compile(duration: DurationConfig, path: KeyPath) -> _CompiledDuration:
    amount: Callable[[Context], float] | float | str = duration.amount
    if isinstance(amount, str):
        faults = Faults()
        with faults.at(*path, "amount"):
            amount = compile_number((*path, "amount"), amount)
        faults.check()
        assert not isinstance(amount, str)
    name = intern(duration.unit)
    unit = "" if name in BUSINESS_DAYS else dates.normalise_unit(name)
    window = None if duration.within is None else duration.within.window()
    return _CompiledDuration(amount, name, unit, duration.calendar, window, path)


def compile_move(duration: DurationConfig, path: KeyPath = ()) -> Callable[[Context], MoveTime]:
    """Compile how far instants are moved by a duration; errors name its path. DefinitionError."""
    return _compile(duration, path).bind


def compile_duration(duration: DurationConfig, path: KeyPath = ()) -> Callable[[Context], datetime]:
    """Compile the end of a duration that begins with the arrival at the step."""
    return _compile(duration, path).end


def spelled_out(value: object) -> object:
    """Return {minutes: 10}, which is short for {amount: 10, unit: minutes}, in full."""
    if isinstance(value, dict) and len(value) == 1 and not value.keys() & {"amount", "unit"}:
        [(unit, amount)] = value.items()
        return {"amount": amount, "unit": unit}
    return value


def in_words(amount: object, unit: str) -> str:
    """Return "1 day", "3 days" or "{{data.n}} days"; a unit that is unknown as it is."""
    try:
        one = "business day" if unit in BUSINESS_DAYS else dates.normalise_unit(unit)
    except DefinitionError:
        return f"{amount} {unit}"
    number = f"{amount:g}" if isinstance(amount, float) else str(amount)
    return f"{number} {one}" if number == "1" else f"{number} {one}s"


def describe_duration(config: Mapping[str, Any]) -> str:
    """Return "3 days", or "4 hours within mon to fri, 09:00 to 17:00"; empty without an amount and
    a unit.
    """
    match config:
        case {"amount": amount, "unit": str() as unit}:
            window = config.get("within")
            within = describe_window(window) if isinstance(window, dict) else ""
            return in_words(amount, unit) + (f" within {within}" if within else "")
    return ""


class FixedOffset(DurationConfig):
    """How far an instant is moved: a fixed amount of a unit of time."""

    amount: StrictInt | StrictFloat
    """How many; negative for earlier."""


class FixedDuration(DurationConfig):
    """A fixed amount of a unit of time."""

    amount: StrictInt | StrictFloat = Field(gt=0)
    """How many."""


Duration = Annotated[
    FixedDuration,
    BeforeValidator(spelled_out),
    WithJsonSchema(
        {
            "anyOf": [
                {
                    "type": "object",
                    "properties": {
                        "amount": {"type": "number", "description": "How many."},
                        "unit": {"type": "string", "description": "The unit of time."},
                        "holidays": {"type": "string", "description": "For business days."},
                        "within": {"type": "object", "description": "The window that counts."},
                    },
                    "required": ["amount", "unit"],
                    "additionalProperties": False,
                },
                {
                    "type": "object",
                    "not": {"anyOf": [{"required": ["amount"]}, {"required": ["unit"]}]},
                    "additionalProperties": {"type": "number"},
                    "minProperties": 1,
                    "maxProperties": 1,
                },
            ]
        }
    ),
]


_ELAPSED = {
    "week": timedelta(weeks=1),
    "day": timedelta(days=1),
    "hour": timedelta(hours=1),
    "minute": timedelta(minutes=1),
    "second": timedelta(seconds=1),
}


def elapsed(duration: FixedDuration) -> timedelta:
    """Return a duration as elapsed time: a day has 24 hours. Raises DefinitionError."""
    unit = "" if duration.unit in BUSINESS_DAYS else dates.normalise_unit(duration.unit)
    size = _ELAPSED.get(unit)
    if size is None:
        raise DefinitionError("unit must be weeks, days, hours, minutes or seconds")
    if duration.within is not None:
        raise DefinitionError("is elapsed time: leave within out")
    if duration.amount > MAX_PERIOD / size:  # a product could overflow
        raise DefinitionError("is more than a year")
    return duration.amount * size
