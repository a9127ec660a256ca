"""The contents of the pages: each function returns a table, or the data of a page."""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from typing import Any

import asyncpg

from sequencerd.console.causes import causes
from sequencerd.console.lists import COLUMNS, DEFAULT_COLUMNS, EnrollmentPage
from sequencerd.console.mask import MASKED_VALUE, OF_OTHERS, MaskedRow, MaskRow, read_data
from sequencerd.console.query import LAST_CHARACTER, MAX_ROWS, NotFoundError, Query, WrongQueryError
from sequencerd.console.summary import FIRST_TIME, MAX_DUE, Counts, SummaryRow
from sequencerd.console.tables import Column, Table, at
from sequencerd.core.describe import plain
from sequencerd.core.enrollment import NEVER
from sequencerd.definitions import drawing
from sequencerd.definitions.diff import describe_revision
from sequencerd.service.diagnosis import EMAIL_INDEX, EMAILS_SEARCHED
from sequencerd.storage import connections
from sequencerd.storage.statements import QUERIES

MIN_OVERDUE = timedelta(minutes=1)  # as the statement "console_steps" has it
MAX_OFFSET = 5000  # rows that a page may begin after
TOO_FAR = f"a page cannot start after more than {MAX_OFFSET:,} rows"
NOT_ALL_SEARCHED = (
    f"Only the latest {EMAILS_SEARCHED:,} enrollments were searched for the address, so others may"
    " have it. This index finds them all; it slows moves by about 2% and enrolling by 4%:"
)


# --- counts


def overview(counts: Counts, query: Query) -> Table:
    """Return a row for each sequence."""
    steps: defaultdict[str, list[SummaryRow]] = defaultdict(list)
    for step in counts.steps:
        steps[step["sequence"]].append(step)
    failed: Counter[str] = Counter()
    for row in counts.failed:
        failed[row["sequence"]] += row["failed"]
    completed: defaultdict[str, Counter[date]] = defaultdict(Counter)
    goals: Counter[str] = Counter()
    for (name, _, action), times in counts.flow.items():
        if action == "completed":
            completed[name].update(times)
        elif action == "goal":
            goals[name] += times.total()
    days = [(day, day.isoformat()) for day in counts.days]
    rows = [
        {
            "sequence": (name := sequence["name"]),
            "url": at("/sequence", sequence=name),
            "status": sequence["status"],
            "active": sum_known(step["active"] for step in steps[name]),
            "is_capped": any(map(_is_capped, steps[name])),
            "soon": sum(step["soon"] for step in steps[name]),
            "overdue": sum(step["overdue"] for step in steps[name]),
            "overdue_url": _overdue_url(counts, sequence=name),
            "failed": failed[name],
            "failed_url": at("/search", sequence=name, status="failed"),
            "goals": goals[name],
            "completed": {text: completed[name][day] for day, text in days},
            "problems": sum(step["problem"] is not None for step in steps[name]),
        }
        for sequence in counts.sequences
    ]
    columns = (
        Column("sequence", "Sequence", link="url"),
        Column("status", "Status", "code"),
        Column("active", "Active", "number"),
        Column("soon", "Due in an hour", "number", optional=True),
        Column("overdue", "Overdue", "number", optional=True),
        Column("failed", "Failed", "number", optional=True),
        Column("goals", "Goals met", "number", optional=True),
        Column("completed", "Completed by day", "days"),
        Column("problems", "Problems", "number", optional=True),
    )
    return Table("overview", columns, rows, query.given)


def sum_known(numbers: Iterable[int | None]) -> int | None:
    """Return the sum of the numbers that are known; None if none is."""
    known = [number for number in numbers if number is not None]
    return sum(known) if known else None


def _is_capped(step: Mapping[str, Any]) -> bool:
    """Return whether more enrollments of a step may be due than were counted."""
    return bool(step["soon"] + step["overdue"] >= MAX_DUE)


def _overdue_url(counts: Counts, **place: str) -> str:
    """Return the URL of the list of those that were overdue when they were counted."""
    before = f"{counts.at - MIN_OVERDUE:%Y-%m-%d %H:%M:%S}"
    return at("/search", **place, status="active", wakes_before=before)


def steps(counts: Counts, query: Query) -> Table:
    """Return a row for each step of a sequence."""
    name = query.must("sequence")
    failed: Counter[str] = Counter()
    for row in counts.failed:
        if row["sequence"] == name:
            failed[row["step"]] += row["failed"]

    def times(step: str, action: str) -> int:
        return counts.flow.get((name, step, action), Counter()).total()

    branches: dict[str, dict[str, int]] = {}
    for (sequence, step, action), days in counts.flow.items():
        if sequence == name and action.startswith("branch "):
            branches.setdefault(step, {})[action.removeprefix("branch ")] = days.total()

    rows = [
        {
            "step": step["step"],
            "url": at("/sequence", sequence=name, step=step["step"]),
            "type": step["type"],
            "active": step["active"],
            "is_capped": _is_capped(step),
            "soon": step["soon"],
            "overdue": step["overdue"],
            "overdue_url": _overdue_url(counts, sequence=name, step=step["step"]),
            "failed": failed[step["step"]],
            "failed_url": at("/search", sequence=name, step=step["step"], status="failed"),
            "next": times(step["step"], "next") + times(step["step"], "jump"),
            "alt_next": times(step["step"], "altNext"),
            "branches": branches.get(step["step"]),
            "goal": times(step["step"], "goal"),
            "median_stay": counts.stays.get((name, step["step"])),
            "problem": step["problem"],
        }
        for step in counts.steps
        if step["sequence"] == name
    ]
    columns = (
        Column("step", "Step", link="url"),
        Column("type", "Type"),
        Column("active", "Waiting", "number"),
        Column("soon", "Due in an hour", "number", optional=True),
        Column("overdue", "Overdue", "number", optional=True),
        Column("failed", "Failed", "number", optional=True),
        Column("next", "Went next", "number", optional=True),
        Column("alt_next", "Went altNext", "number", optional=True),
        Column("branches", "Branches", "counts", optional=True),
        Column("goal", "Moved to a goal", "number", optional=True),
        Column("median_stay", "Median stay", "duration", optional=True),
        Column("problem", "Problem", optional=True),
    )
    return Table("steps", columns, rows, query.given)


def failures(counts: Counts, query: Query, mask: MaskRow) -> Table:
    """Return a row for each cause of failures, the most frequent first."""
    rows = [
        {
            "cause": cause.text,
            "url": at("/search", status="failed", cause=cause.key),
            "failed": cause.failed,
            "since": cause.since,
            "latest": cause.latest,
            "steps": [f"{sequence}/{step}" for (sequence, step), _ in cause.steps.most_common()],
            "failure": ", ".join(sorted(cause.failures)),
            "last_error": cause.example,
        }
        for cause in causes(counts, mask)
    ]
    columns = (
        Column("cause", "Cause", link="url"),
        Column("failed", "Enrollments", "number"),
        Column("since", "Since", "time"),
        Column("latest", "Latest", "time"),
        Column("steps", "Steps", "list"),
        Column("failure", "Code", "code"),
        Column("last_error", "For example", optional=True, like="cause"),
    )
    return Table("failures", columns, rows, query.given)


def coming(counts: Counts, query: Query) -> Table:
    """Return a row for each hour of the next day in which enrollments wake."""
    hours: dict[datetime, Counter[datetime]] = {}
    sequences: dict[datetime, Counter[str]] = {}
    for row in counts.next:
        hour = row["at"].replace(minute=0)
        hours.setdefault(hour, Counter())[row["at"]] += row["enrollments"]
        sequences.setdefault(hour, Counter())[row["sequence"]] += row["enrollments"]
    rows = []
    for hour, tens in hours.items():
        peak, most = tens.most_common(1)[0]
        until = hour + timedelta(hours=1)
        rows.append(
            {
                "at": hour,
                "url": at(
                    "/search",
                    status="active",
                    wakes_from=f"{hour:%Y-%m-%d %H:%M}",
                    wakes_before=f"{until:%Y-%m-%d %H:%M}",
                ),
                "enrollments": tens.total(),
                "peak": peak,
                "most": most,
                "sequences": [name for name, _ in sequences[hour].most_common()],
            }
        )
    columns = (
        Column("at", "Hour from", "time", link="url"),
        Column("enrollments", "Enrollments", "number"),
        Column("most", "Most in ten minutes", "number"),
        Column("peak", "From", "time"),
        Column("sequences", "Sequences", "list"),
    )
    return Table("coming", columns, rows, query.given)


def health(counts: Counts, query: Query, mask: MaskRow, *, is_masked: bool) -> Table:
    """Return what `doctor` finds, errors first. With masks, no error is shown that may quote
    the data of an enrollment, which is not known here.
    """
    is_hidden = is_masked and any(row["kind"] in OF_OTHERS for row in counts.problems)
    found = sorted(counts.findings, key=lambda one: ("error", "warning", "ok").index(one.level))
    rows = [
        {
            "level": one.level,
            "about": one.about,
            # "b: failed" on a page of all shards
            "url": at("/failures") if one.about.rpartition(" ")[2] == "failed" else None,
            "message": MASKED_VALUE
            if is_hidden and one.about.rpartition(" ")[2] == "problems"
            else mask({"message": one.seen})["message"],
            "advice": mask({"message": one.advice})["message"] or None,
        }
        for one in found
    ]
    columns = (
        Column("about", "Check", link="url"),
        Column("level", "Result", "code"),
        Column("message", "Found"),
        Column("advice", "What to do", optional=True),
    )
    return Table("health", columns, rows, query.given)


# --- rows


async def enrollments(pool: asyncpg.Pool, query: Query, mask: MaskRow) -> Table:
    """Return the enrollments at a step, by wake time."""
    since, skip = query.time("from", FIRST_TIME), query.number("skip", 0)
    if skip > MAX_OFFSET:
        raise WrongQueryError(TOO_FAR)
    found = await connections.read(
        pool,
        "console_waiting",
        query.must("sequence"),
        query.must("step"),
        since,
        skip,
        query.rows + 1,
    )
    rows = [_linked(mask(row)) for row in found[: query.rows]]
    more = None
    if len(found) > query.rows:
        place = _next(rows, "wake_at", since, skip)
        more = place and {**query.given, "from": place[0], "skip": place[1]}
    columns = (
        Column("id", "Enrollment", link="url"),
        Column("subject", "Subject"),
        Column("waits_until", "Waits until", "time", optional=True),
        Column("wake_at", "Next check", "time", optional=True, like="waits_until"),
        Column("entered_at", "At the step since", "time"),
        Column("attempt", "Attempt", "number", optional=True),
        Column("last_error", "Last error", optional=True),
    )
    return Table("enrollments", columns, rows, query.given, more)


def _next(
    rows: Sequence[Mapping[str, Any]], key: str, first: datetime, skip: int
) -> tuple[str, str] | None:
    """Return where the next page begins: the time of the last row, and how many rows with this time
    to skip. None if they are too many. This page begins at `first`, after `skip` rows.
    """
    last = rows[-1][key]
    skip = sum(row[key] == last for row in rows) + (skip if last == first else 0)
    return (str(plain(last)), str(skip)) if skip <= MAX_OFFSET else None


async def schedule(pool: asyncpg.Pool, sequence: str, mask: MaskRow) -> MaskedRow | None:
    """Return the schedule by which a sequence enrolls what a query returns, and its last run."""
    rows = await connections.read(pool, "console_schedule", sequence)
    return mask(rows[0]) if rows else None


async def brake(pool: asyncpg.Pool, sequence: str) -> dict[str, Any] | None:
    """Describe the brake of a sequence."""
    rows = await connections.read(pool, "brakes", sequence)
    if not rows:
        return None
    row = rows[0]
    limit = drawing.describe_brake(row["at_most"], row["per"])
    return {"limit": limit, "until": row["until"], "reason": row["reason"]}


async def revisions(pool: asyncpg.Pool, query: Query, mask: MaskRow) -> Table:
    """Return the changes of a sequence, the latest first."""
    found = await connections.read(
        pool,
        "console_revisions",
        query.must("sequence"),
        query.number("before", 2**31) - 1,
        min(query.rows, 10) + 1,
    )
    shown = found[: min(query.rows, 10)]
    name = query.must("sequence")
    changes = await asyncio.to_thread(
        lambda: [describe_revision(name, row["before"], row["document"]) for row in shown]
    )
    rows = [
        {
            "revision": row["revision"],
            "url": at("/revision", sequence=name, revision=row["revision"]),
            "at": row["at"],
            "by": row["by"],
            "reason": mask({"message": row["reason"]})["message"],
            "changes": "\n".join(lines),
        }
        for row, lines in zip(shown, changes, strict=True)
    ]
    more = None
    if len(found) > len(shown):
        more = {**query.given, "before": str(rows[-1]["revision"])}
    columns = (
        Column("revision", "Revision", "number", link="url"),
        Column("at", "When", "time"),
        Column("by", "By"),
        Column("reason", "Reason", optional=True),
        Column("changes", "Changes"),
    )
    return Table("revisions", columns, rows, query.given, more)


async def search(
    pool: asyncpg.Pool, query: Query, mask: MaskRow, masked: tuple[str, ...]
) -> EnrollmentPage:
    """Find enrollments by id, by the beginning of the subject, or by e-mail address."""
    wanted, skip = query.must("q"), query.number("skip", 0)
    found, remark, advice = await by_text(pool, wanted, masked, MAX_ROWS)
    first = {row["id"]: row for row in found}  # on the first pages; then those with the subject
    is_later = query.get("after") is not None
    rows = [] if is_later else [*first.values()][skip : skip + query.rows]
    more: dict[str, str] | None = None
    if not is_later and skip + len(rows) < len(first):
        more = {**query.given, "skip": str(skip + len(rows))}
    elif "subject" in masked:
        remark = "Subjects are masked, so they are not searched."
    else:
        free = query.rows - len(rows)
        following = await _by_subject(pool, wanted, query, free + 1)
        if len(following) > free:
            given = {key: value for key, value in query.given.items() if key != "skip"}
            place = {"after": str(following[free - 1]["id"])} if free else {"skip": str(len(first))}
            more = {**given, **place}
        rows += [row for row in following[:free] if row["id"] not in first]
    if skip or is_later:
        remark, advice = None, None
    if len(first) >= MAX_ROWS:
        remark = (
            f"Only the latest {MAX_ROWS:,} with this address are listed. Add filters to find all."
        )
    shown = [_linked(mask(row)) for row in rows]
    columns = [COLUMNS[name] for name in DEFAULT_COLUMNS]
    return EnrollmentPage(Table("search", columns, shown, query.given, more, remark=remark), advice)


async def by_text(
    pool: asyncpg.Pool, wanted: str, masked: tuple[str, ...], limit: int
) -> tuple[list[asyncpg.Record], str | None, str | None]:
    """Find enrollments by id or e-mail address. Return also what was not searched, and the SQL that
    helps.
    """
    rows: list[asyncpg.Record] = []
    if wanted.isascii() and wanted.isdecimal() and 0 < int(wanted) < 2**63 - 1:
        rows += await connections.read(pool, "console_by_id", int(wanted))
    if "@" not in wanted:
        return rows, None, None
    if "data.email" in masked:
        return rows, "Addresses are masked, so data.email is not searched.", None
    found, is_whole = await _by_email(pool, wanted, limit)
    return rows + found, *((None, None) if is_whole else (NOT_ALL_SEARCHED, EMAIL_INDEX))


async def _by_subject(
    pool: asyncpg.Pool, wanted: str, query: Query, limit: int
) -> list[asyncpg.Record]:
    after: Any = [wanted, "", -1]  # where the scan of the index begins
    if query.get("after"):
        found = await connections.read(pool, "console_by_id", query.number("after", 0))
        if not found:
            raise WrongQueryError("the enrollment at which the last page ended no longer exists")
        after = [found[0]["subject"], found[0]["sequence"], found[0]["entry"]]
    rows: list[asyncpg.Record] = await connections.read(
        pool, "console_by_subject", wanted, wanted + LAST_CHARACTER, *after, limit
    )
    return rows


async def _by_email(
    pool: asyncpg.Pool, wanted: str, limit: int
) -> tuple[list[asyncpg.Record], bool]:
    """Return the enrollments with an e-mail address, and whether all were searched."""
    async with connections.reading(pool) as connection:
        if await connection.fetchval(QUERIES["console_has_email_index"]):
            return await connection.fetch(QUERIES["console_by_email"], wanted, limit), True
        query = QUERIES["console_by_email_of_latest"]
        rows = await connection.fetch(query, wanted, limit, EMAILS_SEARCHED)
        return rows, await connection.fetchval(QUERIES["console_has_at_most"], EMAILS_SEARCHED)


def _linked(row: MaskedRow) -> MaskedRow:
    return {**row, "url": at(f"/enrollments/{row['id']}")}


# --- one enrollment


@dataclass(frozen=True)
class EnrollmentHistory:
    """An enrollment with its events."""

    row: MaskedRow
    events: Table
    version: str


async def journey(pool: asyncpg.Pool, id_: int, query: Query, mask: MaskRow) -> EnrollmentHistory:
    """Return the state of an enrollment, and its latest events. Raises NotFoundError."""
    before, skip = query.time("before", NEVER), query.number("skip", 0)
    if skip > MAX_OFFSET:
        raise WrongQueryError(TOO_FAR)
    async with connections.reading(pool, isolation="repeatable_read") as connection:
        row = await connection.fetchrow(QUERIES["show"], id_)
        found = await connection.fetch(
            QUERIES["console_history"], id_, before, skip, query.rows + 1
        )
        versions = await connection.fetch(QUERIES["console_versions"], [id_])
    if row is None:
        raise NotFoundError(f"Enrollment {id_} does not exist.")
    known = {"known": read_data(row["data"]), "known_subject": row["subject"]}
    events = [mask({**event, **known}) for event in found[: query.rows]]
    more = None
    if len(found) > query.rows:
        place = _next(events, "at", before, skip)
        more = place and {**query.given, "id": str(id_), "before": place[0], "skip": place[1]}
    columns = (
        Column("at", "When", "time"),
        Column("sequence", "Sequence"),
        Column("step", "Step"),
        Column("visit", "Visit", "number"),
        Column("action", "What", "code"),
        Column("message", "Message"),
        Column("revision", "Revision", "number"),
    )
    table = Table("events", columns, events, {**query.given, "id": str(id_)}, more)
    return EnrollmentHistory(mask(row), table, versions[0]["version"])
