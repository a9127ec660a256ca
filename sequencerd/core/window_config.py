"""The config of windows, for a sequence, a side effect, or a step."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import datetime, time, timedelta
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, StrictFloat, StrictInt, model_validator

from sequencerd.core.calendar.windows import WEEKDAYS
from sequencerd.core.config import Config
from sequencerd.core.enrollment import MAX_NAME
from sequencerd.core.model import Window

_CLOCK = re.compile(r"([01]?[0-9]|2[0-3]):([0-5][0-9])(?::([0-5][0-9]))?")

CalendarName = Annotated[str, Field(min_length=1, max_length=MAX_NAME)]


def parse_clock(text: str) -> time:
    """Return a time of day such as 09:00. Raise ValueError for other texts."""
    match = _CLOCK.fullmatch(text)
    if match is None:
        raise ValueError('must be a time of day such as "09:00" or "17:30"')
    hour, minute, second = (int(part or 0) for part in match.groups())
    return time(hour, minute, second)


def _time_of_day(text: str) -> str:
    parse_clock(text)
    return text


def _end(text: str) -> str:
    return text if text == "24:00" else _time_of_day(text)


TimeOfDay = Annotated[str, AfterValidator(_time_of_day)]
"""A text such as 09:00."""


class SpreadConfig(Config):
    """An amount of elapsed time."""

    hours: StrictInt | StrictFloat = Field(default=0, ge=0, le=24)
    """Hours; all keys are added up."""
    minutes: StrictInt | StrictFloat = Field(default=0, ge=0, le=1440)
    """Minutes."""
    seconds: StrictInt | StrictFloat = Field(default=0, ge=0, le=86400)
    """Seconds."""


class WindowConfig(Config):
    """Times of the week, in the enrollment's time zone, such as Monday to Friday from 9 to 17."""

    days: list[Literal["mon", "tue", "wed", "thu", "fri", "sat", "sun"]] | None = Field(
        default=None, min_length=1
    )
    """The days on which the window opens. Default: every day."""
    from_: TimeOfDay = Field(default="00:00", alias="from")
    """The time at which it opens, such as 09:00."""
    to: Annotated[str, AfterValidator(_end)] = "24:00"
    """The time at which it closes, such as 17:00; on the next day if that is not after `from`."""
    holidays: CalendarName | None = None
    """The calendar of sequencer.holidays on whose days it stays closed, such as DE."""
    spread: SpreadConfig | None = None
    """The time over which waiting enrollments start after an opening, such as {minutes: 30}."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        window = self.window()
        if window.end is not None and window.start == window.end:
            raise ValueError("from and to are the same: leave them out for whole days")
        if window == Window(spread=window.spread):
            raise ValueError("is always open: write days, from and to, or holidays")
        if window.spread > _length(window):
            raise ValueError("spread is longer than the window is open")
        return self

    def window(self) -> Window:
        """Return the window for the calendar."""
        length = self.spread or SpreadConfig()
        return Window(
            days=frozenset(map(WEEKDAYS.index, self.days or WEEKDAYS)),
            start=parse_clock(self.from_),
            end=None if self.to in ("24:00", "00:00", "0:00") else parse_clock(self.to),
            holidays=self.holidays,
            spread=timedelta(hours=length.hours, minutes=length.minutes, seconds=length.seconds),
        )


def _length(window: Window) -> timedelta:
    """Return how long a window is open on a day without a change of clocks."""
    day = datetime(2026, 1, 1)  # noqa: DTZ001 - what a clock shows
    start = datetime.combine(day, window.start)
    end = datetime.combine(day, window.end or time.min)
    return end - start + timedelta(days=end <= start)


def describe_window(config: Mapping[str, Any]) -> str:
    """Describe a window: "mon, tue, 09:00 to 17:00, without holidays of DE"; empty for none."""
    try:
        window = WindowConfig.model_validate(config)
    except ValueError:
        return ""
    parts = [_describe_days(window.window().days)]
    if (window.from_, window.to) != ("00:00", "24:00"):
        parts.append(f"{window.from_} to {window.to}")
    if window.holidays is not None:
        parts.append(f"without holidays of {window.holidays}")
    return ", ".join(filter(None, parts))


def _describe_days(days: frozenset[int]) -> str:
    """Describe days, with ranges for three or more consecutive ones; empty for all days."""
    if len(days) == len(WEEKDAYS):
        return ""
    ordered = sorted(days)
    if len(ordered) > 2 and ordered[-1] - ordered[0] == len(ordered) - 1:
        return f"{WEEKDAYS[ordered[0]]} to {WEEKDAYS[ordered[-1]]}"
    return ", ".join(WEEKDAYS[day] for day in ordered)
