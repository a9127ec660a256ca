"""Find consecutive waits for parts of a date that do not mean what they seem to."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from sequencerd.core.calendar.next_match import full_name
from sequencerd.core.calendar.windows import WEEKDAYS

_SIZES = (
    ("millisecond",),
    ("second",),
    ("minute",),
    ("hour",),
    ("day", "weekday", "isoWeekday", "date", "dayOfYear"),
    ("week", "isoWeek"),
    ("month",),
    ("quarter",),
    ("year", "weekYear", "isoWeekYear"),
)
_RANK = {name: rank for rank, names in enumerate(_SIZES) for name in names}


def in_a_row(first: Mapping[str, Any], second: Mapping[str, Any]) -> str | None:
    """Say what is wrong with a WaitForDateComparison that follows another; None if nothing is.

    The first may match on arrival, and no longer when the second one does. A first one that waits
    for the start of a day is correct before an hour.
    """
    one, other = (full_name(config["attribute"]) or "" for config in (first, second))
    if _RANK[one] == _RANK[other]:
        return None
    if _RANK[one] > _RANK[other]:
        if first.get("occurrence") == "next":
            return None
        wrong = f"{other} may match first when {one} no longer does"
    else:
        wrong = f"{other} may match first when {one} no longer does, at its start"
    if {one, other} == {"hour", "minute"}:
        hour, minute = (first, second) if one == "hour" else (second, first)
        return f"{wrong}, as at 9:45 with hour [9] and minute [30]: {_at(hour, minute)}"
    if other == "hour" and one in ("day", "weekday", "isoWeekday"):
        wrong += ", as on the evening of the last of these days"
    window = json.dumps(_window(first) | _window(second)) if "hour" in (one, other) else ""
    advice = (
        f"write one WaitForWindow instead, such as {window}"
        if window
        else (
            f"wait for {one} with occurrence: next"
            if _RANK[one] > _RANK[other]
            else f"wait for {other} first, with occurrence: next"
        )
    )
    return f"{wrong}: {advice}"


def _at(hour: Mapping[str, Any], minute: Mapping[str, Any]) -> str:
    time = "09:30"
    match hour["values"], minute["values"]:
        case [int(hours), *_], [int(minutes), *_]:
            time = f"{hours:02}:{minutes:02}"
    return (
        f'write one WaitForWindow instead, with from: "{time}", or of a date, WaitForDate with '
        f'at: "{time}"'
    )


def _window(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of a window for the values of a comparison."""
    values = config["values"]
    if not all(isinstance(value, int) for value in values):
        return {}
    match full_name(config["attribute"]):
        case "day" | "weekday" | "isoWeekday":
            days = sorted({(value - 1) % 7 for value in values})
            return {"days": [WEEKDAYS[day] for day in days]}
        case "hour":
            return {"from": f"{min(values):02}:00", "to": f"{_after(values):02}:00"}
    return {}


def _after(hours: Sequence[int]) -> int:
    """Return the end of the consecutive hours from the first one on."""
    end = min(hours)
    while end in hours:
        end += 1
    return end
