"""Which users may log in and change something, and what no page shows."""

from __future__ import annotations

import asyncio
import html
import json
import re
from http.cookies import SimpleCookie
from math import inf
from pathlib import Path
from time import process_time
from types import SimpleNamespace

import asyncpg
import httpx
import pytest
import structlog

from sequencerd import passwords
from sequencerd.console import actions, auth, live
from sequencerd.console.pages import MAX_FORM, MAX_FORM_OF_USERS
from sequencerd.errors import SettingsError
from sequencerd.settings_file import load
from tests.console.conftest import (
    BEGUN,
    FAILED,
    Fixable,
    Line,
    console,
    counted,
    page_once,
    token,
    waiting_and_failing,
)
from tests.console.test_pages import check
from tests.helpers.command_line import Command
from tests.helpers.engines import until, way
from tests.helpers.waiting import eventually
from tests.service.test_http_server import answers, daemon, is_ok

PASSWORD = "correct horse"
HASH = "scrypt$32768$8$1$7UZ/2tt2s2dM/ClO04+pDQ==$a7UKYU1bG8mzWJMlnDhk1VOM4ponFnMO/T5zLcyyWbA="
MASKED = ["data.email", "data.contact.phone"]


async def log_in(client: httpx.AsyncClient, password: str = PASSWORD) -> httpx.Response:
    page = await client.get("/login")
    form = {
        "token": token(page),
        "name": "Ada Lovelace",
        "password": password,
        "to": "/console/search?q=a",
    }
    return await client.post("/login", data={**form, "to": "/console/search?q=a"})


def cookie(response: httpx.Response) -> SimpleCookie:
    found = SimpleCookie()
    found.load(response.headers["set-cookie"])
    return found


# --- coming in


async def test_a_password_is_required(database: str, connection: asyncpg.Connection) -> None:
    await waiting_and_failing(connection)
    async with console(database, password_hash=HASH) as client:
        page = await client.get("/enrollments/1?before=2026-01-01")
        assert page.status_code == 303
        assert page.headers["location"].startswith("/console/login?to=%2Fconsole%2Fenrollments%2F1")
        for path in ("/tables/search.json", "/tables/enrollments.csv", "/live"):
            assert (await client.get(path)).status_code == 401
        assert (await client.get("/static/console.css")).status_code == 200
        refused = await log_in(client, "wrong horse")
        assert refused.status_code == 403
        assert "The password is wrong" in refused.text
        assert (await client.get("/")).status_code == 303
        done = await log_in(client)
        assert done.status_code == 303
        assert done.headers["location"] == "/console/search?q=a"
        assert "Ada Lovelace" in (await client.get("/")).text
        kept = cookie(done)["sequencerd"]
        assert kept["httponly"]
        assert kept["samesite"] == "lax"
        assert kept["path"] == "/console"
        assert not kept["secure"]
        # what is in the cookie is signed
        changed = {"Cookie": f"sequencerd={kept.value[:-2]}xx"}
        client.cookies.clear()
        assert (await client.get("/", headers=changed)).status_code == 303


async def test_a_session_ends_with_the_password_and_not_with_the_daemon(
    database: str, connection: asyncpg.Connection
) -> None:
    async with console(database, password_hash=HASH) as client:
        await log_in(client)
        kept = {"Cookie": f"sequencerd={client.cookies['sequencerd']}"}
    async with console(database, password_hash=HASH) as client:
        assert (await client.get("/", headers=kept)).status_code == 200
    async with console(database, password_hash=passwords.make_hash(PASSWORD)) as client:
        assert (await client.get("/", headers=kept)).status_code == 303


async def test_a_session_ends_with_the_logout(
    database: str, connection: asyncpg.Connection
) -> None:
    async with console(database, password_hash=HASH) as client:
        await log_in(client)
        page = await client.get("/")
        assert (await client.post("/logout", data={"token": "x"})).status_code == 403
        assert (await client.get("/")).status_code == 200
        assert (await client.post("/logout", data={"token": token(page)})).status_code == 303
        assert (await client.get("/")).status_code == 303


async def test_a_page_from_before_the_login_or_after_the_logout(database: str) -> None:
    """As in another tab: its form belongs to no session, or to another one."""
    async with console(database, password_hash=HASH) as client:
        asked = await client.get("/login?to=/console/health")
        await log_in(client)
        form = {**fields(asked), "name": "Ada", "password": PASSWORD}
        again = await client.post("/login", data=form, headers=FROM_A_PAGE)
        assert again.status_code == 303
        assert again.headers["location"] == "/console/health"  # is logged in
        page = await client.get("/search")
        assert (await client.get("/login?to=/console/health")).headers["location"] == (
            "/console/health"
        )
        for _ in range(2):
            left = await client.post("/logout", data=fields(asked), headers=FROM_A_PAGE)
            assert left.headers["location"] == "/console/login"
            assert (await client.get("/search")).status_code == 303
        refused = await client.post("/login", data=form, headers=FROM_A_PAGE)
        assert refused.status_code == 403
        assert "Log in again" in check(refused)
        assert PASSWORD not in refused.text
        form = {**fields(refused), "name": "Ada", "password": PASSWORD}
        done = await client.post("/login", data=form, headers=FROM_A_PAGE)
        assert done.status_code == 303
        forged = await client.post("/logout", data=fields(page))
        assert forged.status_code == 403
        assert (await client.get("/search")).status_code == 200


async def test_a_copied_cookie_ends_with_the_session_at_all_daemons(
    database: str, connection: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "KEEPALIVE_INTERVAL", 0.1)
    async with (
        console(database, password_hash=HASH, is_served=True) as client,
        console(database, password_hash=HASH, is_served=True) as other,
    ):
        await log_in(client)
        copied = {"Cookie": f"sequencerd={client.cookies['sequencerd']}"}
        page = await client.get("/")
        for one in (client, other):
            assert (await one.get("/", headers=copied)).status_code == 200
        async with other.stream("GET", "/live?version=x", headers=copied) as stream:
            assert stream.status_code == 200
            assert (await client.post("/logout", data={"token": token(page)})).status_code == 303
            client.cookies.clear()
            async for _ in stream.aiter_raw():  # it ends with the next event
                pass
        for one in (client, other):
            assert (await one.get("/", headers=copied)).status_code == 303
            assert (await one.get("/tables/search.json", headers=copied)).status_code == 401
            posted = await one.post("/change", headers=copied, data={"token": token(page)})
            assert posted.status_code == 303
        assert (await log_in(client)).status_code == 303
        assert (await client.get("/")).status_code == 200  # another session is another
    async with console(database, password_hash=HASH) as client:  # a restart forgets nothing
        assert (await client.get("/", headers=copied)).status_code == 303


async def test_passwords_are_not_guessed(
    database: str, connection: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr(auth, "time", SimpleNamespace(monotonic=lambda: now))
    async with console(database, password_hash=HASH) as client:
        statuses = [
            (await log_in(client, f"wrong {n}")).status_code
            for n in range(auth.MAX_WRONG_PASSWORDS)
        ]
        assert statuses == [403] * auth.MAX_WRONG_PASSWORDS
        refused = await log_in(client)  # the right one, and too late
        assert refused.status_code == 429
        assert refused.headers["retry-after"] == str(int(auth.WRONG_PASSWORDS_PERIOD) + 1)
        now += auth.WRONG_PASSWORDS_PERIOD + 1
        assert (await log_in(client)).status_code == 303


async def test_a_proxy_names_the_user(database: str, connection: asyncpg.Connection) -> None:
    ada = {"X-Forwarded-User": "ada", "X-Forwarded-Proto": "https"}
    async with console(database, trusted_proxy=["127.0.0.0/8"]) as client:
        assert (await client.get("/")).status_code == 403
        page = await client.get("/", headers=ada)
        assert page.status_code == 200
        assert '<span class="user">ada</span>' in page.text
        assert cookie(page)["sequencerd"]["secure"]
        client.cookies.set("sequencerd", cookie(page)["sequencerd"].value)
        assert (await client.get("/")).status_code == 403, "the cookie alone proves nothing"
    async with console(database, trusted_proxy=["10.1.2.3"]) as client:
        assert (await client.get("/", headers=ada)).status_code == 403
    async with console(database, trusted_proxy=["10.1.2.3"], password_hash=HASH) as client:
        assert (await client.get("/", headers=ada)).status_code == 303
    async with console(
        database, trusted_proxy=["127.0.0.1"], user_header="Remote-User", write=True
    ) as client:
        assert (await client.get("/", headers=ada)).status_code == 403
        assert (await client.get("/", headers={"Remote-User": "bob"})).status_code == 200


async def test_a_limit_holds_for_each_client_of_the_proxy(
    database: str, connection: asyncpg.Connection
) -> None:
    async with console(database, trusted_proxy=["127.0.0.1"], password_hash=HASH) as client:
        client.headers["X-Forwarded-For"] = "198.51.100.1, 2001:db8::1"
        for _ in range(auth.MAX_WRONG_PASSWORDS):
            assert (await log_in(client, "wrong")).status_code == 403
        client.headers["X-Forwarded-For"] = "2001:db8::2"  # of the same network
        assert (await log_in(client)).status_code == 429
        client.headers["X-Forwarded-For"] = "2001:db8:1::1"
        assert (await log_in(client)).status_code == 303


async def test_an_open_console_answers_to_its_own_names_alone(
    database: str, connection: asyncpg.Connection
) -> None:
    async with console(database) as client:
        for host, status in (("evil.example", 403), ("localhost:1", 200), ("[::1]:1", 200)):
            page = await client.get("/search", headers={"Host": host})
            assert page.status_code == status, host
            assert "default-src 'none'" in page.headers["content-security-policy"]


# --- changing something

FROM_A_PAGE = {"Sec-Fetch-Site": "same-origin", "Sec-Fetch-Dest": "document"}


def fields(page: httpx.Response) -> dict[str, str]:
    """What the hidden fields of a page have."""
    found = re.findall(r'type="hidden" name="(\w+)" value="([^"]*)"', page.text)
    return {name: html.unescape(value) for name, value in found}


async def test_what_was_entered_is_kept_when_a_session_ends(
    database: str, connection: asyncpg.Connection
) -> None:
    waiting, _ = await waiting_and_failing(connection)
    data = '{"name": "Ada & <Co>",\r\n "plan": "pro"}'
    name = f"SELECT data ->> 'plan' FROM sequencer.enrollments WHERE id = {waiting}"
    async with console(database, password_hash=HASH, write=True) as client:
        await log_in(client)
        asked = await client.get(f"/data?id={waiting}")
        form = {**fields(asked), "text": data, "action": "apply", "reason": "a typo"}
        await connection.execute("UPDATE sequencer.console_sessions SET expires_at = now()")
        for elsewhere in ({}, {**FROM_A_PAGE, "Sec-Fetch-Site": "same-site"}):
            refused = await client.post("/data", data=form, headers=elsewhere)
            assert refused.status_code == 303
        kept = await client.post("/data", data=form, headers=FROM_A_PAGE)
        assert kept.status_code == 403
        assert "Your session has ended" in check(kept)
        assert 'action="/console/data"' in kept.text
        await log_in(client)  # in another tab
        again = await client.post("/data", data=fields(kept), headers=FROM_A_PAGE)
        assert again.status_code == 403
        assert "You are Ada Lovelace now" in check(again)
        assert await connection.fetchval(name) is None
        forged = await client.post("/data", data=fields(kept))
        assert "Send the form again" not in forged.text
        done = await client.post("/data", data=fields(again), headers=FROM_A_PAGE)
        assert done.status_code == 303, done.text
        assert await connection.fetchval(name) == "pro"


async def test_a_large_form_can_be_sent_again_from_its_page_when_a_session_ends(
    database: str, connection: asyncpg.Connection
) -> None:
    """Before a login, the console keeps no more than 100 kB."""
    waiting, _ = await waiting_and_failing(connection)
    async with console(database, password_hash=HASH, write=True) as client:
        await log_in(client)
        asked = await client.get(f"/data?id={waiting}")
        data = {"plan": "pro", "text": "x" * MAX_FORM}
        form = {**fields(asked), "text": json.dumps(data), "action": "apply", "reason": "a typo"}
        await connection.execute("UPDATE sequencer.console_sessions SET expires_at = now()")
        refused = await client.post("/data", data=form, headers=FROM_A_PAGE)
        assert refused.status_code == 413
        assert "Your session has ended" in check(refused)
        assert "go back to the form" in check(refused)
        await log_in(client)  # in another tab
        kept = await client.post("/data", data=form, headers=FROM_A_PAGE)
        done = await client.post("/data", data=fields(kept), headers=FROM_A_PAGE)
        assert done.status_code == 303


@pytest.mark.parametrize("password", [None, HASH])
async def test_what_was_entered_is_kept_while_the_database_is_away(
    database: str, connection: asyncpg.Connection, password: str | None
) -> None:
    waiting, _ = await waiting_and_failing(connection)
    name = f"SELECT data ->> 'plan' FROM sequencer.enrollments WHERE id = {waiting}"
    line = Line(database)
    async with (
        line.open() as through,
        console(database, through=through, password_hash=password, write=True) as client,
    ):
        if password:
            await log_in(client)
        asked = await client.get(f"/data?id={waiting}")
        form = {**fields(asked), "text": '{"plan": "pro"}', "action": "apply", "reason": "a typo"}
        line.cut()
        kept = await client.post("/data", data=form, headers=FROM_A_PAGE)
        assert kept.status_code == 503
        assert "What you entered is kept here" in check(kept)
        assert "Log in" not in kept.text
        assert "Send the form again" not in (await client.post("/data", data=form)).text
        line.is_cut = False
        assert fields(kept).items() >= form.items()

        async def done() -> httpx.Response | None:
            answer = await client.post("/data", data=fields(kept), headers=FROM_A_PAGE)
            return answer if answer.status_code == 303 else None

        answer: httpx.Response = await eventually(done)
        assert answer.status_code == 303
        assert await connection.fetchval(name) == "pro"


async def test_a_form_outlives_a_restart_of_an_open_console(
    database: str, connection: asyncpg.Connection
) -> None:
    """Without passwords, what signs forms is new with each start."""
    waiting, _ = await waiting_and_failing(connection)
    path = f"/change?action=cancel&id={waiting}"
    async with console(database, write=True) as client:
        form = {**fields(await client.get(path)), "reason": "a duplicate"}
    async with console(database, write=True) as client:
        kept = await client.post("/change", data=form, headers=FROM_A_PAGE)
        assert kept.status_code == 403
        assert "the daemon was restarted" in check(kept)
        done = await client.post("/change", data=fields(kept), headers=FROM_A_PAGE)
        assert done.status_code == 303
    assert await connection.fetchval(
        "SELECT status FROM sequencer.enrollments WHERE id = $1", waiting
    ) == ("cancelled")


@pytest.mark.usefixtures("changes_from_one")
async def test_a_page_that_outlives_a_restart_shows_no_other_change(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.undo()
    log = structlog.get_logger()
    numbers = []
    for _ in range(2):
        made = await actions.BulkChanges(log).make("n", "ada", "retry", {}, reason="r", to=None)
        numbers.append(made.number)
        await asyncio.sleep(0.01)
    assert numbers[1] > numbers[0] > 10**12


async def test_a_read_only_console_changes_nothing(
    database: str, connection: asyncpg.Connection
) -> None:
    _, failing = await waiting_and_failing(connection)
    async with console(database, {"Note": Fixable()}, password_hash=HASH) as client:
        await until(connection, FAILED)
        await log_in(client)
        page = await client.get(f"/enrollments/{failing}")
        assert "/console/change" not in page.text
        form = {"action": "retry", "id": str(failing), "token": token(page)}
        for refused in (
            await client.post("/change", data=form),
            await client.get("/change", params=form),
        ):
            assert refused.status_code == 403
            assert "Read only" in refused.text
        assert await connection.fetchval(FAILED)


async def test_forms_of_others_are_refused(database: str, connection: asyncpg.Connection) -> None:
    _, failing = await waiting_and_failing(connection)
    async with console(database, {"Note": Fixable()}, write=True) as client:
        await until(connection, FAILED)
        form = {"action": "cancel", "id": str(failing), "number": "1", "reason": "test"}
        right = token(await client.get("/change", params=form))
        for wrong, headers in (
            ({}, {}),
            ({"token": "x"}, {}),
            ({"token": "ü\ud800".encode("utf-8", "surrogatepass")}, {}),
            ({"token": right}, {"Sec-Fetch-Site": "cross-site"}),
            ({"token": right}, {"Cookie": "sequencerd=x"}),
        ):
            refused = await client.post("/change", data={**form, **wrong}, headers=headers)
            assert refused.status_code in (403, 422)
        assert await connection.fetchval(FAILED)
        for wrong in (
            {"action": "drop"},
            {"action": "cancel", "id": ""},
            {"action": "cancel", "id": "x"},
            {"action": "cancel", "id": "1,,2"},
            {"reason": " "},
            {"action": "move"},
            {"action": "move", "to": "nowhere"},
        ):
            refused = await client.post("/change", data={**form, **wrong, "token": right})
            assert refused.status_code == 422
        huge = {**form, "token": right, "more": "x" * MAX_FORM_OF_USERS}
        for headers in ({}, FROM_A_PAGE):
            refused = await client.post("/change", data=huge, headers=headers)
            assert refused.status_code == 422
            assert "The form is too large." in refused.text
        assert await connection.fetchval(FAILED)


async def test_failed_enrollments_are_retried_to_the_end(
    database: str, connection: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, failing = await waiting_and_failing(connection)
    runner = Fixable()
    async with console(database, {"Note": runner}, write=True, password_hash=HASH) as client:
        await until(connection, FAILED)
        await log_in(client)
        page = await client.get(f"/enrollments/{failing}")
        runner.is_fixed = True
        form = {
            "action": "retry",
            "id": str(failing),
            "number": "1",
            "reason": "mailbox  fixed",
            "token": token(page),
            "back": f"/console/enrollments/{failing}",
        }
        done = await client.post("/change", data=form)
        assert done.headers["location"] == f"/console/enrollments/{failing}"
        await until(
            connection,
            "SELECT status = 'completed' FROM sequencer.enrollments WHERE id = $1",
            failing,
        )
        page = await client.get(f"/enrollments/{failing}")
        assert "Retried 1 enrollment." in page.text
        monkeypatch.setattr(actions, "time", SimpleNamespace(monotonic=lambda: inf))  # much later
        assert "Retried 1 enrollment." not in (await client.get(f"/enrollments/{failing}")).text
        monkeypatch.undo()
        assert "note completed" in await way(connection, failing)
        message = await connection.fetchval(
            "SELECT message FROM sequencer.events WHERE action = 'resumed'"
        )
        assert message == "by postgres: Ada Lovelace in the console: mailbox fixed"
        # no way out of the console
        for to in ("https://evil.example/", "//evil.example", "/consolex", "/console\\@evil"):
            away = await client.post("/change", data={**form, "back": to})
            assert away.headers["location"] == "/console/", to


@pytest.mark.parametrize(
    ("action", "verb", "status"),
    [
        ("retry", "Retry", "completed"),
        ("skip", "Skip the step for", "completed"),
        ("cancel", "Cancel", "cancelled"),
    ],
)
async def test_a_whole_group_is_changed(
    database: str, connection: asyncpg.Connection, action: str, verb: str, status: str
) -> None:
    await waiting_and_failing(connection)
    await connection.execute(
        "INSERT INTO sequencer.enrollments (sequence, subject, step, status, failure)"
        " SELECT 's', 'g' || n, 'note', 'failed', CASE WHEN n > 2500 THEN 'loop' ELSE 'error' END"
        " FROM generate_series(1, 2510) AS n"
    )
    runner = Fixable()
    async with console(database, {"Note": runner}, write=True) as client:
        await until(
            connection,
            "SELECT status = 'failed' FROM sequencer.enrollments WHERE subject = 'bob'",
        )
        runner.is_fixed = True
        group = {"sequence": "s", "step": "note", "failure": "error", "action": action}
        page = await client.get("/change", params=group)
        assert f"{verb} 2,501 enrollments?" in page.text
        form = {**group, "token": token(page), "reason": "test"}
        # more than were asked about are not changed
        asked = await client.post("/change", data={**form, "number": "2500"})
        assert asked.status_code == 409
        assert "2,501 enrollments?" in asked.text
        made = await client.post("/change", data={**form, "number": "2501"})
        await until(
            connection,
            "SELECT count(*) = 2501 FROM sequencer.enrollments WHERE status = $1",
            status,
        )
        left = await connection.fetchval(
            "SELECT count(*) FROM sequencer.enrollments WHERE failure = 'loop'"
        )
        assert left == 10
        page = await page_once(client, made.headers["location"].removeprefix("/console"), 200)
        assert "2,501 enrollments" in page.text
        assert "local user" in page.text


async def test_the_role_of_the_daemon_is_enough(
    logins: dict[str, str], connection: asyncpg.Connection
) -> None:
    _, failing = await waiting_and_failing(connection)
    runner = Fixable()
    async with console(logins["daemon"], {"Note": runner}, write=True) as client:
        await until(connection, FAILED)
        await counted(client, "failures")
        for path in ("/", "/sequence?sequence=s&step=wait", "/search", "/search?q=ada@x.y"):
            assert (await client.get(path)).status_code == 200, path
        page = await client.get(f"/change?action=retry&id={failing}")
        runner.is_fixed = True
        form = {"action": "retry", "id": str(failing), "token": token(page)}
        await client.post("/change", data={**form, "number": "1", "reason": "test"})
        await until(
            connection, "SELECT status = 'completed' FROM sequencer.enrollments WHERE id = 2"
        )
    message = await connection.fetchval(
        "SELECT message FROM sequencer.events WHERE action = 'resumed'"
    )
    assert message == "by login_daemon: local user in the console: test"


# --- what is masked


async def test_masked_data_are_nowhere(database: str, connection: asyncpg.Connection) -> None:
    secret = {"email": "bob@example.com", "contact": {"phone": "+49 1511234567"}, "ok": "yes"}
    waiting, failing = await waiting_and_failing(connection)
    await connection.execute(
        "UPDATE sequencer.enrollments SET data = $2, subject = 'bob@example.com' WHERE id = $1",
        failing,
        json.dumps(secret),
    )
    await connection.execute(
        "INSERT INTO sequencer.events (enrollment_id, at, sequence, step, visit, action, message)"
        " VALUES ($1, now(), 's', 'note', 1, 'noop', 'to rob@old.example.com and bob@example.com')",
        failing,
    )
    group = "sequence=s&step=note&failure=error"
    async with console(database, {"Note": Fixable()}, mask=MASKED) as client:
        await until(connection, FAILED)
        await until(connection, BEGUN)
        await counted(client, "failures")
        for path in (
            f"/enrollments/{failing}",
            f"/enrollments/{waiting}",
            f"/search?{group}&columns=subject,data.email,data.contact.phone,last_error",
            f"/tables/search.json?{group}&columns=data.email,last_error,subject",
            "/failures",
            "/tables/failures.json",
            f"/tables/search.csv?{group}&sort=subject&columns=data.contact,subject",
            f"/tables/events.json?id={failing}",
            f"/tables/events.csv?id={failing}",
            "/tables/enrollments.json?sequence=s&step=wait",
            "/sequence?sequence=s&step=wait",
            "/search",
            "/tables/search.json",
            "/tables/search.csv",
            f"/search?q={failing}",
            f"/simulate?enrollment={waiting}",
            f"/tables/simulation.json?enrollment={waiting}",
        ):
            page = await client.get(path)
            assert page.status_code == 200, path
            assert "example.com" not in page.text, path
            assert "1511234567" not in page.text, path
        page = await client.get(f"/enrollments/{failing}")
        assert "•••" in page.text
        assert "&#34;ok&#34;: &#34;yes&#34;" in page.text
        for where in ("data.email = bob@example.com", "data.contact = {}", "contact.phone.0=1"):
            refused = await client.get("/search", params={"where": where})
            assert refused.status_code == 422
            assert "is masked" in refused.text
        # it cannot be found out whose an address is
        page = await client.get("/tables/search.json?q=ada@example.com")
        assert page.json()["rows"] == []
        assert "masked" in (await client.get("/search?q=ada@example.com")).text
    async with console(database, {"Note": Fixable()}, mask=["subject"]) as client:
        assert "bob" not in (await client.get("/search")).text.replace("bob@", "")
        assert (await client.get("/tables/search.json?q=ad")).json()["rows"] == []


async def test_large_cookies_take_little_time(database: str) -> None:
    async with console(database, password_hash=passwords.make_hash("horse")) as client:
        await client.get("/login")
        escapes, before = r"\x" * 30_000, process_time()
        for cookie in ("sequencerd", "other"):
            kept = {"Cookie": f'{cookie}="{escapes}"; z=1'}
            assert (await client.get("/login", headers=kept)).status_code == 200
        assert process_time() - before < 2  # seconds


# --- settings


def test_a_console_open_to_everyone_is_refused(sequencerd: Command) -> None:
    on = {"SEQUENCERD_CONSOLE_ENABLED": "true"}
    assert load(on).listen == "127.0.0.1:9187"
    assert load({}).listen is None
    for listen in ("127.0.0.2:80", "localhost:1", "[::1]:80", "80"):
        load({**on, "SEQUENCERD_HTTP_LISTEN": listen}).check_console()
    for listen in ("0.0.0.0:80", "[::]:80", "10.0.0.1:80", "console.example:80"):
        everywhere = {**on, "SEQUENCERD_HTTP_LISTEN": listen}
        with pytest.raises(SettingsError, match="open to everyone"):
            load(everywhere).check_console()
        for safe in (
            {"SEQUENCERD_CONSOLE_PASSWORD_HASH": HASH},
            {"SEQUENCERD_CONSOLE_TRUSTED_PROXY": "10.0.0.2, 10.1.0.0/16"},
            {"SEQUENCERD_CONSOLE_ENABLED": "false"},
        ):
            load({**everywhere, **safe}).check_console()
    sequencerd.variables |= {**on, "SEQUENCERD_HTTP_LISTEN": "0.0.0.0:0"}
    sequencerd("run", code=2)
    assert "sequencerd console-password" in sequencerd.errors


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("PASSWORD_HASH", "secret", "console-password"),
        ("TRUSTED_PROXY", "proxy.example", "proxy.example"),
        ("MASK", "email", "data.email"),
        ("USER_HEADER", "a b", "user_header"),
        ("WRITES", "true", "did you mean SEQUENCERD_CONSOLE_WRITE"),
    ],
)
def test_wrong_settings_are_explained(name: str, value: str, words: str) -> None:
    with pytest.raises(SettingsError, match=re.escape(words)):
        load({f"SEQUENCERD_CONSOLE_{name}": value})


def test_the_section_enables_the_console(tmp_path: Path) -> None:
    file = tmp_path / "sequencerd.toml"
    file.write_text("[console]\n")
    console = load({}, file).console
    assert console is not None
    assert console.enabled
    assert not console.write
    file.write_text("[console]\nwrites = true\n")
    with pytest.raises(SettingsError, match="did you mean 'write'"):
        load({}, file)


def test_the_command_makes_a_hash(sequencerd: Command) -> None:
    # also where the daemon does not start for the want of one
    sequencerd.variables |= {
        "SEQUENCERD_CONSOLE_ENABLED": "true",
        "SEQUENCERD_HTTP_LISTEN": "0.0.0.0:80",
        "SEQUENCERD_CONSOLE_PASSWORD_HASH": "to be made",
    }
    given = f"{PASSWORD}\n".encode()
    made = sequencerd("console-password", stdin=given).strip()
    assert passwords.matches(PASSWORD, made)
    assert not passwords.matches("wrong horse", made)
    assert made != sequencerd("console-password", stdin=given).strip()
    assert PASSWORD not in made
    sequencerd("console-password", stdin=b"short\n", code=1)


# --- the daemon


async def test_the_daemon_serves_the_console(database: str, connection: asyncpg.Connection) -> None:
    waiting, _ = await waiting_and_failing(connection)
    async with daemon(database, SEQUENCERD_CONSOLE_WRITE="true") as client:
        await answers(client, "/readyz", is_ok)
        await until(
            connection,
            "SELECT visit = 1 AND wake_at > now() FROM sequencer.enrollments WHERE id = $1",
            waiting,
        )
        page = await client.get(f"/console/enrollments/{waiting}")
        assert page.status_code == 200
        assert "Waits for 1 day, until " in page.text
        for path in ("/", "/console"):
            page = await client.get(path, follow_redirects=True)
            assert page.url.path == "/console/"
        # an open stream doesn't hold up the end
        stream = await client.send(client.build_request("GET", "/console/live"), stream=True)
        assert stream.status_code == 200
    await stream.aclose()
    async with daemon(database) as client:
        await answers(client, "/readyz", is_ok)
        assert (await client.get("/console/")).status_code == 404
