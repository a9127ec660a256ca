"""The ids of enrollments in commands: a number, with the name of its shard."""

from __future__ import annotations

from argparse import ArgumentTypeError
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from sequencerd.storage.connections import Shard


class Id(NamedTuple):
    """The id of an enrollment: `17`, or `b/17` in the shard b."""

    shard: str | None
    number: int

    def __str__(self) -> str:
        return str(self.number) if self.shard is None else f"{self.shard}/{self.number}"


def positive(text: str) -> int:
    """Parse an argument: a bigint above 0."""
    if not (text.isascii() and text.isdecimal() and 0 < int(text) < 2**63):
        raise ArgumentTypeError(f"{text!r} is not a positive integer")
    return int(text)


def parse(text: str) -> Id:
    """Parse an id."""
    shard, slash, number = text.rpartition("/")
    return Id(shard if slash else None, positive(number))


def shard_of_id(shards: Sequence[Shard], id_: Id) -> Shard:
    """Return the shard of an enrollment, among those that a command works on. Raises UsageError."""
    from sequencerd.core.config import nearest  # noqa: PLC0415 - parsing arguments needs none
    from sequencerd.errors import ArgumentError, UsageError  # noqa: PLC0415

    names = [str(shard.name) for shard in shards if shard.name is not None]
    if id_.shard is None:
        if len(shards) == 1:
            return shards[0]
        *others, last = (f"{name}/{id_}" for name in names)
        raise ArgumentError(f"specify the shard of enrollment {id_}: {', '.join(others)} or {last}")
    for shard in shards:
        if shard.name == id_.shard:
            return shard
    hint = nearest(id_.shard, names)
    raise UsageError(f"enrollment {id_}: there is no shard {id_.shard!r}; {hint}")


def by_shard(shards: Sequence[Shard], ids: Sequence[Id]) -> dict[Shard, list[int]]:
    """Group the numbers of ids by shard, in order."""
    found: dict[Shard, set[int]] = {}
    for id_ in ids:
        found.setdefault(shard_of_id(shards, id_), set()).add(id_.number)
    return {shard: sorted(found[shard]) for shard in shards if shard in found}


def labelled(
    shard: Shard, row: Mapping[str, Any], as_json: bool, key: str = "id"
) -> dict[str, Any]:
    """Return a row with its shard: as a key of its own for programs, in the id for users."""
    if shard.name is None:
        return dict(row)
    if as_json or key not in row:
        return {"shard": shard.name, **row}
    return {**row, key: str(Id(shard.name, row[key]))}
