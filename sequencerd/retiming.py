"""Looks again at those who wait at a step that has changed, by the step as it is now.

They are read by id, a page at a time, and evaluated in batches, each in a transaction that also
notes in the step how far it has come: what a crash interrupts goes on from there, in any daemon.
Who waits on as before is not written at all. One step is done at a time, on one connection, so
that everything else goes on meanwhile.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial

import asyncpg
from structlog.typing import FilteringBoundLogger

from sequencerd import store
from sequencerd.clock import Clock
from sequencerd.core import model
from sequencerd.core.advance import waits_on
from sequencerd.core.model import Advanced
from sequencerd.jumps import Jump
from sequencerd.quarantine import apart
from sequencerd.store import TRANSIENT_ERRORS, Place
from sequencerd.writer import PAUSE, Batch, Writer

PAGE = 100_000  # ids read at a time: to find them costs a look at everybody who is at the step
OTHERS_PAUSE = 1.0  # seconds after which we look whether another daemon still goes on
LOCKED_PAUSE = 0.2  # seconds until who is locked by somebody else is tried again
GRACE = 5.0  # seconds for transactions that began before the change; they may bring people here
GRACE_TURN = 0.05


class Retiming:
    """The changed steps that this daemon knows of, and the work on them."""

    def __init__(
        self,
        pool: asyncpg.Pool,
        sequences: Mapping[str, model.Sequence],
        writer: Writer,
        *,
        advance: Callable[..., Advanced],
        set_aside: Callable[[int, Place, Exception], None],
        probe: Callable[[], Awaitable[None]],
        spawn: Callable[[Awaitable[None]], None],
        clock: Clock,
        batch: int,
        log: FilteringBoundLogger,
    ) -> None:
        """`sequences` is the catalog's, which changes; `set_aside` gets what the database refuses
        to write, where `probe` finds that it writes others; `spawn` runs what is not waited for.
        """
        self._pool = pool
        self._sequences = sequences
        self._writer = writer
        self._advance = advance
        self._set_aside = set_aside
        self._probe = probe
        self._spawn = spawn
        self._clock = clock
        self._size = batch
        self._log = log
        self._wanted: dict[Place, None] = {}  # a set that keeps its order
        self._is_working = False
        self._others: dict[Place, int] = {}  # how far another daemon had come

    def start(self, place: Place) -> None:
        """Notes a step that has changed."""
        self._wanted[place] = None
        if not self._is_working:
            self._is_working = True
            self._spawn(self._work())

    async def _work(self) -> None:
        try:
            while self._wanted and not self._writer.stopping:
                place = next(iter(self._wanted))
                del self._wanted[place]
                again = None
                try:
                    if not await self._retime(place):
                        again = OTHERS_PAUSE
                except TRANSIENT_ERRORS as error:
                    again = PAUSE
                    self._log.warning("database error, tried again", error=store.brief(error))
                except Exception:
                    again = 60.0
                    self._log.exception("who waits could not be looked at", step=place)
                if again is not None:
                    asyncio.get_running_loop().call_later(again, self.start, place)
        finally:
            self._is_working = False

    async def _retime(self, place: Place) -> bool:
        """Whether there is nothing more to do; False where another daemon is at it."""
        async with store.connection(self._pool) as connection:
            since = await store.retiming_from(connection, place)
        if since is None or since == self._others.pop(place, since):
            return since is None or await self._from(place, since)
        self._others[place] = since
        return False

    async def _from(self, place: Place, since: int) -> bool:
        """The same, from this id on."""
        await self._outlast_older_transactions()
        count = 0
        while not self._writer.stopping:
            sequence = self._sequences.get(place[0])
            if sequence is None or sequence.paused:
                return True  # it is begun again when it is resumed
            async with store.connection(self._pool) as connection:
                page = await store.standing(connection, place, since, PAGE)
            for first in range(0, len(page), self._size):
                waiting = page[first : first + self._size]
                while waiting and not self._writer.stopping:
                    taken = await self._take(place, since, waiting, sequence.revision)
                    if taken is None:
                        self._others[place] = since
                        return False
                    since, waiting = waiting[0], taken
                    if waiting:
                        await asyncio.sleep(LOCKED_PAUSE)
            if self._writer.stopping:
                break
            count += len(page)
            after = page[-1] + 1 if len(page) == PAGE else None
            async with store.connection(self._pool) as connection:
                if not await store.retimed(connection, place, since, after):
                    self._others[place] = since
                    return False
            if count:
                self._log.info("who waits at a changed step was looked at", step=place, count=count)
            if after is None:
                return True
            since = after
        return True

    async def _take(
        self, place: Place, since: int, ids: list[int], revision: int
    ) -> list[int] | None:
        """Evaluates a batch. Returns who was locked by somebody else; None where it is not ours."""
        locked: list[int] = []
        is_ours = True

        async def work(part: Sequence[int]) -> None:
            nonlocal since, is_ours
            if is_ours:
                others = await self._evaluate(place, (since, ids[0]), part, revision)
                is_ours, since = others is not None, ids[0]
                locked.extend(others or [])

        async def refused(id_: int, error: Exception) -> None:
            self._set_aside(id_, place, error)

        _, common = await apart(ids, work, refused, self._probe)
        if common is not None:
            raise common
        return locked if is_ours else None

    async def _evaluate(
        self,
        place: Place,
        done: tuple[int, int],
        ids: Sequence[int],
        revision: int,
    ) -> list[int] | None:
        """The same at one go; `done` is how far it was done before, and is by now."""
        now = self._clock.now()
        batch = Batch()
        async with self._writer.writing(batch) as connection:
            if not await store.take_retiming(connection, place, *done, revision):
                return None
            waiting, locked = await store.lock_waiting(connection, place, ids, now)
            for enrollment in waiting:
                advanced = self._advance(enrollment, now)
                if advanced.entered:
                    again = partial(self._advance, enrollment, now, None, None)
                    batch.jumps.append(Jump(enrollment, advanced, again))
                elif not waits_on(enrollment, advanced):
                    self._writer.add(batch, enrollment, advanced, now)
            await self._writer.write(connection, batch, now)
        return locked

    async def _outlast_older_transactions(self) -> None:
        """Those of other daemons may still bring people to a step by how it was."""
        async with store.connection(self._pool) as connection:
            newest = await store.new_transaction(connection)
        loop = asyncio.get_running_loop()
        until = loop.time() + GRACE
        while loop.time() < until and not self._writer.stopping:
            async with store.connection(self._pool) as connection:
                if await store.oldest_transaction(connection) >= newest:
                    return
            await asyncio.sleep(GRACE_TURN)
