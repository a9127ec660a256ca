"""The console's application: its routes, and the parts that apply to every request."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, MutableMapping
from contextlib import asynccontextmanager, suppress
from datetime import datetime
from typing import Any, NamedTuple, Protocol

import asyncpg
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.routing import Route
from structlog.typing import FilteringBoundLogger

from sequencerd.console import (
    access,
    changing,
    data_form,
    editing,
    enrollment_form,
    funnel,
    html,
    mail,
    over_time,
    pages,
    sent_forms,
    simulating,
    step_form,
    stored_sequence,
    suppressing,
)
from sequencerd.console.actions import BulkChanges
from sequencerd.console.auth import Auth, Visitor
from sequencerd.console.context import (
    CONTENT_SECURITY_POLICY,
    PageContext,
    context_of,
    lost,
    message_page,
    missing,
    render,
    to_its_shard,
    unmasked,
)
from sequencerd.console.live import LiveTopics
from sequencerd.console.query import NotFoundError, WrongQueryError, as_sentence
from sequencerd.console.sessions import Sessions
from sequencerd.console.summary import Summary
from sequencerd.console.tables import at
from sequencerd.definitions.simulator import Simulator
from sequencerd.errors import DatabaseError, ShardsError, UsageError
from sequencerd.runners import Runner
from sequencerd.settings import ConsoleSettings, Role
from sequencerd.storage.connections import Shard, close_pool, open_pool, read_all_times
from sequencerd.storage.database_errors import TRANSIENT_ERRORS, brief

MAX_CONNECTIONS = 4  # of the pages to the database
TIMEOUT = 10.0  # seconds that a page waits for the database
CLOSE_TIMEOUT = 1.0  # seconds that the end waits for it
SWITCH_INTERVAL = 0.0002  # seconds until Python switches threads

HEADERS = {
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


class ServedShard(NamedTuple):
    """A shard, and what its console calls in the thread beside the engine's: `simulator` returns
    the present sequences and runners, `runners` makes other runners, for this thread, and `redact`
    removes secrets from what servers say.
    """

    shard: Shard
    settings: ConsoleSettings
    simulator: Callable[[], Simulator]
    now: Callable[[], datetime]
    runners: Callable[[], Mapping[str, Runner]]
    redact: Callable[[str], str]


def make_console(served: ServedShard, log: FilteringBoundLogger) -> Starlette:
    """Return the application for one shard. `app.state.close` ends what would keep connections
    open.
    """

    # the engine waits this long for its turn while a page is made; Python's default, 5 ms, is too
    # long
    sys.setswitchinterval(SWITCH_INTERVAL)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        # no connection before the first request
        async with open_pool(
            served.shard,
            name="sequencerd console",
            timeout=TIMEOUT,
            min_size=0,
            max_size=MAX_CONNECTIONS,
            command_timeout=TIMEOUT,
            statement_cache_size=0,  # plans depend on the arguments; may be a pooler
            init=read_all_times,
        ) as pool:
            summary = Summary(pool, log)
            live = LiveTopics(pool, summary)
            actions = BulkChanges(log)
            app.state.console = PageContext(
                served.settings,
                served.shard,
                pool,
                Auth(served.settings, Sessions(pool)),
                html.make_templates(),
                summary,
                live,
                served.simulator,
                served.runners,
                served.redact,
                served.now,
                actions,
            )
            app.state.unmasked = unmasked(app.state.console)
            app.state.close = live.close
            tasks = [asyncio.create_task(work) for work in (summary.keep(), live.keep())]
            try:
                yield
            finally:
                for task in tasks:
                    task.cancel()
                await actions.close()
                await asyncio.gather(*tasks, return_exceptions=True)
                await close_pool(pool, CLOSE_TIMEOUT)

    get, post = guarded_routes(log)
    return Starlette(
        routes=[
            *routes_of_pages(log),
            get("/enrollments/{id:int}", pages.enrollment),
            get("/simulate", in_its_shard(simulating.simulate, "enrollment")),
            get("/message", in_its_shard(mail.mail, "enrollment")),
            get("/message/frame", mail.frame),
            post("/message/test", mail.send_test, "operator"),
            get("/data", in_its_shard(data_form.edit, "id"), "operator"),
            post("/data", data_form.change, "operator"),
            get("/revision", stored_sequence.compare),
        ],
        middleware=[Middleware(WithHeaders)],
        exception_handlers={HTTPException: error_page},
        lifespan=lifespan,
    )


def in_its_shard(page: pages.Page, key: str) -> pages.Page:
    """Return a page that leads to that of a shard if its parameter `key` is an id such as b/17."""

    async def of_any(request: Request) -> Response:
        return to_its_shard(request, key) or await page(request)

    return of_any


class ToRoute(Protocol):
    """Returns the route of a page for users with a role; None stands for all users."""

    def __call__(self, path: str, page: pages.Page, role: Role | None = "viewer") -> Route: ...


def guarded_routes(log: FilteringBoundLogger) -> tuple[ToRoute, ToRoute]:
    """Return the functions that make routes for GET and for POST."""

    def of(method: str) -> ToRoute:
        def route(path: str, page: pages.Page, role: Role | None = "viewer") -> Route:
            return Route(path, guarded(page, role, log), methods=[method])

        return route

    return of("GET"), of("POST")


def routes_of_pages(log: FilteringBoundLogger) -> list[Route]:
    """Return the routes of every console: for one database, or for several shards together; at the
    end, those for logins, sessions, and static files.
    """
    get, post = guarded_routes(log)
    return [
        get("/", pages.overview),
        get("/sequence", pages.sequence),
        get("/failures", pages.failures),
        get("/health", pages.health),
        get("/search", pages.search),
        get("/over-time", over_time.over_time),
        get("/simulate/frame", simulating.frame),
        get("/tables/{name}.{form}", pages.table),
        get("/live", pages.stream),
        get("/funnel", funnel.funnel),
        get("/change", changing.question, "operator"),
        post("/change", changing.change, "operator"),
        get("/changes/{number:int}", changing.follow),
        get("/enroll", enrollment_form.ask, "operator"),
        post("/enroll", enrollment_form.enroll, "operator"),
        get("/suppressions", suppressing.page),
        get("/suppress", suppressing.ask, "operator"),
        post("/suppress", suppressing.suppress, "operator"),
        get("/suppression", suppressing.entry, "operator"),
        post("/suppression", suppressing.remove, "operator"),
        get("/edit", editing.edit, "editor"),
        post("/edit", editing.change, "editor"),
        get("/step", step_form.ask, "editor"),
        post("/step", step_form.change, "editor"),
        post("/step/edited", step_form.of_edited, "editor"),
        get("/edit/schema", editing.schema, "editor"),
        post("/edit/check", editing.check, "editor"),
        get("/status", editing.ask_status, "editor"),
        post("/status", editing.set_status, "editor"),
        get("/sessions", access.sessions),
        post("/sessions", access.end_session, "viewer"),
        get("/login", access.login, None),
        post("/login", access.log_in, None),
        post("/logout", access.log_out, None),
        get("/oidc", access.from_provider, None),
        post("/oidc", access.to_provider, None),
        get("/static/{name:path}", pages.static, None),
    ]


class WithHeaders:
    """Begin each request without missing shards, and add headers to its response."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        missing.set({})
        lost.set({})
        # Back leads to what a form has shown, and the browser does not ask to send it again
        kept = "private, no-cache" if scope.get("method") == "POST" else "no-store"

        async def send_more(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                known = {name.lower() for name, _ in message["headers"]}
                for name, value in {**HEADERS, "Cache-Control": kept}.items():
                    if name.lower().encode() not in known:
                        message["headers"].append((name.lower().encode(), value.encode()))
            await send(message)

        await self._app(scope, receive, send_more)


def error_page(request: Request, error: Exception) -> Response:
    """Return the page for an HTTP error."""
    assert isinstance(error, HTTPException)
    texts: Mapping[int, str] = {
        404: "Page not found.",
        405: "This page does not support that method.",
    }
    answer = message_page(
        request,
        error.status_code,
        error.detail.capitalize(),
        texts.get(error.status_code, error.detail),
    )
    answer.headers.update(error.headers or {})
    return answer


ROUTES_OF_PROGRAMS = (pages.table, pages.stream)
"""Routes for programs: without a login they answer 401 instead of a form, and errors as plain text.
"""

KEPT = "What you entered is kept here."
SESSION_ENDED = f"Your session has ended, so nothing was changed. {KEPT}"
SESSION_ENDED_IN_FORM = (
    "Your session has ended, so nothing was changed. What you entered is too large to be kept here:"
    " log in in another tab, then go back to the form and send it again."
)
FORM_EXPIRED = (
    "The form belongs to another session, or the daemon was restarted, so nothing was changed."
    f" {KEPT} You are {{user}} now."
)
NOT_KNOWN = "It is not known whether the change was made: check before you repeat it."
MAX_ERROR_LENGTH = 300  # characters of an error, which may quote a parameter


def guarded(page: pages.Page, role: Role | None, log: FilteringBoundLogger) -> pages.Page:
    """Return the page for users with a role, or without one for all; errors become pages. What only
    an operator or an editor may use needs console.write as well.
    """

    async def answer(request: Request) -> Response:
        auth = context_of(request).auth
        if refusal := auth.refusal(request):
            return PlainTextResponse(f"{refusal}\n", 403)
        request.state.visitor = auth.unknown(request)
        request.state.form = None  # not read yet
        try:
            if (refused := await _refused(request, page, role)) is not None:
                return refused
            made = await _response(request, page)
        except Exception as error:
            is_kept = role is not None and await _has_own_form(request)
            made = _failed(request, page, error, log, is_kept=is_kept)
        return _with_session(request, made)

    return answer


async def _refused(request: Request, page: pages.Page, role: Role | None) -> Response | None:
    """Identify the user of a request, and read its form. Return the response if this user may not
    use the page.
    """
    context = context_of(request)
    auth, visitor = context.auth, request.state.visitor
    if page is not pages.static:
        request.state.visitor = visitor = await auth.visitor(request)
    if visitor.user is None and role is not None:
        if page in ROUTES_OF_PROGRAMS:
            return PlainTextResponse("Log in first.\n", 401)
        if _is_own_form(request):
            try:
                await pages.read_form(request, pages.MAX_FORM)
            except WrongQueryError:
                login = "/login", "Log in"
                return message_page(request, 413, "Not done", SESSION_ENDED_IN_FORM, link=login)
            # not 401, to which Back does not lead: browsers do not keep it
            kept = _unsent(
                request, 403, "Not done yet", SESSION_ENDED, token=visitor.token, log_in=True
            )
            return _with_session(request, kept)
        to = str(request.url.replace(scheme="", netloc=""))
        return _with_session(request, RedirectResponse(at("/login", to=to), 303))
    if request.method == "POST":
        most = pages.MAX_FORM if role is None else pages.MAX_FORM_OF_USERS
        await pages.read_form(request, most)
        if not auth.is_ours(request, visitor, request.state.form.get("token", "")):
            if not _is_own_form(request):
                text = "This form has expired or comes from another site. Reload the page."
                return message_page(request, 403, "Not done", text)
            if page is access.log_out:
                return None  # of the present session, or of none
            if role is None:
                return _with_session(request, access.ask_again(request))
            text = FORM_EXPIRED.format(user=visitor.user)
            kept = _unsent(request, 403, "Not done yet", text, token=visitor.token)
            return _with_session(request, kept)
    if role in ("operator", "editor") and not context.settings.write:
        text = "Changes are disabled. Set console.write = true to allow them."
        return message_page(request, 403, "Read only", text)
    if role is not None and not visitor.may(role):
        return message_page(request, 403, "Not allowed", _missing_role(visitor, role))
    return None


def _is_own_form(request: Request) -> bool:
    """Return whether the browser says that it sends a form of one of the console's pages: no other
    site can make it say so.
    """
    return (
        request.method == "POST"
        and request.headers.get("sec-fetch-site") == "same-origin"
        and request.headers.get("sec-fetch-dest") == "document"
    )


async def _has_own_form(request: Request) -> bool:
    """Return whether a request has a form of one of the console's pages, which is read if the error
    came before.
    """
    if not _is_own_form(request):
        return False
    if request.state.form is None:
        with suppress(WrongQueryError):
            await pages.read_form(request, pages.MAX_FORM)
    return bool(request.state.form)


def _unsent(
    request: Request, status: int, title: str, text: str, *, token: str, log_in: bool = False
) -> Response:
    """Return a page with what was entered in a form, to be sent again."""
    given = {**request.state.form, "token": token}
    return render(
        request, "unsent.html", status, title=title, text=text, given=given, log_in=log_in
    )


async def _response(request: Request, page: pages.Page) -> Response:
    if (form := request.state.form) and sent_forms.FIELD in form:
        sent = context_of(request).sent_forms
        return await sent.process(request.state.visitor.nonce, form, page(request))
    return await page(request)


def _failed(
    request: Request,
    page: pages.Page,
    error: Exception,
    log: FilteringBoundLogger,
    *,
    is_kept: bool,
) -> Response:
    """Return the response to a request that has raised an error. If `is_kept`, what was entered in
    the request's form can be sent again, unless it is wrong itself.
    """

    def refused(status: int, title: str, text: str, *, retry: bool = False) -> Response:
        text = text if len(text) <= MAX_ERROR_LENGTH else f"{text[:MAX_ERROR_LENGTH]}…"
        if page in ROUTES_OF_PROGRAMS:
            return PlainTextResponse(f"{text}\n", status)
        if is_kept and status >= 500:
            token = request.state.form.get("token", "")
            return _unsent(request, status, title, f"{text} {KEPT}", token=token)
        return message_page(request, status, title, text, retry=retry)

    match error:
        case ClientDisconnect():
            return Response(status_code=400)  # which nobody reads
        case NotFoundError():
            return refused(404, "Not found", str(error))
        case WrongQueryError() | UsageError():
            text = str(context_of(request).mask({"message": str(error)})["message"])
            return refused(422, "Not possible", as_sentence(text))
        case DatabaseError() | ShardsError():
            return refused(503, "Not done", as_sentence(str(error)))
        case pages.NotYetError():
            text = "The first count is not finished.\n"
            return PlainTextResponse(text, 503, {"Retry-After": "1"})
        case asyncpg.ReadOnlySQLTransactionError():
            return refused(503, "Not done", as_sentence(f"{brief(error)}; nothing was changed"))
    if not isinstance(error, TRANSIENT_ERRORS):  # its text may contain data of enrollments
        log.error("a console page failed", path=request.url.path, error=_where(error))
        return refused(500, "Internal error", "The daemon's log has the details.")
    if isinstance(error, ValueError):  # of the driver: nothing was sent
        return refused(422, "Not possible", "A value is out of range.")
    log.warning("the console cannot reach the database", error=brief(error))
    is_slow = isinstance(error, TimeoutError | asyncpg.QueryCanceledError)
    title = "The database does not answer in time" if is_slow else "The database cannot be reached"
    if request.method == "POST":
        made = refused(503, title, NOT_KNOWN)
    elif page in ROUTES_OF_PROGRAMS:
        made = refused(503, title, f"{title}.")
    else:
        made = refused(503, title, "This page retries automatically.", retry=True)
    made.headers["Retry-After"] = "5"
    return made


def _missing_role(visitor: Visitor, role: Role) -> str:
    if visitor.role is None:
        return access.no_role(visitor.user or "")
    return f"This needs the role {role}; {visitor.user} has the role {visitor.role}."


def _with_session(request: Request, response: Response) -> Response:
    if not request.url.path.startswith(at("/static/")):
        context_of(request).auth.keep(request, response, request.state.visitor)
    return response


def _where(error: BaseException) -> str:
    """Return the type of an error and where it was raised, without its text."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    place = f" in {trace.tb_frame.f_code.co_qualname}:{trace.tb_lineno}" if trace else ""
    return f"{brief(error)}{place}"
