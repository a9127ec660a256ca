"""Ends what expires while it waits for a runner that is down or full.

Nothing is claimed there, so each second the enrollments are looked for whose `expires_at` is past.
Those that came to the step without an evaluation, as by an insert, have none yet: they are
evaluated once, which writes it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from datetime import datetime, timedelta
from typing import NamedTuple

import asyncpg

from sequencerd.core.model import SideEffect
from sequencerd.engine.catalog import Catalog
from sequencerd.engine.clock import Clock
from sequencerd.engine.writer import Writer
from sequencerd.storage import store
from sequencerd.storage.store import Place

TURN = 1.0  # seconds between looks
OVERLAP = timedelta(seconds=5)  # a transaction that takes longer to commit is found by the sweep


class _Known(NamedTuple):
    revision: int  # under which each `expires_at` of the step was written
    until: datetime | None  # who is due since before this has one


class Expiries:
    """`claim` evaluates enrollments of a step under a revision, `left_alone` are not to be."""

    def __init__(
        self,
        pool: asyncpg.Pool,
        catalog: Catalog,
        writer: Writer,
        claim: Callable[[Place, int, Sequence[int]], Awaitable[None]],
        left_alone: Callable[[Place], list[int]],
        *,
        daemon: str,
        clock: Clock,
        batch: int,
    ) -> None:
        self._pool = pool
        self._catalog = catalog
        self._writer = writer
        self._claim = claim
        self._left_alone = left_alone
        self._daemon = daemon
        self._clock = clock
        self._batch = batch
        self._known: dict[Place, _Known] = {}

    def forget(self) -> None:
        """All are looked through once more: what was committed late, or came in another way."""
        self._known = {place: known._replace(until=None) for place, known in self._known.items()}

    async def turn(self) -> None:
        """Looks at each step that waits for a runner."""
        for place in {place for lane in self._writer.lanes.values() for place in lane.waiting}:
            sequence = self._catalog.sequences.get(place[0])
            step = self._catalog.step(place)
            if sequence is None or sequence.paused or step is None:
                continue
            if isinstance(step.behaviour, SideEffect) and step.behaviour.expires is not None:
                before: list[int] | None = None
                while not self._writer.stopping:
                    ids = await self._look(place, sequence.revision)
                    if len(ids) < self._batch or ids == before:  # locked, or changed meanwhile
                        break
                    before = ids

    async def _look(self, place: Place, revision: int) -> list[int]:
        """Evaluates a batch of a step. Returns whom it has found."""
        now = self._clock.now()
        known = self._known.get(place)
        async with store.connection(self._pool) as connection:
            if known is None or known.revision != revision:
                await store.forget_expiries(connection, place)
                known = self._known[place] = _Known(revision, None)
            ids = await store.expired_ids(
                connection,
                place,
                now,
                known.until,
                self._batch,
                daemon=self._daemon,
                but=self._left_alone(place),
            )
        if ids:
            await self._claim(place, revision, ids)
        if len(ids) < self._batch:
            self._known[place] = _Known(revision, now - OVERLAP)
        return ids
