"""awa: its engine in Rust, tasks in Python."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

import awa
import uvloop
from measure import Note, main, moment


@dataclass
class A:
    n: int


@dataclass
class B:
    n: int


@dataclass
class C:
    n: int


@dataclass
class Other:
    n: int


KINDS = {"a": A, "b": B, "c": C, "flat": Other, "wave": Other, "wake": Other}
WORKERS = 100


class Awa:
    """A queue with a hundred workers; jobs are added by COPY, one alone by INSERT."""

    left = "SELECT count(*) FROM awa.jobs WHERE state NOT IN ('completed', 'failed', 'cancelled')"
    lead = 20

    async def install(self, url: str) -> None:
        self.client = awa.AsyncClient(url, max_connections=20)
        await self.client.migrate()

    async def add(self, task: str, numbers: Sequence[int], at: float | None = None) -> None:
        jobs = [KINDS[task](number) for number in numbers]
        if len(jobs) == 1:
            await self.client.insert(jobs[0])
        else:
            await self.client.insert_many_copy(jobs, run_at=moment(at))

    @asynccontextmanager
    async def working(self, note: Note) -> AsyncIterator[None]:
        for kind, following in ((A, B), (B, C), (C, None), (Other, None)):

            @self.client.task(kind)
            async def execute(job, following=following):  # type: ignore[no-untyped-def]
                note(job.args.n)
                if following:
                    await self.client.insert(following(job.args.n))

        await self.client.start([("default", WORKERS)])
        try:
            yield
        finally:
            await self.client.shutdown()
            await self.client.close()


uvloop.run(main(Awa()))
