"""When a schedule is due: cron expressions and intervals, in the sequence's time zone."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sequencerd.core.calendar import dates
from sequencerd.core.calendar.zones import set_back
from sequencerd.core.config import parse_config
from sequencerd.core.model import DefinitionError, EvaluationError
from sequencerd.core.schedule import EnrollConfig

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
        ("0 */2 * * *", "2026-03-29T00:30:00+01:00", "2026-03-29T04:00:00+02:00"),
        ("0 0 29 2 *", "2026-01-01T00:00:00+01:00", "2028-02-29T00:00:00+01:00"),
    ],
)
def test_a_cron_expression_is_local_time(schedule: str, now: str, due: str) -> None:
    assert config(schedule=schedule).next_run(at(now), BERLIN) == at(due)
    assert config(schedule=schedule).first_run(at(now), BERLIN) == at(due)


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
