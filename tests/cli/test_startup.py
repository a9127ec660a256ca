"""What a command imports: help and the version are fast, and no command loads the rest."""

from __future__ import annotations

import subprocess
import sys

import pytest

from sequencerd.cli import main
from sequencerd.cli.arguments import make_parser
from sequencerd.definitions import drawing
from sequencerd.definitions.simulator import OUTCOME_WORDS

SLOW = {"rich.console", "sequencerd.core.step_types", "sequencerd.storage.embedded"}
DAEMON = {"sequencerd.daemon", "sequencerd.engine.loop", "sequencerd.console", "httpx", "uvicorn"}


@pytest.mark.parametrize(
    ("modules", "unwanted"),
    [
        ("cli", {*DAEMON, "pydantic", "asyncpg", "rich", "sequencerd.settings"}),
        (
            "cli.inspection cli.operation cli.doctor cli.service",
            {*DAEMON, *SLOW, "sequencerd.runners", "aiosmtplib", "structlog"},
        ),
        ("cli.authoring cli.changes testing", DAEMON - {"httpx"}),
        ("cli.console", {"sequencerd.daemon", "sequencerd.engine.loop"}),
        ("daemon", {"sequencerd.cli", "sequencerd.storage.embedded"}),
    ],
)
def test_commands_import_only_what_they_use(modules: str, unwanted: set[str]) -> None:
    imported = ", ".join(f"sequencerd.{module}" for module in modules.split())
    program = f"import sys, {imported}; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert not unwanted & set(done.stdout.split())


def test_the_version_needs_no_database() -> None:
    program = "import sys; from sequencerd.cli import main\n"
    program += "try: main(['--version'])\nfinally: print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert "schema" in done.stdout
    assert not {"asyncpg", "pydantic", "rich"} & set(done.stdout.split())


def test_every_command_has_its_function() -> None:
    from importlib import import_module

    parser = make_parser()
    (commands,) = (action.choices for action in parser._actions if action.dest == "command")
    assert isinstance(commands, dict)
    for command in commands.values():
        module, _, function = command.get_default("run").rpartition(".")
        assert callable(getattr(import_module(f"sequencerd.cli.{module}"), function))


def test_the_choices_of_arguments_agree_with_the_code() -> None:
    parser = make_parser()
    for name in drawing.FORMATS:
        assert parser.parse_args(["graph", "x", "--format", name]).format == name
    (commands,) = (action.choices for action in parser._actions if action.dest == "command")
    assert isinstance(commands, dict)
    assert ", ".join(OUTCOME_WORDS) in commands["simulate"].format_help().replace("\n", " ")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_for_each_shell(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["completion", shell])
    assert ended.value.code == 0
    script = capsys.readouterr().out
    assert "import-original" in script
    assert "dry-run" in script
    if shell == "bash":
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)
