"""Servers that allow fewer connections than the settings."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

from sequencerd.core.task import Answer, Failed, NotStarted, Result
from sequencerd.runners.email.runner import EmailRunner
from tests.helpers.runners import email_runner, failed
from tests.helpers.servers import Script, serving, task
from tests.helpers.waiting import eventually

CONFIG = {"from": "hi@example.com", "to": "{{data.email}}", "subject": "x", "text": "x"}
FULL = "421 4.7.0 Too many concurrent connections"
COUNT = 8
"""Messages at a time; a runner opens up to ten connections."""


@dataclass
class Limited(Script):
    """A server that refuses what comes while it has `limit` connections. Those that it has wait
    until others were refused.
    """

    limit: int = 2
    refusal: str = FULL
    at: str = "CONNECT"  # what is refused
    messages_each: int = 1_000  # before it closes a connection
    patience: int = 1  # refusals that its connections wait for
    used: int = 0
    refused: asyncio.Event = field(default_factory=asyncio.Event)
    refusals: int = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.used += 1
        is_over = self.used > self.limit
        try:
            if is_over and self.at == "CONNECT":
                self.refuse()
                writer.write(f"{self.refusal}\r\n".encode())
                writer.close()
                return
            session = Session(self, is_over)
            await session.serve(reader, writer)
        finally:
            self.used -= 1

    def refuse(self) -> None:
        self.refusals += 1
        if self.refusals >= self.patience:
            self.refused.set()


class Session(Script):
    """One of its connections."""

    def __init__(self, server: Limited, is_over: bool) -> None:
        super().__init__(commands=server.commands, messages=server.messages)
        self._server = server
        self._is_over = is_over
        self._begun = 0
        server.connections += 1

    async def _say(self, writer: asyncio.StreamWriter, verb: str, usual: str) -> str:
        self._begun += verb == "MAIL"
        if self._begun > self._server.messages_each:
            await super()._say(writer, verb, "421 4.7.0 Too many messages in this session")
            return ""
        if verb == self._server.at:
            if self._is_over:
                self._server.refuse()
                self.answers[verb] = [self._server.refusal]
            else:
                await self._server.refused.wait()
        return await super()._say(writer, verb, usual)


@asynccontextmanager
async def limited(limit: int, **options: Any) -> AsyncIterator[Limited]:
    server = Limited(limit=limit, **options)
    async with serving(server.serve) as server.port:
        yield server


@asynccontextmanager
async def runner(server: Script) -> AsyncIterator[EmailRunner]:
    made = email_runner(server.url)
    try:
        yield made
    finally:
        await made.close()


async def send(made: EmailRunner, count: int = COUNT) -> list[Result]:
    tasks = [task(number, email=f"a{number}@x.org") for number in range(count)]
    return [*await made.run(made.compile(CONFIG), tasks)]


def not_answered(results: list[Result]) -> list[Result]:
    return [result for result in results if not isinstance(result, Answer)]


def recipients(server: Script) -> list[str]:
    return sorted(recipient for found, _ in server.messages for recipient in found)


ALL = [f"a{number}@x.org" for number in range(COUNT)]


@pytest.mark.parametrize("refusal", [FULL, "421 4.3.2 Service not available", "421"])
@pytest.mark.parametrize("limit", [1, 3])
async def test_messages_wait_for_the_connections_that_a_server_allows(
    refusal: str, limit: int
) -> None:
    async with limited(limit, refusal=refusal) as server, runner(server) as made:
        assert not_answered(await send(made)) == []
    assert recipients(server) == ALL
    assert server.connections == limit


@pytest.mark.parametrize(
    ("at", "refusal"),
    [
        (".", "432 4.3.2 STOREDRV.ClientSubmit; sender thread limit exceeded"),
        ("MAIL", "421 4.7.0 Too many connections from your host"),
    ],
)
async def test_a_server_may_count_its_connections_later(at: str, refusal: str) -> None:
    """Microsoft 365 does when it has read the message."""
    async with limited(3, at=at, refusal=refusal) as server, runner(server) as made:
        assert not_answered(await send(made)) == []
    assert recipients(server) == ALL


@pytest.mark.parametrize("at", ["CONNECT", "."])
async def test_a_server_that_allows_no_connection_fails(at: str) -> None:
    """Perhaps other daemons have them; so it is tried again as soon as if it were down."""
    async with limited(0, at=at) as server, runner(server) as made:
        for result in await send(made):
            assert (failed(result).fault, failed(result).cause) == ("server", "over quota")
            assert failed(result).retry_after is None


@pytest.mark.parametrize("refusal", ["554 5.7.1 Client host blocked", "421 4.7.0 No PTR record"])
async def test_other_refusals_of_a_connection_are_reported(refusal: str) -> None:
    async with limited(3, refusal=refusal) as server, runner(server) as made:
        results = await send(made)
    assert sum(isinstance(result, Failed) for result in results) == server.refusals
    assert server.refusals > 0


async def test_more_connections_are_tried_when_the_time_is_over() -> None:
    refusal = "421 Too many connections, retry in 0 s"
    async with limited(1, refusal=refusal) as server, runner(server) as made:
        await send(made)
        server.limit = COUNT
        await send(made)
    assert server.connections > 1


async def test_a_connection_that_the_server_closes_makes_room_for_another() -> None:
    """Exim closes one after so many messages."""
    async with limited(2, messages_each=2) as server, runner(server) as made:
        assert not_answered(await send(made)) == []
    assert recipients(server) == ALL
    assert server.connections == COUNT / 2


async def test_a_message_that_has_waited_for_too_long_is_not_sent() -> None:
    async with limited(1) as server, runner(server) as made:
        first = asyncio.create_task(send(made, 1))
        await eventually(lambda: server.used)
        late = task(1, email="b@x.org")._replace(lease_expired=lambda _: server.refusals > 0)
        (result,) = await made.run(made.compile(CONFIG), [late])
        assert not_answered(await first) == []
        assert not_answered(await send(made, 1)) == []
    assert result == NotStarted()
    assert recipients(server) == ["a0@x.org"] * 2
    assert server.connections == 1


async def test_messages_that_no_longer_wait_keep_no_connection() -> None:
    async with limited(1, patience=100) as server, runner(server) as made:
        program = made.compile(CONFIG)
        waiting = [
            asyncio.create_task(made.run(program, [task(number, email=f"a{number}@x.org")]))
            for number in range(3)
        ]
        await eventually(lambda: server.refusals == 2)
        for one in waiting:
            one.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        server.refused.set()
        await eventually(lambda: server.used == 0)
        assert isinstance((await send(made, 1))[0], Answer)
