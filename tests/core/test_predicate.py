"""Conditions: lodash's answers by rule, by property and by record."""

from __future__ import annotations

import copy
import tracemalloc
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sequencerd.core.model import DefinitionError, EvaluationError
from sequencerd.core.predicate import COMMANDS, UNDEFINED, Operand, compile_predicate, get

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


@pytest.mark.parametrize(
    ("path", "found"),
    [(["a", 1, "b"], "deep"), (3, "three"), (None, "nothing"), ([], UNDEFINED), (-0.0, "minus")],
)
def test_a_path_is_a_list_of_keys_or_any_key(path: object, found: object) -> None:
    subject = {"a": [0, {"b": "deep"}], "3": "three", "null": "nothing", "-0": "minus", "0": "plus"}
    assert get(subject, path) == found


def test_a_path_that_has_no_text_is_rejected() -> None:
    with pytest.raises(DefinitionError, match="no path"):
        compile_predicate("isNil", Operand(type="get", value={"toString": 1}), None)


def test_inherited_names_are_read_as_in_javascript() -> None:
    for path in ("constructor", "toString", "list.map", "text.trim"):
        found = compile_predicate("isFunction", Operand(type="get", value=path), None)
        assert found({"list": [], "text": ""}) is True
    assert (
        compile_predicate("has", Operand(type="get", value="list"), raw("map"))({"list": []})
        is False
    )
    assert (
        compile_predicate("hasIn", Operand(type="get", value="list"), raw("map"))({"list": []})
        is True
    )


@given(st.sampled_from(sorted(COMMANDS)), json_values, json_values | st.text("ab.[]01"))
def test_every_command_answers_or_says_why_not(command: str, value: object, other: object) -> None:
    subject = {"value": value, "other": other}
    before = copy.deepcopy(subject)
    predicate = compile_predicate(
        command, Operand(type="get", value="value"), Operand(type="get", value="other")
    )
    with suppress(EvaluationError):
        assert predicate(subject) in (True, False)
    assert repr(subject) == repr(before)  # NaN differs from itself


@pytest.mark.parametrize(
    ("command", "value", "other"),
    [
        ("repeat", "a", 1e9),
        ("padStart", "a", 1e9),
        ("range", 0, 1e15),
        ("times", 1e15, None),
        ("chunk", [1], 1e-300),
        ("fill", {"length": 2**40}, 1),
        ("toArray", {"length": 2**40}, None),
        ("every", {"length": 2**40}, None),
    ],
)
def test_no_command_takes_long_or_much(command: str, value: object, other: object) -> None:
    tracemalloc.start()
    with suppress(EvaluationError):
        compile_predicate(command, raw(value), raw(other))({})
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 50_000_000


@pytest.mark.parametrize("command", ["debounce", "template", "sample", "mixin"])
def test_what_is_left_out_is_told_with_the_reason(command: str) -> None:
    with pytest.raises(DefinitionError, match="left out, since"):
        compile_predicate(command, raw(1), raw(1))


@pytest.mark.parametrize(
    ("command", "value", "other"),
    [("repeat", "a", 1e9), ("bindAll", {"a": 1}, ["a"]), ("toNumber", {"toString": 1}, None)],
)
def test_where_lodash_throws_the_reason_is_told(command: str, value: object, other: object) -> None:
    with pytest.raises(EvaluationError):
        compile_predicate(command, raw(value), raw(other))({})


def test_data_nested_too_deep_is_told() -> None:
    deep, other = list[object](), list[object]()
    for _ in range(5000):
        deep, other = [deep], [other]
    with pytest.raises(EvaluationError, match="deep"):
        compile_predicate("isEqual", raw(deep), raw(other))({})
    with pytest.raises(EvaluationError, match="deep"):
        compile_predicate("gt", raw(deep), raw(1))({})


def test_a_long_path_is_not_followed_from_many_items() -> None:
    ask = compile_predicate("invokeMap", raw("x" * 2_000), raw("a." * 2_000))
    with pytest.raises(EvaluationError, match="steps"):
        ask({})


@pytest.mark.parametrize(
    ("command", "value", "other", "answer"),
    [
        ("floor", 1e308, 1, False),  # ten times that is infinite, and so NaN
        ("lastIndexOf", {"length": "x"}, 1, False),  # NaN
        ("invertBy", {"a": {"toString": 1}}, None, True),
        ("result", "abc", "charAt", True),
        ("result", {}, "hasOwnProperty", False),
        ("set", [1], "length[0]", True),
    ],
)
def test_rarer_commands(command: str, value: object, other: object, answer: bool) -> None:
    assert compile_predicate(command, raw(value), raw(other))({}) is answer


@pytest.mark.parametrize(
    ("command", "value", "other"),
    [
        ("set", [1], "length"),  # to undefined
        ("take", [1], {"toString": 1}),  # no number
        ("pick", {"a": 1}, [{"toString": 1}]),  # no path
        ("unzipWith", [[1]], 1),  # no function
    ],
)
def test_rarer_commands_that_throw(command: str, value: object, other: object) -> None:
    with pytest.raises(EvaluationError):
        compile_predicate(command, raw(value), raw(other))({})


def test_an_object_of_javascript_s_own_is_plain_only_if_all_inherit_from_it() -> None:
    def is_plain(path: str) -> bool:
        return compile_predicate("isPlainObject", Operand(type="get", value=path), None)({"a": []})

    assert is_plain("constructor.prototype") is True
    assert is_plain("a.__proto__") is False
