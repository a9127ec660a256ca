"""Parse the URL of a mail server."""

from __future__ import annotations

import ssl
from dataclasses import dataclass, field
from ipaddress import ip_address
from urllib.parse import parse_qsl, unquote

from sequencerd.core.hiding import hiding
from sequencerd.urls import split_url


@dataclass(frozen=True, slots=True)
class SmtpServer:
    """The parts of a mail server's URL."""

    host: str
    port: int
    user: str | None
    password: str | None = field(repr=False)
    tls: bool
    starttls: bool | None  # None: if the server offers it
    context: ssl.SSLContext | None = field(repr=False)

    @property
    def tls_name(self) -> str:
        """The host as a certificate names it: without the dot of an absolute name."""
        return self.host.rstrip(".")

    def hide(self, text: str) -> str:
        """Return a text with the password masked."""
        return hiding([self.password or ""])(text)


def parse_url(url: str, *, has_token: bool = False) -> SmtpServer:
    """Parse smtp://user:password@host:587?starttls=always, or smtps:// (port 465).

    Query parameters: `starttls` is `always`, `auto` (if offered) or `never`. The default is
    `always` with a password, except to localhost, so that no password is sent in the clear; `never`
    to localhost without a password; and otherwise `auto`. `cafile` names a file of trusted
    certificates, `verify=no` trusts any certificate. With `has_token`, the URL names only a user,
    and a token replaces the password. Raises ValueError, which never contains the URL.
    """
    try:
        parts = split_url(url)
        host, port = parts.hostname, parts.port
        query = dict(parse_qsl(parts.query, keep_blank_values=True, strict_parsing=True))
    except ValueError:
        if "?" in url and not url.partition("?")[2]:
            raise ValueError("the SMTP URL ends with an empty query: leave out the ?") from None
        raise ValueError(
            "the SMTP URL cannot be read: write smtp://user:password@host:587, with the special "
            "characters of the password percent-encoded"
        ) from None
    if parts.scheme not in ("smtp", "smtps") or not host or parts.path not in ("", "/"):
        raise ValueError(
            "the SMTP URL must be smtp://host or smtps://host, with user:password@ before the host "
            "if needed and special characters percent-encoded"
        )
    user = None if parts.username is None else unquote(parts.username)
    password = None if parts.password is None else unquote(parts.password)
    if has_token and (not user or password is not None):
        raise ValueError(
            "with oauth or token_command, the SMTP URL is smtp://user@host: no password"
        )
    tls = parts.scheme == "smtps"
    has_secret = has_token or bool(password)
    mode = query.pop("starttls", "never" if tls else _default_starttls(host, has_secret))
    verify, cafile = query.pop("verify", "yes"), query.pop("cafile", None)
    if query:
        raise ValueError(f"the SMTP URL has the unknown option {next(iter(query))!r}")
    if mode not in ("always", "auto", "never") or verify not in ("yes", "no"):
        raise ValueError("the SMTP URL's options are starttls=always|auto|never and verify=yes|no")
    if tls and mode != "never":
        raise ValueError("smtps:// is encrypted from the start: leave out starttls")
    return SmtpServer(
        host,
        port or (465 if tls else 587 if has_secret else 25),
        user,
        password,
        tls,
        {"always": True, "auto": None, "never": False}[mode],
        _context(cafile, verify == "yes") if tls or mode != "never" else None,
    )


def _default_starttls(host: str, has_secret: bool) -> str:
    try:
        local = ip_address(host).is_loopback
    except ValueError:
        local = host == "localhost"
    if local:
        return "auto" if has_secret else "never"
    return "always" if has_secret else "auto"


def _context(cafile: str | None, verify: bool) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=cafile)
    except OSError as error:
        raise ValueError(f"the SMTP URL's cafile {cafile!r} cannot be read: {error}") from error
    if not verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context
