"""A message as it will be received, and a test of it, over a real mail server."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from pathlib import Path

import asyncpg

from sequencerd.runners import Runner
from tests.console.conftest import console, fixture, token
from tests.console.test_enrollment_form import hidden
from tests.console.test_pages import check
from tests.helpers.engines import Recorder, define, enroll
from tests.helpers.runners import email_runner, sms_runner
from tests.helpers.servers import HOST, Answer, Request, http_server, smtp_server

TEMPLATES = Path("sequencerd/console/templates")
LETTER = json.dumps(
    {
        "from": "us@example.com",
        "to": "{{data.email}}",
        "subject": "Hello {{data.name}}",
        "html": '<style>p { color: red }</style><p>Dear {{data.name}}<img src="http://x.test/p.gif">'
        "<script>alert(1)</script></p>",
        "text": "Dear {{data.name}}",
    }
)
DATA = '{"email": "ada@example.com", "name": "Ada"}'
PATH = "/message?sequence=s&step=letter"


def _runners(port: int = 9) -> Mapping[str, Runner]:
    return {"Email": email_runner(f"smtp://{HOST}:{port}"), "Note": Recorder()}


@fixture
async def letter(connection: asyncpg.Connection) -> int:
    """An enrollment that waits before a letter. Its id."""
    day = '{"amount": 1, "unit": "day"}'
    await define(
        connection,
        "s",
        ("wait", "WaitForDuration", day, "letter"),
        ("letter", "Email", LETTER, "note"),
        ("note", "Note", "{}", None),
    )
    return await enroll(connection, "s", "ada", DATA)


async def test_a_message_as_it_will_be_received(database: str, letter: int) -> None:
    async with console(database, _runners(), own=_runners, write=False) as client:
        page = await client.get(f"{PATH}&enrollment={letter}")
        text = check(page)
        assert page.status_code == 200
        assert "Hello Ada" in text
        assert "ada@example.com" in text
        assert "Dear Ada" in text
        assert "Message-ID" in text
        assert "Send a test" not in text
        assert "script-src 'self'" in page.headers["content-security-policy"]
        assert "frame-src 'self'" in page.headers["content-security-policy"]
        frame = await client.get(f"/message/frame?sequence=s&step=letter&enrollment={letter}")
        assert "<p>Dear Ada" in frame.text
        policy = frame.headers["content-security-policy"]
        assert policy.startswith("sandbox; default-src 'none'")
        assert "script-src" not in policy
        # of the enrollment that is there, if none is named
        assert "Hello Ada" in check(await client.get(PATH))
        data = {"data": '{"email": "bob@example.com", "name": "<b>Bob"}'}
        assert "Hello <b>Bob" in check(await client.get(PATH, params={**_given(), **data}))


def _given() -> dict[str, str]:
    return {"sequence": "s", "step": "letter"}


async def test_a_message_that_cannot_be_shown(database: str, letter: int) -> None:
    async with console(database, _runners(), own=_runners) as client:
        for query, status, words in (
            ({"enrollment": "999"}, 404, "Enrollment 999 does not exist"),
            ({"enrollment": "x"}, 422, "not a number"),
            ({"data": "{"}, 422, "Data is not JSON"),
            ({"data": "{}"}, 422, "cannot be sent: to"),
            ({"step": "nowhere"}, 404, "no step nowhere"),
            ({"step": "wait"}, 422, "sends no message"),
            ({"step": "note"}, 422, "sends no message"),
            ({"sequence": "nothing"}, 404, "no sequence nothing"),
        ):
            page = await client.get("/message", params={**_given(), **query})
            assert page.status_code == status, query
            assert words in check(page), query
            frame = await client.get("/message/frame", params={"data": "{}", **_given(), **query})
            assert frame.status_code in (404, 422), query


async def test_a_masked_message(database: str, letter: int) -> None:
    mask = ["data.name", "data.email"]
    async with console(database, _runners(), own=_runners, mask=mask) as client:
        page = check(await client.get(f"{PATH}&enrollment={letter}"))
        assert "Hello •••" in page
        frame = await client.get(f"/message/frame?sequence=s&step=letter&enrollment={letter}")
        assert frame.status_code == 200
        for text in (page, frame.text):
            assert "Ada" not in text
            assert "ada@" not in text


async def test_a_test_is_sent(database: str, letter: int) -> None:
    async with smtp_server() as mailbox:

        def own() -> Mapping[str, Runner]:
            return _runners(mailbox.port)

        async with console(database, _runners(), own=own, write=True) as client:
            page = await client.get(f"{PATH}&enrollment={letter}")
            form = {**_given(), "enrollment": str(letter), "token": token(page)}
            refused = await client.post("/message/test", data={**form, "address": "me"})
            assert refused.status_code == 422
            assert "is not an address" in check(refused)
            refused = await client.post("/message/test", data=form)
            assert "Write the address" in check(refused)
            forged = await client.post("/message/test", data={**form, "token": "x"})
            assert forged.status_code == 403
            assert mailbox.messages == []
            form |= {"address": "me@example.com", "once": hidden(page, "once")}
            both = await asyncio.gather(
                *(client.post("/message/test", data=form) for _ in range(2))
            )
            again = await client.post("/message/test", data=form)
            [url] = {answer.headers["location"] for answer in (*both, again)}
            sent = await client.get(url.removeprefix("/console"))
            assert "Test sent to me@example.com" in check(sent)
            assert 'required value="me@example.com"' in sent.text
            assert len(mailbox.messages) == 1  # after a double click, and a reload
            message = mailbox.parsed()
            assert message["Subject"] == "[Test] Hello Ada"
            assert message["To"] == "me@example.com"


def test_forms_that_are_sent_twice_are_recognised() -> None:
    begin_or_end_sessions = {"base.html", "login.html", "sessions.html"}
    repeat_a_form = {"unsent.html"}  # with its fields
    for template in TEMPLATES.glob("*.html"):
        text = template.read_text()
        if 'method="post"' in text and template.name not in begin_or_end_sessions | repeat_a_form:
            assert 'name="once"' in text, template


async def test_an_sms_keeps_its_letters(database: str, connection: asyncpg.Connection) -> None:
    message = {"from": "+15005550006", "to": "{{data.phone}}", "message": "Gruß, {{data.name}}"}
    await define(connection, "s", ("sms", "SMS", json.dumps(message), None))
    data = json.dumps({"phone": "+4915112345678", "name": "Zoë 王"})

    def runners() -> Mapping[str, Runner]:
        return {"SMS": sms_runner()}

    async with console(database, runners(), own=runners) as client:
        page = await client.get("/message", params={"sequence": "s", "step": "sms", "data": data})
        assert "Gruß, Zoë 王" in check(page)


async def test_a_test_shows_no_secret(database: str, connection: asyncpg.Connection) -> None:
    """A server repeats the login that it was sent, also decoded, and what another was sent."""
    message = {"from": "+15005550006", "to": "{{data.phone}}", "message": "Hi"}
    await define(connection, "s", ("sms", "SMS", json.dumps(message), None))
    status = 201

    async def echo(request: Request) -> Answer:
        said = f"{request.headers['authorization']}, the-token, mail-passw0rd"
        return Answer(status, json.dumps({"sid": said, "message": said}).encode())

    others = {
        "email": {"url": "smtp://ada:mail-passw0rd@localhost"},
        "sms": {"account_sid": "AC0", "auth_token": "the-token"},
    }
    async with http_server(echo) as server:

        def own() -> Mapping[str, Runner]:
            return {"SMS": sms_runner(base_url=server.url)}

        async with console(database, own(), own=own, others=others, write=True) as client:
            form = {"sequence": "s", "step": "sms", "data": '{"phone": "+14155550100"}'}
            page = await client.get("/message", params=form)
            form |= {"address": "+14155550101", "token": token(page)}
            sent = await client.post("/message/test", data=form, follow_redirects=True)
            status = 400
            refused = await client.post("/message/test", data=form)
    for answer in (sent, refused):
        assert "Basic ***, ***, ***" in check(answer)


async def test_a_test_needs_write(database: str, letter: int) -> None:
    async with console(database, _runners(), own=_runners) as client:
        form = {**_given(), "enrollment": str(letter), "address": "me@example.com"}
        refused = await client.post("/message/test", data={**form, "token": "x"})
        assert refused.status_code == 403


async def test_data_that_cannot_be_read_is_reported(
    connection: asyncpg.Connection, database: str, letter: int
) -> None:
    """As it would fail the enrollment."""
    deep = await enroll(connection, "s", "bob", '{"a": ' + "[" * 5000 + "]" * 5000 + "}")
    async with console(database, _runners(), own=_runners) as client:
        for page in (f"{PATH}&enrollment={deep}", f"/simulate?enrollment={deep}"):
            found = await client.get(page)
            assert "data cannot be read" in check(found).lower()
            assert found.status_code in (200, 422)
