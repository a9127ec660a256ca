"""Check that each enrollment got where it should, and that every repeated delivery is explained."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

import asyncpg

from tests.chaos.world import PAUSE, STEPS, World

MOVES = ("next", "altNext", "goal", "jump", "completed", "failed", "cancelled", "moved", "resumed")
WAY = [*((name, "next") for name, *_ in STEPS), (STEPS[-1][0], "completed")]
EXPLANATIONS = {"retry", "lease_expired", "stale_result"}
ONCE = next(number for number, step in enumerate(STEPS, 1) if "at_most_once" in step[2])
"""The visit of the step that must not be done twice: there are no loops here."""
WAITED = (1, 3)
"""The visits of the mail before the wait and of the call after it."""


async def check(world: World, *, duplicates: bool = True) -> None:
    """Raises AssertionError with everything that is wrong, and with what was done.

    Without `duplicates`, nothing has happened that would explain one, nor a spent attempt.
    """
    wrong = [problem async for problem in _problems(world, duplicates=duplicates)]
    done = "\n".join(world.plan)
    assert not wrong, "\n".join(wrong[:20]) + f"\n{len(wrong)} problems. What was done:\n{done}"


async def _problems(world: World, *, duplicates: bool):  # type: ignore[no-untyped-def]
    connection = await asyncpg.connect(world.database)
    rows = await connection.fetch("SELECT * FROM sequencer.enrollments ORDER BY id")
    events = await connection.fetch(
        "SELECT * FROM sequencer.events ORDER BY enrollment_id, visit, at"
    )
    await connection.close()
    if not rows:
        yield "nothing was enrolled"
    if lost := set(world.acknowledged) - {row["subject"] for row in rows}:
        yield f"{len(lost)} were committed and are gone: {sorted(lost)[:5]}"
    history: dict[int, list[asyncpg.Record]] = defaultdict(list)
    for event in events:
        history[event["enrollment_id"]].append(event)
    for row in rows:
        strict = not duplicates
        if world.faulty is not None:
            # no fault of one enrollment reaches another: what may explain that some are done twice,
            # or fail, explains nothing of the others
            if row["subject"] in world.faulty:
                continue
            strict = True
        for problem in _of_one(row, history[row["id"]], world, duplicates=not strict):
            yield f"enrollment {row['id']}: {problem}"


def _of_one(
    row: asyncpg.Record, events: Sequence[asyncpg.Record], world: World, *, duplicates: bool
) -> Iterator[str]:
    moves = [(e["step"], e["action"]) for e in events if e["action"] in MOVES]
    begun = Counter(e["action"] for e in events)["enrolled"]
    told: dict[int, set[str]] = defaultdict(set)
    for event in events:
        told[event["visit"]].add(event["action"])
    unknown = row["failure"] == "outcome_unknown" and duplicates
    if begun != 1:
        yield f"has begun {begun} times"
    wanted = [*WAY[: ONCE - 1], (STEPS[ONCE - 1][0], "failed")] if unknown else WAY
    if moves != wanted:
        yield f"has gone {moves}, is {row['status']} ({row['failure']}: {row['last_error']})"
    reached = ONCE if unknown else len(STEPS)
    for visit, (name, type_, *_) in enumerate(STEPS[:reached], 1):
        if type_ not in ("Email", "Call"):
            continue
        key = f"{row['id']}:{visit}"
        count = (world.sink.mails if type_ == "Email" else world.sink.calls)[key]
        if count == 0 and not (unknown and visit == ONCE):
            yield f"{name} was not delivered"
        if len(world.sink.keys[key]) > 1:
            yield f"{name} was delivered under several keys: {world.sink.keys[key]}"
        explained = duplicates and visit != ONCE and told[visit] & EXPLANATIONS
        if count > 1 and not explained:
            yield f"{name} was delivered {count} times, and its events are {told[visit]}"
    first, last = (world.sink.first.get(f"{row['id']}:{visit}") for visit in WAITED)
    # a daemon's clock is behind by as much as an answer of the database was under way
    if first and last and last - first < PAUSE / 1000 / 2:
        yield f"was called {last - first:.3f} s after its mail"
    texts = {e["message"] for e in events if e["action"] in EXPLANATIONS}
    if texts and not duplicates:
        yield f"has the events {texts}"
