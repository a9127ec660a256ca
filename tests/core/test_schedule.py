"""When a schedule is due: cron expressions and intervals, in the sequence's time zone."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
from cronsim import CronSim
from hypothesis import given
from hypothesis import strategies as st

from sequencerd.core.calendar import dates
from sequencerd.core.calendar.zones import set_back
from sequencerd.core.config import parse_config
from sequencerd.core.faults import DefinitionError, EvaluationError
from sequencerd.core.schedule import EnrollConfig, Span

BERLIN = "Europe/Berlin"


def config(**keys: Any) -> EnrollConfig:
    return parse_config(EnrollConfig, {"from": "app.overdue", **keys})


def at(text: str) -> datetime:
    return datetime.fromisoformat(text).astimezone(UTC)


@pytest.mark.parametrize(
    ("schedule", "now", "due"),
    [
        ("0 9 * * 1-5", "2026-10-23T09:00:00+02:00", "2026-10-26T09:00:00+01:00"),
        ("0 9 * * 1-5", "2026-10-23T08:59:59+02:00", "2026-10-23T09:00:00+02:00"),
        # 2:30 does not exist on this day, and occurs twice on that one
        ("30 2 * * *", "2026-03-28T12:00:00+01:00", "2026-03-29T03:00:00+02:00"),
        ("30 2 * * *", "2026-10-24T12:00:00+02:00", "2026-10-25T02:30:00+02:00"),
        ("30 2 * * *", "2026-10-25T02:30:00+02:00", "2026-10-26T02:30:00+01:00"),
        # in the hour that occurs twice, the times of its first occurrence have passed
        ("15,45 2 * * *", "2026-10-25T02:10:00+01:00", "2026-10-26T02:15:00+01:00"),
        ("0 1-5 * * *", "2026-10-25T02:10:00+01:00", "2026-10-25T03:00:00+01:00"),
        # with a star, it follows the clock
        ("*/30 * * * *", "2026-10-25T02:40:00+02:00", "2026-10-25T02:00:00+01:00"),
        ("* * * * *", "2026-10-25T02:00:30+02:00", "2026-10-25T02:01:00+02:00"),
        ("0 */2 * * *", "2026-03-29T00:30:00+01:00", "2026-03-29T04:00:00+02:00"),
        ("0 0 29 2 *", "2026-01-01T00:00:00+01:00", "2028-02-29T00:00:00+01:00"),
    ],
)
def test_a_cron_expression_is_local_time(schedule: str, now: str, due: str) -> None:
    assert config(schedule=schedule).next_run(at(now), BERLIN) == at(due)
    assert config(schedule=schedule).first_run(at(now), BERLIN) == at(due)


@pytest.mark.parametrize(
    ("amount", "unit", "stored"),
    [
        (2, "years", {"amount": 24, "unit": "months"}),
        (1, "quarter", {"amount": 3, "unit": "months"}),
        (3, "weeks", {"amount": 21, "unit": "days"}),
        (2, "hours", {"amount": 2, "unit": "hours"}),
        (120, "minutes", {"amount": 2, "unit": "hours"}),
        (90, "minutes", {"amount": 5400, "unit": "seconds"}),
        (5, "second", {"amount": 5, "unit": "seconds"}),
    ],
)
def test_an_amount_of_time_is_stored_in_four_units(
    amount: int, unit: str, stored: dict[str, Any]
) -> None:
    assert parse_config(Span, {"amount": amount, "unit": unit}).document() == stored


@pytest.mark.parametrize(
    ("schedule", "timezone", "now", "due"),
    [
        # clocks are set at midnight, and by half an hour
        ("* 1 * * 0", "America/Asuncion", "2023-09-30T23:30-04:00", "2023-10-01T01:00-03:00"),
        ("*/15 0-23/2 * * *", "Asia/Gaza", "2021-03-26T23:30+02:00", "2021-03-27T02:00+03:00"),
        ("*/15 0 * * *", "Australia/Lord_Howe", "2028-10-01T12:00+11:00", "2028-10-02T00:00+11:00"),
        (
            "*/30 23 * * *",
            "Australia/Lord_Howe",
            "2025-10-05T12:00+11:00",
            "2025-10-05T23:00+11:00",
        ),
        ("5 * * * *", "Australia/Lord_Howe", "2025-04-06T01:59+11:00", "2025-04-06T02:05+10:30"),
        ("45 * * * *", "Australia/Lord_Howe", "2025-04-06T01:59+11:00", "2025-04-06T01:45+10:30"),
        # a whole day is skipped
        ("0 9 * * *", "Pacific/Apia", "2011-12-29T10:00-10:00", "2011-12-31T00:00+14:00"),
        ("0 */9 * * *", "Pacific/Apia", "2011-12-29T19:00-10:00", "2011-12-31T00:00+14:00"),
    ],
)
def test_a_cron_expression_follows_any_clock(
    schedule: str, timezone: str, now: str, due: str
) -> None:
    assert config(schedule=schedule).next_run(at(now), timezone) == at(due)


@given(
    st.sampled_from(
        ["*/15 0-23/2 * * *", "*/30 23 * * *", "5 * * * *", "* 1 * * *", "*/7 */5 * * *"]
    ),
    st.sampled_from(
        ["Australia/Lord_Howe", "America/Asuncion", "Asia/Gaza", "America/Havana", BERLIN]
    ),
    st.integers(0, 25),
    st.integers(-1500, 200),
)
def test_a_star_is_due_whenever_the_clock_shows_its_time(
    schedule: str, timezone: str, number: int, minutes: int
) -> None:
    """By a look at the clock in each minute."""
    zone = dates.zone(timezone)
    now = _changes(timezone)[number % len(_changes(timezone))] + timedelta(minutes=minutes)
    minute = now
    while True:
        minute += timedelta(minutes=1)
        wall = minute.astimezone(zone).replace(tzinfo=None, fold=0)
        if next(CronSim(schedule, wall - timedelta(minutes=1))) == wall:
            break
    assert config(schedule=schedule).next_run(now, timezone) == minute


@cache
def _changes(timezone: str) -> list[datetime]:
    """When the clocks were set in a dozen years."""
    zone = dates.zone(timezone)
    hours = (datetime(2012, 1, 1, tzinfo=UTC) + timedelta(hours=n) for n in range(100_000))
    return [
        after
        for before, after in pairwise(hours)
        if before.astimezone(zone).utcoffset() != after.astimezone(zone).utcoffset()
    ]


@given(
    st.sampled_from(
        [
            *("30 2 * * *", "15,45 2 * * *", "0 1-5 * * *", "10 1-3 * * *", "5 0 * * *"),
            *("59 23 * * 0", "0 */2 * * *", "*/20 * * * *", "0 9 * * 1#2", "0 0 L * *"),
        ]
    ),
    # clocks are set back by half an hour, two or three hours, and at midnight
    st.sampled_from(
        [
            *("Australia/Lord_Howe", "Antarctica/Troll", "Antarctica/Casey", "Africa/Cairo"),
            *("Africa/Casablanca", "America/Havana", BERLIN, "America/Nuuk"),
        ]
    ),
    st.datetimes(datetime(2019, 1, 1), datetime(2031, 1, 1), timezones=st.just(UTC)),  # noqa: DTZ001 -- hypothesis wants naive bounds
    st.timedeltas(timedelta(), timedelta(hours=6)),
)
def test_the_next_run_is_ahead_and_later_for_a_later_time(
    schedule: str, timezone: str, now: datetime, later: timedelta
) -> None:
    zone = dates.zone(timezone)
    days = (now + timedelta(days=n) for n in range(370))
    now = next(filter(None, (set_back(day, zone) for day in days)), now) - later / 2
    found = config(schedule=schedule).next_run(now, timezone)
    assert found > now
    assert found.astimezone(zone).second == 0
    assert config(schedule=schedule).next_run(now + later, timezone) >= found


def test_an_interval_begins_at_once_and_days_are_calendar_time() -> None:
    every = config(every={"amount": 1, "unit": "days"})
    now = at("2026-10-24T12:00:00+02:00")
    assert every.first_run(now, BERLIN) == now
    assert every.next_run(now, BERLIN) == at("2026-10-25T12:00:00+01:00")


def test_a_schedule_without_a_second_run_is_an_error_of_its_own() -> None:
    every = config(every={"amount": 1000, "unit": "years"})
    with pytest.raises(EvaluationError):
        every.first_run(at("9001-01-01T00:00:00+00:00"), BERLIN)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({}, "either schedule or every"),
        ({"schedule": "0 9 * * *", "every": {"amount": 1, "unit": "hours"}}, "either schedule or"),
        ({"schedule": "0 9 * *"}, "five fields"),
        ({"schedule": "* * * * * *"}, "five fields"),
        ({"schedule": "0 25 * * *"}, "schedule: is not a cron expression: Bad hour"),
        ({"schedule": "0 0 30 2 *"}, "schedule: is not a cron expression"),
        ({"schedule": "0 9 * * *", "at_most": 0}, "at_most"),
        ({"every": {"amount": 0, "unit": "hours"}}, "every.amount"),
        ({"every": {"hours": 2}}, "every: write {amount: 2, unit: hours}"),
        ({"every": {"amount": 1001, "unit": "years"}}, "every: must be at most 1,000 years"),
        ({"every": {"amount": 12_001, "unit": "month"}}, "every: must be at most 1,000 years"),
        *(
            ({"schedule": "0 9 * * *", "from": name}, "your own view or function")
            for name in ("overdue", "pg_catalog.pg_class", "sequencer.enrollments", "a.b; drop", "")
        ),
    ],
)
def test_invalid_schedules_are_refused_with_their_key(keys: dict[str, Any], words: str) -> None:
    with pytest.raises(DefinitionError) as refused:
        config(**keys)
    assert words in str(refused.value)
