"""The pages for logins and sessions."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from sequencerd.console.auth import Auth, TooManyError, Visitor
from sequencerd.console.context import context_of, local, message_page, query_of, render
from sequencerd.console.oidc import LoginError, Provider
from sequencerd.console.query import NotFoundError, Query
from sequencerd.console.sessions import hash_of
from sequencerd.console.tables import at


async def login(request: Request) -> Response:
    """Ask for the password, or redirect to the provider."""
    context = context_of(request)
    to = query_of(request).get("to")
    if not context.auth.has_sessions or request.state.visitor.user:
        return RedirectResponse(local(to), 303)
    return _ask(request, 200, to, "", None)


def ask_again(request: Request) -> Response:
    """Ask for another login, or continue if there was one, after a form of these pages that belongs
    to another session.
    """
    query = Query(request.state.form)
    if not context_of(request).auth.has_sessions or request.state.visitor.user:
        return RedirectResponse(local(query.get("to")), 303)
    wrong = "This page was too old. Log in again."
    return _ask(request, 403, query.get("to"), query.get("name") or "", wrong)


def _ask(request: Request, status: int, to: str | None, name: str, wrong: str | None) -> Response:
    context = context_of(request)
    return render(
        request,
        "login.html",
        status,
        title="Log in",
        to=local(to),
        name=name,
        wrong=wrong,
        has_passwords=context.auth.has_passwords,
        has_provider=context.auth.provider is not None,
        has_users=bool(context.settings.users),
    )


async def log_in(request: Request) -> Response:
    """Check the password."""
    auth = context_of(request).auth
    query = Query(request.state.form)
    name, to = " ".join((query.get("name") or "").split())[:100], query.get("to")
    if not auth.has_passwords:
        return RedirectResponse(at("/"), 303)
    if not name:
        return _ask(request, 422, to, name, "Write your name.")
    try:
        visitor = await auth.log_in(request, name, request.state.form.get("password", ""))
    except TooManyError as error:
        answer = _ask(request, 429, to, name, f"{str(error)[0].upper()}{str(error)[1:]}.")
        answer.headers["Retry-After"] = str(error.seconds)
        return answer
    if visitor is None:
        users = context_of(request).settings.users
        wrong = "The name or the password is wrong." if users else "The password is wrong."
        return _ask(request, 403, to, name, wrong)
    request.state.visitor = visitor
    return RedirectResponse(local(to), 303)


async def log_out(request: Request) -> Response:
    """End the session for all copies of its cookie."""
    auth = context_of(request).auth
    await auth.log_out(request.state.visitor)
    request.state.visitor = auth.anonymous()
    return RedirectResponse(at("/login"), 303)


async def to_provider(request: Request) -> Response:
    """Redirect to the provider's login."""
    auth = context_of(request).auth
    to = local(Query(request.state.form).get("to"))
    try:
        return await _provider(auth).begin(request, to, is_https=auth.is_https(request))
    except LoginError as error:
        return _failed(request, error)


async def from_provider(request: Request) -> Response:
    """Log in the user that the provider names."""
    auth = context_of(request).auth
    try:
        login = await _provider(auth).finish(request)
    except LoginError as error:
        return _failed(request, error)
    if auth.role_of_groups(login.groups) is None:
        return message_page(request, 403, "No access", no_role(login.user))
    request.state.visitor = await auth.log_in_by_provider(request, login)
    # an own page redirects further: after a redirect, SameSite treats the provider as the origin
    return RedirectResponse(local(login.to), 303)


def _provider(auth: Auth) -> Provider:
    if auth.provider is None:
        raise NotFoundError("No provider is set.")
    return auth.provider


def _failed(request: Request, error: LoginError) -> Response:
    reason = context_of(request).redact(str(error))  # before a login, and of a server's words
    return message_page(
        request, 403, "Not logged in", f"The login failed: {reason}.", link=("/login", "Log in")
    )


def no_role(user: str) -> str:
    """Explain why a user has no access."""
    return (
        f"{user} has no role in the console: none of the user's groups is in viewer_groups, "
        "operator_groups or editor_groups of its settings."
    )


async def sessions(request: Request) -> Response:
    """List the sessions of the user; for editors, those of all users."""
    auth, visitor = context_of(request).auth, request.state.visitor
    rows = await auth.sessions.all(_owner_of_sessions(visitor))
    return render(
        request,
        "sessions.html",
        title="Sessions",
        sessions=rows,
        present=hash_of(visitor.nonce),
        is_of_all=visitor.may("editor"),
    )


async def end_session(request: Request) -> Response:
    """End a session of the user or, for editors, any session."""
    auth, visitor = context_of(request).auth, request.state.visitor
    key = Query(request.state.form).must("session")
    if not await auth.sessions.end(key, _owner_of_sessions(visitor)):
        raise NotFoundError("This session has already ended.")
    return RedirectResponse(at("/sessions"), 303)


def _owner_of_sessions(visitor: Visitor) -> str | None:
    return None if visitor.may("editor") else visitor.user
