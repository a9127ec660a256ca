"""Enrolling by a query and a schedule: the key `enroll` of a sequence, and its next run."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Literal
from zoneinfo import ZoneInfo

from cronsim import CronSim, CronSimError
from pydantic import AfterValidator, Field, StrictInt, model_validator

from sequencerd.core.calendar import dates
from sequencerd.core.calendar.zones import first_showing, next_candidate
from sequencerd.core.config import Config

BASE_UNITS = {
    "year": (12, "months"),
    "quarter": (3, "months"),
    "month": (1, "months"),
    "week": (7, "days"),
    "day": (1, "days"),
    "hour": (3600, "seconds"),
    "minute": (60, "seconds"),
    "second": (1, "seconds"),
}
MAX_YEARS = 1000  # dates end with the year 9999
_MINUTE = timedelta(minutes=1)
_DAY = timedelta(days=1)
_BEGINNING = datetime(2, 1, 1, tzinfo=UTC)
SOURCE = re.compile(r"(?P<schema>[a-z_][a-z0-9_]*)\.(?P<name>[a-z_][a-z0-9_]*)")
"""The name of a user's view or function, as written in SQL without quotes."""


class Span(Config):
    """A fixed amount of a unit of time."""

    amount: StrictInt = Field(gt=0, le=100_000)
    """How many."""
    unit: Literal[
        "years",
        "quarters",
        "months",
        "weeks",
        "days",
        "hours",
        "minutes",
        "seconds",
        "year",
        "quarter",
        "month",
        "week",
        "day",
        "hour",
        "minute",
        "second",
    ]
    """Years to seconds. Days and longer units are calendar time, shorter ones are elapsed time."""

    @model_validator(mode="before")
    @classmethod
    def _is_not_short(cls, value: Any) -> Any:
        match value:
            case dict() if len(value) == 1:
                [(unit, amount)] = value.items()
                if str(unit).removesuffix("s") in BASE_UNITS:
                    raise ValueError(f"write {{amount: {amount}, unit: {unit}}}")
        return value

    @model_validator(mode="after")
    def _ends_in_this_calendar(self) -> Span:
        factor, unit = BASE_UNITS[self.unit.removesuffix("s")]
        if unit == "months" and self.amount * factor > MAX_YEARS * 12:
            raise ValueError(f"must be at most {MAX_YEARS:,} years")
        return self

    def document(self) -> dict[str, Any]:
        """Return the same in months, days, hours or seconds, like sequencer.as_duration."""
        factor, unit = BASE_UNITS[self.unit.removesuffix("s")]
        amount = self.amount * factor
        if unit == "seconds" and amount % 3600 == 0:
            return {"amount": amount // 3600, "unit": "hours"}
        return {"amount": amount, "unit": unit}


def _source(name: str) -> str:
    if SOURCE.fullmatch(name) is None or re.match(r"pg_|information_schema\.|sequencer\.", name):
        raise ValueError("must be the name of your own view or function, such as app.overdue")
    return name


def _cron(expression: str) -> str:
    if len(expression.split()) != 5:  # six would be with seconds
        raise ValueError('must be a cron expression of five fields, such as "0 9 * * 1-5"')
    try:
        next(CronSim(expression, datetime(2026, 1, 1, tzinfo=UTC)))
    except CronSimError as error:
        raise ValueError(f"is not a cron expression: {error}") from error
    except StopIteration as error:
        raise ValueError("is a time that never comes") from error
    return expression


def _next_shown(schedule: str, now: datetime, zone: ZoneInfo) -> datetime:
    """Return the first time after `now` at which the clock shows a time of a schedule, from one
    candidate to the next: a time may be skipped, and come again if clocks are set back.
    """
    # cronsim's own time zones miss runs, and add some, where clocks are set at midnight or by half
    # an hour
    instant = now.replace(second=0, microsecond=0) + _MINUTE
    while True:
        wall = _without_zone(instant.astimezone(zone))
        found = next(CronSim(schedule, wall - _MINUTE))
        if found == wall:
            return instant
        instant = next_candidate(found.replace(tzinfo=zone), instant, zone)


def _without_zone(wall: datetime) -> datetime:
    return wall.replace(tzinfo=None, fold=0)


class EnrollConfig(Config):
    """Enrolls the subjects that a query returns, by a schedule."""

    source: Annotated[str, AfterValidator(_source)] = Field(alias="from")
    """A view, table or SQL function that returns subject, and optionally data and timezone."""
    schedule: Annotated[str, AfterValidator(_cron)] | None = None
    """A cron expression such as "0 9 * * 1-5", in the sequence's time zone."""
    every: Span | None = None
    """The time between two runs, instead of a schedule, such as {amount: 1, unit: hours}."""
    at_most: StrictInt = Field(default=1000, ge=1, le=100_000, alias="at_most")
    """The most subjects of a run; with more, none is enrolled, and a problem is reported."""

    @model_validator(mode="after")
    def _has_one_time(self) -> EnrollConfig:
        if (self.schedule is None) == (self.every is None):
            raise ValueError("must have either schedule or every")
        return self

    def first_run(self, now: datetime, timezone: str) -> datetime:
        """Return the first run of a new schedule: the next time that it names, or now. Raises
        EvaluationError if there is no second run.
        """
        following = self.next_run(now, timezone)
        return now if self.every else following

    def next_run(self, now: datetime, timezone: str) -> datetime:
        """Return the next run after a run at this time; missed runs are made up for by one."""
        zone = dates.zone(timezone)
        if self.every is not None:
            return dates.add(now, self.every.amount, self.every.unit, zone)
        assert self.schedule is not None
        minutes, hours, *_ = self.schedule.split()
        if minutes.startswith("*") or hours.startswith("*"):
            return _next_shown(self.schedule, now, zone)
        # a time that is skipped, by a day at most, has its run at the end of the gap
        walls = CronSim(self.schedule, _without_zone(now.astimezone(zone)) - _DAY)
        runs = (first_showing(wall.replace(tzinfo=zone), _BEGINNING) for wall in walls)
        return next(at for at in runs if at > now)

    def document(self) -> Mapping[str, Any]:
        """Return it as stored."""
        return self.model_dump(by_alias=True, exclude_none=True)
