"""Conditions: combinations, and comparisons of times as instants."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sequencerd.core.advance import advance
from sequencerd.core.calendar.granularity import GRANULARITIES, period
from sequencerd.core.decision import Fail, Wait
from sequencerd.core.faults import DefinitionError, EvaluationError
from sequencerd.core.step_types import compile_step, roots, step_type
from sequencerd.core.step_types.condition_config import (
    compile_condition,
    condition_roots,
    describe_condition,
    explain,
    read_condition,
)
from sequencerd.core.view import Context
from tests.core.test_advance import NOW, PAID, at, sequence, step


def get(path: object) -> dict[str, Any]:
    return {"type": "get", "value": path}


def raw(value: object) -> dict[str, Any]:
    return {"type": "raw", "value": value}


def context(data: Mapping[str, object] | None = None, timezone: str = "UTC") -> Context:
    return Context(at("a", json.dumps(data or {})), NOW, timezone, {})


def holds(
    condition: dict[str, Any], data: Mapping[str, object] | None = None, timezone: str = "UTC"
) -> bool:
    return compile_condition(read_condition(condition))(context(data, timezone))


def truth(name: str) -> dict[str, Any]:
    return {"lodashCommand": "eq", "value": get(f"data.{name}"), "compareTo": raw(True)}


# --- combinations

formulas = st.recursive(
    st.sampled_from("abc").map(truth),
    lambda parts: (
        st.lists(parts, min_size=1, max_size=3).map(lambda found: {"all": found})
        | st.lists(parts, min_size=1, max_size=3).map(lambda found: {"any": found})
        | parts.map(lambda found: {"not": found})
    ),
    max_leaves=6,
)


def value_of(formula: dict[str, Any], data: dict[str, bool]) -> bool:
    match formula:
        case {"all": parts}:
            return all(value_of(part, data) for part in parts)
        case {"any": parts}:
            return any(value_of(part, data) for part in parts)
        case {"not": part}:
            return not value_of(part, data)
    return data[formula["value"]["value"].removeprefix("data.")]


@given(formulas, st.fixed_dictionaries(dict.fromkeys("abc", st.booleans())))
def test_combinations_are_those_of_logic(formula: dict[str, Any], data: dict[str, bool]) -> None:
    assert holds(formula, data) == value_of(formula, data)


def test_a_part_that_is_not_needed_is_not_evaluated() -> None:
    throws = {
        "lodashCommand": "invokeMap",
        "value": raw([1]),
        "compareTo": raw("toFixed.call.call"),
    }
    assert holds({"any": [truth("a"), throws]}, {"a": True})
    assert not holds({"all": [truth("a"), throws]}, {"a": False})
    with pytest.raises(EvaluationError, match="invokeMap"):
        holds({"all": [throws, truth("a")]}, {"a": False})


def test_the_paths_that_a_combination_reads_are_known() -> None:
    condition = {
        "all": [
            {"not": {"any": [truth("a"), {"lodashCommand": "isNil", "value": get("external.x")}]}},
            {
                "momentCommand": "isBetween",
                "value": get("startStep"),
                "compareTo": [get("subject"), {"type": "now"}],
            },
        ]
    }
    wanted: frozenset[str] | None = frozenset({"data", "external", "startStep", "subject"})
    assert condition_roots(read_condition(condition)) == wanted
    for type_, config in (
        ("Conditional", condition),
        ("Switch", {"cases": [{"when": PAID, "step": None}, {"when": condition, "step": None}]}),
    ):
        assert roots(type_, config) == wanted


def test_an_outcome_is_shared_unless_own_values_were_read() -> None:
    visited = {"lodashCommand": "gt", "value": get("visit"), "compareTo": raw(5)}
    subject = {"lodashCommand": "eq", "value": get("subject"), "compareTo": raw("ada")}
    for part, is_shared, answers in (
        (visited, True, []),
        (subject, False, []),
        (truth("a"), True, [False]),
        ({"any": [truth("a"), {"not": truth("b")}]}, True, [False, False]),
    ):
        config = {"not": {"all": [{"not": visited}, part]}}
        definitions = sequence(step("if", "Conditional", config))
        advanced = advance(definitions, at("if"), NOW)
        assert advanced.is_shared == is_shared
        assert [answer for _, answer in advanced.answers] == answers


def test_conditions_that_are_nested_too_deep_are_refused() -> None:
    config: dict[str, Any] = truth("a")
    for _ in range(51):
        config = {"not": config}
    with pytest.raises(DefinitionError, match="nested more than 50 levels deep"):
        compile_step("Conditional", config)
    assert compile_step("Conditional", config["not"])


def test_a_goal_and_a_wait_may_have_a_combination() -> None:
    both = {"all": [truth("a"), {"not": truth("b")}]}
    definitions = sequence(
        step("wait", "WaitForCondition", {**both, "timeout": {"amount": 1, "unit": "day"}}, "end"),
        step("end", "WaitForDuration", {"amount": 9, "unit": "days"}),
        step("goal", "Goal", {"any": [truth("c")], "repeat": True}, "end"),
    )
    for data, leads in (("{}", "wait"), ('{"a": true}', "end"), ('{"a": true, "b": true}', "wait")):
        assert advance(definitions, at("wait", data), NOW).enrollment.step == leads
    advanced = advance(definitions, at("wait", '{"c": true}'), NOW)
    assert [event.action for event in advanced.events] == ["goal"]


# --- times


def compare(command: str, value: object, other: object, **keys: object) -> dict[str, Any]:
    one = other if isinstance(other, list) else raw(other)
    return {"momentCommand": command, "value": raw(value), "compareTo": one, **keys}


@pytest.mark.parametrize(
    ("condition", "expected"),
    [
        # as texts, the first would be the later one
        (compare("isBefore", "2026-03-02T23:00+09:00", "2026-03-02T20:00Z"), True),
        (compare("isAfter", "2026-03-02T23:00+09:00", "2026-03-02T20:00Z"), False),
        (compare("isSame", "2026-03-02T23:00+09:00", "2026-03-02T14:00Z"), True),
        (compare("isSameOrBefore", "2026-03-02T23:00+09:00", "2026-03-02T14:00Z"), True),
        (compare("isSameOrAfter", "2026-03-02", "2026-03-02T00:00:00.001Z"), False),
        (compare("isBetween", "2026-03-02", [raw("2026-03-01"), raw("2026-03-03")]), True),
        (compare("isBetween", "2026-03-01", [raw("2026-03-01"), raw("2026-03-03")]), False),
        (compare("isSame", "2026-03-02", "2026-03-02T23:59:59Z", granularity="day"), True),
        (compare("isBefore", "2026-03-02", "2026-03-02T23:59:59Z", granularity="day"), False),
        (compare("isSameOrAfter", "2026-02-01", "2026-03-02", granularity="quarter"), True),
        (compare("isSame", "2026-03-31", "2026-04-01", granularity="quarter"), False),
        # a week begins on Sunday, 1 March
        (compare("isSame", "2026-03-01", "2026-03-02", granularity="week"), True),
        (compare("isSame", "2026-03-01", "2026-03-02", granularity="isoWeek"), False),
        (compare("isSame", "2026-12-31", "2027-01-01", granularity="isoWeek"), True),
        (compare("isSame", "2026-12-31", "2027-01-01", granularity="year"), False),
    ],
)
def test_times_are_compared_as_instants(condition: dict[str, Any], expected: bool) -> None:
    assert holds(condition) == expected


def test_periods_are_those_of_the_enrollment_s_zone() -> None:
    same_day = compare("isSame", "2026-03-02T22:30Z", "2026-03-02T23:30Z", granularity="day")
    assert holds(same_day, timezone="UTC")
    assert not holds(same_day, timezone="Europe/Berlin")
    local = compare("isSame", "2026-03-02T10:00", "2026-03-02T10:00Z")
    assert holds(local, timezone="UTC")
    assert not holds(local, timezone="Europe/Berlin")


def test_the_present_time_is_the_evaluation_s() -> None:
    due = {"momentCommand": "isBefore", "value": {"type": "now"}, "compareTo": get("data.due")}
    definitions = sequence(
        step("if", "Conditional", due, "early", "late"),
        *(step(n, "WaitForDuration", {"amount": 1, "unit": "day"}) for n in ("early", "late")),
    )
    due_at = json.dumps({"due": (NOW + timedelta(hours=1)).isoformat()})
    for hours, leads in ((0, "early"), (2, "late")):
        now = NOW + timedelta(hours=hours)
        assert advance(definitions, at("if", due_at), now).enrollment.step == leads


def moved(operand: Mapping[str, object], amount: float, unit: str, **keys: Any) -> dict[str, Any]:
    return {**operand, "offset": {"amount": amount, "unit": unit, **keys}}


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("2026-01-31T10:00:00Z", False),  # 30 days before 2 March is 31 January
        ("2026-01-31T10:00:00.001Z", True),
        ("2026-03-02", True),
        (None, False),
    ],
)
def test_a_time_is_compared_with_one_before_the_present(value: object, expected: bool) -> None:
    recent = compare("isAfter", value, [])
    recent |= {"value": get("data.at"), "compareTo": moved({"type": "now"}, -30, "days")}
    assert holds(recent, {"at": value}) == expected


@pytest.mark.parametrize(
    ("first", "offset", "second"),
    [
        # days are calendar time: clocks are set on 29 March in Berlin
        ("2026-03-28T10:00", (1, "day"), "2026-03-29T10:00+02:00"),
        ("2026-03-28T10:00", (24, "hours"), "2026-03-29T11:00+02:00"),
        ("2026-01-31", (1, "month"), "2026-02-28T00:00+01:00"),
        ("2026-03-06T10:00", (1, "business day"), "2026-03-09T10:00+01:00"),
    ],
)
def test_an_offset_moves_any_time(first: str, offset: tuple[int, str], second: str) -> None:
    for operand in (raw(first), get("data.at")):
        same = compare("isSame", second, []) | {"compareTo": moved(operand, *offset)}
        assert holds(same, {"at": first}, "Europe/Berlin")
    assert not holds(compare("isSame", second, first), timezone="Europe/Berlin")


def test_an_offset_beyond_the_calendar_is_named() -> None:
    first = raw("2026-03-01")
    far = compare("isBetween", "2026-03-02", [first, moved(first, 9_000, "years")])
    with pytest.raises(EvaluationError, match=r"compareTo\.1\.offset\.amount 9000 years: the date"):
        holds(far, {})


def test_an_offset_without_a_time_is_an_error() -> None:
    several = {"lodashCommand": "gt", "value": moved(get("data.n"), 1, "day"), "compareTo": raw(1)}
    with pytest.raises(DefinitionError, match=r"value\.offset: belongs to momentCommand"):
        compile_condition(read_condition(several))


@pytest.mark.parametrize("missing", [{}, {"due": None}])
def test_without_a_date_a_comparison_is_false(missing: dict[str, None]) -> None:
    condition = {
        "momentCommand": "isSameOrAfter",
        "value": get("data.due"),
        "compareTo": raw("2026"),
    }
    condition["compareTo"] = raw("2026-01-01")
    assert not holds(condition, missing)
    assert holds({"not": condition}, missing)


@pytest.mark.parametrize(
    "wrong", ["soon", 1767225600, "1767225600", " 1767225 ", ["2026-01-01"], True, ""]
)
def test_an_invalid_date_fails_the_enrollment(wrong: object) -> None:
    condition = {
        "momentCommand": "isBetween",
        "value": {"type": "now"},
        "compareTo": [raw("2026-01-01"), get("data.due")],
    }
    decision = advance(
        sequence(step("if", "Conditional", condition)), at("if", json.dumps({"due": wrong})), NOW
    ).decision
    assert isinstance(decision, Fail)
    assert decision.failure == "bad_data"
    assert decision.message.startswith("step 'if': momentCommand isBetween: compareTo.1: ")
    assert "is not an ISO 8601 date" in decision.message


@pytest.mark.parametrize("type_", ["Goal", "WaitForCondition"])
def test_the_present_time_wakes_nothing(type_: str) -> None:
    now = {"momentCommand": "isAfter", "value": {"type": "now"}, "compareTo": get("data.due")}
    ahead = {**now, "value": moved({"type": "now"}, 1, "day")}
    for config in (now, ahead, {"any": [PAID, {"not": now}]}):
        with pytest.raises(DefinitionError, match="WaitForDate, or compare with now in a Cond"):
            compile_step(type_, config)
    late = {**now, "value": get("data.at")}
    assert isinstance(advance(sequence(step("w", type_, late)), at("w"), NOW).decision, Wait)


ZONES = st.sampled_from(["UTC", "Europe/Berlin", "America/St_Johns", "Australia/Lord_Howe"])
INSTANTS = st.datetimes(datetime(1999, 1, 1), datetime(2031, 1, 1), timezones=st.just(UTC))  # noqa: DTZ001 - hypothesis takes the zone apart from it


@given(INSTANTS, INSTANTS, st.sampled_from(GRANULARITIES), ZONES.map(ZoneInfo))
def test_periods_are_in_the_order_of_time(
    one: datetime, other: datetime, unit: str, zone: ZoneInfo
) -> None:
    earlier, later = sorted([one, other])
    if unit in ("year", "quarter", "month", "week", "isoWeek", "day"):
        assert period(earlier, unit, zone) <= period(later, unit, zone)
    else:
        lengths = {"hour": 3600, "minute": 60, "second": 1, "millisecond": 0.001}
        since = period(one, unit, zone) / 1000
        assert 0 <= one.timestamp() - since < lengths[unit] + 0.0011


# --- described


def test_an_offset_is_described() -> None:
    config = compare("isBetween", "2026-03-01", [moved(raw("2026-03-01"), 1, "day")])
    config["value"] = get("data.at")
    config["compareTo"].append(moved({"type": "now"}, -1.5, "hours"))
    shown = 'isBetween(data.at, "2026-03-01" + 1 day, now - 1.5 hours)'
    open_ = compare("isAfter", "2026-03-01", [])
    open_["compareTo"] = moved({"type": "now"}, 4, "hours", within={"days": ["mon"]})
    assert describe_condition(open_) == 'isAfter("2026-03-01", now + 4 hours within mon)'
    assert " + 4 hours within mon) is" in explain(read_condition(open_), context({}))
    assert step_type("Goal").describe(config) == f"waits until {shown} is true"
    told = explain(read_condition(config), context({"at": "2026-03-02"}))
    assert told == (
        'isBetween(data.at = "2026-03-02", "2026-03-01" + 1 day,'
        " now = 2026-03-02T10:00:00Z - 1.5 hours) is false"
    )


def test_a_combination_is_described() -> None:
    due = {
        "momentCommand": "isBefore",
        "value": get("data.due"),
        "compareTo": {"type": "now"},
        "granularity": "day",
    }
    config = {"any": [truth("a"), {"not": due}]}
    shown = "any(eq(data.a, true), not(isBefore(data.due, now, day)))"
    assert step_type("Goal").describe(config) == f"waits until {shown} is true"
    told = explain(read_condition(config), context({"a": False, "due": "2026-03-02"}))
    assert told == (
        'any(eq(data.a = false, true), not(isBefore(data.due = "2026-03-02",'
        " now = 2026-03-02T10:00:00Z, day))) is true"
    )
