"""Partials of a running sequence: changed, missing, and there again."""

from __future__ import annotations

import json

import asyncpg

from tests.helpers.engines import ALL_ENDED, define, enroll, running_engine, until
from tests.helpers.runners import email_runner
from tests.helpers.servers import HOST, smtp_server

MAIL = {
    "from": "hi@example.com",
    "to": "{{data.email}}",
    "subject": "Hello",
    "html": "{{#> layout}}{{subject}}{{/layout}}",
}
STATE = "SELECT count(*) = 1 FROM sequencer.enrollments WHERE subject = $1 AND failure = $2"


async def test_a_changed_partial_takes_effect_at_once_and_a_missing_partial_is_an_invalid_step(
    database: str, connection: asyncpg.Connection
) -> None:
    async def layout(partials: dict[str, str] | None) -> None:
        await connection.execute(
            "UPDATE sequencer.sequences SET partials = $1", partials and json.dumps(partials)
        )

    async def send(subject: str) -> None:
        await enroll(connection, "s", subject, '{"email": "ada@example.com"}')

    await define(connection, "s", ("mail", "Email", json.dumps(MAIL), None))
    await layout({"layout": "<p>1 {{> @partial-block}}</p>"})
    async with smtp_server() as server:
        runner = email_runner(f"smtp://{HOST}:{server.port}")
        async with running_engine(database, {"Email": runner}):
            await send("ada")
            await until(connection, ALL_ENDED)
            await layout({"layout": "<p>2 {{> @partial-block}}{{> footer}}</p>", "footer": "!"})
            await send("bob")
            await until(connection, ALL_ENDED)
            await layout({"layout": "{{> footer}}"})
            await send("eve")
            await until(connection, STATE, "eve", "invalid_step")
            problem = await connection.fetchval("SELECT problem FROM sequencer.steps")
            assert "partial 'layout': line 1: the template has no partial 'footer'" in problem
            await layout({"layout": "{{> @partial-block}}"})
            await until(
                connection, "SELECT bool_and(status = 'completed') FROM sequencer.enrollments"
            )
        await runner.close()
        bodies = [server.parsed(n).get_body(("html",)) for n in range(3)]
    assert [str(body and body.get_content()).strip() for body in bodies] == [
        "<p>1 ada</p>",
        "<p>2 bob!</p>",
        "eve",
    ]
