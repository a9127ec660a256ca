"""Data of enrollments that are edited in the console."""

from __future__ import annotations

import asyncpg
import pytest

from sequencerd.console.mask import MASKED_VALUE, hide_data, restore_data
from sequencerd.errors import UsageError
from tests.console.conftest import BEGUN, Fixable, console, token, waiting_and_failing
from tests.console.test_editing import text_of
from tests.console.test_users import USERS, log_in
from tests.helpers.engines import until

DATA = "SELECT data::text FROM sequencer.enrollments WHERE id = $1"


async def test_data_are_edited_and_recorded(database: str, connection: asyncpg.Connection) -> None:
    waiting, _ = await waiting_and_failing(connection)
    exact = '{"email": "ada@example.com", "big": 12345678901234567890.123456789, "plan": "free"}'
    async with console(database, {"Note": Fixable()}, users=USERS, write=True) as client:
        await until(connection, BEGUN)
        await connection.execute(
            "UPDATE sequencer.enrollments SET data = $2 WHERE id = $1", waiting, exact
        )
        await log_in(client, "vera")
        assert (await client.get(f"/data?id={waiting}")).status_code == 403
        client.cookies.clear()
        await log_in(client, "otto")
        page = await client.get(f"/data?id={waiting}")
        version = page.text.partition('name="version" value="')[2].partition('"')[0]
        form = {"token": token(page), "id": str(waiting), "version": version, "action": "check"}
        for text, words in (("{", "not JSON"), ("[]", "must be a JSON object"), ("", "not JSON")):
            refused = await client.post("/data", data={**form, "text": text})
            assert refused.status_code == 422
            assert words in refused.text
        edited = {**form, "text": text_of(page).replace("free", "pro")}
        checked = await client.post("/data", data=edited)
        assert "&#34;pro&#34;" in checked.text.partition("<ins>")[2].partition("</ins>")[0]
        apply = {**edited, "action": "apply"}
        assert (await client.post("/data", data=apply)).status_code == 422  # no reason
        assert "free" in await connection.fetchval(DATA, waiting)
        done = await client.post("/data", data={**apply, "reason": "upgraded by phone"})
        assert done.headers["location"] == f"/console/enrollments/{waiting}"
        data = await connection.fetchval(DATA, waiting)
        assert '"pro"' in data
        assert "12345678901234567890.123456789" in data
        message = await connection.fetchval(
            "SELECT message FROM sequencer.events WHERE action = 'edited'"
        )
        assert message == "by postgres: otto in the console: upgraded by phone; changed plan"
        # what was seen is no longer there
        stale = await client.post("/data", data={**apply, "reason": "x"})
        assert stale.status_code == 409
        assert (await client.get("/data?id=99999")).status_code == 404


async def test_masked_data_stay_as_they_are(database: str, connection: asyncpg.Connection) -> None:
    waiting, _ = await waiting_and_failing(connection)
    async with console(database, {"Note": Fixable()}, mask=["data.email"], write=True) as client:
        await until(connection, BEGUN)
        page = await client.get(f"/data?id={waiting}")
        assert "ada@example.com" not in page.text
        version = page.text.partition('name="version" value="')[2].partition('"')[0]
        form = {
            "token": token(page),
            "id": str(waiting),
            "version": version,
            "action": "apply",
            "text": text_of(page).replace("Ada", "Ada L."),
            "reason": "test",
        }
        done = await client.post("/data", data=form)
        assert done.status_code == 303, done.text
        data = await connection.fetchval(DATA, waiting)
        assert data == '{"name": "Ada L.", "email": "ada@example.com"}'


def test_masked_values_cannot_be_moved() -> None:
    paths = ("data.email", "data.contacts.phone")
    original = {"email": "a@b", "contacts": [{"phone": "1"}, {"phone": "2"}], "n": 1}
    hidden = hide_data(original, paths)
    assert hidden["email"] == MASKED_VALUE
    assert original["email"] == "a@b"
    assert restore_data(hidden, original, paths) == original
    assert restore_data({**hidden, "email": "c@d"}, original, paths)["email"] == "c@d"
    assert "email" not in restore_data({"n": 2}, original, paths)
    for edited in (
        {**hidden, "n": MASKED_VALUE},
        {**hidden, "other": MASKED_VALUE},
        {**hidden, "contacts": hidden["contacts"][1:]},
    ):
        with pytest.raises(UsageError, match="masked"):
            restore_data(edited, original, paths)
