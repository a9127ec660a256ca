"""Conditions: lodash's answers by rule, by property and by record."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from sequencerd.core.model import DefinitionError, EvaluationError
from sequencerd.core.predicate import UNDEFINED, Operand, compile_predicate, get

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


def raw(value: object) -> Operand:
    return Operand(type="raw", value=value)


@pytest.mark.parametrize(
    ("command", "value", "other", "answer"),
    [
        ("gt", "10", "9", False),  # two texts compare as texts
        ("gt", "10", 9, True),
        ("gt", "1_000", 1, False),  # Python's float() would take it
        ("gte", None, 0, True),
        ("eq", 1, True, False),
        ("eq", [], [], False),  # two arrays, not one
        ("isEqual", {"a": [1]}, {"a": [1.0]}, True),
        ("includes", "10", -0.0, True),
        ("startsWith", "null and void", None, True),
        ("isNil", None, None, True),
        ("isEmpty", 5, None, True),
        ("size", [], None, False),
        ("first", [[]], None, True),
        ("inRange", -3, -5, True),
        ("inRange", 5, 5, False),
        ("add", "0", 0, True),  # the text "00"
        ("subtract", "7", 7, False),
        ("multiply", True, "1", False),  # "true" is no number
        ("divide", 0, 0, False),  # NaN
        ("divide", 1, 0, True),  # Infinity
        ("last", [1, 0], None, False),
        ("toNumber", "0x0", None, False),
        ("isArrayLike", {"length": 3}, None, True),
        ("isDate", "2018-06-08", None, False),
    ],
)
def test_commands(command: str, value: object, other: object, answer: bool) -> None:
    assert compile_predicate(command, raw(value), raw(other))({}) is answer


def test_values_reached_by_get_keep_their_identity() -> None:
    whole, item = Operand(type="get", value="list"), Operand(type="get", value="list[0]")
    assert compile_predicate("includes", whole, item)({"list": [{"a": 1}]}) is True
    assert compile_predicate("includes", whole, raw({"a": 1}))({"list": [{"a": 1}]}) is False


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("a.b", "whole"),  # the whole key first
        ("c[0].d", 1),
        ("c['0'].d", 1),
        ("c.length", 1),
        ("c[1]", UNDEFINED),
        ("c.__class__", UNDEFINED),
        ("text.1", "e"),
    ],
)
def test_get(path: str, found: object) -> None:
    assert get({"a.b": "whole", "a": {"b": 2}, "c": [{"d": 1}], "text": "text"}, path) == found


@given(json_values, st.text("ab.[]'\"0", max_size=12) | st.text())
def test_get_never_raises(subject: object, path: str) -> None:
    get(subject, path)


def test_an_unknown_command_is_rejected_with_the_nearest() -> None:
    with pytest.raises(DefinitionError, match="'isEqual'"):
        compile_predicate("isEqualTo", raw(1), raw(1))


def test_a_path_that_is_no_text_is_rejected() -> None:
    with pytest.raises(ValidationError, match="needs a path"):
        Operand(type="get", value=3)


def test_data_nested_too_deep_is_told() -> None:
    deep: list[object] = []
    for _ in range(5000):
        deep = [deep]
    with pytest.raises(EvaluationError, match="deep"):
        compile_predicate("isEqual", raw(deep), raw(deep))({})
    with pytest.raises(EvaluationError, match="deep"):
        compile_predicate("gt", raw(deep), raw(1))({})
