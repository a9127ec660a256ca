"""The JSON Schema: it takes what `check` takes, and refuses what an editor should underline."""

from __future__ import annotations

import copy
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from sequencerd import schema
from sequencerd.core.steps import COMPILERS, CONFIGS
from sequencerd.files import read_files
from tests.test_check import RUNNERS

REPOSITORY = Path(__file__).parent.parent
SCHEMA = schema.make()
VALIDATOR = Draft202012Validator(SCHEMA)


def is_valid(document: object) -> bool:
    return bool(VALIDATOR.is_valid(document))


def test_it_is_a_schema_that_knows_every_type() -> None:
    Draft202012Validator.check_schema(SCHEMA)
    assert CONFIGS.keys() == COMPILERS.keys()
    for type_ in (*COMPILERS, "Email", "SMS"):
        assert not is_valid(sequence({"name": "a", "type": type_, "config": {"nonsense": 1}}))


def test_every_key_is_described() -> None:
    for name, model in {"": SCHEMA, **SCHEMA["$defs"]}.items():
        for key, value in model["properties"].items():
            assert value.get("description"), f"{name}.{key}"


@pytest.mark.parametrize("file", sorted(REPOSITORY.glob("examples/*.yaml")), ids=lambda p: p.name)
def test_the_examples_are_valid(file: Path) -> None:
    for document in yaml.safe_load_all(file.read_text()):
        VALIDATOR.validate(document)


def sequence(*steps: dict[str, Any], **keys: Any) -> dict[str, Any]:
    return {"name": "s", "steps": list(steps), **keys}


EMAIL = {"from": "a@example.com", "to": "b@example.com", "subject": "Hello", "text": "Hello"}
IS_PRO = {
    "lodashCommand": "eq",
    "value": {"type": "get", "value": "data.plan"},
    "compareTo": {"type": "raw", "value": "pro"},
}
STEPS: list[dict[str, Any]] = [
    {"name": "a", "type": "Email", "config": {**EMAIL, "onError": "altNext"}},
    {"name": "b", "type": "SMS", "config": {"from": "+15005550006", "to": "{{x}}", "message": "m"}},
    {"name": "c", "type": "WaitForDuration", "config": {"amount": 1.5, "unit": "Days"}},
    {"name": "d", "type": "WaitForDateComparison", "config": {"attribute": "day", "values": [1]}},
    {"name": "e", "type": "Goal", "config": IS_PRO},
    {"name": "f", "type": "Conditional", "config": IS_PRO, "altNext": "a"},
    {"name": "g", "type": "GoTo", "next": None},
    {"name": "h", "type": "GoTo", "config": {"step": "a"}},
    {"name": "i", "type": "Split", "config": {"next": 30, "altNext": 70}},
    {"name": "j", "type": "UpdateData", "config": {"data": {"x": [1, "{{id}}"]}}},
    {"name": "k", "type": "WaitForDate", "config": {"date": "2030-01-01"}},
    {"name": "l", "type": "Note", "config": {"anything": {"at": "all"}, "retry": {"attempts": 2}}},
    {
        "name": "m",
        "type": "WaitForCondition",
        "config": {**IS_PRO, "timeout": {"amount": 3, "unit": "M"}},
    },
]


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step["type"])
def test_good_steps_are_valid(step: dict[str, Any]) -> None:
    VALIDATOR.validate(sequence(step))


@pytest.mark.parametrize(
    "document",
    [
        [],
        {"name": "s"},
        {"name": "", "steps": [{"name": "a", "type": "GoTo"}]},
        sequence(),
        sequence({"name": "a"}),
        sequence({"name": "a", "type": "GoTo"}, timzone="UTC"),
        sequence({"name": "a", "type": "GoTo"}, status="stopped"),
        sequence({"name": "a", "type": "GoTo", "nxt": "a"}),
        sequence({"name": "a", "type": "GoTo", "next": 1}),
        sequence({"name": "a", "type": "Email"}),
        sequence({"name": "a", "type": "Email", "config": {**EMAIL, "txt": "Hello"}}),
        sequence({"name": "a", "type": "Email", "config": {**EMAIL, "onError": "skip"}}),
        sequence({"name": "a", "type": "Email", "config": {**EMAIL, "retry": {"attempts": 0}}}),
        sequence({"name": "a", "type": "Email", "config": {**EMAIL, "to": 1}}),
        sequence({"name": "a", "type": "Note", "config": {"delivery": "once"}}),
        sequence({"name": "a", "type": "Note", "config": []}),
        sequence({"name": "a", "type": "Goal", "config": {**IS_PRO, "lodashCommand": "eqq"}}),
        sequence({"name": "a", "type": "Goal", "config": {**IS_PRO, "value": {"type": "x"}}}),
        sequence({"name": "a", "type": "WaitForDuration", "config": {"amount": 1, "unit": "dayz"}}),
        sequence({"name": "a", "type": "WaitForDuration", "config": {"unit": "days"}}),
        sequence(
            {"name": "a", "type": "WaitForDateComparison", "config": {"attribute": "hour"}},
        ),
    ],
)
def test_wrong_files_are_not(document: object) -> None:
    assert not is_valid(document)


def test_a_message_needs_a_text() -> None:
    config = {key: value for key, value in EMAIL.items() if key != "text"}
    assert not is_valid(sequence({"name": "a", "type": "Email", "config": config}))
    assert is_valid(sequence({"name": "a", "type": "Email", "config": {**config, "html": "x"}}))


# Good documents with one value changed, removed or added: mostly wrong, sometimes good again.

VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 70), st.floats(-2, 2), st.just([]), st.just({}),
    st.sampled_from(["a", "", "1", "days", "DAY", "ms", "hour", "PT5M", "eq", "get", "raw", "Goal",
                     "altNext", "Note", "a@example.com", "2030-01-01", "{{x}}", "UTC", "x" * 201]),
    st.lists(st.sampled_from(["a", "b@example.com", 1]), max_size=2),
)  # fmt: skip
KEYS = st.sampled_from(
    ["name", "next", "altNext", "type", "config", "retry", "timeout", "late", "lookup", "status",
     "step", "recheck", "reentry", "timezone", "delivery", "attempts", "firstDelay", "cc", "text"]
)  # fmt: skip


@st.composite
def nearly_good(draw: st.DrawFn) -> dict[str, Any]:
    steps = draw(st.lists(st.sampled_from(STEPS), min_size=1, max_size=3, unique_by=id))
    document = copy.deepcopy(sequence({"name": "zero", "type": "Note"}, *steps))
    for step in document["steps"]:
        for key in ("next", "altNext"):
            step.pop(key, None)
        if step["type"] == "GoTo":
            step.pop("config", None)
    for _ in range(draw(st.integers(0, 2))):
        at: Any = document
        while isinstance(at, dict | list) and at:
            inner = [at[key] for key in at] if isinstance(at, dict) else at
            deeper = [value for value in inner if isinstance(value, dict | list) and value]
            if not deeper or draw(st.booleans()):
                break
            at = draw(st.sampled_from(deeper))
        if isinstance(at, dict):
            at[draw(KEYS | st.sampled_from(sorted(at) or ["a"]))] = draw(VALUES)
        elif at:
            at[draw(st.integers(0, len(at) - 1))] = draw(VALUES)
    return document


@settings(max_examples=300, deadline=None)
@given(nearly_good())
def test_whatever_check_accepts_is_valid(document: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "f.json"
        file.write_text(json.dumps(document))
        accepted, _ = read_files([file], RUNNERS)
    if accepted:
        VALIDATOR.validate(document)
