"""Read bounces and abuse reports: which message came back, and which addresses are invalid.

A message is recognised by a mark in its Message-ID and, with `email.bounce_address`, in the
envelope sender to which the bounce is sent. Anyone can write a bounce, so it counts only for
addresses to which this message was sent according to the history.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from email import message_from_bytes
from email.message import Message
from typing import Literal, NamedTuple

from sequencerd.runners.email.refusals import says_unknown
from sequencerd.runners.fields import one_line

MAX_READ = 1_000_000  # bytes of a message; a returned message may be large, and is not needed

_MARK = re.compile(
    r"(?<![0-9.])(\d{1,18})\.(\d{1,9})\.([0-9a-f]{16})[0-9a-f]{16}(?![0-9a-f])", re.IGNORECASE
)
_ADDRESS = re.compile(r"[^\s<>\"(),:;\[\]]+@[^\s<>\"(),:;\[\]]+")
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
    message = message_from_bytes(raw[:MAX_READ])
    parts = list(message.walk())
    marks = {
        MessageMark(int(enrollment), int(visit), tag.lower())
        for text in (raw[:MAX_READ].decode("latin-1"), *map(_text, parts))
        for enrollment, visit, tag in _MARK.findall(text)
    }
    found = tuple(sorted(marks))
    feedback = [part for part in parts if part.get_content_type() == "message/feedback-report"]
    if feedback:
        return BounceReport("complaint", found, tuple(_complaints(feedback[0])))
    statuses = [part for part in parts if part.get_content_type() == "message/delivery-status"]
    dead = [*_statuses(statuses)] if statuses else [*_plain(message, parts)]
    return BounceReport("bounce", found, tuple(dict.fromkeys(dead)))


def _text(part: Message) -> str:
    """Return the text of a part, decoded; empty for parts that contain other parts."""
    payload = part.get_payload(decode=True)
    return payload.decode("utf-8", "replace") if isinstance(payload, bytes) else ""


def _fields(part: Message) -> Iterator[Message]:
    """Yield the groups of fields in a report, which the parser returns as messages."""
    payload = part.get_payload()
    groups = payload if isinstance(payload, list) else [payload]
    for group in groups:
        if isinstance(group, Message):
            yield group
        elif isinstance(group, str):
            yield from (message_from_bytes(block.encode()) for block in group.split("\n\n"))


def _field(fields: Message, name: str) -> str:
    """Return a field as one line, without the type before it, as in `rfc822; a@example.com`."""
    value = str(fields.get(name, ""))
    return one_line(value.partition(";")[2] if ";" in value else value, 1000)


def _statuses(parts: list[Message]) -> Iterator[UnknownAddress]:
    """Yield the recipients that a delivery status notification (RFC 3464) reports as unknown."""
    for fields in (group for part in parts for group in _fields(part)):
        if str(fields.get("Action", "")).strip().lower() != "failed":
            continue
        status, said = _field(fields, "Status"), _field(fields, "Diagnostic-Code")
        status = status.split(" ")[0]
        reply = re.sub(r"^\d{3}[ -]+", "", said)
        has_code = re.match(r"\d\.\d{1,3}\.\d{1,3}\b", reply) or re.search(r"\(#\d\.", reply)
        if says_unknown(reply if has_code else f"{status} {reply}"):
            for name in ("Original-Recipient", "Final-Recipient"):
                if address := _ADDRESS.search(_field(fields, name)):
                    yield UnknownAddress(address[0], said or status)


def _complaints(part: Message) -> Iterator[UnknownAddress]:
    """Yield the recipients that complain (RFC 5965); an empty address if the report omits it."""
    for fields in _fields(part):
        kind = str(fields.get("Feedback-Type", "")).strip().lower()
        if kind not in _COMPLAINTS:
            continue
        recipients = [str(value) for value in fields.get_all("Original-Rcpt-To", [])]
        found = [address for value in recipients for address in _ADDRESS.findall(value)]
        yield from (UnknownAddress(address, f"abuse report: {kind}") for address in found or [None])


_NEAR = 400  # characters after an address in which the reply is expected
_REPLY = re.compile(r"(?:\b5\d\d[ -]+(?=5\.\d{1,3}\.\d))?(5\.\d{1,3}\.\d{1,3}\b[^\n]*)")
_RETURNED = re.compile(
    r"^[ >-]*(?:-+ .*(?:copy of|original|returned|message header).*|Return-Path:|Received:)",
    re.IGNORECASE | re.MULTILINE,
)


def _plain(message: Message, parts: list[Message]) -> Iterator[UnknownAddress]:
    """Yield the recipients that a bounce without a report calls unknown: each address in its text,
    before the returned message, that is followed by a reply with such a code.
    """
    if not _is_from_mail_system(message):
        return
    leaf = next((part for part in parts if part.get_content_type() == "text/plain"), None)
    text = "" if leaf is None else _text(leaf)
    if returned := _RETURNED.search(text):
        text = text[: returned.start()]
    addresses = list(_ADDRESS.finditer(text))
    for number, address in enumerate(addresses):
        name = address[0].rstrip(".")
        others = (a.start() for a in addresses[number + 1 :] if a[0].rstrip(".") != name)
        end = min(next(others, len(text)), address.end() + _NEAR)
        about = text[address.end() : end]
        codes = [*_REPLY.findall(about), *re.findall(r"[^\n]*\(#5\.\d+\.\d+\)", about)]
        if codes and all(map(says_unknown, codes)):
            yield UnknownAddress(name, one_line(codes[0]))


def _is_from_mail_system(message: Message) -> bool:
    """Return whether a message has the empty sender, as bounces do (RFC 5321, 4.5.5)."""
    if str(message.get("Return-Path", "")).strip() == "<>":
        return True
    sender = str(message.get("From", "")).lower()
    return "mailer-daemon" in sender or "postmaster" in sender or "mail delivery" in sender
