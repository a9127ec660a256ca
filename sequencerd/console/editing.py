"""The pages that change a sequence: its definition, after a plan, and its status."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import asdict, dataclass
from functools import cache, partial
from typing import Any, TypeVar

import asyncpg
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response

from sequencerd.console.changing import reason_of, why
from sequencerd.console.context import (
    CONTENT_SECURITY_POLICY,
    PageContext,
    context_of,
    missing,
    query_of,
    render,
)
from sequencerd.console.query import Query, WrongQueryError
from sequencerd.console.stored_sequence import StoredSequence, read_stored, read_yaml
from sequencerd.console.tables import at
from sequencerd.core.brake import MAX_BRAKE, read_brake
from sequencerd.definitions import json_schema, plan, plan_of_shards, yaml_reader
from sequencerd.definitions.compiler import Definition, Runners
from sequencerd.definitions.files import FileFinding, check_documents
from sequencerd.definitions.plan import Plan
from sequencerd.errors import DatabaseError, FileError, PlanError, SequencerdError, ShardsError
from sequencerd.storage import bulk, connections
from sequencerd.storage.change_of_shards import ChangeTexts, changing
from sequencerd.storage.connections import Shard
from sequencerd.storage.database_errors import brief
from sequencerd.storage.every_shard import ShardAnswers, ask

ORIGIN = "line"
MOVE_PREFIX = "move."
"""Followed by the name of a removed step: the field for its enrollments' new step."""

_T = TypeVar("_T")


# --- the definition: the page


async def edit(request: Request) -> Response:
    """Show the YAML of a sequence for editing: the current one, or that of a revision."""
    context, query = context_of(request), query_of(request)
    name = query.must("sequence")
    revision = query.number("revision", 0) or None
    stored = await read_stored(context, name)
    text = await read_yaml(context.parts.get(query.get("in") or "", context), name, revision)
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
) -> Response:
    plans = made.sequences if made is not None else ()
    at_step: Counter[str] = Counter()
    for plan_ in plans:
        at_step.update(plan_.at_step)
    simulator = context_of(request).simulator()
    form = request.state.form or {}
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
        lines=_lines(made) if made else [],
        removed=list(at_step.items()),
        steps=[step["name"] for step in plans[0].after["steps"]] if plans else [],
        moves=moves or {},
        wrong=wrong,
        revision=revision,
        given={key: form.get(key, "") for key in ("reason", "brake")},
        rows=min(40, max(12, text.count("\n") + 2)),
        nonce=nonce,
        known_steps=list(known.steps) if (known := simulator.definitions.get(name)) else [],
        types=sorted(simulator.runners),
        sequences=sorted(simulator.definitions),
    )
    # the editor adds its styles to the page
    policy = CONTENT_SECURITY_POLICY.replace(
        "style-src 'self'", f"style-src 'self' 'nonce-{nonce}'"
    )
    answer.headers["Content-Security-Policy"] = policy
    return answer


def _lines(made: Plan) -> list[str]:
    """Return the changes of a plan, for each shard if they differ."""
    if made.differing:
        return list(made.lines(done=False))
    return [line for one in made.sequences for line in one.lines(done=False)]


# --- the definition: what the editor asks for while it is open


async def schema(_: Request) -> Response:
    """Return the JSON Schema of files, which the editor uses for completion."""
    return Response(await asyncio.to_thread(_schema), media_type="application/json")


@cache
def _schema() -> str:
    return json.dumps(json_schema.make(), ensure_ascii=False)


async def check(request: Request) -> Response:
    """Return the errors of an edited sequence, with lines and columns."""
    context, query = context_of(request), Query(request.state.form)
    text = text_of(query)
    _, findings = await asyncio.to_thread(_check, context, text)
    return JSONResponse([asdict(finding) for finding in findings])


def text_of(query: Query) -> str:
    """Return the YAML in a form."""
    return (query.get("text") or "").replace("\r\n", "\n")


def _check(context: PageContext, text: str) -> tuple[list[Definition], list[FileFinding]]:
    if len(text.encode()) > yaml_reader.MAX_SIZE:
        message = f"has more than {yaml_reader.MAX_SIZE} bytes: split the sequence"
        return [], [FileFinding(ORIGIN, 1, None, None, message)]
    return check_documents({ORIGIN: yaml_reader.parse(text)}, context.simulator().runners)


# --- the definition: its plan, and the change


async def change(request: Request) -> Response:
    """Check, plan or apply an edited sequence, or offer it as a file."""
    context, query = context_of(request), Query(request.state.form)
    name, action = query.must("sequence"), query.must("action")
    text = text_of(query)
    if action == "download":
        headers = {"Content-Disposition": f'attachment; filename="{_file_name(name)}.yaml"'}
        return Response(text, headers=headers, media_type="application/yaml")
    stored = await read_stored(context, name)
    page = partial(_page, request, name, stored, text)
    definitions, findings = await asyncio.to_thread(_check, context, text)
    if any(finding.is_error for finding in findings):
        return page(422, findings=findings, wrong="The sequence has errors.")
    if [one.sequence.name for one in definitions] != [name]:
        wrong = f"This page edits only {name}: to rename or add sequences, apply files."
        return page(422, findings=findings, wrong=wrong)
    if query.must("base") != stored.base and not missing.get():
        cause = f" ({stored.reason})" if stored.reason else ""
        wrong = (
            f"The sequence has changed: revision {stored.revision}, by {stored.by}{cause}."
            " Nothing was applied. Plan again to see what your text would change."
        )
        return page(409, wrong=wrong)
    moves = _moves(request.state.form, definitions[0])
    edited = _Edit(context.simulator().runners, _shards(context), definitions, moves)
    try:
        answers = await _in_thread(context, edited.plan)
        made = plan_of_shards.merge(answers.found, moves)
        page = partial(page, made=made, moves=moves)
        if lines := answers.lines(refusals=True):
            return page(503, wrong=f"Nothing can be applied: {'; '.join(lines)}.")
        if action != "apply":
            return page(findings=findings)
        if context.shards:
            raise PlanError(f"{name} is in several shards: change it on the pages of all shards")
        if stored.from_file:
            raise PlanError(f"{name} is managed by files: download the changed file, and apply it")
        reason, given = reason_of(query), query.get("brake") or ""
        brake = read_brake(given)
        if reason is None:
            return page(422, wrong="Write a reason: it is recorded with the revision.")
        if given and brake is None:
            return page(422, wrong=f"The brake is a number from 1 to {MAX_BRAKE:,}, or empty.")
        cause, expected = why(request, reason), query.must("plan")
        await _in_thread(context, lambda: edited.apply(cause, expected, brake))
    except (PlanError, FileError, ShardsError) as error:
        wrong, status = f"Nothing was applied: {error}.", 409
        if isinstance(error, ShardsError):  # it may be applied in some
            wrong, status = str(error), 503
        return _page(request, name, await read_stored(context, name), text, status, wrong=wrong)
    return RedirectResponse(at("/sequence", sequence=name), 303)


def _file_name(name: str) -> str:
    return "".join(c if c.isascii() and (c.isalnum() or c in "-_.") else "_" for c in name)


def _moves(form: Mapping[str, str], definition: Definition) -> dict[str, str]:
    """Return the new steps that a form names, by removed step."""
    chosen = {k.removeprefix(MOVE_PREFIX): v for k, v in form.items() if k.startswith(MOVE_PREFIX)}
    return {old: new for old, new in chosen.items() if new and old not in definition.sequence.steps}


@dataclass(frozen=True)
class _Edit:
    """An edited sequence, to be planned and applied in all shards, as by the command line."""

    runners: Runners
    shards: list[Shard]
    definitions: list[Definition]
    moves: Mapping[str, str]

    async def plan(self) -> ShardAnswers[Plan]:
        async def make(shard: Shard) -> Plan:
            async with (
                connections.connected(shard) as connection,
                connection.transaction(isolation="repeatable_read", readonly=True),
            ):
                return await plan.make(connection, self.definitions, self.runners, moves=self.moves)

        return await ask(_explain, self.shards, make)

    async def apply(self, reason: str, expected: str, brake: int | None) -> None:
        async with changing(_explain, self.shards, connections.connect) as change:
            await plan_of_shards.apply(
                change,
                self.definitions,
                self.runners,
                moves=self.moves,
                reason=reason,
                expected=expected,
                brake=brake,
                from_files=False,
            )
            await change.commit(
                ChangeTexts("the revision", plan_of_shards.how_to_complete("the change"))
            )


# --- the status


async def ask_status(request: Request) -> Response:
    """Ask before a sequence's status is changed."""
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
        effect=bulk.SEQUENCE_STATUSES[action].effect(),
        stored=stored,
        reason=query.get("reason") or "",
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
    change = bulk.SEQUENCE_STATUSES[action]

    async def work(shard: Shard) -> None:
        async with connections.connected(shard) as connection:
            await bulk.set_status(connection, [name], change.status, why(request, reason))

    # a shard that cannot be reached must not prevent a pause in the others
    answers = await _in_thread(context, lambda: ask(_explain, _shards(context), work))
    if lines := answers.lines(refusals=True):
        done = ", ".join(str(shard.name) for shard in answers.found)
        wrong = (
            f"{name} is {change.status} in {done}. Not everywhere: {'; '.join(lines)}. Repeat the "
            "change when all can be reached."
        )
        return await _ask_status(request, query, wrong, 503)
    return RedirectResponse(at("/sequence", sequence=name), 303)


# --- on each shard


def _shards(context: PageContext) -> list[Shard]:
    return [part.shard for part in context.parts.values()] or [context.shard]


async def _in_thread(context: PageContext, work: Callable[[], Coroutine[Any, Any, _T]]) -> _T:
    """Run work in a thread, with connections of its own, because planning for many enrollments
    takes long.
    """
    async with context.simulating:
        try:
            return await asyncio.to_thread(lambda: asyncio.run(work()))
        except asyncpg.InsufficientPrivilegeError as error:
            raise WrongQueryError(_missing_privilege(error)) from error


def _missing_privilege(error: asyncpg.InsufficientPrivilegeError) -> str:
    return (
        f"the database refuses: {error}. To change sequences here, the console's login needs "
        "GRANT sequencer_editor"
    )


async def _explain(_: Shard, error: BaseException) -> SequencerdError:
    """Explain an error of one of several shards."""
    match error:
        case SequencerdError():
            return error
        case asyncpg.InsufficientPrivilegeError():
            return DatabaseError(_missing_privilege(error))
    return DatabaseError(brief(error))
