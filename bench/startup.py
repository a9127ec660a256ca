"""How a daemon starts where there are very many: one JSON line for each start.

    PYTHONPATH=. python bench/startup.py --dsn postgresql://postgres@localhost/postgres

    sleeping     ten million sleeping enrollments in ten thousand sequences of ten steps
    steps        a million steps in a thousand sequences with an enrollment at each; half of the
                 steps have a config that no other step has

Each says how long a daemon, as a process of its own, takes until it is ready, with the CPU time of
both sides and the memory; what it costs while nothing is due; how long it takes until it has read
the change of one step; and until an enrollment that is inserted then waits at its first step.

It makes and drops a database "sequencerd_bench"; `sleeping` needs 8 GB of disk.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import time
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from statistics import median

import asyncpg
import cpu
from engine import engine, fresh, say, until
from scale import memory, postmaster

from sequencerd.daemon import tune_collector
from sequencerd.storage import migrate

DEFINE = """
    INSERT INTO sequencer.sequences (name, first_step)
    SELECT 'q' || q, 's1' FROM generate_series(1, $1::int) AS q
"""
DEFINE_STEPS = """
    INSERT INTO sequencer.steps (sequence, name, type, config, next_step)
    SELECT 'q' || q, 's' || s, 'WaitForDuration',
           jsonb_build_object('unit', 'days', 'amount',
                              CASE WHEN s * $3 % 2 = 1 THEN q * 1000 + s ELSE 30 + s END),
           CASE WHEN s < $2 THEN 's' || s + 1 END
      FROM generate_series(1, $1::int) AS q, generate_series(1, $2::int) AS s
"""
ENROLL = """
    INSERT INTO sequencer.enrollments (sequence, step, subject, reentry, wake_at, entered_at)
    SELECT sequence, name, sequence || '-' || name || '-' || n, 'after_end',
           now() + interval '1 day' + n * interval '1 second', now()
      FROM sequencer.steps, generate_series(1, $1::int) AS n
     WHERE sequence BETWEEN $2 AND $3 ORDER BY sequence, name, n
"""
EDIT = "UPDATE sequencer.steps SET config = $1 WHERE sequence = 'q7' AND name = 's5'"
ENROLL_ONE = (
    "INSERT INTO sequencer.enrollments (sequence, subject) VALUES ('q7', gen_random_uuid())"
    " RETURNING id"
)
HAS_ENTERED = "SELECT entered_at IS NOT NULL FROM sequencer.enrollments WHERE id = {}"
EDITS = 5


@dataclass(frozen=True, slots=True)
class Shape:
    """The numbers of sequences, steps and enrollments; `own` is 1 if half of the steps have a
    unique config.
    """

    sequences: int
    steps: int  # of each sequence
    enrollments: int  # at each step
    own: int


SHAPES = {"sleeping": Shape(10_000, 10, 100, 0), "steps": Shape(1_000, 1_000, 1, 1)}


async def fill(connection: asyncpg.Connection, shape: Shape) -> None:
    """Define the sequences, and enroll at all of their steps, in the order of the indexes."""
    await migrate.migrate(connection)
    async with connection.transaction():
        await connection.execute(DEFINE, shape.sequences)
        await connection.execute(
            DEFINE_STEPS, shape.sequences, shape.steps, shape.own, timeout=None
        )
    await connection.execute("ANALYZE")
    await connection.execute("SET session_replication_role = replica")  # no trigger for each row
    names = await connection.fetch("SELECT name FROM sequencer.sequences ORDER BY name")
    page = max(1, 100_000 // (shape.steps * shape.enrollments))
    for first in range(0, len(names), page):
        low, *_, high = [names[first][0], *(row[0] for row in names[first : first + page])]
        await connection.execute(ENROLL, shape.enrollments, low, high, timeout=None)
    await connection.execute("VACUUM ANALYZE", timeout=None)
    await connection.execute("CHECKPOINT", timeout=None)


def work(url: str, server: int, seconds: float, answer: Connection) -> None:
    """Run a daemon, and send its figures."""
    tune_collector()
    answer.send(asyncio.run(observe(url, server, seconds)))


async def observe(url: str, server: int, seconds: float) -> dict[str, float]:
    """Start a daemon, leave it idle, change a step, and enroll."""
    connection = await asyncpg.connect(url)
    without = memory()
    figures: dict[str, float] = {}

    def used() -> tuple[float, float, float]:
        return time.perf_counter(), time.process_time(), cpu.tree(server)

    begun = used()
    async with engine(url) as made:
        took, own, served = (b - a for a, b in zip(begun, used(), strict=True))
        figures |= {"ready_s": took, "daemon_cpu_s": own, "postgres_cpu_s": served}
        figures["memory_mb"] = memory() - without
        await asyncio.sleep(2)
        begun = used()
        await asyncio.sleep(seconds)
        took, own, served = (b - a for a, b in zip(begun, used(), strict=True))
        figures |= {"idle_cpu": own / took, "idle_postgres_cpu": served / took}
        edits = []
        for number in range(EDITS):
            before = made.catalog.sequences["q7"].revision
            started = time.perf_counter()
            await connection.execute(EDIT, f'{{"unit": "hours", "amount": {number + 1}}}')
            while made.catalog.sequences["q7"].revision == before:  # noqa: ASYNC110
                await asyncio.sleep(0.001)
            edits.append(time.perf_counter() - started)
        figures["edit_ms"] = 1000 * median(edits)
        started = time.perf_counter()
        id_ = await connection.fetchval(ENROLL_ONE)
        await until(connection, HAS_ENTERED.format(id_), 0.001)
        figures["enrolled_ms"] = 1000 * (time.perf_counter() - started)
    await connection.close()
    return figures


async def measure(dsn: str, name: str, arguments: argparse.Namespace) -> None:
    """Fill a database, and print the figures of one daemon after the other."""
    shape = SHAPES[name]
    shape = replace(shape, sequences=max(10, round(shape.sequences * arguments.scale)))
    server = await postmaster(dsn)
    if server is None:
        raise SystemExit("the server does not run on this machine")
    steps = shape.sequences * shape.steps
    counts = {
        "sequences": shape.sequences,
        "steps": steps,
        "enrollments": steps * shape.enrollments,
    }
    async with fresh(dsn) as url:
        connection = await asyncpg.connect(url)
        begun = time.perf_counter()
        await fill(connection, shape)
        took = time.perf_counter() - begun
        size = await connection.fetchval("SELECT pg_database_size(current_database())")
        say(f"{name}: filled", **counts, seconds=took, database_mb=size / 1e6)
        await connection.close()
        spawn = multiprocessing.get_context("spawn")  # whose memory is its own
        for _ in range(arguments.rounds):
            here, there = spawn.Pipe()
            daemon = spawn.Process(
                target=work, args=(url, server, arguments.seconds, there), daemon=True
            )
            daemon.start()
            there.close()
            figures: dict[str, float] = await asyncio.to_thread(here.recv)
            daemon.join()
            say(name, **counts, **figures)


async def main(arguments: argparse.Namespace) -> None:
    """Run the works that the arguments name."""
    for name in arguments.works.split(","):
        await measure(arguments.dsn, name, arguments)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dsn", required=True, help="a superuser's URL")
    parser.add_argument("--works", default=",".join(SHAPES))
    parser.add_argument("--scale", type=float, default=1, help="of all numbers, such as 0.01")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=10, help="without anything due")
    asyncio.run(main(parser.parse_args()))
