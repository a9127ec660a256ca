"""What is masked, wherever it is in the data."""

from __future__ import annotations

import json
from time import process_time
from typing import Any

import pytest

from sequencerd.console.mask import MASKED_VALUE, make_mask
from sequencerd.errors import SettingsError
from sequencerd.settings_file import load

ITEMS = [{"email": "ada@x.example", "ok": 1}, {"email": ["bob@x.example"]}, "email", None]


@pytest.mark.parametrize(
    ("path", "data", "shown"),
    [
        ("data.email", {"email": "ada@x.example"}, {"email": MASKED_VALUE}),
        (
            "data.contacts.email",
            {"contacts": ITEMS},
            {
                "contacts": [
                    {"email": MASKED_VALUE, "ok": 1},
                    {"email": MASKED_VALUE},
                    "email",
                    None,
                ]
            },
        ),
        (
            "data.contacts.0.email",
            {"contacts": ITEMS},
            {"contacts": [{"email": MASKED_VALUE, "ok": 1}, *ITEMS[1:]]},
        ),
        (
            "data.contacts.1",
            {"contacts": ["a", "bob", "c"]},
            {"contacts": ["a", MASKED_VALUE, "c"]},
        ),
        ("data.contacts.7", {"contacts": ["a", "b"]}, {"contacts": ["a", "b"]}),
        (
            "data.a.b",
            {"a": [[{"b": 1}], [[{"b": 2}]]]},
            {"a": [[{"b": MASKED_VALUE}], [[{"b": MASKED_VALUE}]]]},
        ),
        ("data.a.0", {"a": [{"0": "x"}, {"0": "y"}]}, {"a": [MASKED_VALUE, {"0": MASKED_VALUE}]}),
        ("data.a.b", {"a": "text"}, {"a": "text"}),
        ("data.0", {"0": "x"}, {"0": MASKED_VALUE}),
    ],
)
def test_a_path_leads_through_lists(path: str, data: Any, shown: Any) -> None:
    assert make_mask([path])({"data": json.dumps(data)})["data"] == shown


def test_values_in_lists_are_masked_in_texts() -> None:
    mask = make_mask(["data.people.name"])
    data = json.dumps({"people": [{"name": "Ada"}, {"name": "Bob Jones"}]})
    row = mask({"data": data, "message": "Bob Jones and Ada"})
    assert row["message"] == f"{MASKED_VALUE} and {MASKED_VALUE}"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("Ada", "長" * 30_000),
        (" ".join(f"w{number}" for number in range(150_000)), "sent to W77777, w77777x"),
    ],
)
def test_long_texts_take_little_time(value: str, message: str) -> None:
    data, before = json.dumps({"text": value}), process_time()
    row = make_mask(["data.text"])({"data": data, "message": message})
    assert process_time() - before < 2  # seconds, in which nothing else is done
    assert row["message"] == message.replace("W77777,", f"{MASKED_VALUE},")


@pytest.mark.parametrize(
    "path", ["email", "data", "data.", "data..a", "subject.a", "data.a[0]", "data.a[].b", "data.*"]
)
def test_a_path_that_cannot_match_is_refused(path: str) -> None:
    with pytest.raises(SettingsError, match=r"console\.mask") as caught:
        load({"SEQUENCERD_CONSOLE_MASK": path})
    assert path in str(caught.value)
