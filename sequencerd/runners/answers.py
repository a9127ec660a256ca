"""Convert the answers of custom runners, from HTTP or Python, to results."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from pydantic.alias_generators import to_camel

from sequencerd.core import exact_json
from sequencerd.core.config import faults
from sequencerd.core.model import Action
from sequencerd.core.task import Answer, Attribution, Failed, OutageCause, Result, Undeliverable
from sequencerd.runners.fields import one_line

MAX_RETRY_AFTER = 10 * 366 * 86_400  # seconds
MAX_MESSAGE = 1_000  # characters
FIRST_YEAR, LAST_YEAR = 1900, 9998  # of what the database keeps as a time

_YEARS = f"write a time in the years {FIRST_YEAR} to {LAST_YEAR}"

_NUL = re.compile(r"(?<!\\)(?:\\\\)*\\u0000")

ANSWERS_OF_WORDS: Mapping[object, Answer] = {
    None: Answer(),
    **{str(action): Answer(action) for action in Action},
}
"""Answers that are only an action; None means `next`."""


class ActionAnswer(BaseModel):
    """The answer for one enrollment: the original's action and message, and our additions."""

    model_config = ConfigDict(alias_generator=to_camel, allow_inf_nan=False, strict=True)

    action: Annotated[Action, Field(strict=False)] = Action.NEXT
    message: str | None = None
    data: dict[str, Any] | None = None
    retry_after: Annotated[float, Field(ge=0, le=MAX_RETRY_AFTER)] | None = None
    wake_at: datetime | None = None

    @field_validator("wake_at", mode="before")
    @classmethod
    def _read_date(cls, value: object) -> object:
        return datetime.fromisoformat(value) if isinstance(value, str) else value

    @field_validator("wake_at")
    @classmethod
    def _check_date(cls, value: datetime | None) -> datetime | None:
        return None if value is None else check_date(value)

    @field_validator("data")
    @classmethod
    def _check_data(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        if value is not None:
            check_json(value)
        return value


def check_date(value: datetime) -> datetime:
    """Return a time in UTC. Raises ValueError for what the database does not accept."""
    if value.tzinfo is None:
        raise ValueError("write the offset, as in 2030-01-01T09:00:00Z")
    try:
        value = value.astimezone(UTC)
    except OverflowError as error:
        raise ValueError(_YEARS) from error
    if not FIRST_YEAR <= value.year <= LAST_YEAR:
        raise ValueError(_YEARS)
    return value


def check_json(value: object) -> None:
    """Raise ValueError for what PostgreSQL's jsonb does not accept."""
    try:
        text = exact_json.dumps(value)
        json.dumps(value, ensure_ascii=False, default=str).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {type(error).__name__}: {str(error)[:100]}") from None
    if _NUL.search(text):
        raise ValueError("not JSON for PostgreSQL: it holds a NUL character")


class StrictActionAnswer(ActionAnswer):
    """The same, but unknown keys are errors: in Python they are typing errors."""

    model_config = ConfigDict(extra="forbid")


def read_outcome(value: object, model: type[ActionAnswer] = ActionAnswer) -> Result:
    """Convert an answer (None, an action, or an object with `action` and other keys) to a result.

    An invalid answer is a temporary failure, because its runner will be fixed. The side effect may
    have taken place.
    """
    if value is None or isinstance(value, str):
        return ANSWERS_OF_WORDS.get(value) or Failed(
            f"unknown action {one_line(str(value), 50)!r}: {_EXPECTED}", unknown=True
        )
    if not isinstance(value, Mapping):
        return Failed(f"the answer is of type {type(value).__name__}: {_EXPECTED}", unknown=True)
    try:
        outcome = model.model_validate(value)
    except ValidationError as error:
        wrong = "; ".join(map(str, faults(error, model, value, "an answer")))
        return Failed(one_line(f"the answer cannot be used: {wrong}"), unknown=True)
    if outcome.model_fields_set <= {"action"}:
        # the same object each time, so that the engine moves all these enrollments together
        return ANSWERS_OF_WORDS[str(outcome.action)]
    return Answer(
        outcome.action,
        None if outcome.message is None else one_line(outcome.message, MAX_MESSAGE),
        outcome.data,
        outcome.wake_at,
        None if outcome.retry_after is None else timedelta(seconds=outcome.retry_after),
    )


def check_result(result: Answer | Failed) -> Result:
    """Return the result that a plug-in has made itself; a failure if its fields are not usable."""
    if isinstance(result, Failed):
        wrong = [name for name, is_right in _fields(result).items() if not is_right]
        if wrong:
            return Failed(f"the Failed cannot be used: wrong {', '.join(wrong)}", unknown=True)
        return result
    after = result.retry_after
    given = {
        "action": result.action,
        "message": result.message,
        "data": dict(result.data) if isinstance(result.data, Mapping) else result.data,
        "retryAfter": after.total_seconds() if isinstance(after, timedelta) else after,
        "wakeAt": result.wake_at,
    }
    checked = read_outcome(
        {name: value for name, value in given.items() if value is not None}, StrictActionAnswer
    )
    if not isinstance(checked, Answer) or not result.undeliverable:
        return checked
    if not _is_undeliverable(result.undeliverable):
        return Failed("the Answer cannot be used: wrong undeliverable", unknown=True)
    return replace(checked, undeliverable=result.undeliverable)


def _fields(failed: Failed) -> dict[str, bool]:
    """Return for the fields of a failure whether they have their types."""
    return {
        "message": isinstance(failed.message, str),
        "retry_after": isinstance(failed.retry_after, timedelta | None),
        "fault": failed.fault in get_args(Attribution),
        "failure": failed.failure in ("error", "bad_data"),
        "cause": failed.cause in get_args(OutageCause),
        "refund": isinstance(failed.refund, int),
        "undeliverable": _is_undeliverable(failed.undeliverable),
    }


def _is_undeliverable(found: object) -> bool:
    return isinstance(found, tuple) and all(isinstance(one, Undeliverable) for one in found)


_EXPECTED = "expected next, altNext or noop"
