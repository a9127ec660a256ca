"""The outcomes that the enrollments of a batch share."""

import json
from collections.abc import Mapping

import pytest

from sequencerd.core.enrollment import Enrollment
from sequencerd.core.faults import EvaluationError
from sequencerd.core.task import Answer
from sequencerd.engine.shared_outcome import SharedOutcome, SharedOutcomes
from tests.core.test_advance import at


def paid(view: str) -> bool:
    data: Mapping[str, object] = json.loads(view)["data"]
    if "broken" in data:
        raise EvaluationError("bad_data", "it cannot be compared")
    return bool(data.get("paid"))


def open_(view: str) -> bool:
    data: Mapping[str, object] = json.loads(view)["data"]
    return bool(data.get("open"))


def having(**data: bool) -> Enrollment:
    return at("a", json.dumps(data))


def outcome(number: int) -> SharedOutcome:
    return SharedOutcome([[number]], at("a"), None)


def test_data_with_the_same_answers_share_an_outcome() -> None:
    outcomes, key = SharedOutcomes(), ("state",)
    assert outcomes.get(key, having(paid=True)) is None
    outcomes.add(key, [(paid, True)], outcome(1))
    outcomes.add(key, [(paid, False), (open_, True)], outcome(2))
    assert outcomes.get(key, having(paid=True, open=True)) == outcome(1)
    assert outcomes.get(key, having(open=True)) == outcome(2)
    assert outcomes.get(key, having()) is None  # nothing has had these answers
    outcomes.add(key, [(paid, False), (open_, False)], outcome(3))
    assert outcomes.get(key, having()) == outcome(3)
    assert outcomes.get(("another state",), having()) is None


@pytest.mark.parametrize("answer", [True, False])
def test_data_that_a_condition_cannot_read_share_nothing(answer: bool) -> None:
    outcomes, key = SharedOutcomes(), ("state",)
    outcomes.add(key, [(paid, answer)], outcome(1))
    assert outcomes.get(key, having(broken=True)) is None


def test_only_the_same_state_and_result_have_the_same_key() -> None:
    outcomes = SharedOutcomes()
    here, there, done = at("a"), at("b"), Answer()
    keys = [
        outcomes.key(enrollment, result, revision, expired)
        for enrollment, result, revision, expired in (
            (here, None, None, 0),
            (there, None, None, 0),
            (here, done, None, 0),
            (here, done, 7, 0),
            (here, done, 7, 1),
            (here._replace(goals_met=["g"]), done, 7, 1),
            (here._replace(executed=["s/a"]), done, 7, 1),
        )
    ]
    assert len(set(keys)) == len(keys)
    again = here._replace(id=8, subject="another", goals_met=[])
    assert outcomes.key(again, None, None, 0) == keys[0]
    assert outcomes.key(again, Answer(data={"own": 1}), None, 0) is None
    assert outcomes.key(again, done, 7, 0) == keys[3]
