"""Fetch access tokens for a mail server, from a token endpoint (RFC 6749) or a command."""

from __future__ import annotations

import asyncio
import math
import shlex
import time
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import NamedTuple

from pydantic import BaseModel, SecretStr, ValidationError

from sequencerd.core.hiding import hiding
from sequencerd.core.task import OutageCause
from sequencerd.runners.fields import one_line
from sequencerd.runners.http_client import HttpClient, Unreachable
from sequencerd.runners.http_reply import retry_after
from sequencerd.settings import EmailSettings, OAuthSettings

RENEWED_EARLY = 120.0
"""How many seconds before it expires a token is renewed; after half its lifetime if that is
shorter.
"""

TIMEOUT = 30.0  # seconds for a token
UNKNOWN_LIFE = 60.0  # seconds for which a token is used if its lifetime is unknown


class TokenError(Exception):
    """No token is available. The message is the reason, and contains no secret; `retry_after` is
    the wait that the endpoint asks for.
    """

    def __init__(
        self,
        message: str,
        cause: OutageCause = "failing",
        retry_after: timedelta | None = None,
    ) -> None:
        super().__init__(message)
        self.cause = cause
        self.retry_after = retry_after


class AccessToken(NamedTuple):
    """An access token, and the number of seconds for which it is valid."""

    text: str
    life: float


class AccessTokens:
    """The current token: fetched when it is needed, once for all callers."""

    def __init__(self, fetch: Callable[[], Awaitable[AccessToken]]) -> None:
        self._fetch = fetch
        self._turn = asyncio.Lock()
        self._token = ""
        self._until = -math.inf

    async def get(self, *, instead_of: str | None = None) -> str:
        """Return a token that remains valid for a while; `instead_of` is one that the server
        rejected. Raises TokenError.
        """
        async with self._turn:
            if time.monotonic() >= self._until or self._token == instead_of:
                token = await self._fetch()
                self._token = token.text
                self._until = time.monotonic() + max(token.life / 2, token.life - RENEWED_EARLY)
            return self._token

    def hide(self, text: str) -> str:
        """Return a text with the token masked, in case a server repeats it."""
        return hiding([self._token])(text)


class _TokenAnswer(BaseModel):
    access_token: str | None = None
    expires_in: float | None = None
    refresh_token: str | None = None
    error: str | None = None
    error_description: str | None = None


def _read(text: str) -> _TokenAnswer:
    try:
        return _TokenAnswer.model_validate_json(text)
    except ValidationError:
        return _TokenAnswer()


class TokenEndpoint:
    """Fetches tokens with the client's credentials, or with a refresh token."""

    def __init__(self, client: OAuthSettings) -> None:
        self._client = client
        self._refresh_token = client.refresh_token
        self._web = HttpClient(timeout=TIMEOUT, connections=1, allow_private=True)

    async def fetch(self) -> AccessToken:
        """Fetch a new token. Raises TokenError."""
        client = self._client
        grant = "client_credentials" if self._refresh_token is None else "refresh_token"
        secrets = {"client_secret": client.client_secret, "refresh_token": self._refresh_token}
        given = {key: value.get_secret_value() for key, value in secrets.items() if value}
        form = {"client_id": client.client_id, "grant_type": grant, **given}
        if client.scope is not None:
            form["scope"] = client.scope
        try:
            reply = await self._web.call("POST", client.token_url, headers={}, form=form)
        except Unreachable as error:
            raise TokenError(f"the token endpoint: {error}", error.cause) from None
        answer = _read(reply.text())
        if reply.status != 200 or not answer.access_token:
            # the body is not shown: even without a token, it may contain another secret
            said = reply.hide(answer.error_description or answer.error or "no token")
            said = hiding(given.values())(said)
            text = f"the token endpoint answered {reply.status}: {one_line(said)}"
            raise TokenError(text, "refused", retry_after(reply.headers))
        if answer.refresh_token:  # some servers change it
            self._refresh_token = SecretStr(answer.refresh_token)
        return AccessToken(answer.access_token, answer.expires_in or UNKNOWN_LIFE)

    async def close(self) -> None:
        """Close the connections."""
        await self._web.close()


class TokenCommand:
    """Runs a program that prints a token, or the JSON of a token endpoint. Raises ValueError."""

    def __init__(self, command: str) -> None:
        self._words = shlex.split(command)
        if not self._words:
            raise ValueError("token_command is empty")

    async def fetch(self) -> AccessToken:
        """Return the token that the program prints. Raises TokenError, without the program's
        output.
        """
        try:
            process = await asyncio.create_subprocess_exec(
                *self._words,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.DEVNULL,
            )
        except OSError as error:
            raise TokenError(f"token_command cannot be run: {error.strerror}") from None
        try:
            async with asyncio.timeout(TIMEOUT):
                output, _ = await process.communicate()
        except BaseException as error:
            process.kill()
            await process.wait()
            if isinstance(error, TimeoutError):
                text = f"token_command did not end within {TIMEOUT:g} s"
                raise TokenError(text) from None
            raise
        if process.returncode:
            raise TokenError(f"token_command ended with status {process.returncode}")
        return _printed(output)

    async def close(self) -> None:
        """Do nothing: there is nothing to release."""


def token_source(settings: EmailSettings) -> TokenEndpoint | TokenCommand | None:
    """Return the source of tokens: a token endpoint or a command, if there is one. Raises
    ValueError.
    """
    if settings.oauth is not None:
        return TokenEndpoint(settings.oauth)
    return None if settings.token_command is None else TokenCommand(settings.token_command)


def _printed(output: bytes) -> AccessToken:
    text = output.decode("utf-8", "replace").strip()
    if text.startswith("{"):
        answer = _read(text)
        token = AccessToken(answer.access_token or "", answer.expires_in or UNKNOWN_LIFE)
    else:
        token = AccessToken(text, UNKNOWN_LIFE)
    if not token.text or not token.text.isprintable() or " " in token.text:
        raise TokenError("token_command prints no token")
    return token
