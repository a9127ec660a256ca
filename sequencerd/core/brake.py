"""How many side effects a brake lets begin in its period."""

from __future__ import annotations

MAX_BRAKE = 1_000_000  # as in the schema


def read_brake(text: str) -> int | None:
    """Parse a number that a user has entered; None if a brake cannot have it."""
    number = int(text) if text.isascii() and text.isdecimal() and len(text) < 10 else 0
    return number if 1 <= number <= MAX_BRAKE else None
