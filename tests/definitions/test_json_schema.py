"""The JSON Schema: it takes what `check` takes, and refuses what an editor should underline."""

from __future__ import annotations

import copy
import json
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from sequencerd.core.calendar import dates
from sequencerd.core.faults import DefinitionError
from sequencerd.core.step_types import BUILT_IN, compile_step
from sequencerd.definitions import json_schema
from sequencerd.definitions.files import read_files
from tests.definitions.test_check import RUNNERS

REPOSITORY = Path(__file__).parents[2]


@cache
def schema() -> dict[str, Any]:
    return json_schema.make()


@cache
def validator() -> Draft202012Validator:
    return Draft202012Validator(schema())


def is_valid(document: object) -> bool:
    return bool(validator().is_valid(document))


def test_the_schema_has_every_step_type() -> None:
    Draft202012Validator.check_schema(schema())
    assert {step["type"] for step in STEPS} == {*BUILT_IN, "Note"}
    for type_ in BUILT_IN:
        assert not is_valid(sequence({"name": "a", "type": type_, "config": {"nonsense": 1}}))


def test_every_key_is_described() -> None:
    for name, model in {"": schema(), **schema()["$defs"]}.items():
        for key, value in model["properties"].items():
            assert value.get("description"), f"{name}.{key}"


@pytest.mark.parametrize("file", sorted(REPOSITORY.glob("examples/*.yaml")), ids=lambda p: p.name)
def test_the_examples_are_valid(file: Path) -> None:
    for document in yaml.safe_load_all(file.read_text()):
        validator().validate(document)


def sequence(*steps: dict[str, Any], **keys: Any) -> dict[str, Any]:
    return {"name": "s", "steps": list(steps), **keys}


EMAIL = {"from": "a@example.com", "to": "b@example.com", "subject": "Hello", "text": "Hello"}
IS_PRO = {
    "lodashCommand": "eq",
    "value": {"type": "get", "value": "data.plan"},
    "compareTo": {"type": "raw", "value": "pro"},
}
IS_DUE = {
    "momentCommand": "isBetween",
    "value": {"type": "now"},
    "compareTo": [
        {"type": "get", "value": "data.a", "offset": {"amount": -1, "unit": "day"}},
        {"type": "raw", "value": "2030-01-01"},
    ],
    "granularity": "day",
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
    {
        "name": "ways",
        "type": "Split",
        "config": {
            "ways": [
                {"name": "a", "weight": 1, "step": "zero"},
                {"name": "b", "weight": 0.5, "step": None},
            ]
        },
    },
    {"name": "sw", "type": "Switch", "config": {"cases": [{"when": IS_PRO, "step": "zero"}]}},
    {
        "name": "nested",
        "type": "Conditional",
        "config": {"all": [IS_PRO, {"any": [{"not": IS_PRO}, IS_DUE]}]},
    },
    {"name": "reached", "type": "Goal", "config": {"not": IS_PRO, "repeat": True}},
    {"name": "j", "type": "UpdateData", "config": {"data": {"x": [1, "{{id}}"]}}},
    {"name": "n", "type": "Enroll", "config": {"sequence": "t", "subject": "{{x}}"}},
    {"name": "o", "type": "Cancel", "config": {"sequence": "t"}},
    {"name": "p", "type": "Collect", "config": {"quiet": {"minutes": 10}, "at_most": 5}},
    {"name": "q", "type": "Collect", "config": {"at": "8:00"}},
    {
        "name": "qa",
        "type": "Collect",
        "config": {"quiet": {"amount": 1, "unit": "business days", "holidays": "DE"}},
    },
    {
        "name": "qb",
        "type": "Collect",
        "config": {"quiet": {"amount": 1, "unit": "hour", "within": {"days": ["mon"]}}},
    },
    {
        "name": "h",
        "type": "WaitForDuration",
        "config": {"amount": 4, "unit": "hours", "within": {"from": "09:00", "to": "17:00"}},
    },
    {"name": "k", "type": "WaitForDate", "config": {"date": "2030-01-01"}},
    {"name": "w", "type": "WaitForWindow", "config": {"days": ["mon"], "from": "09:00"}},
    {"name": "l", "type": "Note", "config": {"anything": {"at": "all"}, "retry": {"attempts": 2}}},
    {
        "name": "m",
        "type": "WaitForCondition",
        "config": {**IS_PRO, "timeout": {"amount": 3, "unit": "M"}},
    },
]


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step["type"])
def test_good_steps_are_valid(step: dict[str, Any]) -> None:
    validator().validate(sequence(step))


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
        sequence({"name": "a", "type": "Split", "config": {"next": 1}}),
        sequence({"name": "a", "type": "Split", "config": {"ways": []}}),
        sequence({"name": "a", "type": "Split", "config": {"ways": [{"name": "b", "weight": 1}]}}),
        sequence({"name": "a", "type": "Switch", "config": {"cases": [{"step": "a"}]}}),
        sequence({"name": "a", "type": "Switch", "config": {"cases": [{"when": IS_PRO}]}}),
        sequence({"name": "a", "type": "Switch"}),
        sequence({"name": "a", "type": "Conditional"}),
        sequence({"name": "a", "type": "Goal", "config": {"repeat": True}}),
        sequence({"name": "a", "type": "Conditional", "config": {"all": []}}),
        sequence({"name": "a", "type": "Conditional", "config": {"not": {"all": [{}]}}}),
        sequence(
            {"name": "a", "type": "Conditional", "config": {**IS_DUE, "momentCommand": "isEqual"}}
        ),
        sequence({"name": "a", "type": "Conditional", "config": {**IS_DUE, "granularity": "x"}}),
        sequence(
            {"name": "a", "type": "WaitForDateComparison", "config": {"attribute": "hour"}},
        ),
    ],
)
def test_wrong_files_are_invalid(document: object) -> None:
    assert not is_valid(document)


@pytest.mark.parametrize(
    ("type_", "key", "names"),
    [
        ("WaitForDuration", "unit", dates.UNITS),
        ("WaitForDateComparison", "attribute", dates.ATTRIBUTES),
    ],
)
def test_names_are_spelled_as_moment_takes_them(type_: str, key: str, names: set[str]) -> None:
    for name in sorted({*names, "dayz", "ddd", "qs"}):
        for spelled in (name, name.upper(), name.lower(), name.title(), f"{name}s"):
            rest: dict[str, Any] = {"amount": 1} if key == "unit" else {"values": [1]}
            config = {**rest, key: spelled}
            step = {"name": "a", "type": type_, "config": config}
            try:
                compile_step(type_, config)
            except DefinitionError:
                # D is a getter, the date; the schema lets it pass as the unit d in capitals
                assert spelled == "D" or not is_valid(sequence(step)), spelled
            else:
                assert is_valid(sequence(step)), spelled


def test_a_message_needs_a_text() -> None:
    config = {key: value for key, value in EMAIL.items() if key != "text"}
    assert not is_valid(sequence({"name": "a", "type": "Email", "config": config}))
    assert is_valid(sequence({"name": "a", "type": "Email", "config": {**config, "html": "x"}}))


# Good documents with some values changed or added, to others that are good there or nonsense.

NONSENSE: list[Any] = [
    None,
    True,
    -1,
    0,
    1.5,
    70,
    "",
    "a",
    "1",
    "{{x}}",
    "x" * 201,
    [],
    {},
    [1],
    ["a"],
]
GOOD: dict[str, list[Any]] = {
    "name": ["zero", "ü" * 100],
    "description": [None, "", "ü" * 5000],
    "timezone": ["europe/berlin", "UTC"],
    "status": ["paused", "archived"],
    "enroll": [
        {"from": "app.due", "schedule": "0 9 * * 1-5"},
        {"from": "app.due", "every": {"amount": 1, "unit": "hours"}, "at_most": 5000},
    ],
    "reentry": ["always", "never", {"after": {"amount": 90, "unit": "days"}}],
    "lookup": [None, "app.plans"],
    "window": [None, {"days": ["mon"]}, {"holidays": "DE", "spread": {"minutes": 1.5}}],
    "topic": [None, "marketing", "shop/offers.v2"],
    "channel": ["push", "web-push"],
    "address": ["{{data.token}}", ""],
    "locale": [None, "data.language"],
    "attachments": [[], [{"url": "{{x}}"}], [{"base64": "aGk=", "inline": True}]],
    "days": [["mon", "sun"]],
    "from": ["9:00", "22:15:30"],
    "recheck": [60, 1.5, "PT5M", "1 day", "00:05:00"],
    "next": [None, "zero"],
    "altNext": [None, "zero"],
    "type": ["Note", "Email", "Goal", "GoTo", "Split"],
    "config": [{}, IS_PRO, EMAIL],
    "step": [None, "zero"],
    "sequence": [None, "other"],
    "lodashCommand": ["isNil", "gte", "toPairsIn"],
    "value": [{"type": "raw"}, {"type": "get", "value": ["data", 0]}, "data.x"],
    "compareTo": [None, {"type": "raw", "value": None}],
    "timeout": [None, {"amount": 0, "unit": "y"}],
    "format": ["X", "x"],
    "every": ["year"],
    "within": [{"days": ["mon"]}, None],
    "offset": [{"amount": "{{data.n}}", "unit": "business days", "holidays": "DE"}],
    "at": ["09:00", "{{data.at}}"],
    "past": ["altNext"],
    "missing": ["altNext"],
    "amount": ["{{data.n}}", 0, -1.5, 10**20],
    "unit": ["businessDays", "DAY", "ms", "Years", "isoWeek", "Q"],
    "all": [[IS_PRO], [IS_PRO, {"any": [IS_DUE]}]],
    "not": [IS_PRO],
    "momentCommand": ["isSame"],
    "granularity": ["day", None],
    "cases": [[], [{"when": IS_PRO, "step": None}]],
    "when": [IS_PRO],
    "ways": [None, [{"name": "a", "weight": 1, "step": "zero"}]],
    "weight": [0, 1.5],
    "attribute": ["Day", "hours", "isoWeekday", "DDD"],
    "values": [[1.0], [2, 3]],
    "late": ["pass", "look again"],
    "date": ["{{data.due}}", "2030-W01"],
    "data": [{"a": None}, {"a": ["{{x}}", {}]}],
    "retry": [{}, {"attempts": None}, {"firstDelay": 0.5, "longestDelay": 1}],
    "quiet": [{"hours": 1.5}, {"amount": 1, "unit": "days"}],
    "at_most": [1],
    "onError": ["fail"],
    "delivery": ["at_most_once"],
    "to": ["24:00", ["a@example.com"], "{{data.email}}, b@example.com"],
    "cc": [None, "", []],
    "text": [None, ""],
    "html": [None, "<p>{{x}}</p>", {"default": "Hello", "pt-BR": "Ola"}],
    "headers": [{}, {"X-A": "b"}],
    "replyTo": ["a@example.com"],
    "statusCallback": ["https://example.com/{{id}}"],
}


def mappings(value: Any) -> list[dict[str, Any]]:
    """Those within a value, itself included."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    own = [value] if isinstance(value, dict) else []
    return own + [mapping for item in inner for mapping in mappings(item)]


@st.composite
def nearly_good(draw: st.DrawFn) -> dict[str, Any]:
    steps = draw(st.lists(st.sampled_from(STEPS), min_size=1, max_size=3, unique_by=id))
    document = copy.deepcopy(sequence(*steps, {"name": "zero", "type": "Note"}))
    for step in document["steps"]:
        for key in ("next", "altNext"):
            step.pop(key, None)
        if step["type"] == "GoTo":
            step["config"] = {"step": "zero"}
    for _ in range(draw(st.integers(0, 2))):
        mapping = draw(st.sampled_from(mappings(document)))
        known = sorted(key for key in mapping if key in GOOD) or ["next"]
        key = draw(st.sampled_from(known) | st.sampled_from(sorted(GOOD)))
        mapping[key] = copy.deepcopy(draw(st.sampled_from(GOOD[key]) | st.sampled_from(NONSENSE)))
    return document


@pytest.mark.slow
@settings(max_examples=3 * settings().max_examples)
@given(nearly_good())
def test_whatever_check_accepts_is_valid(document: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "f.json"
        file.write_text(json.dumps(document))
        accepted, _ = read_files([file], RUNNERS)
    if accepted:
        validator().validate(document)


def test_enrolling_by_a_schedule() -> None:
    step = {"name": "a", "type": "Note"}
    for good in GOOD["enroll"]:
        assert is_valid(sequence(step, enroll=good))
    for wrong in ({}, {"sequence": "s"}, {"from": "app.due", "every": "hour"}):
        assert not is_valid(sequence(step, enroll=wrong))


def test_the_recipient_of_a_custom_step() -> None:
    for good in (
        {"channel": "push", "address": "{{data.token}}"},
        {"channel": "#general"},
        {"address": ["a", 1]},
    ):
        assert is_valid(sequence({"name": "a", "type": "Score", "config": good}))
    for wrong in ({"channel": "#general", "address": "x"}, {"channel": "push", "address": 5}):
        assert not is_valid(sequence({"name": "a", "type": "Score", "config": wrong}))


def test_texts_in_several_languages_and_in_files() -> None:
    for good in (
        "Hello",
        {"en": "Hello", "pt-BR": "Ola"},
        {"file": "welcome.html"},
        {"en": {"file": "en.html"}, "de": "Hallo"},
    ):
        assert is_valid(sequence({"name": "a", "type": "Email", "config": {**EMAIL, "text": good}}))
    for wrong in (7, {}, {"german!": "Hallo"}, {"en": 7}, {"en": {"path": "x"}}, ["Hello"]):
        step = {"name": "a", "type": "Email", "config": {**EMAIL, "text": wrong}}
        assert not is_valid(sequence(step))


def test_wrong_attachments_are_invalid() -> None:
    for wrong in (
        {},
        {"url": "x", "base64": "y"},
        {"url": "x", "name": "y"},
        {"url": "x", "inline": "yes"},
    ):
        config = {**EMAIL, "attachments": [wrong]}
        assert not is_valid(sequence({"name": "a", "type": "Email", "config": config}))
    config = {**EMAIL, "attachments": [{"url": "x"}] * 11}
    assert not is_valid(sequence({"name": "a", "type": "Email", "config": config}))


def test_exits_of_messages_that_are_not_sent() -> None:
    for keys in (
        {"expires": "{{data.begins}}", "onExpired": "altNext", "onSuppressed": "end"},
        {"expires": {"amount": 2, "unit": "hours"}, "onExpired": "next"},
        {"limit": {"at_most": 3, "per": {"days": 7}}},
        {
            "limit": {
                "key": "{{data.email}}",
                "topic": "marketing",
                "at_most": 3,
                "per": {"amount": 7, "unit": "days"},
                "then": "altNext",
            }
        },
    ):
        assert is_valid(sequence({"name": "a", "type": "Email", "config": {**EMAIL, **keys}}))
        assert is_valid(sequence({"name": "a", "type": "Score", "config": keys}))
    for wrong in (
        {"expires": 5},
        {"expires": {"amount": 2, "unit": "moons"}},
        {"onExpired": "fail"},
        {"onSuppressed": "b"},
        {"topic": "new offers"},
        {"limit": {"at_most": 0, "per": {"days": 7}}},
        {"limit": {"at_most": 3}},
        {"limit": {"at_most": 3, "per": {"days": 7}, "then": "fail"}},
    ):
        assert not is_valid(sequence({"name": "a", "type": "Email", "config": {**EMAIL, **wrong}}))
