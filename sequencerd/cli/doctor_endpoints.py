"""Find problems of the servers that a daemon calls: runners, lookups, and servers for messages."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from importlib.metadata import entry_points

from sequencerd.core.step_types.effects import EMAIL, SMS
from sequencerd.core.task import Failed
from sequencerd.engine import lookups
from sequencerd.runners.aws_lambda import LambdaFunction
from sequencerd.runners.email.runner import EmailRunner
from sequencerd.runners.http_client import HttpClient, Unreachable
from sequencerd.runners.http_reply import HttpReply
from sequencerd.service.diagnosis import Diagnosis
from sequencerd.settings import HttpRunnerSettings, LookupSettings, OidcSettings, Settings

ENDPOINT_TIMEOUT = 10.0  # seconds for an endpoint


async def examine_endpoints(
    settings: Settings, types: set[str], used: Mapping[str, bool]
) -> AsyncIterator[Diagnosis]:
    """Check the servers that the settings and the definitions name, in order."""
    if EMAIL.name in types or settings.email.url:
        yield await _mail(settings)
    if settings.sms.provider == "http" and settings.sms.url:
        yield await _endpoint(SMS.name, settings.sms.url, settings.sms.allow_private)
    elif settings.sms.account_sid and settings.sms.auth_token:
        yield await _twilio(settings)
    for name, runner in settings.runners.items():
        yield await _called(f"runner {name}", runner)
    for name, lookup in settings.lookups.items():
        yield await _called(f"lookup {name}", lookup)
    if settings.console is not None and settings.console.oidc is not None:
        yield await _provider(settings.console.oidc)
    installed = {point.name for point in entry_points(group=lookups.GROUP)}
    for name, is_function in used.items():
        if name not in settings.lookups and name not in installed:
            about = f"lookup {name}"
            if is_function:
                yield Diagnosis(about, "is an SQL function")
            else:
                advice = f"create the function {name}(text[]), or configure [lookups.{name}]"
                yield Diagnosis(about, "no such function or endpoint", "error", advice)


async def _mail(settings: Settings) -> Diagnosis:
    try:
        runner = EmailRunner(settings.email.model_copy(update={"timeout": ENDPOINT_TIMEOUT}))
    except ValueError as error:
        return Diagnosis("mail server", str(error), "error", "correct [email]")
    try:
        result = await runner.check()
    finally:
        await runner.close()
    if isinstance(result, Failed):
        advice = "start it, or correct email.url"
        if result.cause != "unreachable":
            advice = "correct [email], or see the log of the server"
        return Diagnosis("mail server", result.message, "error", advice)
    seen = getattr(result, "message", None) or "ready"
    if settings.email.only_to is not None:
        seen += f"; messages go to {', '.join(settings.email.only_to) or 'no recipient'} only"
    return Diagnosis("mail server", seen)


async def _provider(settings: OidcSettings) -> Diagnosis:
    """Read the metadata of the OpenID Connect provider of the console."""
    about, advice = "OIDC provider", "correct console.oidc.issuer"
    issuer = settings.issuer.rstrip("/")
    try:
        reply = await _get(f"{issuer}/.well-known/openid-configuration")
    except Unreachable as error:
        return Diagnosis(about, str(error), "error", f"{_first(error)}, or {advice}")
    try:
        found = json.loads(reply.body)["issuer"]
    except (ValueError, KeyError, TypeError):
        seen = f"answers with {reply.status} instead of its metadata"
        return Diagnosis(about, seen, "error", advice)
    if str(found).rstrip("/") != issuer:
        return Diagnosis(about, f"calls itself {found!r}", "error", advice)
    return Diagnosis(about, "ready")


async def _called(about: str, settings: HttpRunnerSettings | LookupSettings) -> Diagnosis:
    if settings.url is not None:
        return await _endpoint(about, settings.url, settings.allow_private)
    return await _function(about, settings.arn or "", settings.allow_private)


async def _function(about: str, arn: str, allow_private: bool) -> Diagnosis:
    """Ask Lambda whether it would invoke a function, without invoking it."""
    advice = "correct lambda, or grant lambda:InvokeFunction to the daemon's credentials"
    try:
        function = LambdaFunction(
            arn, timeout=ENDPOINT_TIMEOUT, connections=1, allow_private=allow_private
        )
    except ValueError as error:
        return Diagnosis(about, str(error), "error", "correct the settings")
    try:
        reply = await function.check()
    except Unreachable as error:
        return Diagnosis(about, str(error), "error", advice)
    finally:
        await function.close()
    if reply.status != 204:
        seen = f"Lambda answers a dry run with {reply.status} {reply.excerpt()}"
        return Diagnosis(about, seen.rstrip(), "error", advice)
    return Diagnosis(about, "can be invoked")


async def _endpoint(about: str, url: str, allow_private: bool) -> Diagnosis:
    """Send a GET, which is safe by RFC 9110: any response shows that the server is up."""
    try:
        reply = await _get(url, allow_private=allow_private)
    except Unreachable as error:
        return Diagnosis(about, str(error), "error", f"{_first(error)}, or correct its url")
    return Diagnosis(about, f"reachable; responds to GET with {reply.status}")


async def _get(
    url: str, *, allow_private: bool = True, auth: tuple[str, str] | None = None
) -> HttpReply:
    """Send a GET. Raises Unreachable."""
    web = HttpClient(timeout=ENDPOINT_TIMEOUT, connections=1, allow_private=allow_private)
    try:
        return await web.call("GET", url, headers={}, auth=auth)
    finally:
        await web.close()


def _first(error: Unreachable) -> str:
    """Return what to do first about a server without a usable answer."""
    match error.cause:
        case "unreachable":
            return "start it"
        case "refused":
            return "correct its certificate or the settings"
    return "see its log"


async def _twilio(settings: Settings) -> Diagnosis:
    sms = settings.sms
    account, token = sms.account_sid or "", sms.auth_token
    url = f"{sms.base_url.rstrip('/')}/2010-04-01/Accounts/{account}.json"
    try:
        reply = await _get(url, auth=(account, token.get_secret_value() if token else ""))
    except Unreachable as error:
        return Diagnosis("Twilio", str(error), "error", "see status.twilio.com, or sms.base_url")
    if reply.status != 200:
        advice = "correct sms.account_sid and sms.auth_token"
        return Diagnosis("Twilio", f"rejects the login with {reply.status}", "error", advice)
    return Diagnosis("Twilio", "accepts the login")
