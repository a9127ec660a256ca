"""When a runner with a failing server is tried again, and which enrollments spend attempts."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sequencerd.core import backoff
from sequencerd.core.backoff import (
    MAX_COINCIDENCE,
    OPEN_GATE,
    SUCCESS_COUNTS_FOR,
    Gate,
    Pauses,
    Suspects,
    Verdict,
)

PAUSES = Pauses(1.0, 900.0)


def test_pauses_grow_up_to_the_longest() -> None:
    waits = [PAUSES.after(n, 0.0) for n in range(1, 13)]
    assert waits == [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 900, 900]
    assert PAUSES.after(1000, 1.0) == 675


def test_an_open_gate_admits_as_many_as_there_are_slots() -> None:
    assert OPEN_GATE.allowed(0.0, 20) == 20


def test_after_a_failure_the_number_of_tries_doubles_from_one() -> None:
    gate = OPEN_GATE.failed("refused", 9.0, 10.0, 1.0, 0.0)
    assert gate.allowed(10.9, 20) == 0
    assert gate.allowed(11.0, 20) == 1
    limits = []
    while gate.limit is not None:
        gate = gate.succeeded(11.0, 20)
        assert gate.cause is None
        limits.append(gate.allowed(11.0, 20))
    assert limits == [2, 4, 8, 16, 20]


def test_the_requested_pause_is_a_minimum() -> None:
    assert OPEN_GATE.failed("slow down", 0.0, 0.0, 4.0, 0.0).next_at == 4.0
    assert OPEN_GATE.failed("slow down", 0.0, 0.0, 4.0, 60.0).next_at == 60.0


def test_calls_that_ran_at_the_same_time_count_once() -> None:
    gate = OPEN_GATE
    for number in range(20):
        gate = gate.failed("refused", 0.0, 10.0 + number, 1.0, 0.0)
    assert gate.failures == 1
    assert gate.succeeded(0.0, 20) == gate  # it was begun before, and says nothing new
    assert gate.failed("refused", 40.0, 41.0, 2.0, 0.0).failures == 2


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["ok", "down", "suspected"]), st.floats(0, 100), st.floats(0, 5000)
        ),
        max_size=60,
    )
)
def test_back_off_never_spins_and_never_ends(story: list[tuple[str, float, float]]) -> None:
    gate, now, row = OPEN_GATE, 0.0, 0
    for what, later, asked in story:
        now = max(now + later, gate.next_at)
        begun = now
        before = gate
        match what:
            case "ok":
                gate, row = gate.succeeded(begun, 20), 0
            case "suspected":
                gate = gate.suspected(now)
            case _:
                pause = PAUSES.after(gate.failures + 1, 1.0)
                gate, row = gate.failed("no", begun, now, pause, asked), row + 1
                assert gate.next_at - now >= max(asked, min(0.75 * 2 ** (row - 1), 675)) - 1e-6
                assert gate.next_at - now <= max(asked, 900) + 1e-6
                assert gate.allowed(now, 20) == 0
        assert gate.allowed(max(now, gate.next_at), 20) >= 1
        if what == "ok":
            assert gate.allowed(now, 20) >= before.allowed(now, 20)


# --- whose fault it is


@dataclass
class Runner:
    """Calls one after the other, a second apart: of a sound server, except for some enrollments."""

    poisoned: set[int] = field(default_factory=set)
    suspects: Suspects = field(default_factory=Suspects)
    spent: dict[int, int] = field(default_factory=dict)
    now: float = 0.0

    def call(self, number: int, *, works: bool = True, later: float = 1.0) -> Verdict | None:
        self.now += later
        if works and number not in self.poisoned:
            self.suspects.succeeded([(number, 1)], self.now)
            return None
        verdict = self.suspects.failed_alone((number, 1), self.now)
        spends = (verdict.fault != "server") - verdict.refund
        self.spent[number] = self.spent.get(number, 0) + spends
        return verdict


def test_a_bad_enrollment_spends_its_attempts_while_others_succeed() -> None:
    runner = Runner({7})
    runner.call(1)
    faults = []
    for number in range(10, 14):
        verdict = runner.call(7)
        assert verdict is not None
        faults.append(verdict.fault)
        runner.call(number)
    assert faults == ["unclear", "enrollment", "enrollment", "enrollment"]
    # and when all others are done
    assert [runner.call(7, later=500.0) for _ in range(3)] == [Verdict("enrollment")] * 3


def test_a_lone_failure_of_an_unproven_server_spends_no_attempt() -> None:
    runner = Runner()
    assert [runner.call(7, works=False) for _ in range(50)] == [Verdict("server")] * 50


def test_attempts_spent_at_the_start_of_an_outage_are_refunded() -> None:
    runner = Runner()
    runner.call(1)
    assert runner.call(7, works=False) == Verdict("unclear")
    assert runner.call(7, works=False) == Verdict("enrollment")
    assert runner.call(8, works=False) == Verdict("server")
    assert runner.call(7, works=False) == Verdict("server", refund=2)
    assert runner.spent == {7: 0, 8: 0}
    assert runner.call(9, works=False) == Verdict("server", is_outage=True)
    # alone, it would have been given back as well, when the last success was too long ago
    runner = Runner()
    runner.call(1)
    runner.call(7, works=False)
    assert runner.call(7, works=False, later=SUCCESS_COUNTS_FOR + 1) == Verdict("server", refund=1)


def test_a_call_for_several_blames_no_enrollment() -> None:
    runner = Runner({7})
    keys = [(number, 1) for number in range(100)]
    runner.suspects.failed_together(keys, 0.0)
    assert runner.suspects.among(keys) == {*keys}
    assert runner.call(7) == Verdict("server")
    runner.call(8)
    assert runner.call(7) == Verdict("enrollment")
    assert not runner.suspects.among([(8, 1)])


@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=30),
    st.lists(st.integers(0, 30), min_size=200, max_size=200),
    st.floats(0.01, 100),
)
def test_a_total_outage_costs_no_enrollment_its_last_attempt(
    before: list[int], during: list[int], later: float
) -> None:
    """In an outage after a time without failures, at most one enrollment spends an attempt, once,
    and not its last one.
    """
    runner = Runner()
    for number in before:
        runner.call(number)
    for number in during:
        verdict = runner.call(number, works=False, later=later)
        assert verdict is not None
        if len(runner.spent) > 1:
            assert verdict.fault == "server"
        if len(runner.spent) >= MAX_COINCIDENCE:
            assert verdict.is_outage
    first = during[0]
    assert all(spent == 0 for number, spent in runner.spent.items() if number != first)
    if during[-1] == first and len(runner.spent) > 1:
        assert runner.spent[first] == 0


def test_the_first_gate_is_open() -> None:
    assert Gate() == OPEN_GATE


def test_a_suspicion_does_not_open_a_closed_gate() -> None:
    closed = OPEN_GATE.failed("down", 0.0, 1.0, 60.0, 0.0)
    assert closed.suspected(2.0) is closed
    assert OPEN_GATE.suspected(2.0).allowed(2.0, 10) == 1


def test_of_too_many_enrollments_that_fail_the_first_are_forgotten(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(backoff, "MAX_ENROLLMENTS", 2)
    suspects, keys = Suspects(), [(id_, 1) for id_ in range(3)]
    suspects.failed_together(keys, 0.0)
    assert suspects.among(keys) == set(keys[1:])
