"""procrastinate, with ten jobs at a time."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import procrastinate
import uvloop
from measure import Note, beside, main, moment

logging.disable(logging.CRITICAL)
NEXT = {"a": "b", "b": "c"}


class Procrastinate:
    """Done jobs are deleted, as its documentation advises for many."""

    left = "SELECT count(*) FROM procrastinate_jobs WHERE status IN ('todo', 'doing')"
    lead = 20

    async def install(self, url: str) -> None:
        connector = procrastinate.PsycopgConnector(conninfo=url, min_size=1, max_size=12)
        self.app = procrastinate.App(connector=connector)
        await self.app.open_async()
        await self.app.schema_manager.apply_schema_async()
        self.note: Note = lambda _: None
        self.tasks = {}
        for name in ("a", "b", "c", "flat", "wave", "wake"):

            async def execute(n: int, following: str | None = NEXT.get(name)) -> None:
                self.note(n)
                if following:
                    await self.tasks[following].defer_async(n=n)

            self.tasks[name] = self.app.task(execute, name=name)

    async def add(self, task: str, numbers: Sequence[int], at: float | None = None) -> None:
        deferrer = self.tasks[task]
        if at is not None:
            deferrer = deferrer.configure(schedule_at=moment(at))
        await deferrer.batch_defer_async(*({"n": number} for number in numbers))

    @asynccontextmanager
    async def working(self, note: Note) -> AsyncIterator[None]:
        self.note = note
        worker = self.app.run_worker_async(
            concurrency=10,
            install_signal_handlers=False,
            delete_jobs="successful",
            fetch_job_polling_interval=0.5,
            shutdown_graceful_timeout=0,
        )
        async with beside(worker):
            yield
            await self.app.close_async()


uvloop.run(main(Procrastinate()))
