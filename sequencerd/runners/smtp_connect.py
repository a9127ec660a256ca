"""Opens a connection to a mail server: greeting, EHLO, TLS and login."""

from __future__ import annotations

import asyncio
import base64
import binascii
import hmac
import re
import socket
from collections.abc import Mapping

from sequencerd.runners.fields import one_line
from sequencerd.runners.oauth import Tokens
from sequencerd.runners.smtp_dialogue import LONGEST_LINE, Dialogue, Reply, SmtpError, SmtpRefused
from sequencerd.runners.smtp_url import Server

CONNECT_TIMEOUT = 30.0  # seconds, for each of name, connection and TLS
NAME_TIMEOUT = 5.0  # seconds, to ask the resolver for the name of this machine

_HELLO_NAME = re.compile(r"(?=.{3,255}$)[a-z0-9-]{1,63}(?:\.[a-z0-9-]{1,63})+\.?", re.IGNORECASE)
_LOCAL_NAMES = re.compile(r"localhost(?:\..*)?|.*\.(?:localhost|localdomain)", re.IGNORECASE)


async def connect(
    server: Server, *, name: str | None, reply_timeout: float, tokens: Tokens | None
) -> Dialogue:
    """A connection that is ready for mail. Raises SmtpError or OSError.

    `name` is what EHLO says; None is the connection's own address. `reply_timeout` (seconds) is
    for each reply.
    """
    within = min(CONNECT_TIMEOUT, reply_timeout)
    try:
        async with asyncio.timeout(within):
            reader, writer = await asyncio.open_connection(
                server.host,
                server.port,
                limit=LONGEST_LINE,
                ssl=server.context if server.tls else None,
                server_hostname=server.host if server.tls else None,
            )
    except TimeoutError:
        raise SmtpError(f"no connection within {within:g} s") from None
    except UnicodeError:
        raise SmtpError("the host's name can't be looked up") from None
    dialogue = Dialogue(reader, writer, timeout=reply_timeout)
    try:
        await _greet(dialogue, server, name or _literal(dialogue.local_address))
        if tokens is not None:
            await _login_with_token(dialogue, server.user or "", tokens)
        elif server.user is not None and server.password is not None:
            await _login(dialogue, server.user, server.password)
    except BaseException:
        dialogue.close()
        raise
    return dialogue


async def _greet(dialogue: Dialogue, server: Server, name: str) -> None:
    greeting = await dialogue.greeting()
    if greeting.is_refusal:
        raise SmtpRefused(greeting, "connection")
    await _hello(dialogue, name)
    offered = "starttls" in dialogue.extensions
    if server.starttls is False or (server.starttls is None and not offered) or server.tls:
        return
    if not offered:
        raise SmtpError(
            "the server offers no STARTTLS, and the SMTP URL asks for it (starttls=never: don't)"
        )
    reply = await dialogue.say("STARTTLS")
    if reply.is_refusal:
        raise SmtpRefused(reply, "connection", "STARTTLS")
    assert server.context is not None
    await dialogue.start_tls(server.context, server.host)
    await _hello(dialogue, name)


async def _hello(dialogue: Dialogue, name: str) -> None:
    """EHLO; HELO where the server doesn't know it, which a refusal for now does not tell."""
    reply = await dialogue.say(f"EHLO {name}")
    if not reply.is_refusal:
        dialogue.extensions = _extensions(reply.text)
        return
    if 500 <= reply.code < 600:
        try:
            helo = await dialogue.say(f"HELO {name}")
        except (SmtpError, OSError):
            raise SmtpRefused(reply, "connection", f"EHLO {name}") from None
        if not helo.is_refusal:
            return
    raise SmtpRefused(reply, "connection", f"EHLO {name}")


def _extensions(text: str) -> Mapping[str, str]:
    """What stands behind the first line of the reply to EHLO."""
    found: dict[str, str] = {}
    for line in text.split("\n")[1:]:
        word, _, parameters = line.strip().lower().replace("auth=", "auth ").partition(" ")
        found[word] = f"{found.get(word, '')} {parameters}".strip()
    return found


# --- login


async def _login(dialogue: Dialogue, user: str, password: str) -> None:
    """Tries what both know; where others could listen, first what doesn't show the password."""
    offered = dialogue.extensions.get("auth", "").split()
    ways = (
        ("plain", "login", "cram-md5") if dialogue.is_encrypted else ("cram-md5", "plain", "login")
    )
    refused: Reply | None = None
    for way in ways:
        if way in offered:
            reply = await _login_by(way, dialogue, user, password)
            if not reply.is_refusal:
                return
            refused = refused or reply
            if not dialogue.is_open:
                break
    if refused is None:
        names = ", ".join(offered).upper() or "none"
        raise SmtpError(f"the server offers no authentication that is known here ({names})")
    raise SmtpRefused(refused, "connection", "the login")


async def _login_by(way: str, dialogue: Dialogue, user: str, password: str) -> Reply:
    if way == "plain":
        return await dialogue.say(f"AUTH PLAIN {_base64(f'{chr(0)}{user}{chr(0)}{password}')}")
    reply = await dialogue.say(f"AUTH {way.upper()}")
    if way == "cram-md5" and reply.code == 334:
        return await dialogue.say(_base64(f"{user} {_digest(password, reply.text)}"))
    for text in (user, password):
        if reply.code == 334:
            reply = await dialogue.say(_base64(text))
    return reply


async def _login_with_token(dialogue: Dialogue, user: str, tokens: Tokens) -> None:
    """XOAUTH2, as Google and Microsoft describe it; a refused token is tried anew once."""
    if "xoauth2" not in dialogue.extensions.get("auth", "").split():
        raise SmtpError("the server offers no authentication with XOAUTH2")
    token = await tokens.get()
    reply = await _bear(dialogue, user, token)
    if reply.code == 535 and dialogue.is_open and await tokens.get(instead_of=token) != token:
        reply = await _bear(dialogue, user, await tokens.get())
    if reply.is_refusal:
        raise SmtpRefused(reply, "connection", "the login")


async def _bear(dialogue: Dialogue, user: str, token: str) -> Reply:
    initial = _base64(f"user={user}\1auth=Bearer {token}\1\1")
    reply = await dialogue.say(f"AUTH XOAUTH2 {initial}")
    if reply.code == 334:  # the reason, as JSON: the refusal comes after an empty line
        reason = _decoded(reply.text)
        reply = await dialogue.say("")
        reply = Reply(reply.code, f"{reply.text} {reason}")
    return reply


def _digest(password: str, challenge: str) -> str:
    try:
        text = base64.b64decode(challenge)
    except (binascii.Error, ValueError):
        raise SmtpError("the challenge of CRAM-MD5 is not base64") from None
    return hmac.digest(password.encode(), text, "md5").hex()


def _decoded(text: str) -> str:
    try:
        return one_line(base64.b64decode(text).decode("utf-8", "replace"))
    except (binascii.Error, ValueError):
        return one_line(text)


def _base64(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


# --- the name of this machine


def check_hello_name(name: str) -> str:
    """The name, if EHLO can say it. Raises ValueError."""
    if not _HELLO_NAME.fullmatch(name) and not re.fullmatch(r"\[[0-9A-Za-z.:]+\]", name):
        raise ValueError(
            f"hello_name is {name!r}: write a host name with a dot, such as mail.example.com, "
            "or an address in brackets"
        )
    return name


async def own_name() -> str | None:
    """The name of this machine with its domain; None if it has none that others could know."""
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


def _literal(address: str) -> str:
    return f"[IPv6:{address}]" if ":" in address else f"[{address}]"
