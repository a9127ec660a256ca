"""The JSON text of what runners and templates receive."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import pytest

from sequencerd.core.enrollment import Enrollment
from sequencerd.core.view import Context, View, state_view, view_in_state
from sequencerd.core.view import view as view_of

NOW = datetime(2026, 1, 2, 3, 4, 5, 678_901, UTC)
SUBJECT = 'ü"\\\n</script>'


def enrollment(**values: Any) -> Enrollment:
    made = Enrollment(
        7, SUBJECT, '{"n": 1.10, "s": "é"}', NOW, UUID(int=1), None, None, "s", "a", None, NOW
    )
    return made._replace(**values)


@pytest.mark.parametrize("original_id", [None, "12", '"x"\\'])
def test_the_text_of_a_view_has_its_values(original_id: str | None) -> None:
    external = {"plan": 'the "best"', "seats": 3}
    view = view_of(enrollment(original_id=original_id), "Europe/Vienna", NOW, external)
    assert json.loads(view.text) == view
    assert '"n": 1.10' in view.text


def test_views_in_one_state_share_the_text_of_the_state() -> None:
    state = state_view(enrollment(), "UTC", NOW, {})
    views = [view_in_state(enrollment(id=n, subject=f"u{n}"), state) for n in (1, 2)]
    assert [json.loads(one.text)["subject"] for one in views] == ["u1", "u2"]
    assert all(one.text.endswith(state.text[1:]) for one in views)


def test_the_text_of_a_view_has_values_that_were_added() -> None:
    view = view_of(enrollment(), "UTC", NOW, {})
    more = View.of({**view, "unsubscribeLink": "https://example.com"}, view.data)
    assert json.loads(more.text) == more


@pytest.mark.parametrize(
    ("roots", "keys"),
    [
        ({"data", "unknown"}, {"data"}),
        ({"data", "id", "unknown"}, {"data", "id"}),
        ({"unknown"}, set()),
    ],
)
def test_a_view_for_a_condition_has_the_keys_that_it_reads(roots: set[str], keys: set[str]) -> None:
    text = Context(enrollment(), NOW, "UTC", {}).json(roots)
    assert json.loads(text).keys() == keys
