"""What the Python programs of this folder share: the workloads of measure.mjs, in a new database
each, and their figures as lines of JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from datetime import datetime, timezone
from functools import partial
from typing import Any, Protocol

import psycopg

NAME = "sequencerd_bench"
SLICE = 5000
GAP = 0.05  # seconds between two jobs of "wake"

Note = Callable[[int], None]


class Peer(Protocol):
    """A queue. Tasks are "a", which adds "b", which adds "c"; "flat", "wave" and "wake"; and for
    the mix "due", which adds "mail" for each tenth number and "task" for the others.
    """

    left: str
    """A query that counts the jobs that are not done."""
    lead: int
    """Seconds that it needs to prepare a wave of 20,000."""

    async def install(self, url: str) -> None: ...

    async def add(self, task: str, numbers: Sequence[int], at: float | None = None) -> None:
        """Add a job for each number, to be started at a time, in seconds since 1970."""

    def working(self, note: Note) -> AbstractAsyncContextManager[None]:
        """Run a worker that calls `note` with the number as each task starts."""


@asynccontextmanager
async def beside(worker: Coroutine[Any, Any, object]) -> AsyncIterator[None]:
    """Run a worker as long as the context lasts; what its end raises is of no interest."""
    running = asyncio.create_task(worker)
    try:
        yield
    finally:
        running.cancel()
        with suppress(asyncio.CancelledError, Exception):
            await running


async def steps_in_a_row(peer: Peer, connection: psycopg.Connection, count: int) -> None:
    await _done(peer, connection, count, work="w1", task="a", tasks=3)


async def flat(peer: Peer, connection: psycopg.Connection, count: int) -> None:
    await _done(peer, connection, count, work="flat", task="flat", tasks=1)


async def _done(
    peer: Peer, connection: psycopg.Connection, count: int, *, work: str, task: str, tasks: int
) -> None:
    begun = time.time()
    for numbers in _slices(count):
        await peer.add(task, numbers)
    added = time.time() - begun
    connection.execute("ANALYZE")
    connection.execute("CHECKPOINT")
    first: list[float] = []

    def note(_: int) -> None:
        if not first:
            first.append(time.time())

    async with peer.working(note):
        await _until_none(peer, connection)
        seconds = time.time() - first[0]
    say(
        work,
        subjects=count,
        seconds=seconds,
        transitions_per_s=tasks * count / seconds,
        enrolled_per_s=count / added,
    )


async def wave(peer: Peer, connection: psycopg.Connection, count: int) -> None:
    late: list[float] = []
    at = time.time() + 5 + peer.lead * count / 20_000
    async with peer.working(lambda _: late.append(time.time() - at)):
        for numbers in _slices(count):
            await peer.add("wave", numbers, at)
        connection.execute("ANALYZE")
        connection.execute("CHECKPOINT")
        spare = at - time.time()
        await asyncio.sleep(max(0.0, spare))
        while len(late) < count:
            await asyncio.sleep(0.01)
        await _until_none(peer, connection)
        done = time.time() - at
    say(
        "wave",
        subjects=count,
        spare_s=spare,
        first_s=min(late),
        all_done_s=done,
        **percentiles(late, 1),
    )


async def wake(peer: Peer, connection: psycopg.Connection, count: int) -> None:
    started: dict[int, float] = {}
    added: dict[int, float] = {}
    async with peer.working(lambda number: started.setdefault(number, time.time())):  # type: ignore[arg-type, return-value]
        await asyncio.sleep(2)
        for number in range(count):
            await peer.add("wake", [number])
            added[number] = time.time()
            await asyncio.sleep(GAP)
        await _until_none(peer, connection)
    late = [started[number] - added[number] for number in range(count)]
    say("wake", samples=count, **percentiles(late, 1000))


async def mix(peer: Peer, _: psycopg.Connection, rate: int, *, minutes: float) -> None:
    """As mix in measure.mjs."""
    size = rate // 50
    due: dict[int, float] = {}
    late: list[float] = []

    def note(number: int) -> None:
        if at := due.pop(number, None):  # otherwise it is the task after the wait
            late.append(time.time() - at)

    async with peer.working(note):
        say("mix", left=20, passed=0)
        begun = time.time()
        transaction, line = 0, 1
        while line <= 20:
            passed = time.time() - begun
            if passed >= minutes * 60 * line / 20:
                shown = percentiles(late, 1000) if late else {}
                named = {f"late_{name}": value for name, value in shown.items()}
                say("mix", left=20 - line, passed=len(late), **named)
                late.clear()
                line += 1
            elif transaction * size > passed * rate:
                await asyncio.sleep(0.01)
            else:
                at = time.time() + 1
                numbers = range(transaction * size, (transaction + 1) * size)
                due.update(dict.fromkeys(numbers, at))
                await peer.add("due", numbers, at)
                transaction += 1
        await asyncio.to_thread(sys.stdin.read)  # bench/scale.py measures the tables, and closes it


def percentiles(values: list[float], factor: int) -> dict[str, float]:
    values.sort()
    unit = {1: "s", 1000: "ms"}[factor]
    return {
        f"p{p}_{unit}": factor * values[min(len(values) - 1, len(values) * p // 100)]
        for p in (50, 99)
    }


def say(work: str, **figures: float) -> None:
    rounded = {name: round(value, 4) for name, value in figures.items()}
    print(json.dumps({"work": work, **rounded}), flush=True)


def moment(at: float | None) -> datetime | None:
    """A time as the queues take it."""
    return None if at is None else datetime.fromtimestamp(at, timezone.utc)  # noqa: UP017


def _slices(count: int) -> Iterator[range]:
    for low in range(0, count, SLICE):
        yield range(low, min(count, low + SLICE))


async def _until_none(peer: Peer, connection: psycopg.Connection) -> None:
    while True:
        row = connection.execute(peer.left).fetchone()  # type: ignore[call-overload]
        if row[0] == 0:
            return
        await asyncio.sleep(0.05)


async def main(peer: Peer) -> None:
    """Run the works that the arguments name."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--dsn", required=True)
    parser.add_argument("--subjects", type=int, default=5000)
    parser.add_argument("--wave", type=int, default=20_000)
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--works", default="w1,flat,wave,wake")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--rate", type=int, default=2000)
    given = parser.parse_args()
    works = {
        "w1": (steps_in_a_row, given.subjects),
        "flat": (flat, given.subjects),
        "wave": (wave, given.wave),
        "wake": (wake, given.samples),
        "mix": (partial(mix, minutes=given.minutes), given.rate),
    }
    for name in given.works.split(","):
        work, count = works[name]
        with psycopg.connect(given.dsn, autocommit=True) as server:
            server.execute(f"DROP DATABASE IF EXISTS {NAME} WITH (FORCE)")
            server.execute(f"CREATE DATABASE {NAME}")
            server.execute("CHECKPOINT")
            url = f"{given.dsn.rpartition('/')[0]}/{NAME}"
            with psycopg.connect(url, autocommit=True) as connection:
                await peer.install(url)
                await work(peer, connection, count)
            server.execute(f"DROP DATABASE {NAME} WITH (FORCE)")
