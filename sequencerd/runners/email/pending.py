"""Recipients that a server refused temporarily after the other recipients got the message.

The message is sent to them alone, later. Until then, the enrollment stays at its step, and its data
list these recipients, so that they survive a restart.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from sequencerd.core.model import Action, RetryPolicy
from sequencerd.core.retry import doubled
from sequencerd.core.task import Answer, Failed, NotStarted, Result, Task
from sequencerd.runners.email.smtp import Delivery

DATA_KEY = "emailPending"
"""Its key in the enrollment's data; null when nothing is pending."""

MAX_RETRY_PERIOD = timedelta(days=2)
"""How long delivery is retried (mail servers retry for four to five days: RFC 5321, 4.5.4.1)."""


class PendingMail(BaseModel):
    """The part of a message that has yet to be sent: `key` identifies the message, `tries` counts
    the further attempts.
    """

    model_config = ConfigDict(frozen=True)

    key: str
    to: tuple[str, ...]
    since: datetime
    tries: int


def end(message: str) -> Answer:
    """Give up what is pending, so that the enrollment continues."""
    return Answer(message=message, data={DATA_KEY: None})


def read(task: Task) -> PendingMail | None:
    """Return what is pending of this task's message, if a part of it was already sent."""
    data: Mapping[str, Any] = task.view["data"]
    try:
        left = PendingMail.model_validate(data.get(DATA_KEY))
    except ValidationError:
        return None
    return left if left.key == task.key else None


def follow_up(
    task: Task, left: PendingMail | None, delivery: Delivery, retry: RetryPolicy, now: datetime
) -> Result:
    """Return the result of the task after a delivery."""
    result = delivery.result
    later = delivery.later
    if isinstance(result, NotStarted):
        return result
    if isinstance(result, Failed):
        if left is None or result.fault != "enrollment":
            return result
        if not result.permanent:
            later = left.to
    message = result.message or ""
    since = now if left is None else left.since
    if not later or now - since > MAX_RETRY_PERIOD:
        return Answer(message=message) if left is None else end(message)
    tries = 0 if left is None else left.tries + 1
    seconds = doubled(retry.first_delay, retry.longest_delay, tries + 1)
    again = PendingMail(key=task.key, to=later, since=since, tries=tries)
    return Answer(
        Action.NOOP,
        f"{message}; sent to {len(later)} later",
        {DATA_KEY: again.model_dump(mode="json")},
        retry_after=timedelta(seconds=seconds),
        unknown=result.unknown,
    )
