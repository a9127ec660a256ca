"""The numbers of enrollments and events: counted in the background, once for all pages, and only
while a page is open.

A count is followed by a pause nine times as long, so that it takes at most a tenth of one
connection, however much there is to count. The pages show when the count was made.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from statistics import median
from typing import Any

import asyncpg
from structlog.typing import FilteringBoundLogger

from sequencerd.core.enrollment import StepKey
from sequencerd.service.diagnosis import CHECKS, Diagnosis, run_check
from sequencerd.storage.connections import borrow, counting, read, reading
from sequencerd.storage.database_errors import LOST_ERRORS, brief
from sequencerd.storage.statements import QUERIES

MAX_FAILED = 1_000_000  # failed enrollments that are counted
MAX_DUE = 100_000  # enrollments of a step that are due
MAX_CAUSES = 50_000  # failed enrollments whose cause is determined
MAX_GROUPS = 1000  # of failed enrollments with the same cause and step
COMING_PERIOD = timedelta(days=1)  # how far ahead upcoming checks are shown
MAX_COMING = 100_000  # of a step
MAX_PROBLEMS = 100  # of those that daemons report
HISTORY_DAYS = 14
PAUSE_FACTOR = 9  # length of the pause after a count, as a multiple of its duration
CHECK_INTERVAL = 10.0  # seconds, at least
MIN_PAUSE = 1.0  # seconds between counts
ERROR_PAUSE = 2.0  # seconds
STATEMENT_TIMEOUT = 60.0  # seconds
COUNTED_AFTER_VIEW = 30.0  # seconds for which counting continues after the last view
PAGE_WAIT = 0.05  # seconds for which a page waits for the first counts, or those after a long pause
MAX_AGE = timedelta(seconds=5)

COMMIT_DELAY = timedelta(seconds=10)
"""Events are not committed in the order of their times: the latest are not counted yet."""

UNCOUNTED_HISTORY = timedelta(hours=2)
"""The part of the history that is read if no daemon counts it by hour."""

FIRST_TIME = datetime(1900, 1, 1, tzinfo=UTC)
EVENTS_PER_ROUND = 5000  # events that are read in each round
MAX_STAYS = 500  # of a step that are kept

UNREADABLE_VERSION = "lost"
"""The version of a topic that cannot be read: pages then request it and get the error."""

SummaryRow = Mapping[str, Any]
Seconds = float | Mapping[str, float]
"""A duration; a median of several shards for each of them."""

DailyFlow = Mapping[tuple[str, str, str], Counter[date]]
"""Counts by sequence, step and action, for each day."""


@dataclass(frozen=True)
class Counts:
    """Counts as of a time."""

    at: datetime
    sequences: list[SummaryRow]
    steps: list[SummaryRow]
    failed: list[SummaryRow]
    causes: list[SummaryRow]  # of failures, by step
    next: list[SummaryRow]  # what is checked in the next day, by ten minutes
    problems: list[SummaryRow]  # that daemons report
    findings: list[Diagnosis]  # of doctor
    flow: DailyFlow
    stays: Mapping[StepKey, Seconds]  # the median
    flow_since: date | None  # from this day on the flow is known
    recent: list[SummaryRow]  # events that the daemon has not counted by hour
    recent_since: datetime | None
    activity_until: datetime | None  # that the daemon has counted by hour
    has_more_causes: bool = False

    @property
    def days(self) -> list[date]:
        """The days of the flow, the last is today."""
        today = self.at.astimezone(UTC).date()
        return [today - timedelta(days=n) for n in reversed(range(HISTORY_DAYS))]


class Summary:
    """Keeps the counts up to date; `changed` is called when there are new ones."""

    def __init__(self, pool: asyncpg.Pool, log: FilteringBoundLogger) -> None:
        self.changed: Callable[[], None] = lambda: None
        self.missing: Mapping[str, str] = {}  # shards that are not counted, with the reason
        self._pool = pool
        self._log = log
        self._counts: Counts | None = None
        self._error: BaseException | None = None
        self._viewed_at = float("-inf")
        self._wanted = asyncio.Event()
        self._next: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._flow: defaultdict[tuple[str, str, str], Counter[date]] = defaultdict(Counter)
        self._stays: defaultdict[StepKey, deque[float]] = defaultdict(
            lambda: deque(maxlen=MAX_STAYS)
        )
        self._counted_to: datetime | None = None
        self._known_since: date | None = None
        self._findings: list[Diagnosis] = []
        self._checks_due = float("-inf")
        self._kept: dict[str, list[SummaryRow]] = {}  # of statements that are repeated less often
        self._kept_due = float("-inf")
        self._recent: tuple[list[SummaryRow], datetime | None, datetime | None] = [], None, None
        self._details_took = 0.0  # in this round, the checks included
        self._past: list[date] = []  # days that are yet to be counted, the latest at the end

    @property
    def version(self) -> str:
        """Return a version that changes with the counts, and when they can no longer be read."""
        if self._error is not None:
            return UNREADABLE_VERSION
        return self._counts.at.isoformat() if self._counts else ""

    def record_view(self) -> None:
        """Record that a page is open."""
        self._viewed_at = time.monotonic()
        self._wanted.set()

    async def get(self, first: float = PAGE_WAIT) -> Counts | None:
        """Return the latest counts; None if there are none after so many seconds. Raises the error
        that prevents counting.
        """
        was_idle = not self._wanted.is_set()
        self.record_view()
        if self._counts is None or (was_idle and datetime.now(UTC) - self._counts.at > MAX_AGE):
            patience = first if self._counts is None else PAGE_WAIT
            with suppress(TimeoutError):
                await asyncio.wait_for(asyncio.shield(self._next), patience)
        if self._error is not None:
            raise self._error
        return self._counts

    async def keep(self) -> None:
        """Count until cancelled."""
        while True:
            await self._wanted.wait()
            if time.monotonic() - self._viewed_at > COUNTED_AFTER_VIEW:
                self._wanted.clear()
                continue
            begun, self._details_took = time.monotonic(), 0.0
            least, factor = ERROR_PAUSE, PAUSE_FACTOR
            try:
                self._counts = await self._count()
                least, self._error = MIN_PAUSE, None
            except (TimeoutError, asyncpg.QueryCanceledError) as error:
                # it is slow, but available: the previous counts are still worth showing
                self._error = None
                self._log.warning("the console cannot count in time", error=brief(error))
            except Exception as error:  # the pages say that counting failed
                if self._error is None:
                    self._log.warning("the console cannot count", error=brief(error))
                self._error = error
                if isinstance(error, LOST_ERRORS):
                    factor = 0  # however long it took: no page is shown until the next count
            done, self._next = self._next, asyncio.get_running_loop().create_future()
            done.set_result(None)
            self.changed()
            took = time.monotonic() - begun - self._details_took
            await asyncio.sleep(max(least, factor * took))

    async def _count(self) -> Counts:
        (clock,) = await read(self._pool, "server_time")
        now = clock["clock_timestamp"]
        sequences = await read(self._pool, "console_sequences")
        steps = await self._read("console_steps", now, MAX_DUE)
        failed = await self._read("console_failed", MAX_FAILED)
        await self._renew_kept(now)
        counted = self._kept.get("console_active")
        active = {(row["sequence"], row["step"]): row["active"] for row in counted or ()}
        unknown = None if counted is None else 0
        steps = [
            {**step, "active": active.get((step["sequence"], step["step"]), unknown)}
            for step in steps
        ]
        problems = await read(self._pool, "reported_problems", None, MAX_PROBLEMS)
        if self._counts is not None:  # the first page waits for it
            await self._count_flow(now)
        await self._examine()
        stays = {place: median(kept) for place, kept in self._stays.items() if kept}
        flow = {key: Counter(days) for key, days in self._flow.items()}
        recent, recent_since, activity_until = self._recent
        causes = self._kept.get("console_causes", [])
        return Counts(
            now,
            sequences,
            steps,
            failed,
            causes,
            self._kept.get("console_next", []),
            problems,
            self._findings,
            flow,
            stays,
            self._known_since,
            recent,
            recent_since,
            activity_until,
            len(causes) >= MAX_GROUPS or sum(row["failed"] for row in causes) >= MAX_CAUSES,
        )

    async def _read(self, query: str, *arguments: object) -> list[SummaryRow]:
        """Return the rows of a statement that reads many, without parallel workers."""
        async with borrow(self._pool) as acquired, counting(acquired) as connection:
            await connection.execute(QUERIES["without_parallel_workers"])
            rows: list[SummaryRow] = await connection.fetch(
                QUERIES[query], *arguments, timeout=STATEMENT_TIMEOUT
            )
            return rows

    async def _renew_kept(self, now: datetime) -> None:
        """Count what may take longer, and rest longer after it. What takes too long remains as it
        was.
        """
        begun = time.monotonic()
        if begun < self._kept_due:
            return
        for query, arguments in (
            ("console_active", ()),
            ("console_causes", (MAX_CAUSES, MAX_GROUPS)),
            ("console_next", (_tens(now), now + COMING_PERIOD, MAX_COMING)),
        ):
            try:
                self._kept[query] = await self._read(query, *arguments)
            except (TimeoutError, asyncpg.QueryCanceledError) as error:
                self._log.warning(
                    "the console cannot count in time", statement=query, error=brief(error)
                )
        await self._read_recent(now)
        took = time.monotonic() - begun
        self._details_took += took
        self._kept_due = time.monotonic() + PAUSE_FACTOR * took

    async def _read_recent(self, now: datetime) -> None:
        """Count the events that the daemon has not counted by hour."""
        (found,) = await read(self._pool, "console_activity_until")
        until = found["counted_until"]
        since = max(_tens(now).replace(minute=0) - UNCOUNTED_HISTORY, until or FIRST_TIME)
        try:
            rows = await self._read("console_activity_recent", since, now + COMING_PERIOD)
        except (TimeoutError, asyncpg.QueryCanceledError) as error:
            self._log.warning("the console cannot count recent events", error=brief(error))
        else:
            self._recent = rows, since, until

    async def _examine(self) -> None:
        """Run the checks of doctor from time to time, but not while the first page waits."""
        begun = time.monotonic()
        if self._counts is None or begun < self._checks_due:
            return
        findings = []
        for about, check in CHECKS.items():
            async with reading(self._pool) as connection:
                findings.append(await run_check(about, check, connection))
        self._findings = findings
        took = time.monotonic() - begun
        self._details_took += took
        self._checks_due = time.monotonic() + max(CHECK_INTERVAL, PAUSE_FACTOR * took)

    async def _count_flow(self, now: datetime) -> None:
        """Count what has happened since the last time, and one more day of the past."""
        until = now - COMMIT_DELAY
        today = until.astimezone(UTC).date()
        if self._counted_to is None or until - self._counted_to > timedelta(days=HISTORY_DAYS):
            self._flow.clear()
            self._counted_to = _midnight(today)
            self._known_since = today
            self._past = [today - timedelta(days=n) for n in range(HISTORY_DAYS - 1, 0, -1)]
        elif self._past:
            day = self._past.pop()
            try:
                await self._add_flow(_midnight(day), _midnight(day + timedelta(days=1)))
                self._known_since = day
            except (TimeoutError, asyncpg.QueryCanceledError):
                self._past = []  # the days before it are no smaller
        if until > self._counted_to:
            await self._add_flow(self._counted_to, until)
            self._counted_to = until
        first = today - timedelta(days=HISTORY_DAYS - 1)
        for days in self._flow.values():
            for day in [day for day in days if day < first]:
                del days[day]

    async def _add_flow(self, since: datetime, until: datetime) -> None:
        rows = await self._read("console_flow", since, until)
        every = 1 + sum(row["times"] for row in rows) // EVENTS_PER_ROUND
        stays = await self._read("console_stays", since, until, every, EVENTS_PER_ROUND)
        for row in rows:
            self._flow[row["sequence"], row["step"], row["action"]][row["day"]] += row["times"]
        for row in stays:
            if row["seconds"] is not None:
                self._stays[row["sequence"], row["step"]].append(row["seconds"])


def _tens(time: datetime) -> datetime:
    """Return the beginning of the ten minutes that contain a time."""
    return time.replace(minute=time.minute // 10 * 10, second=0, microsecond=0)


def _midnight(day: date) -> datetime:
    return datetime(day.year, day.month, day.day, tzinfo=UTC)
