"""Show a finished message as an HTML page."""

from __future__ import annotations

import base64
import html
import re
from email import message_from_bytes
from email.message import EmailMessage
from email.policy import default

_CID = re.compile(r"\bcid:([^\"'\s)>]+)")
_HEAD = re.compile(r"<head\b[^<>]*>", re.IGNORECASE)
_BODY = re.compile(r"<body\b[^<>]*>", re.IGNORECASE)

_CHARSET = '<meta charset="utf-8">'


def page(content: bytes) -> str:
    """Return a message as HTML, with its headers above and its inline images embedded."""
    read = message_from_bytes(content, policy=default)
    assert isinstance(read, EmailMessage)
    shown = [name for name in ("From", "To", "Cc", "Reply-To", "Subject") if read[name]]
    head = "".join(f"<div><b>{name}:</b> {html.escape(str(read[name]))}</div>" for name in shown)
    files = ", ".join(part.get_filename() or "unnamed" for part in read.iter_attachments())
    if files:
        head += f"<div><b>Attachments:</b> {html.escape(files)}</div>"
    head = f'<div style="font: 14px sans-serif; padding: 12px; background: #eee">{head}</div>'
    body = read.get_body(("html", "plain"))
    text = "" if body is None else str(body.get_content())
    if body is None or body.get_content_type() != "text/html":
        return f"<!doctype html>{_CHARSET}{head}<pre>{html.escape(text)}</pre>\n"
    text = inlined(read, text)
    start = _HEAD.search(text)
    text = text[: start.end()] + _CHARSET + text[start.end() :] if start else _CHARSET + text
    start = _BODY.search(text)
    return text[: start.end()] + head + text[start.end() :] if start else head + text


def inlined(read: EmailMessage, text: str) -> str:
    """Return the HTML of a message with its inline images embedded."""
    images = {part["Content-ID"].strip("<> "): part for part in read.walk() if part["Content-ID"]}
    return _CID.sub(lambda found: _inline(images.get(found[1]), found[0]), text)


def _inline(part: EmailMessage | None, otherwise: str) -> str:
    """Return an image as a data: URL."""
    if part is None:
        return otherwise
    content = part.get_payload(decode=True)
    assert isinstance(content, bytes)
    return f"data:{part.get_content_type()};base64,{base64.b64encode(content).decode()}"
