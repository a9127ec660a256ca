"""Group failures by cause: errors that differ only in addresses, numbers and ids have the same
cause.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from sequencerd.console.mask import MaskedRow
from sequencerd.console.summary import Counts
from sequencerd.core.enrollment import StepKey

NO_ERROR = "no error recorded"


@dataclass
class FailureCause:
    """Failed enrollments with the same cause, with masks applied."""

    key: str
    text: str
    failed: int = 0
    since: datetime | None = None
    latest: datetime | None = None
    example: str | None = None  # an error
    steps: Counter[StepKey] = field(default_factory=Counter)
    failures: set[str] = field(default_factory=set)  # codes
    patterns: list[str] = field(default_factory=list)  # as the queries have them


def causes(counts: Counts, mask: Callable[[Mapping[str, Any]], MaskedRow]) -> list[FailureCause]:
    """Return the causes, the most frequent first."""
    found: dict[str, FailureCause] = {}
    for row in counts.causes:
        shown = mask(
            {
                "message": row["cause"],
                "last_error": row["last_error"],
                "data": row["data"],
                "known_subject": row["subject"],
            }
        )
        text = shown["message"] or NO_ERROR
        # made from what is shown, so that it reveals no more
        key = hashlib.sha256(text.encode()).hexdigest()[:12]
        cause = found.setdefault(key, FailureCause(key, text))
        cause.failed += row["failed"]
        cause.steps[row["sequence"], row["step"]] += row["failed"]
        cause.failures.add(row["failure"] or "by hand")
        cause.since = min(filter(None, (cause.since, row["since"])), default=None)
        cause.latest = max(filter(None, (cause.latest, row["latest"])), default=None)
        cause.example = cause.example or shown["last_error"]
        if row["cause"] not in cause.patterns:
            cause.patterns.append(row["cause"])
    return sorted(found.values(), key=lambda cause: -cause.failed)
