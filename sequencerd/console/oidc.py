"""Log in with OpenID Connect: the authorization code flow with PKCE, by Authlib."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from itsdangerous import BadSignature, URLSafeTimedSerializer
from starlette.requests import Request
from starlette.responses import Response

from sequencerd.console.sessions import cookie_of
from sequencerd.core.faults import printable
from sequencerd.settings import OidcSettings

COOKIE = "sequencerd_login"
MAX_LOGIN_SECONDS = 600
TIMEOUT = 10.0  # seconds for an answer of the provider
PATH = "/console/oidc"
ASYMMETRIC = ("RS", "ES", "PS", "Ed")


class LoginError(Exception):
    """The login at the provider failed; the text is a sentence."""


class Login(NamedTuple):
    """A user according to the provider, and the page that the user requested."""

    user: str
    groups: list[str]
    to: str | None


class Provider:
    """The provider in the settings. Its metadata are read at the first login."""

    def __init__(self, settings: OidcSettings, key: bytes) -> None:
        # imported only if it is set: the package is an extra
        from authlib.integrations.starlette_client import OAuth  # noqa: PLC0415

        self._settings = settings
        self._redirect_url = settings.url.rstrip("/") + PATH
        issuer = settings.issuer.rstrip("/")
        secret = settings.client_secret
        self._app: Any = OAuth().register(
            "oidc",
            client_id=settings.client_id,
            client_secret=secret.get_secret_value() if secret else None,
            server_metadata_url=f"{issuer}/.well-known/openid-configuration",
            client_kwargs={
                "scope": settings.scope,
                "code_challenge_method": "S256",
                "timeout": TIMEOUT,
                **({} if secret else {"token_endpoint_auth_method": "none"}),
            },
        )
        self._serializer = URLSafeTimedSerializer(key, salt="oidc")

    @property
    def credential(self) -> str:
        """Return what sessions depend on."""
        return f"{self._settings.issuer} {self._settings.client_id}"

    async def begin(self, request: Request, to: str, *, is_https: bool) -> Response:
        """Redirect the browser to the provider. Raises LoginError."""
        kept: dict[str, Any] = {"to": to}
        request.scope["session"] = kept  # where Authlib stores state, nonce and PKCE verifier
        with _as_login_errors():
            await self._check_metadata()
            answer: Response = await self._app.authorize_redirect(request, self._redirect_url)
        answer.set_cookie(
            COOKIE,
            self._serializer.dumps(kept),
            max_age=MAX_LOGIN_SECONDS,
            path=PATH,
            secure=is_https,
            httponly=True,
            samesite="lax",
        )
        return answer

    async def finish(self, request: Request) -> Login:
        """Return the user whose browser the provider has redirected back. Raises LoginError."""
        try:
            kept = self._serializer.loads(cookie_of(request, COOKIE), MAX_LOGIN_SECONDS)
        except BadSignature:
            raise LoginError("it was started in another browser, or too long ago") from None
        request.scope["session"] = kept
        with _as_login_errors():
            await self._check_metadata()
            options = {
                "iss": {"essential": True, "value": self._app.server_metadata["issuer"]},
                "aud": {"essential": True, "value": self._settings.client_id},
            }
            token = await self._app.authorize_access_token(request, claims_options=options)
            if "userinfo" not in token:
                raise LoginError("the provider has sent no ID token: scope must contain openid")
            claims: dict[str, Any] = token["userinfo"]
        user, groups = (
            claims.get(name) for name in (self._settings.user_claim, self._settings.groups_claim)
        )
        if not isinstance(user, str) or not user.strip():
            raise LoginError(
                f"the provider's ID token has no claim {self._settings.user_claim!r}: see "
                "console.oidc.user_claim and scope"
            )
        named = groups if isinstance(groups, list) else [groups]
        names = [name for name in named if isinstance(name, str)]
        return Login(" ".join(printable(user).split()), names, kept.get("to"))

    async def _check_metadata(self) -> None:
        metadata = await self._app.load_server_metadata()
        issuer = str(metadata.get("issuer"))
        if issuer.rstrip("/") != self._settings.issuer.rstrip("/"):
            raise LoginError(f"the provider calls itself {issuer!r}: see console.oidc.issuer")
        key = "id_token_signing_alg_values_supported"  # Authlib accepts these
        signed = [alg for alg in metadata.get(key) or () if alg.startswith(ASYMMETRIC)]
        metadata[key] = signed or ["RS256"]


@contextmanager
def _as_login_errors() -> Iterator[None]:
    """Raise LoginError for an answer that does not come or cannot be used."""
    import httpx2  # noqa: PLC0415 - as above
    from authlib.common.errors import AuthlibBaseError  # noqa: PLC0415
    from joserfc.errors import JoseError  # noqa: PLC0415

    try:
        yield
    except httpx2.HTTPStatusError as error:
        raise LoginError(
            f"the provider answered {error.request.url.copy_with(query=None)} with status "
            f"{error.response.status_code}"
        ) from error
    except httpx2.HTTPError as error:
        reason = str(error) or type(error).__name__
        raise LoginError(f"the provider cannot be reached: {reason}") from error
    except (AuthlibBaseError, JoseError) as error:
        raise LoginError(printable(str(error))) from error
    except (ValueError, KeyError, TypeError, RuntimeError) as error:  # of an unexpected answer
        raise LoginError(f"the provider's answer cannot be used: {error}") from error
