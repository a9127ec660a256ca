"""What the engine does with very many, for long, or beside others: one JSON line for each figure.

    PYTHONPATH=. python bench/scale.py --dsn postgresql://postgres@localhost/postgres

    enroll       INSERTs one by one from 1, 8 and 32 connections, and in bulk, against a bare table;
                 the same beside a daemon that executes a task for each
    mix          enroll, wait, decide, execute and mail for minutes, a tenth to --smtp: the sizes of
                 tables and indexes, how late waits end, and CPU time of both sides for an event of
                 the history; --held 10 30 opens a snapshot after ten minutes, for thirty; --peer
                 pg-boss or pgqueuer measures that queue instead, with a second task for the mail
    snapshot     w1 of bench/engine.py with a snapshot held open, against one without
    daemons      w1 with 1, 2 and 4 daemons: rate, and CPU time of both sides for a transition;
                 --server-cores 0 --daemon-cores 1 keeps each side to cores of its own

It makes and drops a database "sequencerd_bench". Figures of one run can be compared.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import multiprocessing
import os
import resource
import statistics
import sys
import time
from asyncio.subprocess import PIPE
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import asyncpg
import compare
import cpu
from aiosmtpd.smtp import SMTP
from asyncpg.prepared_stmt import PreparedStatement
from engine import ALL_ENDED, NAME, WARM_UP, defined, engine, enroll, process, run, say, until
from pydantic import SecretStr

from sequencerd import daemon
from sequencerd.runners.email.runner import EmailRunner
from sequencerd.settings import EmailSettings
from sequencerd.storage import cleanup

BARE = """
    CREATE TABLE bare (LIKE sequencer.enrollments INCLUDING ALL);
    ALTER TABLE bare ALTER step SET DEFAULT 'a', ALTER reentry SET DEFAULT 'after_end';
"""
INSERT = "INSERT INTO {} (sequence, subject, data) VALUES ('s', $1, '{{\"name\": \"Ada\"}}')"
LOAD = (
    "INSERT INTO {} (sequence, subject, data)"
    " SELECT 's', 'load{}-' || n, '{{\"name\": \"Ada\"}}' FROM generate_series(1, {}) AS n"
)
TASKS = tuple((name, "Task", "{}") for name in "abc")


# --- enrolling


async def enrolling(dsn: str, arguments: argparse.Namespace) -> None:
    """Insert into both tables in turns, and print the medians."""
    tables = ("bare", "sequencer.enrollments")
    for beside in (False, True):
        async with defined(dsn, *TASKS[:1]) as (url, connection):
            await connection.execute(BARE)
            daemon = multiprocessing.Process(target=work_for_ever, args=(url,), daemon=True)
            if beside:
                daemon.start()
                await until(connection, "SELECT count(*) > 0 FROM pg_locks WHERE objid = 4")
            for count in (1, 8, 32):
                rates: dict[str, list[float]] = {table: [] for table in tables}
                for _ in range(arguments.rounds):
                    for table in tables:
                        rate = await one_by_one(url, table, count, arguments.seconds)
                        rates[table].append(rate)
                        if beside:
                            await until(connection, ALL_ENDED)
                work = "enroll beside a daemon" if beside else "enroll"
                say_both(work, rates, connections=count)
            if beside:
                daemon.kill()
                daemon.join()
                continue
            rates = {table: [] for table in tables}
            for number in range(arguments.rounds):
                for table in tables:
                    await connection.execute("CHECKPOINT")
                    begun = time.perf_counter()
                    await connection.execute(LOAD.format(table, number, arguments.subjects))
                    rates[table].append(arguments.subjects / (time.perf_counter() - begun))
            say_both("enroll in bulk", rates)


def say_both(work: str, rates: Mapping[str, list[float]], **figures: float) -> None:
    bare, ours = map(statistics.median, rates.values())
    say(work, **figures, bare_per_s=bare, per_s=ours, ratio=ours / bare)


async def one_by_one(url: str, table: str, count: int, seconds: float) -> float:
    """Return the rows inserted a second."""
    connections = [await asyncpg.connect(url) for _ in range(count)]
    inserts = [await connection.prepare(INSERT.format(table)) for connection in connections]
    for number, insert in enumerate(inserts):  # a new session is slow at first
        for warm_up in range(WARM_UP):
            await insert.fetch(f"{time.perf_counter()}-{number}-{warm_up}")
    begun = time.perf_counter()
    rows = 0

    async def work(number: int, insert: PreparedStatement) -> None:
        nonlocal rows
        while time.perf_counter() < begun + seconds:
            rows += 1
            await insert.fetch(f"{begun}-{number}-{rows}")

    await asyncio.gather(*(work(number, insert) for number, insert in enumerate(inserts)))
    for connection in connections:
        await connection.close()
    return rows / seconds


# --- for minutes


def memory() -> float:
    """Return the resident memory of this process, in megabytes."""
    pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
    return int(pages) * resource.getpagesize() / 2**20


class Letterbox:
    """Accepts every mail."""

    async def handle_DATA(self, *_: object) -> str:  # noqa: N802 - as aiosmtpd calls it
        return "250 OK"


def take_mail(port: Any) -> None:
    """Run a mail server as a separate process."""

    async def serve() -> None:
        server = await asyncio.get_running_loop().create_server(
            lambda: SMTP(Letterbox()), "127.0.0.1", 0
        )
        port.value = server.sockets[0].getsockname()[1]
        await server.serve_forever()

    asyncio.run(serve())


async def mix(dsn: str, arguments: argparse.Namespace) -> None:
    """Let each enrollment wait a second, then branch: a tenth get mail, the others a task."""
    if arguments.peer:
        await mix_of_peer(dsn, arguments)
        return
    mail = {"from": "a@example.com", "to": "b@example.com", "subject": "x", "text": "x"}
    steps = (
        ("wait", "WaitForDuration", '{"amount": 1, "unit": "seconds"}'),
        ("decide", "Split", '{"next": 90, "altNext": 10}'),
        ("task", "Task", "{}"),
        ("mail", "Email", json.dumps(mail)),
    )
    with process(take_mail) as port:
        server = arguments.smtp or f"smtp://127.0.0.1:{port}"
        async with defined(dsn, *steps) as (url, connection):
            await connection.execute(
                "UPDATE sequencer.steps SET alt_next_step = 'mail' WHERE name = 'decide';"
                "UPDATE sequencer.steps SET next_step = NULL WHERE name = 'task'"
            )
            work = "held" if arguments.held else "mix"
            sizes = Sizes(connection, await postmaster(dsn), work)
            async with engine(url, {"Email": EmailRunner(EmailSettings(url=SecretStr(server)))}):
                enrolling = asyncio.create_task(enroll_steadily(url, arguments))
                holding = asyncio.create_task(hold_snapshot(url, arguments.held))
                await sizes.say()
                while not enrolling.done():
                    await asyncio.wait([enrolling], timeout=arguments.minutes * 60 / 20)
                    await sizes.say()
                await asyncio.gather(enrolling, holding)
                await until(connection, ALL_ENDED)
                await sizes.say()


async def enroll_steadily(url: str, arguments: argparse.Namespace) -> None:
    """Enroll at the given rate, in fifty transactions a second, and delete enrollments that ended a
    minute ago.
    """
    loop = asyncio.get_running_loop()
    connection = await asyncpg.connect(url)
    begun, number = loop.time(), 0
    deleted_until = cleanup.FIRST_START[1]
    size = arguments.rate // 50
    while (passed := loop.time() - begun) < arguments.minutes * 60:
        if number * size > passed * arguments.rate:
            await asyncio.sleep(0.01)
            continue
        number += 1
        await connection.execute(
            "INSERT INTO sequencer.enrollments (sequence, subject, data)"
            " SELECT 's', $1 || '-' || n, '{\"name\": \"Ada\"}' FROM generate_series(1, $2::int) n",
            str(number),
            size,
        )
        if number % 50 == 0:
            # while a snapshot is held open, a pass from the beginning reads all that was deleted
            # before; daemons make one each hour
            before = await connection.fetchval("SELECT now() - interval '1 minute'")
            await connection.execute(
                "SELECT sequencer.delete_ended($1, 100000, '', $2)", before, deleted_until
            )
            deleted_until = before
    await connection.close()


async def hold_snapshot(url: str, held: Sequence[float] | None) -> None:
    """Keep a transaction open, as a forgotten session does: after some minutes, for others."""
    if held is None:
        return
    after, minutes = held
    await asyncio.sleep(after * 60)
    connection = await asyncpg.connect(url)
    await connection.execute("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT 1")
    await asyncio.sleep(minutes * 60)
    await connection.close()


class Sizes:
    """The sizes of the tables, and cost and lateness since the last line."""

    def __init__(self, connection: asyncpg.Connection, server: int | None, work: str) -> None:
        self._connection, self._server, self._work = connection, server, work
        self._begun = time.perf_counter()
        self._last = datetime.now(UTC)
        self._before = (math.nan, math.nan, math.nan)

    async def say(self) -> None:
        await self._connection.execute("SELECT pg_stat_force_next_flush()")
        row = await self._connection.fetchrow(
            """
            SELECT pg_table_size('sequencer.enrollments') / 1e6 AS table_mb,
                   pg_indexes_size('sequencer.enrollments') / 1e6 AS indexes_mb,
                   (SELECT sum(n_tup_ins) FROM pg_stat_user_tables WHERE relname LIKE 'events%')
                   AS events,
                   (SELECT sum(pg_total_relation_size(relid)) / 1e6 FROM pg_stat_user_tables
                     WHERE relname LIKE 'events%') AS events_mb,
                   (SELECT count(*) FROM sequencer.enrollments) AS rows,
                   (SELECT count(*) FROM sequencer.enrollments WHERE wake_at < now()) AS overdue,
                   (SELECT n_dead_tup FROM pg_stat_user_tables WHERE relname = 'enrollments')
                   AS dead_rows,
                   1000 * late[1] AS late_p50_ms, 1000 * late[2] AS late_p99_ms, passed,
                   now() AS now
              FROM (SELECT percentile_cont('{0.5, 0.99}'::float8[])
                               WITHIN GROUP (ORDER BY seconds_at_step - 1) AS late,
                           count(*) AS passed
                      FROM sequencer.events
                     WHERE step = 'wait' AND action = 'next' AND at > $1) AS e
            """,
            self._last,
        )
        figures = {name: float(value or 0) for name, value in row.items() if name != "now"}
        passed, took = figures.pop("passed"), (row["now"] - self._last).total_seconds()
        self._last = row["now"]
        served = cpu.tree(self._server) if self._server else math.nan
        present = (figures["events"], time.process_time(), served)
        events, own, server = (b - a for a, b in zip(self._before, present, strict=True))
        self._before = present
        say(
            self._work,
            seconds=time.perf_counter() - self._begun,
            **figures,
            **({"daemon_us": 1e6 * own / events, "postgres_us": 1e6 * server / events})
            if events > 0
            else {},
            **each(passed, took, own, server),
            memory_mb=memory(),
        )


def each(passed: float, took: float, worker: float, server: float) -> dict[str, float]:
    """Return how many enrollments a second have passed their waits, and the CPU time of each."""
    if not passed:
        return {"per_s": 0.0}
    return {
        "per_s": passed / took,
        "worker_each_us": 1e6 * worker / passed,
        "postgres_each_us": 1e6 * server / passed,
    }


@dataclass(frozen=True, slots=True)
class Jobs:
    """Where a queue has its jobs: a table, perhaps with partitions; the condition for those that
    are due and not done; and the table of its history.
    """

    table: str
    overdue: str
    history: str | None = None


PEERS = {
    "pg-boss": Jobs("pgboss.job", "state < 'active' AND start_after < now()"),
    "pgqueuer": Jobs("pgqueuer", "status = 'queued' AND execute_after < now()", "pgqueuer_log"),
}


async def mix_of_peer(dsn: str, arguments: argparse.Namespace) -> None:
    """Print a line with each line of the queue's program, which says how late its jobs were."""
    command = compare.install(arguments.peer)
    if command is None:
        raise SystemExit(f"{arguments.peer} could not be installed")
    server = await postmaster(dsn)
    sizes = ("--minutes", str(arguments.minutes), "--rate", str(arguments.rate))
    program = await asyncio.create_subprocess_exec(
        *command, "--works", "mix", *sizes, "--dsn", dsn, stdin=PIPE, stdout=PIPE
    )
    assert program.stdin is not None
    assert program.stdout is not None
    url = urlunsplit(urlsplit(dsn)._replace(path=f"/{NAME}"))
    begun = last = time.perf_counter()
    before = (0.0, 0.0)
    holding: asyncio.Task[None] | None = None
    async for text in program.stdout:
        line = json.loads(text)
        figures = await sizes_of_peer(url, PEERS[arguments.peer])
        present = (cpu.tree(program.pid), cpu.tree(server) if server else math.nan)
        now = time.perf_counter()
        if holding is None:  # the first line: its worker is ready
            holding = asyncio.create_task(hold_snapshot(url, arguments.held))
            begun = now
        else:
            own, served = (b - a for a, b in zip(before, present, strict=True))
            say(
                f"{'held' if arguments.held else 'mix'} {arguments.peer}",
                seconds=now - begun,
                **figures,
                **{name: line[name] for name in ("late_p50_ms", "late_p99_ms") if line.get(name)},
                **each(line["passed"], now - last, own, served),
            )
        last, before = now, present
        if line["left"] == 0:
            program.stdin.close()  # it may drop the database
    if holding and not holding.cancel():
        holding.result()  # raises what it has raised
    if status := await program.wait():
        sys.exit(f"{arguments.peer} ended with status {status}")


async def sizes_of_peer(url: str, jobs: Jobs) -> dict[str, float]:
    connection = await asyncpg.connect(url)
    try:
        row = await connection.fetchrow(
            f"""
            SELECT sum(pg_table_size(relid)) / 1e6 AS table_mb,
                   sum(pg_indexes_size(relid)) / 1e6 AS indexes_mb,
                   sum(pg_stat_get_dead_tuples(relid)) AS dead_rows,
                   pg_total_relation_size(to_regclass($2)) / 1e6 AS events_mb,
                   (SELECT count(*) FROM {jobs.table}) AS rows,
                   (SELECT count(*) FROM {jobs.table} WHERE {jobs.overdue}) AS overdue
              FROM (SELECT relid FROM pg_partition_tree($1::text::regclass)
                     UNION SELECT $1::text::regclass) AS t
            """,
            jobs.table,
            jobs.history,
        )
    finally:
        await connection.close()
    return {name: float(value or 0) for name, value in row.items()}


# --- beside others


async def snapshot(dsn: str, arguments: argparse.Namespace) -> None:
    rates: dict[bool, list[float]] = {}
    for held in (False, True, False, True):
        async with defined(dsn, *TASKS) as (url, connection):
            other = await asyncpg.connect(url)
            if held:
                await other.execute("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT 1")
            await enroll(connection, arguments.subjects)
            begun = time.perf_counter()
            async with engine(url):
                await until(connection, ALL_ENDED)
            took = time.perf_counter() - begun
            await other.close()
            rates.setdefault(held, []).append(3 * arguments.subjects / took)
    free, beside = max(rates[False]), max(rates[True])
    say("snapshot", free_per_s=free, held_per_s=beside, ratio=beside / free)


def work_for_ever(url: str) -> None:
    """Run a daemon as a separate process."""

    async def work() -> None:
        daemon.tune_collector()
        async with engine(url):
            await asyncio.Event().wait()

    run(work())


async def daemons(dsn: str, arguments: argparse.Namespace) -> None:
    """Measure several daemons on the cores of each side: the CPU time of each side for a
    transition.
    """
    with pinned(await postmaster(dsn), arguments.server_cores) as server:
        for count in arguments.daemons:
            await some_daemons(dsn, arguments, count, server)


async def some_daemons(
    dsn: str, arguments: argparse.Namespace, count: int, server: int | None
) -> None:
    async with defined(dsn, *TASKS) as (url, connection):
        at = datetime.now(UTC) + timedelta(seconds=20)
        await enroll(connection, arguments.subjects, at)
        processes = [
            multiprocessing.Process(target=work_for_ever, args=(url,), daemon=True)
            for _ in range(count)
        ]
        for process in processes:
            process.start()
            assert process.pid is not None
            if arguments.daemon_cores:
                os.sched_setaffinity(process.pid, arguments.daemon_cores)
        await asyncio.sleep((at - datetime.now(UTC)).total_seconds())

        def used() -> tuple[float, float]:
            own = sum(cpu.tree(process.pid or 0) for process in processes)
            return own, cpu.tree(server) if server else math.nan

        before = used()
        await until(connection, ALL_ENDED)
        took = (datetime.now(UTC) - at).total_seconds()
        own, served = (b - a for a, b in zip(before, used(), strict=True))
        for process in processes:
            process.kill()
            process.join()
    moves = 3 * arguments.subjects
    say(
        "daemons",
        daemons=count,
        transitions_per_s=moves / took,
        daemons_us=1e6 * own / moves,
        postgres_us=1e6 * served / moves,
    )


async def postmaster(dsn: str) -> int | None:
    """Return the process of the server, if it runs on this machine."""
    connection = await asyncpg.connect(dsn)
    parent = parent_of(await connection.fetchval("SELECT pg_backend_pid()"))
    await connection.close()
    return parent


def parent_of(backend: int) -> int | None:
    try:
        stat = Path(f"/proc/{backend}/stat").read_text()
    except FileNotFoundError:
        return None
    name, _, rest = stat.rpartition(")")
    return int(rest.split()[1]) if name.endswith("(postgres") else None


@contextmanager
def pinned(server: int | None, cores: set[int] | None) -> Iterator[int | None]:
    """Let a server, and the sessions that it starts, use only these cores."""
    if server is None or cores is None:
        if cores:
            raise SystemExit("--server-cores: the server does not run on this machine")
        yield server
        return
    before = os.sched_getaffinity(server)
    os.sched_setaffinity(server, cores)
    try:
        yield server
    finally:
        os.sched_setaffinity(server, before)


def core_numbers(text: str) -> set[int]:
    """Parse cores as taskset does, such as 0,2-3."""
    numbers: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        numbers |= set(range(int(first), int(last or first) + 1))
    return numbers


WORKS = {
    "enroll": enrolling,
    "snapshot": snapshot,
    "daemons": daemons,
    "mix": mix,
}


async def main(arguments: argparse.Namespace) -> None:
    daemon.tune_collector()
    for work in arguments.works.split(","):
        await WORKS[work](arguments.dsn, arguments)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dsn", required=True, help="a superuser's URL")
    parser.add_argument("--works", default=",".join(WORKS))
    parser.add_argument("--subjects", type=int, default=50_000)
    parser.add_argument("--seconds", type=float, default=10, help="of each measurement of a rate")
    parser.add_argument("--rounds", type=int, default=3, help="of enroll")
    parser.add_argument("--minutes", type=float, default=10, help="of the mix")
    parser.add_argument("--rate", type=int, default=2000, help="enrollments a second in the mix")
    parser.add_argument("--held", type=float, nargs=2, metavar=("AFTER", "MINUTES"))
    parser.add_argument("--peer", choices=PEERS, help="whose mix is measured instead")
    parser.add_argument("--smtp", help="URL of the mix's mail server; default: one of its own")
    parser.add_argument("--daemons", type=int, nargs="+", default=[1, 2, 4], metavar="N")
    parser.add_argument("--server-cores", type=core_numbers, metavar="CORES", help="such as 0,2-3")
    parser.add_argument("--daemon-cores", type=core_numbers, metavar="CORES", help="likewise")
    run(main(parser.parse_args()))
