"""Changes made in the console, by the same code as those of the command line."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from math import inf
from typing import Any

import asyncpg
from structlog.typing import FilteringBoundLogger

from sequencerd.errors import UsageError
from sequencerd.storage import bulk, conninfo
from sequencerd.storage.bulk import Done, Selection
from sequencerd.storage.database_errors import brief

ACTIONS = {"retry": "Retried", "skip": "Skipped the step for", "cancel": "Cancelled"}
WAIT = 1.0  # seconds that a page waits for the end of a change
CONNECT_TIMEOUT = 10.0
SHOWN = 20.0  # seconds for which a page shows the report of a change
MOST = 4  # changes at the same time


class Actions:
    """The changes in progress, and their reports for the sessions that requested them."""

    def __init__(self, url: str, log: FilteringBoundLogger) -> None:
        self._url = url
        self._log = log
        self._running: set[asyncio.Task[None]] = set()
        self._reports: dict[
            str, tuple[str, float]
        ] = {}  # by the nonce of the session; and until when

    def report(self, nonce: str) -> str | None:
        """Return the report of the session's change, for a while after its end."""
        now = time.monotonic()
        self._reports = {
            known: report for known, report in self._reports.items() if report[1] > now
        }
        text, _ = self._reports.get(nonce, (None, 0))
        return text

    async def make(
        self,
        nonce: str,
        user: str,
        action: str,
        *,
        id_: int | None,
        sequence: str | None,
        step: str | None,
        failure: str | None,
    ) -> None:
        """Start a change and wait briefly for its end. Raises UsageError."""
        if action not in ACTIONS:
            raise UsageError(f"unknown action {action!r}")
        if id_ is None and not (sequence and step and failure):
            raise UsageError("select an enrollment, or a sequence, a step and a failure")
        if len(self._running) >= MOST:
            raise UsageError("other changes are in progress; try again later")
        ids = None if id_ is None else [id_]
        selection = Selection(ids, None, sequence, step, failure)
        why = f"{user} in the console"
        task = asyncio.create_task(self._guard(nonce, self._make(nonce, action, selection, why)))
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        await asyncio.wait([task], timeout=WAIT)

    async def close(self) -> None:
        """Stop after the current batch."""
        for task in self._running:
            task.cancel()
        if self._running:
            await asyncio.wait(self._running)

    async def _guard(self, nonce: str, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError, TimeoutError) as error:
            self._log.warning("a change in the console failed", error=brief(error))
            self._report(
                nonce,
                f"The database rejected the change: {brief(error)}. Nothing more was changed.",
            )

    def _report(self, nonce: str, text: str, seconds: float | None = None) -> None:
        self._reports[nonce] = (text, time.monotonic() + (SHOWN if seconds is None else seconds))

    async def _make(self, nonce: str, action: str, selection: Selection, why: str) -> None:
        # not one of the pool's: the daemons are to be notified
        connection = await asyncpg.connect(
            **conninfo.arguments(self._url, name="sequencerd console", timeout=CONNECT_TIMEOUT),
            statement_cache_size=0,  # it may lead to a pooler
        )
        total = Done()

        def progress(done: Done) -> None:
            nonlocal total
            total = total.plus(done)
            text = f"{ACTIONS[action]} {total.changed:,} of {len(ids):,}…"
            self._report(nonce, text, inf)

        try:
            ids = await bulk.select(connection, action, selection)
            await bulk.change(connection, action, ids, reason=why, progress=progress)
        finally:
            connection.terminate()
        self._report(nonce, _summary(action, len(ids), total))


def _summary(action: str, selected: int, done: Done) -> str:
    if not selected:
        return "No matching enrollments."
    sentences = [f"{ACTIONS[action]} {bulk.count(done.changed)}", *done.remarks(selected)]
    return " ".join(f"{sentence}." for sentence in sentences)
