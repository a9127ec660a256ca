"""How many segments an SMS has."""

from __future__ import annotations

import pytest

from sequencerd.runners.sms.segments import Segments, count


@pytest.mark.parametrize(
    ("text", "segments", "encoding"),
    [
        ("", 1, "GSM-7"),
        ("a" * 160, 1, "GSM-7"),
        ("a" * 161, 2, "GSM-7"),
        ("ä" * 306, 2, "GSM-7"),
        ("a" * 307, 3, "GSM-7"),
        ("€" * 80, 1, "GSM-7"),
        ("a" * 152 + "€" + "a" * 152, 3, "GSM-7"),  # an escape is not apart from its character
        ("ж" * 70, 1, "UCS-2"),
        ("ж" * 71, 2, "UCS-2"),
        ("😀" * 35, 1, "UCS-2"),
        ("😀" * 66, 2, "UCS-2"),
        ("😀" * 67, 3, "UCS-2"),  # 33 in each, as no character is cut
    ],
    ids=lambda value: str(len(value)) if isinstance(value, str) else value,
)
def test_segments(text: str, segments: int, encoding: str) -> None:
    assert count(text) == Segments(segments, encoding)
