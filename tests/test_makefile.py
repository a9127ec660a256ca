"""The Makefile: help that is complete, checks that all run, a database to try things on."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from tests.test_readme import REPOSITORY


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["make", "--no-print-directory", *arguments],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )


def test_help_lists_every_target() -> None:
    text = (REPOSITORY / "Makefile").read_text()
    targets = re.search(r"^\.PHONY: (.*)$", text, re.MULTILINE)
    assert targets
    assert [line.split()[0] for line in make("help").stdout.splitlines()] == targets[1].split()


def test_check_runs_every_tool_and_then_fails(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    for tool, code in (("ruff", 1), ("mypy", 0), ("lint-imports", 1)):
        program = tmp_path / "bin" / tool
        program.write_text(f"#!/bin/sh\necho ran {tool} $*\nexit {code}\n")
        program.chmod(0o755)
    # what `install` would make is as new as it can be
    done = make("check", f"VENV={tmp_path}", f"--old-file={tmp_path}/installed")
    ran = [line for line in done.stdout.splitlines() if line.startswith("ran")]
    assert ran == ["ran ruff format --check", "ran ruff check", "ran mypy", "ran lint-imports"]
    assert len(re.findall(r"^--- .*: \d+ s$", done.stdout, re.MULTILINE)) == 4
    assert "failed: ruff format --check, ruff check, lint-imports" in done.stderr
    assert done.returncode != 0


def test_the_shell_has_the_schema() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.helpers.shell"],
        cwd=REPOSITORY,
        input="SELECT count(*) FROM sequencer.enrollments;\n",
        capture_output=True,
        text=True,
        check=True,
    )
    assert "(1 row)" in done.stdout
    (url,) = re.findall(r"host=([^'&]*)", done.stderr)
    assert not Path(url.replace("%2F", "/")).exists()
