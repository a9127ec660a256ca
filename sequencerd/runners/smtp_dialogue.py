"""Mail transactions on an SMTP connection (RFC 5321), several commands at once (RFC 2920).

aiosmtplib connects, greets and logs in. It sends one command at a time and takes an answer that
nobody waits for as a fault, so the transactions are ours.
"""

from __future__ import annotations

import asyncio
import re
from typing import NamedTuple, cast

from aiosmtplib import SMTP
from aiosmtplib.errors import SMTPException, SMTPServerDisconnected

LONGEST_LINE = 8192  # bytes; RFC 5321 says 512, servers say more
LONGEST_REPLY = 100  # lines
GROUP = 100
"""Commands that are sent before their replies are read. More might fill both directions: then the
server waits for us to read, and we for it."""

_REPLY = re.compile(rb"([2-5]\d\d)([ -]|$)(.*)", re.DOTALL)
_LINE_END = re.compile(rb"\r\n|\r|\n")
_LEADING_DOT = re.compile(rb"^\.", re.MULTILINE)


class Reply(NamedTuple):
    """What the server answers a command."""

    code: int
    text: str

    @property
    def is_refusal(self) -> bool:
        """Whether the command has failed, for now or for good."""
        return not 200 <= self.code < 300


class Dialogue:
    """A connection whose greetings are over. Raises SMTPException or OSError where it breaks."""

    def __init__(self, client: SMTP) -> None:
        loop = asyncio.get_running_loop()
        transport = cast(asyncio.Transport, client.transport)  # uvloop's have a class of their own
        self._pipelining = client.supports_extension("pipelining")
        self.has_smtputf8 = client.supports_extension("smtputf8")
        self.has_size = client.supports_extension("size")
        self._reader = asyncio.StreamReader(limit=LONGEST_LINE, loop=loop)
        protocol = asyncio.StreamReaderProtocol(self._reader, loop=loop)
        transport.set_protocol(protocol)
        protocol.connection_made(transport)
        self._writer = asyncio.StreamWriter(transport, protocol, self._reader, loop)

    @property
    def is_open(self) -> bool:
        """Whether nobody has ended it, as far as is known."""
        return not (self._writer.is_closing() or self._reader.at_eof())

    async def ask(self, *commands: str) -> list[Reply]:
        """Sends commands and reads a reply to each, all at once if the server allows it.

        A 421 is the last that the server says: it holds for the commands behind it too.
        """
        size = GROUP if self._pipelining else 1
        replies: list[Reply] = []
        for start in range(0, len(commands), size):
            group = commands[start : start + size]
            await self._write(b"".join(_line(command) for command in group))
            for _ in group:
                replies.append(await self._read())
                if replies[-1].code == 421:
                    self.close()
                    return replies + replies[-1:] * (len(commands) - len(replies))
        return replies

    async def transfer(self, content: bytes) -> Reply:
        """Sends a message, after the reply 354 to DATA."""
        lines = _LINE_END.sub(b"\r\n", content).removesuffix(b"\r\n")
        await self._write(_LEADING_DOT.sub(b"..", lines) + b"\r\n.\r\n")
        return await self._read()

    async def quit(self) -> None:
        """Takes leave, and closes."""
        try:
            await self.ask("QUIT")
        finally:
            self.close()

    def close(self) -> None:
        """Ends the connection at once."""
        self._writer.close()

    async def _write(self, data: bytes) -> None:
        if not self.is_open:
            raise SMTPServerDisconnected("the server has closed the connection")
        self._writer.write(data)
        await self._writer.drain()

    async def _read(self) -> Reply:
        texts: list[str] = []
        while len(texts) < LONGEST_REPLY:
            try:
                line = await self._reader.readuntil(b"\n")
            except asyncio.IncompleteReadError as error:
                raise SMTPServerDisconnected("the server has closed the connection") from error
            except asyncio.LimitOverrunError as error:
                raise SMTPException("the answer of the server is too long") from error
            match = _REPLY.fullmatch(line.rstrip())
            if match is None:
                raise SMTPException(f"the answer of the server is not SMTP: {line[:80]!r}")
            texts.append(match[3].decode("utf-8", "replace"))
            if match[2] != b"-":
                return Reply(int(match[1]), "\n".join(texts))
        raise SMTPException("the answer of the server is too long")


def _line(command: str) -> bytes:
    if "\r" in command or "\n" in command:
        raise SMTPException("a command must be one line")
    return command.encode() + b"\r\n"
