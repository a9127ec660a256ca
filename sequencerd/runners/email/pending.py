"""Recipients that a server refused temporarily, while others have the message already.

The message goes to them alone, later. Until then the enrollment stays at its step, and its data
list the recipients to which the message still has to go, so that a restart changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from sequencerd.core.model import Action, Answer, Failed, Result, RetryPolicy, Task
from sequencerd.core.retry import doubled
from sequencerd.runners.email.smtp import Delivery

DATA_KEY = "emailPending"
"""Where it is in the enrollment's data; null when it is over."""

LONGEST = timedelta(days=2)
"""So long it is tried, as mail servers do (RFC 5321, 4.5.4.1, says four to five days at most)."""


class PendingMail(BaseModel):
    """What remains to be sent of a message: `key` identifies it, `tries` counts the further
    attempts.
    """

    model_config = ConfigDict(frozen=True)

    key: str
    to: tuple[str, ...]
    since: datetime
    tries: int

    def end(self, message: str) -> Answer:
        """Give up: the enrollment moves on."""
        return Answer(message=message, data={DATA_KEY: None})


def read(task: Task) -> PendingMail | None:
    """Return what remains of this task's message, if a part of it was sent already."""
    data: Mapping[str, Any] = task.view["data"]
    try:
        left = PendingMail.model_validate(data.get(DATA_KEY))
    except ValidationError:
        return None
    return left if left.key == task.key else None


def follow_up(
    task: Task, left: PendingMail | None, delivery: Delivery, retry: RetryPolicy, now: datetime
) -> Result:
    """Return what the enrollment does after a delivery."""
    result = delivery.result
    later = delivery.later
    if isinstance(result, Failed):
        if left is None or result.fault != "enrollment":
            return result
        if not result.permanent:
            later = left.to
    message = result.message or ""
    since = now if left is None else left.since
    if not later or now - since > LONGEST:
        if left is None:
            return Answer(message=message)
        return left.end(message)
    tries = 0 if left is None else left.tries + 1
    seconds = doubled(retry.first_delay, retry.longest_delay, tries + 1)
    again = PendingMail(key=task.key, to=later, since=since, tries=tries)
    return Answer(
        Action.NOOP,
        f"{message}; sent to {len(later)} later",
        {DATA_KEY: again.model_dump(mode="json")},
        retry_after=timedelta(seconds=seconds),
    )
