"""The pages that change a sequence: its status, and its definition by way of a plan."""

from __future__ import annotations

import asyncio
import difflib
import json
import secrets
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any, TypeVar

import asyncpg
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response

from sequencerd.console.changing import reason_of, why
from sequencerd.console.context import POLICY, PageContext, context_of, query_of, render
from sequencerd.console.query import NotFoundError, Query, WrongQueryError
from sequencerd.console.tables import at
from sequencerd.definitions import json_schema, plan, yaml_reader
from sequencerd.definitions.compiler import Definition
from sequencerd.definitions.diff import parse_document
from sequencerd.definitions.files import FileFinding, check_documents
from sequencerd.definitions.plan import Plan
from sequencerd.definitions.yaml_writer import to_yaml
from sequencerd.errors import DatabaseError, FileError, PlanError
from sequencerd.storage import bulk, connections

ORIGIN = "line"
MOVE = "move."  # with the name of a removed step: the field of its enrollments' new step

_T = TypeVar("_T")


@dataclass(frozen=True)
class StoredSequence:
    """A sequence as it is in the database."""

    revision: int
    status: str
    from_file: bool
    by: str | None
    reason: str | None


async def read_stored(context: PageContext, name: str) -> StoredSequence:
    """Return a sequence as it is. Raises NotFoundError."""
    rows = await connections.read(context.pool, "console_sequence", name)
    if not rows:
        raise NotFoundError(f"There is no sequence {name}.")
    return StoredSequence(**rows[0])


async def read_yaml(context: PageContext, name: str, revision: int | None) -> str:
    """Return a sequence as YAML, as it is or as a revision had it. Raises NotFoundError."""
    ((document,),) = await connections.read(context.pool, "document", name, revision)
    if document is None:
        raise NotFoundError(f"The sequence {name} has no revision {revision}.")
    return to_yaml(parse_document(name, document))


def text_of(query: Query) -> str:
    """Return the YAML of a form."""
    return (query.get("text") or "").replace("\r\n", "\n")


# --- the status


async def ask_status(request: Request) -> Response:
    """Ask before a change of a sequence's status."""
    return await _ask_status(request, query_of(request), None)


async def _ask_status(
    request: Request, query: Query, wrong: str | None, status: int = 200
) -> Response:
    name, action = query.must("sequence"), _action(query)
    stored = await read_stored(context_of(request), name)
    return render(
        request,
        "status.html",
        status,
        title=f"{action.capitalize()} {name}?",
        name=name,
        action=action,
        inside=bulk.SEQUENCE_STATUSES[action].inside,
        stored=stored,
        wrong=wrong,
    )


def _action(query: Query) -> str:
    if (action := query.must("action")) not in bulk.SEQUENCE_STATUSES:
        raise WrongQueryError(f"unknown action {action!r}")
    return action


async def set_status(request: Request) -> Response:
    """Pause, resume or archive a sequence."""
    context, query = context_of(request), Query(request.state.form)
    name, action = query.must("sequence"), _action(query)
    if (reason := reason_of(query)) is None:
        return await _ask_status(request, query, "Write a reason: it is recorded.", 422)
    words = bulk.SEQUENCE_STATUSES[action]

    async def work(connection: asyncpg.Connection) -> None:
        await bulk.set_status(connection, [name], words.status, why(request, reason))

    await _changing(context, work)
    return RedirectResponse(at("/sequence", sequence=name), 303)


async def _changing(
    context: PageContext, work: Callable[[asyncpg.Connection], Awaitable[_T]]
) -> _T:
    """Run work in a connection of its own, in a thread: to plan for many enrollments takes long."""

    async def run() -> _T:
        # not one of the pool's: the daemons are to be notified
        connection = await connections.connect(context.shard)
        try:
            return await work(connection)
        finally:
            await connection.close()

    async with context.simulating:
        try:
            return await asyncio.to_thread(lambda: asyncio.run(run()))
        except asyncpg.InsufficientPrivilegeError as error:
            raise WrongQueryError(
                f"the database refuses: {error}. To change sequences here, the console's login "
                "needs GRANT sequencer_editor"
            ) from error
        except DatabaseError as error:
            raise WrongQueryError(str(error)) from error


# --- the definition


async def edit(request: Request) -> Response:
    """Show a sequence's YAML for editing, as it is or as a revision had it."""
    context, query = context_of(request), query_of(request)
    name = query.must("sequence")
    revision = query.number("revision", 0) or None
    stored = await read_stored(context, name)
    text = await read_yaml(context, name, revision)
    return _page(request, name, stored, text, revision=revision)


def _page(
    request: Request,
    name: str,
    stored: StoredSequence,
    text: str,
    status: int = 200,
    *,
    findings: list[FileFinding] | None = None,
    made: Plan | None = None,
    wrong: str | None = None,
    revision: int | None = None,
    moves: Mapping[str, str] | None = None,
    given: Mapping[str, str] | None = None,
) -> Response:
    one = made.sequences[0] if made is not None else None
    simulator = context_of(request).simulator()
    nonce = secrets.token_urlsafe(16)
    answer = render(
        request,
        "edit.html",
        status,
        title=f"Edit {name}",
        name=name,
        stored=stored,
        text=text,
        findings=findings,
        made=made,
        lines=list(one.lines(done=False)) if one else [],
        removed=list(one.at_step.items()) if one else [],
        steps=[step["name"] for step in one.after["steps"]] if one else [],
        moves=moves or {},
        wrong=wrong,
        revision=revision,
        given={"reason": "", "brake": "", **(given or {})},
        rows=min(40, max(12, text.count("\n") + 2)),
        nonce=nonce,
        known_steps=list(known.steps) if (known := simulator.definitions.get(name)) else [],
        types=sorted(simulator.runners),
        sequences=sorted(simulator.definitions),
    )
    # the editor makes its styles in the page
    policy = POLICY.replace("style-src 'self'", f"style-src 'self' 'nonce-{nonce}'")
    answer.headers["Content-Security-Policy"] = policy
    return answer


async def schema(_: Request) -> Response:
    """Return the JSON Schema of files, by which the editor completes."""
    return Response(await asyncio.to_thread(_schema), media_type="application/json")


@cache
def _schema() -> str:
    return json.dumps(json_schema.make(), ensure_ascii=False)


async def check(request: Request) -> Response:
    """Return what is wrong with an edited sequence, with lines and columns."""
    context, query = context_of(request), Query(request.state.form)
    text = text_of(query)
    _, findings = await asyncio.to_thread(_check, context, text)
    return JSONResponse([asdict(finding) for finding in findings])


async def change(request: Request) -> Response:
    """Check, plan or apply an edited sequence, or offer it as a file."""
    context, query = context_of(request), Query(request.state.form)
    name, action = query.must("sequence"), query.must("action")
    text = text_of(query)
    stored = await read_stored(context, name)
    if action == "download":
        headers = {"Content-Disposition": f'attachment; filename="{_file_name(name)}.yaml"'}
        return Response(text, headers=headers, media_type="application/yaml")
    definitions, findings = await asyncio.to_thread(_check, context, text)
    wrong = None
    if any(finding.is_error for finding in findings):
        wrong = "The sequence has errors."
    elif [one.sequence.name for one in definitions] != [name]:
        wrong = f"This page edits only {name}: to rename or add sequences, apply files."
    if wrong:
        return _page(request, name, stored, text, 422, findings=findings, wrong=wrong)
    if query.number("base", 0) != stored.revision:
        cause = f" ({stored.reason})" if stored.reason else ""
        wrong = (
            f"The sequence has changed: revision {stored.revision}, by {stored.by}{cause}."
            " Nothing was applied. Plan again to see what your text would change."
        )
        return _page(request, name, stored, text, 409, wrong=wrong)
    form = request.state.form
    moves = {k.removeprefix(MOVE): v for k, v in form.items() if k.startswith(MOVE) and v}

    async def work(connection: asyncpg.Connection) -> Plan:
        async with connection.transaction(isolation="repeatable_read", readonly=True):
            return await plan.make(connection, definitions, runners, moves=moves)

    runners = context.simulator().runners
    try:
        made = await _changing(context, work)
        if action != "apply":
            return _page(request, name, stored, text, findings=findings, made=made, moves=moves)
        if context.shards:
            raise PlanError(
                f"{name} is in several shards: download the changed file, and apply it to all"
            )
        if stored.from_file:
            raise PlanError(f"{name} is managed by files: download the changed file, and apply it")
        reason, brake = reason_of(query), query.get("brake") or ""
        if reason is None:
            wrong = "Write a reason: it is recorded with the revision."
        elif brake and not _is_brake(brake):
            wrong = "The brake is a number from 1 to 1,000,000, or empty."
        if wrong or reason is None:
            given = {"reason": reason or "", "brake": brake}
            return _page(
                request, name, stored, text, 422, made=made, moves=moves, wrong=wrong, given=given
            )

        async def apply(connection: asyncpg.Connection) -> None:
            async with connection.transaction():
                await bulk.set_reason(connection, why(request, reason))
                await plan.apply(
                    connection,
                    definitions,
                    runners,
                    moves=moves,
                    expected=query.must("plan"),
                    brake=int(brake) if brake else None,
                    from_files=False,
                )

        await _changing(context, apply)
    except (PlanError, FileError) as error:
        wrong = f"Nothing was applied: {error}."
        return _page(request, name, await read_stored(context, name), text, 409, wrong=wrong)
    return RedirectResponse(at("/sequence", sequence=name), 303)


def _is_brake(text: str) -> bool:
    return text.isascii() and text.isdecimal() and 1 <= int(text[:9]) <= 1_000_000


def _file_name(name: str) -> str:
    return "".join(c if c.isascii() and (c.isalnum() or c in "-_.") else "_" for c in name)


def _check(context: PageContext, text: str) -> tuple[list[Definition], list[FileFinding]]:
    if len(text.encode()) > yaml_reader.MAX_SIZE:
        message = f"has more than {yaml_reader.MAX_SIZE} bytes: split the sequence"
        return [], [FileFinding(ORIGIN, 1, None, None, message)]
    return check_documents({ORIGIN: yaml_reader.parse(text)}, context.simulator().runners)


# --- revisions


async def compare(request: Request) -> Response:
    """Show a revision beside the one before it, or beside another."""
    context, query = context_of(request), query_of(request)
    name, revision = query.must("sequence"), query.number("revision", 0)
    rows = await connections.read(context.pool, "console_revisions", name, revision + 1, 1)
    if not rows or rows[0]["revision"] != revision:
        raise NotFoundError(f"The sequence {name} has no revision {revision}.")
    before, after = (
        to_yaml(parse_document(name, document)) if document else ""
        for document in (rows[0]["before"], rows[0]["document"])
    )
    stored = await read_stored(context, name)
    return render(
        request,
        "compare.html",
        title=f"Revision {revision} of {name}",
        name=name,
        row=rows[0],
        reason=context.mask({"message": rows[0]["reason"]})["message"],
        lines=side_by_side(before, after),
        is_present=stored.revision == revision,
    )


def side_by_side(before: str, after: str, context: int = 3) -> list[dict[str, Any]]:
    """Return the lines of two texts, as far as they differ, with their neighbours. A row without
    lines stands for what is left out.
    """
    old, new = before.splitlines(), after.splitlines()
    matcher = difflib.SequenceMatcher(None, old, new, autojunk=False)
    rows: list[dict[str, Any]] = []
    for number, group in enumerate(matcher.get_grouped_opcodes(context)):
        if number:
            rows.append({"kind": "gap", "before": None, "after": None})
        for kind, first, last, start, end in group:
            rows += [
                {
                    "kind": kind,
                    "before": old[first + offset] if first + offset < last else None,
                    "after": new[start + offset] if start + offset < end else None,
                }
                for offset in range(max(last - first, end - start))
            ]
    return rows
