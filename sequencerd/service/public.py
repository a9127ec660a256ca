"""The pages for recipients and Twilio: the page to unsubscribe, and the hook for SMS.

A GET changes nothing, because mail scanners follow every link. A POST does: the page's button sends
it or, for one click, the recipient's mail program (RFC 8058).
"""

from __future__ import annotations

import asyncio
import base64
import hmac
import re
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from hashlib import sha1, sha256
from html import escape
from typing import NamedTuple, TypeVar
from urllib.parse import parse_qs, parse_qsl, urlsplit

import asyncpg
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import BaseRoute, Route
from structlog.typing import FilteringBoundLogger

from sequencerd.core.languages import choose, normalised
from sequencerd.core.task import Undeliverable
from sequencerd.errors import DatabaseError
from sequencerd.runners.email.mime import as_written
from sequencerd.runners.registry import make_links
from sequencerd.runners.sms.runner import undeliverable
from sequencerd.runners.suppression_check import EVERYTHING, SuppressionKey, forms
from sequencerd.runners.unsubscribe import PATH, Subscription
from sequencerd.service.page_texts import TEXTS, Texts
from sequencerd.settings import Settings, SmsSettings
from sequencerd.storage import connections, suppressions
from sequencerd.storage.connections import Shard
from sequencerd.storage.database_errors import TRANSIENT_ERRORS, brief

MAX_BODY = 64 * 1024  # bytes
MAX_CONNECTIONS = 4  # simultaneous connections to the database
TIMEOUT = 5.0  # seconds for a connection and its statements
RETRY_AFTER = "60"  # seconds
MAX_LANGUAGES = 10  # languages of a browser that are considered
TITLES_CACHED_FOR = 60.0  # seconds for which the titles of topics are cached
REASON_OF_UNDO = "the recipient undid it with the unsubscribe link"

_T = TypeVar("_T")


class BodyTooLarge(Exception):  # noqa: N818 - what a request is
    """The body of a request is larger than any valid one."""


class PublicPages:
    """The public pages; `settings` returns the current settings."""

    def __init__(
        self, shards: Sequence[Shard], settings: Callable[[], Settings], log: FilteringBoundLogger
    ) -> None:
        self._shards = shards
        self._settings = settings
        self._log = log
        self._slots = asyncio.Semaphore(MAX_CONNECTIONS)
        self._titles: dict[str, str] = {}
        self._titles_until = 0.0

    @property
    def routes(self) -> list[BaseRoute]:
        """Return the routes; each exists only with its settings."""
        return [
            Route(f"{PATH}{{token:path}}", self._guarded(self._show), methods=["GET"]),
            Route(f"{PATH}{{token:path}}", self._guarded(self._unsubscribe), methods=["POST"]),
            Route("/hooks/twilio", self._guarded(self._twilio), methods=["POST"]),
        ]

    def app(self) -> Starlette:
        """Return an application with only these routes."""
        return Starlette(routes=self.routes)

    def _guarded(
        self, answer: Callable[[Request], Awaitable[Response]]
    ) -> Callable[[Request], Awaitable[Response]]:
        async def guarded(request: Request) -> Response:
            try:
                return await answer(request)
            except BodyTooLarge:
                return Response("too large", 413)
            except ClientDisconnect:
                return Response(status_code=400)
            except (DatabaseError, *TRANSIENT_ERRORS) as error:
                self._log.warning("a request waits for the database", error=brief(error))
                texts = TEXTS[_language(None, request)]
                response = _page(texts, [texts.unavailable], status=503)
                response.headers["Retry-After"] = RETRY_AFTER
                return response

        return guarded

    async def _everywhere(self, work: Callable[[asyncpg.Connection], Awaitable[_T]]) -> list[_T]:
        """Do the same in all shards, because an address may be in any of them. If one fails, the
        request is repeated, which does it again in all.
        """
        done = []
        async with asyncio.timeout(TIMEOUT), self._slots:
            for shard in self._shards:
                async with connections.connected(shard) as connection:
                    done.append(await work(connection))
        return done

    # --- unsubscribing

    async def _show(self, request: Request) -> Response:
        subscription = self._read(request)
        if subscription is None:
            return _invalid(request)
        texts = TEXTS[_language(subscription, request)]
        filled = await self._filled(texts, subscription)
        buttons = [("all", filled.everything)]
        if subscription.topic != EVERYTHING:
            buttons.insert(0, ("this", filled.this))
        return _page(texts, [filled.question], buttons)

    async def _unsubscribe(self, request: Request) -> Response:
        subscription = self._read(request)
        if subscription is None:
            return _invalid(request)
        choice = _choice(await _body(request))
        texts = TEXTS[_language(subscription, request)]
        filled = await self._filled(texts, subscription)
        channel, address, topic, _ = subscription
        if choice == "undo":
            known, topics = forms(channel, address), {topic, EVERYTHING}
            keys = [(channel, form, name) for form in known for name in topics]

            async def undo(connection: asyncpg.Connection) -> set[SuppressionKey]:
                await suppressions.remove(
                    connection, channel, known, topics, "unsubscribe", reason=REASON_OF_UNDO
                )
                return await suppressions.read_suppressed(connection, keys)

            others = set().union(*await self._everywhere(undo))
            if not others:
                return _page(texts, [filled.undone])
            # from another source, such as a bounce
            is_all = any(key[2] == EVERYTHING for key in others)
            return _page(texts, [filled.ended_everything if is_all else filled.ended_this])
        topic = EVERYTHING if choice == "all" else topic
        given = as_written(address) if channel == "email" else address
        entry = Undeliverable(channel, given, "unsubscribed", "unsubscribe")
        await self._everywhere(lambda connection: suppressions.add(connection, [entry], topic))
        self._log.info("a recipient unsubscribed", channel=channel, topic=topic)
        ended = filled.ended_everything if topic == EVERYTHING else filled.ended_this
        return _page(texts, [ended], [("undo", filled.undo)])

    def _read(self, request: Request) -> Subscription | None:
        links = make_links(self._settings())
        return None if links is None else links.read(request.path_params["token"])

    async def _filled(self, texts: Texts, subscription: Subscription) -> Texts:
        topic = subscription.topic
        if topic != EVERYTHING and asyncio.get_running_loop().time() > self._titles_until:
            self._titles = dict(
                title
                for titles in await self._everywhere(suppressions.topic_titles)
                for title in titles.items()
            )
            self._titles_until = asyncio.get_running_loop().time() + TITLES_CACHED_FOR
        names = {"address": subscription.address, "topic": self._titles.get(topic, topic)}
        return Texts(*(text.format(**names) for text in texts))

    # --- Twilio

    async def _twilio(self, request: Request) -> Response:
        sms = self._settings().sms
        if sms.hook_url is None or sms.auth_token is None:
            return Response("not found", 404)
        body = await _body(request)
        try:
            pairs = parse_qsl(body.decode(), keep_blank_values=True, max_num_fields=200)
        except ValueError:
            return Response("not a form", 400)
        token, given = sms.auth_token.get_secret_value(), request.headers.get(SIGNATURE, "")
        expected = [twilio_signature(token, url, pairs) for url in _signed_urls(sms.hook_url)]
        if not any(hmac.compare_digest(one.encode(), given.encode()) for one in expected):
            return Response("the signature is wrong", 403)
        change = read_hook(dict(pairs), sms)
        if change is not None:

            async def write(connection: asyncpg.Connection) -> None:
                if isinstance(change, ResumedNumber):
                    number = forms("sms", change.address)
                    reason = f"the recipient answered {change.word}"
                    await suppressions.remove(
                        connection, "sms", number, [EVERYTHING], "stop", reason=reason
                    )
                else:
                    await suppressions.add(connection, [change])

            await self._everywhere(write)
        return Response("<Response/>", media_type="text/xml")


async def _body(request: Request) -> bytes:
    """Read the body of a request. Raises BodyTooLarge."""
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY:
            raise BodyTooLarge
    return body


def _choice(body: bytes) -> str:
    """Return what a recipient has chosen; empty for the one click of a mail program."""
    with suppress(ValueError):  # too many fields
        return parse_qs(body.decode("latin-1"), max_num_fields=20).get("choice", [""])[0]
    return ""


# --- the page

STYLE = (
    "html{color-scheme:light dark}body{font:1.1rem/1.5 system-ui,sans-serif;max-width:34rem;"
    "margin:4rem auto;padding:0 1rem;overflow-wrap:anywhere}button{font:inherit;"
    "padding:.5rem 1rem;margin:0 .5rem .5rem 0;min-height:44px;max-width:100%}"
)
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'; style-src"
        f" 'sha256-{base64.b64encode(sha256(STYLE.encode()).digest()).decode()}'"
    ),
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Robots-Tag": "noindex",
}


def _page(
    texts: Texts,
    paragraphs: Iterable[str],
    buttons: Iterable[tuple[str, str]] = (),
    *,
    status: int = 200,
) -> Response:
    """Return a page with plain texts, and buttons that post a choice to the same URL."""
    language = next(key for key, one in TEXTS.items() if one is texts)
    form = "".join(
        f'<button name="choice" value="{choice}">{escape(text)}</button>'
        for choice, text in buttons
    )
    html = (
        f'<!doctype html><html lang="{language}"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{escape(texts.title)}</title><style>{STYLE}</style></head><body><main>"
        f"<h1>{escape(texts.title)}</h1>"
        + "".join(f"<p>{escape(text)}</p>" for text in paragraphs)
        + (f'<form method="post">{form}</form>' if form else "")
        + "</main></body></html>"
    )
    return HTMLResponse(html, status, {**_HEADERS, "Vary": "Accept-Language"})


def _invalid(request: Request) -> Response:
    texts = TEXTS[_language(None, request)]
    return _page(texts, [texts.invalid], status=404)


def _language(subscription: Subscription | None, request: Request) -> str:
    """Return the language of the recipient, or of the browser."""
    accepted = request.headers.get("Accept-Language", "").split(",")[:MAX_LANGUAGES]
    tags = [tag.partition(";")[0].strip() for tag in accepted]
    for tag in [subscription.language if subscription else "", *tags]:
        key, _ = choose(TEXTS, tag)
        if normalised(tag).split("-")[0] == key:
            return key
    return "en"


# --- Twilio's requests

STOP_WORDS = frozenset(
    {"STOP", "STOPALL", "UNSUBSCRIBE", "CANCEL", "END", "QUIT", "OPTOUT", "REVOKE"}
)
START_WORDS = frozenset({"START", "YES", "UNSTOP"})
"""The words with which Twilio itself stops and resumes messages to a number."""


SIGNATURE = "X-Twilio-Signature"


class ResumedNumber(NamedTuple):
    """A number whose owner wants messages again."""

    address: str
    word: str


def twilio_signature(token: str, url: str, pairs: Iterable[tuple[str, str]]) -> str:
    """Return the expected X-Twilio-Signature of a form that is posted to a URL."""
    signed = url + "".join(name + value for name, value in sorted(set(pairs)))
    return base64.b64encode(hmac.digest(token.encode(), signed.encode(), sha1)).decode()


def _signed_urls(url: str) -> list[str]:
    """Return the forms of a URL that Twilio may have signed: with and without a port."""
    parts = urlsplit(url)
    host = re.sub(r":[0-9]+$", "", parts.netloc)
    places = (parts.netloc, host, f"{host}:{443 if parts.scheme == 'https' else 80}")
    return [url.replace(parts.netloc, place, 1) for place in dict.fromkeys(places)]


def read_hook(form: Mapping[str, str], sms: SmsSettings) -> Undeliverable | ResumedNumber | None:
    """Return what an incoming message or a status says about a number; None if nothing."""
    status = form.get("MessageStatus") or form.get("SmsStatus", "")
    if status in ("failed", "undelivered"):
        code = form.get("ErrorCode", "")
        known = int(code) if code.isascii() and code.isdecimal() and len(code) < 10 else None
        gone = undeliverable(known, form.get("To", ""), status)
        return gone if sms.suppress_bounces else None
    word = form.get("OptOutType") or form.get("Body", "")
    word = re.sub(r"[\s.!]+$", "", word.strip()).upper()
    sender = form.get("From", "")
    if sender and word in STOP_WORDS:
        return Undeliverable("sms", sender, f"answered {word}", "stop")
    return ResumedNumber(sender, word) if sender and word in START_WORDS else None
