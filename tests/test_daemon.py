"""The real daemon as a process: signals, crashes, several of them, mail to a real SMTP server."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from email import message_from_bytes
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from aiosmtpd.smtp import SMTP

from tests.helpers.command_line import Command, start_sequencerd
from tests.helpers.engines import ALL_ENDED, define, enroll, running_engine, until, way
from tests.helpers.runners import email_runner, http_runner
from tests.helpers.servers import Answer, Request, http_server
from tests.helpers.waiting import PATIENCE

MAIL = (
    '{"from": "hi@example.com", "to": "{{subject}}@example.com", "subject": "Hello",'
    ' "text": "Hi {{subject}}"}'
)
SHORT = '{"amount": 50, "unit": "milliseconds"}'


class Mailbox:
    """A real SMTP server, and how often each recipient got a mail."""

    def __init__(self) -> None:
        self.received: Counter[tuple[str, str]] = Counter()  # by address and Message-ID
        self.seconds = 0.0  # that it takes for each

    async def handle_DATA(self, _server: object, _session: object, envelope: Any) -> str:  # noqa: N802
        message = message_from_bytes(envelope.content)
        await asyncio.sleep(self.seconds)
        self.received[envelope.rcpt_tos[0], message["Message-ID"]] += 1
        return "250 OK"


@pytest.fixture
async def mailbox() -> AsyncIterator[tuple[Mailbox, str]]:
    box = Mailbox()
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: SMTP(box), "127.0.0.1", 0)
    yield box, f"smtp://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    server.close()


@asynccontextmanager
async def daemon(url: str, smtp: str, **settings: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """A daemon that is ready, and has been stopped in good order if it still runs at the end."""
    variables = {
        "SEQUENCERD_DATABASE": url,
        "SEQUENCERD_SMTP_URL": smtp,
        "SEQUENCERD_LOG_FORMAT": "json",
        **settings,
    }
    process = await start_sequencerd(
        "run",
        env={**os.environ, **variables},
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stderr is not None
    async with asyncio.timeout(PATIENCE):
        line = b""
        while b'"ready"' not in line:
            line = await process.stderr.readline()
            assert line, f"ended with {await process.wait()}"
    reader = asyncio.create_task(process.stderr.read())
    try:
        yield process
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
        code = await process.wait()
        errors = (await reader).decode()
    if code != -signal.SIGKILL:
        assert code == 0, errors
        assert '"level": "error"' not in errors, errors
        assert '"stopped"' in errors


async def mail_sequence(connection: asyncpg.Connection, number: int, mail: str = MAIL) -> None:
    await define(
        connection,
        "s",
        ("hello", "Email", mail, "pause"),
        ("pause", "WaitForDuration", SHORT, "bye"),
        ("bye", "Email", mail.replace("Hello", "Bye"), None),
    )
    await connection.execute(
        "INSERT INTO sequencer.enrollments (sequence, subject)"
        " SELECT 's', 'u' || n FROM generate_series(1, $1::int) AS n",
        number,
    )


WAITS_FOR_MIGRATIONS = (
    "SELECT count(*) = 1 FROM pg_locks"
    " WHERE NOT granted AND relation = 'sequencer.migrations'::regclass"
)


@pytest.mark.parametrize("arguments", [("run",), ("console", "--listen", "127.0.0.1:0")])
async def test_a_start_that_waits_for_a_locked_table_can_be_stopped(
    sequencerd: Command, connection: asyncpg.Connection, arguments: tuple[str, ...]
) -> None:
    async with connection.transaction(), asyncio.timeout(PATIENCE):
        await connection.execute("LOCK TABLE sequencer.migrations IN ACCESS EXCLUSIVE MODE")
        process = await start_sequencerd(*arguments, env=sequencerd.variables)
        try:
            await until(connection, WAITS_FOR_MIGRATIONS)
            process.send_signal(signal.SIGTERM)
            assert await process.wait() == 0
        finally:
            if process.returncode is None:
                process.kill()


COMPLETED = "SELECT count(*) FROM sequencer.enrollments WHERE status = 'completed'"


async def test_every_mail_arrives_exactly_once(
    database: str, connection: asyncpg.Connection, mailbox: tuple[Mailbox, str]
) -> None:
    box, smtp = mailbox
    async with daemon(database, smtp):
        await mail_sequence(connection, 100)
        await until(connection, ALL_ENDED)
    assert await connection.fetchval(COMPLETED) == 100
    assert len(box.received) == 200
    assert set(box.received.values()) == {1}
    for id_ in (1, 100):
        assert await way(connection, id_) == [
            "hello enrolled",
            "hello next",
            "pause next",
            "bye next",
            "bye completed",
        ]


async def test_a_stop_in_the_middle_loses_and_repeats_nothing(
    database: str, connection: asyncpg.Connection, mailbox: tuple[Mailbox, str]
) -> None:
    box, smtp = mailbox
    box.seconds = 0.03
    async with daemon(database, smtp):
        await mail_sequence(connection, 100)
        await until(connection, "SELECT count(*) > 10 FROM sequencer.events WHERE action = 'next'")
    leased = "SELECT count(*) FROM sequencer.enrollments WHERE leased_by IS NOT NULL"
    assert await connection.fetchval(leased) == 0
    spent = await connection.fetch(
        "SELECT * FROM sequencer.events WHERE action = 'retry' AND message NOT LIKE 'interrupted%'"
    )
    assert not spent
    waiting = "SELECT max(attempt) FROM sequencer.enrollments WHERE status = 'active'"
    assert await connection.fetchval(waiting) == 0
    assert not await connection.fetchval(ALL_ENDED)
    async with daemon(database, smtp):
        await until(connection, ALL_ENDED)
    assert len(box.received) == 200
    assert set(box.received.values()) == {1}


@pytest.mark.parametrize("others", [0, 1])
async def test_a_kill_in_the_middle_loses_nothing(
    database: str, connection: asyncpg.Connection, mailbox: tuple[Mailbox, str], others: int
) -> None:
    box, smtp = mailbox
    box.seconds = 0.03
    short = {"SEQUENCERD_ENGINE_LEASE": "1", "SEQUENCERD_ENGINE_SWEEP": "0.5"}
    async with daemon(database, smtp, **short) as first:
        if others:
            async with daemon(database, smtp, **short):
                await kill_in_the_middle(connection, first)
                await until(connection, ALL_ENDED)
        else:
            await kill_in_the_middle(connection, first)
    async with daemon(database, smtp, **short):
        await until(connection, ALL_ENDED)
    assert await connection.fetchval(COMPLETED) == 100
    # one mail for each visit; a second only where an event says that a lease ran out
    assert len(box.received) == 200
    expired = await connection.fetch(
        "SELECT enrollment_id, visit FROM sequencer.events WHERE action = 'lease_expired'"
    )
    twice = [key for key, count in box.received.items() if count > 1]
    assert len(expired) > 0
    assert len(twice) <= len(expired)
    visits = {f"<{row['enrollment_id']}.{row['visit']}." for row in expired}
    for _, message_id in twice:
        assert any(message_id.startswith(visit) for visit in visits), message_id


async def test_a_kill_repeats_nothing_with_at_most_once(
    database: str, connection: asyncpg.Connection, mailbox: tuple[Mailbox, str]
) -> None:
    box, smtp = mailbox
    box.seconds = 0.03
    short = {"SEQUENCERD_ENGINE_LEASE": "1", "SEQUENCERD_ENGINE_SWEEP": "0.5"}
    async with daemon(database, smtp, **short) as first:
        once = MAIL.replace("{", '{"delivery": "at_most_once", ', 1)
        await kill_in_the_middle(connection, first, once)
    async with daemon(database, smtp, **short):
        await until(connection, ALL_ENDED)
    assert set(box.received.values()) == {1}
    unknown = await connection.fetch(
        "SELECT id, visit, last_error FROM sequencer.enrollments WHERE failure = 'outcome_unknown'"
    )
    assert unknown
    assert all("check its outcome" in row["last_error"] for row in unknown)
    completed = await connection.fetchval(COMPLETED)
    assert completed + len(unknown) == 100
    # of those that are unknown some have arrived: only the mail server could know
    assert 2 * completed <= len(box.received) <= 2 * 100


async def test_suppressed_recipients_get_nothing_and_continue(
    database: str, connection: asyncpg.Connection, mailbox: tuple[Mailbox, str]
) -> None:
    box, smtp = mailbox
    await connection.execute(
        "INSERT INTO sequencer.suppressions (channel, address) VALUES ('email', ' U1@Example.com ')"
    )
    async with daemon(database, smtp):
        await mail_sequence(connection, 2)
        await until(connection, ALL_ENDED)
    assert {address for address, _ in box.received} == {"u2@example.com"}
    assert await connection.fetchval(COMPLETED) == 2
    said = "SELECT message FROM sequencer.events WHERE enrollment_id = 1 AND step = 'hello'"
    assert (await connection.fetch(said + " AND action = 'suppressed'"))[0]["message"] == (
        "not sent to u1@example.com"
    )


async def test_an_opt_out_from_promotions_stops_no_invoice(
    database: str, connection: asyncpg.Connection, mailbox: tuple[Mailbox, str]
) -> None:
    box, smtp = mailbox
    mail = {"from": "a@x.org", "to": "{{data.email}}", "text": "x"}
    offer = json.dumps({**mail, "subject": "offer"})
    invoice = json.dumps({**mail, "subject": "invoice", "topic": "invoices"})
    await connection.execute(
        "INSERT INTO sequencer.suppressions (channel, address, topic)"
        " VALUES ('email', 'ada@x.org', 'marketing'), ('email', 'bob@x.org', '*')"
    )
    async with daemon(database, smtp):
        await define(
            connection, "s", ("offer", "Email", offer, "bill"), ("bill", "Email", invoice, None)
        )
        await connection.execute("UPDATE sequencer.sequences SET topic = 'marketing'")
        for name in ("ada", "bob", "eve"):
            await enroll(connection, "s", name, f'{{"email": "{name}@x.org"}}')
        await until(connection, ALL_ENDED)
    assert sorted(address for address, _ in box.received) == ["ada@x.org", "eve@x.org", "eve@x.org"]
    events = await connection.fetch(
        "SELECT step, message FROM sequencer.events WHERE action = 'suppressed'"
        " ORDER BY enrollment_id, at"
    )
    assert [tuple(row) for row in events] == [
        ("offer", "not sent to ada@x.org (topic marketing)"),
        ("offer", "not sent to bob@x.org"),
        ("bill", "not sent to bob@x.org"),
    ]


async def test_a_server_that_never_answers_delays_no_mail(
    database: str, connection: asyncpg.Connection, mailbox: tuple[Mailbox, str]
) -> None:
    asked = 0

    async def never_answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal asked
        asked += 1
        await connection_lost.wait()
        writer.close()

    connection_lost = asyncio.Event()
    server = await asyncio.start_server(never_answer, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    stuck = http_runner(f"http://127.0.0.1:{port}/", name="Stuck", allow_private=True)
    box, smtp = mailbox
    mail = email_runner(smtp)
    async with running_engine(database, {"Stuck": stuck, "Email": mail}, stop_timeout=0):
        await define(connection, "stuck", ("work", "Stuck", "{}", None))
        await connection.execute(
            "INSERT INTO sequencer.enrollments (sequence, subject)"
            " SELECT 'stuck', 'u' || n FROM generate_series(1, 100) AS n"
        )
        await until(
            connection,
            "SELECT EXISTS (SELECT FROM sequencer.enrollments WHERE leased_by IS NOT NULL)",
        )
        await mail_sequence(connection, 20)
        await until(
            connection,
            "SELECT count(*) = 20 FROM sequencer.enrollments WHERE status = 'completed'",
        )
    assert asked > 0
    assert len(box.received) == 40
    connection_lost.set()
    server.close()
    await stuck.close()
    await mail.close()


async def kill_in_the_middle(
    connection: asyncpg.Connection, process: asyncio.subprocess.Process, mail: str = MAIL
) -> None:
    await mail_sequence(connection, 100, mail)
    await until(connection, "SELECT count(*) > 20 FROM sequencer.events WHERE action = 'next'")
    process.kill()
    await process.wait()


async def test_a_daemon_survives_a_restart_of_the_database(
    database: str, connection: asyncpg.Connection, mailbox: tuple[Mailbox, str]
) -> None:
    box, smtp = mailbox
    box.seconds = 0.05
    async with daemon(database, smtp):
        await mail_sequence(connection, 50)
        for _ in range(3):
            await asyncio.sleep(0.2)
            await connection.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )
        await enroll(connection, "s", "late")
        await until(connection, ALL_ENDED)
        # it still listens, or listens again
        id_ = await enroll(connection, "s", "later")
        await until(
            connection, "SELECT status = 'completed' FROM sequencer.enrollments WHERE id = $1", id_
        )
    assert len(box.received) == 104
    assert set(box.received.values()) == {1}


async def test_no_message_contains_a_secret_of_the_settings(
    database: str, connection: asyncpg.Connection, tmp_path: Path
) -> None:
    """Also not that of another runner, which a common gateway may repeat."""
    secrets = ["whsec_c2VjcmV0LW9mLUI=", "token-of-B", "password-of-mail"]
    text = f"the others are {', '.join(secrets)}"

    async def respond(request: Request) -> Answer:
        (runner,) = json.loads(request.body)["runners"]
        if runner["subject"] == "refused":
            return Answer(422, text.encode())
        return Answer(
            200, json.dumps([{"id": runner["id"], "action": "next", "message": text}]).encode()
        )

    async with http_server(respond) as server:
        (tmp_path / "settings.toml").write_text(
            f'[runners.A]\nurl = "{server.url}"\nbatch_size = 1\n'
            f'[runners.B]\nurl = "{server.url}"\nsecret = "{secrets[0]}"\n'
            f'headers = {{Authorization = "Bearer {secrets[1]}"}}\n'
        )
        settings = {"SEQUENCERD_CONFIG": str(tmp_path / "settings.toml")}
        async with daemon(database, f"smtp://u:{secrets[2]}@127.0.0.1:1", **settings):
            await define(connection, "s", ("a", "A", "{}", None))
            await enroll(connection, "s", "answered")
            await enroll(connection, "s", "refused")
            await until(connection, ALL_ENDED)
    told = await connection.fetchval("SELECT string_agg(message, '') FROM sequencer.events")
    told += await connection.fetchval(
        "SELECT string_agg(last_error, '') FROM sequencer.enrollments"
    )
    assert told.count("the others are ***, ***, ***") == 3
    assert not any(secret in told for secret in secrets)


async def test_an_idle_daemon_sends_only_the_probe(
    database: str, connection: asyncpg.Connection, mailbox: tuple[Mailbox, str]
) -> None:
    await define(
        connection, "s", ("pause", "WaitForDuration", '{"amount": 9, "unit": "days"}', None)
    )
    await connection.execute(
        "INSERT INTO sequencer.enrollments (sequence, subject, wake_at)"
        " SELECT 's', 'u' || n, now() + interval '5 days' FROM generate_series(1, 10000) AS n"
    )
    last = (
        "SELECT application_name, max(state_change), max(query) FROM pg_stat_activity"
        " WHERE datname = current_database() AND application_name LIKE 'sequencerd%'"
        " GROUP BY application_name ORDER BY application_name"
    )
    again = (
        "SELECT max(state_change) > $2 FROM pg_stat_activity"
        " WHERE datname = current_database() AND application_name = $1"
    )
    async with daemon(database, mailbox[1]), asyncio.timeout(PATIENCE):
        before, after = 0, 1
        while after != before:  # what it does at its start takes longer on a busy machine
            begun = None
            while (seen := await connection.fetch(last)) != begun:
                begun = seen
                await asyncio.sleep(1)
            (_, before, _), (probe, probed, _) = seen
            await until(connection, again, probe, probed)
            (_, after, _), (_, _, query) = await connection.fetch(last)
    assert query == "SELECT 1"


@pytest.mark.parametrize(
    ("variable", "value", "code", "words"),
    [
        ("SEQUENCERD_DATABASE", "ada@host/app", 2, "URL is wrong"),
        ("SEQUENCERD_DATABASE", "postgresql://u:hidden@127.0.0.1:1/x", 1, "cannot connect"),
        ("SEQUENCERD_NOTHING", "x", 2, "SEQUENCERD_NOTHING is not a setting"),
    ],
)
def test_a_failed_start_prints_one_line(
    variable: str, value: str, code: int, words: str, tmp_path: Path
) -> None:
    command = Command("postgresql://127.0.0.1:1/x", tmp_path)
    command.variables[variable] = value
    # once it has read its settings it handles signals, which only a main thread can
    run = command if variable == "SEQUENCERD_NOTHING" else command.program
    run("run", code=code)
    assert words in command.errors
    assert len(command.errors.strip().splitlines()) == 1
    assert "hidden" not in command.errors


SIGNALLED = """
import os, signal
from sequencerd import cli, daemon

def end(*_):
    try:
        os.kill(os.getpid(), signal.SIGTERM)
    except KeyboardInterrupt:
        print("interrupted", flush=True)

{place} = end
cli.main(["run"])
"""


@pytest.mark.parametrize(
    ("place", "output"), [("cli.import_module", ""), ("daemon.tune_collector", "interrupted\n")]
)
def test_a_signal_during_the_start_ends_the_process(place: str, output: str, database: str) -> None:
    """Imports are not interrupted: libraries turn KeyboardInterrupt into other errors."""
    ended = subprocess.run(
        [sys.executable, "-c", SIGNALLED.format(place=place)],
        env={**os.environ, "SEQUENCERD_DATABASE": database},
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    assert (ended.returncode, ended.stdout) == (-signal.SIGTERM, "")
