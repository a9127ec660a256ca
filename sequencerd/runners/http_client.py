"""Make HTTP calls, within limits and without redirects, and classify the status."""

from __future__ import annotations

import asyncio
import json
import math
import os
import re
import socket
import ssl
import sys
import time
import zlib
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, timedelta
from email.utils import parsedate_to_datetime
from functools import cache
from http.cookiejar import CookieJar, DefaultCookiePolicy
from importlib.util import find_spec
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address
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
from sequencerd.core.task import Attribution, Failed, OutageCause
from sequencerd.runners.encodings import EncodingError, decode
from sequencerd.runners.error_causes import (
    TLS_END_ERRORS,
    cause_of_no_connection,
    causes,
    is_exhausted,
    is_refused_client,
)
from sequencerd.runners.fields import one_line

# httpcore imports it several times for each call; a search that finds nothing takes 30 us each time
if find_spec("sniffio") is None:
    sys.modules["sniffio"] = None  # type: ignore[assignment] # Python's way to say: not there

MAX_ANSWER = 1024 * 1024  # bytes
MAX_WAIT = timedelta(days=366)
MAX_SECONDS = 1e9  # of a wait; more are a time
MAX_CALLS = 500  # over an HTTP/2 connection
IDLE_TIMEOUT = 4.0  # seconds; Node closes HTTP/2 after 5, which httpx does not notice
ADDRESS_TIMEOUT = 2.0  # seconds to connect to an address if the host has another one
MAX_PREFERRED = 1000  # hosts of which the address to try first is remembered
MAX_RETIRED = 3  # consecutive connections that a server may retire without answering on any of them

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


@dataclass(frozen=True, slots=True)
class HttpReply:
    """A server's answer."""

    status: int
    headers: httpx.Headers
    body: bytes
    secrets: frozenset[str] = frozenset()  # values that were sent, and that the answer may repeat

    def text(self) -> str:
        """Return the body of an answer in JSON as text. Some servers write Latin-1."""
        try:
            return self.body.decode(json.detect_encoding(self.body))
        except UnicodeDecodeError:
            return self.body.decode("latin-1")

    def excerpt(self) -> str:
        """Return the beginning of the body, for messages."""
        return one_line(self.hide(self.body[:1000].decode("utf-8", "replace")), 200)

    def hide(self, text: str) -> str:
        """Return a text of the answer without the secrets that were sent."""
        return hiding(self.secrets)(text)


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

    Nothing is kept from one call to the next; there are no cookies.
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
        self._connections = connections
        self._allow_private = allow_private
        self._is_foreign = is_foreign
        self._preferred: dict[str, str] = {}  # the address to try first, by host
        self._proxies = getproxies()
        self._clients: Counter[httpx.AsyncClient] = Counter()  # with the calls in progress on them
        self._newest: dict[httpx.URL | None, httpx.AsyncClient] = {}  # by proxy
        self._calls_left: Counter[httpx.AsyncClient] = Counter()
        self._retired = 0  # consecutive connections without an answer

    @asynccontextmanager
    async def _client(self, proxy: httpx.URL | None) -> AsyncIterator[httpx.AsyncClient]:
        """Return the client for a call. A retired client is closed after its last call."""
        client = self._newest.get(proxy)
        if client is None or (self._http2 and not self._calls_left[client]):
            client = self._newest[proxy] = self._make_client(proxy)
            self._calls_left[client] = MAX_CALLS
        self._calls_left[client] -= 1
        self._clients[client] += 1
        try:
            yield client
        finally:
            self._clients[client] -= 1
            if not self._clients[client] and client is not self._newest.get(proxy):
                del self._clients[client], self._calls_left[client]
                await client.aclose()

    def _make_client(self, proxy: httpx.URL | None) -> httpx.AsyncClient:
        return httpx.AsyncClient(
            proxy=proxy,
            trust_env=False,  # its proxy is chosen for each call
            verify=_tls(self._http2, os.getenv("SSL_CERT_FILE"), os.getenv("SSL_CERT_DIR")),
            cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),
            timeout=None,  # noqa: S113 - one time limit is set around the whole call
            limits=httpx.Limits(max_connections=self._connections, keepalive_expiry=IDLE_TIMEOUT),
            headers={"User-Agent": "sequencerd", "Accept-Encoding": "identity"},
            follow_redirects=False,
            event_hooks={"response": [_note_refusal]},
            http2=self._http2,
        )

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
        sent = False
        refusals: list[_Incoming] = []

        async def trace(event: str, details: Mapping[str, Any]) -> None:
            nonlocal sent
            if event.endswith("send_request_headers.started"):
                sent = sent or details["request"].method != b"CONNECT"  # which is for the proxy
            elif event.endswith("send_request_headers.failed") and (content or form):
                # with HTTP/2, its head may have been written with other requests, but not its body
                sent = sent and not isinstance(details["exception"], httpcore.WriteError)

        secrets = _secrets(headers, auth) | _secrets_of_url(named)
        request = {
            "method": method,
            "headers": {**headers, "Host": named.netloc.decode("ascii")},
            "content": content,
            "data": form,
            "auth": auth or httpx.USE_CLIENT_DEFAULT,
            "extensions": {
                "sni_hostname": named.raw_host.decode("ascii").rstrip("."),
                "trace": trace,
                "refusals": refusals,
            },
        }
        try:
            if (proxy := self._proxy(named)) is not None:
                place += f" through the proxy {_place(proxy)}"
            async with asyncio.timeout(self._timeout):
                answer = await self._send(named, proxy, request, max_answer)
                self._retired = 0
                return answer.reply(secrets)
        except TimeoutError:
            message = f"no answer from {place} within {self._timeout:g} s"
            failed = Unreachable(message, sent=sent)
        except Unreachable as error:
            failed = error
        except (
            httpx.HTTPError,
            httpx.InvalidURL,
            httpx.StreamError,
            OSError,
            UnicodeError,
        ) as error:
            sent = sent and not (_is_unprocessed(error) or is_refused_client(error))
            failed = Unreachable(
                f"{place}: {hiding(secrets)(_reason(error))}",  # a line that was not HTTP
                sent=sent,
                exhausted=is_exhausted(error),
                cause=None if sent else _cause(error),
                retired=_is_retired(error) and self._retired <= MAX_RETIRED,
            )
        if refusals:
            return refusals[-1].reply(secrets)
        raise failed

    async def _send(
        self,
        url: httpx.URL,
        proxy: httpx.URL | None,
        request: Mapping[str, Any],
        max_answer: int,
    ) -> _Incoming:
        """Send a request to the first of the host's addresses that can be connected to."""
        targets = await self._targets(url, is_proxied=proxy is not None)
        briefly = {**request, "timeout": httpx.Timeout(None, connect=ADDRESS_TIMEOUT)}
        async with self._client(proxy) as client:
            try:
                for target, following in pairwise(targets):
                    try:
                        return await _exchange(client, target, briefly, max_answer)
                    except (httpx.ConnectError, httpx.ConnectTimeout):
                        self._preferred[url.host] = following.host
                        if len(self._preferred) > MAX_PREFERRED:
                            del self._preferred[next(iter(self._preferred))]
                return await _exchange(client, targets[-1], request, max_answer)
            except httpx.ProtocolError as error:
                if _is_retired(error) and client is self._newest.get(proxy):
                    del self._newest[proxy]  # no further call begins on this client
                    self._retired += 1
                raise

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

    async def _targets(self, url: httpx.URL, *, is_proxied: bool) -> list[httpx.URL]:
        """Return the URL, or URLs with its host's addresses once these are known to be public."""
        if self._allow_private or (_names_itself(url.host) and not self._is_foreign):
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

    async def close(self) -> None:
        """Close the connections."""
        for client in list(self._clients):
            await client.aclose()


async def _exchange(
    client: httpx.AsyncClient, url: httpx.URL, request: Mapping[str, Any], max_answer: int
) -> _Incoming:
    """Send a request, and read the answer."""
    async with client.stream(url=url, **request) as response:
        refusals: list[_Incoming] = request["extensions"]["refusals"]
        incoming = _Incoming(response) if response.is_success else refusals[-1]
        await incoming.read(max_answer)
        return incoming


async def _note_refusal(response: httpx.Response) -> None:
    """Keep a refusal; httpx then raises an error if it cannot read where a redirect leads."""
    if not response.is_success:
        response.request.extensions["refusals"].append(_Incoming(response))


def _names_itself(host: str) -> bool:
    try:
        ip_address(host)
    except ValueError:
        return host == "localhost"
    return True


_GLOBAL_UNICAST = IPv6Network("2000::/3")
_NAT64 = IPv6Network("64:ff9b::/96")
_COMPATIBLE = IPv6Network("::/96")


def is_public(address: IPv4Address | IPv6Address) -> bool:
    """Return whether an address, and each address that it contains, is on the public Internet."""
    if carried := _carried(address):
        return all(is_public(one) for one in carried)
    if isinstance(address, IPv6Address) and address not in _GLOBAL_UNICAST:
        return False  # site-local, a network's own NAT64 (64:ff9b:1::/48), multicast, ...
    return address.is_global and not address.is_multicast


def _carried(address: IPv4Address | IPv6Address) -> tuple[IPv4Address, ...]:
    """Return the IPv4 addresses that an IPv6 address contains."""
    if isinstance(address, IPv4Address):
        return ()
    if address.teredo is not None:
        return address.teredo
    if address in _NAT64 or address in _COMPATIBLE:
        return (IPv4Address(int(address) & 0xFFFF_FFFF),)
    inner = address.ipv4_mapped or address.sixtofour
    return () if inner is None else (inner,)


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


@dataclass(slots=True)
class _Incoming:
    """An answer of which the head has arrived, and the body as far as it was read."""

    response: httpx.Response
    raw: bytearray = field(default_factory=bytearray)
    decoded: bytes | None = None

    @property
    def _encodings(self) -> str:
        return str(self.response.headers.get("Content-Encoding", ""))

    async def read(self, limit: int) -> None:
        """Read and decode the body. Raises Unreachable, and the errors of httpx."""
        async for chunk in self.response.aiter_raw():
            self.raw += chunk
            if len(self.raw) > limit:
                raise AnswerTooLarge(f"the answer has more than {limit} bytes", sent=True)
        try:
            self.decoded = decode(bytes(self.raw), self._encodings, limit)
        except EncodingError as error:
            raise Unreachable(str(error), sent=True) from None
        except zlib.error as error:
            raise Unreachable(f"the compressed answer cannot be read: {error}", sent=True) from None

    def reply(self, secrets: frozenset[str]) -> HttpReply:
        """Return the answer, which may repeat these secrets."""
        body = self.decoded
        if body is None:
            body = b"" if self._encodings else bytes(self.raw)
        return HttpReply(self.response.status_code, self.response.headers, body, secrets)


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


PAYMENT_REQUIRED = 402
TOO_LARGE = 413
_OPERATORS = frozenset({401, PAYMENT_REQUIRED, 403, 405, 407, 421, 426})
_PASSING = frozenset({408, 409, 423, 425, 429})
_OF_GATEWAYS = frozenset({502, 504, 520, 522, 524, 598, 599})
"""The gateway got no usable answer; those that are not registered are Cloudflare's and others'."""


def judge(reply: HttpReply, message: str) -> Failed | None:
    """Return the failure that a status means; None for 2xx.

    4xx is permanent except for 408, 409, 423, 425 and 429. 429, and 503 with Retry-After, are the
    server's fault. So is what all requests get until an operator corrects it: 401, 403 and 407,
    which need another login; 402, which needs a payment; 405, 421 and 426, which are no answers of
    the endpoint; and redirects, which are not followed: if an endpoint moves, its settings change.
    Other 5xx and 408 may be the fault of the server or of one enrollment. 409 means that the same
    request is still in progress, 423 that what it changes is locked. After the
    failure of a gateway, the side effect may have taken place.
    """
    if 200 <= reply.status < 300:
        return None
    wait = retry_after(reply.headers)
    throttled = reply.status == 429 or (reply.status == 503 and wait is not None)
    is_operators = reply.status < 400 or reply.status in _OPERATORS
    permanent = reply.status < 500 and not is_operators and reply.status not in _PASSING
    fault: Attribution = "enrollment"
    cause: OutageCause = "failing"
    if throttled or reply.status == PAYMENT_REQUIRED:
        fault, cause = "server", "over quota"
    elif is_operators:
        fault, cause = "server", "refused"
    elif reply.status >= 500 or reply.status == 408:
        fault = "unclear"
    return Failed(
        message,
        permanent,
        wait,
        fault=fault,
        unknown=reply.status in _OF_GATEWAYS,
        cause=cause,
    )


def retry_after(headers: httpx.Headers) -> timedelta | None:
    """Return the wait that Retry-After asks for, in seconds or as a date; None if it cannot be
    parsed. Some servers write the seconds of Unix's clock. Of several, the longest counts; proxies
    join them with commas.
    """
    fields = headers.get_list("Retry-After")
    waits = [_wait(text.strip()) for field in fields for text in (field, *field.split(","))]
    return max((wait for wait in waits if wait is not None), default=None)


def _wait(text: str) -> timedelta | None:
    try:
        seconds = float(text)
    except ValueError:
        try:
            at = parsedate_to_datetime(text)
        except (ValueError, OverflowError):
            return None
        at = at if at.tzinfo is not None else at.replace(tzinfo=UTC)
        seconds = at.timestamp() - time.time()
    if not math.isfinite(seconds):
        return None
    if seconds > MAX_SECONDS:
        seconds -= time.time()
    return min(timedelta(seconds=max(0.0, min(seconds, MAX_SECONDS))), MAX_WAIT)


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
