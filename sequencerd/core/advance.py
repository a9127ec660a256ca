"""The one function that decides: where an enrollment goes, and what must happen next.

It reads no clock and does no I/O. The daemon, the simulator and the tests all call `advance`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any, TypeVar, assert_never

from sequencerd.core import exact_json, retry
from sequencerd.core.calendar import dates, windows
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
from sequencerd.core.enrollment import NEVER, Enrollment, effect_key
from sequencerd.core.faults import DefinitionError, EvaluationError, printable
from sequencerd.core.model import (
    LIMIT_REACHED,
    NEXT,
    NOTHING_REFUSED,
    Action,
    Cancellation,
    Definitions,
    Entry,
    Exit,
    InstantStep,
    InvalidStep,
    Limit,
    LimitReached,
    Refusals,
    Sequence,
    ServedElsewhere,
    SideEffect,
    Skip,
    Stay,
    Step,
    Update,
    Window,
)
from sequencerd.core.task import (
    Answer,
    Failed,
    LookupAnswer,
    NotStarted,
    Result,
    Suppressed,
    describe_result,
)
from sequencerd.core.view import Condition, Context, External, merge_data, parse_data

T = TypeVar("T")

MAX_EXPIRED_LEASES = 20
"""The number of expired leases of a visit in a day after which its side effect may be killing the
daemon.
"""

MAX_MOVES = 100
"""Moves in one evaluation; more are considered a loop."""

LOOKUP_DELAY = timedelta(minutes=1)
"""The longest wait before a failed lookup is repeated; jitter subtracts up to a half."""

LOCKED_DELAY = timedelta(milliseconds=200)
"""The wait for other enrollments that another session has locked, or for a changed definition."""

NOOP_DELAY = timedelta(minutes=1)
"""The wait after the answer noop, unless the runner names another: the original's polling interval.
"""

_CHECK_OUTCOME = "it must not be executed twice, so check its outcome, then move the enrollment on"
_MICROSECOND = timedelta(microseconds=1)


def advance(
    definitions: Definitions,
    enrollment: Enrollment,
    now: datetime,
    result: Result | None = None,
    jitter: float = 1.0,
    *,
    started_revision: int | None = None,
    refused: Refusals = NOTHING_REFUSED,
    expired_leases: int = 0,
    result_only: bool = False,
    full: LimitReached | None = None,
) -> Advanced:
    """Move an enrollment as far as possible at this time.

    First apply the result of its side effect, then check the goals, then follow the steps until the
    enrollment must wait (Wait), needs a side effect or external data (Execute, QueryLookup), ends
    (End) or cannot continue (Fail). No definition and no enrollment makes this function raise.

    `enrollment.wake_at` is read only if the enrollment has not started. `result` is the result of
    the attempt that `enrollment.attempt` counts or, after QueryLookup, the external data. `jitter`
    (0 to 1) shortens the wait before a retry. `started_revision` is the revision of the definition
    with which the side effect was started. `refused` maps sequences that the subject cannot enter
    by a jump to the code of the reason, such as `already_enrolled`: the caller checks the sequences
    in `entered`, and calls again if one refuses. `expired_leases` counts the recent leases of this
    visit that expired before. `result_only` applies the result, and leaves the rest to another
    evaluation. `full` says which limit of the first side effect with one has no room, if any: the
    caller reserves it, and calls again.
    """
    if started_revision is None and (known := definitions.get(enrollment.sequence)):
        started_revision = known.revision
    evaluation = _Evaluation(
        definitions, enrollment, now, started_revision, refused, expired_leases, full
    )
    try:
        decision = evaluation.begin(result, jitter) or (
            Wait(now) if result_only else evaluation.follow()
        )
    except EvaluationError as error:
        decision = Fail(error.failure, str(error))
    except DefinitionError as error:
        decision = Fail("error", str(error))
    match decision:
        case Fail(failure, message):
            decision = Fail(failure, printable(message))
            evaluation.at = evaluation.at._replace(leased_by=None)
            evaluation.record("failed", message)
        case End():
            evaluation.record("completed")
    is_shared = (
        not isinstance(result, Failed | LookupAnswer)
        and not evaluation.has_read_own
        and not evaluation.entered
        and not evaluation.entries
        and not evaluation.cancellations
        and not refused
    )
    return Advanced(
        evaluation.at,
        decision,
        tuple(evaluation.events),
        evaluation.merged,
        is_shared,
        evaluation.entered,
        evaluation.entries,
        evaluation.cancellations,
        tuple(evaluation.answers) if is_shared else (),
    )


def wakes_as_before(before: Enrollment, advanced: Advanced) -> bool:
    """Return whether an enrollment continues to wait in the same visit until the same time."""
    decision = advanced.decision
    return (
        isinstance(decision, Wait)
        and advanced.enrollment.visit == before.visit
        and before.wake_at is not None
        and (
            decision.until == before.wake_at
            or decision.until.year == before.wake_at.year == NEVER.year
        )
    )


def is_unchanged(before: Enrollment, advanced: Advanced) -> bool:
    """Return whether an enrollment that waits continues to wait exactly as before."""
    return (
        wakes_as_before(before, advanced) and advanced.enrollment == before and not advanced.events
    )


@dataclass(slots=True, eq=False)
class _Evaluation:
    """One evaluation: the enrollment after its moves so far, and its events."""

    definitions: Definitions
    at: Enrollment
    now: datetime
    revision: int | None  # recorded with each event
    refused: Refusals
    expired_leases: int  # earlier expired leases of this visit
    full: LimitReached | None
    entered: tuple[tuple[str, int | None], ...] = ()
    entries: tuple[Entry, ...] = ()
    cancellations: tuple[Cancellation, ...] = ()
    events: list[Event] = field(default_factory=list)
    merged: Mapping[str, Any] | None = None
    moves: int = 0
    expired_holder: str | None = None  # the daemon whose lease of this visit expired
    is_limited: bool = False  # whether a limit had no room
    answers: list[tuple[Condition, bool]] = field(default_factory=list)  # shared by all contexts
    context: Context | None = None
    read_own_before: bool = False  # whether an earlier context has read own values
    external: External | None = None  # of the present sequence, after its first use
    valid_timezone: str | None = None  # the enrollment's own, or what replaces it

    def begin(self, result: Result | None, jitter: float) -> Decision | None:
        """Start a journey, or apply a result. Return None to follow the steps."""
        if self.at.entered_at is None:
            begun = min(self.at.wake_at or self.now, self.now)
            self.at = self.at._replace(entered_at=begun)
            self.record("enrolled")
        if result is None and (daemon := self.at.leased_by) is not None:
            self.at = self.at._replace(leased_by=None)
            self.expired_holder = daemon
            self.record("lease_expired", f"attempt {self.at.attempt} by {daemon} was interrupted")
        match result:
            case None:
                return None
            case Answer():
                return self._answered(result)
            case Suppressed(message):
                step = self._step_of_result(result)
                self.record("suppressed", message)
                effect = step.behaviour
                exit_ = effect.on_suppressed if isinstance(effect, SideEffect) else "next"
                return self._move_to(_target(step, exit_), is_executed=True)
            case Failed():
                return self._failed(result, jitter)
            case NotStarted(attempts):
                attempt = max(self.at.attempt - attempts, 0)
                self.at = self.at._replace(attempt=attempt, leased_by=None)
                return None
            case LookupAnswer(None, message, asked):
                self.at = self.at._replace(leased_by=None)
                self._record_retry(message)
                delay = LOOKUP_DELAY * (0.5 + jitter / 2)
                return Wait(self.now + max(delay, min(asked or delay, retry.MAX_PAUSE)))
            case LookupAnswer(external):
                self.at = self.at._replace(leased_by=None, last_error=None)
                self.external = external
                return None
            case _:
                assert_never(result)

    def follow(self) -> Decision:
        """Check the goals, then follow step after step until one decides."""
        sequence = self.sequence()
        self.revision = sequence.revision
        if ended := self._check_goals(sequence):
            return ended
        while True:
            if sequence.paused:
                return Wait(self.now)
            step, data = self._step(sequence), self.at.data
            decision = self._execute(sequence, step)
            if (
                self.at.executed
                and isinstance(decision, Wait)
                and _is_waiting(step, decision, self.now)
            ):
                self.at = self.at._replace(executed=())
            if isinstance(decision, Wait) and self._rechecks(sequence, step):
                recheck = self.now + sequence.recheck
                if recheck < decision.until:
                    return decision._replace(until=recheck, waits_until=decision.until)
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
                if ended := self._check_goals(sequence):
                    return ended

    def sequence(self) -> Sequence:
        """Return the definition of the present sequence. Raises EvaluationError."""
        sequence = self.definitions.get(self.at.sequence)
        if sequence is None:
            raise EvaluationError("invalid_step", f"sequence {self.at.sequence!r} does not exist")
        return sequence

    def record(self, action: str, message: str | None = None) -> None:
        """Add an event. Events of one evaluation are a microsecond apart, so they sort by time."""
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
                None if here.entered_at is None else (at - here.entered_at).total_seconds(),
            )
        )

    def _record_retry(self, message: str) -> None:
        """Record a failure that may recur for long only once, and again if its message changes."""
        if printable(message) != self.at.last_error:
            self.record("retry", message)
            self.at = self.at._replace(last_error=printable(message))

    def _current_context(self) -> Context:
        """Return the enrollment after its moves so far, for a step or a goal to read."""
        if self.context is None or not self.context.is_of(self.at):
            self.read_own_before = self.has_read_own
            holidays = self.sequence().holidays
            self.context = Context(
                self.at,
                self.now,
                self._zone(),
                self.external or {},
                holidays,
                answers=self.answers,
            )
        return self.context

    @property
    def has_read_own(self) -> bool:
        """Return whether anything has depended on values of the enrollment itself, not only on its
        state.
        """
        read = self.context is not None and self.context.has_read_own
        return read or self.read_own_before or self.merged is not None

    def _zone(self) -> str:
        """Return the enrollment's time zone, else the sequence's. An unknown one is recorded."""
        own = self.at.timezone
        if own is None:
            return self.sequence().timezone
        if self.valid_timezone is None:
            try:
                dates.zone(own)
                self.valid_timezone = own
            except DefinitionError as error:
                self.valid_timezone = self.sequence().timezone
                self.record("warning", f"{error}; {self.valid_timezone} is used")
        return self.valid_timezone

    def _step(self, sequence: Sequence) -> Step:
        step = sequence.steps.get(self.at.step)
        if step is None:
            raise EvaluationError("invalid_step", f"step {self.at.step!r} does not exist")
        return step

    def _step_of_result(self, result: Answer | Suppressed | Failed) -> Step:
        """Return the present step. If it was removed while its side effect was executed, record the
        result, which would be lost.
        """
        try:
            return self._step(self.sequence())
        except EvaluationError:
            removed = f"the step was removed during attempt {self.at.attempt}"
            self.record("stale_result", f"{removed}: {describe_result(result)}")
            raise

    def _open_goals(self, sequence: Sequence) -> list[Step]:
        """Return the goals that are not met yet, or may be met again once they no longer hold."""
        met = self.at.goals_met
        return [goal for goal in sequence.goals if goal.name not in met or _repeats(goal)]

    def _rechecks(self, sequence: Sequence, step: Step) -> bool:
        """Return whether only a lookup can end this wait."""
        return sequence.lookup is not None and (
            (step.reads_external and isinstance(step.behaviour, InstantStep))
            or any(goal.reads_external for goal in self._open_goals(sequence))
        )

    def _check_goals(self, sequence: Sequence) -> End | Fail | QueryLookup | None:
        """Move to the next step of a goal that is newly met: of several, the definition's last."""
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
            if isinstance(goal.behaviour, InstantStep)
            and goal.behaviour.met is not None
            and _answer_of(goal, goal.behaviour.met, self._current_context())
        ]
        if before := self.at.goals_met:
            holding = {goal.name for goal in met}
            over = {goal.name for goal in open_goals if goal.name in before} - holding
            if over:  # may be met again
                kept = tuple(name for name in before if name not in over)
                self.at = self.at._replace(goals_met=kept)
            met = [goal for goal in met if goal.name not in before]
        if not met:
            return None
        names = tuple(goal.name for goal in met)
        self.at = self.at._replace(goals_met=(*self.at.goals_met, *names))
        others = f", with {', '.join(names[1:])}" if names[1:] else ""
        self.record("goal", f"{names[0]} is met{others}")
        return self._move_to(met[0].next_step, is_goal=True)

    def _look_up(self, sequence: Sequence, step: Step) -> Fail | QueryLookup | None:
        """Return what must happen before external data can be read, or None."""
        if sequence.lookup is None or self.external is not None:
            return None
        effect = step.behaviour
        if isinstance(effect, SideEffect) and (failure := self._after_expired_lease(effect)):
            return failure  # the lookup's lease would hide that of the side effect
        return QueryLookup(step, sequence.lookup)

    def _execute(self, sequence: Sequence, step: Step) -> Decision | None:
        """Execute one step. Return None if it has moved the enrollment."""
        match step.behaviour:
            case InvalidStep(message):
                return Fail("invalid_step", message)
            case ServedElsewhere():
                return Wait(self.now, elsewhere=True)
            case SideEffect() as effect:
                return self._start(sequence, step, effect)
            case InstantStep() as behaviour:
                if step.reads_external and (missing := self._look_up(sequence, step)):
                    return missing
                context = self._current_context()
                context.seed = step.seed
                answer = _answer_of(step, behaviour.answer, context)
            case _:
                assert_never(step.behaviour)
        match answer:
            case Stay(until):
                return Wait(until if until.year < NEVER.year else NEVER)
            case Action.NEXT:
                if behaviour.met is not None and step.name not in self.at.goals_met:
                    self.at = self.at._replace(goals_met=(*self.at.goals_met, step.name))
                self.record(answer.value)
                return self._move_to(step.next_step)
            case Action.ALT_NEXT:
                self.record(answer.value)
                return self._move_to(step.alt_next_step)
            case Update(data, note, has_waited):
                self._merge(data)
                if has_waited:
                    self.at = self.at._replace(executed=())
                self.record(Action.NEXT.value, note)
                return self._move_to(step.next_step)
            case Entry():
                return self._enroll(step, answer)
            case Cancellation():
                return self._cancel(step, answer)
            case Exit(label=label, target=target, sequence=name):
                if name is not None and name != sequence.name and target is not None:
                    return self._enter(step, target, name)
                if label == NEXT.label:
                    self.record("jump", f"to {target}" + (f" of {name}" if name else ""))
                else:
                    self.record("branch", label)
                return self._move_to(target)
            case _:
                assert_never(answer)

    def _start(self, sequence: Sequence, step: Step, effect: SideEffect) -> Decision | None:
        """Decide on a side effect: it may be too early or too late for it, or a loop."""
        if self.at.executed and (key := effect_key(sequence.name, step.name)) in self.at.executed:
            return Fail("loop", _loop_message([*self.at.executed, key]))
        if failure := self._after_expired_lease(effect):
            return failure
        window = sequence.window_of(effect)
        begins_at = self._begins_at(step, window)
        if self.now < begins_at:
            if effect.expires is None or (step.reads_external and self.external is None):
                return Wait(begins_at)
            expires = effect.expires(self._current_context())
            if self.now < expires:
                return Wait(min(begins_at, expires))
        if step.reads_external and (missing := self._look_up(sequence, step)):
            return missing
        expires_at = None if effect.expires is None else effect.expires(self._current_context())
        if expires_at is not None and expires_at <= self.now:
            self.record("expired", f"too late since {expires_at:%Y-%m-%d %H:%M:%S}Z")
            return self._move_to(_target(step, effect.on_expired))
        topic = sequence.topic_of(effect)
        limits = _limits(sequence, step, effect, topic)
        if limits:
            if self.is_limited or self.entered or self.entries or self.cancellations:
                return Wait(self.now)  # a transaction reserves once, and nothing else is open then
            if self.full is not None:
                if self.full.limit >= len(limits):  # the definitions have changed meanwhile
                    return Wait(self.now)
                return self._limited(step, *limits[self.full.limit], self.full.until, expires_at)
        return Execute(
            step,
            effect,
            self._zone(),
            self.external or {},
            sequence.revision,
            expires_at,
            None if window is None else self._closes_at(window),
            topic,
            tuple(limit.reservation(self._current_context(), of) for limit, of in limits),
        )

    def _limited(
        self,
        step: Step,
        limit: Limit,
        topic: str,
        until: datetime,
        expires_at: datetime | None,
    ) -> Decision | None:
        """Wait until a limit has room again, or go on without the side effect."""
        self.is_limited = True
        is_own = isinstance(step.behaviour, SideEffect) and step.behaviour.limit is limit
        message = f"{LIMIT_REACHED} {limit.description}"
        if not is_own:
            message += f", for the topic {topic}"
        if limit.then == "wait":
            if message != self.at.last_error:
                self.record(Action.NOOP.value, message)
                self.at = self.at._replace(last_error=message)
            return Wait(min(until, expires_at or until))
        self.record("limited", message)
        # the steps of a topic with a limit need not have an altNext
        skips = limit.then == "skip" or (not is_own and step.alt_next_step is None)
        return self._move_to(_target(step, "next" if skips else "altNext"))

    def _begins_at(self, step: Step, window: Window | None) -> datetime:
        """Return when a side effect may begin: after its retry delay, and in its window."""
        earliest = max(self.now, self.at.retry_at or self.now)
        if window is None:
            return earliest
        context = self._current_context()
        return windows.begin(
            window,
            earliest,
            dates.zone(context.timezone),
            context.holidays(window.holidays),
            since=context.entered_at,
            share=lambda: context.share(effect_key(step.sequence, step.name)),
        )

    def _closes_at(self, window: Window) -> datetime:
        """Return when a window that is open closes."""
        context = self._current_context()
        zone = dates.zone(context.timezone)
        return windows.closing(window, self.now, zone, context.holidays(window.holidays))

    def _after_expired_lease(self, effect: SideEffect) -> Fail | None:
        """Decide on a side effect whose lease has expired: fail, or start it again.

        The attempt is not counted, as the daemon failed. If that repeats, each retry waits longer:
        the side effect may be what the daemon dies of.
        """
        if self.expired_holder is None or self.at.attempt == 0:
            return None
        if effect.at_most_once:
            return Fail(
                "outcome_unknown",
                f"{self.expired_holder} was interrupted while it executed this step: "
                f"{_CHECK_OUTCOME}",
            )
        if self.expired_leases >= MAX_EXPIRED_LEASES:
            return Fail(
                "error", f"the daemon died in {self.expired_leases + 1} attempts within a day"
            )
        wait = None
        if self.expired_leases:
            crash = Failed("the daemon died")
            wait = self.now + retry.delay(effect.retry, self.expired_leases, crash, jitter=1.0)
        self.at = self.at._replace(attempt=self.at.attempt - 1, retry_at=wait)
        self.expired_holder = None
        return None

    def _enter(self, step: Step, target: str, name: str) -> Decision | None:
        """Jump to a step of another sequence; if that refuses, take altNext, if there is one. Wait
        if its definition is outdated.
        """
        if self.refused.get(name) == "outdated":
            return Wait(self.now + LOCKED_DELAY)
        if (refusal := self._refusal(name)) is not None:
            if step.alt_next_step is None:
                return refusal
            self.record(Action.ALT_NEXT.value, refusal.message)
            return self._move_to(step.alt_next_step)
        known = self.definitions.get(name)
        self.entered += ((name, known.revision if known else None),)
        self.record("jump", f"to {target} of {name}")
        return self._move_to(target, name)

    def _enroll(self, step: Step, entry: Entry) -> End | Fail | None:
        """Enroll a subject elsewhere and continue. If that is refused, take altNext, if there is
        one; otherwise continue if the subject is enrolled already.
        """
        executed = (*self.at.executed, effect_key(step.sequence, step.name))
        if executed[-1] in self.at.executed:
            return Fail("loop", _loop_message([*executed]))
        name, subject = entry.sequence, entry.subject
        known = self.definitions.get(name)
        failure = self.refused.get(entry.key)
        if known is not None and known.archived:
            failure = "archived"
        if failure is None:
            first = known.steps.get(known.first_step) if known else None
            if first is not None and isinstance(first.behaviour, ServedElsewhere):
                entry = entry._replace(elsewhere=first.name)
            self.entries += (entry._replace(executed=executed),)
            self.at = self.at._replace(executed=executed)
            self.record(Action.NEXT.value, f"enrolled {subject!r} in {name}")
            return self._move_to(step.next_step)
        if failure == "missing":
            return Fail("invalid_step", f"step {step.name!r}: sequence {name!r} does not exist")
        message = f"{subject!r} was not enrolled in {name}: " + (
            "the sequence is archived" if failure == "archived" else "its reentry policy refuses"
        )
        if step.alt_next_step is None and failure == "archived":
            return Fail(failure, f"step {step.name!r}: {message}")
        is_alternative = step.alt_next_step is not None
        self.record((Action.ALT_NEXT if is_alternative else Action.NEXT).value, message)
        return self._move_to(step.alt_next_step if is_alternative else step.next_step)

    def _cancel(self, step: Step, cancellation: Cancellation) -> Decision | None:
        """Cancel enrollments of a subject elsewhere and continue. Wait while another session has
        locked one of them.
        """
        if cancellation.key in self.refused:
            return Wait(self.now + LOCKED_DELAY)
        by = f"by step {step.name} of {step.sequence}, enrollment {self.at.id}"
        self.cancellations += (cancellation._replace(message=printable(by)),)
        message = f"cancelled {cancellation.subject!r} in {cancellation.sequence}"
        self.record(Action.NEXT.value, message)
        return self._move_to(step.next_step)

    def _refusal(self, name: str) -> Fail | None:
        """Return why a jump cannot enter a sequence, or None."""
        failure = self.refused.get(name)
        known = self.definitions.get(name)
        if failure == "archived" or (known is not None and known.archived):
            return Fail("archived", f"sequence {name!r} is archived: a GoTo cannot enter it")
        if failure is not None:
            message = f"sequence {name!r} refuses a second entry of the subject"
            return Fail("already_enrolled", message)
        return None

    def _move_to(
        self,
        target: str | None,
        sequence: str | None = None,
        *,
        is_executed: bool = False,
        is_goal: bool = False,
    ) -> End | None:
        """Move to another step, or end. `is_executed`: from a side effect that was executed.

        If items have arrived since it collected, it returns to collect instead of ending, unless a
        goal ends it.
        """
        if target is None and not is_goal and self._has_items():
            target = self.sequence().collects
        if target is None:
            self.at = self.at._replace(leased_by=None, last_error=None)
            return End()
        self.moves += 1
        self.expired_holder = None
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

    def _has_items(self) -> bool:
        """Return whether a sequence that collects would lose items by ending."""
        if self.sequence().collects is None:
            return False
        data = self._current_context().enrollment.data
        return (
            '"items"' in data
            and isinstance(items := parse_data(data).get("items"), list)
            and (items != [])
        )

    def _change_goals(self, sequence: str) -> None:
        """Keep the goals met in this sequence for a return, and restore those of the next one."""
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
        step = self._step_of_result(answer)
        if answer.action is Action.NOOP:
            effect = step.behaviour
            if answer.unknown and isinstance(effect, SideEffect) and effect.at_most_once:
                return Fail("outcome_unknown", f"{answer.message}: {_CHECK_OUTCOME}")
            if answer.message:
                self.record(answer.action.value, answer.message)
            wait = NOOP_DELAY if answer.retry_after is None else answer.retry_after
            again = answer.wake_at or self.now + min(max(wait, timedelta(0)), retry.MAX_PAUSE)
            executed = () if again > self.now else self.at.executed
            self.at = self.at._replace(
                attempt=0, retry_at=again, leased_by=None, last_error=None, executed=executed
            )
            return None
        target, message = step.next_step, answer.message
        if answer.action is Action.ALT_NEXT:
            target, message = step.alt_next_step, _alt_message(step, message)
        self.record(answer.action.value, message)
        return self._move_to(target, is_executed=True)

    def _merge(self, data: Mapping[str, Any]) -> None:
        merged = merge_data(parse_data(self.at.data, exact=True), data)
        self.at = self.at._replace(data=exact_json.dumps(merged))
        self.merged = {**(self.merged or {}), **data}

    def _failed(self, failed: Failed, jitter: float) -> Decision | None:
        step = self._step_of_result(failed)
        effect = step.behaviour if isinstance(step.behaviour, SideEffect) else SideEffect(None)
        if failed.unknown:
            failed = replace(failed, message=f"{failed.message}; it may have taken place")
            if effect.at_most_once:
                return Fail("outcome_unknown", f"{failed.message}: {_CHECK_OUTCOME}")
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
            self.record(Action.ALT_NEXT.value, _alt_message(step, failed.message))
            return self._move_to(step.alt_next_step, is_executed=True)
        return Fail(failed.failure, failed.message)


def _alt_message(step: Step, message: str | None) -> str | None:
    """Return the message of an altNext event: that the journey ends there if the step has no
    altNext.
    """
    if step.alt_next_step is not None:
        return message
    ends = "the step has no altNext, so the enrollment ends here"
    return f"{message}; {ends}" if message else ends


def _repeats(goal: Step) -> bool:
    return isinstance(goal.behaviour, InstantStep) and goal.behaviour.repeats


def _is_waiting(step: Step, decision: Wait, now: datetime) -> bool:
    """Return whether an enrollment waits at a step, rather than for a retry or an unavailable
    runner.
    """
    return isinstance(step.behaviour, InstantStep) and decision.until > now


def _loop_message(executed: list[str]) -> str:
    """Describe the loop that leads back to the last of these side effects."""
    cycle = executed[executed.index(executed[-1]) :]
    return (
        f"a loop that never waits: {' → '.join(cycle)}; add a step that waits, so that time passes "
        "before a side effect is executed again"
    )


def _answer_of(step: Step, function: Callable[[Context], T], context: Context) -> T:
    """Return the answer of a step or a goal. Raises EvaluationError, which names it."""
    try:
        return function(context)
    except EvaluationError as error:
        raise EvaluationError(error.failure, f"step {step.name!r}: {error}") from error


def _limits(
    sequence: Sequence, step: Step, effect: SideEffect, topic: str | None
) -> list[tuple[Limit, str]]:
    """Return the limits of a side effect, its own first, with the topic that each counts."""
    found = []
    if effect.limit is not None:
        counted = effect.limit.topic or topic or effect_key(sequence.name, step.name)
        found.append((effect.limit, counted))
    if topic is not None and sequence.topic_limits:
        of_topic = sequence.topic_limits.get(topic)
        if isinstance(of_topic, Limit):
            found.append((of_topic, topic))
    return found


def _target(step: Step, skip: Skip) -> str | None:
    """Return where a skipped side effect leads."""
    return {"next": step.next_step, "altNext": step.alt_next_step, "end": None}[skip]
