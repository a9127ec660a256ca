"""What enrollments do to others, decided before it is written: jumps, Enroll and Cancel steps.

`advance` does not know whether a sequence lets a subject in, nor whether another session has locked
what is to be cancelled. Both are asked in the transaction that writes; what is refused is advanced
again with that answer. An entry between the question and the write makes the write fail, and it is
done again.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import NamedTuple

import asyncpg

from sequencerd.core.model import (
    Advanced,
    Cancellation,
    End,
    Enrollment,
    Fail,
    RefusalKey,
    Refusals,
)
from sequencerd.storage.entries import lock_cancelled, refusals

UNKNOWN = ("always", None)  # what is taken for the policy and refusal of no such sequence


class PendingJump(NamedTuple):
    """An enrollment that concerns others, and what advances it again under refusals."""

    before: Enrollment
    advanced: Advanced
    again: Callable[[Refusals], Advanced]


class JumpDecisions(NamedTuple):
    """Where enrollments go, and which others they cancel, with a message for each."""

    advanced: list[tuple[Enrollment, Advanced]]
    cancelled: dict[int, str]


async def decide(connection: asyncpg.Connection, jumps: Iterable[PendingJump]) -> JumpDecisions:
    """Decide where they go, by what the sequences say that they enter."""
    decided = JumpDecisions([], {})
    refused: defaultdict[int, dict[RefusalKey, str]] = defaultdict(dict)
    inside: set[tuple[str, str]] = set()  # subjects that others of the batch have brought in
    open_ = list(jumps)
    while open_:
        policies = await _policies(connection, open_)
        targets = await _lock_cancelled(connection, open_)
        jumps, open_ = open_, []
        for before, advanced, again in jumps:
            news: dict[RefusalKey, str] = {}
            own = policies[before.id]
            for key, subject, name in _entered(before, advanced):
                policy, refusal = own.get(key, UNKNOWN)
                if key not in own and not isinstance(key, str):
                    refusal = "missing"
                if refusal is None and policy != "always" and (subject, name) in inside:
                    refusal = "already_enrolled"
                if refusal is not None:
                    news[key] = refusal
            ids: dict[int, str] = {}
            for cancellation in advanced.cancellations:
                found = targets[before.id, cancellation.key]
                if None in found:
                    news[cancellation.key] = "locked"
                ids |= {id_: cancellation.message for id_ in found if id_ is not None}
            if news:
                refused[before.id] |= news
                other = again(refused[before.id])
                if other.is_tentative:
                    open_.append(PendingJump(before, other, again))
                else:
                    decided.advanced.append((before, other))
                continue
            for entry in advanced.entries:
                if own.get(entry.key, UNKNOWN)[0] != "always":
                    inside.add((entry.subject, entry.sequence))
            name = advanced.enrollment.sequence
            policy, _ = own.get(name, UNKNOWN)
            if policy == "never" or not isinstance(advanced.decision, End | Fail):
                inside.add((before.subject, name))
            decided.cancelled.update(ids)
            decided.advanced.append((before, advanced))
    return decided


def _entered(before: Enrollment, advanced: Advanced) -> list[tuple[RefusalKey, str, str]]:
    """What is entered: the key of a refusal, the subject, and the sequence."""
    jumps: list[tuple[RefusalKey, str, str]] = [
        (name, before.subject, name) for name in advanced.entered
    ]
    return [*jumps, *((entry.key, entry.subject, entry.sequence) for entry in advanced.entries)]


async def _policies(
    connection: asyncpg.Connection, jumps: Iterable[PendingJump]
) -> defaultdict[int, dict[RefusalKey, tuple[str, str | None]]]:
    """Ask the sequences that are entered for their reentry policies and refusals."""
    asked = [
        # an enrollment that jumps leaves its sequence, one that enrolls does not
        (before.id, key, before.id if isinstance(key, str) else None, subject, name)
        for before, advanced, _ in jumps
        for key, subject, name in _entered(before, advanced)
    ]
    found: defaultdict[int, dict[RefusalKey, tuple[str, str | None]]] = defaultdict(dict)
    if asked:
        answers = await refusals(connection, [one[2:] for one in asked])
        for (id_, key, *_), answer in zip(asked, answers, strict=True):
            if answer is not None:
                found[id_][key] = answer
    return found


async def _lock_cancelled(
    connection: asyncpg.Connection, jumps: Iterable[PendingJump]
) -> dict[tuple[int, RefusalKey], list[int | None]]:
    """Lock what is to be cancelled: the ids, None for what another session has locked."""
    asked: list[tuple[int, Cancellation]] = [
        (before.id, one) for before, advanced, _ in jumps for one in advanced.cancellations
    ]
    found: dict[tuple[int, RefusalKey], list[int | None]] = {
        (id_, one.key): [] for id_, one in asked
    }
    if asked:
        targets = [(id_, one.subject, one.sequence) for id_, one in asked]
        for number, locked in await lock_cancelled(connection, targets):
            id_, one = asked[number]
            found[id_, one.key].append(locked)
    return found
