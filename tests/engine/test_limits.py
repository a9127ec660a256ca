"""Frequency limits of side effects, which sequences and daemons share."""

from __future__ import annotations

import asyncio
import json
from collections import defaultdict
from datetime import UTC, datetime, timedelta
from random import Random
from typing import Any

import asyncpg
import pytest

from sequencerd.core.model import LimitReached, Reservation
from sequencerd.core.step_types import BUILT_IN, is_instant
from sequencerd.core.task import Answer, Failed, Result, Suppressed, Task
from sequencerd.storage.limits import Reserved, prune, reserve
from tests.helpers.databases import make_login
from tests.helpers.engines import ALL_ENDED, Recorder, define, enroll, running_engine, until, way

NOW = datetime(2026, 3, 2, tzinfo=UTC)
HOUR = timedelta(hours=1)


def limit(at_most: int = 1, **keys: Any) -> str:
    written = {"topic": "marketing", "at_most": at_most, "per": {"days": 7}, **keys}
    return json.dumps({"limit": written})


def place(key: str = "ada", at_most: int = 1, per: timedelta = HOUR) -> Reservation:
    return Reservation(key.encode(), "marketing", at_most, per)


@pytest.mark.slow
async def test_simultaneous_daemons_and_sequences_keep_a_limit(
    connection: asyncpg.Connection, database: str
) -> None:
    for name in ("s", "t"):
        await define(connection, name, ("send", "Note", limit(then="skip"), None))
        await connection.execute(
            "UPDATE sequencer.sequences SET status = 'paused' WHERE name = $1", name
        )
        await connection.execute(
            "INSERT INTO sequencer.enrollments (sequence, subject)"
            " SELECT $1, 'u' || n FROM generate_series(1, 200) AS n",
            name,
        )
    one, other = Recorder(), Recorder()
    async with running_engine(database, {"Note": one}), running_engine(database, {"Note": other}):
        await connection.execute("UPDATE sequencer.sequences SET status = 'active'")
        await until(connection, ALL_ENDED)
    sent: defaultdict[str, int] = defaultdict(int)
    for view in (*one.views, *other.views):
        sent[view["subject"]] += 1
    assert len(sent) == 200
    assert set(sent.values()) == {1}
    skipped = await connection.fetchval(
        "SELECT count(*) FROM sequencer.events WHERE action = 'limited'"
    )
    assert skipped == 200
    assert (
        await connection.fetchval(
            "SELECT count(*) FROM sequencer.enrollments WHERE status = 'failed'"
        )
        == 0
    )


@pytest.mark.parametrize(
    ("then", "went"),
    [
        ("skip", ["send enrolled", "send limited", "end next", "end completed"]),
        ("altNext", ["send enrolled", "send limited", "other next", "other completed"]),
        ("wait", ["send enrolled", "send noop"]),
    ],
)
async def test_exits_of_a_reached_limit(
    connection: asyncpg.Connection, database: str, then: str, went: list[str]
) -> None:
    await define(
        connection,
        "s",
        ("send", "Note", limit(then=then), "end"),
        ("end", "Free", "{}", None),
        ("other", "Free", "{}", None),
    )
    await connection.execute("UPDATE sequencer.sequences SET reentry = 'always'")
    await connection.execute(
        "UPDATE sequencer.steps SET alt_next_step = 'other' WHERE name = 'send'"
    )
    async with running_engine(database, {"Note": Recorder(), "Free": Recorder()}):
        first = await enroll(connection, "s", "ada")
        await until(connection, ALL_ENDED)
        second = await enroll(connection, "s", "ada")
        await until(
            connection,
            "SELECT EXISTS (SELECT FROM sequencer.events WHERE message LIKE 'the limit is %')",
        )
        await until(connection, ALL_ENDED if then != "wait" else "SELECT true")
    assert await way(connection, second) == went
    row = await connection.fetchrow("SELECT * FROM sequencer.enrollments WHERE id = $1", second)
    if then == "wait":
        sent = await connection.fetchval("SELECT at[1] FROM sequencer.reservations")
        assert row["wake_at"] == sent + timedelta(days=7)
        assert row["last_error"] == "the limit is reached: 1 in 7 days"
        assert (row["attempt"], row["leased_by"]) == (0, None)
    assert await way(connection, first) == [
        "send enrolled",
        "send next",
        "end next",
        "end completed",
    ]


async def test_a_limit_frees_a_place_when_the_period_ends(
    connection: asyncpg.Connection, database: str
) -> None:
    config = limit(per={"amount": 1, "unit": "seconds"})
    await define(connection, "s", ("send", "Note", config, None))
    await connection.execute("UPDATE sequencer.sequences SET reentry = 'always'")
    async with running_engine(database, {"Note": Recorder()}, sweep=3600):
        for _ in range(3):
            await enroll(connection, "s", "ada")
        await until(connection, ALL_ENDED)
    reserved = await connection.fetchval("SELECT at FROM sequencer.reservations")
    first, second, third = reserved
    assert second - first >= timedelta(seconds=1) <= third - second


@pytest.mark.parametrize(
    ("result", "keeps"),
    [
        (Answer(), True),
        (Failed("no such address", permanent=True), False),
        (Failed("cut off", permanent=True, unknown=True), True),
        (Suppressed("ada@example.com"), False),
    ],
)
async def test_an_unsent_message_frees_its_place(
    connection: asyncpg.Connection, database: str, result: Result, *, keeps: bool
) -> None:
    await define(connection, "s", ("send", "Note", limit(), None))

    async def behave(_: Task) -> Result:
        return result

    async with running_engine(database, {"Note": Recorder(behave)}):
        await enroll(connection, "s", "ada")
        await until(connection, ALL_ENDED)
    kept = await connection.fetchval("SELECT enrollments FROM sequencer.reservations")
    assert bool(kept) == keeps


async def test_attempts_of_a_visit_count_once(
    connection: asyncpg.Connection, database: str
) -> None:
    answers: list[Result] = [Failed("cut off", unknown=True, retry_after=timedelta(0)), Answer()]
    config = json.loads(limit()) | {"retry": {"attempts": 3, "firstDelay": 0}}
    await define(connection, "s", ("send", "Note", json.dumps(config), None))

    async def behave(_: Task) -> Result:
        return answers.pop(0)

    async with running_engine(database, {"Note": Recorder(behave)}):
        await enroll(connection, "s", "ada")
        await until(connection, ALL_ENDED)
    assert not answers
    assert await connection.fetchval("SELECT enrollments FROM sequencer.reservations") == [1]
    assert await way(connection, 1) == [
        "send enrolled",
        "send retry",
        "send next",
        "send completed",
    ]


@pytest.mark.slow
async def test_a_limit_counts_by_its_key_and_topic(
    connection: asyncpg.Connection, database: str
) -> None:
    """Of the topic of the step or the sequence, or of the step alone; and by data."""
    by_mail = limit(key="{{data.email}}", then="skip")
    await define(connection, "mail", ("send", "Note", by_mail, None))
    own = json.dumps({"limit": {"at_most": 1, "per": {"days": 1}, "then": "skip"}})
    await define(connection, "a", ("send", "Note", own, None))
    await define(connection, "b", ("send", "Note", own, None))
    async with running_engine(database, {"Note": (notes := Recorder())}):
        for subject in ("ada", "bob"):
            await enroll(connection, "mail", subject, '{"email": "same@example.com"}')
        await until(connection, ALL_ENDED)
        assert len(notes.keys) == 1
        for sequence in ("a", "b"):
            await enroll(connection, sequence, "ada")
        await until(connection, ALL_ENDED)
        assert len(notes.keys) == 3
        await connection.execute(
            "UPDATE sequencer.sequences SET topic = 'news' WHERE name <> 'mail'"
        )
        for sequence in ("a", "b"):
            await enroll(connection, sequence, "eve")
        await until(connection, ALL_ENDED)
        assert len(notes.keys) == 4


@pytest.mark.slow
async def test_a_reevaluation_does_not_bypass_the_limit(
    connection: asyncpg.Connection, database: str
) -> None:
    """Nor does a changed definition, or what follows an entry that was refused."""
    await define(connection, "s", ("send", "Note", limit(), None))
    await define(
        connection,
        "t",
        ("enroll", "Enroll", '{"sequence": "u"}', "send"),
        ("send", "Note", limit(), None),
    )
    await define(
        connection, "u", ("wait", "WaitForDuration", '{"amount": 9, "unit": "days"}', None)
    )
    await connection.execute("UPDATE sequencer.sequences SET reentry = 'always' WHERE name <> 'u'")
    waiting = (
        "SELECT count(*) = $1 FROM sequencer.enrollments WHERE step = 'send' AND status = 'active'"
        " AND leased_by IS NULL AND wake_at > now() + interval '1 day'"
    )
    async with running_engine(database, {"Note": (notes := Recorder())}):
        await enroll(connection, "u", "ada")
        await enroll(connection, "s", "ada")
        await until(connection, "SELECT count(*) = 1 FROM sequencer.reservations")
        await enroll(connection, "s", "ada")
        await enroll(connection, "t", "ada")
        await until(connection, waiting, 2)
        for change in (
            "NOTIFY sequencer",
            "SELECT sequencer.reevaluate(subject => 'ada')",
            (
                'UPDATE sequencer.steps SET config = config || \'{"retry": {"attempts": 3}}\''
                " WHERE type = 'Note'"
            ),
            "UPDATE sequencer.enrollments SET data = '{\"x\": 1}'",
        ):
            await connection.execute(change)
            await until(
                connection,
                "SELECT NOT EXISTS (SELECT FROM sequencer.steps WHERE reschedule_from IS NOT NULL)",
            )
            await until(connection, waiting, 2)
    assert len(notes.keys) == 1


# --- of topics


async def limit_topic(connection: asyncpg.Connection, limit: str | None) -> None:
    await connection.execute(
        "INSERT INTO sequencer.topics VALUES ('marketing', 'Offers', NULL, $1)"
        " ON CONFLICT (name) DO UPDATE SET frequency_limit = excluded.frequency_limit",
        limit,
    )


def of_topic(at_most: int = 1, **keys: Any) -> str:
    return json.dumps({"at_most": at_most, "per": {"days": 7}, **keys})


@pytest.mark.slow
async def test_the_limit_of_a_topic_holds_for_all_its_side_effects(
    connection: asyncpg.Connection, database: str
) -> None:
    """By daemons with the daemon's role alone, for the topic of a sequence and of a config; and
    each with the limits of its steps. What has no topic is not concerned.
    """
    await limit_topic(connection, of_topic(2, then="skip"))
    topic = {"topic": "marketing"}
    configs: dict[str, tuple[str, dict[str, Any]]] = {
        "of_sequence": ("Note", {}),
        "of_config": ("Note", topic),
        "limited": ("Note", topic | json.loads(limit(then="skip"))),
        "limited_too": ("Note", topic | json.loads(limit(then="skip"))),
        "invoice": ("Note", {}),
    }
    for name, (type_, config) in configs.items():
        await define(connection, name, ("send", type_, json.dumps(config), None))
        await connection.execute(
            "UPDATE sequencer.sequences SET status = 'paused',"
            " topic = CASE WHEN name = 'of_sequence' THEN 'marketing' END WHERE name = $1",
            name,
        )
        await connection.execute(
            "INSERT INTO sequencer.enrollments (sequence, subject)"
            " SELECT $1, 'u' || n FROM generate_series(1, 50) AS n",
            name,
        )
    one, other = Recorder(), Recorder()
    url = await make_login(connection, database, "login_daemon", "daemon")
    async with running_engine(url, {"Note": one}), running_engine(url, {"Note": other}):
        await connection.execute("UPDATE sequencer.sequences SET status = 'active'")
        await until(connection, ALL_ENDED)
    sent = await connection.fetch(
        "SELECT e.subject, count(*) FILTER (WHERE v.sequence <> 'invoice') AS all,"
        " count(*) FILTER (WHERE v.sequence LIKE 'limited%') AS limited,"
        " count(*) FILTER (WHERE v.sequence = 'invoice') AS invoices"
        " FROM sequencer.events AS v JOIN sequencer.enrollments AS e ON e.id = v.enrollment_id"
        " WHERE v.action = 'next' GROUP BY e.subject"
    )
    assert len(sent) == 50
    assert {row["all"] for row in sent} == {2}
    assert {row["limited"] for row in sent} <= {0, 1}
    assert {row["invoices"] for row in sent} == {1}
    assert len(one.keys) + len(other.keys) == 150
    assert not await connection.fetchval(
        "SELECT count(*) FROM sequencer.enrollments WHERE status = 'failed'"
    )


@pytest.mark.slow
async def test_running_daemons_follow_a_changed_limit_of_a_topic(
    connection: asyncpg.Connection, database: str
) -> None:
    """What waits for it is evaluated again; what is wrong with it stops its topic alone."""
    await define(connection, "s", ("send", "Note", '{"topic": "marketing"}', None))
    await define(connection, "free", ("send", "Note", "{}", None))
    await connection.execute("UPDATE sequencer.sequences SET reentry = 'always'")
    waits = (
        "SELECT last_error = $1 || ' in 7 days, for the topic marketing'"
        " FROM sequencer.enrollments WHERE status = 'active'"
    )
    problem = "SELECT problem LIKE $1 FROM sequencer.steps WHERE sequence = 's'"
    async with running_engine(database, {"Note": Recorder()}, sweep=3600):
        await enroll(connection, "s", "ada")
        await until(connection, ALL_ENDED)
        await limit_topic(connection, of_topic())
        await enroll(connection, "s", "ada")  # what was sent before was not counted
        await until(connection, ALL_ENDED)
        await enroll(connection, "s", "ada")
        await until(connection, waits, "the limit is reached: 1")
        await limit_topic(connection, of_topic(2))
        await until(connection, ALL_ENDED)
        await enroll(connection, "s", "ada")
        await until(connection, waits, "the limit is reached: 2")
        await limit_topic(connection, '{"at_most": "many"}')
        await until(
            connection, problem, "the limit of the topic 'marketing' in the table topics is wrong%"
        )
        await enroll(connection, "free", "ada")
        free = "SELECT status = 'completed' FROM sequencer.enrollments WHERE sequence = 'free'"
        await until(connection, free)
        await connection.execute("DELETE FROM sequencer.topics")
        completed = "SELECT count(*) = 5 FROM sequencer.enrollments WHERE status = 'completed'"
        await until(connection, completed)


async def test_only_side_effects_of_a_topic_are_rescheduled_with_its_limit(
    connection: asyncpg.Connection,
) -> None:
    await define(
        connection,
        "s",
        ("send", "Note", "{}", "wait"),
        ("wait", "WaitForDuration", '{"amount": 9, "unit": "days"}', "other"),
        ("other", "Note", '{"topic": null}', None),
    )
    await connection.execute("UPDATE sequencer.sequences SET topic = 'marketing'")
    marked = "SELECT name FROM sequencer.steps WHERE reschedule_from IS NOT NULL"
    clear = "UPDATE sequencer.steps SET reschedule_from = NULL"
    await connection.execute(clear)
    await limit_topic(connection, None)
    assert await connection.fetch(marked) == []
    for change in (of_topic(), of_topic(2), None):
        await limit_topic(connection, change)
        assert await connection.fetch(marked) == [("send",)]
        await connection.execute(clear)
    await limit_topic(connection, of_topic())
    await connection.execute(clear)
    await connection.execute("UPDATE sequencer.topics SET title = 'News'")
    assert await connection.fetch(marked) == []
    await connection.execute("UPDATE sequencer.topics SET name = 'news'")
    assert await connection.fetch(marked) == [("send",)]


async def test_the_types_without_a_side_effect_are_those_of_the_database(
    connection: asyncpg.Connection,
) -> None:
    known = await connection.fetchval("SELECT sequencer.instant_types()")
    assert sorted(known) == sorted(filter(is_instant, BUILT_IN))


async def test_a_step_without_a_limit_needs_no_query(
    connection: asyncpg.Connection, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def never(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr("sequencerd.storage.limits.reserve", never)
    await define(connection, "s", ("send", "Note", "{}", None))
    async with running_engine(database, {"Note": Recorder()}):
        await enroll(connection, "s", "ada")
        await until(connection, ALL_ENDED)
    assert await way(connection, 1) == ["send enrolled", "send next", "send completed"]


# --- the table


@pytest.mark.slow
async def test_sessions_that_reserve_the_same_in_another_order_do_not_deadlock(
    connection: asyncpg.Connection, database: str
) -> None:
    keys = [f"k{n}" for n in range(20)]

    async def work(order: list[str], enrollment: int) -> None:
        session = await asyncpg.connect(database)
        try:
            for visit in range(20):
                async with session.transaction():
                    wanted = [
                        Reserved(enrollment, visit, (place(key, at_most=1000),)) for key in order
                    ]
                    given = [Reserved(enrollment, visit - 1, (place(key),)) for key in order[::2]]
                    await reserve(session, wanted, given, NOW)
        finally:
            await session.close()

    await asyncio.gather(*(work(keys[::step], n) for n, step in enumerate((1, -1, 1, -1))))
    counts = await connection.fetch("SELECT cardinality(at) FROM sequencer.reservations")
    assert len(counts) == 20


async def test_places_of_one_side_effect_are_reserved_together_or_not_at_all(
    connection: asyncpg.Connection,
) -> None:
    def wanted(id_: int, *places: Reservation) -> Reserved:
        return Reserved(id_, 1, places)

    a, b, later = place("a"), place("b", 2), place("b", 1, 3 * HOUR)
    assert await reserve(connection, [wanted(1, a, b)], [], NOW) == {}
    full = await reserve(connection, [wanted(2, a, b), wanted(3, b)], [], NOW + HOUR / 2)
    assert full == {0: LimitReached(0, NOW + HOUR)}  # 2 took no place of b, so 3 found one
    full = await reserve(connection, [wanted(4, place("c"), b, later)], [], NOW + HOUR / 2)
    assert full == {0: LimitReached(1, NOW + HOUR / 2 + 3 * HOUR)}
    counts = await connection.fetch("SELECT enrollments FROM sequencer.reservations ORDER BY key")
    assert [row["enrollments"] for row in counts] == [[1], [1, 3], []]
    await reserve(connection, [], [wanted(1, a, b)], NOW + HOUR / 2)
    assert await reserve(connection, [wanted(5, a, later, b)], [], NOW + 4 * HOUR) == {}
    # two limits of one key count a side effect once
    assert await connection.fetchval(
        "SELECT enrollments FROM sequencer.reservations WHERE key = 'b'"
    ) == [5]


async def test_uses_that_no_limit_counts_are_pruned(connection: asyncpg.Connection) -> None:
    wanted = [Reserved(1, 1, (place("a"),)), Reserved(2, 1, (place("b", per=9 * HOUR),))]
    await reserve(connection, wanted, [], NOW)
    assert await prune(connection, NOW + 2 * HOUR, 10) == 1
    assert await connection.fetch("SELECT key FROM sequencer.reservations") == [(b"b",)]


@pytest.mark.slow
async def test_no_period_ever_has_more_than_its_limit(connection: asyncpg.Connection) -> None:
    """In whatever order they ask, also with clocks that differ, and whatever is given back."""
    for seed in range(60):
        random = Random(seed)
        at_most, minutes = random.choice([(1, 60), (2, 60), (3, 120)])
        one = place(f"seed {seed}", at_most, timedelta(minutes=minutes))
        kept: dict[tuple[int, int], datetime] = {}
        time = NOW
        for _ in range(30):
            time += timedelta(minutes=random.choice([0, 1, 7, 20]))
            id_, visit = random.randint(1, 5), random.randint(1, 2)
            at = time + timedelta(seconds=random.randint(-30, 30))
            if random.random() < 0.2:
                await reserve(connection, [], [Reserved(id_, visit, (one,))], at)
                kept.pop((id_, visit), None)
                continue
            full = await reserve(connection, [Reserved(id_, visit, (one,))], [], at)
            others = [t for key, t in kept.items() if key != (id_, visit)]
            if not full:
                kept[id_, visit] = max([at, *kept.values()])
            else:
                assert len([t for t in others if t > at - one.per]) >= at_most
                assert len([t for t in others if t > full[0].until - one.per]) < at_most
            for start in kept.values():
                inside = [t for t in kept.values() if start <= t < start + one.per]
                assert len(inside) <= at_most


async def test_a_clock_that_was_ahead_holds_nothing_up_for_longer_than_a_period(
    connection: asyncpg.Connection,
) -> None:
    """What began meanwhile counts as if it had begun when the clock was right again."""
    both, ahead = place(at_most=2), NOW + timedelta(days=2000)
    assert await reserve(connection, [Reserved(1, 1, (both,))], [], NOW - HOUR / 2) == {}
    assert await reserve(connection, [Reserved(2, 1, (both,))], [], ahead) == {}
    assert await reserve(connection, [Reserved(3, 1, (both,))], [], NOW) == {}
    full = await reserve(connection, [Reserved(4, 1, (both,))], [], NOW + HOUR / 2)
    assert full == {0: LimitReached(0, NOW + HOUR)}
    assert await reserve(connection, [Reserved(4, 1, (both,))], [], NOW + HOUR) == {}
    assert await prune(connection, NOW + 3 * HOUR, 10) == 1
    assert await connection.fetchval("SELECT count(*) FROM sequencer.reservations") == 0
