"""Names whose resolution hangs, on asyncio's loop and on uvloop."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections import Counter
from collections.abc import Coroutine, Iterator
from typing import Any

import pytest

from sequencerd.core.task import Answer, Failed
from sequencerd.errors import DatabaseError
from sequencerd.runners.email.smtp import Mail, MailTransport
from sequencerd.service import dns
from sequencerd.storage.connections import connect
from tests.helpers.databases import shard
from tests.helpers.runners import http_runner
from tests.helpers.servers import HOST, all_next, http_server, not_accepting, smtp_server, task

MAIL = Mail("shop@example.com", ("ada@example.com",), (), b"Subject: Hi\r\n\r\nHi\r\n")


class Resolver:
    """The system's resolver, which hangs for `slow.example` until it is released."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.let_go = threading.Event()
        self.asked: Counter[str] = Counter()
        self.is_asked = threading.Event()
        self._real = socket.getaddrinfo
        monkeypatch.setattr(socket, "getaddrinfo", self._resolve)

    def _resolve(self, host: Any, *arguments: Any, **options: Any) -> Any:
        self.asked[host] += 1
        if host == "slow.example":
            self.is_asked.set()
            self.let_go.wait()
            host = HOST
        elif host == "none.example":
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        elif host == "quick.example":
            host = HOST
        elif host == "two.example":
            found = [self._real(one, *arguments, **options) for one in ("127.0.0.2", HOST)]
            return [*found[0], *found[1]]
        return self._real(host, *arguments, **options)


@pytest.fixture
def resolver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Resolver]:
    made = Resolver(monkeypatch)
    yield made
    made.let_go.set()


def run(work: Coroutine[Any, Any, None]) -> None:
    with asyncio.Runner(loop_factory=dns.ResolvingLoop) as runner:
        runner.run(work)


async def hanging(resolver: Resolver, *work: Coroutine[Any, Any, Any]) -> list[asyncio.Task[Any]]:
    """Work that has begun to wait for the name that hangs."""
    tasks = [asyncio.create_task(one) for one in work]
    while not resolver.is_asked.is_set():  # noqa: ASYNC110 - set by a thread
        await asyncio.sleep(0.01)
    return tasks


async def ended(tasks: list[asyncio.Task[Any]]) -> None:
    for one in tasks:
        one.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def test_a_name_that_hangs_delays_no_other(resolver: Resolver) -> None:
    async def work() -> None:
        loop = asyncio.get_running_loop()
        # more than asyncio and uvloop have threads
        tasks = await hanging(
            resolver, *(loop.getaddrinfo("slow.example", port) for port in range(1, 80))
        )
        async with smtp_server() as mailbox, http_server(all_next) as server:
            transport = MailTransport(
                f"smtp://localhost:{mailbox.port}?starttls=never", connections=1, timeout=60
            )
            assert isinstance((await transport.deliver(MAIL)).result, Answer)
            await transport.close()
            for allow_private in (True, False):
                made = http_runner(f"http://localhost:{server.port}/", allow_private=allow_private)
                assert await made.run(made.compile({}), [task()]) == [Answer()]
                await made.close()
        assert not any(one.done() for one in tasks)
        assert resolver.asked["slow.example"] == 1
        resolver.let_go.set()
        found = await asyncio.gather(*tasks)
        assert {(one[0][4][0], one[0][4][1]) for one in found} == {
            (HOST, port) for port in range(1, 80)
        }

    run(work())


def test_the_loop_ends_though_a_name_hangs(resolver: Resolver) -> None:
    async def work() -> None:
        loop = asyncio.get_running_loop()
        await ended(await hanging(resolver, loop.getaddrinfo("slow.example", 80)))

    run(work())  # would wait for ever
    assert not resolver.let_go.is_set()


def test_a_name_that_hangs_times_out(resolver: Resolver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dns, "CALLER_TIMEOUT", 0.1)

    async def work() -> None:
        made = http_runner("http://slow.example/", timeout=60)
        (result,) = await made.run(made.compile({}), [task()])
        await made.close()
        assert isinstance(result, Failed)
        assert result.message == (
            "Crm: slow.example:80: the name service did not answer for slow.example in 0.1 s"
        )
        assert not result.unknown
        with pytest.raises(DatabaseError, match=r"slow\.example"):
            await connect(shard("postgresql://ada@slow.example/shop"))
        transport = MailTransport("smtp://slow.example:25", connections=1, timeout=60)
        result = (await transport.deliver(MAIL)).result
        await transport.close()
        assert isinstance(result, Failed)
        assert "slow.example" in result.message

    run(work())
    assert resolver.asked["slow.example"] <= 2  # HTTP's, and with others' flags


def test_an_answer_is_used_again_for_a_while(
    resolver: Resolver, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now)

    async def work() -> None:
        nonlocal now
        loop = asyncio.get_running_loop()
        for seconds, asked in ((0, 1), (dns.CACHE_SECONDS - 0.1, 1), (0.2, 2)):
            now += seconds
            ((*_, address), *_) = await loop.getaddrinfo("quick.example", 80)
            assert address == (HOST, 80)
            assert resolver.asked["quick.example"] == asked
        for seconds, asked in ((0, 1), (dns.FRESH_ERROR - 0.1, 1), (0.2, 2)):
            now += seconds
            with pytest.raises(socket.gaierror, match="not known"):
                await loop.getaddrinfo("none.example", 80)
            assert resolver.asked["none.example"] == asked

    run(work())


def test_a_cancelled_query_continues_for_the_others(resolver: Resolver) -> None:
    async def work() -> None:
        loop = asyncio.get_running_loop()
        first, second = await hanging(
            resolver, *(loop.getaddrinfo("slow.example", 80) for _ in range(2))
        )
        await ended([first])
        resolver.let_go.set()
        ((*_, address), *_) = await second
        assert address == (HOST, 80)

    run(work())


@pytest.mark.parametrize("host", ["", "a..example", "x" * 70 + ".example", "\ud800"])
def test_invalid_host_names_fail(host: str) -> None:
    async def work() -> None:
        with pytest.raises(OSError):  # noqa: PT011 - each says it its own way
            await asyncio.get_running_loop().create_connection(asyncio.Protocol, host, 1)

    run(work())


def test_the_addresses_of_a_name_are_used_in_turn(resolver: Resolver) -> None:
    async def work() -> None:
        loop = asyncio.get_running_loop()
        server = await loop.create_server(asyncio.Protocol, HOST, 0)
        port = server.sockets[0].getsockname()[1]
        transport, _ = await loop.create_connection(asyncio.Protocol, "localhost", port)
        transport.close()
        server.close()
        await server.wait_closed()
        with pytest.raises(OSError, match=r"refused|Connect call failed"):
            await loop.create_connection(asyncio.Protocol, "localhost", port)

    run(work())


def test_an_address_that_does_not_answer_leaves_time_for_the_next(
    resolver: Resolver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dns, "ADDRESS_TIMEOUT", 0.1)

    async def work() -> None:
        async with smtp_server() as mailbox:
            with not_accepting("127.0.0.2", mailbox.port):
                transport = MailTransport(
                    f"smtp://two.example:{mailbox.port}?starttls=never", connections=1, timeout=60
                )
                assert isinstance((await transport.deliver(MAIL)).result, Answer)
                await transport.close()

    run(work())
