"""Beside the graph: the arms of a Split and the cases of a Switch."""

from __future__ import annotations

import json
import re
from typing import Any

import asyncpg
import httpx

from sequencerd.console import funnel
from sequencerd.console.tables import Table
from tests.console.conftest import DAY, console, fixture, page_with
from tests.console.test_pages import check
from tests.helpers.engines import define, enroll, until

IS_PRO = {
    "lodashCommand": "eq",
    "value": {"type": "get", "value": "data.plan"},
    "compareTo": {"type": "raw", "value": "pro"},
}
ARMS = {
    "ways": [
        {"name": "short", "weight": 45, "step": "note"},
        {"name": "long & <b>", "weight": 45, "step": "call"},
        {"name": "holdout", "weight": 10, "step": None},
    ]
}


@fixture
async def arms(connection: asyncpg.Connection) -> None:
    """A Split with three arms and a Switch with a case, and what happened there."""
    async with connection.transaction():
        await define(
            connection,
            "s",
            (
                "by-plan",
                "Switch",
                json.dumps({"cases": [{"when": IS_PRO, "step": "call"}]}),
                "split",
            ),
            ("split", "Split", json.dumps(ARMS), None),
            ("note", "Note", "{}", None),
            ("call", "Note", "{}", None),
        )
    await connection.executemany(
        "INSERT INTO sequencer.events (enrollment_id, at, sequence, step, visit, action, message)"
        " SELECT n, now() - interval '1 minute', 's', $1, 1, $2, $3"
        " FROM generate_series(1, $4::int) AS n",
        [
            ("split", "branch", "short", 6),
            ("split", "branch", "long & <b>", 3),
            ("split", "branch", "holdout", 1),
            ("by-plan", "branch", "case 1", 4),
            ("by-plan", "next", None, 12),
        ],
    )


def ways(page: httpx.Response) -> list[str]:
    """What the panel says of each way, and whether it is chosen."""
    found = re.findall(r"<li( aria-current=\"true\")?>(<span class=\"label\">.*?)</li>", page.text)
    return [
        ("> " if chosen else "") + " ".join(re.sub("<[^>]*>", " ", text).split())
        for chosen, text in found
    ]


async def test_the_arms_of_a_split_and_the_cases_of_a_switch(database: str, arms: None) -> None:
    async with console(database) as client:
        path = "/sequence?sequence=s&step=split&way=long+%26+%3Cb%3E"
        page = await page_with(client, path, "60%")
        check(page)
        assert ways(page) == [
            "short note 6 60%",
            "> long &amp; &lt;b&gt; call 3 30%",
            "holdout the end 1 10%",
        ]
        page = await client.get("/sequence?sequence=s&step=by-plan&way=case+1")
        first, second = ways(page)
        assert first.startswith("> case 1 call 4 25%")
        assert "data.plan" in first
        assert second.startswith("next split 12 75%")
        (graph,) = re.findall(r"data-graph=\"([^\"]+)\"", page.text) or [page.text]
        assert "holdout" in graph


def test_goals_of_an_arm_are_added_up() -> None:
    rows: list[dict[str, Any]] = [
        {"way": None, "arm": None, "entered": 9, "goals": 4},
        {"way": None, "arm": "red", "entered": 5, "goals": 1},
        {"way": None, "arm": "red", "entered": 3, "goals": 2},
        {"way": "goal paid", "arm": "red", "entered": None, "goals": 2},
        {"way": None, "arm": "blue", "entered": 0, "goals": 0},
    ]
    assert funnel.arms(Table("funnel", (), rows, {})).rows == [
        {"arm": "blue", "enrollments": 0, "goals": 0, "share": 0.0},
        {"arm": "red", "enrollments": 5, "goals": 3, "share": 0.6},
    ]


async def test_what_an_arm_brings(database: str, connection: asyncpg.Connection) -> None:
    ways = [{"name": name, "weight": 1, "step": "wait"} for name in ("red", "blue & green")]
    await define(
        connection,
        "s",
        ("offer", "Split", json.dumps({"ways": ways}), None),
        ("wait", "WaitForDuration", DAY, None),
        ("paid", "Goal", json.dumps(IS_PRO), None),
    )
    async with console(database) as client:
        for n in range(12):
            await enroll(connection, "s", f"user-{n}")
        await until(
            connection,
            "SELECT count(*) = 12 FROM sequencer.enrollments"
            " WHERE step = 'wait' AND entered_at < wake_at",
        )
        red = await connection.fetch(
            "SELECT enrollment_id AS id FROM sequencer.events"
            " WHERE action = 'branch' AND message = 'red'"
        )
        assert 1 < len(red) < 12
        await connection.execute(
            'UPDATE sequencer.enrollments SET data = \'{"plan": "pro"}\' WHERE id = ANY($1)',
            [red[0]["id"], red[1]["id"]],
        )
        ended = "SELECT count(*) = 2 FROM sequencer.enrollments WHERE status = 'completed'"
        await until(connection, ended)
        found = (await client.get("/tables/arms.json?sequence=s")).json()["rows"]
        assert found == [
            {"arm": "blue & green", "enrollments": 12 - len(red), "goals": 0, "share": 0.0},
            {"arm": "red", "enrollments": len(red), "goals": 2, "share": 2 / len(red)},
        ]
        page = await client.get("/funnel?sequence=s")
        assert f"{200 / len(red):.1f}%" in check(page)
        assert ">Arms of offer<" in page.text
        # an exit has only those that took it
        rows = (await client.get("/tables/funnel.json?sequence=s")).json()["rows"]
        (goal,) = (row for row in rows if row["way"] == "goal paid" and row["arm"] is None)
        assert (goal["entered"], goal["exited"], goal["waiting"]) == (None, 2, None)
