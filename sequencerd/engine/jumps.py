"""Decide how enrollments affect others, before it is written: jumps, Enroll and Cancel steps.

`advance` does not know whether a sequence admits a subject, or whether another session has locked
enrollments that are to be cancelled. Both are checked in the transaction that writes; refused
enrollments are advanced again with that answer. An entry between the check and the write makes the
write fail, and it is repeated.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import NamedTuple

import asyncpg

from sequencerd.core.decision import Advanced, End, Fail
from sequencerd.core.enrollment import Enrollment
from sequencerd.core.model import Cancellation, RefusalKey
from sequencerd.storage.entries import lock_cancelled, refusals

UNKNOWN_SEQUENCE = ("always", None, None)  # what `refusals` returns if there is no such sequence

_Policy = tuple[str, str | None, int | None]
"""The reentry policy of a sequence, the code of a refusal, and the revision."""


class PendingMove(NamedTuple):
    """An enrollment that affects others or needs reservations, and the function that advances it
    again, given what refuses that: `refused`, or which limit is `full`.
    """

    before: Enrollment
    advanced: Advanced
    again: Callable[..., Advanced]


class JumpDecisions(NamedTuple):
    """Where enrollments go, and which others they cancel, each with a message."""

    advanced: list[tuple[Enrollment, Advanced]]
    cancelled: dict[int, str]
    outdated: set[str]  # sequences that have changed, into which nothing jumps by the known steps


async def decide(connection: asyncpg.Connection, jumps: Iterable[PendingMove]) -> JumpDecisions:
    """Decide where enrollments go, according to the sequences that they enter."""
    decided = JumpDecisions([], {}, set())
    refused: defaultdict[int, dict[RefusalKey, str]] = defaultdict(dict)
    inside: set[tuple[str, str]] = set()  # subjects that the batch has brought in already
    open_ = list(jumps)
    while open_:
        policies = await _policies(connection, open_)
        targets = await _lock_cancelled(connection, open_)
        jumps, open_ = open_, []
        for before, advanced, again in jumps:
            news: dict[RefusalKey, str] = {}
            own = policies[before.id]
            known = dict(advanced.entered)
            for key, subject, name in _entered(before, advanced):
                policy, refusal, revision = own.get(key, UNKNOWN_SEQUENCE)
                if key not in own and not isinstance(key, str):
                    refusal = "missing"
                if refusal is None and policy != "always" and (subject, name) in inside:
                    refusal = "already_enrolled"
                # what is known may have changed since it was advanced
                is_jump = isinstance(key, str) and known[name] is not None
                if refusal is None and is_jump and revision not in (None, known[name]):
                    refusal = "outdated"
                    decided.outdated.add(name)
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
                other = again(refused=refused[before.id])
                if other.is_tentative:
                    open_.append(PendingMove(before, other, again))
                else:
                    decided.advanced.append((before, other))
                continue
            for entry in advanced.entries:
                if own.get(entry.key, UNKNOWN_SEQUENCE)[0] != "always":
                    inside.add((entry.subject, entry.sequence))
            name = advanced.enrollment.sequence
            policy, *_ = own.get(name, UNKNOWN_SEQUENCE)
            if policy == "never" or not isinstance(advanced.decision, End | Fail):
                inside.add((before.subject, name))
            decided.cancelled.update(ids)
            decided.advanced.append((before, advanced))
    return decided


def _entered(before: Enrollment, advanced: Advanced) -> list[tuple[RefusalKey, str, str]]:
    """Return the entries: the key of a refusal, the subject, and the sequence."""
    jumps: list[tuple[RefusalKey, str, str]] = [
        (name, before.subject, name) for name, _ in advanced.entered
    ]
    return [*jumps, *((entry.key, entry.subject, entry.sequence) for entry in advanced.entries)]


async def _policies(
    connection: asyncpg.Connection, jumps: Iterable[PendingMove]
) -> defaultdict[int, dict[RefusalKey, _Policy]]:
    """Read the reentry policies and refusals of the sequences that are entered."""
    asked = [
        # unlike an Enroll step, a jump leaves its own sequence
        (before.id, key, before.id if isinstance(key, str) else None, subject, name)
        for before, advanced, _ in jumps
        for key, subject, name in _entered(before, advanced)
    ]
    found: defaultdict[int, dict[RefusalKey, _Policy]] = defaultdict(dict)
    if asked:
        answers = await refusals(connection, [one[2:] for one in asked])
        for (id_, key, *_), answer in zip(asked, answers, strict=True):
            if answer is not None:
                found[id_][key] = answer
    return found


async def _lock_cancelled(
    connection: asyncpg.Connection, jumps: Iterable[PendingMove]
) -> dict[tuple[int, RefusalKey], list[int | None]]:
    """Lock the enrollments to be cancelled: ids, or None if another session has locked one."""
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
