"""What is said of a change of several shards whose commits fail, without a database."""

from __future__ import annotations

from typing import Any

import pytest

from sequencerd.errors import DatabaseError, SequencerdError, ShardsError
from sequencerd.storage.change_of_shards import NOTHING_CHANGED, ChangeTexts, changing
from sequencerd.storage.connections import Shard
from sequencerd.storage.statements import QUERIES

TEXTS = ChangeTexts("the revision", "repeat the command")
SHARDS = [Shard("", name=name) for name in "ab"]


class Connection:
    """A connection that is lost by the commit. `outcome` is what the server says of it later."""

    def __init__(self, outcome: str | None) -> None:
        self._outcome = outcome

    def transaction(self) -> Connection:
        return self

    async def start(self) -> None:
        pass

    async def commit(self) -> None:
        raise ConnectionResetError("lost")

    async def execute(self, _: str) -> None:
        pass

    async def fetchval(self, query: str, *_: object) -> str | None:
        return "7" if query == QUERIES["transaction_id"] else self._outcome

    def terminate(self) -> None:
        pass

    async def close(self, **_: object) -> None:
        pass


async def explain(_: Shard, error: BaseException) -> SequencerdError:
    raise error


@pytest.mark.parametrize(
    ("outcomes", "said"),
    [
        (("aborted", "aborted"), NOTHING_CHANGED),
        (("aborted", "committed"), NOTHING_CHANGED),
        (("committed", "aborted"), "the revision is in a, not in b; repeat the command"),
        ((None, "aborted"), "the revision is not in b, it is not known whether it is in a; repeat"),
        ((None, "committed"), "the revision is in b, it is not known whether it is in a; repeat"),
        (("committed", None), "the revision is in a, it is not known whether it is in b; repeat"),
    ],
)
async def test_what_lost_commits_have_left_is_said(
    outcomes: tuple[str | None, ...], said: str
) -> None:
    known = dict(zip("ab", outcomes, strict=True))
    connected: set[str] = set()

    async def connect(shard: Shard) -> Any:
        name = str(shard.name)
        if name in connected and known[name] is None:
            raise DatabaseError("it does not answer")
        connected.add(name)
        return Connection(known[name])

    with pytest.raises(ShardsError) as refused:
        async with changing(explain, SHARDS, connect) as change:
            await change.commit(TEXTS)
    assert said in str(refused.value)


async def test_a_commit_whose_answer_was_lost_is_no_error() -> None:
    async def connect(_: Shard) -> Any:
        return Connection("committed")

    async with changing(explain, SHARDS, connect) as change:
        await change.commit(TEXTS)
