"""Mail transactions against servers that say what a real one rarely says."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from sequencerd.core.task import Answer, Failed, Result
from sequencerd.runners.email.smtp import Mail, MailTransport
from sequencerd.runners.email.smtp_connect import connect
from sequencerd.runners.email.smtp_dialogue import Dialogue, SmtpError, SmtpReply
from sequencerd.runners.email.smtp_url import parse_url
from tests.helpers.servers import HOST, smtp_server
from tests.helpers.waiting import PATIENCE

MAIL = Mail("hi@example.com", ("a@x.org", "b@x.org"), (), b"Subject: x\r\n\r\n.dot\r\nlast")
HELLO = b"250-here\r\n250 PIPELINING\r\n"

Talk = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def listening(talk: Talk, hello: bytes = HELLO) -> AsyncIterator[int]:
    """A server that greets, answers EHLO, and leaves the rest to `talk`. Yields its port."""

    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 here\r\n")
        assert (await reader.readline()).startswith(b"EHLO")
        writer.write(hello)
        try:
            await talk(reader, writer)
        except ConnectionError:
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(greet, HOST, 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        await server.wait_closed()


@asynccontextmanager
async def dialogue(talk: Talk) -> AsyncIterator[Dialogue]:
    async with listening(talk) as port:
        server = parse_url(f"smtp://{HOST}:{port}")
        made = await connect(server, name="me.example", reply_timeout=30, tokens=None)
        yield made
        made.close()


def saying(answer: bytes) -> Talk:
    """Reads a line and answers this, whatever it was."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.readline():
            writer.write(answer)

    return talk


async def deliver(port: int) -> Result:
    transport = MailTransport(f"smtp://{HOST}:{port}?starttls=never", connections=1, timeout=10)
    delivery = await transport.deliver(MAIL)
    await transport.close()
    return delivery.result


async def test_sender_and_recipients_are_sent_before_any_answer() -> None:
    got = []

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        got.extend([await reader.readline() for _ in range(3)])  # it would wait here for ever
        writer.write(b"250 sender\r\n250 first\r\n250 second\r\n")
        assert await reader.readline() == b"DATA\r\n"
        writer.write(b"354 go on\r\n")
        got.append(await reader.readuntil(b"\r\n.\r\n"))
        writer.write(b"250-it is\r\n250 queued\r\n")
        await reader.readline()

    async with listening(talk) as port:
        result = await deliver(port)
    assert isinstance(result, Answer)
    assert "250 it is queued" in (result.message or "")
    assert got == [
        b"MAIL FROM:<hi@example.com>\r\n",
        b"RCPT TO:<a@x.org>\r\n",
        b"RCPT TO:<b@x.org>\r\n",
        b"Subject: x\r\n\r\n..dot\r\nlast\r\n.\r\n",
    ]


async def test_without_the_extension_each_command_waits_for_its_answer() -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for answer in (b"250 ok", b"250 ok", b"250 ok", b"354 go on"):
            await reader.readline()
            with pytest.raises(TimeoutError):  # nothing more comes by itself
                await asyncio.wait_for(reader.read(1), 0.05)
            writer.write(answer + b"\r\n")
        await reader.readuntil(b"\r\n.\r\n")
        writer.write(b"250 queued\r\n")
        await reader.readline()

    async with listening(talk, b"250 here\r\n") as port:
        assert isinstance(await deliver(port), Answer)


async def test_large_commands_and_replies_cannot_deadlock() -> None:
    """A server that stops reading until its answers are read, as all do when buffers are full."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.readline():
            writer.write(b"250 " + b"x" * 4000 + b"\r\n")
            await writer.drain()

    async with asyncio.timeout(PATIENCE), dialogue(talk) as made:
        replies = await made.ask(*(f"RCPT TO:<{i:01000}@x.org>" for i in range(10_000)))
    assert len(replies) == 10_000


async def test_a_reply_that_closes_the_connection_applies_to_all_commands() -> None:
    async with dialogue(saying(b"421 4.3.2 shutting down\r\n")) as made:
        assert await made.ask("MAIL", "RCPT", "RCPT") == [SmtpReply(421, "4.3.2 shutting down")] * 3
        assert not made.is_open
        with pytest.raises(SmtpError):
            await made.ask("RSET")


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n", "is not SMTP"),
        (b"\xff\x00\x01\r\n", "is not SMTP"),
        (b"250" + b"x" * 20_000, "too long"),
        (b"250-more\r\n" * 200, "too long"),
        (b"", "closed the connection"),
    ],
)
async def test_invalid_replies(answer: bytes, words: str) -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readline()
        writer.write(answer)
        await writer.drain()
        if answer:
            await reader.read()

    async with dialogue(talk) as made:
        with pytest.raises(SmtpError, match=words):
            await made.ask("NOOP")


async def test_a_refused_copy_does_not_confuse_the_answers() -> None:
    async with smtp_server() as server:
        server.refused = {"a@x.org": "550 5.1.1 nobody of this name"}
        transport = MailTransport(f"smtp://{HOST}:{server.port}", connections=1, timeout=10)
        results = [(await transport.deliver(MAIL)).result for _ in range(3)]
        await transport.close()
    assert [isinstance(result, Answer) for result in results] == [True] * 3
    assert [message.rcpt_tos for message in server.messages] == [["b@x.org"]] * 3
    assert server.connections == 1


async def test_data_that_is_answered_out_of_order_is_no_delivery() -> None:
    async with listening(saying(b"250 yes\r\n")) as port:
        result = await deliver(port)
    assert isinstance(result, Failed)
    assert "answers DATA with 250" in result.message
    assert (result.permanent, result.unknown) == (False, False)


@pytest.mark.parametrize("reply", [b"552 5.3.4 the message is too big\r\n", b""])
async def test_a_server_that_refuses_a_message_before_its_end(reply: bytes) -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for answer in (b"250 ok", b"250 ok", b"354 go on"):
            await reader.readline()
            writer.write(answer + b"\r\n")
        await reader.readexactly(10_000)
        writer.write(reply)
        await writer.drain()
        await asyncio.sleep(0)  # it closes with much unread, which resets the connection

    mail = replace(MAIL, to=("a@x.org",), content=b"x" * 50_000_000)
    async with listening(talk, b"250 here\r\n") as port:
        transport = MailTransport(f"smtp://{HOST}:{port}?starttls=never", connections=1, timeout=10)
        result = (await transport.deliver(mail)).result
        await transport.close()
    assert isinstance(result, Failed)
    if reply:
        assert "552 5.3.4 the message is too big" in result.message
        assert (result.permanent, result.unknown) == (True, False)
    else:
        assert (result.permanent, result.fault, result.unknown) == (False, "unclear", True)


async def test_a_server_that_refuses_before_the_end_and_reads_on() -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for answer in (b"250 ok", b"250 ok", b"250 ok", b"354 go on\r\n451 4.3.0 no more"):
            await reader.readline()
            writer.write(answer + b"\r\n")
        await reader.readuntil(b"\r\n.\r\n")
        await reader.readline()

    async with listening(talk, b"250 here\r\n") as port:
        result = await deliver(port)
    assert isinstance(result, Failed)
    assert "451 4.3.0 no more" in result.message
    assert (result.permanent, result.unknown) == (False, False)


async def test_a_command_is_one_line() -> None:
    async with dialogue(saying(b"250 yes\r\n")) as made:
        with pytest.raises(SmtpError, match="one line"):
            await made.ask("MAIL FROM:<a@x.org>\r\nRCPT TO:<evil@x.org>")


def test_the_faster_loop_does_as_well() -> None:
    async def one() -> Result:
        async with smtp_server() as server:
            transport = MailTransport(f"smtp://{HOST}:{server.port}", connections=1, timeout=10)
            delivery = await transport.deliver(MAIL)
            await transport.close()
        return delivery.result

    uvloop = pytest.importorskip("uvloop", reason="an extra")
    assert isinstance(uvloop.run(one()), Answer)
