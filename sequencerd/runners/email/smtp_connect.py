"""Open connections to a mail server with aiosmtplib: greeting, EHLO, TLS and login."""

from __future__ import annotations

import asyncio
import re
import socket
from contextlib import suppress
from typing import Any

from aiosmtplib import (
    SMTP,
    SMTPAuthenticationError,
    SMTPConnectResponseError,
    SMTPException,
    SMTPHeloError,
    SMTPReadTimeoutError,
    SMTPResponse,
    SMTPResponseException,
    SMTPServerDisconnected,
)
from aiosmtplib.protocol import SMTPProtocol

from sequencerd.runners.email.oauth import AccessTokens
from sequencerd.runners.email.smtp_dialogue import (
    ClosedError,
    Dialogue,
    MismatchError,
    SmtpError,
    SmtpRefused,
    SmtpReply,
    decode_reply,
)
from sequencerd.runners.email.smtp_url import SmtpServer
from sequencerd.runners.error_causes import is_refused_client

CONNECT_TIMEOUT = 30.0  # seconds, for each of: resolving the name, connecting, TLS
NAME_TIMEOUT = 5.0  # seconds, to ask the resolver for this machine's name

_HELLO_NAME = re.compile(r"(?=.{3,255}$)[a-z0-9-]{1,63}(?:\.[a-z0-9-]{1,63})+\.?", re.IGNORECASE)
_LOCAL_NAMES = re.compile(r"localhost(?:\..*)?|.*\.(?:localhost|localdomain)", re.IGNORECASE)


async def connect(
    server: SmtpServer, *, name: str | None, reply_timeout: float, tokens: AccessTokens | None
) -> Dialogue:
    """Return a connection that is ready for mail. Raises SmtpError or OSError.

    `name` is sent in EHLO; None means the connection's own address. `reply_timeout` is the number
    of seconds for each reply.
    """
    client = _Client(server, reply_timeout)
    try:
        await client.connect()
        client.local_hostname = name or _literal(client)
        await _greet(client, server)
        if tokens is not None:
            await _login_with_token(client, server.user or "", tokens)
        elif server.user is not None and server.password is not None:
            await _login(client, server.user, server.password)
        return Dialogue(client, timeout=reply_timeout)
    except SMTPException as error:
        client.close()
        raise _explained(error, client) from error
    except BaseException:
        client.close()
        raise


async def _greet(client: _Client, server: SmtpServer) -> None:
    await _hello(client)
    offered = client.supports_extension("starttls")
    if server.starttls is False or (server.starttls is None and not offered) or server.tls:
        return
    if not offered:
        raise MismatchError(
            "the server offers no STARTTLS, and the SMTP URL asks for it (starttls=never: don't)"
        )
    await client.starttls(server_hostname=server.tls_name)
    await _hello(client)


async def _hello(client: _Client) -> None:
    """Send EHLO, or HELO if the server does not know EHLO, which a temporary refusal does not
    prove.
    """
    try:
        await client.ehlo()
    except SMTPHeloError as error:
        if error.code < 500:
            raise
        with suppress(SMTPException, SmtpError):  # in that case EHLO's refusal is more informative
            await client.helo()
            return
        raise


async def _login(client: _Client, user: str, password: str) -> None:
    if client.get_transport_info("sslcontext") is not None:
        # No one can listen, and many servers offer CRAM-MD5 without having a secret for it.
        client.AUTH_METHODS = ("plain", "login", "cram-md5")
    if not client.supported_auth_methods:
        names = ", ".join(client.server_auth_methods).upper() or "none"
        raise MismatchError(f"the server offers no supported authentication ({names})")
    await client.login(user, password)


async def _login_with_token(client: _Client, user: str, tokens: AccessTokens) -> None:
    """Log in; if the token is rejected, try again with a new one."""
    if "xoauth2" not in client.server_auth_methods:
        raise MismatchError("the server offers no authentication with XOAUTH2")
    token = await tokens.get()
    try:
        await client.auth_xoauth2(user, token)
    except SMTPAuthenticationError as error:
        if error.code != 535 or (renewed := await tokens.get(instead_of=token)) == token:
            raise
        await client.auth_xoauth2(user, renewed)


class _Client(SMTP):
    """Uses our protocol, and keeps the server's last words before it closed the connection."""

    said: SMTPResponse | None = None
    """The last reply to a command."""

    def __init__(self, server: SmtpServer, reply_timeout: float) -> None:
        super().__init__(
            hostname=server.host,
            port=server.port,
            local_hostname="localhost",  # without a name it asks the resolver; another is set
            timeout=reply_timeout,
            use_tls=server.tls,
            start_tls=False,  # by itself, the library answers any refusal of EHLO with HELO
            tls_context=server.context,
        )
        self._server = server

    async def execute_command(self, *words: bytes, **options: Any) -> SMTPResponse:
        self.said = await super().execute_command(*words, **options)
        return self.said

    async def _create_connection(
        self,
        timeout: float | None,  # noqa: ASYNC109 - the library's
    ) -> SMTPResponse:
        # The library's has a protocol of its own, and one limit for connection and greeting.
        loop = asyncio.get_running_loop()
        within = min(CONNECT_TIMEOUT, timeout or CONNECT_TIMEOUT)
        try:
            async with asyncio.timeout(within):
                self.transport, self.protocol = await loop.create_connection(
                    lambda: _Protocol(loop, self._on_connection_lost),
                    self._server.host,
                    self._server.port,
                    ssl=self._server.context if self._server.tls else None,
                    server_hostname=self._server.tls_name if self._server.tls else None,
                )
        except TimeoutError:
            raise SmtpError(f"no connection within {within:g} s") from None
        except UnicodeError:
            raise SmtpError("the host's name cannot be looked up") from None
        greeting = await self.protocol.read_response(timeout)
        if greeting.code != 220:
            raise SMTPConnectResponseError(*greeting)
        return greeting


class _Protocol(SMTPProtocol):
    """Accepts blank lines, and rejects anything sent between STARTTLS and TLS."""

    asked = "the greeting"
    """The command whose reply is expected; it stays AUTH after AUTH, because what follows is
    secret.
    """

    def write(self, data: bytes) -> None:
        word = data.split(b" ")[0].strip()
        if word in (b"EHLO", b"HELO", b"STARTTLS", b"AUTH"):
            self.asked = word.decode()
        super().write(data)

    async def read_response(
        self,
        timeout: float | None = None,  # noqa: ASYNC109 - the library's
    ) -> SMTPResponse:
        try:
            response = await super().read_response(timeout)
        except SMTPReadTimeoutError:  # the library says neither which reply, nor how long
            raise SmtpError(f"no answer within {timeout:g} s to {self.asked}") from None
        if self.asked == "STARTTLS" and self._buffer:
            # The library drops it (RFC 3207, 6). It may be an attack, so it is reported.
            raise SmtpError("the server sends data between STARTTLS and TLS")
        return response

    def _read_response_from_buffer(self) -> SMTPResponse | None:
        # Some servers send blank lines before a reply, which the library rejects as malformed.
        self._buffer = self._buffer.lstrip()
        return super()._read_response_from_buffer()


def _explained(error: SMTPException, client: _Client) -> SmtpError:
    """Return the same error in SMTP's terms."""
    if isinstance(error, SMTPServerDisconnected):
        if is_refused_client(error):
            return SmtpError(str(error.__cause__))
        if client.said is None or client.said.code < 400:
            return ClosedError()
        # it closed the connection before another login was tried
        error = SMTPAuthenticationError(*client.said)
    if not isinstance(error, SMTPResponseException):
        return MismatchError(error.message)
    text = decode_reply(error.message.encode(errors="surrogateescape"))
    if error.code < 400:
        return MismatchError(f"{error.code} {text}" if error.code > 0 else text)
    match error:
        case SMTPConnectResponseError():
            what = ""
        case SMTPHeloError():
            what = f"EHLO {client.local_hostname}"
        case SMTPAuthenticationError():
            what = "the login"
        case _:
            what = "STARTTLS"
    return SmtpRefused(SmtpReply(error.code, text), "connection", what)


def _literal(client: _Client) -> str:
    """Return this machine's address as the server sees it if there is no NAT in between."""
    name = client.get_transport_info("sockname") or ("127.0.0.1",)
    address = str(name[0]).partition("%")[0]
    return f"[IPv6:{address}]" if ":" in address else f"[{address}]"


# --- this machine's name


def check_hello_name(name: str) -> str:
    """Return a name if EHLO can send it. Raises ValueError."""
    if not _HELLO_NAME.fullmatch(name) and not re.fullmatch(r"\[[0-9A-Za-z.:]+\]", name):
        raise ValueError(
            f"hello_name is {name!r}: write a host name with a dot, such as mail.example.com, "
            "or an address in brackets"
        )
    return name


async def own_name() -> str | None:
    """Return this machine's name with its domain; None if it has none that other machines know."""
    host = socket.gethostname()
    if _is_public(host):
        return host
    try:
        async with asyncio.timeout(NAME_TIMEOUT):
            found = await asyncio.get_running_loop().getaddrinfo(
                host, None, type=socket.SOCK_STREAM, flags=socket.AI_CANONNAME
            )
    except (OSError, TimeoutError):
        return None
    return next((name for *_, name, _ in found if _is_public(name)), None)


def _is_public(name: str) -> bool:
    return _HELLO_NAME.fullmatch(name) is not None and not _LOCAL_NAMES.fullmatch(name)
