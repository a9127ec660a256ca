"""The clock follows the database's, and never runs ahead of what was measured."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from sequencerd.clock import Clock


def test_it_takes_over_what_was_measured_and_carries_it_on() -> None:
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
