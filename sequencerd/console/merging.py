"""What several shards have, as one: counts added up, lists merged."""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from statistics import median
from typing import TYPE_CHECKING, Any

from sequencerd.console.lists import FURTHEST, EnrollmentPage, comparable
from sequencerd.console.query import Query, WrongQueryError
from sequencerd.console.summary import LOST, PATIENCE, Counts, Summary, SummaryRow
from sequencerd.console.tables import at_shard
from sequencerd.storage.database_errors import TRANSIENT_ERRORS, brief

if TYPE_CHECKING:
    from sequencerd.console.context import PageContext


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
        """Another one when the counts of any shard are others."""
        versions = [summary.version for summary in self._shards.values()]
        return LOST if {*versions} == {LOST} else " ".join(versions)

    def look(self) -> None:
        """Note that a page is open."""
        for summary in self._shards.values():
            summary.look()

    async def get(self, first: float = PATIENCE) -> Counts | None:
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
    """Return the counts of several shards as those of one database."""
    every = list(shards.values())
    flow: defaultdict[tuple[str, str, str], Counter[Any]] = defaultdict(Counter)
    stays: defaultdict[tuple[str, str], list[float]] = defaultdict(list)
    for counts in every:
        for key, days in counts.flow.items():
            flow[key] += days
        for place, seconds in counts.stays.items():
            stays[place].append(seconds)
    return replace(
        every[0],
        at=min(counts.at for counts in every),
        sequences=_once({name: counts.sequences for name, counts in shards.items()}, ("name",)),
        steps=_once({name: counts.steps for name, counts in shards.items()}, ("sequence", "step")),
        failed=[row for counts in every for row in counts.failed],
        causes=[row for counts in every for row in counts.causes],
        next=sorted((row for counts in every for row in counts.next), key=lambda row: row["at"]),
        problems=[
            {**row, "about": _in_shard(name, row)}
            for name, counts in shards.items()
            for row in counts.problems
        ],
        findings=[
            replace(finding, about=f"{name}: {finding.about}")
            for name, counts in shards.items()
            for finding in counts.findings
        ],
        flow=flow,
        stays={place: median(found) for place, found in stays.items()},
        flow_since=max(filter(None, (counts.flow_since for counts in every)), default=None),
    )


def _in_shard(name: str, row: SummaryRow) -> str:
    about = row["about"]
    return f"{name}/{about}" if row["kind"] == "quarantined" else f"{about} in {name}"


def _once(shards: Mapping[str, Sequence[SummaryRow]], key: Sequence[str]) -> list[SummaryRow]:
    """Return one row for those of the shards with the same key: numbers of enrollments are added
    up, and another status or problem is named with its shard.
    """
    found: dict[tuple[Any, ...], dict[str, SummaryRow]] = {}
    for name, rows in shards.items():
        for row in rows:
            found.setdefault(tuple(row[part] for part in key), {})[name] = row
    merged = [_one(rows) for rows in found.values()]
    return sorted(merged, key=lambda row: row[key[0]])


def _one(rows: Mapping[str, SummaryRow]) -> SummaryRow:
    made = dict(next(iter(rows.values())))
    for name in made.keys() & {"active", "soon", "overdue"}:
        known = [row[name] for row in rows.values() if row[name] is not None]
        made[name] = sum(known) if known else None
    for name in made.keys() & {"status", "problem"}:
        if len({row[name] for row in rows.values()}) > 1:
            made[name] = "; ".join(f"{shard}: {row[name]}" for shard, row in rows.items())
    return made


# --- lists


async def found_in_all(
    shards: Mapping[str, PageContext],
    query: Query,
    find: Callable[[PageContext, Query], Awaitable[EnrollmentPage]],
) -> EnrollmentPage:
    """Return the enrollments that all shards find, in the order that one database would give."""
    is_by_id = (query.get("sort") or "-id") == "-id" and query.get("q") is None
    before = _before(list(shards), query)
    answers = await asyncio.gather(
        *(
            find(context, Query({**query.given, **before[name]}, query.rows))
            for name, context in shards.items()
        ),
        return_exceptions=True,
    )
    found: dict[str, EnrollmentPage] = {}
    remarks = []
    for name, answer in zip(shards, answers, strict=True):
        if isinstance(answer, EnrollmentPage):
            found[name] = answer
        elif isinstance(answer, TRANSIENT_ERRORS):
            remarks.append(f"The shard {name} is missing here: {brief(answer)}.")
        else:
            raise answer
    if not found:
        raise next(answer for answer in answers if isinstance(answer, BaseException))
    first = next(iter(found.values())).table
    rows = [
        {
            **row,
            "id": f"{name}/{row['id']}",
            "number": row["id"],
            "url": at_shard(name, f"/enrollments/{row['id']}"),
        }
        for name, one in found.items()
        for row in one.table.rows
    ]
    more: dict[str, str] | None = None
    further: dict[str, str] = {}
    if is_by_id:
        # below what any shard has shown or searched, others may have enrollments that come first
        ends = [int(one.table.more["before"]) for one in found.values() if one.table.more]
        rows = [row for row in rows if row["number"] >= max(ends, default=0)]
        rows.sort(key=lambda row: -row["number"])  # stable: for an id, in the order of the shards
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
            name: at_shard(name, "/search", **one.table.more)
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
    if shard not in shards or not number.isdecimal() or int(number) >= FURTHEST:
        raise WrongQueryError("the parameter before is not from a previous page")
    last = shards.index(shard)
    return {
        name: {"before": str(int(number) + (place > last))} for place, name in enumerate(shards)
    }
