"""Enroll the subjects that users' queries return, by the schedules of their sequences.

A query runs in a transaction that cannot write, with a time limit, on connections of its own. The
entries and the time of the next run are written in one transaction, so that no run is done twice.
One daemon does it at a time: the others read when the next run is due, and the errors.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import nullcontext, suppress
from datetime import datetime, timedelta
from functools import partial
from typing import NamedTuple

import asyncpg
from structlog.typing import FilteringBoundLogger

from sequencerd.core.config import parse_config, parse_json
from sequencerd.core.describe import counted
from sequencerd.core.faults import DefinitionError, EvaluationError
from sequencerd.core.retry import doubled
from sequencerd.core.schedule import EnrollConfig
from sequencerd.engine.clock import Clock
from sequencerd.engine.problems import Problems
from sequencerd.engine.quarantine import isolate
from sequencerd.storage import connections, sources
from sequencerd.storage.database_errors import TRANSIENT_ERRORS, brief, is_environment
from sequencerd.storage.sources import Candidate
from sequencerd.storage.statements import QUERIES

CHECK_INTERVAL = 60.0  # seconds between checks if no run is due earlier
RUNNING_INTERVAL = 1.0  # seconds between checks during a run
FIRST_RETRY, LONGEST_RETRY = 60.0, 3600.0  # seconds after a failed run
BATCH_SIZE = 1000  # subjects per statement
CLOCK_TOLERANCE = timedelta(minutes=1)  # within which the clocks of daemons agree
MAX_REFUSED = 20  # refusals, if no subject was enrolled: their cause is a common one
PROBLEM_KIND = "enroll"


class DueRun(NamedTuple):
    """A run that is due."""

    sequence: str
    timezone: str
    config: EnrollConfig
    at: datetime
    failures: int


class RunResult(NamedTuple):
    """The result of a run."""

    found: int | None = None
    enrolled: int | None = None
    problem: str | None = None
    has_failed: bool = False  # whether to try again soon


class Enrolling:
    """Executes the runs that are due, and reports those that fail."""

    def __init__(
        self,
        pool: asyncpg.Pool,
        problems: Problems,
        *,
        timeout: float,
        clock: Clock,
        log: FilteringBoundLogger,
    ) -> None:
        """Make it; `timeout` is the number of seconds for a user's query."""
        self._pool = pool
        self._problems = problems
        self._timeout = timeout
        self._clock = clock
        self._log = log
        self._running: dict[str, asyncio.Task[None]] = {}
        self._reported: set[str] = set()
        self._changed = asyncio.Event()

    def check_soon(self) -> None:
        """Read the schedules soon, because they may have changed."""
        self._changed.set()

    async def keep(self) -> None:
        """Enroll until cancelled."""
        try:
            while True:
                pause = CHECK_INTERVAL
                self._changed.clear()
                try:
                    pause = await self.run_due()
                except TRANSIENT_ERRORS as error:
                    self._log.warning("database error, trying again", error=brief(error))
                except Exception:
                    self._log.exception("internal error")
                # any user can notify, as often as they like
                await asyncio.sleep(min(pause, RUNNING_INTERVAL))
                with suppress(TimeoutError):
                    async with asyncio.timeout(max(pause - RUNNING_INTERVAL, 0.0)):
                        await self._changed.wait()
        finally:
            for run in self._running.values():
                run.cancel()

    async def run_due(self) -> float:
        """Execute the runs that are due; return in how many seconds to check again."""
        pause = await self._check()
        if pause > 0:
            return pause
        async with (
            connections.borrow(self._pool) as connection,
            connections.transaction(connection),
        ):
            if not await connection.fetchval(QUERIES["try_lock_enrolling"]):
                return RUNNING_INTERVAL
            while True:
                pause = await self._check(connection)
                if not self._running:
                    return max(pause, RUNNING_INTERVAL)
                await asyncio.wait(
                    self._running.values(),
                    timeout=RUNNING_INTERVAL,
                    return_when=asyncio.FIRST_COMPLETED,
                )

    async def _check(self, locked: asyncpg.Connection | None = None) -> float:
        """Read the schedules. If a connection has `locked` the enrolling for this daemon, start the
        runs that are due. Return in how many seconds the next run is due.
        """
        async with nullcontext(locked) if locked else connections.borrow(self._pool) as connection:
            rows = await connection.fetch(QUERIES["schedules"])
        now = self._clock.now()
        times = [now + timedelta(seconds=CHECK_INTERVAL)]
        found: dict[str, str] = {}
        for row in rows:
            name, problem, last = row["sequence"], row["problem"], row["last_run_at"]
            if row["status"] != "active":
                continue
            try:
                config = parse_config(EnrollConfig, parse_json(row["enroll"]), "enroll")
                first = config.first_run(now, row["timezone"])
                latest = config.next_run(now + CLOCK_TOLERANCE, row["timezone"])
            except (DefinitionError, EvaluationError) as error:
                found[name] = f"sequence {name!r}: enroll: {error}"
                continue
            if problem is not None:
                found[name] = f"sequence {name!r} enrolls {config.source}: {problem}"
            if name in self._running:
                continue
            due = row["next_run_at"]
            # by a clock that was ahead, the next run may be years away
            is_too_late = last is not None and last > now + CLOCK_TOLERANCE and due > latest
            if row["scheduled"] != row["definition"] or is_too_late:
                times.append(now)
                if locked:
                    async with connections.borrow(self._pool) as connection:
                        await connection.execute(
                            QUERIES["set_schedule"], name, row["definition"], first
                        )
                continue
            times.append(due)
            if locked and due <= now:
                run = DueRun(name, row["timezone"], config, due, row["failures"])
                task = asyncio.create_task(self._run(run))
                self._running[name] = task
                task.add_done_callback(partial(self._ended, name))
        self._report(found)
        return max(0.0, (min(times) - now).total_seconds())

    def _ended(self, name: str, _task: asyncio.Task[None]) -> None:
        self._running.pop(name, None)

    def _report(self, found: dict[str, str]) -> None:
        for name in self._reported - found.keys():
            self._problems.clear(PROBLEM_KIND, name)
        for name, message in found.items():
            self._problems.report(
                PROBLEM_KIND, name, message, since=self._clock.now(), sequence=name
            )
        self._reported = set(found)

    async def _run(self, due: DueRun) -> None:
        """Read and enroll. Errors concern only this sequence."""
        log = self._log.bind(sequence=due.sequence)
        begun = self._clock.now()
        try:
            candidates, faults = await self._read(due)
            run = await self._enroll(due, begun, candidates, faults)
        except asyncio.CancelledError:
            raise
        except Exception as error:
            log.warning("a scheduled run failed", error=brief(error))
            run = RunResult(problem=_explain(error, due, self._timeout), has_failed=True)
            try:
                async with connections.borrow(self._pool) as connection:
                    await self._finish(connection, due, begun, run)
            except Exception as lost:  # it is still due
                log.warning("a scheduled run is tried again", error=brief(lost))
                await asyncio.sleep(RUNNING_INTERVAL)
        else:
            log.info("a scheduled run ended", found=run.found, enrolled=run.enrolled)

    async def _read(self, due: DueRun) -> tuple[list[Candidate], Counter[str]]:
        limit = due.config.at_most + 1
        async with (
            connections.borrow(self._pool) as connection,
            connections.transaction(connection),
        ):
            return await sources.read_source(
                connection, due.config.source, due.sequence, limit, self._timeout
            )

    async def _enroll(
        self, due: DueRun, begun: datetime, candidates: Sequence[Candidate], faults: Counter[str]
    ) -> RunResult:
        """Enroll the subjects and record the run, in one transaction."""
        at_most = due.config.at_most
        problems = [f"{counted(count, 'row')} {fault}" for fault, count in faults.items()]
        async with (
            connections.borrow(self._pool) as connection,
            connections.transaction(connection),
        ):
            if not await connection.fetchval(QUERIES["lock_run"], due.sequence, due.at):
                return RunResult()  # another daemon has done it, or the schedule has changed
            if len(candidates) > at_most:
                problems.insert(
                    0,
                    f"more than at_most = {at_most:,} subjects would enter, so none was enrolled;"
                    " change the query, or raise at_most",
                )
                run = RunResult(len(candidates), 0, "; ".join(problems))
            else:
                await connection.execute(QUERIES["turn_notifications_on"])
                enrolled, refused = await _insert(connection, due.sequence, candidates)
                problems += [f"subject {subject!r}: {error}" for subject, error in refused[:3]]
                if refused[3:]:
                    problems.append(f"{len(refused) - 3:,} more subjects could not be enrolled")
                run = RunResult(len(candidates), enrolled, "; ".join(problems) or None)
            await self._finish(connection, due, begun, run)
        return run

    async def _finish(
        self, connection: asyncpg.Connection, due: DueRun, begun: datetime, run: RunResult
    ) -> None:
        now = self._clock.now()
        following = due.config.next_run(now, due.timezone)
        if run.has_failed:
            pause = doubled(FIRST_RETRY, LONGEST_RETRY, due.failures + 1)
            following = min(following, now + timedelta(seconds=pause))
        await connection.execute(
            QUERIES["finish_run"],
            due.sequence,
            due.at,
            following,
            begun,
            now - begun,
            run.found,
            run.enrolled,
            run.problem and run.problem[:2000],
            run.has_failed,
        )


async def _insert(
    connection: asyncpg.Connection, sequence: str, candidates: Iterable[Candidate]
) -> tuple[int, list[tuple[str, Exception]]]:
    """Enroll subjects, without those that the database refuses. Raises errors that no subject has
    caused.
    """
    enrolled = 0
    refused: list[tuple[str, Exception]] = []

    async def insert(part: Sequence[Candidate]) -> None:
        nonlocal enrolled
        async with connection.transaction():
            enrolled += await connection.fetchval(
                QUERIES["enroll_subjects"],
                sequence,
                [one.subject for one in part],
                [one.data for one in part],
                [one.timezone for one in part],
            )

    async def refuse(one: Candidate, error: Exception) -> None:
        if is_environment(error):
            raise error
        refused.append((one.subject, error))
        if not enrolled and len(refused) == MAX_REFUSED:
            raise error

    async def probe() -> None:
        pass

    wanted = list(candidates)
    for first in range(0, len(wanted), BATCH_SIZE):
        _, common = await isolate(wanted[first : first + BATCH_SIZE], insert, refuse, probe)
        if common is not None:
            raise common
    return enrolled, refused


def _explain(error: Exception, due: DueRun, timeout: float) -> str:
    """Explain the error of a run, and what to do."""
    match error:
        case asyncpg.QueryCanceledError():
            return f"it did not end within {timeout:g} seconds (database.lookup_timeout)"
        case asyncpg.InsufficientPrivilegeError():
            return f"{error}; grant SELECT or EXECUTE on {due.config.source} to the daemon's user"
        case asyncpg.ReadOnlySQLTransactionError():
            return f"{error}: it is read in a transaction that cannot write"
    return str(error) or type(error).__name__
