"""What the database refuses to read or write is the fault of one row, and harms no other."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import asyncpg
import pytest
from structlog.testing import capture_logs

from sequencerd.core.advance import advance
from sequencerd.core.decision import Advanced
from sequencerd.core.enrollment import Enrollment
from sequencerd.core.task import Answer, Result, Task
from sequencerd.engine import moves, quarantine
from sequencerd.engine.backpressure import Backlog
from sequencerd.engine.batch import MAX_UNLOCKED
from sequencerd.engine.clock import Clock
from sequencerd.engine.cursors import EARLIEST_WAKE
from sequencerd.storage import embedded, locking, migrate, sequences, server, writes
from sequencerd.storage.locking import DueEnrollments
from tests.helpers.command_line import Command
from tests.helpers.databases import (
    FAST_SETTINGS,
    QUOTED,
    execute,
    initialize_server,
    make_login,
    server_folder,
    with_database,
)
from tests.helpers.engines import ALL_ENDED, Held, Recorder, define, enroll, running_engine, until
from tests.helpers.waiting import eventually

QUARANTINED = (
    "SELECT count(*) = $1 FROM sequencer.problems AS p JOIN sequencer.daemons AS d"
    " ON d.name = p.daemon WHERE p.kind = 'quarantined' AND d.alive_until > now()"
)
DONE = "SELECT count(*) = $1 FROM sequencer.enrollments WHERE status = 'completed'"
NOTHING = '{"amount": 0, "unit": "ms"}'


async def refuse(
    connection: asyncpg.Connection, when: str, code: str, *, timing: str = "BEFORE UPDATE"
) -> None:
    """A user's trigger that raises for some rows. `code` is an expression."""
    kind = "CONSTRAINT TRIGGER" if "DEFERR" in timing else "TRIGGER"
    before, _, deferred = timing.partition(" DEFERR")
    deferred = f"DEFERR{deferred}" if deferred else ""
    await connection.execute(
        "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
        f" RAISE 'refused' USING ERRCODE = {code}; END $$;"
        f"CREATE {kind} refuse {before} ON sequencer.enrollments {deferred}"
        f" FOR EACH ROW WHEN ({when}) EXECUTE FUNCTION refuse()"
    )


@pytest.fixture
async def daemon_login(connection: asyncpg.Connection, database: str) -> str:
    """The URL of a login that has the daemon's role and no more."""
    return await make_login(connection, database, "login_daemon", "daemon")


class Gate:
    """A runner's behaviour that waits until it is opened."""

    def __init__(self) -> None:
        self.begun = 0
        self.opened = asyncio.Event()

    async def __call__(self, _task: Task) -> Result:
        self.begun += 1
        await self.opened.wait()
        return Answer()


def patient(gate: Gate) -> Recorder:
    """A runner that calls for each at the same time, and waits for long."""
    return Recorder(gate, batch_size=1, concurrency=20)


@pytest.fixture
async def gate() -> AsyncIterator[Gate]:
    made = Gate()
    yield made
    made.opened.set()


async def until_begun(gate: Gate, count: int) -> None:
    await eventually(lambda: gate.begun >= count)


async def test_exhausted_memory_fails_no_enrollment(
    database: str, connection: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may pass: an enrollment whose evaluation meets it is tried again."""
    is_exhausted = True

    def advanced(definitions: Any, enrollment: Enrollment, *rest: Any, **more: Any) -> Advanced:
        if is_exhausted and enrollment.subject == "large":
            raise MemoryError
        return advance(definitions, enrollment, *rest, **more)

    monkeypatch.setattr(moves, "advance", advanced)
    await define(connection, "s", ("note", "Note", "{}", None))
    async with running_engine(database, {"Note": Recorder()}):
        async with connection.transaction():
            for subject in ("large", "small"):
                await enroll(connection, "s", subject, json.dumps({"a": subject}))
        await until(connection, DONE, 1)
        await until(connection, QUARANTINED, 1)
        is_exhausted = False
        await until(connection, DONE, 2)
        await until(connection, QUARANTINED, 0)


async def test_a_row_that_a_trigger_refuses_is_quarantined_and_others_complete_once(
    database: str, connection: asyncpg.Connection, daemon_login: str, gate: Gate
) -> None:
    await connection.execute("CREATE TABLE audit (id bigint)")
    await connection.execute(
        "CREATE FUNCTION audit() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
        " INSERT INTO audit VALUES (NEW.id); RETURN NULL; END $$;"
        "CREATE TRIGGER audit AFTER UPDATE ON sequencer.enrollments FOR EACH ROW"
        " WHEN (OLD.status IS DISTINCT FROM NEW.status AND NEW.sequence = 'imm')"
        " EXECUTE FUNCTION audit()"
    )
    await define(connection, "imm", ("end", "WaitForDuration", NOTHING, None))
    await define(connection, "slow", ("call", "Slow", "{}", None))
    slow = patient(gate)
    async with running_engine(daemon_login, {"Slow": slow}):
        for number in range(20):
            await enroll(connection, "slow", f"u{number}")
        await until_begun(gate, 20)
        bad = await enroll(connection, "imm", "ada")
        await until(connection, QUARANTINED, 1)
        row = await connection.fetchrow("SELECT * FROM sequencer.problems")
        assert (row["about"], row["sequence"], row["step"]) == (str(bad), "imm", "end")
        assert "permission denied for table audit" in row["message"]
        gate.opened.set()
        await until(connection, DONE, 20)
        await connection.execute("GRANT INSERT ON audit TO sequencer_daemon")
        await until(connection, ALL_ENDED)
        await until(connection, QUARANTINED, 0)
    assert set(Counter(slow.keys).values()) == {1}
    assert await connection.fetchval(
        "SELECT count(*) = 0 FROM sequencer.events"
        " WHERE action IN ('lease_expired', 'stale_result')"
    )


async def enroll_now_and_later(connection: asyncpg.Connection, subject: str) -> None:
    """A subject that is due, and another that wakes at the same step in two seconds."""
    await define(connection, "s", ("note", "Note", "{}", None))
    await connection.execute(
        "INSERT INTO sequencer.enrollments (sequence, subject, wake_at)"
        " VALUES ('s', $1, now()), ('s', 'later', now() + interval '2 seconds')",
        subject,
    )


@pytest.mark.usefixtures("no_polls")
async def test_what_wakes_later_beside_a_refused_row_is_on_time(
    database: str, connection: asyncpg.Connection
) -> None:
    await refuse(connection, "NEW.subject = 'bad' AND NEW.status = 'active'", "'23514'")
    await enroll_now_and_later(connection, "bad")
    async with running_engine(database, {"Note": Recorder()}, sweep=3600):
        await until(connection, ALL_ENDED)


@pytest.mark.usefixtures("no_polls")
async def test_what_wakes_after_a_claim_that_has_lost_its_connection_is_on_time(
    database: str, connection: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    peek, is_lost = locking.peek, False

    async def losing(borrowed: asyncpg.Connection, due: DueEnrollments, **more: Any) -> Any:
        nonlocal is_lost
        if due.sequence and not is_lost:
            is_lost = True
            await execute(database, f"SELECT pg_terminate_backend({borrowed.get_server_pid()})")
        return await peek(borrowed, due, **more)

    monkeypatch.setattr(locking, "peek", losing)
    await enroll_now_and_later(connection, "now")
    recorder = Recorder()
    async with running_engine(database, {"Note": recorder}, sweep=3600):
        await until(connection, ALL_ENDED)
    assert is_lost
    assert len(recorder.keys) == 2


@pytest.mark.usefixtures("no_polls")
async def test_a_row_that_is_locked_when_it_is_tried_again_follows(
    database: str, connection: asyncpg.Connection
) -> None:
    present = "CASE WHEN to_regclass('allowed') IS NOT NULL THEN NEW END"
    await discard(connection, "true", present)
    await define(connection, "s", ("note", "Note", "{}", None))
    await enroll(connection, "s", "ada")
    other = await asyncpg.connect(database)
    async with running_engine(database, {"Note": Recorder()}, sweep=3600):
        await until(connection, QUARANTINED, 1)
        async with other.transaction():
            await other.execute("SELECT FROM sequencer.enrollments FOR UPDATE")
            await until(connection, QUARANTINED, 0)
            await connection.execute("CREATE TABLE allowed ()")
        await until(connection, ALL_ENDED)
    await other.close()


CODES = ("P0001", "42501", "40001", "57014", "53100", "23514", "XX000")


@pytest.mark.parametrize(
    "timing", ["BEFORE UPDATE", "AFTER UPDATE", "AFTER UPDATE DEFERRABLE INITIALLY DEFERRED"]
)
@pytest.mark.slow
async def test_the_oldest_row_that_is_refused_blocks_no_other(
    database: str, connection: asyncpg.Connection, timing: str
) -> None:
    """Whatever the code: each is that of a sequence."""
    await refuse(connection, "NEW.subject LIKE 'bad%'", "NEW.sequence", timing=timing)
    for code in CODES:
        await define(
            connection,
            code,
            ("note", "Note", "{}", "end"),
            ("end", "WaitForDuration", NOTHING, None),
        )
        for name in ("bad1", "good1", "bad2", "good2"):
            await enroll(connection, code, name)
    recorder = Recorder()
    async with running_engine(database, {"Note": recorder}) as engine:
        await until(connection, DONE, 2 * len(CODES))
        await until(connection, QUARANTINED, 2 * len(CODES))
        for code in CODES:
            await enroll(connection, code, "good3")
        await until(connection, DONE, 3 * len(CODES))
        # not between a refusal and the failure that the daemon then writes, if it can
        async with engine._trying:
            await connection.execute("DROP TRIGGER refuse ON sequencer.enrollments")
        await until(connection, DONE, 5 * len(CODES))
        await until(connection, QUARANTINED, 0)
    assert set(Counter(recorder.keys).values()) == {1}
    assert len(recorder.keys) == 5 * len(CODES)


async def discard(connection: asyncpg.Connection, when: str, returned: str) -> None:
    """A user's trigger that leaves some rows as they are, without an error."""
    await connection.execute(
        "CREATE FUNCTION discard() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
        f" RETURN {returned}; END $$;"
        "CREATE TRIGGER discard BEFORE UPDATE ON sequencer.enrollments"
        f" FOR EACH ROW WHEN ({when}) EXECUTE FUNCTION discard()"
    )


@pytest.mark.parametrize("returned", ["NULL", "OLD"])
@pytest.mark.parametrize("count", [1, 5, 150])
async def test_a_side_effect_whose_lease_is_discarded_is_not_executed(
    database: str, connection: asyncpg.Connection, returned: str, count: int
) -> None:
    """It would be due as before, and be executed again and again."""
    await define(
        connection, "s", ("call", "Note", "{}", "end"), ("end", "WaitForDuration", NOTHING, None)
    )
    await discard(connection, "OLD.subject = 'u1'", returned)
    recorder = Recorder()
    async with running_engine(database, {"Note": recorder}):
        await connection.execute(
            "INSERT INTO sequencer.enrollments (sequence, subject)"
            " SELECT 's', 'u' || n FROM generate_series(1, $1::int) AS n",
            count,
        )
        await until(connection, QUARANTINED, 1)
        assert "has left the row as it was" in await connection.fetchval(
            "SELECT message FROM sequencer.problems"
        )
        await until(connection, DONE, count - 1)
        assert len(recorder.keys) == count - 1
        await connection.execute("DROP TRIGGER discard ON sequencer.enrollments")
        await until(connection, ALL_ENDED)
    assert set(Counter(recorder.keys).values()) == {1}
    events = await connection.fetch(
        "SELECT action, count(*) FROM sequencer.events GROUP BY action ORDER BY action"
    )
    assert {row["action"]: row["count"] for row in events} == {
        "completed": count,
        "enrolled": count,
        "next": 2 * count,
    }


@pytest.mark.parametrize("returned", ["NULL", "OLD"])
async def test_a_result_that_is_discarded_is_kept(
    database: str, connection: asyncpg.Connection, gate: Gate, returned: str
) -> None:
    await define(
        connection, "s", ("call", "Slow", "{}", "end"), ("end", "WaitForDuration", NOTHING, None)
    )
    slow = patient(gate)
    async with running_engine(database, {"Slow": slow}):
        for name in ("bad", "good"):
            await enroll(connection, "s", name)
        await until_begun(gate, 2)
        await discard(connection, "OLD.subject = 'bad'", returned)
        gate.opened.set()
        await until(connection, DONE, 1)
        await until(connection, QUARANTINED, 1)
        await connection.execute("DROP TRIGGER discard ON sequencer.enrollments")
        await until(connection, ALL_ENDED)
    assert set(Counter(slow.keys).values()) == {1}
    events = await connection.fetch("SELECT DISTINCT action FROM sequencer.events")
    assert {row["action"] for row in events} == {"enrolled", "next", "completed"}


@pytest.mark.parametrize("code", ["P0001", "08006"])
@pytest.mark.slow
async def test_a_result_that_cannot_be_written_is_kept_and_its_side_effect_done_once(
    database: str, connection: asyncpg.Connection, gate: Gate, code: str
) -> None:
    """Also if a trigger cannot connect to a server of its own."""
    await define(
        connection, "s", ("call", "Slow", "{}", "end"), ("end", "WaitForDuration", NOTHING, None)
    )
    slow = patient(gate)
    async with running_engine(database, {"Slow": slow}, lease=1.0):
        for name in ("bad", "good"):
            await enroll(connection, "s", name)
        await until_begun(gate, 2)
        await refuse(connection, "NEW.subject = 'bad' AND NEW.step = 'end'", f"'{code}'")
        gate.opened.set()
        await until(connection, DONE, 1)
        await until(connection, QUARANTINED, 1)
        assert "not executed again" in await connection.fetchval(
            "SELECT message FROM sequencer.problems"
        )
        # for longer than a lease
        since = await now(connection)
        await until(connection, "SELECT now() > $1::timestamptz + interval '2 s'", since)
        await connection.execute("DROP TRIGGER refuse ON sequencer.enrollments")
        await until(connection, ALL_ENDED)
    assert set(Counter(slow.keys).values()) == {1}
    events = await connection.fetch("SELECT DISTINCT action FROM sequencer.events")
    assert {row["action"] for row in events} == {"enrolled", "next", "completed"}


async def test_the_lease_of_a_kept_result_is_not_extended(
    database: str, connection: asyncpg.Connection, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The database would refuse that as well, and with it those of all others."""
    extend, extended = writes.extend_leases, []

    async def recorded(connection: asyncpg.Connection, ids: list[int], *others: Any) -> None:
        extended.append({*ids})
        await extend(connection, ids, *others)

    monkeypatch.setattr(writes, "extend_leases", recorded)
    await define(connection, "s", ("call", "Slow", "{}", None))
    await define(connection, "t", ("call", "Other", "{}", None))
    other = Held()
    runners = {"Slow": patient(gate), "Other": Recorder(other)}
    async with running_engine(database, runners, lease=1.0):
        id_ = await enroll(connection, "t", "good")
        await keep_a_result(connection, gate)
        extended.clear()
        await eventually(lambda: len(extended) >= 3)
        assert extended[-1] == {id_}
        other.released.set()
        await connection.execute("DROP TRIGGER refuse ON sequencer.enrollments")
        await until(connection, ALL_ENDED)


async def keep_a_result(connection: asyncpg.Connection, gate: Gate) -> int:
    """Make an enrollment whose side effect is done and whose result is refused."""
    id_ = await enroll(connection, "s", "bad")
    await until_begun(gate, 1)
    await refuse(connection, "NEW.subject = 'bad'", "'P0001'")
    gate.opened.set()
    await until(connection, QUARANTINED, 1)
    return id_


@pytest.mark.parametrize("is_fixed", [True, False])
async def test_a_kept_result_is_written_or_logged_when_the_daemon_stops(
    database: str,
    connection: asyncpg.Connection,
    gate: Gate,
    monkeypatch: pytest.MonkeyPatch,
    is_fixed: bool,
) -> None:
    monkeypatch.setattr(quarantine, "FIRST_PAUSE", 1000.0)  # it is not tried by itself
    await define(connection, "s", ("call", "Slow", "{}", None))
    slow = patient(gate)
    with capture_logs() as logs:
        async with running_engine(database, {"Slow": slow}):
            id_ = await keep_a_result(connection, gate)
            if is_fixed:
                await connection.execute("DROP TRIGGER refuse ON sequencer.enrollments")
        told = [entry for entry in logs if entry["event"] == "a result could not be written"]
    assert await connection.fetchval(DONE, 1) is is_fixed
    assert len(slow.keys) == 1
    assert [(entry["enrollment"], entry["step"], entry["outcome"]) for entry in told] == (
        [] if is_fixed else [(id_, "call", "next")]
    )


async def test_kept_results_that_were_written_before_the_database_failed_are_not_tried_again(
    database: str, connection: asyncpg.Connection, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two, one is written; then nothing can be written for a while."""
    monkeypatch.setattr(quarantine, "FIRST_PAUSE", 1000.0)  # they are not tried by themselves
    await define(connection, "s", ("call", "Slow", "{}", None))
    async with running_engine(database, {"Slow": patient(gate)}) as one:
        for name in ("good", "bad"):
            await enroll(connection, "s", name)
        await until_begun(gate, 2)
        await refuse(connection, "true", "'P0001'")
        gate.opened.set()
        await until(connection, QUARANTINED, 2)
        await connection.execute("DROP TRIGGER refuse ON sequencer.enrollments")
        await connection.execute(
            "CREATE TRIGGER refuse BEFORE UPDATE ON sequencer.enrollments"
            " FOR EACH ROW WHEN (NEW.subject = 'bad') EXECUTE FUNCTION refuse()"
        )

        async def probe(_: asyncpg.Connection) -> None:
            if await connection.fetchval(DONE, 1):
                raise ConnectionResetError

        with monkeypatch.context() as failing:
            failing.setattr(server, "probe", probe)
            with pytest.raises(ConnectionResetError):
                await one._try_quarantined(results_only=True)
        assert [kept.id for kept in one._quarantine.all] == [
            await connection.fetchval("SELECT id FROM sequencer.enrollments WHERE subject = 'bad'")
        ]
        await connection.execute("DROP TRIGGER refuse ON sequencer.enrollments")
        await one._try_quarantined(results_only=True)
        assert await connection.fetchval(ALL_ENDED)
    events = await connection.fetch("SELECT DISTINCT action FROM sequencer.events")
    assert {row["action"] for row in events} == {"enrolled", "next", "completed"}


async def now(connection: asyncpg.Connection) -> object:
    return await connection.fetchval("SELECT now()")


@pytest.mark.parametrize("code", ["23514", "P0001"])
async def test_a_result_is_recorded_although_the_next_step_is_refused(
    database: str, connection: asyncpg.Connection, code: str
) -> None:
    """The result alone is written where the whole evaluation is not."""
    await refuse(connection, "NEW.status = 'completed' AND NEW.subject = 'bad'", f"'{code}'")
    await define(
        connection, "s", ("call", "Note", "{}", "end"), ("end", "WaitForDuration", NOTHING, None)
    )
    recorder = Recorder()
    async with running_engine(database, {"Note": recorder}):
        bad = await enroll(connection, "s", "bad")
        await enroll(connection, "s", "good")
        await until(connection, DONE, 1)
        if code == "P0001":
            await until(connection, QUARANTINED, 1)
        else:
            await until(connection, ALL_ENDED)
        row = await connection.fetchrow("SELECT * FROM sequencer.enrollments WHERE id = $1", bad)
        assert row["step"] == "end"
        if code == "23514":
            assert (row["status"], row["failure"]) == ("failed", "error")
            assert "it cannot be written: refused" in row["last_error"]
    assert set(Counter(recorder.keys).values()) == {1}
    actions = await connection.fetch(
        "SELECT action FROM sequencer.events WHERE enrollment_id = $1 AND step = 'call'", bad
    )
    assert [row["action"] for row in actions] == ["enrolled", "next"]


async def test_the_leases_of_other_rows_are_extended_beside_a_refused_row(
    database: str, connection: asyncpg.Connection, gate: Gate
) -> None:
    await define(connection, "s", ("call", "Slow", "{}", None))
    async with running_engine(database, {"Slow": patient(gate)}, lease=1.0):
        bad, good = [await enroll(connection, "s", name) for name in ("bad", "good")]
        await until_begun(gate, 2)
        await refuse(connection, "NEW.subject = 'bad'", "'P0001'")
        wake = "SELECT wake_at > $2 FROM sequencer.enrollments WHERE id = $1"
        known = await connection.fetchval("SELECT max(wake_at) FROM sequencer.enrollments")
        await until(connection, wake, good, known)
        await until(
            connection, "SELECT wake_at < now() FROM sequencer.enrollments WHERE id = $1", bad
        )
        await connection.execute("DROP TRIGGER refuse ON sequencer.enrollments")
        gate.opened.set()
        await until(connection, ALL_ENDED)
    assert gate.begun == 2


async def test_what_a_trigger_changes_with_a_lease_is_read_with_the_result(
    database: str, connection: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if many are leased together, and their results are written in small batches."""
    is_new = json.dumps(
        {"lodashCommand": "isNil", "value": {"type": "get", "value": "data.touched"}}
    )
    await define(
        connection,
        "s",
        ("call", "Note", "{}", "new"),
        ("new", "Conditional", is_new, "more"),
        ("more", "Note", "{}", None),
    )
    await connection.execute(
        "CREATE FUNCTION touch() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
        " NEW.data := '{\"touched\": true}'; RETURN NEW; END $$;"
        "CREATE TRIGGER touch BEFORE UPDATE ON sequencer.enrollments FOR EACH ROW"
        " WHEN (OLD.leased_by IS NULL AND NEW.leased_by IS NOT NULL) EXECUTE FUNCTION touch()"
    )
    count = MAX_UNLOCKED + 1
    await connection.execute(
        "INSERT INTO sequencer.enrollments (sequence, subject)"
        " SELECT 's', 'u' || n FROM generate_series(1, $1::int) AS n",
        count,
    )
    take = Backlog.take
    monkeypatch.setattr(Backlog, "take", lambda self, most: take(self, min(most, count // 2)))
    recorder = Recorder(batch_size=count)
    async with running_engine(database, {"Note": recorder}):
        await until(connection, ALL_ENDED)
    assert len(recorder.keys) == count


async def test_slots_of_refused_leases_go_to_the_steps_that_found_none(
    database: str, connection: asyncpg.Connection
) -> None:
    """At once: no result of the refused ones, and no sweep, wakes them."""
    await connection.execute(
        "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
        " PERFORM pg_advisory_xact_lock_shared(1); RAISE 'refused'; END $$;"
        "CREATE TRIGGER refuse BEFORE UPDATE ON sequencer.enrollments"
        " FOR EACH ROW WHEN (NEW.sequence = 'bad') EXECUTE FUNCTION refuse()"
    )
    for name in ("bad", "good"):
        await define(connection, name, ("note", "Note", "{}", None))
    recorder = Recorder(batch_size=1, concurrency=1)
    async with running_engine(database, {"Note": recorder}, sweep=3600) as engine:
        async with connection.transaction():
            await connection.execute("SELECT pg_advisory_xact_lock(1)")
            other = await asyncpg.connect(database)
            await other.execute(
                "INSERT INTO sequencer.enrollments (sequence, subject)"
                " VALUES ('bad', 'a'), ('bad', 'b'), ('bad', 'c')"
            )
            await eventually(lambda: engine.executors.by_key["Note"].free_slots == 0)
            await enroll(other, "good", "a")
            await eventually(lambda: ("good", "note") in engine.executors.waiting())
            await other.close()
        await until(connection, DONE, 1)
        await until(connection, QUARANTINED, 3)


# --- locks, time-outs, rights and names are no row's fault


@pytest.mark.parametrize(
    "lock",
    [
        "LOCK TABLE sequencer.enrollments IN ACCESS EXCLUSIVE MODE",
        "LOCK TABLE sequencer.enrollments, sequencer.daemons IN ACCESS EXCLUSIVE MODE",
        "SELECT FROM sequencer.enrollments FOR UPDATE",
        "UPDATE sequencer.enrollments SET data = '{}'",
        "LOCK TABLE sequencer.events IN SHARE MODE",
    ],
)
@pytest.mark.slow
async def test_rows_locked_beyond_their_lease_are_not_started_again(
    database: str, connection: asyncpg.Connection, gate: Gate, lock: str
) -> None:
    """By no daemon: neither by the one that executes it, nor by another."""
    await define(connection, "s", ("call", "Slow", "{}", None))
    other = await asyncpg.connect(database)
    slow = {"Slow": patient(gate)}
    async with (
        running_engine(database, slow, lease=1.0, sweep=0.3),
        running_engine(database, slow, lease=1.0, sweep=0.3),
    ):
        for number in range(10):
            await enroll(connection, "s", f"u{number}")
        await until_begun(gate, 10)
        async with other.transaction():
            await other.execute(lock)
            since = await now(connection)
            await until(connection, "SELECT now() > $1::timestamptz + interval '4 s'", since)
        # held a while more, and only then done
        since = await now(connection)
        await until(connection, "SELECT now() > $1::timestamptz + interval '1 s'", since)
        gate.opened.set()
        await until(connection, ALL_ENDED)
    await other.close()
    assert gate.begun == 10
    events = await connection.fetch("SELECT DISTINCT action FROM sequencer.events")
    assert {row["action"] for row in events} == {"enrolled", "next", "completed"}


BREAK_AND_FIX = {
    "enrollments": ("BEGIN; LOCK TABLE sequencer.enrollments", "COMMIT"),
    "events": ("BEGIN; LOCK TABLE sequencer.events", "COMMIT"),
    "rights": (
        "REVOKE ALL ON sequencer.enrollments, sequencer.events FROM sequencer_daemon",
        "GRANT SELECT, UPDATE ON sequencer.enrollments TO sequencer_daemon;\
         GRANT SELECT, INSERT ON sequencer.events TO sequencer_daemon",
    ),
    "role": (
        "REVOKE sequencer_daemon FROM login_daemon",
        "GRANT sequencer_daemon TO login_daemon",
    ),
    "schema": ("ALTER SCHEMA sequencer RENAME TO away", f"ALTER SCHEMA away RENAME TO {QUOTED}"),
    "table": (
        "ALTER TABLE sequencer.events RENAME TO away",
        "ALTER TABLE sequencer.away RENAME TO events",
    ),
    "login": (
        "ALTER ROLE login_daemon NOLOGIN; SELECT pg_terminate_backend(pid)\
         FROM pg_stat_activity WHERE usename = 'login_daemon'",
        "ALTER ROLE login_daemon LOGIN",
    ),
}


@pytest.mark.parametrize(
    "broken",
    [
        *(f"lock_timeout {kind}" for kind in BREAK_AND_FIX),
        "statement_timeout enrollments",
        "statement_timeout events",
    ],
)
@pytest.mark.slow
async def test_an_error_of_the_environment_fails_no_enrollment(
    database: str,
    connection: asyncpg.Connection,
    daemon_login: str,
    gate: Gate,
    broken: str,
) -> None:
    setting, kind = broken.split()
    name = await connection.fetchval("SELECT current_database()")
    await connection.execute(f"ALTER DATABASE {name} SET {setting} = '300ms'")
    other = await asyncpg.connect(database, server_settings={setting: "0"})
    await define(connection, "s", ("call", "Slow", "{}", "note"), ("note", "Note", "{}", None))
    runners = {"Slow": patient(gate), "Note": Recorder()}
    async with running_engine(daemon_login, runners, lease=2.0, sweep=0.3) as engine:
        for number in range(10):
            await enroll(connection, "s", f"u{number}")
        await until_begun(gate, 10)
        break_it, mend_it = BREAK_AND_FIX[kind]
        try:
            await other.execute(break_it)
            gate.opened.set()
            await asyncio.sleep(3)  # longer than the lease: nothing tells what does not happen
        finally:
            await other.execute(mend_it)
        await until(connection, ALL_ENDED)
        await until(connection, QUARANTINED, 0)
        await eventually(lambda: not engine.in_flight)
    await other.close()
    statuses = await connection.fetch("SELECT DISTINCT status FROM sequencer.enrollments")
    assert [row["status"] for row in statuses] == ["completed"]
    assert gate.begun == 10


# --- what cannot be read, and what is large


@pytest.mark.slow
async def test_a_full_queue_of_notifications_fails_no_enrollment() -> None:
    """The server reports it as if the row were too large. Only those that end notify here, so that
    a failure could be written.
    """
    with server_folder() as folder:
        initialize_server(folder)
        with embedded.running(
            folder, settings=FAST_SETTINGS | {"max_notify_queue_pages": "64"}
        ) as server:
            connection = await asyncpg.connect(server.url)
            await migrate.migrate(connection)
            await define(connection, "s", ("note", "Note", "{}", None))
            await connection.execute("""
                CREATE FUNCTION tell() RETURNS trigger LANGUAGE plpgsql AS $$
                BEGIN
                    PERFORM pg_notify('app', repeat('x', 7000));
                    RETURN NEW;
                END $$;
                CREATE TRIGGER tell AFTER UPDATE ON sequencer.enrollments
                    FOR EACH ROW WHEN (NEW.status = 'completed') EXECUTE FUNCTION tell()""")
            slow = await asyncpg.connect(server.url)
            await slow.execute("LISTEN app")
            recorder = Recorder()
            async with running_engine(server.url, {"Note": recorder}, sweep=0.1):
                async with slow.transaction():  # meanwhile, it reads none of them
                    with suppress(asyncpg.ProgramLimitExceededError):
                        while True:
                            await connection.execute("SELECT pg_notify('app', repeat('x', 7000))")
                    await connection.execute("SET sequencer.notify = off")
                    await enroll(connection, "s", "a")
                    await until(connection, QUARANTINED, 1)
                # this removes what has been read
                await until(connection, "SELECT pg_notification_queue_usage() < 0.5")
                await until(connection, ALL_ENDED)
            assert await connection.fetchval(DONE, 1)
            assert len(recorder.keys) == 1
            await slow.close()
            await connection.close()


@pytest.mark.slow
async def test_a_database_that_is_not_utf8_is_refused(server: str, tmp_path: Path) -> None:
    name = f"ascii_{uuid4().hex[:12]}"
    await execute(
        server, f"CREATE DATABASE {name} ENCODING 'SQL_ASCII' LOCALE 'C' TEMPLATE template0"
    )
    sequencerd = Command(with_database(server, name), tmp_path)
    try:
        for run, command in ((sequencerd, "migrate"), (sequencerd.program, "run")):
            await asyncio.to_thread(run, command, code=1)
            assert "the database's encoding is SQL_ASCII, and must be UTF8" in sequencerd.errors
        found = await asyncio.to_thread(sequencerd, "doctor", code=1)
        assert "encoding is SQL_ASCII" in found
    finally:
        await execute(server, f"DROP DATABASE {name} WITH (FORCE)")


@pytest.mark.slow
async def test_a_row_that_cannot_be_read_fails_alone(
    server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def accept(_: asyncpg.Connection) -> None:
        pass

    monkeypatch.setattr(migrate, "_check_server", accept)
    name = f"ascii_{uuid4().hex[:12]}"
    await execute(server, f"CREATE DATABASE {name} ENCODING 'UTF8' LOCALE 'C' TEMPLATE template0")
    url = with_database(server, name)
    connection = await asyncpg.connect(url)
    await migrate.migrate(connection)
    await connection.close()
    # from now on the database takes any bytes
    await execute(server, f"UPDATE pg_database SET encoding = 0 WHERE datname = '{name}'")
    connection = await asyncpg.connect(url)
    try:
        await define(connection, "s", ("note", "Note", "{}", None))
        bad = await connection.fetchval(
            "INSERT INTO sequencer.enrollments (sequence, subject) VALUES ('s', E'caf\\351')"
            " RETURNING id"
        )
        recorder = Recorder()
        async with running_engine(url, {"Note": recorder}):
            for number in range(3):
                await enroll(connection, "s", f"u{number}")
            await until(connection, DONE, 3)
            await until(
                connection, "SELECT status = 'failed' FROM sequencer.enrollments WHERE id = $1", bad
            )
            error = "SELECT last_error FROM sequencer.enrollments WHERE id = $1"
            assert (
                "it cannot be read or written: invalid byte sequence"
                in await connection.fetchval(error, bad)
            )
        assert len(recorder.keys) == 3
    finally:
        await connection.close()
        await execute(server, f"DROP DATABASE {name} WITH (FORCE)")


@pytest.mark.slow
@pytest.mark.parametrize("size", [300_000, 100_000])
async def test_a_claim_is_bounded_by_bytes(
    database: str, connection: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    """By those of the data as they are read: PostgreSQL stores the smaller ones in 2,000 bytes."""
    monkeypatch.setattr(locking, "MAX_BYTES", 1_000_000)
    await define(connection, "s", ("note", "Note", "{}", None))
    await connection.execute(
        "INSERT INTO sequencer.enrollments (sequence, subject, data)"
        " SELECT 's', 'u' || n, jsonb_build_object('n', n, 'text', repeat('x', $1))"
        " FROM generate_series(1, 30) AS n",
        size,
    )
    at = Clock().now() + timedelta(hours=1)
    revision = await connection.fetchval("SELECT revision FROM sequencer.sequences")
    due = locking.DueEnrollments("s", "note", at, "me", [], revision, 100, EARLIEST_WAKE)
    claimed, locked, _, _ = await locking.claim(connection, [due])
    assert locked == {("s", "note"): 30}
    assert size <= sum(len(one.data) for one in claimed) <= 1_000_000 + size
    assert all(len(one.data) > size for one in claimed)
    recorder = Recorder()
    async with running_engine(database, {"Note": recorder}):
        await until(connection, DONE, 30)
    assert {view["data"]["n"] for view in recorder.views} == set(range(1, 31))


@pytest.mark.parametrize(
    ("setting", "size", "is_taken"),
    [
        (None, 1_000_000, True),
        (None, 1_100_000, False),
        ("2MB", 1_100_000, True),
        ("10 kB", 11_000, False),
        ("nonsense", 1_000_000, True),
        ("nonsense", 1_100_000, False),
        ("-1", 1_100_000, False),
    ],
)
async def test_data_beyond_the_limit_are_refused(
    connection: asyncpg.Connection, setting: str | None, size: int, is_taken: bool
) -> None:
    await define(connection, "s", ("note", "Note", "{}", None))
    small = await enroll(connection, "s", "small")
    if setting is not None:
        await connection.execute(f"SET sequencer.max_data = '{setting}'")
    data = json.dumps({"text": "x" * size})
    update = "UPDATE sequencer.enrollments SET data = $2 WHERE id = $1"
    if is_taken:
        await enroll(connection, "s", "large", data)
        await connection.execute(update, small, data)
        return
    with pytest.raises(asyncpg.ProgramLimitExceededError, match="'large' in sequence 's' has"):
        await enroll(connection, "s", "large", data)
    with pytest.raises(asyncpg.ProgramLimitExceededError, match="more than the limit"):
        await connection.execute(update, small, data)


async def test_an_answer_with_data_beyond_the_limit_fails_its_own_enrollment(
    database: str, connection: asyncpg.Connection
) -> None:
    async def answer(task: Task) -> Result:
        return Answer(data={"text": "x" * (2_000_000 if task.view["subject"] == "bad" else 1)})

    await define(connection, "s", ("note", "Note", "{}", None))
    recorder = Recorder(answer)
    async with running_engine(database, {"Note": recorder}):
        for name in ("good", "bad"):
            await enroll(connection, "s", name)
        await until(connection, ALL_ENDED)
    row = await connection.fetchrow("SELECT * FROM sequencer.enrollments WHERE subject = 'bad'")
    assert row["status"] == "failed"
    assert "its side effect is done (next), but it cannot be written" in row["last_error"]
    assert "more than the limit of 1024 kB" in row["last_error"]
    assert len(recorder.keys) == 2


# --- what is not known


async def test_unknown_sequences_are_searched_once(
    database: str, connection: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    await connection.execute(
        "SET session_replication_role = replica;"
        "INSERT INTO sequencer.enrollments (sequence, step, subject, reentry)"
        " SELECT 'none' || n, 'a', 'u' || n, 'always' FROM generate_series(1, 200) AS n;"
        "RESET session_replication_role"
    )
    asked = 0
    revisions = sequences.read_revisions

    async def counted(*arguments: Any) -> dict[str, int]:
        nonlocal asked
        asked += 1
        return await revisions(*arguments)

    monkeypatch.setattr(sequences, "read_revisions", counted)
    async with running_engine(database, {"Note": Recorder()}) as engine:
        for _ in range(3):
            await engine.sweep()
        await define(connection, "s", ("note", "Note", "{}", None))
        await enroll(connection, "s", "ada")
        await until(connection, DONE, 1)
        assert asked < 20
        # and one that is made after all is found
        await define(connection, "none7", ("a", "Note", "{}", None))
        await until(connection, DONE, 2)


# --- what should not be done


async def test_tables_that_are_emptied_meanwhile_leave_no_leases(
    database: str, connection: asyncpg.Connection, gate: Gate
) -> None:
    await define(connection, "s", ("call", "Slow", "{}", None))
    async with running_engine(database, {"Slow": patient(gate)}) as engine:
        for number in range(5):
            await enroll(connection, "s", f"u{number}")
        await until_begun(gate, 5)
        await connection.execute("TRUNCATE sequencer.enrollments, sequencer.events")
        gate.opened.set()
        await enroll(connection, "s", "ada")
        await until(connection, DONE, 1)
        await eventually(lambda: not engine.in_flight)


async def test_the_sweep_finds_leases_that_the_daemon_does_not_know(
    database: str, connection: asyncpg.Connection
) -> None:
    await define(connection, "s", ("note", "Note", "{}", None))
    recorder = Recorder()
    async with running_engine(database, {"Note": recorder}, sweep=0.2):
        await until(connection, "SELECT count(*) = 1 FROM sequencer.daemons")
        await connection.execute(
            "INSERT INTO sequencer.enrollments (sequence, subject, wake_at)"
            " VALUES ('s', 'ada', now() + interval '1 hour')"
        )
        await connection.execute(
            "UPDATE sequencer.enrollments SET leased_by = (SELECT name FROM sequencer.daemons),"
            " attempt = 1, entered_at = now(), wake_at = now()"
        )
        await until(connection, ALL_ENDED)
    actions = await connection.fetch("SELECT action FROM sequencer.events ORDER BY at")
    assert [row["action"] for row in actions] == ["lease_expired", "next", "completed"]
