"""The compiled definitions, which are read again when they change."""

from __future__ import annotations

import asyncio
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

import asyncpg

from sequencerd.core import model
from sequencerd.core.enrollment import StepKey
from sequencerd.core.model import StoredConfig
from sequencerd.definitions.compiler import (
    Runners,
    compile_row,
    make_sequence,
    make_step,
    problems,
    served_types,
    shared_of,
)
from sequencerd.engine.background import concurrently
from sequencerd.engine.environment import Environment
from sequencerd.storage import connections, daemons, sequences, server

MAX_BLOCKING = 0.005  # seconds for which compiling may block the loop
UNTIMED_STEPS = 100  # compiled steps that are made without reading the time
THREADED_STEPS = 500  # steps from which on a sequence is assembled in a thread
THREADED_CHARACTERS = 2000  # of a config; templates take up to 40 ms for as many
MAX_COMPILING = 1.0  # seconds for large configs, then all others that have changed are read first
STEPS_PER_READ = 5_000  # steps that are read or reported at a time, in whole sequences
_Configs = dict[tuple[str, str], StoredConfig]  # by type and text
MAX_UNKNOWN = 10_000  # missing names that are remembered until definitions change
MAX_WANTED = 1000  # names of changed sequences; beyond them, all sequences are checked for changes


class Catalog:
    """The sequences by name. `reschedule` is called for changed steps with waiting enrollments, and
    `requested` when there is something to reload.
    """

    def __init__(
        self,
        env: Environment,
        runners: Runners,
        reschedule: Callable[[StepKey], None],
        requested: Callable[[], None],
    ) -> None:
        self._env = env
        self.sequences: dict[str, model.Sequence] = {}
        self._runners = runners
        self._others: frozenset[str] = frozenset()  # types that other daemons serve
        self._unfinished: set[str] = set()  # sequences that must be read once more
        self._set_aside: dict[str, int] = {}  # those with large configs left, and their turn
        # of all sequences that are read, by what the messages of a sequence share
        self._compiled: defaultdict[model.MessageContext, _Configs] = defaultdict(dict)
        self._refused: set[str] = set()  # sequences with steps that may compile later
        self._outdated: frozenset[str] = frozenset()  # types to be compiled again in these
        self._reschedule = reschedule
        self._requested = requested
        self._read_from: tuple[object, ...] | None = None  # the identity of the server
        self._loading = asyncio.Lock()
        self._compile_until: float | None = None  # for large configs, in the loop's time
        self._pause_at = 0.0  # when to let the loop do other work, in its time
        self._wanted: set[str] | None = set()  # sequences to check for changes; None: all
        self._unknown: set[str] = set()  # missing names that were looked up

    @property
    def served_types(self) -> frozenset[str]:
        """Return the step types for which this daemon has a runner."""
        return served_types(self._runners)

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

    def mark_for_reload(self, names: Iterable[str] | None = None) -> None:
        """Have the next reload check these sequences for changes, or all."""
        if names is None:
            self._wanted = None
        elif self._wanted is not None:
            self._wanted |= set(names)
            if len(self._wanted) > MAX_WANTED:
                self._wanted = None

    def request(self, names: Iterable[str] | None = None) -> None:
        """Read the definitions of these sequences, or of all, soon, if they have changed."""
        self.mark_for_reload(names)
        self._requested()

    def request_unknown(self, name: str) -> None:
        """Read the definition of a sequence soon if it is unknown, and may exist."""
        if self.should_load(name):
            self.request([name])

    @property
    def is_due(self) -> bool:
        """Return whether a reload has something to read."""
        return self._wanted != set()

    def mark_refused(self) -> None:
        """Have the next reload compile again what could not be compiled within the limits."""
        self._unfinished |= self._refused
        self._refused.clear()

    async def reload(self) -> list[str]:
        """Read the wanted definitions that have changed. Return the names of their sequences, also
        of those that no longer exist. If compiling takes long, a reload of the rest `is_due`.

        Of the calls that wait while another one reads, the first one reads for all.
        """
        async with self._loading:
            wanted, self._wanted = self._wanted, set()
            if wanted == set():
                return []
            try:
                async with connections.borrow(self._env.pool) as connection:
                    return await self._read_changed(connection, wanted)
            except BaseException:
                self.mark_for_reload(wanted)
                raise

    async def _read_changed(
        self, connection: asyncpg.Connection, wanted: set[str] | None
    ) -> list[str]:
        self._set_other_types(await daemons.types_elsewhere(connection, self._env.daemon))
        if wanted is not None:
            wanted |= self._unfinished
        elif (read_from := await server.identity(connection)) != self._read_from:
            self._read_from = read_from
            self._unfinished |= self.sequences.keys()
        revisions = await sequences.read_revisions(connection, wanted)
        known = self.sequences.keys() if wanted is None else self.sequences.keys() & wanted
        gone = known - revisions.keys()
        for name in gone:
            del self.sequences[name]
        self._unfinished -= (wanted or self._unfinished) - revisions.keys()
        changed = [
            name
            for name, revision in revisions.items()
            if name not in self.sequences
            or name in self._unfinished
            or self.sequences[name].revision != revision
        ]
        if changed:
            changed.sort(key=lambda name: self._set_aside.get(name, -1))
            await self._load(connection, changed, self._runners)
            self._unknown.clear()
        return [*(name for name in changed if name not in self._set_aside), *gone]

    def _set_other_types(self, types: frozenset[str]) -> None:
        """Set the step types that other daemons serve. Steps of changed types are recompiled."""
        others, self._others = self._others, types
        if outdated := (others ^ types) - self.served_types:
            self._outdated |= outdated
            self._compiled.clear()
            self._unfinished |= {
                name
                for name, sequence in self.sequences.items()
                if any(step.type in outdated for step in sequence.steps.values())
            }

    async def use(self, runners: Runners, swap: Callable[[], object]) -> None:
        """Read all definitions again for other runners.

        `swap` is called without an await in between, so that no definition is without its runner.
        """

        def begin() -> None:
            self._runners = runners
            self.sequences.clear()
            swap()

        async with self._loading, connections.borrow(self._env.pool) as connection:
            names = list(await sequences.read_revisions(connection))
            self._compiled.clear()
            try:
                await self._load(connection, names, runners, begin)
            finally:
                self._compiled.clear()

    async def _load(
        self,
        connection: asyncpg.Connection,
        names: Sequence[str],
        runners: Runners,
        begin: Callable[[], None] | None = None,
    ) -> None:
        """Read sequences, and those with many large configs in several calls, unless all of them
        must `begin` together.
        """
        made: list[model.Sequence] = []
        known: dict[StepKey, str] = {}
        changed: list[StepKey] = []  # that are to be rescheduled
        late: list[str] = []
        turns = {name: turn for turn, name in enumerate(names)}
        self._compile_until = None if begin is None else math.inf
        async with sequences.snapshot(connection):
            # in pages, as rows take more memory than what is made of them
            first, size = 1, 1
            sequence_rows, step_rows = await sequences.read_some(connection, names[:1])
            while sequence_rows or first < len(names):
                size = min(2 * size, size * STEPS_PER_READ // max(len(step_rows), 1)) or 1
                page = names[first : first + size]
                first += len(page)
                # the server reads the next page while this one is compiled
                async with concurrently(sequences.read_some(connection, page)) as reading:
                    steps = defaultdict(list)
                    for row in step_rows:
                        steps[row["sequence"]].append(row)
                        if row["problem"] is not None:
                            known[row["sequence"], row["name"]] = row["problem"]
                        if row["reschedule"]:
                            changed.append((row["sequence"], row["name"]))
                    for row in sorted(sequence_rows, key=lambda row: turns[row["name"]]):
                        sequence = await self._make(row, steps[row["name"]], runners)
                        if sequence is None:
                            late.append(row["name"])
                        else:
                            made.append(sequence)
                    sequence_rows, step_rows = await reading
        if begin is not None:
            begin()
        for sequence in made:
            self.sequences[sequence.name] = sequence
        self._unfinished.update(names)  # if the report fails, all of it is repeated
        if made:
            await self._report(connection, made, known)
        for step_key in changed:
            if step_key[0] not in late:
                self._reschedule(step_key)
        self._unfinished.difference_update(set(names).difference(late))
        # the first one has taken the time, and is now the last one
        self._set_aside = {name: turn for turn, name in enumerate(late[1:] + late[:1])}
        if late:
            self.mark_for_reload(late)
        else:
            self._compiled.clear()
        if not self._unfinished:
            self._outdated = frozenset()

    async def _report(
        self,
        connection: asyncpg.Connection,
        made: Sequence[model.Sequence],
        known: Mapping[StepKey, str],
    ) -> None:
        """Write the problems of steps, and resume enrollments that failed at steps that are valid
        now.
        """
        found: dict[StepKey, str | None] = {}
        over: set[StepKey] = set()
        for sequence in made:
            found |= problems(sequence, known)
            if len(found) >= STEPS_PER_READ or sequence is made[-1]:
                await self._write_problems(connection, found, known)
                over |= {key for key, text in found.items() if text is None}
                found = {}
            await self._pause()
        names = {sequence.name for sequence in made}
        await self.revive(
            connection,
            [
                step_key
                for step_key in await sequences.failed_steps(connection, names)
                if step_key[0] in names and (step_key not in known or step_key in over)
            ],
        )

    async def _write_problems(
        self,
        connection: asyncpg.Connection,
        found: Mapping[StepKey, str | None],
        known: Mapping[StepKey, str],
    ) -> None:
        news = {key: text for key, text in found.items() if text != known.get(key)}
        if news:
            await sequences.set_problems(connection, news)
            for (sequence, step), text in news.items():
                if text is not None:
                    self._env.log.error(
                        "step has a problem", sequence=sequence, step=step, problem=text
                    )

    async def revive(self, connection: asyncpg.Connection, step_keys: Iterable[StepKey]) -> None:
        """Resume enrollments that failed at steps because these were invalid, if they are valid."""
        valid = [
            step_key
            for step_key in step_keys
            if (step := self.step(step_key)) and not isinstance(step.behaviour, model.InvalidStep)
        ]
        if valid and (count := await sequences.revive(connection, valid, self._env.clock.now())):
            self._env.log.info(
                "failed enrollments resumed, as their steps are valid now", count=count
            )

    async def _make(
        self,
        row: asyncpg.Record,
        steps: Sequence[asyncpg.Record],
        runners: Runners,
    ) -> model.Sequence | None:
        """Make a sequence from its rows. Return None if large configs are left for the next call.

        Steps that were compiled before, or for another sequence, are not compiled again, and the
        loop is blocked for some milliseconds at most, however many steps there are.
        """
        shared = shared_of(row)
        compiled = self._compiled[shared]
        before = self._compiled_before(row["name"], shared) if runners is self._runners else {}
        made = []
        elsewhere = self._others - served_types(runners)
        for number, step in enumerate(steps):
            key = (step["type"], step["config"])
            config = compiled.get(key)
            if config is None:
                config = before.get(key)
                if config is None:
                    is_large = _is_large(step, shared)
                    if is_large and not self._may_compile():
                        return None
                    work = partial(compile_row, step, runners, shared, elsewhere)
                    # templates take seconds at worst
                    config = await asyncio.to_thread(work) if is_large else work()
                compiled[key] = config
                await self._pause()
            elif number % UNTIMED_STEPS == 0:
                await self._pause()
            if _may_pass(config):
                self._refused.add(row["name"])
            made.append(make_step(step, config))
        if len(made) < THREADED_STEPS:
            return make_sequence(row, made)
        return await asyncio.to_thread(make_sequence, row, made)

    def _may_compile(self) -> bool:
        """Return whether to compile a large config now: the first one, and more for a while."""
        now = asyncio.get_running_loop().time()
        if self._compile_until is None:
            self._compile_until = now + MAX_COMPILING
        return now <= self._compile_until

    async def _pause(self) -> None:
        """Let the loop do other work if compiling has blocked it for some milliseconds."""
        loop = asyncio.get_running_loop()
        if loop.time() >= self._pause_at:
            await asyncio.sleep(0)
            self._pause_at = loop.time() + MAX_BLOCKING

    def _compiled_before(self, name: str, shared: model.MessageContext) -> _Configs:
        """Return the compiled configs of a sequence, but for those that must be compiled again."""
        sequence = self.sequences.get(name)
        if sequence is None or sequence.shared != shared:
            return {}
        return {
            (step.type, step.source.text): step.source
            for step in sequence.steps.values()
            if isinstance(step.source, StoredConfig)
            and step.type not in self._outdated
            and not _may_pass(step.source)
        }


def _is_large(row: asyncpg.Record, shared: model.MessageContext) -> bool:
    """Return whether compiling the config of a step may take long."""
    size = len(row["config"])
    if "{{" in row["config"]:
        size += sum(len(text) for _, text in shared.partials)
    return size >= THREADED_CHARACTERS


def _may_pass(config: StoredConfig) -> bool:
    return isinstance(config.behaviour, model.InvalidStep) and config.behaviour.may_pass
