"""Messages that take long to render leave time to everything else."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress

import pytest

from sequencerd.runners.slow_rendering import SlowRendering


async def test_between_slow_messages_other_work_runs() -> None:
    rendering = SlowRendering()
    log: list[str] = []

    async def message() -> None:
        await rendering.turn()
        with rendering.measured():
            time.sleep(0.03)  # noqa: ASYNC251 - as a template blocks the loop
        log.append("message")

    async def other() -> None:
        while log.count("message") < 3:
            log.append("other")
            await asyncio.sleep(0.001)

    await asyncio.gather(other(), *(message() for _ in range(3)))
    between = "".join(one[0] for one in log).split("m")
    assert all(part.count("o") > 2 for part in between[1:3]), log


async def test_a_message_that_fails_is_measured_too() -> None:
    rendering = SlowRendering()
    with suppress(ValueError), rendering.measured():
        time.sleep(0.03)  # noqa: ASYNC251 - as above
        raise ValueError
    began = time.perf_counter()
    await rendering.turn()
    assert time.perf_counter() - began > 0.01


async def test_fast_messages_wait_for_nothing() -> None:
    rendering = SlowRendering()
    with rendering.measured():
        pass
    turn = rendering.turn()
    with pytest.raises(StopIteration):
        turn.send(None)
