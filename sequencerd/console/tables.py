"""The tables in the pages, which can also be read as JSON and CSV."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, Literal
from urllib.parse import quote, urlencode

from starlette.responses import Response

from sequencerd.core.describe import plain, text

ROOT_PATH = "/console"
MAX_SHOWN = 500  # rows in a page, of a table that is made of counts

place: ContextVar[str] = ContextVar("place", default="")
"""The path of one shard's pages, below ROOT_PATH."""

Kind = Literal[
    "text", "number", "percent", "time", "duration", "json", "days", "code", "list", "counts"
]


@dataclass(frozen=True)
class Column:
    """A column: the key of its values, and how a page shows them. `link` is the key of a URL. An
    `optional` column is shown only if a row has a value other than that in the column `like`.
    """

    key: str
    title: str
    kind: Kind = "text"
    link: str | None = None
    optional: bool = False
    like: str | None = None


@dataclass(frozen=True)
class Table:
    """Rows of one page. `more` is the query of the next page, `query` that of this one. A table
    that can be sorted has an `order`: the key of a column, after a minus if the greatest come
    first. `remark` is what must be known of the rows.
    """

    name: str
    columns: Sequence[Column]
    rows: Sequence[Mapping[str, Any]]
    query: Mapping[str, str]
    more: Mapping[str, str] | None = None
    order: str | None = None
    remark: str | None = None

    @property
    def shown(self) -> list[Column]:
        """Return the columns that a page shows."""
        return [column for column in self.columns if not column.optional or self._says(column)]

    def _says(self, column: Column) -> bool:
        return any(
            row[column.key] and (column.like is None or row[column.key] != row[column.like])
            for row in self.rows
        )

    def part(self, first: int) -> Table:
        """Return as many rows as a page shows, after so many others."""
        end = first + MAX_SHOWN
        more = {**self.query, "first": str(end)} if end < len(self.rows) else None
        return replace(self, rows=self.rows[first:end], more=more)

    def sorted_by(self, column: Column) -> str:
        """Return the query that sorts by a column, or reverses the order if the table is sorted by
        it.
        """
        kept = {key: value for key, value in self.query.items() if key not in ("before", "skip")}
        return at("/search", **{**kept, "sort": f"{'-' * (self.order == column.key)}{column.key}"})

    def url(self, form: str) -> str:
        """Return the URL of the table as "json" or "csv"."""
        return at(f"/tables/{self.name}.{form}", **self.query)


def at(path: str, **query: object) -> str:
    """Return the URL of a page; None values are omitted."""
    given = {key: value for key, value in query.items() if value is not None}
    query_string = f"?{urlencode(given, errors='replace')}" if given else ""
    return ROOT_PATH + quote(place.get() + path) + query_string


_OF_SHARD = "/shards/"


def at_shard(name: str | None, path: str, **query: object) -> str:
    """Return the URL of a page of one shard, or of all."""
    token = place.set("" if name is None else f"{_OF_SHARD}{name}")
    try:
        return at(path, **query)
    finally:
        place.reset(token)


def labelled(id_: int | str) -> str:
    """Return the id of an enrollment with the shard whose page this is, such as b/17."""
    shard = place.get().removeprefix(_OF_SHARD)
    return f"{shard}/{id_}" if shard else str(id_)


def as_json(table: Table) -> Response:
    """Return the rows, and the URL of the next page."""
    keys = [column.key for column in table.columns]
    body = {
        "rows": [{key: row[key] for key in keys} for row in table.rows],
        "next": _next(table, "json"),
    }
    if table.remark:
        body["remark"] = table.remark
    content = json.dumps(body, default=_plain, ensure_ascii=False)
    return Response(content, headers=_headers(table, "json"), media_type="application/json")


def as_csv(table: Table) -> Response:
    """Return the rows below a line with the names of the columns; the header Link has the URL of
    the next page.
    """
    written = io.StringIO()
    # quoted, because some spreadsheets treat a semicolon as the end of a cell
    writer = csv.writer(written, quoting=csv.QUOTE_NONNUMERIC)
    writer.writerow(column.key for column in table.columns)
    for row in table.rows:
        writer.writerow(_cell(row[column.key]) for column in table.columns)
    headers = _headers(table, "csv")
    headers["Content-Disposition"] = f'attachment; filename="{table.name}.csv"'
    return Response(written.getvalue(), headers=headers, media_type="text/csv")


def _headers(table: Table, form: str) -> dict[str, str]:
    following = _next(table, form)
    return {"Link": f'<{following}>; rel="next"'} if following else {}


def _next(table: Table, form: str) -> str | None:
    return at(f"/tables/{table.name}.{form}", **table.more) if table.more else None


def _plain(value: object) -> object:
    return (
        value.isoformat()
        if hasattr(value, "isoformat") and not isinstance(value, datetime)
        else plain(value)
    )


_FORMULA = re.compile(r"[=+\-@\t\r\n\uff0b\uff0d\uff1d\uff20]")  # and their wide forms
_NUMBER = re.compile(r"[+-]?[0-9]+([.,][0-9]+)*")


def _cell(value: object) -> str | int | float:
    if value is None:
        return ""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return value
    if isinstance(value, datetime):
        return str(plain(value))
    if isinstance(value, dict | list):
        return json.dumps(value, default=_plain, ensure_ascii=False)
    shown = text(value)
    # a spreadsheet would interpret it as a formula
    is_formula = _FORMULA.match(shown) and not _NUMBER.fullmatch(shown)
    return f"'{shown}" if is_formula else shown
