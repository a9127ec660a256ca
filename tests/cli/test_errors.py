"""Errors say what to do, and the right thing."""

from __future__ import annotations

import argparse
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import asyncpg
import pytest

from sequencerd import cli
from sequencerd.cli import main
from sequencerd.cli.arguments import make_parser
from sequencerd.cli.commands import roles_for
from sequencerd.errors import PlanError
from sequencerd.storage.statements import QUERIES
from tests.cli.test_doctor import examine
from tests.helpers.command_line import Command
from tests.helpers.databases import make_login, with_login


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_page_of_roles_names_what_every_command_needs(repository: Path) -> None:
    """As a table in docs/security.md."""
    page = (repository / "docs/security.md").read_text()
    documented = {
        name: role.replace("`", "").split(" or ")
        for names, role in re.findall(r"^\| (`[a-z].*) \| (.*) \|$", page, flags=re.MULTILINE)
        for name in re.findall(r"`([^`]+)`", names)
        if role.startswith(("`sequencer_", "the schema"))
    }
    (others,) = re.findall(r"^(`.*) use no database\.$", page, flags=re.MULTILINE)
    (commands,) = (a for a in make_parser()._actions if isinstance(a, argparse._SubParsersAction))
    names = {*documented, *re.findall(r"`([^`]+)`", others)} - {"retry --skip"}
    assert names == set(commands.choices)
    for name, roles in documented.items():
        command, _, option = name.partition(" ")
        assert roles_for(argparse.Namespace(command=command, skip=bool(option))) == roles, name


@pytest.fixture
async def login(connection: asyncpg.Connection, database: str) -> str:
    """The URL of a login that may do nothing."""
    return await make_login(connection, database, "login_none")


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert isinstance(ended.value.code, int)
    return ended.value.code


def test_the_role_that_a_command_needs_is_named(
    login: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for command, role in (
        (["pause", "s"], "GRANT sequencer_editor TO login_none"),
        (["status"], "GRANT sequencer_enroller TO login_none"),
        (["migrate"], "run `migrate` as the schema's owner"),
    ):
        assert run("--database", login, *command) == 1
        errors = capsys.readouterr().err
        assert role in errors
        assert errors.count("GRANT") == role.count("GRANT")


async def test_the_login_in_an_advice_is_quoted(
    connection: asyncpg.Connection, database: str, sequencerd: Command
) -> None:
    await make_login(connection, database, '"login-None"')
    sequencerd("--database", with_login(database, "login-None"), "status", code=1)
    assert 'GRANT sequencer_enroller TO "login-None"' in sequencerd.errors


async def test_missing_privileges_of_a_role_are_not_granted_to_a_login(
    database: str, connection: asyncpg.Connection, sequencerd: Command
) -> None:
    """The login has the role already."""
    login = await make_login(connection, database, "login_member", "enroller", "daemon")
    await connection.execute(
        "REVOKE SELECT ON sequencer.problems FROM sequencer_enroller, sequencer_daemon"
    )
    sequencerd("--database", login, "status", code=1)
    assert (
        "sequencer_enroller lacks privileges: run `sequencerd grants --apply`" in sequencerd.errors
    )
    found = await examine(login)
    assert "sequencerd grants --apply" in found["problems"].advice


async def test_a_daemon_that_may_read_is_not_to_become_an_enroller(
    database: str, connection: asyncpg.Connection, sequencerd: Command
) -> None:
    login = await make_login(connection, database, "login_daemon", "daemon")
    await connection.execute("REVOKE SELECT ON sequencer.overview FROM sequencer_daemon")
    sequencerd("--database", login, "status", code=1)
    assert "sequencer_daemon lacks privileges: run `sequencerd grants" in sequencerd.errors
    assert "GRANT " not in sequencerd.errors


async def test_doctor_continues_after_a_check_fails(
    database: str, login: str, connection: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    await connection.execute("GRANT USAGE ON SCHEMA sequencer TO login_none")
    found = await examine(login, runners={"Crm": {"url": "http://127.0.0.1:9/"}})
    await connection.execute("REVOKE USAGE ON SCHEMA sequencer FROM login_none")
    assert "permission denied" in found["schema"].seen
    assert "GRANT sequencer_daemon" in found["schema"].advice
    assert (found["clock"].level, found["runner Crm"].level) == ("ok", "error")
    end = "SELECT pg_terminate_backend(pg_backend_pid())"
    monkeypatch.setitem(QUERIES, "vacuum_facts", end)
    found = await examine(database, runners={"Crm": {"url": "http://127.0.0.1:9/"}})
    assert found["vacuum"].level == "error"
    assert "runner Crm" in found


async def test_a_command_that_a_deadlock_ends_is_to_be_repeated(
    connection: asyncpg.Connection, sequencerd: Command
) -> None:
    """For example an apply, beside an edit of the same steps by SQL."""
    await connection.execute(
        """
        INSERT INTO sequencer.sequences (name, first_step) VALUES ('s', 'a');
        INSERT INTO sequencer.steps (sequence, name, type) VALUES ('s', 'a', 'Note');
        CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS
            $$BEGIN RAISE deadlock_detected USING MESSAGE = 'deadlock detected'; END$$;
        CREATE TRIGGER refuse AFTER UPDATE ON sequencer.sequences
            FOR EACH ROW EXECUTE FUNCTION refuse();
        """
    )
    sequencerd("pause", "s", code=1)
    assert sequencerd.errors == (
        "sequencerd: deadlock detected; another transaction changed the same rows: repeat the "
        "command\n"
    )


def test_a_closed_pipe_is_not_an_error(
    database: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with `| head`."""
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as pipe:
        monkeypatch.setattr("sys.stdout", pipe)
        for command in (["doctor"], ["status"]):
            assert run("--database", database, *command) == 0
    assert capfd.readouterr().err == ""


def test_an_output_that_cannot_be_written_is_named(
    database: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for command in (["--database", database, "status"], ["--help"], ["--version"]):
        with Path("/dev/full").open("w") as full:
            monkeypatch.setattr("sys.stdout", full)
            assert run(*command) == 1
        assert capfd.readouterr().err == (
            "sequencerd: the output cannot be written: No space left on device\n"
        )


@pytest.mark.parametrize("lines", [["what was found " * 5], ["what was found " * 5] * 2])
def test_errors_are_wrapped_on_a_terminal(
    lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    errors = Terminal()
    monkeypatch.setattr("sys.stderr", errors)
    monkeypatch.setenv("COLUMNS", "40")
    cli._print(PlanError("\n".join(lines)))
    printed = errors.getvalue().splitlines()
    assert max(map(len, printed)) <= 40
    assert " ".join(printed).split() == ["sequencerd:", *" ".join(lines).split()]


@pytest.mark.parametrize(
    ("url", "place"),
    [
        ("postgresql://127.0.0.1:1/x", "127.0.0.1, port 1 (Connection refused)"),
        ("postgresql://127.0.0.1:1,[::1]:2/x", "127.0.0.1, port 1 or ::1, port 2 ("),
        ("host=/nowhere", "/nowhere/.s.PGSQL.5432 (No such file or directory)"),
    ],
)
def test_a_server_that_cannot_be_reached_is_named(
    url: str, place: str, sequencerd: Command
) -> None:
    sequencerd("--database", url, "status", code=1)
    assert f"cannot connect to the database: no server answers at {place}" in sequencerd.errors
    assert sequencerd.errors.endswith(
        "): it may not be running, or SEQUENCERD_DATABASE, --database or database.url should name "
        "another one\n"
    )


@pytest.mark.parametrize("argument", ["--help", "--version"])
def test_the_reader_of_help_may_be_gone(argument: str) -> None:
    """Python buffers it until the end, unless a variable forbids that."""
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    read, closed = os.pipe()
    os.close(read)
    with os.fdopen(closed, "w") as pipe:
        done = subprocess.run(
            [sys.executable, "-m", "sequencerd", argument],
            env=variables,
            stdout=pipe,
            stderr=subprocess.PIPE,
            check=False,
        )
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["nonsense"], 2),
        (["--config", "missing.toml", "run"], 2),
        (["--database", "postgresql://127.0.0.1:1/x", "status"], 1),
    ],
)
def test_errors_that_cannot_be_written_leave_the_exit_code(arguments: list[str], code: int) -> None:
    read, closed = os.pipe()
    os.close(read)
    with os.fdopen(closed, "w") as pipe, Path("/dev/full").open("w") as full:
        for stream in (pipe, full):
            process = [sys.executable, "-m", "sequencerd", *arguments]
            assert subprocess.run(process, stderr=stream, check=False).returncode == code


def test_streams_that_were_closed_before_the_start(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with `>&-`: Python has None for them."""
    for stream in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(f"sys.{stream}", None)
    assert run("--database", database, "status") == 0
    assert run("--database", database, "status", "nowhere") == 1


def test_standard_input_that_was_closed_before_the_start(database: str) -> None:
    program = ["sh", "-c", 'exec "$0" -m sequencerd "$@" <&-', sys.executable]
    for command, code, said in (
        (["console-password"], 1, "the password must have at least 8 characters"),
        (["--database", database, "bounce"], 0, "ignored"),
    ):
        done = subprocess.run([*program, *command], capture_output=True, text=True, check=False)
        assert done.returncode == code
        assert said in done.stdout + done.stderr


def test_a_password_that_cannot_be_read(
    sequencerd: Command, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sequencerd("console-password", stdin=b"\xff" * 9 + b"\n", code=1)
    assert sequencerd.errors == "sequencerd: the password is not valid UTF-8\n"

    def end(*_: object) -> str:
        raise EOFError

    monkeypatch.setattr("getpass.getpass", end)
    monkeypatch.setattr("sys.stdin", Terminal())
    assert run("console-password") == 1
    assert capsys.readouterr().err == "sequencerd: no password was entered\n"


def test_simulate_takes_a_sequence_of_the_database(
    applied: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    url = applied.variables["SEQUENCERD_DATABASE"]
    assert run("--database", url, "simulate", "s") == 0
    assert "second" in capsys.readouterr().out
    assert run("--database", url, "simulate", "t") == 1
    assert "sequence 't' does not exist" in capsys.readouterr().err


def test_commands_that_help_to_correct_settings_read_none(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "sequencerd.toml"
    file.write_text("[console]\npassword_hash = 'to be made'\n")
    monkeypatch.setenv("SEQUENCERD_CONFIG", str(file))
    for command in (["completion", "bash"], ["schema"], ["install-service", "--print"]):
        assert run(*command) == 0
        assert capsys.readouterr().out
    assert run("status") == 2


async def test_data_that_python_cannot_parse_keep_no_command_from_working(
    applied: Command, connection: asyncpg.Connection
) -> None:
    """PostgreSQL takes more brackets and digits."""
    deep = '{"x": "\\u009b", "a": ' + "[" * 5000 + "]" * 5000 + "}"
    await connection.execute(
        "INSERT INTO sequencer.enrollments (sequence, subject, data) VALUES ('s', 'deep', $1)", deep
    )
    applied("check", "s.yaml")
    assert not applied.errors
    exported = applied("export-subject", "deep")
    assert "[" * 5000 in exported
    assert exported.isascii()
    assert "\\u009b" in exported
    (applied.folder / "m.yaml").write_text(
        "name: m\nsteps:\n- name: a\n  type: Email\n  config: {from: a@example.com,"
        " to: b@example.com, subject: x, text: y}\n"
    )
    applied("preview", "m.yaml", "a", "--enrollment", "1", code=1)
    assert "data cannot be read" in applied.errors
