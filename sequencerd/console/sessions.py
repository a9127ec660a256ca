"""Sessions of users who have logged in: rows in the database, which all daemons read."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TypeVar

import asyncpg
from starlette.requests import Request

from sequencerd.core.faults import printable
from sequencerd.storage import connections
from sequencerd.storage.database_errors import TRANSIENT_ERRORS
from sequencerd.storage.statements import QUERIES, affected

_T = TypeVar("_T")

MAX_SESSION_AGE = timedelta(hours=12)
MAX_LOCAL_SESSIONS = 1000  # sessions of a standby
MAX_AGENT = 200  # characters
TIMEOUT = 10.0  # seconds for a question to the database


@dataclass(frozen=True)
class Session:
    """The user of a session, and how it began; `groups` is None after a login with a password."""

    user: str
    groups: Sequence[str] | None
    credential: str


class Sessions:
    """The sessions of all daemons; on a standby, which cannot be written to, also those of this
    process.

    A token is the value of a cookie. Only its hash is stored.
    """

    def __init__(self, pool: asyncpg.Pool) -> None:
        self._pool = pool
        self._begun_here: dict[str, tuple[Session, datetime]] = {}
        self._ended_here: set[str] = set()

    async def begin(self, token: str, session: Session, address: str, agent: str) -> None:
        """Store a new session."""
        try:
            async with connections.borrow(self._pool) as connection:
                await connection.execute(
                    QUERIES["console_begin_session"],
                    hash_of(token),
                    session.user,
                    session.groups,
                    session.credential,
                    address,
                    printable(agent[:MAX_AGENT]),
                    MAX_SESSION_AGE,
                )
        except asyncpg.ReadOnlySQLTransactionError:
            if len(self._begun_here) >= MAX_LOCAL_SESSIONS:
                del self._begun_here[next(iter(self._begun_here))]
            self._begun_here[hash_of(token)] = session, datetime.now(UTC) + MAX_SESSION_AGE

    async def find(self, token: str) -> Session | None:
        """Return a session that has neither ended nor expired."""
        key = hash_of(token)
        if key in self._ended_here:
            return None
        if here := self._begun_here.get(key):
            session, until = here
            return session if datetime.now(UTC) < until else None
        rows = await connections.read(self._pool, "console_session", key, seconds=TIMEOUT)
        return Session(rows[0]["user"], rows[0]["groups"], rows[0]["credential"]) if rows else None

    async def all(self, user: str | None) -> list[asyncpg.Record]:
        """Return the sessions of a user, or of all users: `session` is the argument of `end`."""
        return await connections.read(self._pool, "console_sessions_of", user)

    async def end(self, key: str, user: str | None) -> bool:
        """End a session, for all daemons, and return whether there was one. If `user` is given, it
        must be that user's. On a standby it ends for this process.
        """
        try:
            async with connections.borrow(self._pool) as connection:
                done = await connection.execute(QUERIES["console_end_session"], key, user)
        except asyncpg.ReadOnlySQLTransactionError:
            self._begun_here.pop(key, None)
            self._ended_here.add(key)
            return True
        return affected(done) > 0


class SessionsOfShards(Sessions):
    """The same for several shards: a session is stored in all that can be reached, so that it
    remains valid when one of them is unavailable.
    """

    def __init__(self, shards: Sequence[Sessions]) -> None:
        self._shards = shards
        self._ended: set[str] = set()  # where a shard was away

    async def begin(self, token: str, session: Session, address: str, agent: str) -> None:
        """Store a new session."""
        await self._each(lambda one: one.begin(token, session, address, agent))

    async def find(self, token: str) -> Session | None:
        """Return a session that has neither ended nor expired, as soon as any shard finds it."""
        if hash_of(token) in self._ended:
            return None
        asked = [asyncio.ensure_future(one.find(token)) for one in self._shards]
        try:
            for answer in asyncio.as_completed(asked):
                with suppress(*TRANSIENT_ERRORS):
                    if session := await answer:
                        return session
        finally:
            for task in asked:
                task.cancel()
            await asyncio.gather(*asked, return_exceptions=True)
        return None

    async def all(self, user: str | None) -> list[asyncpg.Record]:
        """Return the sessions of a user, or of all."""
        found = await self._each(lambda one: one.all(user))
        return list({row["session"]: row for rows in found for row in rows}.values())

    async def end(self, key: str, user: str | None) -> bool:
        """End a session in all shards, and return whether there was one."""
        found = await self._each(lambda one: one.end(key, user))
        if len(found) < len(self._shards) and any(found):
            self._ended.add(key)
        return any(found)

    async def _each(self, work: Callable[[Sessions], Awaitable[_T]]) -> list[_T]:
        """Return the answers of the shards. Raises the error if none answers."""
        done = await asyncio.gather(*map(work, self._shards), return_exceptions=True)
        found = [one for one in done if not isinstance(one, BaseException)]
        for one in done:
            if isinstance(one, BaseException) and not (found and isinstance(one, TRANSIENT_ERRORS)):
                raise one
        return found


def cookie_of(request: Request, name: str) -> str:
    """Return the value of a cookie, or an empty text. Some versions of Python take many seconds to
    read a quoted value of 60 kB; the console's own values need no quotation marks.
    """
    given = [part.strip() for part in request.headers.get("cookie", "").split(";")]
    return next((part[len(name) + 1 :] for part in given if part.startswith(f"{name}=")), "")


def hash_of(token: str) -> str:
    """Return the stored hash of a token."""
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()
