"""Beside the graph: the arms of a Split and the cases of a Switch."""

from __future__ import annotations

import json
import re

import asyncpg
import httpx

from tests.console.conftest import console, fixture, page_with
from tests.console.test_pages import check
from tests.helpers.engines import define

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
