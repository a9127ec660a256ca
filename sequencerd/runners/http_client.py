"""Make HTTP calls, within limits and without redirects."""

from __future__ import annotations

import asyncio
import os
import re
import socket
import ssl
import sys
import zlib
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cache
from importlib.util import find_spec
from ipaddress import ip_address
from itertools import pairwise
from typing import Any
from urllib.parse import parse_qsl
from urllib.request import getproxies, proxy_bypass

import h2.errors
import h2.events
import h2.exceptions
import httpcore
import httpx

from sequencerd.core.hiding import hiding
from sequencerd.core.task import Failed, OutageCause
from sequencerd.runners.encodings import EncodingError, decode
from sequencerd.runners.error_causes import (
    TLS_END_ERRORS,
    cause_of_no_connection,
    causes,
    is_exhausted,
    is_refused_client,
)
from sequencerd.runners.fields import one_line
from sequencerd.runners.http_reply import HttpReply
from sequencerd.runners.public_addresses import is_public, names_itself

# httpcore imports it several times for each call; a search that finds nothing takes 30 us each time
if find_spec("sniffio") is None:
    sys.modules["sniffio"] = None  # type: ignore[assignment] # Python's way to say: not there

MAX_ANSWER = 1024 * 1024  # bytes
MAX_CALLS = 500  # over an HTTP/2 connection
IDLE_TIMEOUT = 4.0  # seconds; Node closes HTTP/2 after 5, which httpx does not notice
ADDRESS_TIMEOUT = 2.0  # seconds to connect to an address if the host has another one
MAX_PREFERRED = 1000  # hosts of which the address to try first is remembered
MAX_RETIRED = 3  # consecutive connections that a server may retire without answering on any of them

_DEFAULT_HEADERS = {"Accept": "*/*", "Accept-Encoding": "identity", "User-Agent": "sequencerd"}
_PUBLIC = frozenset(
    {
        *("accept", "content-type", "idempotency-key", "traceparent", "tracestate", "webhook-id"),
        *("webhook-signature", "webhook-timestamp"),
    }
)
"""Headers that are not secret. All others come from the settings, and may be."""

_HEADER_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")
_HEADER_VALUE = re.compile(r"[ -~]*")


class Unreachable(Exception):  # noqa: N818 - it is what has happened
    """There was no usable answer. The message is the reason, without secrets of the URL.

    `sent`: the request had been sent, so it may have taken effect. `exhausted`: this machine has
    run out of descriptors, memory or ports. `retired`: the server closed the connection on purpose,
    so the request is repeated immediately. `cause` is the reason as one word.
    """

    def __init__(
        self,
        message: str,
        *,
        sent: bool = False,
        exhausted: bool = False,
        retired: bool = False,
        cause: OutageCause | None = None,
    ) -> None:
        super().__init__(message)
        self.sent = sent
        self.cause = cause or ("failing" if sent else "unreachable")
        self.exhausted = exhausted
        self.retired = retired

    def failed(self, message: str) -> Failed:
        """Return the failure: a server that accepts no requests is down; a single request may also
        break one that works.
        """
        is_servers = self.retired or self.exhausted or not self.sent
        return Failed(
            message,
            retry_after=timedelta(0) if self.retired else None,
            fault="server" if is_servers else "unclear",
            unknown=self.sent,
            asked=not self.retired,  # the server is not down
            cause=self.cause,
        )


class AnswerTooLarge(Unreachable):
    """An answer that is larger than the caller accepts."""


class PrivateAddress(Unreachable):
    """A host in a private network, which the caller does not allow."""


class HttpClient:
    """An HTTP client that keeps and reuses its connections.

    A name that resolves to a private address is refused unless `allow_private`; a URL with
    localhost or an IP address is taken to be intentional, unless `is_foreign`: others then choose
    the URLs. If the environment names a proxy for a URL, the proxy resolves the name again, and
    need not do so in the same way.

    With `http2`, calls share a connection if the server offers HTTP/2. When a server retires a
    connection, httpx loses the answers in progress, because h2 reads nothing after GOAWAY
    (https://github.com/python-hyper/h2/issues/1181). Therefore the client retires the connection
    first: nginx does so after 1,000 requests. If a server does so earlier, the requests in progress
    are repeated immediately.

    It uses the transports of httpx without its client, which would keep cookies and read where
    redirects lead. Nothing is kept from one call to the next.
    """

    def __init__(
        self,
        *,
        timeout: float,
        connections: int,
        allow_private: bool,
        is_foreign: bool = False,
        http2: bool = False,
    ) -> None:
        self._timeout = timeout
        self._http2 = http2
        self._limits = httpx.Limits(max_connections=connections, keepalive_expiry=IDLE_TIMEOUT)
        self._allow_private = allow_private
        self._is_foreign = is_foreign
        self._preferred: dict[str, str] = {}  # the address to try first, by host
        self._proxies = getproxies()
        self._newest: dict[httpx.URL | None, _Connections] = {}  # by proxy
        self._retired = 0  # consecutive connections without an answer

    async def call(
        self,
        method: str,
        url: str,
        *,
        headers: Mapping[str, str],
        content: bytes | None = None,
        form: Mapping[str, str] | None = None,
        auth: tuple[str, str] | None = None,
        max_answer: int = MAX_ANSWER,
    ) -> HttpReply:
        """Send a body, a form or nothing. Raises Unreachable.

        The status of a refusal counts even if its body is incomplete, encoded or too large.
        """
        try:
            named = httpx.URL(url)
            place = _place(named)
        except (httpx.InvalidURL, UnicodeError):
            raise Unreachable("the host of the URL cannot be called", cause="refused") from None
        secrets = _secrets(headers, auth) | _secrets_of_url(named)
        exchange = _Exchange(has_body=bool(content or form), max_answer=max_answer)
        failed: Unreachable | None = None
        try:
            request = httpx.Request(
                method,
                named,
                headers=_with_defaults(headers),
                content=content,
                data=form,
                extensions={
                    "sni_hostname": named.raw_host.decode("ascii").rstrip("."),
                    "trace": exchange.trace,
                },
            )
            user, password = auth or (named.username, named.password)
            if user or password:
                next(httpx.BasicAuth(user, password).auth_flow(request))
            if (proxy := self._proxy(named)) is not None:
                place += f" through the proxy {_place(proxy)}"
            async with asyncio.timeout(self._timeout):
                await self._send(request, proxy, exchange)
            self._retired = 0
        except TimeoutError:
            message = f"no answer from {place} within {self._timeout:g} s"
            failed = Unreachable(message, sent=exchange.is_sent)
        except Unreachable as error:
            failed = error
        except (httpx.HTTPError, httpx.StreamError, OSError, UnicodeError) as error:
            is_unbegun = _is_unprocessed(error) or is_refused_client(error)
            sent = exchange.is_sent and not is_unbegun
            failed = Unreachable(
                f"{place}: {hiding(secrets)(_reason(error))}",  # a line that was not HTTP
                sent=sent,
                exhausted=is_exhausted(error),
                cause=None if sent else _cause(error),
                retired=_is_retired(error) and self._retired <= MAX_RETIRED,
            )
        if failed is None or exchange.is_refused:
            return exchange.reply(secrets)
        raise failed

    def _proxy(self, url: httpx.URL) -> httpx.URL | None:
        """Return the proxy that the environment names for a URL. Raises Unreachable."""
        named = self._proxies.get(url.scheme) or self._proxies.get("all")
        hosts = (url.host, url.netloc.decode("ascii"))
        if not named or any(map(proxy_bypass, hosts)):
            return None
        with suppress(httpx.InvalidURL):
            proxy = httpx.URL(named if "://" in named else f"http://{named}")
            is_socks = proxy.scheme in ("socks5", "socks5h") and find_spec("socksio") is not None
            if proxy.host and (is_socks or proxy.scheme in ("http", "https")):
                return proxy
        raise Unreachable(
            f"the proxy in the environment ({url.scheme}_proxy or all_proxy) cannot be used: "
            "write http://host:port",
            cause="refused",
        )

    async def _send(
        self, request: httpx.Request, proxy: httpx.URL | None, exchange: _Exchange
    ) -> None:
        """Send a request to the first of the host's addresses that can be connected to."""
        host = request.url.host
        targets = await self._targets(request.url, is_proxied=proxy is not None)
        async with self._connections(proxy) as used:
            try:
                for target, following in pairwise(targets):
                    try:
                        await exchange.run(used.transport, request, target, ADDRESS_TIMEOUT)
                    except (httpx.ConnectError, httpx.ConnectTimeout):
                        self._preferred[host] = following.host
                        if len(self._preferred) > MAX_PREFERRED:
                            del self._preferred[next(iter(self._preferred))]
                    else:
                        return
                await exchange.run(used.transport, request, targets[-1])
            except httpx.ProtocolError as error:
                if _is_retired(error) and not used.is_retired:
                    used.is_retired = True
                    self._retired += 1
                raise

    async def _targets(self, url: httpx.URL, *, is_proxied: bool) -> list[httpx.URL]:
        """Return the URL, or URLs with its host's addresses once these are known to be public."""
        if self._allow_private or (names_itself(url.host) and not self._is_foreign):
            return [url]
        host = url.raw_host.decode("ascii")
        loop = asyncio.get_running_loop()
        try:
            found = await loop.getaddrinfo(host, _port(url), type=socket.SOCK_STREAM)
        except socket.gaierror:
            if not is_proxied:
                raise
            return [url]  # perhaps only the proxy knows the name
        addresses = list(dict.fromkeys(str(entry[4][0]).partition("%")[0] for entry in found))
        for address in addresses:
            if not is_public(ip_address(address)):
                advice = (
                    "name this host in the settings, without a wildcard,"
                    if self._is_foreign
                    else "set allow_private"
                )
                raise PrivateAddress(
                    f"{url.host} has the private address {address}: {advice} if that is intended",
                    cause="refused",
                )
        addresses.sort(key=lambda address: address != self._preferred.get(url.host))
        return [url] if is_proxied else [url.copy_with(host=address) for address in addresses]

    @asynccontextmanager
    async def _connections(self, proxy: httpx.URL | None) -> AsyncIterator[_Connections]:
        """Return the connections for a call. Retired ones are closed after their last call."""
        used = self._newest.get(proxy)
        if used is None or used.is_retired:
            tls = _tls(self._http2, os.getenv("SSL_CERT_FILE"), os.getenv("SSL_CERT_DIR"))
            used = self._newest[proxy] = _Connections(
                httpx.AsyncHTTPTransport(
                    verify=tls, http2=self._http2, limits=self._limits, proxy=proxy
                )
            )
        used.calls += 1
        used.is_retired = self._http2 and used.calls >= MAX_CALLS
        used.in_progress += 1
        try:
            yield used
        finally:
            used.in_progress -= 1
            if used.is_retired and not used.in_progress:
                await used.transport.aclose()

    async def close(self) -> None:
        """Close the connections."""
        for used in self._newest.values():
            await used.transport.aclose()


@dataclass(eq=False, slots=True)
class _Connections:
    """Connections through one proxy, or none, until they are retired."""

    transport: httpx.AsyncHTTPTransport
    calls: int = 0
    in_progress: int = 0
    is_retired: bool = False  # no further call begins


@dataclass(slots=True)
class _Exchange:
    """A request on its way, and as much of the answer as has arrived."""

    has_body: bool
    max_answer: int
    is_sent: bool = False  # so it may have taken effect
    response: httpx.Response | None = None
    raw: bytearray = field(default_factory=bytearray)
    decoded: bytes | None = None

    @property
    def is_refused(self) -> bool:
        """Whether the status is known and is not 2xx."""
        return self.response is not None and not self.response.is_success

    async def trace(self, event: str, details: Mapping[str, Any]) -> None:
        """Called by httpcore, to note whether the request is sent."""
        if event.endswith("send_request_headers.started"):
            # CONNECT is for the proxy
            self.is_sent = self.is_sent or details["request"].method != b"CONNECT"
        elif event.endswith("send_request_headers.failed") and self.has_body:
            # with HTTP/2, its head may have been written with other requests, but not its body
            is_unwritten = isinstance(details["exception"], httpcore.WriteError)
            self.is_sent = self.is_sent and not is_unwritten

    async def run(
        self,
        transport: httpx.AsyncHTTPTransport,
        request: httpx.Request,
        target: httpx.URL,
        connect_timeout: float | None = None,
    ) -> None:
        """Send the request, and read and decode the answer. Raises Unreachable, and the errors of
        httpx.
        """
        request.url = target
        request.extensions["timeout"] = {"connect": connect_timeout}
        self.response = await transport.handle_async_request(request)
        try:
            async for chunk in self.response.aiter_raw():
                self.raw += chunk
                if len(self.raw) > self.max_answer:
                    text = f"the answer has more than {self.max_answer} bytes"
                    raise AnswerTooLarge(text, sent=True)
        finally:
            await self.response.aclose()
        try:
            self.decoded = decode(bytes(self.raw), self._encodings, self.max_answer)
        except EncodingError as error:
            raise Unreachable(str(error), sent=True) from None
        except zlib.error as error:
            raise Unreachable(f"the compressed answer cannot be read: {error}", sent=True) from None

    @property
    def _encodings(self) -> str:
        assert self.response is not None
        return str(self.response.headers.get("Content-Encoding", ""))

    def reply(self, secrets: frozenset[str]) -> HttpReply:
        """Return the answer, which may repeat these secrets."""
        assert self.response is not None
        body = self.decoded
        if body is None:
            body = b"" if self._encodings else bytes(self.raw)
        return HttpReply(self.response.status_code, self.response.headers, body, secrets)


@cache
def _tls(_http2: bool, _file: str | None, _folder: str | None) -> ssl.SSLContext:
    """Return a TLS context that all clients share, because each holds the system's certificates.
    httpcore writes the offered protocols into it, so there is one for each protocol. The
    environment variables are those of httpx.
    """
    return httpx.create_ssl_context()


def _port(url: httpx.URL) -> int:
    return url.port or (443 if url.scheme == "https" else 80)


def _place(url: httpx.URL) -> str:
    """Return host and port, for messages."""
    host = f"[{url.host}]" if ":" in url.host else url.host
    return f"{host}:{_port(url)}"


def _is_unprocessed(error: BaseException) -> bool:
    """Return whether the server says that it has not begun a request (RFC 9113, 8.7)."""
    return any(
        isinstance(argument, h2.events.StreamReset)
        and argument.error_code == h2.errors.ErrorCodes.REFUSED_STREAM
        for one in causes(error)
        for argument in one.args
    )


def _is_retired(error: BaseException) -> bool:
    """Return whether GOAWAY has ended an HTTP/2 connection: h2 then refuses all requests."""
    return any(
        isinstance(one, h2.exceptions.ProtocolError) and "ConnectionState.CLOSED" in str(one)
        for one in causes(error)
    ) or any(
        isinstance(argument, h2.events.ConnectionTerminated) and argument.error_code == 0
        for one in causes(error)
        for argument in one.args
    )


def _cause(error: BaseException) -> OutageCause:
    """Return why there is no connection. A proxy's 4xx is for its operator, as 407 is."""
    is_proxys = isinstance(error, httpx.ProxyError) and str(error).startswith("4")
    return "refused" if is_proxys else cause_of_no_connection(error)


def _reason(error: BaseException) -> str:
    """Return the operating system's reason if the client's error only says that it failed."""
    *_, cause = causes(error)
    if isinstance(cause, OSError) and not isinstance(cause, ssl.SSLError) and cause.errno:
        # asyncio repeats the address
        return os.strerror(cause.errno) if cause.errno > 0 else str(cause.strerror)
    # an error of anyio without a text also says that the connection has ended
    text = "" if isinstance(cause, TLS_END_ERRORS) else one_line(str(cause))
    return text or "the server has closed the connection"


def _with_defaults(headers: Mapping[str, str]) -> httpx.Headers:
    merged = httpx.Headers(_DEFAULT_HEADERS)
    merged.update(headers)  # whatever the case of the names
    return merged


_OWN_NAMES = {name.lower(): name for name in ("Accept", "Content-Type", "Idempotency-Key")}


def check_headers(headers: Mapping[str, str]) -> dict[str, str]:
    """Return headers if they can be sent; those that runners send as well are named as there, so
    that none is sent twice. Raises ValueError, without their values.
    """
    for name, value in headers.items():
        if not _HEADER_NAME.fullmatch(name) or name.lower() in ("host", "content-length"):
            raise ValueError(f"headers: {name!r} cannot be set")
        if not _HEADER_VALUE.fullmatch(value):
            raise ValueError(f"headers: the value of {name} must be printable ASCII")
    return {_OWN_NAMES.get(name.lower(), name): value for name, value in headers.items()}


def _secrets(headers: Mapping[str, str], auth: tuple[str, str] | None) -> frozenset[str]:
    """Return the values to mask if a server repeats them, whole or without "Bearer"."""
    values = [value for name, value in headers.items() if name.lower() not in _PUBLIC]
    parts = [part for value in values for part in value.split()[1:]]
    return frozenset(text for text in (*values, *parts, *(auth or ())[1:]) if len(text) > 3)


def _secrets_of_url(url: httpx.URL) -> frozenset[str]:
    """Return the parts of a URL that may be secret: a password, the values of the query, and random
    parts of the path. Many servers repeat the URL in their answers.
    """
    values = [value for _, value in parse_qsl(url.query.decode("ascii"))]
    parts = [part for part in url.path.split("/") if len(part) > 15 and re.search("[0-9]", part)]
    return frozenset(text for text in (url.password, *values, *parts) if len(text) > 5)
