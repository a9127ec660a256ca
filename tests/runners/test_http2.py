"""HTTP/2: what holds for HTTP/1.1 holds there as well."""

from __future__ import annotations

import asyncio
import ssl
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpcore
import httpx
import pytest
from httpcore._backends.anyio import AnyIOStream

from sequencerd.core.task import Answer, Failed, Result
from sequencerd.runners import http_client
from sequencerd.runners.http_client import MAX_ANSWER
from tests.helpers import servers
from tests.helpers.runners import http_runner
from tests.helpers.servers import (
    HttpServer,
    Request,
    all_next,
    certificate,
    demanding_certificates,
    http_server,
    task,
)


@pytest.fixture
def tls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ssl.SSLContext:
    """A server's context, trusted by clients."""
    context, file = certificate(tmp_path)
    monkeypatch.setenv("SSL_CERT_FILE", str(file))
    return context


async def call(
    server: HttpServer, count: int = 1, *, host: str = "localhost", **options: Any
) -> list[Result]:
    """The results of as many calls at the same time."""
    url = server.url.replace("localhost", host)
    made = http_runner(url, **{"timeout": 60} | options)
    tasks = (task(id_) for id_ in range(count))
    results = await asyncio.gather(*(made.run(made.compile({}), [one]) for one in tasks))
    await made.close()
    return [one for (one,) in results]


@pytest.mark.parametrize("http2", [True, False])
async def test_the_name_of_a_host_may_end_with_a_dot(
    tls: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch, http2: bool
) -> None:
    loop = asyncio.get_running_loop()
    original = loop.getaddrinfo

    async def found(host: Any, port: int, **options: Any) -> Any:
        assert host in ("localhost.", b"localhost.")
        return await original("localhost", port, **options)

    monkeypatch.setattr(loop, "getaddrinfo", found)

    async def respond(request: Request) -> servers.Answer:
        return await all_next(request)

    async with http_server(respond, tls) as server:
        results = await call(server, host="localhost.", allow_private=True, http2=http2)
    assert isinstance(results[0], Answer), results


async def test_a_request_that_was_not_begun_spends_no_attempt(tls: ssl.SSLContext) -> None:
    async def respond(request: Request) -> servers.Answer:
        return servers.Answer(raw=servers.REFUSED_STREAM)

    async with http_server(respond, tls) as server:
        (result,) = await call(server)
    assert isinstance(result, Failed)
    assert (result.fault, result.unknown) == ("server", False)


@pytest.mark.parametrize("http2", [True, False])
async def test_a_server_that_demands_a_certificate_has_refused_the_client(
    tls: ssl.SSLContext, http2: bool
) -> None:
    """With TLS 1.3, after the handshake."""
    tls.set_alpn_protocols(["h2", "http/1.1"])
    with demanding_certificates(tls) as port:
        made = http_runner(f"https://localhost:{port}/", timeout=60, http2=http2)
        (result,) = await made.run(made.compile({}), [task()])
        await made.close()
    assert isinstance(result, Failed)
    assert "certificate required" in result.message
    assert (result.fault, result.unknown, result.cause) == ("server", False, "refused")


@pytest.mark.parametrize("http2", [True, False])
async def test_a_request_that_cannot_be_written_spends_no_attempt(
    tls: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch, http2: bool
) -> None:
    """As when a server has refused the client after the handshake, and closed the connection."""
    original = AnyIOStream.write

    async def write(stream: AnyIOStream, data: bytes, *rest: Any, **options: Any) -> None:
        if data.startswith(b"PRI * HTTP/2.0"):
            await original(stream, data, *rest, **options)
            return
        await stream.aclose()
        raise httpcore.WriteError

    monkeypatch.setattr(AnyIOStream, "write", write)
    async with http_server(all_next, tls) as server:
        (result,) = await call(server, http2=http2)
    assert isinstance(result, Failed)
    assert (result.fault, result.unknown, result.cause) == ("server", False, "unreachable")


async def test_requests_share_a_connection(tls: ssl.SSLContext) -> None:
    together = asyncio.Event()

    async def respond(request: Request) -> servers.Answer:
        if len(server.requests) == 4:
            together.set()
        await together.wait()  # for ever, if they came one after the other
        return await all_next(request)

    async with http_server(respond, tls) as server:
        results = await call(server, 4)
    assert [isinstance(result, Answer) for result in results] == [True] * 4
    assert server.connections == 1
    assert server.requests[0].headers[":authority"] == f"localhost:{server.port}"
    assert "idempotency-key" in server.requests[0].headers


async def test_a_connection_is_given_up_before_the_server_does(
    tls: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_client, "MAX_CALLS", 2)
    together = asyncio.Event()

    async def respond(request: Request) -> servers.Answer:
        if len(server.requests) == 5:
            together.set()
        await together.wait()  # calls are under way on each connection
        return await all_next(request)

    async with http_server(respond, tls) as server:
        results = await call(server, 5)
    assert [isinstance(result, Answer) for result in results] == [True] * 5
    assert server.connections == 3


async def test_a_connection_that_is_given_up_between_calls_is_closed(
    tls: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_client, "MAX_CALLS", 1)
    closed = []
    close = httpx.AsyncHTTPTransport.aclose

    async def note(transport: httpx.AsyncHTTPTransport) -> None:
        closed.append(transport)
        await close(transport)

    monkeypatch.setattr(httpx.AsyncHTTPTransport, "aclose", note)
    async with http_server(all_next, tls) as server:
        made = http_runner(server.url, timeout=60)
        for number in range(3):
            await made.run(made.compile({}), [task(number)])
        assert (server.connections, len(closed)) == (3, 3)
        await made.close()


async def test_http2_can_be_disabled(tls: ssl.SSLContext) -> None:
    async def respond(request: Request) -> servers.Answer:
        return await all_next(request)

    async with http_server(respond, tls) as server:
        await call(server)
        await call(server, http2=False)
    assert [":authority" in request.headers for request in server.requests] == [True, False]


async def test_a_private_address_is_not_called(tls: ssl.SSLContext) -> None:
    async def respond(request: Request) -> servers.Answer:
        return await all_next(request)

    async with http_server(respond, tls) as server:
        (result,) = await call(server, host="127.1")
    assert isinstance(result, Failed)
    assert "127.1 has the private address 127.0.0.1" in result.message
    assert server.connections == 0


async def test_a_connection_cut_after_the_request_leaves_the_outcome_open(
    tls: ssl.SSLContext,
) -> None:
    async def respond(_: Request) -> servers.Answer:
        return servers.Answer(raw=b"")

    async with http_server(respond, tls) as server:
        (result,) = await call(server)
    assert isinstance(result, Failed)
    assert (result.unknown, result.permanent) == (True, False)


async def test_a_request_on_a_connection_that_the_server_closes_is_repeated_at_once(
    tls: ssl.SSLContext,
) -> None:
    async def respond(request: Request) -> servers.Answer:
        if len(server.requests) == 3:
            given_up.set()
        if len(server.requests) <= 3:
            await given_up.wait()  # all are under way
            return servers.Answer(raw=servers.GOAWAY)
        return await all_next(request)

    given_up = asyncio.Event()
    async with http_server(respond, tls) as server:
        made = http_runner(server.url, timeout=60)
        program = made.compile({})
        first = await asyncio.gather(*(made.run(program, [task(id_)]) for id_ in range(3)))
        second = await asyncio.gather(*(made.run(program, [task(id_)]) for id_ in range(3)))
        await made.close()
    for (result,) in first:
        assert isinstance(result, Failed)
        assert (result.unknown, result.fault) == (True, "server")
        assert result.retry_after == timedelta(0)
    assert [isinstance(result, Answer) for (result,) in second] == [True] * 3
    assert server.connections == 2
    keys = [request.headers["idempotency-key"] for request in server.requests]
    assert sorted(keys[:3]) == sorted(keys[3:])


async def test_a_server_that_closes_every_connection_is_not_called_for_ever(
    tls: ssl.SSLContext,
) -> None:
    async def respond(_: Request) -> servers.Answer:
        return servers.Answer(raw=servers.GOAWAY)

    async with http_server(respond, tls) as server:
        made = http_runner(server.url, timeout=60)
        results = [(await made.run(made.compile({}), [task()]))[0] for _ in range(5)]
        await made.close()
    faults = [isinstance(result, Failed) and result.fault for result in results]
    assert faults == ["server", "server", "server", "unclear", "unclear"]


async def test_no_answer_in_time_leaves_the_outcome_open(tls: ssl.SSLContext) -> None:
    async def respond(_: Request) -> servers.Answer:
        await asyncio.Event().wait()
        raise AssertionError

    async with http_server(respond, tls) as server:
        (result,) = await call(server, timeout=1)
    assert isinstance(result, Failed)
    assert result.unknown
    assert "no answer" in result.message


async def test_an_untrusted_certificate_gets_no_request(
    tls: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def respond(request: Request) -> servers.Answer:
        return await all_next(request)

    monkeypatch.delenv("SSL_CERT_FILE")
    async with http_server(respond, tls) as server:
        (result,) = await call(server)
    assert isinstance(result, Failed)
    assert not result.unknown
    assert "certificate" in result.message.lower()
    assert server.requests == []


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (servers.Answer(body=b"[" * (MAX_ANSWER + 1)), "more than"),
        (servers.Answer(302, headers={"location": "https://elsewhere.example"}), "302"),
    ],
)
async def test_answers_are_bounded_and_redirects_not_followed(
    tls: ssl.SSLContext, given: servers.Answer, words: str
) -> None:
    async def respond(_: Request) -> servers.Answer:
        return given

    async with http_server(respond, tls) as server:
        (result,) = await call(server)
    assert isinstance(result, Failed)
    assert words in result.message
    assert len(server.requests) == 1
