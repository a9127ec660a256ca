"""Lists of enrollments: combined filters, sorting and columns, all in the page's address."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import asyncpg

from sequencerd.console.causes import FailureCause
from sequencerd.console.mask import MaskRow
from sequencerd.console.query import Query, WrongQueryError
from sequencerd.console.tables import Column, Table, at
from sequencerd.storage.bulk import Selection
from sequencerd.storage.connections import reading
from sequencerd.storage.statements import QUERIES

FILTERS = (
    "sequence",
    "step",
    "status",
    "failure",
    "cause",
    "topic",
    "where",
    "age",
    "wakes_from",
    "wakes_before",
)
"""The query parameters that filter; `q` searches for a subject."""

COLUMNS = {
    column.key: column
    for column in (
        Column("id", "Enrollment", link="url"),
        Column("subject", "Subject"),
        Column("sequence", "Sequence"),
        Column("step", "Step"),
        Column("status", "Status", "code"),
        Column("waits_until", "Waits until", "time", optional=True),
        Column("wake_at", "Next check", "time", optional=True, like="waits_until"),
        Column("entered_at", "At the step since", "time"),
        Column("created_at", "Enrolled", "time"),
        Column("ended_at", "Ended", "time", optional=True),
        Column("attempt", "Attempts", "number"),
        Column("failure", "Failure", "code"),
        Column("last_error", "Last error", optional=True),
    )
}
DEFAULT_COLUMNS = (
    "id",
    "subject",
    "sequence",
    "step",
    "status",
    "waits_until",
    "wake_at",
    "last_error",
)
MAX_COLUMNS = 20

FIRST_SEARCHED = 20_000  # ids that are searched first; then up to four times as many, and so on
SEARCH_SECONDS = 0.05  # seconds for a search; the next page continues where it ended
EMPTY_SECONDS = 1.0  # seconds for a search that has found nothing yet
MAX_INDEXED = 10_000  # enrollments that an index finds, if the first search does not fill the page
MAX_SORTED = 2000  # enrollments that are sorted by another column than the id
MAX_ID = 2**63 - 1

_UNITS = {"m": "minutes", "h": "hours", "d": "days", "w": "weeks"}


@dataclass(frozen=True)
class EnrollmentPage:
    """A page of a list, with its notices."""

    table: Table
    advice: str | None = None  # SQL
    further: Mapping[str, str] = field(default_factory=dict)  # URLs of next pages, by shard


def selection_of(
    query: Query,
    masked: Sequence[str],
    causes: Sequence[FailureCause],
    topics: Mapping[str, str | None],
    now: datetime,
) -> Selection:
    """Return the selection in the query parameters. Raises WrongQueryError."""
    path, value = _where(query.get("where"), masked)
    patterns = None
    if key := query.get("cause"):
        patterns = next((cause.patterns for cause in causes if cause.key == key), [])
    if (prefix := query.get("q")) and "subject" in masked:
        raise WrongQueryError("subjects are masked, so they are not searched")
    age, topic, status = query.get("age"), query.get("topic"), query.get("status")
    if status not in (None, "active", "completed", "failed", "cancelled"):
        raise WrongQueryError(f"there is no status {status}")
    return Selection(
        ids=query.numbers("id"),
        sequence=query.get("sequence"),
        step=query.get("step"),
        failure=query.get("failure"),
        status=status,
        prefix=prefix,
        sequences=[name for name, of in topics.items() if of == topic] if topic else None,
        wakes_from=query.time_or_none("wakes_from"),
        wakes_before=query.time_or_none("wakes_before"),
        entered_before=now - _age(age) if age else None,
        ended_by=query.time_or_none("ended_by"),
        path=path,
        value=value,
        causes=patterns,
    )


def _where(text: str | None, masked: Sequence[str]) -> tuple[list[str] | None, str | None]:
    """Return the path and the value in a filter such as "data.plan = pro"."""
    if text is None:
        return None, None
    name, is_filter, value = text.partition("=")
    words = name.split()
    if not is_filter or len(words) != 1:
        raise WrongQueryError("write the data filter as in data.plan = pro")
    path = words[0].removeprefix("data.").split(".")
    _check_path(path, masked)
    return path, value.strip()


def _check_path(path: Sequence[str], masked: Sequence[str]) -> None:
    """Refuse a path to masked values, from above or below. All items of a list count alike."""
    wanted = [part for part in path if not part.isdecimal()]
    for other in masked:
        hidden = [part for part in other.split(".")[1:] if not part.isdecimal()]
        shorter = min(len(wanted), len(hidden))
        if other != "subject" and wanted[:shorter] == hidden[:shorter]:
            raise WrongQueryError(f"{other} is masked, so it is not searched")


def _age(text: str) -> timedelta:
    found = re.fullmatch(r"\s*([0-9]{1,5})\s*([mhdw])[a-z]*\s*", text)
    if not found:
        raise WrongQueryError("write the time as in 3 d, with m, h, d or w")
    return timedelta(**{_UNITS[found[2]]: int(found[1])})


async def enrollments(
    pool: asyncpg.Pool, query: Query, selection: Selection, mask: MaskRow
) -> EnrollmentPage:
    """Return the enrollments that match, the latest first or sorted by a column."""
    columns = _columns(query)
    sort = query.get("sort") or "-id"
    key = sort.removeprefix("-")
    if key not in COLUMNS and not key.startswith("data."):
        raise WrongQueryError(f"there is no column {key} to sort by")
    if sort == "-id":
        before = min(query.number("before", MAX_ID), MAX_ID)
        rows, searched_to = await _search(pool, selection, before, query.rows + 1)
        shown, more, remark = rows[: query.rows], None, None
        if len(rows) > query.rows:
            more = {**query.given, "before": str(shown[-1]["id"])}
        elif searched_to > 1:
            more = {**query.given, "before": str(searched_to)}
            remark = f"Searched down to enrollment {searched_to:,}; the next page continues there."
        page = _shown(shown, [column.key for column in columns], mask)
        return EnrollmentPage(Table("search", columns, page, query.given, more, sort, remark))
    rows, searched_to = await _search(pool, selection, MAX_ID, MAX_SORTED + 1)
    is_part = len(rows) > MAX_SORTED or searched_to > 1
    every = _shown(rows[:MAX_SORTED], [key, *(column.key for column in columns)], mask)
    every.sort(key=lambda row: comparable(row[key]), reverse=sort.startswith("-"))
    skip = query.number("skip", 0)
    more = None
    if skip + query.rows < len(every):
        more = {**query.given, "skip": str(skip + query.rows)}
    remark = None
    if is_part:
        remark = f"Only the latest {len(every):,} matches are sorted. Add filters to sort them all."
    page = every[skip : skip + query.rows]
    return EnrollmentPage(Table("search", columns, page, query.given, more, sort, remark))


def without_usual_columns(query: Query) -> Query:
    """Return a query that does not name the columns if they are the usual ones, as a form does."""
    names = (query.get("columns") or "").split(",")
    if {"id", *names} != {*DEFAULT_COLUMNS}:
        return query
    given = {name: value for name, value in query.given.items() if name != "columns"}
    return Query(given, query.rows)


def _columns(query: Query) -> list[Column]:
    names = (query.get("columns") or ",".join(DEFAULT_COLUMNS)).split(",")
    columns = []
    for name in dict.fromkeys(["id", *filter(None, map(str.strip, names))]):
        if name.startswith("data."):
            columns.append(Column(name, name))
        elif name in COLUMNS:
            columns.append(COLUMNS[name])
        else:
            raise WrongQueryError(
                f"there is no column {name}; write paths in the data as data.{name}"
            )
    if len(columns) > MAX_COLUMNS:
        raise WrongQueryError(f"a list has at most {MAX_COLUMNS} columns")
    return columns


async def _search(
    pool: asyncpg.Pool, selection: Selection, before: int, most: int
) -> tuple[list[asyncpg.Record], int]:
    """Return the latest matches, and the lowest id that was searched: 1 if all were. The filters
    are applied to a limited range of ids at a time, until the time is up, or to the few ids that an
    index finds for them.
    """
    rows: list[asyncpg.Record] = []
    begun = time.perf_counter()
    async with reading(pool) as connection:
        last = await connection.fetchval(QUERIES["console_last_id"], before)
        if last is None:
            return [], 1
        top, window = last + 1, FIRST_SEARCHED
        while top > 1:
            first = max(top - window, 1)
            started = time.perf_counter()
            rows += await connection.fetch(
                QUERIES["console_list"], *selection.parameters(), first, top, most - len(rows)
            )
            top = first
            if len(rows) >= most:
                break
            if (
                window == FIRST_SEARCHED
                and (ids := await _few_by_index(connection, selection)) is not None
            ):
                selection, window = selection._replace(ids=ids), top
                continue
            took = time.perf_counter() - started
            left = begun + (SEARCH_SECONDS if rows else EMPTY_SECONDS) - time.perf_counter()
            if took > left:
                break
            if 4 * took < left:
                window *= 4
    return rows, top


async def _few_by_index(connection: asyncpg.Connection, selection: Selection) -> list[int] | None:
    """Return the ids among which all matches are, if an index finds them and they are few."""
    place = selection.sequence, selection.step
    period = selection.wakes_from, selection.wakes_before
    arguments: list[object]
    if selection.ids is not None:
        return [*selection.ids]
    if selection.status == "failed" or selection.causes is not None:
        query, arguments = "console_failed_ids", [*place]
    elif selection.sequence is not None and (selection.status == "active" or any(period)):
        query, arguments = "console_active_ids", [*place, *period]
    else:
        return None
    rows = await connection.fetch(QUERIES[query], *arguments, MAX_INDEXED + 1)
    return [row["id"] for row in rows] if len(rows) <= MAX_INDEXED else None


def _shown(
    rows: Sequence[asyncpg.Record], keys: Sequence[str], mask: MaskRow
) -> list[dict[str, Any]]:
    paths = [key for key in keys if key.startswith("data.")]
    shown = []
    for row in rows:
        made = mask(row)
        made["url"] = at(f"/enrollments/{row['id']}")
        for path in paths:
            made[path] = _inside(made["data"], path.split(".")[1:])
        shown.append(made)
    return shown


def _inside(data: Any, path: Sequence[str]) -> Any:
    for part in path:
        if isinstance(data, dict):
            data = data.get(part)
        elif isinstance(data, list) and part.isdecimal() and int(part) < len(data):
            data = data[int(part)]
        else:
            return None
    return data


def comparable(value: Any) -> tuple[int, Any]:
    """Return a key that sorts values of different types: missing ones first, then numbers, times,
    texts.
    """
    match value:
        case None:
            return 0, 0
        case bool() | int() | float():
            return 1, value
        case datetime():
            return 2, value.astimezone(UTC).timestamp() if value.year < 9999 else float("inf")
        case _:
            return 3, str(value)
