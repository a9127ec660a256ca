"""only_to: a staging system writes to some recipients alone."""

from __future__ import annotations

import json

import asyncpg
import pytest

from sequencerd.core.task import Answer, Suppressed
from sequencerd.runners.only_to import OnlyTo
from tests.helpers.engines import ALL_ENDED, define, enroll, running_engine, until
from tests.helpers.runners import email_runner
from tests.helpers.servers import HOST, smtp_server, task

CONFIG = {
    "from": "hi@example.com",
    "to": "{{data.email}}",
    "cc": "{{data.cc}}",
    "bcc": "bcc@other.org",
    "subject": "Hello",
    "text": "Hello",
}


@pytest.mark.parametrize(
    ("patterns", "address", "is_in"),
    [
        (["*@example.com"], "Ada@EXAMPLE.com", True),
        (["*@Example.com"], "ada@example.com", True),
        (["*@example.com"], "ada@example.com.evil.org", False),
        (["*@example.com"], "ada@sub.example.com", False),
        (["*@*.example.com"], "ada@sub.example.com", True),
        (["*@example.com"], '"ada@example.com"@evil.org', False),
        (["*@bücher.example"], "eve@xn--bcher-kva.example", True),
        (["*@xn--bcher-kva.example"], "eve@xn--bcher-kva.example", True),
        (["ada+*@example.com"], "ada+1@example.com", True),
        (["a..b@docomo.ne.jp"], '"a..b"@docomo.ne.jp', True),
        (['"a b"@example.com'], '"a b"@example.com', True),
        (["*@example.com"], '"b@example.com"@evil.org', False),
        (["+49*"], "+4915112345678", True),
        (["+49 (0)151 123-456"], "+49151123456", True),
        (["+49*"], "whatsapp:+4915112345678", False),
        (["whatsapp:+49*"], "whatsapp:+4915112345678", True),
        ([], "ada@example.com", False),
    ],
)
def test_patterns_are_compared_with_normalised_addresses(
    patterns: list[str], address: str, is_in: bool
) -> None:
    assert OnlyTo("email.only_to", patterns).outside([address]) == (set() if is_in else {address})


async def test_copies_to_others_are_omitted_and_reported() -> None:
    async with smtp_server() as server:
        runner = email_runner(f"smtp://{HOST}:{server.port}", only_to=["*@example.com"])
        program = runner.compile(CONFIG)
        here = task(email="Ada@Example.com", cc="eve@other.org")
        there = task(email="ada@other.org", cc="eve@example.com")
        sent, skipped = await runner.run(program, [here, there])
        await runner.close()
    assert isinstance(sent, Answer)
    assert "; not sent to bcc@other.org, eve@other.org: not in email.only_to" in str(sent.message)
    (envelope,) = server.messages
    assert envelope.rcpt_tos == ["Ada@Example.com"]
    assert server.parsed()["Cc"] is None
    assert skipped == Suppressed("not sent to ada@other.org, bcc@other.org: not in email.only_to")


async def test_a_journey_continues_without_the_message(
    database: str, connection: asyncpg.Connection
) -> None:
    await define(connection, "s", ("mail", "Email", json.dumps(CONFIG), None))
    async with smtp_server() as server:
        runner = email_runner(f"smtp://{HOST}:{server.port}", only_to=[])
        id_ = await enroll(connection, "s", "ada", '{"email": "ada@example.com"}')
        async with running_engine(database, {"Email": runner}):
            await until(connection, ALL_ENDED)
        await runner.close()
        assert not server.messages
    row = await connection.fetchrow(
        "SELECT message FROM sequencer.events WHERE enrollment_id = $1 AND action = 'suppressed'",
        id_,
    )
    assert row["message"].endswith("not in email.only_to")
    status = await connection.fetchval("SELECT status FROM sequencer.enrollments")
    assert status == "completed"
