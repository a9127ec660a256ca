"""Errors of configs are described in terms of the file, not of pydantic."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field, StrictFloat, StrictInt

from sequencerd.core.config import Config, in_order, parse_config
from sequencerd.core.faults import DefinitionError

EITHER = "must be 'never', 'often', a mapping such as {after: ...} or a list"
NAMES = "letters, digits or any of _./-"


class Inner(Config):
    """A value with keys of its own."""

    after: str
    unit: Literal["day", "hour"] = "day"


class Example(Config):
    """A key for each kind of value."""

    whole: int = 3
    number: float = 1
    flag: bool = False
    code: Annotated[str, Field(pattern="^[A-Z]+$")] = "A"
    name: Annotated[str, Field(pattern="^[A-Za-z_][A-Za-z0-9_./-]{0,9}$")] = "a"
    url: Annotated[str, Field(pattern="^https?://")] = "http://x"
    odd: Annotated[str, Field(pattern="^a|b$")] = "a"
    most: Annotated[float, Field(le=2)] = 1
    small: Annotated[int, Field(gt=0, lt=10)] = 3
    items: list[int] = Field(default=[1, 2], min_length=2, max_length=3)
    pair: tuple[int, int] = (1, 2)
    text: Annotated[str, Field(min_length=2, max_length=3)] = "ab"
    map: dict[str, int] = Field(default_factory=dict)
    nothing: None = None
    either: Literal["never", "often"] | Inner | list[Inner] | None = None
    amount: StrictInt | StrictFloat | None = None
    inner: dict[str, Inner] = Field(default_factory=dict)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"whole": 1.5}, "whole: must be a whole number"),
        ({"whole": "x"}, "whole: must be a whole number"),
        ({"number": "x"}, "number: must be a number"),
        ({"number": float("nan")}, "number: must be a number"),
        ({"flag": "maybe"}, "flag: must be true or false"),
        ({"code": "a"}, "code: must be capital letters"),
        ({"name": "a b"}, f"name: must be 1 to 10 {NAMES}, and begin with a letter or _"),
        ({"url": "ftp://x"}, "url: must be a URL such as https://example.com"),
        ({"odd": "c"}, "odd: must match ^a|b$"),
        ({"small": 0}, "small: must be more than 0"),
        ({"small": 10}, "small: must be less than 10"),
        ({"most": 3}, "most: must be 2 or less"),
        ({"items": [1]}, "items: must have at least 2 items"),
        ({"items": [1, 2, 3, 4]}, "items: must have at most 3 items"),
        ({"pair": 1}, "pair: must be a list"),
        ({"text": "a"}, "text: must have at least 2 characters"),
        ({"text": "abcd"}, "text: must have at most 3 characters"),
        ({"map": []}, "map: must be a mapping, key: value"),
        ({"map": {"a": "b"}}, "map.a: must be a whole number"),
        ({"nothing": 1}, "nothing: must be null"),
        ({"txet": 1}, "txet: this has no key 'txet'; did you mean 'text'?"),
        ({"either": {}}, "either.after: is missing"),
        ({"either": {"after": 1}}, "either.after: must be a text"),
        ({"either": {"after": "x", "unit": 1}}, "either.unit: must be 'day' or 'hour'"),
        ({"either": [{"after": 1}]}, "either.0.after: must be a text"),
        (
            {"either": {"after": "x", "untli": 1}},
            "either.untli: either has no key 'untli'; did you mean 'unit'?",
        ),
        ({"inner": {"a": 1}}, "inner.a: must be a mapping such as {after: ...}"),
        (
            {"inner": {"a": {"after": "x", "untli": 1}}},
            "inner.a.untli: a has no key 'untli'; did you mean 'unit'?",
        ),
        ({"amount": "x"}, "amount: must be a number"),
        *(({"either": wrong}, f"either: {EITHER}") for wrong in ("sometimes", "", 5, 1.5, True)),
        ({"either": [5]}, "either.0: must be a mapping such as {after: ...}"),
    ],
)
def test_errors_are_in_plain_words(config: dict[str, Any], words: str) -> None:
    with pytest.raises(DefinitionError) as wrong:
        parse_config(Example, config)
    assert str(wrong.value) == words


def test_keys_have_the_order_of_the_fields() -> None:
    inner = {"unit": "day", "after": "x"}
    given = {"inner": {"b": inner, "a": 1}, "other": inner, "either": [inner, 3], "whole": 1}
    ordered = {
        "other": {"unit": "day", "after": "x"},
        "whole": 1,
        "either": [{"after": "x", "unit": "day"}, 3],
        "inner": {"b": {"after": "x", "unit": "day"}, "a": 1},
    }
    assert json.dumps(in_order(given, Example)) == json.dumps(ordered)
    assert in_order("x", Example) == "x"
