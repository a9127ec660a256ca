"""`check`: every error and warning of a file, at its line."""

from __future__ import annotations

import json
import re
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

import asyncpg
import pytest
import yaml
from jsonschema import Draft202012Validator

from sequencerd.cli import main
from sequencerd.core.enrollment import Enrollment
from sequencerd.core.view import view
from sequencerd.definitions import yaml_reader
from sequencerd.definitions.check import ROOT_KEYS, known_paths
from sequencerd.definitions.files import FileFinding, check_documents, read_all, read_files
from sequencerd.definitions.yaml_reader import DocumentError, parse, read_documents
from sequencerd.errors import FileError
from sequencerd.runners.registry import make_runners
from sequencerd.settings_file import load
from tests.helpers.command_line import Command
from tests.helpers.engines import Recorder
from tests.test_readme import REPOSITORY, blocks

RUNNERS = {
    **make_runners(load({"SEQUENCERD_SMS_ACCOUNT_SID": "AC1", "SEQUENCERD_SMS_AUTH_TOKEN": "x"})),
    "Note": Recorder(),
}
FILES = Path(__file__).parent / "files"


def check(path: Path, text: str) -> list[FileFinding]:
    path.write_text(text)
    return read_files([path], RUNNERS)[1]


@pytest.mark.parametrize("name", ["wrong", "doubtful"])
def test_everything_is_reported_at_once_and_at_its_line(name: str) -> None:
    file = FILES / f"{name}.yaml"
    expected = [
        (number, severity, words.strip())
        for number, line in enumerate(file.read_text().splitlines(), 1)
        if "#" in line
        for severity, words in re.findall(r"(?:# | & )(error|warning): (.*?)(?= & |$)", line)
    ]
    found = [str(finding) for finding in read_files([file], RUNNERS)[1]]
    told = "\n".join(found)
    for number, severity, words in expected:
        start = f"{file}:{number}: {severity}: "
        matches = [line for line in found if line.startswith(start) and words in line]
        assert matches, f"not told: {number}: {severity}: {words}\n{told}"
        found.remove(matches[0])
    assert found == [], "told, and not expected"


def test_paths_begin_with_the_fields_of_an_enrollment() -> None:
    now = datetime.now(UTC)
    enrollment = Enrollment(1, "ada", "{}", now, uuid4(), None, now, "s", "a", None)
    assert set(view(enrollment, "UTC", now, {})) == set(ROOT_KEYS)


def test_the_examples_have_neither_errors_nor_warnings() -> None:
    files = sorted(REPOSITORY.glob("examples/*.yaml"))
    found, findings = read_files(files, {**RUNNERS, "Score": Recorder()})
    assert (len(found), findings) == (len(files), [])


def test_an_error_in_a_block_of_text_is_reported_at_its_line(tmp_path: Path) -> None:
    text = """\
name: s
steps:
  - name: a
    type: Email
    config:
      from: a@example.com
      to: b@example.com
      subject: x
      text: |
        Hello,

        {{#if data.x}}{{dat data.due}}{{/if}}
        {{> footer}}
      html: >-
        {{#if x}}
"""
    found = [(f.line, f.message) for f in check(tmp_path / "f.yaml", text)]
    assert [(line, message.split(":")[0]) for line, message in found] == [
        (12, "text"),
        (13, "text"),
        (14, "html"),
    ]
    assert "unknown helper 'dat'" in found[0][1]
    assert "no partial 'footer'" in found[1][1]


def test_a_custom_runner_for_messages_need_not_have_the_built_in_templates(tmp_path: Path) -> None:
    file = tmp_path / "f.yaml"
    file.write_text("name: s\nsteps: [{name: a, type: SMS, config: {body: '{{'}}]")
    assert read_files([file], {"SMS": Recorder()})[1] == []


def test_a_sequence_in_another_file_counts(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(
        "name: a\nsteps: [{name: x, type: GoTo, config: {sequence: b, step: z}}]"
    )
    (tmp_path / "b.yaml").write_text("name: b\nsteps: [{name: y, type: Note, altNext: null}]")
    found = read_files([tmp_path / "a.yaml", tmp_path / "b.yaml"], RUNNERS)[1]
    assert [finding.message for finding in found] == [
        "step: step 'z' does not exist in sequence 'b'; available: y"
    ]
    with pytest.raises(FileError, match="'z' does not exist in sequence 'b'"):
        read_all([tmp_path / "a.yaml", tmp_path / "b.yaml"], RUNNERS)
    assert read_files([tmp_path / "a.yaml"], RUNNERS)[1] == []
    (tmp_path / "b.yaml").write_text("name: a\nsteps: [{name: y, type: Note, altNext: null}]")
    (twice,) = read_files([tmp_path / "a.yaml", tmp_path / "b.yaml"], RUNNERS)[1]
    assert str(twice).endswith(f"sequence 'a' is defined twice, first in {tmp_path}/a.yaml:1")


PATHS = """\
name: p
steps:
  - {name: note, type: UpdateData, config: {data: {greeted: true}}}
  - name: mail
    type: Email
    config:
      from: a@x.org
      to: "{{data.email}}"
      subject: "{{data.nmae}}, {{data.user.city}}"
      text: "{{data.greeted}} {{data.tags.[0]}} {{data.user.town}} {{default data.nick data.name}}"
    next: null
  - name: paid
    type: Goal
    config:
      lodashCommand: eq
      value: {type: get, value: data.paid}
      compareTo: {type: raw, value: true}
"""
EXAMPLE = {"name": "Ada", "email": "a@x.org", "tags": ["x"], "user": {"town": "Bonn"}}
UNKNOWN = [
    (9, "subject: no data has the path 'data.nmae'; did you mean 'data.name'?"),
    (9, "subject: no data has the path 'data.user.city'"),
    (10, "text: no data has the path 'data.nick'"),
    (16, "value.value: no data has the path 'data.paid'"),
]


def test_paths_are_compared_with_an_example_of_data(tmp_path: Path) -> None:
    file = tmp_path / "p.yaml"
    file.write_text(PATHS)
    known = {"p": known_paths([EXAMPLE])}
    found = read_files([file], RUNNERS, known)[1]
    assert [(one.line, one.message) for one in found] == UNKNOWN
    assert not any(one.is_error for one in found)
    assert read_files([file], RUNNERS)[1] == []
    complete = {**EXAMPLE, "nmae": "", "nick": None, "paid": False, "user": None}
    assert read_files([file], RUNNERS, {"p": known_paths([complete])})[1] == []


GETS = """\
name: p
steps:
  - name: which
    type: Switch
    config:
      cases:
        - when:
            any:
              - {lodashCommand: isNil, value: {type: get, value: "data.orders[0].id"}}
              - {lodashCommand: isNil, value: {type: get, value: "data['a key'].x"}}
              - {lodashCommand: isNil, value: {type: get, value: [data, a.key]}}
              - {lodashCommand: isNil, value: {type: get, value: data.name.length}}
              - {lodashCommand: isNil, value: {type: get, value: "data['a key'].y"}}
              - {lodashCommand: isNil, value: {type: get, value: [data, nmae]}}
          step: null
  - name: copy
    type: UpdateData
    config: {data: {new: {get: data.nmae}, others: [{get: "data.orders[1]"}, {get: data.new.x}]}}
  - {name: tell, type: Enroll, config: {sequence: p, data: {name: {get: data.nmae}}}}
"""


def test_paths_in_every_form_are_compared(tmp_path: Path) -> None:
    file = tmp_path / "p.yaml"
    file.write_text(GETS)
    example = {"name": "Ada", "orders": [{"id": 7}], "a key": {"x": 1}, "a.key": 1}
    found = read_files([file], RUNNERS, {"p": known_paths([example])})[1]
    assert [(one.line, one.message.partition(": no data has the path ")[2]) for one in found] == [
        (13, "'data.a key.y'; did you mean 'data.a key.x'?"),
        (14, "'data.nmae'; did you mean 'data.name'?"),
        (18, "'data.nmae'; did you mean 'data.name'?"),
        (19, "'data.nmae'; did you mean 'data.name'?"),
    ]


def test_only_messages_have_a_link_to_unsubscribe_and_only_with_its_settings(
    tmp_path: Path,
) -> None:
    file = tmp_path / "u.yaml"
    file.write_text(
        "name: u\nsteps:\n"
        "  - {name: set, type: UpdateData, config: {data: {link: '{{unsubscribe_url}}'}}}\n"
        "  - name: mail\n    type: Email\n    config:\n      from: a@x.org\n      to: b@x.org\n"
        "      subject: x\n      text: '{{unsubscribe_url}}'\n"
    )
    settings = {
        "SEQUENCERD_UNSUBSCRIBE_URL": "https://x.org",
        "SEQUENCERD_UNSUBSCRIBE_KEYS": "k" * 32,
    }
    (found,) = read_files([file], make_runners(load(settings)))[1]
    assert (found.line, found.step, found.is_error) == (3, "set", False)
    told = [one for one in read_files([file], RUNNERS)[1] if one.is_error]
    assert [(one.line, one.message) for one in told] == [
        (10, "text: unsubscribe_url would be empty: set unsubscribe.url and unsubscribe.keys")
    ]


def test_an_exported_step_that_leads_to_a_goal_says_so(sequencerd: Command, tmp_path: Path) -> None:
    file = tmp_path / "s.yaml"
    file.write_text(
        "name: s\nsteps:\n"
        "  - {name: jump, type: GoTo, config: {step: week}}\n"
        "  - {name: week, type: WaitForDuration, config: {amount: 1, unit: week}, next: paid}\n"
        "  - name: paid\n    type: Goal\n"
        "    config: {lodashCommand: has, value: {type: get, value: data}}\n"
    )
    sequencerd("apply", str(file))
    file.write_text(sequencerd("export", "s"))
    assert "next: paid" in file.read_text()
    assert "0 errors, 0 warnings" in sequencerd("check", str(file))


def test_a_custom_runner_may_add_data_but_no_typing_errors(tmp_path: Path) -> None:
    file = tmp_path / "p.yaml"
    file.write_text(f"{PATHS}  - {{name: own, type: Note, altNext: null}}\n")
    found = read_files([file], RUNNERS, {"p": known_paths([EXAMPLE])})[1]
    assert [one.message for one in found] == [UNKNOWN[0][1]]


async def test_paths_are_compared_with_the_data_in_the_database(
    sequencerd: Command, connection: asyncpg.Connection, tmp_path: Path
) -> None:
    (tmp_path / "p.yaml").write_text(PATHS)
    assert "0 warnings" in sequencerd("check", "p.yaml")  # nothing is known yet
    sequencerd("apply", "p.yaml")
    await connection.execute(
        "INSERT INTO sequencer.enrollments (sequence, subject, data) VALUES ('p', 'ada', $1)",
        json.dumps(EXAMPLE),
    )
    told = sequencerd("check", "p.yaml")
    assert "p.yaml:9: warning: p/mail: subject: no data has the path 'data.nmae'" in told
    assert f"{len(UNKNOWN)} warnings" in told
    assert "0 warnings" in sequencerd(
        "check",
        "p.yaml",
        "--data",
        json.dumps(
            {
                **EXAMPLE,
                "nmae": "",
                "nick": "",
                "paid": True,
                "user": {"town": "", "city": ""},
            }
        ),
    )


def test_a_simulation_warns_of_paths_missing_in_its_data(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "p.yaml").write_text(PATHS)
    arguments = ["simulate", str(tmp_path / "p.yaml"), "--data", json.dumps(EXAMPLE)]
    with pytest.raises(SystemExit):
        main([*arguments, "--set", 'P1D: {"paid": true, "nick": "A"}'])
    warned = capsys.readouterr().err.splitlines()
    assert warned == [f"warning: p/mail: {message}" for _, message in UNKNOWN[:2]]


# --- documents


def test_documents_are_checked_together_wherever_they_come_from() -> None:
    """The import and the demo have no files."""
    written = {
        "first": "{name: a, steps: [{name: on, type: GoTo, config: {sequence: b, step: x}}]}",
        "second": "name: b\nsteps:\n  - {name: y, type: GoTo}",
        "third": "name: [c",
    }
    found, findings = check_documents({origin: parse(text) for origin, text in written.items()}, {})
    assert [definition.sequence.name for definition in found] == ["b"]
    lines = [str(finding) for finding in findings if finding.is_error]
    assert lines[0].startswith(
        "first:1: error: a/on: step: step 'x' does not exist in sequence 'b'"
    )
    assert lines[1].startswith("third:1: error: while parsing a flow sequence")
    assert len(lines) == 2


# --- YAML and JSON


def documents(tmp_path: Path, content: str | bytes, suffix: str = ".yaml") -> list[object]:
    file = tmp_path / f"file{suffix}"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return [document.value for document in read_documents(file)]


def test_values_are_those_of_json(tmp_path: Path) -> None:
    text = "[1, -2, 1e3, .5, 0x1f, 007, 12:30, 2018-06-08, yes, on, true, ~, null, 1_0, '1', <<]"
    expected = [
        1,
        -2,
        1000.0,
        0.5,
        31,
        7,
        "12:30",
        "2018-06-08",
        "yes",
        "on",
        True,
        None,
        None,
        "1_0",
        "1",
        "<<",
    ]
    assert documents(tmp_path, text) == [expected]


def test_json_is_read_as_json(tmp_path: Path) -> None:
    value = {"a": "😀\t\\/", "b": [1e3, -0.5, None, True], "c": {"yes": "no"}}
    text = json.dumps(value, indent="\t")
    assert "\\ud83d" in text
    assert documents(tmp_path, text, ".json") == [value]


def test_anchors_and_merge_keys(tmp_path: Path) -> None:
    text = "a: &a {x: 1, y: 1}\nb: {<<: *a, y: 2}\nc: {<<: [{z: 3}, *a], x: 4}\nd: *a"
    (value,) = documents(tmp_path, text)
    assert value == {
        "a": {"x": 1, "y": 1},
        "b": {"x": 1, "y": 2},
        "c": {"z": 3, "x": 4, "y": 1},
        "d": {"x": 1, "y": 1},
    }


@pytest.mark.parametrize(
    "content", [b"\xef\xbb\xbfa: 1", "a: 1".encode("utf-16"), b"a: 1\r\n", b"%YAML 1.2\n---\na: 1"]
)
def test_common_encodings_are_read(tmp_path: Path, content: bytes) -> None:
    assert documents(tmp_path, content) == [{"a": 1}]


@pytest.mark.parametrize(
    ("content", "line", "words"),
    [
        ("a: 1\nb: .inf", 2, "'.inf' is not a JSON value (float)"),
        ("a: !!python/name:os.system x", 1, "is not a JSON value (python/name:os.system)"),
        ("a: !!int x", 1, "'x' is not a JSON value (int)"),
        ("a: !!binary aGk=", 1, "is not a JSON value (binary)"),
        ("\na: !mine {}", 2, "the tag '!mine' is not supported"),
        ("a: " + "9" * 5000, 1, "is not a JSON value (int)"),
        ("a: 1\n2: b", 2, "the key 2 must be text"),
        ("? [a]\n: b", 1, "the key must be text"),
        ("a: 1\nb: 1\na: 2", 3, "the key 'a' is given twice"),
        ("<<: 1", 1, "<< needs a mapping"),
        ('a: "\\0"', 1, "PostgreSQL cannot hold"),
        ('a: "\\ud800"', 1, "half of a surrogate pair"),
        (b"a: 1\nb: \xff", 2, "not in UTF-8"),
        (b"a: 1\nb: \x01", 2, "0x01 is not allowed here"),
        ("a:\n\tb: 1", 2, "'\\t'"),
        ("a: 1\nb: [", 2, "expected the node content"),
        ("a: 1\nb: *c", 2, "undefined alias 'c'"),
        ("a: &a [*a]", 1, "nested more than 50 levels deep"),
        ("a: &a {<<: *a}", 1, "nested more than 50 levels deep"),
        ("[" * 100_000, 1, "nested more than 50 levels deep"),
        ("- " * 1000, 1, "nested more than 50 levels deep"),
        ("a: 1\n" * 300_000, 1, "more than 1048576 bytes"),
    ],
)
def test_unreadable_files_are_errors(
    tmp_path: Path, content: str | bytes, line: int, words: str
) -> None:
    with pytest.raises(DocumentError) as wrong:
        documents(tmp_path, content)
    assert words in str(wrong.value)
    assert wrong.value.line == line


def test_a_file_with_too_many_values_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(yaml_reader, "MAX_VALUES", 100)
    assert documents(tmp_path, "[" + "1," * 99 + "]") == [[1] * 99]
    with pytest.raises(DocumentError, match="more than 100 values") as wrong:
        documents(tmp_path, "[\n" + "1," * 101 + "]")
    assert wrong.value.line == 2


@pytest.mark.slow
@pytest.mark.parametrize("form", ["[{}]", "{{<<: [{}]}}"], ids=["aliases", "merges"])
def test_aliases_that_expand_without_end_are_refused(tmp_path: Path, form: str) -> None:
    lines = ["a0: &a0 {x: 1}"]
    lines += [f"a{n + 1}: &a{n + 1} {form.format(', '.join([f'*a{n}'] * 9))}" for n in range(20)]
    began = time.process_time()
    with pytest.raises(DocumentError, match="more than 50000 values"):
        documents(tmp_path, "\n".join(lines))
    assert time.process_time() - began < 60


def test_sequences_before_a_syntax_error_are_checked(tmp_path: Path) -> None:
    text = "name: s\nsteps: [{name: a, type: Nope}]\n---\nname: ["
    found = check(tmp_path / "f.yaml", text)
    assert [finding.line for finding in found] == [2, 4]


# --- the command


def command(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[object, str]:
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return ended.value.code, capsys.readouterr().out


GOOD = "name: s\nsteps: [{name: a, type: GoTo}]"
DOUBTED = "name: s\nsteps: [{name: a, type: GoTo, next: null}, {name: b, type: GoTo}]"


def test_the_exit_code_says_whether_there_are_errors(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "f.yaml"
    file.write_text(GOOD)
    assert command(capsys, "check", file) == (0, "1 valid sequence, 0 errors, 0 warnings\n")
    assert command(capsys, "check", "--json", file) == (0, "[]\n")
    file.write_text(DOUBTED)
    assert command(capsys, "check", file)[0] == 0
    assert command(capsys, "check", "--strict", file)[0] == 1
    file.write_text("name: s")
    code, out = command(capsys, "check", file)
    assert (code, out.splitlines()[0]) == (1, f"{file}:1: error: s: steps: is missing")


def test_findings_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "f.yaml"
    file.write_text(DOUBTED)
    code, out = command(capsys, "check", "--json", file)
    assert code == 0
    (finding,) = json.loads(out)
    assert finding == {
        "file": str(file),
        "line": 2,
        "severity": "warning",
        "sequence": "s",
        "step": "b",
        "message": "unreachable: no step leads here; name it as the next of another step",
    }


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nowhere.yaml", "nowhere.yaml:1: error: cannot be read: No such file or directory"),
        (".", "is a folder: name its files, such as"),
        ("empty.yaml", "it contains no sequence"),
    ],
)
def test_paths_that_are_not_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, words: str
) -> None:
    (tmp_path / "empty.yaml").write_text("# nothing\n---\n")
    code, out = command(capsys, "check", tmp_path / name)
    assert code == 1
    assert words in out


def test_a_finding_is_one_line_for_any_names(tmp_path: Path) -> None:
    text = json.dumps({"name": "a\nb\x1b[31m", "steps": [{"name": "x\ty", "type": "Nope"}]})
    (finding,) = check(tmp_path / "f.json", text)
    assert str(finding).isprintable()


# --- docs/files.md

SHOWN = """\
name: trial
steps:
  - name: pause
    type: WaitForDuration
    config:
      {amount: 3, unit: dayz}
    altNext: tips
  - name: mail
    type: Email
    config:
      from: a@example.com
      to: "{{email}}"
      subject: Hello
      text: Hello
    next: null
  - name: lost
    type: Goal
    config: {lodashCommand: isNil, value: {type: get, value: data.x}}
"""


@pytest.mark.slow
async def test_the_page_about_files_can_be_followed(
    tmp_path: Path, sequencerd: Command, connection: asyncpg.Connection
) -> None:
    found = blocks(REPOSITORY / "docs/files.md")
    trial, _, first_line = [text for language, text in found if language == "yaml"]
    (tmp_path / "trial.yaml").write_text(first_line + trial)
    (tmp_path / "wrong.yaml").write_text(SHOWN)
    checked, planned = [text for language, text in found if language == "text"]
    assert sequencerd("check", "wrong.yaml", code=1) == checked
    for text in (text for language, text in found if language == "sh"):
        said = sequencerd.follow(text)
        if "apply" in text:
            assert "added two-weeks (WaitForDuration)\n" in said
        elif "schema" not in text:
            assert said == "1 valid sequence, 0 errors, 0 warnings\n"
    await connection.execute(
        "INSERT INTO sequencer.enrollments (sequence, subject, step)"
        " SELECT 'trial', n, 'two-weeks' FROM generate_series(1, 412) AS n"
    )
    await connection.execute(
        "UPDATE sequencer.enrollments SET entered_at = now() - interval '1 day' *"
        " CASE WHEN subject::integer <= 37 THEN 12 ELSE 3 END, wake_at = now() + interval '9 days'"
    )
    (tmp_path / "trial.yaml").write_text(trial.replace("14", "10"))
    told, wanted = (
        re.sub(r"[-0-9]{10} [:0-9]{8}Z", "TIME", text.rpartition(" --plan ")[0])
        for text in (sequencerd("plan", "trial.yaml"), planned)
    )
    assert told == wanted
    (command,) = [text for language, text in found if "schema" in text and language == "sh"]
    schema_file = tmp_path / command.split()[-1]
    assert schema_file.name in first_line
    schema = json.loads(schema_file.read_text())
    Draft202012Validator(schema).validate(yaml.safe_load(trial))


# --- all pages

PAGES = [
    page
    for page in sorted((REPOSITORY / "docs").glob("*.md"))
    if page.name != "recipes.md" and any(language == "yaml" for language, _ in blocks(page))
]
MESSAGE = {"from": "a@x.org", "to": "b@x.org", "subject": "s", "text": "t"}


def completed(shown: Any) -> dict[str, Any]:
    """Make a sequence of what a page shows of one: its steps, one of them, or keys."""
    if isinstance(shown, list):
        return {"name": "shown", "steps": shown}
    if "type" in shown:
        return {"name": "shown", "steps": [{"name": "step", **shown}]}
    if shown.keys() & {"name", "enroll"}:
        return {"name": "shown", "steps": [{"name": "step", "type": "GoTo"}], **shown}
    config = {**MESSAGE, **{key: shown[key] for key in shown.keys() - {"partials"}}}
    return {
        "name": "shown",
        "partials": shown.get("partials", {}),
        "steps": [{"name": "step", "type": "Email", "config": config}],
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_definitions_of_a_page_are_valid(page: Path, tmp_path: Path) -> None:
    """Whole sequences have no warnings either. Of parts, steps that they name are elsewhere."""
    for name in ("welcome.html", "welcome.en.txt", "welcome.de.txt", "layout.html"):
        (tmp_path / name).touch()
    file = tmp_path / "shown.json"
    for text in (text for language, text in blocks(page) if language == "yaml"):
        for shown in filter(None, yaml.safe_load_all(text)):
            sequence = completed(shown)
            file.write_text(json.dumps(sequence))
            found = [
                str(finding)
                for finding in read_files([file], {**RUNNERS, "Push": Recorder()})[1]
                if sequence == shown
                or (finding.is_error and not re.search("step '.*' does not", finding.message))
            ]
            assert found == [], text


# --- cycles

MAIL = "{from: a@x.org, to: b@x.org, subject: x, text: y}"
HOLDS = "{lodashCommand: eq, value: {type: get, value: data.a}, compareTo: {type: raw, value: 1}}"
AT_NINE = "{name: wait, type: WaitForDateComparison, config: {attribute: hour, values: [9]}}"


@pytest.mark.parametrize(
    ("steps", "severity", "words"),
    [
        ([AT_NINE], "warning", 'wait does not wait if it matches already (write "occurrence'),
        (["{name: wait, type: WaitForDate, config: {date: 2026-01-01}}"], "error", "never waits"),
        (["{name: wait, type: WaitForDate, config: {date: '{{data.d}}'}}"], "warning", "is past"),
        (
            [f"{{name: wait, type: WaitForCondition, config: {HOLDS}}}"],
            "warning",
            "if its condition is true",
        ),
        ([f"{{name: wait, type: Goal, config: {HOLDS}}}"], "warning", "if its condition is true"),
        (
            ["{name: wait, type: WaitForDuration, config: {amount: 0, unit: days}}"],
            "error",
            "never waits",
        ),
        ([f"{{name: wait, type: Conditional, config: {HOLDS}}}"], "error", "never waits"),
        (["{name: wait, type: Split, config: {next: 1, altNext: 1}}"], "error", "never waits"),
        (["{name: wait, type: GoTo}"], "error", "never waits"),
        (["{name: wait, type: UpdateData, config: {data: {x: 1}}}"], "error", "never waits"),
        (["{name: wait, type: Note}"], "warning", "only if a runner answers noop"),
        (
            [
                (
                    "{name: wait, type: WaitForDateComparison, config: {attribute: isoWeekday,"
                    " values: [1, 2, 3, 4, 5, 6, 7]}}"
                )
            ],
            "error",
            "never waits",
        ),
        ([AT_NINE.replace("}}", ", occurrence: next}}")], None, ""),
        (["{name: wait, type: WaitForDuration, config: {amount: 1, unit: day}}"], None, ""),
        (["{name: wait, type: WaitForDuration, config: {amount: 0.4, unit: day}}"], "error", ""),
        # the original's way to say "once a day": nine, and no longer nine
        (
            [
                AT_NINE,
                (
                    "{name: pause, type: WaitForDateComparison, config: {attribute: hours,"
                    " values: [8, 10]}}"
                ),
            ],
            None,
            "",
        ),
        (
            [
                AT_NINE,
                (
                    "{name: pause, type: WaitForDateComparison, config: {attribute: hour,"
                    " values: [9, 10]}}"
                ),
            ],
            "warning",
            "wait",
        ),
        (
            [AT_NINE, "{name: pause, type: WaitForDuration, config: {amount: 1, unit: hour}}"],
            None,
            "",
        ),
        (
            [
                (
                    "{name: wait, type: Conditional,"
                    " config: {lodashCommand: isNil, value: {type: raw, value: 1}}, altNext: out}"
                )
            ],
            None,
            "",
        ),
    ],
)
def test_a_cycle_that_may_not_wait_is_reported(
    tmp_path: Path, steps: list[str], severity: str | None, words: str
) -> None:
    lines = [f"{{name: welcome, type: Email, config: {MAIL}}}", *steps]
    lines[-1] = lines[-1][:-1] + ", next: welcome}"
    lines.append("{name: out, type: GoTo, next: null}")
    text = "name: s\nsteps:\n" + "".join(f"  - {line}\n" for line in lines)
    told = [str(finding) for finding in check(tmp_path / "s.yaml", text)]
    cycles = [line for line in told if "s/welcome: welcome → " in line]
    if severity is None:
        assert cycles == []
        return
    names = " → ".join([*(re.findall(r"{name: ([\w-]+)", line)[0] for line in lines[:-1])])
    [cycle] = cycles
    assert f":3: {severity}: s/welcome: {names} → welcome " in cycle
    assert words in cycle


def test_a_cycle_through_two_sequences_is_reported(tmp_path: Path) -> None:
    text = (
        f"name: s\nsteps:\n  - {{name: mail, type: Email, config: {MAIL}}}\n"
        "  - {name: over, type: GoTo, config: {sequence: t, step: back}}\n---\n"
        "name: t\nsteps:\n  - {name: back, type: GoTo, config: {sequence: s, step: mail}}\n"
    )
    [told] = check(tmp_path / "s.yaml", text)
    assert told.is_error
    assert "mail → over → t/back → mail never waits" in told.message


MORE = HOLDS.replace("data.a", "data.b")
CHECK = f"{{name: check, type: Conditional, config: {HOLDS}, next: null, altNext: wait}}"
DUE = "{name: wait, type: WaitForDate, config: {date: '{{data.due}}'}, next: check}"
NEVER = "never waits: an enrollment that returns to check without a wait fails with loop; add a"


@pytest.mark.parametrize(
    ("steps", "severity", "words"),
    [
        ([CHECK.replace("wait}", "check}")], "error", f"check → check {NEVER}"),
        (
            [
                (
                    f"{{name: check, type: Switch, next: null, config: {{cases: ["
                    f"{{when: {HOLDS}, step: null}}, {{when: {MORE}, step: check}}]}}}}"
                )
            ],
            "error",
            f"check → check {NEVER}",
        ),
        (
            [
                (
                    "{name: check, type: Split, config: {next: 1, altNext: 1}, next: check,"
                    " altNext: end}"
                )
            ],
            "error",
            f"check → check {NEVER}",
        ),
        (
            [CHECK, "{name: wait, type: GoTo, next: check}"],
            "error",
            f"check → wait → check {NEVER}",
        ),
        ([CHECK, DUE], "warning", "check → wait → check may never wait: wait does not wait if its"),
        (
            [CHECK, DUE.replace("'{{data.due}}'", "2026-01-01")],
            "error",
            f"check → wait → check {NEVER}",
        ),
        # whether both can hold is not known
        (
            [
                CHECK,
                f"{{name: wait, type: Conditional, config: {MORE}, next: check, altNext: end}}",
            ],
            "warning",
            "may never wait: the conditions on this path may hold at the same time; an enrollment",
        ),
        # it only waits for what is not so
        (
            [
                CHECK,
                f"{{name: wait, type: WaitForCondition, config: {HOLDS}, next: check}}",
            ],
            None,
            "",
        ),
        (
            [
                CHECK.replace(HOLDS, f"{{any: [{HOLDS}, {{not: {MORE}}}]}}"),
                f"{{name: wait, type: WaitForCondition, config: {HOLDS}, next: check}}",
            ],
            None,
            "",
        ),
        (
            [
                CHECK.replace(HOLDS, f"{{all: [{HOLDS}, {MORE}]}}"),
                f"{{name: wait, type: WaitForCondition, config: {HOLDS}, next: check}}",
            ],
            "warning",
            "check → wait → check may never wait: wait does not wait if its condition is true",
        ),
        # the next round may be another one
        (
            [CHECK, "{name: wait, type: UpdateData, config: {data: {a: 1}}, next: check}"],
            None,
            "",
        ),
        ([CHECK.replace("data.a", "visit").replace("wait}", "check}")], None, ""),
        (
            [
                "{name: check, type: Enroll, config: {sequence: t}, next: check, altNext: end}",
            ],
            None,
            "",
        ),
        (
            [CHECK, "{name: wait, type: WaitForDuration, config: {hours: 1}, next: check}"],
            None,
            "",
        ),
    ],
)
def test_a_cycle_that_never_ends_is_reported(
    tmp_path: Path, steps: list[str], severity: str | None, words: str
) -> None:
    lines = [*steps, "{name: end, type: GoTo, next: null}"]
    text = "name: s\nsteps:\n" + "".join(f"  - {line}\n" for line in lines)
    told = [str(finding) for finding in check(tmp_path / "s.yaml", text)]
    cycles = [line for line in told if " → " in line]
    if severity is None:
        assert cycles == []
        return
    [cycle] = cycles
    assert f":3: {severity}: s/check: " in cycle
    assert words in cycle


def test_a_long_cycle_of_conditions_that_contradict_each_other_is_not_reported(
    tmp_path: Path,
) -> None:
    """The choices between the two that decide would take hours to combine."""

    def holds(key: str) -> str:
        return HOLDS.replace("data.a", f"data.{key}")

    conditions = [f"{{any: [{holds(f'a{n}')}, {holds(f'b{n}')}]}}" for n in range(300)]
    conditions[150], conditions[-1] = holds("c"), f"{{not: {holds('c')}}}"
    steps = [f"{{name: s{n}, type: Conditional, config: {c}}}" for n, c in enumerate(conditions)]
    steps[-1] = steps[-1][:-1] + ", next: s0}"
    text = "name: s\nsteps:\n" + "".join(f"  - {line}\n" for line in steps)
    assert check(tmp_path / "s.yaml", text) == []
    [told] = check(
        tmp_path / "s.yaml", text.replace("{not: ", "{all: [").replace("}}}, n", "}}]}, n")
    )
    assert "may hold at the same time" in told.message


def test_jumps_that_lead_to_each_other_are_reported(tmp_path: Path) -> None:
    text = (
        "name: s\nsteps:\n  - {name: over, type: GoTo, config: {sequence: t, step: back}}\n---\n"
        "name: t\nsteps:\n  - {name: back, type: GoTo, config: {sequence: s, step: over}}\n"
    )
    [told] = check(tmp_path / "s.yaml", text)
    assert told.is_error
    assert "back → s/over → back never waits" in told.message
    # the second time, it may be refused
    text = text.replace("step: over}}", "step: over}, altNext: end}")
    text += "  - {name: end, type: GoTo, next: null}\n"
    assert "never waits" not in str(check(tmp_path / "s.yaml", text))


GOAL_BEFORE_CYCLE = f"""
name: s
steps:
  - {{name: pause, type: WaitForDuration, config: {{amount: 1, unit: month}}}}
  - {{name: mail, type: Email, config: {MAIL}, next: pause}}
  - name: paid
    type: Goal
    config: {HOLDS[:-1]}REPEAT}}
    next: pause
"""


def test_a_goal_that_leads_once_into_a_cycle_is_reported(tmp_path: Path) -> None:
    file = tmp_path / "s.yaml"
    [told] = check(file, GOAL_BEFORE_CYCLE.replace("REPEAT", ""))
    assert (told.step, told.is_error) == ("paid", False)
    assert "pause → mail → pause: write repeat: true" in told.message
    for repeat in (", repeat: true", ", repeat: false"):
        assert check(file, GOAL_BEFORE_CYCLE.replace("REPEAT", repeat)) == []
    ends = GOAL_BEFORE_CYCLE.replace("REPEAT", "").replace("    next: pause", "    next: null")
    assert check(file, ends) == []


@pytest.mark.slow
def test_many_cycles_are_reported_in_time(tmp_path: Path) -> None:
    steps = [f"  - {{name: m{n}, type: Note, altNext: null}}\n" for n in range(2000)]
    steps[-1] = steps[-1].replace("}\n", ", next: m0}\n")
    start = time.process_time()
    told = check(tmp_path / "s.yaml", "name: s\nsteps:\n" + "".join(steps))
    assert len(told) == 1
    assert time.process_time() - start < 60


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name: s\nsteps: []\n", "steps: must not be empty"),
        (
            "name: s\nreentry: sometimes\nsteps: []\n",
            "reentry: must be 'after_end', 'always', 'never' or a mapping such as {after: ...}",
        ),
        ("name: s\nsteps: 3\n", "steps: must be a list"),
        ("name: s\nsteps:\n  - {name: 5, type: GoTo}\n", "s: step 1: name: must be a text"),
        ("name: s\nsteps:\n  - {name: '', type: GoTo}\n", "s: step 1: name: must not be empty"),
        ("name: s\nsteps:\n  - x\n", "s: step 1: must be a mapping such as {name: ..., type: ...}"),
        (
            "name: s\nsteps:\n  - {name: a, type: WaitForDuration, config: {amount: x, unit: day}}",
            "amount: must be a number or a template such as {{data.days}}",
        ),
        (
            "name: s\nsteps:\n  - {name: a, type: Note, config: {retry: {attempts: 0}}}\n",
            "retry.attempts: must be 1 or more",
        ),
        (
            "name: s\nsteps:\n  - {name: a, type: Split, config: {next: -1, altNext: 1}}\n",
            "next: must be 0 or more",
        ),
        (
            "name: s\nsteps:\n  - {name: a, type: UpdateData, config: {data: {}}}\n",
            "data: must not be empty",
        ),
    ],
)
def test_errors_are_worded_for_a_file(tmp_path: Path, text: str, words: str) -> None:
    found = [str(finding) for finding in check(tmp_path / "s.yaml", text)]
    assert any(words in finding for finding in found), found
    assert not re.search(r"Input|should|valid |items?\b|characters", " ".join(found)), found


@pytest.mark.parametrize(
    ("keys", "is_taken"),
    [
        ("onSuppressed: altNext", True),
        ("expires: {amount: 1, unit: day}, onExpired: altNext", True),
        ("expires: {amount: 1, unit: day}, onExpired: end", False),
        ("onExpired: altNext", False),
    ],
)
def test_exits_of_a_message_that_is_not_sent(tmp_path: Path, keys: str, is_taken: bool) -> None:
    found = check(
        tmp_path / "s.yaml",
        "name: s\nsteps:\n"
        "  - {name: mail, type: Email, next: null, altNext: other, config: {from: a@x.org,"
        f" to: b@x.org, subject: x, text: y, {keys}}}}}\n"
        "  - {name: other, type: WaitForDuration, config: {amount: 1, unit: day}}\n",
    )
    told = " ".join(map(str, found))
    assert ("never taken" not in told and "reach" not in told) == is_taken, told


WORKDAYS = "{attribute: day, values: [1, 2, 3, 4, 5]}"
NINE = "{attribute: hour, values: [9, 10, 11]}"


@pytest.mark.parametrize(
    ("first", "second", "advice"),
    [
        (
            WORKDAYS,
            NINE,
            (
                'of the last of these days: write one WaitForWindow instead, such as {"days": '
                '["mon", "tue", "wed", "thu", "fri"], "from": "09:00", "to": "12:00"}'
            ),
        ),
        (NINE, WORKDAYS, 'such as {"from": "09:00", "to": "12:00", "days": ["mon"'),
        (
            "{attribute: hour, values: [9]}",
            "{attribute: minute, values: [30]}",
            'with from: "09:30", or of a date, WaitForDate with at: "09:30"',
        ),
        ("{attribute: isoWeekday, values: [7]}", "{attribute: hours, values: [9]}", '["sun"]'),
        ("{attribute: month, values: [0]}", "{attribute: date, values: [1]}", "occurrence: next"),
        ("{attribute: day, values: [1], occurrence: next}", NINE, ""),
        ("{attribute: day, values: [1]}", "{attribute: day, values: [2]}", ""),
    ],
)
def test_waits_for_parts_of_a_date_in_a_row_are_reported(
    tmp_path: Path, first: str, second: str, advice: str
) -> None:
    """From Friday's evening, day and then hour sends on Saturday."""
    text = "name: s\nsteps:\n" + "".join(
        f"  - {{name: {name}, type: WaitForDateComparison, config: {config}}}\n"
        for name, config in (("one", first), ("two", second))
    )
    found = check(tmp_path / "s.yaml", text)
    assert len(found) == bool(advice)
    for finding in found:
        assert not finding.is_error
        assert finding.line == 3
        assert finding.message.startswith("next: before two: ")
        assert advice in finding.message


def test_a_recheck_out_of_range_is_named_in_words(tmp_path: Path) -> None:
    text = "name: s\nrecheck: 0\nsteps: [{name: a, type: GoTo}]\n"
    (finding,) = check(tmp_path / "s.yaml", text)
    assert finding.message == "recheck: must be from 1 second to 360 days"
