"""An SMTP connection: commands and replies (RFC 5321), several commands at once (RFC 2920)."""

from __future__ import annotations

import asyncio
import re
import ssl
from collections.abc import Mapping
from typing import NamedTuple

from sequencerd.runners.refusals import Stage

LONGEST_LINE = 8192  # bytes; RFC 5321 says 512, servers say more
LONGEST_REPLY = 100  # lines
GROUP = 100
"""Commands that are sent before their replies are read. More might fill both directions: then the
server waits for us to read, and we for it."""

_REPLY = re.compile(rb"([2-5]\d\d)([ -]|$)(.*)", re.DOTALL)
_LINE_END = re.compile(rb"\r\n|\r|\n")
_LEADING_DOT = re.compile(rb"^\.", re.MULTILINE)


class SmtpError(Exception):
    """The connection broke, the server is silent, or it says something else than SMTP."""


class SmtpRefused(SmtpError):  # noqa: N818 - it is what has happened
    """A refusal. `what` was refused, such as "the login", in words; the stage says the same."""

    def __init__(self, reply: Reply, stage: Stage, what: str = "") -> None:
        super().__init__(f"{reply.code} {reply.text}")
        self.reply = reply
        self.stage: Stage = stage
        self.what = what


class Reply(NamedTuple):
    """What the server answers a command."""

    code: int
    text: str

    @property
    def is_refusal(self) -> bool:
        """Whether the command has failed, for now or for good."""
        return not 200 <= self.code < 300


class Dialogue:
    """A connection. Raises SmtpError or OSError where it breaks.

    `timeout` (seconds) is for each reply; `extensions` are what the server offers, by name in
    lower case, with their parameters.
    """

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, timeout: float
    ) -> None:
        self.extensions: Mapping[str, str] = {}
        self._reader = reader
        self._writer = writer
        self._timeout = timeout

    @property
    def is_open(self) -> bool:
        """Whether nobody has ended it, as far as is known."""
        return not (self._writer.is_closing() or self._reader.at_eof())

    @property
    def is_encrypted(self) -> bool:
        """Whether nobody else can listen."""
        return self._writer.get_extra_info("ssl_object") is not None

    @property
    def local_address(self) -> str:
        """The address of this machine, as the server sees it if nothing is in between."""
        name = self._writer.get_extra_info("sockname")
        return str(name[0]).partition("%")[0] if isinstance(name, tuple) else "127.0.0.1"

    async def greeting(self) -> Reply:
        """What the server says first."""
        return await self._read("the greeting", self._timeout)

    async def ask(self, *commands: str, first_within: float | None = None) -> list[Reply]:
        """Sends commands and reads a reply to each, all at once if the server allows it.

        A 421 is the last that the server says: it holds for the commands behind it too.
        `first_within` limits the time for the first reply further.
        """
        size = GROUP if "pipelining" in self.extensions else 1
        within = min(first_within or self._timeout, self._timeout)
        replies: list[Reply] = []
        for start in range(0, len(commands), size):
            group = commands[start : start + size]
            await self._write(b"".join(_line(command) for command in group), within)
            for command in group:
                replies.append(await self._read(command.partition(" ")[0], within))
                within = self._timeout
                if replies[-1].code == 421:
                    self.close()
                    return replies + replies[-1:] * (len(commands) - len(replies))
        return replies

    async def say(self, command: str) -> Reply:
        """One command, and the reply to it."""
        (reply,) = await self.ask(command)
        return reply

    async def transfer(self, content: bytes, *, within: float) -> Reply:
        """Sends a message, after the reply 354 to DATA; `within` limits the time for the answer."""
        lines = _LINE_END.sub(b"\r\n", content).removesuffix(b"\r\n")
        await self._write(_LEADING_DOT.sub(b"..", lines) + b"\r\n.\r\n", within)
        return await self._read("the message", within)

    async def start_tls(self, context: ssl.SSLContext, host: str) -> None:
        """Encrypts the connection, after the reply 220 to STARTTLS.

        What came unencrypted behind that reply is dropped: it may be somebody else's (RFC 3207, 6).
        """
        writer = self._writer
        async with asyncio.timeout(self._timeout):
            if self._reader._buffer:  # type: ignore[attr-defined]  # noqa: SLF001 - nothing tells
                raise SmtpError("the server says something between STARTTLS and TLS")
            await writer.start_tls(context, server_hostname=host)
        self.extensions = {}

    async def quit(self) -> None:
        """Takes leave, and closes."""
        try:
            await self.say("QUIT")
        finally:
            self.close()

    def close(self) -> None:
        """Ends the connection at once."""
        self._writer.close()

    async def _write(self, data: bytes, within: float) -> None:
        if not self.is_open:
            raise SmtpError("the server has closed the connection")
        self._writer.write(data)
        try:
            async with asyncio.timeout(within):
                await self._writer.drain()
        except TimeoutError:
            raise SmtpError(f"the server reads nothing for {within:g} s") from None

    async def _read(self, command: str, within: float) -> Reply:
        try:
            async with asyncio.timeout(within):
                return await self._read_reply()
        except TimeoutError:
            raise SmtpError(f"no answer within {within:g} s to {command}") from None

    async def _read_reply(self) -> Reply:
        texts: list[str] = []
        for _ in range(LONGEST_REPLY):
            try:
                line = (await self._reader.readuntil(b"\n")).rstrip()
            except asyncio.IncompleteReadError as error:
                raise SmtpError("the server has closed the connection") from error
            except asyncio.LimitOverrunError as error:
                raise SmtpError("the answer of the server is too long") from error
            if not line and not texts:
                continue  # some send blank lines before a reply
            match = _REPLY.fullmatch(line)
            if match is None:
                raise SmtpError(f"the answer of the server is not SMTP: {line[:80]!r}")
            texts.append(match[3].decode("utf-8", "replace"))
            if match[2] != b"-":
                return Reply(int(match[1]), "\n".join(texts))
        raise SmtpError("the answer of the server is too long")


def _line(command: str) -> bytes:
    if "\r" in command or "\n" in command:
        raise SmtpError("a command must be one line")
    return command.encode() + b"\r\n"
