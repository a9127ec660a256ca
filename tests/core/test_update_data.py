"""UpdateData: templates, and operations that keep types."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sequencerd.core.advance import advance
from sequencerd.core.decision import Fail
from sequencerd.core.faults import DefinitionError
from sequencerd.core.step_types import compile_step, roots
from sequencerd.core.task import LookupAnswer
from sequencerd.core.view import REMOVED, merge_data
from tests.core.test_advance import NOW, at, sequence, step

DATA = {
    "points": 12,
    "id": 1234567890123456789,
    "price": 19.99,
    "tags": ["a", 1],
    "on": True,
    "user": {"name": "Ada", "mails": ["x@y.z"]},
    "note": "n",
    "none": None,
    "ids": [{"id": 1234567890123456789}],
}


def updated(changes: dict[str, Any], data: dict[str, Any] | None = None) -> dict[str, Any]:
    """The data after a step, as advance has them and as they are written."""
    before = DATA if data is None else data
    definitions = sequence(step("set", "UpdateData", {"data": changes}))
    advanced = advance(definitions, at("set", json.dumps(before)), NOW)
    assert not isinstance(advanced.decision, Fail), advanced.decision
    assert not advanced.is_shared
    after: dict[str, Any] = json.loads(advanced.enrollment.data)
    assert after == merge_data(before, advanced.data or {})
    return after


@pytest.mark.parametrize(
    ("change", "value"),
    [
        ("{{data.points}}", "12"),
        ({"get": "data.points"}, 12),
        ({"get": "data.id"}, 1234567890123456789),
        ({"get": "data.on"}, True),
        ({"get": "data.none"}, None),
        ({"get": "data.missing"}, None),
        ({"get": "data.missing.deeper"}, None),
        ({"get": "data.user"}, {"name": "Ada", "mails": ["x@y.z"]}),
        ({"get": "data.tags.1"}, 1),
        ({"get": "data.user.mails[0]"}, "x@y.z"),
        ({"get": ["data", "tags"]}, ["a", 1]),
        ({"get": "data.tags.length"}, 2),
        ({"get": "data.note.length"}, 1),
        ({"get": "data.user.name[1]"}, "d"),
        ({"get": "data.points.length"}, None),
        ({"get": "data.tags.01"}, None),
        ({"get": "data.ids[0].id"}, 1234567890123456789),
        ({"get": ["data", "id"]}, 1234567890123456789),
        ({"get": "data.constructor"}, None),
        ({"get": "subject"}, "ada"),
        ({"get": "visit"}, 1),
        ([{"get": "data.points"}, "{{data.points}}"], [12, "12"]),
        ({"deep": {"get": "data.points"}, "text": "x"}, {"deep": 12, "text": "x"}),
        ({"get": 1, "other": 2}, {"get": 1, "other": 2}),  # no operation: it has two keys
        ({"add": 1}, 1),
        ({"append": "x"}, ["x"]),
    ],
)
def test_a_key_that_is_not_there_gets(change: object, value: object) -> None:
    after = updated({"new": change})
    assert after == {**DATA, "new": value}
    assert type(after["new"]) is type(value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("Hello {{data.nmae}}", "data.new: data.nmae: the value is missing"),
        (["x", "{{data.none}}"], "data.new.1: data.none: the value is missing"),
        ({"deep": {"get": "data.user.nmae"}}, "data.new.deep: data.user.nmae: the value is"),
        ({"get": ["data", "none"]}, "data.new: data.none: the value is missing"),
        ({"append": "{{data.nmae}}"}, "data.new.append: data.nmae: the value is missing"),
        ({"append": {"get": "external.nmae"}}, "data.new.append: external.nmae: the value is"),
        ({"add": "{{data.nmae}}"}, "data.new.add: data.nmae: the value is missing"),
    ],
)
def test_strict_a_missing_value_is_bad_data(change: object, message: str) -> None:
    config = {"data": {"new": change}, "strict": True}
    definitions = sequence(step("set", "UpdateData", config))
    decision = advance(definitions, at("set", json.dumps(DATA)), NOW).decision
    assert isinstance(decision, Fail)
    assert decision.failure == "bad_data"
    assert decision.message.startswith(f"step 'set': {message}")


def test_strict_values_that_exist_or_have_a_default_are_written() -> None:
    changes = {"a": '{{default data.nmae ""}}', "b": {"get": "data.points"}, "c": {"remove": True}}
    config = {"data": changes, "strict": True}
    definitions = sequence(step("set", "UpdateData", config))
    advanced = advance(definitions, at("set", json.dumps(DATA)), NOW)
    assert json.loads(advanced.enrollment.data) == {**DATA, "a": "", "b": 12}


@pytest.mark.parametrize(
    ("change", "written"),
    [
        ({"get": "data.huge"}, "1E+400"),
        ({"get": "data.list"}, "[0.1000000000000000000001]"),
        ([{"get": "data['list'][0]"}], "[0.1000000000000000000001]"),
        ({"append": {"get": "data.huge"}}, "[1E+400]"),
    ],
)
def test_numbers_that_no_float_holds_are_copied_to_the_last_digit(
    change: object, written: str
) -> None:
    definitions = sequence(step("set", "UpdateData", {"data": {"new": change}}))
    data = '{"huge": 1e400, "list": [0.1000000000000000000001]}'
    advanced = advance(definitions, at("set", data), NOW)
    assert advanced.enrollment.data.endswith(f', "new": {written}}}')


def test_ids_of_the_lookup_are_copied_to_the_last_digit() -> None:
    copied = {"id": {"get": "external.id"}, "first": {"get": "external.ids[0]"}}
    setting = replace(step("set", "UpdateData", {"data": copied}), reads_external=True)
    definitions = {"s": replace(sequence(setting)["s"], lookup="ids")}
    found = LookupAnswer({"id": 1234567890123456789, "ids": [1234567890123456789]})
    advanced = advance(definitions, at("set"), NOW, found)
    assert json.loads(advanced.enrollment.data) == {
        "id": 1234567890123456789,
        "first": 1234567890123456789,
    }


@pytest.mark.parametrize(
    ("key", "change", "value"),
    [
        ("points", {"add": 1}, 13),
        ("points", {"add": -0.5}, 11.5),
        ("points", {"add": "{{data.points}}"}, 24),
        ("price", {"add": 0.02}, 20.01),
        ("id", {"add": 1}, 1234567890123456790),
        ("none", {"add": 2}, 2),
        ("tags", {"append": "{{subject}}"}, ["a", 1, "ada"]),
        ("tags", {"append": {"get": "data.points"}}, ["a", 1, 12]),
        ("tags", {"append": ["b"]}, ["a", 1, ["b"]]),
        ("none", {"append": None}, [None]),
    ],
)
def test_a_key_that_is_there_becomes(key: str, change: object, value: object) -> None:
    assert updated({key: change})[key] == value


def test_changes_read_the_data_before_the_step() -> None:
    after = updated({"note": {"remove": True}, "copy": {"get": "data.note"}, "x": {"remove": True}})
    assert "note" not in after
    assert after["copy"] == "n"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"note": {"add": 1}}, 'data.note is "n", not a number'),
        ({"on": {"add": 1}}, "data.on is true, not a number"),
        ({"points": {"append": 1}}, "data.points is 12, not a list"),
        ({"points": {"add": "{{data.note}}"}}, "data.points.add: 'n' is not a number"),
        ({"points": {"add": "{{data.missing}}"}}, "data.points.add: '' is not a number"),
        ({"huge": {"add": "{{data.huge}}"}}, "data.huge becomes too large"),
        ({"more": {"add": 1}}, "data.more becomes too large"),
        ({"more": {"append": 1}}, "data.more is 1E+400, not a list"),
    ],
)
def test_data_that_do_not_fit_fail(change: dict[str, Any], message: str) -> None:
    definitions = sequence(step("set", "UpdateData", {"data": change}))
    data = '{"points": 12, "note": "n", "on": true, "huge": 1.7e308, "more": 1e400}'
    decision = advance(definitions, at("set", data), NOW).decision
    assert isinstance(decision, Fail)
    assert decision.failure == "bad_data"
    assert message in decision.message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a": {"add": "one"}}, "data.a.add: must be a number, or a template"),
        ({"a": {"add": True}}, "data.a.add: must be a number, or a template"),
        ({"a": {"add": "{{#if}}"}}, "data.a.add: line 1"),
        ({"a": {"get": ""}}, "data.a: get must be a path"),
        ({"a": {"remove": False}}, "data.a: remove must be true"),
        ({"a": {"b": {"add": 1}}}, "data.a.b: add changes a key of data itself"),
        ({"a": {"append": {"remove": True}}}, "data.a.append: remove changes a key"),
        ({"a": [{"get": {}}]}, "data.a.0: get must be a path"),
        ({"a": ["{{#if}}"]}, "data.a.0: line 1"),
    ],
)
def test_an_operation_that_cannot_be_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(DefinitionError) as error:
        compile_step("UpdateData", {"data": change})
    [fault] = error.value.faults
    assert message in str(fault)


def test_all_keys_of_an_object_are_merged() -> None:
    found = updated({"get": "data.new"}, {"a": 1, "new": {"a": 2, "b": [12345678901234567890]}})
    assert found == {
        "a": 2,
        "b": [12345678901234567890],
        "new": {"a": 2, "b": [12345678901234567890]},
    }


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"data": {"get": "data.none"}}, "data is null, not a mapping"),
        ({"data": {"get": "data.tags"}}, 'data is ["a", 1], not a mapping'),
        ({"data": {"get": "data.x"}, "strict": True}, "the value is missing"),
    ],
)
def test_what_is_not_an_object_is_bad_data(config: dict[str, Any], message: str) -> None:
    definitions = sequence(step("set", "UpdateData", config))
    decision = advance(definitions, at("set", json.dumps(DATA)), NOW).decision
    assert isinstance(decision, Fail)
    assert decision.failure == "bad_data"
    assert message in decision.message


def test_paths_of_the_lookup_that_are_read_are_known() -> None:
    assert "external" in (roots("UpdateData", {"data": {"a": [{"get": "external.plan"}]}}) or ())
    assert "external" not in (roots("UpdateData", {"data": {"a": {"get": "data.x"}}}) or ())


numbers = st.one_of(st.integers(-(10**18), 10**18), st.decimals(-1000, 1000, places=2).map(float))


@given(numbers, numbers)
def test_add_is_exact_to_the_digit(present: float, amount: float) -> None:
    after = updated({"x": {"add": amount}}, {"x": present})["x"]
    if isinstance(present, int) and isinstance(amount, int):
        assert after == present + amount
    assert abs(after - (present + amount)) <= 1e-12 * max(abs(present), abs(amount), 1)


def test_a_key_that_is_set_after_its_removal_exists() -> None:
    definitions = sequence(
        step("one", "UpdateData", {"data": {"a": {"remove": True}}}, then="two"),
        step("two", "UpdateData", {"data": {"a": {"add": 1}}}),
    )
    advanced = advance(definitions, at("one", '{"a": 5}'), NOW)
    assert json.loads(advanced.enrollment.data) == {"a": 1}
    assert advanced.data == {"a": 1}
    removed = advance(
        sequence(step("one", "UpdateData", {"data": {"a": {"remove": True}}})),
        at("one", '{"a": 5}'),
        NOW,
    )
    assert removed.data == {"a": REMOVED}
