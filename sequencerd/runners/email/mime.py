"""Format addresses and messages according to RFC 5322 and MIME.

The standard library's EmailMessage is not used: it turns long URLs in List-Unsubscribe and long
lists in References into encoded words, which mail programs do not decode there.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from email import message_from_bytes
from email.header import Header
from email.policy import default
from typing import NamedTuple
from urllib.parse import quote

import idna

from sequencerd.runners.fields import RenderError, one_line

MAX_HEADER = 10_000  # characters of one header
MAX_LINE = 78
MAX_WORD = 900  # some servers reject longer lines (RFC 5322, 2.1.1: 998 octets)
MAX_TOKEN = 990

_ITEM = re.compile(r'(?:"(?:[^"\\]|\\.)*+"|[^",])*+')
_CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f-\x9f\u2028\u2029]")
_FOLD = re.compile(r"\r?\n[ \t]+")
_HALF = re.compile(r"[\ud800-\udfff]")
_INVISIBLE = re.compile(  # those at both ends may be meant within a name in some scripts
    r"[\u00ad\u061c\u180e\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\ufeff]+"
    r"|^[\u200c\u200d]+|[\u200c\u200d]+$"
)
_ATOM = r"[^\s\x00-\x20\x7f-\x9f()<>\[\]:;@\\,.\"]"
_DOT_ATOM = re.compile(rf"{_ATOM}+(?:\.{_ATOM}+)*")
_DOTS_ANYWHERE = re.compile(rf"(?:{_ATOM}|\.)+")  # such as old addresses of Japanese carriers
_QUOTED_LOCAL = re.compile(r'"((?:[^"\\\x00-\x1f\x7f-\x9f]|\\[^\x00-\x1f\x7f-\x9f])+)"')
_LABEL = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?", re.IGNORECASE)
_PLAIN_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~ -]+")


@dataclass(frozen=True, slots=True)
class Mailbox:
    """`name <address>`; the address's domain is in ASCII. `written` is the address with invisible
    characters if it was written so.
    """

    name: str
    address: str
    written: str = ""

    @property
    def domain(self) -> str:
        """The domain of the address."""
        return self.address.rpartition("@")[2]

    def __str__(self) -> str:
        """Return the mailbox as written in a header."""
        if not self.name:
            return self.address
        name = self.name
        if not _PLAIN_NAME.fullmatch(name):
            name = '"' + re.sub(r'(["\\])', r"\\\1", name) + '"'
        if not name.isascii() or "=?" in name or len(name) + len(self.address) > MAX_WORD:
            name = _encoded_words(self.name, 10)
        return f"{name} <{self.address}>"


def parse_mailboxes(field: str, text: str) -> list[Mailbox]:
    """Parse `a@x, Ada <b@x>, "Lovelace, Ada" <c@x>`; empty text gives none. Raises RenderError."""
    found = []
    position = 0
    check_header(field, text := text.strip())
    while position < len(text):
        item = _ITEM.match(text, position)
        assert item is not None  # at least it matches nothing
        position = item.end()
        if text[position : position + 1] == '"':
            raise RenderError(f"{field}: a quotation mark is not closed in {one_line(text, 100)!r}")
        position += 1
        if item[0].strip():
            found.append(parse_mailbox(field, item[0]))
    return found


def parse_mailbox(field: str, text: str) -> Mailbox:
    """Parse one mailbox: the text before the last < is its name. Raises RenderError."""
    check_header(field, text := text.strip())
    if not text.endswith(">"):
        return make_mailbox(field, "", text)
    name, opened, address = text[:-1].rpartition("<")
    name = name.strip()
    if name.startswith('"') and name.endswith('"') and len(name) > 1:
        name = re.sub(r"\\(.)", r"\1", name[1:-1])
    elif not opened or re.search(r'[<>"]', name):
        raise RenderError(f"{field}: {one_line(text, 100)!r} is not an address")
    return make_mailbox(field, name.strip(), address.strip())


def make_mailbox(field: str, name: str, text: str) -> Mailbox:
    """Return a mailbox with this name and address. Raises RenderError."""
    return Mailbox(name, parse_address(field, text), text if visible(text) != text else "")


def visible(address: str) -> str:
    """Return an address without the invisible characters that are copied with it from web pages and
    documents.
    """
    return address if address.isascii() else _INVISIBLE.sub("", address)


def parse_address(field: str, text: str) -> str:
    """Return an address with its domain in ASCII, and its local part quoted if RFC 5321 requires
    that: `a..b@docomo.ne.jp` as `"a..b"@docomo.ne.jp`. Raises RenderError.
    """
    local, at, domain = visible(text).rpartition("@")
    bad = RenderError(f"{field}: {one_line(text, 100)!r} is not an address such as ada@example.com")
    if not _QUOTED_LOCAL.fullmatch(local) and not _DOTS_ANYWHERE.fullmatch(local):
        raise bad
    local = unquoted(local)
    try:
        domain = domain if domain.isascii() else idna.encode(domain, uts46=True).decode("ascii")
        long = len(local.encode()) > 64 or len(domain) > 253
    except ValueError:  # errors of idna, and lone surrogates
        raise bad from None
    if not at or long or not all(_LABEL.fullmatch(label) for label in domain.split(".")):
        raise bad
    return f"{quoted(local)}@{domain}"


_HOST = re.compile(r"(https?://)([^/?#:@\s]+)", re.IGNORECASE)


def with_ascii_host(url: str) -> str:
    """Return a URL with its host in ASCII, which the percent-encoding of a URL would spoil."""
    found = _HOST.match(url)
    if found is None or found[2].isascii():
        return url
    with suppress(ValueError):
        host = idna.encode(found[2], uts46=True).decode("ascii")
        return f"{found[1]}{host}{url[found.end() :]}"
    return url


def unquoted(local: str) -> str:
    """Return a local part without quotation marks."""
    found = _QUOTED_LOCAL.fullmatch(local)
    return re.sub(r"\\(.)", r"\1", found[1]) if found else local


def quoted(local: str) -> str:
    """Return a local part with quotation marks if RFC 5321 requires them."""
    if _DOT_ATOM.fullmatch(local):
        return local
    return '"' + re.sub(r'(["\\])', r"\\\1", local) + '"'


def as_written(address: str) -> str:
    """Return an address as users write it: without quotation marks if only dots require them."""
    local, _, domain = address.rpartition("@")
    plain = unquoted(local)
    return f"{plain}@{domain}" if _DOTS_ANYWHERE.fullmatch(plain) else address


def check_header(field: str, text: str) -> str:
    """Return a text if it fits into a header: no line break can add another. Raises RenderError."""
    if _CONTROL.search(text):
        raise RenderError(f"{field}: a line break or control character cannot be in a header")
    if _HALF.search(text):
        raise RenderError(f"{field}: half of a character (a lone surrogate)")
    if len(text) > MAX_HEADER:
        raise RenderError(f"{field}: {len(text)} characters are too many, at most {MAX_HEADER}")
    return text


def unfold(text: str) -> str:
    """Return the value of a header as one line, unfolded according to RFC 5322, 2.2.3."""
    return _FOLD.sub(" ", text)


def header(name: str, text: str) -> str:
    """Return a folded header with free text; other than ASCII becomes encoded words (RFC 2047)."""
    if not text.isascii() or "=?" in text or _longest(text) > MAX_WORD:
        return f"{name}: {_encoded_words(text, len(name) + 2)}"
    return _folded(name, text)


def structured_header(name: str, text: str) -> str:
    """Return a folded header with identifiers or URLs, in which encoded words are not allowed.
    Raises RenderError for a value that is not ASCII or too long for a line.
    """
    if not text.isascii():
        raise RenderError(f"{name}: {one_line(text, 50)!r} is not ASCII")
    if _longest(text) > MAX_TOKEN:
        raise RenderError(f"{name}: a word of more than {MAX_TOKEN} characters fits into no line")
    return _folded(name, text)


def list_id_header(name: str, text: str) -> str:
    """Return a folded List-Id (RFC 2919), `words <id>`. Unlike the URLs of other headers of lists,
    its words may be encoded. Raises RenderError.
    """
    words, opened, id_ = text.rpartition("<")
    if words.isascii():
        return structured_header(name, text)
    encoded = _encoded_words(words.strip(' "'), len(name) + 2)
    return structured_header(name, f"{opened}{id_}").replace(":", f": {encoded}\r\n", 1)


def _longest(text: str) -> int:
    """Return the length of the longest word, or of the longest gap, which cannot be folded."""
    return max(map(len, re.findall("[^ ]+| +", text)), default=0)


def _folded(name: str, text: str) -> str:
    lines = [f"{name}:"]
    for word in text.split(" "):
        is_first = lines[-1] == f"{name}:"
        if word and len(lines[-1]) + 1 + len(word) > (MAX_TOKEN if is_first else MAX_LINE):
            lines.append(f" {word}")
        else:
            lines[-1] += f" {word}"
    return "\r\n".join(lines)


def address_header(name: str, mailboxes: Iterable[Mailbox]) -> str:
    """Return a folded header with addresses."""
    written = [str(mailbox) for mailbox in mailboxes]
    line = f"{name}: {', '.join(written)}"
    return line if len(line) <= MAX_LINE else f"{name}: " + ",\r\n ".join(written)


def _encoded_words(text: str, used: int) -> str:
    return Header(text, "utf-8", maxlinelen=75, header_name="x" * used).encode(linesep="\r\n")


class AttachmentFile(NamedTuple):
    """A complete attachment. HTML refers to one with a content id as cid:..."""

    name: str
    type: str
    content: bytes
    content_id: str | None = None


def message(
    headers: Iterable[str],
    text: str | None,
    html: str | None,
    boundary: str,
    files: Sequence[AttachmentFile] = (),
) -> bytes:
    """Return the complete message, with `text`, `html`, or both. Raises RenderError.

    No part may contain `boundary`, which begins with =_; if there are several boundaries, none is
    the beginning of another.
    """
    try:
        parts = [
            _part(subtype, content)
            for subtype, content in (("plain", text), ("html", html))
            if content is not None
        ]
        head = "\r\n".join([*headers, "MIME-Version: 1.0"]).encode()
    except UnicodeEncodeError:
        raise RenderError("text, html: half of a character (a lone surrogate)") from None
    inline = [_file(one) for one in files if html is not None and one.content_id is not None]
    others = [_file(one) for one in files if html is None or one.content_id is None]
    if inline:
        related = boundary.replace("=_", "=_r", 1)
        parts[-1] = _multipart('related; type="text/html"', related, [parts[-1], *inline])
    body = parts[0] if len(parts) == 1 else _multipart("alternative", boundary, parts)
    if others:
        body = _multipart("mixed", boundary.replace("=_", "=_m", 1), [body, *others])
    return head + b"\r\n" + body


def _multipart(subtype: str, boundary: str, parts: Iterable[bytes]) -> bytes:
    mark = boundary.encode()
    return b"".join(
        [
            b'Content-Type: multipart/%b; boundary="%b"\r\n' % (subtype.encode(), mark),
            *(b"\r\n--%b\r\n%b" % (mark, part) for part in parts),
            b"\r\n--%b--\r\n" % mark,
        ]
    )


def _file(file: AttachmentFile) -> bytes:
    """Return a file as a part."""
    kind = "attachment" if file.content_id is None else "inline"
    head = [f"Content-Type: {file.type}", "Content-Transfer-Encoding: base64"]
    head.append(";\r\n ".join([f"Content-Disposition: {kind}", *_file_name(file.name)]))
    if file.content_id is not None:
        head.append(f"Content-ID: <{file.content_id}>")
    content = base64.encodebytes(file.content).replace(b"\n", b"\r\n")
    return "\r\n".join(head).encode() + b"\r\n\r\n" + content


MAX_PARAMETER = 60  # characters, so that the line is not too long


def _file_name(name: str) -> list[str]:
    """Return the parameters that contain a file name, in pieces if it is long (RFC 2231)."""
    if name.isascii() and len(name) <= MAX_PARAMETER:
        return ['filename="{}"'.format(re.sub(r'(["\\])', r"\\\1", name))]
    pieces = [""]
    for character in name:
        encoded = quote(character, safe="")
        if len(pieces[-1]) + len(encoded) > MAX_PARAMETER:
            pieces.append("")
        pieces[-1] += encoded
    if len(pieces) == 1:
        return [f"filename*=UTF-8''{pieces[0]}"]
    pieces[0] = f"UTF-8''{pieces[0]}"
    return [f"filename*{number}*={piece}" for number, piece in enumerate(pieces)]


def _part(subtype: str, content: str) -> bytes:
    """Return a part as quoted-printable: all servers accept it, and no line is too long."""
    lines = content.replace("\r\n", "\n").replace("\r", "\n").encode()
    body = binascii.b2a_qp(lines, istext=True).replace(b"\n", b"\r\n")
    return (
        b'Content-Type: text/%b; charset="utf-8"\r\n'
        b"Content-Transfer-Encoding: quoted-printable\r\n\r\n%b\r\n" % (subtype.encode(), body)
    )


def fields(content: bytes) -> dict[str, str]:
    """Return the parts of a message that a recipient sees: from, subject, and text and html if
    present.
    """
    read = message_from_bytes(content, policy=default)
    found = {"from": str(read["From"]), "subject": str(read["Subject"])}
    for name, kind in (("text", "plain"), ("html", "html")):
        part = read.get_body((kind,))
        if part is not None:
            found[name] = str(part.get_content()).rstrip("\r\n")
    return found
