"""The console over several shards, as a process of its own and in the daemon."""

from __future__ import annotations

import asyncio
import csv
import io
import json
import re
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from html import unescape
from pathlib import Path
from typing import Any

import asyncpg
import httpx

from tests.console.conftest import counted, page_with, token
from tests.console.test_access import HASH, log_in
from tests.helpers.command_line import Command, start_sequencerd
from tests.helpers.engines import running_engine, until
from tests.helpers.shards import NOWHERE, SEQUENCE, configure, place
from tests.helpers.waiting import PATIENCE
from tests.service.test_http_server import free_port


@asynccontextmanager
async def console(
    command: Command, *arguments: str, **variables: str
) -> AsyncIterator[httpx.AsyncClient]:
    """A client of `sequencerd console` or `run`."""
    listen = f"127.0.0.1:{free_port()}"
    process = await start_sequencerd(
        *arguments,
        env=command.variables
        | {"SEQUENCERD_HTTP_LISTEN": listen, "SEQUENCERD_LOG_FORMAT": "json"}
        | variables,
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stderr is not None
    lines = [b""]
    async with asyncio.timeout(PATIENCE):
        while b'"ready"' not in lines[-1]:
            lines.append(await process.stderr.readline())
            assert lines[-1], lines
    reader = asyncio.create_task(process.stderr.read())
    try:
        async with httpx.AsyncClient(
            base_url=f"http://{listen}/console", timeout=PATIENCE
        ) as client:
            yield client
    finally:
        process.send_signal(signal.SIGTERM)
        code = await process.wait()
        errors = (await reader).decode()
    assert code == 0, errors


async def test_pages_of_all_shards_and_of_each(filled: Command) -> None:
    async with console(filled, "console") as client:
        overview = (await page_with(client, "/", "<dd>4</dd>")).text
        assert 'href="/console/shards/b/"' in overview
        assert 'href="/console/suppressions"' in overview
        found = (await client.get("/tables/overview.json")).json()["rows"]
        assert [(row["sequence"], row["status"], row["active"]) for row in found] == [
            ("s", "active", 4)
        ]
        steps = await counted(client, "steps", sequence="s")
        assert [(row["step"], row["active"]) for row in steps] == [("first", 4), ("second", 0)]
        for name in ("a", "b"):
            await page_with(client, "/health", f"{name}: schema")

        in_all = await page_with(client, "/sequence?sequence=s&step=first", ">4</a></dd>")
        assert graph_of(in_all)["nodes"][0]["active"] == "4"
        assert 'href="/console/shards/b/sequence?sequence=s&amp;step=first"' in in_all.text
        assert [row["active"] for row in await counted(client, "shards", sequence="s")] == [2, 2]
        in_one = (await client.get("/shards/b/sequence?sequence=s")).text
        assert 'href="/console/shards/b/search"' in in_one
        assert 'aria-current="page">b</a>' in in_one

        found = await client.get("/enrollments/b/2", follow_redirects=True)
        assert found.url.path == "/console/shards/b/enrollments/2"
        assert "b2" in found.text
        assert "enrollment b/2" in found.text
        assert 'href="/console/shards/a/"' in found.text
        elsewhere = (await client.get("/shards/b/search")).text
        assert ">b/2</a>" in elsewhere
        elsewhere = elsewhere.partition('"Shards"')[2]
        assert 'href="/console/search"' in elsewhere
        assert 'href="/console/shards/a/search"' in elsewhere
        assert (await client.get("/enrollments/c/2")).status_code == 404


def graph_of(page: httpx.Response) -> Any:
    found = re.search(r'data-graph="([^"]*)"', page.text)
    assert found
    return json.loads(unescape(found[1]))


async def rows_of(client: httpx.AsyncClient, table: str, **query: str) -> list[dict[str, Any]]:
    answer = await client.get(f"/tables/{table}.json", params=query)
    assert answer.status_code == 200, answer.text
    rows: list[dict[str, Any]] = answer.json()["rows"]
    return rows


async def test_histories_of_shards_are_added_up(
    filled: Command, shards: dict[str, asyncpg.Connection], shards_url: str
) -> None:
    """In the graph, the funnel and over time; medians stay apart."""
    for name in ("a", "b"):
        async with running_engine(place(shards_url, name)):
            evaluated = "SELECT bool_and(entered_at IS NOT NULL) FROM sequencer.enrollments"
            await until(shards[name], evaluated)
            await shards[name].execute(
                "UPDATE sequencer.enrollments SET step = 'second' WHERE id = 1"
            )
            ended = "SELECT status = 'completed' FROM sequencer.enrollments WHERE id = 1"
            await until(shards[name], ended)
    async with console(filled, "console") as client:
        await page_with(client, "/", "<dd>2</dd>")
        found = await rows_of(client, "funnel", sequence="s")
        funnel = {row["step"]: row for row in found if row["way"] is None}
        assert (funnel["first"]["entered"], funnel["second"]["entered"]) == (4, 2)
        assert funnel["first"]["waiting"] == 2
        assert {*funnel["second"]["median"]} == {"a", "b"}
        page = (await client.get("/funnel?sequence=s")).text
        assert "of several shards are shown as a range" in page
        for by in ("hour", "day"):
            activity = await rows_of(client, "activity", by=by)
            assert sum(row["entered"] for row in activity) >= 4
        found = await rows_of(client, "activity-steps")
        assert [row["name"] for row in found] == ["s"]
        assert (await client.get("/over-time?sequence=s")).status_code == 200
        simulated = await rows_of(client, "simulation", sequence="s")
        assert [row["step"] for row in simulated][-1] == "second"
        led = await client.get("/simulate?enrollment=b/2", follow_redirects=True)
        assert (led.status_code, led.url.path) == (200, "/console/shards/b/simulate")
        events = await client.get("/tables/events.json?id=b/1", follow_redirects=True)
        assert [row["action"] for row in events.json()["rows"]][-1] == "enrolled"
        for path in (
            "/tables/events.json?id=1",
            "/simulate?enrollment=1",
            "/tables/search.json?id=1",
        ):
            refused = await client.get(path)
            assert refused.status_code == 422
            assert "its shard, such as a/1" in refused.text


async def test_tables_of_a_sequence_are_merged(
    filled: Command, shards: dict[str, asyncpg.Connection], tmp_path: Path
) -> None:
    for name, connection in shards.items():
        await connection.execute(
            "UPDATE sequencer.enrollments"
            " SET wake_at = timestamptz '2030-01-01Z' + id * $1::interval",
            timedelta(days=1 if name == "a" else 0),
        )
    (tmp_path / "s.yaml").write_text(SEQUENCE.replace("amount: 3", "amount: 4"))
    filled("apply", "s.yaml", "--shard", "b")
    (tmp_path / "s.yaml").write_text(SEQUENCE.replace("amount: 3", "amount: 5"))
    filled("apply", "s.yaml")
    async with console(filled, "console") as client:
        ids: list[str] = []
        following = "/console/tables/enrollments.json?sequence=s&step=first&limit=1"
        while following:
            answer = (await client.get(following.removeprefix("/console"))).json()
            ids += [row["id"] for row in answer["rows"]]
            following = answer["next"]
        assert ids == ["b/1", "b/2", "a/1", "a/2"]
        revisions = await rows_of(client, "revisions", sequence="s")
        assert [row["revision"] for row in revisions][-2:] == ["2 in b", 1]
        same = await client.get("/sequence?sequence=s")
        assert same.status_code == 200
        assert "The shards have different definitions" not in same.text
        filled("pause", "s", "--shard", "b")
        shown = await page_with(client, "/sequence?sequence=s", "a: active; b: paused")
        assert shown.status_code == 200


async def test_lists_are_merged(filled: Command) -> None:
    async with console(filled, "console") as client:
        found = (await client.get("/search")).text
        assert 'href="/console/shards/b/enrollments/2"' in found
        assert ">b/2</a>" in found
        ids: list[str] = []
        following = "/console/tables/search.csv?limit=3"
        while following:
            answer = await client.get(following.removeprefix("/console"))
            ids += [row["id"] for row in csv.DictReader(io.StringIO(answer.text))]
            following = answer.links.get("next", {}).get("url", "")
        assert ids == ["a/2", "b/2", "a/1", "b/1"]
        for query, wanted in (
            ("q=b2", ["b/2"]),
            ("sort=subject", ["a/1", "a/2", "b/1", "b/2"]),
            ("sort=-subject", ["b/2", "b/1", "a/2", "a/1"]),
            ("status=failed", []),
            ("q=b/1", ["b/1"]),
            ("id=b/1,a/2", ["a/2", "b/1"]),
        ):
            rows = (await client.get(f"/tables/search.json?{query}")).json()["rows"]
            assert [row["id"] for row in rows] == wanted
        assert (await client.get("/search?before=c/1")).status_code == 422
        # a search without one order over all shards says where it continues
        answer = (await client.get("/tables/search.json?sort=subject&limit=1")).json()
        assert [row["id"] for row in answer["rows"]] == ["a/1", "b/1"]
        later: list[dict[str, str]] = []
        for url in re.findall(r"/console(/\S+)", answer["remark"]):
            later += (await client.get(f"{url}&limit=1")).json()["rows"]
        assert [row["subject"] for row in later] == ["a2", "b2"]


async def test_a_shard_that_is_away_is_a_notice(filled: Command, shards_url: str) -> None:
    configure(filled, a=shards_url, b=NOWHERE)
    async with console(filled, "console") as client:
        overview = (await page_with(client, "/", "<dd>2</dd>")).text
        assert "The shard b is missing here" in overview
        found = (await client.get("/search")).text
        assert "The shard b is missing here" in found
        assert ">a/2</a>" in found
        assert (await client.get("/sequence?sequence=s")).status_code == 200
        assert "a2" in (await client.get("/shards/a/enrollments/2")).text
        gone = await client.get("/shards/b/enrollments/2")
        assert gone.status_code == 503


async def test_one_login_holds_for_all_shards(
    filled: Command, shards: dict[str, asyncpg.Connection]
) -> None:
    settings = {"SEQUENCERD_CONSOLE_PASSWORD_HASH": HASH, "SEQUENCERD_CONSOLE_WRITE": "true"}
    async with console(filled, "console", **settings) as client:
        asked = await client.get("/shards/b/search")
        assert asked.headers["location"].startswith("/console/shards/b/login?to=")
        assert (await log_in(client)).status_code == 303
        form = await client.get("/shards/b/enrollments/2")
        assert form.status_code == 200
        cancelled = await client.post(
            "/shards/b/change",
            data={
                "token": token(form),
                "action": "cancel",
                "id": "2",
                "number": "1",
                "reason": "asked",
            },
        )
        assert cancelled.status_code == 303
        assert cancelled.headers["location"].startswith("/console/shards/b/")
        editor = await client.get("/edit?sequence=s")
        assert 'data-check="/console/edit/check"' in editor.text
        checked = await client.post("/edit/check", data={"token": token(form), "text": "a: ["})
        assert checked.json()[0]["line"] == 1
        entry = {"channel": "email", "address": "a@b.c", "topic": "*", "reason": "x"}
        added = await client.post("/shards/b/suppress", data={"token": token(form), **entry})
        assert added.headers["location"].startswith("/console/shards/b/suppressions?")
        await until(
            shards["b"], "SELECT status = 'cancelled' FROM sequencer.enrollments WHERE id = 2"
        )
        assert not await shards["a"].fetchval(
            "SELECT count(*) FROM sequencer.enrollments WHERE status = 'cancelled'"
        )
        await shards["a"].execute("DELETE FROM sequencer.console_sessions")
        assert (await client.get("/")).status_code == 200
        await client.post("/logout", data={"token": token(form)})
        assert (await client.get("/shards/a/")).status_code == 303


async def test_merged_lists_mask_personal_data(filled: Command) -> None:
    mask = {"SEQUENCERD_CONSOLE_MASK": "subject", "SEQUENCERD_CONSOLE_MASK_FOR": "viewer"}
    for role, ids in (("viewer", []), ("editor", ["b/2"])):
        async with console(filled, "console", **mask, SEQUENCERD_CONSOLE_ROLE=role) as client:
            rows = (await client.get("/tables/search.json")).json()["rows"]
            assert any(row["subject"] == "b2" for row in rows) == bool(ids)
            found = (await client.get("/tables/search.json?q=b2")).json()["rows"]
            assert [row["id"] for row in found] == ids


async def test_the_daemon_has_the_console_of_its_shards(filled: Command, shards_url: str) -> None:
    configure(filled, a=shards_url, b=NOWHERE)
    async with console(filled, "run", SEQUENCERD_CONSOLE_ENABLED="true") as client:
        overview = (await page_with(client, "/", "<dd>2</dd>")).text
        assert "The shard b is missing here" in overview
        assert "first" in (await client.get("/shards/a/sequence?sequence=s")).text
