"""DBOS: a workflow with three steps, on a queue."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import sqlalchemy
import uvloop
from dbos import DBOS, DBOSClient, DBOSConfig
from measure import Note, main

VERSION = "bench"
INSTALL = "--install"
_note: list[Note] = []


@DBOS.step()
async def step(n: int) -> None:
    _note[0](n)


@DBOS.workflow(name="a")
async def in_a_row(n: int) -> None:
    for _ in "abc":
        await step(n)


@DBOS.workflow(name="flat")
async def execute(n: int) -> None:
    _note[0](n)


def configuration(url: str) -> DBOSConfig:
    return {
        "name": "bench",
        "system_database_url": url,
        "log_level": "CRITICAL",
        "console_log_level": "CRITICAL",
        "run_admin_server": False,
        "application_version": VERSION,
        "executor_id": "bench",
        "sys_db_pool_size": 20,
    }


def install(url: str) -> None:
    """Create the schema and the queue."""
    DBOS(config=configuration(url))
    DBOS.launch()
    DBOS.register_queue("bench", worker_concurrency=300, polling_interval_sec=0.1)
    DBOS.destroy()


class Workflows:
    """Three hundred workflows at a time; the queue is read every 0.1 s, by default 1 s."""

    left = (
        "SELECT count(*) FROM dbos.workflow_status"
        " WHERE status IN ('ENQUEUED', 'PENDING', 'DELAYED')"
    )
    lead = 40

    async def install(self, url: str) -> None:
        # by a process of its own: what was destroyed once executes no asynchronous workflow again
        subprocess.run([sys.executable, __file__, INSTALL, url], check=True)
        self.config = configuration(url)
        self.client = DBOSClient(system_database_url=url)
        self.engine = sqlalchemy.create_engine(url.replace("postgresql:", "postgresql+psycopg:"))

    async def add(self, task: str, numbers: Sequence[int], at: float | None = None) -> None:
        options = {
            "workflow_name": "a" if task == "a" else "flat",
            "queue_name": "bench",
            "app_version": VERSION,
            "application_name": "bench",
        }
        if at is not None:
            options["delay_seconds"] = at - time.time()  # type: ignore[assignment]
        with self.engine.begin() as connection:
            for number in numbers:
                self.client.enqueue_in_transaction(connection, options, number)

    @asynccontextmanager
    async def working(self, note: Note) -> AsyncIterator[None]:
        _note[:] = [note]
        DBOS(config=self.config)
        await asyncio.to_thread(DBOS.launch)  # it executes workflows on a loop of its own
        try:
            yield
        finally:
            await asyncio.to_thread(DBOS.destroy)


if sys.argv[1] == INSTALL:
    install(sys.argv[2])
else:
    uvloop.run(main(Workflows()))
sys.stdout.flush()
os._exit(0)  # its threads may go on
