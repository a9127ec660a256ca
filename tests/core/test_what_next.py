"""What an enrollment waits for, in words."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import pytest

from sequencerd.core.enrollment import NEVER
from sequencerd.core.what_next import what_next

AT = datetime(2030, 1, 1, tzinfo=UTC)
CONDITION = {
    "lodashCommand": "gte",
    "value": {"type": "get", "value": "data.score"},
    "compareTo": {"type": "raw", "value": 50},
}


def row(
    type_: str | None = "GoTo", config: dict[str, Any] | None = None, **more: Any
) -> dict[str, Any]:
    return {
        "status": "active",
        "sequence_status": "active",
        "type": type_,
        "config": json.dumps(config or {}),
        "next_step": "b",
        "leased_by": None,
        "wake_at": AT,
        "waits_until": more.get("wake_at", AT),
        "entered_at": AT,
        "attempt": 0,
        "expires_at": None,
        "last_error": None,
        **more,
    }


WHEN = "2030-01-01 00:00:00Z"
AGAIN = f"next check at {WHEN}, then b"
UNTIL = f"until {WHEN}, then b"
LATER = datetime(2030, 1, 2, tzinfo=UTC)
DOWN = "2030-01-02 00:00:00Z"
REPORTED: dict[str, Any] = {"reported_since": LATER, "reported_message": "why"}


@pytest.mark.parametrize(
    ("enrollment", "words"),
    [
        (row("WaitForDuration", {"amount": 3, "unit": "days"}), f"waits for 3 days, {UNTIL}"),
        (
            row("WaitForDate", {"date": "{{data.due}}"}),
            f"waits for the date {{{{data.due}}}}, {UNTIL}",
        ),
        (
            row("Email", time_window='{"days": ["mon"]}'),
            f"begins in its window (mon), {AGAIN}",
        ),
        (
            row("Email", {"window": {"from": "09:00", "to": "17:00"}}, attempt=2),
            f"attempt 2 failed, next attempt at {WHEN} in its window (09:00 to 17:00), then b",
        ),
        (row("Email", {"window": None}, time_window='{"days": ["mon"]}'), AGAIN),
        (
            row("WaitForDateComparison", {"attribute": "hour", "values": [9, 10]}),
            f"waits for the hour to be 9 or 10, {UNTIL}",
        ),
        (
            row(
                "WaitForDateComparison",
                {"attribute": "hour", "values": [9], "occurrence": "next"},
            ),
            f"waits for the hour to be 9 the next time, {UNTIL}",
        ),
        (
            row("WaitForCondition", CONDITION, wake_at=NEVER),
            "waits until gte(data.score, 50) is true, then b",
        ),
        (
            row("WaitForCondition", {**CONDITION, "timeout": {"amount": 2, "unit": "weeks"}}),
            f"waits until gte(data.score, 50) is true, at most 2 weeks, {UNTIL}",
        ),
        (
            row("WaitForDuration", {"amount": 3, "unit": "days"}, waits_until=LATER),
            f"waits for 3 days, until 2030-01-02 00:00:00Z, next check at {WHEN}, then b",
        ),
        (
            row("WaitForCondition", CONDITION, waits_until=NEVER),
            f"waits until gte(data.score, 50) is true, next check at {WHEN}, then b",
        ),
        (row("Goal", {"lodashCommand": "eq"}, wake_at=NEVER), "waits for a change, then b"),
        (row("Email", next_step=None), "next check at 2030-01-01 00:00:00Z, then the end"),
        (
            row("Email", attempt=1, expires_at=AT),
            f"attempt 1 failed, next attempt at {WHEN}, then b; not started after {WHEN}",
        ),
        (row("Email", leased_by="host:1"), "Email is being executed by host:1, then b"),
        (
            row("Email", attempt=2),
            "attempt 2 failed, next attempt at 2030-01-01 00:00:00Z, then b",
        ),
        (row(entered_at=None), "starts at 2030-01-01 00:00:00Z"),
        (row(sequence_status="paused"), "nothing while the sequence is paused"),
        (row("WaitForDuration", {"amount": 3}, is_due=True), f"due since {WHEN}, then b"),
        (row(entered_at=None, is_due=True), f"due since {WHEN}, then b"),
        (row("Email", attempt=2, is_due=True), f"attempt 2 failed, due since {WHEN}, then b"),
        (
            row("Email", is_due=True, reported="runner", **REPORTED),
            f"due since {WHEN}, then b; the runner Email has been down since {DOWN}: why",
        ),
        (row("Email", reported="runner", **REPORTED), AGAIN),
        (
            row(leased_by="host:1", is_due=True, reported="quarantined", **REPORTED),
            f"quarantined since {DOWN}, the daemon tries again: why",
        ),
        (
            row(sequence_status="paused", is_due=True, reported="runner", **REPORTED),
            "nothing while the sequence is paused",
        ),
        (row(status="completed"), "nothing, it is completed"),
        (row(None, wake_at=NEVER), "waits for a change, then b"),
    ],
)
def test_descriptions_of_waits(enrollment: dict[str, Any], words: str) -> None:
    assert what_next(enrollment) == words
