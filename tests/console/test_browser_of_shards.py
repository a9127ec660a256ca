"""The console of several shards in a real browser, and what a role may do in it."""

from __future__ import annotations

from itertools import cycle
from typing import TYPE_CHECKING

import httpx
import pytest
import structlog
from starlette.routing import Mount, Route

from sequencerd.console.app import ServedShard
from sequencerd.console.auth import ROLES
from sequencerd.console.shards import make_console_of_shards
from sequencerd.definitions.simulator import Simulator
from sequencerd.settings import ConsoleSettings, Role
from tests.console.conftest import counted, token, window
from tests.console.test_access import HASH, log_in
from tests.console.test_browser import NO_PAGES, SCHEMES, check_accessible, shows
from tests.console.test_roles import NEEDED
from tests.console.test_shards import console
from tests.helpers.command_line import Command
from tests.helpers.shards import NAMES, place

if TYPE_CHECKING:
    from playwright.async_api import Browser

CHANGE = "/console/changes/1"
PAGES = (
    "/console/",
    "/console/sequence?sequence=s&step=first",
    "/console/failures",
    "/console/health",
    "/console/search?sequence=s",
    "/console/over-time",
    "/console/funnel?sequence=s",
    "/console/simulate?sequence=s",
    "/console/message?sequence=s&step=first",
    "/console/enrollments/b/2",
    "/console/data?id=b/2",
    "/console/change?action=move&status=active",
    CHANGE,
    "/console/enroll?sequence=s",
    "/console/suppressions",
    "/console/suppress",
    "/console/suppression?channel=email&address=ada@example.com&topic=*",
    "/console/edit?sequence=s",
    "/console/step?sequence=s&step=first",
    "/console/status?sequence=s&action=pause",
    "/console/shards/b/",
    "/console/shards/b/sequence?sequence=s",
    "/console/nonsense",
)
OF_SESSIONS = ("/login", "/sessions")
WRITES = {"SEQUENCERD_CONSOLE_WRITE": "true"}


def _app() -> list[Route]:
    served = [
        ServedShard(
            place("postgresql:///", name),
            ConsoleSettings(),
            lambda: Simulator({}, {}),
            lambda: None,  # type: ignore[arg-type, return-value]
            dict,
            str,
        )
        for name in NAMES
    ]
    routes = make_console_of_shards(served, structlog.get_logger()).routes
    assert sum(isinstance(route, Mount) for route in routes) == len(NAMES)
    return [route for route in routes if isinstance(route, Route)]


def test_every_page_of_all_shards_is_among_those_that_are_tested() -> None:
    tested = [path.partition("?")[0].removeprefix("/console") for path in PAGES]
    tested += OF_SESSIONS
    for route in _app():
        if "GET" in (route.methods or ()) and route.path not in NO_PAGES:
            assert any(map(route.path_regex.match, tested)), f"no test opens {route.path}"


async def test_every_page_of_all_shards_is_accessible(filled: Command, browser: Browser) -> None:
    async with console(filled, "console", **WRITES) as client:
        await counted(client, "steps", sequence="s")
        key = {"channel": "email", "address": "ada@example.com", "reason": "x"}
        page = await client.get("/suppress")
        await client.post("/suppress", data={**key, "token": token(page)})
        made = await _change(client)
        async with window(browser, client) as view:
            # in one scheme each, as their templates are those of pages that are tested in both
            for path, scheme in zip(PAGES, cycle(SCHEMES.values()), strict=False):
                await view.emulate_media(color_scheme=scheme)
                await view.goto(made if path == CHANGE else path)
                await view.locator("main h1").first.wait_for()
                await check_accessible(view)


async def _change(client: httpx.AsyncClient) -> str:
    asked = await client.get("/change?action=reevaluate&status=active")
    form = {"action": "reevaluate", "status": "active", "number": "4", "reason": "x"}
    made = await client.post("/change", data={**form, "token": token(asked)})
    assert made.status_code == 303, made.text
    return made.headers["location"]


async def test_from_all_shards_into_one_shard_by_keyboard(
    filled: Command, browser: Browser
) -> None:
    async with console(filled, "console") as client:
        await counted(client, "steps", sequence="s")
        async with window(browser, client) as page:
            await page.goto("/console/search")
            await page.locator("h1").click()
            await page.keyboard.press("j")
            await page.keyboard.press("Enter")
            await page.wait_for_url("**/shards/*/enrollments/*")
            # the same page of another shard, or of all
            await page.goto("/console/shards/a/search")
            for _ in range(30):
                await page.keyboard.press("Tab")
                focused = "document.activeElement.getAttribute('href')"
                if await page.evaluate(focused) == "/console/shards/b/search":
                    break
            await page.keyboard.press("Enter")
            await page.wait_for_url("**/shards/b/search")
            await shows(page, "td.id", "b/2")
            await page.go_back()
            await page.wait_for_url("**/shards/a/search")
            await shows(page, "td.id", "a/2")


@pytest.mark.parametrize("role", ["viewer", "operator"])
async def test_a_role_restricts_changes_of_all_shards(filled: Command, role: Role) -> None:
    routes = {route.path for route in _app() if "POST" in (route.methods or ())}
    assert routes <= {*NEEDED}
    settings = {"SEQUENCERD_CONSOLE_PASSWORD_HASH": HASH, "SEQUENCERD_CONSOLE_ROLE": role}
    async with console(filled, "console", **WRITES, **settings) as client:
        await log_in(client)
        page = await client.get("/")
        for path in routes:
            needed = NEEDED[path]
            if needed is None or ROLES.index(role) >= ROLES.index(needed):
                continue
            answer = await client.post(path, data={"token": token(page), "sequence": "s"})
            assert answer.status_code == 403, path
            assert f"This needs the role {needed}" in answer.text, path
