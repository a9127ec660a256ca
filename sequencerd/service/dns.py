"""An event loop with a name resolver in which a slow name delays no other.

All connections use it: HTTP, SMTP and the database. Each name has one query at a time, in a thread
of its own that process exit does not wait for. asyncio's default thread pool is small, and process
exit waits for its threads.
"""

from __future__ import annotations

import asyncio
import errno
import socket
import ssl
import threading
import time
from collections.abc import Callable
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any

CALLER_TIMEOUT = 10.0  # seconds for which a caller waits; the query itself continues
CACHE_SECONDS = 5.0  # seconds for which an answer is reused
FRESH_ERROR = 1.0
ADDRESS_TIMEOUT = 2.0
"""Seconds for a connection to an address if the name has another one. One that does not answer, as
where IPv6 leads nowhere, would otherwise use up the caller's time.
"""

ResolvedAddresses = list[tuple[Any, ...]]
"""Addresses as `socket.getaddrinfo` returns them."""

NameQuery = tuple[str, str | None, int, int, int, int]

if TYPE_CHECKING:
    _Base = asyncio.BaseEventLoop
else:
    try:
        import uvloop
    except ImportError:
        _Base = asyncio.SelectorEventLoop
    else:
        _Base = uvloop.Loop


class NameCache:
    """Known addresses of names, and queries in progress, for one event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._asked: dict[NameQuery, asyncio.Future[ResolvedAddresses]] = {}
        # the answers, with their expiry
        self._known: dict[NameQuery, tuple[float, ResolvedAddresses | OSError]] = {}

    async def resolve(self, key: NameQuery) -> ResolvedAddresses:
        """Return the addresses. Raises socket.gaierror, or another OSError."""
        until, known = self._known.get(key, (0.0, []))
        if time.monotonic() < until:
            if isinstance(known, OSError):
                raise type(known)(*known.args)  # each caller gets a traceback of its own
            return known
        asked = self._asked.get(key) or self._ask(key)
        # cancelling one caller does not end the query, which others share
        done, _ = await asyncio.wait([asked], timeout=CALLER_TIMEOUT)
        if not done:
            raise socket.gaierror(
                socket.EAI_AGAIN,
                f"the name service did not answer for {key[0]} in {CALLER_TIMEOUT:g} s",
            )
        return asked.result()

    def _ask(self, key: NameQuery) -> asyncio.Future[ResolvedAddresses]:
        asked: asyncio.Future[ResolvedAddresses] = self._loop.create_future()
        asked.add_done_callback(lambda done: done.exception())  # all callers may be gone

        def end(answer: ResolvedAddresses | OSError) -> None:
            del self._asked[key]
            if isinstance(answer, OSError):
                asked.set_exception(answer)
                lifetime = FRESH_ERROR
            else:
                asked.set_result(answer)
                lifetime = CACHE_SECONDS
            self._known[key] = time.monotonic() + lifetime, answer

        def work() -> None:
            answer: ResolvedAddresses | OSError
            host, service, family, type_, proto, flags = key
            try:
                answer = socket.getaddrinfo(host, service, family, type_, proto, flags)
            except OSError as error:
                answer = error
            except UnicodeError as error:  # an empty label, or one that is too long
                answer = socket.gaierror(socket.EAI_NONAME, f"{host!r} is not a name: {error}")
            try:
                self._loop.call_soon_threadsafe(end, answer)
            except RuntimeError:
                return  # the loop has ended in the meantime

        self._asked[key] = asked
        try:
            threading.Thread(target=work, name=f"resolve {key[0]}", daemon=True).start()
        except RuntimeError as error:  # the system allows no more threads
            end(OSError(errno.ENOMEM, str(error)))
        return asked


class ResolvingLoop(_Base):
    """asyncio's event loop, or uvloop's if it is installed, with this resolver."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._names = NameCache(self)

    async def getaddrinfo(
        self,
        host: Any,
        port: Any,
        *,
        family: int = 0,
        type: int = 0,  # noqa: A002 - asyncio's name
        proto: int = 0,
        flags: int = 0,
    ) -> ResolvedAddresses:
        """Return the addresses of a name; an IP address needs no thread."""
        if not _is_name(host):
            return socket.getaddrinfo(host, port, family, type, proto, flags)
        text = host.decode("ascii") if isinstance(host, bytes) else str(host)
        number = port if port is None or isinstance(port, int) else _number(port)
        # one query for all ports of a name
        service = str(port) if number is None and port is not None else None
        found = await self._names.resolve((text, service, family, type, proto, flags))
        if number is None:
            return found
        return [(*one[:4], (one[4][0], number, *one[4][2:])) for one in found]

    async def create_connection(  # type: ignore[override]  # the many overloads
        self,
        protocol_factory: Callable[[], asyncio.BaseProtocol],
        host: Any = None,
        port: Any = None,
        **options: Any,
    ) -> tuple[asyncio.BaseTransport, asyncio.BaseProtocol]:
        """Resolve names as above: uvloop would use threads that all connections share."""
        connect: Any = super().create_connection
        if not _is_name(host):
            made: tuple[asyncio.BaseTransport, asyncio.BaseProtocol] = await connect(
                protocol_factory, host, port, **options
            )
            return made
        if options.get("ssl") and options.get("server_hostname") is None:
            options["server_hostname"] = host
        family, proto, flags = (options.pop(name, 0) for name in ("family", "proto", "flags"))
        found = await self.getaddrinfo(
            host, port, family=family, type=socket.SOCK_STREAM, proto=proto, flags=flags
        )
        errors: list[OSError] = []
        for number, entry in enumerate(found, 1):
            try:
                connected = await self._connected(entry, is_last=number == len(found))
                made = await connect(protocol_factory, sock=connected, **options)
            except ssl.SSLError:
                raise  # the host was reached
            except OSError as error:
                errors.append(error)
            else:
                return made
        if len({error.errno for error in errors}) == 1:
            raise errors[-1]
        text = "; ".join(str(error) for error in errors)
        raise OSError(text) from ExceptionGroup(f"connections to {host}", errors)

    async def _connected(self, entry: tuple[Any, ...], *, is_last: bool) -> socket.socket:
        """Return a socket that is connected to an address. Raises OSError."""
        family, _, proto, _, address = entry
        made = socket.socket(family, socket.SOCK_STREAM, proto)
        try:
            made.setblocking(False)
            async with asyncio.timeout(None if is_last else ADDRESS_TIMEOUT):
                await self.sock_connect(made, address)
        except TimeoutError:
            made.close()
            raise OSError(errno.ETIMEDOUT, f"no connection within {ADDRESS_TIMEOUT:g} s") from None
        except BaseException:
            made.close()
            raise
        return made


def _is_name(host: object) -> bool:
    if not host or not isinstance(host, str | bytes):
        return False
    text = host.decode("ascii") if isinstance(host, bytes) else host
    try:
        ip_address(text.partition("%")[0])
    except ValueError:
        return True
    return False


def _number(port: object) -> int | None:
    text = port.decode() if isinstance(port, bytes) else str(port)
    return int(text) if text.isdecimal() else None
