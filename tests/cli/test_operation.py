"""An operator's commands: what they select, ask, and leave behind."""

from __future__ import annotations

import asyncio
import getpass
import json
import os
import pty
import signal
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from sequencerd.core.task import Answer, Failed, Result, Task
from sequencerd.storage import bulk
from tests.helpers.command_line import Command, start_sequencerd
from tests.helpers.engines import Held, Recorder, define, enroll, running_engine, until, way
from tests.helpers.pooler import pgbouncer
from tests.helpers.waiting import PATIENCE

DAYS = '{"amount": 3, "unit": "days"}'


@pytest.fixture
async def defined(connection: asyncpg.Connection) -> asyncpg.Connection:
    """Sequences "s", of a runner's step and a wait, and "t"."""
    await define(
        connection, "s", ("send", "Note", "{}", "wait"), ("wait", "WaitForDuration", DAYS, None)
    )
    await define(connection, "t", ("send", "Note", "{}", None))
    return connection


async def fail(connection: asyncpg.Connection, *ids: int, code: str = "error") -> None:
    await connection.execute(
        "UPDATE sequencer.enrollments SET status = 'failed', failure = $2, last_error = 'no',"
        " attempt = 8, entered_at = now() WHERE id = ANY ($1)",
        ids,
        code,
    )


async def row(connection: asyncpg.Connection, id_: int) -> asyncpg.Record:
    return await connection.fetchrow("SELECT * FROM sequencer.enrollments WHERE id = $1", id_)


async def last_message(connection: asyncpg.Connection, id_: int, action: str) -> str:
    text: str = await connection.fetchval(
        "SELECT message FROM sequencer.events WHERE enrollment_id = $1 AND action = $2"
        " ORDER BY at DESC LIMIT 1",
        id_,
        action,
    )
    return text


# --- what a command selects


async def test_retry_resumes_failed_enrollments_and_records_the_operator_and_the_reason(
    sequencerd: Command, defined: asyncpg.Connection
) -> None:
    ada, bob = [await enroll(defined, "s", name) for name in ("ada", "bob")]
    await fail(defined, ada)
    assert sequencerd("retry", str(ada), "--reason", "it is\nback") == "retry: 1 enrollment\n"
    now = await row(defined, ada)
    assert (now["status"], now["attempt"], now["failure"], now["last_error"]) == (
        "active",
        0,
        None,
        None,
    )
    message = await last_message(defined, ada, "resumed")
    assert message.startswith(f"by postgres: {getpass.getuser()}@")
    assert message.endswith(": it is back")
    sequencerd("retry", str(bob), code=1)
    assert f"retry applies to failed enrollments, not to {bob}" in sequencerd.errors
    sequencerd("retry", "999", "--yes", code=1)
    assert "enrollment 999 does not exist" in sequencerd.errors
    sequencerd("retry", str(ada), "999", code=1)


@pytest.mark.parametrize(
    ("options", "subjects"),
    [
        (["--sequence", "s"], ["s-error", "s-unknown"]),
        (["--failure", "error"], ["s-error", "t-error"]),
        (["--subject", "t-error"], ["t-error"]),
        (["--sequence", "s", "--step", "send", "--failure", "outcome_unknown"], ["s-unknown"]),
        (["--step", "wait"], []),
    ],
)
async def test_filters_select_enrollments(
    sequencerd: Command, defined: asyncpg.Connection, options: list[str], subjects: list[str]
) -> None:
    for name, code in (
        ("s-error", "error"),
        ("s-unknown", "outcome_unknown"),
        ("t-error", "error"),
    ):
        await fail(defined, await enroll(defined, name[0], name), code=code)
    await enroll(defined, "s", "active")
    told = json.loads(sequencerd("retry", *options, "--yes", "--json"))
    assert (told["selected"], told["changed"], told["unchanged"]) == (
        len(subjects),
        len(subjects),
        0,
    )
    active = await defined.fetch(
        "SELECT subject FROM sequencer.enrollments WHERE status = 'active'"
        " AND subject <> 'active' ORDER BY subject"
    )
    assert [one["subject"] for one in active] == subjects


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["retry"], "nothing selected: give ids"),
        (["cancel", "--yes"], "nothing selected"),
        (["cancel", "1", "--sequence", "s"], "either ids or filters"),
        (["cancel", "0"], "not a positive integer"),
        (["show", "99999999999999999999"], "not a positive integer"),
        (["list", "--limit", "0"], "not a positive integer"),
        (["move", "1"], "required: --to"),
        (["cancel", "--sequence", "s"], "Standard input is not a terminal: use --yes"),
    ],
)
async def test_an_incomplete_selection_changes_nothing(
    sequencerd: Command, defined: asyncpg.Connection, arguments: list[str], words: str
) -> None:
    for name in ("ada", "bob"):
        await enroll(defined, "s", name)
    sequencerd(*arguments, code=2)
    assert words in sequencerd.errors
    assert "Traceback" not in sequencerd.errors
    assert await defined.fetchval("SELECT count(*) FROM sequencer.events") == 0


async def test_a_dry_run_reports_and_changes_nothing(
    sequencerd: Command, defined: asyncpg.Connection
) -> None:
    for name in ("ada", "bob"):
        await enroll(defined, "s", name)
    told = sequencerd("cancel", "--sequence", "s", "--dry-run")
    assert "would cancel 2 enrollments" in told
    assert "send" in told
    assert json.loads(sequencerd("cancel", "--sequence", "s", "--dry-run", "--json"))["dry_run"]
    assert await defined.fetchval("SELECT count(*) FROM sequencer.events") == 0


async def test_the_list_has_filters_and_pages(
    sequencerd: Command, defined: asyncpg.Connection
) -> None:
    ids = [await enroll(defined, "s", f"u{n}") for n in range(5)]
    await fail(defined, ids[0])
    await defined.execute(
        "UPDATE sequencer.enrollments SET wake_at = now() - interval '1 hour' WHERE id = $1", ids[1]
    )

    def listed(*arguments: str) -> list[int]:
        return [one["id"] for one in json.loads(sequencerd("list", *arguments, "--json"))]

    assert listed("--failure", "error") == ids[:1]
    assert listed("--overdue") == [ids[1]]
    assert listed("--limit", "2") == ids[:2]
    assert listed("--limit", "2", "--after", str(ids[1])) == ids[2:4]
    sequencerd("list", "--limit", "2")
    assert f"--after {ids[1]}" in sequencerd.errors
    await defined.execute("UPDATE sequencer.sequences SET status = 'paused'")
    assert listed("--overdue") == []


# --- what it does


async def test_skip_continues_after_the_failed_step(
    sequencerd: Command, defined: asyncpg.Connection
) -> None:
    there, last = await enroll(defined, "s", "ada"), await enroll(defined, "t", "ada")
    await fail(defined, there, last, code="outcome_unknown")
    sequencerd("retry", "--failure", "outcome_unknown", "--skip", "--yes")
    moved, ended = await row(defined, there), await row(defined, last)
    assert (moved["step"], moved["status"], moved["visit"], moved["attempt"]) == (
        "wait",
        "active",
        2,
        0,
    )
    assert (ended["status"], ended["failure"]) == ("completed", None)
    assert await way(defined, there) == ["send failed", "send moved", "wait resumed"]
    assert await way(defined, last) == ["send failed", "send completed"]


async def test_cancel_ends_failed_enrollments_too(
    sequencerd: Command, defined: asyncpg.Connection
) -> None:
    ada, bob = [await enroll(defined, "s", name) for name in ("ada", "bob")]
    await fail(defined, ada, code="bad_data")
    sequencerd("cancel", str(ada), str(bob), "--yes")
    now = await row(defined, ada)
    assert (now["status"], now["failure"], now["last_error"]) == ("cancelled", None, "no")
    assert await way(defined, ada) == ["send failed", "send cancelled"]
    assert await way(defined, bob) == ["send cancelled"]
    sequencerd("cancel", str(ada), code=1)


async def test_move_enters_a_step_now_whether_failed_or_not(
    sequencerd: Command, defined: asyncpg.Connection
) -> None:
    ada, bob, eve = [await enroll(defined, "s", name) for name in ("ada", "bob", "eve")]
    await fail(defined, ada)
    await defined.execute("UPDATE sequencer.enrollments SET step = 'wait' WHERE id = $1", eve)
    told = json.loads(sequencerd("move", "--sequence", "s", "--to", "wait", "--yes", "--json"))
    assert (told["selected"], told["changed"]) == (2, 2)
    for id_ in (ada, bob):
        now = await row(defined, id_)
        assert (now["step"], now["status"], now["visit"]) == ("wait", "active", 2)
        assert now["ended_at"] is None
        assert "to wait by postgres" in await last_message(defined, id_, "moved")
    assert (await row(defined, eve))["visit"] == 2  # as before
    sequencerd("move", "--subject", "ada", "--to", "nowhere", code=1)
    assert "sequence 's' has no step 'nowhere'; available: " in sequencerd.errors


async def test_reevaluate_evaluates_and_is_recorded(
    sequencerd: Command, defined: asyncpg.Connection
) -> None:
    ada, bob = [await enroll(defined, "s", name) for name in ("ada", "bob")]
    await defined.execute(
        "UPDATE sequencer.enrollments SET entered_at = now(), wake_at = 'infinity'"
    )
    told = json.loads(sequencerd("reevaluate", "--subject", "ada", "--json"))
    assert told["changed"] == 1
    assert (await row(defined, ada))["wake_at"].year < 2100
    assert (await row(defined, bob))["wake_at"].year == 9999
    assert await way(defined, ada) == ["send reevaluated"]


async def test_a_subject_that_has_entered_again_is_unchanged(
    sequencerd: Command, defined: asyncpg.Connection
) -> None:
    first, other = [await enroll(defined, "s", name) for name in ("ada", "bob")]
    await fail(defined, first)
    second = await enroll(defined, "s", "ada")
    await fail(defined, second, other)
    told = json.loads(sequencerd("retry", "--sequence", "s", "--yes", "--json"))
    assert (told["changed"], told["entered_again"], told["unchanged"]) == (2, 1, 0)
    states = {id_: (await row(defined, id_))["status"] for id_ in (first, second, other)}
    assert sorted(states.values()) == ["active", "active", "failed"]
    assert states[other] == "active"
    left = first if states[first] == "failed" else second
    assert "the subject has entered the sequence again" in sequencerd("retry", str(left))


async def test_sequences_are_paused_and_resumed(
    sequencerd: Command, defined: asyncpg.Connection
) -> None:
    await enroll(defined, "s", "ada")
    paused = sequencerd("pause", "s", "t", "--reason", "wrong\ntext")
    assert "s is paused: 1 enrollment waits; nothing" in paused
    latest = json.loads(sequencerd("history", "s", "--json"))[0]
    assert latest["reason"].endswith(": wrong text")
    assert f"by {latest['by']} ({latest['reason']})\n" in sequencerd("history", "s")
    assert "s is paused already" in sequencerd("pause", "s")
    (told,) = json.loads(sequencerd("resume", "s", "--json"))
    assert told == {"name": "s", "before": "paused", "active": 1, "status": "active"}
    assert "t is archived" in sequencerd("archive", "t")
    sequencerd("pause", "s", "nowhere", code=1)
    assert "'nowhere' does not exist; available: s, t" in sequencerd.errors
    statuses = await defined.fetch("SELECT status FROM sequencer.sequences ORDER BY name")
    assert [one["status"] for one in statuses] == ["active", "archived"]


# --- beside a running engine


async def test_a_running_engine_applies_changes_at_once(
    sequencerd: Command, database: str, defined: asyncpg.Connection
) -> None:
    answers: list[Result] = [Failed("it is down", permanent=True), Answer()]

    async def behave(_: Task) -> Result:
        return answers.pop(0)

    async with running_engine(database, {"Note": Recorder(behave)}, sweep=3600):
        id_ = await enroll(defined, "s", "ada")
        await until(defined, "SELECT status = 'failed' FROM sequencer.enrollments")
        await asyncio.to_thread(sequencerd, "retry", str(id_))
        await until(defined, "SELECT step = 'wait' FROM sequencer.enrollments")


async def test_a_side_effect_in_progress_is_not_waited_for(
    sequencerd: Command, database: str, defined: asyncpg.Connection
) -> None:
    held = Held(Answer(message="sent"))
    async with running_engine(database, {"Note": Recorder(held)}):
        id_ = await enroll(defined, "s", "ada")
        await held.begun.wait()
        text = await asyncio.to_thread(sequencerd, "cancel", str(id_))
        assert "1 were executing a side effect, which is not undone" in text
        held.released.set()
        late = "SELECT count(*) = 1 FROM sequencer.events WHERE action = 'stale_result'"
        await until(defined, late)
    assert (await row(defined, id_))["status"] == "cancelled"
    assert "sent" in await last_message(defined, id_, "stale_result")


# --- many


@pytest.fixture
async def many(defined: asyncpg.Connection) -> asyncpg.Connection:
    """2,500 enrollments: two batches and a half."""
    await defined.execute(
        "INSERT INTO sequencer.enrollments (sequence, subject)"
        " SELECT 's', 'u' || n FROM generate_series(1, 2500) AS n"
    )
    return defined


CANCELLED = "SELECT count(*) FROM sequencer.enrollments WHERE status = 'cancelled'"


async def test_many_enrollments_are_changed_in_batches(
    sequencerd: Command, many: asyncpg.Connection
) -> None:
    assert "cancel: 2,500 enrollments" in sequencerd("cancel", "--sequence", "s", "--yes")
    assert await many.fetchval(CANCELLED) == 2500
    transactions = await many.fetchval(
        "SELECT count(DISTINCT xmin::text) FROM sequencer.enrollments"
    )
    assert transactions == 3
    assert bulk.BATCH_SIZE == 1000


class Terminal:
    """A command on a terminal of its own."""

    def __init__(self, process: asyncio.subprocess.Process, fd: int) -> None:
        self.process = process
        self.fd = fd
        self.text = ""

    async def expect(self, words: str) -> None:
        while words not in self.text:
            async with asyncio.timeout(PATIENCE):
                self.text += (await asyncio.to_thread(os.read, self.fd, 65536)).decode()

    def type(self, text: str) -> None:
        os.write(self.fd, text.encode())

    async def end(self) -> int:
        """Reads the rest. The exit code."""
        async with asyncio.timeout(PATIENCE):
            with suppress(OSError):  # no process has it open any more
                while data := await asyncio.to_thread(os.read, self.fd, 65536):
                    self.text += data.decode()
            return await self.process.wait()


@pytest.fixture
async def on_terminal(sequencerd: Command) -> AsyncIterator[Any]:
    terminals = []

    async def start(*arguments: str) -> Terminal:
        ours, theirs = pty.openpty()
        process = await start_sequencerd(
            *arguments,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=sequencerd.variables,
        )
        os.close(theirs)
        terminals.append(Terminal(process, ours))
        return terminals[-1]

    yield start
    for terminal in terminals:
        if terminal.process.returncode is None:
            terminal.process.kill()
            await terminal.process.wait()
        os.close(terminal.fd)


async def test_a_batch_is_repeated_after_a_deadlock(
    defined: asyncpg.Connection, sequencerd: Command
) -> None:
    await defined.execute(
        "CREATE SEQUENCE changes;"
        "CREATE FUNCTION conflict() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
        " IF nextval('changes') = 2 THEN RAISE 'deadlock' USING ERRCODE = '40P01'; END IF;"
        " RETURN NEW; END $$;"
        "CREATE TRIGGER conflict BEFORE UPDATE ON sequencer.enrollments"
        " FOR EACH ROW EXECUTE FUNCTION conflict()"
    )
    for name in ("ada", "bob", "eve"):
        await enroll(defined, "s", name)
    told = sequencerd("cancel", "--sequence", "s", "--yes", "--reason", "x")
    assert "3 enrollments" in told
    ended = "SELECT count(*) FROM sequencer.enrollments WHERE status = 'cancelled'"
    assert await defined.fetchval(ended) == 3


async def test_changes_of_several_enrollments_ask_for_confirmation(
    on_terminal: Any, many: asyncpg.Connection
) -> None:
    refused = await on_terminal("cancel", "--sequence", "s")
    await refused.expect("cancel 2,500 enrollments? [y/N] ")
    refused.type("\n")
    assert await refused.end() == 1
    assert "nothing was changed" in refused.text
    stopped = await on_terminal("cancel", "--sequence", "s")
    await stopped.expect("[y/N] ")
    stopped.process.send_signal(signal.SIGINT)
    assert await stopped.end() == 130
    assert await many.fetchval(CANCELLED) == 0
    agreed = await on_terminal("cancel", "--sequence", "s")
    await agreed.expect("[y/N] ")
    agreed.type("y\n")
    assert await agreed.end() == 0
    assert "cancel: 2,500 enrollments" in agreed.text
    assert "100%" in agreed.text  # the progress bar
    assert await many.fetchval(CANCELLED) == 2500


async def test_an_interrupted_change_reports_its_progress(
    on_terminal: Any, many: asyncpg.Connection, database: str
) -> None:
    other, last = await asyncpg.connect(database), await asyncpg.connect(database)
    held, until_the_end = many.transaction(), last.transaction()
    lock = "SELECT FROM sequencer.enrollments WHERE subject = $1 FOR UPDATE"
    await held.start()
    await many.execute(lock, "u1500")
    await until_the_end.start()  # so that it never gets past what it was told to leave
    await last.execute(lock, "u2500")
    command = await on_terminal("cancel", "--sequence", "s", "--yes")
    await until(
        other,
        "SELECT EXISTS (SELECT FROM pg_stat_activity"
        " WHERE application_name = 'sequencerd' AND wait_event_type = 'Lock'"
        " AND datname = current_database())",
    )
    command.process.send_signal(signal.SIGINT)
    await held.rollback()
    assert await command.end() == 130
    assert "interrupted: 2,000 of 2,500 enrollments done" in command.text
    assert await other.fetchval(CANCELLED) == 2000
    await other.close()
    await last.close()


async def test_enrollments_at_a_step_that_was_removed_can_be_named(
    sequencerd: Command, defined: asyncpg.Connection
) -> None:
    ada = await enroll(defined, "s", "ada")
    await fail(defined, ada)
    await defined.execute("UPDATE sequencer.steps SET next_step = NULL WHERE name = 'send'")
    await defined.execute("UPDATE sequencer.sequences SET first_step = 'wait' WHERE name = 's'")
    await defined.execute("DELETE FROM sequencer.steps WHERE sequence = 's' AND name = 'send'")
    assert "ada" in sequencerd("list", "--sequence", "s", "--step", "send")
    told = json.loads(sequencerd("cancel", "--sequence", "s", "--step", "send", "--yes", "--json"))
    assert told["changed"] == 1


@pytest.mark.slow
def test_commands_work_through_a_pooler_after_others(
    applied: Command, database: str, tmp_path: Path
) -> None:
    """Each is a process of its own, whose prepared statements would have the same names."""
    with pgbouncer(database, tmp_path) as through:
        applied.variables["SEQUENCERD_DATABASE"] = through
        applied.program("enroll", "s", "ada")
        file = tmp_path / "s.yaml"
        file.write_text(file.read_text().replace("amount: 3", "amount: 4"))
        for command in (
            ["reevaluate", "--subject", "ada"],
            ["plan", "s.yaml"],
            ["move", "--subject", "ada", "--to", "second"],
            ["cancel", "--subject", "ada"],
        ):
            applied.program(*command)
            assert not applied.errors
