"""Count the segments in which networks send an SMS (3GPP TS 23.038): each segment is charged."""

from __future__ import annotations

from typing import NamedTuple

_BASIC = frozenset(
    "@£$¥èéùìòÇ\nØø\rÅåΔ_ΦΓΛΩΠΨΣΘΞÆæßÉ !\"#¤%&'()*+,-./0123456789:;<=>?¡"
    "ABCDEFGHIJKLMNOPQRSTUVWXYZÄÖÑÜ§¿abcdefghijklmnopqrstuvwxyzäöñüà"
)
_EXTENDED = frozenset("\f^{}\\[~]|€")  # these follow an escape, so that each counts twice


class Segments(NamedTuple):
    """The number of segments of a text, and the encoding that its characters need."""

    number: int
    encoding: str


def count(text: str) -> Segments:
    """Count the segments of a text. No character is divided between segments."""
    if set(text) <= _BASIC | _EXTENDED:
        encoding, alone, each = "GSM-7", 160, 153
        sizes = [2 if character in _EXTENDED else 1 for character in text]
    else:
        encoding, alone, each = "UCS-2", 70, 67
        sizes = [2 if ord(character) > 0xFFFF else 1 for character in text]
    if sum(sizes) <= alone:
        return Segments(1, encoding)
    number, used = 1, 0
    for size in sizes:
        if used + size > each:
            number, used = number + 1, 0
        used += size
    return Segments(number, encoding)
