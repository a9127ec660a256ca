"""The shard of a subject: known answers, and an even distribution."""

from __future__ import annotations

from collections import Counter

import pytest

from sequencerd.core.routing import shard_of

KNOWN = [
    ("user-42", 16, 3),
    ("", 16, 2),
    ("Zoë", 1000, 944),
    ("日本", 7, 3),
    ("x" * 1000, 2**31 - 1, 1157117252),
]


@pytest.mark.parametrize(("subject", "shards", "number"), KNOWN)
def test_a_subject_keeps_its_shard(subject: str, shards: int, number: int) -> None:
    """These answers never change: where they did, enrollments would be looked for elsewhere."""
    assert shard_of(subject, shards) == number


def test_subjects_are_spread_evenly() -> None:
    counts = Counter(shard_of(f"user-{number}", 16) for number in range(16_000))
    assert set(counts) == set(range(16))
    assert max(counts.values()) - min(counts.values()) < 200
