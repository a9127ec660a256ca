"""Describe what an enrollment waits for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import datetime
from typing import Any

from sequencerd.core.config import parse_json
from sequencerd.core.describe import is_never, text
from sequencerd.core.faults import DefinitionError
from sequencerd.core.model import LIMIT_REACHED
from sequencerd.core.step_types import step_type
from sequencerd.core.window_config import describe_window


def what_next(row: Mapping[str, Any], at: Callable[[datetime], str] = text) -> str:
    """Describe what an enrollment of the query "show" waits for; `at` formats times."""
    if row["status"] != "active":
        return f"nothing, it is {row['status']}"
    then = f"then {row['next_step'] or 'the end'}"
    if row["expires_at"]:
        then += f"; not started after {at(row['expires_at'])}"
    if row["sequence_status"] == "paused":
        by = f" by its {row['brake']}; `sequencerd resume` continues it" if row.get("brake") else ""
        return f"nothing while the sequence is paused{by}"
    if row.get("reported") == "quarantined":
        since, message = at(row["reported_since"]), row["reported_message"]
        return f"quarantined since {since}, the daemon tries again: {message}"
    if row["leased_by"]:
        return f"{row['type']} is being executed by {row['leased_by']}, {then}"
    if row.get("is_due"):
        return _due(row, at, then)
    if row["entered_at"] is None:
        return f"starts at {at(row['wake_at'])}"
    config = _object(row["config"])
    waits = step_type(row["type"]).describe(config)
    window = "" if waits else _window(row, config)
    if row["attempt"] and not is_never(row["wake_at"]):
        number, next_at = row["attempt"], at(row["wake_at"])
        failed = f"attempt {number} failed, next attempt at {next_at}"
        return f"{failed} in {window}, {then}" if window else f"{failed}, {then}"
    wake_at, waits_until = row["wake_at"], row["waits_until"]
    check = "" if is_never(wake_at) else f"next check at {at(wake_at)}"
    if not waits and (row["last_error"] or "").startswith(LIMIT_REACHED):
        return f"{row['last_error']}, {check}, {then}"
    if is_never(waits_until):
        return ", ".join(filter(None, (waits or "waits for a change", check, then)))
    if waits:
        until = f"until {at(waits_until)}"
        return ", ".join([waits, until, *([check] if waits_until != wake_at else []), then])
    return f"begins in {window}, {check}, {then}" if window else f"{check}, {then}"


def _due(row: Mapping[str, Any], at: Callable[[datetime], str], then: str) -> str:
    failed = f"attempt {row['attempt']} failed, " if row["attempt"] else ""
    due = f"{failed}due since {at(row['wake_at'])}, {then}"
    if row.get("reported") != "runner":
        return due
    since, message = at(row["reported_since"]), row["reported_message"]
    return f"{due}; the runner {row['type']} has been down since {since}: {message}"


def _window(row: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """Describe the window of a side effect: its own, or that of its sequence; empty for none."""
    window = config["window"] if "window" in config else _object(row.get("time_window"))
    described = describe_window(window) if isinstance(window, dict) else ""
    return f"its window ({described})" if described else ""


def _object(text: str | None) -> dict[str, Any]:
    """Parse a JSON object; anything else is an error of the definition, which is reported there."""
    with suppress(DefinitionError):
        found = parse_json(text or "{}")
        if isinstance(found, dict):
            return found
    return {}
