"""`sequencerd holidays`: the calendars of holidays."""

from __future__ import annotations

from datetime import date

import asyncpg

from tests.helpers.command_line import Command


async def test_holidays_are_added_to_existing_ones(
    sequencerd: Command, connection: asyncpg.Connection
) -> None:
    await connection.execute(
        "INSERT INTO sequencer.holidays VALUES ('DE', '2026-12-25', 'ours'),"
        " ('DE', '2026-12-24', '')"
    )
    assert "DE: added 17 holidays of 2026, 2027; 1 existed already" in sequencerd(
        "holidays", "de", "2026", "2027"
    )
    assert "DE: added 0 holidays" in sequencerd("holidays", "DE", "2026", "2027")
    rows = await connection.fetch("SELECT * FROM sequencer.holidays WHERE calendar = 'DE'")
    days = {row["day"]: row["name"] for row in rows}
    assert len(days) == 19
    assert days[date(2026, 12, 25)] == "ours"
    assert days[date(2026, 4, 6)]  # Easter Monday
    sequencerd("holidays", "DE-BY", "2026", "--calendar", "office")
    assert await connection.fetchval(
        "SELECT true FROM sequencer.holidays WHERE calendar = 'office' AND day = '2026-01-06'"
    )


def test_an_unknown_calendar_or_country_is_reported(sequencerd: Command) -> None:
    for arguments, message in (
        (("GERMANY", "2026"), "'GERMANY' are not known: write the code"),
        (("DE-ZZ", "2026"), "DE has no part 'ZZ'"),
        (("DE", "1800"), "knows no holiday of DE in 1800"),
    ):
        sequencerd("holidays", *arguments, code=1)
        assert message in sequencerd.errors
    sequencerd("holidays", "DE", "next", code=2)
    assert "is not a year" in sequencerd.errors
