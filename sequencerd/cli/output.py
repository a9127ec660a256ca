"""What commands print: lines and tables for a terminal, JSON for a program.

All of it goes through here, as names, subjects and messages may hold what a terminal would obey.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any, TextIO

from rich.console import Console
from rich.table import Table
from rich.text import Text

from sequencerd.core.describe import plain, text, visible


def say(line: object = "", *, to: TextIO | None = None, end: str = "\n") -> None:
    """A line; what would end it or move the cursor is shown instead."""
    print(visible(str(line)), file=to, end=end, flush=True)


def say_lines(lines: object, *, to: TextIO | None = None) -> None:
    """The same for a text whose lines are ours."""
    for line in str(lines).removesuffix("\n").split("\n"):
        say(line, to=to)


def warn(line: object) -> None:
    """A line on standard error."""
    say(line, to=sys.stderr)


def say_json(value: object, *, indent: int | None = None) -> None:
    """A value for a program, in ASCII."""
    made = json.dumps(value, default=plain, indent=indent)
    print(made.replace("\x7f", "\\u007f"), flush=True)


def console() -> Console:
    """Tables are never cut where no terminal bounds them."""
    return Console() if sys.stdout.isatty() else Console(width=10_000)


def show(rows: Sequence[Any], as_json: bool, empty: str) -> None:
    if as_json:
        say_json([dict(row) for row in rows])
    elif not rows:
        say(empty)
    else:
        console().print(table(rows))


def table(rows: Sequence[Any]) -> Table:
    """A row for each, with the first one's keys as headings."""
    made = Table(box=None)
    for name in dict(rows[0]) if rows else ():
        made.add_column(cell(name), overflow="fold")
    for row in rows:
        made.add_row(*map(cell, dict(row).values()))
    return made


def cell(value: object) -> Text:
    """A value in a table, as it is: it has no markup."""
    return Text(visible(text(value)))
