"""Merge the tables and lists of several shards into those of a single database."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from sequencerd.console import views
from sequencerd.console.all_shards import in_all, matching_rows
from sequencerd.console.context import PageContext, missing
from sequencerd.console.lists import MAX_ID, EnrollmentPage, comparable
from sequencerd.console.query import Query, WrongQueryError
from sequencerd.console.summary import FIRST_TIME, SummaryRow
from sequencerd.console.tables import Table, at_shard
from sequencerd.core.describe import plain


def _query_for(part: PageContext, context: PageContext, query: Query) -> Query:
    """Return the part of a query that concerns one shard; with one database, the query itself."""
    if not context.parts:
        return query
    return query.of_shard(str(part.shard.name), context.parts) or query


def _of_shards(found: Mapping[str | None, Table]) -> list[dict[str, Any]]:
    """Return the enrollments in tables of shards, each with its shard and its number there."""
    return [
        {
            **row,
            "shard": name,
            "number": row["id"],
            "id": f"{name}/{row['id']}",
            "url": at_shard(name, f"/enrollments/{row['id']}"),
        }
        for name, table in found.items()
        for row in table.rows
    ]


async def waiting_in_all(context: PageContext, query: Query) -> Table:
    """Return the enrollments at a step by wake time, in the order of a single database."""

    async def of(part: PageContext) -> Table:
        return await views.enrollments(part.pool, _query_for(part, context, query), part.mask)

    found = await in_all(context, of)
    if None in found:
        return found[None]
    rows = _of_shards(found)
    rows.sort(key=lambda row: row["wake_at"])
    shown = rows[: query.rows]
    more: dict[str, str] | None = None
    if len(rows) > len(shown) or any(table.more for table in found.values()):
        more = _next_of(query, shown, [str(name) for name in found])
    first = next(iter(found.values()))
    return replace(first, rows=shown, query=query.given, more=more)


def _next_of(
    query: Query, shown: Sequence[SummaryRow], shards: Sequence[str]
) -> dict[str, str] | None:
    """Return where the next page begins in each shard, as `views.enrollments` does."""
    last = shown[-1]["wake_at"]
    given = {key: value for key, value in query.given.items() if not key.startswith("skip.")}
    for name in shards:
        skip = sum(row["wake_at"] == last and row["shard"] == name for row in shown)
        if last == query.time("from", FIRST_TIME):
            ours = query.of_shard(name, shards)
            skip += ours.number("skip", 0) if ours else 0
        if skip > views.MAX_OFFSET:
            return None
        given[f"skip.{name}"] = str(skip)
    return {**given, "from": str(plain(last))}


async def revisions_in_all(context: PageContext, query: Query) -> Table:
    """Return the changes of a sequence, the latest first: a change that several shards have is one
    row, with its number in each shard if these differ.
    """

    async def of(part: PageContext) -> Table:
        return await views.revisions(part.pool, _query_for(part, context, query), part.mask)

    found = await in_all(context, of)
    if None in found:
        return found[None]
    rows = []
    for same in matching_rows(
        {name: table.rows for name, table in found.items()},
        lambda row: (row["by"], row["reason"], row["changes"]),
    ):
        name, row = next(iter(same.items()))
        number: int | str = row["revision"]
        url = at_shard(name, "/revision", sequence=query.must("sequence"), revision=number)
        numbers = {shard: one["revision"] for shard, one in same.items()}
        if len(numbers) < len(found) or len({*numbers.values()}) > 1:
            number = ", ".join(f"{number} in {shard}" for shard, number in numbers.items())
        rows.append({**row, "url": url, "revision": number})
    rows.sort(key=lambda row: row["at"], reverse=True)
    more = {f"before.{name}": table.more["before"] for name, table in found.items() if table.more}
    for name, table in found.items():  # a shard without a further page is not read again
        if more and not table.more:
            more[f"before.{name}"] = "1"
    first = next(iter(found.values()))
    given = {key: value for key, value in query.given.items() if not key.startswith("before.")}
    columns = [replace(one, kind="text") if one.key == "revision" else one for one in first.columns]
    following = {**given, **more} if more else None
    return replace(first, columns=columns, rows=rows, query=query.given, more=following)


# --- lists


async def found_in_all(
    context: PageContext,
    query: Query,
    find: Callable[[PageContext, Query], Awaitable[EnrollmentPage]],
) -> EnrollmentPage:
    """Return the enrollments that all shards find, in the order of a single database."""
    is_by_id = (query.get("sort") or "-id") == "-id" and query.get("q") is None
    before = _before(list(context.parts), query)
    asked = {
        name: Query({**ours.given, **before[name]}, query.rows)
        for name in context.parts
        if (ours := query.of_shard(name, context.parts)) is not None
    }
    found = await in_all(context, lambda part: find(part, asked[str(part.shard.name)]), only=asked)
    remarks = [
        f"The shard {name} is missing here: {why}."
        for name, why in missing.get().items()
        if name in asked and name not in found
    ]
    first = next(iter(found.values())).table
    rows = _of_shards({name: one.table for name, one in found.items()})
    more: dict[str, str] | None = None
    further: dict[str, str] = {}
    if is_by_id:
        # other shards may have enrollments below the last id that any shard returned or searched
        ends = [int(one.table.more["before"]) for one in found.values() if one.table.more]
        rows = [row for row in rows if row["number"] >= max(ends, default=0)]
        rows.sort(key=lambda row: -row["number"])  # stable: equal ids in the order of the shards
        if len(rows) > query.rows:
            rows = rows[: query.rows]
            more = {**query.given, "before": rows[-1]["id"]}
        elif ends:
            more = {**query.given, "before": str(max(ends))}
    else:
        if sort := query.get("sort"):
            key = "number" if sort in ("id", "-id") else sort.removeprefix("-")
            rows.sort(key=lambda row: comparable(row[key]), reverse=sort.startswith("-"))
        further = {
            str(name): at_shard(name, "/search", **one.table.more)
            for name, one in found.items()
            if one.table.more
        }
    remarks += [one.table.remark for one in found.values() if one.table.remark]
    table = replace(
        first,
        rows=rows,
        query=query.given,
        more=more,
        remark=" ".join(dict.fromkeys(remarks)) or None,
    )
    advice = next((one.advice for one in found.values() if one.advice), None)
    return EnrollmentPage(table, advice, further)


def _before(shards: Sequence[str], query: Query) -> dict[str, dict[str, str]]:
    """Return where the page of each shard begins: after an enrollment such as b/17."""
    if (given := query.get("before")) is None or "/" not in given:
        return {name: {} for name in shards}
    shard, _, number = given.partition("/")
    if shard not in shards or not number.isdecimal() or int(number) >= MAX_ID:
        raise WrongQueryError("the parameter before is not from a previous page")
    last = shards.index(shard)
    return {
        name: {"before": str(int(number) + (place > last))} for place, name in enumerate(shards)
    }
