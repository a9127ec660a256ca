"""The standard streams of a command, whether or not they were open at its start."""

from __future__ import annotations

import os
import sys
from io import TextIOWrapper
from typing import TextIO

from sequencerd.errors import SequencerdError


def open_all() -> None:
    """Open the streams that were closed before the start, as with `>&-`: a connection would get
    their numbers, and Python has None for them.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
        if getattr(sys, name) is None:
            mode = "w" if number else "r"
            setattr(sys, name, os.fdopen(number, mode, encoding="utf-8", closefd=False))
    if isinstance(sys.stdin, TextIOWrapper):  # what is read is checked where it is used
        sys.stdin.reconfigure(errors="surrogateescape")
    if isinstance(sys.stdout, TextIOWrapper):  # as standard error, where a locale lacks a character
        sys.stdout.reconfigure(errors="backslashreplace")


def write(text: str, to: TextIO | None = None) -> None:
    """Write a text to a stream, standard output by default, at once. Raises BrokenPipeError if the
    reader is gone, and SequencerdError.
    """
    stream = to or sys.stdout
    try:
        stream.write(text)
        stream.flush()
    except BrokenPipeError:
        raise  # not an error: the reader is gone
    except OSError as error:
        drop(stream)  # the rest is not written again at exit
        raise SequencerdError(f"the output cannot be written: {error.strerror}") from error


def drop(stream: TextIO) -> None:
    """Drop what a stream has not written, and all that follows."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def drop_unwritten() -> None:
    """Drop what could not be written. Otherwise Python tries again at exit, and replaces the exit
    code by 120.
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            drop(stream)
