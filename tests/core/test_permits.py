"""Blocks of permits: as large as the demand, never more often than the rate."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import settings

from sequencerd.core.permits import BLOCK_SECONDS, MAX_LATE_SECONDS, WINDOW_SECONDS, Permits


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
    most = int(100 * BLOCK_SECONDS)
    sizes = []
    for _ in range(8):  # each is used up
        sizes.append(count := permits.wanted(1))
        permits.add(0, count)
        assert all(permits.next(0) is not None for _ in range(count))
        assert permits.next(0) is None
    assert sizes == [1, 2, 4, 8, 16, most, most, most]
    permits.add(0, most)
    assert [permits.next(0) for _ in range(3)] == [0, 0.01, 0.02]
    assert permits.next(9) is None  # the others have expired
    assert permits.wanted(1) == 3
    assert permits.wanted(7) == 7
    assert permits.wanted(1000) == most


def test_a_block_of_a_slow_rate_is_one_permit() -> None:
    permits = Permits(0.1)
    assert permits.wanted(50) == 1
    permits.add(0, 1)
    assert permits.next(0) == 0
    assert permits.wanted(50) == 1


def test_a_permit_can_be_used_late_within_the_rate_of_the_second() -> None:
    permits = Permits(10)
    permits.add(5, 2)
    assert permits.next(5) == 5
    permits.give_back(5)
    permits.add(5.2, 8)
    instants = [permits.next(5.95) for _ in range(10)]
    assert instants == pytest.approx([5 + n / 10 for n in range(10)])
    # after a pause, all that have come may begin at once
    assert [permits.begin(at or 0, 5.95) for at in instants] == [0] * 10
    # so what is on time waits for the next second
    permits.add(6, 4)
    assert permits.next(6) == 6
    assert permits.begin(6, 6) == 0
    assert permits.begin(6.1, 6.11) == pytest.approx(0.84)
    assert permits.begin(6.1, 6.95) == 0
    # and in time it expires
    assert permits.begin(6.2, 6.2 + WINDOW_SECONDS + MAX_LATE_SECONDS) is None
    assert permits.next(6.3 + WINDOW_SECONDS + MAX_LATE_SECONDS) is None


@pytest.mark.slow
@pytest.mark.parametrize("rate", [0.1, 1, 3, 20, 200, 1000])
def test_daemons_together_keep_the_rate_and_use_it(rate: float) -> None:
    """In no second more than the rate and 5%, whatever the demand; with enough, all of it. A daemon
    that was paused for longer than the 5% begins the calls that have waited meanwhile at once.
    """
    for seed in range(settings().max_examples // 7):  # 4; THOROUGH=1: 42
        random = Random(seed)
        row, daemons = Row(), [Permits(rate) for _ in range(4)]
        is_busy = seed % 2 == 0
        pauses = [0.005] if seed % 4 < 2 else [0.005, 0.3, 2.0]
        used: list[float] = []
        waiting: list[list[float]] = [[], [], [], []]  # permits that each has for a call
        stalled = [0.0] * 4
        now, end = 0.0, max(10.0, 40 / rate)
        while now < end:
            for permits, calls, number in zip(daemons, waiting, range(4), strict=True):
                if now < stalled[number]:
                    continue
                if random.random() < 0.02:
                    stalled[number] = now + random.choice(pauses)
                while len(calls) < 10 and (is_busy or random.random() < 0.2):
                    if (at := permits.next(now)) is None:
                        count = permits.wanted(10 - len(calls))
                        permits.add(row.take(now, count, permits.interval), count)
                    else:
                        calls.append(at)
                for at in [at for at in calls if at <= now]:
                    wait = permits.begin(at, now)
                    if not wait:
                        calls.remove(at)
                        used += [now] * (wait == 0)
            now += random.uniform(0.001, 0.01)
        assert used, (rate, seed)
        last = 0
        for first, at in enumerate(used):
            while last < len(used) and used[last] < at + 1:
                last += 1
            late = 2 * 4 * min(10, max(rate, 1)) * (len(pauses) > 1)
            assert last - first <= 1.05 * rate + 1 + late, (rate, seed)
            # in the long run never more than the rate
            assert first <= (at - used[0]) * rate + 0.05 * rate + 1 + late, (rate, seed)
        if is_busy and rate <= 20:  # nothing is lost by pauses but what lasts too long
            elapsed = row.next_at - row.taken[0][0]
            assert sum(count for _, count in row.taken) >= 0.95 * rate * elapsed
