"""Format values for pages. All text is escaped, except the HTML that is made here."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from functools import cache
from importlib.resources import files
from typing import Any
from zoneinfo import ZoneInfo

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from sequencerd.console.tables import ROOT_PATH, at, at_shard, labelled
from sequencerd.core import describe
from sequencerd.core.calendar.dates import zone as find_zone
from sequencerd.core.faults import DefinitionError

STATIC = files("sequencerd.console") / "static"


@cache
def make_templates() -> Environment:
    """Return the templates and their functions, which all consoles of a process share."""
    made = Environment(
        autoescape=True,
        loader=PackageLoader("sequencerd.console"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters.update(
        when=when,
        timed=timed,
        number=number,
        counted=describe.counted,
        duration=duration,
        days=days,
        bars=bars,
        pretty=pretty,
        wakes=wakes,
        labelled=labelled,
    )
    made.tests["in_data"] = lambda key: key.startswith("data.")
    made.globals.update(at=at, at_shard=at_shard, asset=asset)
    for name in made.list_templates():
        made.get_template(name)  # so that the first reader does not wait
    return made


@cache
def asset(name: str) -> str:
    """Return the URL of a static file, which changes with the file's contents."""
    digest = hashlib.sha256((STATIC / name).read_bytes()).hexdigest()[:12]
    return f"{ROOT_PATH}/static/{name}?v={digest}"


def when(value: datetime | None, zone: str = "UTC") -> str:
    """Return a time in UTC, which the browser shows in its own time zone. The title has the exact
    time, also in the given zone.
    """
    if value is None:
        return Markup('<span class="none">not yet</span>')
    if describe.is_never(value):
        return "when something changes"
    exact = value.astimezone(UTC).isoformat(" ").replace("+00:00", " UTC")
    if zone != "UTC":
        exact += f", {clock(value, zone)}"
    return Markup('<time datetime="{}" title="{}">{}</time>').format(
        value.astimezone(UTC).isoformat(), exact, clock(value, "UTC")
    )


_TIME = re.compile(r"\b(\d{4}-\d\d-\d\d \d\d:\d\d:\d\dZ)")


def timed(text: str, zone: str = "UTC") -> str:
    """Return a text whose times, as `describe.text` writes them, are shown as in tables."""
    return Markup("").join(
        when(datetime.fromisoformat(part), zone) if n % 2 and _is_time(part) else part
        for n, part in enumerate(_TIME.split(text))
    )


def _is_time(text: str) -> bool:
    try:
        datetime.fromisoformat(text)
    except ValueError:
        return False
    return True


def sentence(describe: Callable[[Callable[[datetime], str]], str], zone: str) -> str:
    """Return a sentence whose times are shown as in tables; `describe` makes it, given a function
    that formats a time.
    """
    times: list[datetime] = []

    def keep(value: datetime) -> str:
        times.append(value)
        return f"\0{len(times) - 1}\0"

    text = describe(keep)
    texts = f"{text[:1].upper()}{text[1:]}.".split("\0")
    return Markup("").join(
        when(times[int(text)], zone) if n % 2 else text for n, text in enumerate(texts)
    )


def clock(value: datetime, zone: str) -> str:
    """Return a time as a clock in a zone shows it, and the zone."""
    try:
        found = find_zone(zone)
    except DefinitionError:
        zone, found = "UTC", ZoneInfo("UTC")
    try:
        local = value.astimezone(found)
    except OverflowError:
        local, zone = value, "UTC"
    return f"{local:%a %Y-%m-%d %H:%M:%S} {zone}"


def number(value: int | None, is_capped: bool = False) -> str:
    """Format a count, or a lower bound if the counting was stopped."""
    if value is None:
        return "–"
    return f"{value:,}{'+' if is_capped else ''}"


def duration(seconds: float | Mapping[str, float] | None) -> str:
    """Format a duration with its two greatest units; for several shards, the range."""
    if seconds is None:
        return "–"
    if isinstance(seconds, Mapping):
        ends = dict.fromkeys(map(duration, (min(seconds.values()), max(seconds.values()))))
        return " to ".join(ends)
    return describe.duration(seconds)


def days(counts: Mapping[str, int]) -> str:
    """Return a chart with a bar for each day, and the same values as text."""
    most = max(counts.values(), default=0)
    bars = Markup("").join(
        _bar(n * 7, math.ceil(23 * count / most), f"{day}: {count:,}")
        for n, (day, count) in enumerate(counts.items())
        if count  # of thousands of sequences, most days have none
    )
    total = sum(counts.values())
    label = f"{total:,} in {len(counts)} days, at most {most:,} in one"
    return Markup(
        '<svg class="chart" viewBox="0 0 {} 24" role="img" aria-label="{}">{}</svg> '
        '<span class="sum">{}</span>'
    ).format(len(counts) * 7 - 2, label, bars, f"{total:,}")


def wakes(bars: Sequence[Any]) -> str:
    """Return a histogram of wake times, and the same values as text."""
    first, last = bars[0], bars[-1]
    width = (first.until - first.since) or timedelta(minutes=1)
    most = max(bar.number for bar in bars)
    drawn = Markup("").join(
        _bar(
            round((bar.since - first.since) / width) * 7,
            math.ceil(23 * bar.number / most),
            f"{clock(bar.since, 'UTC')}: {bar.number:,}",
        )
        for bar in bars
    )
    columns = round((last.since - first.since) / width) + 1
    total = sum(bar.number for bar in bars)
    label = f"{total:,} next checks, at most {most:,} within {duration(width.total_seconds())}"
    return Markup(
        '<svg class="chart wakes" viewBox="0 0 {} 24" preserveAspectRatio="none" role="img"'
        ' aria-label="{}">{}</svg>'
    ).format(max(columns, 8) * 7 - 2, label, drawn)


def _bar(x: int, height: int, title: str) -> str:
    return Markup('<rect x="{}" y="{}" width="5" height="{}"><title>{}</title></rect>').format(
        x, 24 - height, height, title
    )


def bars(
    points: Sequence[tuple[datetime | str, float]],
    title: str,
    unit: str,
    *,
    of_delays: bool = False,
) -> str:
    """Return a chart of one bar for each hour or day, of counts or of delays in seconds. Its
    maximum is given as text as well; its values belong in a table beside it.
    """

    def formatted(value: float) -> str:
        return duration(value) if of_delays else f"{value:,}"

    most = max((value for _, value in points), default=0)
    drawn = Markup("").join(
        _wide_bar(n, 100 * value / most, f"{_label(at)}: {formatted(value)}")
        for n, (at, value) in enumerate(points)
        if value
    )
    total = "" if of_delays else f"{sum(value for _, value in points):,} in "
    label = f"{title}: {total}{len(points)} {unit}s, at most {formatted(most)} in one"
    first, last = (_label(points[n][0]) if points else "" for n in (0, -1))
    return Markup(
        '<svg class="bars" viewBox="0 0 {} 100" preserveAspectRatio="none" role="img"'
        ' aria-label="{}">{}</svg><p class="axis"><span>{}</span><span>at most {}</span>'
        "<span>{}</span></p>"
    ).format(len(points) * 4, label, drawn, first, formatted(most), last)


def _wide_bar(n: int, height: float, title: str) -> str:
    shown = max(height, 2)
    return Markup(
        '<rect x="{}" y="{:.1f}" width="3" height="{:.1f}"><title>{}</title></rect>'
    ).format(n * 4, 100 - shown, shown, title)


def _label(at: datetime | str) -> str:
    """Return a day, or the hour that begins then, in UTC."""
    return at if isinstance(at, str) else f"{at:%Y-%m-%d %H:%M} UTC"


def pretty(value: Any) -> str:
    """Format JSON over several lines."""
    return escape(json.dumps(value, indent=2, ensure_ascii=False, default=str))
