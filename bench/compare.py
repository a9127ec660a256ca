"""Runs the engine, PostgreSQL's limit and the peers that are installed, in turns, and compares.

    PYTHONPATH=. python bench/compare.py --dsn postgresql://postgres@127.0.0.1/postgres

Peers are programs for Node in bench/peers, installed by `npm install` there. Each figure is
a median over --repeat rounds. Rates and ratios hold for one machine and one run: what disturbs it
disturbs everybody in turn.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent
NODE = HERE / "peers/node_modules/.bin/node"

Figures = dict[tuple[str, str, str], list[float]]
"""By program, work and name of the figure."""


def programs(arguments: argparse.Namespace) -> Iterator[tuple[str, list[str]]]:
    """Everything that takes part: a name, and the command that measures it."""
    options = ["--dsn", arguments.dsn]
    sizes = ["--subjects", str(arguments.subjects), "--wave", str(arguments.wave)]
    works = ["--works", "limit,pure,w1,http,wave,timer,wake"]
    yield "sequencerd", [sys.executable, str(HERE / "engine.py"), *options, *sizes, *works]
    if not NODE.exists():
        print(f"no peers: run `npm install` in {HERE / 'peers'}", file=sys.stderr)
        return
    few = [
        "--subjects",
        str(min(arguments.subjects, arguments.slow)),
        "--wave",
        str(arguments.wave),
    ]
    for name, amount in (("pg_boss", sizes), ("graphile_worker", few)):
        yield name, [str(NODE), str(HERE / f"peers/{name}.mjs"), *options, *amount]


def measure(name: str, command: list[str], figures: Figures) -> None:
    """Runs one program, shows its lines and keeps its figures."""
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(f"{name:16} {line}", end="", flush=True)
            one: Mapping[str, float] = json.loads(line)
            for figure, value in one.items():
                if figure != "work":
                    figures.setdefault((name, str(one["work"]), figure), []).append(value)
    if process.returncode:
        print(f"{name}: ended with status {process.returncode}", file=sys.stderr)


def show(figures: Figures) -> None:
    """The medians, and how often better ours is."""
    table = Table("work", "figure", "program", "median", "range", "sequencerd's is", box=None)
    for work, figure, unit in (
        ("pure", "transitions_per_s", "/s"),
        ("w1", "transitions_per_s", "/s"),
        ("http", "transitions_per_s", "/s"),
        ("limit", "transitions_per_s", "/s"),
        ("wave", "p99_s", "s"),
        ("wave", "all_done_s", "s"),
        ("timer", "p99_ms", "ms"),
        ("wake", "p50_ms", "ms"),
        ("wake", "p99_ms", "ms"),
        ("raw notify", "p99_ms", "ms"),
    ):
        own = "w1" if work == "limit" else "wake" if work == "raw notify" else work
        ours = statistics.median(figures.get(("sequencerd", own, figure), [0.0]))
        for (name, its_work, its_figure), values in figures.items():
            if (its_work, its_figure) == (work, figure):
                median = statistics.median(values)
                spread = f"{min(values):,.4g} to {max(values):,.4g}"
                is_self = name == "sequencerd" and own == work
                ratio = "" if is_self else f"{100 * ours / median:.0f}% of it"
                table.add_row(work, figure, name, f"{median:,.4g} {unit}", spread, ratio)
    Console(width=120).print(table)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dsn", required=True, help="a superuser's URL, by TCP")
    parser.add_argument("--subjects", type=int, default=50_000)
    parser.add_argument("--wave", type=int, default=20_000)
    parser.add_argument(
        "--slow", type=int, default=5_000, help="subjects for peers without batches"
    )
    parser.add_argument("--repeat", type=int, default=3)
    arguments = parser.parse_args()
    figures: Figures = {}
    for _ in range(arguments.repeat):
        for name, command in programs(arguments):
            measure(name, command, figures)
    show(figures)


if __name__ == "__main__":
    main()
