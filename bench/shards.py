"""Measure what a transition costs with 1, 2 and 4 shards on one machine: one JSON line for each
figure.

    PYTHONPATH=. python bench/shards.py

Each shard has a PostgreSQL server of its own, which this starts. The same subjects, divided by the
hash, pass three no-op tasks each: once with a daemon for each shard, and once with one for all. The
CPU time for a transition should not depend on the number of shards; other programs on the machine
make it somewhat greater.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import time
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack, ExitStack, contextmanager

import asyncpg
import cpu
import postgresql
from engine import ALL_ENDED, DATA, engine, say

from sequencerd.core.routing import shard_of
from sequencerd.daemon import tune_collector
from sequencerd.storage import migrate

STEPS = "abc"
DEFINE = """
    BEGIN;
    INSERT INTO sequencer.sequences (name, first_step, status) VALUES ('s', 'a', 'paused');
    INSERT INTO sequencer.steps (sequence, name, type, next_step)
    VALUES ('s', 'a', 'Task', 'b'), ('s', 'b', 'Task', 'c'), ('s', 'c', 'Task', NULL);
    COMMIT
"""
ENROLL = """
    INSERT INTO sequencer.enrollments (sequence, subject, data)
    SELECT 's', subject, $2::jsonb FROM unnest($1::text[]) AS subject
"""
IS_SERVED = "SELECT count(*) > 0 FROM pg_locks WHERE objid = 4 AND granted"
BEGIN = "UPDATE sequencer.sequences SET status = 'active'"


async def prepare(url: str, subjects: Sequence[str]) -> None:
    """Enroll the subjects of a shard in a sequence that is paused."""
    connection = await asyncpg.connect(url)
    await migrate.migrate(connection)
    await connection.execute(DEFINE)
    await connection.execute(ENROLL, subjects, DATA, timeout=None)
    await connection.execute("VACUUM ANALYZE sequencer.enrollments", timeout=None)
    await connection.execute("CHECKPOINT", timeout=None)
    await connection.close()


def work_for_ever(urls: Sequence[str]) -> None:
    """Run a daemon that serves some shards, as a separate process."""

    async def work() -> None:
        tune_collector()
        async with AsyncExitStack() as stack:
            for url in urls:
                await stack.enter_async_context(engine(url))
            await asyncio.Event().wait()

    asyncio.run(work())


@contextmanager
def daemons(shards: Sequence[Sequence[str]]) -> Iterator[list[int]]:
    """Run a daemon for each group of shards, and yield their processes."""
    processes = [
        multiprocessing.Process(target=work_for_ever, args=(urls,), daemon=True) for urls in shards
    ]
    for process in processes:
        process.start()
    try:
        yield [process.pid or 0 for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.join()


async def measure(urls: Sequence[str], servers: Sequence[int], own: Sequence[int]) -> list[float]:
    """Return the seconds that all takes, and the CPU seconds of daemons and of servers."""
    connections = [await asyncpg.connect(url) for url in urls]
    for connection in connections:
        await until(connection, IS_SERVED)

    def used() -> list[float]:
        return [time.perf_counter(), sum(map(cpu.tree, own)), sum(map(cpu.tree, servers))]

    before = used()
    for connection in connections:
        await connection.execute(BEGIN)
    for connection in connections:
        await until(connection, ALL_ENDED)
    after = used()
    for connection in connections:
        await connection.close()
    return [b - a for a, b in zip(before, after, strict=True)]


async def until(connection: asyncpg.Connection, query: str) -> None:
    while not await connection.fetchval(query):  # noqa: ASYNC110 - rows set no event
        await asyncio.sleep(0.25)


def compare(arguments: argparse.Namespace, count: int, *, is_one: bool) -> None:
    """Measure some shards, with one daemon for all or one for each."""
    names = [f"user-{number}" for number in range(arguments.subjects)]
    with ExitStack() as stack:
        found = [stack.enter_context(postgresql.running(arguments.server)) for _ in range(count)]
        urls = [one.dsn for one in found]
        for number, url in enumerate(urls):
            own = [name for name in names if shard_of(name, count) == number]
            asyncio.run(prepare(url, own))
        groups = [urls] if is_one else [[url] for url in urls]
        processes = stack.enter_context(daemons(groups))
        took, daemon, postgres = asyncio.run(
            measure(urls, [one.process for one in found], processes)
        )
    moves = len(STEPS) * arguments.subjects
    say(
        "shards",
        shards=count,
        daemons=len(groups),
        transitions_per_s=moves / took,
        daemons_us=1e6 * daemon / moves,
        postgres_us=1e6 * postgres / moves,
        both_us=1e6 * (daemon + postgres) / moves,
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--server", default="embedded", help="a version, a folder, or embedded")
    parser.add_argument("--shards", type=int, nargs="+", default=[1, 2, 4], metavar="N")
    parser.add_argument("--subjects", type=int, default=50_000, help="of all shards together")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    for _ in range(given.rounds):
        for shards in given.shards:
            for one_daemon in (False, True) if shards > 1 else (False,):
                compare(given, shards, is_one=one_daemon)
