"""Run sequencerd, PostgreSQL's own limit and other queues in turns, and print a table.

    python bench/compare.py                         a server of its own, all peers
    python bench/compare.py --server 15 --server 18 --peers pg-boss

Peers are installed at their first run, below bench/peers. A program's figures are dropped if other
processes used more than a tenth of a core while it ran: they would say something about these.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
import venv
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import cpu
import postgresql

HERE = Path(__file__).parent
PEERS = HERE / "peers"
NODE = PEERS / "node_modules/.bin/node"
DISTURBED = 0.1  # cores that other processes may use
COMMON = ("psycopg[binary]==3.3.9", "uvloop==0.23.0")


@dataclass(frozen=True, slots=True)
class Peer:
    """A queue: its program in bench/peers, its packages for Python, and what it is as it runs."""

    program: str
    shown: str
    packages: tuple[str, ...] = ()
    is_slow: bool = True  # executes fewer than a few thousand jobs a second


KNOWN = {
    "pg-boss": Peer(
        "pg_boss.mjs", "pg-boss 12.38, batches of 500, a table for each queue", is_slow=False
    ),
    "graphile-worker": Peer("graphile_worker.mjs", "graphile-worker 0.18, local queue"),
    "pgqueuer": Peer("pgqueuer_.py", "pgqueuer 1.6, batches of 500", ("pgqueuer[asyncpg]==1.6.0",)),
    "procrastinate": Peer("procrastinate_.py", "procrastinate 3.10", ("procrastinate==3.10.0",)),
    "absurd": Peer("absurd_.py", "absurd 0.5", ("absurd-sdk==0.5.1", "absurdctl==0.5.1")),
    "awa": Peer("awa_.py", "awa 0.6", ("awa-pg==0.6.9",)),
    "dbos": Peer("dbos_.py", "DBOS 3.4", ("dbos==3.4.0",)),
}

COLUMNS = (
    ("w1", "transitions_per_s", "chain of three, tasks a second", True),
    ("flat", "transitions_per_s", "one task each, a second", True),
    ("flat", "enrolled_per_s", "added in bulk, a second", True),
    ("wave", "p99_s", "wave, 99% started, s", False),
    ("wave", "all_done_s", "wave, all done, s", False),
    ("wake", "p50_ms", "wake, median, ms", False),
    ("wake", "p99_ms", "wake, 99%, ms", False),
)
"""Work, figure, heading, and whether more is better."""
ALONE = (
    ("limit", "transitions_per_s"),
    ("pure", "transitions_per_s"),
    ("data", "transitions_per_s"),
    ("http", "transitions_per_s"),
    ("timer", "p99_ms"),
    ("raw notify", "p99_ms"),
)
"""What has no counterpart at the peers."""

Figures = dict[tuple[str, str, str], list[float]]
"""By program, work and name of the figure."""


def install(name: str) -> list[str] | None:
    """Return the command that runs a peer, installed if necessary; None if that fails."""
    peer = KNOWN[name]
    program = PEERS / peer.program
    if peer.program.endswith(".mjs"):
        if not NODE.exists() and not _run(["npm", "install", "--no-audit", "--no-fund"], PEERS):
            return None
        return [str(NODE), str(program)]
    folder = PEERS / "venvs" / name
    python = folder / "bin/python"
    if not (folder / "installed").exists():
        venv.create(folder, with_pip=True, clear=True)
        packages = [*peer.packages, *COMMON]
        if not _run([str(python), "-m", "pip", "install", "--quiet", *packages], PEERS):
            return None
        (folder / "installed").touch()
    return [str(python), str(program)]


def _run(command: list[str], folder: Path) -> bool:
    print(" ".join(command), file=sys.stderr)
    try:
        return subprocess.run(command, cwd=folder, stdout=sys.stderr, check=False).returncode == 0
    except FileNotFoundError as error:
        print(error, file=sys.stderr)
        return False


def programs(arguments: argparse.Namespace) -> Iterator[tuple[str, list[str]]]:
    """Yield everything that takes part: a name, and the command that measures it."""
    sizes = ["--wave", str(arguments.wave), "--samples", str(arguments.samples)]
    works = ["--works", "limit,pure,data,w1,flat,http,wave,timer,wake"]
    many = ["--subjects", str(arguments.subjects)]
    few = ["--subjects", str(min(arguments.subjects, arguments.slow))]
    yield "sequencerd", [sys.executable, str(HERE / "engine.py"), *sizes, *many, *works]
    for name in arguments.peers:
        command = install(name)
        if command is None:
            print(f"{name}: could not be installed, it is left out", file=sys.stderr)
        else:
            yield name, [*command, *sizes, *(few if KNOWN[name].is_slow else many)]


def measure(name: str, command: list[str], postmaster: int | None, figures: Figures) -> None:
    """Run one program, print its lines, and keep its figures if nothing disturbed it."""
    found: Figures = {}
    environment = {**os.environ, "PYTHONPATH": str(HERE.parent)}
    begun, busy, served = time.monotonic(), cpu.machine(), _of(postmaster)
    own = os.times()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(f"{name:16} {line}", end="", flush=True, file=sys.stderr)
            one: Mapping[str, float] = json.loads(line)
            for figure, value in one.items():
                if figure != "work":
                    found.setdefault((name, str(one["work"]), figure), []).append(value)
    if process.returncode:
        print(f"{name}: ended with status {process.returncode}", file=sys.stderr)
    seconds = time.monotonic() - begun
    others = cpu.machine() - busy - (_of(postmaster) - served) - _since(own)
    if postmaster is not None and others > DISTURBED * seconds:
        print(
            f"{name}: dropped, as other processes used {others / seconds:.2f} cores meanwhile",
            file=sys.stderr,
        )
        return
    for key, values in found.items():
        figures.setdefault(key, []).extend(values)


def _of(postmaster: int | None) -> float:
    return cpu.tree(postmaster) if postmaster is not None else 0.0


def _since(before: os.times_result) -> float:
    """Return the CPU time of this process and of those that it has waited for."""
    return sum(os.times()[:4]) - sum(before[:4])


def report(figures: Figures, names: Iterable[str]) -> str:
    """Return the medians as Markdown, the best of each column in bold."""
    medians = {key: statistics.median(values) for key, values in figures.items()}
    lines = [
        "| | " + " | ".join(heading for _, _, heading, _ in COLUMNS) + " |",
        "| --- |" + " ---: |" * len(COLUMNS),
    ]
    for name in names:
        cells = []
        for work, figure, _, is_rate in COLUMNS:
            value = medians.get((name, work, figure))
            column = [v for (_, w, f), v in medians.items() if (w, f) == (work, figure)]
            is_best = value is not None and value == (max(column) if is_rate else min(column))
            shown = "-" if value is None else f"{value:,.0f}" if is_rate else f"{value:.3g}"
            cells.append(f"**{shown}**" if is_best and len(column) > 1 else shown)
        shown_name = KNOWN[name].shown if name in KNOWN else name
        lines.append(f"| {shown_name} | " + " | ".join(cells) + " |")
    lines.append("")
    for work, figure in ALONE:
        if (value := medians.get(("sequencerd", work, figure))) is not None:
            lines.append(f"- `{work}`: {value:,.4g} {figure}")
    lines += [f"- {line}" for line in behind(medians)]
    spread = [
        f"{name} {work} {figure} {min(values):,.4g} to {max(values):,.4g}"
        for (name, work, figure), values in figures.items()
        if len(values) > 1 and (work, figure) in {column[:2] for column in COLUMNS}
    ]
    return "\n".join([*lines, *(["", "Ranges: " + "; ".join(spread)] if spread else [])])


def behind(medians: Mapping[tuple[str, str, str], float]) -> Iterator[str]:
    """Yield a line for each column in which peers are ahead of sequencerd."""
    for work, figure, heading, is_rate in COLUMNS:
        ours = medians.get(("sequencerd", work, figure))
        ahead = [
            f"{name} {value:,.4g}"
            for (name, its_work, its_figure), value in medians.items()
            if ours is not None
            and (its_work, its_figure) == (work, figure)
            and (value > ours if is_rate else value < ours)
        ]
        if ahead:
            yield f'behind in "{heading}", with {ours:,.4g}: {", ".join(ahead)}'


def machine(version: str) -> str:
    """Return a line that names the machine and the versions."""
    cpus = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    models = {line.partition(":")[2].strip() for line in cpus.splitlines() if "model name" in line}
    revision = subprocess.run(
        ["git", "-C", str(HERE), "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    settings = ", ".join(f"{name} = {value}" for name, value in postgresql.SETTINGS.items())
    return (
        f"{len(os.sched_getaffinity(0))} cores ({', '.join(sorted(models)) or platform.machine()}),"
        f" Linux {platform.release()}, PostgreSQL {version} ({settings}),"
        f" Python {platform.python_version()}, sequencerd {revision}"
    )


def main() -> int:
    """Measure and print. Return 1 if the figures of sequencerd were all dropped."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--server",
        action="append",
        metavar="SERVER",
        help="a version in /usr/lib/postgresql or of the embedded server, a folder of programs, or"
        " embedded (default); repeat it to compare servers",
    )
    parser.add_argument("--peers", nargs="*", default=list(KNOWN), choices=KNOWN, metavar="PEER")
    parser.add_argument("--subjects", type=int, default=50_000)
    parser.add_argument("--wave", type=int, default=20_000)
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--slow", type=int, default=5_000, help="subjects for slow peers")
    parser.add_argument("--repeat", type=int, default=3)
    arguments = parser.parse_args()
    found = list(programs(arguments))
    is_whole = True
    for wanted in arguments.server or ["embedded"]:
        figures: Figures = {}
        with postgresql.running(wanted) as one:
            for _ in range(arguments.repeat):
                for name, command in found:
                    measure(name, [*command, "--dsn", one.dsn], one.process, figures)
            print(f"{machine(one.version)}. Medians of {arguments.repeat} rounds.\n")
        if any(key[0] == "sequencerd" for key in figures):
            print(report(figures, [name for name, _ in found]), flush=True)
        else:
            is_whole = False
            print("No figures: other processes disturbed every round.", flush=True)
    return 0 if is_whole else 1


if __name__ == "__main__":
    sys.exit(main())
