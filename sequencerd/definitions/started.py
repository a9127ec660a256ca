"""Start a simulation from an enrollment in the database."""

from __future__ import annotations

from typing import NamedTuple

import asyncpg

from sequencerd.core.enrollment import Enrollment
from sequencerd.errors import UsageError
from sequencerd.storage.statements import QUERIES


class StartedEnrollment(NamedTuple):
    """An enrollment, and the sequences that its subject cannot enter again."""

    enrollment: Enrollment
    enrolled: tuple[str, ...]


async def read_started(connection: asyncpg.Connection, id_: int) -> StartedEnrollment | None:
    """Read an active enrollment; None if it does not exist. Raises UsageError if it has ended.

    A side effect that is being executed starts again in the simulation.
    """
    row = await connection.fetchrow(QUERIES["simulated"], id_)
    if row is None:
        return None
    *columns, status = row.values()
    if status != "active":
        raise UsageError(f"enrollment {id_} is {status}: nothing follows")
    enrollment = Enrollment(*columns)._replace(leased_by=None)
    refusing = await connection.fetch(QUERIES["refusing"], enrollment.subject, id_)
    return StartedEnrollment(enrollment, tuple(row["sequence"] for row in refusing))
