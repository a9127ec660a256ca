"""Read bounces and abuse reports: which message came back, and which addresses are invalid.

A message is recognised by a mark in its Message-ID and, with `email.bounce_address`, in the
envelope sender to which the bounce is sent. Anyone can write a bounce, so it counts only for
addresses to which this message was sent according to the history.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from email import message_from_bytes, message_from_string
from email.message import Message
from itertools import groupby, islice
from typing import Literal, NamedTuple

from sequencerd.runners.email.plain import plain_text
from sequencerd.runners.email.refusals import enhanced_code, says_unknown
from sequencerd.runners.fields import one_line

MAX_READ = 1_000_000  # bytes of a message; a returned message may be large, and is not needed
MAX_TEXT = 100_000  # characters of a bounce that is no report
MAX_DEPTH = 5  # messages within messages
MAX_MARKS = 100  # each takes a query, and a bounce has one or two

_MARK = re.compile(
    r"(?<![0-9.])(\d{1,18})\.(\d{1,9})\.([0-9a-f]{16})[0-9a-f]{16}(?![0-9a-f])", re.IGNORECASE
)
_APART = (
    r"\s<>\"(),:;\[\]（）＜＞「」『』【】《》〈〉：；，、。"  # beside addresses, also in Chinese
)
_ADDRESS = re.compile(  # of a long text, each character is read a few times
    rf"(?:\"(?:[^\"\\\n]|\\.){{1,64}}\"|(?<![^{_APART}])[^{_APART}]+)@[^{_APART}]+"
)
_ESCAPED = re.compile(r"\\x\{([0-9A-Fa-f]{2,5})\}")
_COMPLAINTS = frozenset({"abuse", "fraud", "opt-out"})


class MessageMark(NamedTuple):
    """What identifies a message: the enrollment, the visit, and half of the enrollment's random
    tag.
    """

    enrollment: int
    visit: int
    tag: str


class UnknownAddress(NamedTuple):
    """An address that a bounce reports as unknown; None means the recipient of the message."""

    address: str | None
    reason: str


@dataclass(frozen=True, slots=True)
class BounceReport:
    """The content of a bounce or an abuse report."""

    kind: Literal["bounce", "complaint"]
    marks: tuple[MessageMark, ...]
    dead: tuple[UnknownAddress, ...]


def read_report(raw: bytes) -> BounceReport:
    """Read a message. If it is neither a bounce nor a complaint, `dead` is empty."""
    raw = re.sub(rb"\r\n?", b"\n", raw[:MAX_READ])
    parts = _parts(raw)
    marks = dict.fromkeys(
        MessageMark(int(enrollment), int(visit), tag.lower())
        for text in (raw.decode("latin-1"), *map(_text, parts))
        for enrollment, visit, tag in _MARK.findall(text)
    )
    found = tuple(sorted(islice(marks, MAX_MARKS)))
    feedback = [part for part in parts if part.type == "message/feedback-report"]
    if feedback:
        return BounceReport("complaint", found, tuple(_complaints(feedback[0])))
    if complaints := [*_complaints_of_microsoft(parts)]:
        return BounceReport("complaint", found, tuple(complaints))
    statuses = [part for part in parts if part.type in _STATUS_TYPES]
    dead = [*_statuses(statuses, parts)] if statuses else [*_plain(parts)]
    return BounceReport("bounce", found, tuple(dict.fromkeys(dead)))


# --- the parts of a message

_STATUS_TYPES = frozenset({"message/delivery-status", "message/global-delivery-status"})  # RFC 6533
_REPORT_TYPES = _STATUS_TYPES | {"message/feedback-report"}


class _Part(Message):
    """A part of a message. The content of one of type message/... is not parsed with the rest, but
    decoded first: some mail systems encode it, as RFC 6533 allows.
    """

    @property
    def type(self) -> str:
        """The content type."""
        return super().get_content_type()

    def get_content_type(self) -> str:
        """Return the type as the parser of the standard library should see it."""
        return self.type.replace("message/", "application/x-message-")


def _parts(raw: bytes) -> list[_Part]:
    """Return the parts of a message, and of the messages in it; none if it is nested too deeply."""
    found: list[_Part] = []
    level = [raw]
    for _ in range(MAX_DEPTH):
        parts: list[_Part] = []
        for one in level:
            with suppress(RecursionError):
                parts += message_from_bytes(one, _Part).walk()
        found += parts
        level = [
            _content(part)
            for part in parts
            if part.type.startswith("message/") and part.type not in _REPORT_TYPES
        ]
    return found


def _content(part: _Part) -> bytes:
    """Return the content of a part, decoded; empty for parts that contain other parts."""
    payload = part.get_payload(decode=True)
    return payload if isinstance(payload, bytes) else b""


def _text(part: _Part) -> str:
    """Return the text of a part; empty for parts that contain other parts."""
    try:
        return _content(part).decode(part.get_content_charset("utf-8"), "replace")
    except (LookupError, ValueError):
        return _content(part).decode("utf-8", "replace")


# --- reports


def _fields(part: _Part) -> Iterator[Message]:
    """Yield the groups of fields in a report. Some have nothing between the groups."""
    for block in re.split(r"\n[ \t]*(?=\n)", _text(part)):
        if not block.strip():
            continue
        names = _RECIPIENT.findall(block)
        is_one = names.count(names[0]) == 1 if names else True
        groups = [block] if is_one else re.split(rf"(?m)^(?={names[0]})", block)
        yield from (message_from_string(group.lstrip()) for group in groups)


def _field(fields: Message, name: str) -> str:
    """Return a field as one line, without the type before it, as in `rfc822; a@example.com`."""
    return one_line(re.sub(r"^\s*[\w-]+\s*;", "", str(fields.get(name, ""))), 1000)


def _addresses(text: str) -> list[str]:
    """Return the addresses in a field, which may be escaped as in RFC 6533."""
    text = _ESCAPED.sub(lambda escaped: chr(int(escaped[1], 16)), text)
    return [_bare(address) for address in _ADDRESS.findall(text)]


def _bare(address: str) -> str:
    """Return an address without what mail systems write around it."""
    return address.strip("'").rstrip(".")


_RECIPIENT = re.compile(r"^(?:Original|Final)-Recipient:", re.IGNORECASE | re.MULTILINE)
_INNER_REPLY = re.compile(r"\b5\d\d[ -]+[\"']?(5\.\d{1,3}\.\d{1,3}\b.*)")


def _statuses(reports: list[_Part], parts: list[_Part]) -> Iterator[UnknownAddress]:
    """Yield the recipients that a delivery status notification (RFC 3464) reports as unknown. If it
    has no reason at all, as by OpenSMTPD, that of its text counts.
    """
    explained: list[UnknownAddress] | None = None
    for fields in (group for part in reports for group in _fields(part)):
        action = str(fields.get("Action", "")).partition("(")[0]
        if action.strip().lower() != "failed":
            continue
        status, said = _field(fields, "Status"), _field(fields, "Diagnostic-Code")
        status = status.split(" ")[0]
        if status == "5.0.0" and not said:
            recipients = _addresses(_field(fields, "Final-Recipient"))
            explained = [*_plain(parts)] if explained is None else explained
            yield from (dead for dead in explained if dead.address in recipients)
            continue
        inner = _INNER_REPLY.search(said)  # what the other server said, after words of this one
        reply = inner[1] if inner else re.sub(r"^\d{3}[ -]+", "", said)
        if says_unknown(reply if any(enhanced_code(reply)) else f"{status} {reply}"):
            for name in ("Original-Recipient", "Final-Recipient"):
                for address in _addresses(_field(fields, name))[:1]:
                    yield UnknownAddress(address, said or status)


def _complaints(part: _Part) -> Iterator[UnknownAddress]:
    """Yield the recipients that complain (RFC 5965); an empty address if the report omits it."""
    for fields in _fields(part):
        kind = str(fields.get("Feedback-Type", "")).strip().lower()
        if kind not in _COMPLAINTS:
            continue
        recipients = [str(value) for value in fields.get_all("Original-Rcpt-To", [])]
        found: list[str | None] = [a for value in recipients for a in _addresses(value)]
        yield from (UnknownAddress(address, f"abuse report: {kind}") for address in found or [None])


def _complaints_of_microsoft(parts: list[_Part]) -> Iterator[UnknownAddress]:
    """Yield the recipients of Outlook.com that complain: its reports are the message itself, with
    the recipient in a header.
    """
    if not parts or "staff@hotmail.com" not in str(parts[0].get("From", "")).lower():
        return
    for part in parts[1:]:
        for address in _addresses(str(part.get("X-HmXmrOriginalRecipient", ""))):
            yield UnknownAddress(address, "abuse report")


_NEAR = 400  # characters after an address in which the reply is expected
_REPLY = re.compile(r"(?<![\d.])(?<!503[ -])5\.\d{1,3}\.\d{1,3}\b[^\n]*")  # 503 is about no address
_REPLY_OF_QMAIL = re.compile(r"[^\n]*\(#5\.\d+\.\d+\b[^\n)]*\)")
_RETURNED = re.compile(
    r"^[ >-]*(?:-+ .*(?:copy of|original|returned|message header).*|Return-Path:|Received:)",
    re.IGNORECASE | re.MULTILINE,
)


def _plain(parts: list[_Part]) -> Iterator[UnknownAddress]:
    """Yield the recipients that a bounce without a report calls unknown: each address in its text,
    before the returned message, that is followed by a reply with such a code.
    """
    if not parts or not _is_from_mail_system(parts[0]):
        return
    texts = {part.type: _text(part) for part in reversed(list(parts[0].walk()))}
    text = texts.get("text/plain") or plain_text(texts.get("text/html", "")) or ""
    text = text[:MAX_TEXT]
    if returned := _RETURNED.search(text):
        text = text[: returned.start()]
    named = groupby(_ADDRESS.finditer(text), lambda address: _bare(address[0]))
    places = [(name, [*same]) for name, same in named]
    ends = [same[0].start() for _, same in places[1:]]
    for (name, same), end in zip(places, [*ends, len(text)], strict=False):
        for address in same:
            about = text[address.end() : min(end, address.end() + _NEAR)]
            codes = [*_REPLY.findall(about), *_REPLY_OF_QMAIL.findall(about)]
            if codes and all(map(says_unknown, codes)):
                yield UnknownAddress(name, one_line(codes[0]))


def _is_from_mail_system(message: Message) -> bool:
    """Return whether a message has the empty sender, as bounces do (RFC 5321, 4.5.5)."""
    path, sender = (str(message.get(name, "")).lower() for name in ("Return-Path", "From"))
    if path.strip() == "<>" or "mailer-daemon" in path:  # Postfix passes it to a pipe by this name
        return True
    return "mailer-daemon" in sender or "postmaster" in sender or "mail delivery" in sender
