"""Restrict messages to some recipients, for systems that must not write to others."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

from sequencerd.runners.suppression_check import spellings


class OnlyTo:
    """The patterns of recipients that get messages, such as *@example.com; None means all
    recipients.
    """

    def __init__(self, setting: str, patterns: Iterable[str] | None) -> None:
        self._setting = setting
        self._patterns = (
            None if patterns is None else {form for p in patterns for form in spellings(p)}
        )

    def outside(self, addresses: Iterable[str]) -> frozenset[str]:
        """Return the addresses that get no message."""
        if self._patterns is None:
            return frozenset()
        return frozenset(address for address in addresses if not self._has(address))

    def _has(self, address: str) -> bool:
        return any(
            fnmatchcase(form, pattern)
            for form in spellings(address)
            for pattern in self._patterns or ()
        )

    def describe(self, addresses: Iterable[str]) -> str:
        """Describe addresses that get no message, with the reason."""
        return f"{', '.join(sorted(addresses))}: not in {self._setting}"
