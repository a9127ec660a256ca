"""Every route that changes something is tried by each role, without a login, with a forged form,
and without console.write. A refused request changes nothing and reveals nothing.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any, Literal

import asyncpg
import httpx

from sequencerd.console.auth import ROLES
from sequencerd.console.sessions import hash_of
from sequencerd.passwords import make_hash
from sequencerd.runners import Runner
from tests.console.conftest import DAY, console, fixture, routes, token
from tests.helpers.engines import Recorder, define, enroll
from tests.helpers.runners import email_runner
from tests.helpers.servers import HOST
from tests.helpers.waiting import eventually

Role = Literal["viewer", "operator", "editor"]

NAME, EMAIL = "Konrad Zuse", "zuse@example.com"
SECRETS = ("zuse", "konrad")
LETTER = json.dumps(
    {"from": "us@shop.test", "to": "{{data.email}}", "subject": "For {{data.name}}", "text": "x"}
)
CHANGED = """\
name: s
steps:
  - name: wait
    type: WaitForDuration
    config: {amount: 2, unit: day}
    next: letter
  - name: letter
    type: Email
    config: {from: us@shop.test, to: "{{data.email}}", subject: x, text: x}
"""

NEEDED: dict[str, Role | None] = {
    "/message/test": "operator",
    "/change": "operator",
    "/data": "operator",
    "/enroll": "operator",
    "/suppress": "operator",
    "/suppression": "operator",
    "/edit": "editor",
    "/edit/check": "editor",
    "/step": "editor",
    "/step/edited": "editor",
    "/status": "editor",
    "/sessions": "viewer",
    "/login": None,
    "/logout": None,
    "/oidc": None,
}
"""The role that each route needs; None changes at most the session of the request."""

WITHOUT_WRITE = ("/sessions", "/login", "/logout", "/oidc")
SHOWS_ALONE = ("/message/test", "/edit/check", "/step", "/step/edited")
"""What changes no table."""

PROXY: dict[str, Any] = {
    "trusted_proxy": ["127.0.0.1"],
    "viewer_groups": ["viewer"],
    "operator_groups": ["operator"],
    "editor_groups": ["editor"],
    "password_hash": make_hash("secret"),
    "mask": ["subject", "data.email", "data.name"],
    "mask_for": ["viewer"],
}
"""The proxy names the user of a request, and one that it does not name logs in."""


def _runners() -> Mapping[str, Runner]:
    return {"Email": email_runner(f"smtp://{HOST}:9"), "Note": Recorder()}


def test_every_route_that_changes_something_is_among_those_that_are_tested() -> None:
    assert {route.path for route in routes("POST")} == {*NEEDED}


@asynccontextmanager
async def console_of_users(database: str, **settings: Any) -> AsyncIterator[httpx.AsyncClient]:
    async with console(database, _runners(), own=_runners, **PROXY, **settings) as client:
        yield client


def as_role(role: Role | None) -> dict[str, str]:
    return {} if role is None else {"X-Forwarded-User": role, "X-Forwarded-Groups": role}


@fixture
async def forms(connection: asyncpg.Connection) -> dict[str, dict[str, str]]:
    """Of each route a form that would change something, if an editor sent it."""
    await define(
        connection,
        "s",
        ("wait", "WaitForDuration", DAY, "letter"),
        ("letter", "Email", LETTER, None),
    )
    data = json.dumps({"email": EMAIL, "name": NAME})
    id_ = str(await enroll(connection, "s", NAME, data))
    await connection.execute(
        "INSERT INTO sequencer.suppressions (channel, address) VALUES ('email', $1)", EMAIL
    )
    await connection.execute(
        'INSERT INTO sequencer.console_sessions (session, "user", credential, address, agent,'
        " expires_at) VALUES ($1, $2, 'x', '10.0.0.1', 'x', now() + interval '1 hour')",
        hash_of("a session"),
        NAME,
    )
    revision = str(await connection.fetchval("SELECT revision FROM sequencer.sequences"))
    edited = {"sequence": "s", "text": CHANGED, "base": revision}
    return {
        "/message/test": {"sequence": "s", "step": "letter", "enrollment": id_, "address": EMAIL},
        "/change": {"action": "cancel", "id": id_, "number": "1", "reason": "x"},
        "/data": {"id": id_, "text": "{}", "action": "apply", "reason": "x"},
        "/enroll": {"sequence": "s", "subject": "ada", "reason": "x"},
        "/suppress": {"channel": "email", "address": "ada@example.com", "reason": "x"},
        "/suppression": {"channel": "email", "address": EMAIL, "topic": "*", "reason": "x"},
        "/edit": {**edited, "action": "apply", "reason": "x"},
        "/edit/check": edited,
        "/step": {**edited, "step": "wait"},
        "/step/edited": {**edited, "step": "wait"},
        "/status": {"sequence": "s", "action": "pause", "reason": "x"},
        "/sessions": {"session": hash_of("a session")},
        "/login": {"name": "Ada", "password": "wrong"},
        "/logout": {},
        "/oidc": {},
    }


async def settled(connection: asyncpg.Connection) -> None:
    """Wait until the engine has taken the enrollment up, and writes nothing more."""
    await eventually(
        lambda: connection.fetchval("SELECT wake_at > now() + '1 hour' FROM sequencer.enrollments")
    )


async def tables(connection: asyncpg.Connection) -> dict[str, str]:
    """Return what all tables hold, but for what daemons write by themselves."""
    names = await connection.fetch(
        "SELECT relname FROM pg_class WHERE relnamespace = 'sequencer'::regnamespace"
        " AND relkind IN ('r', 'p') AND NOT relispartition"
        " AND relname NOT IN ('daemons', 'activity', 'activity_progress', 'lateness', 'rates')"
    )
    return {
        name: await connection.fetchval(
            f"SELECT string_agg(t::text, ' ' ORDER BY t::text) FROM sequencer.{name} AS t"
        )
        for (name,) in names
    }


async def token_of(client: httpx.AsyncClient, headers: Mapping[str, str]) -> str:
    return token(await client.get("/login" if not headers else "/health", headers=headers))


def _tells_nothing(answer: httpx.Response) -> None:
    told = "".join((*map(str, answer.headers.items()), answer.text)).lower()
    assert not any(secret in told for secret in SECRETS), answer.text


REFUSED: dict[str, dict[str, str]] = {
    "/change": {"action": "move", "to": "letter", "number": "0", "reason": "a typo"},
    "/data": {"text": "{", "reason": "a typo"},
    "/edit": {"text": "steps: []", "reason": "a typo", "brake": "500"},
    "/enroll": {"email": "not an address", "data": "{", "step": "letter", "reason": "a typo"},
    "/suppress": {"topic": "a b", "reason": "a typo"},
    "/suppression": {"reason": "", "confirmed": "yes"},
    "/message/test": {"address": "not an address"},
}
"""What each form is refused for. The pages of /status and /step have no such error."""


async def test_a_refused_form_keeps_what_was_entered(
    database: str, connection: asyncpg.Connection, forms: dict[str, dict[str, str]]
) -> None:
    await connection.execute("UPDATE sequencer.suppressions SET source = 'bounce'")
    async with console_of_users(database, write=True) as client:
        headers = as_role("editor")
        shared = {"token": await token_of(client, headers)}
        await settled(connection)
        for path, entered in REFUSED.items():
            form = {**forms[path], **entered, **shared}
            if path == "/data":
                asked = await client.get(f"/data?id={form['id']}", headers=headers)
                form["version"] = fields_of(asked)["version"]
            refused = await client.post(path, data=form, headers=headers)
            assert refused.status_code in (409, 422), path
            found = fields_of(refused)
            for name, value in entered.items():
                if name not in ("action", "number"):
                    assert found.get(name) == value, f"{path}: {name}"
        asked = await client.get("/status?sequence=s&action=pause&reason=a+typo", headers=headers)
        assert fields_of(asked)["reason"] == "a typo"
        # a plan is made again
        form = {**forms["/edit"], "action": "plan", "reason": "a typo", "brake": "7", **shared}
        planned = fields_of(await client.post("/edit", data=form, headers=headers))
        assert (planned["reason"], planned["brake"]) == ("a typo", "7")


def fields_of(page: httpx.Response) -> dict[str, str]:
    """Return what the fields of the page's forms contain."""
    found = {}
    for tag in re.findall("<input[^>]*>", page.text):
        attributes = dict(re.findall(r'(\w+)="([^"]*)"', tag))
        if attributes.get("type") != "checkbox" or " checked" in tag:
            found[attributes["name"]] = html.unescape(attributes.get("value", ""))
    for name, text in re.findall(
        r'<textarea[^>]*name="(\w+)"[^>]*>\n?(.*?)</textarea>', page.text, re.DOTALL
    ):
        found[name] = html.unescape(text)
    for name, options in re.findall(
        r'<select[^>]*name="([\w.]+)"[^>]*>(.*?)</select>', page.text, re.DOTALL
    ):
        if chosen := re.search(r"<option[^>]* selected>([^<]*)", options):
            found[name] = html.unescape(chosen[1])
    return found


async def test_a_forbidden_change_changes_nothing(
    database: str, connection: asyncpg.Connection, forms: dict[str, dict[str, str]]
) -> None:
    async with console_of_users(database, write=True) as client:
        await settled(connection)
        before = await tables(connection)
        for role in ROLES:
            headers = as_role(role)
            given = await token_of(client, headers)
            for path, form in forms.items():
                needed = NEEDED[path]
                forged = await client.post(path, data={**form, "token": "x"}, headers=headers)
                assert forged.status_code == 403, (role, path)
                assert "This form has expired or comes from another site" in forged.text
                elsewhere = await client.post(
                    path,
                    data={**form, "token": given},
                    headers={**headers, "Sec-Fetch-Site": "cross-site"},
                )
                assert elsewhere.status_code == 403, (role, path)
                if needed is None or ROLES.index(role) >= ROLES.index(needed):
                    continue
                refused = await client.post(path, data={**form, "token": given}, headers=headers)
                assert refused.status_code == 403, (role, path)
                assert f"This needs the role {needed}; {role} has the role {role}." in refused.text
                for answer in (forged, elsewhere, refused):
                    _tells_nothing(answer)
        # a viewer ends no other user's session
        headers = as_role("viewer")
        form = {**forms["/sessions"], "token": await token_of(client, headers)}
        refused = await client.post("/sessions", data=form, headers=headers)
        assert refused.status_code == 404
        _tells_nothing(refused)
        assert await tables(connection) == before


async def test_without_a_login_nothing_is_changed(
    database: str, connection: asyncpg.Connection, forms: dict[str, dict[str, str]]
) -> None:
    async with console_of_users(database, write=True) as client:
        await settled(connection)
        before = await tables(connection)
        given = await token_of(client, {})
        for path, form in forms.items():
            answer = await client.post(path, data={**form, "token": given})
            _tells_nothing(answer)
            if NEEDED[path] is not None:
                assert answer.status_code == 303, path
                assert answer.headers["location"].startswith("/console/login?"), path
        assert await tables(connection) == before


async def test_a_console_that_only_reads_changes_nothing(
    database: str, connection: asyncpg.Connection, forms: dict[str, dict[str, str]]
) -> None:
    async with console_of_users(database) as client:
        await settled(connection)
        before = await tables(connection)
        for role in ROLES:
            headers = as_role(role)
            given = await token_of(client, headers)
            for path, form in forms.items():
                if path in WITHOUT_WRITE:
                    continue
                refused = await client.post(path, data={**form, "token": given}, headers=headers)
                assert refused.status_code == 403, (role, path)
                assert "Set console.write = true" in refused.text
                _tells_nothing(refused)
        assert await tables(connection) == before


async def test_the_refused_changes_work_for_an_editor(
    database: str, connection: asyncpg.Connection, forms: dict[str, dict[str, str]]
) -> None:
    headers = as_role("editor")
    async with console_of_users(database, write=True) as client:
        await settled(connection)
        given = await token_of(client, headers)
        # the forms have what the pages before have: the plan, and the version of the data
        edit, data = forms["/edit"], forms["/data"]
        planned = await client.post(
            "/edit", data={**edit, "action": "plan", "token": given}, headers=headers
        )
        asked = await client.get("/data", params={"id": data["id"]}, headers=headers)
        for form, page, name in ((edit, planned, "plan"), (data, asked, "version")):
            found = re.search(f'name="{name}" value="([^"]+)"', page.text)
            assert found, page.text
            form[name] = found[1]
        for path, form in forms.items():
            if NEEDED[path] is None:
                continue
            before = await tables(connection)
            answer = await client.post(path, data={**form, "token": given}, headers=headers)
            assert answer.status_code not in (401, 403, 500), f"{path}: {answer.text}"
            if path not in SHOWS_ALONE:
                assert answer.status_code == 303, f"{path}: {answer.text}"
                assert await tables(connection) != before, path
