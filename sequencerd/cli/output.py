"""Tables for a terminal, JSON for a program."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sequencerd.words import plain, text


def console() -> Console:
    """Tables are never cut where no terminal bounds them."""
    return Console() if sys.stdout.isatty() else Console(width=10_000)


def show(rows: Sequence[Any], as_json: bool, empty: str) -> None:
    if as_json:
        print(json.dumps([dict(row) for row in rows], default=plain))
    elif not rows:
        print(empty)
    else:
        console().print(table(rows))


def table(rows: Sequence[Any]) -> Table:
    """A row for each, with the first one's keys as headings."""
    made = Table(box=None)
    for name in dict(rows[0]) if rows else ():
        made.add_column(name, overflow="fold")
    for row in rows:
        made.add_row(*(escape(text(value)) for value in dict(row).values()))
    return made
