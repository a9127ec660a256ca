"""The pages of suppressions: the list, and the forms that add and remove entries."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import asyncpg
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from sequencerd.console.all_shards import in_all, matching_rows, say_where_missing
from sequencerd.console.auth import Visitor
from sequencerd.console.changing import reason_of, why
from sequencerd.console.context import PageContext, context_of, message_page, query_of, render
from sequencerd.console.mask import MASKED_VALUE, MaskedRow
from sequencerd.console.query import LAST_CHARACTER, NotFoundError, Query, WrongQueryError
from sequencerd.console.tables import Column, Table, at
from sequencerd.core.task import Undeliverable
from sequencerd.runners.sms.numbers import normalise
from sequencerd.runners.suppression_check import EVERYTHING, forms
from sequencerd.storage import bulk, connections, suppressions
from sequencerd.storage.statements import QUERIES

BY_HAND = ("application", "console")
"""The sources of entries that were caused neither by a recipient nor by a mail server."""

SOURCES = (*BY_HAND, "refused", "bounce", "complaint", "stop", "unsubscribe")
FILTERS = ("channel", "address", "topic", "source")
KEY = ("channel", "address", "topic")
MAX_SCANNED = 20_000  # entries that a page searches
MASKED_REMARK = "Addresses are masked, so they are not searched"

_CHANNEL = re.compile(r"[a-z0-9][a-z0-9._-]{0,99}")
_TOPIC = re.compile(r"\*|[A-Za-z0-9][A-Za-z0-9._:/-]{0,199}")


@dataclass(frozen=True)
class SuppressionPage:
    """A page of the list. `is_cut` means that more entries may match than were searched."""

    table: Table
    is_cut: bool


# --- the list


async def page(request: Request) -> Response:
    """List the suppressions, and the entries that were removed lately."""
    context, query = context_of(request), query_of(request)
    found = await read(context, request.state.visitor, query)
    removed = await in_all(
        context, lambda part: connections.read(part.pool, "console_unsuppressed")
    )
    shown = itemgetter("channel", "topic", "source", "reason")
    latest = [next(iter(same.values())) for same in matching_rows(removed, shown)]
    latest.sort(key=lambda row: row["removed_at"], reverse=True)
    return render(
        request,
        "suppressions.html",
        title="Suppressions",
        given={name: query.get(name) or "" for name in FILTERS},
        found=found.table,
        is_cut=found.is_cut,
        most=MAX_SCANNED,
        channels=await _channels(context),
        sources=SOURCES,
        is_masked=context.is_masked,
        is_filtered=any(query.get(name) for name in FILTERS),
        removed=[context.mask({**row, "message": row["reason"]}) for row in latest],
    )


async def _channels(context: PageContext) -> list[str]:
    found = await in_all(context, lambda part: connections.read(part.pool, "console_channels"))
    return sorted({row["channel"] for rows in found.values() for row in rows})


async def read(context: PageContext, visitor: Visitor, query: Query) -> SuppressionPage:
    """Return a page of the entries that match, in the order of channels and addresses."""
    is_masked = context.is_masked  # if any path is masked, the value there may be an address
    is_linked = not is_masked and context.settings.write and visitor.may("operator")
    if is_masked and query.get("address"):
        raise WrongQueryError(MASKED_REMARK)
    channel, given = query.get("channel"), query.get("address") or ""
    channels = [channel] if channel else await _channels(context)
    prefixes = [normalise(given) if one in ("email", "sms") else given.strip() for one in channels]
    after = [query.get(f"after_{name}") or "" for name in KEY]

    async def search(part: PageContext) -> list[asyncpg.Record]:
        return await connections.read(
            part.pool,
            "console_suppressions",
            channels,
            prefixes,
            LAST_CHARACTER,
            query.get("topic"),
            query.get("source"),
            after,
            query.rows + 1,
            MAX_SCANNED,
        )

    entries: dict[tuple[str, ...], asyncpg.Record] = {}  # all shards should have the same
    ends: list[asyncpg.Record] = []  # up to which they were searched
    for rows in (await in_all(context, search)).values():
        matching = [row for row in rows if not row["is_last"]]
        entries = {_key_of(row): row for row in matching} | entries
        ends += [row for row in rows if row["is_last"] and len(matching) <= query.rows]
        ends += matching[query.rows :]
    end = min(ends, key=_key_of, default=None)
    every = [entries[key] for key in sorted(entries) if end is None or key <= _key_of(end)]
    shown = every[: query.rows]
    is_cut = len(every) <= query.rows and end is not None
    last = end if is_cut else shown[-1] if len(every) > query.rows else None
    more = None
    if last is not None and not is_masked:  # the address of the next page would reveal it
        more = {**query.given, **{f"after_{name}": last[name] for name in KEY}}
    columns = (
        Column("address", "Address", link="url" if is_linked else None),
        Column("channel", "Channel"),
        Column("topic", "Topic"),
        Column("source", "Source", "code"),
        Column("reason", "Reason", optional=True),
        Column("created_at", "Since", "time"),
    )
    found = [_shown(context, row, is_masked=is_masked) for row in shown]
    return SuppressionPage(Table("suppressions", columns, found, query.given, more), is_cut)


def _key_of(row: asyncpg.Record) -> tuple[str, ...]:
    return tuple(row[name] for name in KEY)


def _shown(context: PageContext, row: Mapping[str, Any], *, is_masked: bool) -> MaskedRow:
    shown = context.mask({"message": row["reason"]})
    entry = {**row, "reason": shown["message"]}
    if is_masked:
        return {**entry, "address": MASKED_VALUE}
    return {**entry, "url": at("/suppression", **{name: row[name] for name in KEY})}


# --- what adds an entry


async def ask(request: Request) -> Response:
    """Show the form that suppresses an address."""
    return _form(request, query_of(request))


def _form(request: Request, query: Query, wrong: str | None = None, status: int = 200) -> Response:
    definitions = context_of(request).simulator().definitions.values()
    return render(
        request,
        "suppress.html",
        status,
        title="Suppress an address",
        given={name: query.get(name) or "" for name in (*KEY, "reason")},
        topics=sorted({one.topic for one in definitions if one.topic}),
        wrong=wrong,
    )


async def suppress(request: Request) -> Response:
    """Suppress an address."""
    context, query = context_of(request), Query(request.state.form)
    try:
        channel, address, topic = _key(query)
    except WrongQueryError as error:
        return _form(request, query, f"{error}.", 422)
    if (reason := reason_of(query)) is None:
        return _form(request, query, "Write a reason: it is recorded.", 422)
    entry = Undeliverable(channel, address, why(request, reason), "console")

    async def add(part: PageContext) -> bool:
        async with connections.borrow(part.pool) as connection:
            known = await _entries(connection, channel, address, topic)
            return not known and bool(await suppressions.add(connection, [entry], topic))

    added = await in_all(context, add)
    if wrong := say_where_missing(added):
        return _form(request, query, f"Suppressed in {wrong}", 503)
    if not any(added.values()):
        return _form(request, query, "This address is already suppressed.", 409)
    shown = None if context.is_masked else address
    return RedirectResponse(at("/suppressions", channel=channel, address=shown), 303)


def _key(query: Query) -> tuple[str, str, str]:
    """Return a channel, an address and a topic. Raises WrongQueryError."""
    channel = (query.get("channel") or "").strip().lower()
    address = (query.get("address") or "").strip()
    topic = (query.get("topic") or EVERYTHING).strip()
    if not _CHANNEL.fullmatch(channel):
        raise WrongQueryError("The channel is email, sms, or that of a custom runner, such as push")
    if not 1 <= len(address.encode()) <= 1000:
        raise WrongQueryError("The address must have 1 to 1,000 bytes")
    if not _TOPIC.fullmatch(topic):
        raise WrongQueryError("The topic must be * or letters, digits and ._:/-")
    return channel, address, topic


async def _entries(
    connection: asyncpg.Connection, channel: str, address: str, topic: str
) -> list[asyncpg.Record]:
    """Return the entries of an address, including those that are hashes."""
    rows: list[asyncpg.Record] = await connection.fetch(
        QUERIES["console_suppression"], channel, _forms(channel, address), topic
    )
    return rows


def _forms(channel: str, address: str) -> list[str]:
    return [*forms(channel, address), address]  # an entry may itself be a hash


# --- what removes one


async def entry(request: Request) -> Response:
    """Show an entry, and ask before it is removed."""
    return await _entry(request, query_of(request))


async def _entry(
    request: Request, query: Query, wrong: str | None = None, status: int = 200
) -> Response:
    context, key = context_of(request), _key(query)

    async def find(part: PageContext) -> list[asyncpg.Record]:
        async with connections.reading(part.pool) as connection:
            return await _entries(connection, *key)

    found = await in_all(context, find)
    same = matching_rows(found, lambda row: (row["source"], row["reason"]))
    entries = [next(iter(rows.values())) for rows in same]
    if not entries:
        channel, _, topic = key
        about = "all topics" if topic == EVERYTHING else f"the topic {topic}"
        raise NotFoundError(f"This address is not suppressed for {channel} and {about}.")
    return render(
        request,
        "suppression.html",
        status,
        title="Suppression",
        key=dict(zip(KEY, key, strict=True)),
        entries=[context.mask({**row, "message": row["reason"]}) for row in entries],
        made_by_others=_made_by_others(entries),
        reason=query.get("reason") or "",
        is_confirmed=query.get("confirmed") is not None,
        wrong=wrong,
    )


def _made_by_others(entries: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the sources of entries that a recipient or a mail server has caused."""
    return sorted({row["source"] for row in entries} - {*BY_HAND})


async def remove(request: Request) -> Response:
    """Remove an entry. The removal must be confirmed if a recipient or a mail server has caused the
    entry.
    """
    context, query = context_of(request), Query(request.state.form)
    channel, address, topic = _key(query)
    if (reason := reason_of(query)) is None:
        return await _entry(request, query, "Write a reason: it is recorded.", 422)
    sources = None if query.get("confirmed") else BY_HAND

    async def remove_from(part: PageContext) -> list[asyncpg.Record]:
        async with connections.borrow(part.pool) as connection, connection.transaction():
            await bulk.set_reason(connection, why(request, reason))
            await connection.execute(
                QUERIES["console_unsuppress"], channel, _forms(channel, address), topic, sources
            )
            return await _entries(connection, channel, address, topic)

    left = await in_all(context, remove_from)
    if wrong := say_where_missing(left):
        return message_page(
            request,
            503,
            "Not removed everywhere",
            f"Removed in {wrong}",
            link=("/suppressions", "Suppressions"),
        )
    for rows in left.values():
        if rows:
            wrong = f"Confirm that messages may be sent again despite: {rows[0]['source']}."
            return await _entry(request, query, wrong, 422)
    return RedirectResponse(at("/suppressions", channel=channel), 303)
