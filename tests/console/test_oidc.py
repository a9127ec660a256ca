"""Login by OpenID Connect, with a provider that speaks HTTP: discovery, the code flow with PKCE,
signed ID tokens.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import parse_qsl, urlencode

import asyncpg
import httpx
import pytest
from authlib.oauth2.rfc7636 import create_s256_code_challenge
from joserfc import jwt
from joserfc.jwk import RSAKey
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.routing import Route

from sequencerd.service.http_server import serving
from sequencerd.settings import Settings
from tests.console.conftest import console, token
from tests.service.test_http_server import free_port

SECRET = "s3cret"
GROUPS: dict[str, Any] = {"viewer_groups": ["staff"], "editor_groups": ["marketing"]}
KEY = RSAKey.generate_key(2048, {"kid": "1", "alg": "RS256", "use": "sig"})
OTHER_KEY = RSAKey.generate_key(2048, {"kid": "1", "alg": "RS256", "use": "sig"})


class Provider:
    """An OpenID Connect provider with one user, who is logged in."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.claims: dict[str, Any] = {"email": "ada@example.com", "groups": ["staff"]}
        self.changes: dict[str, Any] = {}  # of the ID token, by an attacker
        self.key = KEY
        self.metadata: dict[str, Any] = {}
        self.asked: dict[str, str] = {}
        self.state: str | None = None  # instead of the one of the request
        self.refusal: str | None = None  # of every login, with what the provider was sent
        self._codes: dict[str, dict[str, str]] = {}

    def app(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/.well-known/openid-configuration", self._discover),
                Route("/jwks", self._keys),
                Route("/authorize", self._authorize),
                Route("/token", self._token, methods=["POST"]),
            ]
        )

    async def _discover(self, _: Request) -> Response:
        return JSONResponse(
            {
                "issuer": self.url,
                "authorization_endpoint": f"{self.url}/authorize",
                "token_endpoint": f"{self.url}/token",
                "jwks_uri": f"{self.url}/jwks",
                "id_token_signing_alg_values_supported": ["RS256", "HS256", "none"],
                "response_types_supported": ["code"],
                "subject_types_supported": ["public"],
                **self.metadata,
            }
        )

    async def _keys(self, _: Request) -> Response:
        return JSONResponse({"keys": [KEY.as_dict(private=False)]})

    async def _authorize(self, request: Request) -> Response:
        self.asked = dict(request.query_params)
        assert self.asked["response_type"] == "code"
        assert self.asked["client_id"] == "console"
        assert self.asked["code_challenge_method"] == "S256"
        code = f"code-{len(self._codes)}"
        self._codes[code] = self.asked
        answer = {"code": code, "state": self.state or self.asked["state"]}
        return RedirectResponse(f"{self.asked['redirect_uri']}?{urlencode(answer)}", 302)

    async def _token(self, request: Request) -> Response:
        form = dict(parse_qsl((await request.body()).decode()))
        auth = httpx.BasicAuth("console", SECRET)._auth_header
        asked = self._codes.pop(form["code"], None)  # once
        if self.refusal is not None:
            said = self.refusal.format(auth=request.headers["authorization"], secret=SECRET)
            return JSONResponse({"error": "invalid_client", "error_description": said}, 401)
        if request.headers.get("authorization") != auth or asked is None:
            return JSONResponse({"error": "invalid_client"}, 401)
        challenge = create_s256_code_challenge(form["code_verifier"])
        if challenge != asked["code_challenge"] or form["redirect_uri"] != asked["redirect_uri"]:
            return JSONResponse({"error": "invalid_grant"}, 400)
        now = int(time.time())
        claims = {
            "iss": self.url,
            "aud": "console",
            "sub": "1",
            "iat": now,
            "exp": now + 300,
            "nonce": asked["nonce"],
            **self.claims,
            **self.changes,
        }
        claims = {name: value for name, value in claims.items() if value is not None}
        return JSONResponse(
            {
                "access_token": "x",
                "token_type": "Bearer",
                "expires_in": 300,
                "id_token": jwt.encode({"alg": "RS256", "kid": "1"}, claims, self.key),
            }
        )


@asynccontextmanager
async def with_provider(
    database: str, **changes: Any
) -> AsyncIterator[tuple[httpx.AsyncClient, Provider]]:
    """A client of a console whose users a provider logs in."""
    provider = Provider(f"http://127.0.0.1:{free_port()}")
    oidc = {
        "issuer": provider.url,
        "client_id": "console",
        "client_secret": SECRET,
        "url": "http://console.example",
        "scope": "openid email groups",
        **changes,
    }
    async with (
        serving(provider.app(), provider.url.removeprefix("http://")),
        console(database, oidc=oidc, write=True, **GROUPS) as client,
    ):
        yield client, provider


async def log_in(client: httpx.AsyncClient) -> httpx.Response:
    """Follow the redirects as a browser does, to the console and no further."""
    page = await client.get("/login?to=/console/search")
    answer = await client.post("/oidc", data={"token": token(page), "to": "/console/search"})
    if answer.status_code != 302:
        return answer
    async with httpx.AsyncClient() as browser:
        back = await browser.get(answer.headers["location"])
    assert back.status_code == 302, back.text
    location = back.headers["location"]
    assert location.startswith("http://console.example/console/oidc?")
    return await client.get(location.removeprefix("http://console.example/console"))


async def test_a_provider_logs_users_in(database: str, connection: asyncpg.Connection) -> None:
    async with with_provider(database) as (client, provider):
        assert (await client.get("/")).status_code == 303
        done = await log_in(client)
        assert done.status_code == 303, done.text
        assert done.headers["location"] == "/console/search"
        assert provider.asked["scope"] == "openid email groups"
        assert ">ada@example.com</a>" in (await client.get("/")).text
        refused = await client.get("/change?action=cancel&id=1")
        assert "ada@example.com has the role viewer" in refused.text
        row = await connection.fetchrow("SELECT * FROM sequencer.console_sessions")
        assert row["groups"] == ["staff"]
        # another group, another role
        provider.claims["groups"] = "marketing"
        client.cookies.clear()
        assert (await log_in(client)).status_code == 303
        assert (await client.get("/change?action=cancel&id=1")).status_code == 200
        page = await client.get("/")
        assert (await client.post("/logout", data={"token": token(page)})).status_code == 303
        assert (await client.get("/")).status_code == 303


async def test_a_code_is_good_for_one_login(database: str, connection: asyncpg.Connection) -> None:
    async with with_provider(database) as (client, _):
        page = await client.get("/login")
        answer = await client.post("/oidc", data={"token": token(page)})
        async with httpx.AsyncClient() as browser:
            back = await browser.get(answer.headers["location"])
        path = back.headers["location"].removeprefix("http://console.example/console")
        kept = {"Cookie": "; ".join(f"{name}={value}" for name, value in client.cookies.items())}
        # in another browser it is worth nothing
        client.cookies.clear()
        assert "started in another browser" in (await client.get(path)).text
        assert (await client.get(path, headers=kept)).status_code == 303
        client.cookies.clear()
        assert (await client.get(path, headers=kept)).status_code == 403


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"nonce": "another"}, "nonce"),
    ({"nonce": None}, "nonce"),
    ({"iss": "https://evil.example"}, "iss"),
    ({"aud": "another-client"}, "aud"),
    ({"exp": 1}, "expired"),
    ({"email": None}, "has no claim &#39;email&#39;"),
    ({"groups": ["interns"]}, "ada@example.com has no role in the console"),
    ({"groups": None}, "ada@example.com has no role in the console"),
    ({"groups": {"staff": True}}, "ada@example.com has no role in the console"),
]


async def test_a_wrong_token_is_refused(database: str, connection: asyncpg.Connection) -> None:
    async with with_provider(database) as (client, provider):
        for changes, words in WRONG:
            provider.changes = changes
            refused = await log_in(client)
            assert refused.status_code == 403, changes
            assert words in refused.text, changes
            assert (await client.get("/")).status_code == 303, changes
        assert not await connection.fetchval("SELECT count(*) FROM sequencer.console_sessions")
        provider.changes = {}
        assert (await log_in(client)).status_code == 303


async def test_forgeries_are_refused(database: str, connection: asyncpg.Connection) -> None:
    async with with_provider(database) as (client, provider):
        provider.key = OTHER_KEY
        assert "bad_signature" in (await log_in(client)).text
        provider.key = KEY
        provider.state = "another"
        assert "state" in (await log_in(client)).text.lower()
        provider.state = None
        denied = await client.get("/oidc?error=access_denied&error_description=Not+you")
        assert denied.status_code == 403
        # nobody is led to the provider by another site
        assert (await client.post("/oidc", data={"token": "x"})).status_code == 403
        assert (await client.get("/")).status_code == 303
        assert (await log_in(client)).status_code == 303


async def test_a_wrong_provider_is_explained(database: str, connection: asyncpg.Connection) -> None:
    async with with_provider(database, client_secret="wrong") as (client, provider):
        assert "invalid_client" in (await log_in(client)).text
        provider.metadata = {"issuer": "https://evil.example"}
    async with with_provider(database) as (client, provider):
        provider.metadata = {"issuer": "https://evil.example"}
        assert "calls itself" in (await log_in(client)).text
    nowhere = f"http://127.0.0.1:{free_port()}"
    async with with_provider(database, issuer=nowhere) as (client, _):
        refused = await log_in(client)
        assert refused.status_code == 403
        assert "the provider cannot be reached" in refused.text


async def test_a_provider_that_repeats_the_login(
    database: str, connection: asyncpg.Connection
) -> None:
    async with with_provider(database) as (client, provider):
        provider.refusal = "{auth} is {secret}"
        assert "invalid_client: Basic *** is ***." in (await log_in(client)).text


def test_the_package_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    from sequencerd import settings
    from sequencerd.errors import SettingsError

    oidc = {"issuer": "https://id.example", "client_id": "x", "url": "https://c.example"}
    found = Settings.model_validate({"console": {"oidc": oidc, **GROUPS}})
    found.check_console()
    monkeypatch.setattr(settings, "find_spec", lambda name: None)
    with pytest.raises(SettingsError, match=r"pip install 'sequencerd\[oidc\]'"):
        found.check_console()
