"""Windows of side effects: checked before every attempt, whatever held the side effect up."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from typing import Any

import pytest

from sequencerd.core.advance import advance
from sequencerd.core.decision import Execute, Fail, Wait
from sequencerd.core.model import Action, Sequence, SideEffect, Window
from sequencerd.core.step_types.durations import DurationConfig
from sequencerd.core.step_types.effects import compile_expiry
from sequencerd.core.task import Answer, Failed, NotStarted, Result
from sequencerd.core.window_config import WindowConfig, describe_window
from tests.core.test_advance import EFFECT, at, sequence, step

OFFICE_CONFIG = {
    "days": ["mon", "tue", "wed", "thu", "fri"],
    "from": "09:00",
    "to": "17:00",
    "holidays": "DE",
}
OFFICE = WindowConfig.model_validate(OFFICE_CONFIG).window()
HOLIDAYS = {"DE": frozenset({date(2026, 4, 3), date(2026, 4, 6)})}
BEFORE = datetime(2026, 4, 2, 14, 30, tzinfo=UTC)  # Thursday before Easter, 16:30 in Berlin
CLOSES = datetime(2026, 4, 2, 15, 0, tzinfo=UTC)
OPENS = datetime(2026, 4, 7, 7, 0, tzinfo=UTC)  # Tuesday, 9:00


def office(effect: SideEffect = EFFECT, window: Window | None = OFFICE) -> dict[str, Sequence]:
    made = sequence(step("mail", "Email", effect=effect), timezone="Europe/Berlin")
    return {"s": replace(made["s"], window=window, holidays=HOLIDAYS)}


def waiting(**values: Any) -> Any:
    return at("mail", entered_at=BEFORE, **values)


def test_a_side_effect_begins_within_its_window() -> None:
    decision = advance(office(), waiting(), BEFORE).decision
    assert isinstance(decision, Execute)
    assert decision.closes_at == CLOSES
    assert advance(office(), waiting(), CLOSES).decision == Wait(OPENS)


@pytest.mark.parametrize(
    ("result", "attempt"),
    [
        (Failed("451 later"), 2),  # a retry that would be at 17:30
        (Failed("451", fault="server", retry_after=timedelta(hours=1)), 1),  # an outage
        (NotStarted(), 1),  # it was in a queue, or held up by a rate, until the window closed
        (Answer(Action.NOOP, retry_after=timedelta(hours=2)), 0),
    ],
)
def test_the_window_is_checked_before_every_attempt(result: Result, attempt: int) -> None:
    effect = replace(EFFECT, retry=replace(EFFECT.retry, first_delay=7200, longest_delay=7200))
    leased = waiting(attempt=2, leases=2, leased_by="me")
    now = CLOSES if isinstance(result, NotStarted) else BEFORE
    advanced = advance(office(effect), leased, now, result)
    assert advanced.decision == Wait(OPENS)
    assert advanced.enrollment.attempt == attempt
    # when it wakes before, as by a change of data, it waits on
    again = advance(office(effect), advanced.enrollment, OPENS - timedelta(hours=3))
    assert again.decision == Wait(OPENS)
    assert isinstance(advance(office(effect), advanced.enrollment, OPENS).decision, Execute)


def test_the_window_is_checked_after_a_pause_and_after_a_crash() -> None:
    paused = {"s": replace(office()["s"], paused=True)}
    assert advance(paused, waiting(), BEFORE).decision == Wait(BEFORE)
    assert advance(office(), waiting(), CLOSES).decision == Wait(OPENS)
    cut_off = advance(office(), waiting(attempt=1, leased_by="dead"), CLOSES)
    assert cut_off.decision == Wait(OPENS)
    assert cut_off.enrollment.attempt == 0


def test_a_window_of_its_own_comes_first_and_null_exempts() -> None:
    exempt = replace(EFFECT, window=None, follows_window=False)
    assert isinstance(advance(office(exempt), waiting(), CLOSES).decision, Execute)
    evening = replace(EFFECT, window=Window(start=OFFICE.end or OFFICE.start), follows_window=False)
    assert advance(office(evening), waiting(), BEFORE).decision == Wait(CLOSES)


def test_a_window_is_open_in_the_time_zone_of_the_enrollment() -> None:
    tokyo = waiting(timezone="Asia/Tokyo")  # 23:30
    assert advance(office(), tokyo, BEFORE).decision == Wait(datetime(2026, 4, 7, 0, 0, tzinfo=UTC))


def test_an_expiry_before_the_window_opens_wakes_the_enrollment() -> None:
    hour = compile_expiry(DurationConfig(amount=2, unit="hours"))
    effect = replace(EFFECT, expires=hour, on_expired="end")
    expiry = BEFORE + timedelta(hours=2)
    assert advance(office(effect), waiting(), CLOSES).decision == Wait(expiry)
    assert [e.action for e in advance(office(effect), waiting(), expiry).events] == [
        "expired",
        "completed",
    ]


def test_an_expiry_counts_the_time_of_a_window_without_holidays() -> None:
    hour = {"amount": 1, "unit": "hours", "within": OFFICE_CONFIG}
    expires = compile_expiry(DurationConfig.model_validate(hour))
    effect = replace(EFFECT, expires=expires, on_expired="end", window=None, follows_window=False)
    expiry = OPENS + timedelta(minutes=30)  # the other half hour passed before Easter
    just_before = expiry - timedelta(seconds=1)
    assert isinstance(advance(office(effect), waiting(), just_before).decision, Execute)
    assert advance(office(effect), waiting(), expiry).events[0].action == "expired"


def test_subjects_are_spread_over_the_opening_and_share_no_outcome() -> None:
    definitions = office(window=replace(OFFICE, spread=timedelta(minutes=30)))
    found = [
        advance(definitions, waiting(subject=f"user-{number}"), CLOSES) for number in range(200)
    ]
    times = [one.decision.until for one in found if isinstance(one.decision, Wait)]
    assert all(OPENS <= time < OPENS + timedelta(minutes=30) for time in times)
    assert len(set(times)) == 200
    in_each_third = [
        sum(
            OPENS + timedelta(minutes=n) <= time < OPENS + timedelta(minutes=n + 10)
            for time in times
        )
        for n in (0, 10, 20)
    ]
    assert min(in_each_third) > 40
    assert not any(one.is_shared for one in found)
    assert advance(definitions, waiting(), BEFORE).is_shared
    assert advance(office(), waiting(), CLOSES).is_shared


def test_a_calendar_without_holidays_stops_the_step() -> None:
    empty = {"s": replace(office()["s"], holidays={})}
    decision = advance(empty, waiting(), BEFORE).decision
    assert isinstance(decision, Fail)
    assert decision.failure == "invalid_step"
    assert "sequencerd holidays" in decision.message


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "is always open"),
        ({"from": "00:00", "to": "24:00"}, "is always open"),
        ({"from": "9:00", "to": "09:00"}, "are the same"),
        ({"from": "25:00"}, "a time of day"),
        ({"to": "noon"}, "a time of day"),
        ({"days": []}, "at least 1 item"),
        ({"days": ["monday"]}, "'mon', 'tue'"),
        ({"from": "09:00", "to": "10:00", "spread": {"hours": 2}}, "longer than the window"),
        ({"from": "22:00", "to": "06:00", "spread": {"hours": 9}}, "longer than the window"),
        ({"from": "09:00", "spread": {"days": 1}}, "Extra inputs"),
    ],
)
def test_a_window_that_cannot_be_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WindowConfig.model_validate(config)


def test_starts_may_be_spread_over_the_whole_window() -> None:
    config = {"from": "22:00", "to": "06:00", "spread": {"hours": 8}}
    assert WindowConfig.model_validate(config).window().spread == timedelta(hours=8)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (
            {"days": ["mon", "tue", "wed"], "from": "09:00", "to": "17:00", "holidays": "DE"},
            "mon to wed, 09:00 to 17:00, without holidays of DE",
        ),
        ({"days": ["sat", "mon"]}, "mon, sat"),
        ({"days": ["mon", "tue", "fri"]}, "mon, tue, fri"),
        ({"from": "22:00", "to": "06:00"}, "22:00 to 06:00"),
        ({"from": 9}, ""),
    ],
)
def test_windows_are_described(config: dict[str, Any], words: str) -> None:
    assert describe_window(config) == words
