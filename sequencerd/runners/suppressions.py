"""Who gets no messages: asked right before each send, many at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from collections.abc import Set as AbstractSet
from typing import Literal

import idna

from sequencerd.runners.sms.numbers import normalise

Channel = Literal["email", "sms"]
Key = tuple[str, str]
"""A channel and an address as `sequencer.suppressions` has it."""


class Suppressions:
    """What is asked of the database; `ask` gives those of the keys that are suppressed."""

    def __init__(self, ask: Callable[[list[Key]], Awaitable[AbstractSet[Key]]]) -> None:
        self._ask = ask
        self._turn = asyncio.Lock()
        self._wanted: set[Key] = set()
        self._round: asyncio.Task[AbstractSet[Key]] | None = None

    async def among(self, channel: Channel, addresses: Iterable[str]) -> set[str]:
        """Which of the addresses are suppressed by now.

        While one question is under way, the next collects what all others want to know.
        """
        given = list(addresses)
        self._wanted.update((channel, form) for address in given for form in forms(address))
        if self._round is None:
            self._round = asyncio.create_task(self._ask_all())
        found = await asyncio.shield(self._round)  # who is cancelled leaves it to the others
        return {
            address for address in given if any((channel, form) in found for form in forms(address))
        }

    async def _ask_all(self) -> AbstractSet[Key]:
        async with self._turn:
            wanted, self._wanted, self._round = self._wanted, set(), None
            return await self._ask(sorted(wanted))


def forms(address: str) -> set[str]:
    """How an address may stand in the table: in lower case, its domain in ASCII or as people write
    it; a number without what people put between the digits.
    """
    plain = address.strip().lower()
    local, at, domain = plain.rpartition("@")
    if not at:
        return {plain, normalise(address)}
    try:
        written = idna.decode(domain)
    except ValueError:
        return {plain}
    return {plain, f"{local}@{written}"}
