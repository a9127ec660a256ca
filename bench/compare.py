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
import signal
import statistics
import subprocess
import sys
import time
import venv
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cpu
import postgresql

HERE = Path(__file__).parent
PEERS = HERE / "peers"
NODE = PEERS / "node_modules/.bin/node"
DISTURBED = 0.1  # cores that other processes may use
SILENCE = 600  # seconds in which a program prints a line, or has stopped
COMMON = ("psycopg[binary]==3.3.9", "uvloop==0.23.0")


@dataclass(frozen=True, slots=True)
class Peer:
    """A queue: its program in bench/peers, its packages for Python, its name in the table, and the
    most work that it gets, so that no queue takes much longer than the others.
    """

    program: str
    shown: str
    packages: tuple[str, ...] = ()
    subjects: int = 5_000
    wave: int = 20_000


KNOWN = {
    "pg-boss": Peer(
        "pg_boss.mjs", "pg-boss 12.38, batches of 500, a table for each queue", subjects=50_000
    ),
    "graphile-worker": Peer("graphile_worker.mjs", "graphile-worker 0.18, local queue"),
    "pgqueuer": Peer("pgqueuer_.py", "pgqueuer 1.6, batches of 500", ("pgqueuer[asyncpg]==1.6.0",)),
    # of 5,000 jobs for the same time, it started none within a minute, and of 20,000 within ten
    "awa": Peer("awa_.py", "awa 0.6", ("awa-pg==0.6.9",), wave=2_000),
    "procrastinate": Peer(
        "procrastinate_.py", "procrastinate 3.10", ("procrastinate==3.10.0",), 2_000, 5_000
    ),
    "absurd": Peer(
        "absurd_.py", "absurd 0.5", ("absurd-sdk==0.5.1", "absurdctl==0.5.1"), 2_000, 5_000
    ),
    "dbos": Peer("dbos_.py", "DBOS 3.4", ("dbos==3.4.0",), 2_000, 5_000),
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
    ("w1", "transitions_per_s"),
    ("http", "transitions_per_s"),
    ("timer", "p50_ms"),
    ("timer", "p99_ms"),
    ("raw notify", "p99_ms"),
    ("raw commit", "p50_ms"),
    ("raw commit", "p99_ms"),
)
"""Workloads that have no counterpart in the other queues."""

OWN_WORKS = "limit,pure,data,w1,flat,http,wave,timer,wake"

Line = Mapping[str, Any]
Figures = dict[tuple[str, str, str], list[float]]
"""By program, work and name of the figure."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """The work of each program, unless it is slow."""

    subjects: int = 50_000
    wave: int = 20_000
    samples: int = 200

    def arguments(self, subjects: int, wave: int) -> list[str]:
        """Return the arguments of a program for its part of the work."""
        return [
            *("--subjects", str(min(subjects, self.subjects))),
            *("--wave", str(min(wave, self.wave))),
            *("--samples", str(self.samples)),
        ]

    def shown(self, names: Iterable[str]) -> str:
        """Return a sentence that names the queues with less work."""
        known = [(name, KNOWN[name]) for name in names if name in KNOWN]
        few = [name for name, peer in known if peer.subjects < self.subjects]
        small = [name for name, peer in known if peer.wave < self.wave]
        parts = [f"{self.subjects:,} subjects", f"a wave of {self.wave:,}"]
        for left, what in ((few, "subjects"), (small, "wave")):
            sizes = sorted({getattr(KNOWN[name], what) for name in left}, reverse=True)
            parts += [
                f"{what} of {', '.join(n for n in left if getattr(KNOWN[n], what) == size)}:"
                f" {size:,}"
                for size in sizes
            ]
        return "; ".join(parts)


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


def programs(
    peers: Iterable[str], sizes: Sizes, works: str = OWN_WORKS
) -> Iterator[tuple[str, list[str]]]:
    """Yield the name of each program, and the command that measures it."""
    yield (
        "sequencerd",
        [
            *(sys.executable, str(HERE / "engine.py"), "--works", works),
            *sizes.arguments(sizes.subjects, sizes.wave),
        ],
    )
    for name in peers:
        command = install(name)
        if command is None:
            print(f"{name}: could not be installed, it is left out", file=sys.stderr)
        else:
            peer = KNOWN[name]
            yield name, [*command, *sizes.arguments(peer.subjects, peer.wave)]


def run(
    name: str, command: Sequence[str], server: postgresql.Server, *, is_kept: bool = False
) -> list[Line] | None:
    """Run one program, print its lines, and return them; None if other processes disturbed it,
    unless such figures are kept. A program that prints nothing for SILENCE is stopped.
    """
    lines: list[Line] = []
    signal.signal(signal.SIGALRM, _give_up)
    environment = {**os.environ, "PYTHONPATH": str(HERE.parent)}
    begun, busy, served = time.monotonic(), cpu.machine(), cpu.tree(server.process)
    own = os.times()
    with subprocess.Popen(
        [*command, "--dsn", server.dsn], stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        try:
            signal.alarm(SILENCE)
            for line in process.stdout:
                signal.alarm(SILENCE)
                print(f"{name:16} {line}", end="", flush=True, file=sys.stderr)
                lines.append(json.loads(line))
        except TimeoutError:
            print(f"{name}: stopped, as it printed nothing for {SILENCE} s", file=sys.stderr)
            process.terminate()
        except BaseException:
            process.terminate()
            raise
        finally:
            signal.alarm(0)
    if process.returncode:
        print(f"{name}: ended with status {process.returncode}", file=sys.stderr)
    seconds = time.monotonic() - begun
    others = cpu.machine() - busy - (cpu.tree(server.process) - served) - _since(own)
    if others <= DISTURBED * seconds:
        return lines
    done = "kept, although" if is_kept else "dropped, as"
    print(
        f"{name}: {done} other processes used {others / seconds:.2f} cores meanwhile",
        file=sys.stderr,
    )
    return lines if is_kept else None


def _give_up(_: int, __: object) -> None:
    raise TimeoutError


def collect(name: str, lines: Iterable[Line], figures: Figures) -> None:
    """Add the figures of a program's lines, without waves for which it was not ready in time."""
    for line in lines:
        if line.get("spare_s", 0) < 0:
            print(f"{name}: dropped a wave, as adding it took too long", file=sys.stderr)
            continue
        for figure, value in line.items():
            if figure != "work":
                figures.setdefault((name, str(line["work"]), figure), []).append(value)


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
            cell = "-" if value is None else shown(value)
            cells.append(f"**{cell}**" if is_best and len(column) > 1 else cell)
        shown_name = KNOWN[name].shown if name in KNOWN else name
        lines.append(f"| {shown_name} | " + " | ".join(cells) + " |")
    lines += ["", *alone(medians), ""]
    lines += [f"- {line}" for line in behind(medians)]
    return "\n".join([*lines, *ranges(figures)])


def ranges(figures: Figures) -> Iterator[str]:
    """Yield the table of the lowest and highest values of what was measured several times."""
    spread = {
        key: f"{shown(min(values))} to {shown(max(values))}"
        for key, values in figures.items()
        if len(values) > 1
    }
    if not spread:
        return
    yield ""
    yield "| lowest and highest | " + " | ".join(heading for _, _, heading, _ in COLUMNS) + " |"
    yield "| --- |" + " ---: |" * len(COLUMNS)
    for name in dict.fromkeys(name for name, _, _ in spread):
        cells = (spread.get((name, work, figure), "-") for work, figure, _, _ in COLUMNS)
        yield f"| {name} | " + " | ".join(cells) + " |"


def shown(value: float) -> str:
    """Return a number with three digits, or whole."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def alone(medians: Mapping[tuple[str, str, str], float]) -> Iterator[str]:
    """Yield the table of workloads without a counterpart in the other queues."""
    limit = medians.get(("sequencerd", "limit", "transitions_per_s"))
    yield "| work | sequencerd | of the limit |"
    yield "| --- | ---: | ---: |"
    for work, figure in ALONE:
        if (value := medians.get(("sequencerd", work, figure))) is None:
            continue
        is_rate = figure.endswith("_per_s")
        which = "median" if figure == "p50_ms" else "99%"
        cell = f"{value:,.0f} a second" if is_rate else f"{value:.3g} ms, {which}"
        part = f"{value / limit:.0%}" if limit and is_rate and work != "limit" else ""
        yield f"| `{work}` | {cell} | {part} |"


def behind(medians: Mapping[tuple[str, str, str], float]) -> Iterator[str]:
    """Yield a line for each column in which peers are ahead of sequencerd."""
    for work, figure, heading, is_rate in COLUMNS:
        ours = medians.get(("sequencerd", work, figure))
        if ours is None:
            continue
        ahead = [
            f"{name} {shown(value)}"
            for (name, its_work, its_figure), value in medians.items()
            if (its_work, its_figure) == (work, figure)
            and (value > ours if is_rate else value < ours)
        ]
        if ahead:
            yield f'ahead of sequencerd in "{heading}" ({shown(ours)}): {", ".join(ahead)}'


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
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument(
        "--disturbed", action="store_true", help="keep figures whatever else the machine does"
    )
    arguments = parser.parse_args()
    sizes = Sizes(arguments.subjects, arguments.wave, arguments.samples)
    found = list(programs(arguments.peers, sizes))
    is_whole = True
    for wanted in arguments.server or ["embedded"]:
        figures: Figures = {}
        with postgresql.running(wanted) as one:
            for _ in range(arguments.repeat):
                for name, command in found:
                    lines = run(name, command, one, is_kept=arguments.disturbed)
                    collect(name, lines or (), figures)
            print(f"{machine(one.version)}. Medians of {arguments.repeat} rounds.\n")
        if any(key[0] == "sequencerd" for key in figures):
            names = [name for name, _ in found]
            print(f"{report(figures, names)}\n\n{sizes.shown(names)}.", flush=True)
        else:
            is_whole = False
            print("No figures: other processes disturbed every round.", flush=True)
    return 0 if is_whole else 1


if __name__ == "__main__":
    sys.exit(main())
