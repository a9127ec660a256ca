"""Mail transactions on an SMTP connection (RFC 5321), with pipelined commands (RFC 2920).

aiosmtplib connects, greets and logs in. It sends one command at a time, and drops replies that it
does not expect, so transactions are implemented here.
"""

from __future__ import annotations

import asyncio
import re
from contextlib import suppress
from typing import NamedTuple, cast

from aiosmtplib import SMTP

from sequencerd.runners.email.refusals import Stage
from sequencerd.runners.fields import one_line

MAX_LINE_LENGTH = 8192  # bytes; RFC 5321 says 512, but servers send more
MAX_REPLY_LINES = 100  # lines
PIPELINE_DEPTH = 100
"""Commands that are sent before their replies are read. More could fill both directions, so that
each side waits for the other to read.
"""

FINAL_TIMEOUT = 600.0
"""Seconds for the reply to the message (RFC 5321, 4.5.3.2.6). With a shorter timeout, a server that
has accepted the message might get it again.
"""

SHUTTING_DOWN = 421

_REPLY = re.compile(rb"([2-5]\d\d)([ -]|$)(.*)", re.DOTALL)
_LINE_END = re.compile(rb"\r\n|\r|\n")
_LEADING_DOT = re.compile(rb"^\.", re.MULTILINE)


class SmtpError(Exception):
    """The connection broke, the server does not answer, or it does not speak SMTP."""


class ClosedError(SmtpError):
    """The server has closed the connection."""

    def __init__(self) -> None:
        super().__init__("the server has closed the connection")


class MismatchError(SmtpError):
    """The server does not offer what the settings need, or does not speak SMTP."""


class SmtpRefused(SmtpError):  # noqa: N818 - it is what has happened
    """A refusal. `what` was refused, such as "the login"; `stage` is the same as a code."""

    def __init__(self, reply: SmtpReply, stage: Stage, what: str = "") -> None:
        super().__init__(f"{reply.code} {reply.text}")
        self.reply = reply
        self.stage: Stage = stage
        self.what = what


class SmtpReply(NamedTuple):
    """The server's reply to a command."""

    code: int
    text: str

    @property
    def is_refusal(self) -> bool:
        """Return whether the command has failed, temporarily or permanently."""
        return not 200 <= self.code < 300


def decode_reply(raw: bytes) -> str:
    """Return the text of a reply, which some servers write in Latin-1."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return raw.decode("latin-1")


class _Reader(asyncio.StreamReader):
    """Reads what has arrived before the connection was lost: it may be the reason."""

    lost: Exception | None = None

    def set_exception(self, exc: Exception) -> None:
        """Keep the error for later."""
        self.lost = exc
        self.feed_eof()


class Dialogue:
    """A connection that is ready for mail, taken over from aiosmtplib. Raises SmtpError or OSError
    when it breaks.

    `timeout` is the number of seconds for each reply. `extensions` are those that the server
    offers, by name in lower case, with their parameters.
    """

    def __init__(self, client: SMTP, *, timeout: float) -> None:
        if client.transport is None:
            raise ClosedError
        loop = asyncio.get_running_loop()
        transport = cast(asyncio.Transport, client.transport)  # uvloop's is another class
        self.is_reused = False  # it was idle, so the server may have closed it
        self.has_envelope = False  # of a message that was not sent
        self.is_handed_over = False  # a message was sent, and not answered
        self.extensions = client.esmtp_extensions
        self._timeout = timeout
        self._reader = _Reader(limit=MAX_LINE_LENGTH, loop=loop)
        protocol = asyncio.StreamReaderProtocol(self._reader, loop=loop)
        transport.set_protocol(protocol)
        protocol.connection_made(transport)
        self._writer = asyncio.StreamWriter(transport, protocol, self._reader, loop)

    @property
    def is_open(self) -> bool:
        """Return whether the connection is open, as far as is known."""
        return not (self._writer.is_closing() or self._reader.at_eof())

    @property
    def max_size(self) -> int | None:
        """Return how many bytes a message may have (RFC 1870); None if the server does not say."""
        size = self.extensions.get("size", "")
        return int(size) or None if re.fullmatch(r"[0-9]{1,18}", size) else None

    async def ask(self, *commands: str, first_within: float | None = None) -> list[SmtpReply]:
        """Send commands, all at once if the server allows it, and read a reply to each.

        A 421 is the server's last reply, so it also applies to the following commands. If the
        server closes the connection after another refusal, there are no more replies.
        `first_within` is a shorter limit, in seconds, for the first reply.
        """
        size = PIPELINE_DEPTH if "pipelining" in self.extensions else 1
        within = min(first_within or self._timeout, self._timeout)
        replies: list[SmtpReply] = []
        for start in range(0, len(commands), size):
            group = commands[start : start + size]
            try:
                await self._write(b"".join(_line(command) for command in group), within)
                for command in group:
                    replies.append(await self._read(command.partition(" ")[0], within))
                    within = self._timeout
                    if replies[-1].code == SHUTTING_DOWN:
                        self.close()
                        return replies + replies[-1:] * (len(commands) - len(replies))
            except (ClosedError, OSError):
                self.close()
                if replies and replies[-1].is_refusal:
                    return replies
                raise
        return replies

    async def say(self, command: str) -> SmtpReply:
        """Send one command and return the reply."""
        (reply,) = await self.ask(command)
        return reply

    async def transfer(self, content: bytes) -> SmtpReply:
        """Send a message after the reply 354 to DATA. A server that refuses the message may close
        the connection before its end.
        """
        self.is_handed_over = True
        lines = _LINE_END.sub(b"\r\n", content).removesuffix(b"\r\n")
        try:
            await self._write(_LEADING_DOT.sub(b"..", lines) + b"\r\n.\r\n", FINAL_TIMEOUT)
        except (SmtpError, OSError):
            self.close()
            self._reader.feed_eof()
            reply = None
            with suppress(SmtpError, OSError):
                reply = await self._read_reply()
            if reply is None or not reply.is_refusal:
                raise
        else:
            reply = await self._read("the message", FINAL_TIMEOUT)
        if reply.code < 400 and reply.is_refusal:
            raise SmtpError(f"answers the message with {reply.code}")
        self.is_handed_over = False
        self.has_envelope = reply.is_refusal
        return reply

    async def quit(self) -> None:
        """Send QUIT and close the connection."""
        try:
            await self.say("QUIT")
        finally:
            self.close()

    def close(self) -> None:
        """Close the connection immediately."""
        self._writer.close()

    async def _write(self, data: bytes, within: float) -> None:
        if not self.is_open:
            raise ClosedError
        self._writer.write(data)
        try:
            async with asyncio.timeout(within):
                await self._writer.drain()
        except TimeoutError:
            raise SmtpError(f"the server reads nothing for {within:g} s") from None

    async def _read(self, command: str, within: float) -> SmtpReply:
        try:
            async with asyncio.timeout(within):
                return await self._read_reply()
        except TimeoutError:
            raise SmtpError(f"no answer within {within:g} s to {command}") from None

    async def _read_reply(self) -> SmtpReply:
        texts: list[str] = []
        for _ in range(MAX_REPLY_LINES):
            try:
                line = (await self._reader.readuntil(b"\n")).rstrip()
            except asyncio.IncompleteReadError as error:
                raise self._reader.lost or ClosedError() from error
            except asyncio.LimitOverrunError as error:
                raise SmtpError("the answer of the server is too long") from error
            if not line and not texts:
                continue  # some servers send blank lines before a reply
            match = _REPLY.fullmatch(line)
            if match is None:
                said = one_line(line.decode("latin-1"), 80)
                raise MismatchError(f"the answer of the server is not SMTP: {said!r}")
            texts.append(decode_reply(match[3]))
            if match[2] != b"-":
                return SmtpReply(int(match[1]), "\n".join(texts))
        raise SmtpError("the answer of the server is too long")


def _line(command: str) -> bytes:
    if "\r" in command or "\n" in command:
        raise SmtpError("a command must be one line")
    return command.encode() + b"\r\n"
