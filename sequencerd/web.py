"""The HTTP listener: health checks and metrics.

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
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from sequencerd.errors import SettingsError
from sequencerd.settings import split_address

Check = Callable[[], list[str]]
"""What is wrong, in sentences."""


def make_app(alive: Check, ready: Check, registry: CollectorRegistry) -> Starlette:
    """/healthz and /readyz, each 200 or 503 with its reasons, and /metrics."""

    async def metrics(request: Request) -> Response:
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        return Response(encode(registry), headers={"Content-Type": content_type})

    return Starlette(
        routes=[
            Route("/healthz", _answer(alive)),
            Route("/readyz", _answer(ready)),
            Route("/metrics", metrics),
        ]
    )


def _answer(check: Check) -> Callable[[Request], Response]:
    def answer(_: Request) -> Response:
        reasons = check()
        body = {"status": "unavailable" if reasons else "ok", "reasons": reasons}
        return JSONResponse(body, 503 if reasons else 200, headers={"Cache-Control": "no-store"})

    return answer


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
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            lifespan="off",
            server_header=False,
            timeout_graceful_shutdown=1,
        )
    )
    # in a thread that is not the main one, uvicorn leaves the signals alone
    serving = asyncio.create_task(asyncio.to_thread(server.run, [listener]))
    try:
        yield
    finally:
        server.should_exit = True
        await serving
        listener.close()
