"""The one function that decides: where an enrollment goes, and what must happen next.

It reads no clock and does no I/O. The daemon, the simulator and the tests all call `advance`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any, TypeVar, assert_never

from sequencerd.core import retry
from sequencerd.core.calendar import dates
from sequencerd.core.model import (
    NEVER,
    Action,
    Advanced,
    Answer,
    Decision,
    DefinitionError,
    Definitions,
    Elsewhere,
    End,
    Enrollment,
    EvaluationError,
    Event,
    Execute,
    Exit,
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
    effect_key,
    parse_data,
    printable,
)

T = TypeVar("T")

MAX_LAPSES = 20
"""So often within a day the lease of a visit may expire; the daemon may die of its side effect."""

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
    refused: Mapping[str, str] | None = None,
    lapses: int = 0,
    result_only: bool = False,
) -> Advanced:
    """Brings an enrollment as far as it gets at this time.

    `enrollment.wake_at` is ignored but for one that begins. `result` is what the side effect of its
    step came to, of the attempt that `enrollment.attempt` counts; `jitter` (0 to 1) shortens the
    wait before the next one; `begun_under` is the revision of the definition with which it began.
    Where it decides LookUp, the next `result` is what was found. `refused` are sequences that the
    subject can't enter by a jump, with the code of the reason, such as `already_enrolled`: whether
    those that it enters refuse it is for the caller to find out, who then calls again. `lapses` is
    how often the lease has expired before in this visit, lately. `result_only` goes no further than
    the result says: what follows is left to another evaluation.

    First the result moves it, then the goals are looked at, then it follows its steps until one
    must wait (Wait, Execute), the way ends (End) or can't be gone (Fail). Never raises because of
    what a definition or an enrollment holds.
    """
    way = _Way(definitions, enrollment, now, refused)
    way.lapses = lapses
    if begun_under is not None:
        way.revision = begun_under
    try:
        decision = way.begin(result, jitter) or (Wait(now) if result_only else way.follow())
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
    is_common = (
        not isinstance(result, Failed | Found)
        and not way.has_read_whose
        and not way.entered
        and refused is None
    )
    return Advanced(way.at, decision, tuple(way.events), way.merged, is_common, way.entered)


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
        "entered",
        "events",
        "external",
        "is_read",
        "lapsed",
        "lapses",
        "merged",
        "moment",
        "moves",
        "now",
        "refused",
        "revision",
    )

    def __init__(
        self,
        definitions: Definitions,
        enrollment: Enrollment,
        now: datetime,
        refused: Mapping[str, str] | None,
    ) -> None:
        self.definitions = definitions
        self.at = enrollment
        self.now = now
        self.refused = refused
        self.entered: tuple[str, ...] = ()
        self.events: list[Event] = []
        self.merged: Mapping[str, Any] | None = None
        self.moves = 0
        known = definitions.get(enrollment.sequence)
        self.revision = known.revision if known else None  # which events are to show
        self.lapsed: str | None = None  # the daemon whose lease of this visit has run out
        self.lapses = 0  # leases that ran out before it
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
                step = self._step(self.sequence())
                self.record("suppressed", message)
                effect = step.behaviour
                way = effect.on_suppressed if isinstance(effect, SideEffect) else "next"
                return self._go(_target(step, way), is_executed=True)
            case Failed():
                return self._failed(result, jitter)
            case NotStarted():
                attempt = max(self.at.attempt - 1, 0)
                self.at = self.at._replace(attempt=attempt, leased_by=None)
                return None
            case Found(None, message):
                self.at = self.at._replace(leased_by=None)
                self._record_retry(message)
                return Wait(self.now + LOOKUP_DELAY * (0.5 + jitter / 2))
            case Found(external):
                self.at = self.at._replace(leased_by=None, last_error=None)
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
            if self.at.executed and isinstance(decision, Wait) and _waits(step, decision, self.now):
                self.at = self.at._replace(executed=())
            if isinstance(decision, Wait) and self._rechecks(sequence, step):
                return decision._replace(until=min(decision.until, self.now + sequence.recheck))
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

    def _record_retry(self, message: str) -> None:
        """What may go on for long is recorded when it begins, and when the reason changes."""
        if printable(message) != self.at.last_error:
            self.record("retry", message)
            self.at = self.at._replace(last_error=printable(message))

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
        """Those that have not pulled before, or may pull again once they no longer hold."""
        met = self.at.goals_met
        return [goal for goal in sequence.goals if goal.name not in met or _repeats(goal)]

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
            and _asked(goal, goal.behaviour.met, self._look())
        ]
        if before := self.at.goals_met:
            holding = {goal.name for goal in met}
            over = {goal.name for goal in open_goals if goal.name in before} - holding
            if over:  # armed again
                kept = tuple(name for name in before if name not in over)
                self.at = self.at._replace(goals_met=kept)
            met = [goal for goal in met if goal.name not in before]
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
            case Elsewhere():
                return Wait(self.now, elsewhere=True)
            case SideEffect() as effect:
                return self._start(sequence, step, effect)
            case Instant() as behaviour:
                if step.reads_external and (missing := self._look_up(sequence, step)):
                    return missing
                moment = self._look()
                moment.seed = step.seed
                answer = _asked(step, behaviour.answer, moment)
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
                if name is not None and name != sequence.name:
                    return self._enter(step, target, name)
                self.record("jump", f"to {target}" + (f" of {name}" if name else ""))
                return self._go(target)
            case Action.NOOP:
                return Wait(self.now + NOOP_DELAY)
            case _:
                assert_never(answer)

    def _start(self, sequence: Sequence, step: Step, effect: SideEffect) -> Decision | None:
        """The side effect, unless it is too early for it, too late, or one try more would be too
        many.
        """
        if self.at.executed and (key := effect_key(sequence.name, step.name)) in self.at.executed:
            return Fail("loop", _told_loop([*self.at.executed, key]))
        if cut_off := self._cut_off(effect):
            return cut_off
        if self.at.retry_at is not None and self.now < self.at.retry_at:
            if effect.expires is None or (step.reads_external and self.external is None):
                return Wait(self.at.retry_at)
            expires = effect.expires(self._look())
            if self.now < expires:
                return Wait(min(self.at.retry_at, expires))
        if step.reads_external and (missing := self._look_up(sequence, step)):
            return missing
        expires_at = None if effect.expires is None else effect.expires(self._look())
        if expires_at is not None and expires_at <= self.now:
            self.record("expired", f"too late since {expires_at:%Y-%m-%d %H:%M:%S}Z")
            return self._go(_target(step, effect.on_expired))
        external = self.external or {}
        return Execute(step, effect, self._zone(), external, sequence.revision, expires_at)

    def _cut_off(self, effect: SideEffect) -> Fail | None:
        """What follows where a side effect was cut off: it must not be started again, or else the
        attempt is not counted, as it was the daemon that failed. Where that goes on, it waits
        longer each time: it may be what the daemon dies of.
        """
        if self.lapsed is None or self.at.attempt == 0:
            return None
        if effect.at_most_once:
            return Fail(
                "outcome_unknown",
                f"{self.lapsed} was cut off while it executed this step: {_LOOK}",
            )
        if self.lapses >= MAX_LAPSES:
            return Fail("error", f"the daemon died in each of {self.lapses + 1} attempts of a day")
        wait = None
        if self.lapses:
            crash = Failed("the daemon died")
            wait = self.now + retry.delay(effect.retry, self.lapses, crash, jitter=1.0)
        self.at = self.at._replace(attempt=self.at.attempt - 1, retry_at=wait)
        self.lapsed = None
        return None

    def _enter(self, step: Step, target: str, name: str) -> End | Fail | None:
        """To a step of another sequence, if that lets it in; else altNext, where there is one."""
        if (refusal := self._refusal(name)) is not None:
            if step.alt_next_step is None:
                return refusal
            self.record(Action.ALT_NEXT.value, refusal.message)
            return self._go(step.alt_next_step)
        self.entered += (name,)
        self.record("jump", f"to {target} of {name}")
        return self._go(target, name)

    def _refusal(self, name: str) -> Fail | None:
        """Why a sequence can't be entered by a jump."""
        failure = (self.refused or {}).get(name)
        known = self.definitions.get(name)
        if failure == "archived" or (known is not None and known.archived):
            return Fail("archived", f"sequence {name!r} is archived: no GoTo enters it")
        if failure is not None:
            message = f"sequence {name!r} refuses a second entry of the subject"
            return Fail("already_enrolled", message)
        return None

    def _go(
        self, target: str | None, sequence: str | None = None, *, is_executed: bool = False
    ) -> End | None:
        """To another step, or to the end of the way; from a side effect that `is_executed`."""
        if target is None:
            self.at = self.at._replace(leased_by=None, last_error=None)
            return End()
        self.moves += 1
        self.lapsed = None
        if sequence is None:
            sequence = self.at.sequence
        elif sequence != self.at.sequence:
            self._change_goals(sequence)
        here = self.at
        executed = here.executed
        if is_executed:
            executed = (*executed, effect_key(here.sequence, here.step))
        self.at = here.entering(sequence, target, self.now, executed)
        return None

    def _change_goals(self, sequence: str) -> None:
        """Goals are of their sequence: those met here are kept for when it comes back."""
        here = self.at
        if here.goals_met or here.goals_elsewhere:
            kept = json.loads(here.goals_elsewhere or "{}")
            if here.goals_met:
                kept[here.sequence] = list(here.goals_met)
            met = tuple(kept.pop(sequence, ()))
            text = json.dumps(kept) if kept else None
            self.at = here._replace(goals_met=met, goals_elsewhere=text)

    def _answered(self, answer: Answer) -> Decision | None:
        if answer.data:
            self._merge(answer.data)
        step = self._step(self.sequence())
        if answer.action is Action.NOOP:
            if answer.message:
                self.record(answer.action.value, answer.message)
            wait = NOOP_DELAY if answer.retry_after is None else answer.retry_after
            again = answer.wake_at or self.now + min(max(wait, timedelta(0)), retry.LONGEST)
            executed = () if again > self.now else self.at.executed
            self.at = self.at._replace(
                attempt=0, retry_at=again, leased_by=None, last_error=None, executed=executed
            )
            return None
        self.record(answer.action.value, answer.message)
        target = step.next_step if answer.action is Action.NEXT else step.alt_next_step
        return self._go(target, is_executed=True)

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
            given_back = failed.refund + (failed.fault == "server")
            attempt = max(self.at.attempt - given_back, 0)
            self.at = self.at._replace(attempt=attempt, retry_at=self.now + wait, leased_by=None)
            if failed.fault == "server":
                self._record_retry(failed.message)
            else:
                self.record("retry", failed.message)
                self.at = self.at._replace(last_error=printable(failed.message))
            return None
        if effect.on_error == "altNext":
            self.record(Action.ALT_NEXT.value, failed.message)
            return self._go(step.alt_next_step, is_executed=True)
        return Fail("error", failed.message)


def _repeats(goal: Step) -> bool:
    return isinstance(goal.behaviour, Instant) and goal.behaviour.repeats


def _waits(step: Step, decision: Wait, now: datetime) -> bool:
    """Whether time passes at a step that waits, not at one that is retried or held up."""
    return isinstance(step.behaviour, Instant) and decision.until > now


def _told_loop(executed: list[str]) -> str:
    """What is wrong with coming back to the last of these side effects."""
    cycle = executed[executed.index(executed[-1]) :]
    return (
        f"a loop that never waits: {' → '.join(cycle)}; nothing is executed a second time before "
        "time has passed: put a step that waits into it"
    )


def _asked(step: Step, ask: Callable[[Moment], T], moment: Moment) -> T:
    """What a step or a goal answers. Raises EvaluationError, which names it."""
    try:
        return ask(moment)
    except EvaluationError as error:
        raise EvaluationError(error.failure, f"step {step.name!r}: {error}") from error


def _target(step: Step, way: Exit) -> str | None:
    """Where a side effect that is skipped leads."""
    return {"next": step.next_step, "altNext": step.alt_next_step, "end": None}[way]
