"""Draw what the benchmarks printed, as SVG, for bench/tables.py. Bars are medians, their lines the
range.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from xml.sax.saxutils import escape

WIDTH, ROW, LEFT, RIGHT = 720, 26, 200, 90
STYLE = (
    "text{font:13px system-ui,sans-serif;fill:#333}.n{fill:#777}rect{fill:#9db4c8}"
    ".ours{fill:#2f6f9f}line,polyline{stroke:#777;fill:none}polyline{stroke:#2f6f9f;"
    "stroke-width:2}.other{stroke:#b7791f}@media(prefers-color-scheme:dark){"
    "text{fill:#ddd}.n{fill:#999}}"
)

Line = Mapping[str, Any]


def read(text: str) -> list[tuple[str, Line]]:
    """Return the lines of JSON that have a workload, each with its program."""
    found = re.finditer(r"^(?:([\w-]+) +)?(\{.*\})$", text, re.MULTILINE)
    lines = [(match[1] or "sequencerd", json.loads(match[2])) for match in found]
    return [(name, line) for name, line in lines if "work" in line]


def bars(title: str, unit: str, values: Mapping[str, Sequence[float]]) -> str:
    """Draw one bar for each name; the longest fills the width."""
    room = WIDTH - LEFT - RIGHT
    scale = room / max(max(each) for each in values.values())
    parts = [f'<text x="0" y="16">{escape(title)}</text>']
    for number, (name, each) in enumerate(values.items()):
        y, median = 28 + number * ROW, statistics.median(each)
        digits = 0 if median > 100 else 2
        low, high = LEFT + min(each) * scale, LEFT + max(each) * scale
        kind = ' class="ours"' if name.startswith("sequencerd") else ""
        parts += [
            f'<text x="{LEFT - 8}" y="{y + 14}" text-anchor="end">{escape(name)}</text>',
            f'<rect x="{LEFT}" y="{y}" width="{median * scale:.1f}" height="18"{kind}/>',
            f'<line x1="{low:.1f}" x2="{high:.1f}" y1="{y + 9}" y2="{y + 9}"/>',
            f'<text x="{high + 6:.1f}" y="{y + 14}" class="n">{median:,.{digits}f} {unit}</text>',
        ]
    return svg(28 + len(values) * ROW, parts)


def curves(title: str, seconds: Sequence[float], values: Mapping[str, Sequence[float]]) -> str:
    """Draw megabytes over time."""
    height, room = 200, WIDTH - 2 * 60
    most = 1.1 * max(max(each) for each in values.values())
    parts = [f'<text x="0" y="16">{escape(title)}</text>']
    for number, (name, each) in enumerate(values.items()):
        points = [
            (60 + room * at / seconds[-1], 30 + height * (1 - value / most))
            for at, value in zip(seconds, each, strict=True)
        ]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        kind = ' class="other"' if number else ""
        parts.append(f'<polyline points="{path}"{kind}/>')
        x, y = points[-1]
        parts.append(f'<text x="{x - 4:.1f}" y="{y - 6:.1f}" text-anchor="end">{name}</text>')
    for part in range(5):
        value, y = most * part / 4, 30 + height * (1 - part / 4)
        parts.append(
            f'<text x="52" y="{y + 4:.1f}" text-anchor="end" class="n">{value:.0f} MB</text>'
        )
    for part in range(6):
        x, minute = 60 + room * part / 5, seconds[-1] * part / 300
        parts.append(
            f'<text x="{x:.1f}" y="{height + 48}" text-anchor="middle" class="n">'
            f"{minute:.0f} min</text>"
        )
    return svg(height + 56, parts)


def svg(height: float, parts: Sequence[str]) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}">'
        f"<style>{STYLE}</style>{''.join(parts)}</svg>\n"
    )


def pictures(text: str) -> Iterator[tuple[str, str]]:
    """Yield the name and the drawing of each picture for which the text has figures."""
    rates: dict[str, list[float]] = {}
    waves: dict[str, list[float]] = {}
    for name, line in (lines := read(text)):
        work = line["work"]
        if work in ("w1", "pure", "limit"):
            label = {
                "w1": name,
                "pure": f"{name}, without effects",
                "limit": "PostgreSQL, one session",
            }[work]
            rates.setdefault(label, []).append(line["transitions_per_s"])
        if work == "wave" and "p99_s" in line:
            waves.setdefault(name, []).append(line["p99_s"])
    mix = [line for _, line in lines if line["work"] == "mix"]
    if len(rates) > 1:
        yield "w1", bars("Chain of three: tasks a second", "/s", rates)
    if len(waves) > 1:
        yield "wave", bars("Seconds until 99% of a wave have started", "s", waves)
    if mix:
        yield (
            "mix",
            curves(
                "Size of sequencer.enrollments while 2,000 a second enter and leave",
                [line["seconds"] for line in mix],
                {
                    "table": [line["table_mb"] for line in mix],
                    "indexes": [line["indexes_mb"] for line in mix],
                },
            ),
        )
