"""The HTTP listener: health checks, metrics, and the console if there is one.

It has a thread and an event loop of its own: so it can tell that the daemon's loop is blocked, and
who asks it delays no enrollment.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import uvicorn
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.routing import BaseRoute, Mount, Route

from sequencerd.errors import SettingsError
from sequencerd.names import new_loop
from sequencerd.settings import split_address

Check = Callable[[], list[str]]
"""What is wrong, in sentences."""


def make_app(
    alive: Check, ready: Check, registry: CollectorRegistry, console: Starlette | None = None
) -> Starlette:
    """/healthz and /readyz, each 200 or 503 with its reasons, /metrics, and /console."""

    async def metrics(request: Request) -> Response:
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        return Response(encode(registry), headers={"Content-Type": content_type})

    routes: list[BaseRoute] = [
        Route("/healthz", _answer(alive)),
        Route("/readyz", _answer(ready)),
        Route("/metrics", metrics),
    ]
    if console is None:
        return Starlette(routes=routes)
    mounted = console
    routes += [
        Route("/", RedirectResponse("/console/")),
        Mount("/console", mounted),
    ]

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with mounted.router.lifespan_context(mounted):
            app.state.close = mounted.state.close
            yield

    return Starlette(routes=routes, lifespan=lifespan)


def _answer(check: Check) -> Callable[[Request], Response]:
    def answer(_: Request) -> Response:
        reasons = check()
        body = {"status": "unavailable" if reasons else "ok", "reasons": reasons}
        return JSONResponse(body, 503 if reasons else 200, headers={"Cache-Control": "no-store"})

    return answer


class _Server(uvicorn.Server):
    """Waits for the requests that are under way, and none that would go on for ever."""

    def __init__(self, app: Starlette) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                log_config=None,
                access_log=False,
                proxy_headers=False,  # whom to believe is for the console's settings to say
                server_header=False,
                timeout_graceful_shutdown=1,
            )
        )
        self._app = app

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        getattr(self._app.state, "close", lambda: None)()
        await super().shutdown(sockets)


@asynccontextmanager
async def serving(app: Starlette, listen: str | None) -> AsyncIterator[None]:
    """Serves meanwhile, if there is an address. Raises SettingsError if it can't be had."""
    if listen is None:
        yield
        return
    host, port = split_address(listen)
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.create_server(address[:2], family=family)
    except OSError as error:
        raise SettingsError(f"http.listen: can't listen on {listen}: {error.strerror}") from error
    server = _Server(app)

    def serve() -> None:
        with asyncio.Runner(loop_factory=new_loop) as runner:
            runner.run(server.serve([listener]))

    # in a thread that is not the main one, uvicorn leaves the signals alone
    serving = asyncio.create_task(asyncio.to_thread(serve))
    try:
        yield
    finally:
        server.should_exit = True
        await serving
        listener.close()
