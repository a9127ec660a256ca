"""Calls at an even rate, of one process or of all daemons."""

from __future__ import annotations

import asyncio

import pytest

from sequencerd.core.model import Limits
from sequencerd.runners import pace
from sequencerd.runners.pace import Pace


async def test_without_a_rate_it_asks_nobody() -> None:
    async def never(*_: object) -> float:
        raise AssertionError

    made = Pace(Limits(), "Email", never)
    assert made.longest_wait == 0
    assert await made.turn()


async def test_calls_pass_in_their_order_and_are_asked_for_in_blocks() -> None:
    asked: list[tuple[str, float, int]] = []

    async def take(name: str, per_second: float, count: int) -> float:
        asked.append((name, per_second, count))
        return sum(count for _, _, count in asked[:-1]) / per_second

    made = Pace(Limits(per_second=1000), "Email", take)
    passed: list[int] = []

    async def call(number: int) -> None:
        assert await made.turn()
        passed.append(number)

    await asyncio.gather(*(call(number) for number in range(100)))
    assert passed == [*range(100)]
    assert {(name, rate) for name, rate, _ in asked} == {("Email", 1000)}
    assert [count for _, _, count in asked] == [1, 2, 4, 8, 16, 32, 64]


async def test_a_call_whose_turn_does_not_come_in_time_is_given_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As its permit is too far away, or none comes; another call can use it."""
    loop = asyncio.get_running_loop()
    delays = [60.0]

    async def take(_name: str, _per_second: float, _count: int) -> float:
        if not delays:
            await asyncio.Event().wait()
        return delays.pop()

    made = Pace(Limits(per_second=1), "Email", take)
    assert not await made.turn(expires=loop.time() + 0.05)
    waits = asyncio.create_task(made.turn())  # has the permit in a minute
    assert not await made.turn(expires=loop.time() + 0.05)
    assert not waits.cancel() or not delays
    monkeypatch.setattr(pace, "PATIENCE", 0.05)
    assert not await Pace(Limits(1, per_second=1000), "Email", take).turn()


async def test_an_answer_that_took_long_says_nothing_of_the_present(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pace, "STALE", 0.0)
    answers = 0

    async def take(_name: str, _per_second: float, _count: int) -> float:
        nonlocal answers
        answers += 1
        if answers == 3:
            monkeypatch.setattr(pace, "STALE", 60.0)
        return 0.0

    assert await Pace(Limits(per_second=10), "Email", take).turn()
    assert answers == 3
