"""Brakes pause a sequence instead of executing more side effects than they allow."""

from __future__ import annotations

import asyncio
import json
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path

import asyncpg
import pytest

from sequencerd.core.task import Answer, Failed, Result, Task
from sequencerd.storage import limits
from tests.helpers.command_line import Command
from tests.helpers.engines import Recorder, define, enroll, running_engine, until

NOW = datetime(2026, 3, 2, tzinfo=UTC)
NONE_LEASED = "SELECT NOT EXISTS (SELECT FROM sequencer.enrollments WHERE leased_by IS NOT NULL)"
PAUSED = "SELECT status = 'paused' FROM sequencer.sequences WHERE name = 's'"


async def braked(connection: asyncpg.Connection, at_most: int, per: str = "1 hour") -> None:
    """A sequence that is paused until the test lets it begin."""
    await define(connection, "s", ("send", "Note", "{}", None))
    await connection.execute(
        "UPDATE sequencer.sequences SET status = 'paused', brake_at_most = $1,"
        " brake_per = make_interval(secs => extract(epoch FROM $2::text::interval))",
        at_most,
        per,
    )


async def fill(connection: asyncpg.Connection, count: int, sequence: str = "s") -> None:
    await connection.execute(
        "INSERT INTO sequencer.enrollments (sequence, subject)"
        " SELECT $1, 'u' || n FROM generate_series(1, $2) AS n",
        sequence,
        count,
    )


async def go(connection: asyncpg.Connection) -> None:
    await connection.execute("UPDATE sequencer.sequences SET status = 'active'")


async def reason(connection: asyncpg.Connection) -> str | None:
    text: str | None = await connection.fetchval("SELECT reason FROM sequencer.brakes")
    return text


@pytest.mark.slow
async def test_two_daemons_in_one_instant_send_no_more_than_the_brake_allows(
    connection: asyncpg.Connection, database: str
) -> None:
    await braked(connection, 37)
    await fill(connection, 300)
    one, other = Recorder(), Recorder()
    async with running_engine(database, {"Note": one}), running_engine(database, {"Note": other}):
        await go(connection)
        await until(connection, PAUSED)
        await until(connection, NONE_LEASED)
        assert len(one.views) + len(other.views) == 37
        assert await reason(connection) == "brake: more than 37 in 1 hour"
        # resumed, it counts anew
        await go(connection)
        await until(connection, PAUSED)
        await until(connection, NONE_LEASED)
    assert len(one.views) + len(other.views) == 74
    subjects = [view["subject"] for view in (*one.views, *other.views)]
    assert len(set(subjects)) == 74
    assert await connection.fetchval(
        "SELECT count(*) = 74 FROM sequencer.enrollments WHERE status = 'completed'"
    )
    assert (
        await connection.fetchval(
            "SELECT count(*) FROM sequencer.revisions WHERE reason = $1",
            "brake: more than 37 in 1 hour",
        )
        == 2
    )


async def test_as_many_as_allowed_do_not_pause(
    connection: asyncpg.Connection, database: str
) -> None:
    await braked(connection, 20)
    await fill(connection, 20)
    note = Recorder()
    async with running_engine(database, {"Note": note}):
        await go(connection)
        await until(
            connection, "SELECT count(*) = 20 FROM sequencer.enrollments WHERE status = 'completed'"
        )
        assert not await connection.fetchval(PAUSED)
        await enroll(connection, "s", "one more")
        await until(connection, PAUSED)
    assert len(note.views) == 20


async def test_side_effects_of_other_steps_are_counted_with_full_slots(
    connection: asyncpg.Connection, database: str
) -> None:
    """Of a batch that comes to the step at once there are fewer slots than allowed."""
    await define(
        connection,
        "s",
        (
            "split",
            "Conditional",
            '{"lodashCommand": "isNil", "value": {"type": "get", "value": "data.a"}}',
            "send",
        ),
        ("send", "Note", "{}", "again"),
        ("again", "Note", "{}", None),
    )
    await connection.execute(
        "UPDATE sequencer.steps SET alt_next_step = 'send' WHERE name = 'split'"
    )
    await connection.execute(
        "UPDATE sequencer.sequences SET brake_at_most = 100, brake_per = '1 hour'"
    )
    note = Recorder()
    async with running_engine(database, {"Note": note}):
        await fill(connection, 50)
        await until(
            connection, "SELECT count(*) = 50 FROM sequencer.enrollments WHERE status = 'completed'"
        )
        assert not await connection.fetchval(PAUSED)
        await enroll(connection, "s", "one more")
        await until(connection, PAUSED)
    assert len(note.views) == 100


async def test_attempts_that_fail_count(connection: asyncpg.Connection, database: str) -> None:
    async def behave(task: Task) -> Result:
        return Failed("no", permanent=True) if task.view["subject"] == "u1" else Answer()

    await braked(connection, 2)
    await fill(connection, 3)
    note = Recorder(behave)
    async with running_engine(database, {"Note": note}):
        await go(connection)
        await until(connection, PAUSED)
    assert len(note.views) == 2


async def test_side_effects_of_another_sequence_do_not_count(
    connection: asyncpg.Connection, database: str
) -> None:
    await braked(connection, 1)
    await define(connection, "t", ("send", "Note", "{}", None))
    await fill(connection, 5)
    async with running_engine(database, {"Note": Recorder()}):
        await go(connection)
        await until(connection, PAUSED)
        await fill(connection, 5, "t")
        await until(
            connection,
            "SELECT count(*) = 5 FROM sequencer.enrollments"
            " WHERE sequence = 't' AND status = 'completed'",
        )


async def test_a_daemon_that_was_killed_is_counted(
    connection: asyncpg.Connection, database: str
) -> None:
    """Its leases, which were given before it died, and those that follow when they expire."""
    await braked(connection, 4)
    await fill(connection, 3)
    await connection.execute(
        "UPDATE sequencer.enrollments SET leased_by = 'gone', leases = 1, attempt = 1,"
        " entered_at = now(), wake_at = now() - interval '1 second'"
    )
    note = Recorder()
    await go(connection)
    async with connection.transaction():
        await limits.left_by_brakes(connection, ["s"], datetime.now(UTC))
        await limits.count_for_brakes(connection, {"s": (3, False)}, datetime.now(UTC))
    async with running_engine(database, {"Note": note}):
        await until(connection, PAUSED)
    assert len(note.views) == 1


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [1, 90, 3600, 86400])
async def test_never_more_begin_in_any_period(connection: asyncpg.Connection, seconds: int) -> None:
    """Asked at many times, in steps that do not divide the period."""
    await braked(connection, 10, f"{seconds} seconds")
    await go(connection)
    begun: list[datetime] = []
    per = timedelta(seconds=seconds)
    for n in range(400):
        at = NOW + n * per / 37
        async with connection.transaction():
            remaining = (await limits.left_by_brakes(connection, ["s"], at))["s"]
            wanted = min(n % 4, remaining)
            await limits.count_for_brakes(connection, {"s": (wanted, False)}, at)
        begun += [at] * wanted
        assert sum(one > at - per for one in begun) <= 10
    assert len(begun) > 80  # about ten in each of eleven periods
    sizes = await connection.fetchval("SELECT cardinality(times) FROM sequencer.brakes")
    assert sizes <= 61


async def test_the_brake_of_apply_holds_in_place_of_the_other_until_its_end(
    connection: asyncpg.Connection,
) -> None:
    await braked(connection, 10)
    await connection.execute(
        "UPDATE sequencer.sequences SET apply_brake = 3, apply_brake_until = $1", NOW
    )
    before, after = NOW - timedelta(seconds=1), NOW + timedelta(seconds=1)
    async with connection.transaction():
        assert await limits.left_by_brakes(connection, ["s"], before) == {"s": 3}
        assert await limits.left_by_brakes(connection, ["s"], after) == {"s": 10}
        await connection.execute(
            "UPDATE sequencer.sequences SET brake_at_most = NULL, brake_per = NULL"
        )
        assert await limits.left_by_brakes(connection, ["s"], after) == {}


async def test_what_was_counted_by_a_clock_that_was_ahead_does_not_count(
    connection: asyncpg.Connection,
) -> None:
    await braked(connection, 10)
    await go(connection)
    async with connection.transaction():
        for at in (NOW + timedelta(days=2000), NOW - timedelta(minutes=5)):
            await limits.left_by_brakes(connection, ["s"], at)
            await limits.count_for_brakes(connection, {"s": (4, False)}, at)
        assert await limits.left_by_brakes(connection, ["s"], NOW) == {"s": 6}


@pytest.mark.parametrize(
    ("per", "words"),
    [
        ("1 hour", "1 hour"),
        ("90 minutes", "90 minutes"),
        ("1 minute", "1 minute"),
        ("45 seconds", "45 seconds"),
        ("2 days", "48 hours"),
    ],
)
async def test_the_period_is_named_in_its_unit(
    connection: asyncpg.Connection, per: str, words: str
) -> None:
    await braked(connection, 1, per)
    await connection.execute("UPDATE sequencer.sequences SET status = 'active'")
    async with connection.transaction():
        assert await limits.left_by_brakes(connection, ["s"], NOW) == {"s": 1}
        await limits.count_for_brakes(connection, {"s": (1, True)}, NOW)
    reason = await connection.fetchval("SELECT reason FROM sequencer.brakes")
    assert reason == f"brake: more than 1 in {words}"


async def test_a_locked_sequence_is_paused_later_and_nothing_more_is_sent(
    connection: asyncpg.Connection, database: str
) -> None:
    await braked(connection, 5)
    await go(connection)
    note = Recorder()
    other = await asyncpg.connect(database)
    async with running_engine(database, {"Note": note}):
        async with other.transaction():
            await other.execute("SELECT FROM sequencer.sequences FOR UPDATE")
            await fill(connection, 20)
            await until(
                connection,
                "SELECT count(*) = 5 FROM sequencer.enrollments WHERE status = 'completed'",
            )
            assert not await connection.fetchval(PAUSED)
        await until(connection, PAUSED)
    await other.close()
    assert len(note.views) == 5


@pytest.mark.parametrize("locked", ["enrollments", "brakes WHERE sequence = 'a'"])
async def test_an_apply_that_removes_brakes_waits_for_a_daemon(
    sequencerd: Command, connection: asyncpg.Connection, database: str, tmp_path: Path, locked: str
) -> None:
    """A daemon locks enrollments first, which apply may move, and then brakes by their names."""
    files = [tmp_path / f"{name}.yaml" for name in ("b", "a")]
    for file in files:
        file.write_text(FILE.replace("trial", file.stem) + SEND)
    sequencerd("apply", *map(str, files))
    await fill(connection, 1, "a")
    for file in files:
        steps = FILE[FILE.index("steps") :].replace("wait", "other")
        file.write_text(f"name: {file.stem}\n{steps}{SEND}")
    daemon = await asyncpg.connect(database)
    async with daemon.transaction():
        await daemon.execute(f"SELECT FROM sequencer.{locked} FOR UPDATE")
        moves = ["--move", "wait=other"]
        applying = asyncio.create_task(
            asyncio.to_thread(sequencerd, "apply", *map(str, files), *moves)
        )
        await until(
            connection,
            "SELECT EXISTS (SELECT FROM pg_stat_activity"
            " WHERE wait_event_type = 'Lock' AND datname = current_database())",
        )
        assert set(await limits.left_by_brakes(daemon, ["a", "b"], NOW)) == {"a", "b"}
    await applying
    await daemon.close()
    assert await connection.fetchval("SELECT count(*) FROM sequencer.brakes") == 0


async def test_without_a_brake_there_is_no_extra_query(
    connection: asyncpg.Connection, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []

    async def remaining(*arguments: object) -> dict[str, int]:
        asked.append(arguments)
        return {}

    monkeypatch.setattr(limits, "left_by_brakes", remaining)
    monkeypatch.setattr(limits, "count_for_brakes", remaining)
    await define(connection, "s", ("send", "Note", "{}", None))
    await fill(connection, 5)
    async with running_engine(database, {"Note": Recorder()}):
        await until(
            connection, "SELECT count(*) = 5 FROM sequencer.enrollments WHERE status = 'completed'"
        )
    assert asked == []
    assert await connection.fetchval("SELECT count(*) FROM sequencer.brakes") == 0


@pytest.mark.slow
async def test_commands_explain_a_pause_by_the_brake(
    sequencerd: Command, connection: asyncpg.Connection, database: str
) -> None:
    await braked(connection, 1)
    await fill(connection, 2)
    async with running_engine(database, {"Note": Recorder()}) as engine:
        await go(connection)
        await until(connection, PAUSED)
        await engine.sweep()
        assert engine.catalog.sequences["s"].is_stopped
    told = sequencerd("status")
    assert "the sequence is paused by its brake: more than 1 in 1 hour" in told
    assert "sequencerd resume s continues it, and starts counting again" in told
    left = await connection.fetchval("SELECT id FROM sequencer.enrollments WHERE status = 'active'")
    assert "paused by its brake: more than 1 in 1 hour" in sequencerd("show", str(left))
    assert "brake: more than 1 in 1 hour" in sequencerd("history", "s")
    told = sequencerd("doctor", code=1)
    assert re.search(r"ERROR +brakes: have paused s \(more than 1 in 1 hour\)", told)
    assert "then sequencerd resume" in told
    assert re.search(r"ok +problems: none reported", told)
    # also without the brake, which ends no pause
    await connection.execute(
        "UPDATE sequencer.sequences SET brake_at_most = NULL, brake_per = NULL"
    )
    assert "paused by its brake" in sequencerd("status")
    sequencerd("resume", "s")
    assert "brake" not in sequencerd("status")
    assert json.loads(sequencerd("show", str(left), "--json"))["brake"] is None


FILE = """
name: trial
brake:
  at_most: 500
  per: {minutes: 90}
steps:
  - {name: wait, type: WaitForDuration, config: {amount: 1, unit: hours}}
"""
SEND = "  - {name: send, type: WaitForDuration, config: {amount: 1, unit: hours}}\n"


@pytest.mark.slow
async def test_a_brake_of_a_file_is_planned_applied_and_exported(
    sequencerd: Command, connection: asyncpg.Connection, tmp_path: Path
) -> None:
    file = tmp_path / "trial.yaml"
    file.write_text(FILE)
    sequencerd("apply", str(file))
    row = await connection.fetchrow("SELECT * FROM sequencer.sequences")
    assert (row["brake_at_most"], row["brake_per"]) == (500, timedelta(minutes=90))
    assert "nothing changed" in sequencerd("plan", str(file))
    exported = tmp_path / "exported.yaml"
    exported.write_text(sequencerd("export", "trial"))
    assert "nothing changed" in sequencerd("plan", str(exported))
    file.write_text(FILE.replace("500", "7").replace("minutes: 90", "days: 1"))
    assert "brake: 500 in 5400 seconds → 7 in 24 hours" in sequencerd("plan", str(file))
    sequencerd("apply", str(file))
    assert "nothing changed" in sequencerd("apply", str(file))
    file.write_text("name: trial\n" + FILE[FILE.index("steps") :])
    assert "brake: 7 in 24 hours → none" in sequencerd("apply", str(file))
    assert await connection.fetchval("SELECT count(*) FROM sequencer.brakes") == 0


@pytest.mark.parametrize(
    ("written", "line", "words"),
    [
        ("  at_most: 500", 4, "at_most: must be 1 or more"),
        ("  per: {minutes: 90}", 5, "per: "),
    ],
)
def test_errors_of_a_brake_name_the_line(
    sequencerd: Command, tmp_path: Path, written: str, line: int, words: str
) -> None:
    file = tmp_path / "trial.yaml"
    wrong = {"  at_most: 500": "  at_most: 0", "  per: {minutes: 90}": "  per: {months: 1}"}
    file.write_text(FILE.replace(written, wrong[written]))
    told = sequencerd("check", str(file), code=1)
    assert f"trial.yaml:{line}: error: trial: brake.{words}" in told + sequencerd.errors


async def test_apply_sets_a_brake_for_a_day_on_changed_sequences(
    sequencerd: Command, connection: asyncpg.Connection, tmp_path: Path
) -> None:
    file, other = tmp_path / "trial.yaml", tmp_path / "other.yaml"
    file.write_text(FILE)
    other.write_text(FILE.replace("trial", "other"))
    sequencerd("apply", str(other))
    told = sequencerd("apply", str(file), str(other), "--brake", "500")
    assert "for a day, each changed sequence is paused if more than 500 side effects" in told
    rows = await connection.fetch(
        "SELECT name, apply_brake, apply_brake_until BETWEEN now() + interval '23 hours'"
        " AND now() + interval '1 day' AS is_day FROM sequencer.sequences ORDER BY name"
    )
    assert [tuple(row) for row in rows] == [("other", None, None), ("trial", 500, True)]
    # it is no part of the definition
    assert "nothing changed" in sequencerd("plan", str(file))
    for wrong in ("0", "x", "1000001"):
        sequencerd("apply", str(file), "--brake", wrong, code=2)
        assert "use a number from 1 to 1,000,000" in sequencerd.errors
