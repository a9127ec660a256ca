"""Deliver mail by SMTP: reuse connections, and classify the server's replies."""

from __future__ import annotations

import asyncio
import re
import ssl
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial

from sequencerd.core.task import Answer, Attribution, Failed, NotStarted, Result
from sequencerd.runners.email import smtp_connect
from sequencerd.runners.email.oauth import AccessTokens, TokenError
from sequencerd.runners.email.refusals import (
    Refusal,
    RefusalMeaning,
    Stage,
    read_refusal,
    says_unknown,
)
from sequencerd.runners.email.smtp_dialogue import (
    SHUTTING_DOWN,
    Dialogue,
    MismatchError,
    SmtpError,
    SmtpRefused,
    SmtpReply,
)
from sequencerd.runners.email.smtp_pool import ConnectionPool
from sequencerd.runners.email.smtp_url import parse_url
from sequencerd.runners.error_causes import cause_of_no_connection, is_exhausted
from sequencerd.runners.fields import one_line

IDLE_TIMEOUT = 20.0
"""Seconds without a message after which a connection is closed."""

REPLY_TIMEOUT = 300.0
"""Seconds for each reply (RFC 5321, 4.5.3.2.1 to 4.5.3.2.3)."""

FINAL_TIMEOUT = 600.0
"""Seconds for the reply to the message (RFC 5321, 4.5.3.2.6). With a shorter timeout, a server that
has accepted the message might get it again.
"""

OFFER_TIMEOUT = 600.0
"""Seconds for everything before the message, so that slow replies do not add up."""

REUSE_TIMEOUT = 10.0
"""Seconds for the first reply on a connection that was idle: it may be dead, unlike a new one."""

MAX_ADDRESSES = 10


@dataclass(frozen=True, slots=True)
class Mail:
    """A message that is ready for delivery. `utf8` means that an address is not ASCII, which
    requires SMTPUTF8.
    """

    sender: str
    to: tuple[str, ...]
    others: tuple[str, ...]  # cc and bcc
    content: bytes
    utf8: bool = False
    ascii_content: bytes | None = None
    """What the recipients with ASCII addresses get from a server without SMTPUTF8; None if that is
    nothing.
    """
    written: Mapping[str, str] = field(default_factory=dict)
    """Recipients by what was written, if that has invisible characters."""

    @property
    def recipients(self) -> tuple[str, ...]:
        """All recipients."""
        return (*self.to, *self.others)

    def only(self, addresses: Collection[str]) -> Mail:
        """Return the same message for some of its recipients."""
        to = tuple(address for address in self.to if address in addresses)
        others = tuple(address for address in self.others if address in addresses)
        return replace(self, to=to, others=others)


@dataclass(frozen=True, slots=True)
class Delivery:
    """The outcome of a delivery. `later` contains the recipients that another attempt may reach,
    when others already have the message.
    """

    result: Answer | Failed | NotStarted
    later: tuple[str, ...] = ()
    unknown: Mapping[str, str] = field(default_factory=dict)
    """Addresses that do not exist according to the server, with its replies."""


def judge(reply: SmtpReply, stage: Stage) -> Failed:
    """Convert a refusal to a failure."""
    refusal = read_refusal(reply.code, reply.text, stage)
    return _failed(refusal, f"{reply.code} {one_line(reply.text)}")


def _failed(refusal: Refusal, message: str) -> Failed:
    match refusal.meaning:
        case RefusalMeaning.QUOTA:
            return Failed(message, retry_after=refusal.wait, fault="server", cause="over quota")
        case RefusalMeaning.OPERATOR:
            return Failed(message, fault="server", cause="refused")
        case RefusalMeaning.UNAVAILABLE:
            return Failed(message, fault="server", cause="unavailable")
        case RefusalMeaning.SENDER:
            return Failed(message, fault="unclear")
        case RefusalMeaning.PASSING | RefusalMeaning.RECIPIENTS:
            return Failed(message)
        case RefusalMeaning.REFUSED:
            return Failed(message, permanent=True)


class MailTransport:
    """Delivers mail to one server, over at most `connections` connections at a time.

    `timeout` is the number of seconds for each reply of the server except the last. `hello_name` is
    the name sent in EHLO. Raises ValueError for an invalid URL or name.
    """

    def __init__(
        self,
        url: str,
        *,
        connections: int,
        timeout: float = REPLY_TIMEOUT,
        hello_name: str | None = None,
        tokens: AccessTokens | None = None,
        idle: float = IDLE_TIMEOUT,
    ) -> None:
        self._server = parse_url(url, has_token=tokens is not None)
        host = self._server.host
        self._place = (
            f"[{host}]:{self._server.port}" if ":" in host else f"{host}:{self._server.port}"
        )
        self._timeout = timeout
        self._tokens = tokens
        self._slots = asyncio.Semaphore(connections)
        self._pool = ConnectionPool(self._connect, idle=idle)
        self._name = None if hello_name is None else smtp_connect.check_hello_name(hello_name)
        self._is_named = hello_name is not None

    async def deliver(self, mail: Mail, is_late: Callable[[], bool] = lambda: False) -> Delivery:
        """Deliver a message to the server. Errors of the server are returned, not raised.

        `is_late` returns whether it is too late to begin, as it may be when a connection is free.
        """
        attempt = _DeliveryAttempt()
        try:
            failed = await self._try(partial(self._deliver, mail, is_late), attempt)
        except _TooLateError:
            return Delivery(NotStarted())
        delivery = attempt.delivery(failed)
        unknown = {address: self._hide(said) for address, said in attempt.unknown.items()}
        return replace(delivery, unknown=unknown)

    async def check(self) -> Result:
        """Connect and log in without sending a message. Errors of the server are returned, not
        raised.
        """
        failed = await self._try(self._greet, _DeliveryAttempt())
        return failed or Answer(message=f"{self._place} is ready for mail")

    async def _greet(self, attempt: _DeliveryAttempt) -> None:
        attempt.dialogue, _ = await self._pool.acquire()
        await self._give_back(attempt)

    async def _try(
        self,
        work: Callable[[_DeliveryAttempt], Awaitable[Failed | None]],
        attempt: _DeliveryAttempt,
    ) -> Failed | None:
        try:
            async with self._slots:
                failed = await work(attempt)
        except SmtpRefused as error:
            about = f"{self._place} refuses {error.what}" if error.what else self._place
            failed = judge(error.reply, error.stage)
            failed = replace(failed, message=f"{about}: {failed.message}")
            if error.stage == "message" and len(attempt.rest) == 1:
                attempt.note_unknown(attempt.rest[0], error.reply)
            await self._give_back(attempt)
        except (SmtpError, TokenError, OSError) as error:
            attempt.unknown.clear()  # its replies may have been out of order
            is_servers = not attempt.begun or is_exhausted(error)
            fault: Attribution = "server" if is_servers else "unclear"
            text = f"{self._place}: {_describe(error)}"
            if isinstance(error, TokenError):
                failed = Failed(text, False, error.retry_after, fault, cause=error.cause)
            else:
                is_wrong = isinstance(error, MismatchError)
                cause = "refused" if is_wrong else cause_of_no_connection(error)
                failed = Failed(text, fault=fault, cause=cause)
        finally:
            self._end(attempt)
        if failed is None:
            return None
        message = self._hide(one_line(failed.message, 500))
        return replace(failed, message=message, unknown=attempt.handed_over)

    def _hide(self, text: str) -> str:
        text = self._server.hide(text)
        return text if self._tokens is None else self._tokens.hide(text)

    async def _deliver(
        self, mail: Mail, is_late: Callable[[], bool], attempt: _DeliveryAttempt
    ) -> Failed | None:
        """Send a message in as many transactions as the server requires."""
        failed = None
        attempt.rest = list(mail.recipients)
        since = _now()
        while attempt.rest and not failed:
            if _now() - since > OFFER_TIMEOUT:
                raise SmtpError(f"not ready for all of it within {OFFER_TIMEOUT:g} s")
            before = [*attempt.rest], {**attempt.refused}, {**attempt.unknown}
            try:
                failed = await self._transact(mail, is_late, attempt)
            except (SmtpError, OSError) as error:
                if attempt.dialogue is None or attempt.handed_over:
                    raise
                is_old = attempt.is_reused and _ends_connection(error)
                is_limit = not is_old and self._pool.is_limit(error)
                if not (is_old or is_limit):
                    raise
                self._end(attempt, has_room=not is_limit)  # nothing has been sent yet
                attempt.rest, attempt.refused, attempt.unknown = before
            else:
                await self._give_back(attempt)
        return failed

    async def _transact(
        self, mail: Mail, is_late: Callable[[], bool], attempt: _DeliveryAttempt
    ) -> Failed | None:
        """Send one transaction to the remaining recipients, and remove those that it reaches."""
        try:
            async with asyncio.timeout(OFFER_TIMEOUT):
                dialogue, attempt.is_reused = await self._pool.acquire()
                attempt.dialogue = dialogue
                if not attempt.sent and is_late():
                    await self._give_back(attempt)
                    raise _TooLateError
                within = REUSE_TIMEOUT if attempt.is_reused else self._timeout
                if mail.utf8 and "smtputf8" not in dialogue.extensions:
                    text = f"{self._place} accepts only ASCII addresses (no SMTPUTF8)"
                    refused = Failed(text, permanent=True)
                    others = [one for one in attempt.rest if one.isascii()]
                    if mail.ascii_content is None or not others:
                        return refused
                    attempt.refused |= {one: refused for one in attempt.rest if not one.isascii()}
                    attempt.rest = others
                    mail = replace(mail, content=mail.ascii_content, utf8=False)
                limit, size = dialogue.max_size, len(mail.content)
                if limit is not None and size > limit:
                    text = f"{self._place} accepts messages of at most {limit} bytes, not {size}"
                    return Failed(text, permanent=True)
                replies = await _begin(mail, attempt, within)
                is_lost = len(replies) < len(attempt.rest[: attempt.at_once])
                are_left = len(replies) < len(attempt.rest)
                taken = attempt.sort(mail, replies)
                if not attempt.waits(mail) and (is_lost or (are_left and not taken)):
                    return None  # the others follow, if it is lost on another connection
                if not taken:
                    return attempt.failure(mail)
                reply = await dialogue.say("DATA")
        except TimeoutError:
            raise SmtpError(f"not ready for the message within {OFFER_TIMEOUT:g} s") from None
        if reply.code == 354:
            attempt.handed_over = True
            reply = await dialogue.transfer(mail.content, within=FINAL_TIMEOUT)
            if reply.code < 400 and reply.is_refusal:
                raise SmtpError(f"answers the message with {reply.code}")
            attempt.handed_over = False
        elif not reply.is_refusal:
            raise SmtpError(f"answers DATA with {reply.code}")
        elif reply.code == SHUTTING_DOWN:  # of the message, it knows nothing yet
            raise SmtpRefused(reply, "recipient")
        if reply.is_refusal:
            if len(replies) > 1 and _is_recipient_limit(reply):
                all_taken = len(taken) == len(replies)
                attempt.at_once = len(taken) // 2 if all_taken else len(taken)
                return None
            raise SmtpRefused(reply, "message")
        attempt.begun = False
        attempt.sent.extend(taken)
        attempt.rest = [address for address in attempt.rest if address not in taken]
        attempt.said = one_line(f"{reply.code} {reply.text}")
        return None

    async def _connect(self) -> Dialogue:
        if not self._is_named:  # determined once, because it may take a DNS query
            self._name = await smtp_connect.own_name()
            self._is_named = True
        return await smtp_connect.connect(
            self._server, name=self._name, reply_timeout=self._timeout, tokens=self._tokens
        )

    async def _give_back(self, attempt: _DeliveryAttempt) -> None:
        """Keep the connection for the next message; reset it first if a message was begun."""
        dialogue = attempt.dialogue
        if dialogue is None:
            return
        with suppress(SmtpError, OSError):
            if not (attempt.begun and (await dialogue.say("RSET")).is_refusal):
                attempt.dialogue = None
                self._pool.release(dialogue)
        self._end(attempt)  # unless it was released

    def _end(self, attempt: _DeliveryAttempt, *, has_room: bool = True) -> None:
        """Close a connection whose state is unknown."""
        attempt.begun = False
        dialogue, attempt.dialogue = attempt.dialogue, None
        if dialogue is not None:
            self._pool.discard(dialogue, has_room=has_room)

    async def close(self) -> None:
        """Close all connections."""
        await self._pool.close()


class _TooLateError(Exception):
    """It is too late to begin."""


@dataclass(slots=True)
class _DeliveryAttempt:
    """The progress of a delivery."""

    dialogue: Dialogue | None = None  # until the connection is given back
    is_reused: bool = False  # the connection was idle, so the server may have closed it
    begun: bool = False  # the server has the envelope of a message that was not sent yet
    handed_over: bool = False  # a message was sent, and not answered yet
    rest: list[str] = field(default_factory=list)  # recipients not sent to the server, or not yet
    at_once: int | None = None  # how many of them the server accepts in a transaction
    sent: list[str] = field(default_factory=list)
    refused: dict[str, Failed] = field(default_factory=dict)
    said: str = ""  # the server's reply to the last message that it accepted
    unknown: dict[str, str] = field(default_factory=dict)  # addresses, with the server's replies

    def note_unknown(self, address: str, reply: SmtpReply) -> None:
        """Record an address if the server says that it does not exist."""
        if reply.code >= 500 and says_unknown(reply.text):
            self.unknown[address] = f"{reply.code} {one_line(reply.text)}"

    def sort(self, mail: Mail, replies: Sequence[SmtpReply]) -> list[str]:
        """Return the recipients of this transaction; none if the message is not sent to any.

        If a `to` address is refused temporarily, the message is sent to no recipient yet, so that
        all get it together. Recipients beyond the server's limit are left for another transaction,
        and if the server has closed the connection after a refusal, all others. Raises SmtpRefused
        if it shuts down.
        """
        taken = []
        left = self.rest[len(replies) :]
        for address, reply in zip(self.rest, replies, strict=False):
            if reply.code == SHUTTING_DOWN:
                raise SmtpRefused(reply, "recipient")
            self.note_unknown(address, reply)
            if not reply.is_refusal:
                taken.append(address)
            elif _is_recipient_limit(reply):
                left.append(address)
                self.refused[address] = judge(reply, "recipient")
            else:
                self.refused[address] = judge(reply, "recipient")
        for address in left:
            if taken:
                self.refused.pop(address, None)
        self.rest = taken + left
        return [] if self.waits(mail) else taken

    def waits(self, mail: Mail) -> bool:
        """Return whether the message is not sent yet because of a `to` address."""
        refused = (self.refused[address] for address in mail.to if address in self.refused)
        return not self.sent and any(not failed.permanent for failed in refused)

    def failure(self, mail: Mail) -> Failed:
        """Return one failure for all refused recipients."""
        failures = list(self.refused.values())
        waits = [failed.retry_after for failed in failures if failed.retry_after]
        faults = {failed.fault for failed in failures if not failed.permanent}
        all_refused = len(self.refused) == len(mail.recipients)
        return Failed(
            ("" if all_refused else "not sent to any recipient yet, ")
            + f"refused: {_list_refusals(self.refused)}",
            permanent=all(failed.permanent for failed in failures),
            retry_after=max(waits, default=None),
            fault=faults.pop() if len(faults) == 1 else "enrollment",
        )

    def delivery(self, failed: Failed | None) -> Delivery:
        """Return the outcome. A message that reached one recipient has not failed."""
        if not self.sent:
            assert failed is not None
            return Delivery(failed)
        refused = dict.fromkeys(self.rest, failed or _LEFT) | self.refused
        later = [address for address, why in refused.items() if not why.permanent]
        is_unknown = failed is not None and failed.unknown
        message = f"sent to {_listed(self.sent)}: {self.said}"
        if refused:
            message += f"; refused: {_list_refusals(refused)}"
        if is_unknown:
            message += "; it may have been delivered"
        return Delivery(Answer(message=one_line(message, 2000), unknown=is_unknown), tuple(later))


_LEFT = Failed("too many recipients at a time")


def _is_recipient_limit(reply: SmtpReply) -> bool:
    """Return whether a transaction has too many recipients. Some servers say so of the message."""
    return read_refusal(*reply, "recipient").meaning is RefusalMeaning.RECIPIENTS


async def _begin(mail: Mail, attempt: _DeliveryAttempt, first_within: float) -> list[SmtpReply]:
    """Send the sender and the recipients, and return the replies to the recipients. Raises
    SmtpRefused.
    """
    dialogue = attempt.dialogue
    assert dialogue is not None
    options = f" SIZE={len(mail.content)}" if "size" in dialogue.extensions else ""
    if mail.utf8:
        options += " SMTPUTF8 BODY=8BITMIME"
    recipients = [f"RCPT TO:<{address}>" for address in attempt.rest[: attempt.at_once]]
    attempt.begun = True
    sender, *replies = await dialogue.ask(
        f"MAIL FROM:<{mail.sender}>{options}", *recipients, first_within=first_within
    )
    if sender.is_refusal:
        raise SmtpRefused(sender, "sender", f"the sender {mail.sender}")
    return replies


def _ends_connection(error: Exception) -> bool:
    """Return whether a connection cannot be used any more. One that refuses a sender may have
    reached its limit of messages, or lost its login or its state: only a new one tells.
    """
    if not isinstance(error, SmtpRefused):
        return True
    return error.reply.code == SHUTTING_DOWN or error.stage == "sender"


def _now() -> float:
    return asyncio.get_running_loop().time()


def _list_refusals(refused: Mapping[str, Failed]) -> str:
    shown = list(refused.items())[:MAX_ADDRESSES]
    more = f" and {len(refused) - len(shown)} more" if len(refused) > len(shown) else ""
    return ", ".join(f"{address} ({failed.message})" for address, failed in shown) + more


def _listed(addresses: list[str]) -> str:
    more = len(addresses) - MAX_ADDRESSES
    shown = ", ".join(addresses[:MAX_ADDRESSES])
    return f"{shown} and {more} more" if more > 0 else shown


_SENT = r"(?:\"(?:[^\"\\]|\\.)+\"|[^\s\",:]+)@[^\s,:]+"


def read_sent(message: str) -> list[str]:
    """Return the recipients that the message of a delivery names."""
    found = re.search(rf"\bsent to ({_SENT}(?:, {_SENT})*)(?: and \d+ more)?: \d{{3}}\b", message)
    return re.findall(_SENT, found[1]) if found else []


def _describe(error: Exception) -> str:
    """Describe a connection error, with advice if there is any."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return (
            f"the certificate is not trusted: {error.verify_message} (see cafile in the SMTP URL)"
        )
    if isinstance(error, OSError) and error.strerror:
        return error.strerror  # without the number
    return str(error) or type(error).__name__
