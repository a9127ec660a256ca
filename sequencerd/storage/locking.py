"""Lock and read enrollments: due ones, given ones, and those whose side effects have ended."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import AsyncGenerator, Mapping
from collections.abc import Sequence as Rows
from datetime import UTC, datetime
from typing import Any, NamedTuple

import asyncpg

from sequencerd.core.enrollment import NEVER, Enrollment, Fence, StepKey
from sequencerd.storage import connections
from sequencerd.storage.sequences import read_revisions
from sequencerd.storage.statements import QUERIES, columns
from sequencerd.storage.wakes import LeftAtStep
from sequencerd.storage.writes import id_array

MANY_LEASES = 50  # leases of one transaction, for which it pays to note its number
MAX_BYTES = 8_000_000  # of data that one transaction reads, except for a single larger enrollment
FIRST_LARGE_ROWS = 4  # enrollments with large data that are read before their size is known


Places = Mapping[int, str]
"""By id, where rows are that a transaction has locked and not written yet (ctid)."""

_PLACE_AND_NUMBER = 2  # the columns of a claim before those of the enrollment


class Claimed(NamedTuple):
    """The enrollments that a claim has read, and the number of rows that it has locked at each
    step; their places and the number of the transaction, unless nodes have places and numbers of
    their own, or triggers of others may change what is written.
    """

    enrollments: list[Enrollment]
    locked: Counter[StepKey]
    places: Places
    transaction: int | None


class DueEnrollments(NamedTuple):
    """Which due enrollments of a step to read: none that a living daemon has leased. The parameters
    of `peek` and `due_ids`, in their order.
    """

    sequence: str
    step: str
    now: datetime
    daemon: str
    excluding: Rows[int]
    revision: int  # of the known definition: if it has changed, none are read
    limit: int
    since: datetime  # the first wake time

    @property
    def step_key(self) -> StepKey:
        """Return the key of the step."""
        return self.sequence, self.step


async def claim(connection: asyncpg.Connection, dues: Rows[DueEnrollments]) -> Claimed:
    """Claim due enrollments of steps at one time, no more than fit into MAX_BYTES. They stay locked
    until the end of the transaction.
    """
    first = dues[0]
    excluding = list({id_ for due in dues for id_ in due.excluding})
    rows = await connection.fetch(
        QUERIES["claim"],
        *columns(due.step_key for due in dues),
        first.now,
        first.daemon,
        excluding,
        [due.revision for due in dues],
        [due.limit for due in dues],
        [due.since for due in dues],
    )
    number = rows[0]["transaction"] if rows else None
    places = {} if number is None else {row["id"]: row["place"] for row in rows}
    whole = await _with_data(connection, rows)
    enrollments = [Enrollment._make(row[_PLACE_AND_NUMBER:]) for row in whole]
    locked = Counter((row["sequence"], row["step"]) for row in rows)
    return Claimed(enrollments, locked, places, number)


class Peeked(NamedTuple):
    """What was read without a lock: enrollments, by id which transaction has last written each, and
    what is left at the step if all of them are written.
    """

    enrollments: list[Enrollment]
    versions: dict[int, int]
    left: LeftAtStep | None


async def peek(
    connection: asyncpg.Connection, due: DueEnrollments, *, with_ahead: bool
) -> Peeked | None:
    """Read without a lock what a claim would claim, and what other daemons have leased. Return None
    if a claim must read it, because its last writer is not known, or data are large.
    """
    rows = await connection.fetch(QUERIES["peek"], *due, with_ahead)
    if any(row["version"] is None or row["data"] is None for row in rows):
        return None
    left = None
    for now, ahead, *_ in rows[:1]:
        left = LeftAtStep(now, None, None, (ahead or NEVER) if with_ahead else None)
    return Peeked(
        [Enrollment._make(row[3:]) for row in rows],
        {row["id"]: int(row["version"]) for row in rows},
        left,
    )


async def read_ahead(
    connection: asyncpg.Connection, waking: DueEnrollments, page: int
) -> AsyncGenerator[list[tuple[Enrollment, int]], None]:
    """Read, in pages, what will be due at a time, and which transaction has last written each: only
    what `peek` could read then.
    """
    async with connections.transaction(connection):
        async for rows in connections.batches(
            connection, "peeked", QUERIES["peek"], *waking, False, size=page
        ):
            yield [
                (Enrollment._make(row[3:]), int(row["version"]))
                for row in rows
                if row["version"] is not None
                and row["data"] is not None
                and row["leased_by"] is None
            ]


async def due_ids(connection: asyncpg.Connection, due: DueEnrollments) -> list[int]:
    """Find the ids that a claim would find, without reading values that may be unreadable."""
    return [row["id"] for row in await connection.fetch(QUERIES["due_ids"], *due)]


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
    """Find unleased enrollments of a step that have expired, or that are due `since` a time and may
    have expired.
    """
    since = since or datetime.min.replace(tzinfo=UTC)
    query = QUERIES["expired_ids"]
    rows = await connection.fetch(query, *step_key, now, daemon, excluding, limit, since)
    return [row["id"] for row in rows]


async def forget_expiries(connection: asyncpg.Connection, step_key: StepKey) -> None:
    """Mark the expiries of a step as unknown, because its definition may have changed."""
    await connections.write_in_batches(connection, "forget_expiries", *step_key)


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

    If `bare`, read them without their data and subjects, which may be unreadable.
    """
    query = QUERIES["claim_bare" if bare else "claim_some"]
    rows = await connection.fetch(query, *step_key, now, daemon, ids, revision)
    return list(map(Enrollment._make, await _with_data(connection, rows)))


async def _with_data(connection: asyncpg.Connection, rows: Rows[asyncpg.Record]) -> Rows[Rows[Any]]:
    """Add large data, which the statements omit, to rows: as much as fits into MAX_BYTES. Further
    rows are dropped.
    """
    large = [row["id"] for row in rows if row["data"] is None]
    if not large:
        return rows
    data: dict[int, str] = {}
    size, take = 0, FIRST_LARGE_ROWS
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
    since: Mapping[StepKey, datetime],
    now: datetime,
    *,
    daemon: str,
    excluding: Rows[int],
) -> dict[StepKey, list[int]]:
    """Find, by step, due enrollments that a daemon has leased but does not know of."""
    found: dict[StepKey, list[int]] = {}
    for row in await connection.fetch(
        QUERIES["orphans"], *columns(since), list(since.values()), now, daemon, excluding
    ):
        found.setdefault((row["sequence"], row["step"]), []).append(row["id"])
    return found


_CHANGEABLE = (
    *("subject", "data", "sequence", "step", "timezone"),
    *("last_error", "goals_met", "goals_elsewhere", "executed"),
)
"""What may change within a visit, in the order of the statement `lock`."""


class Locked(NamedTuple):
    """Enrollments whose side effects have ended: the ids of the locked rows; by id, the enrollments
    whose fences are unchanged, as they are now; and the revisions of their sequences. Of rows that
    were not read, also the places, and the number of the transaction.
    """

    ids: set[int]
    unchanged: dict[int, Enrollment]
    revisions: dict[str, int | None]
    places: Places
    transaction: int | None


async def lock(
    connection: asyncpg.Connection, known: Rows[Enrollment], transactions: Mapping[int, int]
) -> Locked:
    """Lock enrollments, except those that another session has locked.

    Values that cannot change within a visit are taken from memory, because dates take long to
    decode. Rows that nothing has changed since the `transactions`, given by the number of the
    lease, are not read at all.
    """
    ids = {enrollment.id for enrollment in known}
    locked: set[int] = set()
    now: dict[int, Enrollment] = {}
    revisions: dict[str, int | None] = {}
    places: dict[int, str] = {}
    ours: int | None = None
    by_lease: defaultdict[tuple[int, str | None, str], dict[int, Enrollment]]
    by_lease = defaultdict(dict)
    for one in known:
        by_lease[one.leases, one.leased_by, one.sequence][one.id] = one
    for (number, daemon, sequence), leased in by_lease.items():
        if len(leased) < MANY_LEASES or number not in transactions:
            continue
        unchanged, where, revisions[sequence], ours = await connection.fetchrow(
            QUERIES["lock_unchanged"],
            id_array(leased),
            str(transactions[number]),
            sequence,
            daemon,
            number,
        )
        locked.update(unchanged)
        places.update(zip(unchanged, where, strict=True))
        now |= {id_: leased[id_] for id_ in unchanged}
    if not ids - locked:
        return Locked(locked, now, revisions, places, ours)
    by_fence = {enrollment.fence: enrollment for enrollment in known}
    renamed: list[str] = []
    rows = await connection.fetch(QUERIES["lock"], id_array(sorted(ids - locked)))
    for row in await _with_data(connection, rows):
        id_, visit, leases, leased_by, *values, revision = row
        locked.add(id_)
        if was := by_fence.get((id_, visit, leases, leased_by)):
            read = dict(zip(_CHANGEABLE, values, strict=True))
            one = now[id_] = was._replace(wake_at=None, **read)
            revisions[one.sequence] = revision
            if (one.sequence, one.step) != (was.sequence, was.step):
                renamed.append(one.sequence)
    if renamed:
        # a rename that was committed during the statement is in the rows, but not in its snapshot
        revisions |= dict.fromkeys(renamed) | await read_revisions(connection, renamed)
    return Locked(locked, now, revisions, places, ours)


async def fences(
    connection: asyncpg.Connection, ids: Rows[int], *, written_together: bool
) -> set[Fence]:
    """Read the fences of enrollments, after every transaction that may still write them. If one
    transaction writes all of them, it has ended when one can be locked: the others may be locked by
    other sessions, which are not waited for.
    """
    query = "fences"
    if written_together and await connection.fetchval(QUERIES["is_any_free"], ids):
        query = "present_fences"
    rows = await connection.fetch(QUERIES[query], ids)
    return {(row["id"], row["visit"], row["leases"], row["leased_by"]) for row in rows}


async def existing(connection: asyncpg.Connection, ids: Rows[int]) -> set[int]:
    """Return which enrollments exist."""
    return {row["id"] for row in await connection.fetch(QUERIES["existing"], ids)}


async def lock_waiting(
    connection: asyncpg.Connection,
    step_key: StepKey,
    ids: Rows[int],
    now: datetime,
    revision: int,
) -> tuple[list[Enrollment], list[int]]:
    """Lock enrollments that wait at a step. Return them, and the ids of the others that wait: other
    sessions have locked them, or the definition is not the known one.
    """
    rows = await connection.fetch(QUERIES["lock_waiting"], *step_key, ids, now, revision)
    waiting = list(map(Enrollment._make, await _with_data(connection, rows)))
    if len(waiting) == len(ids):
        return waiting, []
    ours = {enrollment.id for enrollment in waiting}
    others = [id_ for id_ in ids if id_ not in ours]
    rows = await connection.fetch(QUERIES["waiting"], *step_key, others, now)
    return waiting, [row["id"] for row in rows]
