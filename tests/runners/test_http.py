"""Custom runners by HTTP against a real server with faults by request."""

from __future__ import annotations

import asyncio
import base64
import gzip
import hashlib
import hmac
import json
import math
import socket
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from ipaddress import ip_address
from typing import Any

import httpx
import pytest

from sequencerd.core.faults import DefinitionError
from sequencerd.core.model import Action
from sequencerd.core.task import Answer, Result
from sequencerd.core.view import View
from sequencerd.runners import http_client
from sequencerd.runners.http import BatchRunner
from sequencerd.runners.http_client import MAX_ANSWER, HttpClient
from sequencerd.runners.public_addresses import is_public
from tests.helpers import servers
from tests.helpers.runners import failed, http_runner
from tests.helpers.servers import (
    HOST,
    KEY,
    HttpServer,
    Request,
    all_next,
    http_server,
    no_descriptors,
    not_accepting,
    serving,
    task,
)

SECRET = "whsec_" + base64.b64encode(b"a key of some bytes").decode()


def fixed(answer: servers.Answer | Sequence[Any]) -> Any:
    """What answers always the same: an answer, or a list as JSON."""
    made = answer
    if not isinstance(answer, servers.Answer):
        made = servers.Answer(body=json.dumps(answer).encode())

    async def respond(_: Request) -> Any:
        return made

    return respond


@asynccontextmanager
async def runner(server: HttpServer, **options: Any) -> AsyncIterator[BatchRunner]:
    """A runner for this server, closed at the end."""
    made = http_runner(f"{server.url}/crm", **options)
    try:
        yield made
    finally:
        await made.close()


async def run(answer: servers.Answer | Sequence[Any], *ids: int, **options: Any) -> list[Result]:
    """The results for a server that answers always the same."""
    async with http_server(fixed(answer)) as server, runner(server, **options) as made:
        tasks = [task(id_) for id_ in ids or (7,)]
        return list(await made.run(made.compile({}), tasks))


async def test_a_call_searches_for_no_module(monkeypatch: pytest.MonkeyPatch) -> None:
    """A search that finds nothing is repeated with each import, and takes longer than all else."""
    searched: list[str] = []

    class Finder:
        def find_spec(self, name: str, *_: object) -> None:
            searched.append(name)

    async with http_server(all_next) as server, runner(server) as made:
        program = made.compile({})
        await made.run(program, [task()])
        monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])
        await made.run(program, [task()])
    assert searched == []


async def test_numbers_are_sent_as_postgresql_has_them() -> None:
    data = '{"sum": 1.10, "id": 12345678901234567890123, "tiny": 0.1000000000000000055}'
    view = View.of({**task(7).view, "external": {}, "data": json.loads(data)}, data)
    async with http_server(all_next) as server, runner(server) as made:
        await made.run(made.compile({}), [task(7)._replace(view=view)])
    assert data.encode() in server.requests[0].body
    assert json.loads(server.requests[0].body)["runners"][0]["idempotencyKey"] == KEY


async def test_the_event_and_its_headers() -> None:
    async with (
        http_server(all_next) as server,
        runner(server, secret=SECRET, headers={"Authorization": "Bearer x"}) as made,
    ):
        program = made.compile({"list": "news", "nested": {"ü": [1, None]}})
        one = await made.run(program, [task(7, email="ada@example.com")])
        two = await made.run(program, [task(7), task(8)])
        await made.run(program, [task(7), task(8)])
    assert list(one) == [Answer()]
    assert list(two) == [Answer(), Answer()]
    first, second, third = server.requests
    assert server.connections == 1
    assert first.target == "/crm"
    assert first.headers["host"] == server.url.removeprefix("http://")
    assert first.headers["authorization"] == "Bearer x"
    assert first.headers["content-type"] == "application/json"
    event = json.loads(first.body)
    assert event["config"] == {"list": "news", "nested": {"ü": [1, None]}}
    assert event["runners"] == [
        {**task(7, email="ada@example.com").view, "idempotencyKey": KEY},
    ]
    assert first.headers["idempotency-key"] == first.headers["webhook-id"] == KEY
    assert second.headers["idempotency-key"] == third.headers["idempotency-key"]
    assert second.headers["idempotency-key"].startswith("batch_")
    stamp = first.headers["webhook-timestamp"]
    assert abs(int(stamp) - datetime.now(UTC).timestamp()) < 60
    signed = f"{KEY}.".encode() + stamp.encode() + b"." + first.body
    digest = hmac.new(b"a key of some bytes", signed, hashlib.sha256).digest()
    assert first.headers["webhook-signature"] == "v1," + base64.b64encode(digest).decode()


async def test_every_kind_of_answer() -> None:
    results = await run(
        [
            {"id": 1, "action": "altNext", "message": "no\nway\x00", "more": 1},
            {"id": "2", "action": "noop", "retryAfter": 90},
            {"id": 3, "action": "noop", "wakeAt": "2030-01-01T09:00:00+01:00", "data": {"a": [1]}},
            {"id": 4, "action": "next", "message": None, "data": None},
        ],
        *(1, 2, 3, 4),
    )
    assert results == [
        Answer(Action.ALT_NEXT, "no way"),
        Answer(Action.NOOP, retry_after=timedelta(seconds=90)),
        Answer(Action.NOOP, data={"a": [1]}, wake_at=datetime(2030, 1, 1, 8, tzinfo=UTC)),
        Answer(),
    ]


async def test_a_wait_may_have_more_digits_than_a_float() -> None:
    body = b'[{"id": 7, "action": "noop", "retryAfter": 90.50000000000000000001}]'
    (result,) = await run(servers.Answer(200, body))
    assert result == Answer(Action.NOOP, retry_after=timedelta(seconds=90.5))


@pytest.mark.parametrize(
    ("item", "says"),
    [
        ({}, "answered nothing for the id 7"),
        ({"id": 9, "action": "next"}, "answered nothing for the id 7"),
        ({"id": None, "action": "next"}, "answered nothing for the id 7"),
        ("next", "answered nothing for the id 7"),
        ({"id": 7}, "answered no action for the id 7"),
        ({"id": 7, "action": "jump"}, "action: "),
        ({"id": 7, "action": ["next"]}, "action: "),
        ({"id": 7, "action": "next", "message": 5}, "message: "),
        ({"id": 7, "action": "noop", "retryAfter": "soon"}, "retryAfter: "),
        ({"id": 7, "action": "noop", "retryAfter": -1}, "retryAfter: "),
        ({"id": 7, "action": "noop", "retryAfter": 1e300}, "retryAfter: "),
        ({"id": 7, "action": "noop", "retryAfter": math.inf}, "retryAfter: "),
        ({"id": 7, "action": "noop", "wakeAt": "tomorrow"}, "wakeAt: "),
        ({"id": 7, "action": "noop", "wakeAt": 1893456000}, "wakeAt: "),
        ({"id": 7, "action": "noop", "wakeAt": "2030-01-01T09:00:00"}, "wakeAt: write the offset"),
        ({"id": 7, "action": "noop", "wakeAt": "0001-01-01T00:00:00+23:59"}, "wakeAt: "),
        ({"id": 7, "action": "next", "data": [1]}, "data: "),
        ({"id": 7, "action": "next", "data": {"a": "\x00"}}, "data: "),
        ({"id": 7, "action": "next", "data": {"a": "\ud800"}}, "data: "),
        ({"id": 7, "action": "next", "data": {"a": math.inf}}, "data: "),
    ],
)
async def test_a_bad_item_concerns_its_enrollment_only(item: Any, says: str) -> None:
    results = await run([item, {"id": 8, "action": "next"}], 7, 8)
    bad = failed(results[0])
    assert (bad.permanent, bad.fault) == (False, "enrollment")
    assert says in bad.message
    assert results[1] == Answer()


async def test_secret_parts_of_the_url_are_not_repeated_in_messages() -> None:
    """As by Express: "Cannot POST /hooks/...?key=..."."""
    path = "/hooks/a1b2c3d4e5f6a7b8c9/customers?key=Url5ecret%2FKey&mode=live"
    body = b"Cannot POST " + path.encode() + b", key Url5ecret/Key"
    async with http_server(fixed(servers.Answer(404, body=body))) as server:
        made = http_runner(f"{server.url}{path}")
        (result,) = await made.run(made.compile({}), [task(7)])
        await made.close()
    assert failed(result).message == (
        "Crm answered 404 Cannot POST /hooks/***/customers?key=***&mode=live, key ***"
    )


async def test_secret_parts_of_the_url_are_not_repeated_from_what_is_not_http() -> None:
    async def echo(request: servers.Request) -> servers.Answer:
        return servers.Answer(raw=f"unknown command {request.target}\r\n\r\n".encode())

    async with http_server(echo) as server:
        made = http_runner(f"{server.url}/?key=Url5ecret%2FKey")
        (result,) = await made.run(made.compile({}), [task(7)])
        await made.close()
    assert "unknown command" in failed(result).message
    assert "Url5ecret" not in failed(result).message


async def test_an_answer_that_repeats_the_url_is_used_without_its_secrets() -> None:
    items = [
        {"id": 7, "action": "next", "message": "POST /?key=Url5ecret%2FKey, by ada:passw0rd"},
        {"id": "Url5ecret/Key", "action": "next"},
    ]
    async with http_server(fixed(items)) as server:
        url = server.url.replace("//", "//ada:passw0rd@")
        made = http_runner(f"{url}/?key=Url5ecret%2FKey")
        results = await made.run(made.compile({}), [task(7), task(8)])
        await made.close()
    assert results[0] == Answer(message="POST /?key=***, by ada:***")
    assert failed(results[1]).message.endswith("ids received: 7, ***")


async def test_an_id_that_comes_twice() -> None:
    twice = [{"id": 7, "action": "next"}, {"id": 7, "action": "noop"}, {"id": 8, "action": "next"}]
    results = await run(twice, 7, 8)
    assert "2 times for the id 7" in failed(results[0]).message
    assert results[1] == Answer()


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "not answer with a JSON list"),
        (
            b"<html>hello</html>",
            "not answer with a JSON list (Expecting value: line 1 column 1 (char 0)): <html>hello",
        ),
        (b'{"id": 7, "action": "next"}', 'not answer with a JSON list: {"id": 7, "action": "next"'),
        (b"[" * 100_000, "not answer with a JSON list"),
        (b"\xff\xfe\x00", "not answer with a JSON list"),
        (b"[1" + b"0" * 5000 + b"]", "not answer with a JSON list (Exceeds the limit"),
        (b" " * (MAX_ANSWER + 1), "more than"),
    ],
)
async def test_a_body_that_cannot_be_used(body: bytes, says: str) -> None:
    results = await run(servers.Answer(body=body), 7, 8)
    assert [failed(result).permanent for result in results] == [False, False]
    assert all(says in failed(result).message for result in results)


@pytest.mark.parametrize(
    ("status", "permanent", "fault"),
    [
        (301, False, "server"),
        (307, False, "server"),
        (400, True, "enrollment"),
        (401, False, "server"),
        (402, False, "server"),
        (403, False, "server"),
        (404, True, "enrollment"),
        (405, False, "server"),
        (407, False, "server"),
        (308, False, "server"),
        (408, False, "unclear"),
        (409, False, "enrollment"),
        (413, True, "enrollment"),
        (421, False, "server"),
        (423, False, "enrollment"),
        (425, False, "enrollment"),
        (426, False, "server"),
        (429, False, "server"),
        (500, False, "unclear"),
        (503, False, "unclear"),
    ],
)
async def test_a_failure_is_attributed_by_its_status(
    status: int, permanent: bool, fault: str
) -> None:
    answer = servers.Answer(status, b"the reason", {"Location": "http://169.254.169.254/"})
    for result in await run(answer, 7, 8):
        bad = failed(result)
        assert (bad.permanent, bad.fault) == (permanent, fault)
        assert bad.message == f"Crm answered {status} the reason"


@pytest.mark.parametrize(
    ("status", "unknown"),
    [
        *((status, True) for status in (502, 504, 520, 522, 524, 598, 599)),
        *((status, False) for status in (500, 503, 521, 523, 525, 530)),
    ],
)
async def test_a_gateway_may_have_passed_on_the_call(status: int, unknown: bool) -> None:
    """It got no answer, unlike one that could not connect (521, 523, 525, 530)."""
    (result,) = await run(servers.Answer(status))
    assert (failed(result).fault, failed(result).unknown) == ("unclear", unknown)


@pytest.mark.parametrize(
    ("head", "body", "says"),
    [
        (b"429 X\r\nContent-Length: 500", b"slow down", "Crm answered 429 slow down"),
        (b"429 X\r\nTransfer-Encoding: chunked", b"5\r\nsl", "Crm answered 429 sl"),
        (
            b"429 X\r\nContent-Encoding: br\r\nContent-Length: 3",
            b"\x0b\x02\x80",
            "Crm answered 429",
        ),
        (
            b"429 X\r\nContent-Encoding: gzip",
            gzip.compress(b"slow", mtime=0)[:9],
            "Crm answered 429",
        ),
        (
            b"429 X\r\nConnection: close",
            b"x" * (MAX_ANSWER + 1),
            f"Crm answered 429 {'x' * 200}...",
        ),
    ],
)
async def test_a_refusal_counts_although_its_body_cannot_be_read(
    head: bytes, body: bytes, says: str
) -> None:
    raw = b"HTTP/1.1 " + head + b"\r\nRetry-After: 30\r\n\r\n" + body
    bad = failed((await run(servers.Answer(raw=raw)))[0])
    assert (bad.fault, bad.retry_after, bad.unknown) == ("server", timedelta(seconds=30), False)
    assert bad.message == says


async def test_a_refusal_counts_although_its_body_does_not_end() -> None:
    chunk = servers.Answer(400, b"a\r\nthe reason\r\n", {"Transfer-Encoding": "chunked"})
    bad = failed((await run(chunk, timeout=2))[0])
    assert (bad.permanent, bad.message) == (True, "Crm answered 400 the reason")


@pytest.mark.parametrize(
    "location",
    [
        "http://[::1",
        "http://crm.example.com:port/",
        "mailto:ops@example.com",
        "javascript:alert(1)",
        "/moved\x01",
        "/" + "a" * 70_000,
    ],
)
async def test_a_redirect_counts_although_it_leads_nowhere(location: str) -> None:
    bad = failed((await run(servers.Answer(302, b"", {"Location": location})))[0])
    assert (bad.fault, bad.cause, bad.unknown) == ("server", "refused", False)
    assert bad.message == "Crm answered 302"


@pytest.mark.parametrize(
    "fields",
    ["Retry-After: 30\r\nRetry-After: 120", "Retry-After: 30, 120", "Retry-After: soon,120 , 30"],
)
async def test_of_several_retry_after_the_longest_counts(fields: str) -> None:
    raw = f"HTTP/1.1 429 X\r\n{fields}\r\nContent-Length: 0\r\n\r\n".encode()
    bad = failed((await run(servers.Answer(raw=raw)))[0])
    assert bad.retry_after == timedelta(seconds=120)


@pytest.mark.parametrize(
    ("value", "least", "most"),
    [
        ("{in two hours, by the clock of Unix}", 7100, 7201),
        ("120", 120, 120),
        ("0", 0, 0),
        ("-5", 0, 0),
        ("1e300", 86_400, 1e9),
        ("{in two hours}", 7100, 7201),
        ("Mon, 01 Jan 2001 00:00:00 GMT", 0, 0),
    ],
)
async def test_retry_after_is_read_as_seconds_or_as_a_date(
    value: str, least: float, most: float
) -> None:
    if value == "{in two hours}":
        value = format_datetime(datetime.now(UTC) + timedelta(hours=2), usegmt=True)
    elif value.startswith("{"):
        value = str(int(datetime.now(UTC).timestamp()) + 7200)
    for status in (429, 503):
        (result,) = await run(servers.Answer(status, b"", {"Retry-After": value}))
        bad = failed(result)
        assert bad.retry_after is not None
        assert least <= bad.retry_after.total_seconds() <= most
        assert bad.fault == "server"


@pytest.mark.parametrize(
    "value",
    [
        "soon",
        "nan",
        "inf",
        "Mon, 99 Foo",
        "Fri, 31 Dec 99999999999999999999 23:59:59 GMT",
        "Fri, 31 Dec 2027 23:59:59 +99999999999999",
    ],
)
async def test_an_invalid_retry_after_is_ignored(value: str) -> None:
    (result,) = await run(servers.Answer(503, b"", {"Retry-After": value}))
    assert failed(result).retry_after is None
    assert failed(result).fault == "unclear"


@pytest.mark.parametrize(
    "raw", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n[", b"220 mail.example ESMTP\r\n"]
)
async def test_a_connection_that_breaks(raw: bytes) -> None:
    (result,) = await run(servers.Answer(raw=raw))
    assert (failed(result).permanent, failed(result).fault) == (False, "unclear")


async def test_a_server_that_ends_the_tls_handshake_is_named() -> None:
    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.close()

    async with serving(refuse) as port:
        made = http_runner(f"https://{HOST}:{port}")
        (result,) = await made.run(made.compile({}), [task()])
        await made.close()
    said = f"Crm: {HOST}:{port}: the server has closed the connection"
    assert (failed(result).message, failed(result).fault) == (said, "server")


async def test_an_endless_answer_is_cut_off() -> None:
    chunk = b"10000\r\n" + b"x" * 65_536 + b"\r\n"
    raw = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunk * 100
    (result,) = await run(servers.Answer(raw=raw))
    assert "more than" in failed(result).message


@pytest.mark.parametrize("host", ["a..example.com", "xn--", "☃.example.com"])
async def test_a_host_that_cannot_be_looked_up(host: str) -> None:
    """Some pass the check of the settings, as the parsers of URLs differ."""
    made = http_runner(f"https://{host}/?token=hidden")
    (result,) = await made.run(made.compile({}), [task()])
    await made.close()
    assert (failed(result).permanent, failed(result).fault) == (False, "server")
    assert "hidden" not in failed(result).message


async def test_an_endpoint_that_hangs() -> None:
    async def respond(_: Request) -> servers.Answer:
        await asyncio.Event().wait()
        raise AssertionError

    async with http_server(respond) as server, runner(server, timeout=0.2) as made:
        (result,) = await made.run(made.compile({}), [task()])
    assert failed(result).message == f"Crm: no answer from 127.0.0.1:{server.port} within 0.2 s"
    assert not failed(result).permanent


async def test_a_port_without_a_listener() -> None:
    async with http_server(all_next) as server:
        url = server.url
    made = http_runner(f"{url.replace('//', '//user:hidden@')}/?token=hidden")
    (result,) = await made.run(made.compile({}), [task()])
    await made.close()
    assert not failed(result).permanent
    assert failed(result).message == f"Crm: {url.removeprefix('http://')}: Connection refused"
    assert "hidden" not in failed(result).message


async def test_a_name_that_leads_to_a_private_address() -> None:
    results: list[Result] = []
    async with http_server(all_next) as server:
        url = server.url.replace("127.0.0.1", "127.1")  # not an address, but resolved to one
        for allow in (False, True):
            made = http_runner(url, allow_private=allow)
            results += await made.run(made.compile({}), [task()])
            await made.close()
    assert "127.1 has the private address 127.0.0.1" in failed(results[0]).message
    assert results[1] == Answer()
    assert len(server.requests) == 1


async def test_a_public_name_is_called_at_the_address_that_was_checked() -> None:
    web = HttpClient(timeout=1, connections=1, allow_private=False)
    url = httpx.URL("https://8.8.2056:8443/x")
    targets = await web._targets(url, is_proxied=False)
    await web.close()
    assert targets == [httpx.URL("https://8.8.8.8:8443/x")]


@pytest.mark.parametrize("dead_is_first", [True, False])
async def test_an_address_that_does_not_answer_leaves_time_for_the_next(
    monkeypatch: pytest.MonkeyPatch, dead_is_first: bool
) -> None:
    """A client that checks the addresses of a name connects to each of them itself."""
    addresses = ["127.0.0.2", HOST] if dead_is_first else [HOST, "127.0.0.2"]
    connected = resolve(monkeypatch, addresses)
    async with http_server(all_next) as server:
        with not_accepting("127.0.0.2", server.port):
            made = http_runner(f"http://two.example:{server.port}", timeout=60)
            for _ in range(3):
                assert await made.run(made.compile({}), [task()]) == [Answer()]
            await made.close()
    assert len(server.requests) == 3
    used = addresses if dead_is_first else addresses[:1]
    assert connected == used  # the address that answered is used again, as is its connection


def resolve(monkeypatch: pytest.MonkeyPatch, addresses: list[str]) -> list[str]:
    """Let every name have these addresses, as if they were public. Return those that are connected
    to, as they are.
    """
    connected: list[str] = []
    loop = asyncio.get_running_loop()
    find_really, connect_really = loop.getaddrinfo, loop.sock_connect

    async def find(_: Any, *args: Any, **options: Any) -> Any:
        return [one for name in addresses for one in await find_really(name, *args, **options)]

    async def connect(made: socket.socket, address: Any) -> None:
        connected.append(address[0])
        await connect_really(made, address)

    monkeypatch.setattr(loop, "getaddrinfo", find)
    monkeypatch.setattr(loop, "sock_connect", connect)
    monkeypatch.setattr(http_client, "is_public", lambda _: True)
    monkeypatch.setattr(http_client, "ADDRESS_TIMEOUT", 0.1)
    return connected


async def test_the_addresses_of_the_latest_hosts_are_remembered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(http_client, "MAX_PREFERRED", 1)
    connected = resolve(monkeypatch, ["127.0.0.2", HOST])
    client = HttpClient(timeout=60, connections=1, allow_private=False)
    async with http_server(all_next) as server:
        with not_accepting("127.0.0.2", server.port):
            for name in ("one", "one", "two", "two", "one"):
                url = f"http://{name}.example:{server.port}"
                await client.call("POST", url, headers={}, content=b'{"runners": []}')
            await client.close()
    assert connected.count("127.0.0.2") == 3


async def test_data_that_json_cannot_hold_concerns_its_enrollment_only() -> None:
    async with http_server(all_next) as server, runner(server) as made:
        tasks = [task(7, big=math.inf), task(8)]
        results = await made.run(made.compile({}), tasks)
    assert failed(results[0]).permanent
    assert results[1] == Answer()


async def test_calls_are_paced() -> None:
    async with http_server(all_next) as server, runner(server, per_second=50) as made:
        loop = asyncio.get_running_loop()
        begin = loop.time()
        await asyncio.gather(*(made.run(made.compile({}), [task(n)]) for n in range(6)))
        assert loop.time() - begin >= 0.1


def test_a_config_that_is_not_json() -> None:
    made = http_runner("https://crm.example.com")
    with pytest.raises(DefinitionError, match="config"):
        made.compile({"a": math.nan})


@pytest.mark.parametrize(
    "body",
    [
        b'\xef\xbb\xbf[{"id": 7, "action": "next", "message": "f\xc3\xbcr"}]',
        '[{"id": 7, "action": "next", "message": "für"}]'.encode("utf-16"),
        '[{"id": 7, "action": "next", "message": "für"}]'.encode("latin-1"),
    ],
)
async def test_json_is_read_in_other_encodings(body: bytes) -> None:
    assert await run(servers.Answer(body=body)) == [Answer(message="für")]


async def test_headers_of_the_settings_replace_those_of_the_runner() -> None:
    given = {"content-type": "application/x+json", "ACCEPT": "a/b", "idempotency-key": "always"}
    async with http_server(all_next) as server, runner(server, headers=given) as made:
        await made.run(made.compile({}), [task()])
    sent = server.requests[0].headers
    assert (sent["content-type"], sent["accept"]) == ("application/x+json", "a/b")
    assert sent["idempotency-key"] == KEY


async def test_nothing_is_kept_from_one_call_to_the_next() -> None:
    async def respond(request: Request) -> servers.Answer:
        answer = await all_next(request)
        answer.headers["Set-Cookie"] = f"session=of-{len(server.requests)}; Path=/; Max-Age=3600"
        return answer

    async with http_server(respond) as server, runner(server) as made:
        for id_ in range(3):
            await made.run(made.compile({}), [task(id_)])
    assert ["cookie" in request.headers for request in server.requests] == [False] * 3


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True),
        ("10.0.0.1", False),
        ("100.64.0.1", False),  # carriers' NAT
        ("169.254.169.254", False),
        ("0.0.0.0", False),
        ("224.0.1.1", False),
        ("255.255.255.255", False),
        ("2606:4700::1111", True),
        ("::", False),
        ("::1", False),
        ("fe80::1", False),
        ("fec0::1", False),
        ("fc00::1", False),
        ("ff0e::1", False),
        ("::ffff:8.8.8.8", True),
        ("::ffff:10.0.0.1", False),
        ("::8.8.8.8", True),
        ("::127.0.0.1", False),
        ("64:ff9b::8.8.8.8", True),
        ("64:ff9b::169.254.169.254", False),
        ("64:ff9b::224.0.0.1", False),
        ("64:ff9b:1::8.8.8.8", False),
        ("64:ff9b:1:a00:0:100::", False),
        ("2002:808:808::1", True),
        ("2002:a00:1::1", False),
        ("2002:7f00:1::", False),
        ("2001:0:808:808::f7f7:f7f7", True),  # Teredo, 8.8.8.8 behind 8.8.8.8
        ("2001:0:808:808::f5ff:fffe", False),  # 10.0.0.1 behind 8.8.8.8
        ("2001:0:a00:1::f7f7:f7f7", False),
        ("2001:db8::1", False),
    ],
)
def test_which_addresses_are_public(address: str, public: bool) -> None:
    assert is_public(ip_address(address)) is public


async def test_clients_share_the_certificates() -> None:
    contexts = []
    for _ in range(2):
        web = HttpClient(timeout=1, connections=1, allow_private=False)
        async with web._connections(None) as used:
            contexts.append(used.transport._pool._ssl_context)
        await web.close()
    assert contexts[0] is contexts[1]


async def test_a_machine_without_descriptors_spends_no_attempt() -> None:
    async with http_server(all_next) as server, runner(server) as made:
        with no_descriptors():
            (result,) = await made.run(made.compile({}), [task()])
        assert failed(result).message == f"Crm: {HOST}:{server.port}: Too many open files"
        assert (failed(result).fault, failed(result).unknown) == ("server", False)
        assert await made.run(made.compile({}), [task()]) == [Answer()]


async def test_the_cause_is_reported_whatever_was_being_handled() -> None:
    async with http_server(all_next) as server:
        url = server.url
    made = http_runner(url)
    try:
        raise ModuleNotFoundError("No module named 'uvloop'")
    except ModuleNotFoundError:
        (result,) = await made.run(made.compile({}), [task()])
    await made.close()
    assert failed(result).message.endswith("Connection refused")


@pytest.mark.parametrize(
    "options",
    [
        {"secret": "whsec_"},
        {"secret": "no base64!"},
        {"headers": {"X-A": "secret\r\nX-B: c"}},
        {"headers": {"X A": "b"}},
        {"headers": {"Host": "b"}},
        {"per_second": 0},
    ],
)
def test_settings_that_cannot_work(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"secret|headers|per_second") as caught:
        http_runner(**{"url": "https://crm.example.com", "name": "Crm"} | options)
    assert "secret\r" not in str(caught.value)
