"""Print the output of commands: lines and tables for a terminal, JSON for a program.

All output passes through here, because names, subjects and messages may contain control characters
for terminals.
"""

from __future__ import annotations

import asyncio
import json
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from io import TextIOWrapper
from shutil import get_terminal_size
from typing import Any, NamedTuple, TextIO

from rich.cells import cell_len, set_cell_size

from sequencerd.cli.streams import write
from sequencerd.core.describe import is_never, plain, text, visible


def say(line: object = "", *, to: TextIO | None = None, end: str = "\n", hang: int = 4) -> None:
    """Print a line, with line ends and control characters escaped. On a terminal, a long line is
    wrapped between words, indented by `hang` more.
    """
    shown = _printed_text(str(line), to)
    width = _width(to or sys.stdout)
    if width and len(shown) > width:
        indent = " " * (len(shown) - len(shown.lstrip()))
        shown = "\n".join(_wrapped(shown.lstrip(), width, indent, indent + " " * hang))
    write(shown + end, to)


def say_lines(lines: object) -> None:
    """Print a text of several lines that contains no values of users; lines are not wrapped."""
    for line in str(lines).removesuffix("\n").split("\n"):
        write(visible(line) + "\n")


def _printed_text(content: str, to: TextIO | None = None) -> str:
    """Return a text as a stream prints it, with characters escaped that control a terminal or that
    the locale lacks: widths are those of the escapes.
    """
    encoding = getattr(to or sys.stdout, "encoding", None) or "utf-8"
    return visible(content).encode(encoding, "backslashreplace").decode(encoding)


def _width(stream: TextIO) -> int | None:
    """Return the width of a terminal; None if it is not a terminal."""
    return get_terminal_size().columns if stream.isatty() else None


def _wrapped(text: str, width: int, first: str, rest: str) -> list[str]:
    return textwrap.wrap(
        text,
        width,
        initial_indent=first,
        subsequent_indent=rest,
        break_long_words=False,
        break_on_hyphens=False,
    )


def warn(line: object) -> None:
    """Print a line on standard error."""
    say(line, to=sys.stderr)


BUSY_AFTER = 0.3  # seconds
_busy: list[str] = []


@contextmanager
def busy(doing: str) -> Iterator[None]:
    """Show on a terminal what takes longer than a moment. Nothing else may be printed in the
    meantime. A terminal shows one at a time.
    """
    if _busy or not sys.stderr.isatty():
        yield
        return
    from rich.console import Console  # noqa: PLC0415 - only a terminal needs it
    from rich.status import Status  # noqa: PLC0415

    status = Status(f"{doing}…", console=Console(stderr=True))
    start = asyncio.get_running_loop().call_later(BUSY_AFTER, status.start)
    _busy.append(doing)
    try:
        yield
    finally:
        _busy.clear()
        start.cancel()
        status.stop()


@contextmanager
def progress_bar(doing: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show a progress bar on a terminal; return the function that advances it."""
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.console import Console  # noqa: PLC0415 - only a terminal needs it
    from rich.progress import Progress  # noqa: PLC0415

    with Progress(console=Console(stderr=True)) as bar:
        shown = bar.add_task(doing, total=total)
        yield lambda count: bar.advance(shown, count)


def say_raw(content: str) -> None:
    """Print a text for a program, unchanged."""
    use_utf8()
    write(content)


def use_utf8() -> None:
    """Print in UTF-8 to a file or a program, whatever the locale: files are read as UTF-8."""
    if isinstance(sys.stdout, TextIOWrapper) and not sys.stdout.isatty():
        sys.stdout.reconfigure(encoding="utf-8")


def say_json(value: object, *, indent: int | None = None) -> None:
    """Print a value for a program, in ASCII."""
    made = json.dumps(value, default=plain, indent=indent)
    write(made.replace("\x7f", "\\u007f") + "\n")


def show(rows: Sequence[Any], as_json: bool, empty: str) -> None:
    """Print rows: for a program, for a terminal, or as a table of unlimited width."""
    if as_json:
        say_json([dict(row) for row in rows])
    elif not rows:
        say(empty)
    else:
        width = _width(sys.stdout)
        for line in laid_out(rows, width, datetime.now(UTC)) if width else aligned(rows):
            say_lines(line)


def aligned(rows: Sequence[Any]) -> Iterator[str]:
    """Yield rows as aligned columns, below the keys of the first row."""
    titles = list(rows[0].keys())
    cells = [titles, *([_printed_text(text(value)) for value in row.values()] for row in rows)]
    widths = [max(map(cell_len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        yield "  ".join(map(set_cell_size, line, widths)).rstrip()


# --- on a terminal

_TEXT_COLUMNS = ("problem", "last_error", "message")
"""Columns with whole sentences, which are printed below their row."""

_RELATIVE = {
    "wake_at": "wakes",
    "waits_until": "waits until",
    "next_wake_at": "next",
    "since": "since",
}
_MIN_WIDTH = 8

_OPTIONAL_COLUMNS = ("type", "attempt", "revision", "daemon")
"""Columns that are left out if the names would not fit."""


class _Printed(NamedTuple):
    """A column as it is printed."""

    title: str
    cells: list[str]
    size: int
    is_number: bool

    def fit(self, text: str) -> str:
        """Return a text of the column's width: numbers are aligned on the right."""
        if self.is_number:
            return " " * (self.size - cell_len(text)) + text
        if cell_len(text) > self.size:
            mark = "…" if _printed_text("…") == "…" else "..."
            return set_cell_size(text, self.size - len(mark)) + mark
        return set_cell_size(text, self.size)


def laid_out(rows: Sequence[Any], width: int, now: datetime) -> Iterator[str]:
    """Yield rows as lines for a terminal: a section for each sequence, without columns that are
    empty or have the same status in all rows, with relative times, and sentences below. Names are
    not wrapped; if the width does not suffice, the longest are truncated.
    """
    found = [dict(row) for row in rows]
    heads = _heads(found)
    indent = "  " if heads else ""
    columns = _printed(found, heads, width - len(indent), now)

    def line(texts: Iterable[str]) -> str:
        fitted = (column.fit(text) for column, text in zip(columns, texts, strict=True))
        return (indent + "  ".join(fitted)).rstrip()

    sections: dict[object, list[int]] = {}
    for number, row in enumerate(found):
        sections.setdefault(row["sequence"] if heads else None, []).append(number)
    for section, numbers in sections.items():
        if numbers[0]:
            yield ""
        if section is not None:
            yield ", ".join(_printed_text(text(found[numbers[0]][name])) for name in heads)
        yield line(column.title for column in columns)
        for number in numbers:
            yield line(column.cells[number] for column in columns)
            for name in _TEXT_COLUMNS:
                if found[number].get(name):
                    prose = _printed_text(text(found[number][name]))
                    yield from _wrapped(prose, width, indent + "    ", indent + "    ")


def _heads(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the columns whose values stand above a section; none if there are no sections."""
    if len(found[0]) <= 2 or all(row.get("sequence") is None for row in found):
        return []
    has_one_status = "status" in found[0] and len({row["status"] for row in found}) == 1
    return ["sequence", "status"] if has_one_status else ["sequence"]


def _printed(
    found: Sequence[Mapping[str, Any]], heads: Sequence[str], width: int, now: datetime
) -> list[_Printed]:
    """Return the columns below the heads, as far as they have values and fit."""
    names = [
        name
        for name in found[0]
        if name not in (*heads, *_TEXT_COLUMNS) and any(row[name] not in _EMPTY for row in found)
    ]
    if all(row.get("waits_until") in (None, row.get("wake_at")) for row in found):
        names = [name for name in names if name != "waits_until"]
    for spare in (*_OPTIONAL_COLUMNS, None):
        cells = {name: [_short(name, row[name], now) for row in found] for name in names}
        titles = [_RELATIVE.get(name, name.replace("_", " ")) for name in names]
        widths = [
            max(map(cell_len, (title, *cells[name])))
            for name, title in zip(names, titles, strict=True)
        ]
        excess = sum(widths) + 2 * (len(widths) - 1) - width
        if excess <= 0 or spare is None:
            break
        names = [name for name in names if name != spare]
    while excess > 0 and max(widths) > _MIN_WIDTH:
        widths[widths.index(max(widths))] -= 1
        excess -= 1
    return [
        _Printed(title, cells[name], size, all(isinstance(row[name], int | None) for row in found))
        for name, title, size in zip(names, titles, widths, strict=True)
    ]


_EMPTY: tuple[object, ...] = (None, 0, "", [], ())


def _short(name: str, value: object, now: datetime) -> str:
    if value in _EMPTY and value != 0:
        return ""
    if isinstance(value, datetime) and name in _RELATIVE and not is_never(value):
        return relative(value, now)
    return _printed_text(text(value))


def relative(at: datetime, now: datetime) -> str:
    """Return the distance of a time, in its largest unit."""
    seconds = round((at - now).total_seconds())
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min"), (1, "s")):
        if count := abs(seconds) // size:
            return f"in {count} {unit}" if seconds > 0 else f"{count} {unit} ago"
    return "now"
