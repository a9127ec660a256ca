"""Changes made in the console, with the same functions as the command line."""

from __future__ import annotations

import asyncio
import itertools
import time
from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from types import MappingProxyType

import asyncpg
from structlog.typing import FilteringBoundLogger

from sequencerd.errors import UsageError
from sequencerd.storage import bulk
from sequencerd.storage.bulk import BulkResult, Selection
from sequencerd.storage.connections import Shard, open_connection
from sequencerd.storage.database_errors import brief

ACTIONS = {
    "retry": "Retried",
    "skip": "Skipped the step for",
    "cancel": "Cancelled",
    "move": "Moved",
    "reevaluate": "Reevaluated",
}
RESPONSE_WAIT = 1.0  # seconds that a page waits for the end of a change
CONNECT_TIMEOUT = 10.0
REPORT_SHOWN_FOR = 20.0  # seconds for which a page shows the report of a change
MAX_RUNNING = 4  # changes at the same time
MAX_KEPT = 50  # changes whose reports are kept


def recorded(user: str, reason: str) -> str:
    """Return what the history records about a change."""
    return f"{user} in the console: {reason}"


@dataclass(eq=False)
class BulkChange:
    """A change of the enrollments that a user selected, with its progress."""

    number: int
    nonce: str  # of the session
    user: str
    reason: str
    action: str
    to: str | None
    ids: dict[Shard, array[int]] = field(default_factory=dict)
    begun_at: datetime = field(default_factory=lambda: datetime.now(UTC))
    done: BulkResult = field(default_factory=BulkResult)
    errors: list[str] = field(default_factory=list)
    ended: float | None = None  # by the monotonic clock
    page: str | None = None  # the address of the page that shows its report

    @property
    def selected(self) -> int:
        """Return how many enrollments were selected."""
        return sum(map(len, self.ids.values()))

    @property
    def report(self) -> str:
        """Describe the state of the change."""
        words = ACTIONS[self.action] + (f" to {self.to}" if self.to else "")
        if self.ended is None:
            return f"{words} {self.done.changed:,} of {self.selected:,}…"
        if not self.selected and not self.errors:
            return "No matching enrollments."
        sentences = [f"{words} {bulk.count(self.done.changed)}"]
        if self.errors:
            sentences += self.errors
        else:
            sentences += self.done.remarks(self.selected)
        return " ".join(f"{sentence}." for sentence in sentences)


def first_number() -> int:
    """Return a number that no change had before a restart, so that a page that is still open does
    not show another change.
    """
    return int(time.time() * 1000)


class BulkChanges:
    """The changes in progress, and those that ended last."""

    def __init__(self, log: FilteringBoundLogger) -> None:
        self._log = log
        self._running: set[asyncio.Task[None]] = set()
        self._changes: dict[int, BulkChange] = {}
        self._numbers = itertools.count(first_number())

    def report(self, nonce: str, page: str) -> str | None:
        """Return the report of the session's latest change if it led to this page, for a while
        after its end.
        """
        for change in reversed(self._changes.values()):
            if change.nonce == nonce:
                is_shown = change.page == page and (
                    change.ended is None or time.monotonic() - change.ended < REPORT_SHOWN_FOR
                )
                return change.report if is_shown else None
        return None

    def get(self, number: int) -> BulkChange | None:
        """Return a change by its number."""
        return self._changes.get(number)

    async def make(
        self,
        nonce: str,
        user: str,
        action: str,
        selections: Mapping[Shard, Selection],
        *,
        reason: str,
        to: str | None,
        without: Mapping[str, str] = MappingProxyType({}),
    ) -> BulkChange:
        """Start a change and wait briefly for its end; `without` are shards that cannot be changed,
        with the reasons. Raises UsageError.
        """
        if len(self._running) >= MAX_RUNNING:
            raise UsageError("other changes are in progress; try again later")
        number = next(self._numbers)
        change = self._changes[number] = BulkChange(number, nonce, user, reason, action, to)
        change.errors += [
            f"Nothing was changed in the shard {name}: {why}" for name, why in without.items()
        ]
        for known in list(self._changes)[:-MAX_KEPT]:
            if self._changes[known].ended is not None:
                del self._changes[known]
        task = asyncio.create_task(self._make(change, selections))
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        await asyncio.wait([task], timeout=RESPONSE_WAIT)
        return change

    async def close(self) -> None:
        """Stop after the current batch."""
        for task in self._running:
            task.cancel()
        if self._running:
            await asyncio.wait(self._running)

    async def _make(self, change: BulkChange, selections: Mapping[Shard, Selection]) -> None:
        try:
            # an error in one shard does not affect the others
            await asyncio.gather(*(self._guard(change, *one) for one in selections.items()))
        finally:
            change.ended = time.monotonic()

    async def _guard(self, change: BulkChange, shard: Shard, selection: Selection) -> None:
        try:
            await self._change(change, shard, selection)
        except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError, TimeoutError) as error:
            self._log.warning("a change in the console failed", error=brief(error))
            where = "The database" if shard.name is None else f"The shard {shard.name}"
            there = "" if shard.name is None else " there"
            change.errors.append(
                f"{where} rejected the change: {brief(error)}. Nothing more was changed{there}"
            )

    async def _change(self, change: BulkChange, shard: Shard, selection: Selection) -> None:
        # not from the pool, whose sessions do not notify daemons
        connection = await open_connection(
            shard,
            name="sequencerd console",
            timeout=CONNECT_TIMEOUT,
            statement_cache_size=0,  # the URL may be that of a pooler
        )

        def progress(done: BulkResult) -> None:
            change.done = change.done.plus(done)

        try:
            ids = await bulk.select(connection, change.action, selection, change.to)
            change.ids[shard] = ids
            await bulk.change(
                connection,
                change.action,
                ids,
                reason=recorded(change.user, change.reason),
                to=change.to,
                progress=progress,
            )
        finally:
            connection.terminate()
