"""Attachments of messages: from data, or fetched from hosts that the settings allow."""

from __future__ import annotations

import asyncio
import base64
import binascii
import mimetypes
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any
from urllib.parse import unquote

import httpx

from sequencerd.core.config import Faults
from sequencerd.core.faults import DefinitionError
from sequencerd.core.javascript.templates import Template
from sequencerd.core.step_types.effects import AttachmentConfig
from sequencerd.core.task import Failed
from sequencerd.runners.email.mime import AttachmentFile
from sequencerd.runners.fields import RenderError, compile_field, one_line, render
from sequencerd.runners.http_client import AnswerTooLarge, HttpClient, PrivateAddress, Unreachable
from sequencerd.runners.http_reply import HttpReply, judge
from sequencerd.urls import check_url

MAX_BYTES = 10 * 1024 * 1024  # of all attachments of a message, before their encoding
MAX_NAME = 100  # characters
LONG_SUFFIX = 20  # characters
MAX_REDIRECTS = 3
MAX_FETCHES = 4  # messages whose attachments are fetched at the same time
CALL_TIMEOUT = 30.0  # seconds, for one attachment
FETCH_TIMEOUT = 60.0  # seconds, for all attachments of a message

_COMPLETE = frozenset({200, 203})  # not 202, which means later, nor 204 and 206
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_SOURCE = re.compile(r"(?:(https?)://)?([^/:?#@\s\[\]]+|\[[0-9a-f:.]+\])(?::([0-9]{1,5}))?(/\S*)?")
_TYPE = re.compile(r"[a-z0-9][a-z0-9.+-]{0,80}/[a-z0-9][a-z0-9.+-]{0,80}", re.IGNORECASE)
_PARAMETER = re.compile(
    r"\s*;\s*([a-z0-9-]{1,40}=(?:[\w.+-]{1,80}|\"[\w .,:+/-]{0,80}\"))\s*", re.ASCII | re.IGNORECASE
)
MAX_PARAMETERS = 5
_CONTENT_ID = re.compile(r"[A-Za-z0-9.!#$%&'*+/=?^_`{|}~@-]{1,200}")
_UNSAFE = re.compile(r'[<>:"/\\|?*]')
_BLANK = re.compile(r"\s+")
_UNKNOWN = "application/octet-stream"


class AttachmentError(ValueError):
    """An attachment that is not available, now or ever: `failed` tells which."""

    def __init__(
        self,
        message: str,
        *,
        permanent: bool = True,
        is_data: bool = False,
        reply: HttpReply | None = None,
    ) -> None:
        super().__init__(message)
        # this is not the mail server's fault, so its other messages need not wait
        self.failed = Failed(
            message, permanent, asked=False, failure="bad_data" if is_data else "error"
        )
        judged = None if reply is None else judge(reply, message)
        if judged is not None:
            self.failed = Failed(message, judged.permanent, judged.retry_after, asked=False)


@dataclass(frozen=True, slots=True)
class Attachment:
    """The templates of one attachment, by key: there is either `url` or `base64`."""

    path: str
    templates: Mapping[str, Template]
    inline: bool

    def value(self, key: str, view: Mapping[str, Any]) -> str:
        """Render a template; empty if there is none. Raises RenderError."""
        template = self.templates.get(key)
        return "" if template is None else render(f"{self.path}.{key}", template, view).strip()


def compile_attachment(number: int, config: AttachmentConfig, *, strict: bool) -> Attachment:
    """Compile the templates of an attachment. Raises DefinitionError."""
    faults = Faults()
    templates = {}
    sources = config.model_dump(by_alias=True, exclude_none=True, exclude={"inline"})
    for key, source in sources.items():
        with faults.at("attachments", number):
            templates[key] = compile_field(key, source, strict=strict)
    url = config.url
    if url is not None and "{{" not in url and not re.match(r"https?://[^/]", url):
        with faults.at("attachments", number, "url"):
            raise DefinitionError("must be a URL such as https://example.com/terms.pdf")
    faults.check()
    return Attachment(f"attachments.{number}", templates, config.inline)


# --- allowed URLs


@dataclass(frozen=True, slots=True)
class UrlPattern:
    """A pattern of URLs. `is_exact` means that it names one host, without wildcards."""

    scheme: str
    host: str
    port: int
    path: str
    is_exact: bool

    def matches(self, url: httpx.URL) -> bool:
        """Return whether a URL matches this pattern."""
        return (
            url.scheme == self.scheme
            and (url.port or _PORTS[url.scheme]) == self.port
            and any(fnmatchcase(host, self.host) for host in _hosts(url))
            and fnmatchcase(url.path, self.path)
        )


_PORTS = {"http": 80, "https": 443}


def _hosts(url: httpx.URL) -> tuple[str, str]:
    return url.host.lower(), url.raw_host.decode("ascii").lower()


def parse_source(pattern: str) -> UrlPattern:
    """Parse a pattern such as files.example.com, *.example.com, or http://localhost:8000/public/*.
    Raises ValueError.
    """
    found = _SOURCE.fullmatch(pattern)
    if not found or (found[3] and not 0 < int(found[3]) < 65536):
        raise ValueError(
            f"attachments_from: {pattern!r} is not a host, or a URL with wildcards: write "
            "files.example.com, https://*.example.com, or https://files.example.com/public/*"
        )
    scheme, host, port, path = found.groups()
    scheme = scheme or "https"
    host = host.lower().strip("[]")
    is_exact = not re.search(r"[*?]", host)
    return UrlPattern(scheme, host, int(port or _PORTS[scheme]), path or "*", is_exact)


# --- fetching


class Attachments:
    """Fetches the attachments of messages, from URLs that match one of the `allowed` patterns.
    Raises ValueError for an invalid pattern.
    """

    def __init__(self, allowed: Iterable[str]) -> None:
        sources = [parse_source(pattern) for pattern in allowed]
        self._sources = sorted(sources, key=lambda source: not source.is_exact)
        self._slots = asyncio.Semaphore(MAX_FETCHES)
        # only a host that is named in full may be in a private network
        self._clients: dict[bool, HttpClient] = {
            is_exact: HttpClient(
                timeout=CALL_TIMEOUT,
                connections=MAX_FETCHES,
                allow_private=is_exact,
                is_foreign=True,
            )
            for is_exact in (True, False)
        }

    async def get(
        self, attachments: Sequence[Attachment], view: Mapping[str, Any]
    ) -> tuple[AttachmentFile, ...]:
        """Return the attachments of a message, without those whose URL or content renders to
        nothing. Raises AttachmentError and RenderError.
        """
        if not attachments:
            return ()
        async with self._slots:
            try:
                async with asyncio.timeout(FETCH_TIMEOUT):
                    return await self._get(attachments, view)
            except TimeoutError:
                message = f"attachments: not complete within {FETCH_TIMEOUT:g} s"
                raise AttachmentError(message, permanent=False) from None

    async def _get(
        self, attachments: Sequence[Attachment], view: Mapping[str, Any]
    ) -> tuple[AttachmentFile, ...]:
        found: list[AttachmentFile] = []
        left = MAX_BYTES
        for one in attachments:
            if url := one.value("url", view):
                content, given = await self._fetch(one.path, url, left)
                name = one.value("filename", view) or _last_part(url)
            elif encoded := one.value("base64", view):
                content, given, name = _decoded(one.path, encoded), "", one.value("filename", view)
            else:
                continue
            left -= len(content)
            if left < 0:
                raise _too_large(one.path)
            type_ = _content_type(one.value("contentType", view), name, given)
            name = file_name(name, type_)
            found.append(AttachmentFile(name, type_, content, _content_id(one, name, view)))
        return tuple(found)

    async def _fetch(self, path: str, url: str, left: int) -> tuple[bytes, str]:
        """Return the content at a URL, and its type according to the server. Messages name only the
        host, because the rest of a URL may be secret.
        """
        for _ in range(1 + MAX_REDIRECTS):
            parsed, source = self._allowed(path, url)
            place = f"{path}: {one_line(parsed.host, 100)}"
            try:
                reply = await self._clients[source.is_exact].call(
                    "GET", url, headers={}, max_answer=left
                )
            except AnswerTooLarge as error:
                raise _too_large(path) from error
            except Unreachable as error:
                is_private = isinstance(error, PrivateAddress)
                raise AttachmentError(f"{path}: {error}", permanent=is_private) from error
            location = reply.headers.get("Location")
            if reply.status not in _REDIRECTS or not location:
                break
            try:
                url = str(parsed.join(location))
            except (httpx.InvalidURL, ValueError):
                break
        else:
            message = f"{place} redirects more than {MAX_REDIRECTS} times"
            raise AttachmentError(message, permanent=False)
        if reply.status not in _COMPLETE:
            raise AttachmentError(f"{place} answers {reply.status}", permanent=False, reply=reply)
        return reply.body, reply.headers.get("Content-Type", "")

    def _allowed(self, path: str, url: str) -> tuple[httpx.URL, UrlPattern]:
        """Return a URL if it may be fetched, with the pattern that allows it."""
        try:
            parsed = httpx.URL(check_url(url))
            host = parsed.host
        except (httpx.InvalidURL, ValueError) as error:
            raise AttachmentError(f"{path}.url: is not a URL", is_data=True) from error
        is_plain = not parsed.userinfo and ".." not in parsed.path.split("/")
        for source in self._sources:
            if is_plain and source.matches(parsed):
                return parsed, source
        place = one_line(f"{parsed.scheme}://{host}", 100)
        raise AttachmentError(f"{path}: {place} is not allowed by email.attachments_from")

    async def close(self) -> None:
        """Close the connections."""
        for client in self._clients.values():
            await client.close()


def _too_large(path: str) -> AttachmentError:
    limit = MAX_BYTES // 1024 // 1024
    return AttachmentError(f"{path}: the attachments have more than {limit} MB")


def _decoded(path: str, encoded: str) -> bytes:
    try:
        return base64.b64decode(_BLANK.sub("", encoded), validate=True)
    except (binascii.Error, ValueError) as error:
        raise AttachmentError(f"{path}.base64: is not base64", is_data=True) from error


# --- names and types


def _last_part(url: str) -> str:
    with suppress(httpx.InvalidURL, ValueError):
        return unquote(httpx.URL(url).path.rpartition("/")[2])
    return ""


def file_name(name: str, type_: str) -> str:
    """Return a valid file name on every system, made from a text of unknown origin."""
    kept = "".join(
        " " if c.isspace() else c
        for c in name.replace("\\", "/").rpartition("/")[2]
        if c.isspace() or unicodedata.category(c)[0] != "C"
    )
    kept = _BLANK.sub(" ", _UNSAFE.sub("_", kept)).strip(" .")
    stem, dot, suffix = kept.rpartition(".")
    if dot and len(suffix) < LONG_SUFFIX:
        kept = f"{stem[: MAX_NAME - len(suffix) - 1]}.{suffix}"
    return kept[:MAX_NAME] or f"attachment{mimetypes.guess_extension(type_) or ''}"


def _content_type(written: str, name: str, given: str) -> str:
    """Return the type: the written one with its parameters, or that of the file name, or that from
    the server; with the server's charset if that is of the same type.
    """
    if found := _read_type(written):
        return "; ".join(found)
    served = _read_type(given) or [_UNKNOWN]
    guessed = _read_type(mimetypes.guess_type(name)[0] or "") or served[:1]
    charset = [one for one in served[1:] if one.lower().startswith("charset=")]
    return "; ".join([*guessed, *charset] if guessed[0] == served[0] else guessed)


def _read_type(text: str) -> list[str]:
    """Return a type and its parameters; nothing if a part of a message cannot have it."""
    text = text.strip()
    found = _TYPE.match(text)
    # content of these types must not be encoded
    if not found or found[0].lower().startswith(("multipart/", "message/")):
        return []
    parameters: list[str] = []
    position = found.end()
    while position < len(text):
        parameter = _PARAMETER.match(text, position)
        if parameter is None or len(parameters) == MAX_PARAMETERS:
            return []
        parameters.append(parameter[1])
        position = parameter.end()
    return [found[0].lower(), *parameters]


def _content_id(attachment: Attachment, name: str, view: Mapping[str, Any]) -> str | None:
    content_id = attachment.value("contentId", view).removeprefix("cid:")
    if not content_id and not attachment.inline:
        return None
    content_id = content_id or name
    if not _CONTENT_ID.fullmatch(content_id):
        raise RenderError(
            f"{attachment.path}.contentId: {one_line(content_id, 50)!r} cannot be one"
        )
    return content_id
