"""How long the console's pages take on the server, one JSON line for each.

    PYTHONPATH=. python bench/console.py --dsn postgresql://postgres@localhost/postgres

It makes and drops a database "sequencerd_bench" with so many enrollments: twenty sequences of ten
steps, two fifths of the enrollments at one step and with one wake time, one in fifty failed, and
two events for each in the last two weeks. Pages are requested in turn, as by one reader after
another; meanwhile the counts are made in the background, as always. `cpu_ms` is what a request
costs both sides, with its share of the counts. Then come what those cost, how many enrollments
another connection inserts alone and while a reader asks for a page each second, in turns, and how
late an idle engine starts a runner after an INSERT, alone and while a reader asks for page after
page.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from datetime import UTC, datetime, timedelta
from statistics import median, quantiles
from typing import Any

import asyncpg
import cpu
import engine
import httpx
import structlog
from prometheus_client import CollectorRegistry
from scale import postmaster
from starlette.applications import Starlette

from sequencerd.console import summary
from sequencerd.console.app import ServedShard, make_console
from sequencerd.core.model import Sequence
from sequencerd.definitions.compiler import from_rows
from sequencerd.definitions.simulator import Simulator
from sequencerd.service.http_server import make_app, serving
from sequencerd.settings import ConsoleSettings
from sequencerd.storage import migrate
from sequencerd.storage.connections import Shard
from sequencerd.storage.sequences import read_definitions, read_revisions
from sequencerd.storage.statements import QUERIES

SEQUENCES = 20
STEPS = 10

DEFINE = """
INSERT INTO sequencer.sequences (name, first_step) SELECT 's' || n, 't0'
  FROM generate_series(0, $1::int - 1) AS n
"""
DEFINE_STEPS = """
INSERT INTO sequencer.steps (sequence, name, type, config, next_step)
SELECT 's' || n, 't' || m, 'WaitForDuration', '{"amount": 30, "unit": "days"}',
       CASE WHEN m < $2 - 1 THEN 't' || m + 1 END
  FROM generate_series(0, $1::int - 1) AS n, generate_series(0, $2::int - 1) AS m
"""
ENROLL = """
INSERT INTO sequencer.enrollments (sequence, subject, data, step, wake_at, entered_at, reentry,
                                   status, failure, last_error, ended_at)
SELECT CASE WHEN n % 5 < 2 THEN 's0' ELSE 's' || n % $3 END,
       'user-' || n,
       jsonb_build_object('email', 'user' || n || '@example.com', 'name', 'Ada ' || n),
       CASE WHEN n % 5 < 2 THEN 't3' ELSE 't' || n / $3 % $4 END,
       CASE WHEN failed THEN NULL WHEN n % 5 < 2 THEN 'infinity'
            ELSE now() + n % 2592000 * interval '1 second' END,
       now() - interval '1 day', 'after_end',
       CASE WHEN failed THEN 'failed' ELSE 'active' END,
       CASE WHEN failed THEN 'error' END,
       CASE WHEN failed THEN '550 no such user' END,
       CASE WHEN failed THEN now() END
  FROM (SELECT n, n % 100 IN (5, 7) AS failed FROM generate_series($1::int, $2::int) AS n) AS n
"""
HISTORY = """
INSERT INTO sequencer.events (enrollment_id, at, sequence, step, visit, action)
SELECT n, now() - interval '14 days' * (1 - n::float8 / $2) + m * interval '10 minutes',
       's' || n % $3, 't' || m, 1 + m, CASE m WHEN 0 THEN 'enrolled' ELSE 'next' END
  FROM generate_series(1, $1::int) AS n, generate_series(0, 1) AS m ORDER BY 2
"""


async def fill(connection: asyncpg.Connection, count: int) -> None:
    """Insert the enrollments and their history."""
    await connection.execute("SET session_replication_role = replica")  # faster, and no NOTIFY
    await connection.execute(DEFINE, SEQUENCES)
    await connection.execute(DEFINE_STEPS, SEQUENCES, STEPS)
    for first in range(1, count + 1, 100_000):
        last = min(first + 99_999, count)
        await connection.execute(ENROLL, first, last, SEQUENCES, STEPS)
    await connection.execute(HISTORY, count, count, SEQUENCES)
    await connection.execute("SET session_replication_role = origin")
    await connection.execute("VACUUM ANALYZE sequencer.enrollments")
    await connection.execute("VACUUM ANALYZE sequencer.events")


async def main() -> None:
    """Measure, and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dsn", required=True)
    parser.add_argument("--enrollments", type=int, default=1_000_000)
    parser.add_argument("--requests", type=int, default=200, help="of each page")
    given = parser.parse_args()
    async with engine.fresh(given.dsn) as url:
        connection = await asyncpg.connect(url)
        await migrate.migrate(connection)
        begun = time.perf_counter()
        await fill(connection, given.enrollments)
        print(json.dumps({"filled": given.enrollments, "s": round(time.perf_counter() - begun)}))
        names = list(await read_revisions(connection))
        sequences, steps = await read_definitions(connection, names)
        definitions: dict[str, Sequence] = {
            row["name"]: from_rows(row, [s for s in steps if s["sequence"] == row["name"]], {})
            for row in sequences
        }
        app = make_console(
            ServedShard(
                Shard(url),
                ConsoleSettings(write=True),
                lambda: Simulator(definitions, {}),
                lambda: datetime.now(UTC),
                dict,
                str,
            ),
            structlog.get_logger(),
        )
        transport = httpx.ASGITransport(app=app)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client,
        ):
            await measure(client, given.requests, given.enrollments, await postmaster(url))
        await cost(connection)
        await writes(app, url, given.enrollments)
        await connection.close()
    await disturbance(given.dsn, given.requests)


def pages_of(count: int) -> dict[str, str]:
    """Return the pages' paths by what they show."""
    return {
        "overview": "/",
        "sequence": "/sequence?sequence=s1",
        "step, 400,000 of a million with one time": "/sequence?sequence=s0&step=t3",
        "step, its last page": "/tables/enrollments.json"
        "?sequence=s0&step=t3&from=infinity&skip=5000",
        "enrollment": f"/enrollments/{count // 2}",
        "failures": "/failures",
        "failures of a step": "/search?sequence=s0&step=t3&status=failed",
        "filtered": "/search?where=data.name+%3D+Ada+77&sort=subject&columns=subject,data.email",
        "filtered by sequence": "/search?sequence=s7&status=active",
        "search, nothing asked": "/search",
        "search by subject": "/search?q=user-9",
        "search by id": f"/search?q={count // 3}",
        "search by address, without an index": "/search?q=user77@example.com",
        "over time": "/over-time",
        "over time of a sequence, by hour": "/over-time?by=hour&sequence=s1",
        "question before a change": "/change?action=retry&status=failed",
        "health": "/health",
        "simulate": "/simulate?sequence=s1&data=%7B%7D",
        "overview as JSON": "/tables/overview.json",
    }


async def measure(client: httpx.AsyncClient, requests: int, count: int, server: int | None) -> None:
    """Print a line for each page: the milliseconds of its first request, and of the others."""
    for name, path in pages_of(count).items():
        took = []
        before = used(server)
        for _ in range(requests):
            begun = time.perf_counter()
            answer = await client.get(path)
            took.append((time.perf_counter() - begun) * 1000)
            assert answer.status_code in (200, 503), (path, answer.status_code)
            await asyncio.sleep(0)
        percentiles = quantiles(took[1:], n=100)
        line: dict[str, Any] = {
            "page": name,
            "first_ms": round(took[0], 1),
            "p50_ms": round(median(took[1:]), 1),
            "p99_ms": round(percentiles[98], 1),
            "cpu_ms": round((used(server) - before) * 1000 / requests, 1),
        }
        print(json.dumps(line), flush=True)


def used(server: int | None) -> float:
    """Return the seconds of CPU time of this process and of a server on this machine."""
    return time.process_time() + (cpu.tree(server) if server else 0.0)


async def writes(app: Starlette, url: str, count: int) -> None:
    """Measure the enrollments a second of another process, without and with a reader of the
    console.
    """
    rates: dict[bool, list[float]] = {False: [], True: []}
    paths = [f"/console{path}" for path in pages_of(count).values()]
    served = make_app(list, list, CollectorRegistry(), app)
    async with serving(served, LISTEN):
        for turn in range(2 * TURNS):
            is_read = turn % 2 == 1
            reader = await python(SOMETIMES, json.dumps(paths)) if is_read else None
            writer = await python(WRITER, url, f"w{turn}")
            output, _ = await writer.communicate()
            rates[is_read].append(float(output))
            if reader:
                reader.kill()
                await reader.wait()
    alone, beside = median(rates[False]), median(rates[True])
    engine.say("writes beside a reader", alone_per_s=alone, ratio=beside / alone)


async def python(program: str, *arguments: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable, "-c", program, *arguments, stdout=asyncio.subprocess.PIPE
    )


async def cost(connection: asyncpg.Connection) -> None:
    """Measure each of the background counts by itself."""
    now = await connection.fetchval(QUERIES["server_time"])
    day = now.replace(hour=0, minute=0, second=0, microsecond=0)
    yesterday = day - timedelta(days=1)
    for name, parameters in (
        ("console_steps", (now, summary.MAX_DUE)),
        ("console_active", ()),
        ("console_failed", (summary.MAX_FAILED,)),
        ("console_flow", (yesterday, day)),
        ("console_stays", (yesterday, day, 10, summary.EVENTS_PER_ROUND)),
    ):
        took = []
        for _ in range(5):
            begun = time.perf_counter()
            await connection.fetch(QUERIES[name], *parameters)
            took.append((time.perf_counter() - begun) * 1000)
        print(json.dumps({"query": name, "p50_ms": round(median(took), 1)}), flush=True)


async def disturbance(dsn: str, samples: int) -> None:
    """Measure the engine's latency without readers, and with one that never pauses."""
    async with engine.defined(dsn, ("a", "Task", "{}")) as (url, connection):
        console = make_console(
            ServedShard(
                Shard(url),
                ConsoleSettings(),
                lambda: Simulator({}, {}),
                lambda: datetime.now(UTC),
                dict,
                str,
            ),
            structlog.get_logger(),
        )
        app = make_app(list, list, CollectorRegistry(), console)
        async with engine.engine(url), serving(app, LISTEN):
            for reader in (False, True):
                reading = None
                if reader:
                    reading = await asyncio.create_subprocess_exec(sys.executable, "-c", READER)
                    await asyncio.sleep(1)
                latencies = []
                for n in range(samples):
                    begun = engine.next_start()
                    await connection.execute(
                        "INSERT INTO sequencer.enrollments (sequence, subject) VALUES ('s', $1)",
                        f"u{n} {reader}",
                    )
                    committed = time.perf_counter()
                    latencies.append(await begun - committed)
                    await asyncio.sleep(0.02)
                if reading:
                    reading.kill()
                    await reading.wait()
                engine.say(
                    "wake, while pages are read" if reader else "wake",
                    **engine.percentiles(latencies, 1000),
                )
        engine.listeners.clear()


LISTEN = "127.0.0.1:9188"
TURNS = 5
SOMETIMES = f"""
import itertools, json, sys, time, httpx
with httpx.Client(base_url="http://{LISTEN}") as client:
    for path in itertools.cycle(json.loads(sys.argv[1])):
        assert client.get(path, timeout=30).status_code in (200, 503), path
        time.sleep(1)
"""
WRITER = """
import asyncio, sys, time, asyncpg
async def main():
    connection = await asyncpg.connect(sys.argv[1])
    count, begun = 0, time.monotonic()
    while time.monotonic() < begun + 8:
        await connection.execute(
            "INSERT INTO sequencer.enrollments (sequence, subject) VALUES ('s1', $1)",
            f"{sys.argv[2]} {count}",
        )
        count += 1
    print(count / (time.monotonic() - begun))
asyncio.run(main())
"""
READER = f"""
import httpx
with httpx.Client(base_url="http://{LISTEN}/console") as client:
    while True:
        client.get("/search")
"""


if __name__ == "__main__":
    asyncio.run(main())
