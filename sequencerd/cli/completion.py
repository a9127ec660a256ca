"""Print the completion of commands and options for a shell."""

from __future__ import annotations

import argparse
from pathlib import Path

import shtab

from sequencerd.cli.arguments import make_parser
from sequencerd.cli.output import say_lines
from sequencerd.settings import Settings


def completion_command(arguments: argparse.Namespace, _: Settings) -> int:
    parser = make_parser()
    _complete_files(parser)
    say_lines(shtab.complete(parser, arguments.shell))
    return 0


def _complete_files(parser: argparse.ArgumentParser) -> None:
    """Let arguments that are paths be completed with files."""
    for action in parser._actions:  # noqa: SLF001 - argparse has no other way to them
        if isinstance(action, argparse._SubParsersAction):  # noqa: SLF001
            for command in action.choices.values():
                _complete_files(command)
        elif action.type is Path:
            action.complete = shtab.FILE  # type: ignore[attr-defined]
