"""Daemons with different runners on one database: each executes what it can, and fails none."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any, cast

import asyncpg
import pytest

from sequencerd.core.faults import DefinitionError
from sequencerd.storage import daemons
from sequencerd.storage.statements import QUERIES
from tests.helpers.engines import (
    ALL_ENDED,
    Held,
    HeldWrites,
    Recorder,
    define,
    enroll,
    running_engine,
    until,
    way,
)

PROBLEM = "SELECT problem FROM sequencer.steps WHERE name = 'call'"
HAS_PROBLEM = f"SELECT ({PROBLEM}) LIKE 'no runner serves the type ''Call''%'"
HAS_NONE = f"SELECT ({PROBLEM}) IS NULL"
SERVED = "SELECT EXISTS (SELECT FROM sequencer.daemons WHERE types @> '{Call}')"
NO_FAILURE = (
    "SELECT NOT EXISTS (SELECT FROM sequencer.events WHERE action = 'failed')"
    " AND NOT EXISTS (SELECT FROM sequencer.enrollments WHERE status = 'failed')"
)
STEPS = (
    ("note", "Note", "{}", "call"),
    ("call", "Call", "{}", "end"),
    ("end", "Note", "{}", None),
)


class NotSetUp(Recorder):
    """A runner that lacks settings, and so executes nothing."""

    lacks_settings = True

    def compile(self, config: object) -> object:
        raise DefinitionError("it lacks settings")


async def test_daemons_leave_steps_that_only_others_serve(
    database: str, connection: asyncpg.Connection
) -> None:
    """One goes from a step that the other does not serve to one that itself does not, and back."""
    await define(connection, "s", *STEPS)
    notes, calls = Recorder(), Recorder()
    async with running_engine(database, {"Call": calls}, sweep=3600) as one:
        await until(connection, SERVED)
        await one.sweep()
        async with running_engine(database, {"Note": notes}, sweep=3600):
            await until(
                connection, "SELECT count(*) = 2 FROM sequencer.daemons WHERE types <> '{}'"
            )
            await one.sweep()
            ids = [await enroll(connection, "s", f"u{number}") for number in range(40)]
            # by notifications: the next sweep would come in an hour
            await until(connection, ALL_ENDED)
            assert await connection.fetchval(NO_FAILURE)
            assert await connection.fetchval(HAS_NONE)
            assert len(calls.visits) == len(set(calls.visits)) == 40
            assert len(notes.visits) == len(set(notes.visits)) == 80
            assert await way(connection, ids[0]) == [
                "note enrolled",
                "note next",
                "call next",
                "end next",
                "end completed",
            ]


@pytest.mark.slow
async def test_a_step_is_a_problem_where_no_living_daemon_serves_it(
    database: str, connection: asyncpg.Connection
) -> None:
    await define(connection, "s", *STEPS[1:])
    async with running_engine(database, {"Note": Recorder()}) as without:
        await until(connection, HAS_PROBLEM)
        async with running_engine(database, {"Call": Recorder(), "Note": Recorder()}):
            await until(connection, HAS_NONE)
            await without.sweep()
            assert await connection.fetchval(HAS_NONE), "they change it to and fro"
            await enroll(connection, "s", "served")
            await until(connection, ALL_ENDED)
            assert await connection.fetchval(NO_FAILURE)
        await without.sweep()
        await until(connection, HAS_PROBLEM)
        await enroll(connection, "s", "unserved")
        failed = (
            "SELECT failure = 'invalid_step' FROM sequencer.enrollments WHERE subject = 'unserved'"
        )
        await until(connection, failed)
        async with running_engine(database, {"Call": Recorder(), "Note": Recorder()}):
            await until(connection, ALL_ENDED)
            await until(
                connection,
                "SELECT status = 'completed' FROM sequencer.enrollments WHERE subject = 'unserved'",
            )
            await until(connection, HAS_NONE)


async def test_a_dead_daemon_serves_nothing(database: str, connection: asyncpg.Connection) -> None:
    await define(connection, "s", *STEPS[1:])
    await connection.execute(
        "INSERT INTO sequencer.daemons (name, alive_until, types)"
        " VALUES ('dead', now() - interval '1 s', '{Call}')"
    )
    async with running_engine(database, {"Note": Recorder()}):
        await until(connection, HAS_PROBLEM)


async def test_the_problem_that_the_serving_daemon_finds_stays(
    database: str, connection: asyncpg.Connection
) -> None:
    await define(connection, "s", ("call", "Call", '{"bad": 1}', None))
    told = f"SELECT ({PROBLEM}) LIKE '%this key is not known%'"
    async with running_engine(database, {"Call": Recorder()}):
        await until(connection, SERVED)
        await until(connection, told)
        async with running_engine(database, {"Call": NotSetUp()}) as without:
            await without.sweep()
            assert await connection.fetchval(told)


async def test_a_runner_that_lacks_settings_serves_nothing(
    database: str, connection: asyncpg.Connection
) -> None:
    await define(connection, "s", ("call", "Call", '{"bad": 1}', None))
    async with running_engine(database, {"Call": NotSetUp(), "Note": Recorder()}):
        await until(connection, "SELECT types = '{Note}' FROM sequencer.daemons")


async def test_lone_enrollments_start_once_where_two_daemons_are_notified(
    database: str, connection: asyncpg.Connection
) -> None:
    """Both read each without a lock, and only one of them writes it."""
    recorder = Recorder()
    await define(connection, "s", ("one", "Note", "{}", "two"), ("two", "Note", "{}", None))
    async with (
        running_engine(database, {"Note": recorder}),
        running_engine(database, {"Note": recorder}),
    ):
        for number in range(20):
            await enroll(connection, "s", f"u{number}")
            await until(connection, ALL_ENDED)
    assert set(Counter(recorder.keys).values()) == {1}
    assert len(recorder.keys) == 40


async def test_a_lone_enrollment_starts_beside_a_lease_that_a_living_daemon_cannot_extend(
    database: str, connection: asyncpg.Connection
) -> None:
    """Then that daemon dies."""
    await define(connection, "s", ("one", "Note", "{}", None))
    await connection.execute(
        "INSERT INTO sequencer.daemons (name, alive_until, types)"
        " VALUES ('other', now() + interval '1 hour', '{Note}')"
    )
    await enroll(connection, "s", "theirs")
    await connection.execute(
        "UPDATE sequencer.enrollments SET leased_by = 'other', leases = 1, attempt = 1,"
        " entered_at = now(), wake_at = now()"
    )
    async with running_engine(database, {"Note": Recorder()}):
        id_ = await enroll(connection, "s", "ours")
        done = "SELECT status = 'completed' FROM sequencer.enrollments WHERE id = $1"
        await until(connection, done, id_)
        assert (
            await connection.fetchval(
                "SELECT leased_by FROM sequencer.enrollments WHERE subject = 'theirs'"
            )
            == "other"
        )
        await connection.execute("DELETE FROM sequencer.daemons WHERE name = 'other'")
        await enroll(connection, "s", "again")
        await until(connection, ALL_ENDED)
    assert (
        await connection.fetchval(
            "SELECT count(*) FROM sequencer.events WHERE action = 'lease_expired'"
        )
        == 1
    )


async def test_rows_that_a_frozen_daemon_has_locked_go_to_another(
    database: str, connection: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    soon = QUERIES["prepare_session"].replace("30s", "200ms")
    monkeypatch.setitem(cast("dict[str, str]", QUERIES), "prepare_session", soon)
    await define(connection, "s", ("note", "Note", "{}", None))
    one, other = Recorder(), Recorder()
    async with running_engine(database, {"Note": one}) as cold:
        writes = HeldWrites(cold, monkeypatch)
        # late, so that it is locked
        await connection.execute(
            "INSERT INTO sequencer.enrollments (sequence, subject, wake_at)"
            " VALUES ('s', 'a', now() - interval '1 hour')"
        )
        await writes.begun.wait()
        try:
            async with running_engine(database, {"Note": other}):
                await until(connection, ALL_ENDED)
        finally:
            writes.released.set()
    assert (len(one.keys), len(other.keys)) == (0, 1)


@pytest.mark.parametrize("is_back", [False, True])
async def test_a_daemon_that_was_cut_off_starts_nothing_that_others_have_taken_over(
    database: str, connection: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch, is_back: bool
) -> None:
    """Neither before nor after its next heartbeat."""
    await define(connection, "s", ("call", "Call", "{}", None))
    held, other = Held(), Recorder()
    one = Recorder(held, batch_size=1, concurrency=1)
    is_cut_off, is_over = True, asyncio.Event()
    async with running_engine(database, {"Call": one}, lease=1.0) as cold:
        beat, extend = cold.heartbeat.beat, cold._leases._extend

        async def hang() -> None:
            await is_over.wait()
            await beat()

        async def extend_later(*arguments: Any) -> None:
            if not is_cut_off:
                await extend(*arguments)

        ids = [await enroll(connection, "s", f"u{number}") for number in range(2)]
        await until(connection, "SELECT count(leased_by) = 2 FROM sequencer.enrollments")
        await held.begun.wait()
        monkeypatch.setattr(cold.heartbeat, "beat", hang)
        monkeypatch.setattr(cold._leases, "_extend", extend_later)
        async with running_engine(database, {"Call": other}, lease=1.0):
            await until(connection, ALL_ENDED)
        is_cut_off = False
        if is_back:
            is_over.set()
            alive = "SELECT count(*) = 1 FROM sequencer.daemons WHERE alive_until > now()"
            await until(connection, alive)
        held.released.set()
        stale = "SELECT count(*) = 2 FROM sequencer.events WHERE action = 'stale_result'"
        await until(connection, stale)
        is_over.set()
    assert len(other.keys) == 2
    assert one.keys == [key for key in other.keys if key.startswith(f"{ids[0]}:")]


async def test_side_effects_start_while_heartbeats_are_refused(
    database: str, connection: asyncpg.Connection
) -> None:
    """For longer than a lease: no other daemon takes over a lease that was just written."""
    await define(connection, "s", ("one", "Note", "{}", "two"), ("two", "Note", "{}", None))
    recorder = Recorder()
    locking = await asyncpg.connect(database)
    async with running_engine(database, {"Note": recorder}, lease=1.0):
        await until(connection, "SELECT count(*) = 1 FROM sequencer.daemons")
        async with locking.transaction():
            await locking.execute("LOCK TABLE sequencer.daemons IN SHARE MODE")
            await until(connection, "SELECT alive_until < now() FROM sequencer.daemons")
            await enroll(connection, "s", "ada")
            await until(connection, ALL_ENDED)
    await locking.close()
    assert len(recorder.keys) == 2
    events = await connection.fetch("SELECT action FROM sequencer.events ORDER BY visit, at")
    assert [row["action"] for row in events] == ["enrolled", "next", "next", "completed"]


async def test_a_clock_that_is_set_back_takes_over_no_lease_of_a_living_daemon(
    database: str, connection: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server's: a daemon that has not measured it since is ahead of it."""
    await define(connection, "s", ("call", "Call", "{}", None))
    held, other = Held(), Recorder()
    async with running_engine(database, {"Call": Recorder(held)}):
        await enroll(connection, "s", "ada")
        await held.begun.wait()
        async with running_engine(database, {"Call": other}) as ahead:
            await until(connection, "SELECT count(*) = 2 FROM sequencer.daemons")
            monkeypatch.setattr(ahead._env.clock, "_offset", ahead._env.clock._offset + 3600)
            await ahead._claims.claim_all(("s", "call"))
            held.released.set()
            await until(connection, ALL_ENDED)
    assert not other.keys
    found = "SELECT count(*) FROM sequencer.events WHERE action = 'lease_expired'"
    assert await connection.fetchval(found) == 0


async def test_a_clock_that_is_set_forward_during_a_heartbeat_takes_over_no_lease(
    database: str, connection: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when a machine with a server and daemons was suspended."""
    await define(connection, "s", ("call", "Call", "{}", None))
    held, other = Held(), Recorder()
    remove = daemons.remove_dead_daemons

    async def remove_later(*arguments: Any) -> None:
        await connection.execute(
            "UPDATE sequencer.daemons SET alive_until = now() - interval '1 second'"
        )
        await remove(*arguments)

    async with running_engine(database, {"Call": Recorder(held)}):
        await enroll(connection, "s", "ada")
        await held.begun.wait()
        async with running_engine(database, {"Call": other}) as second:
            await until(connection, "SELECT count(*) = 2 FROM sequencer.daemons")
            await connection.execute(
                "UPDATE sequencer.enrollments SET wake_at = now() - interval '1 second'"
            )
            monkeypatch.setattr(daemons, "remove_dead_daemons", remove_later)
            await second.heartbeat.beat()
            monkeypatch.undo()
            await second.heartbeat.beat()
            await second._claims.claim_all(("s", "call"))
            held.released.set()
            await until(connection, ALL_ENDED)
    assert not other.keys
    found = "SELECT count(*) FROM sequencer.events WHERE action = 'lease_expired'"
    assert await connection.fetchval(found) == 0
