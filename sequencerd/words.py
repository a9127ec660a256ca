"""Values and states in words, for people; and as JSON has them, for programs."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

from sequencerd.core.model import NEVER


def text(value: object) -> str:
    """A value in a line."""
    match value:
        case None:
            return "-"
        case datetime():
            if is_never(value):
                return "never"
            return f"{value.astimezone(UTC):%Y-%m-%d %H:%M:%S}Z"
        case list() | tuple():
            return ", ".join(map(str, value))
        case dict():
            return json.dumps(value, ensure_ascii=False)
        case _:
            return str(value)


def is_never(at: datetime) -> bool:
    """Whether it is what asyncpg makes of PostgreSQL's infinity."""
    return at.year == NEVER.year


def plain(value: object) -> object:
    """For JSON: times in ISO 8601, "infinity" for never."""
    if isinstance(value, datetime):
        return "infinity" if is_never(value) else value.astimezone(UTC).isoformat()
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")


def what_next(row: Mapping[str, Any], at: Callable[[datetime], str] = text) -> str:
    """What an enrollment waits for; `at` says when."""
    if row["status"] != "active":
        return f"nothing, it is {row['status']}"
    then = f"then {row['next_step'] or 'the end'}"
    if row["sequence_status"] == "paused":
        return "nothing while the sequence is paused"
    if row["leased_by"]:
        return f"{row['type']} is being executed by {row['leased_by']}, {then}"
    if is_never(row["wake_at"]):
        return f"waits for a change, {then}"
    if row["entered_at"] is None:
        return f"begins at {at(row['wake_at'])}"
    return f"is looked at again at {at(row['wake_at'])}, {then}"
