"""Results wait in a queue, which is bounded."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import asyncpg
import pytest

from sequencerd.engine import backpressure
from sequencerd.engine.backpressure import Backlog
from sequencerd.engine.results import Results
from tests.helpers.engines import ALL_ENDED, Recorder, define, running_engine, until
from tests.helpers.waiting import eventually

COUNT = 200


def test_results_that_were_not_written_are_written_first() -> None:
    backlog = Backlog(10)
    backlog.add(cast("Any", [3, 4]))
    backlog.put_back(cast("Any", [1, 2]))
    assert cast("Any", backlog.take(3)) == [1, 2, 3]


async def test_no_side_effect_is_claimed_while_many_results_wait(
    database: str, connection: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, may_write = Results.write_in_parts, asyncio.Event()

    async def write_later(self: Results, *arguments: Any) -> Any:
        await may_write.wait()
        return await write(self, *arguments)

    monkeypatch.setattr(Results, "write_in_parts", write_later)
    monkeypatch.setattr(backpressure, "MAX_RESULT_BATCHES", 1)
    recorder = Recorder(batch_size=COUNT)
    await define(connection, "s", ("a", "Note", "{}", None))
    await connection.execute(
        "INSERT INTO sequencer.enrollments (sequence, subject)"
        " SELECT 's', 'u' || n FROM generate_series(1, $1::int) AS n",
        COUNT,
    )
    async with running_engine(database, {"Note": recorder}, sweep=3600, batch=5) as one:
        await eventually(lambda: recorder.keys and not one._busy)
        assert len(recorder.keys) < COUNT / 2
        may_write.set()
        await until(connection, ALL_ENDED)
    assert len(recorder.keys) == len(set(recorder.keys)) == COUNT
