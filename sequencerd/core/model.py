"""A definition as data: sequences, steps and what they do."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from datetime import date, datetime, time, timedelta
from enum import StrEnum
from hashlib import sha256
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from sequencerd.core import exact_json
from sequencerd.core.faults import Fault, KeyPath
from sequencerd.core.view import Context, Holidays


class Action(StrEnum):
    """The answer of a step for an enrollment, as in the original."""

    NEXT = "next"
    ALT_NEXT = "altNext"
    NOOP = "noop"  # wait here, and be executed again later


@dataclass(frozen=True, slots=True)
class Stay:
    """A step's answer: wait here until a time (NEVER: until something changes)."""

    until: datetime


class Exit(NamedTuple):
    """Where a step leads, and under which condition."""

    label: str  # of the action or the branch
    path: KeyPath  # of the target in the step
    target: str | None = None  # None: the end
    sequence: str | None = None  # of the target, if the step names it
    condition: Any = None  # taken if it holds and no earlier exit is; None: in all other cases
    condition_path: KeyPath = ("config",)
    at_once: Literal["always", "sometimes", "never"] = "always"
    """Whether the exit is taken on arrival, before time has passed."""
    reason: str = ""  # for "sometimes": in which case, such as "if its date is past"
    getter: tuple[str, frozenset[int]] | None = None  # for "sometimes": what it gives at such times
    is_optional: bool = False  # omitted if the step names no target


_TARGET = Exit._fields.index("target")

NEXT = Exit("next", ("next",))
ALT_NEXT = Exit("altNext", ("altNext",))
"""The exits whose targets the step names; those of other exits are in its config."""

NEXT_AND_ALT_NEXT = (NEXT, ALT_NEXT._replace(is_optional=True))
"""The exits of a step about which nothing else is known."""


@dataclass(frozen=True, slots=True)
class Update:
    """A step's answer: merge this into the data, without keys that are REMOVED, and continue."""

    data: Mapping[str, Any]
    message: str | None = None
    has_waited: bool = False  # for what came from outside: it is no loop to come back


class Entry(NamedTuple):
    """A step's answer: enroll this subject in another sequence, and continue."""

    sequence: str
    subject: str
    data: str  # JSON text
    timezone: str | None
    executed: tuple[str, ...] = ()  # side effects executed since the last wait, with this step
    elsewhere: str | None = None  # its first step, if other daemons execute that

    @property
    def key(self) -> RefusalKey:
        """Return the key of a refusal."""
        return ("enroll", self.sequence, self.subject)


class Cancellation(NamedTuple):
    """A step's answer: cancel this subject's enrollments in a sequence, and continue."""

    sequence: str
    subject: str
    message: str = ""  # for their history

    @property
    def key(self) -> RefusalKey:
        """Return the key of a refusal."""
        return ("cancel", self.sequence, self.subject)


RefusalKey = str | tuple[str, str, str]
Refusals = Mapping[Any, str]  # by RefusalKey, or by sequence name alone
"""Refusals with the codes of their reasons: jumps by their sequence, and others by their key."""
NOTHING_REFUSED: Refusals = MappingProxyType({})

StepAnswer = Literal[Action.NEXT, Action.ALT_NEXT] | Stay | Exit | Update | Entry | Cancellation
"""An exit that the config names, or an action, the others."""


@dataclass(frozen=True, slots=True)
class InstantStep:
    """A built-in step without a side effect: a function of the enrollment and the time, which may
    raise EvaluationError.

    Only a goal has `met`: whether it is reached. A goal that `repeats` can be reached again once it
    no longer holds.
    """

    answer: Callable[[Context], StepAnswer]
    exits: tuple[Exit, ...] = (NEXT,)
    met: Callable[[Context], bool] | None = None
    repeats: bool = False
    collects: bool = False  # items, which must not be lost when the enrollment ends
    concerns: tuple[tuple[str, str], ...] = ()  # verb and name of the sequences that it affects


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How often and how soon a failed side effect is retried; times in seconds.

    Retries end after so many attempts, or when the waits between them add up to `give_up_after`.
    """

    attempts: int | None = 8
    first_delay: float = 10.0
    longest_delay: float = 3600.0
    give_up_after: float | None = None


DEFAULT_RETRY = RetryPolicy()
"""The default for custom runners."""

MESSAGE_RETRY = RetryPolicy(None, 60.0, 3600.0, 2 * 86400.0)
"""The default for messages: mail servers may refuse for hours what they accept later."""


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits of a server: for each daemon, simultaneous calls and enrollments in a call; for
    all daemons together, calls per second. A call that takes longer than `timeout` seconds is
    cancelled.
    """

    concurrency: int = 10
    timeout: float = 30.0
    batch_size: int = 1
    per_second: float | None = None

    def __post_init__(self) -> None:
        """Raise ValueError for limits that would allow nothing."""
        for name in ("concurrency", "timeout", "batch_size", "per_second"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} is {value}: write a number above 0")


MESSAGE_LIMITS = Limits()
"""The default for messages. Each is a call of its own and written when it is sent, so a crash
repeats few.
"""

CALL_LIMITS = Limits(concurrency=4, batch_size=100)
"""The default for custom runners called over HTTP."""

LOOKUP_LIMITS = Limits(concurrency=2, batch_size=1000)
"""The default for lookups."""


@dataclass(frozen=True, slots=True)
class Window:
    """The times of a week at which something may begin: on some days (Monday is 0), from `start`
    until `end`, or until midnight if that is None.

    Where `end` is not after `start`, it is a time of the next day. `holidays` names the calendar on
    whose days it does not open. Those that wait for the same opening begin within `spread` of it.
    """

    days: frozenset[int] = frozenset(range(7))
    start: time = time.min
    end: time | None = None
    holidays: str | None = None
    spread: timedelta = timedelta(0)

    def opens_on(self, day: date, holidays: Collection[date]) -> bool:
        """Return whether the window opens on a day."""
        return day.weekday() in self.days and day not in holidays

    def shows(self, wall: datetime, holidays: Collection[date]) -> bool:
        """Return whether the window is open at a wall time."""
        day, clock = wall.date(), wall.time()
        if self.end is None or self.start < self.end:
            is_within = self.start <= clock and (self.end is None or clock < self.end)
            return is_within and self.opens_on(day, holidays)
        if clock >= self.start:
            return self.opens_on(day, holidays)
        return (
            clock < self.end and day > date.min and self.opens_on(day - timedelta(days=1), holidays)
        )


Skip = Literal["next", "altNext", "end"]
"""Where an enrollment goes if its side effect is skipped."""


LIMIT_REACHED = "the limit is reached:"
"""The beginning of last_error while an enrollment waits for a limit."""


class Reservation(NamedTuple):
    """A place in the period of a limit."""

    key: bytes  # hash of the topic and the text that are counted together
    topic: str
    at_most: int
    per: timedelta


@dataclass(frozen=True, slots=True)
class Limit:
    """How many side effects may begin for a key, such as a subject, in any period."""

    key: Callable[[Context], str]
    topic: str | None  # None: the topic of the step; without one, the step is counted alone
    at_most: int
    per: timedelta
    then: Literal["wait", "skip", "altNext"]
    description: str  # such as "3 in 7 days", for messages

    def reservation(self, context: Context, topic: str) -> Reservation:
        """Return the place to reserve before the side effect begins. Raises EvaluationError."""
        counted = f"{topic}\0{self.key(context)}".encode("utf-8", "replace")
        return Reservation(sha256(counted).digest()[:16], topic, self.at_most, self.per)


class LimitReached(NamedTuple):
    """Which limit of a side effect has no room, the step's own first, and until when."""

    limit: int
    until: datetime


@dataclass(frozen=True, slots=True)
class SideEffect:
    """A step with a side effect: `program` is its compiled config."""

    program: object
    retry: RetryPolicy = field(default_factory=RetryPolicy)
    on_error: Literal["fail", "altNext"] = "fail"
    at_most_once: bool = False
    on_suppressed: Skip = "next"
    expires: Callable[[Context], datetime] | None = None  # it does not begin after this time
    on_expired: Skip = "next"
    window: Window | None = None  # when it may begin, unless it follows its sequence
    follows_window: bool = True  # of its sequence
    topic: str | None = None  # what it is about, unless it follows its sequence
    follows_topic: bool = True  # of its sequence
    limit: Limit | None = None
    exits: tuple[Exit, ...] = NEXT_AND_ALT_NEXT


class MessageContext(NamedTuple):
    """The common parts of a sequence's messages."""

    locale: str | None = None  # the path of the subject's language
    partials: tuple[tuple[str, str], ...] = ()  # templates of partials, by name


NOTHING_SHARED = MessageContext()


@dataclass(frozen=True, slots=True)
class InvalidStep:
    """Why a step cannot be executed. Enrollments that reach it fail with `invalid_step`."""

    message: str
    faults: tuple[Fault, ...] = ()  # the same errors, by place in the config
    exits: tuple[Exit, ...] = NEXT_AND_ALT_NEXT
    may_pass: bool = False  # a limit was reached, which may not be so when it is compiled again


TopicLimits = Mapping[str, Limit | InvalidStep]
"""The limits of the topics in sequencer.topics that have one."""


@dataclass(frozen=True, slots=True)
class ServedElsewhere:
    """A step that other daemons execute: they serve its type, this daemon does not."""

    problem: str  # the problem that it would have here
    exits: tuple[Exit, ...] = NEXT_AND_ALT_NEXT


Behaviour = InstantStep | SideEffect | InvalidStep | ServedElsewhere


@dataclass(frozen=True, slots=True)
class StoredConfig:
    """The config of a step as JSON text, and what it is compiled to.

    It is parsed whenever it is read, which is seldom: as objects, it would take several times the
    memory.
    """

    text: str
    behaviour: Behaviour
    reads_external: bool = False
    calendars: frozenset[str] = frozenset()

    def parse(self) -> dict[str, Any]:
        """Return the config; if it cannot be read, which is a problem of its step, nothing."""
        try:
            config: dict[str, Any] = exact_json.loads(self.text, exact=False)
        except (ValueError, RecursionError):
            return {}
        return config


@dataclass(frozen=True, slots=True)
class Step:
    """A node of a sequence. `behaviour` is made from `type` and `config`."""

    sequence: str
    name: str
    type: str
    source: Mapping[str, Any] | StoredConfig
    next_step: str | None
    alt_next_step: str | None
    behaviour: Behaviour
    position: int = 0  # in the definition: of several goals met at once, the last one wins
    reads_external: bool = False
    seed: str | None = None  # of a Split: what assigns subjects; None: its names
    calendars: frozenset[str] = frozenset()  # of holidays, which its config names

    @property
    def config(self) -> Mapping[str, Any]:
        """Return its config."""
        return self.source.parse() if isinstance(self.source, StoredConfig) else self.source

    @property
    def exits(self) -> tuple[Exit, ...]:
        """Return the exits of its behaviour, with the targets that the step names."""
        targets = {NEXT.path: self.next_step, ALT_NEXT.path: self.alt_next_step}
        found = [  # written out: `_replace` takes three times as long
            Exit._make((*exit_[:_TARGET], targets[exit_.path], *exit_[_TARGET + 1 :]))
            if exit_.path in targets
            else exit_
            for exit_ in self.behaviour.exits
        ]
        return tuple(one for one in found if one.target is not None or not one.is_optional)


@dataclass(frozen=True, slots=True)
class Sequence:
    """A named graph of steps. `goals` are its Goal steps, the definition's last one first."""

    name: str
    first_step: str
    timezone: str
    steps: Mapping[str, Step]
    paused: bool = False
    goals: tuple[Step, ...] = ()
    revision: int = 0  # the database increases it with every change
    lookup: str | None = None  # the source of external data
    recheck: timedelta = timedelta(minutes=1)  # how often what reads external data is evaluated
    archived: bool = False  # GoTo steps of other sequences cannot enter it
    window: Window | None = None  # when its side effects may begin
    topic: str | None = None  # what its side effects are about
    topic_limits: TopicLimits | None = None  # None if no database was read
    shared: MessageContext = NOTHING_SHARED  # by its messages
    holidays: Holidays | None = None  # None if no database was read: no day is a holiday
    collects: str | None = None  # its first step that collects items
    braked_until: datetime | None = None  # until then a brake counts its side effects
    is_stopped: bool = False  # paused by its brake
    resumed_at: datetime | None = None  # nothing in it was due before

    def topic_of(self, effect: SideEffect) -> str | None:
        """Return what a side effect of the sequence is about."""
        return self.topic if effect.follows_topic else effect.topic

    def window_of(self, effect: SideEffect) -> Window | None:
        """Return when a side effect of the sequence may begin."""
        return self.window if effect.follows_window else effect.window


Definitions = Mapping[str, Sequence]
