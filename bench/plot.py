"""Draws what the benchmarks printed, as SVG.

    PYTHONPATH=. python bench/compare.py 2> results.txt
    PYTHONPATH=. python bench/scale.py --dsn ... --works mix | tee --append results.txt
    python bench/plot.py results.txt docs

It writes performance-w1.svg, -wave.svg and -mix.svg. Bars are medians, their lines the range.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

WIDTH, ROW, LEFT, RIGHT = 720, 26, 200, 90
STYLE = (
    "text{font:13px system-ui,sans-serif;fill:#333}.n{fill:#777}rect{fill:#9db4c8}"
    ".ours{fill:#2f6f9f}line,polyline{stroke:#777;fill:none}polyline{stroke:#2f6f9f;"
    "stroke-width:2}.other{stroke:#b7791f}@media(prefers-color-scheme:dark){"
    "text{fill:#ddd}.n{fill:#999}}"
)
NAMES = {"pg_boss": "pg-boss", "graphile_worker": "graphile-worker"}

Line = Mapping[str, Any]


def read(path: Path) -> list[tuple[str, Line]]:
    """The lines of JSON, each with its program."""
    found = re.finditer(r"^(?:(\w+) +)?(\{.*\})$", path.read_text(), re.MULTILINE)
    return [(match[1] or "sequencerd", json.loads(match[2])) for match in found]


def bars(title: str, unit: str, values: Mapping[str, Sequence[float]]) -> str:
    """One bar for each name, the longest as long as the room."""
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
    """Megabytes over time."""
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


def main(arguments: argparse.Namespace) -> None:
    """Draws all three."""
    rates: dict[str, list[float]] = {}
    waves: dict[str, list[float]] = {}
    for program, line in (lines := read(arguments.results)):
        name = NAMES.get(program, program)
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
    drawn = {
        "w1": bars("W1: transitions a second", "/s", rates),
        "wave": bars("W2: seconds until 99% of a wave of 20,000 have started", "s", waves),
        "mix": curves(
            "W6: size of sequencer.enrollments while 2,000 a second enter and leave",
            [line["seconds"] for line in mix],
            {
                "table": [line["table_mb"] for line in mix],
                "indexes": [line["indexes_mb"] for line in mix],
            },
        ),
    }
    for name, text in drawn.items():
        (arguments.folder / f"performance-{name}.svg").write_text(text)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path)
    parser.add_argument("folder", type=Path)
    main(parser.parse_args())
