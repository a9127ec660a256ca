"""Measure what the documentation shows in tables, and write it there.

    python bench/tables.py                      the tables without a star: about 15 minutes
    python bench/tables.py all                  all of them: about two and a half hours
    python bench/tables.py cores enroll         some of them
    python bench/tables.py --quick --disturbed  small sizes, to see that everything runs

    figures       sequencerd, PostgreSQL's limit and seven other queues
    servers       sequencerd on PostgreSQL 15 and 18
    enroll        INSERTs beside a bare table, with and without a daemon
    cores         PostgreSQL and the daemons each on cores of their own
    snapshot      while a snapshot is held open
    console *     the pages of the console, with a million enrollments
    startup *     ten million sleeping enrollments; a million steps
    mix *         ten minutes of load
    held *        fifty minutes of load, for thirty of them with a snapshot held open
    held_peers *  12 minutes of it, for 8 of them with a snapshot, and two other queues

Each starts a server of its own. A table stands in docs between <!-- bench: NAME --> and
<!-- bench end -->; it stays as it is if other processes used more than a tenth of a core while it
was measured. --print writes no file.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import compare
import plot
import postgresql
from compare import HERE, Figures, Line, Sizes

DOCS = HERE.parent / "docs"
SLOW_AFTER = 2  # of the peers in compare.KNOWN, which are measured once
HELD_MINUTES, HELD_FROM, HELD_UNTIL = 12, 2, 10
HELD_RATES = {"sequencerd": 2000, "pg-boss": 2000, "pgqueuer": 500}
"""How many subjects a second each queue is asked for."""


@dataclass(frozen=True, slots=True)
class Run:
    """A server, and how to measure on it."""

    server: postgresql.Server
    is_quick: bool
    is_kept: bool  # even if other processes disturbed it
    raw: list[str]  # the lines that were printed, for the pictures

    def lines(self, name: str, *arguments: str, program: Sequence[str] = ()) -> list[Line]:
        """Run a benchmark of this folder, or another program. Raises DisturbedError."""
        command = program or (sys.executable, str(HERE / f"{name}.py"))
        found = compare.run(name, [*command, *arguments], self.server, is_kept=self.is_kept)
        if found is None:
            raise DisturbedError(name)
        self.raw.extend(f"{name} {json.dumps(line)}" for line in found)
        return found


class DisturbedError(Exception):
    """Other processes used too much of the machine."""


def table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a table in Markdown; the first column has names, the others numbers."""
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def whole(value: float) -> str:
    return f"{value:,.0f}"


# --- the tables


def figures(run: Run) -> str:
    """Measure sequencerd and the other queues, the slow ones once."""
    sizes = Sizes(500, 500, 10) if run.is_quick else Sizes(50_000, 20_000, 100)
    rounds = 1 if run.is_quick else 2
    programs = list(compare.programs(compare.KNOWN, sizes))
    fast = {"sequencerd", *list(compare.KNOWN)[:SLOW_AFTER]}
    found: Figures = {}
    missing = []
    for number in range(rounds):
        for name, command in programs:
            if number and name not in fast:
                continue
            try:
                compare.collect(name, run.lines(name, program=command), found)
            except DisturbedError:
                missing.append(name)
    if not any(name == "sequencerd" for name, _, _ in found):
        raise DisturbedError("sequencerd")
    names = [name for name, _ in programs if any(key[0] == name for key in found)]
    note = f"{sizes.shown(names)}; medians of {rounds} rounds, the slowest queues once."
    if missing:
        note += f" Dropped, as other processes disturbed them: {', '.join(missing)}."
    return f"{compare.report(found, names)}\n\n{note}"


def servers(run: Run) -> str:
    """Measure the same workloads on two versions in turns, on 18 with and without its new I/O."""
    sizes = Sizes(500, 500, 10) if run.is_quick else Sizes(50_000, 20_000, 50)
    variants: list[tuple[str, dict[str, str]]]
    variants = [("15", {}), ("18", {}), ("18", {"io_method": "sync"})]
    found: Figures = {}
    for _ in range(1 if run.is_quick else 2):
        for wanted, settings in variants:
            with postgresql.running(wanted, settings) as server:
                name = ", ".join([server.version, *map(" = ".join, settings.items())])
                there = Run(server, run.is_quick, run.is_kept, [])
                arguments = sizes.arguments(sizes.subjects, sizes.wave)
                works = ("--works", "limit,pure,w1,flat,wave,wake")
                compare.collect(name, there.lines("engine", *works, *arguments), found)
    columns = (
        ("limit", "transitions_per_s", "limit, a second"),
        ("pure", "transitions_per_s", "`pure`, a second"),
        ("w1", "transitions_per_s", "`w1`, a second"),
        ("flat", "transitions_per_s", "`flat`, a second"),
        ("flat", "enrolled_per_s", "added in bulk, a second"),
        ("wave", "all_done_s", "`wave`, all done, s"),
        ("wake", "p50_ms", "`wake`, median, ms"),
    )
    rows = []
    for name in dict.fromkeys(program for program, _, _ in found):
        values = [statistics.median(found[name, work, figure]) for work, figure, _ in columns]
        shown = [whole(value) if value > 1000 else f"{value:.3g}" for value in values]
        rows.append([name, *shown])
    return table(["PostgreSQL", *(head for *_, head in columns)], rows)


def enroll(run: Run) -> str:
    """Measure inserts, in rows a second."""
    size = ("--rounds", "1", "--seconds", "1") if run.is_quick else ("--seconds", "4")
    lines = run.lines("scale", "--works", "enroll", *size)
    alone = {line["connections"]: line for line in lines if line["work"] == "enroll"}
    beside = {
        line["connections"]: line for line in lines if line["work"] == "enroll beside a daemon"
    }
    bulk = next(line for line in lines if line["work"] == "enroll in bulk")

    def cells(line: Line) -> list[str]:
        return [whole(line["bare_per_s"]), whole(line["per_s"]), f"{line['ratio']:.0%}"]

    rows = [[count, *cells(alone[count]), *cells(beside[count])] for count in alone]
    rows.append(["in bulk", *cells(bulk), "", "", ""])
    heads = ["connections"]
    for when in ("no daemon", "beside a daemon"):
        heads += [f"bare table, {when}", f"enrollments, {when}", "of it"]
    return table(heads, rows)


def cores(run: Run) -> str:
    """Run PostgreSQL on the first half of the cores, and the daemons on the second."""
    known = sorted(os.sched_getaffinity(0))
    subjects = ("--subjects", "2000") if run.is_quick else ("--subjects", "50000")
    rows = []
    count = 1
    while 2 * count <= len(known):
        sides = [",".join(map(str, side)) for side in (known[:count], known[count : 2 * count])]
        lines = run.lines(
            "scale",
            *("--works", "daemons", "--server-cores", sides[0], "--daemon-cores", sides[1]),
            *("--daemons", "1", "2", *(["4"] if count > 1 else []), *subjects),
        )
        rows += [
            [
                count,
                count,
                line["daemons"],
                whole(line["transitions_per_s"]),
                f"{line['daemons_us']:.1f}",
                f"{line['postgres_us']:.1f}",
                f"{line['daemons_us'] * line['transitions_per_s'] / 1e6:.2f}",
                f"{line['postgres_us'] * line['transitions_per_s'] / 1e6:.2f}",
            ]
            for line in lines
        ]
        count *= 2
    heads = ["cores of PostgreSQL", "cores of the daemons", "daemons", "transitions a second"]
    heads += ["µs of the daemons", "µs of PostgreSQL", "cores used by the daemons"]
    heads += ["cores used by PostgreSQL"]
    return table(heads, rows)


def snapshot(run: Run) -> str:
    """Measure w1 while a snapshot is held open."""
    subjects = "1000" if run.is_quick else "50000"
    line = run.lines("scale", "--works", "snapshot", "--subjects", subjects)[0]
    rows = [[whole(line["free_per_s"]), whole(line["held_per_s"]), f"{line['ratio']:.0%}"]]
    return table(["`w1` alone, a second", "while a snapshot is held open", "of it"], rows)


def console(run: Run) -> str:
    """Measure the pages of the console, in milliseconds on the server."""
    size = ("20000", "5") if run.is_quick else ("1000000", "60")
    lines = run.lines("console", "--enrollments", size[0], "--requests", size[1])
    rows = [[line["page"], line["p50_ms"], line["p99_ms"]] for line in lines if "page" in line]
    beside = next(line for line in lines if line.get("work") == "writes beside a reader")
    shown = table(["page", "median", "99th percentile"], rows)
    return (
        f"{shown}\n\nBeside a reader who asks for a page each second, another connection inserts"
        f" {beside['ratio']:.2f} times as many enrollments as alone."
    )


def startup(run: Run) -> str:
    """Measure starts of a daemon: medians of three."""
    size = ("--scale", "0.01", "--seconds", "2") if run.is_quick else ()
    lines = [line for line in run.lines("startup", *size) if "ready_s" in line]
    rows = []
    for work in dict.fromkeys(line["work"] for line in lines):
        own = [line for line in lines if line["work"] == work]
        middle = {
            key: statistics.median(line[key] for line in own) for key in own[0] if key != "work"
        }
        rows.append(
            [
                *(whole(middle[key]) for key in ("enrollments", "sequences", "steps")),
                f"{middle['ready_s']:.2f} s",
                f"{middle['daemon_cpu_s']:.2f} and {middle['postgres_cpu_s']:.2f} s",
                f"{whole(middle['memory_mb'])} MB",
                f"{middle['idle_cpu']:.1%} and {middle['idle_postgres_cpu']:.1%}",
                f"{whole(middle['edit_ms'])} ms",
                f"{whole(middle['enrolled_ms'])} ms",
            ]
        )
    heads = ["enrollments", "sequences", "steps", "ready after", "CPU of daemon and PostgreSQL"]
    heads += ["memory", "CPU when idle", "an edit is read after", "an enrollment waits after"]
    return table(heads, rows)


def mix(run: Run) -> str:
    """Measure ten minutes of load, and show the beginning, the middle and the end."""
    lines = _minutes(run, "0.2" if run.is_quick else "10")
    return _course([lines[len(lines) * part // 5] for part in range(5)] + [lines[-1]])


def held(run: Run) -> str:
    """Measure ten minutes of load, thirty with a snapshot, and ten more."""
    minutes = ("0.5", "--held", "0.1", "0.3") if run.is_quick else ("50", "--held", "10", "30")
    return _course(_minutes(run, *minutes)[1::2])


def held_peers(run: Run) -> str:
    """Measure sequencerd and two other queues: before a snapshot, at its end, and after it."""
    scale = 1 / 32 if run.is_quick else 1.0
    since, until, end = (scale * minute for minute in (HELD_FROM, HELD_UNTIL, HELD_MINUTES))
    rows: list[list[str]] = []
    rates = {n: rate // 10 if run.is_quick else rate for n, rate in HELD_RATES.items()}
    for name, rate in rates.items():
        whose = () if name == "sequencerd" else ("--peer", name)
        snapshot = ("--held", str(since), str(until - since))
        per_second = ("--rate", str(rate))
        try:
            lines = _minutes(run, str(end), *snapshot, *per_second, *whose)
        except DisturbedError:
            if not whose:
                raise
            lines = []
        if not lines or lines[-1]["seconds"] < 50 * end:
            rows.append([f"{name}: disturbed by other processes, or stopped", *[""] * 8])
            continue
        if not whose:
            lines.pop()  # the rest, after the last enrollment
        for moment, minute in (("before", since), ("at its end", until), ("after", math.inf)):
            line = [line for line in lines if line["seconds"] < 60 * minute][-1]
            rows.append([f"{name}, {moment}", *_compared(line)])
    heads = ["queue, and when", "a second", "99% late by, ms", "overdue", "dead rows", "table, MB"]
    heads += ["indexes, MB", "µs of PostgreSQL for each", "µs of the worker for each"]
    asked = "; ".join(f"{name} {rate:,}" for name, rate in rates.items())
    note = (
        f"For {end:g} minutes, with the snapshot from minute {since:g} to {until:g}. In the"
        " other queues, each subject is a delayed job, due after a second, then a job in one of two"
        " queues. pg-boss looks every half a second for jobs that have become due, and deletes done"
        f" ones after a minute; pgqueuer deletes them at once. Subjects a second: {asked}; at"
        " 2,000, pgqueuer falls behind from the beginning. CPU time is for each subject."
    )
    return f"{table(heads, rows)}\n\n{note}"


def _compared(line: Line) -> list[str]:
    sizes = ("overdue", "dead_rows", "table_mb", "indexes_mb")
    names = ("per_s", "late_p99_ms", *sizes, "postgres_each_us", "worker_each_us")
    return [whole(line[name]) if name in line else "-" for name in names]


def _minutes(run: Run, minutes: str, *more: str) -> list[Line]:
    """Return the lines of a mix, without those in which nothing happened."""
    rate = ("--rate", "200") if run.is_quick else ()
    lines = run.lines("scale", "--works", "mix", "--minutes", minutes, *rate, *more)
    return [line for line in lines if "worker_each_us" in line]


def _course(lines: Iterable[Line]) -> str:
    rows = [
        [
            f"{line['seconds'] / 60:.1f}",
            whole(line["rows"]),
            whole(line["dead_rows"]),
            whole(line["overdue"]),
            f"{line['late_p99_ms']:.0f}",
            whole(line["table_mb"]),
            whole(line["indexes_mb"]),
            f"{line['daemon_us']:.0f}",
            f"{line['postgres_us']:.0f}",
            whole(line["memory_mb"]),
        ]
        for line in lines
    ]
    heads = ["minute", "rows", "dead rows", "overdue", "99% late by, ms", "table, MB"]
    heads += ["indexes, MB", "µs of the daemon for each event", "µs of PostgreSQL for each event"]
    return table([*heads, "memory of the daemon, MB"], rows)


TABLES: dict[str, Callable[[Run], str]] = {
    one.__name__: one
    for one in (figures, servers, enroll, cores, snapshot, console, startup, mix, held, held_peers)
}
LONG = ("console", "startup", "mix", "held", "held_peers")


# --- where they stand


def write(name: str, text: str) -> None:
    """Replace a table in the documentation. Raises SystemExit if there is no place for it."""
    pattern = re.compile(rf"(?<=<!-- bench: {name} -->\n).*?(?=<!-- bench end -->)", re.DOTALL)
    for page in sorted(DOCS.glob("*.md")):
        before = page.read_text(encoding="utf-8")
        after, count = pattern.subn(lambda _: f"\n{text}\n\n", before)
        if count:
            page.write_text(after, encoding="utf-8")
            return
    raise SystemExit(f"no page in {DOCS} has a line <!-- bench: {name} -->")


def draw(raw: Sequence[str]) -> None:
    """Draw the pictures for which everything was measured."""
    for name, picture in plot.pictures("\n".join(raw)):
        (DOCS / f"performance-{name}.svg").write_text(picture, encoding="utf-8")


def main() -> int:
    """Measure. Return 1 if a table could not be measured without being disturbed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tables", nargs="*", metavar="TABLE", help="also: all")
    parser.add_argument("--server", default="15", help="a version, a folder, or embedded")
    parser.add_argument("--quick", action="store_true", help="small sizes")
    parser.add_argument("--print", action="store_true", help="write no file")
    parser.add_argument(
        "--disturbed", action="store_true", help="keep figures whatever else the machine does"
    )
    given = parser.parse_args()
    wanted = given.tables or [name for name in TABLES if name not in LONG]
    if "all" in wanted:
        wanted = list(TABLES)
    if unknown := [name for name in wanted if name not in TABLES]:
        parser.error(f"no table is named {unknown[0]}; available: {', '.join(TABLES)}, all")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that servers are stopped
    failed = []
    for name in wanted:
        begun, raw = time.monotonic(), list[str]()
        with postgresql.running(given.server) as server:
            try:
                text = TABLES[name](Run(server, given.quick, given.disturbed, raw))
            except DisturbedError as error:
                print(
                    f"{name}: not measured, as other processes disturbed {error}", file=sys.stderr
                )
                failed.append(name)
                continue
        version = "of the first column" if name == "servers" else server.version
        text = f"{text}\n\n{compare.machine(version)}."
        print(f"{name}, {(time.monotonic() - begun) / 60:.1f} minutes:\n\n{text}\n", flush=True)
        if not given.print:
            write(name, text)
            draw(raw)
    if failed:
        print(f"Not measured: {', '.join(failed)}. Close other programs, and repeat these.")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
