"""Each page and table of the console, from the real listener with a real database."""

from __future__ import annotations

import asyncio
import csv
import gc
import html as html_of
import io
import json
import re
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import asyncpg
import httpx
import pytest

from sequencerd.console import html, summary, tables, views
from sequencerd.console.live import POLL_INTERVAL
from sequencerd.console.pages import FILES
from sequencerd.console.query import Query
from sequencerd.console.tables import Column, Table, as_csv
from sequencerd.storage import connections
from sequencerd.storage.statements import QUERIES
from tests.console.conftest import (
    BEGUN,
    DAY,
    FAILED,
    Fixable,
    Line,
    console,
    counted,
    page_once,
    page_with,
    report,
    waiting_and_failing,
)
from tests.console.test_merging import NOTHING
from tests.helpers.engines import define, enroll, until
from tests.helpers.pooler import pgbouncer
from tests.helpers.waiting import PATIENCE, eventually

HOSTILE = "<script>alert(1)</script>"
PAGES = (
    "/",
    "/sequence?sequence=s",
    "/sequence?sequence=s&step=wait",
    "/enrollments/1",
    "/enrollments/2",
    "/failures",
    "/health",
    "/search?sequence=s&step=note&status=failed&failure=error",
    "/search",
    "/search?q=ada",
    "/simulate",
    "/simulate?sequence=s&data=%7B%7D",
    "/simulate?enrollment=1",
)


class Checker(HTMLParser):
    """Reject what a page must not contain: inline scripts or styles, and tags that do not match."""

    VOID = ("meta", "link", "input", "br")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        assert not [name for name in given if name.startswith("on") or name == "style"]
        assert tag != "style"
        assert tag != "script" or given["src"]
        assert len(given) == len(attrs), f"{tag} says something twice: {attrs}"
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        assert not data.strip() or "script" not in self.open
        self.text += data


def check(page: httpx.Response) -> str:
    """The text of a page that is well-formed."""
    checker = Checker()
    checker.feed(page.text)
    checker.close()
    assert checker.open == []
    return " ".join(checker.text.split())


async def test_every_page_is_there(database: str, connection: asyncpg.Connection) -> None:
    await waiting_and_failing(connection)
    await connection.execute("UPDATE sequencer.sequences SET description = 'For <new> users'")
    async with console(database, {"Note": Fixable()}) as client:
        await until(connection, FAILED)
        await until(connection, BEGUN)
        await counted(client, "failures")
        for path in PAGES:
            page = await client.get(path)
            assert page.status_code == 200, path
            check(page)
            assert "default-src 'none'" in page.headers["content-security-policy"]
            assert "unsafe" not in page.headers["content-security-policy"]
            assert page.headers["x-content-type-options"] == "nosniff"
            assert page.headers["cache-control"] == "no-store"
        overview = check(await client.get("/"))
        assert "s active" in overview
        assert "For <new> users" in check(await client.get("/sequence?sequence=s"))
        text = check(await client.get("/enrollments/1"))
        assert "Waits for 1 day, until " in text
        assert "then note" in text
        text = check(await client.get("/enrollments/2"))
        assert 'refused: {"email": "bob@example.com"}' in text
        assert "enrolled" in text
        text = check(await client.get("/search?sequence=s&step=note&status=failed&failure=error"))
        assert "bob" in text
        text = check(await client.get("/simulate?sequence=s&data={}"))
        assert "completed" in text
        root = await client.get(f"{str(client.base_url).removesuffix('/console/')}/")
        assert root.headers["location"] == "/console/"


async def test_a_sequence_shows_its_schedule_and_the_last_run(
    database: str, connection: asyncpg.Connection
) -> None:
    await waiting_and_failing(connection)
    path = "/sequence?sequence=s"
    async with console(database) as client, console(database, mask=["subject"]) as masked:
        assert "Enrolls what" not in check(await client.get(path))
        await connection.execute(
            "UPDATE sequencer.sequences SET enroll ="
            """ '{"from": "app.due", "every": {"amount": 2, "unit": "hours"}}'"""
        )
        text = check(await client.get(path))
        assert "Enrolls what app.due returns: every 2 hours." in text
        assert "Last run" not in text
        await connection.execute(
            "INSERT INTO sequencer.scheduled_runs"
            " VALUES ('s', '{}', '2030-01-02 03:04Z', '2030-01-01 03:04Z', '90 s', 1200, 1100,"
            """ 0, $$subject 'ada "O\\'Hara"': <not> here; 99 more subjects$$)"""
        )
        text = check(await client.get(path))
        assert "Last run Tue 2030-01-01 03:04:00 UTC, took 1 min 30 s" in text
        assert "enrolled 1,100 of 1,200" in text
        assert "Next run Wed 2030-01-02 03:04:00 UTC" in text
        assert "ada" in text
        assert "<not> here; 99 more" in text
        text = check(await masked.get(path))
        assert "subject •••: <not> here; 99 more" in text
        await connection.execute("UPDATE sequencer.scheduled_runs SET found = NULL")
        assert "took 1 min 30 s. Next run" in check(await client.get(path))


@pytest.mark.slow
async def test_counts_of_the_overview(database: str, connection: asyncpg.Connection) -> None:
    _, failing = await waiting_and_failing(connection)
    await enroll(connection, "s", "carl")
    await connection.execute(
        "INSERT INTO sequencer.events (enrollment_id, at, sequence, step, visit, action)"
        # on one day, whenever the test runs
        " SELECT n, date_trunc('day', now()) - interval '3 days' + hours * interval '1 hour',"
        " 's', 'wait', 1, action"
        " FROM generate_series(100, 104) AS n,"
        " (VALUES ('enrolled', 0), ('next', 2)) AS e (action, hours)"
        " UNION ALL"
        " SELECT 100, date_trunc('day', now()) - interval '69 hours', 's', 'note', 2, 'completed'"
    )
    async with console(database, {"Note": Fixable()}) as client:
        await until(connection, FAILED)
        async with asyncio.timeout(PATIENCE):
            while True:
                (row,) = await counted(client, "overview")
                if sum(row["completed"].values()) and row["failed"]:
                    break
                await asyncio.sleep(0.1)
        assert (row["active"], row["failed"], row["overdue"], row["soon"]) == (2, 1, 0, 0)
        assert len(row["completed"]) == summary.HISTORY_DAYS
        wait, note = await counted(client, "steps", sequence="s")
        assert (wait["step"], wait["active"], wait["next"]) == ("wait", 2, 5)
        assert wait["median_stay"] == 2 * 3600
        assert (note["step"], note["failed"]) == ("note", 1)
        (group,) = await counted(client, "failures")
        assert group.pop("last_error").startswith("refused: ")
        assert group.pop("since") == group.pop("latest")
        cause = 'refused: {"email": "<address>"}'
        assert group == {"cause": cause, "steps": ["s/note"], "failure": "error", "failed": 1}
        await connection.execute(
            "UPDATE sequencer.enrollments SET status = 'cancelled' WHERE id = $1", failing
        )
        async with asyncio.timeout(PATIENCE):
            while True:
                if not (await client.get("/tables/failures.json")).json()["rows"]:
                    break
                await asyncio.sleep(0.1)


async def test_the_number_of_overdue_enrollments_leads_to_their_list(
    database: str, connection: asyncpg.Connection
) -> None:
    await define(connection, "s", ("wait", "WaitForDuration", DAY, None))
    await connection.execute(
        "INSERT INTO sequencer.enrollments (sequence, subject, wake_at) VALUES"
        " ('s', 'late', now() - interval '1 hour'), ('s', 'early', now() + interval '1 hour')"
    )
    async with connection.transaction():
        await connection.execute("SELECT FROM sequencer.enrollments FOR UPDATE")  # from the daemon
        async with console(database) as client:
            await counted(client, "overview")
            for path, links in (("/", 1), ("/sequence?sequence=s&step=wait", 2)):
                page = (await page_with(client, path, "Overdue")).text
                urls = re.findall(r'<a href="/console(/search[^"]+wakes_before=[^"]+)">1</a>', page)
                assert len(urls) == links
                for url in urls:
                    found = check(await client.get(html_of.unescape(url)))
                    assert "late" in found
                    assert "early" not in found


async def test_the_coming_checks(database: str, connection: asyncpg.Connection) -> None:
    await define(connection, "s", ("wait", "WaitForCondition", "{}", None))
    await define(connection, "paused", ("wait", "WaitForCondition", "{}", None))
    await connection.execute(
        "UPDATE sequencer.sequences SET status = 'paused' WHERE name = 'paused'"
    )
    await connection.execute(
        "INSERT INTO sequencer.enrollments (sequence, subject, wake_at)"
        " SELECT CASE WHEN n > 20 THEN 'paused' ELSE 's' END, 'u' || n,"
        " date_trunc('hour', now()) + interval '5 hours 20 minutes' + n % 2 * interval '25 minutes'"
        " + n / 15 * interval '2 days' FROM generate_series(1, 30) AS n"
    )
    async with console(database) as client:
        (row,) = await counted(client, "coming")
        assert (row["enrollments"], row["most"], row["sequences"]) == (14, 7, ["s"])
        page = check(await client.get("/"))
        assert "Most enrollments are checked in the ten minutes from" in page
        page = (await client.get("/")).text
        (path,) = re.findall(r'href="/console(/search[^"]*wakes_from[^"]*)"', page)
        listed = await client.get(html_of.unescape(path))
        assert listed.text.count('<td class="text subject') == 14
        since = datetime.fromisoformat(row["at"])
        # in the filters above the list in the reader's zone, and in the form in UTC as in its label
        assert f'next check from <time datetime="{since.isoformat()}"' in listed.text
        assert f'name="wakes_from" value="{since:%Y-%m-%d %H:%M}"' in listed.text


async def test_health_is_what_doctor_finds(database: str, connection: asyncpg.Connection) -> None:
    await waiting_and_failing(connection)
    await connection.execute("ALTER TABLE sequencer.enrollments DISABLE TRIGGER USER")
    await connection.execute("ALTER TABLE sequencer.steps DISABLE TRIGGER USER")
    async with (
        console(database, {"Note": Fixable()}) as client,
        console(database, {"Note": Fixable()}, mask=["data.email"]) as masked,
    ):
        await connection.execute(  # unnoticed by the engines
            "UPDATE sequencer.steps SET problem = 'ask ada@example.com' WHERE name = 'wait'"
        )
        found = {row["about"]: row for row in await counted(client, "health")}
        assert found["triggers"]["level"] == "error"
        assert "ENABLE TRIGGER ALL" in found["triggers"]["advice"]
        assert found["roles"]["level"] == "warning"
        assert found["server"]["level"] == found["clock"]["level"] == "ok"
        assert "ask ada@example.com" in found["steps"]["message"]
        assert '<a href="/console/failures">failed</a>' in (await client.get("/health")).text
        page = check(await client.get("/health"))
        assert page.index("ENABLE TRIGGER ALL") < page.index("this user is a superuser")
        await counted(masked, "health")
        assert "ask •••" in check(await masked.get("/health"))


async def test_problems_are_described_by_their_kind(
    database: str, connection: asyncpg.Connection
) -> None:
    await waiting_and_failing(connection)
    at = {"since": "2026-03-02T00:00:00Z"}
    note = {"sequence": "s", "step": "note"}
    await report(
        connection,
        {"kind": "runner", "about": "Email", "message": "refused", "waiting": 1, **at},
        {"kind": "quarantined", "about": "7", "message": "denied", **note, **at},
        {"kind": "enroll", "about": "s", "sequence": "s", "message": "no view", **at},
    )
    await connection.execute(
        "UPDATE sequencer.sequences SET brake_at_most = 1, brake_per = '1 hour'"
    )
    await connection.execute(
        "UPDATE sequencer.brakes SET reason = 'brake: more than 1 in 1 hour', paused_at = now()"
    )
    since = "since Mon 2026-03-02 00:00:00 UTC"
    async with console(database, {"Note": Fixable()}) as client:
        await counted(client, "health")
        for path in ("/health", "/"):
            page = " ".join(check(await client.get(path)).split())
            made = (await client.get(path)).text
            assert '<a href="/console/enrollments/7">Enrollment 7</a>' in made
            assert 'The sequence <a href="/console/sequence?sequence=s">s</a>' in made
            for words in (
                f"The runner Email has been down {since}, 1 enrollment waiting: refused",
                f"Enrollment 7 at s/note has been quarantined {since}: denied",
                f"The sequence s, {since}: no view",
                "the sequence is paused by its brake: more than 1 in 1 hour",
            ):
                assert words in page
        page = check(await client.get("/sequence?sequence=s"))
        assert f"Enrollment 7 at s/note has been quarantined {since}: denied" in page
        assert "The runner Email has been down" not in page  # no step uses it
        assert page.count("no view") == 0
        await connection.execute("UPDATE sequencer.problems SET about = 'Note' WHERE waiting = 1")
        await page_with(client, "/sequence?sequence=s", "The runner Note has been down")
        # what holds up an enrollment is on its page as well
        await connection.execute(
            "UPDATE sequencer.problems SET about = '1' WHERE kind = 'quarantined'"
        )
        page = check(await client.get("/enrollments/1"))
        assert f"Quarantined {since}, the daemon tries again: denied." in page


async def test_counts_are_limited(
    database: str, connection: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(summary, "MAX_DUE", 3)
    monkeypatch.setattr(views, "MAX_DUE", 3)
    hour = '{"amount": 30, "unit": "minutes"}'
    await define(connection, "s", ("a", "WaitForDuration", hour, "b"), ("b", "Note", "{}", None))
    for n in range(5):
        await enroll(connection, "s", f"u{n}")
    async with console(database) as client:
        await until(
            connection,
            "SELECT count(*) = 5 FROM sequencer.enrollments WHERE visit = 1"
            " AND wake_at > now() + interval '20 minutes'",
        )
        async with asyncio.timeout(PATIENCE):
            while True:
                if (await counted(client, "overview"))[0]["soon"] == 3:
                    break
                await asyncio.sleep(0.05)
        assert "3+" in check(await client.get("/"))
        steps = check(await client.get("/sequence?sequence=s"))
        assert "3+" in steps
        assert "0+" not in steps


async def test_a_step_is_shown_before_the_first_count(
    database: str, connection: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    await define(connection, "s", ("a", "WaitForDuration", DAY, None))

    async def nothing(_: summary.Summary) -> None:
        return None

    monkeypatch.setattr(summary.Summary, "get", nothing)
    async with console(database) as client:
        page = check(await client.get("/sequence?sequence=s&step=a"))
        assert "Waits for" in page


async def test_a_count_that_takes_too_long_keeps_the_last_one(
    database: str, connection: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other figures are shown, and the statement is not repeated at once."""
    await define(connection, "s", ("a", "WaitForDuration", DAY, None))
    await enroll(connection, "s", "ada")
    read = summary.Summary._read
    asked = []
    hours = 0

    async def late(
        self: summary.Summary, query: str, *arguments: object
    ) -> list[summary.SummaryRow]:
        nonlocal hours
        asked.append(query)
        if query == "console_active":
            hours += 1  # it took so long
            raise asyncpg.QueryCanceledError("canceling statement due to statement timeout")
        return await read(self, query, *arguments)

    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + 3600 * hours)
    monkeypatch.setattr(summary, "time", clock)
    monkeypatch.setattr(summary, "MIN_PAUSE", 0.01)
    monkeypatch.setattr(summary.Summary, "_read", late)
    async with console(database) as client:
        (row,) = await counted(client, "overview")
        assert (row["active"], row["failed"]) == (None, 0)
        assert "Active–" in check(await client.get("/"))
        await eventually(lambda: asked.count("console_steps") >= 4)
        assert asked.count("console_active") == 1


async def test_hostile_data_are_text(database: str, connection: asyncpg.Connection) -> None:
    await define(
        connection,
        HOSTILE,
        (HOSTILE, "WaitForDuration", '{"amount": 1, "unit": "day"}', "\"'><b>"),
        ("\"'><b>", "Note", json.dumps({HOSTILE: HOSTILE}), None),
    )
    await enroll(connection, HOSTILE, HOSTILE, json.dumps({HOSTILE: HOSTILE, "email": HOSTILE}))
    await connection.execute(
        "INSERT INTO sequencer.enrollments (sequence, subject, data, step)"
        ' VALUES ($1, $2, \'{"a": "</script><script>alert(2)</script>"}\', $2)',
        HOSTILE,
        "\"'><b>",
    )
    async with console(database, {"Note": Fixable()}) as client:
        await until(connection, FAILED)
        await counted(client, "failures")
        for path, query in (
            ("/", {}),
            ("/sequence", {"sequence": HOSTILE, "step": HOSTILE}),
            ("/sequence", {"sequence": HOSTILE, "step": "\"'><b>"}),
            ("/enrollments/1", {}),
            ("/enrollments/2", {}),
            ("/failures", {}),
            ("/search", {"sequence": HOSTILE, "step": "\"'><b>", "failure": "error"}),
            ("/search", {"q": HOSTILE}),
            ("/search", {"q": "\"'><b>"}),
            ("/simulate", {"sequence": HOSTILE, "data": json.dumps({"a": HOSTILE})}),
            ("/simulate", {"sequence": HOSTILE, "data": HOSTILE}),
            ("/simulate", {"enrollment": "1"}),
            ("/sequence", {"sequence": "<script>alert(3)</script>"}),
        ):
            page = await client.get(path, params=query)
            assert page.status_code in (200, 404, 422), page.text
            assert "<script>alert" not in page.text
            check(page)
            assert "alert" in page.text or '"><b>' not in page.text
        rows = (await client.get("/tables/search.json", params={"q": HOSTILE})).json()["rows"]
        assert [row["subject"] for row in rows] == [HOSTILE]


async def test_tables_as_json_and_csv(database: str, connection: asyncpg.Connection) -> None:
    waiting, _ = await waiting_and_failing(connection)
    await enroll(connection, "s", "=1+1")
    async with console(database, {"Note": Fixable()}) as client:
        await until(connection, FAILED)
        await counted(client, "failures")
        for name, query in (
            ("overview", {}),
            ("steps", {"sequence": "s"}),
            ("failures", {}),
            ("enrollments", {"sequence": "s", "step": "wait"}),
            ("search", {"sequence": "s", "step": "note", "failure": "error"}),
            ("revisions", {"sequence": "s"}),
            ("search", {}),
            ("events", {"id": str(waiting)}),
            ("simulation", {"sequence": "s", "data": "{}"}),
        ):
            answer = await client.get(f"/tables/{name}.json", params=query)
            rows = answer.json()["rows"]
            assert rows, name
            assert answer.headers["content-security-policy"]
            text = await client.get(f"/tables/{name}.csv", params=query)
            assert text.headers["content-type"] == "text/csv; charset=utf-8"
            found = list(csv.DictReader(io.StringIO(text.text)))
            assert len(found) == len(rows), name
            assert list(found[0]) == list(rows[0])
        answer = await client.get("/tables/search.csv?q==1")
        assert next(csv.DictReader(io.StringIO(answer.text)))["subject"] == "'=1+1"
        assert (await client.get("/tables/nonsense.json")).status_code == 404
        assert (await client.get("/tables/search.xml")).status_code == 404


async def test_pagination(database: str, connection: asyncpg.Connection) -> None:
    await define(connection, "s", ("wait", "WaitForCondition", "{}", None))
    await connection.execute(
        "INSERT INTO sequencer.enrollments (sequence, subject, wake_at)"
        " SELECT 's', 'u' || n, '2100-01-01Z'::timestamptz + n / 40 * interval '1 hour'"
        " FROM generate_series(1, 130) AS n"
    )
    await connection.execute(
        "INSERT INTO sequencer.enrollments (sequence, subject, status, failure)"
        " SELECT 's', 'f' || n, 'failed', 'error' FROM generate_series(1, 120) AS n"
    )
    await connection.execute(
        "INSERT INTO sequencer.events (enrollment_id, at, sequence, step, visit, action)"
        " SELECT 1, now() - n * interval '1 minute', 's', 'wait', 1, 'noop'"
        " FROM generate_series(1, 120) AS n"
    )
    async with console(database) as client:
        for table, key, query, wanted in (
            ("enrollments", "id", {"sequence": "s", "step": "wait"}, 130),
            ("search", "id", {"sequence": "s", "step": "wait", "failure": "error"}, 120),
            ("search", "id", {"status": "failed", "sort": "subject"}, 120),
            ("search", "id", {}, 250),
            ("search", "id", {"q": "u"}, 130),
            ("events", "at", {"id": "1"}, 120),
        ):
            for limit in ("7", "50", "1000"):
                seen, pages = [], 0
                path: str | None = f"/tables/{table}.json?limit={limit}"
                answer = await client.get(path or "", params={**query, "limit": limit})
                while True:
                    pages += 1
                    seen += [row[key] for row in answer.json()["rows"]]
                    path = answer.json()["next"]
                    if path is None:
                        break
                    answer = await client.get(str(client.base_url.join(path)))
                assert len(seen) == len(set(seen)) == wanted, (table, limit)
                assert pages == -(-wanted // int(limit))
        page = await client.get("/sequence?sequence=s&step=wait")
        assert "Next page" in page.text


async def test_search(
    database: str, connection: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting, _ = await waiting_and_failing(connection)
    async with console(database) as client:

        async def found(q: str) -> list[str]:
            rows = (await client.get("/tables/search.json", params={"q": q})).json()["rows"]
            return [row["subject"] for row in rows]

        assert await found("ad") == ["ada"]
        assert await found(str(waiting)) == ["ada"]
        assert await found("Bob@Example.com") == ["bob"]
        assert await found("nobody") == []
        assert await found("9" * 30) == []
        monkeypatch.setattr(views, "EMAILS_SEARCHED", 1)
        assert await found("ada@example.com") == []
        page = check(await client.get("/search?q=ada@example.com"))
        assert "CREATE INDEX CONCURRENTLY enrollments_email" in page
        assert "Not found in the part that was searched." in page
        assert "No matching" not in page
        await connection.execute(
            "CREATE INDEX enrollments_email ON sequencer.enrollments (lower(data->>'email'))"
        )
        assert await found("Bob@Example.com") == ["bob"]
        assert await found("ada@example.com") == ["ada"]
        assert "No matching" in check(await client.get("/search?q=x@example.com"))


async def test_pages_of_unknown_objects(database: str, connection: asyncpg.Connection) -> None:
    await waiting_and_failing(connection)
    async with console(database) as client:
        for path, status, words in (
            ("/nonsense", 404, "page not found"),
            ("/enrollments/99", 404, "enrollment 99 does not exist"),
            (f"/enrollments/{'9' * 30}", 404, "does not exist"),
            ("/sequence?sequence=t", 404, "no sequence t"),
            ("/sequence?sequence=s&step=t", 404, "no step t"),
            ("/sequence", 422, "Sequence is missing"),
            ("/sequence?sequence=a%00b", 422, "contains invalid characters"),
            ("/search?q=%00", 422, "contains invalid characters"),
            ("/search?q=u&after=[]", 422, "after is not a number"),
            ("/search?q=u&after=999", 422, "at which the last page ended no longer exists"),
            ("/search?before=-1", 422, "not a number"),
            ("/enrollments/1?before=yesterday", 422, "not a time"),
            ("/sequence?sequence=s&step=wait&skip=999999", 422, "cannot start after"),
            ("/simulate?sequence=s&data=[]", 422, "JSON object"),
            ("/simulate?sequence=s&data={", 422, "not JSON"),
            ("/simulate?sequence=s&timezone=Moon/Base", 422, "Moon/Base"),
            ("/simulate?sequence=t", 422, "does not exist"),
            ("/simulate?enrollment=99", 404, "enrollment 99 does not exist"),
            ("/static/../app.py", 404, ""),
            ("/static/vendor/VERSIONS", 404, ""),
        ):
            page = await client.get(path)
            assert page.status_code == status, path
            assert words.lower() in check(page).lower().replace("’", "'"), path
            assert "default-src 'none'" in page.headers["content-security-policy"]
        for path in ("/", "/tables/overview.json"):
            page = await client.post(path)
            assert page.status_code == 405
            assert "does not support that method" in check(page)
            assert page.headers["allow"]


async def test_an_internal_error_shows_no_details(
    database: str,
    connection: asyncpg.Connection,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    await waiting_and_failing(connection)

    async def broken(*_: object) -> None:
        raise KeyError("ada@example.com")

    monkeypatch.setattr(views, "search", broken)
    async with console(database) as client:
        page = await client.get("/search?q=ada")
        assert page.status_code == 500
        assert "ada@" not in page.text
        check(page)
        assert "default-src 'none'" in page.headers["content-security-policy"]
    told = capsys.readouterr()
    assert "KeyError" in told.out + told.err
    assert "ada@example.com" not in told.out + told.err


@pytest.mark.slow
async def test_pages_report_a_missing_database(
    database: str, connection: asyncpg.Connection
) -> None:
    await waiting_and_failing(connection)
    line = Line(database)
    async with line.open() as through, console(database, through=through) as client:
        await counted(client, "overview")
        line.cut()
        for path in ("/enrollments/1", "/search", "/", "/tables/overview.json"):
            page = await page_once(client, path, 503)
            if path.endswith(".json"):  # for a program, as all errors
                assert page.text == "The database cannot be reached.\n"
            else:
                assert "database cannot be reached" in check(page).replace("’", "'")
            assert page.headers["retry-after"]
            assert "default-src 'none'" in page.headers["content-security-policy"]
        line.is_cut = False
        await page_once(client, "/", 200)
        await page_once(client, "/enrollments/1", 200)


def test_scripts_are_small_and_vendored_with_their_licences() -> None:
    sizes = {name: len((html.STATIC / name).read_bytes()) for name in FILES if name.endswith(".js")}
    assert sizes.pop("vendor/codemirror.js") < 420_000  # the editor alone loads it
    assert sum(sizes.values()) < 130_000
    versions = (html.STATIC / "vendor/VERSIONS").read_text()
    libraries = {"htmx": "htmx.org", "dagre": "@dagrejs/dagre", "codemirror": "@codemirror/view"}
    for name, package in libraries.items():
        assert package in versions
        assert "Permission" in (html.STATIC / f"vendor/{name}.LICENSE").read_text()


def test_times_in_the_subject_s_zone() -> None:
    at = datetime(2026, 3, 2, 23, 30, tzinfo=UTC)
    assert html.clock(at, "Europe/Berlin") == "Tue 2026-03-03 00:30:00 Europe/Berlin"
    assert html.clock(at, "Moon/Base") == "Mon 2026-03-02 23:30:00 UTC"


async def test_many_viewers_cost_one_query(
    database: str, connection: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting, _ = await waiting_and_failing(connection)
    asked: list[str] = []
    read = connections.read

    async def counting(pool: asyncpg.Pool, query: str, *arguments: object) -> object:
        asked.append(query)
        return await read(pool, query, *arguments)

    async with console(database, is_served=True) as client:
        page = client.build_request("GET", "/live", params={"topic": waiting, "version": ""})
        streams = [await client.send(page, stream=True) for _ in range(20)]
        monkeypatch.setattr(connections, "read", counting)
        begun = asyncio.get_running_loop().time()
        await eventually(lambda: len(asked) > 1)
        took = asyncio.get_running_loop().time() - begun
        for stream in streams:
            await stream.aclose()
    assert len(asked) <= took / POLL_INTERVAL + 2
    assert set(asked) == {"console_versions"}


async def test_a_simulation_of_an_endless_cycle_ends(
    database: str, connection: asyncpg.Connection
) -> None:
    hour = '{"amount": 1, "unit": "hour"}'
    async with connection.transaction():
        await define(
            connection,
            "s",
            ("wait", "WaitForDuration", hour, "note"),
            ("note", "Note", "{}", "wait"),
        )
    async with console(database) as client:
        page = await client.get("/simulate?sequence=s")
        assert "stopped after 500 entries; it loops" in check(page)
        rows = (await client.get("/tables/simulation.json?sequence=s")).json()["rows"]
        assert 500 < len(rows) < 510


@pytest.mark.slow
async def test_a_console_without_viewers_costs_nothing(
    database: str, connection: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(summary, "COUNTED_AFTER_VIEW", 0.5)
    await waiting_and_failing(connection)
    latest = (
        "SELECT max(query_start) FROM pg_stat_activity WHERE datname = current_database()"
        " AND application_name = 'sequencerd console'"
    )
    async with console(database, is_served=True) as client:
        await asyncio.sleep(0.3)
        assert await connection.fetchval(latest) is None, "not even a connection"
        assert (await client.get("/tables/overview.json")).json()["rows"], "it waits for the first"
        assert (await client.head("/live")).status_code == 200
        page = client.build_request("GET", "/live")
        stream = await client.send(page, stream=True)
        before = await connection.fetchval(latest)
        await until(connection, f"SELECT ({latest}) > $1", before)
        await stream.aclose()
        asked = None
        while (last := await connection.fetchval(latest)) != asked:  # it ends some time after
            asked = last
            await asyncio.sleep(2.5)


async def test_an_open_stream_does_not_hold_up_the_end(
    database: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with httpx.AsyncClient() as other:
        async with console(database, is_served=True) as client:
            stream = await other.send(client.build_request("GET", "/live"), stream=True)
            assert stream.status_code == 200
        assert [line async for line in stream.aiter_lines()]
    assert caplog.records == [], "uvicorn had to break it off"


async def test_the_end_waits_until_connections_are_given_back(
    database: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    reset, begun, ended = asyncpg.Connection.reset, asyncio.Event(), asyncio.Event()

    async def slowly(connection: asyncpg.Connection, **options: object) -> None:
        begun.set()
        try:
            await asyncio.sleep(0.05)
            await reset(connection, **options)
        finally:
            ended.set()

    async with asyncio.timeout(PATIENCE):
        async with console(database) as client:
            await client.get("/")
            monkeypatch.setattr(asyncpg.Connection, "reset", slowly)
            await begun.wait()  # by the count that follows
            ended.clear()
        await ended.wait()
    await asyncio.sleep(0)
    gc.collect()  # reports exceptions that nothing has looked at
    assert caplog.records == []


async def test_an_open_enrollment_is_read_again_with_whatever_its_page_shows(
    connection: asyncpg.Connection,
) -> None:
    id_, _ = await waiting_and_failing(connection)

    async def version() -> str:
        (row,) = await connection.fetch(QUERIES["console_versions"], [id_])
        return str(row["version"])

    known = await version()
    await report(connection, {"kind": "quarantined", "about": str(id_), "message": "denied"})
    for change in (
        "SELECT",
        "UPDATE sequencer.problems SET message = 'refused'",
        "UPDATE sequencer.daemons SET alive_until = now()",
        "UPDATE sequencer.steps SET problem = 'no date'",
        "UPDATE sequencer.sequences SET status = 'paused'",
    ):
        await connection.execute(change)
        assert await version() != known, change
        known = await version()
    await connection.execute(
        "UPDATE sequencer.enrollments SET wake_at = clock_timestamp() + interval '0.5 s'"
    )
    known = await version()

    async def changed() -> str | None:
        return found if (found := await version()) != known else None

    known = await eventually(changed)


@pytest.mark.slow
async def test_a_stream_reports_changes(database: str, connection: asyncpg.Connection) -> None:
    waiting, _ = await waiting_and_failing(connection)
    async with console(database, write=True, is_served=True) as client:
        await until(connection, BEGUN)
        page = await client.get(f"/enrollments/{waiting}")
        version = page.text.partition('data-version="')[2].partition('"')[0]
        query = {"topic": str(waiting), "version": version}
        async with client.stream("GET", "/live", params=query) as stream:
            assert stream.headers["content-type"].startswith("text/event-stream")
            lines = stream.aiter_lines()
            assert await anext(lines) == ": "
            await connection.execute(
                "UPDATE sequencer.enrollments SET status = 'cancelled' WHERE id = $1", waiting
            )
            async with asyncio.timeout(PATIENCE):
                async for line in lines:
                    if line == "event: changed":
                        break
                new = await anext(lines)
        assert new.startswith("id: ")
        # a page that comes again with what it knew hears at once that there is something newer
        headers = {"Last-Event-ID": version}
        async with client.stream("GET", "/live", params=query, headers=headers) as stream:
            async with asyncio.timeout(PATIENCE):
                async for line in stream.aiter_lines():
                    if line == "event: changed":
                        break
        # and one that knows the latest does not
        headers = {"Last-Event-ID": new.removeprefix("id: ")}
        async with client.stream("GET", "/live", params=query, headers=headers) as stream:
            lines = stream.aiter_lines()
            async with asyncio.timeout(PATIENCE):
                assert await anext(lines) == ": "
            seen: list[str] = []
            with suppress(TimeoutError):
                async with asyncio.timeout(2.5):
                    async for line in lines:
                        seen += [line]
            assert "event: changed" not in seen


async def test_through_a_pooler(
    database: str, connection: asyncpg.Connection, tmp_path: Path
) -> None:
    waiting, _ = await waiting_and_failing(connection)
    paths = ["/", "/failures", "/search?q=ada", "/sequence?sequence=s&step=wait"]
    paths += [f"/enrollments/{waiting}", f"/simulate?enrollment={waiting}&sequence=s"]
    with pgbouncer(database, tmp_path) as through:
        async with console(database, through=through) as client:
            await counted(client, "overview")
            for _ in range(5):
                pages = await asyncio.gather(*map(client.get, paths))
                assert [page.status_code for page in pages] == [200] * len(paths)


@pytest.mark.parametrize(
    ("value", "cell"),
    [
        ("=1+1", '"\'=1+1"'),
        ("+1+1", '"\'+1+1"'),
        ("-1+1", '"\'-1+1"'),
        ("@SUM(A1)", '"\'@SUM(A1)"'),
        ("\t=1", '"\'\t=1"'),
        ("\r=1", '"\'\r=1"'),
        ("\n=1", '"\'\n=1"'),
        ("\uff1d1+1", '"\'\uff1d1+1"'),
        ("a;=1+1", '"a;=1+1"'),
        ("-12.5", '"-12.5"'),
        ("+4915112345678", '"+4915112345678"'),
        (-5, "-5"),
        (1.5, "1.5"),
        (None, '""'),
        (["=1+1"], '"[""=1+1""]"'),
    ],
)
def test_csv_holds_no_formula(value: object, cell: str) -> None:
    made = as_csv(Table("t", [Column("a", "A")], [{"a": value}], {}))
    assert bytes(made.body).decode() == f'"a"\r\n{cell}\r\n'


def test_times_within_texts_are_shown_as_in_tables() -> None:
    shown = html.timed("<b> since 2026-11-27 12:20:41Z, not 2026-99-27 12:20:41Z", "Asia/Tokyo")
    assert shown == (
        '&lt;b&gt; since <time datetime="2026-11-27T12:20:41+00:00" title="2026-11-27 12:20:41 UTC,'
        ' Fri 2026-11-27 21:20:41 Asia/Tokyo">Fri 2026-11-27 12:20:41 UTC</time>,'
        " not 2026-99-27 12:20:41Z"
    )


async def test_nothing_is_due_in_a_paused_sequence(
    database: str, connection: asyncpg.Connection
) -> None:
    await define(connection, "s", ("wait", "WaitForDuration", DAY, None))
    await define(connection, "p", ("wait", "WaitForDuration", DAY, None))
    await connection.execute(
        "UPDATE sequencer.sequences SET status = 'paused';"
        "INSERT INTO sequencer.enrollments (sequence, subject, wake_at) SELECT name, n,"
        " now() + (n * 30 - 45) * interval '1 minute'"
        " FROM sequencer.sequences, generate_series(0, 2) AS n;"
    )
    async with console(database) as client:
        for name in ("p", "s"):
            (row,) = await counted(client, "steps", sequence=name)
            assert (row["active"], row["soon"], row["overdue"]) == (3, 0, 0)
        assert await connection.fetchval("SELECT count(*) FROM sequencer.overdue") == 0


async def test_a_timeline_is_complete_over_its_pages(
    database: str, connection: asyncpg.Connection
) -> None:
    """Many events can have the same time."""
    waiting, _ = await waiting_and_failing(connection)
    async with console(database, {"Note": Fixable()}) as client:
        await until(connection, BEGUN)
        await connection.execute(
            "INSERT INTO sequencer.events (enrollment_id, at, sequence, step, visit, action,"
            " message) SELECT $1, now() - n / 9 * interval '1 hour', 's', 'wait', n / 2, 'next',"
            " n::text FROM generate_series(1, 100) AS n",
            waiting,
        )
        for limit in (7, 50):
            rows: list[dict[str, str]] = []
            url = f"/tables/events.json?id={waiting}&limit={limit}"
            while url:
                page = (await client.get(url)).json()
                rows += page["rows"]
                url = (page["next"] or "").removeprefix("/console")
            found = [row["message"] for row in rows if row["action"] == "next"]
            assert sorted(map(int, found)) == list(range(1, 101))
            assert [row["at"] for row in rows] == sorted((row["at"] for row in rows), reverse=True)
            visits = [(row["at"], row["visit"]) for row in rows]
            assert visits == sorted(visits, reverse=True)
        page = await client.get(f"/enrollments/{waiting}")
        assert "skip=" in page.text
        assert (await client.get(f"/enrollments/{waiting}?skip=9999")).status_code == 422


async def test_a_long_sequence_is_shown_in_parts(
    database: str, connection: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = 2 * tables.MAX_SHOWN + 1
    await define(
        connection,
        "s",
        *((f"w{n}", "WaitForDuration", DAY, f"w{n + 1}") for n in range(steps - 1)),
        (f"w{steps - 1}", "WaitForDuration", DAY, None),
    )
    asked = 0
    says = Table._says

    def counting(self: Table, column: Column) -> bool:
        nonlocal asked
        asked += 1
        return says(self, column)

    async with console(database) as client:
        assert len(await counted(client, "steps", sequence="s")) == steps
        monkeypatch.setattr(Table, "_says", counting)
        path = "/sequence?sequence=s"
        for rows in (tables.MAX_SHOWN, tables.MAX_SHOWN, 1):
            page = await client.get(path)
            assert "A graph of more than 500 steps is not drawn." in check(page)
            assert 'id="graph' not in page.text
            assert page.text.count('<td class="text step') == rows
            following = re.search(r'href="/console([^"]+)">Next page', page.text)
            path = following[1].replace("&amp;", "&") if following else ""
        assert not following
        assert asked < 100, "once for each column, not for each row"
        assert "Waits for 1 day" in check(
            await client.get(f"/sequence?sequence=s&step=w{steps - 1}")
        )


@pytest.mark.parametrize(
    ("path", "cell"),
    [("/", "text sequence"), ("/failures", "text cause"), ("/over-time", "text name")],
)
async def test_many_rows_of_counts_are_shown_in_parts(
    database: str,
    connection: asyncpg.Connection,
    monkeypatch: pytest.MonkeyPatch,
    path: str,
    cell: str,
) -> None:
    monkeypatch.setattr(tables, "MAX_SHOWN", 2)
    for name in "abcde":
        await define(connection, name, ("wait", "WaitForDuration", DAY, None))
        await enroll(connection, name, "ada")
    await connection.execute(
        "INSERT INTO sequencer.enrollments (sequence, subject, step, status, failure, last_error)"
        " SELECT name, 'bob', 'wait', 'failed', 'error', 'this is ' || name"
        " FROM sequencer.sequences"
    )
    async with console(database) as client:
        await until(connection, "SELECT count(*) = 5 FROM sequencer.events")
        await counted(client, "failures")
        await page_with(client, path, "Next page")
        found = []
        while path:
            page = await client.get(path)
            check(page)
            found.append(page.text.count(f'<td class="{cell}'))
            if "<dt>Failed</dt>" in page.text:
                assert re.search("<dt>Failed</dt><dd>(<.*>)?5<", page.text), "of all sequences"
            following = re.search(r'href="/console([^"]+)">Next page', page.text)
            path = following[1].replace("&amp;", "&") if following else ""
        assert found == [2, 2, 1]


def test_counts_are_read_once_for_all_sequences() -> None:
    """Not once for each, which took minutes for 10,000."""
    read = 0

    class Rows(list[Any]):
        def __iter__(self) -> Iterator[Any]:
            nonlocal read
            read += 1
            return super().__iter__()

    step = {"step": "wait", "active": 2, "soon": 1, "overdue": 1, "problem": None}
    names = ("a", "b", "c")
    counts = replace(
        NOTHING,
        sequences=[{"name": name, "status": "active"} for name in names],
        steps=Rows([{**step, "sequence": name} for name in names]),
        failed=Rows([{"sequence": "b", "step": "wait", "failed": 3}]),
    )
    rows = views.overview(counts, Query({})).rows
    assert [(row["active"], row["failed"]) for row in rows] == [(2, 0), (2, 3), (2, 0)]
    assert read == 2


async def test_many_quarantined_enrollments_hide_no_outage(
    database: str, connection: asyncpg.Connection
) -> None:
    before = {"since": "2026-03-02T00:00:00Z"}
    await report(
        connection,
        {"kind": "runner", "about": "Email", "message": "connection refused"},
        *(
            {"kind": "quarantined", "about": str(n), "message": "refused", **before}
            for n in range(summary.MAX_PROBLEMS)
        ),
    )
    async with console(database) as client:
        for path in ("/", "/health"):
            page = check(await page_with(client, path, "<h2>Problems</h2>"))
            assert page.index("The runner Email has been down") < page.index("quarantined")
            assert ("At most 100 are listed." in page) == (path == "/health")
            assert ("90 more" in page) == (path == "/")
        assert "Email has been down" in check(await page_with(client, "/health", " more"))


@pytest.mark.parametrize(("limit", "most"), [("MAX_CAUSES", 3), ("MAX_GROUPS", 2)])
async def test_a_page_says_that_there_are_more_causes(
    database: str,
    connection: asyncpg.Connection,
    monkeypatch: pytest.MonkeyPatch,
    limit: str,
    most: int,
) -> None:
    monkeypatch.setattr(summary, limit, most)
    await define(connection, "s", ("wait", "WaitForDuration", DAY, None))
    fail = (
        "INSERT INTO sequencer.enrollments (sequence, subject, step, status, failure, last_error)"
        " SELECT 's', text, 'wait', 'failed', 'error', text FROM unnest($1::text[]) AS text"
    )
    await connection.execute(fail, ["no name"])
    async with console(database) as client:
        assert "There are more" not in check(await page_with(client, "/failures", "no name"))
        await connection.execute(fail, ["no address", "no plan"])
        await page_with(client, "/failures", "There are more than these")


async def test_a_page_that_comes_again_does_so_without_a_script(
    database: str, connection: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    again = '<noscript><meta http-equiv="refresh"'
    line = Line(database)
    async with line.open() as through, console(database, through=through) as client:
        await counted(client, "health")
        for path in ("/", "/failures", "/health", "/search"):
            assert again not in (await client.get(path)).text, path

        async def nothing(_: summary.Summary) -> None:
            return None

        with monkeypatch.context() as patched:
            patched.setattr(summary.Summary, "get", nothing)
            for path in ("/", "/failures", "/health"):
                assert again in (await client.get(path)).text, path
        line.cut()
        assert again in (await page_once(client, "/search", 503)).text


async def test_pages_are_back_with_the_database(
    database: str, connection: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An attempt to count that found no database is followed by a short pause, however long it
    took.
    """
    await waiting_and_failing(connection)
    line = Line(database)
    count, failed = summary.Summary._count, asyncio.Event()

    async def recording(self: summary.Summary) -> summary.Counts:
        try:
            return await count(self)
        except Exception:
            failed.set()
            raise

    monkeypatch.setattr(summary.Summary, "_count", recording)
    monkeypatch.setattr(summary, "ERROR_PAUSE", 0.05)
    async with line.open() as through, console(database, through=through) as client:
        await counted(client, "overview")
        line.cut()
        await failed.wait()
        monkeypatch.setattr(summary, "PAUSE_FACTOR", 1_000_000)
        failed.clear()
        await failed.wait()
        line.is_cut = False
        await page_once(client, "/", 200)


async def test_a_slow_database_is_not_said_to_be_away(
    database: str, connection: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    await waiting_and_failing(connection)

    async def late(*_: object) -> None:
        raise TimeoutError

    async with console(database) as client:
        monkeypatch.setattr(views, "journey", late)
        page = await client.get("/enrollments/1")
        assert page.status_code == 503
        assert "The database does not answer in time" in check(page)
