"""What happened over time: charts and tables, from the counts by hour and the history since."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg
import httpx
import pytest
import structlog

from sequencerd.console import html
from sequencerd.console.over_time import range_of
from sequencerd.console.query import Query, WrongQueryError
from sequencerd.engine.retention import tidy
from sequencerd.settings import RetentionSettings
from sequencerd.storage import connections
from tests.console.conftest import DAY, console, counted
from tests.console.test_pages import check
from tests.helpers.databases import shard
from tests.helpers.engines import define

DAYS_AGO = datetime.now(UTC).replace(hour=12, minute=30) - timedelta(days=3)


async def journeys(connection: asyncpg.Connection) -> None:
    """Events of three days ago, by a sequence with a goal and a jump, and of now."""
    await define(
        connection,
        "s",
        ("wait", "WaitForDuration", DAY, "note"),
        ("note", "Note", "{}", "leave"),
        ("leave", "GoTo", '{"sequence": "t", "step": "note"}', None),
        ("paid", "Goal", '{"value": "data.paid", "compareTo": true}', "note"),
    )
    await define(connection, "t", ("note", "Note", "{}", None))
    await connection.executemany(
        "INSERT INTO sequencer.events (enrollment_id, at, sequence, step, visit, action, message)"
        " VALUES (1, $1, $2, $3, 1, $4, $5)",
        [
            (at, *event)
            for at in (DAYS_AGO, DAYS_AGO + timedelta(hours=1), datetime.now(UTC))
            for event in (
                ("s", "wait", "enrolled", None),
                ("s", "wait", "enrolled", None),
                ("s", "wait", "next", None),
                ("s", "wait", "goal", "paid is met"),
                ("s", "note", "next", None),
                ("s", "note", "suppressed", "x"),
                ("s", "leave", "jump", "to t"),
                ("t", "note", "completed", None),
                ("t", "note", "failed", "x"),
                ("gone", "step", "next", None),
            )
        ],
    )


async def tidied(database: str) -> None:
    pool = await connections.connect_pool(shard(database), 1)
    await tidy(pool, RetentionSettings(), datetime.now(UTC), structlog.get_logger())
    await pool.close()


async def rows(client: httpx.AsyncClient, table: str, **query: str) -> list[dict[str, Any]]:
    answer = await client.get(f"/tables/{table}.json", params=query)
    assert answer.status_code == 200, answer.text
    found: list[dict[str, Any]] = answer.json()["rows"]
    return found


async def test_hours_and_days_of_sequences_and_steps(
    database: str, connection: asyncpg.Connection
) -> None:
    await journeys(connection)
    await tidied(database)
    async with console(database) as client:
        await counted(client, "overview")
        days = await rows(client, "activity")
        assert len(days) == 14
        (old,) = [row for row in days if row["at"] == f"{DAYS_AGO:%Y-%m-%d}"]
        wanted = {"sent": 2, "suppressed": 2, "completed": 2, "failed": 2}
        on_time = {"late": 0, "over_minute": 0, "over_ten_minutes": 0, "longest": None}
        assert old == {"at": old["at"], "entered": 14, **wanted, **on_time}
        wanted = dict.fromkeys(wanted, 1)
        assert days[-1] == {"at": days[-1]["at"], "entered": 7, **wanted, **on_time}
        by_sequence = {row["name"]: row for row in await rows(client, "activity-steps")}
        assert by_sequence["t"]["entered"] == by_sequence["t"]["failed"] == 3
        by_step = await rows(client, "activity-steps", sequence="s")
        assert [(row["name"], row["entered"]) for row in by_step] == [
            ("wait", 6),
            ("note", 6),
            ("leave", 6),
        ]
        until = (DAYS_AGO + timedelta(hours=2)).isoformat()
        query = {"by": "hour", "until": until, "sequence": "s", "step": "note"}
        hours = await rows(client, "activity", **query)
        assert [row["entered"] for row in hours[-3:]] == [2, 2, 0]
        text = (await client.get("/tables/activity.csv", params=query)).text
        names = ("at", "entered", "sent", "suppressed", "completed", "failed", *on_time)
        assert text.splitlines()[0] == ",".join(f'"{name}"' for name in names)
        page = await client.get("/over-time", params=query)
        assert 'aria-label="Entered: 4 in 48 hours, at most 2 in one"' in page.text
        assert (await client.get("/over-time?sequence=none")).status_code == 404
        assert (await client.get("/over-time?sequence=s&step=none")).status_code == 404
        assert (await client.get("/over-time?step=note")).status_code == 422


async def test_the_lateness_of_steps(database: str, connection: asyncpg.Connection) -> None:
    await define(connection, "s", ("note", "Note", "{}", None))
    now = datetime.now(UTC)
    await connection.executemany(
        "INSERT INTO sequencer.lateness VALUES ('s', $1, $2, $3, $4, $5, $6, $7)",
        [
            ("note", DAYS_AGO, 3, 2, 1, 675.0, False),
            ("note", DAYS_AGO.replace(minute=0), 2, 0, 0, 30.0, True),
            ("other", DAYS_AGO, 1, 0, 0, 11.0, False),
            ("note", now, 1, 0, 0, 20.0, False),
        ],
    )
    query = {"by": "hour", "from": f"{DAYS_AGO:%Y-%m-%d}"}
    async with console(database) as client:
        hours = {row["at"]: row for row in await rows(client, "activity", **query)}
        old = hours[DAYS_AGO.replace(minute=0, second=0, microsecond=0).isoformat()]
        assert (old["late"], old["longest"]) == (6, 675.0)
        assert (old["over_minute"], old["over_ten_minutes"]) == (2, 1)
        by_step = await rows(client, "activity-steps", sequence="s")
        found = {row["name"]: (row["late"], row["longest"]) for row in by_step}
        assert found == {"note": (6, 675.0), "other": (1, 11.0)}
        text = check(await client.get("/over-time", params={**query, "sequence": "s"}))
        assert "Began late 7" in text
        assert "Over 1 min late" in text
        assert "Longest delay 11 min 15 s" in text
        page = await client.get("/over-time?sequence=s&step=note")
        assert 'aria-label="Longest delay: 14 days, at most 11 min 15 s in one"' in page.text
        assert "<td" in page.text
        await tidied(database)
        summed = await connection.fetch(
            "SELECT step, times, longest FROM sequencer.lateness WHERE is_hour ORDER BY 1, 2"
        )
        assert [tuple(row) for row in summed] == [
            ("note", 2, 30.0),
            ("note", 3, 675.0),
            ("other", 1, 11.0),
        ]
        assert by_step == await rows(client, "activity-steps", sequence="s")


async def test_before_the_daemon_has_counted(database: str, connection: asyncpg.Connection) -> None:
    await journeys(connection)
    async with console(database) as client:
        await counted(client, "overview")
        days = await rows(client, "activity")
        assert sum(row["entered"] for row in days) == 7
        page = await client.get("/over-time")
        assert "The daemon has not counted the history yet" in page.text


@pytest.mark.parametrize(
    "given",
    [
        {"by": "week"},
        {"from": "nonsense"},
        {"from": "2030-01-02", "until": "2030-01-01"},
        {"from": "2000-01-01", "until": "2030-01-01"},
        {"from": "2030-01-01", "until": "2030-03-01", "by": "hour"},
        {"until": "infinity"},
        {"until": "0001-01-01"},
    ],
)
def test_nonsense_in_the_range(given: dict[str, str]) -> None:
    with pytest.raises(WrongQueryError):
        range_of(Query(given), datetime.now(UTC))


def test_a_range_has_full_hours_or_days() -> None:
    now = datetime(2030, 1, 31, 12, 40, tzinfo=UTC)
    found = range_of(Query({"by": "hour", "from": "2030-01-31 10:20+01:00"}), now)
    assert (found.since.hour, found.until.hour, len(list(found.units()))) == (9, 13, 4)
    found = range_of(Query({}), now)
    assert (found.since.day, found.until.day) == (18, 1)


def test_only_days_on_which_something_happened_have_a_bar() -> None:
    chart = html.days({"2026-03-01": 0, "2026-03-02": 4, "2026-03-03": 0})
    assert chart.count("<rect") == 1
    assert '<rect x="7" y="1" width="5" height="23"><title>2026-03-02: 4</title>' in chart
    assert "4 in 3 days, at most 4 in one" in chart


def test_hours_of_a_chart_are_named_as_utc() -> None:
    hours = [(datetime(2026, 3, 2, n, tzinfo=UTC), n) for n in range(2)]
    assert "<span>2026-03-02 01:00 UTC</span>" in html.bars(hours, "Sent", "hour")
