"""What NOTIFY may carry."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sequencerd.listener import Changed, Due, Look, Message, parse


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        ("", Look()),
        ("{}", Look()),
        ('{"subject": "ada"}', Look(subject="ada")),
        ('{"sequence": "s", "step": "a"}', Look(sequence="s", step="a")),
        ('{"due" : ["s", "a"]}', Due(due=("s", "a"))),
        ('{"definitions": true}', Changed(definitions=True)),
    ],
)
def test_payloads(payload: str, message: Message) -> None:
    assert parse(payload) == message


@pytest.mark.parametrize(
    "payload", ["nonsense", "[]", "null", '{"subject": 5}', '{"sbject": "x"}', '{"due": ["a"]}']
)
def test_nonsense_is_refused_with_a_hint(payload: str) -> None:
    with pytest.raises(ValueError, match="write NOTIFY sequencer"):
        parse(payload)


@given(st.text())
def test_whatever_comes_it_is_a_message_or_refused(payload: str) -> None:
    with suppress(ValueError):
        parse(payload)
