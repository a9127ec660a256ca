"""The statements in queries/*.sql by name, and the advisory locks that they take."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from enum import Enum
from importlib.resources import files

from sequencerd.core.enrollment import Enrollment, StepKey
from sequencerd.storage.schemas import LOCK_CLASS


class AdvisoryLock(Enum):
    """The advisory locks, by the second of their two numbers; see the list in
    sql/0001_sequencer.sql.
    """

    MIGRATIONS = 1
    RETENTION = 2
    DEFINITIONS = 3
    NOTIFY = 4
    REQUESTS = 5
    ENROLLING = 6
    FORGETTING = 7

    def __str__(self) -> str:
        """Return the arguments for the functions that lock it."""
        return f"{LOCK_CLASS}, {self.value}"


# what PostgreSQL has compressed may be a hundred times as long
_SMALL_DATA = (
    "CASE WHEN pg_column_size(e.data) <= 2000 AND (pg_column_compression(e.data) IS NULL"
    " OR octet_length(e.data::text) <= 8000) THEN e.data END AS data"
)
_COLUMNS = {name: f"e.{name}" for name in Enrollment._fields} | {
    "wake_at": "least(e.wake_at, '9999-12-31Z') AS wake_at",  # Python's calendar has no infinity
    "timezone": "left(e.timezone, 100) AS timezone",  # no name is as long, but a text may have 1 GB
}
_BARE = {
    "subject": "'' AS subject",
    "data": "'{}' AS data",
    "original_id": "NULL AS original_id",
    "sequence": "$1::text AS sequence",
    "step": "$2::text AS step",
    "timezone": "NULL AS timezone",
    "last_error": "NULL AS last_error",
    "goals_met": "'{}'::text[] AS goals_met",
    "goals_elsewhere": "NULL AS goals_elsewhere",
    "executed": "'{}'::text[] AS executed",
}  # values that may be unreadable are not read
_PLACEHOLDERS = {
    "{enrollment}": ", ".join((_COLUMNS | {"data": _SMALL_DATA}).values()),
    "{whole_enrollment}": ", ".join(_COLUMNS.values()),
    "{bare_enrollment}": ", ".join((_COLUMNS | _BARE).values()),
    "{small_data}": _SMALL_DATA,
    "{timezone}": _COLUMNS["timezone"],
    **{f"{{{lock.name.lower()}_lock}}": str(lock) for lock in AdvisoryLock},
}


def _load_queries() -> dict[str, str]:
    """Read the statements by name, and insert their shared parts."""
    queries, parts = {}, {}
    for file in (files("sequencerd.storage") / "queries").iterdir():
        _, *found = re.split(
            r"^-- (name|part): (\w+)\n", file.read_text("utf-8"), flags=re.MULTILINE
        )
        for kind, name, sql in zip(found[::3], found[1::3], found[2::3], strict=True):
            if kind == "name":
                queries[name] = sql
            else:
                parts[f"{{{name}}}"] = re.sub(r"^--.*\n", "", sql, flags=re.MULTILINE).strip()
    # a part may use earlier parts
    for placeholder, expanded in (*reversed(parts.items()), *_PLACEHOLDERS.items()):
        queries = {name: text.replace(placeholder, expanded) for name, text in queries.items()}
    return queries


QUERIES: Mapping[str, str] = _load_queries()
"""The statements by name."""


def columns(step_keys: Iterable[StepKey]) -> tuple[list[str], list[str]]:
    """Split step keys into an array of sequences and one of steps."""
    wanted = list(step_keys)
    return [sequence for sequence, _ in wanted], [step for _, step in wanted]


def affected(tag: str) -> int:
    """Return how many rows a statement has written, given its command tag such as "INSERT 0 5"."""
    return int(tag.rpartition(" ")[2])
