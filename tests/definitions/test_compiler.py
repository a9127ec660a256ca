"""Definitions: files are read and checked as a whole."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest

from sequencerd import settings_file
from sequencerd.core.model import InvalidStep, RetryPolicy, SideEffect
from sequencerd.core.step_types.waits import WaitForDurationConfig
from sequencerd.definitions import compiler, files
from sequencerd.errors import FileError
from sequencerd.runners.registry import make_runners
from tests.helpers.engines import Recorder

RUNNERS = {"Note": Recorder()}

GOOD = """
name: s
timezone: Europe/Berlin
steps:
  - name: hello
    type: Note
    config: {on: yes, date: 2018-06-08, retry: {attempts: 2}, onError: altNext}
    altNext: bye
  - name: pause
    type: WaitForDuration
    config: {amount: 3, unit: days}
  - name: bye
    type: Note
    next: null
  - name: unreached
    type: Note
"""


def read(tmp_path: Path, text: str) -> list[compiler.Definition]:
    file = tmp_path / "file.yaml"
    file.write_text(text)
    return files.read_file(file, RUNNERS)


def test_a_file_is_read(tmp_path: Path) -> None:
    (definition,) = read(tmp_path, GOOD)
    steps = definition.sequence.steps
    assert definition.sequence.first_step == "hello"
    assert [(s.name, s.next_step, s.alt_next_step) for s in steps.values()] == [
        ("hello", "pause", "bye"),
        ("pause", "bye", None),
        ("bye", None, None),
        ("unreached", None, None),
    ]
    hello = steps["hello"].behaviour
    assert isinstance(hello, SideEffect)
    assert hello.program == {"on": "yes", "date": "2018-06-08"}
    assert (hello.retry.attempts, hello.on_error) == (2, "altNext")


def test_omitted_retries_are_those_of_the_runner() -> None:
    runner = Recorder()
    runner.retry = RetryPolicy(attempts=3, first_delay=1.0, longest_delay=2.0)
    config = {"retry": {"firstDelay": 0.5}}
    behaviour = compiler.compile_behaviour("Note", config, {"Note": runner})
    assert isinstance(behaviour, SideEffect)
    assert behaviour.retry == RetryPolicy(attempts=3, first_delay=0.5, longest_delay=2.0)


def test_the_settings_of_a_runner_limit_its_retries() -> None:
    runners = make_runners(settings_file.load({"SEQUENCERD_EMAIL_ATTEMPTS": "3"}))
    assert runners["Email"].retry.attempts == 3
    assert runners["SMS"].retry.attempts is None


def test_json_is_yaml_too_and_a_file_may_hold_several(tmp_path: Path) -> None:
    one = '{"name": "a", "steps": [{"name": "x", "type": "GoTo"}]}'
    other = one.replace('"a"', '"b"')
    found = read(tmp_path, f"{one}\n---\n{other}\n---\n")
    assert [definition.sequence.name for definition in found] == ["a", "b"]


def steps(*lines: str) -> str:
    return "name: s\nsteps:\n" + "".join(f"  - {{{line}}}\n" for line in lines)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no sequence"),
        ("- 1", "file.yaml:1: error: must be a mapping"),
        ("name: [", "file.yaml"),
        ("name: s", "file.yaml:1: error: s: steps: is missing"),
        (
            "name: s\nreentry: {policy: always}\nsteps: []",
            "file.yaml:2: error: s: reentry.after: is missing",
        ),
        ("name: s\nsteps: []", "steps: must not be empty"),
        (
            GOOD.replace("timezone", "timzone"),
            "file.yaml:3: error: s: timzone: a sequence has no key 'timzone'",
        ),
        (GOOD.replace("Europe/Berlin", "Europe/Berlln"), "did you mean 'Europe/Berlin'"),
        (
            GOOD.replace("unit: days", "unit: dayz"),
            "file.yaml:11: error: s/pause: unit: 'dayz' is not a unit of time",
        ),
        (
            GOOD.replace("amount: 3", "amount: '3'"),
            "file.yaml:11: error: s/pause: amount: must be a number",
        ),
        (GOOD.replace("altNext: bye", "altNext: buy"), "did you mean 'bye'"),
        (GOOD.replace("attempts: 2", "attempts: 0"), "s/hello: retry.attempts"),
        (GOOD.replace("name: pause", "name: hello"), "step 'hello' is defined twice"),
        (GOOD + "---\n" + GOOD, "sequence 's' is defined twice"),
        ("name: s\nname: t", "the key 'name' is given twice"),
        ("1: s", "must be text"),
        (steps("name: a, type: WaitForDurations"), "did you mean 'WaitForDuration'"),
        (steps("name: a, type: Note, config: {bad: 1}"), "s/a: bad: this key is not known"),
        (steps("name: a, type: GoTo, config: {step: b}"), "step 'b' does not exist"),
        (steps("name: a, type: GoTo, next: a"), "never waits"),
        (
            steps("name: a, type: GoTo, next: b", "name: b, type: GoTo, next: a"),
            "file.yaml:4: error: s/b: it is part of a cycle that never waits",
        ),
        (steps("name: a, type: WaitForDate, config: {date: soon}"), "not an ISO 8601 date"),
        (
            steps("name: a, type: WaitForDateComparison, config: {attribute: hour, values: [24]}"),
            "hour is never 24",
        ),
        (
            steps(
                "name: a, type: Goal, config: {lodashCommand: gtt, value: {type: raw, value: 1}}"
            ),
            "did you mean 'gt'",
        ),
        (
            steps("name: a, type: Note, config: {delivery: sometimes}"),
            "at_most_once",
        ),
    ],
)
def test_a_wrong_file_is_explained(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(FileError) as wrong:
        read(tmp_path, text)
    assert words in str(wrong.value)


def test_all_errors_are_reported_at_once(tmp_path: Path) -> None:
    text = steps("name: a, type: Nope", "name: b, type: GoTo, next: zzz", "name: b, type: GoTo")
    with pytest.raises(FileError) as wrong:
        read(tmp_path, text)
    assert len(str(wrong.value).splitlines()) == 3


def test_a_cycle_with_an_exit_is_valid(tmp_path: Path) -> None:
    condition = "{lodashCommand: eq, value: {type: get, value: data.x}}"
    (definition,) = read(
        tmp_path,
        steps(
            f"name: a, type: Conditional, config: {condition}, next: b, altNext: null",
            "name: b, type: UpdateData, config: {data: {x: true}}, next: a",
        ),
    )
    behaviours = [step.behaviour for step in definition.sequence.steps.values()]
    assert not any(isinstance(behaviour, InvalidStep) for behaviour in behaviours)


@pytest.mark.parametrize(
    ("type_", "config", "reads"),
    [
        (
            "Goal",
            {"lodashCommand": "isNil", "value": {"type": "get", "value": "['external'].x"}},
            True,
        ),
        ("Goal", {"lodashCommand": "eq", "value": {"type": "raw", "value": "external"}}, False),
        ("UpdateData", {"data": {"external": "external"}}, False),
        ("UpdateData", {"data": {"a": ["{{#each data.l}}{{@root.external.x}}{{/each}}"]}}, True),
        ("WaitForDate", {"date": "{{lookup this data.key}}"}, True),
        ("WaitForDate", {"date": "{{data.external}}"}, False),
        ("Score", {"what": "external"}, True),
        ("Score", {"what": "externals"}, False),
    ],
)
def test_which_steps_read_external_data(type_: str, config: dict[str, object], reads: bool) -> None:
    assert compiler.reads_external(type_, config) is reads


def test_a_wait_keeps_nothing_of_its_parsed_config() -> None:
    """Millions of steps fit into memory: a wait keeps its function, not what that was made of."""

    def configs() -> set[int]:
        gc.collect()
        return {id(one) for one in gc.get_objects() if isinstance(one, WaitForDurationConfig)}

    before = configs()
    behaviour = compiler.compile_behaviour("WaitForDuration", {"amount": 1234, "unit": "hours"}, {})
    assert behaviour.exits
    assert configs() <= before
