"""Change several shards: prepare on all of them before committing on any."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from typing import NamedTuple, TypeVar

import asyncpg
from asyncpg.transaction import Transaction

from sequencerd.errors import SequencerdError, ShardsError
from sequencerd.storage.connections import Shard
from sequencerd.storage.database_errors import TRANSIENT_ERRORS
from sequencerd.storage.every_shard import MAX_CONCURRENT_SHARDS, Explain, ask_all
from sequencerd.storage.statements import QUERIES

COMMIT_TIMEOUT = 30.0  # seconds for a commit, and to find out its outcome
CLOSE_TIMEOUT = 5.0  # seconds
NOTHING_CHANGED = "nothing was changed in any shard"

_T = TypeVar("_T")

Connect = Callable[[Shard], Awaitable[asyncpg.Connection]]


class ChangeTexts(NamedTuple):
    """How messages name a change, and how to complete it if only some shards have it."""

    name: str  # such as "the revision"
    completion: str


class Change:
    """A transaction on each of several shards; with one shard, an ordinary transaction."""

    def __init__(
        self,
        explain: Explain,
        shards: Sequence[Shard],
        connect: Connect,
        warn: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Make it; an interruption is reported to `warn`, with what it has left."""
        self.connections: dict[Shard, asyncpg.Connection] = {}
        self._warn = warn
        self._is_committing = False
        self._explain = explain
        self._shards = shards
        self._connect = connect
        self._transactions: dict[Shard, Transaction] = {}

    async def begin(self, shard: Shard) -> None:
        """Begin the transaction on a shard. Raises SequencerdError if it cannot be reached."""
        connection = self.connections[shard] = await self._connect(shard)
        self._transactions[shard] = connection.transaction()
        await self._transactions[shard].start()

    async def on_each(
        self, work: Callable[[Shard], Awaitable[_T]], *, at_once: int = MAX_CONCURRENT_SHARDS
    ) -> Mapping[Shard, _T]:
        """Do a part of the work on every shard. Raises SequencerdError if one refuses."""
        return await ask_all(
            self._explain, self._shards, work, otherwise=NOTHING_CHANGED, at_once=at_once
        )

    async def on(self, shard: Shard, work: Callable[[Shard], Awaitable[_T]]) -> _T:
        """Do a part of the work on one shard. Raises SequencerdError if it refuses."""
        return (await ask_all(self._explain, [shard], work, otherwise=NOTHING_CHANGED))[shard]

    async def commit(self, texts: ChangeTexts) -> None:
        """Commit on one shard after the other, if all can. Raises ShardsError, which says what a
        failure has left.
        """
        ids = await self.on_each(self._prepare)
        self._is_committing = True
        done: list[str] = []
        failed: dict[str, str] = {}
        unknown: list[str] = []
        for shard in self._shards:
            try:
                try:
                    await asyncio.wait_for(self._transactions[shard].commit(), COMMIT_TIMEOUT)
                except TRANSIENT_ERRORS as error:
                    if shard.name is None:
                        raise
                    outcome = await self._outcome(shard, ids[shard])
                    if outcome != "committed":
                        failed[shard.name] = f"shard {shard.name}: {error or 'it does not answer'}"
                    if outcome is None:
                        unknown.append(shard.name)
                    elif outcome == "aborted" and not done and not unknown:
                        raise ShardsError(f"{failed[shard.name]}\n{NOTHING_CHANGED}") from error
            except asyncio.CancelledError:
                self._report_interruption(shard, texts, done, unknown)
                raise
            if shard.name is not None and shard.name not in failed:
                done.append(shard.name)
        if failed:
            where = f"{_where(texts, done, failed, unknown)}; {texts.completion}"
            raise ShardsError("\n".join([*failed.values(), where]))

    async def _prepare(self, shard: Shard) -> str | None:
        """Find out now what the commit would refuse. Return the id of the transaction."""
        connection = self.connections[shard]
        await connection.execute(QUERIES["check_constraints"])
        id_: str | None = await connection.fetchval(QUERIES["transaction_id"])
        return id_

    async def _outcome(self, shard: Shard, transaction_id: str | None) -> str | None:
        """Return whether a transaction was committed; None if its shard cannot tell."""
        if transaction_id is None:  # it has written nothing
            return "committed"
        with suppress(SequencerdError, *TRANSIENT_ERRORS):
            async with asyncio.timeout(COMMIT_TIMEOUT):
                connection = await self._connect(shard)
                try:
                    while True:
                        outcome: str | None = await connection.fetchval(
                            QUERIES["transaction_outcome"], transaction_id
                        )
                        if outcome != "in progress":
                            return outcome
                        await asyncio.sleep(0.1)
                finally:
                    connection.terminate()
        return None

    def _report_interruption(
        self, shard: Shard, texts: ChangeTexts, done: Sequence[str], unknown: Sequence[str]
    ) -> None:
        """Report an interruption of the commit on one of the shards."""
        if shard.name is None:
            said = f"it is not known whether {texts.name} is there; repeat the command"
        else:
            left = [name for one in self._shards if (name := str(one.name)) not in done]
            left.remove(shard.name)
            said = f"{_where(texts, done, left, [*unknown, shard.name])}; {texts.completion}"
        self._warn(f"interrupted: {said}")

    def report_interruption(self) -> None:
        """Report an interruption before the commits."""
        if not self._is_committing:
            is_one = self._shards[0].name is None
            self._warn(f"interrupted: {'nothing was changed' if is_one else NOTHING_CHANGED}")

    async def close(self) -> None:
        """Roll back what is not committed."""
        for connection in self.connections.values():
            with suppress(*TRANSIENT_ERRORS):
                await connection.close(timeout=CLOSE_TIMEOUT)


def _where(
    texts: ChangeTexts, done: Collection[str], failed: Collection[str], unknown: Collection[str]
) -> str:
    undone = [name for name in failed if name not in unknown]
    parts = (
        (f"{texts.name} is in ", done),
        ("not in " if done else f"{texts.name} is not in ", undone),
        ("it is not known whether it is in ", unknown),
    )
    return ", ".join(f"{text}{', '.join(names)}" for text, names in parts if names)


@asynccontextmanager
async def changing(
    explain: Explain,
    shards: Sequence[Shard],
    connect: Connect,
    warn: Callable[[str], None] = lambda _: None,
) -> AsyncIterator[Change]:
    """Begin a change of several shards; what is not committed in the context is rolled back. An
    interruption is reported to `warn`.
    """
    change = Change(explain, shards, connect, warn)
    try:
        await change.on_each(change.begin)
        yield change
    except asyncio.CancelledError:
        change.report_interruption()
        raise
    finally:
        await change.close()
