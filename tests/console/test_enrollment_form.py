"""Subjects that are enrolled in the console."""

from __future__ import annotations

import asyncio
import html
import re

import asyncpg
import httpx

from tests.console.conftest import DAY, console, token
from tests.console.test_users import USERS, log_in
from tests.helpers.engines import define, enroll

FORM = {"sequence": "s", "subject": "ada", "reason": "a test"}


async def post(client: httpx.AsyncClient, **fields: str) -> httpx.Response:
    page = await client.get("/enroll?sequence=s")
    return await client.post("/enroll", data={"token": token(page), **FORM, **fields})


def hidden(page: httpx.Response, name: str) -> str:
    found = re.search(f'name="{name}" value="([^"]+)"', page.text)
    assert found, page.text
    return found[1]


async def number_of(connection: asyncpg.Connection) -> int:
    number: int = await connection.fetchval("SELECT count(*) FROM sequencer.enrollments")
    return number


async def test_a_subject_is_enrolled_with_the_user_s_name(
    database: str, connection: asyncpg.Connection
) -> None:
    await define(
        connection, "s", ("wait", "WaitForDuration", DAY, "last"), ("last", "Note", "{}", None)
    )
    async with console(database, users=USERS, write=True) as client:
        await log_in(client, "vera")
        assert "Enroll…" not in (await client.get("/sequence?sequence=s")).text
        refused = await client.get("/enroll?sequence=s")
        assert refused.status_code == 403
        assert "This needs the role operator" in refused.text
        page = await client.get("/")
        assert (
            await client.post("/enroll", data={"token": token(page), **FORM})
        ).status_code == 403
        assert await number_of(connection) == 0
        client.cookies.clear()
        await log_in(client, "otto")
        assert "Enroll…" in (await client.get("/sequence?sequence=s")).text
        assert (await client.post("/enroll", data={"token": "x", **FORM})).status_code == 403
        done = await post(
            client,
            data='{"plan": "pro", "n": 12345678901234567890.5}',
            email="ada@example.com",
            timezone="Europe/Berlin",
            step="last",
            start="2100-01-01 08:00",
        )
        assert done.status_code == 303, done.text
        row = await connection.fetchrow("SELECT * FROM sequencer.enrollments")
        assert done.headers["location"] == f"/console/enrollments/{row['id']}"
        assert row["data"] == (
            '{"n": 12345678901234567890.5, "plan": "pro", "email": "ada@example.com"}'
        )
        assert (row["step"], row["timezone"]) == ("last", "Europe/Berlin")
        assert row["wake_at"].isoformat() == "2100-01-01T08:00:00+00:00"
        event = await connection.fetchrow("SELECT * FROM sequencer.events")
        assert event["action"] == "created"
        assert event["message"].endswith(": otto in the console: a test")
        assert "otto in the console: a test" in (await client.get(f"/enrollments/{row['id']}")).text


WRONG = (
    ({"data": "{"}, "Data is not JSON"),
    ({"data": "[1]"}, "Data must be a JSON object"),
    ({"data": '{"a": NaN}'}, "Data is not JSON"),
    ({"data": '{"a": "\\u0000"}'}, "the database cannot store \\u0000"),
    ({"data": '{"email": "bob@example.com"}', "email": "a@b.c"}, "another e-mail address"),
    ({"timezone": "Mars/Base"}, "Timezone: "),
    ({"start": "tomorrow"}, "Start 'tomorrow' is not an ISO 8601 date"),
    ({"start": "9999-12-31"}, "The start time must be in the years 1900 to 9998"),
    ({"step": "nowhere"}, "Step 'nowhere' does not exist in sequence 's'"),
    ({"sequence": "t"}, "Sequence 't' does not exist"),
    ({"sequence": ""}, "Sequence is missing"),
    ({"subject": ""}, "Subject is missing"),
    ({"subject": "x" * 3000}, "subject"),
    ({"reason": " "}, "Write a reason"),
)


async def test_invalid_enrollments_are_refused(
    database: str, connection: asyncpg.Connection
) -> None:
    await define(connection, "s", ("wait", "WaitForDuration", DAY, None))
    async with console(database, write=True) as client:
        for fields, words in WRONG:
            refused = await post(client, **fields)
            assert refused.status_code == 422, fields
            assert words in html.unescape(refused.text), fields
            assert f'value="{fields.get("subject", "ada")}"' in refused.text
        assert await number_of(connection) == 0
        assert await connection.fetchval("SELECT count(*) FROM sequencer.events") == 0


async def test_the_reentry_policy_and_an_archived_sequence_refuse(
    database: str, connection: asyncpg.Connection
) -> None:
    await define(connection, "s", ("wait", "WaitForDuration", DAY, None))
    id_ = await enroll(connection, "s", "ada")
    async with console(database, write=True) as client:
        refused = await post(client)
        assert refused.status_code == 409
        assert "ada has already been enrolled in s; the reentry policy" in refused.text
        assert f'<a href="/console/enrollments/{id_}">enrollment {id_}</a> (active)' in refused.text
        await connection.execute("UPDATE sequencer.sequences SET status = 'archived'")
        refused = await post(client, subject="bob")
        assert refused.status_code == 422
        assert "is archived: it accepts no new enrollments" in refused.text
        assert await number_of(connection) == 1


async def test_without_write_nothing_is_enrolled(
    database: str, connection: asyncpg.Connection
) -> None:
    await define(connection, "s", ("wait", "WaitForDuration", DAY, None))
    async with console(database) as client:
        refused = await client.get("/enroll")
        assert refused.status_code == 403
        assert "console.write = true" in refused.text


async def test_the_daemon_s_role_is_not_enough_to_enroll(
    logins: dict[str, str], connection: asyncpg.Connection
) -> None:
    await define(connection, "s", ("wait", "WaitForDuration", DAY, None))
    async with console(logins["daemon"], write=True) as client:
        refused = await post(client)
        assert refused.status_code == 422
        assert "GRANT sequencer_enroller" in refused.text
    assert await number_of(connection) == 0


async def test_a_form_that_is_sent_twice_enrolls_once(
    database: str, connection: asyncpg.Connection
) -> None:
    await define(connection, "s", ("wait", "WaitForDuration", DAY, None))
    await connection.execute("UPDATE sequencer.sequences SET reentry = 'always'")
    async with console(database, write=True) as client:
        page = await client.get("/enroll?sequence=s")
        form = {**FORM, "token": token(page), "once": hidden(page, "once")}
        wrong = await client.post("/enroll", data={**form, "data": "{"})
        assert wrong.status_code == 422
        both = await asyncio.gather(*(client.post("/enroll", data=form) for _ in range(3)))
        later = await client.post("/enroll", data=form)
        assert [answer.status_code for answer in (*both, later)] == [303] * 4
        assert len({answer.headers["location"] for answer in (*both, later)}) == 1
        assert await number_of(connection) == 1
        # another subject, and the same in another form
        await client.post("/enroll", data={**form, "subject": "bob"})
        assert (await post(client)).status_code == 303
        assert await number_of(connection) == 3
