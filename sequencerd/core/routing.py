"""Determine the shard of a subject."""

from __future__ import annotations

from hashlib import sha256
from typing import NamedTuple


class ShardNumber(NamedTuple):
    """The number of a shard, from 0, and the number of shards."""

    number: int
    shards: int

    def __str__(self) -> str:
        """Format it for a message."""
        return f"number {self.number} of {self.shards} shards"


def shard_of(subject: str, shards: int) -> int:
    """Return the number of a subject's shard, from 0 to `shards` - 1.

    It is the first four bytes of the SHA-256 of the subject in UTF-8, as a big-endian number,
    modulo `shards`: the same as `sequencer.shard_of`, and as the examples of docs/shards.md in
    other languages.
    """
    return int.from_bytes(sha256(subject.encode()).digest()[:4]) % shards
