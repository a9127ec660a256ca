"""The one function that decides: where an enrollment goes, and what must happen next.

It reads no clock and does no I/O. The daemon, the simulator and the tests all call `advance`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any, assert_never

from sequencerd.core import dates, retry
from sequencerd.core.model import (
    NEVER,
    Action,
    Advanced,
    Answer,
    Decision,
    DefinitionError,
    Definitions,
    End,
    Enrollment,
    EvaluationError,
    Event,
    Execute,
    External,
    Fail,
    Failed,
    Found,
    Instant,
    Jump,
    LookUp,
    Moment,
    NotStarted,
    Problem,
    Result,
    Sequence,
    SideEffect,
    Stay,
    Step,
    Suppressed,
    Update,
    Wait,
    parse_data,
    printable,
)

MAX_MOVES = 100
"""Within one evaluation; more is a loop."""

LOOKUP_DELAY = timedelta(minutes=1)
"""When a lookup that failed is asked again; a random part of the half is taken off."""

NOOP_DELAY = timedelta(minutes=1)
"""When a runner that answered noop is asked again: the original's cycle."""

_LOOK = "it must not be executed twice, so look what came of it, then move the enrollment on"
_MICROSECOND = timedelta(microseconds=1)


def advance(
    definitions: Definitions,
    enrollment: Enrollment,
    now: datetime,
    result: Result | None = None,
    jitter: float = 1.0,
    *,
    begun_under: int | None = None,
) -> Advanced:
    """Brings an enrollment as far as it gets at this time.

    `enrollment.wake_at` is ignored but for one that begins. `result` is what the side effect of its
    step came to, of the attempt that `enrollment.attempt` counts; `jitter` (0 to 1) shortens the
    wait before the next one; `begun_under` is the revision of the definition with which it began.
    Where it decides LookUp, the next `result` is what was found.

    First the result moves it, then the goals are looked at, then it follows its steps until one
    must wait (Wait, Execute), the way ends (End) or can't be gone (Fail). Never raises because of
    what a definition or an enrollment holds.
    """
    way = _Way(definitions, enrollment, now)
    if begun_under is not None:
        way.revision = begun_under
    try:
        decision = way.begin(result, jitter) or way.follow()
    except EvaluationError as error:
        decision = Fail(error.failure, str(error))
    except DefinitionError as error:
        decision = Fail("error", str(error))
    match decision:
        case Fail(failure, message):
            decision = Fail(failure, printable(message))
            way.at = way.at._replace(leased_by=None)
            way.record("failed", message)
        case End():
            way.record("completed")
    is_common = not isinstance(result, Failed | Found) and not way.has_read_whose
    return Advanced(way.at, decision, tuple(way.events), way.merged, is_common)


def waits_on(before: Enrollment, advanced: Advanced) -> bool:
    """Whether nothing changes for who waits."""
    decision = advanced.decision
    return (
        isinstance(decision, Wait)
        and before.wake_at is not None
        and (
            decision.until == before.wake_at
            or decision.until.year == before.wake_at.year == NEVER.year
        )
        and advanced.enrollment == before
        and not advanced.events
    )


class _Way:
    """One evaluation: where the enrollment is by now, and what has happened."""

    __slots__ = (
        "_timezone",
        "at",
        "definitions",
        "events",
        "external",
        "is_read",
        "lapsed",
        "merged",
        "moment",
        "moves",
        "now",
        "revision",
    )

    def __init__(self, definitions: Definitions, enrollment: Enrollment, now: datetime) -> None:
        self.definitions = definitions
        self.at = enrollment
        self.now = now
        self.events: list[Event] = []
        self.merged: Mapping[str, Any] | None = None
        self.moves = 0
        known = definitions.get(enrollment.sequence)
        self.revision = known.revision if known else None  # which events are to show
        self.lapsed: str | None = None  # the daemon whose lease of this visit has run out
        self._timezone: str | None = None
        self.moment: Moment | None = None
        self.is_read = False  # whose it is, in a moment that is over
        self.external: External | None = None  # of the sequence where it is, once it was looked up

    def begin(self, result: Result | None, jitter: float) -> Decision | None:
        """The start of a journey, or what came of the side effect; None to go on from there."""
        if self.at.entered_at is None:
            begun = min(self.at.wake_at or self.now, self.now)
            self.at = self.at._replace(entered_at=begun)
            self.record("enrolled")
        if result is None and (lapsed := self.at.leased_by) is not None:
            self.at = self.at._replace(leased_by=None)
            self.lapsed = lapsed
            self.record("lapsed", f"attempt {self.at.attempt} by {lapsed} was cut off")
        match result:
            case None:
                return None
            case Answer():
                return self._answered(result)
            case Suppressed(message):
                self.record("suppressed", message)
                return self._go(self._step(self.sequence()).next_step)
            case Failed():
                return self._failed(result, jitter)
            case NotStarted():
                attempt = max(self.at.attempt - 1, 0)
                self.at = self.at._replace(attempt=attempt, leased_by=None)
                return None
            case Found(None, message):
                self.at = self.at._replace(leased_by=None)
                self.record("retry", message)
                return Wait(self.now + LOOKUP_DELAY * (0.5 + jitter / 2))
            case Found(external):
                self.at = self.at._replace(leased_by=None)
                self.external = external
                return None
            case _:
                assert_never(result)

    def follow(self) -> Decision:
        """Goals first, then step after step."""
        sequence = self.sequence()
        self.revision = sequence.revision
        if ended := self._pull(sequence):
            return ended
        while True:
            if sequence.paused:
                return Wait(self.now)
            step, data = self._step(sequence), self.at.data
            decision = self._execute(sequence, step)
            if isinstance(decision, Wait) and self._rechecks(sequence, step):
                return Wait(min(decision.until, self.now + sequence.recheck))
            if decision is not None:
                return decision
            if self.moves > MAX_MOVES:
                message = f"more than {MAX_MOVES} moves without a wait; a cycle needs one"
                return Fail("loop", message)
            if self.at.sequence != sequence.name or self.at.data is not data:
                if self.at.sequence != sequence.name:
                    self.external = None
                sequence = self.sequence()
                self.revision = sequence.revision
                if ended := self._pull(sequence):
                    return ended

    def sequence(self) -> Sequence:
        """The definition of the sequence that it is in. Raises EvaluationError."""
        sequence = self.definitions.get(self.at.sequence)
        if sequence is None:
            raise EvaluationError("invalid_step", f"sequence {self.at.sequence!r} does not exist")
        return sequence

    def record(self, action: str, message: str | None = None) -> None:
        """An event; those of one evaluation are a microsecond apart, so that they sort by time."""
        at = self.now + len(self.events) * _MICROSECOND
        here = self.at
        self.events.append(
            Event(
                at,
                here.sequence,
                here.step,
                here.visit,
                action,
                None if message is None else printable(message),
                self.revision,
            )
        )

    def _look(self) -> Moment:
        """The enrollment as it is now, for a step or a goal to read."""
        if self.moment is None or not self.moment.is_of(self.at):
            self.is_read = self.has_read_whose
            self.moment = Moment(self.at, self.now, self._zone(), self.external or {})
        return self.moment

    @property
    def has_read_whose(self) -> bool:
        """Whether the way depends on more than where the enrollment was."""
        read = self.moment is not None and self.moment.is_read
        return read or self.is_read or self.merged is not None

    def _zone(self) -> str:
        """Its own zone, else the sequence's; one that does not exist falls back and is told."""
        own = self.at.timezone
        if own is None:
            return self.sequence().timezone
        if self._timezone is None:
            try:
                dates.zone(own)
                self._timezone = own
            except DefinitionError as error:
                self._timezone = self.sequence().timezone
                self.record("warning", f"{error}; {self._timezone} is used")
        return self._timezone

    def _step(self, sequence: Sequence) -> Step:
        step = sequence.steps.get(self.at.step)
        if step is None:
            raise EvaluationError("invalid_step", f"step {self.at.step!r} does not exist")
        return step

    def _open_goals(self, sequence: Sequence) -> list[Step]:
        """Those that have not pulled before."""
        return [goal for goal in sequence.goals if goal.name not in self.at.goals_met]

    def _rechecks(self, sequence: Sequence, step: Step) -> bool:
        """Whether it waits for what a lookup alone can tell."""
        return sequence.lookup is not None and (
            (step.reads_external and isinstance(step.behaviour, Instant))
            or any(goal.reads_external for goal in self._open_goals(sequence))
        )

    def _pull(self, sequence: Sequence) -> End | Fail | LookUp | None:
        """Goals that are met and have not pulled before: the last of the definition wins."""
        open_goals = self._open_goals(sequence)
        if sequence.paused:
            return None
        if any(goal.reads_external for goal in open_goals) and (
            missing := self._look_up(sequence, self._step(sequence))
        ):
            return missing
        met = [
            goal
            for goal in open_goals
            if isinstance(goal.behaviour, Instant)
            and goal.behaviour.met is not None
            and goal.behaviour.met(self._look())
        ]
        if not met:
            return None
        names = tuple(goal.name for goal in met)
        self.at = self.at._replace(goals_met=(*self.at.goals_met, *names))
        others = f", with {', '.join(names[1:])}" if names[1:] else ""
        self.record("goal", f"{names[0]} is met{others}")
        return self._go(met[0].next_step)

    def _look_up(self, sequence: Sequence, step: Step) -> Fail | LookUp | None:
        """What has to be done before external data can be read, if anything."""
        if sequence.lookup is None or self.external is not None:
            return None
        effect = step.behaviour
        if isinstance(effect, SideEffect) and (cut_off := self._cut_off(effect)):
            return cut_off  # the lookup's lease would hide that the effect was cut off
        return LookUp(step, sequence.lookup)

    def _execute(self, sequence: Sequence, step: Step) -> Decision | None:
        """One step; None when it has moved the enrollment on."""
        match step.behaviour:
            case Problem(message):
                return Fail("invalid_step", message)
            case SideEffect() as effect:
                return self._start(sequence, step, effect)
            case Instant() as behaviour:
                if step.reads_external and (missing := self._look_up(sequence, step)):
                    return missing
                answer = behaviour.answer(self._look())
            case _:
                assert_never(step.behaviour)
        match answer:
            case Stay(until):
                return Wait(until if until.year < NEVER.year else NEVER)
            case Action.NEXT:
                if behaviour.met is not None and step.name not in self.at.goals_met:
                    self.at = self.at._replace(goals_met=(*self.at.goals_met, step.name))
                self.record(answer.value)
                return self._go(step.next_step)
            case Action.ALT_NEXT:
                self.record(answer.value)
                return self._go(step.alt_next_step)
            case Update(data):
                self._merge(data)
                self.record(Action.NEXT.value)
                return self._go(step.next_step)
            case Jump(target, name):
                self.record("jump", f"to {target}" + (f" of {name}" if name else ""))
                return self._go(target, name)
            case Action.NOOP:
                return Wait(self.now + NOOP_DELAY)
            case _:
                assert_never(answer)

    def _start(self, sequence: Sequence, step: Step, effect: SideEffect) -> Decision:
        """The side effect, unless it is too early for it or one try more would be too many."""
        if self.at.retry_at is not None and self.now < self.at.retry_at:
            return Wait(self.at.retry_at)
        if cut_off := self._cut_off(effect):
            return cut_off
        if step.reads_external and (missing := self._look_up(sequence, step)):
            return missing
        return Execute(step, effect, self._zone(), self.external or {}, sequence.revision)

    def _cut_off(self, effect: SideEffect) -> Fail | None:
        """Whether a side effect that was cut off must not be started again."""
        if self.lapsed is not None and self.at.attempt > 0:
            if effect.at_most_once:
                return Fail(
                    "outcome_unknown",
                    f"{self.lapsed} was cut off while it executed this step: {_LOOK}",
                )
            if self.at.attempt >= effect.retry.attempts:
                return Fail("error", f"cut off in attempt {self.at.attempt}, the last one")
        return None

    def _go(self, target: str | None, sequence: str | None = None) -> End | None:
        """To another step, or to the end of the way."""
        if target is None:
            self.at = self.at._replace(leased_by=None)
            return End()
        self.moves += 1
        self.lapsed = None
        self.at = self.at.entering(sequence or self.at.sequence, target, self.now)
        return None

    def _answered(self, answer: Answer) -> Decision | None:
        if answer.data:
            self._merge(answer.data)
        step = self._step(self.sequence())
        if answer.action is Action.NOOP:
            if answer.message:
                self.record(answer.action.value, answer.message)
            wait = NOOP_DELAY if answer.retry_after is None else answer.retry_after
            again = answer.wake_at or self.now + min(max(wait, timedelta(0)), retry.LONGEST)
            self.at = self.at._replace(attempt=0, retry_at=again, leased_by=None)
            return None
        self.record(answer.action.value, answer.message)
        return self._go(step.next_step if answer.action is Action.NEXT else step.alt_next_step)

    def _merge(self, data: Mapping[str, Any]) -> None:
        merged = {**parse_data(self.at.data), **data}
        self.at = self.at._replace(data=json.dumps(merged))
        self.merged = {**(self.merged or {}), **data}

    def _failed(self, failed: Failed, jitter: float) -> Decision | None:
        step = self._step(self.sequence())
        effect = step.behaviour if isinstance(step.behaviour, SideEffect) else SideEffect(None)
        if failed.unknown:
            failed = replace(failed, message=f"{failed.message}; it may have taken place")
            if effect.at_most_once:
                return Fail("outcome_unknown", f"{failed.message}: {_LOOK}")
        if not retry.gives_up(effect.retry, self.at.attempt, failed):
            wait = retry.delay(effect.retry, self.at.attempt, failed, jitter)
            attempt = max(self.at.attempt - (failed.fault == "server"), 0)
            self.at = self.at._replace(attempt=attempt, retry_at=self.now + wait, leased_by=None)
            self.record("retry", failed.message)
            return None
        if effect.on_error == "altNext":
            self.record(Action.ALT_NEXT.value, failed.message)
            return self._go(step.alt_next_step)
        return Fail("error", failed.message)
