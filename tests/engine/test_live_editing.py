"""What docs/live-editing.md promises, line by line, with an engine that runs meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from sequencerd.core.model import RetryPolicy
from sequencerd.core.task import Answer, Failed, Result, Task
from sequencerd.engine import jumps
from sequencerd.errors import PlanError
from sequencerd.storage import entries, evaluations, locking
from tests.helpers.command_line import Command
from tests.helpers.engines import ALL_ENDED, Recorder, enroll, running_engine, until, way
from tests.helpers.plans import Applying
from tests.helpers.waiting import eventually

SEQUENCE = """
name: s
steps:
  - {name: hello, type: Note, config: {text: Hello}}
  - {name: pause, type: WaitForDuration, config: {amount: 3, unit: days}}
  - {name: bye, type: Note, config: {text: Bye}}
"""
PAID = "{lodashCommand: eq, value: {type: get, value: data.paid}, compareTo: {type: raw, value: 1}}"
DAY = timedelta(days=1)
RETIMED = "SELECT bool_and(reschedule_from IS NULL) FROM sequencer.steps"
STATUS = "SELECT status FROM sequencer.enrollments WHERE id = $1"
AT = "SELECT step = $2 AND wake_at > now() FROM sequencer.enrollments WHERE id = $1"


@pytest.fixture
async def apply(connection: asyncpg.Connection, tmp_path: Path) -> Applying:
    made = Applying(connection, tmp_path)
    await made(SEQUENCE)
    return made


async def at_pause(connection: asyncpg.Connection, subject: str, since: timedelta) -> int:
    """An enrollment that came to the pause a while ago."""
    async with connection.transaction():
        id_ = await enroll(connection, "s", subject)
        await connection.execute(
            "UPDATE sequencer.enrollments SET step = 'pause', visit = 2,"
            " entered_at = now() - $2::interval,"
            " wake_at = now() - $2::interval + interval '3 days' WHERE id = $1",
            *(id_, since),
        )
    return id_


async def stay(connection: asyncpg.Connection, id_: int) -> timedelta:
    """From entering the step to waking."""
    row = await connection.fetchrow("SELECT * FROM sequencer.enrollments WHERE id = $1", id_)
    length: timedelta = row["wake_at"] - row["entered_at"]
    return length


class Held(Recorder):
    """A runner whose side effects end when the test lets them."""

    def __init__(self, **options: Any) -> None:
        super().__init__(self._wait, **options)
        self.begun = asyncio.Event()
        self.go_on = asyncio.Event()

    async def _wait(self, _: Task) -> Result:
        self.begun.set()
        await self.go_on.wait()
        return Answer()


@pytest.fixture
async def note(database: str, apply: Applying) -> AsyncIterator[Recorder]:
    """What a running engine executes."""
    recorder = Recorder()
    async with running_engine(database, {"Note": recorder}):
        yield recorder


# --- waits


async def test_a_wait_made_shorter_or_longer_counts_from_entering(
    apply: Applying, connection: asyncpg.Connection, note: Recorder
) -> None:
    over, within = [await at_pause(connection, f"u{n}", n * DAY) for n in (2, 1)]
    await apply(SEQUENCE.replace("amount: 3, unit: days", "amount: 36, unit: hours"))
    await until(connection, f"{STATUS.replace('status', 'status = $2')}", over, "completed")
    await until(connection, RETIMED)
    assert await stay(connection, within) == 1.5 * DAY
    await apply(SEQUENCE.replace("amount: 3", "amount: 10"))
    await until(connection, RETIMED)
    assert await stay(connection, within) == 10 * DAY
    assert note.visits == [f"{over}:3"]


async def test_a_replaced_wait_is_evaluated_from_the_arrival(
    apply: Applying, connection: asyncpg.Connection, note: Recorder
) -> None:
    over, within = [await at_pause(connection, f"u{n}", n * DAY) for n in (2, 1)]
    for id_, year in ((over, 2020), (within, 2090)):
        await connection.execute(
            "UPDATE sequencer.enrollments SET data = $2 WHERE id = $1",
            *(id_, f'{{"until": "{year}-01-01"}}'),
        )
    await apply(
        SEQUENCE.replace(
            "WaitForDuration, config: {amount: 3, unit: days}",
            "WaitForDate, config: {date: '{{data.until}}'}",
        )
    )
    await until(connection, STATUS.replace("status", "status = 'completed'"), over)
    await until(connection, RETIMED)
    wake_at = await connection.fetchval(
        "SELECT wake_at FROM sequencer.enrollments WHERE id = $1", within
    )
    assert wake_at == datetime(2090, 1, 1, tzinfo=UTC)


# --- side effects


async def test_a_side_effect_in_flight_finishes_as_it_began(
    apply: Applying, connection: asyncpg.Connection, database: str
) -> None:
    held = Held()
    async with running_engine(database, {"Note": held}):
        id_ = await enroll(connection, "s", "ada")
        await held.begun.wait()
        await apply(SEQUENCE.replace("Hello", "Hi").replace("amount: 3", "amount: 0"))
        held.go_on.set()
        await until(connection, ALL_ENDED)
    assert [dict(program) for program in held.programs] == [{"text": "Hello"}, {"text": "Bye"}]  # type: ignore[call-overload]
    events = await connection.fetch(
        "SELECT step, revision FROM sequencer.events WHERE enrollment_id = $1 AND action = 'next'"
        " ORDER BY at",
        id_,
    )
    assert [tuple(row) for row in events] == [("hello", 1), ("pause", 2), ("bye", 2)]


async def test_a_later_attempt_has_the_new_config(
    apply: Applying, connection: asyncpg.Connection, database: str
) -> None:
    failing = asyncio.Event()

    async def behave(_: Task) -> Result:
        if failing.is_set():
            return Answer()
        failing.set()
        return Failed("not now")

    recorder = Recorder(behave)
    recorder.retry = RetryPolicy(first_delay=3600, longest_delay=3600)
    async with running_engine(database, {"Note": recorder}):
        await enroll(connection, "s", "ada")
        await failing.wait()
        await until(connection, "SELECT EXISTS (SELECT FROM sequencer.events WHERE action='retry')")
        await apply(SEQUENCE.replace("Hello", "Hi"))
        await connection.execute(
            "UPDATE sequencer.enrollments SET wake_at = now(), retry_at = now()"
        )
        await until(connection, "SELECT step = 'pause' FROM sequencer.enrollments")
    assert [dict(program)["text"] for program in recorder.programs] == ["Hello", "Hi"]  # type: ignore[call-overload]


# --- the graph


async def test_steps_added_before_an_enrollment_are_not_executed(
    apply: Applying, connection: asyncpg.Connection, note: Recorder
) -> None:
    id_ = await at_pause(connection, "ada", DAY)
    step = "  - {name: NAME, type: Note}\n"
    text = SEQUENCE.replace("  - {name: pause", step.replace("NAME", "behind") + "  - {name: pause")
    text = text.replace("  - {name: bye", step.replace("NAME", "ahead") + "  - {name: bye")
    await apply(text.replace("amount: 3", "amount: 0"))
    await until(connection, ALL_ENDED)
    assert await way(connection, id_) == [
        "pause next",
        "ahead next",
        "bye next",
        "bye completed",
    ]


async def test_another_next_step_applies_to_enrollments_that_leave(
    apply: Applying, connection: asyncpg.Connection, note: Recorder
) -> None:
    stays, leaves = [await at_pause(connection, f"u{n}", n * DAY) for n in (1, 2)]
    other = "  - {name: other, type: Note, next: null}\n"
    text = SEQUENCE.replace("unit: days}", "unit: days}, next: other") + other
    await apply(text)
    assert await connection.fetchval(AT, stays, "pause")
    await connection.execute(
        "UPDATE sequencer.enrollments SET wake_at = now(), entered_at = now() - interval '4 days'"
        " WHERE id = $1",
        leaves,
    )
    await until(connection, STATUS.replace("status", "status = 'completed'"), leaves)
    assert await way(connection, leaves) == ["pause next", "other next", "other completed"]
    assert await connection.fetchval(AT, stays, "pause")


async def test_a_renamed_step_keeps_its_enrollments(
    apply: Applying, connection: asyncpg.Connection, database: str
) -> None:
    held = Held()
    text = SEQUENCE + f"  - {{name: paid, type: Goal, config: {PAID}, next: pause}}\n"
    text = text.replace("Bye}}", "Bye}, next: null}")
    await apply(text)
    async with running_engine(database, {"Note": held}):
        flying = await enroll(connection, "s", "ada")
        await held.begun.wait()
        waits = await at_pause(connection, "bob", DAY)
        data = "UPDATE sequencer.enrollments SET data = '{\"paid\": 1}' WHERE id = $1"
        await connection.execute(data, waits)
        await until(connection, "SELECT visit > 2 FROM sequencer.enrollments WHERE id=$1", waits)
        await until(connection, AT, waits, "pause")
        before = await connection.fetchrow(
            "SELECT entered_at, wake_at, visit FROM sequencer.enrollments WHERE id = $1", waits
        )
        renamed = text.replace("name: hello", "name: greet, renamedFrom: hello")
        renamed = renamed.replace("name: pause", "name: think, renamedFrom: pause")
        renamed = renamed.replace("next: pause", "next: think")
        await apply(renamed.replace("name: paid", "name: customer, renamedFrom: paid"))
        held.go_on.set()
        await until(connection, AT, flying, "think")
        await connection.execute("SELECT sequencer.reevaluate()")
        await until(connection, AT, waits, "think")
    after = await connection.fetchrow(
        "SELECT entered_at, wake_at, visit FROM sequencer.enrollments WHERE id = $1", waits
    )
    assert after == before  # neither a new stay nor pulled once more
    assert held.visits == [f"{flying}:1"]


async def test_a_removed_step_needs_a_target_for_its_enrollments(
    apply: Applying, connection: asyncpg.Connection, note: Recorder
) -> None:
    id_ = await at_pause(connection, "ada", DAY)
    without = "\n".join(line for line in SEQUENCE.splitlines() if "pause" not in line)
    with pytest.raises(PlanError, match="--move pause=STEP"):
        await apply(without)
    assert await connection.fetchval(AT, id_, "pause")
    await apply(without, moves={"pause": "bye"})
    await until(connection, ALL_ENDED)
    assert await way(connection, id_) == ["pause moved", "bye next", "bye completed"]


async def test_a_changed_goal_is_checked_for_all_enrollments(
    apply: Applying, connection: asyncpg.Connection, note: Recorder
) -> None:
    id_ = await at_pause(connection, "ada", DAY)
    await connection.execute("UPDATE sequencer.enrollments SET data = '{\"paid\": 2}'")
    text = SEQUENCE + f"  - {{name: paid, type: Goal, config: {PAID}}}\n"
    await apply(text.replace("Bye}}", "Bye}, next: null}"))
    await until(connection, RETIMED)
    await until(connection, AT, id_, "pause")
    await apply(
        text.replace("Bye}}", "Bye}, next: null}").replace("raw, value: 1", "raw, value: 2")
    )
    await until(connection, ALL_ENDED)
    assert await way(connection, id_) == ["pause goal", "pause completed"]


async def test_another_time_zone_reschedules(
    apply: Applying, connection: asyncpg.Connection, note: Recorder
) -> None:
    id_ = await at_pause(connection, "ada", DAY)
    text = SEQUENCE.replace(
        "WaitForDuration, config: {amount: 3, unit: days}",
        "WaitForDate, config: {date: '2090-01-01'}",
    )
    wake_at = "SELECT wake_at FROM sequencer.enrollments WHERE id = $1"
    for zone, hour in (("UTC", 0), ("America/New_York", 5)):
        await apply(text.replace("name: s\n", f"name: s\ntimezone: {zone}\n"))
        await until(connection, RETIMED)
        assert await connection.fetchval(wake_at, id_) == datetime(2090, 1, 1, hour, tzinfo=UTC)


async def test_an_enrollment_follows_its_own_time_zone(
    apply: Applying, connection: asyncpg.Connection, note: Recorder
) -> None:
    await apply(
        SEQUENCE.replace(
            "WaitForDuration, config: {amount: 3, unit: days}",
            "WaitForDate, config: {date: '2090-01-01'}",
        )
    )
    id_ = await enroll(connection, "s", "ada")
    wakes = "SELECT wake_at = $2 FROM sequencer.enrollments WHERE id = $1"
    await until(connection, wakes, id_, datetime(2090, 1, 1, tzinfo=UTC))
    await until(connection, RETIMED)
    await connection.execute("UPDATE sequencer.enrollments SET timezone = 'America/New_York'")
    await until(connection, wakes, id_, datetime(2090, 1, 1, 5, tzinfo=UTC))


SHORT = """
name: s
steps:
  - {name: start, type: GoTo}
  - {name: pause, type: WaitForDuration, config: {amount: 3, unit: days}}
"""


async def test_nothing_jumps_to_a_removed_step_before_the_daemon_has_read_the_change(
    apply: Applying, connection: asyncpg.Connection, database: str
) -> None:
    await apply(SHORT)
    await apply("{name: t, steps: [{name: go, type: GoTo, config: {sequence: s, step: start}}]}")
    async with running_engine(database) as engine:
        async with engine.catalog._loading:
            await apply(SHORT.replace("pause", "rest"))
            id_ = await enroll(connection, "t", "ada")
            begun = "SELECT entered_at IS NOT NULL FROM sequencer.enrollments"
            await until(connection, begun)
        await until(connection, "SELECT sequence = 's' FROM sequencer.enrollments")
        assert await connection.fetchval(AT, id_, "rest")
    assert await way(connection, id_) == ["go enrolled", "go jump", "start next"]


async def test_nothing_jumps_to_a_removed_step_while_the_daemon_reads_the_change(
    apply: Applying,
    connection: asyncpg.Connection,
    database: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    await apply(SHORT)
    await apply("{name: t, steps: [{name: go, type: GoTo, config: {sequence: s, step: start}}]}")
    refusals, is_read = entries.refusals, asyncio.Event()
    async with running_engine(database) as engine:
        known = engine.catalog.sequences

        async def read_meanwhile(*arguments: Any) -> Any:
            if not is_read.is_set():
                await apply(SHORT.replace("pause", "rest"))
                await eventually(lambda: "rest" in known["s"].steps)
                is_read.set()
            return await refusals(*arguments)

        monkeypatch.setattr(jumps, "refusals", read_meanwhile)
        id_ = await enroll(connection, "t", "ada")
        await is_read.wait()
        await until(connection, "SELECT sequence = 's' FROM sequencer.enrollments")
        assert await connection.fetchval(AT, id_, "rest")


async def test_a_request_moves_nothing_before_the_daemon_has_read_the_change(
    apply: Applying,
    connection: asyncpg.Connection,
    database: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    evaluated = asyncio.Event()
    lock_waiting = locking.lock_waiting

    async def lock_and_tell(*arguments: Any) -> Any:
        found = await lock_waiting(*arguments)
        evaluated.set()
        return found

    monkeypatch.setattr(locking, "lock_waiting", lock_and_tell)
    text = SHORT.replace("GoTo", "WaitForDuration, config: {amount: 2, unit: days}")
    await apply(text)
    async with running_engine(database) as engine:
        id_ = await enroll(connection, "s", "ada")
        await until(connection, AT, id_, "start")
        async with engine.catalog._loading:
            await apply(text.replace("pause", "rest"))
            await connection.execute(
                "UPDATE sequencer.enrollments SET entered_at = now() - interval '2 days'"
            )
            await connection.execute("""NOTIFY sequencer, '{"subject": "ada"}'""")
            await evaluated.wait()
        await until(connection, "SELECT step <> 'start' FROM sequencer.enrollments")
        assert await connection.fetchval(AT, id_, "rest")


# --- the status


async def test_a_paused_sequence_executes_nothing_and_waits_keep_running(
    apply: Applying, connection: asyncpg.Connection, database: str
) -> None:
    held = Held(batch_size=1, concurrency=1)
    async with running_engine(database, {"Note": held}) as engine:
        flying = await enroll(connection, "s", "ada")
        await held.begun.wait()
        text = SEQUENCE.replace("unit: days", "unit: ms")
        await apply(text.replace("name: s\n", "name: s\nstatus: paused\n"))
        later, first = [await at_pause(connection, f"u{n}", n * DAY) for n in (5, 9)]
        entered = await enroll(connection, "s", "eve")
        held.go_on.set()
        await until(connection, "SELECT visit = 2 FROM sequencer.enrollments WHERE id=$1", flying)
        await engine.sweep()
        assert held.visits == [f"{flying}:1"]
        await apply(text.replace("name: s\n", "name: s\nstatus: active\n"))
        await until(connection, ALL_ENDED)
    byes = [key for key in held.visits if key.endswith(":3")]
    assert byes.index(f"{first}:3") < byes.index(f"{later}:3")
    assert f"{entered}:1" in held.visits
    assert len(held.keys) == len(set(held.keys)) == 6


async def test_an_archived_sequence_admits_no_enrollment_and_existing_enrollments_continue(
    apply: Applying, connection: asyncpg.Connection, note: Recorder
) -> None:
    id_ = await at_pause(connection, "ada", 4 * DAY)
    text = SEQUENCE.replace("name: s\n", "name: s\nstatus: archived\n")
    await apply(text)
    await until(connection, STATUS.replace("status", "status = 'completed'"), id_)
    with pytest.raises(asyncpg.PostgresError, match="archived"):
        await enroll(connection, "s", "bob")


# --- many


@pytest.mark.slow
async def test_an_interrupted_reschedule_continues(
    apply: Applying, connection: asyncpg.Connection, database: str
) -> None:
    ids = [await at_pause(connection, f"u{n}", DAY) for n in range(20)]
    longer = SEQUENCE.replace("amount: 3", "amount: 4")
    rescheduling = "SELECT rescheduling FROM sequencer.overview WHERE step = 'pause'"
    other = await asyncpg.connect(database)
    held = other.transaction()
    async with running_engine(database, {"Note": Recorder()}, batch=5):
        await until(connection, RETIMED)
        await held.start()
        await other.execute("SELECT FROM sequencer.enrollments WHERE id = $1 FOR UPDATE", ids[12])
        await apply(longer)
        await until(connection, rescheduling.replace("rescheduling", "rescheduling = 10"))
    assert await connection.fetchval(rescheduling) == 10  # the first ten are done, and committed
    stays = {id_: await stay(connection, id_) for id_ in ids}
    assert {stays[id_] for id_ in ids[:10]} == {4 * DAY}
    assert stays[ids[12]] == stays[ids[19]] == 3 * DAY
    versions = "SELECT id, xmin FROM sequencer.enrollments WHERE id = ANY ($1) ORDER BY id"
    before = await connection.fetch(versions, ids[:10])
    await held.rollback()
    await other.close()
    async with running_engine(database, {"Note": Recorder()}, batch=5):
        await until(connection, RETIMED)
    assert {await stay(connection, id_) for id_ in ids} == {4 * DAY}
    assert await connection.fetch(versions, ids[:10]) == before  # nothing is done again
    assert await connection.fetchval(rescheduling) is None


async def test_an_enrollment_that_waits_as_before_is_not_written(
    apply: Applying, connection: asyncpg.Connection, note: Recorder
) -> None:
    await at_pause(connection, "ada", DAY)
    version = "SELECT xmin FROM sequencer.enrollments"
    before = await connection.fetchval(version)
    await apply(SEQUENCE.replace("amount: 3, unit: days", "amount: 72, unit: hours"))
    await until(connection, RETIMED)
    assert await connection.fetchval(version) == before


async def test_no_transaction_in_progress_is_missed(
    connection: asyncpg.Connection, database: str
) -> None:
    """Even one whose number is greater than that of the last that ended."""
    other = await asyncpg.connect(database)
    async with connection.transaction():
        number = int(await connection.fetchval("SELECT pg_current_xact_id()::text"))
        newer = await evaluations.new_transaction(other)
        assert newer is not None
        assert newer > number
        assert await evaluations.oldest_transaction(other) <= number
    while await evaluations.oldest_transaction(other) < newer:  # noqa: ASYNC110 - it sets no event
        await asyncio.sleep(0.01)  # of another database
    await other.close()


# --- back again


@pytest.mark.slow
async def test_an_export_restores_a_revision(sequencerd: Command, tmp_path: Path) -> None:
    file = tmp_path / "s.yaml"
    text = SEQUENCE.replace("Note", "GoTo").replace(", config: {text: Hello}", "")
    file.write_text(text.replace(", config: {text: Bye}", ""))
    sequencerd("apply", "s.yaml")
    file.write_text(file.read_text().replace("amount: 3", "amount: 9"))
    planned = sequencerd("plan", "s.yaml")
    assert "changed pause: config.amount 3 → 9" in planned
    sequencerd("plan", "s.yaml", "--detailed-exitcode", code=2)
    sequencerd("apply", "s.yaml", "--plan", "000000000000", code=1)
    assert "no longer holds" in sequencerd.errors
    sequencerd("apply", "s.yaml", "--plan", planned.split()[-1])
    history = sequencerd("history", "s")
    assert history.index("revision 2") < history.index("revision 1")
    assert "  changed pause: config.amount 3 → 9" in history
    (tmp_path / "before.yaml").write_text(sequencerd("export", "s", "--revision", "1"))
    assert "changed pause: config.amount 9 → 3" in sequencerd("apply", "before.yaml")
    assert "revision 3" in sequencerd("history", "s")
    assert "nothing changed" in sequencerd("apply", "before.yaml")
    sequencerd("export", "s", "--revision", "9", code=1)
    assert "sequence 's' has no revision 9; see: history s" in sequencerd.errors
