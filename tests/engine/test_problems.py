"""The problems that a daemon reports: one of each kind for each thing, the oldest of too many."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from sequencerd.engine import problems
from sequencerd.engine.problems import Problems

START = datetime(2026, 1, 1, tzinfo=UTC)
MINUTE = timedelta(minutes=1)


def test_a_known_problem_keeps_its_beginning() -> None:
    one = Problems()
    one.report("runner", "Email", "timeout", since=START)
    one.report("runner", "Email", "refused", since=START + MINUTE, waiting=3)
    one.report("enroll", "Email", "another kind", since=START + MINUTE)
    assert [(row.message, row.since, row.waiting) for row in one.rows()] == [
        ("refused", START, 3),
        ("another kind", START + MINUTE, None),
    ]
    one.clear("runner", "Email")
    one.report("runner", "Email", "again", since=START + 2 * MINUTE)
    assert [row.since for row in one.rows()] == [START + MINUTE, START + 2 * MINUTE]


def test_only_changes_are_written_at_once() -> None:
    one = Problems()
    one.clear("runner", "Email")
    assert not one.changed.is_set()
    for message, is_changed in (("a", True), ("a", False), ("b", True)):
        one.changed.clear()
        one.report("runner", "Email", message, since=START)
        assert one.changed.is_set() is is_changed
    one.changed.clear()
    one.clear("runner", "Email")
    assert one.changed.is_set()


def test_of_too_many_the_oldest_are_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(problems, "MAX_PROBLEMS", 2)
    one = Problems()
    for number in (3, 1, 2):
        one.report("quarantined", f"{number}", "refused", since=START + number * MINUTE)
    assert [row.about for row in one.rows()] == ["1", "2"]
    one.report("runner", "Email", "refused", since=START + 9 * MINUTE)
    assert [row.about for row in one.rows()] == ["Email", "1"], "many others come after an outage"
