"""Users of the console: their roles, from the settings or from the groups of a proxy, and their
sessions.
"""

from __future__ import annotations

import re
from typing import Any

import asyncpg
import httpx
import pytest

from sequencerd.console.sessions import hash_of
from sequencerd.errors import SettingsError
from sequencerd.settings import Settings
from sequencerd.settings_file import load
from tests.console.conftest import FAILED, Fixable, console, token, waiting_and_failing
from tests.helpers.engines import until

PASSWORDS = {name: f"{name}'s horse" for name in ("vera", "otto", "edda")}
MADE = "scrypt$32768$8$1$"
HASHES = {  # made before, as that takes a tenth of a second for each
    "vera": "9HRvIjrqIbasV4fQbBpS2Q==$p2HlZlFzwU6cRG6u7Yg1qU2xiZ8i5D82z9Hr2MEkdCE=",
    "otto": "GCnDnC3en9gHt3sqJU7aSQ==$1uaFnu9IL4LcaqGOyFjgZWXwEuMwM9CeB4Dh2eojHdw=",
    "edda": "49B6Mlh8vx7z4ZAtnefUsg==$HHHXtS3XU+APqWNPcg8hUBaX3b4krFvCQ1+ZZSJAb9w=",
}
USERS: dict[str, Any] = {
    "vera": {"password_hash": MADE + HASHES["vera"]},
    "otto": {"password_hash": MADE + HASHES["otto"], "role": "operator"},
    "edda": {"password_hash": MADE + HASHES["edda"], "role": "editor"},
}
GROUPS = {"viewer_groups": ["staff"], "operator_groups": ["ops"], "editor_groups": ["marketing"]}


async def log_in(client: httpx.AsyncClient, name: str, password: str | None = None) -> int:
    """Log in and return the status; 303 is success."""
    page = await client.get("/login")
    given = PASSWORDS[name] if password is None else password
    form = {"token": token(page), "name": name, "password": given}
    return (await client.post("/login", data=form)).status_code


@pytest.mark.slow
async def test_each_user_has_a_password(database: str, connection: asyncpg.Connection) -> None:
    async with console(database, users=USERS) as client:
        assert await log_in(client, "vera", PASSWORDS["otto"]) == 403
        assert await log_in(client, "nobody", PASSWORDS["otto"]) == 403
        assert (await client.get("/")).status_code == 303
        assert await log_in(client, "otto") == 303
        assert ">otto</a>" in (await client.get("/")).text
    # a user that is gone, or whose password is another, is logged out
    kept = {"Cookie": f"sequencerd={client.cookies['sequencerd']}"}
    async with console(database, users={**USERS, "otto": USERS["vera"]}) as client:
        assert (await client.get("/", headers=kept)).status_code == 303
    async with console(database, users={"vera": USERS["vera"]}) as client:
        assert (await client.get("/", headers=kept)).status_code == 303


async def test_a_role_is_required(database: str, connection: asyncpg.Connection) -> None:
    _, failing = await waiting_and_failing(connection)
    async with console(database, {"Note": Fixable()}, users=USERS, write=True) as client:
        await until(connection, FAILED)
        await log_in(client, "vera")
        page = await client.get(f"/enrollments/{failing}")
        assert "/console/change" not in page.text
        form = {"action": "cancel", "id": str(failing), "number": "1", "reason": "test"}
        for refused in (
            await client.get("/change", params=form),
            await client.post("/change", data={**form, "token": token(page)}),
        ):
            assert refused.status_code == 403
            assert "This needs the role operator; vera has the role viewer." in refused.text
        assert await connection.fetchval(FAILED)
        client.cookies.clear()
        await log_in(client, "otto")
        page = await client.get("/change", params=form)
        assert (
            await client.post("/change", data={**form, "token": token(page)})
        ).status_code == 303
        message = await connection.fetchval(
            "SELECT message FROM sequencer.events WHERE action = 'cancelled'"
        )
        assert message == "by postgres: otto in the console: test"


async def test_a_proxy_names_groups(database: str, connection: asyncpg.Connection) -> None:
    proxy: dict[str, Any] = {"trusted_proxy": ["127.0.0.1"], "write": True, **GROUPS}
    asked = {"action": "cancel", "id": "1"}

    def ada(*groups: str) -> list[tuple[str, str]]:
        return [("X-Forwarded-User", "ada"), *(("X-Forwarded-Groups", group) for group in groups)]

    async with console(database, **proxy) as client:
        for headers, page, change in (
            (ada(), 403, 403),
            (ada("interns"), 403, 403),
            (ada("staff"), 200, 403),
            (ada("staff, ops"), 200, 200),
            (ada("interns", "marketing"), 200, 200),
        ):
            assert (await client.get("/", headers=headers)).status_code == page, headers
            answer = await client.get("/change", params=asked, headers=headers)
            assert answer.status_code == change, headers
        refused = await client.get("/", headers=ada("interns"))
        assert "ada has no role in the console" in refused.text
    # a header from an address that is not the proxy's names nobody
    async with console(database, **{**proxy, "trusted_proxy": ["10.1.2.3"]}) as client:
        assert (await client.get("/", headers=ada("marketing"))).status_code == 403
    async with console(database, **{**proxy, "viewer_groups": ["*"]}) as client:
        assert (await client.get("/", headers=ada("interns"))).status_code == 200


async def test_sessions_are_listed_and_ended(database: str, connection: asyncpg.Connection) -> None:
    async with console(database, users=USERS) as client:
        cookies: dict[str, str] = {}
        for name in ("vera", "vera", "edda"):
            client.cookies.clear()
            client.headers["User-Agent"] = f"browser of {name}"
            await log_in(client, name)
            cookies[f"{name}{len(cookies)}"] = client.cookies["sequencerd"]
        client.cookies.clear()
        first, second, edda = ({"Cookie": f"sequencerd={kept}"} for kept in cookies.values())
        hashes = {name: hash_of(kept) for name, kept in cookies.items()}
        kept = await connection.fetch("SELECT * FROM sequencer.console_sessions")
        assert {row["session"] for row in kept} == {*hashes.values()}
        assert not any(value in str(row) for row in kept for value in cookies.values())
        page = await client.get("/sessions", headers=second)
        assert page.text.count("browser of vera") == 2
        assert "browser of edda" not in page.text
        # another user's session cannot be ended by a viewer
        form = {"token": token(page), "session": hashes["edda2"]}
        assert (await client.post("/sessions", headers=second, data=form)).status_code == 404
        form["session"] = hashes["vera0"]
        wrong = await client.post("/sessions", headers=second, data={**form, "token": "x"})
        assert wrong.status_code == 403
        assert (await client.get("/", headers=first)).status_code == 200
        assert (await client.post("/sessions", headers=second, data=form)).status_code == 303
        assert (await client.get("/", headers=first)).status_code == 303
        assert (await client.get("/", headers=second)).status_code == 200
        page = await client.get("/sessions", headers=edda)
        assert "browser of vera" in page.text
        form = {"token": token(page), "session": hashes["vera1"]}
        assert (await client.post("/sessions", headers=edda, data=form)).status_code == 303
        assert (await client.get("/", headers=second)).status_code == 303


async def test_a_session_expires(database: str, connection: asyncpg.Connection) -> None:
    async with console(database, users=USERS) as client:
        await log_in(client, "vera")
        assert (await client.get("/")).status_code == 200
        await connection.execute("UPDATE sequencer.console_sessions SET expires_at = now()")
        assert (await client.get("/")).headers["location"].startswith("/console/login")
        assert (await client.get("/tables/search.json")).status_code == 401
        await log_in(client, "vera")  # which deletes it
        assert await connection.fetchval("SELECT count(*) FROM sequencer.console_sessions") == 1


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"users": USERS, "password_hash": USERS["vera"]["password_hash"]}, "not both"),
        ({"users": {"ada": {"password_hash": "secret"}}}, "console-password"),
        ({"users": {" ": USERS["vera"]}}, "not the name of a user"),
        ({"users": {"ada": {**USERS["vera"], "role": "admin"}}}, "viewer"),
        ({"role": "root"}, "viewer"),
        ({"viewer_groups": ["staff"]}, "set oidc or trusted_proxy"),
        ({"oidc": {"issuer": "https://id.example", "client_id": "x"}}, "url"),
        (
            {
                "oidc": {
                    "issuer": "https://id.example",
                    "client_id": "x",
                    "url": "https://c.example",
                }
            },
            "oidc needs groups",
        ),
        (
            {"oidc": {"issuer": "id.example", "client_id": "x", "url": "https://c.example"}},
            "issuer",
        ),
    ],
)
def test_wrong_settings_are_explained(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        Settings.model_validate({"console": settings})


def test_groups_are_set_by_variables() -> None:
    found = load(
        {
            "SEQUENCERD_CONSOLE_TRUSTED_PROXY": "10.0.0.1",
            "SEQUENCERD_CONSOLE_VIEWER_GROUPS": "All Staff, ops",
        }
    ).console
    assert found is not None
    assert found.viewer_groups == ("All Staff", "ops")
    with pytest.raises(SettingsError, match="role"):
        load({"SEQUENCERD_CONSOLE_ROLE": "root"})
