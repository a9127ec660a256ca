"""The HTTP listener: health checks, metrics, and the console if it is enabled.

It has a thread and an event loop of its own, so that it can report a blocked daemon, and requests
delay no enrollment.
"""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

import uvicorn
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, RedirectResponse, Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from sequencerd.errors import SettingsError
from sequencerd.service.dns import ResolvingLoop
from sequencerd.settings import split_address

HealthCheck = Callable[[], list[str]]
"""Returns the problems, as sentences."""


def make_app(
    alive: HealthCheck,
    ready: HealthCheck,
    registry: CollectorRegistry,
    console: Starlette | None = None,
    public: Sequence[BaseRoute] = (),
) -> Starlette:
    """Return an application with /healthz and /readyz, each 200 or 503 with its reasons, /metrics,
    /console, and the `public` pages if these have no listener of their own.
    """

    async def metrics(request: Request) -> Response:
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        return Response(encode(registry), headers={"Content-Type": content_type})

    routes: list[BaseRoute] = [
        Route("/healthz", _answer(alive)),
        Route("/readyz", _answer(ready)),
        Route("/metrics", metrics),
        *public,
    ]
    if console is None:
        return Starlette(routes=routes)
    routes += [Route("/", RedirectResponse("/console/")), Mount("/console", console)]

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with console.router.lifespan_context(console):
            app.state.close = console.state.close
            yield

    return Starlette(routes=routes, lifespan=lifespan)


def _answer(check: HealthCheck) -> Callable[[Request], Response]:
    def answer(_: Request) -> Response:
        reasons = check()
        body = {"status": "unavailable" if reasons else "ok", "reasons": reasons}
        return JSONResponse(body, 503 if reasons else 200, headers={"Cache-Control": "no-store"})

    return answer


MAX_CONNECTIONS = 100  # the daemon needs its descriptors for its own work
REQUEST_TIMEOUT = 10.0  # seconds in which a request must arrive, and an answer must be read


class _Connection(H11Protocol):
    """A connection, of which there is a limited number, with time limits for the client.

    uvicorn limits the time between requests, but not the time until the first one, while one
    arrives, or while its answer is read.
    """

    _turn: tuple[bool, float] | None = None
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Make room by closing the connection whose client has been slow for longest. If all wait
        for an answer, the oldest request ends: a stream of the console, which the browser reopens.
        """
        others = [one for one in self.connections if isinstance(one, _Connection)]
        super().connection_made(transport)
        self._check_time()
        if len(others) >= MAX_CONNECTIONS:
            min(others, key=_Connection.turn).drop()

    def turn(self) -> tuple[bool, float]:
        """Return whether the client waits for an answer, and since when this, or the opposite, has
        been seen.
        """
        cycle = self.cycle
        works = cycle is not None and not cycle.response_complete and not cycle.more_body
        is_ours = works and not self.flow.write_paused
        if self._turn is None or self._turn[0] != is_ours:
            self._turn = is_ours, self.loop.time()
        return self._turn

    def _check_time(self) -> None:
        """Check every second, because there is no event for each kind of slowness."""
        is_ours, since = self.turn()
        if not is_ours and self.loop.time() - since >= REQUEST_TIMEOUT:
            self.drop()
            return
        self._timer = self.loop.call_later(min(1.0, REQUEST_TIMEOUT), self._check_time)

    def drop(self) -> None:
        """Close the connection without an answer."""
        self.connections.discard(self)
        self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the timer."""
        if self._timer is not None:
            self._timer.cancel()
        super().connection_lost(exc)


def _refusing_ambiguous(app: ASGIApp) -> ASGIApp:
    """Refuse a request with two lengths, and close its connection: a proxy in front may take its
    body for shorter, and what follows for a request that it has checked.
    """

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        names = {name for name, _ in scope["headers"]}
        if {b"content-length", b"transfer-encoding"} <= names:
            text = "A request has either Content-Length or Transfer-Encoding.\n"
            refused = PlainTextResponse(text, 400, {"Connection": "close"})
            return await refused(scope, receive, send)
        return await app(scope, receive, send)

    return answer


class _HttpServer(uvicorn.Server):
    """Waits for requests in progress, but not for those that would never end."""

    def __init__(self, app: Starlette) -> None:
        super().__init__(
            uvicorn.Config(
                _refusing_ambiguous(app),
                http=_Connection,
                ws="none",
                lifespan="off",  # that of `serving`
                backlog=MAX_CONNECTIONS,  # accepted in one iteration of the loop
                log_config=None,
                access_log=False,
                proxy_headers=False,  # the console's settings say which proxies are trusted
                server_header=False,
                timeout_graceful_shutdown=1,
            )
        )
        self._app = app

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        getattr(self._app.state, "close", lambda: None)()
        await super().shutdown(sockets)


@asynccontextmanager
async def serving(
    app: Starlette,
    listen: str | None,
    taken: Callable[[str], None] | None = None,
    *,
    setting: str = "http.listen",
) -> AsyncIterator[None]:
    """Serve within the context, if there is an address. Raises SettingsError if it cannot be used,
    and the application's error if that cannot start.

    If another process uses the address, `taken` is called with it and nothing is served, so that a
    second daemon with the same settings works nevertheless.
    """
    if listen is None:
        yield
        return
    host, port = split_address(listen)
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.create_server(address[:2], family=family, backlog=MAX_CONNECTIONS)
    except OSError as error:
        if error.errno == errno.EADDRINUSE and taken is not None:
            taken(listen)
            yield
            return
        raise SettingsError(f"{setting}: cannot listen on {listen}: {error.strerror}") from error
    server = _HttpServer(app)
    loop = asyncio.get_running_loop()
    started = loop.create_future()

    async def serve() -> None:
        # uvicorn would end the process without the error of an application that cannot start
        async with app.router.lifespan_context(app):
            loop.call_soon_threadsafe(started.set_result, None)
            await server.serve([listener])

    def run() -> None:
        with asyncio.Runner(loop_factory=ResolvingLoop) as runner:
            runner.run(serve())

    # in a thread other than the main one, uvicorn installs no signal handlers
    serving = asyncio.create_task(asyncio.to_thread(run))
    try:
        await asyncio.wait((serving, started), return_when=asyncio.FIRST_COMPLETED)
        if not serving.done():
            yield
    finally:
        server.should_exit = True
        try:
            await serving
        finally:
            listener.close()
