"""The counts of several shards, added up."""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from operator import itemgetter
from typing import Any

from sequencerd.console import views
from sequencerd.console.all_shards import common_or_each, matching_rows
from sequencerd.console.summary import (
    PAGE_WAIT,
    UNREADABLE_VERSION,
    Counts,
    Summary,
    SummaryRow,
)
from sequencerd.core.enrollment import StepKey
from sequencerd.storage.database_errors import brief


class SummaryOfShards(Summary):
    """The counts of all shards that can be reached."""

    def __init__(self, shards: Mapping[str, Summary]) -> None:
        self.changed = lambda: None
        self.missing: Mapping[str, str] = {}
        self._shards = shards
        for summary in shards.values():
            summary.changed = self._also(summary.changed)

    def _also(self, before: Callable[[], None]) -> Callable[[], None]:
        def changed() -> None:
            before()
            self.changed()

        return changed

    @property
    def version(self) -> str:
        """Return a version that changes with the counts of any shard."""
        versions = [summary.version for summary in self._shards.values()]
        return UNREADABLE_VERSION if {*versions} == {UNREADABLE_VERSION} else " ".join(versions)

    def record_view(self) -> None:
        """Record that a page is open."""
        for summary in self._shards.values():
            summary.record_view()

    async def get(self, first: float = PAGE_WAIT) -> Counts | None:
        """Return the latest counts; None if there are none yet. Raises the error if all fail."""
        answers = await asyncio.gather(
            *(summary.get(first) for summary in self._shards.values()), return_exceptions=True
        )
        found = dict(zip(self._shards, answers, strict=True))
        failed = {name: one for name, one in found.items() if isinstance(one, BaseException)}
        self.missing = {name: brief(error) for name, error in failed.items()}
        if len(failed) == len(found):
            raise next(iter(failed.values()))
        counted = {name: one for name, one in found.items() if isinstance(one, Counts)}
        return merge_counts(counted) if counted else None


def merge_counts(shards: Mapping[str, Counts]) -> Counts:
    """Add up the counts of several shards."""
    every = list(shards.values())
    flow: defaultdict[tuple[str, str, str], Counter[Any]] = defaultdict(Counter)
    stays: defaultdict[StepKey, dict[str, float]] = defaultdict(dict)  # medians cannot be added up
    for name, counts in shards.items():
        for key, days in counts.flow.items():
            flow[key] += days
        for place, seconds in counts.stays.items():
            if not isinstance(seconds, Mapping):
                stays[place][name] = seconds
    return replace(
        every[0],
        at=min(counts.at for counts in every),
        sequences=_merge_rows({name: one.sequences for name, one in shards.items()}, "name"),
        steps=_merge_rows({name: one.steps for name, one in shards.items()}, "sequence", "step"),
        failed=[row for counts in every for row in counts.failed],
        causes=[row for counts in every for row in counts.causes],
        has_more_causes=any(counts.has_more_causes for counts in every),
        next=sorted((row for counts in every for row in counts.next), key=lambda row: row["at"]),
        problems=[
            {**row, "shard": name} for name, counts in shards.items() for row in counts.problems
        ],
        findings=[
            replace(finding, about=f"{name}: {finding.about}")
            for name, counts in shards.items()
            for finding in counts.findings
        ],
        flow=flow,
        stays=stays,
        flow_since=max(filter(None, (counts.flow_since for counts in every)), default=None),
    )


def _merge_rows(shards: Mapping[str | None, Sequence[SummaryRow]], *key: str) -> list[SummaryRow]:
    """Return one row for those of the shards with the same key: numbers of enrollments are added
    up, and another status or problem is named with its shard.
    """
    merged = []
    for rows in matching_rows(shards, itemgetter(*key)):
        made = dict(next(iter(rows.values())))
        for name in made.keys() & {"active", "soon", "overdue"}:
            made[name] = views.sum_known(row[name] for row in rows.values())
        for name in made.keys() & {"status", "problem"}:
            made[name] = common_or_each({shard: row[name] for shard, row in rows.items()})
        merged.append(made)
    return sorted(merged, key=itemgetter(key[0]))
