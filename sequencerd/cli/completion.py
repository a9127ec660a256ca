"""Print a shell's completion of commands and options."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

import shtab

from sequencerd.cli.arguments import make_parser

if TYPE_CHECKING:
    from sequencerd.settings import Settings


def completion_command(arguments: argparse.Namespace, _: Settings) -> int:
    from sequencerd.cli.output import say_lines  # noqa: PLC0415 - a build of the package has none

    say_lines(complete(arguments.shell))
    return 0


def complete(shell: str) -> str:
    """Return the completion script of a shell."""
    parser = make_parser()
    _complete_files(parser)
    return str(shtab.complete(parser, shell))


def _complete_files(parser: argparse.ArgumentParser) -> None:
    """Complete arguments that are paths with files."""
    for action in parser._actions:  # noqa: SLF001 - argparse has no other way to them
        if isinstance(action, argparse._SubParsersAction):  # noqa: SLF001
            for command in action.choices.values():
                _complete_files(command)
        elif action.type is Path:
            action.complete = shtab.FILE  # type: ignore[attr-defined]
