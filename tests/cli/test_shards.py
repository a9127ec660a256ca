"""Every command over several shards as over one database."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path

import asyncpg
import pytest
from asyncpg.transaction import Transaction

from sequencerd.cli.arguments import make_parser
from sequencerd.cli.ids import Id, shard_of_id
from sequencerd.core.routing import shard_of
from sequencerd.errors import ArgumentError, SequencerdError
from sequencerd.storage import connections
from sequencerd.storage.connections import Shard
from sequencerd.storage.embedded import PostgresPrograms
from sequencerd.storage.every_shard import ask
from tests.helpers.clusters import cluster
from tests.helpers.command_line import Command, beside, start_sequencerd
from tests.helpers.databases import execute
from tests.helpers.engines import until
from tests.helpers.shards import NOWHERE, SEQUENCE, configure
from tests.helpers.waiting import PATIENCE

# --- all commands

NO_DATABASE = {"completion", "console-password", "demo", "install-service", "schema"}
ELSEWHERE = {
    "run": "tests/test_shards.py",
    "fdw": "tests/storage/test_fdw.py",
    "migrate": "tests/test_shards.py",
    "console": "tests/console/test_shards.py",
    "watch": "below",
    "tail": "below",
    "import-original": "tests/definitions/test_import_into_shards.py",
}
LISTED = ["id ", "a/1", "b/1", "a/2", "b/2"]
EXAMPLES: dict[str, tuple[list[str], Callable[[str], object]]] = {
    "apply": (["s.yaml"], lambda out: out == "s: nothing changed\n"),
    "plan": (["s.yaml"], lambda out: out == "s: nothing changed\n"),
    "check": (["s.yaml"], lambda out: "1 valid sequence" in out),
    "status": ([], lambda out: "first" in out and " 4 " in out),
    "list": ([], lambda out: [line[:3] for line in out.splitlines()] == LISTED),
    "show": (["b/2"], lambda out: "shard        b\nsubject      b2" in out),
    "history": (["s"], lambda out: out.count("revision 1, ") == 1),
    "export": (["s"], lambda out: out.count("name: s\n") == 1),
    "graph": (["s"], lambda out: "4" in out),
    "simulate": (["--from-enrollment", "b/1"], lambda out: "second" in out),
    "preview": (["m.yaml", "hello", "--enrollment", "b/2"], lambda out: "To: b2@" in out),
    "send-test": (["m.yaml", "hello", "--enrollment", "b/2", "--to", "b@x.org"], lambda out: True),
    "doctor": ([], lambda out: "a: schema" in out and "b: schema" in out),
    "grants": ([], lambda out: "-- shard a" in out and "-- shard b" in out),
    "enroll": (["s", "new"], lambda out: out.startswith(("enrolled as a/", "enrolled as b/"))),
    "holidays": (["DE", "2026"], lambda out: "a: DE: added 9" in out and "b: DE: added 9" in out),
    "bounce": ([], lambda out: "ignored" in out),
    "reevaluate": (["--sequence", "s", "--yes"], lambda out: "reevaluate: 5 enrollments" in out),
    "move": (["a/1", "b/1", "--to", "second", "--yes"], lambda out: "move: 2 enrollments" in out),
    "cancel": (["--subject", "b2"], lambda out: "cancel: 1 enrollment" in out),
    "retry": (["--sequence", "s", "--yes"], lambda out: "retry: 0 enrollments" in out),
    "pause": (["s"], lambda out: "s is paused: 4 enrollments" in out),
    "resume": (["s"], lambda out: "s is active: 4 enrollments" in out),
    "archive": (["s"], lambda out: "s is archived: 4 enrollments" in out),
    "export-subject": (["a1"], lambda out: json.loads(out)["enrollments"][0]["shard"] == "a"),
    "forget": (["a1", "--yes"], lambda out: "forgot a1: enrollments: 1" in out),
}
"""What each command prints of the two shards, in this order."""

MESSAGE = """
name: m
steps:
  - {name: hello, type: Email, config: {to: "{{subject}}@example.com", from: s@example.com,
     subject: Hello, text: Hello}}
"""


def test_every_command_works_on_all_shards(filled: Command, tmp_path: Path) -> None:
    (commands,) = (one.choices for one in make_parser()._actions if one.dest == "command")
    assert commands is not None
    assert {*commands} == {*EXAMPLES} | NO_DATABASE | {*ELSEWHERE}
    (tmp_path / "m.yaml").write_text(MESSAGE)
    for command, (arguments, is_right) in EXAMPLES.items():
        code = 1 if command == "send-test" else 0  # no server is set
        printed = filled(command, *arguments, code=code)
        assert is_right(printed), f"{command}: {printed}{filled.errors}"
        if command == "enroll":
            assert filled("list", "--subject", "new").count("new") == 1


def test_pages_of_a_list_go_through_all_shards(filled: Command) -> None:
    seen: list[str] = []
    after: list[str] = []
    while page := json.loads(filled("list", "--limit", "1", "--json", *after)):
        ((shard, id_),) = [(row["shard"], row["id"]) for row in page]
        seen.append(f"{shard}/{id_}")
        after = ["--after", seen[-1]]
    assert seen == ["a/1", "b/1", "a/2", "b/2"]
    filled("list", "--limit", "3")
    assert "next page: --after a/2" in filled.errors
    assert [row["id"] for row in json.loads(filled("list", "--shard", "b", "--json"))] == [1, 2]


def test_an_id_names_its_shard(filled: Command, database: str, tmp_path: Path) -> None:
    assert json.loads(filled("show", "b/2", "--json"))["shard"] == "b"
    assert "b2" in filled("show", "2", "--shard", "b")
    for arguments, code, message in (
        (["show", "2"], 2, "specify the shard of enrollment 2: a/2 or b/2"),
        (["show", "c/2"], 1, "there is no shard 'c'; available: a, b"),
        (["show", "b/2", "--shard", "a"], 1, "there is no shard 'b'; available: a"),
        (["retry", "a/1", "2"], 2, "specify the shard of enrollment 2"),
        (["show", "b/x"], 2, "'x' is not a positive integer"),
    ):
        filled(*arguments, code=code)
        assert message in filled.errors
    filled("show", "b/9", code=1)
    assert "enrollment b/9 does not exist" in filled.errors
    alone = Command(database, tmp_path)
    alone("show", "b/1", code=1)
    assert "there is no shard 'b'; there are none" in alone.errors


def test_the_hint_for_an_id_names_all_shards() -> None:
    shards = [Shard("", name=name) for name in "abc"]
    with pytest.raises(ArgumentError, match=r"of enrollment 1: a/1, b/1 or c/1$"):
        shard_of_id(shards, Id(None, 1))


async def test_wrong_ids_change_nothing_in_any_shard(
    filled: Command, shards: dict[str, asyncpg.Connection]
) -> None:
    filled("cancel", "a/1", "b/9", "--yes", code=1)
    assert "shard b: enrollment b/9 does not exist" in filled.errors
    assert "nothing was changed" in filled.errors
    filled("cancel", "a/1", "b/1", "--yes")
    for connection in shards.values():
        rows = await connection.fetch("SELECT id, status FROM sequencer.enrollments ORDER BY id")
        assert [tuple(row) for row in rows] == [(1, "cancelled"), (2, "active")]


def test_names_are_those_of_any_shard(filled: Command, tmp_path: Path) -> None:
    (tmp_path / "t.yaml").write_text(SEQUENCE.replace("name: s", "name: t"))
    filled("apply", "t.yaml", "--shard", "a")
    filled("enroll", "t", "x", "--shard", "a")
    assert "a/3" in filled("list", "--sequence", "t")
    assert filled("history", "t").startswith("revision 2 in a, ")
    assert "cancel: 1 enrollment" in filled("cancel", "--sequence", "t")
    filled("list", "--sequence", "u", code=1)
    assert "shard b: sequence 'u' does not exist" in filled.errors
    filled("export", "t", code=1)
    assert "the shards have different definitions of 't': a; b" in filled.errors
    assert "name: t" in filled("export", "t", "--shard", "a")
    filled("pause", "t", code=1)
    assert "shard b: sequence 't' does not exist" in filled.errors
    assert json.loads(filled("status", "t", "--json"))[0]["shards"] == ["a"]
    (tmp_path / "m.yaml").write_text(MESSAGE)
    filled("apply", "m.yaml", "--shard", "b")
    assert "hello" in filled("simulate", "m", "--runner", "Email=next")
    assert "To: subject@" in filled("preview", "m", "hello")
    filled("simulate", "u", code=1)
    assert "sequence 'u' does not exist" in filled.errors
    subject = next(f"x{n}" for n in range(20) if shard_of(f"x{n}", 2) == 0)
    filled("enroll", "m", subject, code=1)
    assert "shard a: sequence 'm' does not exist" in filled.errors
    filled("pause", "s", "--shard", "a")
    assert "a: paused; b: active" in filled("status", "s")
    assert not filled.errors


def test_subjects_of_all_kinds(filled: Command) -> None:
    for subject in ("zoë 王", "e\u0301", "😀" * 250, "a/7", "7", " ", "--help"):
        printed = filled("enroll", "s", "--", subject).split()[-1]
        name = "ab"[shard_of(subject, 2)]
        assert printed.startswith(f"{name}/"), subject
        (row,) = json.loads(filled("list", "--json", f"--subject={subject}"))
        assert (row["shard"], row["subject"]) == (name, subject)
    for subject, size in (("", "0"), ("é" * 501, "1,002")):
        filled("enroll", "s", subject, code=2)
        assert f"the subject has {size} bytes; it must have 1 to 1,000" in filled.errors
    for command in ("enroll s", "forget --yes", "list --subject"):
        filled(*command.split(), "caf\udce9", code=2)
        assert "the argument subject is not valid UTF-8" in filled.errors


async def test_forget_and_export_ask_all_shards(
    filled: Command, shards: dict[str, asyncpg.Connection]
) -> None:
    filled("enroll", "s", "subject-both", "--shard", "a", "--data", '{"e": "x"}')
    filled("enroll", "s", "subject-both", "--shard", "b")
    filled("enroll", "s", "other", "--shard", "b", "--data", '{"friend": "subject-both"}')
    exported = json.loads(filled("export-subject", "subject-both"))
    assert [row["shard"] for row in exported["enrollments"]] == ["a", "b"]
    assert exported["mentioned_in"] == ["b/4"]
    would = json.loads(filled("forget", "subject-both", "--dry-run", "--json"))
    assert (would["enrollments"], would["mentioned_in"]) == (2, ["b/4"])
    assert "forgot subject-both: enrollments: 2" in filled("forget", "subject-both", "--yes")
    for connection in shards.values():
        assert not await connection.fetchval(
            "SELECT count(*) FROM sequencer.enrollments WHERE subject = 'subject-both'"
        )


async def test_forget_finds_in_each_shard_the_addresses_that_another_knows(
    filled: Command, shards: dict[str, asyncpg.Connection]
) -> None:
    """A recipient that unsubscribes is suppressed in all shards."""
    data = {"email": "ada@example.com", "phones": [491512345678]}
    filled("enroll", "s", "customer-1", "--shard", "a", "--data", json.dumps(data))
    for connection in shards.values():
        await connection.execute(
            "INSERT INTO sequencer.suppressions (channel, address, reason, source)"
            " VALUES ('email', 'ada@example.com', 'by ada@example.com', 'recipient'),"
            " ('sms', '+491512345678', '', 'recipient'),"
            " ('email', 'bob@example.com', '', 'recipient')"
        )
    held = json.loads(filled("export-subject", "customer-1"))["suppressions"]
    assert sorted((one["shard"], one["channel"]) for one in held) == [
        ("a", "email"),
        ("a", "sms"),
        ("b", "email"),
        ("b", "sms"),
    ]
    assert "suppressed addresses: 4" in filled("forget", "customer-1", "--yes")
    for connection in shards.values():
        rows = await connection.fetch("SELECT address FROM sequencer.suppressions")
        known = sorted(row["address"] for row in rows if not row["address"].startswith("sha256:"))
        assert (len(rows), known) == (3, ["bob@example.com"])


async def test_data_nested_too_deeply_are_exported_and_forgotten_shard_by_shard(
    filled: Command, shards: dict[str, asyncpg.Connection]
) -> None:
    deep = '{"a": ' * 5000 + "1" + "}" * 5000
    filled("enroll", "s", "deep", "--shard", "a", "--data", '{"a": 1}')
    await shards["a"].execute(
        "UPDATE sequencer.enrollments SET data = $1::text::jsonb WHERE subject = 'deep'", deep
    )
    for command in ("export-subject", "forget"):
        filled(command, "deep", *(["--yes"] if command == "forget" else []), code=1)
        assert "the data in shard a cannot be read (it is nested more than 200" in filled.errors
        assert "name each shard by itself, with --shard" in filled.errors
    assert "}" * 5000 in filled("export-subject", "deep", "--shard", "a")
    assert "forgot deep: enrollments: 1" in filled("forget", "deep", "--yes", "--shard", "a")


# --- one shard that is away

READING = (
    ["status"],
    ["list"],
    ["history", "s"],
    ["export", "s"],
    ["graph", "s"],
    ["plan", "s.yaml"],
    ["doctor"],
    ["export-subject", "a1"],
    ["cancel", "--subject", "a1", "--dry-run"],
)


def test_reading_commands_report_missing_shards(filled: Command, shards_url: str) -> None:
    whole = {tuple(arguments): filled(*arguments) for arguments in READING}
    configure(filled, a=shards_url, b=NOWHERE)
    for arguments in READING:
        printed = filled(*arguments, code=1)
        assert printed, arguments
        missing = printed if arguments == ["doctor"] else filled.errors
        assert "b: " in missing, arguments
        assert "cannot connect to the database" in missing
        if arguments[0] in ("history", "export"):
            assert printed == whole[tuple(arguments)]
    same = [one for one in filled("doctor", code=1).splitlines() if "of the shards" in one]
    assert {line.partition(": ")[2] for line in same} == {"cannot be compared"}
    for command in ("history", "export", "status", "simulate"):
        filled(command, "u", code=1)
        assert filled.errors.startswith("sequencerd: shard b: cannot connect"), command
        assert "sequence 'u' does not exist" in filled.errors
    assert filled("show", "a/1")
    filled("show", "b/1", code=1)
    assert filled.errors.startswith("sequencerd: shard b: cannot connect to the database")
    assert "second" in filled("simulate", "s")
    configure(filled, a=NOWHERE, b=shards_url)
    assert "second" in filled("simulate", "s")
    configure(filled, a=NOWHERE, b=NOWHERE)
    filled("status", code=1)
    assert [line.split(":")[0] for line in filled.errors.splitlines()] == ["sequencerd", "shard b"]


def test_writing_commands_report_missing_shards(filled: Command, shards_url: str) -> None:
    configure(filled, a=shards_url, b=NOWHERE)
    assert "s is paused in a: 2 enrollments" in filled("pause", "s", code=1)
    assert "shard b: cannot connect" in filled.errors
    filled("forget", "a1", "--yes", code=1)
    assert "shard b: cannot connect" in filled.errors
    assert "nothing was forgotten: each shard may have" in filled.errors
    assert "forgot a1: enrollments: 1" in filled("forget", "a1", "--yes", "--shard", "a")
    assert "cancel: 1 enrollment" in filled("cancel", "--sequence", "s", code=1)
    assert "shard b: cannot connect" in filled.errors
    filled("bounce", stdin=BOUNCE, code=75)
    assert "the mail server should try again" in filled.errors


def test_a_read_only_shard_refuses_only_its_own_changes(filled: Command, shards_url: str) -> None:
    refuses = f"{shards_url}{'&' if '?' in shards_url else '?'}options="
    configure(filled, a=shards_url, b=f"{refuses}-cdefault_transaction_read_only%3Don")
    assert "a: paused; b: active" in filled("pause", "s", code=1) + filled("status")
    filled("cancel", "a/1", "--yes")
    for command in ("cancel b/1", "apply s.yaml", "holidays DE 2026", "enroll s x --shard b"):
        filled(*command.split(), code=1)
        assert "shard b: the database is read-only: it is a standby, or" in filled.errors


BOUNCE = b"""\
From: MAILER-DAEMON@example.com
Content-Type: multipart/report; report-type=delivery-status; boundary=x

--x
Content-Type: text/plain

It does not exist.
--x
Content-Type: message/delivery-status

Reporting-MTA: dns; example.com

Final-Recipient: rfc822; ada@example.com
Action: failed
Status: 5.1.1
--x
Content-Type: message/rfc822

Message-ID: <1.1.0123456789abcdef0123456789abcdef@example.com>

--x--
"""


# --- apply: all or none


EDITED = SEQUENCE.replace("amount: 3", "amount: 4")
WITH_REVISION = "SELECT count(*) FROM sequencer.steps WHERE config->>'amount' = '4'"
NOBODY = "synchronous_standby_names"
"""With this set, a commit waits for a standby that does not exist."""


async def have_revision(shards: dict[str, asyncpg.Connection]) -> list[str]:
    return [name for name, one in shards.items() if await one.fetchval(WITH_REVISION)]


async def test_apply_changes_nothing_where_one_shard_refuses(
    filled: Command, shards: dict[str, asyncpg.Connection], tmp_path: Path
) -> None:
    """By a constraint trigger that is deferred to the end of the transaction."""
    await shards["b"].execute(
        """
        CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS
            $$BEGIN RAISE check_violation USING MESSAGE = 'not four'; END$$;
        CREATE CONSTRAINT TRIGGER refuse AFTER UPDATE ON sequencer.steps
            DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION refuse();
        """
    )
    (tmp_path / "s.yaml").write_text(EDITED)
    filled("apply", "s.yaml", code=1)
    assert "shard b: the database rejected the command: not four\n" in filled.errors
    assert "nothing was changed in any shard" in filled.errors
    assert await have_revision(shards) == []
    await shards["b"].execute("DROP TRIGGER refuse ON sequencer.steps")
    assert "changed first: config.amount 3 → 4" in filled("apply", "s.yaml")
    assert await have_revision(shards) == ["a", "b"]


def test_apply_changes_nothing_where_one_shard_is_away(
    filled: Command, shards_url: str, tmp_path: Path
) -> None:
    configure(filled, a=shards_url, b=NOWHERE)
    (tmp_path / "s.yaml").write_text(EDITED)
    filled("apply", "s.yaml", code=1)
    assert "shard b: cannot connect" in filled.errors
    assert "nothing was changed in any shard" in filled.errors
    assert "amount: 3" in filled("export", "s", "--shard", "a")


@asynccontextmanager
async def commits_wait(url: str) -> AsyncIterator[str]:
    """Yield a URL of the same database on which a commit waits until the end of the block."""
    await execute(url, f"ALTER SYSTEM SET {NOBODY} = 'nobody'")
    await execute(url, "SELECT pg_reload_conf()")
    try:
        yield f"{url}{'&' if '?' in url else '?'}options=-csynchronous_commit%3Don"
    finally:
        await execute(url, f"ALTER SYSTEM RESET {NOBODY}")
        await execute(url, "SELECT pg_reload_conf()")


COMMITTING = """
SELECT EXISTS (SELECT FROM pg_stat_activity
                WHERE wait_event = 'SyncRep' AND datname = current_database())
"""
WAITS = "wait_event = 'SyncRep'"
KILL = """
SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity
 WHERE datname = current_database() AND application_name = 'sequencerd'
   AND state = 'idle in transaction'
"""


async def test_apply_reports_a_shard_that_dies_before_its_commit(
    filled: Command,
    shards: dict[str, asyncpg.Connection],
    tmp_path: Path,
    shards_url: str,
) -> None:
    """The commit in a takes its time; b loses the prepared transaction in the meantime."""
    (tmp_path / "s.yaml").write_text(EDITED)
    fingerprint = filled("plan", "s.yaml").split()[-1]
    async with commits_wait(shards_url) as slow:
        configure(filled, a=slow, b=shards_url)
        applying = asyncio.create_task(
            asyncio.to_thread(filled, "apply", "s.yaml", "--plan", fingerprint, code=1)
        )
        await until(shards["b"], COMMITTING)
        assert await shards["b"].fetchval(KILL) == 1
    await applying
    assert "shard b: " in filled.errors
    assert "the revision is in a, not in b; repeat the command without --plan" in filled.errors
    assert await have_revision(shards) == ["a"]

    configure(filled, a=shards_url, b=shards_url)
    assert filled("plan", "s.yaml").splitlines()[:3] == [
        "s in a: nothing changed",
        "s in b:",
        "  changed first: config.amount 3 → 4",
    ]
    assert "the shards have different definitions of s" in filled("plan", "s.yaml")
    found = json.loads(filled("doctor", "--json"))
    (of_definitions,) = [one for one in found if one["about"] == "definitions of the shards"]
    filled("status")
    assert "the shards have different definitions of s (a | b)\n" in filled.errors
    assert (of_definitions["seen"], of_definitions["shard"]) == ("differ: s (a | b)", None)
    assert "s in b:\n  changed first" in filled("apply", "s.yaml")
    assert await have_revision(shards) == ["a", "b"]
    assert filled("apply", "s.yaml") == "s: nothing changed\n"
    assert filled("history", "s").startswith("revision 2 in a, revision 3 in b, ")


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
async def test_a_rollback_interrupted_between_commits_is_completed_by_another(
    filled: Command,
    shards: dict[str, asyncpg.Connection],
    tmp_path: Path,
    shards_url: str,
    end: signal.Signals,
) -> None:
    (tmp_path / "s.yaml").write_text(EDITED)
    filled("apply", "s.yaml")
    (tmp_path / "s.yaml").write_text(filled("export", "s", "--revision", "1"))
    async with commits_wait(shards_url) as slow:
        configure(filled, a=slow, b=shards_url)
        applying = await start_sequencerd(
            "apply", "s.yaml", env=filled.variables, cwd=tmp_path, stderr=asyncio.subprocess.PIPE
        )
        await until(shards["b"], COMMITTING)
        applying.send_signal(end)
        _, errors = await applying.communicate()
    assert applying.returncode == (130 if end == signal.SIGINT else -end)
    if end != signal.SIGKILL:
        assert (
            b"interrupted: the revision is not in b, it is not known whether it is in a" in errors
        )
    configure(filled, a=shards_url, b=shards_url)
    await until(shards["a"], WITH_REVISION.replace("count(*)", "count(*) = 0"))
    assert await have_revision(shards) == ["b"]
    assert "s in a: nothing changed" in filled("plan", "s.yaml")
    assert "s in b:\n  changed first: config.amount 4 → 3" in filled("apply", "s.yaml")
    assert await have_revision(shards) == []


LOCKED = """
SELECT EXISTS (SELECT FROM pg_stat_activity WHERE datname = current_database()
                 AND application_name = 'sequencerd' AND wait_event_type = 'Lock')
"""


async def test_an_interrupted_change_names_the_shards_that_have_it() -> None:
    waits, reported = asyncio.Event(), list[str]()

    async def work(shard: Shard) -> None:
        if shard.name != "a":
            waits.set()
            await asyncio.sleep(PATIENCE)

    async def explain(_: Shard, error: BaseException) -> SequencerdError:
        raise error

    shards = [Shard("", name=name) for name in "abc"]
    asking = asyncio.create_task(ask(explain, shards, work, warn=reported.append))
    await waits.wait()
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    assert reported == ["interrupted: done in a, perhaps not in b, c; repeat the command"]


async def interrupt_at_locked_table(
    command: Command, shards: dict[str, asyncpg.Connection], table: str, *arguments: str
) -> bytes:
    """Execute a command on two shards, send it SIGTERM when it waits for a table of the second one,
    and return what it reports.
    """
    async with shards["b"].transaction():
        await shards["b"].execute(f"LOCK TABLE sequencer.{table}")
        process = await start_sequencerd(
            *arguments, env=command.variables, cwd=command.folder, stderr=asyncio.subprocess.PIPE
        )
        await until(shards["a"], LOCKED)
        process.send_signal(signal.SIGTERM)
        _, errors = await process.communicate()
    assert process.returncode == -signal.SIGTERM
    return errors


async def test_an_interrupted_pause_is_reported(
    filled: Command, shards: dict[str, asyncpg.Connection]
) -> None:
    errors = await interrupt_at_locked_table(filled, shards, "sequences", "pause", "s")
    assert re.search(rb"interrupted: .*not in .*b; repeat the command", errors)


async def test_an_apply_interrupted_before_its_commit_changes_nothing(
    filled: Command, shards: dict[str, asyncpg.Connection], tmp_path: Path
) -> None:
    (tmp_path / "s.yaml").write_text(EDITED)
    errors = await interrupt_at_locked_table(filled, shards, "steps", "apply", "s.yaml")
    assert b"interrupted: nothing was changed in any shard\n" in errors
    assert await have_revision(shards) == []


async def test_the_outcome_of_a_commit_without_an_answer_is_found(
    filled: Command,
    shards: dict[str, asyncpg.Connection],
    tmp_path: Path,
    shards_url: str,
) -> None:
    (tmp_path / "s.yaml").write_text(EDITED)
    async with commits_wait(shards_url) as slow:
        configure(filled, a=slow, b=shards_url)
        applying = asyncio.create_task(asyncio.to_thread(filled, "apply", "s.yaml"))
        await until(shards["b"], COMMITTING)
        assert await shards["b"].fetchval(KILL.replace("state = 'idle in transaction'", WAITS)) == 1
        assert "changed first" in await applying
    assert await have_revision(shards) == ["a", "b"]


async def test_apply_changes_nothing_if_the_first_commit_fails(
    filled: Command,
    shards: dict[str, asyncpg.Connection],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "s.yaml").write_text(EDITED)
    commit = Transaction.commit

    async def cut(self: Transaction) -> None:
        self._connection.terminate()
        await commit(self)

    monkeypatch.setattr(Transaction, "commit", cut)
    filled("apply", "s.yaml", code=1)
    assert "shard a: " in filled.errors
    assert "nothing was changed in any shard" in filled.errors
    assert await have_revision(shards) == []


async def test_apply_over_a_server_that_stops_before_its_commit(
    filled: Command,
    shards: dict[str, asyncpg.Connection],
    tmp_path: Path,
    shards_url: str,
) -> None:
    """It cannot be asked whether its commit has succeeded."""
    (tmp_path / "s.yaml").write_text(EDITED)
    with ExitStack() as stack:
        other = stack.enter_context(cluster(PostgresPrograms.find()))
        configure(filled, a=shards_url, b=other)
        filled("migrate")
        async with commits_wait(shards_url) as slow:
            configure(filled, a=slow, b=other)
            applying = asyncio.create_task(asyncio.to_thread(filled, "apply", "s.yaml", code=1))
            await until(shards["a"], COMMITTING)
            stack.close()
        await applying
    assert "the revision is in a, it is not known whether it is in b" in filled.errors
    assert await have_revision(shards) == ["a"]


async def test_two_applies_at_the_same_time_do_not_deadlock(
    filled: Command, tmp_path: Path, shards_url: str
) -> None:
    (tmp_path / "s.yaml").write_text(EDITED)
    (tmp_path / "t.yaml").write_text(SEQUENCE.replace("name: s", "name: t"))
    both = (
        start_sequencerd(
            "apply",
            f"{name}.yaml",
            env=filled.variables,
            cwd=tmp_path,
        )
        for name in "st"
    )
    processes = await asyncio.gather(*both)
    async with asyncio.timeout(PATIENCE):
        assert [await one.wait() for one in processes] == [0, 0]


# --- plan


async def test_a_plan_adds_up_the_shards(
    filled: Command, shards: dict[str, asyncpg.Connection], tmp_path: Path
) -> None:
    await shards["a"].execute("CREATE TABLE customers AS VALUES ('x'), ('y')")
    await shards["a"].execute("ALTER TABLE customers RENAME column1 TO subject")
    for connection in shards.values():
        await connection.execute("UPDATE sequencer.enrollments SET entered_at = now()")
    enroll = "enroll: {from: public.customers, every: {amount: 1, unit: days}}\n"
    (tmp_path / "s.yaml").write_text(EDITED + enroll)
    planned = filled("plan", "s.yaml")
    assert "4 wait at first: " in planned
    assert "4 of public.customers would enter now" in planned
    removed = SEQUENCE.replace("name: first", "name: other")
    (tmp_path / "s.yaml").write_text(removed)
    filled("plan", "s.yaml", code=1)
    assert "s: 4 enrollments at first, which is removed" in filled.errors
    assert "4 move from first to other" in filled("plan", "s.yaml", "--move", "first=other")
    planned = json.loads(filled("plan", "s.yaml", "--move", "first=other", "--json"))
    assert planned["sequences"][0]["shards"] == ["a", "b"]
    filled("apply", "s.yaml", "--move", "first=other", "--plan", "0123456789ab", code=1)
    assert "plan 0123456789ab no longer holds" in filled.errors
    applied = filled("apply", "s.yaml", "--move", "first=other", "--plan", planned["plan"])
    assert "4 move from first to other" in applied


# --- shards that do not answer


def test_a_server_that_does_not_answer_is_given_up(
    filled: Command, shards_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "CONNECT_TIMEOUT", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        configure(filled, a=shards_url, b=f"postgresql://127.0.0.1:{silent.getsockname()[1]}/app")
        assert "a/1" in filled("list", code=1)
    assert "shard b: cannot connect to the database: no answer within 0.3" in filled.errors


async def test_a_statement_without_an_answer_is_given_up(
    filled: Command, shards: dict[str, asyncpg.Connection], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sequencerd.cli.commands.STATEMENT_TIMEOUT", 0.5)
    async with shards["b"].transaction():
        await shards["b"].execute("LOCK TABLE sequencer.enrollments IN ACCESS EXCLUSIVE MODE")
        assert "a/1" in filled("list", code=1)
        assert "shard b: the database did not answer within 0.5 seconds" in filled.errors
        assert "first" in filled("status", code=1)


async def test_tail_follows_all_shards(
    filled: Command, shards: dict[str, asyncpg.Connection]
) -> None:
    """It continues while one is unavailable, and includes that one again when it is back."""
    async with beside(filled, "tail", "--since", "600") as (out, errors):
        filled("cancel", "a/1", "b/2", "--yes")
        lines = [(await out.readline()).decode().split()[2] for _ in range(2)]
        assert sorted(lines) == ["a/1", "b/2"]
        await shards["b"].execute("ALTER TABLE sequencer.events RENAME TO hidden")
        assert b"shard b: the database rejected" in await errors.readline()
        filled("cancel", "a/2")
        assert b"a/2" in await out.readline()
        await shards["b"].execute("ALTER TABLE sequencer.hidden RENAME TO events")
        assert b"shard b is back" in await errors.readline()
        filled("cancel", "b/1")
        assert b"b/1" in await out.readline()


async def test_watch_adds_up_shards_and_names_missing_ones(
    filled: Command, shards_url: str
) -> None:
    configure(filled, a=shards_url, b=NOWHERE)
    async with beside(filled, "watch", "--interval", "0.1") as (out, errors):
        assert b"shard b: cannot connect" in await errors.readline()
        assert b"change" in await out.readline()
    async with beside(filled, "watch", "of-b", "--interval", "0.1") as (out, errors):
        for _ in range(2):  # until it is back
            assert b"shard b: cannot connect" in await errors.readline()


# --- doctor


def test_doctor_compares_the_shards(filled: Command) -> None:
    filled("holidays", "DE", "2026", "--shard", "a")
    found = {
        one["about"]: one for one in json.loads(filled("doctor", "--json")) if not one["shard"]
    }
    assert found["holidays of the shards"]["seen"] == "differ: DE (a | b)"
    assert found["definitions of the shards"]["seen"] == "the same in all"
    assert found["server of the shards"]["level"] == "ok"
