"""What recipients and Twilio reach, on a real database."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Mapping
from functools import partial
from typing import Any
from urllib.parse import urlencode

import asyncpg
import httpx
import pytest
import structlog
from prometheus_client import CollectorRegistry

from sequencerd.runners.registry import make_links
from sequencerd.runners.suppression_check import hashed
from sequencerd.runners.unsubscribe import Subscription, UnsubscribeLinks
from sequencerd.service.http_server import make_app
from sequencerd.service.page_texts import TEXTS
from sequencerd.service.public import (
    MAX_BODY,
    REASON_OF_UNDO,
    PublicPages,
    ResumedNumber,
    read_hook,
    twilio_signature,
)
from sequencerd.settings import Settings, SmsSettings
from tests.helpers.databases import shard
from tests.service.test_http_server import answers, daemon, free_port

KEY = "k" * 32
HOOK = "https://mail.example.com/hooks/twilio"
SETTINGS: dict[str, Any] = {
    "unsubscribe": {"url": "https://mail.example.com", "keys": [KEY]},
    "sms": {"account_sid": "AC1", "auth_token": "12345", "hook_url": HOOK},
}
ADA = Subscription("email", "Ada@X.org", "news", "en")
ENTRIES = "SELECT channel, address, topic, source FROM sequencer.suppressions ORDER BY 1, 2, 3"
AWAY = "postgresql://127.0.0.1:1/app"


def path(subscription: Subscription, key: str = KEY) -> str:
    return UnsubscribeLinks("", [key]).link(subscription)


def client(url: str, settings: Mapping[str, Any] = SETTINGS) -> httpx.AsyncClient:
    made = Settings.model_validate(settings)
    app = PublicPages([shard(url)], lambda: made, structlog.get_logger()).app()
    return httpx.AsyncClient(
        transport=httpx.ASGITransport(app), base_url="https://mail.example.com"
    )


@pytest.fixture
async def web(database: str) -> AsyncIterator[httpx.AsyncClient]:
    async with client(database) as made:
        yield made


async def entries(connection: asyncpg.Connection) -> list[tuple[str, ...]]:
    return [tuple(row) for row in await connection.fetch(ENTRIES)]


async def removed(connection: asyncpg.Connection) -> list[tuple[str, ...]]:
    rows = await connection.fetch(
        "SELECT channel, address, topic, reason FROM sequencer.removed_suppressions ORDER BY id"
    )
    return [tuple(row) for row in rows]


async def test_a_get_changes_nothing_and_a_post_unsubscribes(
    web: httpx.AsyncClient, connection: asyncpg.Connection
) -> None:
    await connection.execute(
        "INSERT INTO sequencer.topics (name, title) VALUES ('news', 'Offers & <news>')"
    )
    for method in ("GET", "HEAD"):  # as mail scanners do
        shown = await web.request(method, path(ADA))
        assert shown.status_code == 200
    assert await entries(connection) == []
    page = (await web.get(path(ADA))).text
    assert "Offers &amp; &lt;news&gt;" in page
    assert "Ada@X.org" in page
    assert re.findall(r'value="(\w+)"', page) == ["this", "all"]
    done = await web.post(path(ADA), data={"choice": "this"})
    assert "no longer receive “Offers &amp; &lt;news&gt;”" in done.text
    assert await entries(connection) == [("email", "ada@x.org", "news", "unsubscribe")]


@pytest.mark.parametrize(
    "request_",
    [
        {"data": {"List-Unsubscribe": "One-Click"}},
        {"files": {"List-Unsubscribe": (None, b"One-Click")}},
        {"content": b"List-Unsubscribe=One-Click" + b"&x=1" * 1000},
        {"content": b"\xff=%ff&&;=&List-Unsubscribe"},
        {},
    ],
)
async def test_one_click_suppresses_the_address_once(
    web: httpx.AsyncClient, connection: asyncpg.Connection, request_: dict[str, Any]
) -> None:
    for _ in range(2):
        assert (await web.post(path(ADA), **request_)).status_code == 200
    assert await entries(connection) == [("email", "ada@x.org", "news", "unsubscribe")]


async def test_unsubscribing_from_all_messages_and_back(
    web: httpx.AsyncClient, connection: asyncpg.Connection
) -> None:
    await connection.execute(
        "INSERT INTO sequencer.suppressions (channel, address, source) VALUES"
        " ('sms', 'ada@x.org', 'unsubscribe'), ('email', 'bob@x.org', 'unsubscribe')"
    )
    others = await entries(connection)
    done = await web.post(path(ADA), data={"choice": "all"})
    assert "any messages" in done.text
    assert ("email", "ada@x.org", "*", "unsubscribe") in await entries(connection)
    undone = await web.post(path(ADA), data={"choice": "undo"})
    assert "will receive messages again" in undone.text
    assert await entries(connection) == others
    assert await removed(connection) == [
        ("email", hashed("ada@x.org"), "*", f"by postgres: {REASON_OF_UNDO}")
    ]
    # one of another source stays, and the page says so
    await connection.execute(
        "INSERT INTO sequencer.suppressions (channel, address, topic, source)"
        " VALUES ('email', 'ada@x.org', 'news', 'bounce')"
    )
    undone = await web.post(path(ADA), data={"choice": "undo"})
    assert "will no longer receive “news”" in undone.text


async def test_a_token_is_for_its_channel_and_topic_alone(
    web: httpx.AsyncClient, connection: asyncpg.Connection
) -> None:
    assert 'value="this"' not in (await web.get(path(ADA._replace(topic="*")))).text
    await web.post(path(Subscription("sms", "+49 151 123456", "news")))
    await web.post(path(ADA._replace(topic="*")))
    await web.post(path(ADA._replace(address='"a..b"@x.org')))
    assert await entries(connection) == [
        ("email", "a..b@x.org", "news", "unsubscribe"),
        ("email", "ada@x.org", "*", "unsubscribe"),
        ("sms", "+49151123456", "news", "unsubscribe"),
    ]


@pytest.mark.parametrize("behind", ["/", "%2F", "&utm_source=mail", "?utm_source=mail"])
async def test_what_others_add_to_a_link_does_not_matter(
    web: httpx.AsyncClient, connection: asyncpg.Connection, behind: str
) -> None:
    """A mail program follows no redirect of its one click."""
    assert (await web.get(path(ADA) + behind)).status_code == 200
    assert (await web.post(path(ADA) + behind)).status_code == 200
    assert await entries(connection) == [("email", "ada@x.org", "news", "unsubscribe")]


async def test_invalid_requests_change_nothing(
    web: httpx.AsyncClient, connection: asyncpg.Connection
) -> None:
    good = path(ADA)
    for wrong in (good[:-2], good[:20] + "x" + good[21:], path(ADA, "x" * 32), "/unsubscribe/x"):
        for method in ("GET", "POST"):
            answer = await web.request(method, wrong)
            assert answer.status_code == 404
            assert "not valid" in answer.text
    assert (await web.post(good, content=b"x" * (MAX_BODY + 1))).status_code == 413
    assert (await web.put(good)).status_code == 405
    assert await entries(connection) == []


async def test_no_script_runs_in_the_page(web: httpx.AsyncClient) -> None:
    evil = ADA._replace(address="<script>alert(1)</script>", topic="n")
    page = await web.get(path(evil))
    assert "<script" not in page.text
    rules = page.headers["Content-Security-Policy"]
    assert "default-src 'none'" in rules
    assert "script-src" not in rules
    assert page.headers["Referrer-Policy"] == "no-referrer"
    assert page.headers["Cache-Control"] == "no-store"


@pytest.mark.parametrize(
    ("language", "accepted", "title"),
    [
        ("de-AT", "fr", "de"),
        ("", "xx, fr-CA;q=0.8", "fr"),
        ("xx", "", "en"),
        ("", "en, de", "en"),
        ("PT_BR", "", "pt"),
        ("", "*" * 5000, "en"),
    ],
)
async def test_the_page_is_in_the_language_of_the_recipient(
    web: httpx.AsyncClient, language: str, accepted: str, title: str
) -> None:
    link = path(ADA._replace(topic="*", language=language))
    page = (await web.get(link, headers={"Accept-Language": accepted})).text
    assert f"<title>{TEXTS[title].title}</title>".replace("'", "&#x27;") in page
    assert f'<html lang="{title}">' in page


@pytest.mark.parametrize("language", TEXTS)
def test_every_language_has_all_texts(language: str) -> None:
    for name, text in TEXTS[language]._asdict().items():
        english = getattr(TEXTS["en"], name)
        assert set(re.findall(r"{\w*}", text)) == set(re.findall(r"{\w*}", english)), name


async def test_requests_are_retried_while_the_database_is_away(database: str) -> None:
    form = urlencode({"From": "+49151123456", "Body": "STOP"})
    async with client(AWAY) as web:
        signed = {"X-Twilio-Signature": sign({"From": "+49151123456", "Body": "STOP"})}
        found = [
            await web.get(path(ADA)),
            await web.post(path(ADA)),
            await web.post("/hooks/twilio", content=form, headers=signed),
        ]
    for answer in found:
        assert answer.status_code == 503
        assert int(answer.headers["Retry-After"]) > 0


async def test_nothing_else_is_reachable(database: str) -> None:
    async with client(database) as web:
        for other in ("/", "/metrics", "/healthz", "/console/", "/hooks", "/unsubscribe/"):
            assert (await web.get(other)).status_code == 404, other
    async with client(database, {}) as web:  # without the settings, nothing at all is
        assert (await web.get(path(ADA))).status_code == 404
        assert (await web.post("/hooks/twilio")).status_code == 404


async def test_public_pages_without_an_own_listener(database: str) -> None:
    made = Settings.model_validate(SETTINGS)
    public = PublicPages([shard(database)], lambda: made, structlog.get_logger())
    app = make_app(list, list, CollectorRegistry(), None, public.routes)
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://x") as web:
        assert (await web.get(path(ADA._replace(topic="*")))).status_code == 200
        assert (await web.get("/healthz")).status_code == 200


@pytest.mark.slow
async def test_a_listener_of_its_own_serves_nothing_else(
    database: str, connection: asyncpg.Connection
) -> None:
    port = free_port()
    link = path(ADA._replace(topic="*"))
    async with (
        daemon(
            database,
            SEQUENCERD_HTTP_PUBLIC_LISTEN=f"127.0.0.1:{port}",
            SEQUENCERD_UNSUBSCRIBE_URL="https://mail.example.com",
            SEQUENCERD_UNSUBSCRIBE_KEYS=f"{'n' * 32} {KEY}",
        ) as operators,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60) as web,
    ):
        await answers(operators, "/readyz", lambda answer: answer.status_code == 200)
        assert (await web.get("/metrics")).status_code == 404
        assert (await web.get("/console/")).status_code == 404
        assert (await web.head(link)).status_code == 200
        assert (await operators.get(link)).status_code == 404
        assert (await web.post(link)).status_code == 200
    assert await entries(connection) == [("email", "ada@x.org", "*", "unsubscribe")]


def test_the_links_are_those_of_the_settings() -> None:
    links = make_links(Settings.model_validate(SETTINGS))
    assert links is not None
    assert links.link(ADA) == "https://mail.example.com" + path(ADA)


# --- Twilio


def sign(form: Mapping[str, str]) -> str:
    return twilio_signature("12345", HOOK, form.items())


def test_the_signature_of_twilios_documentation() -> None:
    form = {
        "CallSid": "CA1234567890ABCDE",
        "Caller": "+14158675309",
        "Digits": "1234",
        "From": "+14158675309",
        "To": "+18005551212",
    }
    url = "https://mycompany.com/myapp.php?foo=1&bar=2"
    assert twilio_signature("12345", url, form.items()) == "RSOYDt4T1cUTdK1PDd93/VVr8B8="


async def test_stop_and_start(web: httpx.AsyncClient, connection: asyncpg.Connection) -> None:
    await connection.execute(
        "INSERT INTO sequencer.suppressions (channel, address, topic) VALUES ('sms', '+491', 'x')"
    )
    before = await entries(connection)

    async def post(body: str) -> httpx.Response:
        form = {"From": "+491", "To": "+4930", "Body": body, "MessageSid": "SM1"}
        return await web.post(
            "/hooks/twilio", data=form, headers={"X-Twilio-Signature": sign(form)}
        )

    answer = await post(" Stop. ")
    assert answer.status_code == 200
    assert answer.text == "<Response/>"
    assert await entries(connection) == [("sms", "+491", "*", "stop"), *before]
    await post("please stop it")
    await post("start")
    assert await entries(connection) == before
    await post("start")
    answered = "by postgres: the recipient answered START"
    assert await removed(connection) == [("sms", hashed("+491"), "*", answered)]


@pytest.mark.parametrize(
    ("hook", "signed"),
    [
        ("https://mail.example.com/hooks/twilio", "https://mail.example.com:443/hooks/twilio"),
        ("https://mail.example.com:443/hooks/twilio", "https://mail.example.com/hooks/twilio"),
        ("https://mail.example.com:8443/hooks/twilio", "https://mail.example.com/hooks/twilio"),
        (
            "https://u:p@mail.example.com/hooks/twilio?a=b",
            "https://u:p@mail.example.com:443/hooks/twilio?a=b",
        ),
        ("http://[2001:db8::1]/hooks/twilio", "http://[2001:db8::1]:80/hooks/twilio"),
    ],
)
async def test_twilio_may_sign_a_url_with_and_without_its_port(
    database: str, hook: str, signed: str
) -> None:
    form = {"From": "+491", "Body": "hello"}
    settings = {**SETTINGS, "sms": {**SETTINGS["sms"], "hook_url": hook}}
    async with client(database, settings) as web:
        for url, status in ((hook, 200), (signed, 200), (hook + "x", 403)):
            headers = {"X-Twilio-Signature": twilio_signature("12345", url, form.items())}
            answer = await web.post("/hooks/twilio", data=form, headers=headers)
            assert answer.status_code == status, url


async def test_a_hook_that_twilio_did_not_sign(
    web: httpx.AsyncClient, connection: asyncpg.Connection
) -> None:
    form = {"From": "+491", "Body": "STOP"}
    for signature in ("", "x", "\u00fc", sign({**form, "From": "+492"})):
        sent = {b"X-Twilio-Signature": signature.encode()}
        assert (await web.post("/hooks/twilio", data=form, headers=sent)).status_code == 403
    assert (await web.post("/hooks/twilio", data=form)).status_code == 403
    assert (await web.post("/hooks/twilio", content=b"x" * (MAX_BODY + 1))).status_code == 413
    assert await entries(connection) == []


@pytest.mark.parametrize(
    ("form", "source"),
    [
        ({"MessageStatus": "undelivered", "ErrorCode": "30005"}, "refused"),
        ({"MessageStatus": "failed", "ErrorCode": "30006"}, "refused"),
        ({"MessageStatus": "failed", "ErrorCode": "21610"}, "stop"),
        ({"MessageStatus": "failed", "ErrorCode": "30007"}, None),
        ({"MessageStatus": "failed"}, None),
        ({"MessageStatus": "failed", "ErrorCode": "9" * 5000}, None),
        ({"MessageStatus": "delivered", "ErrorCode": "30005"}, None),
        ({"SmsStatus": "undelivered", "ErrorCode": "30005"}, "refused"),
        ({"SmsStatus": "received", "Body": "STOP"}, "stop"),
        ({"Body": "stopp"}, None),
        ({"Body": " Stop . "}, "stop"),
        ({"Body": "\u00a0StopAll!\n"}, "stop"),
        ({"Body": "stop stop"}, None),
        ({"Body": "QUIT", "OptOutType": "STOP"}, "stop"),
        ({"Body": "Hilfe", "OptOutType": "HELP"}, None),
        ({"Body": "STOP", "From": ""}, None),
    ],
)
def test_hooks_report_their_changes(form: dict[str, str], source: str | None) -> None:
    read = partial(read_hook, {"From": "+491", "To": "+492", **form})
    found = read(SmsSettings())
    assert not isinstance(found, ResumedNumber)
    assert (found and found.source) == source
    if found is not None:
        assert found.address == (
            "+492" if source == "refused" or "MessageStatus" in form else "+491"
        )
    if source == "refused":
        assert read(SmsSettings(suppress_bounces=False)) is None
