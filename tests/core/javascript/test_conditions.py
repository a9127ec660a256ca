"""Conditions: lodash's answers, and what a definition may ask of it."""

from __future__ import annotations

import json
from contextlib import suppress
from importlib.resources import files

import pytest
from _quickjs import Context
from hypothesis import given, settings
from hypothesis import strategies as st

from sequencerd.core.faults import DefinitionError, EvaluationError
from sequencerd.core.javascript.conditions import (
    ALWAYS_FALSE,
    ALWAYS_TRUE,
    COMMANDS,
    LEFT_OUT,
    Operand,
    compile_predicate,
    first_key,
)

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


def holds(command: str, value: Operand, other: Operand | None, view: object = None) -> bool:
    return compile_predicate(command, value, other)(json.dumps(view or {}))


def at(path: object) -> Operand:
    return Operand(type="get", value=path)


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
def test_commands_answer_as_in_lodash(
    command: str, value: object, other: object, answer: bool
) -> None:
    assert holds(command, raw(value), raw(other)) is answer


def test_values_reached_by_get_keep_their_identity() -> None:
    view = {"list": [{"a": 1}]}
    assert holds("includes", at("list"), at("list[0]"), view) is True
    assert holds("includes", at("list"), raw({"a": 1}), view) is False


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("a.b", '"whole"'),  # the whole key first
        ("c[0].d", "1"),
        ("c['0'].d", "1"),
        ("c.length", "1"),
        ("c[1]", None),
        ("c.__class__", None),
        ("text.1", '"e"'),
        (["a", "b"], "2"),
        (3, '"three"'),
        (None, '"nothing"'),
        ([], None),
        (-0.0, '"minus"'),
    ],
)
def test_a_path_is_read_as_lodash_reads_it(path: object, found: str | None) -> None:
    view = {"a.b": "whole", "a": {"b": 2}, "c": [{"d": 1}], "text": "text"}
    more = {"3": "three", "null": "nothing", "-0": "minus", "0": "plus"}
    predicate = compile_predicate("isNil", at(path), None)
    assert predicate.operands(json.dumps(view | more)) == (found, None)


@pytest.mark.parametrize(
    ("path", "key"),
    [
        ("data.a", "data"),
        ("data['a b']", "data"),
        ("['data'].a", "data"),
        ("a b", "a b"),
        (["data", 1], "data"),
        ([0], "0"),
        ([], None),
        (None, "null"),
    ],
)
def test_the_first_key_of_a_path(path: object, key: str | None) -> None:
    assert first_key(at(path)) == key


@given(json_values, st.text("ab.[]'\"0", max_size=12) | st.text())
def test_get_never_fails(view: object, path: str) -> None:
    compile_predicate("isNil", at(path), None)(json.dumps(view))


@pytest.mark.parametrize(
    ("hint", "names"),
    [
        ("did you mean 'eq'?", "equals Equal equal_to isEquals =="),
        ("did you mean 'isEqual'?", "isEqualTo IsEqual is-equal isequal isEqal"),
        ("did you mean 'gt'?", "greaterThan greater_than GREATER-THAN isGreaterThan greatherThan"),
        ("did you mean 'gt'?", "more exceeds after_than > GT gtt"),
        (
            "did you mean 'gte'?",
            "greaterThanOrEqual isGreaterThanOrEqualTo greaterOrEqual atLeast ge",
        ),
        ("did you mean 'lt'?", "lessThan less_than less smallerThan below before <"),
        ("did you mean 'lte'?", "lessThanOrEqual lessThanEquals at_most le"),
        ("did you mean 'includes'?", "contains contain include in oneOf hasValue"),
        ("did you mean 'startsWith'?", "beginsWith starts_with startWith"),
        ("did you mean 'isEmpty'?", "empty isBlank"),
        ("write the opposite of 'eq'", "notEqual not_equals neq ne != isNotEqual doesNotEqual"),
        ("write the opposite of 'includes'", "notIncludes does_not_contain notIn nin"),
        ("write the opposite of 'isNil'", "isNotNull notNil isDefined"),
        ("did you mean 'gt'? For times, write momentCommand: isAfter", "isAfter isafter"),
        ("For times, write momentCommand: isBetween", "isBetween"),
        ("write a function of lodash such as eq, gt", "xyzzy \u00e4 ''"),
    ],
)
def test_an_unknown_command_is_rejected_with_the_one_that_is_meant(hint: str, names: str) -> None:
    for name in names.split():
        with pytest.raises(DefinitionError) as error:
            compile_predicate(name, raw(1), raw(1))
        assert hint in str(error.value), name


def test_the_commands_are_those_of_lodash() -> None:
    context = Context()
    context.eval(files("sequencerd.core.javascript").joinpath("vendor/lodash.js").read_text())
    known = set(str(context.eval("_.functions(_).join(' ')")).split())
    assert known == COMMANDS | LEFT_OUT.keys()
    assert not COMMANDS & LEFT_OUT.keys()
    assert ALWAYS_TRUE <= COMMANDS


@settings(deadline=None)
@given(st.sampled_from(sorted(ALWAYS_TRUE)), json_values, json_values)
def test_conditions_that_are_always_true(command: str, value: object, other: object) -> None:
    with suppress(EvaluationError):
        assert holds(command, raw(value), raw(other)) is True


@settings(deadline=None)
@given(st.sampled_from(sorted(ALWAYS_FALSE)), json_values, json_values)
def test_conditions_that_are_always_false(command: str, value: object, other: object) -> None:
    assert holds(command, raw(value), raw(other)) is False


def test_every_command_that_is_always_true_is_known_as_such() -> None:
    """A `filter` that is meant as a condition is always true: so is an empty list."""
    values = [None, False, 0, 1, "", "a", "0", [], [1], [{"a": 1}], {}, {"a": {"b": 2}}]
    views = [{"a": value, "b": other} for value in values for other in values]
    for command in COMMANDS - ALWAYS_TRUE:
        predicate = compile_predicate(command, at("a"), at("b"))
        answers = set()
        for view in views:
            with suppress(EvaluationError):
                answers.add(predicate(json.dumps(view)))
        assert False in answers, command


def test_a_path_that_has_no_text_is_rejected() -> None:
    with pytest.raises(DefinitionError, match="not a path"):
        compile_predicate("isNil", at({"toString": 1}), None)


def test_operands_that_are_no_json_are_rejected() -> None:
    for value in (float("nan"), object()):
        with pytest.raises(DefinitionError, match="not JSON"):
            compile_predicate("isNil", raw(value), None)


def test_inherited_names_are_read_as_in_javascript() -> None:
    view = {"list": [], "text": ""}
    for path in ("constructor", "toString", "list.map", "text.trim"):
        assert holds("isFunction", at(path), None, view) is True
    assert holds("has", at("list"), raw("map"), view) is False
    assert holds("hasIn", at("list"), raw("map"), view) is True


@settings(deadline=None)  # a limit is reached later
@given(st.sampled_from(sorted(COMMANDS)), json_values, json_values | st.text("ab.[]01"))
def test_every_command_returns_a_result_or_an_error(
    command: str, value: object, other: object
) -> None:
    with suppress(EvaluationError):
        assert holds(command, at("value"), at("other"), {"value": value, "other": other}) in (0, 1)


@pytest.mark.parametrize("command", ["debounce", "template", "sample", "mixin", "now"])
def test_omitted_commands_are_reported_with_the_reason(command: str) -> None:
    with pytest.raises(DefinitionError, match="not available, because"):
        compile_predicate(command, raw(1), raw(1))


@pytest.mark.parametrize(
    ("command", "value", "other", "words"),
    [
        ("bindAll", {"a": 1}, ["a"], "Expected a function"),
        ("toNumber", {"toString": 1}, None, "toNumber"),
    ],
)
def test_errors_of_lodash_are_reported(
    command: str, value: object, other: object, words: str
) -> None:
    with pytest.raises(EvaluationError, match=words) as caught:
        holds(command, raw(value), raw(other))
    assert caught.value.failure == "error"


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
    assert holds(command, raw(value), raw(other)) is answer


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
        holds(command, raw(value), raw(other))
