"""Jumps into other sequences, decided before they are written.

`advance` does not know whether a sequence admits a subject. One query checks all jumps of a batch,
in the transaction that writes them; refused enrollments are advanced again with that answer. If an
insert comes between the query and the write, the write fails and the batch is repeated.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import asyncpg

from sequencerd.core.model import Advanced, End, Enrollment, Fail
from sequencerd.storage import store


class Jump(NamedTuple):
    """An enrollment that has jumped; `again` advances it once more, given refusals by sequence."""

    before: Enrollment
    advanced: Advanced
    again: Callable[[Mapping[str, str]], Advanced]


async def decide(
    connection: asyncpg.Connection, jumps: Iterable[Jump]
) -> list[tuple[Enrollment, Advanced]]:
    """Return the enrollments as advanced by what the entered sequences answer."""
    decided: list[tuple[Enrollment, Advanced]] = []
    refused: defaultdict[int, dict[str, str]] = defaultdict(dict)
    inside: set[tuple[str, str]] = set()  # subject and sequence of other jumps of the batch
    open_ = list(jumps)
    while open_:
        asked = [
            (j.before.id, j.before.subject, name) for j in open_ for name in j.advanced.entered
        ]
        answers = await store.refusals(connection, asked)
        jumps, open_ = open_, []
        for before, advanced, again in jumps:
            news: dict[str, str] = {}
            for name in advanced.entered:
                policy, refusal = answers.get((before.id, name), ("always", None))
                if refusal is None and policy != "always" and (before.subject, name) in inside:
                    refusal = "already_enrolled"
                if refusal is not None:
                    news[name] = refusal
            if news:
                refused[before.id] |= news
                other = again(refused[before.id])
                if other.entered:
                    open_.append(Jump(before, other, again))
                else:
                    decided.append((before, other))
                continue
            name = advanced.enrollment.sequence
            policy, _ = answers.get((before.id, name), ("always", None))
            if policy == "never" or not isinstance(advanced.decision, End | Fail):
                inside.add((before.subject, name))
            decided.append((before, advanced))
    return decided
