"""Write the results of side effects: advance the enrollments whose leases are still valid.

No result is lost: if the database refuses what follows from one, the result is written alone, or
quarantined.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from sequencerd.core.decision import Event
from sequencerd.core.enrollment import StepKey
from sequencerd.core.faults import printable
from sequencerd.core.task import (
    Answer,
    Failed,
    Result,
    Undeliverable,
    describe_result,
    may_have_taken_place,
)
from sequencerd.engine.background import ERROR_PAUSE, LOCKED_PAUSE
from sequencerd.engine.backpressure import Backlog
from sequencerd.engine.batch import MAX_UNLOCKED, Batch
from sequencerd.engine.catalog import Catalog
from sequencerd.engine.environment import Environment
from sequencerd.engine.executors import Executors, Finished, Leased
from sequencerd.engine.leases import Leases
from sequencerd.engine.moves import Moves
from sequencerd.engine.quarantine import Quarantine, isolate, refusal_of
from sequencerd.engine.slow_evaluations import SlowEvaluations
from sequencerd.storage import locking, suppressions
from sequencerd.storage.database_errors import LOST_ERRORS, brief, is_data_error
from sequencerd.storage.limits import Reserved
from sequencerd.storage.writes import NotWritten, Unchanged

SLOW_PAUSE = 0.25  # seconds until a batch with slow evaluations is continued
DIFFERING_FOR = timedelta(seconds=5)
"""For how long many equal results of a step are locked first, after some had different outcomes."""


@dataclass(eq=False)
class Results:
    """Writes results."""

    _env: Environment
    _catalog: Catalog
    _executors: Executors
    _moves: Moves
    _leases: Leases
    _backlog: Backlog
    _quarantine: Quarantine
    _differing_until: dict[StepKey, datetime] = field(default_factory=dict)

    async def write(self) -> None:
        """Write results in batches until cancelled."""
        while True:
            await self._backlog.changed.wait()
            self._backlog.changed.clear()
            while self._backlog.is_ready:
                was_full = self._backlog.is_full
                results = self._backlog.take(self._env.batch)
                if was_full:
                    self._executors.resume()
                left, common = await self.write_in_parts(results)
                if common is not None:
                    self._env.log.warning("results wait for the database", error=brief(common))
                    await asyncio.sleep(ERROR_PAUSE)
                    if isinstance(common, LOST_ERRORS):
                        left = await self._still_held(left)
                    self._backlog.put_back(left)

    async def write_in_parts(
        self, results: Sequence[Finished]
    ) -> tuple[list[Finished], Exception | None]:
        """Write results. Return those that were not written, and the error if no result has caused
        it.
        """
        return await isolate(results, self._write_batch, self._refused, self._env.probe)

    async def _refused(self, finished: Finished, error: Exception) -> None:
        """Write a result alone if what follows from it cannot be written, so that it is not lost.

        What follows then fails by itself. If the result cannot be written alone either, the
        enrollment fails, or is quarantined.
        """
        leased, _ = finished
        left = [finished]
        refusal: Exception | None = error
        if not leased.executor.is_lookup:
            refusal = await refusal_of(self._write_batch(left, result_only=True))
        if refusal is not None and is_data_error(refusal):
            refusal = await refusal_of(self._write_batch(left, failure=refusal))
        if refusal is not None and left:  # it was not written despite the error
            at = leased.enrollment
            self._quarantine.add(at.id, (at.sequence, at.step), refusal, finished)

    async def _write_batch(
        self,
        results: list[Finished],
        *,
        result_only: bool = False,
        failure: Exception | None = None,
    ) -> None:
        """Advance enrollments by the results of their side effects: by the result only, as far as
        possible, or to a failure.
        """
        try:
            await self._try_batch(results, result_only=result_only, failure=failure)
        except LOST_ERRORS:
            results[:] = await self._still_held(results)
            raise

    async def _still_held(self, results: Sequence[Finished]) -> list[Finished]:
        """Drop the results that were written by a commit whose answer was lost."""
        held = await self._leases.held(leased for leased, _ in results)
        self._leases.forget(leased for leased, _ in results if leased.fence not in held)
        return [one for one in results if one[0].fence in held]

    async def _try_batch(
        self, results: Sequence[Finished], *, result_only: bool, failure: Exception | None
    ) -> None:
        """Write results by the known definitions. Those of sequences whose definitions have changed
        are written when these have been read.
        """
        now = self._env.clock.now()
        if failure is None and not result_only and await self._write_unlocked(results, now):
            return
        known = [leased.enrollment for leased, _ in results]
        batch = Batch()
        # of changed sequences, locked by another session, or left over by slow evaluations
        later: list[Finished] = []
        pause = LOCKED_PAUSE
        async with self._leases.writing(batch) as connection:
            locked = await locking.lock(connection, known, self._leases.transactions)
            revisions = locked.revisions.items()
            if changed := {name for name, at in revisions if self._revision(name) != at}:
                self._catalog.request(changed)
            batch.places, batch.transaction = locked.places, locked.transaction
            missing = [enrollment.id for enrollment in known if enrollment.id not in locked.ids]
            exist = await locking.existing(connection, missing) if missing else set()
            slow = SlowEvaluations()
            for number, (leased, result) in enumerate(results, 1):
                enrollment = locked.unchanged.get(leased.enrollment.id)
                # its sequence may have another name than in memory
                if leased.enrollment.id in exist or (enrollment and enrollment.sequence in changed):
                    later.append((leased, result))
                    continue
                # an enrollment may have been leased again since
                if enrollment is not None and enrollment.leases == leased.enrollment.leases:
                    if leased.reservations and not may_have_taken_place(result):
                        given = Reserved(enrollment.id, enrollment.visit, leased.reservations)
                        batch.given_back.append(given)
                    if failure is not None:
                        self._moves.fail(batch, enrollment, now, _unwritten(result), failure)
                        continue
                    is_evaluated = self._moves.move(
                        batch, enrollment, now, result, leased.revision, result_only=result_only
                    )
                    if is_evaluated and slow.end_batch():
                        later += results[number:]
                        pause = SLOW_PAUSE
                        break
                elif leased.enrollment.id not in locked.ids:
                    self._env.log.warning("enrollment was deleted", enrollment=leased.enrollment.id)
                elif not leased.executor.is_lookup:
                    event = _stale(leased, result, now)
                    batch.events.setdefault(event, []).append(leased.enrollment.id)
            await self._moves.write(connection, batch, now)
            ended = results
            if later:
                keep = {leased.fence for leased, _ in later}
                ended = [one for one in results if one[0].fence not in keep]
            if failure is None:
                await suppressions.add(connection, _undeliverable(ended))
        self._leases.forget(leased for leased, _ in ended)
        if later:
            asyncio.get_running_loop().call_later(pause, self._backlog.add, later)

    async def _write_unlocked(self, results: Sequence[Finished], now: datetime) -> bool:
        """Write results in one statement, if they are few or have the same outcome, nothing has
        changed since their leases, and no more is to be written than rows and events. Return
        whether it has.
        """
        is_few = len(results) <= MAX_UNLOCKED
        names = {leased.enrollment.sequence for leased, _ in results}
        known = self._leases.transactions
        if (
            not (is_few or _are_alike(results))
            or len(names) > 1
            or any(
                one.enrollment.leases not in known
                # leased again since: among several leases, the statement would not notice it
                or self._leases.by_id.get(one.enrollment.id) is not one
                or one.reservations
                or _has_data(result)
                for one, result in results
            )
            or _undeliverable(results)
        ):
            return False
        (name,) = names
        revision = self._revision(name)
        step_key = name, results[0][0].enrollment.step
        differing_until = self._differing_until.get(step_key)
        if revision is None or not (is_few or differing_until is None or differing_until <= now):
            return False
        versions = {one.enrollment.id: known[one.enrollment.leases] for one, _ in results}
        batch = Batch()
        with suppress(NotWritten):
            async with self._leases.without_lock(batch) as connection:
                slow = SlowEvaluations()
                for leased, result in results:
                    if (
                        self._moves.move(batch, leased.enrollment, now, result, leased.revision)
                        and slow.end_batch()
                    ):
                        raise NotWritten
                if not batch.is_plain or not (is_few or batch.are_alike):
                    if not is_few:
                        self._differing_until[step_key] = now + DIFFERING_FOR
                    raise NotWritten
                leases = {leased.enrollment.leases for leased, _ in results}
                unchanged = Unchanged(versions, self._env.daemon, leases, name, revision)
                await self._leases.write_unchanged(connection, batch, now, unchanged)
            self._leases.forget(leased for leased, _ in results)
            return True
        return False

    def _revision(self, name: str) -> int | None:
        sequence = self._catalog.sequences.get(name)
        return sequence.revision if sequence else None


def _are_alike(results: Sequence[Finished]) -> bool:
    """Return whether results are the same, of side effects leased by one transaction."""
    first, result = results[0]
    number = first.enrollment.leases
    return all(same is result and one.enrollment.leases == number for one, same in results)


def _undeliverable(results: Sequence[Finished]) -> list[Undeliverable]:
    return [
        one._replace(reason=f"{one.reason} (enrollment {leased.enrollment.id})")
        for leased, result in results
        if isinstance(result, Answer | Failed)
        for one in result.undeliverable
    ]


def _has_data(result: Result) -> bool:
    return isinstance(result, Answer) and bool(result.data)


def _unwritten(result: Result) -> str:
    """Describe why an enrollment fails whose result cannot be written."""
    done = f"its side effect is done ({result.action}), but " if isinstance(result, Answer) else ""
    return f"{done}it cannot be written"


def _stale(leased: Leased, result: Result, now: datetime) -> Event:
    """Return the event for a result whose enrollment has moved in the meantime."""
    was, text = leased.enrollment, describe_result(result)
    return Event(
        now,
        was.sequence,
        was.step,
        was.visit,
        "stale_result",
        printable(f"attempt {was.attempt} came too late to move it: {text}"),
        leased.revision,
    )
