"""When steps wake first: all of them, some from a time on, and those of some sequences."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import asyncpg
import pytest

from sequencerd.storage.wakes import first_wakes, first_wakes_of
from tests.helpers.engines import define

START = datetime(2026, 1, 1, tzinfo=UTC)
LAST = chr(0x10FFFF) * 50


def at(hours: int) -> datetime:
    return START + timedelta(hours=hours)


async def test_the_first_wake_of_each_step(
    connection: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    for sequence in ("a", "aa", LAST):
        steps = [("x", "GoTo", "{}", None), ("xx", "GoTo", "{}", None), (LAST, "GoTo", "{}", None)]
        await define(connection, sequence, *steps)
    wakes = {("a", "x"): (1, 4), ("a", "xx"): (2,), ("aa", LAST): (3, 5), (LAST, LAST): (6,)}
    for (sequence, step), hours in wakes.items():
        for hour in hours:
            await connection.execute(
                "INSERT INTO sequencer.enrollments (sequence, step, subject, wake_at)"
                " VALUES ($1, $2, $3, $4)",
                sequence,
                step,
                f"u{hour}",
                at(hour),
            )
    await connection.execute(
        "INSERT INTO sequencer.enrollments (sequence, step, subject, wake_at)"
        " VALUES ('aa', 'x', 'never', 'infinity')"
    )
    first = {step_key: at(hours[0]) for step_key, hours in wakes.items()}
    for size in (1, 2, 3, 5, 6):  # of the pages in which they are read
        monkeypatch.setattr("sequencerd.storage.wakes.STEPS_PER_SEARCH", size)
        found = await first_wakes(connection, {})
        assert dict(found) == first
        assert len(found) == len(first)
    names = [name for step_key, _ in await first_wakes(connection, {}) for name in step_key]
    assert len({id(name) for name in names}) == len(set(names))  # many steps, few names
    since = {("aa", LAST): at(4), ("a", "x"): at(3), ("a", "xx"): at(9), ("no", "step"): at(0)}
    later = first | {("a", "x"): at(4), ("aa", LAST): at(5)}
    del later["a", "xx"]
    assert dict(await first_wakes(connection, since)) == later
    found = await first_wakes_of(connection, ["a", LAST, "none"])
    assert dict(found) == {key: wake for key, wake in first.items() if key[0] != "aa"}
