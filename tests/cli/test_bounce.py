"""`sequencerd bounce`, from standard input and from Postfix."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import asyncpg
import pytest

from tests.helpers.command_line import Command
from tests.helpers.engines import define, enroll
from tests.helpers.waiting import PATIENCE
from tests.runners.email.test_bounces import EXIM, FEEDBACK, dsn, failed

ENTRIES = "SELECT address, topic, source FROM sequencer.suppressions ORDER BY address"


@pytest.fixture
async def token(connection: asyncpg.Connection) -> str:
    """Return the mark of a message to ada@example.org alone, and that of one with a copy to bob."""
    await define(connection, "s", ("mail", "Email", "{}", None))
    id_ = await enroll(connection, "s", "user-42")
    await sent(connection, id_, 1, "ada@example.org")
    await sent(connection, id_, 2, "ada@example.org, bob@bücher.example")
    tag = await connection.fetchval("SELECT tag FROM sequencer.enrollments")
    return f"{id_}.1.{tag.hex[:16]}e5b9b2dfbb4b3ae1"


async def sent(connection: asyncpg.Connection, id_: int, visit: int, addresses: str) -> None:
    await connection.execute(
        "INSERT INTO sequencer.events (enrollment_id, at, sequence, step, visit, action, message)"
        " VALUES ($1, now(), 's', 'mail', $2, 'next', $3)",
        id_,
        visit,
        f"sent to {addresses}: 250 2.0.0 queued",
    )


async def entries(connection: asyncpg.Connection) -> list[tuple[str, str, str]]:
    return [tuple(row) for row in await connection.fetch(ENTRIES)]


async def test_a_bounce_suppresses_the_recipient(
    sequencerd: Command, connection: asyncpg.Connection, token: str
) -> None:
    raw = dsn(failed("5.1.1", address="Ada@Example.org"), token=token)
    for _ in range(2):  # a mail server may deliver it twice
        out = sequencerd("bounce", stdin=raw)
        assert out == "suppressed ada@example.org: 5.1.1 (enrollment 1)\n"
    assert await entries(connection) == [("ada@example.org", "*", "bounce")]


async def test_an_address_may_be_quoted_in_the_history(
    sequencerd: Command, connection: asyncpg.Connection, token: str
) -> None:
    await sent(connection, 1, 3, '"a..b"@docomo.ne.jp')
    third = token.replace(".1.", ".3.", 1)
    sequencerd("bounce", stdin=dsn(failed("5.1.1", address="A..b@docomo.ne.jp"), token=third))
    assert await entries(connection) == [("a..b@docomo.ne.jp", "*", "bounce")]


async def test_the_bounce_address_identifies_the_message_as_well(
    sequencerd: Command, connection: asyncpg.Connection, token: str
) -> None:
    second = token.replace(".1.", ".2.", 1)
    to = f"bounces+{second}@example.com"
    fields = failed("5.1.1", address="bob@xn--bcher-kva.example")
    sequencerd("bounce", stdin=dsn(fields, to, token="gone"))
    assert await entries(connection) == [("bob@bücher.example", "*", "bounce")]


async def test_plain_bounces_and_complaints(
    sequencerd: Command, connection: asyncpg.Connection, token: str
) -> None:
    plain = EXIM.replace("7.1.f66a91ef9a4ab3d4e5b9b2dfbb4b3ae1", token)
    report = FEEDBACK.format(kind="abuse", recipient="")
    report = report.replace("7.1.f66a91ef9a4ab3d4e5b9b2dfbb4b3ae1", token)
    sequencerd("bounce", stdin=plain.encode())
    assert await entries(connection) == [("ada@example.org", "*", "bounce")]
    await connection.execute("DELETE FROM sequencer.suppressions")
    # who complained is known, as the message had one recipient
    sequencerd("bounce", stdin=report.encode())
    assert await entries(connection) == [("ada@example.org", "*", "complaint")]
    await connection.execute("DELETE FROM sequencer.suppressions")
    sequencerd("bounce", stdin=report.replace(token, token.replace(".1.", ".2.", 1)).encode())
    assert await entries(connection) == []


async def test_a_complaint_may_hide_who_complains(
    sequencerd: Command, connection: asyncpg.Connection, token: str
) -> None:
    """Providers replace the address, or its local part (RFC 6590)."""
    two = token.replace(".1.", ".2.", 1)
    for mark, hidden in ((two, "redacted@example.org"), (token, "6b8c1f@example.org")):
        report = FEEDBACK.format(kind="abuse", recipient=f"Original-Rcpt-To: <{hidden}>\n")
        report = report.replace("7.1.f66a91ef9a4ab3d4e5b9b2dfbb4b3ae1", mark)
        sequencerd("bounce", stdin=report.encode())
    assert await entries(connection) == [("ada@example.org", "*", "complaint")]


@pytest.mark.parametrize(
    ("fields", "forge"),
    [
        (failed("5.1.1", address="stranger@example.org"), str),
        (failed("5.1.1"), lambda token: "2" + token[1:]),  # another enrollment
        (failed("5.1.1"), lambda token: token.replace(".1.", ".3.")),  # another visit
        (failed("5.1.1"), lambda token: token[:4] + token[:3:-1]),  # another tag
        (failed("5.1.1"), lambda token: f"{'9' * 18}.{'9' * 9}.{token[4:]}"),
        (failed("5.1.1"), lambda token: f"{'9' * 30}.{'9' * 20}.{token[4:]}"),
        (failed("5.1.1").replace("failed", "delayed"), str),
        (failed("4.2.2"), str),
    ],
)
async def test_an_unproven_report_suppresses_no_address(
    sequencerd: Command,
    connection: asyncpg.Connection,
    token: str,
    fields: str,
    forge: Callable[[str], str],
) -> None:
    raw = dsn(fields, token=forge(token))
    assert sequencerd("bounce", stdin=raw).startswith("ignored: ")
    assert await entries(connection) == []


@pytest.mark.parametrize("raw", [b"", b"\x00\xff" * 1000, b"From: a@b\n\nHello"])
def test_other_messages_than_bounces_are_ignored(sequencerd: Command, raw: bytes) -> None:
    assert sequencerd("bounce", stdin=raw).startswith("ignored: ")


def test_a_failure_asks_the_mail_server_to_retry(sequencerd: Command, tmp_path: Path) -> None:
    """Any other exit status would make the mail server bounce the bounce."""
    raw = dsn(failed("5.1.1"))
    sequencerd.variables["SEQUENCERD_DATABASE"] = "postgresql://127.0.0.1:1/app?connect_timeout=2"
    sequencerd("bounce", stdin=raw, code=75)
    sequencerd.variables["SEQUENCERD_CONFIG"] = str(tmp_path / "missing.toml")
    sequencerd("bounce", stdin=raw, code=75)
    assert "missing.toml" in sequencerd.errors


POSTFIX = Path("/usr/sbin/postfix")
PYTHON = Path("/usr/bin/python3")
"""Of the system: Postfix starts pipes as a user that may not be allowed to start the tests' own."""


@pytest.mark.skipif(
    os.geteuid() != 0 or not (POSTFIX.exists() and PYTHON.exists()),
    reason="needs Postfix (apt-get install postfix) and root, who may start it",
)
async def test_postfix_delivers_bounces_to_the_command(
    sequencerd: Command, connection: asyncpg.Connection, token: str
) -> None:
    """The transport of docs/suppressions.md. A message stays queued while the database is away."""
    available = sequencerd.variables.copy()
    sequencerd.variables["SEQUENCERD_DATABASE"] = "postgresql://127.0.0.1:1/app?connect_timeout=2"
    answers: asyncio.Queue[int] = asyncio.Queue()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        raw = await reader.read()
        code = 75 if sequencerd.variables is not available else 0
        await asyncio.to_thread(sequencerd, "bounce", stdin=raw, code=code)
        writer.write(bytes([code]))
        writer.close()
        answers.put_nowait(code)

    with tempfile.TemporaryDirectory(dir="/tmp", prefix="postfix-") as folder:
        postfix = Postfix(Path(folder))
        server = await asyncio.start_unix_server(serve, postfix.socket)
        postfix.socket.chmod(0o666)
        async with server:
            await asyncio.to_thread(postfix.start)
            try:
                verp = f"bounces+{token}@bounces.example"
                await postfix.deliver(verp, dsn(failed("5.1.1"), to=verp, token="gone"))
                async with asyncio.timeout(PATIENCE):
                    assert await answers.get() == 75
                assert await entries(connection) == []
                sequencerd.variables = available
                while answers.empty():  # the queue manager may not have deferred it yet
                    await postfix.run("postqueue", "-f")
                    await asyncio.sleep(0.5)
                assert await answers.get() == 0
            finally:
                await asyncio.to_thread(postfix.stop)
    assert await entries(connection) == [("ada@example.org", "*", "bounce")]


class Postfix:
    """An instance with its own folders and no port, which delivers by the command alone.

    What the pipe gets goes to a socket, where the test runs the command, and its status back.
    """

    def __init__(self, folder: Path) -> None:
        folder.chmod(0o755)
        self.socket = folder / "socket"
        self.config = folder / "etc"
        for name in ("etc", "spool", "lib"):
            (folder / name).mkdir()
        shutil.chown(folder / "lib", "postfix")
        command = folder / "command"
        command.write_text(
            f"#!{PYTHON}\nimport socket, sys\nends = socket.socket(socket.AF_UNIX)\n"
            f"ends.connect('{self.socket}')\nends.sendall(sys.stdin.buffer.read())\n"
            "ends.shutdown(socket.SHUT_WR)\nsys.exit(ends.recv(1)[0])\n"
        )
        command.chmod(0o755)
        (self.config / "main.cf").write_text(
            f"compatibility_level = 3.6\nqueue_directory = {folder}/spool\n"
            f"data_directory = {folder}/lib\nmyhostname = mail.example\nmydestination =\n"
            f"maillog_file = {folder}/log\nmaillog_file_prefixes = {folder}\n"
            "relay_domains = bounces.example\nsmtputf8_enable = no\n"
            "transport_maps = inline:{bounces.example=sequencerd:}\n"
            "sequencerd_destination_recipient_limit = 1\n"
            "minimal_backoff_time = 1s\nqueue_run_delay = 1s\n"
        )
        services = {
            "pickup": "n - n 60 1",
            "cleanup": "n - n - 0",
            "qmgr": "n - n 1 1",
            "rewrite": "- - n - -",
            "bounce": "- - n - 0",
            "defer": "- - n - 0",
        }
        programs = {"rewrite": "trivial-rewrite", "defer": "bounce"}
        lines = [
            f"{name} unix {flags} {programs.get(name, name)}" for name, flags in services.items()
        ]
        lines += [
            "postlog unix-dgram n - n - 1 postlogd",
            "showq unix n - n - - showq",
            "flush unix n - n 1000? 0 flush",
            f"sequencerd unix - n n - 1 pipe\n  flags=Rq user=nobody argv={command}",
        ]
        (self.config / "master.cf").write_text("\n".join(lines) + "\n")

    def start(self) -> None:
        subprocess.run([POSTFIX, "-c", self.config, "start"], check=True, capture_output=True)

    def stop(self) -> None:
        subprocess.run([POSTFIX, "-c", self.config, "stop"], check=True, capture_output=True)

    async def deliver(self, recipient: str, raw: bytes) -> None:
        await self.run("sendmail", "-i", "-f", "", recipient, stdin=raw)

    async def run(self, program: str, *arguments: str, stdin: bytes = b"") -> None:
        process = await asyncio.create_subprocess_exec(
            POSTFIX.with_name(program),
            *arguments,
            env={**os.environ, "MAIL_CONFIG": str(self.config)},
            stdin=subprocess.PIPE,
        )
        await process.communicate(stdin)
        assert process.returncode == 0
