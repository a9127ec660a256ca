"""pgqueuer, with batches."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import timedelta

import asyncpg
import uvloop
from measure import Note, beside, main
from pgqueuer import PgQueuer
from pgqueuer.db import AsyncpgDriver, AsyncpgPoolDriver
from pgqueuer.queries import Queries

logging.disable(logging.CRITICAL)
NEXT = {"a": ("b",), "b": ("c",), "due": ("mail", *["task"] * 9)}
"""Which task follows, by the last digit of the number if there are several."""


class Pgqueuer:
    """Connections: one to add jobs, ten to work."""

    left = "SELECT count(*) FROM pgqueuer"
    lead = 20

    async def install(self, url: str) -> None:
        self.url = url
        connection = await asyncpg.connect(url)
        self.queries = Queries(AsyncpgDriver(connection))
        await self.queries.install()
        await self.queries.optimize_autovacuum()

    async def add(self, task: str, numbers: Sequence[int], at: float | None = None) -> None:
        count = len(numbers)
        after = None if at is None else [timedelta(seconds=at - time.time())] * count
        await self.queries.enqueue(
            [task] * count, [b"%d" % number for number in numbers], [0] * count, after
        )

    @asynccontextmanager
    async def working(self, note: Note) -> AsyncIterator[None]:
        pool = await asyncpg.create_pool(self.url, min_size=10, max_size=10)
        queue, queries = PgQueuer.from_asyncpg_pool(pool), Queries(AsyncpgPoolDriver(pool))
        for task in ("a", "b", "c", "flat", "wave", "wake", "due", "task", "mail"):

            @queue.entrypoint(task)
            async def execute(job, following=NEXT.get(task)):  # type: ignore[no-untyped-def]
                number = int(job.payload)
                note(number)
                if following:
                    await queries.enqueue(following[number % len(following)], job.payload)

        worker = queue.run(batch_size=500, dequeue_timeout=timedelta(seconds=30))
        async with beside(worker):
            yield
            pool.terminate()


uvloop.run(main(Pgqueuer()))
