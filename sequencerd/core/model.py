"""The terms of the system as data. Start here, then read advance.py."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Set
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time, timedelta
from enum import StrEnum
from functools import cached_property, lru_cache
from hashlib import sha256
from shlex import quote
from typing import Any, Final, Literal, NamedTuple, assert_never
from uuid import UUID

from sequencerd.core import exact_json

NEVER = datetime.max.replace(tzinfo=UTC)
"""The wake time of enrollments that only wake by a change; PostgreSQL's 'infinity'."""

MAX_MESSAGE = 2000  # characters
MAX_NAME = 200  # bytes of a name of a sequence, step or calendar, as in the schema
MAX_SUBJECT = 1000  # bytes, as in the schema


KeyPath = tuple[str | int, ...]
"""The keys and indexes of a path to a value."""


class Fault(NamedTuple):
    """An error at one place of a definition, with advice."""

    path: KeyPath
    message: str

    def __str__(self) -> str:
        return f"{'.'.join(map(str, self.path))}: {self.message}" if self.path else self.message


class DefinitionError(ValueError):
    """A definition that cannot be executed: a sentence, or all errors that were found."""

    def __init__(self, wrong: str | Iterable[Fault]) -> None:
        self.faults = (Fault((), wrong),) if isinstance(wrong, str) else tuple(wrong)
        super().__init__("; ".join(map(str, self.faults)))


FAILURES = (
    "error",
    "outcome_unknown",
    "bad_data",
    "invalid_step",
    "unsatisfiable",
    "loop",
    "already_enrolled",
    "archived",
)
"""The codes of failures, as docs/failures.md explains them."""


class EvaluationError(Exception):
    """An enrollment that cannot continue. `failure` is the code for its row, the message the
    reason.
    """

    def __init__(self, failure: str, message: str) -> None:
        super().__init__(message)
        self.failure = failure


class Action(StrEnum):
    """The answer of a step for an enrollment, as in the original."""

    NEXT = "next"
    ALT_NEXT = "altNext"
    NOOP = "noop"  # wait here, and be executed again later


# --- definitions


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

StepAnswer = Action | Stay | Exit | Update | Entry | Cancellation
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

Holidays = Mapping[str, frozenset[date]]
"""The days of each calendar in sequencer.holidays."""


def no_holidays(calendar: str) -> str:
    """Explain why a calendar cannot be used."""
    return (
        f"calendar {calendar!r} has no holidays: fill it with `sequencerd holidays COUNTRY YEAR "
        f"--calendar {quote(calendar)}`, or insert its days into the table holidays"
    )


def share(seed: str, subject: str) -> float:
    """Return a number from 0 to 1 for a subject: constant for a seed, uniform over all subjects."""
    key = f"{seed}\0{subject}".encode("utf-8", "replace")
    return float(int.from_bytes(sha256(key).digest()[:6]) / 2**48)


# --- an enrollment

StepKey = tuple[str, str]
"""A step of a sequence, by the names of both: where enrollments are, and a key of the heap."""

Fence = tuple[int, int, int, str | None]
"""Identifies a lease of an enrollment: id, visit, number of the lease in it, and the daemon. The
attempt would not suffice: it is given back if the enrollment is not at fault.
"""


class Enrollment(NamedTuple):
    """A subject's journey: where it is and since when. `entered_at` is None until it has begun.

    A tuple in the order of the columns that are read. Everything that is made for each move of each
    enrollment is a tuple, because tuples are made several times faster than frozen dataclasses.
    """

    # its own values
    id: int
    subject: str
    data: str  # JSON text: most moves don't read it
    created_at: datetime
    tag: UUID  # random
    original_id: str | None  # in the original, of one that was imported
    wake_at: datetime | None  # as it was read
    # its state
    sequence: str
    step: str
    timezone: str | None
    entered_at: datetime | None = None
    visit: int = 1
    attempt: int = 0
    leases: int = 0  # the number of its latest lease in this visit
    retry_at: datetime | None = None  # the side effect is not started before
    leased_by: str | None = None  # the daemon that executes the side effect until wake_at
    last_error: str | None = None  # of this visit
    goals_met: tuple[str, ...] | list[str] = ()  # in its sequence
    goals_elsewhere: str | None = None  # JSON text: the goals met by sequence that it has left
    executed: tuple[str, ...] | list[str] = ()  # side effects since it last waited, see effect_key

    @property
    def key(self) -> str:
        """The idempotency key of the side effect of this visit.

        Id and visit are for readers. Half of the random tag distinguishes it from keys of other
        databases. The microsecond at which the visit began distinguishes it from keys that this
        database made before it was restored: then, the visit begins at another time. The key of the
        first visit is the same after a restore, even if the visit begins later.
        """
        begun = self.created_at if self.visit == 1 else self.entered_at
        return f"{self.id}:{self.visit}:{self.tag.hex[:16]}{_microseconds(begun) if begun else ''}"

    @property
    def fence(self) -> Fence:
        """Return values that are unchanged until the enrollment is moved or leased again."""
        return (self.id, self.visit, self.leases, self.leased_by)

    @property
    def goals(self) -> tuple[tuple[str, ...] | list[str], str | None]:
        """Return the goals that it has met, in its sequence and in others."""
        return self.goals_met, self.goals_elsewhere

    @property
    def state(self) -> tuple[object, ...]:
        """Return all values that are not its own, without its wake time."""
        return self[_STATE_BEGINS:]

    @property
    def hashable_state(self) -> tuple[object, ...]:
        """Return its state, hashable."""
        lists = tuple(self.goals_met), tuple(self.executed)
        # flat, it would take twice as long
        return self[_STATE_BEGINS:_LISTS], self.goals_elsewhere, lists

    def in_state_of(self, other: Enrollment) -> Enrollment:
        """Return the same enrollment in the state of another."""
        # `_make` takes twice as long
        return tuple.__new__(Enrollment, self[:_WAKE_AT] + other[_WAKE_AT:])

    # What most moves do is written out: `_replace` takes twice as long.

    def entering(
        self, sequence: str, step: str, now: datetime, executed: tuple[str, ...] | list[str]
    ) -> Enrollment:
        """Return it at another step: a new visit, in which nothing has been tried."""
        return Enrollment(
            self.id,
            self.subject,
            self.data,
            self.created_at,
            self.tag,
            self.original_id,
            None,
            sequence,
            step,
            self.timezone,
            now,
            self.visit + 1,
            0,
            0,
            None,
            None,
            None,
            self.goals_met,
            self.goals_elsewhere,
            executed,
        )

    def leased_to(self, daemon: str, number: int) -> Enrollment:
        """Return it with one more attempt, leased by this daemon with this number."""
        return Enrollment(
            self.id,
            self.subject,
            self.data,
            self.created_at,
            self.tag,
            self.original_id,
            None,
            self.sequence,
            self.step,
            self.timezone,
            self.entered_at,
            self.visit,
            self.attempt + 1,
            number,
            None,
            daemon,
            self.last_error,
            self.goals_met,
            self.goals_elsewhere,
            self.executed,
        )


_WAKE_AT = Enrollment._fields.index("wake_at")
_STATE_BEGINS = Enrollment._fields.index("sequence")
_LISTS = Enrollment._fields.index("goals_met")


def effect_key(sequence: str, step: str) -> str:
    """Return the name of a step with a side effect, unique among all sequences; SQL has the same
    function.
    """
    if "/" in sequence or "%" in sequence:
        sequence = sequence.replace("%", "%25").replace("/", "%2F")
    return f"{sequence}/{step}"


External = Mapping[str, Any]
"""External data about a subject; empty without a lookup."""


Condition = Callable[[str], bool]
"""A condition on a view, given as JSON text."""


class Context:
    """The evaluation context: what steps and goals read of an enrollment, and the time.

    `has_read_own` tells whether values of the enrollment itself were read, and not only its state.
    Conditions that read only the data do not count: `answers` has their results.
    """

    __slots__ = (
        "_enrollment",
        "_holidays",
        "answers",
        "external",
        "has_read_own",
        "now",
        "seed",
        "timezone",
    )

    def __init__(
        self,
        enrollment: Enrollment,
        now: datetime,
        timezone: str,
        external: External,
        holidays: Holidays | None = None,
        *,
        answers: list[tuple[Condition, bool]] | None = None,
    ) -> None:
        self.answers = [] if answers is None else answers
        self.external = external
        self._holidays = holidays
        self.now = now
        self.timezone = timezone
        self.has_read_own = False
        self.seed: str | None = None  # of the step that reads it
        self._enrollment = enrollment

    def is_of(self, enrollment: Enrollment) -> bool:
        """Return whether this is the context of exactly this enrollment."""
        return self._enrollment is enrollment

    @property
    def enrollment(self) -> Enrollment:
        """Return the whole enrollment; this counts as reading its own values."""
        self.has_read_own = True
        return self._enrollment

    @property
    def entered_at(self) -> datetime:
        """Return since when the enrollment has been at its step."""
        return self._enrollment.entered_at or self.now

    def share(self, seed: str) -> float:
        """Return the subject's position between 0 and 1."""
        return share(seed, self.enrollment.subject)

    def holidays(self, calendar: str | None) -> Collection[date]:
        """Return the days of a calendar. Raises EvaluationError if it has none."""
        if calendar is None or self._holidays is None:
            return ()
        if calendar not in self._holidays:
            raise EvaluationError("invalid_step", no_holidays(calendar))
        return self._holidays[calendar]

    def holds(self, condition: Condition, roots: Set[str]) -> bool:
        """Return whether a condition that reads these keys of the view holds."""
        if roots != _DATA:
            return condition(self.json(roots))
        answer = condition(data_view(self._enrollment))
        self.answers.append((condition, answer))
        return answer

    def json(self, roots: Set[str] | None) -> str:
        """Return a view with these keys (None: all) as JSON text."""
        if roots is None or not roots <= _STATE:
            self.has_read_own = True
        if roots == _DATA:
            return data_view(self._enrollment)
        others = _about(self._enrollment, self.timezone, self.entered_at, self.external)
        if roots is not None:
            others = {name: value for name, value in others.items() if name in roots}
        has_data = roots is None or "data" in roots
        return _with_data(others, self._enrollment.data if has_data else None)


def data_view(enrollment: Enrollment) -> str:
    """Return a view that contains only the data, as JSON text."""
    return f'{{"data":{enrollment.data}}}'


@lru_cache(maxsize=16)  # the enrollments of a batch enter their steps at one time
def _microseconds(time: datetime) -> str:
    """Format a time as 16 hexadecimal digits."""
    return f"{int(time.timestamp() * 1_000_000) % 2**64:016x}"


_DATA = {"data"}
_STATE = {"sequence", "step", "timezone", "visit", "attempt", "startStep"}
"""The values that all enrollments in one state share."""


class StateView(dict[str, Any]):
    """The values of a view that all enrollments in one state share, and None for the others."""

    @cached_property
    def text(self) -> str:
        """Return the shared values as JSON."""
        return json.dumps({name: value for name, value in self.items() if name not in _OWN_NAMES})


_OWN_NAMES = ("id", "originalId", "subject", "dataLookup", "startSequence")


def state_view(
    enrollment: Enrollment, timezone: str, entered_at: datetime, external: External
) -> StateView:
    """Return the view of a state; the names are the original's."""
    return StateView(
        {
            "id": None,
            "originalId": None,
            "subject": None,
            "dataLookup": None,
            "sequence": enrollment.sequence,
            "step": enrollment.step,
            "external": external,
            "timezone": timezone,
            "visit": enrollment.visit,
            "attempt": enrollment.attempt,
            "startSequence": None,
            "startStep": iso(entered_at),
        }
    )


def view(enrollment: Enrollment, timezone: str, entered_at: datetime, external: External) -> View:
    """Return what runners receive. Raises EvaluationError for data that cannot be read."""
    return view_in_state(enrollment, state_view(enrollment, timezone, entered_at, external))


def view_in_state(enrollment: Enrollment, of_state: StateView) -> View:
    """Return what runners receive, given the values of its state. Raises EvaluationError for data
    that cannot be read.
    """
    made = View(of_state)
    _add_own(made, enrollment)
    made["data"] = parse_data(enrollment.data)
    made.data = enrollment.data
    made.state = of_state
    return made


def _about(
    enrollment: Enrollment, timezone: str, entered_at: datetime, external: External
) -> dict[str, Any]:
    """Return the values that `get` paths, templates and custom runners read, without the data."""
    values = {**state_view(enrollment, timezone, entered_at, external)}
    _add_own(values, enrollment)
    return values


def _add_own(values: dict[str, Any], enrollment: Enrollment) -> None:
    """Set the values that a view of the enrollment's state leaves open."""
    original_id = enrollment.original_id
    values["id"] = enrollment.id
    values["originalId"] = enrollment.id if original_id is None else _original_id(original_id)
    values["subject"] = values["dataLookup"] = enrollment.subject
    values["startSequence"] = iso(enrollment.created_at)


def _original_id(id_: str) -> int | str:
    """Return the id of an enrollment in the original."""
    return int(id_) if id_.isascii() and id_.isdecimal() else id_


class View(dict[str, Any]):
    """The values that `get` paths, templates and custom runners may read, with their JSON text."""

    data: str  # the JSON text of the data
    state: StateView | None = None  # the shared values, unless it has others

    @classmethod
    def of(cls, values: Mapping[str, Any], data: str) -> View:
        """Make a view of these values, with this text of the data; without `__init__`, which takes
        longer.
        """
        made = cls(values)
        made.data = data
        return made

    @cached_property
    def text(self) -> str:
        """Return it as JSON, with the data as in PostgreSQL."""
        if self.state is None:
            others = {name: value for name, value in self.items() if name != "data"}
            return _with_data(others, self.data)
        # written out: to encode a dict takes three times as long
        original_id, subject = self["originalId"], json.dumps(self["subject"])
        if isinstance(original_id, str):
            original_id = json.dumps(original_id)
        return (
            f'{{"data":{self.data},"id": {self["id"]}, "originalId": {original_id}, '
            f'"subject": {subject}, "dataLookup": {subject}, '
            f'"startSequence": "{self["startSequence"]}", {self.state.text[1:]}'
        )


def _with_data(others: Mapping[str, Any], data: str | None) -> str:
    """Return JSON text, with the data as in PostgreSQL."""
    text = json.dumps(others)
    if data is None:
        return text
    return f'{{"data":{data},{text[1:]}' if others else f'{{"data":{data}}}'


_decode = json.JSONDecoder().raw_decode  # without a search for blanks, which jsonb lacks


def parse_data(text: str, *, exact: bool = False) -> dict[str, Any]:
    """Parse an enrollment's data; `exact` keeps all digits, for data that are written again. Raises
    EvaluationError for values that PostgreSQL accepts and Python does not.
    """
    try:
        data: dict[str, Any]
        if exact:
            data = exact_json.loads(text)
        else:
            exact_json.check_depth(text)
            data = _decode(text)[0]
    except (ValueError, RecursionError) as error:
        raise EvaluationError("bad_data", f"data cannot be read: {error}") from error
    return data


REMOVED: Final = object()
"""In changes of data, the value of a key that is removed."""


def merge_data(data: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return data with changes of their top-level keys."""
    return {key: value for key, value in {**data, **changes}.items() if value is not REMOVED}


def printable(text: str) -> str:
    """Return text that PostgreSQL accepts and a terminal can show: no control characters, and
    limited in length.
    """
    text = text if len(text) <= MAX_MESSAGE else f"{text[:MAX_MESSAGE]}..."
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text
    )


@lru_cache(maxsize=4096)  # the enrollments of a batch have entered their step at one time
def iso(instant: datetime) -> str:
    """Format an instant (aware, in UTC) in ISO 8601 with milliseconds, like JavaScript."""
    return instant.isoformat(timespec="milliseconds")[:23] + "Z"


# --- tasks and results


class Task(NamedTuple):
    """One enrollment for a runner: `key` is its idempotency key, `view` contains the values that
    may be read.
    """

    key: str
    view: Mapping[str, Any]
    expires: float | None = None  # a time of the event loop's clock
    topic: str | None = None  # what it is about
    lease_expired: Callable[[float], bool] | None = None  # whether its lease is over at such a time

    def is_late(self, now: float) -> bool:
        """Return whether it is too late to begin, after a queue or a limited rate: the result is
        NotStarted.
        """
        if self.expires is not None and now >= self.expires:
            return True
        return self.lease_expired is not None and self.lease_expired(now)


class Undeliverable(NamedTuple):
    """An address to be suppressed, because no message can reach it or it opted out at its provider.

    `source` says how that became known, as in `sequencer.suppressions`.
    """

    channel: str
    address: str
    reason: str
    source: Literal["refused", "bounce", "complaint", "stop", "unsubscribe", "console"] = "refused"


@dataclass(frozen=True, slots=True)
class Answer:
    """The side effect is done or, with NOOP, to be executed again: at `wake_at`, or later.

    `undeliverable` are recipients that turned out to be undeliverable.
    """

    action: Action = Action.NEXT
    message: str | None = None
    data: Mapping[str, Any] | None = None  # merged into the enrollment's data
    wake_at: datetime | None = None
    retry_after: timedelta | None = None
    undeliverable: tuple[Undeliverable, ...] = ()


Attribution = Literal["enrollment", "server", "unclear"]
"""The cause of a failure; "server" includes the operator."""

OutageCause = Literal["failing", "over quota", "refused", "unavailable", "unreachable"]
"""The reasons for which a server fails, for logs; refused: its operator must correct a login or a
setting.
"""


@dataclass(frozen=True, slots=True)
class Failed:
    """The side effect did not take place, as far as is known.

    A permanent failure is not retried. `retry_after` is the least wait that the server asks for.
    `unknown`: it may have taken place nevertheless, for example if an answer was lost.

    `fault` is the cause. "enrollment": this message, address or data was refused; an attempt is
    spent. "server": nothing would have succeeded, for example because of an outage, a login, a
    quota or a throttle; no attempt is spent, and the executor holds back the whole runner.
    "unclear": it may be either, as with a 500 or a time-out; the executor decides by the results of
    its other calls. `asked` is False if the server was not called, for example because a template
    cannot be rendered: that says nothing about the server. `refund` is the number of earlier
    attempts that turned out not to be the enrollment's fault either. `cause` describes the failure
    without the server's words, which may name a recipient. `undeliverable` are recipients that
    turned out to be undeliverable.
    """

    message: str
    permanent: bool = False
    retry_after: timedelta | None = None
    fault: Attribution = "enrollment"
    unknown: bool = False
    asked: bool = True
    refund: int = 0
    failure: Literal["error", "bad_data"] = "error"
    cause: OutageCause = "failing"
    undeliverable: tuple[Undeliverable, ...] = ()


@dataclass(frozen=True, slots=True)
class LookupAnswer:
    """The result of a lookup. `external` is None if it failed; then `message` says why, and
    `retry_after` is the least wait that the server asks for.
    """

    external: External | None
    message: str = ""
    retry_after: timedelta | None = None


@dataclass(frozen=True, slots=True)
class Suppressed:
    """Nothing was sent, because the recipients are suppressed; the message names them."""

    message: str


@dataclass(frozen=True, slots=True)
class NotStarted:
    """The side effect has not begun, or a lookup was cancelled: the enrollment is given back as if
    never leased.
    """

    attempts: int = 1  # that the lease has counted: none for a lookup


Result = Answer | Suppressed | Failed | NotStarted | LookupAnswer


def may_have_taken_place(result: Result) -> bool:
    """Return whether a side effect with this result may have taken place."""
    return isinstance(result, Answer) or (isinstance(result, Failed) and result.unknown)


def describe_result(result: Result) -> str:
    """Return what an event says about a result that has no effect."""
    match result:
        case Answer(action, message):
            return f"{action}: {message}" if message else str(action)
        case Suppressed(message):
            return f"suppressed: {message}"
        case Failed(message):
            return f"failed: {message}"
        case NotStarted():
            return "not started"
        case LookupAnswer():
            return "found"
        case _:
            assert_never(result)


def outcome(result: Result) -> str:
    """Return the result as one word, for metrics and traces."""
    match result:
        case Answer(action):
            return str(action)
        case LookupAnswer(external):
            return "failed" if external is None else "found"
        case Failed(permanent=True):
            return "refused"
        case Failed(fault="server") | NotStarted():
            return "postponed"
        case Suppressed():
            return "suppressed"
        case Failed():
            return "failed"
        case _:
            assert_never(result)


# --- decisions


class Event(NamedTuple):
    """What happened to an enrollment: a row of the history without its id."""

    at: datetime
    sequence: str
    step: str
    visit: int
    action: str
    message: str | None = None
    revision: int | None = None  # the revision of the definition at that time
    seconds_at_step: float | None = None  # how long it had been at the step


class Wait(NamedTuple):
    """The enrollment remains active and is evaluated again at that time; by other daemons if it is
    `elsewhere`.

    `waits_until` is the end of the wait if it is evaluated earlier, because of external data.
    """

    until: datetime
    elsewhere: bool = False
    waits_until: datetime | None = None


class Execute(NamedTuple):
    """The enrollment needs the side effect of its step."""

    step: Step
    effect: SideEffect
    timezone: str
    external: External
    revision: int  # of its sequence
    expires_at: datetime | None = None  # it does not begin after this time
    closes_at: datetime | None = None  # the end of its window, after which it does not begin
    topic: str | None = None
    reservations: tuple[Reservation, ...] = ()  # reservations that must all succeed first


class QueryLookup(NamedTuple):
    """The enrollment needs external data from this lookup."""

    step: Step
    lookup: str


class End(NamedTuple):
    """The journey has ended."""

    status: Literal["completed"] = "completed"


class Fail(NamedTuple):
    """The enrollment cannot continue: a code and a sentence."""

    failure: str
    message: str


Decision = Wait | Execute | QueryLookup | End | Fail


class Advanced(NamedTuple):
    """The enrollment after `advance`, the decision, and what to record.

    If `is_shared`, every enrollment in the same state has the same outcome if its data give the
    same `answers`: each is a condition that was evaluated, in this order, and its result.
    """

    enrollment: Enrollment
    decision: Decision
    events: tuple[Event, ...]
    data: Mapping[str, Any] | None = None  # to be merged into the row's data
    is_shared: bool = False
    entered: tuple[str, ...] = ()  # the sequences into which it jumps, unless they refuse it
    entries: tuple[Entry, ...] = ()  # enrollments of others, unless they are refused
    cancellations: tuple[Cancellation, ...] = ()  # cancellations of others, once these are locked
    answers: tuple[tuple[Condition, bool], ...] = ()

    @property
    def is_tentative(self) -> bool:
        """Return whether the outcome depends on other enrollments."""
        return bool(self.entered or self.entries or self.cancellations)
