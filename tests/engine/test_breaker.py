"""The circuit breaker of an executor, by itself."""

from __future__ import annotations

from sequencerd.core.backoff import Pauses
from sequencerd.core.model import Answer, Failed, Result
from sequencerd.engine.breaker import Breaker, now


def judge(*results: Result) -> list[Result]:
    """What a new breaker says of the results of one call."""
    breaker = Breaker(10, Pauses(), lambda: None, lambda: None)
    keys = [(number, 1) for number in range(len(results))]
    judged = list(breaker.judge(keys, results, now()))
    breaker.stop()
    return judged


async def test_equal_failures_are_retried_at_the_same_time() -> None:
    """Whether a runner answers one object for all, or one for each. The wait is random."""
    one = Failed("down", fault="server")
    for results in ([one] * 3, [Failed("down", fault="server") for _ in range(3)]):
        _, first, *others = judge(Answer(), *results)
        assert isinstance(first, Failed)
        assert first.retry_after is not None
        assert others == [first, first]


async def test_different_failures_keep_their_messages() -> None:
    results = judge(Failed("a", fault="server"), Answer(), Failed("b", fault="server"))
    assert [getattr(result, "message", None) for result in results] == ["a", None, "b"]
