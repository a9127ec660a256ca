"""Authentication of the console: a password, a proxy's header, or the local machine."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from ipaddress import ip_address, ip_network

import asyncpg
from itsdangerous import BadSignature, URLSafeTimedSerializer
from starlette.requests import Request
from starlette.responses import Response

from sequencerd import passwords
from sequencerd.settings import Console
from sequencerd.storage import connections
from sequencerd.storage.statements import QUERIES

COOKIE = "sequencerd"
LONGEST_SESSION = 12 * 3600  # seconds
MAX_USER = 100  # characters
TIMEOUT = 10.0  # seconds for a question to the database

ATTEMPTS = 5  # wrong passwords from an address in a minute
PERIOD = 60.0
MAX_ADDRESSES = 10_000

LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")


@dataclass(frozen=True)
class Visitor:
    """The user of a request: None before the login. `token` proves that a form is ours."""

    user: str | None
    nonce: str
    token: str


class Auth:
    """Authentication by the settings."""

    def __init__(self, settings: Console, pool: asyncpg.Pool) -> None:
        self._settings = settings
        self._pool = pool
        self.password_hash = (
            settings.password_hash.get_secret_value() if settings.password_hash else None
        )
        # from the hash: sessions outlive a restart, hold for several daemons, and end with the
        # password. Without one a session proves nothing, and may end
        root = self.password_hash or secrets.token_hex()
        self._key = hashlib.sha256(f"sequencerd console {root}".encode()).digest()
        self._serializer = URLSafeTimedSerializer(self._key, salt="session")
        self._proxies = [ip_network(text) for text in settings.trusted_proxy]
        self._failures: dict[str, list[float]] = {}
        self._ended_here: set[str] = set()
        self._one_at_a_time = asyncio.Semaphore(1)

    @property
    def is_open(self) -> bool:
        """Whether every local user has access."""
        return self.password_hash is None and not self._proxies

    def refusal(self, request: Request) -> str | None:
        """Return why a request is refused regardless of its user, or None."""
        # a name that leads here is how a page from elsewhere would read what needs no login
        if self.is_open and request.url.hostname not in (*LOOPBACK_NAMES, "::1"):
            return "Without a password the console answers at 127.0.0.1 and localhost alone."
        if self.password_hash is None and self._proxies and self._from_proxy(request) is None:
            return "The proxy in front of the console must name the user."
        return None

    def visitor(self, request: Request) -> Visitor:
        """Return the user of a request."""
        kept = self._session(request)
        nonce = kept.get("nonce") or secrets.token_urlsafe(16)
        user = self._from_proxy(request)
        if user is None and self.is_open:
            user = "local user"
        if user is None and self.password_hash is not None:
            user = kept.get("user")
        return Visitor(user, nonce, self._token(nonce, user))

    async def is_logged_out(self, request: Request, visitor: Visitor) -> bool:
        """Return whether the visitor's session was ended by a logout; its cookie may have been
        copied.
        """
        if self.password_hash is None or visitor.user is None or self._from_proxy(request):
            return False  # what lets them in is no session
        if visitor.nonce in self._ended_here:
            return True
        ((answer,),) = await connections.read(
            self._pool, "console_is_logged_out", _hash(visitor.nonce), seconds=TIMEOUT
        )
        return bool(answer)

    async def log_out(self, visitor: Visitor) -> None:
        """End the visitor's session, at all daemons; on a standby, for this process."""
        try:
            async with connections.borrow(self._pool) as connection:
                await connection.execute(
                    QUERIES["console_log_out"],
                    _hash(visitor.nonce),
                    timedelta(seconds=LONGEST_SESSION),
                )
        except asyncpg.ReadOnlySQLTransactionError:
            self._ended_here.add(visitor.nonce)

    def anonymous(self) -> Visitor:
        """Return a visitor without a login."""
        nonce = secrets.token_urlsafe(16)
        return Visitor(None, nonce, self._token(nonce, None))

    async def log_in(self, request: Request, user: str, password: str) -> Visitor | None:
        """Log a user in; None for a wrong password. Raises TooManyError."""
        address = self.address(request)
        if wait := self._wait(address):
            raise TooManyError(wait)
        assert self.password_hash is not None
        async with self._one_at_a_time:  # it takes memory and a core
            if wait := self._wait(address):
                raise TooManyError(wait)
            right = await asyncio.to_thread(passwords.matches, password, self.password_hash)
            if not right:
                self._failed(address)
                return None
        self._failures.pop(address, None)
        nonce = secrets.token_urlsafe(16)
        return Visitor(user, nonce, self._token(nonce, user))

    def is_ours(self, request: Request, visitor: Visitor, token: str) -> bool:
        """Return whether a form was made here for this visitor."""
        site = request.headers.get("sec-fetch-site", "same-origin")
        return site in ("same-origin", "none") and hmac.compare_digest(
            token.encode("utf-8", "surrogatepass"), visitor.token.encode()
        )

    def keep(self, request: Request, response: Response, visitor: Visitor) -> None:
        """Set the cookie where the visitor has another one."""
        if self._session(request) != (wanted := {"nonce": visitor.nonce, "user": visitor.user}):
            response.set_cookie(
                COOKIE,
                self._serializer.dumps(wanted),
                max_age=LONGEST_SESSION,
                path="/console",
                secure=self._is_https(request),
                httponly=True,
                samesite="lax",
            )

    def address(self, request: Request) -> str:
        """Return where the request comes from: for an IPv6 address its network."""
        text = request.client.host if request.client else ""
        if self._is_proxy(request):
            text = request.headers.get("x-forwarded-for", text).rpartition(",")[2].strip()
        try:
            address = ip_address(text)
        except ValueError:
            return text
        return str(ip_network((address, 64), strict=False)) if address.version == 6 else text

    def _session(self, request: Request) -> dict[str, str | None]:
        try:
            kept = self._serializer.loads(request.cookies.get(COOKIE, ""), LONGEST_SESSION)
        except BadSignature:
            return {}
        return dict(kept)

    def _token(self, nonce: str, user: str | None) -> str:
        return hmac.digest(self._key, f"form {nonce} {user}".encode(), "sha256").hex()

    def _from_proxy(self, request: Request) -> str | None:
        name = request.headers.get(self._settings.user_header, "").strip()
        return name[:MAX_USER] if name and self._is_proxy(request) else None

    def _is_proxy(self, request: Request) -> bool:
        try:
            peer = ip_address(request.client.host if request.client else "")
        except ValueError:
            return False
        return any(peer in network for network in self._proxies)

    def _is_https(self, request: Request) -> bool:
        forwarded = request.headers.get("x-forwarded-proto") if self._is_proxy(request) else None
        return (forwarded or request.url.scheme) == "https"

    def _wait(self, address: str) -> int:
        """For how many seconds this address may not try."""
        recent = _recent(self._failures.get(address, ()))
        return 0 if len(recent) < ATTEMPTS else int(recent[0] + PERIOD - time.monotonic()) + 1

    def _failed(self, address: str) -> None:
        failures = [*_recent(self._failures.pop(address, ())), time.monotonic()]
        if len(self._failures) >= MAX_ADDRESSES:
            del self._failures[next(iter(self._failures))]  # the one that failed longest ago
        self._failures[address] = failures


class TooManyError(Exception):
    """Too many wrong passwords: come again after so many seconds."""

    def __init__(self, seconds: int) -> None:
        super().__init__(f"too many wrong passwords; try again in {seconds} s")
        self.seconds = seconds


def _hash(nonce: str) -> str:
    return hashlib.sha256(nonce.encode("utf-8", "surrogatepass")).hexdigest()


def _recent(times: Sequence[float]) -> list[float]:
    since = time.monotonic() - PERIOD
    return [at for at in times if at > since]
