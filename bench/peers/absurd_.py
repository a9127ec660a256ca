"""absurd: a durable task with three steps, and one that sleeps until the wave."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psycopg
from absurd_sdk import Absurd, AsyncAbsurd
from measure import Note, beside, main


class OneConnection:
    """A hundred tasks at a time on one connection, as its Python SDK has no pool."""

    left = (
        "SELECT count(*) FROM absurd.t_default"
        " WHERE state NOT IN ('completed', 'failed', 'cancelled')"
    )
    lead = 90

    async def install(self, url: str) -> None:
        self.url = url
        program = str(Path(sys.executable).with_name("absurdctl"))
        subprocess.run([program, "init", "-d", url], check=True, stdout=subprocess.DEVNULL)
        self.connection = psycopg.connect(url, autocommit=True)
        self.client = Absurd(self.connection)
        self.client.create_queue("default")
        for task in ("a", "flat", "wave", "wake"):
            self.client.register_task(task)(lambda *_: None)

    async def add(self, task: str, numbers: Sequence[int], at: float | None = None) -> None:
        with self.connection.transaction():
            for number in numbers:
                self.client.spawn(task, {"n": number, "at": at})

    @asynccontextmanager
    async def working(self, note: Note) -> AsyncIterator[None]:
        app = AsyncAbsurd(self.url)

        @app.register_task("a")
        async def in_a_row(given: dict[str, Any], context: Any) -> None:
            async def step() -> None:
                note(given["n"])

            for name in "abc":
                await context.step(name, step)

        @app.register_task("wave")
        async def wave(given: dict[str, Any], context: Any) -> None:
            if given["at"] > time.time():
                await context.sleep_until("wave", given["at"])
            note(given["n"])

        for name in ("flat", "wake"):

            @app.register_task(name)
            async def execute(given: dict[str, Any], _: Any) -> None:
                note(given["n"])

        worker = app.start_worker(concurrency=100, batch_size=100, poll_interval=0.25)
        async with beside(worker):
            yield


asyncio.run(main(OneConnection()))
