"""Dates, amounts and values of the data: when a wait is over, and what data it refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sequencerd.core.advance import advance
from sequencerd.core.calendar import dates
from sequencerd.core.calendar.anniversaries import next_anniversary
from sequencerd.core.decision import Decision, End, Fail, Wait
from sequencerd.core.faults import DefinitionError
from sequencerd.core.model import Sequence
from sequencerd.core.step_types import compile_step, roots
from sequencerd.core.what_next import what_next
from tests.core.calendar.test_dates import ZONES, instants
from tests.core.test_advance import NOW, at, sequence, step
from tests.core.test_what_next import row

HOLIDAYS = {"DE": frozenset({date(2026, 4, 3), date(2026, 4, 6)})}  # Easter
OVER = "other"


def waiting(
    config: dict[str, Any], type_: str = "WaitForDate", timezone: str = "Europe/Berlin"
) -> dict[str, Sequence]:
    made = sequence(
        step("wait", type_, config, None, OVER),
        step(OVER, "WaitForDuration", {"amount": 99, "unit": "years"}),
        timezone=timezone,
    )
    return {"s": replace(made["s"], holidays=HOLIDAYS)}


def decided(
    config: dict[str, Any],
    data: dict[str, Any],
    type_: str = "WaitForDate",
    now: datetime = NOW,
    **values: Any,
) -> Decision | str:
    """The decision, or the name of the other step."""
    advanced = advance(waiting(config, type_), at("wait", json.dumps(data), **values), now)
    return OVER if advanced.enrollment.step == OVER else advanced.decision


def until(text: str) -> Wait:
    found = dates.parse(text, dates.zone("UTC"))
    assert found is not None
    return Wait(found)


DUE = {"date": "{{data.due}}"}
DAYS = {"unit": "days"}
OFFICE = {
    "days": ["mon", "tue", "wed", "thu", "fri"],
    "from": "09:00",
    "to": "17:00",
    "holidays": "DE",
}
HOURS = {"amount": 4, "unit": "hours", "within": OFFICE}
WORKDAYS = {"unit": "business days", "holidays": "DE"}


@pytest.mark.parametrize(
    ("config", "due", "decision"),
    [
        # three days before, at nine; the clocks are set in between
        ({"offset": {"amount": -3, **DAYS}, "at": "09:00"}, "2026-03-31", "2026-03-28T08:00:00Z"),
        ({"offset": {"amount": 3, **DAYS}, "at": "9:30"}, "2026-03-28", "2026-03-31T07:30:00Z"),
        ({"at": "17:30:15"}, "2026-03-05T23:59:00+01:00", "2026-03-05T16:30:15Z"),
        ({"at": "02:30"}, "2026-03-29", "2026-03-29T01:30:00Z"),  # skipped: 3:30
        ({"at": "02:30"}, "2026-10-25", "2026-10-25T00:30:00Z"),  # the first of two
        ({"offset": {"amount": 1, **WORKDAYS}}, "2026-04-02", "2026-04-06T22:00:00Z"),
        ({"offset": {"amount": -1, **WORKDAYS}}, "2026-04-07", "2026-04-01T22:00:00Z"),
        ({"offset": {"amount": 0, **WORKDAYS}}, "2026-04-04", "2026-04-06T22:00:00Z"),
        ({"offset": {"amount": 1, "unit": "businessDays"}}, "2026-04-02", "2026-04-02T22:00:00Z"),
        ({"offset": {"amount": -90, "unit": "minutes"}}, "2026-03-05", "2026-03-04T21:30:00Z"),
        ({"format": "X"}, 1774000000, "2026-03-20T09:46:40Z"),
        ({"format": "x"}, 1774000000000, "2026-03-20T09:46:40Z"),
        ({"format": "X", "at": "09:00"}, "1774000000", "2026-03-20T08:00:00Z"),
        ({}, "2026-12-01 10:00:00 UTC", "2026-12-01T10:00:00Z"),
        ({}, "20261201", "2026-11-30T23:00:00Z"),
        ({"every": "year"}, "1990-05-05", "2026-05-04T22:00:00Z"),
        ({"every": "month", "at": "09:00"}, "1990-01-31", "2026-03-31T07:00:00Z"),
        ({"every": "month", "at": "12:00"}, "2019-12-02", "2026-03-02T11:00:00Z"),
        ({"every": "year", "at": "09:00"}, "1990-03-02", "2027-03-02T08:00:00Z"),  # it is 11:00
        ({"every": "year", "at": "12:00"}, "1990-03-02", "2026-03-02T11:00:00Z"),
        ({"every": "year", "at": "09:00"}, "2024-02-29", "2027-02-28T08:00:00Z"),
        (
            {"every": "year", "offset": {"amount": -7, **DAYS}, "at": "09:00"},
            "1990-03-05",
            "2027-02-26T08:00:00Z",
        ),
    ],
)
def test_a_wait_for_a_time_in_the_data(config: dict[str, Any], due: object, decision: str) -> None:
    assert decided({**DUE, **config}, {"due": due}) == until(decision)


def test_the_time_follows_the_data_and_the_holidays() -> None:
    config = {**DUE, "offset": {"amount": "{{data.days}}", **WORKDAYS}}
    assert decided(config, {"due": "2026-04-07", "days": -1}) == until("2026-04-01T22:00:00Z")
    assert decided(config, {"due": "2026-04-09", "days": "-1"}) == until("2026-04-07T22:00:00Z")
    definitions = {"s": replace(waiting(config)["s"], holidays={"DE": frozenset[date]()})}
    enrollment = at("wait", '{"due": "2026-04-07", "days": -1}')
    assert advance(definitions, enrollment, NOW).decision == until("2026-04-05T22:00:00Z")


LATE = NOW + timedelta(hours=3)


@pytest.mark.parametrize(
    ("config", "due", "decision"),
    [
        ({}, "2026-03-01", End()),
        ({"past": "next"}, "2026-03-01", End()),
        ({"past": "altNext"}, "2026-03-01", OVER),
        # it was ahead on arrival, and is over since an hour: it was woken late
        ({"past": "altNext"}, "2026-03-02T12:00:00Z", End()),
        ({"past": "altNext", "offset": {"amount": -1, **DAYS}}, "2026-03-02T12:00:00Z", OVER),
        ({"missing": "altNext"}, "", OVER),
        ({"missing": "altNext"}, None, OVER),
        ({"missing": "altNext"}, "2026-03-01", End()),
        ({"missing": "altNext", "every": "year"}, " ", OVER),
    ],
)
def test_exits_without_a_future_time(config: dict[str, Any], due: object, decision: object) -> None:
    assert decided({**DUE, **config}, {"due": due}, now=LATE) == decision


YEARLY = {**DUE, "every": "year", "past": "altNext", "at": "09:00"}
EARLIER = {"offset": {"amount": -60, **DAYS}}
LATER = {"offset": {"amount": 60, **DAYS}}


@pytest.mark.parametrize(
    ("config", "due", "decision"),
    [
        (EARLIER, "2020-05-15", until("2026-03-16T08:00:00Z")),
        (EARLIER, "2020-05-01", OVER),  # on 2 March at 9:00, and now it is 11:00
        (EARLIER, "2020-03-03", OVER),
        (EARLIER, "2020-03-02", until("2027-01-01T08:00:00Z")),  # the anniversary began today
        (EARLIER, "2026-05-01", OVER),
        (EARLIER, "2027-05-01", until("2027-03-02T08:00:00Z")),  # the date itself is the first
        (LATER, "2020-01-01", until("2027-03-02T08:00:00Z")),
        (LATER, "2020-01-02", until("2026-03-03T08:00:00Z")),
        ({}, "2020-03-02", until("2027-03-02T08:00:00Z")),
        ({}, "2020-03-03", until("2026-03-03T08:00:00Z")),
        ({"every": "month", **EARLIER, "offset": {"amount": -5, **DAYS}}, "2020-01-06", OVER),
        (
            {"every": "month", **EARLIER, "offset": {"amount": -5, **DAYS}},
            "2020-01-20",
            until("2026-03-15T08:00:00Z"),
        ),
    ],
)
def test_the_time_before_the_next_anniversary_may_be_past(
    config: dict[str, Any], due: str, decision: object
) -> None:
    assert decided({**YEARLY, **config}, {"due": due}) == decision


def test_a_time_before_an_anniversary_that_was_missed_is_past() -> None:
    entered, due = NOW - timedelta(days=300), {"due": "2020-05-02"}
    config = {**YEARLY, **EARLIER}
    woken = datetime(2026, 3, 3, 8, tzinfo=UTC)
    assert decided(config, due, entered_at=entered, now=woken - timedelta(1)) == Wait(woken)
    assert decided(config, due, entered_at=entered, now=woken + timedelta(hours=9)) == End()
    assert decided(config, due, entered_at=entered, now=woken + timedelta(days=2)) == OVER


def test_dates_missed_by_more_than_a_day_are_past() -> None:
    """A date that is changed to one of last month is none to send for."""
    entered = NOW - timedelta(days=60)
    config = {**DUE, "past": "altNext"}
    month_ago, hour_ago = ({"due": (NOW - timedelta(days=d)).isoformat()} for d in (30, 0.1))
    assert decided(config, month_ago, entered_at=entered) == OVER
    assert decided(config, hour_ago, entered_at=entered) == End()
    yearly = {**DUE, "every": "year"}
    found = decided(yearly, month_ago, entered_at=entered)
    assert found == until("2027-01-31T10:00:00Z")
    assert decided(yearly, hour_ago, entered_at=entered) == End()


@pytest.mark.parametrize(
    ("config", "data", "message"),
    [
        (DUE, {"due": "soon"}, "date 'soon' is not an ISO 8601 date"),
        ({**DUE, "missing": "altNext"}, {"due": "soon"}, "date 'soon' is not an ISO 8601 date"),
        (DUE, {}, "date '' is not an ISO 8601 date"),
        (DUE, {"due": 1767225}, "'1767225' is not an ISO 8601 date"),
        (DUE, {"due": 1767225600}, "write format: X for seconds, or format: x"),
        (DUE, {"due": "1767225600000"}, "write format: X for seconds, or format: x"),
        (DUE, {"due": 2026}, "'2026' is not an ISO 8601 date"),
        ({**DUE, "format": "X"}, {"due": "2026-12-01"}, "is not a number of seconds since 1970"),
        ({**DUE, "format": "X"}, {"due": 1767225600000}, "is not a number of seconds since 1970"),
        ({**DUE, "at": "{{data.at}}"}, {"due": "2026-12-01", "at": "noon"}, "at: 'noon' must be"),
        (
            {**DUE, "offset": {"amount": "{{data.n}}", **DAYS}},
            {"due": "2026-12-01", "n": "three"},
            "offset.amount: 'three' is not a number",
        ),
        (
            {**DUE, "offset": {"amount": "{{data.n}}", **DAYS}},
            {"due": "2026-12-01", "n": 10**9},
            "offset.amount 1e+09 days: the date is outside of the years 1 to 9999",
        ),
        (
            {**DUE, "offset": {"amount": "{{data.n}}", **WORKDAYS}},
            {"due": "2026-12-01", "n": 1.5},
            "offset.amount 1.5 business days",
        ),
    ],
)
def test_data_that_do_not_fit_fail_with_the_value(
    config: dict[str, Any], data: dict[str, Any], message: str
) -> None:
    decision = decided(config, data)
    assert isinstance(decision, Fail)
    assert decision.failure == "bad_data"
    assert message in decision.message


@pytest.mark.parametrize(
    ("type_", "config", "message"),
    [
        ("WaitForDate", {"date": "1767225600"}, "date: '1767225600' is not an ISO 8601 date"),
        ("WaitForDate", {"date": "data.due"}, "+00:00; write {{data.due}} for a value"),
        ("WaitForDate", {"date": "2026-12-01", "format": "X"}, "'2026-12-01' is not a number"),
        ("WaitForDate", {**DUE, "format": "YYYY"}, "format: must be 'X' or 'x'"),
        ("WaitForDate", {**DUE, "at": "noon"}, "at: must be a time of day"),
        ("WaitForDate", {**DUE, "every": "week"}, "every: must be 'year' or 'month'"),
        ("WaitForDate", {**DUE, "offset": {"amount": "3", **DAYS}}, "offset.amount: must be a num"),
        (
            "WaitForDate",
            {**DUE, "offset": {"amount": 1, "unit": "day", "holidays": "DE"}},
            "offset: holidays are for the unit business days",
        ),
        ("WaitForDuration", {"amount": 1.5, "unit": "business days"}, "must be a whole number"),
        *[
            ("WaitForDuration", {"amount": 1, "unit": unit, "within": OFFICE}, "shorter units")
            for unit in ("days", "business days", "M")
        ],
        ("WaitForDate", {**DUE, "offset": {**HOURS, "amount": -4}}, "offset: amount must be more"),
        ("WaitForDuration", {**HOURS, "within": {}}, "within: is always open"),
        (
            "WaitForDuration",
            {**HOURS, "within": {**OFFICE, "spread": {"minutes": 5}}},
            "within has no spread",
        ),
        *[
            ("WaitForDuration", {"amount": 3, "unit": unit}, "did you mean 'business days'?")
            for unit in ("workdays", "business_days", "working day", "weekdays", "Business Days")
        ],
        ("WaitForDuration", {"amount": "{{#if}}", "unit": "days"}, "amount: line 1"),
        ("WaitForDateComparison", {"attribute": "hour", "values": [9, "9"]}, "values.1: hour is"),
        ("WaitForDateComparison", {"attribute": "hour", "values": ["{{x"]}, "values.0: line 1"),
        ("WaitForWindow", {}, "is always open"),
    ],
)
def test_a_config_that_cannot_be_is_refused(
    type_: str, config: dict[str, Any], message: str
) -> None:
    with pytest.raises(DefinitionError) as error:
        compile_step(type_, config)
    assert message in str(error.value)


def test_amounts_of_the_data() -> None:
    config = {"amount": "{{data.n}}", "unit": "hours"}
    for number in (2, "2", " 2.0 "):
        found = decided(config, {"n": number}, "WaitForDuration")
        assert found == Wait(NOW + timedelta(hours=2))
    condition = {
        "lodashCommand": "eq",
        "value": {"type": "get", "value": "data.paid"},
        "compareTo": {"type": "raw", "value": True},
    }
    timed = {**condition, "timeout": config}
    found = decided(timed, {"n": 2}, "WaitForCondition")
    assert found == Wait(NOW + timedelta(hours=2))
    decision = decided(timed, {}, "WaitForCondition")
    assert isinstance(decision, Fail)
    assert "timeout.amount: '' is not a number" in decision.message
    workdays = {"amount": 3, "unit": "business days", "holidays": "DE"}
    thursday = NOW + timedelta(days=31)
    assert decided(workdays, {}, "WaitForDuration", thursday, entered_at=thursday) == until(
        "2026-04-09T10:00:00Z"
    )
    assert "external" in (roots("WaitForDuration", {"amount": "{{external.n}}"}) or ())


def test_an_amount_of_working_hours() -> None:
    """It is Monday, 11:00; Easter Monday is a holiday."""
    thursday = datetime(2026, 4, 2, 13, tzinfo=UTC)  # 15:00
    tuesday = until("2026-04-07T09:00:00Z")
    here: dict[str, Any] = {"now": thursday, "entered_at": thursday}
    assert decided(HOURS, {}, "WaitForDuration", **here) == tuesday
    rendered = {**HOURS, "amount": "{{data.n}}"}
    assert decided(rendered, {"n": 4}, "WaitForDuration", **here) == tuesday
    decision = decided(rendered, {"n": -1}, "WaitForDuration", **here)
    assert isinstance(decision, Fail)
    assert decision.message == "step 'wait': amount -1 hours: must not be negative with within"
    condition = {"lodashCommand": "isNumber", "value": {"type": "get", "value": "data.paid"}}
    assert decided({**condition, "timeout": HOURS}, {}, "WaitForCondition", **here) == tuesday
    due = {"due": "2026-04-02T13:00:00Z"}
    assert decided({**DUE, "offset": HOURS}, due, **here) == tuesday
    items = {"items": [1], "collecting": {"since": thursday.isoformat()}}
    assert decided({"quiet": HOURS}, items, "Collect", **here) == tuesday


def test_values_of_the_data() -> None:
    config = {"attribute": "hour", "values": ["{{data.hour}}", 23], "occurrence": "next"}
    assert decided(config, {"hour": 9}, "WaitForDateComparison") == until("2026-03-02T22:00:00Z")
    assert decided(config, {"hour": "12"}, "WaitForDateComparison") == until("2026-03-02T11:00:00Z")
    for hour, message in ((24, "values: hour is never 24"), ("x", "values.0: 'x' is not a number")):
        decision = decided(config, {"hour": hour}, "WaitForDateComparison")
        assert isinstance(decision, Fail)
        assert decision.failure == "bad_data"
        assert message in decision.message


def test_a_step_waits_for_a_window() -> None:
    config = {"days": ["mon"], "from": "10:00", "to": "12:00", "spread": {"minutes": 30}}
    assert decided(config, {}, "WaitForWindow") == End()  # Monday, 11:00
    decision = decided(config, {}, "WaitForWindow", NOW + timedelta(hours=1))
    assert isinstance(decision, Wait)
    opens = datetime(2026, 3, 9, 9, 0, tzinfo=UTC)
    assert opens <= decision.until < opens + timedelta(minutes=30)


@pytest.mark.parametrize(
    ("type_", "config", "words"),
    [
        (
            "WaitForDate",
            {**DUE, "offset": {"amount": -3, **DAYS}, "at": "09:00"},
            "waits for 3 days before the date {{data.due}} at 09:00",
        ),
        (
            "WaitForDate",
            {**DUE, "every": "month", "at": "01:00"},
            "waits for the next monthly anniversary of {{data.due}} at 01:00",
        ),
        ("WaitForDate", {**DUE, "every": "year"}, "waits for the next anniversary of {{data.due}}"),
        (
            "WaitForDate",
            {**DUE, "offset": {"amount": "{{data.n}}", **DAYS}},
            "waits for {{data.n}} days from the date {{data.due}}",
        ),
        ("WaitForWindow", {"days": ["mon"]}, "waits for the window (mon)"),
    ],
)
def test_descriptions_of_waits_for_dates(type_: str, config: dict[str, Any], words: str) -> None:
    assert what_next(row(type_, config)).startswith(f"{words}, until")


zones = st.sampled_from(ZONES)
clocks = st.times().map(lambda time: time.replace(microsecond=0))


@given(instants, instants, st.integers(-800, 800), zones)
def test_the_next_anniversary_decides_whether_the_time_is_past(
    first: datetime, arrival: datetime, days: int, zone: str
) -> None:
    config = {**DUE, "every": "year", "offset": {"amount": days, **DAYS}, "past": "altNext"}
    enrollment = at("wait", json.dumps({"due": first.isoformat()}), entered_at=arrival)
    advanced = advance(waiting(config, timezone=zone), enrollment, arrival)
    tz = dates.zone(zone)
    coming = dates.add(next_anniversary(first, arrival, tz), days, "days", tz)
    if coming <= arrival:
        assert advanced.enrollment.step == OVER
    else:
        assert isinstance(advanced.decision, Wait)
        assert arrival < advanced.decision.until <= coming


@given(instants, st.integers(-400, 400), st.sampled_from(["days", "business days"]), clocks, zones)
def test_the_wait_ends_exactly_at_the_date(
    due: datetime, amount: int, unit: str, clock: Any, zone: str
) -> None:
    config = {
        **DUE,
        "offset": {"amount": amount, "unit": unit},
        "at": clock.isoformat(),
    }
    data = json.dumps({"due": due.isoformat()})
    entered = datetime(1990, 1, 1, tzinfo=UTC)
    enrollment = at("wait", data, entered_at=entered)
    definitions = waiting(config, timezone=zone)
    decision = advance(definitions, enrollment, entered).decision
    assert isinstance(decision, Wait)
    shown = decision.until.astimezone(dates.zone(zone))
    day = due.astimezone(dates.zone(zone)).date()
    assert (shown.date() - day).days * (1 if amount >= 0 else -1) >= abs(amount) or not amount
    # the clock shows the time, or one that is later by a gap
    late = timedelta(hours=shown.hour - clock.hour, minutes=shown.minute - clock.minute)
    assert late % timedelta(days=1) <= timedelta(hours=1)
    before = advance(definitions, enrollment, decision.until - timedelta(microseconds=1))
    assert before.decision == decision
    assert advance(definitions, enrollment, decision.until).decision == End()
