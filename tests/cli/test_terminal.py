"""What commands and the log print: nothing in it steers a terminal."""

from __future__ import annotations

import asyncio
import io
import json
import re
from contextlib import redirect_stderr
from datetime import UTC, datetime, timedelta
from pathlib import Path

import asyncpg
import pytest
import structlog
import yaml
from rich.cells import cell_len

from sequencerd.cli.output import aligned, busy, laid_out, progress_bar, relative, say
from sequencerd.core.describe import visible
from sequencerd.definitions.yaml_writer import DEFAULTS, to_yaml
from sequencerd.service.logs import make_log
from sequencerd.settings import LogSettings, Settings
from tests.helpers.command_line import Command
from tests.helpers.engines import enroll

HOSTILE = (
    "a\x1b[2J\x1b]0;title\x07b\nforged line\rc\x9b31m\x7f\u202egnp.exe\u2066\u200b\u2028d"
    " [bold]e[/bold] :smile:"
)
SHOWN = (
    r"a\x1b[2J\x1b]0;title\x07b\nforged line\rc\x9b31m\x7f\u202egnp.exe\u2066\u200b\u2028d"
    " [bold]e[/bold] :smile:"
)

OBEYED = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (HOSTILE, SHOWN),
        ("Zoë 😀 日本 café\xa0x", "Zoë 😀 日本 café\xa0x"),
        ("\ud800", r"\ud800"),
        ("\U000e0041", r"\U000e0041"),
        ("\ufeff\u00ad\t\x00", r"\ufeff\xad\t\x00"),
    ],
)
def test_escapes_of_control_characters(text: str, shown: str) -> None:
    assert visible(text) == shown


@pytest.fixture
async def hostile(applied: Command, connection: asyncpg.Connection) -> int:
    """An enrollment whose every text is hostile."""
    id_ = await enroll(connection, "s", HOSTILE, json.dumps({"name": HOSTILE}))
    await connection.execute("UPDATE sequencer.enrollments SET last_error = $1", HOSTILE)
    await connection.execute(
        "INSERT INTO sequencer.events (enrollment_id, sequence, step, visit, at, action,"
        " message) SELECT id, sequence, step, visit, now(), 'noop', $1 FROM sequencer.enrollments",
        HOSTILE,
    )
    return id_


@pytest.mark.slow
async def test_no_command_prints_control_characters(applied: Command, hostile: int) -> None:
    commands = (
        ("list",),
        ("show", str(hostile)),
        ("status",),
        ("history", "s"),
        ("cancel", "--sequence", "s", "--dry-run"),
        ("doctor",),
    )
    for command in commands:
        printed = applied(*command) + applied.errors
        assert not OBEYED.search(printed), command
        assert "\nforged" not in printed, command
        if command[0] in ("list", "show"):
            assert SHOWN in printed, printed


async def test_errors_escape_control_characters(applied: Command) -> None:
    for code, *command in (
        (1, "enroll", HOSTILE, "x"),
        (1, "enroll", "s", "x", "--step", HOSTILE),
        (1, "history", HOSTILE),
        (1, "status", HOSTILE),
        (2, "list", "--status", HOSTILE),
        (2, "show", HOSTILE),
        (2, HOSTILE),
    ):
        applied(*command, code=code)
        assert not OBEYED.search(applied.errors), command
        assert "\nforged" not in applied.errors, command


async def test_json_stays_json(applied: Command, hostile: int) -> None:
    for command in (("list", "--json"), ("show", str(hostile), "--json")):
        printed = applied(*command)
        assert printed.isascii()
        assert not OBEYED.search(printed)
        found = json.loads(printed)
        assert (found[0] if isinstance(found, list) else found)["subject"] == HOSTILE


def test_columns_without_a_terminal() -> None:
    """They have their whole width, and no markup."""
    rows = [{"id": 1, "subject": "日本 [bold]"}, {"id": 22, "subject": HOSTILE}]
    assert list(aligned(rows)) == ["id  subject", "1   日本 [bold]", f"22  {SHOWN}"]


NOW = datetime(2026, 3, 2, 10, tzinfo=UTC)


def test_columns_have_the_width_of_what_a_locale_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Standard output then has an escape, which is longer."""
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="backslashreplace")
    monkeypatch.setattr("sys.stdout", stream)
    rows = [{"subject": "Zoë", "n": 1}, {"subject": "日本", "n": 2}]
    expected = ["subject       n", r"Zo\xeb        1", r"\u65e5\u672c  2"]
    assert list(aligned(rows)) == expected
    assert list(laid_out(rows, 80, NOW)) == expected
    (_, line) = laid_out([{"subject": "日本" * 9, "n": 2}], 20, NOW)
    assert line == r"\u65e5\u672c\u...  2"
    assert line.isascii()


def status(sequence: str, step: str, problem: str | None = None) -> dict[str, object]:
    return {
        "sequence": sequence,
        "step": step,
        "type": "Email",
        "status": "active",
        "active": 1240,
        "due": 0,
        "overdue": 0,
        "next_wake_at": NOW + timedelta(hours=3),
        "failed": 0,
        "problem": problem,
    }


def test_eighty_columns_suffice() -> None:
    """One section per sequence, no column that says nothing, no broken name, sentences below."""
    problem = (
        "no runner is installed for the type Emial; did you mean Email, or is a package missing?"
    )
    rows = [
        status("onboarding-of-new-customers", "trial-has-ended-reminder", problem),
        status("onboarding-of-new-customers", "日本"),
        status("invoices", HOSTILE),
    ]
    assert list(laid_out(rows[:2], 80, NOW)) == [
        "onboarding-of-new-customers, active",
        "  step                      type   active  next",
        "  trial-has-ended-reminder  Email    1240  in 3 h",
        "      no runner is installed for the type Emial; did you mean Email, or is a",
        "      package missing?",
        "  日本                      Email    1240  in 3 h",
    ]
    for width in (40, 80, 120):
        lines = list(laid_out(rows, width, NOW))
        assert "invoices" in "\n".join(lines)
        assert all(cell_len(line) <= width for line in lines)
        assert not any(OBEYED.search(line) for line in lines)


def test_rows_without_a_sequence_have_no_heading() -> None:
    row = {"kind": "runner", "about": "Crm", "sequence": None, "since": NOW, "waiting": 39}
    problems = [row, {**row, "about": "Post", "waiting": 5}]
    assert list(laid_out(problems, 80, NOW)) == [
        "kind    about  since  waiting",
        "runner  Crm    now         39",
        "runner  Post   now          5",
    ]
    problems.append({**row, "kind": "enroll", "about": "trial", "sequence": "trial"})
    assert [line for line in laid_out(problems, 80, NOW) if not line.startswith("  ")] == [
        "",
        "trial",
    ]


def test_the_end_of_a_wait_is_shown_where_it_is_not_the_next_check() -> None:
    row = {"id": 1, "wake_at": NOW + timedelta(hours=3), "waits_until": NOW + timedelta(hours=3)}
    assert list(laid_out([row], 80, NOW)) == ["id  wakes", " 1  in 3 h"]
    row["waits_until"] = NOW + timedelta(days=2)
    assert list(laid_out([row], 80, NOW)) == ["id  wakes   waits until", " 1  in 3 h  in 2 d"]


class Screen(io.StringIO):
    """Standard error of a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("stream", "shown"), [(Screen(), True), (io.StringIO(), False)])
async def test_progress_is_for_a_terminal_alone(
    stream: io.StringIO, shown: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sequencerd.cli.output.BUSY_AFTER", 0)
    monkeypatch.setenv("TERM", "xterm")
    with redirect_stderr(stream):
        with busy("counting"):
            await asyncio.sleep(0)  # the loop starts what is due
            await asyncio.sleep(0)
        with progress_bar("cancel", 2000) as advance:
            advance(1000)
    assert ("counting…" in stream.getvalue()) == shown
    assert ("50%" in stream.getvalue()) == shown
    assert bool(stream.getvalue()) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0, "now"), (59, "in 59 s"), (-60, "1 min ago"), (7199, "in 1 h"), (-200_000, "2 d ago")],
)
def test_times_from_now_on(seconds: int, shown: str) -> None:
    assert relative(NOW + timedelta(seconds=seconds), NOW) == shown


def test_long_lines_are_continued_between_words(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sequencerd.cli.output._width", lambda _: 30)
    say("  3 wait at a-step-with-a-long-name: 3 would continue at once")
    assert capsys.readouterr().out == (
        "  3 wait at\n      a-step-with-a-long-name:\n      3 would continue at once\n"
    )
    say("OK  a check: what it has found", hang=8)
    assert capsys.readouterr().out == "OK  a check: what it has found\n"
    say("OK  a check: and what is found is long", hang=8)
    assert capsys.readouterr().out == "OK  a check: and what is found\n        is long\n"


def test_an_export_that_turns_texts_is_escaped_and_the_same() -> None:
    config = {"text": "a\u202eb\x9b", "name": "Zoë"}
    step = {"name": "one", "type": "Crm", "config": config, "next": None, "altNext": None}
    document = {**DEFAULTS, "name": "s", "steps": [step]}
    made = to_yaml(document)
    assert not OBEYED.search(made)
    assert yaml.safe_load(made)["steps"][0]["config"] == config
    del config["text"]
    assert "Zoë" in to_yaml(document)


@pytest.mark.parametrize("form", ["text", "json"])
def test_the_log_escapes_control_characters(form: str) -> None:
    with redirect_stderr(io.StringIO()) as written:
        log = make_log(Settings(log=LogSettings(format=form)))
        log.warning(HOSTILE, subject=HOSTILE, step=("s", HOSTILE))
        try:
            raise ValueError(HOSTILE)
        except ValueError:
            log.exception("failed")
    structlog.reset_defaults()
    assert not OBEYED.search(written.getvalue())
    assert "\nforged" not in written.getvalue()
    assert "forged line" in written.getvalue()


def test_commands_print_only_by_the_output_module(repository: Path) -> None:
    """Every command prints by cli/output.py, which is where this is done."""
    for path in (repository / "sequencerd/cli").glob("*.py"):
        # the demo and the arguments print what is ours alone
        if path.name not in ("output.py", "demo.py", "arguments.py"):
            assert not re.search(r"(?<![\w.])print\(|sys\.stdout\.write", path.read_text()), path
