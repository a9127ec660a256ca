"""The command line: only arguments and output. Nothing imports it."""

from __future__ import annotations

import os
import signal
import sys
import threading
from argparse import Namespace
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from types import FrameType

from sequencerd.cli import streams
from sequencerd.cli.arguments import WITHOUT_SETTINGS, make_parser
from sequencerd.errors import (
    ArgumentError,
    FileError,
    PlanError,
    SequencerdError,
    SettingsError,
    ShardsError,
)

# Printing and settings import slow modules, so they are imported only when needed: not for --help.


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command and exit: 0 done, 1 failed, 2 wrong arguments or settings."""
    streams.open_all()
    try:
        sys.exit(_run(arguments))
    finally:
        streams.drop_unwritten()


def _run(arguments: Sequence[str] | None) -> int:
    given = Namespace()
    try:
        given = make_parser().parse_args(arguments)
        _check_texts(given)
        from sequencerd.cli.commands import read_settings  # noqa: PLC0415
        from sequencerd.settings import Settings  # noqa: PLC0415

        settings = Settings() if given.command in WITHOUT_SETTINGS else read_settings(given)
        module, _, function = given.run.rpartition(".")
        run = getattr(import_module(f"sequencerd.cli.{module}"), function)
        _interrupt_on_signals()  # not before: imports turn an interrupt into errors of their own
        code: int = run(given, settings)
    except SequencerdError as error:
        with suppress(SequencerdError, BrokenPipeError):  # of standard error
            _print(error)
        code = getattr(given, "exit_code_of_errors", error.exit_code)
    except KeyboardInterrupt:
        if _received:  # end as the signal would have ended it
            signal.signal(_received[0], signal.SIG_DFL)  # uvloop leaves its handler
            os.kill(os.getpid(), _received[0])
        code = 130
    except BrokenPipeError:
        # the reader is gone, as with `| head`: not an error, and nothing more to write
        streams.drop(sys.stdout)
        code = 0
    return code


_received: list[int] = []
"""Signals that interrupt a command."""


def _interrupt_on_signals() -> None:
    """Make SIGTERM and SIGHUP interrupt a command as Ctrl+C does, so that it reports what it has
    done. The second signal ends the process.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:  # not with nohup
            signal.signal(number, _interrupt)


def _interrupt(number: int, _: FrameType | None) -> None:
    _received.append(number)
    signal.signal(number, signal.SIG_DFL)
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in the background of a shell
        raise KeyboardInterrupt
    signal.raise_signal(signal.SIGINT)


def _check_texts(given: Namespace) -> None:
    """Raise ArgumentError for a text that cannot be stored. A value may be a secret, and paths are
    left as they are.
    """
    for name, value in vars(given).items():
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and any("\ud800" <= one <= "\udfff" for one in text):
                raise ArgumentError(f"the argument {name} is not valid UTF-8")


def _print(error: SequencerdError) -> None:
    from sequencerd.cli.output import say  # noqa: PLC0415
    from sequencerd.service.systemd import is_journal  # noqa: PLC0415

    if is_journal():  # each line with its priority, or `journalctl -p warning` would hide it
        for line in str(error).split("\n"):
            say(f"<3>{line}", to=sys.stderr)
        return
    # errors in a file begin with the file's name, as editors expect
    prefix = "" if isinstance(error, FileError) else "sequencerd: "
    # what they name is quoted
    several = isinstance(error, FileError | PlanError | SettingsError | ShardsError)
    text = f"{prefix}{error}"
    for line in text.split("\n") if several else [text]:
        say(line, to=sys.stderr)
