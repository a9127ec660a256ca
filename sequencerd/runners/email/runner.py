"""The step type Email: messages sent by SMTP."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from email.utils import format_datetime
from typing import Any
from urllib.parse import quote

from sequencerd.core.config import Faults, parse_config
from sequencerd.core.faults import DefinitionError, Fault
from sequencerd.core.javascript.templates import Template
from sequencerd.core.languages import DEFAULT_LOCALE
from sequencerd.core.model import NOTHING_SHARED, MessageContext
from sequencerd.core.step_types.effects import EMAIL, EmailConfig
from sequencerd.core.task import Answer, Failed, NotStarted, Result, Suppressed, Task, Undeliverable
from sequencerd.runners import unsubscribe
from sequencerd.runners.email import mime, pending
from sequencerd.runners.email.addresses import AddressField, compile_addresses
from sequencerd.runners.email.attachments import (
    FETCH_TIMEOUT,
    MAX_FETCHES,
    Attachment,
    AttachmentError,
    Attachments,
    compile_attachment,
)
from sequencerd.runners.email.mime import AttachmentFile, parse_mailbox
from sequencerd.runners.email.oauth import AccessTokens, token_source
from sequencerd.runners.email.plain import plain_text
from sequencerd.runners.email.smtp import OFFER_TIMEOUT, Mail, MailTransport
from sequencerd.runners.email.smtp_dialogue import FINAL_TIMEOUT
from sequencerd.runners.fields import (
    RenderError,
    Translations,
    compile_field,
    compile_texts,
    marked_as_test,
    one_line,
    render,
)
from sequencerd.runners.only_to import OnlyTo
from sequencerd.runners.pace import Pace, TakePermits
from sequencerd.runners.slow_rendering import SlowRendering
from sequencerd.runners.suppression_check import Suppressions, describe
from sequencerd.runners.unsubscribe import UnsubscribeLinks
from sequencerd.settings import EmailSettings

MAX_RECIPIENTS = 100


@dataclass(frozen=True, slots=True)
class EmailProgram:
    """A compiled config: the templates by field."""

    addresses: Mapping[str, AddressField]  # from, to, cc, bcc, replyTo
    subject: Template | Translations
    text: Template | Translations | None
    html: Template | Translations | None
    headers: Mapping[str, Template]
    list_unsubscribe: Template | Translations | None
    attachments: tuple[Attachment, ...] = ()
    bounce_address: str | None = None
    links: UnsubscribeLinks | None = None  # links to unsubscribe
    locale: str = DEFAULT_LOCALE  # the path of the subject's language


class EmailRunner:
    """Sends a message for each enrollment of a step, by the mail server of the settings. `links`
    makes the links to unsubscribe. Raises ValueError for settings that cannot be used.
    """

    def __init__(
        self,
        settings: EmailSettings,
        *,
        suppressions: Suppressions | None = None,
        links: UnsubscribeLinks | None = None,
        take: TakePermits | None = None,
    ) -> None:
        limits = settings.limits
        self.retry = settings.retry
        self._suppress_bounces = settings.suppress_bounces
        self._bounce_address = settings.bounce_address
        self._links = links
        self._suppressions = suppressions
        self._only_to = OnlyTo("email.only_to", settings.only_to)
        self._rendering = SlowRendering()
        self._attachments = Attachments(settings.attachments_from)
        self._pace = Pace(limits, EMAIL.name, take)
        # the transport has limits of its own; this one covers the rest
        longest = 2 * OFFER_TIMEOUT + FINAL_TIMEOUT + self._pace.longest_wait
        longest += FETCH_TIMEOUT * (1 + limits.concurrency // MAX_FETCHES)
        self.limits = replace(limits, timeout=longest)
        self._source = token_source(settings)
        self._transport = MailTransport(
            settings.server,
            connections=limits.concurrency,
            timeout=limits.timeout,
            hello_name=settings.hello_name,
            tokens=None if self._source is None else AccessTokens(self._source.fetch),
        )
        url = settings.list_unsubscribe
        if url is None and links is not None:
            url = f"{{{{{unsubscribe.NAME}}}}}"
        self._unsubscribe = None if url is None else compile_field("listUnsubscribe", url)

    def compile(
        self, config: Mapping[str, Any], shared: MessageContext = NOTHING_SHARED
    ) -> EmailProgram:
        """Compile all templates, and check literal addresses. Raises DefinitionError."""
        parsed = parse_config(EmailConfig, config, EMAIL.name)
        fields = {
            "from": parsed.from_,
            "to": parsed.to,
            "cc": parsed.cc,
            "bcc": parsed.bcc,
            "replyTo": parsed.reply_to,
        }
        faults = Faults()
        addresses = {}
        for name, field in fields.items():
            with faults.at():
                addresses[name] = compile_addresses(
                    name, field, many=parsed.many, strict=parsed.strict
                )
                count = addresses[name].count
                if name == "to" and count == 0:
                    raise DefinitionError([Fault(("to",), "no address")])
                if name == "from" and count not in (None, 1):
                    raise DefinitionError([Fault(("from",), _not_one(count))])
        headers = {}
        for name, template in parsed.headers.items():
            with faults.at("headers"):
                headers[name] = compile_field(name, template, strict=parsed.strict)
        attachments = []
        for number, attachment in enumerate(parsed.attachments):
            with faults.at():
                attachments.append(compile_attachment(number, attachment, strict=parsed.strict))
        texts: dict[str, Template | Translations] = {}
        for name, source, escape in (
            ("subject", parsed.subject, False),
            ("text", parsed.text, False),
            ("html", parsed.html, True),
            ("listUnsubscribe", parsed.list_unsubscribe, False),
        ):
            with faults.at():
                if source is not None:
                    texts[name] = compile_texts(
                        name, source, shared, escape=escape, strict=parsed.strict
                    )
        if self._links is None:
            with faults.at():
                unsubscribe.check_reads(texts, dict(shared.partials))
            with faults.at("headers"):
                unsubscribe.check_reads(headers)
        faults.check()
        return EmailProgram(
            addresses,
            texts["subject"],
            texts.get("text"),
            texts.get("html"),
            headers,
            texts.get("listUnsubscribe", self._unsubscribe),
            tuple(attachments),
            self._bounce_address,
            self._links,
            shared.locale or DEFAULT_LOCALE,
        )

    def preview(self, program: object, task: Task) -> Mapping[str, str]:
        """Return what `run` would send, by field. Raises RenderError."""
        assert isinstance(program, EmailProgram)
        mail = write(program, task, datetime.now(UTC))
        found = {**mime.fields(mail.content), "to": ", ".join((*mail.to, *mail.others))}
        names = [
            one.value("filename", task.view) or one.value("url", task.view) or "attachment"
            for one in program.attachments
            if one.value("url", task.view) or one.value("base64", task.view)
        ]
        return {**found, "files": ", ".join(names)} if names else found

    async def write(self, program: object, task: Task) -> bytes:
        """Return the finished message of an enrollment. Raises RenderError."""
        assert isinstance(program, EmailProgram)
        files = await self._attachments.get(program.attachments, task.view)
        return write(program, task, datetime.now(UTC), files=files).content

    def as_test(self, config: Mapping[str, Any], address: str) -> dict[str, Any]:
        """Return a config that sends the message only to this address, marked as a test, and
        without headers to unsubscribe. Raises RenderError.
        """
        parse_mailbox("to", address)
        kept = {k: v for k, v in config.items() if k not in ("cc", "bcc", "listUnsubscribe")}
        headers = {k: v for k, v in config.get("headers", {}).items() if not _is_list_header(k)}
        return {
            **kept,
            "to": address,
            "subject": marked_as_test(config["subject"]),
            "headers": {**headers, "List-Unsubscribe": "", "X-Sequencerd-Test": "true"},
        }

    async def run(self, program: object, tasks: Sequence[Task]) -> Sequence[Result]:
        """Send the messages concurrently."""
        assert isinstance(program, EmailProgram)
        if len(tasks) == 1:
            return [await self._send(program, tasks[0])]
        return await asyncio.gather(*(self._send(program, task) for task in tasks))

    async def _send(self, program: EmailProgram, task: Task) -> Result:
        now = datetime.now(UTC)
        try:
            await self._rendering.turn({"text": program.text, "html": program.html}, task.view)
            with self._rendering.measured():
                mail = write(program, task, now)
            outside = self._only_to.outside(mail.recipients)
            if outside.issuperset(mail.to):
                return Suppressed(f"not sent to {self._only_to.describe(outside)}")
            files: tuple[AttachmentFile, ...] = ()
            if program.attachments:
                # suppressed recipients need none; the check is repeated after they are fetched
                without = await self._suppressed(mail, task)
                if skipped := _skipped(mail, task, without, outside):
                    return skipped
                files = await self._attachments.get(program.attachments, task.view)
            if not await self._pace.turn(task.expires):
                return NotStarted()
            without = await self._suppressed(mail, task)
            left_out = without.keys() | outside
            if skipped := _skipped(mail, task, without, outside):
                return skipped
            if task.is_late(asyncio.get_running_loop().time()):
                return NotStarted()
            if left_out or files:
                mail = write(program, task, now, left_out, files)
        except AttachmentError as error:
            return error.failed
        except RenderError as error:
            return Failed(str(error), permanent=True, asked=False, failure="bad_data")
        left = pending.read(task)
        if left is not None:
            mail = mail.only(left.to)
            if not mail.recipients:
                return pending.end("not sent to others: they are no longer recipients")
        delivery = await self._transport.deliver(
            mail, lambda: task.is_late(asyncio.get_running_loop().time())
        )
        result = pending.follow_up(task, left, delivery, self.retry, now)
        if isinstance(result, Answer | Failed) and self._suppress_bounces:
            gone = tuple(
                Undeliverable("email", mime.as_written(address), said)
                for address, said in delivery.unknown.items()
            )
            result = replace(result, undeliverable=gone) if gone else result
        if isinstance(result, Answer) and left_out:
            message = result.message or ""
            if without:
                message += f"; suppressed: {describe(without)}"
            if outside:
                message += f"; not sent to {self._only_to.describe(outside)}"
            return replace(result, message=one_line(message, 2000))
        return result

    async def _suppressed(self, mail: Mail, task: Task) -> Mapping[str, str]:
        if self._suppressions is None:
            return {}
        subject = str(task.view["subject"])
        addresses = (*mail.recipients, *mail.written, subject)
        found = await self._suppressions.find_suppressed("email", addresses, task.topic)
        names = {**mail.written, subject: subject}
        return {names.get(address, address): topic for address, topic in found.items()}

    async def check(self) -> Result:
        """Connect and log in without sending a message. Errors of the server are returned, not
        raised.
        """
        return await self._transport.check()

    async def close(self) -> None:
        """Close the connections."""
        await self._transport.close()
        await self._attachments.close()
        if self._source is not None:
            await self._source.close()


def _skipped(
    mail: Mail, task: Task, without: Mapping[str, str], outside: AbstractSet[str]
) -> Suppressed | None:
    """Return the result if no recipient is left, or if the subject is suppressed."""
    if not (without.keys() | outside >= set(mail.to) or task.view["subject"] in without):
        return None
    reasons = filter(None, (describe(without), ", ".join(sorted(outside))))
    return Suppressed(f"not sent to {', '.join(reasons)}")


def write(
    program: EmailProgram,
    task: Task,
    at: datetime,
    without: AbstractSet[str] = frozenset(),
    files: Sequence[AttachmentFile] = (),
) -> Mail:
    """Return the message for an enrollment, dated `at`, without some of the addresses. Raises
    RenderError.
    """
    view = task.view
    found = {name: field.render(view) for name, field in program.addresses.items()}
    left_out = {address.lower() for address in without}
    for name in ("to", "cc", "bcc"):
        found[name] = [one for one in found[name] if one.address.lower() not in left_out]
    if len(found["from"]) != 1:
        raise RenderError(f"from: {_not_one(len(found['from']))}")
    if not found["to"]:
        raise RenderError("to: no address")
    sender = found["from"][0]
    recipients = (*found["to"], *found["cc"], *found["bcc"])
    distinct: dict[str, str] = {}  # in any case, a server delivers to the same mailbox
    for one in recipients:
        distinct.setdefault(one.address.lower(), one.address)
    if len(distinct) > MAX_RECIPIENTS:
        raise RenderError(f"to, cc, bcc: {len(distinct)} addresses, at most {MAX_RECIPIENTS}")
    every = tuple(distinct.values())
    count = len({one.address.lower() for one in found["to"]})
    to, others = every[:count], every[count:]
    if program.links is not None:
        view = program.links.added(view, "email", to, task.topic, program.locale)
    mark = message_mark(task)
    headers = [
        mime.address_header("From", found["from"]),
        mime.address_header("To", found["to"]),
        *(mime.address_header("Cc", found["cc"]) for _ in found["cc"][:1]),
        *(mime.address_header("Reply-To", found["replyTo"]) for _ in found["replyTo"][:1]),
        mime.header("Subject", _header_value("subject", program.subject, view)),
        f"Date: {format_datetime(at)}",
        f"Message-ID: <{mark}@sequencerd.{sender.domain}>",
        *_more_headers(program, view),
    ]
    html = None if program.html is None else render("html", program.html, view)
    text = plain_text(html or "") if program.text is None else render("text", program.text, view)
    content = mime.message(
        headers,
        text,
        html,
        boundary=f"=_{mark}",  # neither quoted-printable nor base64 contains =_
        files=files,
    )
    bounces_to = (program.bounce_address or sender.address).replace("{token}", mark)
    utf8 = not all(map(str.isascii, (bounces_to, *to, *others, *headers)))
    ascii_content = None
    foreign = {address for address in (*to, *others) if not address.isascii()}
    if foreign and not foreign.issuperset(to):
        rest = write(program, task, at, foreign.union(without), files)
        ascii_content = None if rest.utf8 else rest.content
    written = {one.written: one.address for one in recipients if one.written}
    return Mail(bounces_to, to, others, content, utf8, ascii_content, written)


def message_mark(task: Task) -> str:
    """Return the mark of this message, which is the same in every attempt: its idempotency key."""
    return re.sub(r"[^A-Za-z0-9]+", ".", task.key)


def _more_headers(program: EmailProgram, view: Mapping[str, Any]) -> list[str]:
    values = {
        name: _header_value(name, template, view) for name, template in program.headers.items()
    }
    template = program.list_unsubscribe
    if template is not None and not any(n.lower() == "list-unsubscribe" for n in values):
        value = _header_value("listUnsubscribe", template, view)
        if value and not value.startswith("<"):  # otherwise it is written as in the header
            value = f"<{quote(mime.with_ascii_host(value), safe=_URL)}>"
        values["List-Unsubscribe"] = value
        if "<https:" in value.lower():
            values = {n: v for n, v in values.items() if n.lower() != "list-unsubscribe-post"}
            values["List-Unsubscribe-Post"] = "List-Unsubscribe=One-Click"
    return [_header(name, value) for name, value in values.items() if value]


_URL = "%:/?#[]@!$&'()*+,;=~-._"
_STRUCTURED = frozenset({"in-reply-to", "references", "feedback-id"})


def _not_one(count: int | None) -> str:
    return f"{count} addresses instead of one"


def _is_list_header(name: str) -> bool:
    return name.lower().startswith("list-")


def _header(name: str, value: str) -> str:
    if name.lower() == "list-id":
        return mime.list_id_header(name, value)
    if _is_list_header(name):
        return mime.structured_header(name, quote(value, safe=f' <>"{_URL}'))
    if name.lower() in _STRUCTURED:
        return mime.structured_header(name, value)
    return mime.header(name, value)


def _header_value(name: str, template: Template | Translations, view: Mapping[str, Any]) -> str:
    return mime.check_header(name, mime.unfold(render(name, template, view)).strip())
