"""Values and states in words, for people; and as JSON has them, for programs."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any
from unicodedata import category

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


_HIDDEN = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
"""Categories of Unicode: controls, what has no width or turns the direction of a text, halves of
characters, ends of lines and paragraphs."""


def visible(text: str) -> str:
    """A text in one line that a terminal shows and does not obey: `\\x1b` for an escape."""
    if text.isprintable():
        return text
    return "".join(_escape(one) if category(one) in _HIDDEN else one for one in text)


def _escape(character: str) -> str:
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")


def is_never(at: datetime) -> bool:
    """Whether it is what asyncpg makes of PostgreSQL's infinity."""
    return at.year == NEVER.year


def plain(value: object) -> object:
    """For JSON: times in ISO 8601, "infinity" for never."""
    if isinstance(value, datetime):
        return "infinity" if is_never(value) else value.astimezone(UTC).isoformat()
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")


def what_next(row: Mapping[str, Any], at: Callable[[datetime], str] = text) -> str:
    """What an enrollment waits for, of a row of the query "show"; `at` says when."""
    if row["status"] != "active":
        return f"nothing, it is {row['status']}"
    then = f"then {row['next_step'] or 'the end'}"
    if row["sequence_status"] == "paused":
        return "nothing while the sequence is paused"
    if row["leased_by"]:
        return f"{row['type']} is being executed by {row['leased_by']}, {then}"
    if row["entered_at"] is None:
        return f"begins at {at(row['wake_at'])}"
    if row["attempt"] and not is_never(row["wake_at"]):
        number = row["attempt"]
        return f"attempt {number} failed, the next one follows at {at(row['wake_at'])}, {then}"
    waits = _waits(row["type"], json.loads(row["config"]) if row["config"] else {})
    if is_never(row["wake_at"]):
        return f"{waits or 'waits for a change'}, {then}"
    again = f"is looked at again at {at(row['wake_at'])}, {then}"
    return f"{waits}; it {again}" if waits else again


def _waits(type_: str | None, config: Mapping[str, Any]) -> str:
    """In words what a step that waits is there for; nothing for others."""
    match type_, config:
        case "WaitForDuration", {"amount": amount, "unit": unit}:
            return f"waits for {amount} {unit}"
        case "WaitForDate", {"date": date}:
            return f"waits for the date {date}"
        case "WaitForDateComparison", {"attribute": attribute, "values": list(values)}:
            wanted = f"{attribute} to be {' or '.join(map(str, values))}"
            is_next = config.get("occurrence") == "next"
            return f"waits for the {wanted}" + (" the next time" if is_next else "")
        case (("WaitForCondition" | "Goal"), {"lodashCommand": command, "value": value}):
            operands = [value, *([config["compareTo"]] if "compareTo" in config else [])]
            condition = f"waits until {command}({', '.join(map(_operand, operands))}) holds"
            match config.get("timeout"):
                case {"amount": amount, "unit": unit}:
                    return f"{condition}, {amount} {unit} at most"
            return condition
    return ""


def _operand(operand: object) -> str:
    match operand:
        case {"type": "get", "value": path}:
            return str(path)
        case {"value": value}:
            return json.dumps(value, ensure_ascii=False)
    return "?"
