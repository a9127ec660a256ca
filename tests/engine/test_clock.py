"""The clock follows the database's, and never runs ahead of what was measured."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from sequencerd.engine.clock import Clock


def test_the_clock_continues_from_the_measured_time() -> None:
    seconds = 1000.0
    clock = Clock(monotonic=lambda: seconds)
    server = datetime(2031, 5, 5, 12, 0, tzinfo=UTC)
    off = clock.measured(server)
    assert off > timedelta(days=1)
    assert clock.now() == server
    seconds += 90
    assert clock.now() == server + timedelta(seconds=90)
    assert clock.seconds_until(server + timedelta(seconds=100)) == 10
    assert clock.measured(server + timedelta(seconds=90)) == timedelta(0)


def test_small_corrections_do_not_move_the_clock_back() -> None:
    seconds = 1000.0
    clock = Clock(monotonic=lambda: seconds)
    server = datetime(2031, 5, 5, 12, 0, tzinfo=UTC)
    clock.measured(server)
    assert clock.now() == server
    clock.measured(server - timedelta(seconds=0.5))
    assert clock.now() == server
    assert clock.measured(server - timedelta(seconds=0.5)) == timedelta(0)
    seconds += 0.5
    assert clock.now() == server
    seconds += 0.25
    assert clock.now() == server + timedelta(seconds=0.25)
    # a clock that was put right by an hour is followed
    clock.measured(server - timedelta(hours=1))
    assert clock.now() == server - timedelta(hours=1)
