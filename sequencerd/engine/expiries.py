"""End side effects that expire while their enrollments wait for a runner that is down or full.

Nothing is claimed at such steps, so enrollments whose `expires_at` has passed are searched every
second. Those that came to the step without an evaluation, as by an insert, have no `expires_at`
yet: they are evaluated once, which writes it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import NamedTuple

from sequencerd.core.enrollment import StepKey
from sequencerd.core.model import SideEffect
from sequencerd.engine.catalog import Catalog
from sequencerd.engine.claims import Claims
from sequencerd.engine.environment import Environment
from sequencerd.engine.executors import Executors
from sequencerd.storage import connections
from sequencerd.storage.locking import expired_ids, forget_expiries

SEARCH_INTERVAL = 1.0  # seconds between searches
COMMIT_DELAY = timedelta(seconds=5)
"""A transaction that commits later is found by the sweep."""


class _KnownExpiry(NamedTuple):
    revision: int  # the definition with which each `expires_at` of the step was written
    until: datetime | None  # all that were due before this time have one


@dataclass(eq=False)
class Expiries:
    """Finds expired enrollments, and claims them."""

    _env: Environment
    _catalog: Catalog
    _executors: Executors
    _claims: Claims
    _known: dict[StepKey, _KnownExpiry] = field(default_factory=dict)

    def forget(self) -> None:
        """Search all due enrollments once more, because some may have been committed late."""
        self._known = {
            step_key: known._replace(until=None) for step_key, known in self._known.items()
        }

    async def run(self) -> None:
        """Claim what has expired at the steps that wait for a runner."""
        for step_key in self._executors.waiting():
            sequence = self._catalog.sequences.get(step_key[0])
            step = self._catalog.step(step_key)
            if sequence is None or sequence.paused or step is None:
                continue
            if isinstance(step.behaviour, SideEffect) and step.behaviour.expires is not None:
                before: list[int] | None = None
                while not self._env.stopping.is_set():
                    ids = await self._claim_expired(step_key, sequence.revision)
                    if len(ids) < self._env.batch or ids == before:  # locked or changed meanwhile
                        break
                    before = ids

    async def _claim_expired(self, step_key: StepKey, revision: int) -> list[int]:
        """Claim a batch of a step. Return the ids that were found."""
        now = self._env.clock.now()
        known = self._known.get(step_key)
        async with connections.borrow(self._env.pool) as connection:
            if known is None or known.revision != revision:
                await forget_expiries(connection, step_key)
                known = self._known[step_key] = _KnownExpiry(revision, None)
            ids = await expired_ids(
                connection,
                step_key,
                now,
                known.until,
                self._env.batch,
                daemon=self._env.daemon,
                excluding=self._claims.excluded(step_key),
            )
        if ids:
            await self._claims.claim_some(step_key, revision, ids)
        if len(ids) < self._env.batch:
            self._known[step_key] = _KnownExpiry(revision, now - COMMIT_DELAY)
        return ids
