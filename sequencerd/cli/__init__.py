"""The command line: arguments and printing only."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import NoReturn

from sequencerd import demo, embedded
from sequencerd.cli import authoring, changes, inspection, operation, preview, service
from sequencerd.cli.commands import Commands, read_settings
from sequencerd.cli.output import say, say_lines
from sequencerd.errors import FileError, PlanError, SequencerdError
from sequencerd.words import visible


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one command and exits: 0 done, 1 failed, 2 wrong arguments or settings."""
    try:
        given = _parser().parse_args(arguments)
        code: int = given.run(given, read_settings(given))
    except (SequencerdError, embedded.EmbeddedError) as error:
        # what is wrong in a file begins with the file, as editors expect it
        prefix = "" if isinstance(error, FileError) else "sequencerd: "
        several = isinstance(error, FileError | PlanError)  # what they name is quoted
        (say_lines if several else say)(f"{prefix}{error}", to=sys.stderr)
        code = getattr(error, "exit_code", 1)
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:
        # the reader has gone, as `| head` does: not an error, and nothing more to write
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    sys.exit(code)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Names a wrong argument as a terminal may see it."""
        super().error(visible(message))


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="sequencerd",
        description="Moves enrollments through sequences of steps, on PostgreSQL.",
    )
    parser.add_argument("--version", action="version", version=version("sequencerd"))
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="settings in TOML (or SEQUENCERD_CONFIG)"
    )
    parser.add_argument(
        "--database", metavar="URL", help="postgresql://user@host/name (or SEQUENCERD_DATABASE)"
    )
    commands = Commands(parser)
    for module in (service, authoring, changes, preview, operation, inspection):
        module.add_to(commands)
    about = "see it work in twenty seconds, with a database and servers of its own"
    shown = commands.add("demo", lambda given, _: demo.main(given.psql), about, "demo")
    shown.add_argument(
        "--psql",
        nargs=argparse.REMAINDER,
        metavar="ARGUMENT",
        help="open psql on the database that the demo left, with these arguments",
    )
    return parser
