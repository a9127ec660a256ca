"""How a batch that fails is taken apart, and when a row is tried again, without a database."""

from __future__ import annotations

import asyncio

import asyncpg
import pytest
import structlog

from sequencerd.engine.clock import Clock
from sequencerd.engine.problems import Problems
from sequencerd.engine.quarantine import (
    FIRST_PAUSE,
    MAX_LOCK_FAILURES,
    MAX_PAUSE,
    MAX_PAUSE_OF_ENVIRONMENT,
    Quarantine,
    isolate,
)

LOCKED: Exception = asyncpg.LockNotAvailableError("locked")
WRONG: Exception = asyncpg.RaiseError("a trigger refuses it")
ROWS = list(range(10))


async def probe() -> None:
    """Every row can be written."""


async def refused_of(*wrong: int, error: Exception) -> tuple[list[int], list[int], object]:
    """The rows that are refused and those that are left, if some cannot be written."""
    refused: list[int] = []

    async def work(part: list[int]) -> None:
        if set(wrong) & set(part):
            raise error

    async def refuse(row: int, _: Exception) -> None:
        refused.append(row)

    left, common = await isolate(ROWS, work, refuse, probe)
    return refused, left, common


async def test_each_wrong_row_is_found() -> None:
    assert await refused_of(0, 7, 9, error=WRONG) == ([0, 7, 9], [], None)
    assert await refused_of(*ROWS, error=WRONG) == (ROWS, [], None)


async def test_locks_of_every_row_are_no_rows_fault() -> None:
    refused, left, common = await refused_of(*ROWS, error=LOCKED)
    assert len(refused) == MAX_LOCK_FAILURES - 1
    assert refused + left == ROWS
    assert common is LOCKED
    # unlike those of some rows, once another one is written
    assert await refused_of(*ROWS[1:], error=LOCKED) == (ROWS[1:], [], None)


async def test_what_is_done_despite_an_error_is_not_repeated() -> None:
    parts: list[list[int]] = []

    async def work(part: list[int]) -> None:
        parts.append(list(part))
        part.clear()
        raise WRONG

    async def refuse(_row: int, error: Exception) -> None:
        raise error

    assert await isolate(ROWS, work, refuse, probe) == ([], None)
    assert parts == [ROWS]


async def test_nothing_is_refused_if_nothing_can_be_written() -> None:
    async def work(_: list[int]) -> None:
        raise WRONG

    async def refuse(_row: int, error: Exception) -> None:
        raise error

    async def full() -> None:
        raise asyncpg.DiskFullError("no space")

    left, common = await isolate(ROWS, work, refuse, full)
    assert left == ROWS
    assert isinstance(common, asyncpg.DiskFullError)


@pytest.mark.parametrize(
    ("error", "longest"), [(WRONG, MAX_PAUSE), (LOCKED, MAX_PAUSE_OF_ENVIRONMENT)]
)
async def test_pauses_grow_up_to_a_limit(error: Exception, longest: float) -> None:
    kept = Quarantine(Problems(), clock=Clock(), log=structlog.get_logger())
    loop = asyncio.get_running_loop()
    for number in range(10):
        kept.add(1, ("s", "a"), error)
        (one,) = kept.all
        assert one.due_at - loop.time() == pytest.approx(min(2**number, longest), abs=0.9)
    assert len(kept) == 1


async def test_a_row_that_is_being_tried_is_not_due_again() -> None:
    kept = Quarantine(Problems(), clock=Clock(), log=structlog.get_logger())
    kept.add(1, ("s", "a"), WRONG)
    now = asyncio.get_running_loop().time() + 2 * FIRST_PAUSE
    assert list(kept.due(now)) == [("s", "a")]
    assert kept.due(now) == {}
    assert list(kept.due(now + FIRST_PAUSE)) == [("s", "a")]
