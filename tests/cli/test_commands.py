"""The command line: what it prints, and how it ends."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import asyncpg
import pytest

from sequencerd.cli import main
from sequencerd.cli.arguments import make_parser
from sequencerd.core.faults import FAILURES
from sequencerd.storage.bulk import changed_by
from tests.helpers.command_line import Command, beside, start_sequencerd
from tests.helpers.databases import server_folder
from tests.helpers.engines import define, enroll
from tests.helpers.waiting import PATIENCE

PIPE = asyncio.subprocess.PIPE
EXPLAINED = Path("docs/failures.md").read_text()


def test_migrate_twice(sequencerd: Command) -> None:
    assert sequencerd("migrate") == "the schema is up to date\n"


def test_from_a_file_to_a_history(applied: Command) -> None:
    id_ = json.loads(applied("enroll", "s", "ada", "--data", '{"name": "[Ada]"}', "--json"))["id"]
    assert "enrolled as" in applied("enroll", "s", "bob", "--at", "2040-01-01", "--step", "second")
    assert "first" in applied("status")
    (first, second) = json.loads(applied("status", "s", "--json"))
    assert (first["active"], second["active"], second["next_wake_at"]) == (
        1,
        1,
        "2040-01-01T00:00:00+00:00",
    )
    assert "ada" in applied("list", "--sequence", "s", "--step", "first")
    assert json.loads(applied("list", "--status", "failed", "--json")) == []
    text = applied("show", str(id_))
    assert '{"name": "[Ada]"}' in text
    assert "no events yet" in text
    shown = json.loads(applied("show", str(id_), "--json"))
    assert (shown["subject"], shown["step"], shown["history"]) == ("ada", "first", [])
    assert re.fullmatch("due since .*Z, then second", shown["next"])


async def test_show_names_the_topic_of_a_side_effect(
    sequencerd: Command, connection: asyncpg.Connection
) -> None:
    await define(
        connection,
        "s",
        ("news", "Email", "{}", "bill"),
        ("bill", "Email", '{"topic": "invoices"}', "other"),
        ("other", "Email", '{"topic": null}', "wait"),
        ("wait", "GoTo", "{}", None),
    )
    await connection.execute("UPDATE sequencer.sequences SET topic = 'marketing'")
    id_ = await enroll(connection, "s", "ada")
    for step, topic in (
        ("news", "marketing"),
        ("bill", "invoices"),
        ("other", None),
        ("wait", None),
    ):
        await connection.execute("UPDATE sequencer.enrollments SET step = $1", step)
        shown = sequencerd("show", str(id_))
        assert re.findall(r"^topic +(.*)$", shown, re.MULTILINE) == [topic] * bool(topic)


def test_a_status_begins_with_the_description(applied: Command, tmp_path: Path) -> None:
    file = tmp_path / "s.yaml"
    file.write_text(file.read_text().replace("name: s\n", 'name: s\ndescription: "Two\\e[2J"\n', 1))
    applied("apply", "s.yaml")
    assert applied("status", "s").splitlines()[0] == r"Two\x1b[2J"
    assert "Two" not in applied("status")
    assert isinstance(json.loads(applied("status", "s", "--json")), list)


def test_apply_records_the_operator_and_the_reason(applied: Command, tmp_path: Path) -> None:
    file = tmp_path / "s.yaml"
    file.write_text(file.read_text().replace("name: s\n", "name: s\ndescription: two\n", 1))
    applied("apply", "s.yaml", "--reason", "commit 4f2a")
    latest, *_, first = json.loads(applied("history", "s", "--json"))
    assert latest["reason"] == f"{first['reason']}: commit 4f2a"
    assert first["reason"] == changed_by(None)


def test_tables_are_not_cut_in_a_pipe(applied: Command) -> None:
    subject = "long-" * 100
    applied("enroll", "s", subject)
    assert subject in applied("list")


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["enroll", "s", "ada", "--data", "[1]"], 2, "JSON object"),
        (["enroll", "s", "ada", "--data", "{"], 2, "not JSON"),
        (["enroll", "s", "ada", "--at", "soon"], 2, "ISO 8601"),
        (["enroll", "s", "ada", "--timezone", "Europe/Berln"], 2, "timezone: "),
        (["enroll", "t", "ada"], 1, "sequence 't' does not exist"),
        (["enroll", "s", "ada", "--step", "x"], 1, "sequence 's' has no step 'x'"),
        (["show", "999"], 1, "enrollment 999 does not exist"),
        (["status", "t"], 1, "'t' does not exist"),
        (["apply", "nowhere.yaml"], 1, "nowhere.yaml:1: error: cannot be read"),
        (["appply"], 2, "invalid choice: 'appply'; did you mean 'apply'?"),
        (["list", "--status", "faild"], 2, "did you mean 'failed'?"),
        (["zzz"], 2, "invalid choice: 'zzz'; see: sequencerd --help"),
        (
            ["list", "--sequnce", "s"],
            2,
            "list: error: unrecognized arguments: --sequnce s; did you mean --sequence?",
        ),
        (["--config", "nowhere.toml", "status"], 2, "nowhere.toml"),
        (["--database", "mysql://x", "status"], 2, "write postgresql://"),
    ],
)
def test_invalid_arguments_are_explained(
    applied: Command, arguments: list[str], code: int, words: str
) -> None:
    assert applied(*arguments, code=code) == ""
    assert words in applied.errors
    assert "Traceback" not in applied.errors


def test_names_that_do_not_exist_are_reported(
    applied: Command, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SEQUENCERD_DATABASE", applied.variables["SEQUENCERD_DATABASE"])
    for arguments, words in (
        ("list --sequence t", "sequence 't' does not exist; available: s"),
        ("list --sequence s --step fist", "sequence 's' has no step 'fist'; did you mean 'first'?"),
        ("tail --sequence t", "sequence 't' does not exist"),
        ("tail --id 999", "enrollment 999 does not exist"),
        ("retry --sequence t", "sequence 't' does not exist"),
        ("cancel --sequence t --yes", "sequence 't' does not exist"),
        ("cancel --step x --dry-run", "no sequence has a step 'x'"),
        ("move --sequence t --to first", "sequence 't' does not exist"),
        ("reevaluate --sequence s --step x", "sequence 's' has no step 'x'"),
        ("list --failure eror", "no failure has the code 'eror'; did you mean 'error'?"),
        ("retry --failure x", "no failure has the code 'x'; available: already_enrolled, "),
        ("cancel --failure x --yes", "no failure has the code 'x'"),
        ("move --failure x --to first", "no failure has the code 'x'"),
        ("simulate s --runner Email=fail", "--runner Email: no step has this type of side effect"),
        ("status t", "'t' does not exist"),
        ("watch t", "'t' does not exist"),
        ("pause t", "'t' does not exist"),
        ("history t", "'t' does not exist"),
        ("export t", "'t' does not exist"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(arguments.split())
        assert ended.value.code == 1, arguments
        assert words in capsys.readouterr().err, arguments


@pytest.mark.parametrize(
    "data", ['{"a": NaN}', '{"a": -Infinity}', r'{"a": ["\u0000"]}', r'{"a": "\ud800"}', "[]"]
)
def test_data_that_the_database_cannot_store_are_refused_by_name(
    applied: Command, data: str
) -> None:
    for command in ("enroll s ada --data", "simulate s --data", "check s.yaml --data"):
        applied(*command.split(), data, code=2)
        assert applied.errors.startswith("sequencerd: --data "), applied.errors
    kept = r'{"a": "\\u0000 \ud83d\ude00", "b": 12345678901234567890.5, "c": 1e999}'
    applied("enroll", "s", "ada", "--data", kept)


def test_values_beyond_those_of_the_database_are_refused_by_name(applied: Command) -> None:
    applied("enroll", "s", "ada", "--at", "9999-12-31T23:59:59Z", code=2)
    assert applied.errors == "sequencerd: the start time must be in the years 1900 to 9998\n"
    applied("export", "s", "--revision", "3000000000", code=1)
    assert "'s' has no revision 3000000000" in applied.errors
    applied("export", "s", "--revision", "-1", code=2)


@pytest.mark.parametrize("command", ["check", "plan", "graph", "simulate", "preview"])
def test_a_file_may_be_a_pipe(sequencerd: Command, command: str) -> None:
    """As with `sequencerd check <(make-it)`."""
    reader, writer = os.pipe()
    config = '{"to": "a@b.c", "from": "d@e.f", "subject": "Hi", "text": "Hello"}'
    steps = f'[{{"name": "hello", "type": "Email", "config": {config}}}]'
    os.write(writer, f'{{"name": "piped", "steps": {steps}}}'.encode())
    os.close(writer)
    step = ["hello"] if command == "preview" else []
    shown = sequencerd(command, f"/dev/fd/{reader}", *step)
    os.close(reader)
    assert "hello" in shown.lower() or "1 valid sequence" in shown


def test_a_second_enrollment_is_refused(applied: Command) -> None:
    applied("enroll", "s", "ada")
    applied("enroll", "s", "ada", code=1)
    assert "already" in applied.errors


def test_only_a_file_has_several_sequences(applied: Command) -> None:
    for command in ("simulate s t", "graph s t", "preview s t first", "send-test s t x --to a@b.c"):
        applied(*command.split(), code=2)
        assert "s is not a file, but a sequence in the database: leave out 't'" in applied.errors


async def test_codes_of_failures_are_known(
    applied: Command, connection: asyncpg.Connection
) -> None:
    codes = re.findall(r"^\| `(\w+)` \|", EXPLAINED.partition("## ")[0], re.MULTILINE)
    assert tuple(codes) == FAILURES
    comment = await connection.fetchval(
        "SELECT col_description(attrelid, attnum) FROM pg_attribute"
        " WHERE attrelid = 'sequencer.enrollments'::regclass AND attname = 'failure'"
    )
    assert set(FAILURES) == set(re.findall(r"\w+", comment.partition(": ")[2]))
    for code in FAILURES:
        assert applied("list", "--failure", code) == "no matching enrollments\n"
    # applications may write others
    id_ = await connection.fetchval(
        "INSERT INTO sequencer.enrollments (sequence, subject) VALUES ('s', 'ada') RETURNING id"
    )
    await connection.execute(
        "UPDATE sequencer.enrollments SET status = 'failed', failure = 'ours' WHERE id = $1", id_
    )
    assert "ada" in applied("list", "--failure", "ours")


def test_a_service_of_a_user_that_does_not_exist(sequencerd: Command) -> None:
    sequencerd("install-service", "--print", "--user", "nobody")
    assert "user" not in sequencerd.errors
    sequencerd("install-service", "--print", "--user", "nowhere")
    assert "this machine has no user 'nowhere': create it" in sequencerd.errors


async def test_tail_prints_events_as_they_happen(applied: Command) -> None:
    applied("enroll", "s", "ada")
    arguments = ("tail", "--sequence", "s", "--since", "60", "--json")
    async with beside(applied, *arguments) as (out, _):
        run = await start_sequencerd("run", env=applied.variables)
        try:
            event = json.loads(await out.readline())
        finally:
            run.terminate()
            assert await run.wait() == 0
    assert (event["subject"], event["step"], event["action"]) == ("ada", "first", "enrolled")


UNREADABLE = ("-infinity", "infinity", "4713-01-01 BC", "294276-12-31")
"""Times of PostgreSQL that Python does not have."""


async def test_one_unreadable_time_hides_nothing_else(
    applied: Command, connection: asyncpg.Connection
) -> None:
    """Only the schema's owner can write such times."""
    ids = [await enroll(connection, "s", f"user-{number}") for number in range(len(UNREADABLE))]
    for id_, time in zip(ids, UNREADABLE, strict=True):
        await connection.execute(
            "UPDATE sequencer.enrollments SET status = 'completed',"
            " waits_until = $2::text::timestamptz, expires_at = $2::text::timestamptz"
            " WHERE id = $1",
            id_,
            time,
        )
        await connection.execute(
            "UPDATE sequencer.enrollments SET ended_at = $2::text::timestamptz WHERE id = $1",
            id_,
            time,
        )
        for at in (time, "2026-01-01"):
            await connection.execute(
                "INSERT INTO sequencer.events (enrollment_id, at, sequence, step, visit, action)"
                " VALUES ($1, $2::text::timestamptz, 's', 'first', 1, 'next')",
                id_,
                at,
            )
        shown = applied("show", str(id_))
        assert shown.count("next") >= 2
        assert "2026-01-01 00:00:00Z" in shown
        assert len(json.loads(applied("show", str(id_), "--json"))["history"]) == 3
    assert len(json.loads(applied("list", "--json"))) == len(UNREADABLE)
    assert applied("list").count("user-") == len(UNREADABLE)


async def test_an_event_of_the_future_hides_no_other_from_tail(
    applied: Command, connection: asyncpg.Connection
) -> None:
    id_ = await enroll(connection, "s", "ada")
    insert = (
        "INSERT INTO sequencer.events (enrollment_id, at, sequence, step, visit, action)"
        " VALUES ($1, $2::text::timestamptz, 's', 'first', 1, $3)"
    )
    await connection.execute(insert, id_, "2100-01-01", "next")
    await connection.execute(insert, id_, "294276-12-31", "altNext")
    async with beside(applied, "tail", "--json") as (out, _):
        assert json.loads(await out.readline())["action"] == "next"
        assert json.loads(await out.readline())["action"] == "altNext"
        await connection.execute(insert, id_, "now", "noop")
        assert json.loads(await out.readline())["action"] == "noop"


async def test_a_character_that_the_locale_lacks_is_escaped(
    sequencerd: Command, connection: asyncpg.Connection
) -> None:
    await define(connection, "日本 ë", ("a", "GoTo", "{}", None))
    await enroll(connection, "日本 ë", "Zoë")
    sequencerd.variables["PYTHONIOENCODING"] = "latin-1"
    for command in (
        ["show", "1"],
        ["list"],
        ["status"],
    ):
        done = await start_sequencerd(
            *command, env=sequencerd.variables, stdout=PIPE, stderr=asyncio.subprocess.STDOUT
        )
        printed, _ = await done.communicate()
        assert (done.returncode, rb"\u65e5\u672c " in printed) == (0, True), printed
    exporting = await start_sequencerd("export", "日本 ë", env=sequencerd.variables, stdout=PIPE)
    exported, _ = await exporting.communicate()
    assert "日本 ë" in exported.decode()  # commands read files in UTF-8
    (sequencerd.folder / "日本.yaml").write_bytes(exported)
    assert sequencerd("apply", "日本.yaml") == "日本 ë: nothing changed\n"


def test_each_command_has_a_valid_example_and_describes_its_arguments() -> None:
    parser = make_parser()
    (commands,) = (one.choices for one in parser._actions if one.dest == "command")
    assert isinstance(commands, dict)
    for name, command in commands.items():
        example = command.epilog.removeprefix("Example: sequencerd ")
        arguments = shlex.split(re.split(" [|<>] ", example)[0])
        assert parser.parse_args(arguments).command == name
        assert [one.dest for one in command._actions if not one.help] == []


def test_help_is_no_wider_than_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    (commands,) = (one.choices for one in make_parser()._actions if one.dest == "command")
    assert isinstance(commands, dict)
    for command in commands.values():
        lines = command.format_help().splitlines()
        assert [line for line in lines if len(line) > 60] == []


def test_two_hyphens_after_an_equals_sign_are_a_value() -> None:
    parser = make_parser()
    parsed = parser.parse_args(["cancel", "--subject=--", "--reason=--"])
    assert (parsed.subject, parsed.reason) == ("--", "--")
    for argument in ("--status=--", "--limit=--"):
        with pytest.raises(SystemExit) as ended:
            parser.parse_args(["list", argument])
        assert ended.value.code == 2


def test_the_settings_may_be_named_before_and_after_a_command() -> None:
    parser = make_parser()
    for arguments, config, database in (
        ("--config a --database b status", "a", "b"),
        ("status --config a --database b", "a", "b"),
        ("--config a --database b status --config c", "c", "b"),
        ("status", None, None),
    ):
        given = parser.parse_args(arguments.split())
        assert given.config == (config and Path(config)), arguments
        assert given.database == database, arguments


def test_the_demo_succeeds(tmp_path: Path) -> None:
    with server_folder() as home:
        home.chmod(0o755)  # the server's user must be able to enter it
        done = subprocess.run(
            [sys.executable, "-m", "sequencerd", "demo"],
            env={**os.environ, "XDG_DATA_HOME": str(home)},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
            timeout=PATIENCE,
        )
        assert (home / "sequencerd/demo/data").is_dir()
    assert done.returncode == 0, done.stdout + done.stderr
    for words in (
        "mail to ada@example.com: Your trial has ended",
        "SMS to +15005550011: Bob",
        "cleo  a-few-days goal: paid is met",
        "score           next       scored 80",
        "-- cleo, completed",
        "demo --psql",
    ):
        assert words in done.stdout
    assert done.stderr == ""


async def test_a_definition_that_python_cannot_read_is_an_error_of_its_own(
    applied: Command, connection: asyncpg.Connection
) -> None:
    id_ = json.loads(applied("enroll", "s", "ada", "--json"))["id"]
    deep = '{"a": ' * 5000 + "1" + "}" * 5000
    for text in (deep, '{"a": ' + "1" * 5000 + "}"):
        await connection.execute(
            "UPDATE sequencer.steps SET config = $1::text::jsonb WHERE sequence = 's'", text
        )
        await connection.execute("UPDATE sequencer.enrollments SET data = $1::text::jsonb", text)
        assert re.search(
            "^problem +(data|config) cannot be read", applied("show", str(id_)), re.MULTILINE
        )
        assert json.loads(applied("show", str(id_), "--json"))["config"].startswith(text[:9])
        assert "cannot be read" in applied("history", "s")
        for command in (("export", "s"), ("history", "s", "--json"), ("plan", "s.yaml")):
            applied(*command, code=1)
            assert "'s': its definition in the database cannot be read" in applied.errors
