"""Plan for several shards: add up the counts, name the differences, and apply to all or none."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from dataclasses import replace

from sequencerd.definitions import apply_plan, plan
from sequencerd.definitions.affected import WaitingCounts
from sequencerd.definitions.compiler import Definition, Runners
from sequencerd.definitions.plan import Plan, ScheduledEntries, SequencePlan, refusals
from sequencerd.storage.bulk import set_reason
from sequencerd.storage.change_of_shards import Change
from sequencerd.storage.connections import Shard
from sequencerd.storage.statements import QUERIES

_Parts = Mapping[str, SequencePlan]
"""The plans of one sequence, by shard."""


async def apply(
    change: Change,
    definitions: Sequence[Definition],
    runners: Runners,
    *,
    moves: Mapping[str, str],
    reason: str,
    prune: bool = False,
    expected: str | None = None,
    brake: int | None = None,
    from_files: bool = True,
) -> Plan:
    """Make a plan on every shard of a change and apply it, for the caller to commit: see
    `plan.make` and `apply_plan.write`. `reason` is recorded with the revisions. Raises PlanError if
    the plan cannot be applied, or does not have the `expected` fingerprint.
    """

    async def lock(shard: Shard) -> None:
        await set_reason(change.connections[shard], reason)
        await change.connections[shard].execute(QUERIES["lock_definitions"])

    async def make(shard: Shard) -> Plan:
        connection = change.connections[shard]
        return await plan.make(connection, definitions, runners, moves=moves, prune=prune)

    async def write(shard: Shard) -> None:
        await apply_plan.write(
            change.connections[shard],
            plans[shard],
            definitions,
            brake=brake,
            from_files=from_files,
        )

    # in one order, so that two of these at the same time cannot deadlock
    await change.on_each(lock, at_once=1)
    plans = await change.on_each(make)
    merged = merge(plans, moves)
    apply_plan.check(merged, expected)
    await change.on_each(write)
    return merged


def how_to_complete(how: str) -> str:
    """Say how to complete a change that was committed on only some shards."""
    return (
        f"repeat {how} when all shards can be reached: it completes the others, and does not "
        "change those that have the revision"
    )


def merge(plans: Mapping[Shard, Plan], moves: Mapping[str, str]) -> Plan:
    """Merge the plans of several shards; the plan of a single shard is returned unchanged."""
    first, *others = plans.values()
    if not others:
        return first
    names = list(dict.fromkeys(one.sequence for one in first.sequences))
    merged = [
        _merge_one(alike)
        for name in names
        for alike in _alike(
            {
                str(shard.name): one
                for shard, plan in plans.items()
                for one in plan.sequences
                if one.sequence == name
            }
        )
    ]
    times = Counter(one.sequence for one in merged)
    differing = frozenset(name for name, count in times.items() if count > 1)
    facts = "\n".join(f"{shard.name} {plan.fingerprint}" for shard, plan in plans.items())
    return Plan(
        tuple(merged),
        tuple(sorted({name for plan in plans.values() for name in plan.archived})),
        tuple(refusals(merged, names, moves)),
        hashlib.sha256(facts.encode()).hexdigest()[:12],
        differing,
    )


def _alike(parts: _Parts) -> Sequence[_Parts]:
    """Group the plans of a sequence by equal changes and results."""
    groups: list[dict[str, SequencePlan]] = []
    for shard, one in parts.items():
        for group in groups:
            other = next(iter(group.values()))
            if (one.changes, one.after) == (other.changes, other.after):
                group[shard] = one
                break
        else:
            groups.append({shard: one})
    return groups


def _merge_one(parts: _Parts) -> SequencePlan:
    plans = list(parts.values())
    at_step: Counter[str] = Counter()
    for one in plans:
        at_step.update(one.at_step)
    return replace(
        plans[0],
        revision=max((plan.revision for plan in plans if plan.revision), default=None),
        at_step=dict(at_step),
        named=tuple(dict.fromkeys(naming for plan in plans for naming in plan.named)),
        waiting=tuple(_waiting(plan.waiting for plan in plans)),
        empty_calendars=sentences({shard: plan.empty_calendars for shard, plan in parts.items()}),
        missing=sentences({shard: plan.missing for shard, plan in parts.items()}),
        entering=_entering(parts),
        unlisted_topics=sentences({shard: plan.unlisted_topics for shard, plan in parts.items()}),
        limits=sentences({shard: plan.limits for shard, plan in parts.items()}),
        shards=tuple(parts),
    )


def _waiting(found: Iterable[Sequence[WaitingCounts]]) -> Iterable[WaitingCounts]:
    by_step: dict[str, WaitingCounts] = {}
    for of_shard in found:
        for waiting in of_shard:
            if waiting.step in by_step:
                by_step[waiting.step].add(waiting)
            else:
                by_step[waiting.step] = copy(waiting)
    return by_step.values()


def sentences(by_shard: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """Return each sentence once, with its shards unless these are all."""
    shards: dict[str, list[str]] = {}
    for shard, sentences in by_shard.items():
        for sentence in sentences:
            shards.setdefault(sentence, []).append(shard)
    return tuple(
        sentence if len(found) == len(by_shard) else f"{sentence} (in {', '.join(found)})"
        for sentence, found in shards.items()
    )


def _entering(parts: _Parts) -> ScheduledEntries | str | None:
    found = {shard: plan.entering for shard, plan in parts.items()}
    known = [one for one in found.values() if isinstance(one, ScheduledEntries)]
    if len(known) < len(found) or any(one.found > one.at_most for one in known):
        return "; ".join(sentences({shard: [str(one)] for shard, one in found.items() if one}))
    faults: Counter[str] = Counter()
    for one in known:
        faults.update(one.faults)
    return replace(known[0], found=sum(one.found for one in known), faults=faults)
