"""Every statement that runs against the database, as a typed function; SQL in queries/."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from collections.abc import Sequence as Rows
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from enum import Enum
from importlib.resources import files
from typing import Any, NamedTuple

import asyncpg

from sequencerd.core import exact_json
from sequencerd.core.model import REMOVED, Enrollment, Entry, Event, Fence, merge_data
from sequencerd.core.schedule import SOURCE
from sequencerd.errors import DatabaseError, SettingsError
from sequencerd.storage import conninfo

TRANSIENT_ERRORS = (
    OSError,
    TimeoutError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,  # a connection that is cut in the middle of an answer
    asyncpg.PostgresError,
)
"""Errors after which the same work is repeated a little later. If only one row meets such an error,
or its data cause it, the row is isolated first.
"""

LOST_ERRORS = (
    OSError,
    TimeoutError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
    asyncpg.PostgresConnectionError,
    asyncpg.AdminShutdownError,
    asyncpg.CrashShutdownError,
    asyncpg.CannotConnectNowError,
)
"""Errors of a lost connection: whether it has committed is not known."""

_DATA = frozenset({"21", "22", "23", "54"})
_ENVIRONMENT = frozenset({"08", "25", "28", "40", "53", "55", "57", "58"})
_PLAIN = _ENVIRONMENT | {"0A", "26", "3D", "3F", "42", "XX"}


def is_data_error(error: BaseException) -> bool:
    """Return whether the database, or the driver, finds fault with a row's own data."""
    if isinstance(error, asyncpg.PostgresError):
        return _class(error) in _DATA
    return isinstance(error, (ValueError, OverflowError))


def is_environment(error: BaseException) -> bool:
    """Return whether an error is one of locks, timeouts, resources or connections."""
    if isinstance(error, asyncpg.PostgresError):
        return _class(error) in _ENVIRONMENT
    return isinstance(error, LOST_ERRORS) and not is_data_error(error)


def _class(error: asyncpg.PostgresError) -> str:
    return (error.sqlstate or "")[:2]


def brief(error: BaseException) -> str:
    """Describe an error of the database for the log, without what it quotes from rows."""
    name = type(error).__name__
    if isinstance(error, asyncpg.PostgresError):
        is_plain = _class(error) in _PLAIN
    else:
        is_plain = is_environment(error)
    if is_plain:
        return str(error).partition("\n")[0] or name
    return f"{name} {getattr(error, 'sqlstate', '')}".rstrip()


CONNECT_TIMEOUT = 10.0  # seconds
PROBE_TIMEOUT = 5.0  # seconds
MAX_BYTES = 8_000_000  # of data that one transaction reads, except for a single larger enrollment
FIRST_LARGE = 4  # enrollments with large data that are read before their size is known
COMMAND_TIMEOUT = 30.0  # seconds: a connection that is silently dead must not block the engine

PROBLEM_COLUMNS = 7  # of sequencer.problems, besides the daemon

StepKey = tuple[str, str]
"""A step of a sequence: its key in the heap."""


class AdvisoryLock(Enum):
    """The advisory locks, by the second of their two numbers; sql/0001_sequencer.sql lists them."""

    MIGRATIONS = 1
    RETENTION = 2
    DEFINITIONS = 3
    NOTIFY = 4
    REQUESTS = 5
    ENROLLING = 6

    def __str__(self) -> str:
        """Return the arguments of the functions that lock it."""
        return f"{LOCK_CLASS}, {self.value}"


LOCK_CLASS = 7364528
"""The first number of each advisory lock: those of other applications have another."""

_SMALL_DATA = "CASE WHEN pg_column_size(e.data) <= 2000 THEN e.data END AS data"
_COLUMNS = {name: f"e.{name}" for name in Enrollment._fields} | {
    "wake_at": "least(e.wake_at, '9999-12-31Z') AS wake_at",  # Python's calendar has no infinity
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
}  # what may be unreadable is not read
_PLACEHOLDERS = {
    "{enrollment}": ", ".join((_COLUMNS | {"data": _SMALL_DATA}).values()),
    "{whole_enrollment}": ", ".join(_COLUMNS.values()),
    "{bare_enrollment}": ", ".join((_COLUMNS | _BARE).values()),
    "{small_data}": _SMALL_DATA,
    **{f"{{{lock.name.lower()}_lock}}": str(lock) for lock in AdvisoryLock},
}


def _load_queries() -> dict[str, str]:
    """Read the statements by name, and insert the parts that they share."""
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
    # a part may use those before it
    for placeholder, expanded in (*reversed(parts.items()), *_PLACEHOLDERS.items()):
        queries = {name: text.replace(placeholder, expanded) for name, text in queries.items()}
    return queries


_FUNCTION = re.compile(r"(?P<schema>[a-z_][a-z0-9_]*)\.(?P<name>[a-z_][a-z0-9_]*)")

QUERIES: Mapping[str, str] = _load_queries()
"""The statements by name."""


class Claimed(NamedTuple):
    """The enrollments that a claim has read, and how many rows it has locked."""

    enrollments: list[Enrollment]
    locked: int


class Row(NamedTuple):
    """What is written of enrollments that are in the same state, as most of a batch are."""

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
    executed: tuple[str, ...] = ()
    expires_at: datetime | None = None
    waits_until: datetime | None = None


@dataclass(slots=True)
class Written:
    """What a transaction writes of enrollments that it has locked."""

    rows: dict[Row, list[int]] = field(default_factory=dict)
    events: dict[Event, list[int]] = field(default_factory=dict)
    goals_met: dict[int, tuple[Rows[str], str | None]] = field(default_factory=dict)  # elsewhere
    data: dict[int, Mapping[str, Any]] = field(default_factory=dict)  # merged into what is there


async def connect(url: str) -> asyncpg.Connection:
    """Open a connection for a command. Raises DatabaseError without the password in it."""
    try:
        connection = await asyncpg.connect(
            **conninfo.arguments(url, name="sequencerd", timeout=CONNECT_TIMEOUT),
            statement_cache_size=0,  # it may lead to a pooler
        )
    except (OSError, asyncpg.PostgresError, TimeoutError) as error:
        raise DatabaseError(f"cannot connect to the database: {explain(error)}") from error
    except (ValueError, asyncpg.InterfaceError) as error:
        reason = str(error).partition("\n")[0]
        raise SettingsError(f"wrong setting of the database: {reason}") from error
    return connection


def explain(error: BaseException) -> str:
    """Return why a connection could not be made."""
    return str(error) or f"no answer within {CONNECT_TIMEOUT:g} seconds"


async def connect_pool(
    url: str, size: int, *, pooled: bool = False, least: int = 1, **options: Any
) -> asyncpg.Pool:
    """Open connections for the daemon, whose writes send no notifications.

    With `pooled`, through a pooler, nothing is kept from one transaction to the next: no prepared
    statements, and no settings, so writes do send notifications. `least` connections are opened at
    once.
    """
    notify = {} if pooled else {"sequencer.notify": "off"}
    if pooled:
        options["statement_cache_size"] = 0
    else:
        # for as long as the connection lasts: a lone timer must not wait for them
        options["max_cached_statement_lifetime"] = 0
    return await asyncpg.create_pool(
        **conninfo.arguments(url, name="sequencerd", timeout=CONNECT_TIMEOUT, settings=notify),
        min_size=least,
        max_size=size,
        command_timeout=COMMAND_TIMEOUT,
        **options,
    )


@asynccontextmanager
async def connection(pool: asyncpg.Pool) -> AsyncIterator[asyncpg.Connection]:
    """Borrow a connection. One that does not answer is closed.

    A cancellation remains one even if the ROLLBACK after it fails; otherwise a task that repeats
    its work after database errors could not be cancelled.
    """
    waiting, ours = _waiting.setdefault(pool, {}), object()
    waiting[ours] = time.monotonic()
    try:
        async with pool.acquire() as acquired:
            _end_wait(pool, ours)
            with _closed_when_dead(acquired):
                yield acquired
    except TRANSIENT_ERRORS as error:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise asyncio.CancelledError from error
        raise
    finally:
        _end_wait(pool, ours)


_waiting: dict[asyncpg.Pool, dict[object, float]] = {}
"""Since when tasks wait for a connection, for pools on which any task waits."""


def _end_wait(pool: asyncpg.Pool, ours: object) -> None:
    if (waiting := _waiting.get(pool)) is not None:
        waiting.pop(ours, None)
        if not waiting:
            del _waiting[pool]


def longest_wait(pool: asyncpg.Pool) -> float:
    """Return for how many seconds a connection has been waited for. Callable from any thread."""
    since = list(_waiting.get(pool, {}).values())
    return time.monotonic() - min(since) if since else 0.0


@asynccontextmanager
async def transaction(on: asyncpg.Connection, **options: Any) -> AsyncIterator[asyncpg.Connection]:
    """Open a transaction. A connection that does not answer is closed, without a ROLLBACK."""
    async with on.transaction(**options):
        with _closed_when_dead(on):
            yield on


@asynccontextmanager
async def reading(pool: asyncpg.Pool, **options: Any) -> AsyncIterator[asyncpg.Connection]:
    """Borrow a connection, in a read-only transaction."""
    async with connection(pool) as acquired, transaction(acquired, readonly=True, **options):
        yield acquired


async def read(
    pool: asyncpg.Pool, query: str, *arguments: object, seconds: float | None = None
) -> list[asyncpg.Record]:
    """Return the rows of one of the QUERIES, in a read-only transaction and within a time."""
    async with reading(pool) as connection:
        rows: list[asyncpg.Record] = await connection.fetch(
            QUERIES[query], *arguments, timeout=seconds
        )
        return rows


@contextmanager
def _closed_when_dead(used: asyncpg.Connection) -> Iterator[None]:
    try:
        yield
    except TimeoutError:
        used.terminate()
        raise


# --- definitions


async def revisions(connection: asyncpg.Connection) -> dict[str, int]:
    """Read the revision of every sequence."""
    rows = await connection.fetch(QUERIES["revisions"])
    return {row["name"]: row["revision"] for row in rows}


async def definitions(
    connection: asyncpg.Connection, names: Iterable[str]
) -> tuple[list[asyncpg.Record], list[asyncpg.Record]]:
    """Read some sequences and their steps, from one snapshot."""
    wanted = list(names)
    async with transaction(connection, isolation="repeatable_read", readonly=True):
        return (
            await connection.fetch(QUERIES["sequences"], wanted),
            await connection.fetch(QUERIES["steps"], wanted),
        )


class HiddenTable(NamedTuple):
    """A table of which row-level security hides rows from a user: all, or perhaps some."""

    table: str
    user: str
    hides_all: bool

    def __str__(self) -> str:
        return f"{'all' if self.hides_all else 'some'} of {self.table} from {self.user}"


async def hidden_tables(connection: asyncpg.Connection) -> list[HiddenTable]:
    """Find tables of which row-level security may hide rows from this user, or from triggers."""
    return [HiddenTable(*row) for row in await connection.fetch(QUERIES["row_security"])]


async def set_problems(
    connection: asyncpg.Connection, problems: Mapping[StepKey, str | None]
) -> None:
    """Write the problems of steps; None clears one."""
    await connection.execute(QUERIES["set_problems"], *_columns(problems), list(problems.values()))


# --- the engine


async def is_standby(connection: asyncpg.Connection) -> bool:
    """Return whether the server is a standby, until it is promoted."""
    found: bool = await connection.fetchval(QUERIES["is_standby"])
    return found


async def server_time(connection: asyncpg.Connection) -> datetime:
    """Read the database's clock."""
    now: datetime = await connection.fetchval(QUERIES["server_time"])
    return now


async def beat(
    connection: asyncpg.Connection,
    daemon: str,
    started_at: datetime | None,
    lease: timedelta,
    types: Iterable[str],
) -> datetime:
    """Extend the life of a daemon by the duration of a lease. Return since when it runs."""
    since: datetime = await connection.fetchval(
        QUERIES["beat"], daemon, started_at, lease, sorted(types)
    )
    return since


async def types_elsewhere(connection: asyncpg.Connection, daemon: str) -> frozenset[str]:
    """Read the step types that other living daemons serve."""
    return frozenset(row[0] for row in await connection.fetch(QUERIES["types_elsewhere"], daemon))


async def notify_due(connection: asyncpg.Connection, step_keys: Iterable[StepKey]) -> None:
    """Notify other daemons of due steps."""
    await connection.execute(QUERIES["notify_due"], *_columns(step_keys))


async def remove_dead_daemons(connection: asyncpg.Connection) -> None:
    """Remove daemons that have sent no heartbeat for too long."""
    await connection.execute(QUERIES["remove_dead_daemons"])


async def remove_daemon(connection: asyncpg.Connection, daemon: str) -> None:
    """Remove a daemon that ends."""
    await connection.execute(QUERIES["remove_daemon"], daemon)


async def write_problems(
    connection: asyncpg.Connection, daemon: str, problems: Rows[tuple[object, ...]]
) -> None:
    """Replace the problems that a daemon reports, given in the order of the columns."""
    columns = list(zip(*problems, strict=True)) or [()] * PROBLEM_COLUMNS
    await connection.execute(QUERIES["remove_problems"], daemon, *columns[:2])
    if problems:
        await connection.execute(QUERIES["write_problems"], daemon, *columns)


async def first_wakes(connection: asyncpg.Connection) -> list[tuple[StepKey, datetime]]:
    """Read the earliest wake time of each step that has active enrollments."""
    rows = await connection.fetch(QUERIES["first_wakes"])
    return [((row["sequence"], row["step"]), row["wake_at"]) for row in rows]


async def acquire_notify_lock(connection: asyncpg.Connection) -> bool | None:
    """Try to acquire the notify lock, for as long as the connection lasts.

    Return True if this connection holds it, False if another daemon does, and None if transactions
    are in progress that have skipped their notification.
    """
    is_ours: bool | None = await connection.fetchval(QUERIES["acquire_notify_lock"])
    return is_ours


async def release_notify_lock(connection: asyncpg.Connection) -> None:
    """Release the notify lock, and notify the other daemons of that."""
    await connection.execute(QUERIES["release_notify_lock"])


async def count_due(
    connection: asyncpg.Connection, step_keys: Iterable[StepKey], now: datetime, limit: int
) -> list[tuple[str, str, int, int]]:
    """Count due and overdue enrollments of steps, up to a limit each."""
    sequences, steps = _columns(step_keys)
    rows = await connection.fetch(QUERIES["count_due"], sequences, steps, now, limit)
    return [tuple(row) for row in rows]


async def claim(
    connection: asyncpg.Connection,
    step_key: StepKey,
    now: datetime,
    revision: int,
    limit: int,
    *,
    daemon: str,
    excluding: Rows[int],
) -> Claimed:
    """Claim due enrollments of a step: none that a living daemon has leased, and no more than fit
    into MAX_BYTES. They stay locked until the end of the transaction.
    """
    rows = await connection.fetch(
        QUERIES["claim"], *step_key, now, daemon, excluding, revision, limit
    )
    return Claimed([Enrollment(*row) for row in await _with_data(connection, rows)], len(rows))


async def due_ids(
    connection: asyncpg.Connection,
    step_key: StepKey,
    now: datetime,
    limit: int,
    *,
    daemon: str,
    excluding: Rows[int],
) -> list[int]:
    """Find what a claim would find, reading nothing that may be unreadable."""
    rows = await connection.fetch(QUERIES["due_ids"], *step_key, now, daemon, excluding, limit)
    return [row["id"] for row in rows]


async def expired_ids(
    connection: asyncpg.Connection,
    step_key: StepKey,
    now: datetime,
    since: datetime | None,
    limit: int,
    *,
    daemon: str,
    excluding: Rows[int],
) -> list[int]:
    """Find unleased enrollments of a step that have expired, or are due `since` a time and may
    have.
    """
    since = since or datetime.min.replace(tzinfo=UTC)
    query = QUERIES["expired_ids"]
    rows = await connection.fetch(query, *step_key, now, daemon, excluding, limit, since)
    return [row["id"] for row in rows]


async def forget_expiries(connection: asyncpg.Connection, step_key: StepKey) -> None:
    """Mark the expiries of a step as unknown, as its definition may have changed."""
    await connection.execute(QUERIES["forget_expiries"], *step_key)


async def claim_some(
    connection: asyncpg.Connection,
    step_key: StepKey,
    now: datetime,
    revision: int,
    ids: Rows[int],
    *,
    daemon: str,
    bare: bool = False,
) -> list[Enrollment]:
    """Claim given enrollments of a step, including those leased to this daemon itself.

    If `bare`, without their data and subjects, which may be unreadable.
    """
    query = QUERIES["claim_bare" if bare else "claim_some"]
    rows = await connection.fetch(query, *step_key, now, daemon, ids, revision)
    return [Enrollment(*row) for row in await _with_data(connection, rows)]


async def _with_data(
    connection: asyncpg.Connection, rows: Rows[asyncpg.Record]
) -> Rows[Iterable[Any]]:
    """Add large data, which statements omit, to rows: as much as fits into MAX_BYTES.

    Rows beyond that are dropped.
    """
    large = [row["id"] for row in rows if row["data"] is None]
    if not large:
        return rows
    data: dict[int, str] = {}
    size, take = 0, FIRST_LARGE
    while large and size < MAX_BYTES:
        part, large = large[:take], large[take:]
        for id_, text in await connection.fetch(QUERIES["large_data"], part):
            data[id_] = text
            size += len(text)
        take = max(1, (MAX_BYTES - size) * len(data) // max(size, 1))
    return [
        tuple(data[row["id"]] if key == "data" else value for key, value in row.items())
        if row["data"] is None
        else row
        for row in rows
        if row["data"] is not None or row["id"] in data
    ]


async def count_expired_leases(
    connection: asyncpg.Connection, claimed: Rows[Enrollment], now: datetime
) -> dict[int, int]:
    """Count the recent leases of enrollments that expired in their present visits."""
    ids, visits = [one.id for one in claimed], [one.visit for one in claimed]
    return {
        row["enrollment_id"]: row["count"]
        for row in await connection.fetch(QUERIES["count_expired_leases"], ids, visits, now)
    }


async def orphans(
    connection: asyncpg.Connection,
    step_keys: Iterable[StepKey],
    now: datetime,
    *,
    daemon: str,
    excluding: Rows[int],
) -> dict[StepKey, list[int]]:
    """Find what a daemon has leased and does not know of, by step, once it is due."""
    sequences, steps = _columns(step_keys)
    found: dict[StepKey, list[int]] = {}
    for row in await connection.fetch(QUERIES["orphans"], sequences, steps, now, daemon, excluding):
        found.setdefault((row["sequence"], row["step"]), []).append(row["id"])
    return found


async def probe(connection: asyncpg.Connection) -> None:
    """Raise what keeps enrollments and events from being written, whichever row it is."""
    await connection.execute(QUERIES["probe"], timeout=PROBE_TIMEOUT)


async def lock(
    connection: asyncpg.Connection, known: Rows[Enrollment]
) -> tuple[set[int], dict[Fence, Enrollment], dict[str, int | None]]:
    """Lock enrollments, except those that another session has locked.

    Return the ids of the locked rows; by their fences, those that are still as known, read again;
    and the revisions of their sequences. What cannot change within a visit is taken from what is
    known, as dates take long to read.
    """
    by_fence = {enrollment.fence: enrollment for enrollment in known}
    ids = sorted({enrollment.id for enrollment in known})
    locked, now, revisions = set(), {}, {}
    rows = await _with_data(connection, await connection.fetch(QUERIES["lock"], ids))
    for row in rows:
        id_, visit, leases, leased_by, *rest = row
        subject, data, sequence, step, timezone, error, goals, elsewhere, executed, revision = rest
        fence = (id_, visit, leases, leased_by)
        locked.add(id_)
        if was := by_fence.get(fence):
            revisions[sequence] = revision
            now[fence] = Enrollment(
                id_,
                subject,
                data,
                was.created_at,
                was.tag,
                was.original_id,
                sequence,
                step,
                timezone,
                None,
                was.entered_at,
                visit,
                was.attempt,
                leases,
                was.retry_at,
                leased_by,
                error,
                goals,
                elsewhere,
                executed,
            )
    return locked, now, revisions


async def fences(connection: asyncpg.Connection, ids: Rows[int]) -> set[Fence]:
    """Read the fences of enrollments, after every transaction that may still write them."""
    rows = await connection.fetch(QUERIES["fences"], ids)
    return {(row["id"], row["visit"], row["leases"], row["leased_by"]) for row in rows}


async def existing(connection: asyncpg.Connection, ids: Rows[int]) -> set[int]:
    """Return which enrollments are not deleted."""
    return {row["id"] for row in await connection.fetch(QUERIES["existing"], ids)}


async def refusals(
    connection: asyncpg.Connection, entered: Rows[tuple[int | None, str, str]]
) -> list[tuple[str, str | None] | None]:
    """Of those that enter a sequence (the id of what jumps there, subject, sequence): its reentry
    policy, and the code of the reason for which it refuses. None where there is no such sequence.
    """
    rows = await connection.fetch(QUERIES["refusals"], *map(list, zip(*entered, strict=True)))
    return [row["reentry"] and (row["reentry"], row["refusal"]) for row in rows]


async def lock_cancelled(
    connection: asyncpg.Connection, wanted: Rows[tuple[int, str, str]]
) -> list[tuple[int, int | None]]:
    """Lock what is to be cancelled (by the id of an enrollment, subject, sequence). Return for each
    enrollment the index in `wanted`, and its id, or None if another session has locked it.
    """
    rows = await connection.fetch(QUERIES["lock_cancelled"], *map(list, zip(*wanted, strict=True)))
    return [(row["number"] - 1, row["locked"]) for row in rows]


async def cancel(
    connection: asyncpg.Connection, messages: Mapping[int, str], now: datetime
) -> None:
    """Cancel locked enrollments, with a message for the history of each."""
    query = QUERIES["cancel_others"]
    await connection.execute(query, list(messages), list(messages.values()), now)


async def enter(connection: asyncpg.Connection, entries: Rows[Entry]) -> set[StepKey]:
    """Enroll subjects, and return where they begin. Raises ValueError if one has been enrolled
    since it was asked.
    """
    rows = await connection.fetch(
        QUERIES["enter"],
        [entry.sequence for entry in entries],
        [entry.subject for entry in entries],
        [entry.data for entry in entries],
        [entry.timezone for entry in entries],
        [json.dumps(entry.executed) for entry in entries],
    )
    if len(rows) < len(entries):
        raise ValueError("a subject has been enrolled meanwhile")
    return {(row["sequence"], row["step"]) for row in rows}


async def next_wake(
    connection: asyncpg.Connection,
    step_key: StepKey,
    now: datetime,
    *,
    daemon: str,
    excluding: Rows[int],
) -> datetime | None:
    """Read when to claim at a step again, `excluding` some enrollments."""
    query = QUERIES["next_wake"]
    at: datetime | None = await connection.fetchval(query, *step_key, now, daemon, excluding)
    return at


async def write(connection: asyncpg.Connection, written: Written, now: datetime) -> None:
    """Write the new states of locked enrollments, and their events."""
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
    if written.rows:
        rows = [(ids, *row, now) for row, ids in written.rows.items()]
        await connection.executemany(QUERIES["write"], rows)
    if written.events:
        enrollments = [id_ for ids in written.events.values() for id_ in ids]
        number = [n for n, ids in enumerate(written.events.values(), 1) for _ in ids]
        await connection.execute(
            QUERIES["record"], enrollments, number, *zip(*written.events, strict=True)
        )


async def extend_leases(
    connection: asyncpg.Connection, ids: Rows[int], daemon: str, until: datetime
) -> None:
    """Extend the leases of what a daemon is executing."""
    await connection.execute(QUERIES["extend_leases"], ids, daemon, until)


async def occupied(connection: asyncpg.Connection) -> list[StepKey]:
    """Read the steps that have active enrollments."""
    rows = await connection.fetch(QUERIES["occupied"])
    return [(row["sequence"], row["step"]) for row in rows]


async def request_evaluation(
    connection: asyncpg.Connection, step_keys: Iterable[StepKey]
) -> list[StepKey]:
    """Request the evaluation of all that wait at steps. Return the steps that were not locked."""
    sequences, steps = _columns(step_keys)
    rows = await connection.fetch(QUERIES["request_evaluation"], sequences, steps)
    return [(row["sequence"], row["name"]) for row in rows]


async def waiting_of_subjects(
    connection: asyncpg.Connection, subjects: Rows[str], after: int, now: datetime, limit: int
) -> list[asyncpg.Record]:
    """Read id, subject, sequence and step of the waiting enrollments of subjects, after an id."""
    query = QUERIES["waiting_of_subjects"]
    rows: list[asyncpg.Record] = await connection.fetch(query, subjects, after, now, limit)
    return rows


async def unfinished_rescheduling(connection: asyncpg.Connection) -> dict[StepKey, int]:
    """Read the steps with enrollments yet to be evaluated, and from which id on."""
    rows = await connection.fetch(QUERIES["unfinished_rescheduling"])
    return {(row["sequence"], row["name"]): row["reschedule_from"] for row in rows}


async def acquire_requests_lock(connection: asyncpg.Connection) -> bool:
    """Try to become the daemon that handles requests, for as long as the connection lasts."""
    is_ours: bool = await connection.fetchval(QUERIES["acquire_requests_lock"])
    return is_ours


async def rescheduling_from(connection: asyncpg.Connection, step_key: StepKey) -> int | None:
    """Read from which id on enrollments at a step are yet to be evaluated; None if none are."""
    since: int | None = await connection.fetchval(QUERIES["rescheduling_from"], *step_key)
    return since


async def active_ids(
    connection: asyncpg.Connection, step_key: StepKey, since: int, limit: int
) -> list[int]:
    """Read the ids of the enrollments at a step, in order, from one on."""
    rows = await connection.fetch(QUERIES["active_ids"], *step_key, since, limit)
    return [row["id"] for row in rows]


async def lock_rescheduling(
    connection: asyncpg.Connection, step_key: StepKey, since: int, revision: int
) -> bool:
    """Lock a step, so that this daemon alone evaluates it until the end of the transaction.

    Return False if another daemon has locked it, or the definition is not the known one.
    """
    return (
        await connection.fetchval(QUERIES["lock_rescheduling"], *step_key, since, revision)
        is not None
    )


async def record_progress(connection: asyncpg.Connection, step_key: StepKey, until: int) -> None:
    """Record up to which id a step is done."""
    await connection.execute(QUERIES["record_progress"], *step_key, until)


async def lock_waiting(
    connection: asyncpg.Connection, step_key: StepKey, ids: Rows[int], now: datetime
) -> tuple[list[Enrollment], list[int]]:
    """Lock enrollments that wait at a step. Return them, and those that others have locked."""
    rows = await connection.fetch(QUERIES["lock_waiting"], *step_key, ids, now)
    waiting = [Enrollment(*row) for row in await _with_data(connection, rows)]
    if len(waiting) == len(ids):
        return waiting, []
    ours = {enrollment.id for enrollment in waiting}
    others = [id_ for id_ in ids if id_ not in ours]
    rows = await connection.fetch(QUERIES["waiting"], *step_key, others, now)
    return waiting, [row["id"] for row in rows]


async def finish_rescheduling(
    connection: asyncpg.Connection, step_key: StepKey, since: int
) -> bool | None:
    """Record that a step is done. Return whether to do it again; None if another daemon did."""
    again: bool | None = await connection.fetchval(QUERIES["finish_rescheduling"], *step_key, since)
    return again


async def new_transaction(connection: asyncpg.Connection) -> int:
    """Draw a number greater than those of all transactions that have written until now."""
    number: int = await connection.fetchval(QUERIES["new_transaction"])
    return number


async def oldest_transaction(connection: asyncpg.Connection) -> int:
    """Read the number of the oldest transaction in progress that has written."""
    number: int = await connection.fetchval(QUERIES["oldest_transaction"])
    return number


async def revive(connection: asyncpg.Connection, step_keys: Rows[StepKey], now: datetime) -> int:
    """Resume enrollments that failed at steps which are valid now. Return how many."""
    sequences, steps = _columns(step_keys)
    return _count(await connection.execute(QUERIES["revive"], sequences, steps, now))


async def suppressed(
    connection: asyncpg.Connection, addresses: Rows[tuple[str, str]]
) -> set[tuple[str, str]]:
    """Return which of the (channel, address) are suppressed."""
    channels, texts = [a[0] for a in addresses], [a[1] for a in addresses]
    rows = await connection.fetch(QUERIES["suppressed"], channels, texts)
    return {(row["channel"], row["address"]) for row in rows}


async def look_up(
    connection: asyncpg.Connection, function: str, subjects: Rows[str], seconds: float
) -> dict[str, Mapping[str, Any]]:
    """Call an SQL function `schema.name(subjects text[])` for data, by subject.

    It cannot write, and the server ends it after some seconds. Raises ValueError for what is not
    the name of a function, or in a schema that applications cannot have.
    """
    name = _FUNCTION.fullmatch(function)
    if name is None or re.match(r"pg_|information_schema$|sequencer$", name["schema"]):
        raise ValueError(
            f"{function!r} is neither set up as [lookups.{function}] nor installed, "
            "nor an SQL function's name such as app.of_subjects"
        )
    query = QUERIES["look_up"].format(**name.groupdict())
    async with connection.transaction(readonly=True):
        # for this transaction alone, so that it holds through a pooler as well
        await connection.execute(QUERIES["limit_statement"], f"{seconds * 1000:.0f}")
        rows = await connection.fetch(query, subjects, timeout=seconds + COMMAND_TIMEOUT)
    return {row["subject"]: json.loads(row["data"] or "{}") for row in rows}


class Candidate(NamedTuple):
    """A subject that a user's query returns, and that could enter."""

    subject: str
    data: str | None
    timezone: str | None


async def read_source(
    connection: asyncpg.Connection, source: str, sequence: str, limit: int, seconds: float
) -> tuple[list[Candidate], Counter[str]]:
    """Read the subjects that a user's view or function returns, without those that the sequence
    refuses; and count the rows that cannot be enrolled, by what is wrong with them.

    In a savepoint of the caller's transaction: nothing can be written, and the server ends the
    query after so many seconds. Raises ValueError if there is no such view or function.
    """
    name = SOURCE.fullmatch(source)
    assert name is not None  # it is checked with the definition
    limited = connection.transaction()
    await limited.start()
    try:
        await connection.execute(QUERIES["read_only"], f"{seconds * 1000:.0f}")
        kind = await connection.fetchval(QUERIES["source_kind"], *name.groups())
        if kind is None:
            raise ValueError(f"no view, table or function {source} without arguments exists")
        called = "" if kind == "relation" else "()"
        query = QUERIES["read_source"].replace(
            "{source}", '"{schema}"."{name}"'.format(**name.groupdict()) + called
        )
        rows = await connection.fetch(query, sequence, limit, timeout=seconds + COMMAND_TIMEOUT)
    finally:
        if not connection.is_closed():
            await limited.rollback()  # and the settings with it
    valid = [Candidate(*row[:3]) for row in rows if row["fault"] is None]
    return valid, Counter(row["fault"] for row in rows if row["fault"] is not None)


async def try_lock_retention(connection: asyncpg.Connection) -> bool:
    """Try to become the only daemon that runs retention, until the end of the transaction."""
    is_alone: bool = await connection.fetchval(QUERIES["try_lock_retention"])
    return is_alone


async def add_event_partitions(connection: asyncpg.Connection) -> None:
    """Create the partitions of the history that are needed soon."""
    await connection.execute(QUERIES["add_event_partitions"])


async def drop_event_partition(connection: asyncpg.Connection, before: datetime) -> str | None:
    """Drop the oldest partition of the history, if all of it is older. Return its name."""
    name: str | None = await connection.fetchval(QUERIES["drop_event_partition"], before)
    return name


async def delete_ended(connection: asyncpg.Connection, before: datetime, limit: int) -> int:
    """Delete a batch of the enrollments that ended before a time. Return how many."""
    count: int = await connection.fetchval(QUERIES["delete_ended"], before, limit)
    return count


def _columns(step_keys: Iterable[StepKey]) -> tuple[list[str], list[str]]:
    """Return the sequences and the steps of keys, each as an array."""
    wanted = list(step_keys)
    return [sequence for sequence, _ in wanted], [step for _, step in wanted]


def _count(tag: str) -> int:
    """Return the number in a command tag such as "INSERT 0 5"."""
    return int(tag.rsplit(" ", 1)[-1])
