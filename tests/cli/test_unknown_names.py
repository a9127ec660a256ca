"""A name that does not exist ends every command with exit code 1 and a similar name."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import asyncpg
import pytest

from sequencerd.cli.arguments import make_parser
from tests.helpers.command_line import Command
from tests.helpers.engines import define, enroll

MISSPELT = {
    "sequence": ("onbording", "onboarding"),
    "sequences": ("onbording", "onboarding"),
    "target": ("onbording", "onboarding"),
    "file": ("onbording", "onboarding"),
    "step": ("wellcome", "welcome"),
    "to": ("wellcome", "welcome"),
    "failure": ("eror", "error"),
}
"""For each argument that is a name: a wrong value, and the right one."""
REQUIRED = {
    "sequence": "onboarding",
    "sequences": "onboarding",
    "target": "onboarding",
    "step": "welcome",
    "to": "welcome",
    "country": "DE",
    "shell": "bash",
}
TWO = """
{name: onboarding, steps: [{name: welcome, type: GoTo}]}
---
{name: other, steps: [{name: welcome, type: GoTo}]}
"""


def parsers() -> dict[str, argparse.ArgumentParser]:
    (commands,) = (a for a in make_parser()._actions if isinstance(a, argparse._SubParsersAction))
    return dict(commands.choices)


def call(command: str, given: dict[str, str]) -> list[str]:
    """Return the arguments of a command: those that are given, and those that it requires."""
    arguments = [command]
    for action in parsers()[command]._actions:
        is_required = action.required and action.nargs != "*"
        if action.dest in given or is_required:
            value = given.get(action.dest) or REQUIRED.get(action.dest, "1")
            arguments += [*action.option_strings[:1], value]
    return arguments


def calls() -> Iterator[tuple[list[str], str]]:
    """Yield the arguments of each command with one wrong name, and the name that is meant."""
    for command, parser in parsers().items():
        names = {action.dest for action in parser._actions}
        for name in names & MISSPELT.keys():
            wrong, meant = MISSPELT[name]
            given = {name: wrong}
            if name == "to" and command != "move":
                continue  # an address, or a folder
            if name == "to":
                given["sequence"] = "onboarding"
            if name == "sequence":  # of a file with several
                given |= dict.fromkeys(names & {"file", "target"}, "two.yaml")
            yield call(command, given), meant


async def test_similar_names_are_suggested(
    connection: asyncpg.Connection, sequencerd: Command, tmp_path: Path
) -> None:
    (tmp_path / "two.yaml").write_text(TWO)
    await define(connection, "onboarding", ("welcome", "GoTo", "{}", None))
    tried = list(calls())
    assert len(tried) > len(MISSPELT)
    for arguments, meant in tried:
        assert sequencerd(*arguments, code=1) == "", arguments
        assert f"; did you mean {meant!r}?" in sequencerd.errors, arguments


def test_a_similar_shard_is_suggested(sequencerd: Command, tmp_path: Path) -> None:
    sequencerd.without_database()
    (tmp_path / "sequencerd.toml").write_text("[shards]\nnorth = {url = 'postgresql:///north'}\n")
    config = ("--config", "sequencerd.toml")
    for command, parser in parsers().items():
        if "shard" not in {action.dest for action in parser._actions}:
            continue
        code = parser.get_default("exit_code_of_errors") or 1
        sequencerd(*config, *call(command, {"shard": "nroth"}), code=code)
        expected = "there is no shard 'nroth' in the settings; did you mean 'north'?"
        assert expected in sequencerd.errors, command
    sequencerd(*config, "show", "nroth/7", code=1)
    assert "there is no shard 'nroth'; did you mean 'north'?" in sequencerd.errors


@pytest.mark.usefixtures("connection")
def test_a_name_may_be_longer_than_that_of_a_file(sequencerd: Command) -> None:
    for command in ("simulate", "graph"):
        sequencerd(command, "x" * 5000, code=1)
        assert "does not exist; there are none" in sequencerd.errors


async def test_a_removed_sequence_has_a_history_and_no_status(
    connection: asyncpg.Connection, sequencerd: Command
) -> None:
    await define(connection, "onboarding", ("welcome", "GoTo", "{}", None))
    id_ = await enroll(connection, "onboarding", "ada")
    await connection.execute("UPDATE sequencer.enrollments SET status = 'cancelled'")
    await connection.execute("DELETE FROM sequencer.sequences")
    sequencerd("status", "onboarding", code=1)
    assert "was removed; its enrollments: list --sequence onboarding" in sequencerd.errors
    sequencerd("export", "onboarding", code=1)
    assert "has no definition; see: history onboarding" in sequencerd.errors
    await connection.execute("DELETE FROM sequencer.enrollments WHERE id = $1", id_)
    sequencerd("status", "onboarding", code=1)
    assert "sequence 'onboarding' does not exist; there are none" in sequencerd.errors
    assert "added welcome" in sequencerd("history", "onboarding")
    assert "name: onboarding" in sequencerd("export", "onboarding", "--revision", "1")
