"""Deliver mail by SMTP: reuse connections, and classify the server's replies."""

from __future__ import annotations

import asyncio
import re
import ssl
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from time import monotonic

from sequencerd.core.task import Answer, Attribution, Failed, NotStarted, Result
from sequencerd.runners.email import smtp_connect
from sequencerd.runners.email.oauth import AccessTokens, TokenError
from sequencerd.runners.email.refusals import (
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
from sequencerd.runners.email.smtp_pool import ConnectionPool, WornConnectionError
from sequencerd.runners.email.smtp_url import parse_url
from sequencerd.runners.error_causes import cause_of_no_connection, is_exhausted
from sequencerd.runners.fields import one_line

IDLE_TIMEOUT = 20.0
"""Seconds without a message after which a connection is closed."""

OFFER_TIMEOUT = 600.0
"""Seconds for everything before the message, so that slow replies do not add up."""

REUSE_TIMEOUT = 10.0
"""Seconds for the first reply on a connection that was idle: it may be dead, unlike a new one."""

MAX_LISTED = 10  # addresses that a message names


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
    message = f"{reply.code} {one_line(reply.text)}"
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
        timeout: float,
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
        sending = _Sending(mail, is_late, self._pool, self._place)
        try:
            async with self._slots:
                ended = await sending.send()
        except (SmtpError, TokenError, OSError) as error:
            ended = self._failure(error, sending.dialogue)
            if not isinstance(error, SmtpRefused):
                sending.unknown.clear()  # the replies may have been out of order
        if isinstance(ended, Failed):
            ended = replace(ended, message=self._hide(one_line(ended.message, 500)))
        delivery = sending.delivery(ended)
        unknown = {address: self._hide(said) for address, said in sending.unknown.items()}
        return replace(delivery, unknown=unknown)

    async def check(self) -> Result:
        """Connect and log in without sending a message. Errors of the server are returned, not
        raised.
        """
        try:
            async with self._slots, self._pool.borrow():
                return Answer(message=f"{self._place} is ready for mail")
        except (SmtpError, TokenError, OSError) as error:
            failed = self._failure(error, None)
            return replace(failed, message=self._hide(one_line(failed.message, 500)))

    def _failure(self, error: SmtpError | TokenError | OSError, used: Dialogue | None) -> Failed:
        """Return what an error on a connection means. If the server had the envelope of the
        message, the message may be the cause.
        """
        if isinstance(error, SmtpRefused):
            failed = judge(error.reply, error.stage)
            about = f"{self._place} refuses {error.what}" if error.what else self._place
            return replace(failed, message=f"{about}: {failed.message}")
        text = f"{self._place}: {_describe(error)}"
        has_envelope = used is not None and used.has_envelope
        fault: Attribution = "unclear" if has_envelope and not is_exhausted(error) else "server"
        if isinstance(error, TokenError):
            return Failed(text, False, error.retry_after, fault, cause=error.cause)
        is_wrong = isinstance(error, MismatchError)
        cause = "refused" if is_wrong else cause_of_no_connection(error)
        return Failed(text, fault=fault, cause=cause)

    def _hide(self, text: str) -> str:
        text = self._server.hide(text)
        return text if self._tokens is None else self._tokens.hide(text)

    async def _connect(self) -> Dialogue:
        if not self._is_named:  # determined once, because it may take a DNS query
            self._name = await smtp_connect.own_name()
            self._is_named = True
        return await smtp_connect.connect(
            self._server, name=self._name, reply_timeout=self._timeout, tokens=self._tokens
        )

    async def close(self) -> None:
        """Close all connections."""
        await self._pool.close()


@dataclass(slots=True)
class _Sending:
    """A message on its way, in as many transactions as the server requires."""

    mail: Mail
    is_late: Callable[[], bool]
    pool: ConnectionPool
    place: str  # the server, for messages
    dialogue: Dialogue | None = None  # of the last transaction
    at_once: int | None = None  # how many recipients the server accepts in a transaction
    sent: list[str] = field(default_factory=list)
    refused: dict[str, Failed] = field(default_factory=dict)
    said: str = ""  # the server's reply to the last message that it accepted
    unknown: dict[str, str] = field(default_factory=dict)  # addresses, with the server's replies
    rest: list[str] = field(init=False)  # recipients not sent to the server, or not yet

    def __post_init__(self) -> None:
        self.rest = list(self.mail.recipients)

    async def send(self) -> Failed | NotStarted | None:
        """Send the message. Return why some recipients do not get it. Raises SmtpError, TokenError
        or OSError.
        """
        since = monotonic()
        ended: Failed | NotStarted | None = None
        while self.rest and ended is None:
            if monotonic() - since > OFFER_TIMEOUT:
                raise SmtpError(f"not ready for all of it within {OFFER_TIMEOUT:g} s")
            before = [*self.rest], {**self.refused}, {**self.unknown}
            self.dialogue = None
            limit = asyncio.timeout(OFFER_TIMEOUT)
            try:
                async with limit, self.pool.borrow() as self.dialogue:
                    ended = await self._transact(self.dialogue, limit)
            except WornConnectionError:
                self.rest, self.refused, self.unknown = before
            except TimeoutError:
                if not limit.expired():
                    raise
                raise SmtpError(f"not ready for the message within {OFFER_TIMEOUT:g} s") from None
        return ended

    async def _transact(
        self, dialogue: Dialogue, limit: asyncio.Timeout
    ) -> Failed | NotStarted | None:
        """Send one transaction to the remaining recipients, and remove those that it reaches. The
        time limit ends when the message itself is sent.
        """
        if not self.sent and self.is_late():
            return NotStarted()
        mail = self._acceptable(dialogue)
        if isinstance(mail, Failed):
            return mail
        offered = self.rest[: self.at_once]
        replies = await self._offer(mail, offered, dialogue)
        are_left = len(replies) < len(self.rest)
        taken = self._sort(replies)
        if not self._waits and (len(replies) < len(offered) or (are_left and not taken)):
            return None  # the others follow, if it is lost on another connection
        if not taken:
            return self._failure()
        reply = await dialogue.say("DATA")
        if reply.code == 354:
            limit.reschedule(None)
            reply = await dialogue.transfer(mail.content)
        elif not reply.is_refusal:
            raise SmtpError(f"answers DATA with {reply.code}")
        elif reply.code == SHUTTING_DOWN:  # of the message, it knows nothing yet
            raise SmtpRefused(reply, "recipient")
        if not reply.is_refusal:
            self.sent += taken
            self.rest = [address for address in self.rest if address not in taken]
            self.said = one_line(f"{reply.code} {reply.text}")
        elif len(replies) > 1 and _is_recipient_limit(reply):
            self.at_once = len(taken) // 2 if len(taken) == len(replies) else len(taken)
        else:
            if len(self.rest) == 1:
                self._note_unknown(self.rest[0], reply)
            raise SmtpRefused(reply, "message")
        return None

    def _acceptable(self, dialogue: Dialogue) -> Mail | Failed:
        """Return the message in a form that the server accepts, without the recipients that it
        cannot have.
        """
        mail = self.mail
        if mail.utf8 and "smtputf8" not in dialogue.extensions:
            text = f"{self.place} accepts only ASCII addresses (no SMTPUTF8)"
            refused = Failed(text, permanent=True)
            others = [one for one in self.rest if one.isascii()]
            if mail.ascii_content is None or not others:
                return refused
            self.refused |= {one: refused for one in self.rest if not one.isascii()}
            self.rest = others
            mail = replace(mail, content=mail.ascii_content, utf8=False)
        limit, size = dialogue.max_size, len(mail.content)
        if limit is not None and size > limit:
            text = f"{self.place} accepts messages of at most {limit} bytes, not {size}"
            return Failed(text, permanent=True)
        return mail

    async def _offer(
        self, mail: Mail, recipients: Sequence[str], dialogue: Dialogue
    ) -> list[SmtpReply]:
        """Send the sender and the recipients, and return the replies to the recipients. Raises
        SmtpRefused.
        """
        options = f" SIZE={len(mail.content)}" if "size" in dialogue.extensions else ""
        if mail.utf8:
            options += " SMTPUTF8 BODY=8BITMIME"
        dialogue.has_envelope = True
        sender, *replies = await dialogue.ask(
            f"MAIL FROM:<{mail.sender}>{options}",
            *(f"RCPT TO:<{address}>" for address in recipients),
            first_within=REUSE_TIMEOUT if dialogue.is_reused else None,
        )
        if sender.is_refusal:
            raise SmtpRefused(sender, "sender", f"the sender {mail.sender}")
        return replies

    def _sort(self, replies: Sequence[SmtpReply]) -> list[str]:
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
            self._note_unknown(address, reply)
            if not reply.is_refusal:
                taken.append(address)
                continue
            self.refused[address] = judge(reply, "recipient")
            if _is_recipient_limit(reply):
                left.append(address)
        for address in left:
            if taken:
                self.refused.pop(address, None)
        self.rest = taken + left
        return [] if self._waits else taken

    @property
    def _waits(self) -> bool:
        """Whether the message is not sent yet because of a `to` address."""
        refused = (self.refused[one] for one in self.mail.to if one in self.refused)
        return not self.sent and any(not failed.permanent for failed in refused)

    def _note_unknown(self, address: str, reply: SmtpReply) -> None:
        """Record an address if the server says that it does not exist."""
        if reply.code >= 500 and says_unknown(reply.text):
            self.unknown[address] = f"{reply.code} {one_line(reply.text)}"

    def _failure(self) -> Failed:
        """Return one failure for all refused recipients."""
        failures = list(self.refused.values())
        waits = [failed.retry_after for failed in failures if failed.retry_after]
        faults = {failed.fault for failed in failures if not failed.permanent}
        all_refused = len(self.refused) == len(self.mail.recipients)
        return Failed(
            ("" if all_refused else "not sent to any recipient yet, ")
            + f"refused: {_list_refusals(self.refused)}",
            permanent=all(failed.permanent for failed in failures),
            retry_after=max(waits, default=None),
            fault=faults.pop() if len(faults) == 1 else "enrollment",
        )

    def delivery(self, ended: Failed | NotStarted | None) -> Delivery:
        """Return the outcome. A message that reached one recipient has not failed."""
        unknown = self.dialogue is not None and self.dialogue.is_handed_over
        failed = replace(ended, unknown=unknown) if isinstance(ended, Failed) else None
        if not self.sent:
            assert ended is not None
            return Delivery(failed or ended)
        refused = dict.fromkeys(self.rest, failed or _LEFT) | self.refused
        later = [address for address, why in refused.items() if not why.permanent]
        message = f"sent to {_listed(self.sent)}: {self.said}"
        if refused:
            message += f"; refused: {_list_refusals(refused)}"
        if unknown:
            message += "; it may have been delivered"
        return Delivery(Answer(message=one_line(message, 2000), unknown=unknown), tuple(later))


_LEFT = Failed("too many recipients at a time")


def _is_recipient_limit(reply: SmtpReply) -> bool:
    """Return whether a transaction has too many recipients. Some servers say so of the message."""
    return read_refusal(*reply, "recipient").meaning is RefusalMeaning.RECIPIENTS


def _list_refusals(refused: Mapping[str, Failed]) -> str:
    return _listed([f"{address} ({failed.message})" for address, failed in refused.items()])


def _listed(items: Sequence[str]) -> str:
    more = len(items) - MAX_LISTED
    shown = ", ".join(items[:MAX_LISTED])
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
