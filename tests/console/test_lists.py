"""Failures by cause, lists with filters, and actions on a selection."""

from __future__ import annotations

import asyncio
import html
import re
from time import process_time
from typing import Any

import asyncpg
import httpx
import pytest

from sequencerd.console import lists
from sequencerd.console.query import WrongQueryError
from sequencerd.core.task import Answer, Failed, Result, Task
from sequencerd.storage.bulk import Selection
from sequencerd.storage.statements import QUERIES
from tests.console.conftest import (
    DAY,
    FAILED,
    Fixable,
    Line,
    console,
    counted,
    page_with,
    token,
    waiting_and_failing,
)
from tests.console.test_pages import check
from tests.helpers.engines import Recorder, define, enroll, until
from tests.helpers.waiting import PATIENCE

CAUSES = {
    "to ada@example.com: 550 5.1.1 no such user 77": "to <address>: 550 5.1.1 no such user …",
    "refused: x@y.z (552 mailbox is full)": "refused: <address> (552 mailbox is full)",
    "account 412 is closed": "account … is closed",
    "account 13 is closed": "account … is closed",
    "the server answered 503": "the server answered 503",
    'answered 422 {"error": "no account 5"}': 'answered 422 {"error": "no account …"}',
    "to: 'O''Brien' is not an address": 'to: "…"',
    'not an address: "n7@@example"': 'not an address: "…"',
    "order INV-2026-1, uuid 550e8400-e29b-41d4-a716-446655440000": "order …, uuid …",
    "don't call +49 (151) 123-456": "don't call …",
    "127.0.0.1:25: Connection refused": "…:…: Connection refused",
    "100% of a_b\\c": "…% of a_b\\c",
    "value “a b” is wrong": 'value "…" is wrong',
    "amount 1,250.00 refused": "amount … refused",
    "amount 7 refused": "amount … refused",
    "connect to [2001:db8::1]:25 failed": "connect to […:…::…]:… failed",
    "customer cus_NffrFeUfNV2Hib was deleted": "customer … was deleted",
    "at 2026-11-12T13:14:15.123Z: gone": "at …:…:…: gone",
    "": "",
}


def test_a_filter_with_many_blanks_takes_little_time() -> None:
    before = process_time()
    _, value = lists._where(f"data.plan = a{' ' * 60_000}\nb", [])
    assert process_time() - before < 2  # seconds, in which nothing else is done
    assert value == f"a{' ' * 60_000}\nb"
    with pytest.raises(WrongQueryError):
        lists._where(f"{' ' * 60_000}\n", [])


async def test_errors_of_one_cause_have_one_pattern(connection: asyncpg.Connection) -> None:
    await define(connection, "s", ("wait", "WaitForDuration", DAY, None))
    await connection.executemany(
        "INSERT INTO sequencer.enrollments (sequence, subject, status, last_error)"
        " VALUES ('s', $1, 'failed', $2)",
        [(str(n), error) for n, error in enumerate(CAUSES)],
    )
    rows = await connection.fetch(QUERIES["console_causes"], 1000, 1000)
    found = {row["cause"] for row in rows}
    for error, wanted in CAUSES.items():
        if not error.startswith("to: "):  # what follows a quotation within a quotation may differ
            assert wanted in found, error
    # each is found again by its cause
    for row in rows:
        parameters = Selection(causes=[row["cause"]]).parameters()
        matching = await connection.fetch(QUERIES["select"], *parameters, ["failed"], None)
        assert len(matching) == sum(r["failed"] for r in rows if r["cause"] == row["cause"]), row


async def failing(connection: asyncpg.Connection) -> None:
    """Two causes at two steps, and others that wait."""
    await define(
        connection, "s", ("wait", "WaitForDuration", DAY, "note"), ("note", "Note", "{}", None)
    )
    await define(connection, "t", ("note", "Note", "{}", None))
    await connection.execute(
        "INSERT INTO sequencer.enrollments (sequence, step, subject, status, failure, last_error,"
        " data, ended_at)"
        " SELECT CASE WHEN n % 3 = 0 THEN 't' ELSE 's' END, 'note', 'f' || n, 'failed', 'error',"
        " CASE WHEN n <= 6 THEN 'to a' || n || '@b.c: 550 no such user' ELSE 'id ' || n END,"
        """ jsonb_build_object('name', 'Ada ' || n, 'plan', CASE WHEN n % 2 = 0 THEN 'pro' END),"""
        " now() - interval '1 hour' FROM generate_series(1, 9) AS n"
    )
    await connection.execute(
        "INSERT INTO sequencer.enrollments (sequence, subject, data, wake_at, entered_at)"
        """ SELECT 's', 'w' || n, jsonb_build_object('plan', 'pro', 'n', n),"""
        " '2100-01-01Z'::timestamptz + n * interval '1 day', now() - n * interval '1 day'"
        " FROM generate_series(1, 5) AS n"
    )


async def found(client: httpx.AsyncClient, **query: str) -> list[dict[str, Any]]:
    answer = await client.get("/tables/search.json", params=query)
    assert answer.status_code == 200, answer.text
    rows: list[dict[str, Any]] = answer.json()["rows"]
    return rows


async def test_a_cause_is_retried_and_followed(
    database: str, connection: asyncpg.Connection
) -> None:
    await failing(connection)
    runner = Fixable()
    async with console(database, {"Note": runner}, write=True) as client:
        first, second = await counted(client, "failures")
        assert (first["cause"], first["failed"]) == ("to <address>: 550 no such user", 6)
        assert first["steps"] == ["s/note", "t/note"]
        assert (second["cause"], second["failed"]) == ("id …", 3)
        page = await client.get("/failures")
        address = page.text.partition("/console/search?status=failed&amp;cause=")[2][:12]
        assert len(await found(client, status="failed", cause=address)) == 6
        query = {"action": "retry", "status": "failed", "cause": address}
        asked = await client.get("/change", params=query)
        assert "Retry 6 enrollments?" in asked.text
        form = {**query, "number": "6", "reason": "the server is fixed", "token": token(asked)}
        made = await client.post("/change", data=form)
        assert made.status_code == 303
        followed = made.headers["location"].removeprefix("/console")
        page = await page_with(client, followed, "6 failed again")
        assert "Retried 6 enrollments" in page.text
        assert "the server is fixed" in page.text
        # of those, a selection; what is fixed completes
        runner.is_fixed = True
        ids = await connection.fetch(
            "SELECT id FROM sequencer.enrollments WHERE status = 'failed' ORDER BY id LIMIT 2"
        )
        form = {**form, "cause": "", "id": ",".join(str(row["id"]) for row in ids), "number": "2"}
        made = await client.post("/change", data=form)
        followed = made.headers["location"].removeprefix("/console")
        await page_with(client, followed, "2 completed")
        assert (await client.get("/changes/99")).status_code == 404
        # a move needs a step that all of them have
        moved = {"action": "move", "status": "failed", "sequence": "t"}
        asked = await client.get("/change", params=moved)
        assert "<option>note</option>" in asked.text
        assert "<option>wait</option>" not in asked.text


async def test_a_move_that_is_confirmed_twice_is_made_once(
    database: str, connection: asyncpg.Connection
) -> None:
    await define(
        connection, "s", ("wait", "WaitForDuration", DAY, "note"), ("note", "Note", "{}", "wait")
    )
    await enroll(connection, "s", "ada")
    runner = Recorder()
    async with console(database, {"Note": runner}, write=True) as client:
        await until(connection, "SELECT entered_at < wake_at FROM sequencer.enrollments")
        asked = await client.get("/change?action=move&id=1")
        once = re.search(r'name="once" value="([^"]+)"', asked.text)
        assert once
        form = {"action": "move", "id": "1", "number": "1", "to": "note", "reason": "x"}
        form |= {"token": token(asked), "once": once[1]}
        assert (await client.post("/change", data=form)).status_code == 303
        moved = "SELECT count(*) = 1 FROM sequencer.events WHERE step = 'note' AND action = 'next'"
        await until(connection, moved)
        assert (await client.post("/change", data=form)).status_code == 303
        assert await connection.fetchval(
            "SELECT count(*) = 1 FROM sequencer.events WHERE action = 'moved'"
        )
        assert len(runner.keys) == 1


async def test_a_selection_fails_again_with_new_causes(
    database: str, connection: asyncpg.Connection
) -> None:
    """The outcomes are counted by the new causes, whatever the old one was."""
    await failing(connection)

    async def behave(task: Task) -> Result:
        number = int(task.view["subject"].removeprefix("f"))
        if number % 3 == 0:
            return Answer()
        text = f"amount {number},250.00 EUR over the limit of “plan {number}”"
        return Failed(text if number % 2 else f"cus_{number}x9: closed", permanent=True)

    async with console(database, {"Note": Recorder(behave)}, write=True) as client:
        ids = [row["id"] for row in await found(client, status="failed", sort="subject")]
        chosen = {"action": "retry", "id": ",".join(map(str, ids[:7]))}
        asked = await client.get("/change", params=chosen)
        assert "Retry 7 enrollments?" in asked.text
        form = {**chosen, "number": "7", "reason": "again", "token": token(asked)}
        made = await client.post("/change", data=form)
        path = made.headers["location"].removeprefix("/console")
        text = check(await page_with(client, path, "5 failed again, 2 completed"))
        assert 'amount … EUR over the limit of "…"' in text
        assert "…: closed" in text
        assert len(await found(client, status="failed")) == 7


async def test_filters_combine(
    database: str, connection: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    await failing(connection)
    async with console(database, {"Note": Fixable()}) as client:

        async def subjects(**query: str) -> list[str]:
            return [row["subject"] for row in await found(client, **query)]

        assert await subjects(where="data.plan = pro", status="active") == [
            "w5",
            "w4",
            "w3",
            "w2",
            "w1",
        ]
        assert await subjects(where="plan=pro", sequence="t") == ["f6"]
        assert await subjects(where="data.n = 3") == ["w3"]
        assert await subjects(status="failed", q="f9") == ["f9"]
        assert await subjects(age="3d", sequence="s", status="active") == ["w5", "w4", "w3"]
        assert await subjects(wakes_from="2100-01-03", wakes_before="2100-01-05") == ["w3", "w2"]
        assert await subjects(status="active", sort="data.n", columns="subject,data.n") == [
            "w1",
            "w2",
            "w3",
            "w4",
            "w5",
        ]
        assert await subjects(cause="0" * 12) == []
        (row,) = await found(client, where="n = 3", columns="subject,data.n,data.no.way")
        assert row == {"id": row["id"], "subject": "w3", "data.n": 3, "data.no.way": None}
        text = (await client.get("/tables/search.csv?where=n=3&columns=data.n")).text
        assert text.splitlines()[0] == '"id","data.n"'
        # what no index serves is searched a part at a time, and the page leads on
        monkeypatch.setattr(lists, "EMPTY_SECONDS", 0)
        monkeypatch.setattr(lists, "FIRST_SEARCHED", 4)
        page = await client.get("/search?where=data.n+%3D+1")
        assert "Searched down to enrollment" in page.text
        assert "No matching" not in page.text
        assert await subjects(where="data.n = 1") == []
        path, seen = "/console/tables/search.json?where=data.n+%3D+1", []
        while path:
            answer = await client.get(str(client.base_url.join(path)))
            seen += [row["subject"] for row in answer.json()["rows"]]
            path = answer.json()["next"]
        assert seen == ["w1"]


@pytest.mark.parametrize(
    ("query", "wanted"),
    [
        ({"status": "failed", "sequence": "t"}, ["f3", "f6", "f9"]),
        ({"status": "failed", "step": "note", "where": "plan=pro"}, ["f2", "f4", "f6", "f8"]),
        ({"status": "active", "sequence": "s", "step": "wait"}, ["w1", "w2", "w3", "w4", "w5"]),
        ({"sequence": "s", "wakes_from": "2100-01-03", "wakes_before": "2100-01-05"}, ["w2", "w3"]),
    ],
)
async def test_what_an_index_finds_is_listed_however_old_it_is(
    database: str,
    connection: asyncpg.Connection,
    monkeypatch: pytest.MonkeyPatch,
    query: dict[str, str],
    wanted: list[str],
) -> None:
    await failing(connection)
    await connection.execute(
        "INSERT INTO sequencer.enrollments (sequence, step, subject, status)"
        " SELECT 's', 'note', 'c' || n, 'completed' FROM generate_series(1, 20) AS n"
    )
    monkeypatch.setattr(lists, "SEARCH_SECONDS", 0)
    monkeypatch.setattr(lists, "EMPTY_SECONDS", 0)
    monkeypatch.setattr(lists, "FIRST_SEARCHED", 4)
    async with console(database, {"Note": Fixable()}) as client:
        rows = await found(client, **query)
        assert [row["subject"] for row in rows] == wanted[::-1]
        assert [row["subject"] for row in await found(client, **query, sort="subject")] == wanted
        (row,) = await found(client, **query, id=str(rows[0]["id"]))
        assert row["subject"] == wanted[-1]
        # many are searched for until one is found, so that the page is not empty
        monkeypatch.setattr(lists, "MAX_INDEXED", 0)
        assert await found(client, **query) == []
        monkeypatch.setattr(lists, "EMPTY_SECONDS", PATIENCE)
        rows = await found(client, **query)
        assert {row["subject"] for row in rows} <= {*wanted}
        assert rows


async def test_columns_are_ticked_and_kept_in_the_address(
    database: str, connection: asyncpg.Connection
) -> None:
    await failing(connection)
    async with console(database, {"Note": Fixable()}) as client:
        # as a browser without JavaScript sends the form: each box, and empty fields
        form = "columns=subject&columns=entered_at&columns=data.plan, data.n&sort=&status=active"
        page = await client.get(f"/search?{form}&failure=")
        check(page)
        heads = re.findall(r"<a [^>]+>([^<]+)</a></th>", page.text)
        assert heads == ["Enrollment", "Subject", "At the step since", "data.plan", "data.n"]
        ticked = re.findall(r'name="columns" value="([^"]+)" checked', page.text)
        assert ticked == ["subject", "entered_at"]
        assert 'name="columns" value="data.plan, data.n"' in page.text
        address = httpx.URL(page.headers["hx-replace-url"])
        assert address.params["columns"] == "subject,entered_at,data.plan, data.n"
        (csv,) = re.findall(r'href="/console(/tables/search\.csv[^"]+)"', page.text)
        lines = (await client.get(html.unescape(csv))).text.splitlines()
        assert lines[0] == '"id","subject","entered_at","data.plan","data.n"'
        assert len(lines) == 6
        # the usual columns are not in the address, and do not turn a search into a list
        usual = "&".join(f"columns={name}" for name in lists.DEFAULT_COLUMNS[1:])
        page = await client.get(f"/search?q=w3&{usual}&columns=")
        assert page.headers["hx-replace-url"] == "/console/search?q=w3"
        assert "w3" in check(page)
        many = ",".join(f"data.a{n}" for n in range(30))
        assert "at most 20 columns" in (await client.get(f"/search?columns={many}")).text


async def test_a_list_is_sorted_by_any_column(
    database: str, connection: asyncpg.Connection
) -> None:
    await failing(connection)
    async with console(database, {"Note": Fixable()}) as client:
        page = await client.get("/search?status=active&sort=-entered_at&columns=subject")
        assert re.findall(r">(w\d)<", page.text) == ["w1", "w2", "w3", "w4", "w5"]
        page = await client.get("/search?status=active&sort=data.n&columns=subject")
        assert re.findall(r">(w\d)<", page.text) == ["w1", "w2", "w3", "w4", "w5"]
        # the heads of columns sort, and the other way round the second time
        (link,) = re.findall(r'<a href="/console([^"]+)">Subject</a></th>', page.text)
        page = await client.get(html.unescape(link))
        assert 'aria-sort="ascending"' in page.text
        (link,) = re.findall(r'<a href="/console([^"]+)">Subject</a></th>', page.text)
        page = await client.get(html.unescape(link))
        assert re.findall(r">(w\d)<", page.text) == ["w5", "w4", "w3", "w2", "w1"]
        assert 'aria-sort="descending"' in page.text


async def test_a_search_combines_with_filters(
    database: str, connection: asyncpg.Connection
) -> None:
    await failing(connection)
    await connection.execute(
        "INSERT INTO sequencer.enrollments (sequence, subject, data) VALUES"
        """ ('s', 'x1', '{"email": "Ada@Example.com"}'), ('s', 'ada@example.com', '{}'),"""
        """ ('t', 'x2', '{"email": "ada@example.com"}')"""
    )
    id_ = await connection.fetchval("SELECT id FROM sequencer.enrollments WHERE subject = 'x2'")
    async with console(database, {"Note": Fixable()}, write=True) as client:

        async def subjects(**query: str) -> list[str]:
            return [row["subject"] for row in await found(client, **query)]

        mail = "ada@example.com"
        assert await subjects(q=mail, sequence="s") == ["ada@example.com", "x1"]
        assert await subjects(q=mail, sort="subject") == ["ada@example.com", "x1", "x2"]
        assert await subjects(q=str(id_), columns="subject") == ["x2"]
        assert await subjects(q=str(id_), sequence="s") == []
        # what is changed is what was shown
        asked = await client.get(f"/change?action=cancel&q={mail}&sequence=s")
        assert "Cancel 2 enrollments?" in asked.text
        # where not all were searched, the list, its JSON and the page say so
        await connection.execute(
            "INSERT INTO sequencer.enrollments (sequence, subject)"
            " SELECT 't', 'y' || n FROM generate_series(1, 10001) AS n"
        )
        for path in (f"/search?q={mail}", f"/search?q={mail}&status=active"):
            text = check(await client.get(path))
            assert "Only the latest 10,000 enrollments were searched" in text
            assert "CREATE INDEX CONCURRENTLY enrollments_email" in text
            answer = await client.get(f"/tables{path.replace('/search?', '/search.json?')}")
            assert "latest 10,000 enrollments" in answer.json()["remark"]


@pytest.mark.parametrize("mask", [[], ["subject", "data.email"]])
async def test_nonsense_in_filters(
    database: str, connection: asyncpg.Connection, mask: list[str]
) -> None:
    await waiting_and_failing(connection)
    async with console(database, {"Note": Fixable()}, write=True, mask=mask) as client:
        for path, words in (
            ("/search?where=plan", "data filter as in data.plan = pro"),
            ("/search?age=long", "time as in 3 d"),
            ("/search?status=dead", "no status dead"),
            ("/search?sort=mood", "no column mood"),
            ("/search?columns=mood", "no column mood"),
            ("/search?wakes_from=soon", "not a time"),
            ("/search?id=1,x", "not a number"),
            ("/search?sequence=a%00b", "invalid characters"),
            ("/search?before=x", "not a number"),
            ("/change?action=retry", "nothing is selected"),
            ("/change?action=drop&id=1", "unknown action"),
            ("/change?id=1", "action is missing"),
            ("/changes/x", "page not found"),
            *((("/search?q=a&status=active", "masked"),) if mask else ()),
            *((("/change?action=cancel&where=email=x", "masked"),) if mask else ()),
        ):
            page = await client.get(path)
            assert page.status_code in (404, 422), path
            assert words in page.text.lower(), path
        for empty, words in (
            ("/search?sequence=none", "There is no sequence none."),
            ("/search?sequence=s&step=none", "The sequence s has no step none."),
            ("/search?step=none&sort=subject", "No matching enrollments."),
        ):
            page = await client.get(empty)
            assert page.status_code == 200
            assert words in page.text
        # a filter that matches nothing is seen, and not dropped by the next search
        page = await client.get("/search?sequence=none&topic=gone")
        assert "<option selected>none</option>" in page.text
        assert "<option selected>gone</option>" in page.text


async def test_a_masked_cause_is_masked_everywhere(
    database: str, connection: asyncpg.Connection
) -> None:
    await waiting_and_failing(connection)
    await connection.execute(
        "INSERT INTO sequencer.enrollments (sequence, step, subject, status, failure, last_error,"
        " data) SELECT 's', 'note', name, 'failed', 'error', name || ' is unknown',"
        """ jsonb_build_object('name', name) FROM unnest(ARRAY['Grace', 'Edsger']) AS name"""
    )
    async with console(database, {"Note": Fixable()}, mask=["data.name"], write=True) as client:
        async with asyncio.timeout(PATIENCE):
            while True:
                rows = await counted(client, "failures")
                if shown := [row for row in rows if "unknown" in row["cause"]]:
                    break
        # those that look alike are one cause, with both of its patterns
        assert [(row["cause"], row["failed"]) for row in shown] == [("••• is unknown", 2)]
        page = await client.get("/failures")
        key = page.text.partition("cause=")[2][:12]
        for path in ("/failures", "/tables/failures.csv", f"/search?cause={key}"):
            text = (await client.get(path)).text
            assert "•••" in text
            assert "Grace" not in text
            assert "Edsger" not in text
        both = await found(client, cause=key)
        assert len(both) == max(row["failed"] for row in rows)


async def test_a_list_without_a_database(database: str, connection: asyncpg.Connection) -> None:
    await waiting_and_failing(connection)
    line = Line(database)
    async with line.open() as through, console(database, through=through, write=True) as client:
        await until(connection, FAILED.replace("= 1", ">= 0"))
        assert (await client.get("/search?status=active")).status_code == 200
        line.cut()
        for path in ("/search?status=active", "/change?action=cancel&status=active"):
            page = await client.get(path)
            assert page.status_code == 503
            assert "The database cannot be reached" in page.text


async def test_a_search_finds_each_enrollment_once_over_all_pages(
    database: str, connection: asyncpg.Connection
) -> None:
    """Those with the address come first, then those whose subject begins with it."""
    await define(connection, "s", ("wait", "WaitForDuration", DAY, None))
    await connection.execute(
        "UPDATE sequencer.sequences SET reentry = 'always';"
        "INSERT INTO sequencer.enrollments (sequence, subject, data)"
        " SELECT 's', CASE WHEN n % 2 = 0 THEN 'ada@example.com-' || n ELSE 'u' || n END,"
        " CASE WHEN n <= 14 THEN '{\"email\": \"Ada@example.com\"}'::jsonb ELSE '{}' END"
        " FROM generate_series(1, 30) AS n"
    )
    async with console(database) as client:
        for limit in (1, 5, 7, 14, 50):
            found: list[str] = []
            url = f"/tables/search.json?q=+ada@example.com+&limit={limit}"
            while url:
                page = (await client.get(url)).json()
                assert len(page["rows"]) <= limit
                found += [row["subject"] for row in page["rows"]]
                url = (page["next"] or "").removeprefix("/console")
            assert len(found) == len({*found}) == 22, limit
            assert {*found[:14]} == {
                f"u{n}" if n % 2 else f"ada@example.com-{n}" for n in range(1, 15)
            }
        assert "u3" in check(await client.get("/search?q=%20u3%0A"))
