"""Tables for a terminal, JSON for a program."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sequencerd.core.model import NEVER


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


def text(value: object) -> str:
    match value:
        case None:
            return "-"
        case datetime():
            if is_never(value):
                return "never"
            return f"{value.astimezone(UTC):%Y-%m-%d %H:%M:%S}Z"
        case list() | tuple():
            return ", ".join(map(str, value))
        case dict():
            return json.dumps(value, ensure_ascii=False)
        case _:
            return str(value)


def is_never(at: datetime) -> bool:
    """Whether it is what asyncpg makes of PostgreSQL's infinity."""
    return at.year == NEVER.year


def plain(value: object) -> object:
    """For JSON: times in ISO 8601, "infinity" for never."""
    if isinstance(value, datetime):
        return "infinity" if is_never(value) else value.astimezone(UTC).isoformat()
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")
