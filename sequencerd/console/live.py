"""Notify open pages of changes, with one query for all of them."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator

import asyncpg

from sequencerd.console.summary import UNREADABLE_VERSION, Summary
from sequencerd.storage import connections

POLL_INTERVAL = 1.0  # seconds between polls of the enrollments that pages show
KEEPALIVE_INTERVAL = 15.0  # seconds of silence after which something is sent, for proxies
COUNTS_TOPIC = 0
"""The topic of pages that show counts; the topic of other pages is an enrollment's id."""


class LiveTopics:
    """The topics that open pages watch, with their latest versions."""

    def __init__(self, pool: asyncpg.Pool, summary: Summary) -> None:
        self._pool = pool
        self._summary = summary
        self._watched: Counter[int] = Counter()
        self._versions: dict[int, str] = {}
        self._turn = asyncio.Event()  # replaced whenever versions are read
        self._open = asyncio.Event()
        self.closing = False
        summary.changed = self._announce

    def _announce(self) -> None:
        self._versions[COUNTS_TOPIC] = self._summary.version
        turn, self._turn = self._turn, asyncio.Event()
        turn.set()

    def version(self, topic: int) -> str | None:
        """Return the latest known version of a topic."""
        return self._versions.get(topic)

    def close(self) -> None:
        """End all streams."""
        self.closing = True
        self._announce()

    async def keep(self) -> None:
        """Poll while a page is open, until cancelled."""
        while True:
            await self._open.wait()
            if self._watched[COUNTS_TOPIC]:
                self._summary.record_view()
            ids = [id_ for id_, pages in self._watched.items() if id_ != COUNTS_TOPIC and pages > 0]
            if ids:
                try:
                    rows = await connections.read(self._pool, "console_versions", ids)
                    new = {row["id"]: row["version"] for row in rows}
                except Exception:  # the pages request the counts and get the reason
                    new = dict.fromkeys(ids, UNREADABLE_VERSION)
                if any(self._versions.get(id_) != version for id_, version in new.items()):
                    self._versions |= new
                    self._announce()
            await asyncio.sleep(POLL_INTERVAL)

    async def stream(self, topic: int, known: str) -> AsyncIterator[str]:
        """Yield the events for a page that has a version: each newer one."""
        self._watched[topic] += 1
        self._open.set()
        try:
            yield f": \nid: {known}\nretry: 1000\n\n"
            while not self.closing:
                turn = self._turn
                version = self._versions.get(topic, known)
                if version != known:
                    known = version
                    yield f"event: changed\nid: {known}\ndata:\n\n"
                try:
                    await asyncio.wait_for(turn.wait(), KEEPALIVE_INTERVAL)
                except TimeoutError:
                    yield ":\n\n"
        finally:
            self._watched[topic] -= 1
            if self._watched[topic] <= 0:
                del self._watched[topic]
                self._versions.pop(topic, None)
            if not self._watched:
                self._open.clear()
