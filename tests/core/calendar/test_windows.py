"""Windows, by their rules and by properties: never outside, the first, monotone, on days of DST."""

from __future__ import annotations

from datetime import date, datetime, time, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sequencerd.core.calendar import dates
from sequencerd.core.calendar.windows import begin, closing, open_for, opening
from sequencerd.core.faults import EvaluationError
from sequencerd.core.model import Window
from tests.core.calendar.test_dates import ZONES, at, instants

BERLIN = dates.zone("Europe/Berlin")
OFFICE = Window(frozenset(range(5)), time(9), time(17), holidays="DE")
NIGHT = Window(frozenset({4}), time(22), time(6))
EARLY = Window(start=time(2, 15), end=time(2, 45))
EASTER = frozenset({date(2026, 4, 3), date(2026, 4, 6)})

zones = st.sampled_from([dates.zone(name) for name in ZONES])
quarters = st.integers(0, 95).map(lambda n: time(n // 4, n % 4 * 15))
windows = st.builds(
    Window,
    st.frozensets(st.integers(0, 6), min_size=1),
    quarters,
    st.none() | quarters,
).filter(lambda window: window.start != window.end)
# the hours around the days on which clocks are set, in all of these zones
changes = st.builds(
    lambda day, minutes: at(day) + timedelta(minutes=minutes),
    st.sampled_from(["2026-03-08", "2026-03-29", "2026-04-05", "2026-10-04", "2026-10-25"]),
    st.integers(-1440, 2880),
)
offs = st.sets(st.dates(date(2026, 3, 1), date(2026, 11, 30)), max_size=10).map(frozenset)


@pytest.mark.parametrize(
    ("window", "now", "opens"),
    [
        (OFFICE, "2026-04-01T08:00:00Z", "2026-04-01T08:00:00Z"),
        (OFFICE, "2026-04-02T15:00:00Z", "2026-04-07T07:00:00Z"),  # 17:00 before Easter
        (OFFICE, "2026-03-27T16:30:00Z", "2026-03-30T07:00:00Z"),  # clocks are set on Sunday
        (OFFICE, "2026-10-23T16:30:00Z", "2026-10-26T08:00:00Z"),
        (NIGHT, "2026-04-10T12:00:00Z", "2026-04-10T20:00:00Z"),  # Friday, 22:00
        (NIGHT, "2026-04-11T03:59:00Z", "2026-04-11T03:59:00Z"),  # Saturday, 5:59, is its end
        (NIGHT, "2026-04-11T04:00:00Z", "2026-04-17T20:00:00Z"),
        (EARLY, "2026-03-28T12:00:00Z", "2026-03-30T00:15:00Z"),  # skipped on the 29th
        (EARLY, "2026-10-25T00:15:00Z", "2026-10-25T00:15:00Z"),  # shown twice on the 25th
        (EARLY, "2026-10-25T00:45:00Z", "2026-10-25T01:15:00Z"),
        (Window(start=time(2, 30), end=time(4)), "2026-03-28T12:00:00Z", "2026-03-29T01:00:00Z"),
        (Window(frozenset({0})), "2026-04-12T12:00:00Z", "2026-04-12T22:00:00Z"),
    ],
)
def test_a_window_opens(window: Window, now: str, opens: str) -> None:
    assert opening(window, at(now), BERLIN, EASTER) == at(opens)


@pytest.mark.parametrize(
    ("window", "now", "closes"),
    [
        (OFFICE, "2026-04-01T08:00:00Z", "2026-04-01T15:00:00Z"),
        (NIGHT, "2026-04-10T20:00:00Z", "2026-04-11T04:00:00Z"),
        (EARLY, "2026-10-25T00:15:00Z", "2026-10-25T00:45:00Z"),
        # 01:30 to 02:30 in which the clock is set back to 02:00 at 03:00
        (
            Window(start=time(1, 30), end=time(2, 30)),
            "2026-10-24T23:30:00Z",
            "2026-10-25T00:30:00Z",
        ),
        (Window(frozenset({0, 1})), "2026-04-12T22:00:00Z", "2026-04-14T22:00:00Z"),  # two days
    ],
)
def test_a_window_closes(window: Window, now: str, closes: str) -> None:
    assert closing(window, at(now), BERLIN, EASTER) == at(closes)


def test_the_first_day_of_the_calendar_has_no_night_before() -> None:
    first = datetime(1, 1, 1, 0, 30)  # noqa: DTZ001 - what a clock shows
    every_night = Window(start=time(22), end=time(6))
    assert not every_night.shows(first, ())
    assert every_night.shows(first.replace(hour=23), ())
    assert every_night.shows(first.replace(day=2), ())


def test_a_window_that_never_opens_is_reported() -> None:
    days = frozenset(date(2026, 1, 1) + timedelta(days=n) for n in range(2000))
    with pytest.raises(EvaluationError, match="four years") as error:
        opening(OFFICE, at("2026-04-01T08:00:00Z"), BERLIN, days)
    assert error.value.failure == "unsatisfiable"


@pytest.mark.parametrize(
    ("window", "hours", "since", "ends"),
    [
        (OFFICE, 4, "2026-04-01T08:00:00Z", "2026-04-01T12:00:00Z"),
        (OFFICE, 5, "2026-04-01T10:00:00Z", "2026-04-01T15:00:00Z"),  # as it closes
        (OFFICE, 4, "2026-04-02T13:00:00Z", "2026-04-07T09:00:00Z"),  # two before Easter, two after
        (OFFICE, 4, "2026-03-28T13:00:00Z", "2026-03-30T11:00:00Z"),  # arrives on Saturday
        (OFFICE, 20, "2026-04-08T07:00:00Z", "2026-04-10T11:00:00Z"),
        (OFFICE, 0, "2026-04-08T17:00:00Z", "2026-04-09T07:00:00Z"),
        (NIGHT, 9, "2026-03-27T21:00:00Z", "2026-04-03T21:00:00Z"),
        (EARLY, 2, "2026-10-24T12:00:00Z", "2026-10-27T01:45:00Z"),  # shown twice on the 25th
        (Window(frozenset({5, 6})), 47, "2026-03-27T12:00:00Z", "2026-03-29T22:00:00Z"),
    ],
)
def test_time_counts_while_a_window_is_open(
    window: Window, hours: int, since: str, ends: str
) -> None:
    off = frozenset() if window is NIGHT else EASTER
    assert open_for(window, timedelta(hours=hours), at(since), BERLIN, off) == at(ends)


def test_an_amount_that_never_is_over_is_reported() -> None:
    with pytest.raises(EvaluationError, match="not open as long in four years"):
        open_for(NIGHT, timedelta(hours=8 * 220), at("2026-04-01T08:00:00Z"), BERLIN)


def _is_open(window: Window, instant: datetime, tz: object, off: frozenset[date]) -> bool:
    """The rule, written once more in another way."""
    wall = instant.astimezone(tz)  # type: ignore[arg-type]
    minute = wall.hour * 60 + wall.minute
    start = window.start.hour * 60 + window.start.minute
    end = window.end.hour * 60 + window.end.minute if window.end else 1440
    length = (end - start) % 1440 or 1440
    for back in (0, 1):
        day = wall.date() - timedelta(days=back)
        if 0 <= minute + back * 1440 - start < length:
            return day.weekday() in window.days and day not in off
    return False


@given(windows, st.one_of(changes, instants), zones, offs)
def test_a_window_opens_at_the_first_instant_within_it(
    window: Window, now: datetime, tz: object, off: frozenset[date]
) -> None:
    opens = opening(window, now, tz, off)  # type: ignore[arg-type]
    assert opens >= now
    assert _is_open(window, opens, tz, off)
    minutes = int((min(opens, now + timedelta(days=2)) - now) / timedelta(minutes=15))
    for n in range(minutes):
        assert not _is_open(window, now + timedelta(minutes=15 * n), tz, off)
    if opens > now:
        assert not _is_open(window, opens - timedelta(microseconds=1), tz, off)


@given(windows, changes, zones, offs)
def test_a_window_is_open_until_it_closes(
    window: Window, now: datetime, tz: object, off: frozenset[date]
) -> None:
    opens = opening(window, now, tz, off)  # type: ignore[arg-type]
    closes = closing(window, opens, tz, off)  # type: ignore[arg-type]
    assert closes > opens
    for n in range(int((closes - opens) / timedelta(minutes=15))):
        assert _is_open(window, opens + timedelta(minutes=15 * n), tz, off)
    assert _is_open(window, closes - timedelta(microseconds=1), tz, off)


@given(windows, changes, st.timedeltas(timedelta(0), timedelta(days=3)), zones, offs)
def test_the_opening_is_monotone(
    window: Window, now: datetime, ahead: timedelta, tz: object, off: frozenset[date]
) -> None:
    later = opening(window, now + ahead, tz, off)  # type: ignore[arg-type]
    assert later >= opening(window, now, tz, off)  # type: ignore[arg-type]


@given(windows, changes, st.integers(0, 300), zones, offs)
def test_the_quarters_of_an_hour_in_which_a_window_is_open_are_counted(
    window: Window, now: datetime, quarters: int, tz: object, off: frozenset[date]
) -> None:
    quarter = timedelta(minutes=15)
    now = now.replace(minute=now.minute // 15 * 15)
    ends = open_for(window, quarters * quarter, now, tz, off)  # type: ignore[arg-type]
    parts = range(int((ends - now) / quarter))
    assert sum(_is_open(window, now + n * quarter, tz, off) for n in parts) == quarters
    if quarters:  # it is over as soon as that
        assert _is_open(window, ends - timedelta(microseconds=1), tz, off)


SPREAD = Window(frozenset(range(5)), time(9), time(17), spread=timedelta(minutes=30))


@pytest.mark.parametrize(
    ("since", "now", "begins"),
    [
        ("2026-04-01T03:00:00Z", "2026-04-01T03:00:00Z", "2026-04-01T07:15:00Z"),  # waits for 9:00
        ("2026-04-01T03:00:00Z", "2026-04-01T07:05:00Z", "2026-04-01T07:15:00Z"),  # is looked at
        ("2026-04-01T03:00:00Z", "2026-04-01T07:20:00Z", "2026-04-01T07:20:00Z"),
        ("2026-04-01T07:05:00Z", "2026-04-01T07:05:00Z", "2026-04-01T07:05:00Z"),  # comes at 9:05
        ("2026-04-01T14:00:00Z", "2026-04-01T14:50:00Z", "2026-04-01T14:50:00Z"),  # tried again
        ("2026-04-01T14:50:00Z", "2026-04-01T15:10:00Z", "2026-04-02T07:15:00Z"),  # after it closed
        ("2026-04-01T14:50:00Z", "2026-04-02T07:05:00Z", "2026-04-02T07:15:00Z"),
    ],
)
def test_enrollments_that_wait_for_an_opening_are_spread(since: str, now: str, begins: str) -> None:
    found = begin(SPREAD, at(now), BERLIN, since=at(since), share=lambda: 0.5)
    assert found == at(begins)


@given(
    windows,
    st.timedeltas(timedelta(minutes=1), timedelta(hours=30)),
    changes,
    st.timedeltas(timedelta(0), timedelta(days=2)),
    zones,
    st.floats(0, 1, exclude_max=True),
)
def test_spread_starts_lie_within_the_window(  # noqa: PLR0917 - drawn
    window: Window, spread: timedelta, since: datetime, ahead: timedelta, tz: object, share: float
) -> None:
    spreading = Window(window.days, window.start, window.end, None, spread)
    now = since + ahead
    begins = begin(spreading, now, tz, since=since, share=lambda: share)  # type: ignore[arg-type]
    assert begins >= now
    assert _is_open(spreading, begins, tz, frozenset())
    # at that time it begins, and does not wait once more
    assert begin(spreading, begins, tz, since=since, share=lambda: share) == begins  # type: ignore[arg-type]
