"""The definitions as the daemon knows them: read anew when they have changed."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable, Sequence

import asyncpg
from structlog.typing import FilteringBoundLogger

from sequencerd import store
from sequencerd.clock import Clock
from sequencerd.core import model
from sequencerd.definitions import Runners, from_rows, problems
from sequencerd.store import Place

MOST_UNKNOWN = 100_000  # names that are remembered


class Catalog:
    """The sequences by name. `retime` is told of steps that have changed while people wait."""

    def __init__(
        self,
        pool: asyncpg.Pool,
        runners: Runners,
        retime: Callable[[Place], None],
        *,
        clock: Clock,
        log: FilteringBoundLogger,
    ) -> None:
        self.sequences: dict[str, model.Sequence] = {}
        self.unknown: set[str] = set()  # of which enrollments speak, until there are such sequences
        self._pool = pool
        self._runners = runners
        self._retime = retime
        self._clock = clock
        self._log = log
        self._loading = asyncio.Lock()

    async def reload(self, missing: str | None = None) -> bool:
        """Reads the definitions that have changed. Whether there are any. For one that is
        `missing`, only if nobody else has read it meanwhile.
        """
        async with self._loading, store.connection(self._pool) as connection:
            if missing in self.sequences or missing in self.unknown:
                return False
            revisions = await store.revisions(connection)
            for name in self.sequences.keys() - revisions.keys():
                del self.sequences[name]
            changed = [
                name
                for name, revision in revisions.items()
                if name not in self.sequences or self.sequences[name].revision != revision
            ]
            if changed:
                await self._load(connection, changed)
            self.unknown -= revisions.keys()
            if missing is not None and missing not in revisions:
                if len(self.unknown) >= MOST_UNKNOWN:
                    self.unknown.clear()
                self.unknown.add(missing)
            return bool(changed)

    async def use(self, runners: Runners, swap: Callable[[], object]) -> None:
        """Reads all definitions anew, for other runners. `swap` is called in the same turn of the
        loop, so that nobody finds a definition without its runner.
        """

        def begin() -> None:
            self._runners = runners
            self.sequences.clear()
            swap()

        async with self._loading, store.connection(self._pool) as connection:
            await self._load(connection, list(await store.revisions(connection)), begin)

    async def _load(
        self,
        connection: asyncpg.Connection,
        names: Sequence[str],
        begin: Callable[[], None] = lambda: None,
    ) -> None:
        sequence_rows, step_rows = await store.definitions(connection, names)
        begin()
        steps = defaultdict(list)
        for row in step_rows:
            steps[row["sequence"]].append(row)
        found: dict[Place, str | None] = {}
        for row in sequence_rows:
            sequence = from_rows(row, steps[row["name"]], self._runners)
            self.sequences[sequence.name] = sequence
            found |= problems(sequence)
        known = {(row["sequence"], row["name"]): row["problem"] for row in step_rows}
        if news := {place: text for place, text in found.items() if text != known[place]}:
            await store.set_problems(connection, news)
            for place, text in news.items():
                if text is not None:
                    self._log.error(
                        "step has a problem", sequence=place[0], step=place[1], problem=text
                    )
        mended = [place for place, text in found.items() if text is None]
        if count := await store.revive(connection, mended, self._clock.now()):
            self._log.info("failed enrollments go on, their steps are mended", count=count)
        for row in step_rows:
            place = (row["sequence"], row["name"])
            if row["retime"]:
                self._retime(place)
