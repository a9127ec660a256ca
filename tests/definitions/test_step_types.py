"""One record describes a step type: what the rest of the project knows follows from it."""

from __future__ import annotations

import ast
import copy
import json
import re
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from sequencerd import settings_file
from sequencerd.core.model import InvalidStep, Sequence, Step
from sequencerd.core.step_types import BUILT_IN, is_instant, step_type
from sequencerd.core.step_types.condition_config import ConditionConfig
from sequencerd.definitions import drawing
from sequencerd.definitions.compiler import build, compile_behaviour, named_calendars
from sequencerd.definitions.files import read_files
from sequencerd.errors import SettingsError
from sequencerd.runners.registry import make_runners
from tests.definitions.test_check import RUNNERS
from tests.definitions.test_json_schema import EMAIL, IS_PRO
from tests.test_readme import REPOSITORY

HAS_N = {"lodashCommand": "isNumber", "value": {"type": "get", "value": "data.n"}}
# Configs with as many exits as possible; "there" and "elsewhere" are steps.
CONFIGS: dict[str, list[dict[str, Any]]] = {
    "GoTo": [{}, {"step": "there"}, {"step": "there", "sequence": "other"}],
    "Conditional": [IS_PRO],
    "Goal": [IS_PRO],
    "Switch": [{"cases": [{"when": IS_PRO, "step": "there"}, {"when": HAS_N, "step": None}]}],
    "Split": [
        {"next": 1, "altNext": 1},
        {
            "ways": [
                {"name": "a", "weight": 1, "step": "there"},
                {"name": "b", "weight": 1, "step": None},
            ]
        },
    ],
    "WaitForDuration": [
        {"amount": 1, "unit": "day"},
        {"amount": 4, "unit": "hours", "within": {"from": "09:00"}},
    ],
    "WaitForDate": [
        {"date": "{{data.due}}"},
        {"date": "{{data.due}}", "past": "altNext", "missing": "altNext"},
        {"date": "{{data.due}}", "every": "year"},
    ],
    "WaitForWindow": [{"days": ["mon"], "from": "09:00"}],
    "WaitForDateComparison": [{"attribute": "hour", "values": [9]}],
    "WaitForCondition": [IS_PRO, {**IS_PRO, "timeout": {"amount": 1, "unit": "day"}}],
    "UpdateData": [{"data": {"x": 1}}],
    "Enroll": [{"sequence": "other"}, {"sequence": "other", "subject": "{{data.x}}"}],
    "Cancel": [{"sequence": "other"}],
    "Collect": [
        {"quiet": {"minutes": 10}, "most": {"hours": 1}},
        {"at": "08:00"},
        {"quiet": {"amount": 1, "unit": "business days", "holidays": "DE"}},
    ],
    "Email": [EMAIL, {**EMAIL, "onError": "altNext"}, {**EMAIL, "onSuppressed": "end"}],
    "SMS": [{"from": "+15005550006", "to": "{{data.x}}", "message": "m", "onError": "altNext"}],
    "Note": [{}],
}
BUSINESS_DAYS = {"unit": "business days", "holidays": "DE"}
SOON = {
    "momentCommand": "isBefore",
    "value": {"type": "get", "value": "data.due"},
    "compareTo": {"type": "now", "offset": {"amount": 2, **BUSINESS_DAYS}},
}
HOURS = {"amount": 2, "unit": "hours", "within": {"from": "09:00", "holidays": "DE"}}
CASES = [(type_, config) for type_, configs in CONFIGS.items() for config in configs]


def test_every_type_has_a_case() -> None:
    assert CONFIGS.keys() == {*BUILT_IN, "Note"}


def document(type_: str, config: dict[str, Any]) -> dict[str, Any]:
    ends = [
        {"name": name, "type": "Note", "next": None}
        for name in ("next", "altNext", "there", "lost")
    ]
    step = {"name": "it", "type": type_, "config": config, "next": "next", "altNext": "altNext"}
    return {"name": "s", "steps": [copy.deepcopy(step), *ends]}


def read(tmp_path: Path, document: dict[str, Any]) -> tuple[Any, list[str]]:
    """The definition, and what `check` says, without the file's name."""
    file = tmp_path / "s.json"
    file.write_text(json.dumps(document, indent=1))
    found, findings = read_files([file], RUNNERS)
    return found[0].sequence if found else None, [
        str(finding).removeprefix(f"{file}:") for finding in findings
    ]


@pytest.mark.parametrize(("type_", "config"), CASES)
def test_each_exit_is_drawn_and_reachable_and_checked_at_its_line(
    tmp_path: Path, type_: str, config: dict[str, Any]
) -> None:
    whole = document(type_, config)
    sequence, told = read(tmp_path, whole)
    exits = sequence.steps["it"].exits
    assert exits
    # each step that the config names, and each end, is where an exit leads
    steps = re.findall(r'"step": (?:"(\w+)"|null)', json.dumps(config))
    assert {one.target or "" for one in exits} >= set(steps)
    targets = {one.target for one in exits if one.sequence is None and one.target}
    unreachable = {re.findall(r"s/(\w+): unreachable", line)[0] for line in told if "unrea" in line}
    assert unreachable == {"next", "altNext", "there", "lost"} - targets
    has_altnext = any(one.path == ("altNext",) for one in exits)
    assert any("s/it: altNext: never taken" in line for line in told) != has_altnext

    drawn = {(edge.target, edge.sequence, edge.label) for edge in drawing.edges(sequence)}
    for one in exits:
        label = "" if one.label == "next" else one.label
        assert (one.target, one.sequence, label) in drawn
        shown = "end" if one.target is None else one.target
        if one.sequence is not None:
            shown = f"{one.sequence}/{shown}"
        line = drawing.text(sequence, {}).splitlines()[0]
        assert f"{one.label} {shown}" in line
        for draw in (drawing.mermaid, drawing.dot):
            assert shown in draw(sequence, {})
        if one.target is not None and one.sequence is None:
            wrong = copy.deepcopy(whole)
            holder = wrong["steps"][0]
            for key in one.path[:-1]:
                holder = holder[key]
            holder[one.path[-1]] = "nowhere"
            lines = json.dumps(wrong, indent=1).splitlines()
            [number] = [n for n, text in enumerate(lines, 1) if '"nowhere"' in text]
            _, errors = read(tmp_path, wrong)
            assert any(
                line.startswith(f"{number}: error: s/it: ") and "'nowhere' does not exist" in line
                for line in errors
            ), errors


@pytest.mark.parametrize(("type_", "config"), CASES)
def test_a_step_that_waits_is_described(type_: str, config: dict[str, Any]) -> None:
    waits = type_.startswith("WaitFor") or type_ in ("Goal", "Collect")
    assert step_type(type_).describe(config).startswith("waits ") == waits
    assert step_type(type_).describe({}) == ""


def test_no_other_module_knows_a_type_by_its_name() -> None:
    """What depends on the type is in its record, so that a new type changes no other module. The
    import names the types of the original, which has no new ones.
    """
    package = REPOSITORY / "sequencerd"
    rooms = {package / "core/step_types", package / "definitions/original"}
    found = [
        f"{file.relative_to(REPOSITORY)}:{node.lineno}: {node.value}"
        for file in package.rglob("*.py")
        if not rooms & {*file.parents} and any(f'"{name}"' in file.read_text() for name in BUILT_IN)
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in BUILT_IN
    ]
    assert found == []


def test_the_page_has_a_row_for_each_type() -> None:
    page = (REPOSITORY / "docs/steps.md").read_text()
    table = page.split("| type | config |")[1].split("\n\n")[0]
    rows = re.findall(r"^\| (`[^|]+) \| ([^|]*)", table, re.MULTILINE)
    named = {type_: keys for types, keys in rows for type_ in re.findall(r"`(\w+)`", types)}
    assert named.keys() == BUILT_IN.keys()
    for type_ in filter(is_instant, BUILT_IN):
        fields = BUILT_IN[type_].config.model_fields
        for key, field in fields.items():
            if "condition" not in named[type_] or key not in ConditionConfig.model_fields:
                assert f"`{field.alias or key}`" in named[type_], f"{type_}: {key}"


# --- names that are taken


@pytest.mark.parametrize("type_", BUILT_IN)
def test_a_runner_in_the_settings_with_a_built_in_name_is_refused(
    tmp_path: Path, type_: str
) -> None:
    file = tmp_path / "sequencerd.toml"
    file.write_text(f'[runners.{type_}]\nurl = "https://example.com"\n')
    loaded = settings_file.load({"SEQUENCERD_CONFIG": str(file)})
    message = rf"\[runners.{type_}\]: {type_} is a built-in step type, choose another name"
    with pytest.raises(SettingsError, match=message):
        make_runners(loaded)


@pytest.mark.parametrize(
    ("type_", "config", "has_problem"),
    [
        ("WaitForDuration", {"amount": 1, **BUSINESS_DAYS}, True),
        ("WaitForDate", {"date": "2030-01-01", "offset": {"amount": 1, **BUSINESS_DAYS}}, True),
        ("WaitForCondition", {**IS_PRO, "timeout": {"amount": 1, **BUSINESS_DAYS}}, True),
        ("WaitForWindow", {"holidays": "DE"}, True),
        ("Switch", {"cases": [{"when": {"not": SOON}, "step": None}]}, True),
        ("WaitForDuration", HOURS, True),
        ("WaitForDate", {"date": "2030-01-01", "offset": HOURS}, True),
        ("WaitForCondition", {**IS_PRO, "timeout": HOURS}, True),
        ("Collect", {"quiet": HOURS}, True),
        (
            "Conditional",
            {**SOON, "compareTo": {"type": "now", "offset": HOURS}},
            True,
        ),
        ("Note", {"expires": {"amount": 1, **BUSINESS_DAYS}}, True),
        ("Note", {"expires": HOURS}, True),
        ("WaitForWindow", {"holidays": "FR"}, False),
        ("UpdateData", {"data": {"holidays": "DE"}}, False),  # a key of the user's
    ],
)
def test_a_calendar_without_holidays_is_a_problem_of_the_steps_that_need_it(
    type_: str, config: dict[str, Any], has_problem: bool
) -> None:
    behaviour = compile_behaviour(type_, config, RUNNERS)
    named = named_calendars(type_, config)
    step = Step("s", "it", type_, config, None, None, behaviour, calendars=named)
    holidays = {"FR": frozenset({date(2026, 7, 14)})}
    sequence = Sequence("s", "it", "UTC", {"it": step}, holidays=holidays)
    built = build(sequence).steps["it"].behaviour
    assert isinstance(built, InvalidStep) == has_problem
    if isinstance(built, InvalidStep):
        assert "calendar 'DE' has no holidays" in built.message
