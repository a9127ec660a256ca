"""Funnels: how the visits to each step ended, by exit and by arm of a Split."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from datetime import timedelta
from random import Random

import asyncpg
import pytest

from sequencerd.core.task import Answer, Failed, Result, Suppressed, Task
from tests.helpers.engines import Recorder, define, enroll, running_engine, until

WAYS = json.dumps(
    {"ways": [{"name": name, "weight": 1, "step": "note"} for name in ("red", "blue")]}
)
WEIGHTS = '{"next": 1, "altNext": 1}'
PAID = json.dumps(
    {
        "lodashCommand": "eq",
        "value": {"type": "get", "value": "data.paid"},
        "compareTo": {"type": "raw", "value": True},
    }
)
DAYS = '{"amount": 3, "unit": "days"}'
SUMS = ("entered", "exited", "waiting", "failed", "cancelled", "suppressed", "goals")


async def funnel(
    connection: asyncpg.Connection, *arguments: object
) -> dict[tuple[str | None, ...], asyncpg.Record]:
    marks = ", ".join(f"${n}" for n, _ in enumerate(arguments, 1))
    rows = await connection.fetch(f"SELECT * FROM sequencer.funnel({marks})", *arguments)
    return {(row["step"], row["way"], row["arm"]): row for row in rows}


def counts(row: asyncpg.Record) -> dict[str, int]:
    return {name: row[name] for name in SUMS if row[name]}


async def run(connection: asyncpg.Connection, database: str, *subjects: str) -> None:
    """Move these through split, note and wait; the outcome of each depends on its name."""

    async def behave(task: Task) -> Result:
        name = task.view["subject"]
        if name.startswith("fails"):
            return Failed("no", permanent=True)
        return Suppressed("bob@example.com") if name.startswith("suppressed") else Answer()

    await define(
        connection,
        "s",
        ("split", "Split", WAYS, None),
        ("note", "Note", "{}", "wait"),
        ("wait", "WaitForDuration", DAYS, None),
        ("paid", "Goal", PAID, None),
    )
    async with running_engine(database, {"Note": Recorder(behave)}):
        for subject in subjects:
            await enroll(connection, "s", subject)
        await until(
            connection,
            "SELECT NOT EXISTS (SELECT FROM sequencer.enrollments"
            " WHERE status = 'active' AND step <> 'wait')",
        )
        await connection.execute(
            "UPDATE sequencer.enrollments SET data = '{\"paid\": true}' WHERE subject LIKE 'pays%'"
        )
        await until(
            connection,
            "SELECT NOT EXISTS (SELECT FROM sequencer.enrollments"
            " WHERE status = 'active' AND subject LIKE 'pays%')",
        )
    await connection.execute(
        "UPDATE sequencer.enrollments SET status = 'cancelled' WHERE subject LIKE 'stops%'"
    )


async def test_a_funnel_counts_the_outcome_of_each_visit(
    connection: asyncpg.Connection, database: str
) -> None:
    subjects = [
        f"{name}-{n}"
        for name in ("fails", "suppressed", "pays", "stops", "stays")
        for n in range(8)
    ]
    await run(connection, database, *subjects)
    rows = await funnel(connection, "s")
    assert list(dict.fromkeys(step for step, _, _ in rows)) == ["split", "note", "wait"]
    assert counts(rows["split", None, None]) == {"entered": 40, "exited": 40}
    assert counts(rows["note", None, None]) == {
        "entered": 40,
        "exited": 32,
        "failed": 8,
        "suppressed": 8,
    }
    assert counts(rows["note", "suppressed", None]) == {"exited": 8, "suppressed": 8}
    assert counts(rows["note", "next", None]) == {"exited": 24}
    assert counts(rows["wait", None, None]) == {
        "entered": 32,
        "exited": 8,
        "waiting": 16,
        "cancelled": 8,
        "goals": 8,
    }
    assert counts(rows["wait", "goal paid", None]) == {"exited": 8, "goals": 8}
    # arms add up to all
    arms = {arm for _, _, arm in rows if arm}
    assert arms == {"red", "blue"}
    for step in ("split", "note", "wait"):
        for name in SUMS:
            parts = [
                row[name] for (s, way, arm), row in rows.items() if s == step and not way and arm
            ]
            assert sum(parts) == rows[step, None, None][name], (step, name)
    red = rows["split", "red", None]
    assert red["exited"] == rows["split", None, "red"]["entered"]
    assert 0 < red["exited"] < 40
    # what was deleted since is left in the history, and what has not begun is no visit
    await connection.execute("DELETE FROM sequencer.enrollments WHERE status <> 'active'")
    await connection.execute(
        "INSERT INTO sequencer.enrollments (sequence, subject, wake_at)"
        " VALUES ('s', 'x', now() + interval '1 day')"
    )
    assert {key: dict(row) for key, row in (await funnel(connection, "s")).items()} == {
        key: dict(row) for key, row in rows.items()
    }


async def test_visits_that_began_before_do_not_count(
    connection: asyncpg.Connection, database: str
) -> None:
    await run(connection, database, "pays-1", "stays-1")
    await connection.execute(
        "UPDATE sequencer.events SET seconds_at_step = 86400 WHERE action = 'goal'"
    )
    await connection.execute(
        "UPDATE sequencer.enrollments SET entered_at = now() - interval '1 day'"
        " WHERE status = 'active'"
    )
    hour = timedelta(hours=1)
    since = await connection.fetchval("SELECT now() - $1::interval", hour)
    assert {step for step, _, _ in await funnel(connection, "s", since)} == {"split", "note"}
    assert await funnel(connection, "s", since + 2 * hour) == {}


async def test_times_are_those_at_the_step(connection: asyncpg.Connection) -> None:
    await define(connection, "s", ("wait", "WaitForDuration", DAYS, None))
    await connection.execute(
        "INSERT INTO sequencer.events"
        " (enrollment_id, at, sequence, step, visit, action, seconds_at_step)"
        " SELECT n, now(), 's', 'wait', 1, CASE WHEN n <= 10 THEN 'next' ELSE 'altNext' END, n * 60"
        " FROM generate_series(1, 20) AS n"
    )
    rows = await funnel(connection, "s")
    minutes = {
        way: (row["median"] / timedelta(minutes=1), row["p90"] / timedelta(minutes=1))
        for (_, way, _), row in rows.items()
    }
    assert minutes == {None: (10, 18), "next": (5, 9), "altNext": (15, 19)}


async def test_times_of_a_long_history_are_those_of_a_sample(
    connection: asyncpg.Connection,
) -> None:
    await define(connection, "s", ("wait", "WaitForDuration", DAYS, None))
    await connection.execute(
        "INSERT INTO sequencer.events"
        " (enrollment_id, at, sequence, step, visit, action, seconds_at_step)"
        " SELECT n * 16 + 5, now(), 's', 'wait', 1, 'next', n FROM generate_series(1, 4000) AS n"
    )
    await connection.execute(
        "UPDATE pg_class SET reltuples = 8000000 WHERE oid = 'sequencer.events_other'::regclass"
    )
    row = (await funnel(connection, "s"))["wait", None, None]
    assert row["entered"] == 4000
    assert timedelta(seconds=1500) < row["median"] < timedelta(seconds=2500)
    assert timedelta(seconds=3300) < row["p90"] < timedelta(seconds=3900)


async def test_a_retried_failure_is_one_visit(
    connection: asyncpg.Connection, database: str
) -> None:
    await run(connection, database, "fails-1")
    for _ in range(2):
        await connection.execute(
            "UPDATE sequencer.enrollments SET status = 'active' WHERE status = 'failed'"
        )
        await connection.execute(
            "UPDATE sequencer.enrollments SET status = 'failed' WHERE status = 'active'"
        )
    assert counts((await funnel(connection, "s"))["note", None, None]) == {
        "entered": 1,
        "failed": 1,
    }
    await connection.execute("UPDATE sequencer.enrollments SET status = 'active'")
    assert counts((await funnel(connection, "s"))["note", None, None]) == {
        "entered": 1,
        "waiting": 1,
    }
    await connection.execute("UPDATE sequencer.enrollments SET step = 'wait'")
    rows = await funnel(connection, "s")
    assert counts(rows["note", "moved", None]) == {"exited": 1}
    assert counts(rows["wait", None, None]) == {"entered": 1, "waiting": 1}


STEPS = ("a b", "split", "3 c", "d")
ENDS = ("next", "altNext", "jump", "suppressed", "moved", "goal", "failed", "cancelled", "resumed")
Event = tuple[int, int, str, int, str, str | None, float]  # id, second, step, visit, action, ...


def history(random: Random, *, first_id: int, apart: int, by_weights: bool) -> Iterator[Event]:
    """Make up enrollments that come back to the Split and that are resumed."""
    for id_ in range(1, 200):
        second = random.randrange(1000)
        for visit in range(1, random.randrange(2, 9)):
            step = random.choice(STEPS if visit > 1 else STEPS[2:])  # not at the Split at once
            stay = random.randrange(200)
            action = random.choice(ENDS)
            if step == "split":
                action = random.choice(("next", "altNext")) if by_weights else "branch"
            message = {"branch": random.choice(("red 1", "blue")), "goal": "paid is met"}.get(
                action
            )
            second += stay + 1
            yield first_id + id_ * apart, second, step, visit, action, message, stay


def plainly(events: list[Event], since: int) -> dict[tuple[str, str | None, str | None], int]:
    """Count by step, way and arm: those that left, and without a way all."""
    counts: Counter[tuple[str, str | None, str | None]] = Counter()
    for id_, second, step, visit, action, message, stay in events:
        own = [e for e in events if e[0] == id_]
        superseded = action in {"failed", "cancelled"} and any(e[1] > second for e in own)
        if second - stay < since or action == "resumed" or superseded:
            continue
        taken = [(e[3], e[5] or e[4]) for e in own if e[2] == "split" and e[1] >= since]
        arm = min(taken)[1] if taken and min(taken)[0] <= visit else None
        way = {"branch": message, "goal": "goal paid"}.get(action, action)
        ways = {None} if action in {"failed", "cancelled"} else {None, way}
        counts.update((step, w, a) for w in ways for a in {None, arm})
    return dict(counts)


@pytest.mark.parametrize(
    ("since", "first_id", "apart", "by_weights"),
    [(0, 0, 1, False), (900, 2**40, 37, False), (900, 0, 2**50, False), (900, 63, 1, True)],
)
async def test_counts_are_those_of_a_plain_computation(
    connection: asyncpg.Connection, since: int, first_id: int, apart: int, by_weights: bool
) -> None:
    ways = WAYS.replace("red", "red 1").replace('"note"', "null")
    await define(
        connection,
        "s",
        ("split", "Split", WEIGHTS if by_weights else ways, None),
        *((name, "WaitForDuration", DAYS, None) for name in STEPS if name != "split"),
    )
    random = Random(since)
    events = list(history(random, first_id=first_id, apart=apart, by_weights=by_weights))
    await connection.executemany(
        "INSERT INTO sequencer.events (enrollment_id, at, sequence, step, visit, action, message,"
        " seconds_at_step) VALUES ($1, date_trunc('day', now()) + $2 * interval '1 s',"
        " 's', $3, $4, $5, $6, $7)",
        events,
    )
    start = await connection.fetchval(
        "SELECT date_trunc('day', now()) + $1 * interval '1 s'", since
    )
    rows = await funnel(connection, "s", start)
    found = {key: row["exited"] if key[1] else row["entered"] for key, row in rows.items()}
    assert {key: count for key, count in found.items() if count} == plainly(events, since)


async def test_names_are_checked(connection: asyncpg.Connection, database: str) -> None:
    await run(connection, database, "stays-1")
    for arguments, words in (
        (("nowhere",), "sequence 'nowhere' does not exist"),
        (("s", None, "note"), "sequence 's' has no Split 'note'"),
    ):
        with pytest.raises(asyncpg.UndefinedObjectError, match=words):
            await funnel(connection, *arguments)
    assert await funnel(connection, "s", None, "split") == await funnel(connection, "s")
