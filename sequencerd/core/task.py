"""A task for a runner, and its results."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Literal, NamedTuple, assert_never

from sequencerd.core.model import Action
from sequencerd.core.view import External


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

    `undeliverable` are recipients that turned out to be undeliverable. `unknown`: what is to be
    executed again may have taken place.
    """

    action: Action = Action.NEXT
    message: str | None = None
    data: Mapping[str, Any] | None = None  # merged into the enrollment's data
    wake_at: datetime | None = None
    retry_after: timedelta | None = None
    undeliverable: tuple[Undeliverable, ...] = ()
    unknown: bool = False


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
