"""Blocks of permits: as large as the demand, never more often than the rate."""

from __future__ import annotations

from random import Random

import pytest

from sequencerd.core.permits import BLOCK, LATEST, Permits


class Row:
    """The row that all daemons share, as the statement take_permits changes it."""

    def __init__(self) -> None:
        self.next_at = 0.0
        self.taken: list[tuple[float, int]] = []

    def take(self, now: float, count: int, interval: float) -> float:
        first = max(self.next_at, now - 0.025)
        self.next_at = first + count * interval
        self.taken.append((first, count))
        return first


def test_a_block_is_as_large_as_the_demand() -> None:
    permits = Permits(100)
    most = int(100 * BLOCK)
    sizes = []
    for _ in range(8):  # each is used up
        sizes.append(count := permits.wanted(1))
        permits.add(0, count)
        assert all(permits.next(0) is not None for _ in range(count))
        assert permits.next(0) is None
    assert sizes == [1, 2, 4, 8, 16, most, most, most]
    permits.add(0, most)
    assert [permits.next(0) for _ in range(3)] == [0, 0.01, 0.02]
    assert permits.next(9) is None  # the others have lapsed
    assert permits.wanted(1) == 3
    assert permits.wanted(7) == 7
    assert permits.wanted(1000) == most


def test_a_block_of_a_slow_rate_is_one_permit() -> None:
    permits = Permits(0.1)
    assert permits.wanted(50) == 1
    permits.add(0, 1)
    assert permits.next(0) == 0
    assert permits.wanted(50) == 1


def test_a_permit_can_be_used_a_little_late_and_given_back() -> None:
    permits = Permits(10)
    permits.add(5, 2)
    assert permits.next(5 + LATEST) == 5
    permits.give_back(5)
    assert permits.next(5.04) == 5
    assert permits.next(5.11 + LATEST) is None


@pytest.mark.parametrize("rate", [0.1, 1, 3, 20, 200, 1000])
def test_daemons_together_keep_the_rate_and_use_it(rate: float) -> None:
    """In no second more than the rate and 5%, whatever the demand; with enough, all of it."""
    for seed in range(20):
        random = Random(seed)
        row, daemons = Row(), [Permits(rate) for _ in range(4)]
        is_busy = seed % 2 == 0
        used: list[float] = []
        now, end = 0.0, max(10.0, 40 / rate)
        free_at = [0.0] * 4  # when each has used its latest permit
        while now < end:
            for number, permits in enumerate(daemons):
                # those with much to do keep 200 ms of calls waiting, the others call now and then
                while now >= free_at[number] - 0.2 * is_busy and (is_busy or random.random() < 0.3):
                    if (at := permits.next(now)) is None:
                        count = permits.wanted(random.randint(1, 10))
                        permits.add(row.take(now, count, permits.interval), count)
                        continue
                    used.append(random.uniform(max(at, now), max(at + LATEST, now)))
                    free_at[number] = at
            now += random.uniform(0.001, 0.02)
        assert used, (rate, seed)
        used.sort()
        last = 0
        for first, at in enumerate(used):
            while last < len(used) and used[last] < at + 1:
                last += 1
            assert last - first <= 1.05 * rate + 1, (rate, seed)
        if is_busy:
            elapsed = row.next_at - row.taken[0][0]
            assert sum(count for _, count in row.taken) >= 0.95 * rate * elapsed
