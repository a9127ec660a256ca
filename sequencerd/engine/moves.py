"""Advance enrollments into a batch, and lease those that need a side effect or a lookup.

Side effects start only after the transaction that writes the batch has committed (`leases`).
"""

from __future__ import annotations

import asyncio
import math
import random
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import partial
from typing import assert_never

import asyncpg

from sequencerd.core import model
from sequencerd.core.advance import advance
from sequencerd.core.decision import (
    Advanced,
    Decision,
    End,
    Event,
    Execute,
    Fail,
    QueryLookup,
    Wait,
)
from sequencerd.core.enrollment import Enrollment, StepKey
from sequencerd.core.faults import EvaluationError, printable
from sequencerd.core.model import NOTHING_REFUSED, Refusals, SideEffect
from sequencerd.core.task import Result, Task
from sequencerd.core.view import state_view, view_in_state
from sequencerd.engine.batch import Batch
from sequencerd.engine.breaker import TIMER_TOLERANCE
from sequencerd.engine.catalog import Catalog
from sequencerd.engine.environment import Environment
from sequencerd.engine.executors import Executor, Executors, Leased
from sequencerd.engine.jumps import PendingMove, decide
from sequencerd.engine.shared_outcome import SharedOutcome, Start
from sequencerd.engine.slow_evaluations import SlowEvaluations
from sequencerd.storage import entries, limits, wakes, writes
from sequencerd.storage.limits import Reserved

MAX_INVALID = 10_000  # steps that are remembered
START_TOLERANCE = timedelta(seconds=1)  # after its wake time, an enrollment starts on time
BRAKE_DELAY = timedelta(seconds=1)  # until a delay by a brake ends, unless it pauses the sequence


@dataclass(eq=False)
class Moves:
    """Advances enrollments."""

    _env: Environment
    _catalog: Catalog
    _executors: Executors  # which have the slots
    _lease_expired: Callable[[float, float], bool]  # of the heartbeat
    invalid: dict[StepKey, model.Step | None] = field(default_factory=dict)
    """The steps at which enrollments have failed as invalid, as they were defined then."""

    def move(
        self,
        batch: Batch,
        enrollment: Enrollment,
        now: datetime,
        result: Result | None = None,
        started_revision: int | None = None,
        *,
        expired_leases: int = 0,
        result_only: bool = False,
    ) -> bool:
        """Advance an enrollment into a batch, or let it share the outcome of an earlier one. Return
        whether anything was evaluated for it.
        """
        begins_at = None
        if enrollment.entered_at is None:
            begins_at = self._begins_at(enrollment, now)
        key = batch.outcomes.key(enrollment, result, started_revision, expired_leases, begins_at)
        if (
            key is not None
            and (shared := batch.outcomes.get(key, enrollment)) is not None
            and self._share(batch, enrollment, shared)
        ):
            return batch.outcomes.has_asked
        before = enrollment
        if begins_at is not None:
            enrollment = enrollment._replace(wake_at=begins_at)
        again = partial(
            self.advance,
            enrollment,
            now,
            result,
            started_revision,
            expired_leases=expired_leases,
        )
        advanced = again(result_only=result_only)
        if advanced.is_tentative:
            batch.jumps.append(PendingMove(enrollment, advanced, again))
            return True
        if self._needs_reservation(advanced, now):
            batch.limited.append(PendingMove(enrollment, advanced, again))
            return True
        outcome = self.add(batch, before, advanced, now)
        if outcome is not None and key is not None:
            batch.outcomes.add(key, advanced.answers, outcome)
        return True

    def move_unlocked(self, batch: Batch, due: Iterable[Enrollment], now: datetime) -> bool:
        """Advance enrollments that are not locked into a batch. Return False if they must be locked
        to be written: if evaluations are slow, or if more than rows and events is to be written.
        """
        slow = SlowEvaluations()
        for enrollment in due:
            if self.move(batch, enrollment, now) and slow.end_batch():
                return False
        return batch.is_plain

    def _begins_at(self, enrollment: Enrollment, now: datetime) -> datetime | None:
        """Return when an enrollment enters its first step: at its wake time, or now if it starts on
        time at a side effect, so that it can share the outcome of those that start with it.
        """
        wake_at = enrollment.wake_at
        if wake_at is not None and wake_at > now - START_TOLERANCE:
            step = self._catalog.step((enrollment.sequence, enrollment.step))
            if step is not None and isinstance(step.behaviour, SideEffect):
                return now
        return wake_at

    def advance(
        self,
        enrollment: Enrollment,
        now: datetime,
        result: Result | None = None,
        started_revision: int | None = None,
        refused: Refusals = NOTHING_REFUSED,
        *,
        expired_leases: int = 0,
        result_only: bool = False,
        full: model.LimitReached | None = None,
    ) -> Advanced:
        """Advance an enrollment by the present definitions. An internal error lets it fail. Raises
        MemoryError.
        """
        jitter = random.random()  # noqa: S311 - spreads load, guards nothing
        try:
            advanced = advance(
                self._catalog.sequences,
                enrollment,
                now,
                result,
                jitter,
                started_revision=started_revision,
                refused=refused,
                expired_leases=expired_leases,
                result_only=result_only,
                full=full,
            )
        except MemoryError:
            raise  # that of the machine is exhausted, which may pass
        except Exception as error:
            self._env.log.exception("enrollment could not be evaluated", enrollment=enrollment.id)
            text = f"internal error: {type(error).__name__}: {error}"
            return _failed(enrollment, now, text, "error")
        match advanced.decision:
            case Fail("invalid_step") if len(self.invalid) < MAX_INVALID:
                step_key = advanced.enrollment.sequence, advanced.enrollment.step
                self.invalid.setdefault(step_key, self._catalog.step(step_key))
        return advanced

    def fail(
        self, batch: Batch, enrollment: Enrollment, now: datetime, text: str, error: Exception
    ) -> None:
        """Let an enrollment fail that the database refuses to write."""
        is_entered = getattr(error, "constraint_name", None) == "one_entry"
        failure = "already_enrolled" if is_entered else "error"
        self.add(batch, enrollment, _failed(enrollment, now, f"{text}: {error}", failure), now)

    def _needs_reservation(self, advanced: Advanced, now: datetime) -> bool:
        """Return whether a side effect must be reserved: it has a limit or a brake, and there is a
        free slot.
        """
        at, decision = advanced.enrollment, advanced.decision
        return (
            isinstance(decision, Execute)
            and (decision.reservations != () or self._is_braked(at, now))
            and self._executors.free(decision.step.type, (at.sequence, at.step)) is not None
        )

    def _is_braked(self, at: Enrollment, now: datetime) -> bool:
        sequence = self._catalog.sequences.get(at.sequence)
        until = sequence.braked_until if sequence else None
        return until is not None and now < until

    def add(
        self,
        batch: Batch,
        before: Enrollment,
        advanced: Advanced,
        now: datetime,
        *,
        is_reserved: bool = False,
        held_until: datetime | None = None,
    ) -> SharedOutcome | None:
        """Add an advanced enrollment to a batch, with a lease if it needs one.

        Return the outcome if all enrollments in the same state share it. A side effect that needs a
        reservation is not leased: the enrollment is due, and a claim reserves it; or it waits until
        `held_until` if a brake has no room for it.
        """
        at, decision, events = advanced.enrollment, advanced.decision, advanced.events
        wake_at = now
        is_shared = advanced.is_shared and at.goals == before.goals
        start: Start | None = None
        match decision:
            case Wait(wake_at, elsewhere):
                if elsewhere:
                    batch.elsewhere.add((at.sequence, at.step))
            case Execute(step):
                is_open = is_reserved or not (decision.reservations or self._is_braked(at, now))
                executor = self._executors.free(step.type, (at.sequence, at.step))
                try:
                    if is_open and executor is not None:
                        leased = at.leased_to(self._env.daemon, batch.lease_number)
                        wake_at = now + self._env.lease_time
                        started = self._start(leased, executor, decision, wake_at)
                        _lease(batch, leased, started)
                        at, start = leased, started
                    else:  # there may be a slot for the next enrollment
                        is_shared, wake_at = False, held_until or _due_since(before, at, now)
                except EvaluationError as error:
                    unable = _failed(at, now, str(error), error.failure)
                    events += unable.events
                    decision = unable.decision
            case QueryLookup(step, lookup):
                is_shared = False
                if executor := self._executors.free(("lookup", lookup), (at.sequence, at.step)):
                    at = at._replace(
                        wake_at=None, leased_by=self._env.daemon, leases=batch.lease_number
                    )
                    task = Task(at.key, {"subject": at.subject})
                    batch.lease(Leased(at, step, executor, None, task))
                    wake_at = now + self._env.lease_time
            case End() | Fail():
                pass
            case _:
                assert_never(decision)
        if isinstance(decision, Fail):
            is_shared = False  # the reason may be in its data
        ids = batch.add(before, at, decision, wake_at, events, data=advanced.data)
        return SharedOutcome(ids, at, start) if is_shared else None

    def _share(self, batch: Batch, enrollment: Enrollment, shared: SharedOutcome) -> bool:
        """Add an enrollment to a shared outcome. Return False if it must be advanced by itself."""
        if shared.start is not None:
            if shared.start.executor.free_slots <= 0:
                return False
            try:
                _lease(batch, enrollment.in_state_of(shared.at), shared.start)
            except EvaluationError:
                return False
        for ids in shared.ids:
            ids.append(enrollment.id)
        return True

    def _start(
        self, leased: Enrollment, executor: Executor, execute: Execute, until: datetime
    ) -> Start:
        """Return how the side effect of an enrollment that is leased until a time is started."""
        step, effect, timezone, external, revision, expires_at, closes_at, topic, places = execute
        assert leased.entered_at is not None
        view = state_view(leased, timezone, leased.entered_at, external)
        time = asyncio.get_running_loop().time()
        expires = None
        if expires_at or closes_at:
            end = min(filter(None, (expires_at, closes_at)))
            expires = time + self._env.clock.seconds_until(end) + TIMER_TOLERANCE
        lease_expired = partial(self._lease_expired, time + self._env.clock.seconds_until(until))
        return Start(
            executor, step, effect.program, view, expires, topic, revision, places, lease_expired
        )

    async def write(self, connection: asyncpg.Connection, batch: Batch, now: datetime) -> None:
        """Write a batch, after deciding its effects on other sequences and enrollments."""
        decided = await decide(connection, batch.jumps)
        if decided.outdated:
            self._catalog.request(decided.outdated)
        for jumped, advanced in decided.advanced:
            self.add(batch, jumped, advanced, now)
            batch.entries += advanced.entries
        if batch.limited or batch.given_back:
            await self._reserve(connection, batch, now)
        if batch.jumps or batch.entries:
            await entries.limit_waits(connection)
        await writes.write(connection, batch, now)
        if decided.cancelled:
            await entries.cancel(connection, decided.cancelled, now)
        if batch.entries:
            batch.entered = dict.fromkeys(await entries.enter(connection, batch.entries), now)
            batch.elsewhere |= {
                (entry.sequence, entry.elsewhere) for entry in batch.entries if entry.elsewhere
            }
        if batch.elsewhere:
            await wakes.notify_due(connection, batch.elsewhere, now)

    async def _reserve(self, connection: asyncpg.Connection, batch: Batch, now: datetime) -> None:
        """Reserve side effects with a limit or a brake, and add their enrollments, with a lease or
        as the limit says.
        """
        wanted = [_reserved(one.advanced) for one in batch.limited]
        full: dict[int, model.LimitReached] = {}
        if batch.given_back or any(one.places for one in wanted):
            full = await limits.reserve(connection, wanted, batch.given_back, now)
        braked = {
            one.advanced.enrollment.sequence
            for one in batch.limited
            if self._is_braked(one.advanced.enrollment, now)
        }
        remaining = await limits.left_by_brakes(connection, braked, now) if braked else {}
        begun, over = Counter[str](), set[str]()
        unused = []
        for number, (before, advanced, again) in enumerate(batch.limited):
            if number in full:
                self.add(batch, before, again(full=full[number]), now)
                continue
            name = advanced.enrollment.sequence
            leased = len(batch.leased)
            if begun[name] < remaining.get(name, math.inf):
                self.add(batch, before, advanced, now, is_reserved=True)
                begun[name] += len(batch.leased) - leased
            else:
                over |= {name} if self._needs_reservation(advanced, now) else set()
                self.add(batch, before, advanced, now, held_until=now + BRAKE_DELAY)
            if len(batch.leased) == leased:  # others took the last free slots, or the brake holds
                unused.append(wanted[number])
        if any(one.places for one in unused):
            await limits.reserve(connection, [], unused, now)
        counted = {name: (begun[name], name in over) for name in remaining}
        if any(count or is_over for count, is_over in counted.values()):
            await limits.count_for_brakes(connection, counted, now)


def _reserved(advanced: Advanced) -> Reserved:
    """Return the reservations that an enrollment needs."""
    at, decision = advanced.enrollment, advanced.decision
    assert isinstance(decision, Execute)
    return Reserved(at.id, at.visit, decision.reservations)


def _lease(batch: Batch, leased: Enrollment, start: Start) -> None:
    """Lease an enrollment for its side effect. Raises EvaluationError for unreadable data."""
    executor, step, program, of_state, expires, topic, revision, places, lease_expired = start
    task = Task(leased.key, view_in_state(leased, of_state), expires, topic, lease_expired)
    batch.lease(Leased(leased, step, executor, program, task, revision, places))


def _due_since(before: Enrollment, at: Enrollment, now: datetime) -> datetime:
    """Return the wake time of an enrollment that got no slot: it keeps its place in the order."""
    if before.wake_at is None or before.visit != at.visit:
        return now
    return min(before.wake_at, now)


def _failed(enrollment: Enrollment, now: datetime, message: str, failure: str) -> Advanced:
    """Return the outcome of an enrollment that fails for a reason outside of `advance`."""
    text = printable(message)
    here = enrollment
    seconds = None if here.entered_at is None else (now - here.entered_at).total_seconds()
    event = Event(
        now, here.sequence, here.step, here.visit, "failed", text, seconds_at_step=seconds
    )
    decision: Decision = Fail(failure, text)
    return Advanced(enrollment._replace(leased_by=None), decision, (event,))
