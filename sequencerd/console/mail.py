"""Show the message of a step as it will be received, for an enrollment or for sample data."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from email import message_from_bytes
from email.message import EmailMessage
from email.policy import default
from typing import Any

from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response

from sequencerd.console.context import (
    WITH_FRAMES,
    PageContext,
    SentTest,
    context_of,
    definition_of,
    query_of,
    render,
)
from sequencerd.console.mask import read_data
from sequencerd.console.query import NotFoundError, Query, as_sentence
from sequencerd.console.tables import at
from sequencerd.core.enrollment import Enrollment
from sequencerd.core.model import SideEffect
from sequencerd.definitions import step_message
from sequencerd.definitions.options import read_object
from sequencerd.errors import UsageError
from sequencerd.runners.email.page import inlined
from sequencerd.runners.protocol import MessageRunner, close_all
from sequencerd.storage import connections
from sequencerd.storage.statements import QUERIES

SAMPLE_DATA = '{"email": "ada@example.com", "phone": "+14155550100", "name": "Ada"}'
MESSAGE_PARAMETERS = ("sequence", "step", "enrollment", "data", "external", "timezone")
MAX_SENDING = 30.0  # seconds
MAX_SENT_TESTS = 100  # whose reports are kept

FRAME_POLICY = (
    "sandbox; default-src 'none'; style-src 'unsafe-inline'; img-src data:; frame-ancestors 'self'"
)
"""The Content-Security-Policy of a frame with the HTML of a message: no script runs, and nothing is
loaded.
"""


HideText = Callable[[str], str]


@dataclass(frozen=True)
class MessagePreview:
    """A message with masks applied."""

    subject: str | None
    headers: list[tuple[str, str]]
    text: str | None
    html: str | None
    files: list[str]


async def mail(request: Request) -> Response:
    """Show a message, and a form that selects its enrollment or data."""
    return await _page(request, query_of(request), None)


async def _page(request: Request, query: Query, wrong: str | None, status: int = 200) -> Response:
    context = context_of(request)
    sequence = definition_of(context, query.must("sequence"), query.must("step"))
    shown, enrollment = None, query.get("enrollment")
    if enrollment is None and query.get("data") is None:
        enrollment = await example(context, query)
    try:
        shown = await _mail(context, query, enrollment)
    except UsageError as error:
        wrong, status = wrong or as_sentence(str(error)), 422
    given = {name: query.get(name) for name in MESSAGE_PARAMETERS} | {"enrollment": enrollment}
    user = request.state.visitor.user or ""
    sent = context.sent_tests.get(query.get("sent") or "")
    answer = render(
        request,
        "mail.html",
        status,
        title=f"The message of {query.must('step')}",
        mail=shown,
        report=sent and sent.report,
        wrong=wrong,
        given=given,
        data=query.get("data") or ("" if enrollment else SAMPLE_DATA),
        frame=at("/message/frame", **given),
        steps=[name for name, step in sequence.steps.items() if sends(context, step)],
        lookup=sequence.lookup,
        to=query.get("address") or (sent.address if sent else user if "@" in user else ""),
    )
    answer.headers.update(WITH_FRAMES)
    return answer


async def frame(request: Request) -> Response:
    """Return the HTML of a message, for a frame."""
    context, query = context_of(request), query_of(request)
    return framed((await _mail(context, query, query.get("enrollment"))).html)


def framed(html: str | None) -> Response:
    """Return HTML that may be shown in a frame. Raises NotFoundError if the message has none."""
    if html is None:
        raise NotFoundError("This message has no HTML.")
    headers = {"Content-Security-Policy": FRAME_POLICY, "X-Frame-Options": "SAMEORIGIN"}
    return HTMLResponse(html, headers=headers)


async def send_test(request: Request) -> Response:
    """Send the message to one address, marked as a test."""
    context, query = context_of(request), Query(request.state.form)
    runners = context.runners()
    try:
        address = query.get("address")
        if address is None:
            raise UsageError("write the address for the test")
        message, masked = await _message(context, query, query.get("enrollment"))
        try:
            test = step_message.make_test(message, address, runners)
            async with asyncio.timeout(MAX_SENDING):
                report = await step_message.send(test, address, context.redact)
        except (ValueError, UsageError) as error:
            raise UsageError(masked(str(error))) from error
    except TimeoutError:
        wrong = "The server did not answer in time; the test may still arrive."
        return await _page(request, query, wrong, 422)
    except UsageError as error:
        return await _page(request, query, as_sentence(str(error)), 422)
    finally:
        await close_all(runners.values())
    number = secrets.token_urlsafe(12)
    context.sent_tests[number] = SentTest(address, f"Test {report}.")
    for old in list(context.sent_tests)[:-MAX_SENT_TESTS]:
        del context.sent_tests[old]
    given = {name: query.get(name) for name in MESSAGE_PARAMETERS}
    return RedirectResponse(at("/message", **given, sent=number), 303)


def sends(context: PageContext, step: Any) -> bool:
    """Return whether a step sends a message that can be previewed."""
    runner = context.simulator().runners.get(step.type)
    return isinstance(step.behaviour, SideEffect) and isinstance(runner, MessageRunner)


async def example(context: PageContext, query: Query) -> str | None:
    """Return the id of an enrollment at the step, or else of the latest one in the sequence."""
    sequence, step = query.must("sequence"), query.must("step")
    rows = await connections.read(context.pool, "console_example", sequence, step)
    return str(rows[0]["id"]) if rows else None


async def _message(
    context: PageContext, query: Query, id_: str | None
) -> tuple[step_message.StepMessage, HideText]:
    """Return the message, and the function that masks its texts."""
    sequence = definition_of(context, query.must("sequence"), query.must("step"))
    external = read_object(query.get("external") or "{}", "external data")
    known: dict[str, Any] = {}
    if id_ is None:
        data = query.get("data") or SAMPLE_DATA
        read_object(data, "data")
        enrollment = step_message.sample(data, None, query.get("timezone"))
    else:
        number = Query({"enrollment": id_}).number("enrollment", 0)
        async with connections.reading(context.pool) as connection:
            row = await connection.fetchrow(QUERIES["simulated"], number)
        if row is None:
            raise NotFoundError(f"Enrollment {number} does not exist.")
        enrollment = Enrollment(*list(row)[:-1])
        known = {"known": read_data(enrollment.data), "known_subject": enrollment.subject}
    runners = context.simulator().runners
    made = step_message.make_message(sequence, query.must("step"), runners, enrollment, external)

    def hide(text: str) -> str:
        return str(context.mask({"message": text, **known})["message"])

    return made, hide


async def _mail(context: PageContext, query: Query, id_: str | None) -> MessagePreview:
    """Return a message with masks applied. Raises UsageError."""
    message, masked = await _message(context, query, id_)
    runners = context.runners()  # the engine's runners belong to its thread
    runner = runners[message.step.type]
    assert isinstance(runner, MessageRunner)
    try:
        async with context.simulating:
            content = await step_message.write(message._replace(runner=runner))
    except UsageError as error:
        raise UsageError(masked(str(error))) from error
    finally:
        await close_all(runners.values())
    read = message_from_bytes(content, policy=default)
    assert isinstance(read, EmailMessage)
    text, html = (_part(read, kind) for kind in ("plain", "html"))
    return MessagePreview(
        masked(str(read["Subject"])) if read["Subject"] else None,
        [(name, masked(str(value))) for name, value in read.items() if name != "Subject"],
        masked(text) if text is not None else None,
        masked(inlined(read, html)) if html is not None else None,
        [masked(part.get_filename() or "unnamed") for part in read.iter_attachments()],
    )


def _part(read: EmailMessage, kind: str) -> str | None:
    part = read.get_body((kind,))
    if part is None:
        return None
    content = part.get_payload(decode=True)
    assert isinstance(content, bytes)
    # the frame of an SMS has no charset
    return content.decode(part.get_content_charset("utf-8"), "replace")
