"""Mail over SMTP: connections that are kept and reused, and what a server's answers mean."""

from __future__ import annotations

import asyncio
import re
import socket
import ssl
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial

from aiosmtplib import SMTP
from aiosmtplib.errors import (
    SMTPAuthenticationError,
    SMTPConnectError,
    SMTPDataError,
    SMTPException,
    SMTPHeloError,
    SMTPNotSupported,
    SMTPResponseException,
    SMTPSenderRefused,
)

from sequencerd.core.model import Answer, Failed, Result
from sequencerd.runners.causes import is_exhausted
from sequencerd.runners.fields import one_line
from sequencerd.runners.smtp_dialogue import Dialogue, Reply
from sequencerd.runners.smtp_url import parse_url

IDLE = 20.0
"""After so many seconds without a message a connection is closed."""

THROTTLED = timedelta(minutes=1)
"""A server that throttles names no time: it is asked again after this one."""

SHOWN_ADDRESSES = 10

_LOGIN_CODES = (530, 534, 535, 538)  # the operator's to mend, not the message's fault
_ENHANCED = re.compile(r"([245])\.\d{1,3}\.\d{1,3}\b")
_THROTTLED = re.compile(
    r"throttl|rate.?limit|4\.7\.28\b|too much mail"
    r"|too many (concurrent |simultaneous )?(connections|sessions|messages|e?mails|requests)"
    r"|(daily|hourly|sending|rate).{0,20}(limit|quota|rate).{0,20}exceed"
    r"|exceed.{0,40}(daily|hourly|sending|rate).{0,20}(limit|quota|rate)",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class Mail:
    """A message ready to go. `utf8`: an address is not ASCII, so the server must do SMTPUTF8."""

    sender: str
    to: tuple[str, ...]
    others: tuple[str, ...]  # cc and bcc
    content: bytes
    utf8: bool = False


def judge(code: int, text: str) -> Failed:
    """What a refusal means for the message.

    5xx is permanent, unless it is about our login, about a rate, or its enhanced code (RFC 3463)
    says otherwise. Throttling is the server's fault.
    """
    message = f"{code} {one_line(text)}"
    if _THROTTLED.search(text):
        return Failed(message, retry_after=THROTTLED, fault="server")
    enhanced = _ENHANCED.match(text)
    passing = enhanced is not None and enhanced[1] == "4"
    return Failed(message, permanent=code >= 500 and code not in _LOGIN_CODES and not passing)


def unavailable(code: int, text: str) -> Failed:
    """What it means that the server as such refuses to work: nothing for the message."""
    return replace(judge(code, text), permanent=False, fault="server")


class Postman:
    """Delivers mail to one server, over at most `connections` connections at a time."""

    def __init__(self, url: str, *, connections: int, timeout: float, idle: float = IDLE) -> None:
        self._server = parse_url(url)
        self._place = f"{self._server.host}:{self._server.port}"
        self._timeout = timeout
        self._idle_for = idle
        self._slots = asyncio.Semaphore(connections)
        self._idle: list[tuple[Dialogue, float]] = []  # with the time of their last use
        self._timer: asyncio.TimerHandle | None = None
        self._quitting: set[asyncio.Task[None]] = set()
        self._name: str | None = None

    async def deliver(self, mail: Mail) -> Result:
        """Hands a message over to the server. Never raises for what the server does."""
        return await self._try(partial(self._deliver, mail))

    async def check(self) -> Result:
        """Connects and logs in, and sends nothing. Never raises for what the server does."""
        return await self._try(self._greet)

    async def _greet(self, attempt: _Attempt) -> Result:
        attempt.dialogue = await self._connect()
        await self._give_back(attempt)
        return Answer(message=f"{self._place} is ready for mail")

    async def _try(self, work: Callable[[_Attempt], Awaitable[Result]]) -> Result:
        attempt = _Attempt()
        try:
            async with self._slots, asyncio.timeout(self._timeout):
                return await work(attempt)
        except SMTPResponseException as error:
            failed = self._judge(error, attempt)
        except TimeoutError:
            text = f"no answer from {self._place} within {self._timeout:g} s"
            failed = Failed(text, fault="unclear" if attempt.begun else "server")
        except SMTPNotSupported as error:
            failed = Failed(f"{self._place} {error}", permanent=True)
        except (SMTPException, OSError) as error:
            text = f"{self._place}: {_describe(error)}"
            is_servers = not attempt.begun or is_exhausted(error)
            failed = Failed(text, fault="server" if is_servers else "unclear")
        finally:
            attempt.end()
        message = self._server.hide(one_line(failed.message, 500))
        return replace(
            failed, message=message, unknown=attempt.handed_over and not attempt.answered
        )

    def _judge(self, error: SMTPResponseException, attempt: _Attempt) -> Failed:
        """What a refusal means; most of them are about the server or our login."""
        about_message = isinstance(error, SMTPSenderRefused | SMTPDataError)
        failed = (judge if about_message else unavailable)(error.code, error.message)
        if error.code == 421 and not attempt.handed_over:
            failed = unavailable(error.code, error.message)
        about = self._place
        if isinstance(error, SMTPSenderRefused):
            about += f" refuses the sender {error.sender}"
        elif isinstance(error, SMTPAuthenticationError):
            about += " refuses the login"
        return replace(failed, message=f"{about}: {failed.message}")

    async def _deliver(self, mail: Mail, attempt: _Attempt) -> Result:
        try:
            dialogue, (sender, *recipients) = await self._open(mail, attempt)
            if sender.is_refusal:
                raise SMTPSenderRefused(*sender, mail.sender)
        except (SMTPSenderRefused, SMTPNotSupported):
            await self._give_back(attempt)
            raise
        result = await self._transfer(dialogue, mail, recipients, attempt)
        await self._give_back(attempt)
        return result

    async def _open(self, mail: Mail, attempt: _Attempt) -> tuple[Dialogue, list[Reply]]:
        """Names sender and recipients, on a connection that was idle or else on a new one."""
        while dialogue := self._take():
            attempt.dialogue = dialogue
            try:
                replies = await _begin(mail, attempt, dialogue)
                if not 400 <= replies[0].code < 500:
                    return dialogue, replies
            except SMTPNotSupported:
                raise
            except (SMTPException, OSError):
                pass
            dialogue.close()  # a limit of the connection, or given up: nothing was sent yet
        dialogue = attempt.dialogue = await self._connect()
        return dialogue, await _begin(mail, attempt, dialogue)

    async def _transfer(
        self, dialogue: Dialogue, mail: Mail, replies: Sequence[Reply], attempt: _Attempt
    ) -> Result:
        refused: dict[str, Failed] = {}
        recipients = (*mail.to, *mail.others)
        for address, reply in zip(recipients, replies, strict=True):
            if reply.code == 421:
                raise SMTPResponseException(*reply)
            if reply.is_refusal:
                refused[address] = judge(*reply)
        addressees = [refused[address] for address in mail.to if address in refused]
        if len(refused) == len(recipients) or not all(failed.permanent for failed in addressees):
            # Not sent to anybody yet: an addressee who is refused for now gets it with the rest.
            return _refused(refused, everybody=len(refused) == len(recipients))
        (reply,) = await dialogue.ask("DATA")
        if not reply.is_refusal:
            raise SMTPException(f"answers DATA with {reply.code}")
        if reply.code == 354:
            attempt.handed_over = True
            reply = await dialogue.transfer(mail.content)
            attempt.answered = True
        if reply.is_refusal:
            await self._give_back(attempt)
            raise SMTPDataError(*reply)
        attempt.begun = False
        taken = [address for address in recipients if address not in refused]
        answer = one_line(f"{reply.code} {reply.text}")
        message = f"sent to {_listed(taken)}: {answer}"
        if refused:
            message += f"; refused: {_told(refused)}"
        return Answer(message=one_line(message, 2000))

    def _client(self) -> SMTP:
        server = self._server
        return SMTP(
            hostname=server.host,
            port=server.port,
            username=server.user,
            password=server.password,
            local_hostname=self._name,
            timeout=None,
            use_tls=server.tls,
            start_tls=False if server.tls else server.starttls,
            tls_context=server.context,
        )

    async def _connect(self) -> Dialogue:
        self._name = self._name or await _own_name()  # found once: it may take a DNS query
        client = self._client()
        try:
            await client.connect()
            if client.is_ehlo_or_helo_needed:
                try:
                    await client.ehlo()
                except SMTPHeloError:
                    await client.helo()
        except BaseException:
            client.close()
            raise
        return Dialogue(client)

    # Keeping connections

    def _take(self) -> Dialogue | None:
        while self._idle:
            dialogue, since = self._idle.pop()
            if dialogue.is_open and _now() - since < self._idle_for:
                return dialogue
            self._quit(dialogue)
        return None

    async def _give_back(self, attempt: _Attempt) -> None:
        """Keeps the connection for the next message; one that was begun is forgotten first."""
        dialogue = attempt.dialogue
        if dialogue is None:
            return
        if attempt.begun:
            try:
                await dialogue.ask("RSET")
            except (SMTPException, OSError):
                return
        attempt.dialogue = None
        if dialogue.is_open:
            self._idle.append((dialogue, _now()))
            if self._timer is None:
                self._timer = asyncio.get_running_loop().call_later(self._idle_for, self._drop)

    def _drop(self) -> None:
        """Closes what has been idle for too long."""
        kept = [(c, since) for c, since in self._idle if _now() - since < self._idle_for]
        for entry in self._idle:
            if entry not in kept:
                self._quit(entry[0])
        self._idle = kept
        self._timer = None
        if kept:
            wait = kept[0][1] + self._idle_for - _now()
            self._timer = asyncio.get_running_loop().call_later(wait, self._drop)

    def _quit(self, dialogue: Dialogue) -> None:
        task = asyncio.get_running_loop().create_task(_say_goodbye(dialogue))
        self._quitting.add(task)
        task.add_done_callback(self._quitting.discard)

    async def close(self) -> None:
        """Closes all connections."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for dialogue, _ in self._idle:
            self._quit(dialogue)
        self._idle.clear()
        await asyncio.gather(*self._quitting)


@dataclass(slots=True)
class _Attempt:
    """How far a delivery has come."""

    dialogue: Dialogue | None = None  # until it is given back
    handed_over: bool = False  # the message is on its way
    answered: bool = False  # the server has said what became of it
    begun: bool = False  # the server knows of a message that is not sent yet

    def end(self) -> None:
        """Closes a connection whose state nobody knows."""
        if self.dialogue is not None:
            self.dialogue.close()


async def _begin(mail: Mail, attempt: _Attempt, dialogue: Dialogue) -> list[Reply]:
    """Names the sender and the recipients: the replies, in this order."""
    if mail.utf8 and not dialogue.has_smtputf8:
        raise SMTPNotSupported("takes ASCII addresses only (no SMTPUTF8)")
    options = f" SIZE={len(mail.content)}" if dialogue.has_size else ""
    if mail.utf8:
        options += " SMTPUTF8 BODY=8BITMIME"
    recipients = [f"RCPT TO:<{address}>" for address in (*mail.to, *mail.others)]
    attempt.begun = True
    return await dialogue.ask(f"MAIL FROM:<{mail.sender}>{options}", *recipients)


async def _own_name() -> str:
    """This machine's name for EHLO. aiosmtplib would ask in threads that the exit waits for."""
    name = socket.gethostname()
    try:
        found = await asyncio.get_running_loop().getaddrinfo(
            name, None, type=socket.SOCK_STREAM, flags=socket.AI_CANONNAME
        )
    except OSError:
        return name
    return next((canonical for *_, canonical, _ in found if canonical), name)


async def _say_goodbye(dialogue: Dialogue) -> None:
    with suppress(SMTPException, OSError):
        async with asyncio.timeout(2):
            await dialogue.quit()
    dialogue.close()


def _now() -> float:
    return asyncio.get_running_loop().time()


def _refused(refused: Mapping[str, Failed], *, everybody: bool) -> Failed:
    """One failure for all recipients that were refused."""
    waits = [failed.retry_after for failed in refused.values() if failed.retry_after]
    return Failed(
        ("" if everybody else "not sent to anybody yet, ") + f"refused: {_told(refused)}",
        permanent=all(failed.permanent for failed in refused.values()),
        retry_after=max(waits, default=None),
        fault="server" if all(f.fault == "server" for f in refused.values()) else "enrollment",
    )


def _told(refused: Mapping[str, Failed]) -> str:
    shown = list(refused.items())[:SHOWN_ADDRESSES]
    more = f" and {len(refused) - len(shown)} more" if len(refused) > len(shown) else ""
    return ", ".join(f"{address} ({failed.message})" for address, failed in shown) + more


def _listed(addresses: list[str]) -> str:
    more = len(addresses) - SHOWN_ADDRESSES
    shown = ", ".join(addresses[:SHOWN_ADDRESSES])
    return f"{shown} and {more} more" if more > 0 else shown


def _describe(error: Exception) -> str:
    """An error of the connection, with what helps where one knows it."""
    if isinstance(error, SMTPConnectError) and isinstance(error.__cause__, OSError):
        error = error.__cause__  # it says no less, and not the place again
    text = str(error) or type(error).__name__
    if isinstance(error, ssl.SSLCertVerificationError):
        return (
            f"the certificate is not trusted: {error.verify_message} (see cafile in the SMTP URL)"
        )
    if "STARTTLS extension not supported" in text:
        return "the server offers no STARTTLS, and the SMTP URL asks for it (starttls=never: don't)"
    return text
