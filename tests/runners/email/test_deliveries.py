"""Deliveries through the engine: what is left of a message, and waves against limits."""

from __future__ import annotations

import json

import asyncpg

from sequencerd.core.model import RetryPolicy
from tests.helpers import servers
from tests.helpers.engines import define, enroll, running_engine, until
from tests.helpers.runners import email_runner, http_runner
from tests.helpers.servers import Request, http_server, scripted
from tests.runners.email.test_smtp_pool import limited

CONFIG = json.dumps(
    {
        "from": "hi@example.com",
        "to": "{{data.email}}",
        "cc": "bob@x.org",
        "subject": "x",
        "text": "x",
    }
)
ALL_ENDED = "SELECT bool_and(status = 'completed') FROM sequencer.enrollments"


async def test_a_greylisted_copy_outlives_a_restart(
    database: str, connection: asyncpg.Connection
) -> None:
    await define(connection, "s", ("mail", "Email", CONFIG, "end"), ("end", "GoTo", "{}", None))
    async with scripted() as server:
        server.answers["RCPT"] = ["250 ok", "450 4.2.0 Greylisted", "450 4.2.0 Greylisted"]
        retry = RetryPolicy(first_delay=0.05, longest_delay=1)
        first = email_runner(server.url, retry=retry)
        async with running_engine(database, {"Email": first}):
            await enroll(connection, "s", "ada", '{"email": "ada@x.org"}')
            await until(connection, "SELECT data ? 'emailPending' FROM sequencer.enrollments")
        await first.close()
        second = email_runner(server.url, retry=retry)
        async with running_engine(database, {"Email": second}):
            await until(connection, ALL_ENDED)
        await second.close()
    assert [recipients for recipients, _ in server.messages] == [["ada@x.org"], ["bob@x.org"]]
    assert json.loads(await connection.fetchval("SELECT data FROM sequencer.enrollments")) == {
        "email": "ada@x.org",
        "emailPending": None,
    }
    actions = await connection.fetch("SELECT action, message FROM sequencer.events ORDER BY at")
    said = [str(row["message"]) for row in actions if row["action"] in ("noop", "next")]
    assert "bob@x.org (450 4.2.0 Greylisted); sent to 1 later" in said[0]


async def test_a_wave_against_a_limit_of_connections(
    database: str, connection: asyncpg.Connection
) -> None:
    await define(connection, "s", ("mail", "Email", CONFIG, "end"), ("end", "GoTo", "{}", None))
    async with limited(2) as server:
        runner = email_runner(server.url)
        async with running_engine(database, {"Email": runner}):
            for number in range(30):
                await enroll(connection, "s", f"u{number}", f'{{"email": "a{number}@x.org"}}')
            await until(connection, ALL_ENDED)
        await runner.close()
    assert len(server.messages) == 30


async def test_a_wave_against_a_limit_of_a_request(
    database: str, connection: asyncpg.Connection
) -> None:
    async def respond(request: Request) -> servers.Answer:
        if len(request.body) > 20_000:
            return servers.Answer(413, b"request entity too large")
        items = [
            {"id": runner["id"], "action": "next"} for runner in json.loads(request.body)["runners"]
        ]
        return servers.Answer(body=json.dumps(items).encode())

    await define(connection, "s", ("work", "Crm", "{}", None))
    async with http_server(respond) as server:
        runner = http_runner(server.url)
        async with running_engine(database, {"Crm": runner}):
            await connection.execute(
                "INSERT INTO sequencer.enrollments (sequence, subject, data)"
                " SELECT 's', 'u' || n, jsonb_build_object('text', repeat('x', 800))"
                " FROM generate_series(1, 300) AS n"
            )
            await until(connection, ALL_ENDED)
        await runner.close()
    attempts = await connection.fetchval("SELECT max(attempt) FROM sequencer.enrollments")
    assert attempts <= 1
