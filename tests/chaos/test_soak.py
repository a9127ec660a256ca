"""All faults at random for CHAOS_SECONDS: no resource of a daemon grows with them."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import os
import random
import signal
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from pathlib import Path
from statistics import median

import asyncpg
import pytest

from sequencerd.core.task import Answer, Failed, Result, Task
from sequencerd.engine.loop import Engine
from sequencerd.storage.database_errors import TRANSIENT_ERRORS
from tests.chaos.world import CONNECT, SECONDS, World
from tests.helpers.engines import ALL_ENDED, Recorder, running_engine, until

RATE = 50  # enrollments a second
TURN = 2.0  # seconds between samples
MORE = {"RSS in MB": 40.0, "descriptors": 12, "tasks": 12, "statements": 40}
"""By how much the end may be above the beginning."""

RESTART = (signal.SIGINT, signal.SIGQUIT, signal.SIGKILL)


def sample(engine: Engine) -> dict[str, float]:
    """What must not grow, of this process."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    connections = [holder._con for holder in engine._env.pool._holders if holder._con is not None]
    return {
        "RSS in MB": pages * os.sysconf("SC_PAGE_SIZE") / 1e6,
        "descriptors": sum(map(is_ours, Path("/proc/self/fd").iterdir())),
        "tasks": len(asyncio.all_tasks()),
        "statements": max((len(one._stmt_cache) for one in connections), default=0),
    }


def is_ours(descriptor: Path) -> bool:
    """Not a lock of the embedded server: each start of it leaves two behind in this process."""
    with suppress(FileNotFoundError):
        return descriptor.readlink().name not in ("starting", "using")
    return False


def slopes(samples: list[dict[str, float]]) -> dict[str, tuple[float, float]]:
    """The medians of the second and of the last fifth: at the beginning caches fill."""
    fifth = max(len(samples) // 5, 1)
    return {
        name: (
            median(one[name] for one in samples[fifth : 2 * fifth] or samples),
            median(one[name] for one in samples[-fifth:]),
        )
        for name in samples[0]
    }


class Forgetful(Recorder):
    """Keeps nothing of what it was given: the test measures memory."""

    async def run(self, program: object, tasks: Sequence[Task]) -> Sequence[Result]:
        assert self.behaviour is not None
        return [await self.behaviour(task) for task in tasks]


async def test_nothing_grows(world: World, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, "asyncpg")  # pytest keeps what is logged, with its frames
    rng = random.Random(world.rng.random())

    async def answer(_: Task) -> Result:
        await asyncio.sleep(rng.uniform(0, 0.05))
        fault = rng.random()
        if fault < 0.02:
            return Failed("down", fault="server")
        if fault < 0.04:
            raise ConnectionError("lost")
        return Answer()

    def runners() -> dict[str, Forgetful]:
        return {"Email": Forgetful(answer), "Call": Forgetful(answer)}

    samples = []
    async with running_engine(world.database, runners(), sweep=1, lease=3.0) as engine:
        faults = [partial_fault(world, rng, one) for one in FAULTS]

        async def replace_runners() -> None:
            await (await engine.use(runners(), engine.executors.lookups))

        faults.append(replace_runners)
        app = asyncio.create_task(world.enroll(SECONDS, RATE))
        while not app.done():
            with suppress(*CONNECT):
                await rng.choice(faults)()
            await asyncio.sleep(TURN)
            samples.append(sample(engine))
        await app
        connection = await asyncpg.connect(world.database)
        await until(connection, ALL_ENDED)
        await connection.close()
    grown = slopes(samples)
    shown = {name: f"{first:g} to {last:g}" for name, (first, last) in grown.items()}
    print(shown)
    wrong = {name for name, (first, last) in grown.items() if last - first > MORE[name]}
    assert not wrong, shown


# --- what goes wrong


async def terminate(connection: asyncpg.Connection, _: World, __: random.Random) -> None:
    await connection.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE datname = current_database() AND pid <> pg_backend_pid() AND random() < 0.5"
    )


async def refuse(connection: asyncpg.Connection, _: World, rng: random.Random) -> None:
    code = rng.choice(["40001", "53100", "P0001", "23514"])
    await connection.execute(
        "CREATE OR REPLACE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
        f" IF random() < 0.05 THEN RAISE 'injected' USING ERRCODE = '{code}'; END IF;"
        " RETURN NEW; END $$;"
        "CREATE TRIGGER fail BEFORE UPDATE ON sequencer.enrollments FOR EACH ROW"
        " EXECUTE FUNCTION fail()"
    )
    await asyncio.sleep(1)
    await connection.execute("DROP TRIGGER fail ON sequencer.enrollments")


async def lock(connection: asyncpg.Connection, _: World, __: random.Random) -> None:
    async with connection.transaction():
        await connection.execute("LOCK TABLE sequencer.enrollments IN ACCESS EXCLUSIVE MODE")
        await asyncio.sleep(1)


async def truncate(connection: asyncpg.Connection, _: World, __: random.Random) -> None:
    await connection.execute("TRUNCATE sequencer.enrollments, sequencer.events")


async def edit(connection: asyncpg.Connection, _: World, rng: random.Random) -> None:
    await connection.execute(
        "UPDATE sequencer.steps SET config = jsonb_build_object('note', $1::text)"
        " WHERE name = 'call'",
        str(rng.random()),
    )


async def notify(connection: asyncpg.Connection, _: World, rng: random.Random) -> None:
    for _number in range(100):
        name = f"none{rng.randrange(100_000)}"
        payload = rng.choice(["", "nonsense", json.dumps({"due": [name, "a"]})])
        await connection.execute("SELECT pg_notify('sequencer', $1)", payload)


async def crowd(_: asyncpg.Connection, world: World, __: random.Random) -> None:
    taken: list[asyncpg.Connection] = []
    with suppress(*TRANSIENT_ERRORS):
        while len(taken) < 100:
            taken.append(await asyncpg.connect(world.server.url, timeout=5))
    await asyncio.sleep(1)
    for one in taken:
        one.terminate()


async def restart(_: asyncpg.Connection, world: World, rng: random.Random) -> None:
    world.server.kill(rng.choice(RESTART))
    await asyncio.to_thread(world.server.start)


FAULTS = (terminate, refuse, lock, truncate, edit, notify, crowd, restart)


def partial_fault(
    world: World,
    rng: random.Random,
    fault: Callable[[asyncpg.Connection, World, random.Random], Awaitable[None]],
) -> Callable[[], Awaitable[None]]:
    """A fault with a connection of its own."""

    async def do() -> None:
        connection = await asyncpg.connect(world.database, timeout=5)
        world.note(fault.__name__)
        try:
            await fault(connection, world, rng)
        finally:
            connection.terminate()

    return do
