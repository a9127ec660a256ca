"""The circuit breaker of an executor, by itself."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import timedelta

import pytest

from sequencerd.core.backoff import MAX_COINCIDENCE, Pauses
from sequencerd.core.task import Answer, Failed, Result
from sequencerd.engine.breaker import Breaker, now


@pytest.fixture
async def breaker() -> AsyncIterator[Breaker]:
    made = Breaker(10, Pauses(), lambda: None, lambda: None)
    yield made
    made.stop()


def judge(breaker: Breaker, *results: Result, begun: float | None = None) -> list[Result]:
    """What a breaker says of the results of one call."""
    keys = [(number, 1) for number in range(len(results))]
    return list(breaker.judge(keys, results, now() if begun is None else begun))


async def test_equal_failures_are_retried_at_the_same_time(breaker: Breaker) -> None:
    """Whether a runner answers one object for all, or one for each. The wait is random."""
    one = Failed("down", fault="server")
    for results in ([one] * 3, [Failed("down", fault="server") for _ in range(3)]):
        _, first, *others = judge(breaker, Answer(), *results)
        assert isinstance(first, Failed)
        assert first.retry_after is not None
        assert others == [first, first]


async def test_different_failures_keep_their_messages(breaker: Breaker) -> None:
    results = judge(breaker, Failed("a", fault="server"), Answer(), Failed("b", fault="server"))
    assert [getattr(result, "message", None) for result in results] == ["a", None, "b"]


async def test_a_server_that_asks_for_weeks_is_tried_again_within_a_day(breaker: Breaker) -> None:
    (failed,) = judge(breaker, Failed("later", fault="server", retry_after=timedelta(weeks=2)))
    assert isinstance(failed, Failed)
    assert failed.retry_after == timedelta(days=1)


async def test_of_simultaneous_calls_the_first_failure_names_the_cause(breaker: Breaker) -> None:
    begun = now() - 1
    judge(breaker, Failed("gone", fault="server", cause="unreachable"), begun=begun)
    judge(breaker, Failed("no login", fault="server", cause="refused"), begun=begun)
    assert (breaker.outage, breaker.cause) == ("gone", "unreachable")


async def test_an_outage_without_evidence_is_reported_once() -> None:
    changes: list[str | None] = []
    one = Breaker(10, Pauses(), lambda: None, lambda: changes.append(one.outage))
    for number in range(MAX_COINCIDENCE + 2):
        judge(one, Failed(f"500, request {number}", fault="unclear"))
    assert changes == [f"500, request {MAX_COINCIDENCE - 1}"]
    one.stop()
