"""Suppressions that are listed, added and removed in the console."""

from __future__ import annotations

import html
from typing import Any

import asyncpg
import httpx
import pytest

from sequencerd.console import suppressing
from sequencerd.runners.suppression_check import hashed
from tests.console.conftest import console, token
from tests.console.test_users import USERS, log_in

ENTRIES = """
    INSERT INTO sequencer.suppressions (channel, address, topic, source, reason) VALUES
        ('email', 'ada@example.com', '*', 'unsubscribe', 'link in enrollment 7'),
        ('email', 'ada@example.com', 'news', 'application', NULL),
        ('email', 'bob@example.com', '*', 'bounce', '550 no such user bob@example.com'),
        ('sms', '+4915112345678', '*', 'stop', NULL),
        ('push', 'fH7:Xy', 'news', 'application', NULL)
"""


async def addresses(client: httpx.AsyncClient, **query: Any) -> list[tuple[str, str]]:
    answer = await client.get("/tables/suppressions.json", params=query)
    return [(row["address"], row["topic"]) for row in answer.json()["rows"]]


async def post(client: httpx.AsyncClient, path: str, **fields: str) -> httpx.Response:
    page = await client.get("/suppress")
    return await client.post(path, data={"token": token(page), **fields})


async def number_of(connection: asyncpg.Connection) -> int:
    number: int = await connection.fetchval("SELECT count(*) FROM sequencer.suppressions")
    return number


async def test_the_list_is_filtered_and_paged(
    database: str, connection: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with console(database) as client:
        assert "None." in (await client.get("/suppressions")).text
        await connection.execute(ENTRIES)
        page = await client.get("/suppressions")
        assert "ada@example.com" in page.text
        assert "link in enrollment 7" in page.text
        assert "Suppress an address…" not in page.text
        assert "/console/suppression?" not in page.text
        for query, found in (
            ({"channel": "push"}, [("fH7:Xy", "news")]),
            ({"topic": "news"}, [("ada@example.com", "news"), ("fH7:Xy", "news")]),
            ({"source": "bounce"}, [("bob@example.com", "*")]),
            ({"address": " ADA@"}, [("ada@example.com", "*"), ("ada@example.com", "news")]),
            ({"address": "+49 (0)151"}, [("+4915112345678", "*")]),
            ({"address": "fH7"}, [("fH7:Xy", "news")]),
            ({"address": "nobody"}, []),
            ({"channel": "nonsense"}, []),
        ):
            assert await addresses(client, **query) == found, query
        # a page at a time, also where only some were searched
        every = await addresses(client)
        assert len(every) == 5
        for most in (20_000, 2):
            monkeypatch.setattr(suppressing, "MAX_SCANNED", most)
            path, seen = "/tables/suppressions.json?limit=2", []
            while path:
                answer = (await client.get(path.removeprefix("/console"))).json()
                seen += [(row["address"], row["topic"]) for row in answer["rows"]]
                path = answer["next"]
            assert seen == every
        page = await client.get("/suppressions?source=stop")
        assert "Not found in the part that was searched." in page.text
        assert "the next page continues the search" in page.text


async def test_an_address_is_suppressed_with_the_user_s_name(
    database: str, connection: asyncpg.Connection
) -> None:
    form = {"channel": "email", "address": " Ada@Example.COM", "topic": "news"}
    async with console(database, users=USERS, write=True) as client:
        await log_in(client, "vera")
        page = await client.get("/suppressions")
        assert "Suppress an address…" not in page.text
        assert (await client.get("/suppress")).status_code == 403
        asked = {"token": token(page), **form, "reason": "by phone"}
        assert (await client.post("/suppress", data=asked)).status_code == 403
        client.cookies.clear()
        await log_in(client, "otto")
        assert (await client.post("/suppress", data={**asked, "token": "x"})).status_code == 403
        assert await number_of(connection) == 0
        assert "Write a reason" in (await post(client, "/suppress", **form)).text
        done = await post(client, "/suppress", **form, reason="by phone")
        assert done.status_code == 303, done.text
        row = await connection.fetchrow("SELECT * FROM sequencer.suppressions")
        assert (row["channel"], row["address"], row["topic"]) == (
            "email",
            "ada@example.com",
            "news",
        )
        assert (row["source"], row["reason"]) == ("console", "otto in the console: by phone")
        again = await post(client, "/suppress", **form, reason="by phone")
        assert again.status_code == 409
        assert "already suppressed" in again.text
        # also one that was forgotten
        await connection.execute(
            "INSERT INTO sequencer.suppressions (channel, address) VALUES ('email', $1)",
            hashed("eve@example.com"),
        )
        known = {"channel": "email", "address": "eve@example.com", "topic": "*", "reason": "x"}
        assert (await post(client, "/suppress", **known)).status_code == 409


async def test_invalid_suppressions_are_refused(
    database: str, connection: asyncpg.Connection
) -> None:
    form = {"channel": "email", "address": "a@b.c", "topic": "*", "reason": "x"}
    async with console(database, write=True) as client:
        for fields, words in (
            ({"channel": "E mail"}, "The channel is email, sms"),
            ({"address": ""}, "The address must have 1 to 1,000 bytes"),
            ({"address": "ä" * 501}, "The address must have 1 to 1,000 bytes"),
            ({"topic": "a b"}, "The topic must be *"),
        ):
            refused = await post(client, "/suppress", **{**form, **fields})
            assert refused.status_code == 422
            assert words in refused.text
        assert await number_of(connection) == 0


async def test_an_entry_is_removed_and_recorded(
    logins: dict[str, str], connection: asyncpg.Connection
) -> None:
    await connection.execute(ENTRIES)
    news = {"channel": "email", "address": "Ada@example.com", "topic": "news"}
    every = {**news, "topic": "*"}
    async with console(logins["daemon"], users=USERS, write=True) as client:
        await log_in(client, "vera")
        assert (await client.get("/suppression", params=news)).status_code == 403
        page = await client.get("/suppressions")
        asked = {"token": token(page), **news, "reason": "x", "confirmed": "yes"}
        assert (await client.post("/suppression", data=asked)).status_code == 403
        client.cookies.clear()
        await log_in(client, "otto")
        assert (await client.post("/suppression", data={**asked, "token": "x"})).status_code == 403
        assert await number_of(connection) == 5
        page = await client.get("/suppression", params=news)
        assert "Messages may be sent" not in page.text
        assert "Write a reason" in (await post(client, "/suppression", **news)).text
        done = await post(client, "/suppression", **news, reason="a mistake")
        assert done.status_code == 303, done.text
        assert await addresses(client, address="ada") == [("ada@example.com", "*")]
        assert "/console/suppression?" in (await client.get("/suppressions")).text
        # what the recipient wanted is not undone by the way
        page = await client.get("/suppression", params=every)
        assert "The recipient asked for no more messages." in page.text
        refused = await post(client, "/suppression", **every, reason="asked by phone")
        assert refused.status_code == 422
        assert "despite: unsubscribe" in refused.text
        assert await addresses(client, address="ada") == [("ada@example.com", "*")]
        done = await post(client, "/suppression", **every, reason="asked by phone", confirmed="yes")
        assert done.status_code == 303
        assert await addresses(client, address="ada") == []
        rows = await connection.fetch("SELECT * FROM sequencer.removed_suppressions ORDER BY id")
        assert [(row["address"], row["topic"], row["source"], row["reason"]) for row in rows] == [
            (
                hashed("ada@example.com"),
                "news",
                "application",
                "by login_daemon: otto in the console: a mistake",
            ),
            (
                hashed("ada@example.com"),
                "*",
                "unsubscribe",
                "by login_daemon: otto in the console: asked by phone",
            ),
        ]
        page = await client.get("/suppressions")
        assert "otto in the console: asked by phone" in page.text
        gone = await client.get("/suppression", params=every)
        assert gone.status_code == 404
        assert "This address is not suppressed for email and all topics." in gone.text
        assert (await post(client, "/suppression", **every, reason="x")).status_code == 303


async def test_a_forgotten_address_is_removed_by_its_name(
    database: str, connection: asyncpg.Connection
) -> None:
    await connection.execute(
        "INSERT INTO sequencer.suppressions (channel, address) VALUES ('sms', $1)",
        hashed("+4915112345678"),
    )
    key = {"channel": "sms", "address": "+49 151 12345678", "topic": "*"}
    async with console(database, write=True) as client:
        page = await client.get("/suppression", params=key)
        assert page.status_code == 200
        assert (await post(client, "/suppression", **key, reason="x")).status_code == 303
        assert await number_of(connection) == 0
        address = await connection.fetchval("SELECT address FROM sequencer.removed_suppressions")
        assert address == hashed("+4915112345678")


async def test_masked_addresses_are_not_shown(
    database: str, connection: asyncpg.Connection
) -> None:
    await connection.execute(ENTRIES)
    async with console(database, mask=["data.email"], write=True) as client:
        page = html.unescape((await client.get("/suppressions")).text)
        for address in ("ada@", "bob@", "+49", "fH7"):
            assert address not in page
        assert "550 no such user •••" in page
        assert set(await addresses(client)) == {("•••", "*"), ("•••", "news")}
        assert (await client.get("/tables/suppressions.json?limit=2")).json()["next"] is None
        refused = await client.get("/suppressions?address=ada")
        assert refused.status_code == 422
        assert "Addresses are masked, so they are not searched." in refused.text
        key = {"channel": "push", "address": "fH7:Xy", "topic": "news"}
        done = await post(client, "/suppression", **key, reason="x")
        assert done.status_code == 303
        added = await post(client, "/suppress", **key, reason="x")
        assert "fH7" not in added.headers["location"]
