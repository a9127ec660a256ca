"""What the engine does with a database, one JSON line for each workload.

    PYTHONPATH=. python bench/engine.py --dsn postgresql://postgres@localhost/postgres

    w1     three no-op tasks in a row, a Python runner each: transitions a second, since the first
           task started
    flat   one no-op task for each enrollment, counted likewise
    http   the same with an HTTP runner, a server of its own that answers batches of 1,000
    pure   three steps in a row without a side effect
    data   three conditions in a row on each enrollment's own data
    limit  what one session reaches with the same batches on a bare table
    wave   timers that are due at one instant: how late they start
    many   half as many, each in a sequence of its own
    timer  one timer at a time, in an idle daemon: how late it starts
    wake   INSERT commit to runner start, in an idle daemon, beside a raw NOTIFY
    goal   UPDATE of data to the goal's step, in an idle daemon

It makes and drops a database "sequencerd_bench". Figures of one run can be compared, the machine's
noise is the same for all.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import asyncpg
import structlog
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from sequencerd.core.model import CALL_LIMITS
from sequencerd.daemon import daemon_name, tune_collector
from sequencerd.engine.clock import Clock
from sequencerd.engine.lookups import Lookups
from sequencerd.engine.loop import Engine
from sequencerd.runners import Runner
from sequencerd.runners.http import BatchRunner, HttpEndpoint
from sequencerd.runners.python import PythonRunner, runner
from sequencerd.service.metrics import Metrics
from sequencerd.settings import EngineSettings
from sequencerd.storage import connections, migrate
from sequencerd.storage.connections import Shard
from sequencerd.storage.listener import listen

run: Callable[[Coroutine[Any, Any, None]], None]
try:
    import uvloop
except ImportError:
    run = asyncio.run
else:
    run = uvloop.run

NAME = "sequencerd_bench"
DATA = json.dumps({"name": "x" * 60, "mail": "y" * 60, "k": 12345, "z": "z" * 40})
CONDITION = json.dumps(
    {
        "lodashCommand": "gt",
        "value": {"type": "get", "value": "data.k"},
        "compareTo": {"type": "raw", "value": 5},
    }
)
BATCH = 1000
WARM_UP = 5

listeners: list[Callable[[Sequence[Any]], None]] = []


@runner(batch_size=BATCH, concurrency=2)
async def no_op(_config: object, runners: Sequence[Any]) -> None:
    """Do nothing, and note the time if it is wanted."""
    for listener in listeners:
        listener(runners)


@asynccontextmanager
async def fresh(dsn: str) -> AsyncIterator[str]:
    """Provide the URL of a new database."""
    connection = await asyncpg.connect(dsn)
    await connection.execute(f"DROP DATABASE IF EXISTS {NAME} WITH (FORCE)")
    await connection.execute(f"CREATE DATABASE {NAME}")
    await connection.execute("CHECKPOINT")
    try:
        yield urlunsplit(urlsplit(dsn)._replace(path=f"/{NAME}"))
    finally:
        await connection.execute(f"DROP DATABASE {NAME} WITH (FORCE)")
        await connection.close()


@asynccontextmanager
async def defined(dsn: str, *steps: tuple[str, str, str]) -> AsyncIterator[tuple[str, Any]]:
    """Provide a database with a sequence of (name, type, config), and a connection."""
    async with fresh(dsn) as url:
        connection = await asyncpg.connect(url)
        await migrate.migrate(connection)
        names = [name for name, _, _ in steps]
        async with connection.transaction():
            await connection.execute(
                "INSERT INTO sequencer.sequences (name, first_step) VALUES ('s', $1)", names[0]
            )
            await connection.executemany(
                "INSERT INTO sequencer.steps (sequence, name, type, config, next_step)"
                " VALUES ('s', $1, $2, $3, $4)",
                [(*step, then) for step, then in zip(steps, [*names[1:], None], strict=True)],
            )
        try:
            yield url, connection
        finally:
            await connection.close()


@asynccontextmanager
async def engine(url: str, runners: Mapping[str, Runner] | None = None) -> AsyncIterator[Engine]:
    """Provide a daemon's engine and listener that are ready."""
    at = Shard(url)
    pool, heart = await connections.connect_pool(at, 5), await connections.connect_pool(at, 1)
    log = structlog.wrap_logger(structlog.PrintLogger(sys.stderr))
    made = Engine(
        pool,
        heart,
        {"Task": PythonRunner(no_op, name="Task"), **(runners or {})},
        Lookups(pool, {}).get,
        clock=Clock(),
        settings=EngineSettings(batch=BATCH),
        name=daemon_name(),
        log=log,
        metrics=Metrics(),
    )
    ready = asyncio.Event()

    async def connected() -> None:
        await made.sweep()
        ready.set()

    listener = asyncio.create_task(listen(at, made.receive, connected, made.find_due, log=log))
    working = asyncio.create_task(made.run())
    await ready.wait()
    try:
        yield made
    finally:
        made.stop()
        await working
        listener.cancel()
        with suppress(asyncio.CancelledError):
            await listener
        await pool.close()
        await heart.close()


async def enroll(
    connection: Any, count: int, wake_at: datetime | None = None, sequence: str = "'s'"
) -> float:
    """Enroll so many subjects in a sequence: an expression with their number, n."""
    begun = time.perf_counter()
    await connection.execute(
        "INSERT INTO sequencer.enrollments (sequence, subject, data, wake_at)"
        f" SELECT {sequence}, 'u' || n, $2::jsonb || jsonb_build_object('k', n),"
        " coalesce($3, now()) FROM generate_series(1, $1::int) AS n",
        count,
        DATA,
        wake_at,
    )
    seconds = time.perf_counter() - begun
    await connection.execute("ANALYZE sequencer.enrollments")
    await connection.execute("CHECKPOINT")
    return seconds


async def until(connection: Any, query: str, pause: float = 0.05) -> None:
    """Poll until the answer is true, because rows set no event."""
    while not await connection.fetchval(query):  # noqa: ASYNC110
        await asyncio.sleep(pause)


ALL_ENDED = "SELECT NOT EXISTS (SELECT FROM sequencer.enrollments WHERE status = 'active')"


async def steps_in_a_row(
    dsn: str,
    subjects: int,
    work: str,
    kind: tuple[str, str],
    runners: Mapping[str, Runner] | None = None,
    *,
    names: str = "abc",
) -> None:
    steps = [(name, *kind) for name in names]
    async with defined(dsn, *steps) as (url, connection):
        seconds = await enroll(connection, subjects)
        first: list[float] = []
        listeners[:] = [lambda _: first.append(time.perf_counter()) if not first else None]
        begun = time.perf_counter()
        async with engine(url, runners):
            await until(connection, ALL_ENDED)
            took = time.perf_counter() - (first[0] if first else begun)
        listeners.clear()
        count = len(names) * subjects
        say(
            work,
            subjects=subjects,
            seconds=took,
            transitions_per_s=count / took,
            enrolled_per_s=subjects / seconds,
        )


def answer_calls(port: Any) -> None:
    """Run an HTTP server, as a separate process, that answers "next" for all enrollments."""

    async def answer(request: Request) -> JSONResponse:
        event = await request.json()
        return JSONResponse([{"id": one["id"], "action": "next"} for one in event["runners"]])

    listener = socket.create_server(("127.0.0.1", 0))
    port.value = listener.getsockname()[1]
    app = Starlette(routes=[Route("/", answer, methods=["POST"])])
    uvicorn.Server(uvicorn.Config(app, log_config=None)).run([listener])


async def http(dsn: str, subjects: int) -> None:
    with process(answer_calls) as port:
        limits = replace(CALL_LIMITS, batch_size=BATCH)
        called = HttpEndpoint(
            f"http://127.0.0.1:{port}/", timeout=limits.timeout, connections=limits.concurrency
        )
        runner = BatchRunner(called, name="Call", limits=limits, batch_bytes=BATCH * 1000)
        await steps_in_a_row(dsn, subjects, "http", ("Call", "{}"), {"Call": runner})
        await runner.close()


@contextmanager
def process(serve: Callable[[Any], None]) -> Iterator[int]:
    """Provide the port of a server in a separate process."""
    port = multiprocessing.Value("i", 0)
    server = multiprocessing.Process(target=serve, args=(port,), daemon=True)
    server.start()
    while not port.value:
        time.sleep(0.01)
    try:
        yield port.value
    finally:
        server.terminate()


async def limit(dsn: str, subjects: int) -> None:
    """Claim rows, update them and write history, in batches, in one session."""
    async with fresh(dsn) as url:
        connection = await asyncpg.connect(url)
        await connection.execute(
            """
            CREATE TABLE s (
                id bigint PRIMARY KEY, step int NOT NULL, wake_at timestamptz NOT NULL,
                status text NOT NULL, attempt int NOT NULL, data jsonb NOT NULL);
            CREATE TABLE h (
                id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, sid bigint NOT NULL,
                step int NOT NULL, at timestamptz NOT NULL, what text NOT NULL);
            """
        )
        now = datetime.now(UTC)
        await connection.copy_records_to_table(
            "s", records=[(n, 0, now, "active", 0, DATA) for n in range(subjects)]
        )
        await connection.execute("CREATE INDEX ON s (step, wake_at) WHERE status = 'active'")
        await connection.execute("ANALYZE s")
        claim = await connection.prepare(
            "SELECT id, step, attempt, data FROM s WHERE status = 'active' AND step = $1"
            " AND wake_at <= now() ORDER BY wake_at LIMIT $2 FOR UPDATE SKIP LOCKED"
        )
        update = await connection.prepare(
            "UPDATE s SET step = u.step, wake_at = u.wake_at FROM"
            " unnest($1::bigint[], $2::int[], $3::timestamptz[]) AS u (id, step, wake_at)"
            " WHERE s.id = u.id"
        )
        begun = time.perf_counter()
        for step in range(3):
            while True:
                async with connection.transaction():
                    rows = await claim.fetch(step, BATCH)
                    if not rows:
                        break
                    now = datetime.now(UTC)
                    ids, steps = [row[0] for row in rows], [row[1] + 1 for row in rows]
                    await update.fetch(ids, steps, [now] * len(rows))
                    await connection.copy_records_to_table(
                        "h",
                        columns=["sid", "step", "at", "what"],
                        records=[(row[0], row[1], now, "done") for row in rows],
                    )
        took = time.perf_counter() - begun
        say("limit", subjects=subjects, seconds=took, transitions_per_s=3 * subjects / took)
        await connection.close()


async def wave(dsn: str, count: int, *, sequences: int = 1) -> None:
    """Let all tasks be due at one instant; a runner records when they start."""
    async with defined(dsn, ("a", "Task", "{}")) as (url, connection):
        if sequences > 1:
            async with connection.transaction():
                await connection.execute(
                    "INSERT INTO sequencer.sequences (name, first_step)"
                    " SELECT 's' || n, 'a' FROM generate_series(1, $1) AS n",
                    sequences,
                )
                await connection.execute(
                    "INSERT INTO sequencer.steps (sequence, name, type)"
                    " SELECT 's' || n, 'a', 'Task' FROM generate_series(1, $1) AS n",
                    sequences,
                )
        lateness: list[float] = []
        async with engine(url):
            at = datetime.now(UTC) + timedelta(seconds=8)

            def note(runners: Sequence[Any]) -> None:
                lateness.extend([(datetime.now(UTC) - at).total_seconds()] * len(runners))

            listeners[:] = [note]
            await enroll(connection, count, at, "'s'" if sequences == 1 else "'s' || n")
            spare = (at - datetime.now(UTC)).total_seconds()
            await until(connection, ALL_ENDED)
            done = (datetime.now(UTC) - at).total_seconds()
        listeners.clear()
        say(
            "wave" if sequences == 1 else "many",
            subjects=count,
            spare_s=spare,
            first_s=min(lateness),
            all_done_s=done,
            **percentiles(lateness, 1),
        )


def next_start() -> asyncio.Future[float]:
    """Wait for the next call of the runner, and return its time."""
    future: asyncio.Future[float] = asyncio.get_running_loop().create_future()
    listeners[:] = [lambda _: future.set_result(time.perf_counter())]
    return future


async def timer(dsn: str, samples: int) -> None:
    """Measure the lateness by the database's clock, which is this machine's, after a few tasks to
    warm up.
    """
    async with defined(dsn, ("a", "Task", "{}")) as (url, connection):
        late = []
        async with engine(url):
            for n in range(-WARM_UP, samples):
                begun = next_start()
                now = time.perf_counter()
                wait = timedelta(milliseconds=100 + n % 50)
                await connection.execute(
                    "INSERT INTO sequencer.enrollments (sequence, subject, wake_at)"
                    " VALUES ('s', $1, $2)",
                    f"u{n}",
                    datetime.now(UTC) + wait,
                )
                late.append(await begun - now - wait.total_seconds())
        del late[:WARM_UP]
        listeners.clear()
        say("timer", samples=samples, first_ms=1000 * min(late), **percentiles(late, 1000))


async def wake(dsn: str, samples: int) -> None:
    async with defined(dsn, ("a", "Task", "{}")) as (url, connection):
        loop = asyncio.get_running_loop()
        latencies, raw, commits = [], [], []
        await connection.execute("CREATE TABLE raw (n integer)")
        listening = await asyncpg.connect(url)
        heard = loop.create_future()
        await listening.add_listener("raw", lambda *_: heard.set_result(time.perf_counter()))
        async with engine(url):
            for n in range(samples):
                begun = next_start()
                await connection.execute(
                    "INSERT INTO sequencer.enrollments (sequence, subject) VALUES ('s', $1)",
                    f"u{n}",
                )
                committed = time.perf_counter()
                latencies.append(await begun - committed)
                await asyncio.sleep(0.05)
                heard = loop.create_future()
                await connection.execute("NOTIFY raw")
                committed = time.perf_counter()
                raw.append(await heard - committed)
                await asyncio.sleep(0.02)
                begun_at = time.perf_counter()
                await connection.execute("INSERT INTO raw VALUES (1)")
                commits.append(time.perf_counter() - begun_at)
        listeners.clear()
        await listening.close()
        say("wake", samples=samples, **percentiles(latencies, 1000))
        say("raw notify", samples=samples, **percentiles(raw, 1000))
        say("raw commit", samples=samples, **percentiles(commits, 1000))


async def goal(dsn: str, samples: int) -> None:
    paid = json.dumps({"lodashCommand": "identity", "value": {"type": "get", "value": "data.paid"}})
    steps = (
        ("a", "WaitForDuration", '{"amount": 9, "unit": "days"}'),
        ("g", "Goal", paid),
        ("b", "Task", "{}"),
    )
    async with defined(dsn, *steps) as (url, connection), engine(url):
        await enroll(connection, samples)
        asleep = "SELECT bool_and(entered_at IS NOT NULL) FROM sequencer.enrollments"
        await until(connection, asleep)
        latencies = []
        for n in range(samples):
            begun = next_start()
            await connection.execute(
                "UPDATE sequencer.enrollments SET data = data || '{\"paid\": true}'"
                " WHERE subject = $1",
                f"u{n + 1}",
            )
            committed = time.perf_counter()
            latencies.append(await begun - committed)
            await asyncio.sleep(0.02)
        listeners.clear()
        say("goal", samples=samples, **percentiles(latencies, 1000))


def percentiles(values: list[float], factor: float) -> dict[str, float]:
    values = sorted(values)
    unit = {1: "s", 1000: "ms"}[int(factor)]
    return {
        f"p{p}_{unit}": factor * values[min(len(values) - 1, len(values) * p // 100)]
        for p in (50, 99)
    }


def say(work: str, **figures: float) -> None:
    rounded = {name: round(value, 4) for name, value in figures.items()}
    print(json.dumps({"work": work, **rounded}), flush=True)


async def main(arguments: argparse.Namespace) -> None:
    tune_collector()
    dsn, subjects = arguments.dsn, arguments.subjects
    works = {
        "w1": lambda: steps_in_a_row(dsn, subjects, "w1", ("Task", "{}")),
        "flat": lambda: steps_in_a_row(dsn, subjects, "flat", ("Task", "{}"), names="a"),
        "http": lambda: http(dsn, subjects),
        "pure": lambda: steps_in_a_row(dsn, subjects, "pure", ("GoTo", "{}")),
        "data": lambda: steps_in_a_row(dsn, subjects, "data", ("Conditional", CONDITION)),
        "limit": lambda: limit(dsn, subjects),
        "wave": lambda: wave(dsn, arguments.wave),
        "many": lambda: wave(dsn, arguments.wave // 2, sequences=arguments.wave // 2),
        "wake": lambda: wake(dsn, arguments.samples),
        "timer": lambda: timer(dsn, arguments.samples),
        "goal": lambda: goal(dsn, arguments.samples),
    }
    for _ in range(arguments.repeat):
        for work in arguments.works.split(","):
            await works[work]()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dsn", required=True, help="a superuser's URL")
    parser.add_argument("--subjects", type=int, default=50_000)
    parser.add_argument("--wave", type=int, default=20_000)
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--works", default="limit,w1,flat,http,pure,data,wave,many,timer,wake,goal")
    parser.add_argument("--repeat", type=int, default=1)
    run(main(parser.parse_args()))
