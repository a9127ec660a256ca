"""Checks which addresses are suppressed, right before each send and many at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from collections.abc import Set as AbstractSet
from contextlib import suppress
from hashlib import sha256
from typing import Literal

import idna

from sequencerd.runners.sms.numbers import normalise

Channel = Literal["email", "sms"]
Key = tuple[str, str]
"""A channel and an address as `sequencer.suppressions` has it."""


class Suppressions:
    """Checks keys in rounds; `ask` queries the database for those that are suppressed."""

    def __init__(self, ask: Callable[[list[Key]], Awaitable[AbstractSet[Key]]]) -> None:
        self._ask = ask
        self._turn = asyncio.Lock()
        self._wanted: set[Key] = set()
        self._round: asyncio.Task[AbstractSet[Key]] | None = None

    async def among(self, channel: Channel, addresses: Iterable[str]) -> set[str]:
        """Return which of the addresses are suppressed now.

        While one query is in progress, the next one collects the addresses of all other callers.
        """
        given = list(addresses)
        self._wanted.update((channel, form) for address in given for form in forms(address))
        if self._round is None:
            self._round = asyncio.create_task(self._ask_all())
        found = await asyncio.shield(
            self._round
        )  # a cancelled caller leaves the round to the others
        return {
            address for address in given if any((channel, form) in found for form in forms(address))
        }

    async def _ask_all(self) -> AbstractSet[Key]:
        async with self._turn:
            wanted, self._wanted, self._round = self._wanted, set(), None
            return await self._ask(sorted(wanted))


def forms(address: str) -> set[str]:
    """Return how an address may be written in the table: each of its `spellings`, also as the hash
    that a forgotten one has.
    """
    known = spellings(address)
    return known | set(map(hashed, known))


def spellings(address: str) -> set[str]:
    """Return an address in lower case, with its domain in ASCII and as users write it, and a number
    without separators.
    """
    plain = address.strip().lower()
    local, at, domain = plain.rpartition("@")
    known = {plain}
    if not at:
        known.add(normalise(address))
    else:
        with suppress(ValueError):
            known.add(f"{local}@{idna.decode(domain)}")
    return known


def hashed(address: str) -> str:
    """Return what stands for a forgotten address; SQL has the same function, suppression_hash."""
    return f"sha256:{sha256(address.encode('utf-8', 'replace')).hexdigest()}"
