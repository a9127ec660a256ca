"""The query parameters of pages and tables."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

from sequencerd.core.enrollment import NEVER

_ID = re.compile(r"([^/\s]+)/[0-9]+")

ROWS_PER_PAGE = 50
MAX_ROWS = 1000  # of a table that a program asks for
LAST_CHARACTER = "\U0010ffff"  # ends a search by the beginning of a text


class NotFoundError(Exception):
    """The requested object does not exist; the text is a sentence."""


class WrongQueryError(Exception):
    """A query parameter is wrong; the text is a sentence."""


def as_sentence(text: str) -> str:
    """Return the text of an error as a sentence."""
    return f"{text[:1].upper()}{text[1:]}."


@dataclass(frozen=True)
class Query:
    """The query parameters of a page or table."""

    given: Mapping[str, str]
    rows: int = ROWS_PER_PAGE

    def get(self, name: str) -> str | None:
        """Return a value; None where it is empty or missing. Raises WrongQueryError."""
        value = self.given.get(name) or None
        if value is not None and ("\0" in value or _is_broken(value)):
            raise WrongQueryError(f"{_label(name)} contains invalid characters")
        return value

    def must(self, name: str) -> str:
        """Return a required value."""
        if (value := self.get(name)) is None:
            raise WrongQueryError(f"{_label(name)} is missing from the URL of this page")
        return value

    def of_shard(self, name: str, shards: Collection[str]) -> Query | None:
        """Return the part of a query over all shards that concerns one of them: ids such as b/17
        become numbers, and `skip.b` says where its own page begins. None if the query names only
        enrollments of other shards. Raises WrongQueryError for an id that is in no shard.
        """
        given: dict[str, str] = {}
        for key, value in self.given.items():
            parameter, dot, shard = key.rpartition(".")
            if not dot or shard not in shards:
                given.setdefault(key, value)
            elif shard == name:
                given[parameter] = value
        text = given.get("q")
        if text is not None and (found := _ID.fullmatch(text)) and found[1] in shards:
            given["id"] = given.pop("q")
        if (named := given.pop("id", None)) is None:
            return Query(given, self.rows)
        numbers = []
        for part in named.split(","):
            shard, _, number = part.rpartition("/")
            if shard not in shards:
                raise WrongQueryError(f"write the id with its shard, such as {name}/{number}")
            if shard == name:
                numbers.append(number)
        return Query({**given, "id": ",".join(numbers)}, self.rows) if numbers else None

    def number(self, name: str, default: int) -> int:
        """Return a number from 0 on."""
        text = self.get(name)
        return default if text is None else self._number(name, text)

    def _number(self, name: str, text: str) -> int:
        if not (text.isascii() and text.isdecimal() and len(text) < 20 and int(text) < 2**63):
            raise WrongQueryError(f"{_label(name)} is not a number")
        return int(text)

    def numbers(self, name: str) -> list[int] | None:
        """Return numbers separated by commas; None if there are none."""
        text = self.get(name)
        if text is None:
            return None
        return [self._number(name, part) for part in text.split(",")]

    def time_or_none(self, name: str) -> datetime | None:
        """Return a time, or None if it is missing."""
        return None if self.get(name) is None else self.time(name, NEVER)

    def time(self, name: str, default: datetime) -> datetime:
        """Return a time in ISO 8601, or infinity."""
        text = self.get(name)
        if text is None:
            return default
        if text == "infinity":
            return NEVER
        try:
            found = datetime.fromisoformat(text)
            # converted to UTC, it may be outside of the calendar
            return found.astimezone(UTC) if found.tzinfo else found.replace(tzinfo=UTC)
        except (ValueError, OverflowError) as error:
            message = f"{_label(name)} is not a time such as 2026-03-02 09:00"
            raise WrongQueryError(message) from error


def _label(name: str) -> str:
    return name.replace("_", " ")


def _is_broken(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False
