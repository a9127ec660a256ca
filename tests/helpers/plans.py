"""Plans and applies the texts of files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import asyncpg

from sequencerd.definitions import files, plan, plan_of_shards
from sequencerd.definitions.plan import Plan
from sequencerd.errors import SequencerdError
from sequencerd.runners import Runner
from sequencerd.storage import connections
from sequencerd.storage.change_of_shards import Change
from sequencerd.storage.connections import Shard
from tests.helpers.engines import Recorder
from tests.helpers.runners import email_runner

RUNNERS: dict[str, Runner] = {"Note": Recorder(), "Email": email_runner("smtp://127.0.0.1:9")}


class Applying:
    """Plans and applies texts."""

    def __init__(self, connection: asyncpg.Connection, folder: Path) -> None:
        self.connection = connection
        self.file = folder / "file.yaml"

    async def plan(self, text: str, **options: Any) -> Plan:
        self.file.write_text(text)
        found = files.read_file(self.file, RUNNERS)
        async with self.connection.transaction(isolation="repeatable_read", readonly=True):
            return await plan.make(self.connection, found, RUNNERS, **options)

    async def lines(self, text: str, **options: Any) -> list[str]:
        """What a plan says, without the blanks before it."""
        planned = await self.plan(text, **options)
        return [line.strip() for line in planned.lines(done=False)]

    async def __call__(self, text: str, **options: Any) -> Plan:
        self.file.write_text(text)
        found = files.read_file(self.file, RUNNERS)
        only = Shard("")
        change = Change(_unexplained, [only], connections.connect)
        change.connections[only] = self.connection  # in whose transaction all happens
        async with self.connection.transaction():
            return await plan_of_shards.apply(
                change, found, RUNNERS, **{"moves": {}, "reason": ""} | options
            )


async def _unexplained(_: Shard, error: BaseException) -> SequencerdError:
    raise error
