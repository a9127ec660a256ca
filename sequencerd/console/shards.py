"""The console of several shards: pages for all of them together, and those of each below
/shards/NAME.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Mount
from starlette.types import ASGIApp, Receive, Scope, Send
from structlog.typing import FilteringBoundLogger

from sequencerd.console import mail, simulating
from sequencerd.console.actions import BulkChanges
from sequencerd.console.all_shards import in_all
from sequencerd.console.app import (
    ServedShard,
    WithHeaders,
    error_page,
    guarded_routes,
    in_its_shard,
    make_console,
    routes_of_pages,
)
from sequencerd.console.auth import Auth
from sequencerd.console.context import (
    PageContext,
    context_of,
    query_of,
    unmasked,
)
from sequencerd.console.live import LiveTopics
from sequencerd.console.query import NotFoundError
from sequencerd.console.sessions import SessionsOfShards
from sequencerd.console.summary_of_shards import SummaryOfShards
from sequencerd.console.tables import at_shard, place
from sequencerd.definitions.simulator import Simulator


def make_console_of_shards(served: Sequence[ServedShard], log: FilteringBoundLogger) -> Starlette:
    """Return the application for several shards."""
    consoles = {str(one.shard.name): make_console(one, log) for one in served}

    def simulator() -> Simulator:
        """Return all definitions: if one differs between shards, that of the first."""
        found = [one.simulator() for one in reversed(served)]
        definitions = {name: each for one in found for name, each in one.definitions.items()}
        return Simulator(definitions, found[-1].runners)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            for console in consoles.values():
                await stack.enter_async_context(console.router.lifespan_context(console))
            contexts: dict[str, PageContext] = {
                name: console.state.console for name, console in consoles.items()
            }
            first = next(iter(contexts.values()))
            sessions = SessionsOfShards([one.auth.sessions for one in contexts.values()])
            auth = Auth(first.settings, sessions)
            for name, console in consoles.items():
                contexts[name] = replace(contexts[name], auth=auth, shards=tuple(consoles))
                console.state.console = contexts[name]
                console.state.unmasked = unmasked(contexts[name])
            summary = SummaryOfShards({name: one.summary for name, one in contexts.items()})
            live = LiveTopics(first.pool, summary)
            actions = BulkChanges(log)
            stack.push_async_callback(actions.close)
            app.state.console = replace(
                first,
                settings=first.settings.model_copy(
                    update={"write": any(one.settings.write for one in contexts.values())}
                ),
                auth=auth,
                summary=summary,
                live=live,
                actions=actions,
                simulator=simulator,
                parts=contexts,
            )
            app.state.unmasked = replace(
                unmasked(app.state.console),
                parts={name: console.state.unmasked for name, console in consoles.items()},
            )

            def close() -> None:
                live.close()
                for console in consoles.values():
                    console.state.close()

            app.state.close = close
            keeping = asyncio.create_task(live.keep())
            try:
                yield
            finally:
                keeping.cancel()
                await asyncio.gather(keeping, return_exceptions=True)

    get, _ = guarded_routes(log)
    return Starlette(
        routes=[
            *routes_of_pages(log),
            get("/enrollments/{shard}/{id:int}", enrollment),
            get("/simulate", in_its_shard(simulating.simulate, "enrollment")),
            get("/message", in_its_shard(message, "enrollment")),
            get("/data", in_its_shard(no_such_page, "id"), "operator"),
            *(
                Mount(f"/shards/{name}", _ShardLinks(console, name))
                for name, console in consoles.items()
            ),
        ],
        middleware=[Middleware(WithHeaders)],
        exception_handlers={HTTPException: error_page},
        lifespan=lifespan,
    )


class _ShardLinks:
    """Makes all links in a shard's pages lead to pages of that shard."""

    def __init__(self, app: ASGIApp, name: str) -> None:
        self._app = app
        self._place = f"/shards/{name}"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        token = place.set(self._place)
        try:
            await self._app(scope, receive, send)
        finally:
            place.reset(token)


async def enrollment(request: Request) -> Response:
    """Redirect to the enrollment with an id such as b/17."""
    name, number = request.path_params["shard"], request.path_params["id"]
    if name not in context_of(request).parts:
        raise NotFoundError(f"There is no shard {name}.")
    return RedirectResponse(at_shard(name, f"/enrollments/{number}"))


async def message(request: Request) -> Response:
    """Redirect to the message of a step in a shard that has an enrollment for it."""
    context, query = context_of(request), query_of(request)
    found = await in_all(context, lambda part: mail.example(part, query))
    name, id_ = next(((name, id_) for name, id_ in found.items() if id_), (next(iter(found)), None))
    return RedirectResponse(at_shard(name, "/message", **{"enrollment": id_, **query.given}))


async def no_such_page(_: Request) -> Response:
    """Refuse what is an enrollment's, which is in one shard."""
    raise NotFoundError("Give the id with its shard, such as b/17.")
