"""Windows: the times of a week at which something may begin, such as Monday to Friday from 9 to 17.

A window is open while the local clock shows a time in it, also on days on which the clock is set: a
window that the clock skips does not open that day, and one that occurs twice opens twice. A window
across midnight belongs to the day on which it opens.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from datetime import date, datetime, time, timedelta
from zoneinfo import ZoneInfo

from sequencerd.core.calendar.zones import next_candidate, to_wall
from sequencerd.core.faults import EvaluationError
from sequencerd.core.model import Window

WEEKDAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")

_DAY = timedelta(days=1)
_HORIZON_DAYS = 4 * 366  # days in which it must open once
_MAX_ADJACENT = 8  # openings without a break that are followed to find out when it closes


def opening(
    window: Window, since: datetime, tz: ZoneInfo, holidays: Collection[date] = ()
) -> datetime:
    """Return the first instant from `since` on at which the window is open.

    Raise EvaluationError (unsatisfiable) if it does not open within four years.
    """
    try:
        instant = since
        while (instant - since).days <= _HORIZON_DAYS:
            wall = to_wall(instant, tz)
            if window.shows(wall, holidays):
                return instant
            instant = next_candidate(_next_showing(window.start, wall), instant, tz)
    except OverflowError:
        pass  # the calendar ends
    raise EvaluationError("unsatisfiable", "the window will not open within four years")


def closing(
    window: Window, at: datetime, tz: ZoneInfo, holidays: Collection[date] = ()
) -> datetime:
    """Return when a window that is open `at` an instant closes.

    Days that follow each other without a break are one opening; of more than some, it is the end of
    one of them.
    """
    instant = at
    for _ in range(_MAX_ADJACENT):
        wall = to_wall(instant, tz)
        if not window.shows(wall, holidays):
            break
        instant = next_candidate(_next_showing(window.end or time.min, wall), instant, tz)
    return instant


def open_for(
    window: Window,
    amount: timedelta,
    since: datetime,
    tz: ZoneInfo,
    holidays: Collection[date] = (),
) -> datetime:
    """Return when a window will have been open for an amount of time since an instant: with 0, when
    it opens. Raise EvaluationError (unsatisfiable) if that takes more than four years.
    """
    instant = opening(window, since, tz, holidays)
    while (closes := closing(window, instant, tz, holidays)) - instant < amount:
        amount -= closes - instant
        instant = opening(window, closes, tz, holidays)
        if (instant - since).days > _HORIZON_DAYS:
            raise EvaluationError("unsatisfiable", "the window is not open as long in four years")
    return instant + amount


def begin(
    window: Window,
    now: datetime,
    tz: ZoneInfo,
    holidays: Collection[date] = (),
    *,
    since: datetime,
    share: Callable[[], float] = lambda: 0.0,
) -> datetime:
    """Return when something that waits since `since` may begin: now, or later. `share` (0 to 1) is
    its position in the spread. What arrived while the window was open begins at once; what waited
    for the opening begins at its position, even if it is evaluated earlier.
    """
    opens = opening(window, now, tz, holidays)
    if not window.spread:
        return opens
    if opens == now:
        since = max(min(since, now), now - window.spread)
        opens = opening(window, since, tz, holidays)
        if opens == since:
            closes = closing(window, since, tz, holidays)
            if closes > now:
                return now
            opens = opening(window, closes, tz, holidays)
    length = closing(window, opens, tz, holidays) - opens
    delay = min(window.spread, length) * share()
    return max(now, opens + min(delay, length - timedelta.resolution))  # rounded, it may be closed


def _next_showing(clock: time, wall: datetime) -> datetime:
    """Return the next wall time after this one with a time of day."""
    days = 0 if wall.time() < clock else 1
    return datetime.combine(wall.date() + _DAY * days, clock, tzinfo=wall.tzinfo)
