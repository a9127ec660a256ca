"""The files of sql/, which migrate applies; in a module of its own, because `--version` reads them
without a database.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path

_FILE = re.compile(r"(\d{4})_(\w+)\.sql")
_TOKEN = re.compile(r"""\$(\w*)\$.*?\$\1\$|'[^']*'|"[^"]*"|--[^\n]*|/\*.*?\*/|;""", re.DOTALL)
_BEFORE = re.compile(r"(?:\s|--[^\n]*|/\*.*?\*/)*", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Migration:
    """One file of sql/."""

    version: int
    name: str
    sql: str

    @property
    def checksum(self) -> str:
        """Return the checksum of the file's text, whatever its line endings."""
        return sha256(self.sql.replace("\r\n", "\n").encode()).hexdigest()

    def statements(self) -> Iterator[tuple[int, str]]:
        """Yield the statements, each with its line: Citus does not accept several at once."""
        start = 0
        ends = [match.end() for match in _TOKEN.finditer(self.sql) if match[0] == ";"]
        for end in (*ends, len(self.sql)):
            before = _BEFORE.match(self.sql, start)
            assert before
            if statement := self.sql[before.end() : end]:
                yield self.sql.count("\n", 0, before.end()) + 1, statement
            start = end


def available() -> list[Migration]:
    """Return the migrations of this version, the oldest first."""
    found = [
        Migration(int(match[1]), file.name, file.read_text(encoding="utf-8"))
        for file in _folder().iterdir()
        if (match := _FILE.fullmatch(file.name))
    ]
    return sorted(found, key=lambda migration: migration.version)


def _folder() -> Traversable:
    """Return sql/ in the installed package, or beside it in a checkout."""
    packaged = files("sequencerd") / "sql"
    return packaged if packaged.is_dir() else Path(__file__).parents[2] / "sql"
