"""Texts and partials in files of their own."""

from __future__ import annotations

import json
from pathlib import Path

import asyncpg
import pytest

from sequencerd.definitions import included
from sequencerd.definitions.files import read_file, read_files
from sequencerd.definitions.yaml_writer import to_yaml
from sequencerd.errors import FileError
from tests.helpers.command_line import Command
from tests.helpers.plans import RUNNERS

FILE = """
name: trial
partials:
  layout: "<html>{{> @partial-block}}{{> footer}}</html>"
steps:
  - name: welcome
    type: Email
    config:
      from: hello@example.com
      to: "{{data.email}}"
      subject: Welcome
      html: {file: mails/welcome.html}
      text: {en: {file: welcome.txt}, de: "Hallo {{> footer}}"}
  - name: reminder
    type: Email
    config:
      from: hello@example.com
      to: "{{data.email}}"
      subject: Still there?
      html: "{{#> layout}}{{data.name}}{{/layout}}"
  - name: text
    type: Email
    config: {from: hello@example.com, to: "{{data.email}}", subject: Bye, text: Bye}
"""


@pytest.fixture
def trial(tmp_path: Path) -> Path:
    (tmp_path / "mails").mkdir()
    (tmp_path / "partials").mkdir()
    (tmp_path / "mails/welcome.html").write_text("\ufeff{{#> layout}}<p>Hi</p>{{/layout}}\r\n")
    (tmp_path / "welcome.txt").write_text("Hi {{> footer}}")
    (tmp_path / "partials/footer.html").write_text("-- {{data.name}}")
    (tmp_path / "partials/unused.txt").write_text("{{#if}}")
    (tmp_path / "partials/picture.png").write_bytes(b"\xff")
    (tmp_path / "trial.yaml").write_text(FILE)
    return tmp_path / "trial.yaml"


def test_files_take_the_place_of_texts(trial: Path) -> None:
    (definition,) = read_file(trial, RUNNERS)
    config = definition.sequence.steps["welcome"].config
    assert config["html"] == "{{#> layout}}<p>Hi</p>{{/layout}}\n"
    assert config["text"] == {"en": "Hi {{> footer}}", "de": "Hallo {{> footer}}"}
    assert dict(definition.sequence.shared.partials) == {
        "layout": "<html>{{> @partial-block}}{{> footer}}</html>",
        "footer": "-- {{data.name}}",
    }


def test_errors_name_the_file_and_its_line(trial: Path) -> None:
    (trial.parent / "mails/welcome.html").write_text("<p>\n{{dat x}}\n{{nmae}}")
    (trial.parent / "partials/footer.html").write_text("\n{{#if}}")
    _, findings = read_files([trial], RUNNERS)
    told = [str(finding).removeprefix(f"{trial.parent}/") for finding in findings]
    assert any(
        line.startswith(
            "mails/welcome.html:2: error: trial/welcome: html: line 2: the template calls"
        )
        for line in told
    ), told
    broken = [line for line in told if "is not closed" in line]
    assert len(broken) == 1, "a partial is told once, not for each step"
    assert broken[0].startswith("partials/footer.html:2: error: trial: partials.footer: line 2")


def test_files_outside_of_the_folder_are_refused(trial: Path, tmp_path: Path) -> None:
    outside = tmp_path.parent / "outside.txt"
    outside.write_text("secret")
    (trial.parent / "link.txt").symlink_to(outside)
    (trial.parent / "latin.txt").write_bytes(b"\xe4")
    (trial.parent / "big.txt").write_text("x" * 300_000)
    for name, says in (
        (str(outside), "outside of the folder"),
        ("../outside.txt", "outside of the folder"),
        ("link.txt", "outside of the folder"),
        ("nowhere.txt", "No such file"),
        ("mails", "Is a directory"),
        ("latin.txt", "not in UTF-8"),
        ("big.txt", "more than 262144 characters"),
        ("\0", "cannot be read"),
    ):
        with pytest.raises(included.IncludedError, match=says):
            included.read(trial.parent, name)
    trial.write_text(FILE.replace("welcome.txt", "../outside.txt"))
    with pytest.raises(FileError, match=r"trial.yaml:13: error: trial/welcome: text.en.file: "):
        read_file(trial, RUNNERS)


def test_two_files_of_one_partial_are_refused(trial: Path) -> None:
    (trial.parent / "partials/footer.txt").write_text("x")
    with pytest.raises(FileError, match=r"footer\.html and footer\.txt are the same partial"):
        read_file(trial, RUNNERS)


async def test_partials_are_planned_applied_and_rolled_back(
    sequencerd: Command, connection: asyncpg.Connection, trial: Path
) -> None:
    sequencerd("apply", "trial.yaml")
    assert sequencerd("plan", "trial.yaml") == "trial: nothing changed\n"
    first = sequencerd("export", "trial")
    (trial.parent / "partials/footer.html").write_text("-- {{data.name}} & Co")
    assert sequencerd("plan", "trial.yaml").splitlines()[:2] == [
        "trial:",
        "  changed partial footer: a message of 2 steps changes: welcome, reminder",
    ]
    sequencerd("apply", "trial.yaml")
    revisions = await connection.fetchval("SELECT count(*) FROM sequencer.revisions")
    assert revisions == 2
    assert "changed partial footer: a message of 2 steps changes" in sequencerd("history", "trial")
    document = json.loads(await connection.fetchval("SELECT sequencer.document('trial')"))
    assert document["partials"]["footer"] == "-- {{data.name}} & Co"
    (trial.parent / "alone").mkdir()
    exported = trial.parent / "alone/trial.yaml"
    exported.write_text(to_yaml(document))
    assert sequencerd("plan", "alone/trial.yaml") == "trial: nothing changed\n"
    exported.write_text(first)
    assert "changed partial footer" in sequencerd("apply", "alone/trial.yaml")
    shown = sequencerd(
        "preview", "trial", "reminder", "--html", "--data", '{"email": "a@x.org", "name": "<A>"}'
    )
    assert "&lt;A&gt;-- &lt;A&gt;</html>" in shown
    with pytest.raises(asyncpg.CheckViolationError):
        await connection.execute("UPDATE sequencer.sequences SET partials = '{\"a\": 1}'")
