"""Configs: what is wrong with one is described in terms of the file, not of pydantic."""

from __future__ import annotations

from typing import Annotated, Any

import pytest
from pydantic import Field

from sequencerd.core.config import Config, parse_config
from sequencerd.core.model import DefinitionError

NAMES = "letters, digits or any of _./-"


class Example(Config):
    """A key for each kind of value."""

    whole: int = 3
    number: float = 1
    flag: bool = False
    code: Annotated[str, Field(pattern="^[A-Z]+$")] = "A"
    name: Annotated[str, Field(pattern="^[A-Za-z_][A-Za-z0-9_./-]{0,9}$")] = "a"
    url: Annotated[str, Field(pattern="^https?://")] = "http://x"
    odd: Annotated[str, Field(pattern="^a|b$")] = "a"
    small: Annotated[int, Field(gt=0, lt=10)] = 3
    items: list[int] = Field(default=[1, 2], min_length=2, max_length=3)
    pair: tuple[int, int] = (1, 2)
    text: Annotated[str, Field(min_length=2, max_length=3)] = "ab"
    map: dict[str, int] = Field(default_factory=dict)
    nothing: None = None


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
        ({"items": [1]}, "items: must have at least 2 items"),
        ({"items": [1, 2, 3, 4]}, "items: must have at most 3 items"),
        ({"pair": 1}, "pair: must be a list"),
        ({"text": "a"}, "text: must have at least 2 characters"),
        ({"text": "abcd"}, "text: must have at most 3 characters"),
        ({"map": []}, "map: must be a mapping, key: value"),
        ({"map": {"a": "b"}}, "map.a: must be a whole number"),
        ({"nothing": 1}, "nothing: must be null"),
        ({"txet": 1}, "txet: this has no key 'txet'; did you mean 'text'?"),
    ],
)
def test_errors_are_in_plain_words(config: dict[str, Any], words: str) -> None:
    with pytest.raises(DefinitionError) as wrong:
        parse_config(Example, config)
    assert str(wrong.value) == words
