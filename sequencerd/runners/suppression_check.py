"""Check which addresses are suppressed, immediately before each send and many at a time."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Iterable, Mapping
from collections.abc import Set as AbstractSet
from contextlib import suppress
from hashlib import sha256
from itertools import product

import idna

from sequencerd.runners.email.mime import quoted, unquoted, visible
from sequencerd.runners.sms.numbers import normalise

EVERYTHING = "*"
"""The topic of entries that suppress all messages."""

SuppressionKey = tuple[str, str, str]
"""A channel, an address and a topic, as in `sequencer.suppressions`."""


class Suppressions:
    """Checks keys in rounds; `ask` queries the database for the suppressed ones."""

    def __init__(
        self, ask: Callable[[list[SuppressionKey]], Awaitable[AbstractSet[SuppressionKey]]]
    ) -> None:
        self._ask = ask
        self._turn = asyncio.Lock()
        self._wanted: set[SuppressionKey] = set()
        self._round: asyncio.Task[AbstractSet[SuppressionKey]] | None = None

    async def find_suppressed(
        self, channel: str, addresses: Iterable[str], topic: str | None
    ) -> dict[str, str]:
        """Return which of the addresses are suppressed now, for all topics or this one, each with
        the topic of its entry.

        While a query is in progress, the next one collects the addresses of all other callers.
        """
        topics = [EVERYTHING] if topic is None else [EVERYTHING, topic]
        keys = {
            address: [(channel, form, name) for name in topics for form in forms(channel, address)]
            for address in addresses
        }
        for wanted in keys.values():
            self._wanted.update(wanted)
        if self._round is None:
            self._round = asyncio.create_task(self._ask_all())
            self._round.add_done_callback(_ignore_error)
        # a cancelled caller leaves the round to the others
        found = await asyncio.shield(self._round)
        entries = {
            address: [key for key in wanted if key in found] for address, wanted in keys.items()
        }
        return {address: matched[0][2] for address, matched in entries.items() if matched}

    async def _ask_all(self) -> AbstractSet[SuppressionKey]:
        async with self._turn:
            wanted, self._wanted, self._round = self._wanted, set(), None
            return await self._ask(sorted(wanted))


def _ignore_error(task: asyncio.Task[AbstractSet[SuppressionKey]]) -> None:
    """Let asyncio log no error of a round whose callers were all cancelled."""
    if not task.cancelled():
        task.exception()


_UNSTORABLE = re.compile(r"[\x00\ud800-\udfff]")
"""What no text of PostgreSQL can contain, although a lookup may return it."""


def describe(found: Mapping[str, str]) -> str:
    """Describe suppressed addresses, with the topic unless it is all topics."""
    return ", ".join(
        address if topic == EVERYTHING else f"{address} (topic {topic})"
        for address, topic in sorted(found.items())
    )


def forms(channel: str, address: str) -> set[str]:
    """Return all forms in which the table may contain an address: e-mail addresses and numbers in
    each of their `spellings`, others as they are, and each of these as the hash that replaces a
    forgotten address.
    """
    is_known = channel in ("email", "sms")
    known = spellings(address) if is_known else {address.strip(" \t\r\n\u00a0\u3000")}
    if channel == "email" and not all(map(str.isascii, known)):
        written = (address.strip(), *known)
        known |= {form for one in written for form in _stored_cases(one)}
    return {one for one in known if not _UNSTORABLE.search(one)} | set(map(hashed, known))


def _stored_cases(address: str) -> set[str]:
    """Return an address as the table contains it if both parts were written as here, or in lower
    case, in capitals, or with initials: the table's trigger folds ASCII letters alone.
    """
    parts = []
    for part in address.rpartition("@"):
        lower = part.lower()
        cases = {part, lower, part.upper(), lower.title(), lower[:1].upper() + lower[1:]}
        parts.append(
            {
                "".join(one.lower() if one.isascii() else one for one in case)
                for case in cases
                if case.lower() == lower  # not with SS for another letter
            }
        )
    return set(map("".join, product(*parts)))


def spellings(address: str) -> set[str]:
    """Return an e-mail address in lower case, with its domain both in ASCII and as users write it,
    its local part with and without the quotation marks that dots may require, and all of it with
    and without invisible characters; without a name before it, as in `Ada <ada@example.com>`; a
    number without separators.
    """
    plain = address.strip().lower()
    if "@" in plain and plain.endswith(">"):
        plain = plain[:-1].rpartition("<")[2].strip()
    if visible(plain) != plain and "@" in plain:
        return {plain} | spellings(visible(plain))
    local, at, domain = plain.rpartition("@")
    if not at:
        return {plain, normalise(address)}
    domains = {domain}
    with suppress(ValueError):
        domains.add(
            idna.decode(domain)
            if domain.isascii()
            else idna.encode(domain, uts46=True).decode("ascii")
        )
    local_parts = {local, unquoted(local), quoted(unquoted(local))}
    return {f"{part}@{one}" for part in local_parts for one in domains}


def hashed(address: str) -> str:
    """Return the hash that replaces a forgotten address; as does suppression_hash in SQL."""
    return f"sha256:{sha256(address.encode('utf-8', 'replace')).hexdigest()}"
