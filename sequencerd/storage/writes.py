"""Write the new states of locked enrollments, with their events, and extend leases."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from collections.abc import Sequence as Rows
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, NamedTuple

import asyncpg

from sequencerd.core import exact_json
from sequencerd.core.decision import Event
from sequencerd.core.view import REMOVED, merge_data
from sequencerd.storage.statements import QUERIES


class EnrollmentState(NamedTuple):
    """The values that are written for enrollments in the same state, as most of a batch are."""

    sequence: str
    step: str
    status: str
    wake_at: datetime | None
    entered_at: datetime | None
    visit: int
    attempt: int
    leases: int
    retry_at: datetime | None
    leased_by: str | None
    failure: str | None = None
    last_error: str | None = None
    executed: str = "{}"  # as an array in PostgreSQL's text format
    expires_at: datetime | None = None
    waits_until: datetime | None = None


MAX_SEPARATE_STATEMENTS = 3
"""Different states of a batch up to which each is written by a statement of its own."""

NO_EVENTS: Rows[Rows[Any]] = [()] * len(Event._fields)
NO_STATE = EnrollmentState("", "", "active", None, None, 1, 0, 0, None, None)
"""A state that no enrollment has."""


@dataclass(slots=True)
class EnrollmentWrites:
    """What a transaction writes for enrollments that it has locked."""

    rows: dict[EnrollmentState, list[int]] = field(default_factory=dict)
    events: dict[Event, list[int]] = field(default_factory=dict)
    goals_met: dict[int, tuple[Rows[str], str | None]] = field(default_factory=dict)  # elsewhere
    data: dict[int, Mapping[str, Any]] = field(default_factory=dict)  # merged into the data
    places: Mapping[int, str] = field(default_factory=dict)
    """The places (ctid) of rows that the transaction has locked, by id, as far as known."""

    @property
    def are_alike(self) -> bool:
        """Whether all enrollments get the same state and the same events."""
        lists = [*self.rows.values(), *self.events.values()]
        return len(self.rows) == 1 and all(ids == lists[0] for ids in lists)


async def write(connection: asyncpg.Connection, written: EnrollmentWrites, now: datetime) -> None:
    """Write the new states of locked enrollments, and their events. Raises NotStored."""
    if written.data:
        data = [
            (
                id_,
                exact_json.dumps(merge_data({}, changes)),
                [key for key, value in changes.items() if value is REMOVED],
            )
            for id_, changes in written.data.items()
        ]
        await connection.executemany(QUERIES["merge_data"], data)
    if written.goals_met:
        goals = [(id_, *met) for id_, met in written.goals_met.items()]
        await connection.executemany(QUERIES["write_goals"], goals)
    groups = list(written.rows.items())
    if len(groups) > MAX_SEPARATE_STATEMENTS:
        stored = await connection.fetchval(QUERIES["write_each"], *_states(written), now)
        _check_stored(stored, sum(map(len, written.rows.values())))
        groups = []
    if written.events and not groups:
        groups.append((NO_STATE, []))
    events = written.events
    # what has been written before is at another place
    places = {} if written.data or written.goals_met else written.places
    for row, ids in groups:
        happened, events = _event_columns(events), {}
        if where := _in_places(ids, places):
            written_in_place = await connection.fetchval(
                QUERIES["write_in_place"], where, *row, now, *happened
            )
            if written_in_place == len(ids):
                continue
            happened = _event_columns(events)
        stored = await connection.fetchval(
            QUERIES["write_and_record"], id_array(ids), *row, now, *happened
        )
        _check_stored(stored, len(ids))


class Unchanged(NamedTuple):
    """What must not have changed for `write_unchanged` to write: rows and a definition."""

    versions: Mapping[int, int]  # by id, the transaction that has last written the row
    leased_by: str | None
    leases: Collection[int]  # the numbers of the latest leases of all rows
    sequence: str
    revision: int


async def write_unchanged(
    connection: asyncpg.Connection, written: EnrollmentWrites, now: datetime, known: Unchanged
) -> int | None:
    """Write new states and their events, if nothing has changed that is known of them and none is
    locked by another session. Raises NotWritten otherwise. States that differ should be few.

    It is a transaction by itself. Return its number, or None if triggers of others may have changed
    what was written. Goals and data are not written.
    """
    rows = list(written.rows.items())
    state, ids = rows[0]
    fence = known.revision, known.sequence, known.leased_by, id_array(known.leases)
    query: str
    values: Rows[Any]
    if written.are_alike:
        is_one = len(ids) == 1
        query = "write_one_unchanged" if is_one else "write_alike_unchanged"
        values = (
            ids[0] if is_one else id_array(ids),
            *state,
            now,
            *(zip(*written.events, strict=True) if written.events else NO_EVENTS),
            id_array({*known.versions.values()}),
        )
    else:
        query = "write_unchanged"
        values = (
            *_states(written),
            now,
            *_event_columns(written.events),
            id_array(known.versions[id_] for _, ids in rows for id_ in ids),
        )
    try:
        row = await connection.fetchrow(QUERIES[query], *values, *fence)
    except asyncpg.DivisionByZeroError as error:  # not stored as written
        raise NotWritten from error
    if row is None:
        raise NotWritten
    number: int | None = row["number"]
    return number


async def number_of_writes(connection: asyncpg.Connection) -> int | None:
    """Return the number of the present transaction: the version of the rows that it has written.
    None if triggers of others may have changed these, or where each node has numbers of its own.
    """
    number: int | None = await connection.fetchval(QUERIES["number_of_writes"])
    return number


class NotWritten(Exception):  # noqa: N818 - not an error
    """What was read without a lock has changed or is locked, or cannot be written so."""


class NotStored(Exception):  # noqa: N818 - raised for rows, like NotWritten
    """The database has accepted a write, and has not stored it."""

    def __init__(self) -> None:
        super().__init__("a trigger or rule of the table has left the row as it was")


def _check_stored(stored: int, wanted: int) -> None:
    if stored != wanted:
        raise NotStored


def _states(written: EnrollmentWrites) -> Rows[Any]:
    """Return the ids of all rows, and their new states by column."""
    every = [(row, id_) for row, ids in written.rows.items() for id_ in ids]
    return id_array(id_ for _, id_ in every), *zip(*(row for row, _ in every), strict=True)


def _event_columns(events: Mapping[Event, Rows[int]]) -> Rows[Any]:
    """Return the ids of all events, the number of what happened to each, and that by column."""
    numbers = (f",{number}" * len(ids) for number, ids in enumerate(events.values(), 1))
    return (
        _joined(events.values()),
        f"{{{''.join(numbers)[1:]}}}",
        *(zip(*events, strict=True) if events else NO_EVENTS),
    )


def _joined(lists: Iterable[Rows[int]]) -> str:
    """Return lists of ids as one array. Most are equal: each such text is made once."""
    texts: list[str] = []
    before: Rows[int] = ()
    for ids in lists:
        texts.append(texts[-1] if ids == before else ",".join(map(str, ids)))
        before = ids
    return f"{{{','.join(texts)}}}"


def _in_places(ids: Rows[int], places: Mapping[int, str]) -> str | None:
    """Return the places of rows as an array in PostgreSQL's text format, if all are known."""
    if not ids or not places:
        return None
    try:
        joined = '","'.join([places[id_] for id_ in ids])
    except KeyError:
        return None
    return f'{{"{joined}"}}'


def id_array(numbers: Iterable[int]) -> str:
    """Return an array in PostgreSQL's text format."""
    return f"{{{','.join(map(str, numbers))}}}"


def text_array(texts: Iterable[str]) -> str:
    """Return an array in PostgreSQL's text format."""
    quoted = (text.replace("\\", r"\\").replace('"', r"\"") for text in texts)
    return "{" + ",".join(f'"{text}"' for text in quoted) + "}"


async def extend_leases(
    connection: asyncpg.Connection, ids: Rows[int], daemon: str, until: datetime
) -> None:
    """Extend the leases of the side effects that a daemon executes."""
    await connection.execute(QUERIES["extend_leases"], ids, daemon, until)
