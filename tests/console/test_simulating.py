"""The simulation in the console: what its form asks for, and what it shows."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Mapping
from typing import Any

import asyncpg
import httpx

from sequencerd.runners import Runner
from tests.console.conftest import console, fixture
from tests.console.test_pages import check
from tests.helpers.engines import Recorder, define, enroll
from tests.helpers.runners import email_runner
from tests.helpers.servers import HOST

LETTER = json.dumps(
    {
        "from": "us@example.com",
        "to": "{{data.email}}",
        "subject": "Hello {{data.name}}",
        "html": "<p>Dear {{data.name}}, you have {{data.points}}<script>alert(1)</script></p>",
    }
)
HOUR = '{"amount": 1, "unit": "hour"}'
PAID = json.dumps({"lodashCommand": "identity", "value": {"type": "get", "value": "data.paid"}})
GIVEN = {
    "sequence": "s",
    "start": "2030-01-31 08:00",
    "data": '{"email": "ada@example.com", "name": "Ada"}',
}


def _runners() -> Mapping[str, Runner]:
    return {"Email": email_runner(f"smtp://{HOST}:9"), "Score": Recorder()}


@fixture
async def journey(connection: asyncpg.Connection) -> int:
    """A sequence that scores, waits, writes and ends early for those who paid; an enrollment."""
    async with connection.transaction():
        await define(
            connection,
            "s",
            ("score", "Score", "{}", "wait"),
            ("wait", "WaitForDuration", HOUR, "letter"),
            ("letter", "Email", LETTER, "again"),
            ("again", "WaitForDuration", HOUR, "letter2"),
            ("letter2", "Email", LETTER, None),
            ("paid", "Goal", PAID, None),
        )
    return await enroll(connection, "s", "ada", GIVEN["data"])


async def _entries(client: httpx.AsyncClient, **query: str) -> list[dict[str, Any]]:
    answer = await client.get("/tables/simulation.json", params={**GIVEN, **query})
    assert answer.status_code == 200, answer.text
    rows: list[dict[str, Any]] = answer.json()["rows"]
    return rows


async def test_answers_and_changes_are_parameters_of_the_url(database: str, journey: int) -> None:
    asked = {
        "answer.Score": '{"action": "next", "data": {"points": 7}}',
        "when.1": "PT90M",
        "set.1": '{"name": "Grace"}',
        "when.3": "2030-01-31 09:45",
        "set.3": '{"paid": true}',
    }
    async with console(database, _runners(), own=_runners) as client:
        page = await client.get("/simulate", params={**GIVEN, **asked})
        text = check(page)
        assert "Hello Ada" in text
        assert "paid" in text
        assert 'value="2030-01-31 09:45"' in page.text  # the form keeps what it was given
        assert 'name="when.5"' in page.text  # with two rows to add more
        assert page.text == (await client.get("/simulate", params={**GIVEN, **asked})).text
        entries = await _entries(client, **asked)
        assert entries == await _entries(client, **asked)
        assert [(row["step"], row["action"]) for row in entries if row["action"] == "data"] == [
            ("again", "data"),
            ("again", "data"),
        ]
        assert entries[-1]["action"] == "goal"
        assert entries[-1]["at"] == "2030-01-31T09:45:00+00:00"
        # the message, in a frame of its own in which nothing runs
        (source,) = re.findall(
            r'<iframe sandbox="" loading="lazy" src="/console([^"]+)"', page.text
        )
        assert "frame-src 'self'" in page.headers["content-security-policy"]
        for _ in range(6):  # others have taken its place among those that are kept
            await client.get("/simulate", params={**GIVEN, "subject": str(_)})
        frame = await client.get(source.replace("&amp;", "&"))
        assert "<p>Dear Ada, you have 7<script>" in frame.text
        assert frame.headers["content-security-policy"].startswith("sandbox; default-src 'none'")
        missing = await client.get(source.replace("&amp;", "&").replace("entry=", "entry=9"))
        assert missing.status_code == 404


async def test_without_a_start_the_address_gets_the_present(database: str, journey: int) -> None:
    async with console(database, _runners(), own=_runners) as client:
        page = await client.get("/simulate?sequence=s&timezone=&until=")
        address = httpx.URL(page.headers["hx-replace-url"])
        assert set(address.params) == {"start", "sequence"}
        path = str(address).removeprefix("/console")
        assert re.findall("<ol.*</ol>", page.text, re.DOTALL) == re.findall(
            "<ol.*</ol>", (await client.get(path)).text, re.DOTALL
        )


async def test_an_enrollment_with_answers_and_changes(database: str, journey: int) -> None:
    asked = {"enrollment": str(journey), "answer.Score": "noop", "start": "2040-01-01"}
    async with console(database, _runners(), own=_runners) as client:
        page = await client.get("/simulate", params={**asked, "until": "2040-02-01"})
        assert page.status_code == 200
        assert 'name="data"' not in page.text
        assert f"Simulate enrollment {journey}" in check(page)
        asked |= {"answer.Score": "fail", "when.1": "letter", "set.1": '{"points": 3}'}
        text = check(await client.get("/simulate", params=asked))
        assert "2040-01-01" in text


WRONG = (
    ({"start": "soon"}, "start", "is not an ISO 8601 time"),
    ({"until": "2029-01-01"}, "until", "before the start"),
    ({"until": "2999-01-01"}, "until", "ten years"),
    ({"timezone": "Moon/Base"}, "timezone", "Moon/Base"),
    ({"data": "[]"}, "data", "JSON object"),
    ({"data": "{"}, "data", "not JSON"),
    ({"external": "1"}, "external", "JSON object"),
    ({"answer.Email": "x"}, "answer.Email", "'x' is none of"),
    ({"outcome": "maybe"}, "outcome", "maybe"),
    ({"answer.Score": "maybe"}, "answer.Score", "maybe"),
    ({"answer.Score": '{"action": "maybe"}'}, "answer.Score", "must be 'next'"),
    ({"answer.Score": '{"action": '}, "answer.Score", "not JSON"),
    ({"when.1": "letr", "set.1": "{}"}, "when.1", "letter"),
    ({"when.1": "PX", "set.1": "{}"}, "when.1", "not a step, a duration"),
    ({"when.1": "P1", "set.1": "{}"}, "when.1", "not an ISO 8601 duration"),
    ({"when.1": "P9999999999D", "set.1": "{}"}, "when.1", "the years 1 to 9999"),
    ({"when.1": "2030-99-01", "set.1": "{}"}, "when.1", "not an ISO 8601 time"),
    ({"when.2": "P1D"}, "set.2", "Write the data"),
    ({"set.2": "{}"}, "when.2", "Write when"),
    ({"when.2": "P1D", "set.2": "{"}, "set.2", "not JSON"),
    ({"sequence": "t"}, "sequence", "does not exist"),
)


async def test_errors_are_shown_beside_their_field(database: str, journey: int) -> None:
    async with console(database, _runners(), own=_runners) as client:
        for given, field, words in WRONG:
            page = await client.get("/simulate", params={**GIVEN, **given})
            check(page)
            assert page.status_code == 422, given
            beside = re.findall(r'<p class="wrong" id="wrong-([^"]+)">([^<]*)', page.text)
            assert [name for name, _ in beside] == [field], given
            assert words in html.unescape(beside[0][1]), given
            marked = re.findall(r'name="([^"]+)" aria-invalid="true" aria-describedby', page.text)
            assert marked == [field], given
        both = {**GIVEN, "start": "soon", "data": "["}
        assert (await client.get("/tables/simulation.json", params=both)).status_code == 422
        page = await client.get("/simulate", params=both)
        assert len(re.findall('id="wrong-', page.text)) == 2
