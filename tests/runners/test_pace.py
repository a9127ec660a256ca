"""Calls at an even rate, of one process or of all daemons."""

from __future__ import annotations

import asyncio

import pytest

from sequencerd.core import permits
from sequencerd.core.model import Limits
from sequencerd.core.permits import Permits
from sequencerd.runners import pace
from sequencerd.runners.pace import Pace


async def test_without_a_rate_there_are_no_permits() -> None:
    async def never(*_: object) -> tuple[float, float]:
        raise AssertionError

    made = Pace(Limits(), "Email", never)
    assert made.longest_wait == 0
    assert await made.turn()


async def test_calls_use_blocks_of_permits_in_order(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(permits, "WINDOW_SECONDS", 600.0)  # no permit expires on a busy machine
    asked: list[tuple[str, float, int]] = []
    granted: list[float] = []
    callers: list[str] = []
    original = Permits.next

    async def take(name: str, per_second: float, count: int) -> tuple[float, float]:
        asked.append((name, per_second, count))
        await asyncio.sleep(0)  # the others come meanwhile
        return 100 + sum(count for _, _, count in asked[:-1]) / per_second, 100

    def recorded(self: Permits, now: float) -> float | None:
        at = original(self, now)
        if at is not None and (task := asyncio.current_task()):
            granted.append(at)
            callers.append(task.get_name())
        return at

    monkeypatch.setattr(Permits, "next", recorded)
    made = Pace(Limits(per_second=1000), "Email", take)
    calls = [asyncio.create_task(made.turn(), name=str(number)) for number in range(100)]
    assert all(await asyncio.gather(*calls))
    assert callers == [str(number) for number in range(100)]
    assert granted == sorted(granted)
    assert {(name, rate) for name, rate, _ in asked} == {("Email", 1000)}
    assert [count for _, _, count in asked] == [1, 99]


async def test_a_call_that_waits_too_long_is_given_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As its permit is too far away, or none comes; another call can use it."""
    loop = asyncio.get_running_loop()
    blocks = 0

    async def take(_name: str, _per_second: float, _count: int) -> tuple[float, float]:
        nonlocal blocks
        blocks += 1
        if blocks > 1:
            await asyncio.Event().wait()
        return 20, 0

    made = Pace(Limits(per_second=1), "Email", take)
    assert not await made.turn(expires=loop.time() + 0.05)
    waits = asyncio.create_task(made.turn())
    await asyncio.sleep(0)
    assert blocks == 1  # it has that permit, in 20 seconds
    assert not await made.turn(expires=loop.time() + 0.05)
    assert blocks == 2
    waits.cancel()
    monkeypatch.setattr(pace, "MIN_WAIT", 0.05)
    assert not await Pace(Limits(1, per_second=1000), "Email", take).turn()


async def test_the_age_of_permits_is_measured_by_the_fastest_answers() -> None:
    """The permits of the slow answer have expired; those of the next answer have not."""
    loop = asyncio.get_running_loop()
    ages = [0.0, 3.0, 0.0]  # by which the answers are late

    async def take(_name: str, _per_second: float, count: int) -> tuple[float, float]:
        now = loop.time() - ages.pop(0)
        return now, now

    made = Pace(Limits(per_second=5), "Email", take)
    assert await made.turn()
    assert len(ages) == 2
    assert await made.turn()
    assert not ages
