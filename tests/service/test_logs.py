"""Logs: in which form, with which priority, and what is in none of them."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from tests.helpers.command_line import start_sequencerd
from tests.helpers.engines import define, until
from tests.helpers.waiting import PATIENCE

PERSON = "ada.lovelace@example.com"
MAIL = '{"from": "a@example.com", "to": "{{data.email}}", "subject": "x", "text": "x"}'
SMS = '{"from": "+4915112345678", "to": "+4915112345679", "message": "x"}'
CONDITION = (
    '{"lodashCommand": "eq", "value": {"type": "get", "value": "external.plan"},'
    ' "compareTo": {"type": "raw", "value": "pro"}}'
)


async def said(*arguments: str, **variables: str) -> str:
    """What a command writes to standard error."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, *arguments, env={**os.environ, **variables}, stderr=asyncio.subprocess.PIPE
    )
    _, errors = await process.communicate()
    return errors.decode()


LINES = """
import logging, os
from sequencerd.service.logs import make_log
from sequencerd.settings_file import load
log = make_log(load(os.environ))
log.debug("first")
log.info("second", enrollment=7)
log.warning("third")
try:
    visible = "hidden"
    raise ValueError("boom")
except ValueError:
    log.exception("fourth")
logging.getLogger("asyncio").error("a library's, %s", "too")
"""


SECRETS = {
    "SEQUENCERD_DATABASE": "postgresql://app:p%40ss%22word@db/app",
    "SEQUENCERD_SMS_AUTH_TOKEN": 'Bearer to"ken',
    "SAID": 'p@ss"word and p%40ss%22word and to"ken',
}
MORE_LINES = """
log.error(os.environ["SAID"], parts=["whole", os.environ["SEQUENCERD_DATABASE"]])
import asyncpg
for error in (ConnectionError("away"), asyncpg.InternalClientError("cut"), KeyError("bug")):
    try:
        raise error
    except Exception:
        logging.getLogger("asyncpg.pool").warning("retrying", exc_info=True)
"""


REPEATED = """
import os
from sequencerd.service import logs
from sequencerd.settings_file import load
log = logs.make_log(load(os.environ))
now = 0
logs.monotonic = lambda: now
for now in range(70):
    log.warning("trying again", error="away", at="a")
    log.warning("enrollment failed", enrollment=7)
now += 6  # it was back meanwhile
log.warning("trying again", error="away", at="a")
log.warning("trying again", error="away", at="b")
"""


async def test_a_warning_that_each_attempt_repeats_is_written_once_a_minute() -> None:
    lines = [json.loads(line) for line in (await said("-c", REPEATED)).splitlines()]
    about = [(line["at"], line.get("repeated")) for line in lines if "error" in line]
    assert about == [("a", None), ("a", 59), ("a", None), ("b", None)]
    assert len(lines) == len(about) + 70


@pytest.fixture(scope="module")
def lines() -> list[dict[str, Any]]:
    """What a program without a terminal writes."""
    done = subprocess.run(
        [sys.executable, "-c", LINES + MORE_LINES],
        env=os.environ | SECRETS,
        capture_output=True,
        text=True,
        check=True,
    )
    return [json.loads(line) for line in done.stderr.splitlines()]


def test_json_without_a_terminal(lines: list[dict[str, Any]]) -> None:
    lines = lines[:4]
    assert [(line["level"], line["event"]) for line in lines] == [
        ("info", "second"),
        ("warning", "third"),
        ("error", "fourth"),
        ("error", "a library's, too"),
    ]
    assert lines[0]["enrollment"] == 7
    assert "ValueError: boom" in lines[2]["exception"]
    assert lines[3]["logger"] == "asyncio"


def test_secrets_are_hidden_in_every_part_of_a_line(lines: list[dict[str, Any]]) -> None:
    line = lines[4]
    assert (line["event"], line["parts"]) == ("*** and *** and ***", ["whole", "***"])


def test_transient_errors_of_libraries_are_one_line(lines: list[dict[str, Any]]) -> None:
    *passing, bug = lines[5:]
    assert [line["error"] for line in passing] == ["ConnectionError", "InternalClientError"]
    for line in passing:
        assert line["event"] == "retrying"
        assert "exception" not in line
    assert "KeyError" in bug["exception"]


@pytest.mark.parametrize("is_closed", [False, True])
async def test_a_failing_log_stops_nothing(
    database: str, connection: asyncpg.Connection, is_closed: bool
) -> None:
    if is_closed:  # journald was restarted, say
        end, other = os.pipe()
        os.close(end)
    else:
        other = os.open("/dev/full", os.O_WRONLY)
    variables = {**os.environ, "SEQUENCERD_DATABASE": database}
    process = await start_sequencerd("run", env=variables, stderr=other)
    os.close(other)
    await until(connection, "SELECT count(*) = 1 FROM sequencer.daemons")
    process.send_signal(signal.SIGTERM)
    assert await process.wait() == 0


async def test_priorities_for_journald() -> None:
    here, there = socket.socketpair()
    with here, there:
        node = os.fstat(there.fileno())
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-c",
            LINES,
            env={
                **os.environ,
                "JOURNAL_STREAM": f"{node.st_dev}:{node.st_ino}",
                "SEQUENCERD_LOG_LEVEL": "debug",
            },
            stderr=there.fileno(),
        )
        there.close()
        await process.wait()
        lines = here.makefile().read().splitlines()
    assert [line[:4] for line in lines] == ["<7>{", "<6>{", "<4>{", "<3>{", "<3>{"]
    assert json.loads(lines[1][3:])["event"] == "second"
    # another stream than the journal's, as after a redirection
    assert (await said("-c", LINES, JOURNAL_STREAM="1:2")).startswith("{")


async def test_colours_on_a_terminal_and_no_variables() -> None:
    terminal, end = pty.openpty()
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", LINES, stderr=end)
    os.close(end)
    reading = asyncio.to_thread(read_all, terminal)
    text, _ = await asyncio.gather(reading, process.wait())
    os.close(terminal)
    assert "\x1b[" in text
    assert "second" in text
    assert "ValueError: boom" in text
    assert "'hidden'" not in text


def read_all(terminal: int) -> str:
    found = b""
    try:
        while part := os.read(terminal, 10_000):
            found += part
    except OSError:  # how a terminal ends when its last writer closes it
        pass
    return found.decode()


async def test_no_secret_and_no_recipient_is_logged(
    database: str, connection: asyncpg.Connection, tmp_path: Path
) -> None:
    """Secrets in every setting, servers that give them away, and everything fails."""
    await define(connection, "http", ("x", "Score", "{}", None))
    await define(connection, "mail", ("x", "Email", MAIL, None))
    await define(connection, "sms", ("x", "SMS", SMS, None))
    await define(connection, "asks", ("x", "Conditional", CONDITION, None))
    await connection.execute("UPDATE sequencer.sequences SET lookup = 'plans' WHERE name = 'asks'")
    for sequence in ("http", "mail", "sms", "asks"):
        await connection.execute(
            "INSERT INTO sequencer.enrollments (sequence, subject, data) VALUES ($1, $2, $3)",
            sequence,
            PERSON,
            json.dumps({"email": PERSON}),
        )
    heard: list[str] = []

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request = await reader.readuntil(b"\r\n\r\n")
        heard.append(request.decode())
        body = b"I know " + request.replace(b"\r\n", b" ") + PERSON.encode()
        writer.write(b"HTTP/1.1 400 Bad\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
        await writer.drain()
        writer.close()

    async def mail(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 hello\r\n")
        while line := (await reader.readline()).strip():
            heard.append(line.decode())
            if line.startswith(b"EHLO"):
                writer.write(b"250-hello\r\n250 AUTH PLAIN LOGIN\r\n")
            elif line.startswith(b"AUTH"):
                writer.write(b"535 wrong: smtp-secret of %s\r\n" % PERSON.encode())
            elif line == b"QUIT":
                break
            else:
                writer.write(b"250 ok\r\n")
        writer.close()

    web = await asyncio.start_server(echo, "127.0.0.1", 0)
    post = await asyncio.start_server(mail, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{web.sockets[0].getsockname()[1]}/"
    smtp = f"127.0.0.1:{post.sockets[0].getsockname()[1]}"
    (tmp_path / "runner-secret").write_text("whsec_cnVubmVyLXNlY3JldA==\n")
    config = tmp_path / "sequencerd.toml"
    config.write_text(
        f'[email]\nurl = "smtp://ada:smtp-secret@{smtp}?starttls=never"\nattempts = 1\n'
        f'[sms]\nprovider = "http"\nurl = "{url}"\nattempts = 1\nbody = "{{}}"\n'
        'headers = {Authorization = "Bearer sms-secret"}\n'
        f'[runners.Score]\nurl = "{url}"\nsecret = {{file = "runner-secret"}}\n'
        'headers = {X-Key = "header-secret"}\n'
        f'[lookups.plans]\nurl = "{url}"\nheaders = {{X-Key = "lookup-secret"}}\n'
        '[log]\nlevel = "debug"\n'
    )
    process = await start_sequencerd(
        "--config",
        str(config),
        "run",
        env={**os.environ, "SEQUENCERD_DATABASE": database, "CREDENTIALS_DIRECTORY": str(tmp_path)},
        stderr=asyncio.subprocess.PIPE,
    )
    failed = "SELECT count(*) = 2 FROM sequencer.enrollments WHERE failure = 'error'"
    await until(connection, failed)
    # a refused login is the operator's: it is reported, and fails no enrollment
    await until(connection, "SELECT EXISTS (SELECT FROM sequencer.problems WHERE about = 'Email')")
    await until(connection, "SELECT EXISTS (SELECT FROM sequencer.events WHERE action = 'retry')")
    await connection.execute("SELECT pg_notify('sequencer', $1)", f'{{"person": "{PERSON}"}}')
    config.write_text("[email]\nurl = 'smtp://ada:other-secret@nowhere:port'\n")
    process.send_signal(signal.SIGHUP)
    assert process.stderr is not None
    errors = b""
    async with asyncio.timeout(PATIENCE):
        while b"invalid settings" not in errors:
            line = await process.stderr.readline()
            assert line, errors.decode()
            errors += line
        process.terminate()
        errors += (await process.communicate())[1]
    web.close()
    post.close()
    lines = [json.loads(line) for line in errors.decode().splitlines()]
    assert {"ready", "enrollment failed", "notifications not understood", "stopped"} <= {
        line["event"] for line in lines
    }
    assert any("invalid settings" in line["event"] for line in lines)
    told = "\n".join(heard)
    for secret in ("sms-secret", "header-secret", "lookup-secret", "webhook-signature", "AUTH"):
        assert secret in told, f"{secret} was not needed, so the test shows nothing"
    for secret in ("secret", "cnVubmVyLXNlY3JldA"):
        assert secret not in errors.decode().replace("invalid settings", "")
    written = await connection.fetch("SELECT message FROM sequencer.events")
    assert not [row for row in written if "secret" in (row["message"] or "")]
    down = [line for line in lines if line["event"].startswith("runner is down")]
    assert ("warning", "refused") in {(line["level"], line.get("cause")) for line in down}
    for line in lines:
        assert line["level"] == "debug" or PERSON not in json.dumps(line), line
