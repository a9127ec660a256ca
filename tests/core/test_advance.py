"""advance(): what it decides, by tables and by properties."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sequencerd.core.advance import (
    LOCKED_DELAY,
    LOOKUP_DELAY,
    MAX_EXPIRED_LEASES,
    MAX_MOVES,
    advance,
    is_unchanged,
)
from sequencerd.core.decision import (
    Advanced,
    Decision,
    End,
    Event,
    Execute,
    Fail,
    QueryLookup,
    Wait,
)
from sequencerd.core.enrollment import NEVER, Enrollment, effect_key
from sequencerd.core.faults import DefinitionError
from sequencerd.core.model import (
    Action,
    InvalidStep,
    LimitReached,
    RetryPolicy,
    Sequence,
    SideEffect,
    Skip,
    Step,
)
from sequencerd.core.retry import MAX_PAUSE
from sequencerd.core.step_types import compile_step
from sequencerd.core.step_types.durations import DurationConfig
from sequencerd.core.step_types.effects import LimitConfig, TopicLimitConfig, compile_expiry
from sequencerd.core.task import Answer, Failed, LookupAnswer, NotStarted, Result, Suppressed
from sequencerd.core.view import Context, data_view

NOW = datetime(2026, 3, 2, 10, 0, tzinfo=UTC)  # a Monday
HOUR = timedelta(hours=1)
EFFECT = SideEffect(program=None, retry=RetryPolicy(attempts=3, first_delay=10, longest_delay=60))
PAID = {
    "lodashCommand": "eq",
    "value": {"type": "get", "value": "data.paid"},
    "compareTo": {"type": "raw", "value": True},
}


def step(
    name: str,
    type_: str,
    config: Mapping[str, Any] | None = None,
    then: str | None = None,
    otherwise: str | None = None,
    *,
    effect: SideEffect = EFFECT,
) -> Step:
    behaviour = effect if type_ == "Email" else compile_step(type_, config or {})
    return Step("s", name, type_, config or {}, then, otherwise, behaviour)


def sequence(*steps: Step, name: str = "s", timezone: str = "UTC") -> dict[str, Sequence]:
    placed = [replace(s, position=n, sequence=name) for n, s in enumerate(steps)]
    goals = tuple(s for s in reversed(placed) if s.type == "Goal")
    return {name: Sequence(name, steps[0].name, timezone, {s.name: s for s in placed}, goals=goals)}


def at(step: str, data: str = "{}", **values: Any) -> Enrollment:
    known: dict[str, Any] = {
        "id": 1,
        "sequence": "s",
        "step": step,
        "subject": "ada",
        "data": data,
        "timezone": None,
        "created_at": NOW,
        "tag": UUID(int=0),
        "original_id": None,
        "wake_at": NOW,
        "entered_at": NOW,
    }
    return Enrollment(**(known | values))


def test_an_imported_enrollment_shows_its_former_id() -> None:
    for known, shown in (("12", 12), ("00f4-a", "00f4-a"), (None, 1)):
        context = Context(at("x", original_id=known), NOW, "UTC", {})
        assert json.loads(context.json({"id", "originalId"})) == {"id": 1, "originalId": shown}
        assert context.has_read_own  # others are not in the same state


def actions(
    definitions: Mapping[str, Sequence], enrollment: Enrollment, **values: Any
) -> list[str]:
    return [event.action for event in advance(definitions, enrollment, NOW, **values).events]


# --- one step each


@pytest.mark.parametrize(
    ("type_", "config", "data", "expected"),
    [
        ("WaitForDuration", {"amount": 3, "unit": "days"}, "{}", Wait(NOW + timedelta(days=3))),
        ("WaitForDuration", {"amount": 0, "unit": "days"}, "{}", End()),
        ("WaitForDuration", {"amount": -1, "unit": "hours"}, "{}", End()),
        (
            "WaitForDate",
            {"date": "2026-03-02T12:00:00+01:00"},
            "{}",
            Wait(NOW + timedelta(hours=1)),
        ),
        ("WaitForDate", {"date": "2026-03-02T11:00:00+01:00"}, "{}", End()),
        (
            "WaitForDate",
            {"date": "{{data.due}}"},
            '{"due": "2026-03-03"}',
            Wait(datetime(2026, 3, 3, tzinfo=UTC)),
        ),
        ("WaitForDate", {"date": "9999-12-31"}, "{}", Wait(NEVER)),
        (
            "WaitForDateComparison",
            {"attribute": "day", "values": [2]},
            "{}",
            Wait(datetime(2026, 3, 3, tzinfo=UTC)),
        ),
        ("WaitForDateComparison", {"attribute": "day", "values": [1]}, "{}", End()),
        ("Goal", PAID, "{}", Wait(NEVER)),
        ("Goal", PAID, '{"paid": true}', End()),
        ("GoTo", {}, "{}", End()),
        ("Conditional", PAID, "{}", End()),
        ("WaitForCondition", PAID, "{}", Wait(NEVER)),
        ("WaitForCondition", PAID, '{"paid": true}', End()),
        (
            "WaitForCondition",
            {**PAID, "timeout": {"amount": 2, "unit": "days"}},
            "{}",
            Wait(NOW + timedelta(days=2)),
        ),
        ("Split", {"next": 1, "altNext": 0}, "{}", End()),
        ("UpdateData", {"data": {"paid": True}}, "{}", End()),
    ],
)
def test_step(type_: str, config: Mapping[str, Any], data: str, expected: Decision) -> None:
    assert advance(sequence(step("a", type_, config)), at("a", data), NOW).decision == expected


@pytest.mark.parametrize(
    ("type_", "config", "data", "failure", "word"),
    [
        ("WaitForDate", {"date": "{{data.due}}"}, "{}", "bad_data", "ISO 8601"),
        ("WaitForDate", {"date": "{{data.due}}"}, '{"due": "soon"}', "bad_data", "soon"),
        (
            "WaitForDateComparison",
            {"attribute": "year", "values": [2001]},
            "{}",
            "unsatisfiable",
            "year",
        ),
    ],
)
def test_a_step_that_cannot_continue(
    type_: str, config: Mapping[str, Any], data: str, failure: str, word: str
) -> None:
    advanced = advance(sequence(step("a", type_, config)), at("a", data), NOW)
    assert isinstance(advanced.decision, Fail)
    assert advanced.decision.failure == failure
    assert word in advanced.decision.message
    assert [event.action for event in advanced.events] == ["failed"]


def test_a_conditional_leads_to_next_or_alt_next() -> None:
    definitions = sequence(
        step("a", "Conditional", PAID, "yes", "no"),
        step("yes", "Email"),
        step("no", "Email"),
    )
    assert advance(definitions, at("a", '{"paid": true}'), NOW).enrollment.step == "yes"
    assert advance(definitions, at("a"), NOW).enrollment.step == "no"


def test_go_to_names_a_step_of_another_sequence() -> None:
    definitions = {
        **sequence(step("a", "GoTo", {"step": "x", "sequence": "other"})),
        **sequence(step("x", "Email"), name="other"),
    }
    advanced = advance(definitions, at("a"), NOW)
    assert (advanced.enrollment.sequence, advanced.enrollment.step) == ("other", "x")
    assert advanced.enrollment.visit == 2


@pytest.mark.parametrize(
    ("config", "message"),
    [({"step": "x", "sequence": "nowhere"}, "nowhere"), ({"step": "nowhere"}, "nowhere")],
)
def test_a_go_to_an_unknown_step_fails(config: Mapping[str, Any], message: str) -> None:
    decision = advance(sequence(step("a", "GoTo", config)), at("a"), NOW).decision
    assert isinstance(decision, Fail)
    assert decision.failure == "invalid_step"
    assert message in decision.message


def test_an_enrollment_enters_a_paused_sequence_and_waits() -> None:
    definitions = {
        **sequence(step("a", "GoTo", {"step": "x", "sequence": "other"})),
        "other": replace(
            sequence(step("x", "GoTo", then=None), name="other")["other"], paused=True
        ),
    }
    advanced = advance(definitions, at("a"), NOW)
    assert advanced.enrollment.sequence == "other"
    assert advanced.decision == Wait(NOW)


def test_a_problem_fails_enrollments_that_reach_the_step() -> None:
    bad = replace(step("b", "GoTo"), behaviour=InvalidStep("amount: is missing"))
    decision = advance(sequence(step("a", "GoTo", then="b"), bad), at("a"), NOW).decision
    assert decision == Fail("invalid_step", "amount: is missing")


def test_a_loop_ends() -> None:
    definitions = sequence(
        step("a", "Conditional", PAID, "b", "b"), step("b", "Conditional", PAID, "a", "a")
    )
    advanced = advance(definitions, at("a"), NOW)
    assert isinstance(advanced.decision, Fail)
    assert advanced.decision.failure == "loop"
    assert advanced.enrollment.visit <= MAX_MOVES + 2


# --- time


def test_a_journey_starts_at_its_wake_time_even_if_evaluated_late() -> None:
    planned = NOW - timedelta(hours=2)
    definitions = sequence(step("a", "WaitForDuration", {"amount": 3, "unit": "hours"}))
    advanced = advance(definitions, at("a", entered_at=None, wake_at=planned), NOW)
    assert advanced.enrollment.entered_at == planned
    assert advanced.decision == Wait(planned + timedelta(hours=3))
    assert [event.action for event in advanced.events] == ["enrolled"]


@pytest.mark.parametrize(
    ("late", "config", "expected"),
    [
        (timedelta(seconds=50), {}, End()),
        (timedelta(days=1, seconds=70), {}, Wait(datetime(2026, 3, 10, tzinfo=UTC))),
        (timedelta(days=1, seconds=70), {"late": "pass"}, End()),
    ],
)
def test_a_comparison_that_wakes_late_is_evaluated_again(
    late: timedelta, config: Mapping[str, Any], expected: Decision
) -> None:
    tuesday = {"attribute": "day", "values": [2], **config}
    definitions = sequence(step("a", "WaitForDateComparison", tuesday))
    woken = datetime(2026, 3, 3, tzinfo=UTC) + late
    assert advance(definitions, at("a"), woken).decision == expected


def test_on_time_to_the_millisecond_counts_a_minute_long() -> None:
    definitions = sequence(step("a", "WaitForDateComparison", {"attribute": "ms", "values": [5]}))
    planned = advance(definitions, at("a"), NOW).decision
    assert planned == Wait(NOW + timedelta(milliseconds=5))
    assert advance(definitions, at("a"), NOW + timedelta(seconds=30)).decision == End()


def test_the_zone_of_the_enrollment_precedes_that_of_the_sequence() -> None:
    midnight = {"date": "2026-03-03T00:00:00"}
    definitions = sequence(step("a", "WaitForDate", midnight), timezone="Europe/Berlin")
    berlin, tokyo = datetime(2026, 3, 2, 23, tzinfo=UTC), datetime(2026, 3, 2, 15, tzinfo=UTC)
    assert advance(definitions, at("a"), NOW).decision == Wait(berlin)
    own = advance(definitions, at("a", timezone="Asia/Tokyo"), NOW)
    assert (own.decision, own.events) == (Wait(tokyo), ())
    bad = advance(definitions, at("a", timezone="Asia/Tokio"), NOW)
    assert bad.decision == Wait(berlin)
    assert [(event.action, "Tokyo" in str(event.message)) for event in bad.events] == [
        ("warning", True)
    ]


# --- goals

GOALS = sequence(
    step("wait", "WaitForDuration", {"amount": 1, "unit": "year"}, "paid"),
    step("paid", "Goal", PAID, "thanks"),
    step("thanks", "WaitForDuration", {"amount": 1, "unit": "year"}, "late"),
    step("late", "Goal", {**PAID, "value": {"type": "get", "value": "data.late"}}, "end"),
    step("end", "Email"),
)


def test_a_goal_moves_enrollments_from_any_step() -> None:
    advanced = advance(GOALS, at("wait", '{"paid": true}'), NOW)
    assert advanced.enrollment.step == "thanks"
    assert advanced.enrollment.goals_met == ("paid",)
    assert [event.action for event in advanced.events] == ["goal"]


def test_of_several_goals_the_last_of_the_definition_wins() -> None:
    advanced = advance(GOALS, at("wait", '{"paid": true, "late": true}'), NOW)
    assert advanced.enrollment.step == "end"
    assert set(advanced.enrollment.goals_met) == {"paid", "late"}


def test_a_goal_that_is_met_on_arrival_is_not_met_again() -> None:
    twice = {"lodashCommand": "gte", "value": {"type": "get", "value": "visit"}}
    twice["compareTo"] = {"type": "raw", "value": 2}
    definitions = sequence(
        step("go", "GoTo", {"step": "goal"}),
        step("goal", "Goal", twice, "wait"),
        step("wait", "WaitForDuration", {"amount": 1, "unit": "days"}),
    )
    arrived = advance(definitions, at("go"), NOW).enrollment
    assert (arrived.step, arrived.goals_met) == ("wait", ("goal",))
    assert advance(definitions, arrived, NOW).enrollment == arrived


def test_an_event_names_the_goals_that_are_met_with_another() -> None:
    definitions = sequence(
        step("wait", "WaitForDuration", {"amount": 1, "unit": "days"}),
        *(step(name, "Goal", PAID, "wait") for name in ("a", "b")),
    )
    met = advance(definitions, at("wait", '{"paid": true}'), NOW)
    assert [event.message for event in met.events] == ["b is met, with a"]
    alone = advance(definitions, at("wait", '{"paid": true}', goals_met=("a",)), NOW)
    assert [event.message for event in alone.events] == ["b is met"]


def test_a_wait_that_changes_nothing_is_recognised() -> None:
    before = at("a", wake_at=NOW)
    same = Advanced(before, Wait(NOW), (), None, False)
    assert is_unchanged(before, same)
    never = before._replace(wake_at=NEVER)
    assert is_unchanged(never, same._replace(enrollment=never, decision=Wait(NEVER - HOUR)))
    for changed in (
        same._replace(decision=Wait(NOW + HOUR)),
        same._replace(decision=Wait(NEVER)),
        same._replace(decision=End()),
        same._replace(enrollment=before._replace(attempt=1)),
        same._replace(events=(Event(NOW, "s", "a", 0, "retry", None, None, None),)),
    ):
        assert not is_unchanged(before, changed)
    assert not is_unchanged(never, same._replace(enrollment=never))
    unknown = before._replace(wake_at=None)
    assert not is_unchanged(unknown, same._replace(enrollment=unknown))


def test_a_goal_moves_an_enrollment_once() -> None:
    met = at("wait", '{"paid": true}', goals_met=("paid",))
    assert advance(GOALS, met, NOW).enrollment.step == "wait"


def test_a_goal_that_was_passed_does_not_move_an_enrollment_back() -> None:
    passed = advance(GOALS, at("paid", '{"paid": true}'), NOW).enrollment
    assert passed.step == "thanks"
    again = advance(GOALS, passed._replace(step="end"), NOW)
    assert again.enrollment.step == "end"


# --- side effects

MAIL = sequence(
    step("mail", "Email", then="wait", otherwise="other"),
    step("wait", "WaitForDuration", {"amount": 1, "unit": "day"}),
    step("other", "WaitForDuration", {"amount": 2, "unit": "day"}),
    step("paid", "Goal", PAID, "other"),
)


def test_a_side_effect_is_executed() -> None:
    decision = advance(MAIL, at("mail"), NOW).decision
    assert isinstance(decision, Execute)
    assert decision.step.name == "mail"


@pytest.mark.parametrize(
    ("result", "place", "names"),
    [
        (Answer(message="sent"), "wait", ["next"]),
        (Answer(Action.ALT_NEXT), "other", ["altNext"]),
        (Answer(Action.NOOP), "mail", []),
        (Answer(Action.NOOP, "not yet"), "mail", ["noop"]),
        (Failed("refused"), "mail", ["retry"]),
        (Failed("refused", permanent=True), "mail", ["failed"]),
    ],
)
def test_the_result_of_a_side_effect_moves_the_enrollment(
    result: Result, place: str, names: list[str]
) -> None:
    leased = at("mail", attempt=1, leased_by="me")
    advanced = advance(MAIL, leased, NOW, result)
    assert advanced.enrollment.step == place
    assert advanced.enrollment.leased_by is None
    assert [event.action for event in advanced.events] == names


def test_a_side_effect_is_finished_before_goals_are_checked() -> None:
    paid = at("mail", '{"paid": true}', attempt=1, leased_by="me")
    advanced = advance(MAIL, paid, NOW, Answer(message="sent"))
    assert advanced.enrollment.step == "other"
    assert [(e.step, e.action) for e in advanced.events] == [("mail", "next"), ("wait", "goal")]


def test_data_from_an_answer_is_merged_and_meets_goals() -> None:
    leased = at("mail", '{"name": "Ada"}', attempt=1, leased_by="me")
    advanced = advance(MAIL, leased, NOW, Answer(data={"paid": True}))
    assert advanced.data == {"paid": True}
    assert json.loads(advanced.enrollment.data) == {"name": "Ada", "paid": True}
    assert advanced.enrollment.step == "other"


def test_a_failure_is_tried_again_later_each_time_until_the_last() -> None:
    enrollment = at("mail", attempt=1, leased_by="me")
    first = advance(MAIL, enrollment, NOW, Failed("down"), jitter=1.0)
    assert first.decision == Wait(NOW + timedelta(seconds=10))
    second = advance(MAIL, first.enrollment._replace(attempt=2), NOW, Failed("down"), jitter=1.0)
    assert second.decision == Wait(NOW + timedelta(seconds=20))
    last = advance(MAIL, first.enrollment._replace(attempt=3), NOW, Failed("down"), jitter=1.0)
    assert last.decision == Fail("error", "down")


def test_an_enrollment_does_not_start_before_its_wake_time() -> None:
    later = NOW + timedelta(minutes=5)
    assert advance(MAIL, at("mail", retry_at=later), NOW).decision == Wait(later)
    assert isinstance(advance(MAIL, at("mail", retry_at=later), later).decision, Execute)


def test_failures_of_the_server_spend_no_attempt() -> None:
    leased = at("mail", attempt=3, leased_by="me")
    throttled = Failed("slow down", fault="server", retry_after=timedelta(seconds=7))
    advanced = advance(MAIL, leased, NOW, throttled, jitter=0.0)
    assert advanced.enrollment.attempt == 2
    assert advanced.decision == Wait(NOW + timedelta(seconds=7))
    stopped = advance(MAIL, leased, NOW, replace(throttled, retry_after=timedelta(0)))
    assert isinstance(stopped.decision, Execute)


@pytest.mark.parametrize(
    ("effect", "topic"),
    [
        (EFFECT, "news"),
        (replace(EFFECT, topic="invoices", follows_topic=False), "invoices"),
        (replace(EFFECT, topic=None, follows_topic=False), None),
    ],
)
def test_the_topic_of_a_step_precedes_that_of_the_sequence(
    effect: SideEffect, topic: str | None
) -> None:
    limit = LimitConfig.model_validate({"at_most": 1, "per": {"days": 7}}).compile()
    definitions = sequence(step("mail", "Email", effect=replace(effect, limit=limit)))
    definitions["s"] = replace(definitions["s"], topic="news")
    decision = advance(definitions, at("mail"), NOW).decision
    assert isinstance(decision, Execute)
    assert decision.topic == topic
    assert [one.topic for one in decision.reservations] == [topic or "s/mail"]


@pytest.mark.parametrize(("way", "leads"), [("next", "end"), ("altNext", "other"), ("end", None)])
def test_a_suppressed_message_is_recorded_and_takes_its_exit(way: Skip, leads: str | None) -> None:
    definitions = sequence(
        step("mail", "Email", None, "end", "other", effect=replace(EFFECT, on_suppressed=way)),
        step("other", "WaitForDuration", {"amount": 2, "unit": "day"}),
        step("end", "WaitForDuration", {"amount": 2, "unit": "day"}),
    )
    leased = at("mail", attempt=1, leased_by="me")
    advanced = advance(definitions, leased, NOW, Suppressed("not sent to a@x.org"))
    assert advanced.events[0].action == "suppressed"
    assert advanced.events[0].message == "not sent to a@x.org"
    if leads is None:
        assert advanced.decision == End()
    else:
        assert advanced.enrollment.step == leads


def test_a_message_that_is_suppressed_again_and_again_is_a_loop() -> None:
    definitions = sequence(step("mail", "Email", then="mail"))
    leased = at("mail", attempt=1, leased_by="me")
    looped = advance(definitions, leased, NOW, Suppressed("not sent to a@x.org"))
    assert isinstance(looped.decision, Fail)
    assert looped.decision.failure == "loop"


@pytest.mark.parametrize("started", [True, False])
def test_a_result_for_a_step_that_is_no_side_effect_any_more_leads_to_next(started: bool) -> None:
    definitions = sequence(
        step("mail", "GoTo", {}, "pause"),
        step("pause", "WaitForDuration", {"amount": 2, "unit": "day"}),
    )
    leased = at("mail", attempt=1, leased_by="me")
    result = Suppressed("not sent to a@x.org") if started else NotStarted(1)
    advanced = advance(definitions, leased, NOW, result)
    assert advanced.enrollment.step == "pause"


@pytest.mark.parametrize(("attempt", "left"), [(1, 0), (2, 1), (0, 0)])
def test_a_side_effect_that_was_not_started_gives_its_attempt_and_lease_back(
    attempt: int, left: int
) -> None:
    leased = at("mail", attempt=attempt, leased_by="me")
    definitions = sequence(step("mail", "Email"))
    advanced = advance(definitions, leased, NOW, NotStarted(1), result_only=True)
    assert (advanced.enrollment.attempt, advanced.enrollment.leased_by) == (left, None)
    assert (advanced.decision, advanced.events) == (Wait(NOW), ())


def test_an_expired_side_effect_is_not_started() -> None:
    day = compile_expiry(DurationConfig(amount=1, unit="day"))
    effect = replace(EFFECT, expires=day, on_expired="altNext")
    definitions = sequence(
        step("mail", "Email", None, None, "other", effect=effect),
        step("other", "WaitForDuration", {"amount": 2, "unit": "day"}),
    )
    entered = NOW - timedelta(hours=23)
    arrived = at("mail", entered_at=entered)
    assert isinstance(advance(definitions, arrived, NOW).decision, Execute)
    # it wakes at its expiry, if the next attempt would be later
    waits = at("mail", entered_at=entered, attempt=1, retry_at=NOW + timedelta(hours=5))
    expiry = entered + timedelta(days=1)
    assert advance(definitions, waits, NOW).decision == Wait(expiry)
    down = Failed("down", fault="server", retry_after=timedelta(hours=5))
    leased = at("mail", entered_at=entered, attempt=1, leased_by="me")
    assert advance(definitions, leased, NOW, down).decision == Wait(expiry)
    for late in (arrived, waits):
        advanced = advance(definitions, late, expiry)
        assert advanced.enrollment.step == "other"
        assert advanced.events[0].action == "expired"


def test_a_date_of_the_data_can_be_the_expiry() -> None:
    effect = replace(EFFECT, expires=compile_expiry("{{data.begins}}"), on_expired="end")
    definitions = sequence(step("mail", "Email", effect=effect))
    later = at("mail", '{"begins": "2100-01-01T00:00:00Z"}')
    assert isinstance(advance(definitions, later, NOW).decision, Execute)
    over = advance(definitions, at("mail", '{"begins": "2001-01-01T00:00:00Z"}'), NOW)
    assert over.decision == End()
    assert [event.action for event in over.events] == ["expired", "completed"]
    nothing = advance(definitions, at("mail", "{}"), NOW).decision
    assert isinstance(nothing, Fail)
    assert nothing.failure == "bad_data"


def test_on_error_leads_to_alt_next() -> None:
    kind = replace(EFFECT, on_error="altNext")
    definitions = sequence(
        step("mail", "Email", otherwise="other", effect=kind),
        step("other", "WaitForDuration", {"amount": 2, "unit": "day"}),
    )
    refused = Failed("no such address", permanent=True)
    advanced = advance(definitions, at("mail", attempt=1, leased_by="me"), NOW, refused)
    assert advanced.enrollment.step == "other"
    assert [(e.action, e.message) for e in advanced.events] == [("altNext", "no such address")]


def test_a_limit_is_reserved_or_waits_or_skips() -> None:
    config = LimitConfig.model_validate({"topic": "news", "at_most": 1, "per": {"days": 7}})
    later, until = NOW + timedelta(days=2), NOW + timedelta(days=1)
    for then, leads in (("wait", "mail"), ("skip", "end"), ("altNext", "other")):
        limit = replace(config.compile("news"), then=then)  # type: ignore[arg-type]
        definitions = sequence(
            step("mail", "Email", None, "end", "other", effect=replace(EFFECT, limit=limit)),
            step("other", "WaitForDuration", {"amount": 2, "unit": "day"}),
            step("end", "Email", None, effect=replace(EFFECT, limit=limit)),
        )
        decision = advance(definitions, at("mail"), NOW).decision
        assert isinstance(decision, Execute)
        assert decision.reservations
        assert decision.reservations[0][1:] == ("news", 1, timedelta(days=7))
        full = advance(definitions, at("mail"), NOW, full=LimitReached(0, until))
        assert full.enrollment.step == leads
        assert full.events[0].message == "the limit is reached: 1 in 7 days"
        if then == "wait":
            assert full.decision == Wait(until)
            again = advance(definitions, full.enrollment, until, full=LimitReached(0, later))
            assert (again.decision, again.events) == (Wait(later), ())
        elif then == "skip":  # the next one is reserved in a transaction of its own
            assert full.decision == Wait(NOW)
        # the limit may have gone since it was found to be full
        assert advance(definitions, at("mail"), NOW, full=LimitReached(1, until)).decision == (
            Wait(NOW)
        )


def test_what_affects_others_is_written_before_a_limit_is_reserved() -> None:
    limit = LimitConfig.model_validate({"at_most": 1, "per": {"days": 7}}).compile(None)
    mail = step("mail", "Email", effect=replace(EFFECT, limit=limit))
    other = sequence(replace(mail, name="begin"), name="other")
    for type_, config in (
        ("Enroll", {"sequence": "else"}),
        ("Cancel", {"sequence": "else"}),
        ("GoTo", {"sequence": "other", "step": "begin"}),
    ):
        definitions = {**sequence(step("go", type_, config, "mail"), mail), **other}
        advanced = advance(definitions, at("go"), NOW)
        assert advanced.decision == Wait(NOW), type_
        assert advanced.enrollment.step in ("mail", "begin")


def test_a_failure_of_the_server_is_recorded_once() -> None:
    definitions = sequence(step("mail", "Email"))
    leased = at("mail", attempt=1, leased_by="me")
    first = advance(definitions, leased, NOW, Failed("down", fault="server"))
    assert [event.action for event in first.events] == ["retry"]
    again = first.enrollment._replace(attempt=1, leased_by="me")
    for message, recorded in (("down", []), ("no login", ["retry"])):
        advanced = advance(definitions, again, NOW, Failed(message, fault="server"))
        assert [event.action for event in advanced.events] == recorded


@pytest.mark.parametrize(
    "subject", ["user-42", " a<b>&'\"\\ ", "Zo\u00eb\n", "\U0001f600", "{{x}}"]
)
def test_the_usual_key_of_a_limit_is_the_subject_as_templates_render_it(subject: str) -> None:
    usual, rendered = (
        LimitConfig.model_validate({"key": key, "at_most": 1, "per": {"days": 7}}).compile("news")
        for key in ("{{subject}}", "{{ subject }}")
    )
    context = Context(at("mail", subject=subject), NOW, "UTC", {})
    assert usual.key(context) == rendered.key(context) == subject


def test_the_limit_of_a_topic_holds_beside_that_of_a_step() -> None:
    per = {"days": 7}
    own = LimitConfig.model_validate({"topic": "other", "at_most": 1, "per": per, "then": "skip"})
    of_topic = TopicLimitConfig.model_validate({"at_most": 2, "per": per, "then": "altNext"})
    until = NOW + timedelta(days=1)
    effect = replace(EFFECT, topic="news", follows_topic=False, limit=own.compile("other"))
    made = sequence(
        step("mail", "Email", None, "end", "other", effect=effect),
        step("free", "Email", None, "end", effect=replace(effect, limit=None)),
        step("plain", "Email", None, "end"),
        step("other", "WaitForDuration", {"amount": 2, "unit": "day"}),
        step("end", "WaitForDuration", {"amount": 2, "unit": "day"}),
    )
    limits = {"news": of_topic.compile("news")}
    definitions = {"s": replace(made["s"], topic_limits=limits)}

    def places(name: str) -> list[str]:
        decision = advance(definitions, at(name), NOW).decision
        assert isinstance(decision, Execute)
        return [one.topic for one in decision.reservations]

    assert (places("mail"), places("free"), places("plain")) == (["other", "news"], ["news"], [])
    for name, number, leads, message in (
        ("mail", 0, "end", "the limit is reached: 1 in 7 days"),
        ("mail", 1, "other", "the limit is reached: 2 in 7 days, for the topic news"),
        ("free", 0, "end", "the limit is reached: 2 in 7 days, for the topic news"),
    ):
        full = advance(definitions, at(name), NOW, full=LimitReached(number, until))
        assert (full.enrollment.step, full.events[0].message) == (leads, message)
    # the limit was removed between the evaluation and the reservation
    gone = advance(
        sequence(*made["s"].steps.values()), at("free"), NOW, full=LimitReached(0, until)
    )
    assert gone.enrollment.step == "free"


def test_an_expired_lease_is_recorded_and_retried() -> None:
    expired = at("mail", attempt=1, leased_by="host:1")
    advanced = advance(MAIL, expired, NOW)
    assert isinstance(advanced.decision, Execute)
    assert [event.action for event in advanced.events] == ["lease_expired"]
    assert "host:1" in str(advanced.events[0].message)


def test_at_most_once_is_left_to_an_operator_after_a_crash() -> None:
    once = replace(EFFECT, at_most_once=True)
    definitions = sequence(step("mail", "Email", effect=once))
    decision = advance(definitions, at("mail", attempt=1, leased_by="host:1"), NOW).decision
    assert isinstance(decision, Fail)
    assert decision.failure == "outcome_unknown"


def test_a_part_that_may_have_taken_place_is_repeated_only_if_allowed() -> None:
    part = Answer(Action.NOOP, "sent to a", {"left": "b"}, unknown=True)
    here = at("mail", attempt=1, leased_by="host:1")
    assert isinstance(advance(MAIL, here, NOW, part).decision, Wait)
    once = sequence(step("mail", "Email", effect=replace(EFFECT, at_most_once=True)))
    advanced = advance(once, here, NOW, part)
    assert isinstance(advanced.decision, Fail)
    assert advanced.decision.failure == "outcome_unknown"
    assert "sent to a: it must not be executed twice" in advanced.decision.message
    assert '"left"' in advanced.enrollment.data  # `retry` then sends it alone
    known = replace(part, unknown=False)
    assert isinstance(advance(once, here, NOW, known).decision, Wait)


def test_an_unknown_outcome_is_recorded_and_repeated_only_if_allowed() -> None:
    lost = Failed("no answer", unknown=True)
    advanced = advance(MAIL, at("mail", attempt=1, leased_by="host:1"), NOW, lost)
    assert isinstance(advanced.decision, Wait)
    assert [(e.action, e.message) for e in advanced.events][-1] == (
        "retry",
        "no answer; it may have taken place",
    )
    once = sequence(step("mail", "Email", effect=replace(EFFECT, at_most_once=True)))
    decision = advance(once, at("mail", attempt=1, leased_by="host:1"), NOW, lost).decision
    assert isinstance(decision, Fail)
    assert decision.failure == "outcome_unknown"
    # what is known not to have taken place is tried again
    known = Failed("refused for now")
    decision = advance(once, at("mail", attempt=1, leased_by="host:1"), NOW, known).decision
    assert isinstance(decision, Wait)


def test_a_crash_of_the_daemon_spends_no_attempt() -> None:
    cut_off = at("mail", attempt=3, leased_by="host:1")
    advanced = advance(MAIL, cut_off, NOW)
    assert isinstance(advanced.decision, Execute)
    assert advanced.enrollment.attempt == 2
    assert [event.action for event in advanced.events] == ["lease_expired"]


def test_a_step_that_kills_the_daemon_is_tried_less_often_and_at_last_given_up() -> None:
    cut_off = at("mail", attempt=1, leased_by="host:1")
    waits = []
    for expired_leases in range(1, MAX_EXPIRED_LEASES):
        decision = advance(MAIL, cut_off, NOW, expired_leases=expired_leases).decision
        assert isinstance(decision, Wait)
        waits.append((decision.until - NOW).total_seconds())
    assert waits[:4] == [10, 20, 40, 60]
    decision = advance(MAIL, cut_off, NOW, expired_leases=MAX_EXPIRED_LEASES).decision
    assert isinstance(decision, Fail)
    assert "the daemon died in 21 attempts" in decision.message


def test_a_result_can_be_applied_alone() -> None:
    advanced = advance(
        MAIL,
        at("mail", attempt=1, leased_by="host:1"),
        NOW,
        Answer(data={"a": 1}),
        result_only=True,
    )
    assert advanced.decision == Wait(NOW)
    assert advanced.enrollment.step == MAIL["s"].steps["mail"].next_step
    assert advanced.enrollment.leased_by is None
    assert advanced.data == {"a": 1}
    assert [event.action for event in advanced.events] == ["next"]


EXTERNAL = {**PAID, "value": {"type": "get", "value": "external.paid"}}


def looking_up(*steps: Step) -> dict[str, Sequence]:
    reading = [replace(s, reads_external="external" in json.dumps(s.config)) for s in steps]
    return {"s": replace(sequence(*reading)["s"], lookup="app.f")}


def test_external_data_are_requested_where_they_are_read() -> None:
    definitions = looking_up(
        step("pause", "WaitForDuration", {"amount": 1, "unit": "days"}, "ask"),
        step("ask", "Conditional", EXTERNAL, "yes"),
        step("yes", "WaitForDate", {"date": "2027-01-01"}),
    )
    waits = advance(definitions, at("pause"), NOW)
    assert waits.decision == Wait(NOW + timedelta(days=1))
    asks = advance(definitions, at("pause"), NOW + timedelta(days=1))
    assert isinstance(asks.decision, QueryLookup)
    assert (asks.decision.lookup, asks.enrollment.step) == ("app.f", "ask")
    found = advance(definitions, asks.enrollment, NOW, LookupAnswer({"paid": True}))
    assert found.enrollment.step == "yes"
    assert isinstance(advance(definitions, asks.enrollment, NOW, LookupAnswer({})).decision, End)
    failed = advance(definitions, asks.enrollment, NOW, LookupAnswer(None, "it is away"))
    assert failed.decision == Wait(NOW + LOOKUP_DELAY)
    assert [(e.action, e.message) for e in failed.events] == [("retry", "it is away")]
    for asked, waited in ((10, LOOKUP_DELAY), (600, timedelta(minutes=10)), (1e6, MAX_PAUSE)):
        answer = LookupAnswer(None, "it is busy", timedelta(seconds=asked))
        busy = advance(definitions, asks.enrollment._replace(leased_by="me"), NOW, answer)
        assert (busy.decision, busy.enrollment.leased_by) == (Wait(NOW + waited), None)


def test_external_data_are_of_the_sequence_that_requested_them() -> None:
    ask = step("ask", "Conditional", EXTERNAL, "over")
    definitions = looking_up(ask, step("over", "GoTo", {"step": "ask", "sequence": "other"}))
    definitions["other"] = replace(
        definitions["s"],
        name="other",
        steps={"ask": replace(ask, sequence="other", reads_external=True)},
    )
    moved = advance(definitions, at("ask"), NOW, LookupAnswer({"paid": True}))
    assert moved.enrollment.sequence == "other"
    assert isinstance(moved.decision, QueryLookup)


@pytest.mark.parametrize("message", [None, "score 20"])
def test_an_answer_of_alt_next_to_a_step_without_one_is_recorded(message: str | None) -> None:
    definitions = sequence(step("score", "Email", then="next"), step("next", "GoTo"))
    leased = at("score", attempt=1, leased_by="host:1")
    ended = advance(definitions, leased, NOW, Answer(Action.ALT_NEXT, message))
    assert isinstance(ended.decision, End)
    ends = "the step has no altNext, so the enrollment ends here"
    told = ends if message is None else f"{message}; {ends}"
    assert [(e.action, e.message) for e in ended.events] == [("altNext", told), ("completed", None)]


def test_a_wait_for_external_data_is_evaluated_every_recheck() -> None:
    definitions = looking_up(
        step("pause", "WaitForDuration", {"amount": 1, "unit": "days"}),
        step("goal", "Goal", EXTERNAL, "pause"),
    )
    assert isinstance(advance(definitions, at("pause"), NOW).decision, QueryLookup)
    minute = Wait(NOW + timedelta(minutes=1), waits_until=NOW + timedelta(days=1))
    assert advance(definitions, at("pause"), NOW, LookupAnswer({})).decision == minute
    nearly = NOW + timedelta(days=1, seconds=-1)  # the wait ends before the next check
    last = advance(definitions, at("pause"), nearly, LookupAnswer({})).decision
    assert last == Wait(NOW + timedelta(days=1))
    pulled = advance(definitions, at("pause"), NOW, LookupAnswer({"paid": True}))
    assert pulled.enrollment.goals_met == ("goal",)
    assert pulled.decision == Wait(NOW + timedelta(days=1))  # nothing more to be asked for


def test_a_side_effect_that_waits_is_not_evaluated_for_external_data() -> None:
    definitions = looking_up(step("mail", "Email", {"text": "{{external.name}}"}))
    later = NOW + timedelta(hours=5)
    assert advance(definitions, at("mail", retry_at=later), NOW).decision == Wait(later)
    assert isinstance(advance(definitions, at("mail"), NOW).decision, QueryLookup)


def test_an_interrupted_lookup_is_no_attempt() -> None:
    once = replace(EFFECT, at_most_once=True)
    asking = at("mail", attempt=0, leased_by="crashed")
    assert isinstance(
        advance(sequence(step("mail", "Email", effect=once)), asking, NOW).decision, Execute
    )


def test_a_lookup_does_not_hide_an_interrupted_side_effect() -> None:
    once = replace(EFFECT, at_most_once=True)
    definitions = looking_up(step("mail", "Email", effect=once), step("goal", "Goal", EXTERNAL))
    cut_off = advance(definitions, at("mail", attempt=1, leased_by="host:1"), NOW)
    assert isinstance(cut_off.decision, Fail)
    assert cut_off.decision.failure == "outcome_unknown"


def test_no_lookup_is_requested_in_a_paused_sequence() -> None:
    definitions = looking_up(step("goal", "Goal", EXTERNAL))
    paused = {"s": replace(definitions["s"], paused=True)}
    assert advance(paused, at("goal"), NOW).decision == Wait(NOW)


def test_a_timeout_of_a_condition_leads_to_alt_next() -> None:
    config = {**PAID, "timeout": {"amount": 2, "unit": "days"}}
    wait = step("wait", "WaitForCondition", config, then="paid", otherwise="late")
    definitions = sequence(wait, step("paid", "GoTo"), step("late", "GoTo"))
    two_days = NOW + timedelta(days=2)
    in_time = advance(definitions, at("wait", '{"paid": true}'), two_days)
    assert in_time.enrollment.step == "paid"
    late = advance(definitions, at("wait"), two_days)
    assert (late.events[0].step, late.events[0].action) == ("wait", "altNext")
    assert late.enrollment.step == "late"


@pytest.mark.slow
def test_a_split_is_weighted_and_stable_and_independent_of_other_splits() -> None:
    def subset(name: str) -> set[str]:
        config = {"next": 30, "altNext": 70}
        split = step(name, "Split", config, then="x", otherwise="y")
        definitions = sequence(split, step("x", "GoTo"), step("y", "GoTo"))
        return {
            subject
            for subject in (f"u{n}" for n in range(2000))
            if advance(definitions, at(name, subject=subject), NOW).enrollment.step == "x"
        }

    first = subset("a")
    assert first == subset("a")
    assert 500 < len(first) < 700
    second = subset("b")
    assert 130 < len(first & second) < 230


def test_other_weights_move_as_few_as_possible_and_a_seed_outlives_names() -> None:
    def first(share: int, name: str = "a", seed: str | None = None) -> set[str]:
        config = {"next": share, "altNext": 100 - share}
        split = replace(step(name, "Split", config, "x", "y"), seed=seed)
        definitions = sequence(split, step("x", "GoTo"), step("y", "GoTo"))
        subjects = (f"u{n}" for n in range(2000))
        return {
            subject
            for subject in subjects
            if advance(definitions, at(name, subject=subject), NOW).enrollment.step == "x"
        }

    half, more = first(50), first(60)
    assert half < more
    assert 0.08 < len(more - half) / 2000 < 0.12
    assert first(50, "b") != half
    assert first(50, "b", "s/a") == half


def case(path: str, compare_to: object, target: str | None) -> dict[str, Any]:
    value = {"type": "get", "value": path}
    other = {"type": "raw", "value": compare_to}
    return {
        "when": {"lodashCommand": "eq", "value": value, "compareTo": other},
        "step": target,
    }


@pytest.mark.parametrize(
    ("data", "leads", "events"),
    [
        ('{"plan": "pro"}', "call", [("branch", "case 1")]),
        ('{"plan": "pro", "seats": 5}', "call", [("branch", "case 1")]),
        ('{"seats": 5}', "offer", [("branch", "case 2")]),
        ('{"gone": true}', None, [("branch", "case 3"), ("completed", None)]),
        ("{}", "nurture", [("next", None)]),
    ],
)
def test_a_switch_goes_to_the_first_case_that_holds(
    data: str, leads: str | None, events: list[tuple[str, str | None]]
) -> None:
    cases = [
        case("data.plan", "pro", "call"),
        case("data.seats", 5, "offer"),
        case("data.gone", True, None),
    ]
    day = {"amount": 1, "unit": "day"}
    definitions = sequence(
        step("choose", "Switch", {"cases": cases}, then="nurture"),
        *(step(name, "WaitForDuration", day) for name in ("call", "offer", "nurture")),
    )
    advanced = advance(definitions, at("choose", data), NOW)
    assert [(event.action, event.message) for event in advanced.events] == events
    if leads is None:
        assert isinstance(advanced.decision, End)
    else:
        assert advanced.enrollment.step == leads
    assert len(advanced.answers) > 0  # it has read data


def ways_of(weights: Mapping[str, float], seed: str | None = None) -> dict[str, str]:
    """The way of each of some subjects."""
    ways = [{"name": name, "weight": weight, "step": None} for name, weight in weights.items()]
    definitions = sequence(replace(step("split", "Split", {"ways": ways}), seed=seed))
    found = {}
    for subject in (f"u{n}" for n in range(2000)):
        branch, _ = advance(definitions, at("split", subject=subject), NOW).events
        assert branch.action == "branch"
        found[subject] = str(branch.message)
    return found


def test_changed_weights_of_a_split_move_as_few_subjects_as_possible() -> None:
    before = ways_of({"a": 45, "b": 45, "holdout": 10, "off": 0})
    share = {name: list(before.values()).count(name) / 2000 for name in ("a", "b", "holdout")}
    assert sum(share.values()) == 1
    assert 0.41 < share["a"] < 0.49
    assert 0.08 < share["holdout"] < 0.12
    after = ways_of({"holdout": 20, "b": 45, "a": 45})  # in another order
    moved = {subject: way for subject, way in after.items() if way != before[subject]}
    assert set(moved.values()) == {"holdout"}
    assert 0.06 < len(moved) / 2000 < 0.11
    assert before != ways_of({"a": 45, "b": 45, "holdout": 10}, seed="other")


def test_goals_read_data_that_update_data_merged() -> None:
    config = {"data": {"paid": True, "note": "for {{subject}}", "list": ["{{id}}", 2]}}
    definitions = sequence(
        step("set", "UpdateData", config, then="pause"),
        step("pause", "WaitForDuration", {"amount": 1, "unit": "days"}),
        step("goal", "Goal", PAID, then="thanks"),
        step("thanks", "WaitForDuration", {"amount": 1, "unit": "days"}),
    )
    advanced = advance(definitions, at("set", '{"old": 1}'), NOW)
    assert advanced.data == {"paid": True, "note": "for ada", "list": ["1", 2]}
    assert json.loads(advanced.enrollment.data) == {"old": 1, **advanced.data}
    assert advanced.enrollment.step == "thanks"
    assert [event.action for event in advanced.events] == ["next", "goal"]


def test_several_updates_are_all_written() -> None:
    definitions = sequence(
        step("one", "UpdateData", {"data": {"a": 1, "b": 1}}, then="two"),
        step("two", "UpdateData", {"data": {"b": 2}}),
    )
    assert advance(definitions, at("one"), NOW).data == {"a": 1, "b": 2}


@pytest.mark.parametrize(
    ("type_", "config", "words"),
    [
        ("WaitForCondition", {**PAID, "timeout": {"amount": 1, "unit": "moons"}}, "moons"),
        ("WaitForCondition", {"timeout": {"amount": 1, "unit": "day"}}, "lodashCommand"),
        ("Split", {"next": 0, "altNext": 0}, "weights"),
        ("Split", {"next": 1}, "write the weights of next and altNext, or ways"),
        ("Split", {"altNext": 1}, "write the weights of next and altNext, or ways"),
        ("Split", {"next": 1, "ways": [{"name": "a", "weight": 1, "step": None}]}, "or ways"),
        ("Split", {"next": -1, "altNext": 2}, "next"),
        ("Split", {"next": 1, "altNext": 1, "ways": []}, "ways"),
        ("Switch", {"cases": []}, "cases"),
        ("Switch", {"cases": [{"when": PAID}]}, "cases.0.step: is missing"),
        ("Switch", {"cases": [{"when": {**PAID, "lodashCommand": "now"}, "step": None}]}, "clock"),
        ("UpdateData", {"data": {}}, "data"),
        ("UpdateData", {"data": {"a": ["{{#if}}"]}}, "data.a.0"),
    ],
)
def test_invalid_configs_are_reported(type_: str, config: Mapping[str, Any], words: str) -> None:
    with pytest.raises(DefinitionError, match=words):
        compile_step(type_, config)


# --- loops, goals of several sequences, jumps


def drive(
    definitions: Mapping[str, Sequence],
    here: Enrollment,
    *,
    days: float = 3,
) -> tuple[list[tuple[datetime, str]], Decision]:
    """What is executed and when, each side effect taking a second, and how it ends."""
    now, executed, result = NOW, list[tuple[datetime, str]](), None
    while True:
        advanced = advance(definitions, here, now, result)
        here, result, decision = advanced.enrollment, None, advanced.decision
        if isinstance(decision, Execute):
            executed.append((now, f"{here.sequence}/{here.step}"))
            assert len(executed) < 100, executed
            here, result, now = (
                here.leased_to("host:1", here.leases + 1),
                Answer(),
                now + timedelta(seconds=1),
            )
        elif isinstance(decision, Wait) and decision.until < NOW + timedelta(days=days):
            now = decision.until
        else:
            return executed, decision


AT_TEN = {"attribute": "hour", "values": [10]}
ALWAYS = {"lodashCommand": "isNil", "value": {"type": "raw", "value": None}}


@pytest.mark.parametrize(
    "between",
    [
        [("WaitForDateComparison", AT_TEN)],
        [("WaitForDate", {"date": "2026-03-01"})],
        [("WaitForCondition", ALWAYS)],
        [("WaitForDuration", {"amount": 0, "unit": "days"})],
        [("Conditional", ALWAYS)],
        [("GoTo", {})],
        [("UpdateData", {"data": {"x": 1}})],
        [("Split", {"next": 1, "altNext": 0})],
        [("Goal", ALWAYS)],
        [("Email", {}), ("WaitForDateComparison", AT_TEN), ("Email", {})],
        [],
    ],
)
def test_a_side_effect_is_not_executed_again_before_time_has_passed(
    between: list[tuple[str, Mapping[str, Any]]],
) -> None:
    names = ["mail", *(f"s{n}" for n in range(len(between))), "mail"]
    steps = [step("mail", "Email", then=names[1])]
    steps += [step(names[n], *given, names[n + 1]) for n, given in enumerate(between, 1)]
    executed, decision = drive(sequence(*steps), at("mail"))
    effects = ["s/mail", *(f"s/{s.name}" for s in steps[1:] if s.type == "Email")]
    assert [key for _, key in executed] == effects
    assert isinstance(decision, Fail)
    assert decision.failure == "loop"
    assert " → ".join([*effects, "s/mail"]) in decision.message


def test_a_loop_through_another_sequence_is_detected() -> None:
    definitions = {
        **sequence(
            step("mail", "Email", then="over"),
            step("over", "GoTo", {"step": "mail", "sequence": "t"}),
        ),
        **sequence(
            step("mail", "Email", then="back"),
            step("back", "GoTo", {"step": "mail", "sequence": "s"}),
            name="t",
        ),
    }
    executed, decision = drive(definitions, at("mail"))
    assert [key for _, key in executed] == ["s/mail", "t/mail"]
    assert isinstance(decision, Fail)
    assert decision.failure == "loop"


@pytest.mark.parametrize("late", ["look again", "pass"])
def test_every_day_at_ten_is_once_a_day(late: str) -> None:
    config = {**AT_TEN, "occurrence": "next", "late": late}
    definitions = sequence(
        step("wait", "WaitForDateComparison", config, "mail"), step("mail", "Email", then="wait")
    )
    executed, decision = drive(definitions, at("wait"), days=5)
    assert [when for when, _ in executed] == [NOW + timedelta(days=n) for n in range(1, 5)]
    assert isinstance(decision, Wait)


@pytest.mark.parametrize(
    ("late", "woken", "passes"),
    [
        ("look again", timedelta(minutes=20), True),  # it is still ten
        ("look again", timedelta(hours=2), False),
        ("pass", timedelta(hours=2), True),
    ],
)
def test_a_next_occurrence_may_be_missed(late: str, woken: timedelta, passes: bool) -> None:
    config = {**AT_TEN, "occurrence": "next", "late": late}
    wait = sequence(step("wait", "WaitForDateComparison", config))
    now = NOW + timedelta(days=1) + woken
    missed = Wait(NOW + timedelta(days=2))
    assert advance(wait, at("wait"), now).decision == (End() if passes else missed)


def test_names_with_slashes_are_distinguished() -> None:
    assert effect_key("a/b", "c") != effect_key("a", "b/c")
    assert effect_key("a%2Fb", "c") != effect_key("a/b", "c")


def test_repeated_failures_by_alt_next_are_a_loop() -> None:
    effect = replace(EFFECT, on_error="altNext")
    definitions = sequence(step("mail", "Email", otherwise="mail", effect=effect))
    here = at("mail", attempt=3, leased_by="host:1")
    decision = advance(definitions, here, NOW, Failed("no")).decision
    assert isinstance(decision, Fail)
    assert decision.failure == "loop"


def test_cycles_with_a_wait_continue() -> None:
    daily = sequence(
        step("wait", "WaitForDuration", {"amount": 1, "unit": "days"}, "mail"),
        step("mail", "Email", then="sms"),
        step("sms", "Email", then="wait"),
    )
    executed, decision = drive(daily, at("wait"))
    assert len(executed) == 4
    assert isinstance(decision, Wait)


def test_a_goal_that_moves_from_a_side_effect_and_a_retry_are_no_loop() -> None:
    here = advance(MAIL, at("mail", attempt=1, leased_by="host:1"), NOW, Failed("later")).enrollment
    again = advance(MAIL, here, NOW + timedelta(minutes=5))
    assert isinstance(again.decision, Execute)


def test_a_runner_that_waits_by_noop_waits() -> None:
    poll = sequence(step("mail", "Email", then="poll"), step("poll", "Email", then="mail"))
    here = at("poll", attempt=1, leased_by="host:1", executed=("s/mail",))
    noop = advance(poll, here, NOW, Answer(Action.NOOP))
    assert noop.enrollment.executed == ()
    at_once = advance(poll, here, NOW, Answer(Action.NOOP, retry_after=timedelta(0)))
    assert isinstance(at_once.decision, Execute)  # the same visit is no revisit
    assert at_once.enrollment.executed == ("s/mail",)


def test_goals_are_of_their_sequence() -> None:
    definitions = {
        **sequence(
            step("wait", "WaitForDuration", {"amount": 9, "unit": "days"}),
            step("paid", "Goal", PAID, "over"),
            step("over", "GoTo", {"step": "dun", "sequence": "b"}),
        ),
        **sequence(
            step("dun", "Email", then="back"),
            step("back", "GoTo", {"step": "wait", "sequence": "s"}),
            step("paid", "Goal", PAID, "thanks"),
            step("thanks", "WaitForDuration", {"amount": 1, "unit": "days"}, "back"),
            name="b",
        ),
    }
    pulled = advance(definitions, at("wait", '{"paid": true}'), NOW)
    assert (pulled.enrollment.sequence, pulled.enrollment.step) == ("b", "thanks")
    assert pulled.enrollment.goals_met == ("paid",)
    # and what was met before it left holds when it comes back
    back = advance(definitions, pulled.enrollment, NOW + timedelta(days=1))
    assert (back.enrollment.sequence, back.enrollment.step) == ("s", "wait")
    assert back.enrollment.goals_met == ("paid",)
    assert json.loads(back.enrollment.goals_elsewhere or "") == {"b": ["paid"]}


def test_a_goal_that_repeats_is_armed_again_when_it_no_longer_holds() -> None:
    definitions = sequence(
        step("wait", "WaitForDuration", {"amount": 9, "unit": "days"}),
        step("paid", "Goal", {**PAID, "repeat": True}, "wait"),
    )
    pulled = advance(definitions, at("wait", '{"paid": true}'), NOW)
    assert [event.action for event in pulled.events] == ["goal"]
    again = advance(definitions, pulled.enrollment, NOW)
    assert not again.events
    unpaid = advance(definitions, pulled.enrollment._replace(data="{}"), NOW)
    assert (unpaid.enrollment.goals_met, unpaid.events) == ((), ())
    paid = advance(definitions, unpaid.enrollment._replace(data='{"paid": true}'), NOW)
    assert [event.action for event in paid.events] == ["goal"]
    assert paid.enrollment.goals_met == ("paid",)


JUMP = step("go", "GoTo", {"step": "x", "sequence": "other"})
OTHER = sequence(step("x", "Email"), name="other")
ARCHIVED = {"other": replace(OTHER["other"], archived=True)}


def test_a_jump_reports_the_sequence_that_it_enters() -> None:
    advanced = advance({**sequence(JUMP), **OTHER}, at("go"), NOW)
    assert (advanced.entered, advanced.is_shared) == ((("other", 0),), False)
    assert [event.action for event in advanced.events] == ["jump"]


@pytest.mark.parametrize(
    ("other", "refused", "failure"),
    [
        (OTHER, {"other": "already_enrolled"}, "already_enrolled"),
        (OTHER, {"other": "archived"}, "archived"),
        (ARCHIVED, {}, "archived"),
    ],
)
def test_a_jump_that_is_refused_has_an_outcome(
    other: dict[str, Sequence], refused: dict[str, str], failure: str
) -> None:
    failed = advance({**sequence(JUMP), **other}, at("go"), NOW, refused=refused)
    assert isinstance(failed.decision, Fail)
    assert failed.decision.failure == failure
    assert "other" in failed.decision.message
    assert (failed.enrollment.sequence, failed.enrollment.step) == ("s", "go")
    assert failed.entered == ()
    otherwise = replace(JUMP, alt_next_step="mail")
    definitions = {**sequence(otherwise, step("mail", "Email")), **other}
    went = advance(definitions, at("go"), NOW, refused=refused)
    assert (went.enrollment.step, went.events[0].action) == ("mail", "altNext")
    assert isinstance(went.decision, Execute)


def test_jumps_within_a_sequence_are_never_refused() -> None:
    own = step("go", "GoTo", {"step": "mail", "sequence": "s"})
    definitions = sequence(own, step("mail", "Email"))
    archived = {"s": replace(definitions["s"], archived=True)}
    assert isinstance(advance(archived, at("go"), NOW).decision, Execute)


# --- other enrollments


ENROLL = {"sequence": "other", "subject": "account-{{data.n}}", "data": {"plan": "{{data.n}}"}}


def test_an_enrolled_subject_is_part_of_the_outcome() -> None:
    definitions = {**sequence(step("go", "Enroll", ENROLL, "end"), step("end", "GoTo")), **OTHER}
    advanced = advance(definitions, at("go", data='{"n": 7}'), NOW)
    [entry] = advanced.entries
    assert (entry.sequence, entry.subject, entry.data) == ("other", "account-7", '{"plan": "7"}')
    assert entry.executed == ("s/go",)
    assert (advanced.is_shared, advanced.is_tentative) == (False, True)
    assert advanced.events[0].message == "enrolled 'account-7' in other"
    everything = sequence(step("go", "Enroll", {"sequence": "other", "data": {"get": "data"}}))
    [entry] = advance(everything, at("go", data='{"n": 7, "a": [{}]}'), NOW).entries
    assert entry.data == '{"n": 7, "a": [{}]}'
    own = sequence(step("go", "Enroll", {"sequence": "other"}))
    [entry] = advance(own, at("go")._replace(timezone="Asia/Tokyo"), NOW).entries
    assert (entry.subject, entry.timezone) == (at("go").subject, "Asia/Tokyo")


@pytest.mark.parametrize(
    ("refusal", "then", "decision", "action"),
    [
        ("already_enrolled", None, "Wait", "next"),
        ("already_enrolled", "mail", "Execute", "altNext"),
        ("archived", None, "archived", "failed"),
        ("archived", "mail", "Execute", "altNext"),
        ("missing", "mail", "invalid_step", "failed"),
    ],
)
def test_a_refused_entry_has_an_outcome(
    refusal: str, then: str | None, decision: str, action: str
) -> None:
    go = step("go", "Enroll", {"sequence": "other"}, "on", then)
    key = ("enroll", "other", at("go").subject)
    definitions = sequence(go, step("on", "WaitForCondition", PAID), step("mail", "Email"))
    advanced = advance(definitions, at("go"), NOW, refused={key: refusal})
    found = advanced.decision
    assert decision in (type(found).__name__, getattr(found, "failure", None))
    assert advanced.events[0].action == action
    assert "other" in (advanced.events[0].message or "")
    assert advanced.entries == ()


@pytest.mark.parametrize("text", ["", "x" * 1001, "é" * 501])
def test_a_subject_that_cannot_be_is_bad_data(text: str) -> None:
    go = step("go", "Enroll", {"sequence": "other", "subject": "{{data.n}}"})
    advanced = advance(sequence(go), at("go", data=json.dumps({"n": text})), NOW)
    assert isinstance(advanced.decision, Fail)
    assert advanced.decision.failure == "bad_data"


def test_enrolling_in_a_circle_is_a_loop() -> None:
    go = step("go", "Enroll", {"sequence": "other"}, "go")
    advanced = advance(sequence(go), at("go"), NOW)
    assert isinstance(advanced.decision, Fail)
    assert advanced.decision.failure == "loop"
    assert len(advanced.entries) == 1
    # across enrollments: the new one brings what was executed before it
    begun = advance(sequence(go), at("go")._replace(executed=("s/go",)), NOW)
    assert isinstance(begun.decision, Fail)
    assert begun.entries == ()


def test_a_subject_of_the_greatest_length_is_enrolled() -> None:
    go = step("go", "Enroll", {"sequence": "other", "subject": "é" * 500})
    [entry] = advance({**sequence(go), **OTHER}, at("go"), NOW).entries
    assert entry.subject == "é" * 500


@pytest.mark.parametrize("type_", ["Enroll", "Cancel"])
def test_a_subject_that_is_no_template_is_refused(type_: str) -> None:
    with pytest.raises(DefinitionError, match="subject: line 1"):
        compile_step(type_, {"sequence": "other", "subject": "{{#if}}"})


def test_a_cancellation_waits_for_locked_rows() -> None:
    stop = step("stop", "Cancel", {"sequence": "other"})
    advanced = advance(sequence(stop), at("stop"), NOW)
    assert advanced.decision == End()
    [cancellation] = advanced.cancellations
    assert cancellation.message == "by step stop of s, enrollment 1"
    waits = advance(sequence(stop), at("stop"), NOW, refused={cancellation.key: "locked"})
    assert waits.decision == Wait(NOW + LOCKED_DELAY)
    assert (waits.events, waits.cancellations) == ((), ())


# --- items


def collecting(config: dict[str, Any]) -> dict[str, Sequence]:
    made = sequence(step("collect", "Collect", config, "mail"), step("mail", "Email"))
    holidays = {"DE": frozenset({NOW.date() + timedelta(days=1)})}
    return {"s": replace(made["s"], collects="collect", holidays=holidays)}


def items(*minutes: float, **more: Any) -> str:
    """Data with items that came so many minutes ago."""
    since, last = ((NOW - timedelta(minutes=ago)).isoformat() for ago in (minutes[0], minutes[-1]))
    count = len(minutes)
    known = {"count": count, "since": since, "last": last}
    return json.dumps({"items": list(range(count)), "collecting": {**known, **more}})


WORKDAY = {"amount": 1, "unit": "business days", "holidays": "DE"}
BOTH = {"quiet": {"minutes": 10}, "most": {"amount": 1, "unit": "hour"}}


@pytest.mark.parametrize(
    ("config", "data", "minutes"),
    [
        (BOTH, "{}", None),
        (BOTH, '{"items": []}', None),
        (BOTH, items(5, 1), 9),
        (BOTH, items(55, 1), 5),
        (BOTH, items(12, 10), 0),
        (BOTH, items(60, 1), 0),
        ({"most": {"hours": 1}}, items(55, 54), 5),
        ({"at": "10:30"}, items(5), 30),
        ({"at": "10:00"}, items(5), 0),
        ({"at": "10:00"}, items(0), 24 * 60),
        ({"at": "9:00"}, items(61, 5), 0),
        ({"at": "10:00:30"}, items(0), 0.5),
        # NOW is a Monday, and the day after it a holiday
        ({"quiet": WORKDAY, "most": {"weeks": 1}}, items(30, 20), 2 * 24 * 60 - 20),
        ({"quiet": {"days": 3}, "most": WORKDAY}, items(30, 20), 2 * 24 * 60 - 30),
        # put there by an application, or nonsense: they came when it arrived
        (BOTH, '{"items": [1]}', 10),
        (BOTH, '{"items": [1], "collecting": {"since": 7, "last": "never", "count": "x"}}', 10),
    ],
)
def test_items_are_moved_when_their_time_is_over(
    config: dict[str, Any], data: str, minutes: float | None
) -> None:
    advanced = advance(collecting(config), at("collect", data=data), NOW)
    if minutes == 0:
        assert isinstance(advanced.decision, Execute)
        moved = json.loads(advanced.enrollment.data)
        before = json.loads(data)
        assert (moved["batch"], moved["items"]) == (before["items"], [])
        assert moved["collected"]["count"] == len(before["items"])
        assert "collecting" not in moved
    else:
        until = NEVER if minutes is None else NOW + timedelta(minutes=minutes)
        assert advanced.decision == Wait(until)


def test_items_beyond_the_limit_are_counted() -> None:
    data = items(20, 19, 18, count=9)
    advanced = advance(collecting({**BOTH, "at_most": 2}), at("collect", data=data), NOW)
    moved = json.loads(advanced.enrollment.data)
    assert moved["batch"] == [0, 1]
    assert (moved["collected"]["count"], moved["collected"]["omitted"]) == (9, 7)


def test_items_of_the_send_are_the_next_round_and_no_loop() -> None:
    """The mail took long: what came meanwhile is due when it ends."""
    definitions = collecting(BOTH)
    mailed = at("mail", data=items(30, 20), executed=())
    ended = advance(definitions, mailed, NOW, Answer())
    assert isinstance(ended.decision, Execute)
    assert json.loads(ended.enrollment.data)["batch"] == [0, 1]
    assert advance(definitions, at("mail"), NOW, Answer()).decision == End()


def test_a_goal_ends_a_collection() -> None:
    goal = step("out", "Goal", PAID)
    definitions = sequence(step("collect", "Collect", BOTH), goal)
    data = json.dumps({**json.loads(items(1)), "paid": True})
    assert advance(definitions, at("collect", data=data), NOW).decision == End()


# --- properties

NAMES = ["a", "b", "c", "d"]
CONDITION = st.sampled_from(["data.paid", "data.x", "visit", "external"]).map(
    lambda path: {**PAID, "value": {"type": "get", "value": path}}
)
CONFIGS = st.one_of(
    st.tuples(st.just("GoTo"), st.just({})),
    st.tuples(st.just("GoTo"), st.sampled_from([*NAMES, "nowhere"]).map(lambda s: {"step": s})),
    st.tuples(st.sampled_from(["Conditional", "Goal", "WaitForCondition"]), CONDITION),
    st.tuples(st.just("Split"), st.just({"next": 1, "altNext": 1})),
    st.tuples(
        st.just("UpdateData"),
        st.sampled_from([{"paid": True}, {"paid": None}]).map(lambda data: {"data": data}),
    ),
    st.tuples(
        st.just("WaitForDuration"),
        st.fixed_dictionaries(
            {
                "amount": st.integers(-5, 5),
                "unit": st.sampled_from(["milliseconds", "hours", "days", "months"]),
            }
        ),
    ),
    st.tuples(
        st.just("WaitForDate"),
        st.sampled_from(["2026-03-01", "2027-01-01", "{{data.due}}"]).map(lambda d: {"date": d}),
    ),
    st.tuples(
        st.just("WaitForDateComparison"),
        st.fixed_dictionaries(
            {
                "attribute": st.sampled_from(["day", "hour", "month", "minute"]),
                "values": st.lists(st.integers(0, 6), min_size=1, max_size=2),
                "occurrence": st.sampled_from(["current", "next"]),
            }
        ),
    ),
    st.tuples(st.just("Email"), st.just({})),
)


@st.composite
def worlds(draw: st.DrawFn) -> dict[str, Sequence]:
    where = st.sampled_from([*NAMES, None])
    steps = []
    for name in NAMES:
        type_, config = draw(CONFIGS)
        steps.append(step(name, type_, config, draw(where), draw(where)))
    zone = draw(st.sampled_from(["UTC", "Europe/Berlin", "America/New_York"]))
    return sequence(*steps, timezone=zone)


DATA = st.sampled_from(["{}", '{"paid": true}', '{"due": "2026-05-05"}', '{"due": 5, "x": true}'])
enrollments = st.builds(
    at,
    st.sampled_from(NAMES),
    DATA,
    timezone=st.sampled_from([None, "Asia/Tokyo", "Nowhere/Land"]),
    entered_at=st.sampled_from([None, NOW, NOW - timedelta(days=40)]),
    goals_met=st.sampled_from([(), ("a",), ("b", "c")]),
    executed=st.sampled_from([(), ("s/a",), ("s/b", "s/c")]),
    attempt=st.integers(0, 3),
    leased_by=st.sampled_from([None, "host:1"]),
)
results = st.sampled_from(
    [
        None,
        Answer(),
        Answer(Action.NOOP),
        Answer(Action.ALT_NEXT, data={"paid": True}),
        Failed("no"),
        Failed("no", permanent=True),
        Failed("later", fault="server"),
    ]
)


@given(worlds(), enrollments, results)
def test_advance_always_returns_a_decision_that_can_be_written(
    definitions: dict[str, Sequence], enrollment: Enrollment, result: Result | None
) -> None:
    advanced = advance(definitions, enrollment, NOW, result, 0.5)
    here = advanced.enrollment
    match advanced.decision:
        case Wait(until):
            assert NOW < until <= NEVER
        case Execute(step):
            assert step.name == here.step
        case Fail(failure, message):
            assert failure
            assert message
        case End():
            assert advanced.events[-1].action == "completed"
    assert here.entered_at is not None
    assert here.leased_by is None
    assert here.visit - enrollment.visit <= MAX_MOVES + 2
    assert all(a.at < b.at for a, b in zip(advanced.events, advanced.events[1:], strict=False))


@given(worlds(), enrollments, results, DATA)
def test_enrollments_in_the_same_state_share_the_outcome(
    definitions: dict[str, Sequence], enrollment: Enrollment, result: Result | None, data: str
) -> None:
    advanced = advance(definitions, enrollment, NOW, result, 0.5)
    other = enrollment._replace(id=2, subject="bob", data=data, created_at=NOW - timedelta(days=1))
    assert other.state == enrollment.state
    if advanced.is_shared and all(
        condition(data_view(other)) == answer for condition, answer in advanced.answers
    ):
        expected = advanced._replace(enrollment=other.in_state_of(advanced.enrollment))
        assert advance(definitions, other, NOW, result, 0.7) == expected


@given(worlds(), enrollments, st.floats(0, 1, exclude_max=True))
def test_an_early_wake_changes_nothing(
    definitions: dict[str, Sequence], enrollment: Enrollment, part: float
) -> None:
    first = advance(definitions, enrollment, NOW)
    if not isinstance(first.decision, Wait):
        return
    wait = min(first.decision.until, NOW + timedelta(days=400)) - NOW
    then = min(NOW + wait * part, first.decision.until - timedelta(microseconds=1))  # rounded up
    early = advance(definitions, first.enrollment, then)
    assert early.decision == first.decision
    assert early.enrollment == first.enrollment
    assert [event.action for event in early.events] in ([], ["warning"])


@settings(deadline=None)  # it makes many moves
@given(worlds(), enrollments, st.sampled_from([Answer(), Answer(Action.ALT_NEXT)]))
def test_two_executions_of_a_step_have_a_wait_between_them(
    definitions: dict[str, Sequence], enrollment: Enrollment, answer: Answer
) -> None:
    here = enrollment._replace(attempt=0, leased_by=None, executed=())
    now, result = NOW, None
    executed: dict[str, datetime] = {}
    for _ in range(50):
        advanced = advance(definitions, here, now, result)
        here, result = advanced.enrollment, None
        match advanced.decision:
            case Execute():
                assert executed.get(here.step) != now
                executed[here.step] = now
                here, result = here.leased_to("host:1", here.leases + 1), answer
            case Wait(until) if until < NEVER:
                now = until
            case _:
                break


@given(worlds(), enrollments)
def test_every_goal_moves_an_enrollment_at_most_once(
    definitions: dict[str, Sequence], enrollment: Enrollment
) -> None:
    now, here, pulls = NOW, enrollment, 0
    for _ in range(6):
        advanced = advance(definitions, here, now)
        pulls += sum(event.action == "goal" for event in advanced.events)
        assert len(set(advanced.enrollment.goals_met)) == len(advanced.enrollment.goals_met)
        if not isinstance(advanced.decision, Wait) or advanced.decision.until == NEVER:
            break
        here, now = advanced.enrollment, advanced.decision.until
    assert pulls <= len(next(iter(definitions.values())).goals)


def test_a_goal_that_cannot_be_evaluated_is_named() -> None:
    endless = {"lodashCommand": "range", "value": {"type": "raw", "value": 1e9}}
    found = sequence(
        step("a", "WaitForDuration", {"amount": 1, "unit": "day"}), step("won", "Goal", endless)
    )
    decision = advance(found, at("a"), NOW).decision
    assert isinstance(decision, Fail)
    assert decision.failure == "bad_data"
    assert decision.message.startswith("step 'won': lodashCommand range: more than 0.25 seconds")


def test_a_template_that_cannot_be_rendered_is_named_with_its_field() -> None:
    found = sequence(step("a", "UpdateData", {"data": {"on": ["{{date data.due}}"]}}))
    decision = advance(found, at("a"), NOW).decision
    message = "step 'a': data.on.0: {{date data.due}}: the value is missing, write an ISO 8601 text"
    assert decision == Fail("bad_data", message)


@pytest.mark.parametrize(
    ("path", "shared"),
    [
        ("visit", True),
        ("timezone", True),
        (["step"], True),
        ("data.a", True),
        ("subject", False),
        ("['data'].a", True),
    ],
)
def test_outcomes_are_shared_by_the_values_that_a_condition_reads(
    path: object, shared: bool
) -> None:
    asking = {"lodashCommand": "isNil", "value": {"type": "get", "value": path}}
    there = {**asking, "value": {"type": "get", "value": "step"}}
    then = step("then", "Conditional", there)  # what was read before this move counts as well
    found = sequence(step("ask", "Conditional", asking, "then", "then"), then)
    advanced = advance(found, at("ask"), NOW)
    assert advanced.is_shared is shared
    assert [answer for _, answer in advanced.answers] == ([True] if "data" in str(path) else [])


def test_the_data_of_a_condition_are_read_by_javascript_alone() -> None:
    sums = {
        "value": {"type": "get", "value": "data.sum"},
        "compareTo": {"type": "raw", "value": 12345678901234567},
    }
    asking = {**PAID, **sums}
    data = (
        '{"sum": 12345678901234568, "deep": ' + "[" * 3_000 + "]" * 3_000 + "}"
    )  # Python's json cannot
    found = sequence(
        step("ask", "Conditional", asking, "yes"),
        step("yes", "WaitForDuration", {"amount": 1, "unit": "day"}),
    )
    assert advance(found, at("ask", data), NOW).enrollment.step == "yes"


@pytest.mark.parametrize(
    ("result", "words"),
    [
        (Answer(message="sent to a@x.org", data={"n": 1}), "next: sent to a@x.org"),
        (Suppressed("not sent to a@x.org"), "suppressed: not sent to a@x.org"),
        (Failed("no answer", unknown=True), "failed: no answer"),
    ],
)
def test_the_result_of_a_step_that_was_removed_meanwhile_is_recorded(
    result: Result, words: str
) -> None:
    advanced = advance(sequence(step("other", "Email")), at("mail", attempt=1), NOW, result)
    assert [(event.action, event.message) for event in advanced.events] == [
        ("stale_result", f"the step was removed during attempt 1: {words}"),
        ("failed", "step 'mail' does not exist"),
    ]
    assert advanced.decision == Fail("invalid_step", "step 'mail' does not exist")
    assert (advanced.enrollment.data == '{"n": 1}') == isinstance(result, Answer)
