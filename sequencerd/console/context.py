"""The context of the console's pages, and how a page is rendered."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, NamedTuple

import asyncpg
from jinja2 import Environment
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response

from sequencerd.console.actions import BulkChanges
from sequencerd.console.auth import Auth, Visitor
from sequencerd.console.live import LiveTopics
from sequencerd.console.mask import make_mask
from sequencerd.console.query import ROWS_PER_PAGE, NotFoundError, Query, WrongQueryError
from sequencerd.console.sent_forms import SentForms
from sequencerd.console.summary import Summary
from sequencerd.console.tables import at, at_shard
from sequencerd.console.views import EnrollmentHistory
from sequencerd.core import model
from sequencerd.definitions.simulator import Simulator
from sequencerd.runners import Runner
from sequencerd.settings import ConsoleSettings, Role
from sequencerd.storage.connections import Shard

CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self';"
    " connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
"""The Content-Security-Policy of pages."""

WITH_FRAMES = {"Content-Security-Policy": f"{CONTENT_SECURITY_POLICY}; frame-src 'self'"}
"""The header of a page that shows messages in frames."""

missing: ContextVar[dict[str, str]] = ContextVar("missing")
"""The shards that did not answer this request, with the reasons."""

lost: ContextVar[dict[str, Exception]] = ContextVar("lost")
"""Those whose connection was lost or timed out: the request waits for each of them once."""


class SentTest(NamedTuple):
    """A test message that was sent: its recipient, and a sentence about the result."""

    address: str
    report: str


@dataclass
class PageContext:
    """The objects that all pages use."""

    settings: ConsoleSettings
    shard: Shard
    pool: asyncpg.Pool
    auth: Auth
    templates: Environment
    summary: Summary
    live: LiveTopics
    simulator: Callable[[], Simulator]
    runners: Callable[[], Mapping[str, Runner]]
    redact: Callable[[str], str]
    now: Callable[[], datetime]
    actions: BulkChanges
    sent_forms: SentForms = field(default_factory=SentForms)
    sent_tests: dict[str, SentTest] = field(default_factory=dict)
    simulating: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(1))
    counting_history: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(1))
    simulated: dict[str, Any] = field(default_factory=dict)
    enrollments_read: dict[tuple[int, bool], tuple[str, EnrollmentHistory]] = field(
        default_factory=dict
    )
    shards: Sequence[str] = ()  # among which a reader chooses
    parts: Mapping[str, PageContext] = field(default_factory=dict)  # of all shards together

    def __post_init__(self) -> None:
        self.mask = make_mask(self.settings.mask)
        self.is_masked = bool(self.settings.mask)


def context_of(request: Request) -> PageContext:
    """Return the context of the pages for the request's user."""
    visitor: Visitor | None = getattr(request.state, "visitor", None)
    context: PageContext = request.app.state.console
    if visitor is None or visitor.role is None or visitor.role in context.settings.mask_for:
        return context
    unmasked: PageContext = request.app.state.unmasked
    return unmasked


def definition_of(context: PageContext, name: str, step: str | None) -> model.Sequence:
    """Return a sequence; if a step is named, one that has it. Raises NotFoundError."""
    definition = context.simulator().definitions.get(name)
    if definition is None:
        raise NotFoundError(f"There is no sequence {name}.")
    if step is not None and step not in definition.steps:
        raise NotFoundError(f"The sequence {name} has no step {step}.")
    return definition


def unmasked(context: PageContext) -> PageContext:
    """Return the same context without masks."""
    return replace(context, settings=context.settings.model_copy(update={"mask": ()}))


def render(request: Request, template: str, code: int = 200, /, **given: Any) -> Response:
    """Return a page."""
    context = context_of(request)
    visitor: Visitor | None = getattr(request.state, "visitor", None)
    address = str(request.url.replace(scheme="", netloc=""))
    text = context.templates.get_template(template).render(
        visitor=visitor,
        here=request.url.path.removeprefix(at("")),
        shards=context.shards or tuple(context.parts),
        shard=None if context.parts else context.shard.name,
        missing={**context.summary.missing, **missing.get()},
        address=address,
        may_write=_may(context, visitor, "operator"),
        may_edit=_may(context, visitor, "editor"),
        may_log_out=context.auth.has_sessions,
        done=context.actions.report(visitor.nonce, address) if visitor else None,
        once=secrets.token_urlsafe(12),
        **given,
    )
    return HTMLResponse(text, code)


def _may(context: PageContext, visitor: Visitor | None, role: Role) -> bool:
    return context.settings.write and visitor is not None and visitor.may(role)


def message_page(
    request: Request,
    status: int,
    title: str,
    text: str,
    *,
    retry: bool = False,
    link: tuple[str, str] = ("/", "Overview"),
) -> Response:
    """Return a page with a sentence, which reloads itself if `retry`; `link` is a path and its
    text.
    """
    return render(request, "message.html", status, title=title, text=text, retry=retry, link=link)


def to_its_shard(request: Request, key: str) -> Response | None:
    """Return what leads to the same page of a shard if the query parameter `key` is an id such as
    b/17. Raises WrongQueryError for one without a shard, on a page of all.
    """
    context, query = context_of(request), query_of(request)
    if (id_ := query.get(key)) is None:
        return None
    name, _, number = id_.rpartition("/")
    if name in context.parts or name in context.shards:
        path = request.url.path.removeprefix(at(""))
        return RedirectResponse(at_shard(name, path, **{**query.given, key: number}))
    if context.parts:
        example = next(iter(context.parts))
        raise WrongQueryError(f"write the id with its shard, such as {example}/{number}")
    return None


LIST_PARAMETERS = ("id", "columns")
"""Query parameters that a form may send several times."""


def query_of(request: Request, rows: int = ROWS_PER_PAGE) -> Query:
    """Return the query parameters."""
    given: dict[str, str] = {}
    for key, value in request.query_params.multi_items():
        # a pasted search text may have blanks around it
        text = value.strip() if key == "q" else value
        if text:  # forms also send empty fields
            given[key] = f"{given[key]},{text}" if key in LIST_PARAMETERS and key in given else text
    return Query(given, rows)


def local(address: str | None) -> str:
    """Return the address if it belongs to the console, otherwise that of the overview."""
    is_ours = address and (address == "/console" or address.startswith(("/console/", "/console?")))
    return address if address and is_ours else at("/")
