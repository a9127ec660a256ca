"""Authenticate users of the console, by password, OpenID Connect, a proxy's header or as local
users, and authorize them.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import secrets
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from ipaddress import ip_address, ip_network
from typing import get_args

from starlette.requests import Request
from starlette.responses import Response

from sequencerd import passwords
from sequencerd.console.oidc import Login, Provider
from sequencerd.console.sessions import MAX_SESSION_AGE, Session, Sessions, cookie_of, hash_of
from sequencerd.settings import ConsoleSettings, Role

SESSION_COOKIE = "sequencerd"
MAX_USER = 100  # characters

MAX_WRONG_PASSWORDS = 5  # wrong passwords from an address in a minute
WRONG_PASSWORDS_PERIOD = 60.0  # seconds
MAX_ADDRESSES = 10_000

LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]", "::1")

ROLES: tuple[Role, ...] = get_args(Role)
"""The roles; each includes those before it."""


@dataclass(frozen=True)
class Visitor:
    """The user of a request, or None before the login. `token` proves that a form was made by this
    console. The role is None if none of the user's groups has one.
    """

    user: str | None
    nonce: str
    token: str
    role: Role | None = None

    def may(self, role: Role) -> bool:
        """Return whether the user has at least this role."""
        return self.role is not None and ROLES.index(self.role) >= ROLES.index(role)


class Auth:
    """Authentication according to the settings."""

    def __init__(self, settings: ConsoleSettings, sessions: Sessions) -> None:
        self._settings = settings
        self.sessions = sessions
        common = settings.password_hash
        self._hash = None if common is None else common.get_secret_value()
        self._hashes = {
            name: user.password_hash.get_secret_value() for name, user in settings.users.items()
        }
        oidc = settings.oidc
        kept = [*self._hashes.values()]
        if self._hash is not None:
            kept.append(self._hash)
        if oidc is not None and oidc.client_secret is not None:
            kept.append(oidc.client_secret.get_secret_value())
        # made from what all daemons know, so that each accepts the forms of the others. Without
        # it, forms are valid until the process ends
        root = " ".join(kept) or secrets.token_hex()
        self._key = hashlib.sha256(f"sequencerd console {root}".encode()).digest()
        self.provider = Provider(oidc, self._key) if oidc is not None else None
        self._proxies = [ip_network(text) for text in settings.trusted_proxy]
        self._failures: dict[str, list[float]] = {}
        self._one_at_a_time = asyncio.Semaphore(1)

    @property
    def is_open(self) -> bool:
        """Return whether every local user has access."""
        return not self._settings.is_protected

    @property
    def has_passwords(self) -> bool:
        """Return whether users can log in with a password."""
        return self._hash is not None or bool(self._hashes)

    @property
    def has_sessions(self) -> bool:
        """Return whether users can log in here, so that sessions exist."""
        return self.has_passwords or self.provider is not None

    def refusal(self, request: Request) -> str | None:
        """Return why a request is refused regardless of its user, or None."""
        # DNS rebinding: a foreign name for this address would let other pages read this one
        if self.is_open and request.url.hostname not in LOOPBACK_NAMES:
            return "Without a password the console answers only at 127.0.0.1 and localhost."
        if self._proxies and not self.has_sessions and self._from_proxy(request) is None:
            return "The proxy in front of the console must name the user."
        return None

    async def visitor(self, request: Request) -> Visitor:
        """Return the user of a request."""
        nonce = cookie_of(request, SESSION_COOKIE) or secrets.token_urlsafe(32)
        if (user := self._from_proxy(request)) is not None:
            return self._visitor(user, nonce, self._role_of_proxied(request))
        if self.is_open:
            return self._visitor("local user", nonce, self._settings.role)
        if self.has_sessions and (session := await self._session(request)) is not None:
            return self._visitor(session.user, nonce, self._role_of(session))
        return self._visitor(None, nonce, None)

    def unknown(self, request: Request) -> Visitor:
        """Return the visitor of a request before the user is known."""
        return self._visitor(None, cookie_of(request, SESSION_COOKIE), None)

    def _visitor(self, user: str | None, nonce: str, role: Role | None) -> Visitor:
        return Visitor(user, nonce, self._token(nonce, user), role)

    async def _session(self, request: Request) -> Session | None:
        if not (token := cookie_of(request, SESSION_COOKIE)):
            return None
        session = await self.sessions.find(token)
        if session is None or session.credential != self._credential(session):
            return None
        return session

    def _credential(self, session: Session) -> str | None:
        """Return what a session's login depends on, as it is now; None if that no longer exists."""
        if session.groups is not None:
            return self.provider.credential if self.provider else None
        known = self._hashes.get(session.user, self._hash)
        return None if known is None else hash_of(f"sequencerd console {known}")

    def _role_of(self, session: Session) -> Role | None:
        if session.groups is not None:
            return self.role_of_groups(session.groups)
        user = self._settings.users.get(session.user)
        return self._settings.role if user is None else user.role

    def role_of_groups(self, groups: Iterable[str]) -> Role | None:
        """Return the most powerful role of some groups."""
        wanted = {*groups, "*"}
        found = (role for role, named in self._settings.groups.items() if wanted & {*named})
        return next(found, None)

    def _role_of_proxied(self, request: Request) -> Role | None:
        if not any(self._settings.groups.values()):
            return self._settings.role
        values = request.headers.getlist(self._settings.groups_header)
        return self.role_of_groups(part.strip() for text in values for part in text.split(","))

    async def has_ended(self, request: Request, visitor: Visitor) -> bool:
        """Return whether the visitor's session has ended in the meantime."""
        if not self.has_sessions or self._from_proxy(request) is not None:
            return False  # their access does not depend on a session
        return visitor.user is not None and await self._session(request) is None

    async def log_out(self, visitor: Visitor) -> None:
        """End the visitor's session, for all copies of its cookie."""
        await self.sessions.end(hash_of(visitor.nonce), None)

    def anonymous(self) -> Visitor:
        """Return a visitor without a login."""
        return self._visitor(None, secrets.token_urlsafe(32), None)

    async def log_in(self, request: Request, user: str, password: str) -> Visitor | None:
        """Log a user in; None for a wrong name or password. Raises TooManyError."""
        address = self.address(request)
        if wait := self._wait(address):
            raise TooManyError(wait)
        known = self._hashes.get(user, self._hash)
        # takes as long for an unknown user, so that names cannot be guessed
        asked = known or next(iter(self._hashes.values()))
        async with self._one_at_a_time:  # hashing takes memory and a core
            if wait := self._wait(address):
                raise TooManyError(wait)
            right = await asyncio.to_thread(passwords.matches, password, asked)
            if not right or known is None:
                self._failed(address)
                return None
        self._failures.pop(address, None)
        return await self._begin(request, user, None)

    async def log_in_by_provider(self, request: Request, login: Login) -> Visitor:
        """Begin the session of a user who has logged in at the provider."""
        return await self._begin(request, login.user[:MAX_USER], login.groups)

    async def _begin(self, request: Request, user: str, groups: Sequence[str] | None) -> Visitor:
        session = Session(user, groups, "")
        session = Session(user, groups, self._credential(session) or "")
        visitor = self._visitor(user, secrets.token_urlsafe(32), self._role_of(session))
        agent = request.headers.get("user-agent", "")
        await self.sessions.begin(visitor.nonce, session, self.address(request), agent)
        return visitor

    def is_ours(self, request: Request, visitor: Visitor, token: str) -> bool:
        """Return whether a form was made by this console for this visitor."""
        site = request.headers.get("sec-fetch-site", "same-origin")
        return site in ("same-origin", "none") and hmac.compare_digest(
            token.encode("utf-8", "surrogatepass"), visitor.token.encode()
        )

    def keep(self, request: Request, response: Response, visitor: Visitor) -> None:
        """Set the cookie if the visitor has another one."""
        if cookie_of(request, SESSION_COOKIE) != visitor.nonce:
            response.set_cookie(
                SESSION_COOKIE,
                visitor.nonce,
                max_age=int(MAX_SESSION_AGE.total_seconds()),
                path="/console",
                secure=self.is_https(request),
                httponly=True,
                samesite="lax",
            )

    def address(self, request: Request) -> str:
        """Return the address of the client: for IPv6, its network."""
        text = request.client.host if request.client else ""
        if self._is_proxy(request):
            text = request.headers.get("x-forwarded-for", text).rpartition(",")[2].strip()
        try:
            address = ip_address(text)
        except ValueError:
            return text
        return str(ip_network((address, 64), strict=False)) if address.version == 6 else text

    def _token(self, nonce: str, user: str | None) -> str:
        signed = f"form {nonce} {user}".encode("utf-8", "surrogatepass")
        return hmac.digest(self._key, signed, "sha256").hex()

    def _from_proxy(self, request: Request) -> str | None:
        name = request.headers.get(self._settings.user_header, "").strip()
        return name[:MAX_USER] if name and self._is_proxy(request) else None

    def _is_proxy(self, request: Request) -> bool:
        try:
            peer = ip_address(request.client.host if request.client else "")
        except ValueError:
            return False
        return any(peer in network for network in self._proxies)

    def is_https(self, request: Request) -> bool:
        """Return whether the browser uses https."""
        forwarded = request.headers.get("x-forwarded-proto") if self._is_proxy(request) else None
        return (forwarded or request.url.scheme) == "https"

    def _wait(self, address: str) -> int:
        """Return for how many seconds this address may not try again."""
        recent = _recent(self._failures.get(address, ()))
        if len(recent) < MAX_WRONG_PASSWORDS:
            return 0
        return int(recent[0] + WRONG_PASSWORDS_PERIOD - time.monotonic()) + 1

    def _failed(self, address: str) -> None:
        failures = [*_recent(self._failures.pop(address, ())), time.monotonic()]
        if len(self._failures) >= MAX_ADDRESSES:
            del self._failures[next(iter(self._failures))]  # the address with the oldest failure
        self._failures[address] = failures


class TooManyError(Exception):
    """Too many wrong passwords; the value is the number of seconds to wait."""

    def __init__(self, seconds: int) -> None:
        super().__init__(f"too many wrong passwords; try again in {seconds} s")
        self.seconds = seconds


def _recent(times: Sequence[float]) -> list[float]:
    since = time.monotonic() - WRONG_PASSWORDS_PERIOD
    return [at for at in times if at > since]
