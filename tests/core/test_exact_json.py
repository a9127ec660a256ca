"""Numbers keep their digits, whatever a float holds."""

from __future__ import annotations

import copy
import json
from decimal import Decimal
from time import process_time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sequencerd.core import exact_json

NUMBERS = st.decimals(allow_nan=False, allow_infinity=False)
TEXTS = st.text(st.characters(exclude_characters="\0"))
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | TEXTS | NUMBERS.map(str).map(exact_json.loads),
    lambda inner: st.lists(inner) | st.dictionaries(TEXTS, inner),
    max_leaves=10,
)


@given(NUMBERS)
def test_a_number_keeps_its_value(number: Decimal) -> None:
    read = exact_json.loads(f"[{number}]")
    assert Decimal(exact_json.dumps(read)[1:-1]) == number


@given(VALUES)
def test_written_json_is_read_again(value: object) -> None:
    assert exact_json.loads(exact_json.dumps(value)) == value


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_a_number_that_a_float_holds_is_a_float(number: float) -> None:
    assert type(exact_json.loads(repr(number))) is float


@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), Decimal("NaN"), Decimal("-Infinity"), Decimal("sNaN")]
)
def test_non_numbers_are_refused(value: object) -> None:
    with pytest.raises(ValueError, match=r"JSON"):
        exact_json.dumps({"a": value})
    with pytest.raises(TypeError):
        exact_json.dumps({"a": object()})


def test_an_exponent_that_no_number_can_have_is_an_error() -> None:
    with pytest.raises(ValueError, match="exponent"):
        exact_json.loads("[1e9999999999999999999999]")


def test_a_text_with_nul_characters_stays_a_text() -> None:
    assert json.loads(exact_json.dumps("\0x\0")) == "\0x\0"


@pytest.mark.parametrize("extra", [0, 1, 5000])
def test_brackets_in_texts_are_not_levels(extra: int) -> None:
    """Some more than may be within each other, and some beside."""
    brackets = "[{" * exact_json.MAX_DEPTH
    text = json.dumps([brackets, '\\"' + brackets, [[]] * exact_json.MAX_DEPTH])
    exact_json.check_depth(text)
    levels = exact_json.MAX_DEPTH - 3 + extra
    deep = "[" * levels + text + "]" * levels
    if extra:
        with pytest.raises(ValueError, match="nested more than 200 levels deep"):
            exact_json.loads(deep)
    else:
        exact_json.loads(deep)


def test_a_text_without_an_end_takes_little_time() -> None:
    """What a server answers may be cut off, or no JSON at all."""
    text, before = "[" + "[]," * exact_json.MAX_DEPTH + '"' + '\\"' * 500_000, process_time()
    with pytest.raises(json.JSONDecodeError, match="Unterminated string"):
        exact_json.loads(text)
    assert process_time() - before < 2  # seconds, in which nothing else is done


def test_the_deepest_json_can_be_read_by_functions_that_call_themselves() -> None:
    """Those of Python have a limit, whatever the version."""
    deep = exact_json.loads('{"a":' * exact_json.MAX_DEPTH + "1" + "}" * exact_json.MAX_DEPTH)
    assert copy.deepcopy(deep) == deep
    assert exact_json.loads(exact_json.dumps(deep)) == deep
