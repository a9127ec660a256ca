"""Merge the results of several shards: add up counts, and merge lists."""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from sequencerd.console import views
from sequencerd.console.context import PageContext, lost, missing
from sequencerd.console.lists import MAX_ID, EnrollmentPage, comparable
from sequencerd.console.query import NotFoundError, Query, WrongQueryError
from sequencerd.console.summary import (
    FIRST_TIME,
    PAGE_WAIT,
    UNREADABLE_VERSION,
    Counts,
    Summary,
    SummaryRow,
)
from sequencerd.console.tables import Table, at_shard
from sequencerd.core.describe import plain
from sequencerd.core.enrollment import StepKey
from sequencerd.storage.database_errors import TRANSIENT_ERRORS, brief, is_lost

_T = TypeVar("_T")


class SummaryOfShards(Summary):
    """The counts of all shards that can be reached."""

    def __init__(self, shards: Mapping[str, Summary]) -> None:
        self.changed = lambda: None
        self.missing: Mapping[str, str] = {}
        self._shards = shards
        for summary in shards.values():
            summary.changed = self._also(summary.changed)

    def _also(self, before: Callable[[], None]) -> Callable[[], None]:
        def changed() -> None:
            before()
            self.changed()

        return changed

    @property
    def version(self) -> str:
        """Return a version that changes with the counts of any shard."""
        versions = [summary.version for summary in self._shards.values()]
        return UNREADABLE_VERSION if {*versions} == {UNREADABLE_VERSION} else " ".join(versions)

    def record_view(self) -> None:
        """Record that a page is open."""
        for summary in self._shards.values():
            summary.record_view()

    async def get(self, first: float = PAGE_WAIT) -> Counts | None:
        """Return the latest counts; None if there are none yet. Raises the error if all fail."""
        found = dict(
            zip(
                self._shards,
                await asyncio.gather(
                    *(summary.get(first) for summary in self._shards.values()),
                    return_exceptions=True,
                ),
                strict=True,
            )
        )
        failed = {name: one for name, one in found.items() if isinstance(one, BaseException)}
        self.missing = {name: brief(error) for name, error in failed.items()}
        if len(failed) == len(found):
            raise next(iter(failed.values()))
        counted = {name: one for name, one in found.items() if isinstance(one, Counts)}
        return merge_counts(counted) if counted else None


def merge_counts(shards: Mapping[str, Counts]) -> Counts:
    """Add up the counts of several shards."""
    every = list(shards.values())
    flow: defaultdict[tuple[str, str, str], Counter[Any]] = defaultdict(Counter)
    stays: defaultdict[StepKey, dict[str, float]] = defaultdict(dict)  # medians cannot be added up
    for name, counts in shards.items():
        for key, days in counts.flow.items():
            flow[key] += days
        for place, seconds in counts.stays.items():
            if not isinstance(seconds, Mapping):
                stays[place][name] = seconds
    return replace(
        every[0],
        at=min(counts.at for counts in every),
        sequences=_merge_rows(
            {name: counts.sequences for name, counts in shards.items()}, ("name",)
        ),
        steps=_merge_rows(
            {name: counts.steps for name, counts in shards.items()}, ("sequence", "step")
        ),
        failed=[row for counts in every for row in counts.failed],
        causes=[row for counts in every for row in counts.causes],
        has_more_causes=any(counts.has_more_causes for counts in every),
        next=sorted((row for counts in every for row in counts.next), key=lambda row: row["at"]),
        problems=[
            {**row, "shard": name} for name, counts in shards.items() for row in counts.problems
        ],
        findings=[
            replace(finding, about=f"{name}: {finding.about}")
            for name, counts in shards.items()
            for finding in counts.findings
        ],
        flow=flow,
        stays=stays,
        flow_since=max(filter(None, (counts.flow_since for counts in every)), default=None),
    )


def _merge_rows(shards: Mapping[str, Sequence[SummaryRow]], key: Sequence[str]) -> list[SummaryRow]:
    """Return one row for those of the shards with the same key: numbers of enrollments are added
    up, and another status or problem is named with its shard.
    """
    found: dict[tuple[Any, ...], dict[str, SummaryRow]] = {}
    for name, rows in shards.items():
        for row in rows:
            found.setdefault(tuple(row[part] for part in key), {})[name] = row
    merged = [_merge_row(rows) for rows in found.values()]
    return sorted(merged, key=lambda row: row[key[0]])


def _merge_row(rows: Mapping[str, SummaryRow]) -> SummaryRow:
    made = dict(next(iter(rows.values())))
    for name in made.keys() & {"active", "soon", "overdue"}:
        made[name] = views.sum_known(row[name] for row in rows.values())
    for name in made.keys() & {"status", "problem"}:
        made[name] = common_or_each({shard: row[name] for shard, row in rows.items()})
    return made


def common_or_each(values: Mapping[str | None, _T]) -> _T | str:
    """Return a value if all shards have the same, otherwise the value of each shard."""
    first, *others = values.values()
    if all(value == first for value in others):
        return first
    return "; ".join(f"{shard}: {value}" for shard, value in values.items())


# --- all shards


async def in_all(
    context: PageContext,
    work: Callable[[PageContext], Awaitable[_T]],
    *,
    only: Collection[str] | None = None,
) -> dict[str | None, _T]:
    """Return the answers of all shards, or of `only` some, by name; with a single database, its
    answer. The page says which shards are missing. Raises the error if none answers.
    """
    if not context.parts:
        return {None: await work(context)}
    names = [name for name in context.parts if only is None or name in only]
    known = lost.get({})

    async def ask(name: str) -> _T:
        if name in known:
            raise known[name]
        return await work(context.parts[name])

    answers = await asyncio.gather(*map(ask, names), return_exceptions=True)
    found: dict[str | None, _T] = {}
    failed: list[BaseException] = []
    for name, answer in zip(names, answers, strict=True):
        if not isinstance(answer, BaseException):
            found[name] = answer
            continue
        failed.append(answer)
        if isinstance(answer, TRANSIENT_ERRORS):
            missing.get()[name] = brief(answer)
            if is_lost(answer):
                known[name] = answer
        elif not isinstance(answer, NotFoundError):  # only some may have a sequence
            raise answer
    if not found:
        raise failed[0]
    return found


def say_where_missing(found: Iterable[str | None]) -> str | None:
    """Say in which shards a change was made if some are missing; None if it was made in all."""
    if not missing.get():
        return None
    names = ", ".join(missing.get())
    return (
        f"{', '.join(map(str, found))}, not in {names}: repeat the change when all can be reached."
    )


def grouped(found: Mapping[str | None, _T | None]) -> list[tuple[str | None, _T]]:
    """Return each value once, with the names of its shards, or None if all shards have it."""
    groups: list[tuple[list[str | None], _T]] = []
    for name, value in found.items():
        if value is None:
            continue
        for names, other in groups:
            if value == other:
                names.append(name)
                break
        else:
            groups.append(([name], value))
    return [
        (None if len(names) == len(found) else ", ".join(map(str, names)), value)
        for names, value in groups
    ]


def matching_rows(
    found: Mapping[str | None, Iterable[SummaryRow]], key: Callable[[SummaryRow], object]
) -> list[dict[str | None, SummaryRow]]:
    """Return the rows of all shards; a row that several shards have is returned once. The nth row
    with a key is the same in all of them.
    """
    merged: dict[tuple[object, int], dict[str | None, SummaryRow]] = {}
    for name, rows in found.items():
        times: Counter[object] = Counter()
        for row in rows:
            times[key(row)] += 1
            merged.setdefault((key(row), times[key(row)]), {})[name] = row
    return list(merged.values())


# --- tables


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
