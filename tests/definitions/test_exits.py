"""The exits of a step are where `advance` takes enrollments: none is missing, none is too many."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta
from itertools import product
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sequencerd.core.advance import advance
from sequencerd.core.decision import End, Wait
from sequencerd.core.enrollment import Enrollment
from sequencerd.core.model import (
    Action,
    InvalidStep,
    LimitReached,
    Refusals,
    Sequence,
    SideEffect,
    Step,
)
from sequencerd.core.step_types import is_message, named_steps, step_type
from sequencerd.core.task import Answer, Failed, NotStarted, Result, Suppressed
from sequencerd.definitions.compiler import build, compile_behaviour
from tests.definitions.test_check import RUNNERS
from tests.definitions.test_json_schema import EMAIL, GOOD, IS_PRO, NONSENSE, mappings
from tests.definitions.test_step_types import CASES

Place = tuple[str | None, str | None]
"""A sequence, if it is another one, and a step, if it is not the end."""

NOW = datetime(2026, 6, 8, 9, 30, tzinfo=UTC)  # a Monday
LONG_AGO, LATER = NOW - timedelta(days=400), NOW + timedelta(days=400)
NUMBER = "+15005550006"
DATA: list[dict[str, Any]] = [
    {"x": NUMBER},
    {"x": NUMBER, "plan": "pro"},
    {"due": "2026-06-08T09:00:00Z", "items": [1]},
    {"due": "2020-01-01", "items": [1], "collecting": {"since": "2020-01-01T00:00:00Z"}},
    {"due": "", "n": 0},
]
RESULTS: list[Result | None] = [
    Answer(Action.NEXT),
    Failed("refused", permanent=True),
    Suppressed("all of them"),
    NotStarted(),
]
REFUSED: list[Refusals] = [
    {},
    {
        "other": "already_enrolled",
        ("enroll", "other", "ada"): "already_enrolled",
        ("enroll", "other", NUMBER): "already_enrolled",
    },
]
MORE: list[tuple[str, dict[str, Any]]] = [
    ("WaitForCondition", {**IS_PRO, "timeout": {"amount": "{{data.n}}", "unit": "days"}}),
    ("WaitForDate", {"date": "{{data.due}}", "past": "altNext"}),
    ("WaitForDate", {"date": "{{data.due}}", "missing": "altNext"}),
    ("Email", {**EMAIL, "limit": {"at_most": 1, "per": {"days": 1}, "then": "altNext"}}),
    ("Email", {**EMAIL, "expires": "{{data.due}}", "onExpired": "end", "onSuppressed": "altNext"}),
    ("Note", {"limit": {"at_most": 1, "per": {"days": 1}, "then": "altNext"}}),
    ("SMS", {"from": NUMBER, "to": NUMBER, "message": "m", "expires": "{{data.due}}"}),
]


def sequence_of(type_: str, config: Mapping[str, Any]) -> Sequence:
    ends = [
        Step("s", name, "Note", {}, None, None, SideEffect(None))
        for name in ("next", "altNext", "there", "zero")
    ]
    behaviour = compile_behaviour(type_, config, RUNNERS)
    step = Step("s", "it", type_, config, "next", "altNext", behaviour)
    steps = {step.name: step for step in (step, *ends)}
    return build(Sequence("s", "it", "UTC", steps, holidays={"DE": frozenset()}))


def leads(sequence: Sequence, enrollments: Iterable[Enrollment]) -> set[Place]:
    """Where `advance` takes enrollments, whatever a runner and other sequences answer."""
    step = sequence.steps["it"]
    results: list[Result | None] = [None]
    full: list[LimitReached | None] = [None]
    if isinstance(effect := step.behaviour, SideEffect):
        results += RESULTS if is_message(step.type) else [*RESULTS, Answer(Action.ALT_NEXT)]
        full += [LimitReached(0, LATER)] if effect.limit else []
    found: set[Place] = set()
    for enrollment, result, refused, limit in product(enrollments, results, REFUSED, full):
        here = enrollment if result is None else enrollment.leased_to("daemon", 1)
        moved = advance({"s": sequence}, here, NOW, result, refused=refused, full=limit)
        after = moved.enrollment
        if after.visit > here.visit:
            found.add((None if after.sequence == "s" else after.sequence, after.step))
        elif isinstance(moved.decision, End):
            found.add((None, None))
    return found


def enrollments(data: Iterable[Mapping[str, Any]], subjects: int) -> Iterable[Enrollment]:
    for one, arrived, number in product(data, (NOW, LONG_AGO), range(subjects)):
        subject = f"{number}" if number else "ada"
        yield Enrollment(
            number,
            subject,
            json.dumps(one),
            LONG_AGO,
            UUID(int=1),
            None,
            NOW,
            "s",
            "it",
            None,
            arrived,
        )


def exits(sequence: Sequence) -> set[Place]:
    return {(one.sequence, one.target) for one in sequence.steps["it"].exits}


@pytest.mark.parametrize(("type_", "config"), [*CASES, *MORE])
def test_each_exit_is_taken_and_there_are_no_others(type_: str, config: dict[str, Any]) -> None:
    sequence = sequence_of(type_, config)
    assert not isinstance(sequence.steps["it"].behaviour, InvalidStep)
    assert leads(sequence, enrollments(DATA, subjects=4)) == exits(sequence)


@pytest.mark.parametrize(("type_", "config"), CASES)
def test_the_record_knows_each_step_that_an_exit_finds_in_the_config(
    type_: str, config: dict[str, Any]
) -> None:
    """Otherwise the step could be deleted, and would not follow a rename."""
    found = sequence_of(type_, config).steps["it"].exits
    in_config = {one.path for one in found if one.path[0] == "config" and one.target}
    assert in_config == {("config", *path) for path, _, _ in named_steps(type_, config)}


@pytest.mark.parametrize(("type_", "config"), CASES)
def test_steps_that_may_wait_declare_it(type_: str, config: dict[str, Any]) -> None:
    """In its exits, for the search for cycles that never wait, and in words for operators."""
    sequence = sequence_of(type_, config)
    step = sequence.steps["it"]
    if isinstance(step.behaviour, SideEffect):
        return
    waits = any(
        isinstance(advance({"s": sequence}, at, NOW).decision, Wait)
        for at in enrollments(DATA, subjects=1)
    )
    says_so = any(one.at_once != "always" for one in step.exits)
    assert says_so or not waits
    assert bool(step_type(type_).describe(config)) == says_so


@st.composite
def changed(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    """A step that differs from one of the cases in one value or two."""
    type_, config = draw(st.sampled_from([*CASES, *MORE]))
    config = copy.deepcopy(config)
    for _ in range(draw(st.integers(1, 2))):
        mapping = draw(st.sampled_from(mappings(config)))
        key = draw(st.sampled_from(sorted(GOOD | mapping)))
        mapping[key] = copy.deepcopy(draw(st.sampled_from([*GOOD.get(key, ()), *NONSENSE])))
    return type_, config


@given(changed(), st.sampled_from(DATA))
def test_no_config_leads_where_it_has_no_exit(
    step: tuple[str, dict[str, Any]], data: dict[str, Any]
) -> None:
    sequence = sequence_of(*step)
    assert leads(sequence, enrollments([data], subjects=1)) <= exits(sequence)
