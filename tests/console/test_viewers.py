"""With masked data, no page and no download of the console shows a viewer any personal data;
operators see all.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import asyncpg
import httpx
import pytest

from sequencerd.console.mask import MASKED_VALUE, make_mask
from sequencerd.core.task import Failed, Result, Task
from sequencerd.errors import SettingsError
from sequencerd.runners import Runner
from sequencerd.runners.unsubscribe import UnsubscribeLinks
from sequencerd.settings_file import load
from tests.console.conftest import DAY, console, counted, fixture, page_with, report, routes, token
from tests.helpers.engines import Recorder, define, until
from tests.helpers.runners import email_runner
from tests.helpers.servers import HOST

SUBJECT = "kunde-zuse-47110815"
EMAIL = "konrad.zuse@example.com"
DATA = {
    "email": EMAIL,
    "contact": {"phone": "+49 6652 123-4567", "name": "Konrad O'Zuse <Sen>"},
    "plan": "pro",
}
# no number of less than seven digits: times have six that are random
SECRETS = ("zuse", "konrad", "47110815", "6652123", "1234567", "123-4567", "6652 1", "example.com")
MASKED = ["subject", "data.email", "data.contact"]
LETTER = json.dumps(
    {
        "from": "us@shop.test",
        "to": "{{data.email}}",
        "subject": "For {{data.contact.name}} ({{subject}})",
        "html": "<p>Dear {{data.contact.name}}, call {{data.contact.phone}}</p>"
        '<a href="https://shop.test/?m={{data.email}}">x</a><a href="{{unsubscribe_url}}">y</a>',
        "text": "Dear {{data.contact.name}}, {{subject}}",
    }
)
BAD = json.dumps(
    {
        "from": "us@shop.test",
        "to": "{{data.contact.name}} of {{subject}}",
        "subject": "x",
        "text": "x",
    }
)


async def _refuse(task: Task) -> Result:
    text = json.dumps(task.view["data"], ensure_ascii=True).upper()
    return Failed(f"{task.view['subject']} refused: {text}", permanent=True)


def _runners() -> Mapping[str, Runner]:
    links = UnsubscribeLinks("https://shop.test", ["a" * 32])
    return {"Email": email_runner(f"smtp://{HOST}:9", links=links), "Note": Recorder(_refuse)}


@fixture
async def journey(connection: asyncpg.Connection) -> tuple[int, int]:
    """An enrollment that waits, and one that has failed."""
    await define(
        connection,
        "s",
        ("wait", "WaitForDuration", DAY, "letter"),
        ("letter", "Email", LETTER, "bad"),
        ("bad", "Email", BAD, "note"),
        ("note", "Note", "{}", None),
    )
    waiting, failing = [
        await connection.fetchval(
            "INSERT INTO sequencer.enrollments (sequence, subject, data, step)"
            " VALUES ('s', $1, $2, $3) RETURNING id",
            f"{SUBJECT}-{step}",
            json.dumps(DATA),
            step,
        )
        for step in ("wait", "note")
    ]
    await connection.execute(
        "INSERT INTO sequencer.events (enrollment_id, at, sequence, step, visit, action, message)"
        " VALUES ($1, now(), 's', 'wait', 1, 'noop', $2)",
        waiting,
        f"sent to {EMAIL.upper()}, formerly zuse@old.example.com, for {SUBJECT}-wait",
    )
    await connection.execute(
        "INSERT INTO sequencer.suppressions (channel, address, topic, source, reason)"
        " VALUES ('email', $1, '*', 'application', $2), ('sms', '+4966521234567', '*', 'stop', $2)",
        EMAIL,
        f"{EMAIL} called from +49 6652 123-4567",
    )
    message = f"trigger: Konrad O'Zuse ({SUBJECT}-wait) is on legal hold"
    down = "Note answered 500: no account of Konrad O'Zuse"
    await report(
        connection,
        {"kind": "runner", "about": "Note", "message": down},
        {"kind": "quarantined", "about": str(waiting), "sequence": "s", "message": message},
    )
    return waiting, failing


def _pages(waiting: int, failing: int) -> dict[str, list[str]]:
    """Requests for each route that a viewer may read."""
    list_ = "columns=subject,data.email,data.contact,data.contact.phone,last_error,data.plan"
    tables = {
        "enrollments": "sequence=s&step=wait",
        "steps": "sequence=s",
        "revisions": "sequence=s",
        "search": f"{list_}&sort=-data.email",
        "events": f"id={waiting}",
        "simulation": f"enrollment={waiting}",
        "funnel": "sequence=s",
    }
    others = ("overview", "failures", "coming", "health", "suppressions", "activity")
    every = {**tables, **dict.fromkeys((*others, "activity-steps"), "")}
    frame = f"sequence=s&step=letter&enrollment={waiting}"
    return {
        "/": ["/"],
        "/sequence": [f"/sequence?sequence=s&step={step}" for step in ("wait", "letter", "note")],
        "/enrollments/{id:int}": [f"/enrollments/{waiting}", f"/enrollments/{failing}"],
        "/failures": ["/failures"],
        "/health": ["/health"],
        "/search": [
            "/search",
            f"/search?{list_}",
            f"/search?q={failing}",
            f"/search?{list_}&status=failed&sort=subject&limit=1",
            "/search?where=data.plan = pro",
        ],
        "/suppressions": ["/suppressions", "/suppressions?channel=email"],
        "/over-time": ["/over-time"],
        "/simulate": [f"/simulate?enrollment={waiting}", f"/simulate?enrollment={failing}"],
        "/simulate/frame": [f"/simulate/frame?enrollment={waiting}&entry={n}" for n in range(8)],
        "/tables/{name}.{form}": [
            f"/tables/{name}.{form}?{query}&limit={limit}"
            for name, query in every.items()
            for form in ("json", "csv")
            for limit in (1, 50)
        ],
        "/live": [],  # read apart, as it has no end
        "/message": [
            f"/message?{frame}",
            "/message?sequence=s&step=letter",
            f"/message?sequence=s&step=bad&enrollment={waiting}",
        ],
        "/message/frame": [
            f"/message/frame?{frame}",
            f"/message/frame?sequence=s&step=bad&enrollment={waiting}",
        ],
        "/funnel": ["/funnel?sequence=s"],
        "/changes/{number:int}": ["/changes/1"],
        "/revision": ["/revision?sequence=s&revision=1"],
        "/sessions": ["/sessions"],
    }


FOR_OPERATORS = {
    "/change": "/change?action=cancel&id=1",
    "/data": "/data?id=1",
    "/enroll": "/enroll",
    "/suppress": "/suppress",
    "/suppression": "/suppression?channel=email&address=x&topic=*",
    "/edit": "/edit?sequence=s",
    "/edit/schema": "/edit/schema",
    "/step": "/step?sequence=s&step=wait",
    "/status": "/status?sequence=s&action=pause",
}
WITHOUT_DATA = ("/login", "/oidc", "/static/{name:path}")


def test_every_route_is_among_those_that_are_tested() -> None:
    paths = {route.path for route in routes("GET")}
    assert paths == {*_pages(1, 2), *FOR_OPERATORS, *WITHOUT_DATA}


async def test_nothing_personal_reaches_a_viewer(
    database: str, connection: asyncpg.Connection, journey: tuple[int, int]
) -> None:
    waiting, failing = journey
    settings: dict[str, Any] = {"mask": MASKED, "mask_for": ["viewer"], "write": True}
    pages = _pages(waiting, failing)
    async with (
        console(
            database, _runners(), own=_runners, role="viewer", is_served=True, **settings
        ) as viewer,
        console(database, _runners(), own=_runners, role="operator", **settings) as operator,
    ):
        await until(
            connection, "SELECT count(*) = 1 FROM sequencer.enrollments WHERE status = 'failed'"
        )
        for client in (viewer, operator):
            await counted(client, "failures")
            await counted(client, "health")
        statuses = set()
        for path in (path for some in pages.values() for path in some):
            page = await viewer.get(path)
            statuses.add(page.status_code)
            assert page.status_code in (200, 404, 422), f"{path}: {page.text}"
            _check(page, path)
        assert statuses == {200, 404, 422}
        for path in FOR_OPERATORS.values():
            page = await viewer.get(path)
            assert page.status_code == 403, path
            _check(page, path)
        for topic in ("0", str(waiting)):
            async with viewer.stream("GET", f"/live?topic={topic}&version=x") as stream:
                async for line in stream.aiter_lines():
                    assert not any(secret in line.lower() for secret in SECRETS)
                    if line.startswith("event"):
                        break
        # whoever may change data sees them
        for path in (
            f"/enrollments/{waiting}",
            f"/tables/events.json?id={waiting}",
            f"/message?sequence=s&step=letter&enrollment={waiting}",
            f"/simulate?enrollment={waiting}",
            f"/search?q={EMAIL}",
            "/failures",
            "/suppressions",
            f"/data?id={waiting}",
        ):
            page = await operator.get(path)
            assert page.status_code == 200, path
            assert MASKED_VALUE not in page.text, path
            assert "zuse" in page.text.lower(), path
        # nor does a search find what is masked
        for path in (
            f"/search?q={SUBJECT}&status=active",
            "/search?where=data.email=konrad.zuse@example.com",
            "/tables/suppressions.json?address=konrad.zuse@example.com",
        ):
            assert (await viewer.get(path)).status_code == 422, path
        for wanted in (SUBJECT, EMAIL):
            answer = await viewer.get("/tables/search.json", params={"q": wanted})
            assert answer.json()["rows"] == []


async def test_the_progress_of_a_change_shows_no_personal_data(
    database: str, connection: asyncpg.Connection, journey: tuple[int, int]
) -> None:
    settings: dict[str, Any] = {"mask": MASKED, "write": True}  # for all roles
    async with console(database, _runners(), own=_runners, **settings) as client:
        await until(
            connection, "SELECT count(*) = 1 FROM sequencer.enrollments WHERE status = 'failed'"
        )
        asked = await client.get("/change?action=retry&status=failed")
        form = {"action": "retry", "status": "failed", "number": "1", "token": token(asked)}
        reason = f"called {EMAIL} and +49 6652 1234567"
        made = await client.post("/change", data={**form, "reason": reason})
        path = made.headers["location"].removeprefix("/console")
        page = await page_with(client, path, "failed again")
        _check(page, path)
        for path in (f"/data?id={journey[0]}", "/change?action=cancel&status=active"):
            _check(await client.get(path), path)


def _check(page: httpx.Response, path: str) -> None:
    said = "".join((*map(str, page.headers.items()), page.text)).lower()
    asked = path.lower()
    found = [one for one in SECRETS if one in said and one not in asked]
    assert not found, f"{path}: {found} in …{said[max(0, said.find(found[0]) - 300) :][:600]}"


@pytest.mark.parametrize(
    "text",
    [
        "O'Zuse",
        "o'zuse",
        "&lt;O&#x27;Zuse&gt;",
        "O%27Zuse",
        "KONRAD",
        "Konrad+O%27Zuse",
        "'Konrad O\\'Zuse'",
        '"konrad.zuse@example.com"',
        "mailto:konrad.zuse%40example.com",
        "rob@old.example.com",
        "+49 6652 1234567",
        "https://shop.test/unsubscribe/WyJlbWFpbCJd.abc-_x",
    ],
)
def test_masked_values_in_other_spellings(text: str) -> None:
    known = {"name": "Konrad O'Zuse", "email": "konrad.zuse@example.com"}
    mask = make_mask(["data.name", "data.email"])
    shown = mask({"message": f"at 2030-01-31 09:00:00 to {text} done", "known": known})["message"]
    assert MASKED_VALUE in shown
    assert not any(secret in shown.lower() for secret in (*SECRETS, "abc-_x"))
    assert shown.startswith("at 2030-01-31 09:00:00 to ")
    assert shown.endswith(" done")


def test_an_unknown_role() -> None:
    with pytest.raises(SettingsError, match=r"console\.mask_for"):
        load({"SEQUENCERD_CONSOLE_MASK_FOR": "reader"})
    found = load({"SEQUENCERD_CONSOLE_MASK_FOR": "viewer operator"}).console
    assert found is not None
    assert found.mask_for == ("viewer", "operator")
