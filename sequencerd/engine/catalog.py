"""The compiled definitions, which are read again when they change."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence

import asyncpg
from structlog.typing import FilteringBoundLogger

from sequencerd.core import model
from sequencerd.core.model import StepKey
from sequencerd.definitions.compiler import (
    CompiledStep,
    Runners,
    compile_row,
    make_sequence,
    make_step,
    problems,
    served,
    shared_of,
)
from sequencerd.engine.clock import Clock
from sequencerd.storage import connections, daemons, sequences

MAX_BLOCKING = 0.005  # seconds for which compiling may block the loop
THREADED_STEPS = 500  # steps from which on a sequence is assembled in a thread
STEPS_PER_READ = 5_000  # steps that are read or reported at a time, in whole sequences
_Key = tuple[str, str, model.MessageContext]  # type, config as JSON, what messages share
MAX_UNKNOWN = 10_000  # missing names that are remembered until definitions change


class Catalog:
    """The sequences by name. `reschedule` is called for changed steps with waiting enrollments."""

    def __init__(
        self,
        pool: asyncpg.Pool,
        runners: Runners,
        reschedule: Callable[[StepKey], None],
        *,
        daemon: str,
        clock: Clock,
        log: FilteringBoundLogger,
    ) -> None:
        self.sequences: dict[str, model.Sequence] = {}
        self._pool = pool
        self._runners = runners
        self._daemon = daemon
        self._others: frozenset[str] = frozenset()  # types that other daemons serve
        self._unfinished: set[str] = set()  # sequences that must be read once more
        self._reschedule = reschedule
        self._clock = clock
        self._log = log
        self._loading = asyncio.Lock()
        self._compiled: dict[str, dict[_Key, CompiledStep]] = {}  # by sequence
        self._started = self._read = 0  # the last reload that started, the last that succeeded
        self._unknown: set[str] = set()  # missing names that were looked up

    @property
    def served(self) -> frozenset[str]:
        """Return the step types for which this daemon has a runner."""
        return served(self._runners)

    def step(self, step_key: StepKey) -> model.Step | None:
        """Return the step with this key, or None."""
        sequence = self.sequences.get(step_key[0])
        return sequence.steps.get(step_key[1]) if sequence else None

    def should_load(self, name: str) -> bool:
        """Return whether an unknown sequence may exist, once for each name.

        An enrollment may be older than its sequence, and its name must not cause endless reloads.
        """
        if name in self.sequences or name in self._unknown or len(self._unknown) >= MAX_UNKNOWN:
            return False
        self._unknown.add(name)
        return True

    async def reload(self) -> list[str]:
        """Read the definitions that have changed. Return the names of their sequences.

        A call that waits while another one starts to read does not read again.
        """
        last = self._started
        async with self._loading:
            if self._read > last:
                return []
            self._started += 1
            present = self._started
            async with connections.borrow(self._pool) as connection:
                changed = await self._read_changed(connection)
            self._read = present
            return changed

    async def _read_changed(self, connection: asyncpg.Connection) -> list[str]:
        self._set_other_types(await daemons.types_elsewhere(connection, self._daemon))
        revisions = await sequences.read_revisions(connection)
        for name in self.sequences.keys() - revisions.keys():
            del self.sequences[name]
            self._compiled.pop(name, None)
        self._unfinished &= revisions.keys()
        changed = [
            name
            for name, revision in revisions.items()
            if name not in self.sequences
            or name in self._unfinished
            or self.sequences[name].revision != revision
        ]
        if changed:
            await self._load(connection, changed, self._runners)
            self._unknown.clear()
        return changed

    def _set_other_types(self, types: frozenset[str]) -> None:
        """Set the step types that other daemons serve. Steps of changed types are recompiled."""
        others, self._others = self._others, types
        concerned = (others ^ types) - self.served
        for name, compiled in self._compiled.items():
            stale = [key for key in compiled if key[0] in concerned]
            if stale:
                self._unfinished.add(name)
            for key in stale:
                del compiled[key]

    async def use(self, runners: Runners, swap: Callable[[], object]) -> None:
        """Read all definitions again for other runners.

        `swap` is called without an await in between, so that no definition is without its runner.
        """

        def begin() -> None:
            self._runners = runners
            self.sequences.clear()
            swap()

        async with self._loading, connections.borrow(self._pool) as connection:
            self._compiled.clear()
            names = list(await sequences.read_revisions(connection))
            await self._load(connection, names, runners, begin)

    async def _load(
        self,
        connection: asyncpg.Connection,
        names: Sequence[str],
        runners: Runners,
        begin: Callable[[], None] = lambda: None,
    ) -> None:
        made: list[model.Sequence] = []
        known: dict[StepKey, str] = {}
        changed: list[StepKey] = []  # that are to be rescheduled
        pool: dict[_Key, tuple[_Key, CompiledStep]] = {}  # of all sequences that are loaded
        async with sequences.snapshot(connection):
            # rows take more memory than what is made of them
            size, first = 1, 0
            while page := names[first : first + size]:
                sequence_rows, step_rows = await sequences.read_some(connection, page)
                first += len(page)
                size = min(2 * size, size * STEPS_PER_READ // max(len(step_rows), 1)) or 1
                steps = defaultdict(list)
                for row in step_rows:
                    step_key = (row["sequence"], row["name"])
                    steps[row["sequence"]].append(row)
                    if row["problem"] is not None:
                        known[step_key] = row["problem"]
                    if row["reschedule"]:
                        changed.append(step_key)
                made += [
                    await self._make(row, steps[row["name"]], runners, pool)
                    for row in sequence_rows
                ]
        begin()
        for sequence in made:
            self.sequences[sequence.name] = sequence
        self._unfinished.difference_update(names)
        found: dict[StepKey, str | None] = {}
        for sequence in made:
            found |= problems(sequence, known)
            if len(found) >= STEPS_PER_READ or sequence is made[-1]:
                await self._report(connection, found, known)
                found = {}
            await asyncio.sleep(0)
        for step_key in changed:
            self._reschedule(step_key)

    async def _report(
        self,
        connection: asyncpg.Connection,
        found: Mapping[StepKey, str | None],
        known: Mapping[StepKey, str],
    ) -> None:
        """Write the problems of steps, and resume enrollments that failed at steps that are valid
        now.
        """
        news = {key: text for key, text in found.items() if text != known.get(key)}
        if news:
            await sequences.set_problems(connection, news)
            for (sequence, step), text in news.items():
                if text is not None:
                    self._log.error(
                        "step has a problem", sequence=sequence, step=step, problem=text
                    )
        await self.revive(connection, [key for key, text in found.items() if text is None])

    async def revive(self, connection: asyncpg.Connection, step_keys: Iterable[StepKey]) -> None:
        """Resume enrollments that failed at steps because these were invalid, if they are valid."""
        valid = [
            step_key
            for step_key in step_keys
            if (step := self.step(step_key)) and not isinstance(step.behaviour, model.InvalidStep)
        ]
        if count := await sequences.revive(connection, valid, self._clock.now()):
            self._log.info("failed enrollments resumed, as their steps are valid now", count=count)

    async def _make(
        self,
        row: asyncpg.Record,
        steps: Sequence[asyncpg.Record],
        runners: Runners,
        pool: dict[_Key, tuple[_Key, CompiledStep]],
    ) -> model.Sequence:
        """Make a sequence from its rows.

        Steps that were compiled before, or for another sequence (`pool`), are not compiled again,
        and the loop is blocked for some milliseconds at most, however many steps there are.
        """
        before = self._compiled.get(row["name"], {})
        compiled: dict[_Key, CompiledStep] = {}
        made = []
        loop = asyncio.get_running_loop()
        end = loop.time() + MAX_BLOCKING
        elsewhere = self._others - served(runners)
        shared = shared_of(row)
        for step in steps:
            key = (step["type"], step["config"], shared)
            if key in pool:
                key, one = pool[key]
            else:
                one = before.get(key) or compile_row(step, runners, shared, elsewhere)
                pool[key] = key, one
            compiled[key] = one
            made.append(make_step(step, one))
            if loop.time() >= end:
                await asyncio.sleep(0)
                end = loop.time() + MAX_BLOCKING
        self._compiled[row["name"]] = compiled
        if len(made) < THREADED_STEPS:
            return make_sequence(row, made)
        return await asyncio.to_thread(make_sequence, row, made)
