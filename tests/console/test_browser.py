"""The console in a real browser: Debian's chromium, driven by Playwright. `bin/browser` installs
them. If one is missing, the tests are skipped, and the end of the run reports that. The screenshots
of docs/console.md are made here: with SCREENSHOTS=1 they are written to docs/.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from urllib.parse import urlencode

import asyncpg
import httpx
import pytest

from sequencerd.console import live, summary
from sequencerd.console.summary import HISTORY_DAYS
from sequencerd.definitions import apply_plan
from sequencerd.definitions.files import read_file
from sequencerd.passwords import make_hash
from sequencerd.service import public
from sequencerd.service.page_texts import TEXTS
from tests.console.conftest import (
    BEGUN,
    DAY,
    FAILED,
    Fixable,
    Line,
    console,
    routes,
    token,
    waiting_and_failing,
    window,
)
from tests.helpers.command_line import start_sequencerd
from tests.helpers.engines import Recorder, define, enroll, until
from tests.helpers.waiting import PATIENCE
from tests.service.test_http_server import answers, free_port, is_ok

if TYPE_CHECKING:
    from playwright.async_api import Browser, Page
    from playwright.async_api import Route as Handled

REPOSITORY = Path(__file__).parent.parent.parent
AXE = (Path(__file__).parent / "vendor/axe.js").read_text()
LAYOUT = (Path(__file__).parent / "layout.js").read_text()


@pytest.fixture(autouse=True)
def _in_short_intervals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "POLL_INTERVAL", 0.1)


RUN_AXE = """async () => {
    if (!("axe" in window)) return null;
    const tags = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"];
    const options = { runOnly: tags, resultTypes: ["violations"], selectors: false };
    const { violations } = await axe.run(options);
    return violations.map((v) => `${v.id}: ${v.nodes.map((n) => n.html).join(" | ")}`);
}"""


async def check_accessible(page: Page) -> None:
    """Check the rules of WCAG 2.2 AA with axe, which is injected past the page's policy."""
    found = await page.evaluate(RUN_AXE)
    if found is None:
        await page.evaluate(AXE)
        await page.add_init_script(AXE)  # sent once for all that is opened from now on
        found = await page.evaluate(RUN_AXE)
    assert found == [], page.url


async def text_of(page: Page, selector: str) -> str:
    return " ".join((await page.locator(selector).first.text_content() or "").split())


async def shows(page: Page, selector: str, words: str) -> None:
    """Waits until it does, without being loaded again."""
    await page.locator(selector, has_text=words).first.wait_for()


PAGES = (
    "/console/",
    "/console/sequence?sequence=s&step=wait",
    "/console/enrollments/1",
    "/console/enrollments/2",
    "/console/failures",
    "/console/search?sequence=s&step=note&status=failed&failure=error",
    "/console/change?action=move&status=failed",
    "/console/search?q=ada",
    "/console/simulate?sequence=s&data=%7B%7D",
    "/console/health",
    "/console/over-time",
    "/console/over-time?sequence=s&by=hour",
    "/console/changes/1",
    "/console/message?sequence=s&step=note",
    "/console/data?id=1",
    "/console/enroll?sequence=s",
    "/console/suppressions",
    "/console/suppress",
    "/console/suppression?channel=email&address=ada@example.com&topic=*",
    "/console/edit?sequence=s",
    "/console/step?sequence=s&step=wait",
    "/console/status?sequence=s&action=pause",
    "/console/revision?sequence=s&revision=2",
    "/console/funnel?sequence=s",
    "/console/nonsense",
)
OF_SESSIONS = ("/console/login", "/console/sessions")
NO_PAGES = (
    "/tables/{name}.{form}",
    "/edit/schema",
    "/live",
    "/static/{name:path}",
    "/message/frame",
    "/simulate/frame",
    "/oidc",
)
"""What answers programs, or leads on to a page."""


SCHEMES: dict[int, Literal["dark", "light"]] = {360: "dark", 1280: "light"}
WIDTHS = (360, 768, 1280, 1920)
"""A page is checked at each of them, and as to colours in the scheme that it has above."""

CUT_OFF = """() => [...document.querySelectorAll("td, dd, dt, h1, h2, p, li, button, label, nav a")]
    .filter((e) => e.offsetParent !== null && getComputedStyle(e).position !== "absolute")
    .filter((e) => e.scrollWidth > e.clientWidth + 1 && getComputedStyle(e).display !== "inline"
        || e.tagName === "TD" && e.scrollHeight > e.clientHeight + 2)
    .map((e) => e.outerHTML)"""
"""What spills over its box."""
LOOK = f"""(thumbs) => [
    document.documentElement.scrollWidth,
    ({CUT_OFF})(),
    ({LAYOUT})(thumbs),
    getComputedStyle(document.body).backgroundColor,
]"""


def test_every_page_is_among_those_that_are_tested() -> None:
    tested = [path.partition("?")[0].removeprefix("/console") for path in (*PAGES, *OF_SESSIONS)]
    for route in routes("GET"):
        if route.path not in NO_PAGES:
            assert any(map(route.path_regex.match, tested)), f"no test opens {route.path}"


SPACED = """(text) => {
    const sheet = new CSSStyleSheet();
    sheet.replaceSync(text);
    document.adoptedStyleSheets = text ? [sheet] : [];
}"""
SPACING = (
    "*:not(svg *) { line-height: 1.5 !important; letter-spacing: 0.12em !important;"
    " word-spacing: 0.16em !important; } p { margin-bottom: 2em !important; }"
    " svg { letter-spacing: 0 !important; word-spacing: 0 !important; }"  # drawn before
)
"""What readers may set, according to WCAG 1.4.12."""


async def check_page(page: Page, path: str) -> None:
    """Check a page at every width and in both colour schemes. On a phone, targets must be large
    enough; at 400%, readers may space letters and lines.
    """
    for width in WIDTHS:
        scheme = SCHEMES.get(width)
        if scheme:
            await page.emulate_media(color_scheme=scheme)
        await page.set_viewport_size({"width": width, "height": 844})
        wide, cut_off, errors, colour = await page.evaluate(LOOK, width == WIDTHS[0])
        assert wide <= width, f"{path} is wider than {width}"
        assert cut_off == [], f"{path} at {width}"
        assert errors == [], f"{path} at {width}"
        if scheme:
            assert (colour == "rgb(255, 255, 255)") == (scheme == "light")
            await check_accessible(page)
    await page.set_viewport_size({"width": 320, "height": 256})
    await page.evaluate(SPACED, SPACING)
    wide, cut_off, errors, _ = await page.evaluate(LOOK, False)
    assert wide <= 320, f"{path} is wider than 320"
    assert cut_off == [], f"{path} at 320"
    assert errors == [], f"{path} at 320"
    await page.evaluate(SPACED, "")


async def test_every_page_fits_every_width_and_is_accessible(
    database: str,
    connection: asyncpg.Connection,
    browser: Browser,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    await waiting_and_failing(connection)
    await connection.execute(
        "INSERT INTO sequencer.suppressions (channel, address, source, reason)"
        " VALUES ('email', 'ada@example.com', 'unsubscribe', 'link in enrollment 7'),"
        " ('push', repeat('fH7xY', 40), 'application', NULL);"
        "INSERT INTO sequencer.removed_suppressions (channel, address, topic, source, created_at,"
        " reason) VALUES ('sms', 'sha256:0', '*', 'bounce', now(), 'Ada in the console: asked')"
    )
    await connection.execute(
        "INSERT INTO sequencer.enrollments (sequence, subject, step, status, ended_at)"
        " SELECT 's', 'a-long-subject-of-an-enrollment-' || n, 'note', 'completed', now()"
        " FROM generate_series(1, 3) AS n"
    )
    async with console(database, {"Note": Fixable()}, write=True, is_served=True) as client:
        await until(connection, FAILED)
        await until(connection, BEGUN)
        asked = await client.get("/change?action=retry&status=failed")
        form = {"action": "retry", "status": "failed", "number": "1", "reason": "fixed"}
        await client.post("/change", data={**form, "token": token(asked)})
        async with window(browser, client) as page:
            for path in PAGES:
                await page.goto(path)
                if path in ("/console/failures", "/console/health", "/console/"):
                    await page.locator("table, .actions").first.wait_for()
                await check_page(page, path)
                monkeypatch.setattr(summary, "MIN_PAUSE", PATIENCE)
    async with (
        console(database, password_hash=make_hash("secret"), is_served=True) as client,
        window(browser, client) as page,
    ):
        for path in OF_SESSIONS:
            await page.goto(path)
            await check_page(page, path)
            if path == OF_SESSIONS[0]:
                await page.get_by_label("Your name").fill("Ada")
                await page.get_by_label("Password").fill("secret")
                await page.get_by_role("button", name="Log in").click()
                await page.locator(".overview, .empty").first.wait_for()


async def test_texts_are_as_large_as_readers_set_in_their_browser(
    database: str, connection: asyncpg.Connection, browser: Browser
) -> None:
    await waiting_and_failing(connection)
    async with (
        console(database, {"Note": Fixable()}, write=True, is_served=True) as client,
        window(browser, client, viewport={"width": 640, "height": 844}) as page,
    ):
        await until(connection, FAILED)
        devtools = await page.context.new_cdp_session(page)
        await devtools.send("Page.setFontSizes", {"fontSizes": {"standard": 32}})
        for path in ("/console/search", "/console/over-time", "/console/simulate?sequence=s"):
            await page.goto(path)
            assert await page.evaluate("getComputedStyle(document.body).fontSize") == "29px"
            wide, cut_off, errors, _ = await page.evaluate(LOOK, False)
            assert (wide, cut_off, errors) == (640, [], []), path


LONG = "a-name-of-two-hundred-characters-" * 6 + "!!"
WORD = "m" * 200


async def test_names_as_long_as_can_be_fit_every_width(
    database: str,
    connection: asyncpg.Connection,
    browser: Browser,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(summary, "MIN_PAUSE", PATIENCE)
    await define(
        connection,
        LONG,
        (WORD, "WaitForDuration", DAY, LONG),
        (LONG, "Note", '{"limit": {"topic": "news", "at_most": 3, "per": {"days": 7}}}', None),
    )
    await connection.execute(
        "UPDATE sequencer.sequences"
        " SET brake_at_most = 500, brake_per = '1 hour', status = 'paused'"
    )
    id_ = await enroll(connection, LONG, "subject-" * 120, json.dumps({WORD: WORD}))
    await connection.execute(
        "INSERT INTO sequencer.enrollments"
        " (sequence, step, subject, status, failure, last_error, wake_at)"
        " SELECT $1, $1, $2 || n, 'failed', 'error', $2, NULL FROM generate_series(1, 3) AS n",
        LONG,
        WORD * 4,
    )
    await connection.execute(
        "INSERT INTO sequencer.suppressions (channel, address, source, reason)"
        " VALUES ('push', repeat('x', 900), 'application', repeat('y', 900)),"
        " ('a-channel-of-which-the-name-is-long', repeat('m', 18) || '@example.com', 'bounce', '')"
    )
    here = urlencode({"sequence": LONG})
    async with (
        console(database, write=True, is_served=True) as client,
        window(browser, client) as page,
    ):
        for path in (
            "/console/",
            f"/console/sequence?{here}",
            f"/console/sequence?{here}&step={WORD}",
            f"/console/enrollments/{id_}",
            "/console/failures",
            "/console/search",
            "/console/change?action=retry&status=failed",
            "/console/suppressions",
            "/console/suppressions?channel=a-channel-of-which-the-name-is-long",
            f"/console/suppression?channel=push&address={'x' * 900}&topic=*",
            f"/console/status?{here}&action=archive",
        ):
            await page.goto(path)
            await page.locator("h1, .overview, .failures").first.wait_for()
            if path in ("/console/", "/console/failures"):
                await page.locator("table").first.wait_for()
                # what counts is on the page, and not beside it
                for number in await page.locator("td.failed").all():
                    box = await number.bounding_box()
                    assert box is not None
                    assert box["x"] + box["width"] <= WIDTHS[2]
            if f"{here}&step" in path:
                assert "at most 500 in 1 hour" in await text_of(page, ".brake")
                await page.locator("#graph .node").first.wait_for()
                assert "at most 3 in 7 days" in await text_of(page, "#graph .node .limit")
            await check_page(page, path)


async def test_the_page_to_unsubscribe_fits_a_phone_in_every_language(browser: Browser) -> None:
    page = await browser.new_page(viewport={"width": 360, "height": 780}, color_scheme="dark")
    for language, texts in TEXTS.items():
        address, topic = f"{'l' * 60}@{'long.' * 20}example.com", "Topic " * 30
        question = texts.question.format(address=address)
        buttons = [("this", texts.this.format(topic=topic)), ("all", texts.everything)]
        made = public._page(texts, [question], buttons)
        await page.set_content(bytes(made.body).decode())
        assert await page.evaluate("document.documentElement.scrollWidth") <= 360, language
        assert await page.evaluate(LAYOUT, True) == [], language
        await check_accessible(page)
    # all of the page is dark, also what is beside the text
    scheme = "getComputedStyle(document.documentElement).colorScheme"
    assert await page.evaluate(scheme) == "light dark"
    await page.close()


async def test_counts_and_timelines_update_by_themselves_for_all_viewers(
    database: str, connection: asyncpg.Connection, browser: Browser
) -> None:
    waiting, _ = await waiting_and_failing(connection)
    async with (
        console(database, is_served=True) as client,
        window(browser, client) as first,
        window(browser, client) as second,
        window(browser, client) as third,
    ):
        await first.goto("/console/")
        await second.goto("/console/")
        await third.goto(f"/console/enrollments/{waiting}")
        await shows(first, "td.active", "1")
        await enroll(connection, "s", "carl")
        for page in (first, second):
            await shows(page, "td.active", "2")
        await shows(third, "#state", "Live")
        await connection.execute(
            "UPDATE sequencer.enrollments SET status = 'cancelled' WHERE id = $1", waiting
        )
        await shows(third, ".head .tag", "cancelled")
        await shows(third, ".timeline .tag", "cancelled")
        for page in (first, second):
            await shows(page, "td.active", "1")


async def test_a_failed_enrollment_is_retried_in_the_page(
    database: str, connection: asyncpg.Connection, browser: Browser
) -> None:
    await waiting_and_failing(connection)
    runner = Fixable()
    async with (
        console(database, {"Note": runner}, write=True, is_served=True) as client,
        window(browser, client) as page,
    ):
        await until(connection, FAILED)
        await page.goto("/console/")
        await page.get_by_role("link", name="Failures").click()
        await page.get_by_role("link", name="refused").click()
        # without a mouse: down to the row, tick it, and open it
        await page.locator("h1").click()
        await page.keyboard.press("j")
        await page.keyboard.press("x")
        assert await page.locator("input[name=id]").is_checked()
        await page.keyboard.press("Enter")
        await shows(page, ".why", "refused")
        runner.is_fixed = True
        await page.get_by_role("button", name="Retry").click()
        await shows(page, "h1", "Retry 1 enrollment?")
        await page.get_by_label("Reason").fill("fixed")
        await page.get_by_role("button", name="Retry 1 enrollment").click()
        await shows(page, ".done", "Retried 1 enrollment.")
        await shows(page, ".head .tag", "completed")
        text = await text_of(page, ".timeline")
        assert "resumed" in text
        assert "local user in the console" in text
        assert await page.get_by_role("button", name="Retry").count() == 0


async def test_a_sequence_is_operated_by_keyboard_alone(
    database: str, connection: asyncpg.Connection, browser: Browser
) -> None:
    await waiting_and_failing(connection)
    async with console(database, is_served=True) as client, window(browser, client) as page:
        await page.goto("/console/")
        await page.locator("table.overview").wait_for()
        await page.keyboard.press("Tab")
        assert await page.evaluate("document.activeElement.textContent") == "Skip to content"
        await page.keyboard.press("Enter")
        seen = []
        while (await page.evaluate("document.activeElement.textContent")).strip() != "s":
            await page.keyboard.press("Tab")
            seen.append(await page.evaluate("document.activeElement.outerHTML"))
            assert len(seen) < 20, seen
        # what has the focus can be seen
        outline = "getComputedStyle(document.activeElement).outlineStyle"
        assert await page.evaluate(outline) == "solid"
        await page.keyboard.press("Enter")
        await page.wait_for_url("**/sequence?sequence=s")
        # a step of the graph
        await page.locator("#graph a.node").first.wait_for()
        for _ in range(40):
            await page.keyboard.press("Tab")
            if await page.evaluate("document.activeElement.closest('#graph a') !== null"):
                break
        await page.keyboard.press("Enter")
        await page.wait_for_url("**step=wait")
        await shows(page, "#step h2", "wait")
        # what has the focus keeps it when the counts move
        link = page.locator("#graph a.node").nth(1)
        await link.focus()
        await enroll(connection, "s", "carl")
        await shows(page, "#graph .count", "2")
        assert (await page.evaluate("document.activeElement.textContent")).startswith("note")
        await page.goto("/console/search")
        await page.locator("#q:focus").wait_for()
        await page.keyboard.type("car")
        await shows(page, "td.subject", "carl")
        await page.wait_for_url("**/search?q=car")  # what is seen is a link that can be sent


async def test_hostile_data_run_nowhere(
    database: str, connection: asyncpg.Connection, browser: Browser
) -> None:
    hostile = "<script>window.hit = 1</script><img src=x onerror='window.hit = 2'>"
    await connection.execute(
        "INSERT INTO sequencer.sequences (name, first_step) VALUES ($1, $1)", hostile
    )
    await connection.execute(
        "INSERT INTO sequencer.steps (sequence, name, type, config)"
        ' VALUES ($1, $1, \'WaitForDuration\', \'{"amount": 1, "unit": "day"}\')',
        hostile,
    )
    id_ = await enroll(connection, hostile, hostile, '{"</pre><script>": "\'\\"><script>"}')
    async with console(database, is_served=True) as client, window(browser, client) as page:
        await until(connection, BEGUN)
        await page.goto("/console/")
        await page.locator("td.sequence a").click()
        await page.locator("#graph a.node").first.wait_for()
        assert hostile[:7] in await text_of(page, "#graph .step")  # its beginning and its end
        await page.locator("td.step a").click()
        assert await text_of(page, "td.subject") == hostile
        await page.goto(f"/console/enrollments/{id_}")
        assert await text_of(page, "h1") == hostile
        await page.goto("/console/search")
        await page.locator("#q").fill(hostile)
        await shows(page, "td.subject", "window.hit")
        assert await page.evaluate("window.hit === undefined")


async def test_times_are_in_the_reader_s_zone(
    database: str, connection: asyncpg.Connection, browser: Browser
) -> None:
    await waiting_and_failing(connection)
    await connection.execute(
        "UPDATE sequencer.enrollments SET timezone = 'Europe/Berlin',"
        " wake_at = '2030-01-01 12:00Z' WHERE id = 1"
    )
    async with console(database, is_served=True) as client, window(browser, client) as page:
        await connection.execute(
            "UPDATE sequencer.enrollments SET wake_at = '2030-01-01 12:00Z' WHERE id = 1"
        )
        await page.goto("/console/enrollments/1")
        assert "Times: Asia/Tokyo" in await text_of(page, ".account")
        text = await text_of(page, ".rows")
        assert "Tue 2030-01-01 21:00:00" in text
        assert "13:00:00" not in text
        exact = await page.locator(".rows dt:text-is('Waits until') + dd time").get_attribute(
            "title"
        )
        assert exact == "2030-01-01 12:00:00 UTC, Tue 2030-01-01 13:00:00 Europe/Berlin"
        await page.goto("/console/sequence?sequence=s&step=wait")
        assert await text_of(page, "td.waits_until time") == "Tue 2030-01-01 21:00:00"


async def test_a_daemon_is_restarted_under_an_open_page(
    database: str, connection: asyncpg.Connection, browser: Browser
) -> None:
    waiting, _ = await waiting_and_failing(connection)
    listen = f"127.0.0.1:{free_port()}"
    variables = {
        **os.environ,
        "SEQUENCERD_DATABASE": database,
        "SEQUENCERD_HTTP_LISTEN": listen,
        "SEQUENCERD_CONSOLE_ENABLED": "true",
    }

    async def start() -> asyncio.subprocess.Process:
        return await start_sequencerd("run", env=variables)

    running = await start()
    try:
        async with httpx.AsyncClient(base_url=f"http://{listen}/console/") as client:
            await answers(client, "/", is_ok)
            async with window(browser, client) as page, window(browser, client) as overview:
                await page.goto(f"/console/enrollments/{waiting}")
                await overview.goto("/console/")
                await shows(overview, "td.active", "1")
                for window_ in (page, overview):
                    await shows(window_, "#state", "Live")
                    await window_.evaluate("window.isTheSame = true")
                running.send_signal(signal.SIGKILL)
                await running.wait()
                await shows(page, "#state", "Not connected")
                await connection.execute(
                    "UPDATE sequencer.enrollments SET status = 'cancelled' WHERE id = $1", waiting
                )
                await enroll(connection, "s", "carl")
                await enroll(connection, "s", "dora")
                running = await start()
                await shows(page, ".head .tag", "cancelled")
                await shows(overview, "td.active", "2")
                for window_ in (page, overview):
                    await shows(window_, "#state", "Live")
                    assert await window_.evaluate("window.isTheSame")
    finally:
        running.terminate()
        assert await running.wait() == 0


async def test_pages_recover_after_the_database_was_away(
    database: str, connection: asyncpg.Connection, browser: Browser
) -> None:
    waiting, _ = await waiting_and_failing(connection)
    line = Line(database)
    async with (
        line.open() as through,
        console(database, through=through, is_served=True) as client,
        window(browser, client) as overview,
        window(browser, client) as page,
        window(browser, client) as late,
    ):
        await overview.goto("/console/")
        await shows(overview, "td.active", "1")
        await page.goto(f"/console/enrollments/{waiting}")
        for window_ in (overview, page):
            await shows(window_, "#state", "Live")
        line.cut()
        for window_ in (overview, page):
            await shows(window_, "#state", "Not connected")
        assert await text_of(page, "h1") == "ada"
        await late.goto(f"/console/enrollments/{waiting}")
        await shows(late, "h1", "The database cannot be reached")
        await connection.execute(
            "UPDATE sequencer.enrollments SET status = 'cancelled' WHERE id = $1", waiting
        )
        line.is_cut = False
        await shows(page, ".head .tag", "cancelled")
        await shows(late, "h1", "ada")
        await shows(overview, "td.active", "0")
        for window_ in (overview, page):
            await shows(window_, "#state", "Live")


@pytest.mark.parametrize("failure", ["abort", "503"])
async def test_a_failed_request_is_repeated(
    database: str, connection: asyncpg.Connection, browser: Browser, failure: str
) -> None:
    waiting, _ = await waiting_and_failing(connection)
    async with console(database, is_served=True) as client, window(browser, client) as page:
        await page.goto(f"/console/enrollments/{waiting}")
        await shows(page, "#state", "Live")
        asked = []

        async def fail_once(route: Handled) -> None:
            asked.append(route.request.url)
            if len(asked) > 1:
                await route.continue_()
            elif failure == "abort":
                await route.abort()
            else:
                await route.fulfill(status=503, body='<div id="live">gone</div>')

        await page.route(f"**/console/enrollments/{waiting}", fail_once)
        await connection.execute(
            "UPDATE sequencer.enrollments SET status = 'cancelled' WHERE id = $1", waiting
        )
        await shows(page, "#state", "Not connected")
        assert await text_of(page, "h1") == "ada"
        await shows(page, ".head .tag", "cancelled")
        await shows(page, "#state", "Live")


async def test_a_session_that_is_over_leads_to_the_login(
    database: str, connection: asyncpg.Connection, browser: Browser
) -> None:
    waiting, _ = await waiting_and_failing(connection)
    async with (
        console(database, password_hash=make_hash("correct horse"), is_served=True) as client,
        window(browser, client) as page,
    ):
        await page.goto(f"/console/enrollments/{waiting}")
        await page.get_by_label("Your name").fill("Ada")
        await page.get_by_label("Password").fill("correct horse")
        await page.get_by_role("button", name="Log in").click()
        await shows(page, "h1", "ada")
        await shows(page, "#state", "Live")
        await page.context.clear_cookies()
        await connection.execute(
            "UPDATE sequencer.enrollments SET status = 'cancelled' WHERE id = $1", waiting
        )
        await shows(page, "h1", "Log in")
        assert "to=" in page.url


async def test_simulate_in_the_page(
    database: str, connection: asyncpg.Connection, browser: Browser
) -> None:
    await waiting_and_failing(connection)
    async with console(database, is_served=True) as client, window(browser, client) as page:
        await page.goto("/console/simulate")
        await page.locator("#data").fill('{"name": "Ada"}')
        await page.get_by_role("button", name="Simulate").click()
        await shows(page, "#year", "completed")
        await page.wait_for_url("**/simulate?start=*&sequence=s&*Ada*")
        await page.get_by_label("Until").fill("2000-01-01")
        await page.locator("#data").fill("{")
        await page.get_by_role("button", name="Simulate").click()
        await shows(page, "#wrong-data", "not JSON")
        await shows(page, "#wrong-until", "before the start")
        assert await page.locator("#data").input_value() == "{"


async def test_the_end_of_a_simulation_is_a_sentence(
    database: str, connection: asyncpg.Connection, browser: Browser
) -> None:
    await define(connection, "s", ("wait", "WaitForDate", '{"date": "{{data.due}}"}', None))
    async with console(database, is_served=True) as client, window(browser, client) as page:
        data = json.dumps({"due": "the day after tomorrow"})
        await page.goto(f"/console/simulate?{urlencode({'sequence': 's', 'data': data})}")
        end = page.locator(".timeline .place", has_text="failed: ")
        one_line = await page.locator(".timeline .at").first.bounding_box()
        box = await end.bounding_box()
        assert box is not None
        assert one_line is not None
        assert box["height"] < 2 * one_line["height"]
        await check_page(page, page.url)


async def test_columns_are_ticked_in_the_page(
    database: str, connection: asyncpg.Connection, browser: Browser
) -> None:
    await waiting_and_failing(connection)
    async with console(database, is_served=True) as client:
        async with window(browser, client) as page:
            await page.goto("/console/search")
            await page.locator("summary").first.click()
            await page.get_by_label("Enrolled", exact=True).check()
            await page.get_by_label("Paths in the data").fill("data.name")
            await page.get_by_role("button", name="Apply").click()
            await shows(page, "th", "data.name")
            await page.wait_for_url("**/search?columns=*created_at*data.name*")
            await page.reload()
            await shows(page, "th", "Enrolled")
            await page.get_by_role("link", name="data.name").click()
            await page.wait_for_url("**sort=data.name*")
        async with window(browser, client, java_script_enabled=False) as page:
            await page.goto("/console/search")
            await page.locator("summary").first.click()
            await page.get_by_label("Subject", exact=True).uncheck()
            await page.get_by_role("button", name="Apply").click()
            await page.wait_for_url("**columns=*")
            assert await page.locator("th", has_text="Subject").count() == 0
            assert await page.locator("th", has_text="Status").count() == 1


async def test_screenshots(
    database: str,
    connection: asyncpg.Connection,
    browser: Browser,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """What the docs show, of the example."""
    monkeypatch.setattr(summary, "PAUSE_FACTOR", 0)  # each count is of one more day
    folder = REPOSITORY / "docs" if os.environ.get("SCREENSHOTS") else tmp_path
    path = REPOSITORY / "examples/onboarding.yaml"
    runners = {"Email": Recorder(), "SMS": Recorder(), "Score": Recorder()}
    found = read_file(path, runners)
    async with connection.transaction():
        await apply_plan.apply(connection, found, runners)
    await connection.execute(MANY)
    async with console(database, runners, write=True, is_served=True) as client:
        await until(connection, "SELECT count(*) > 100 FROM sequencer.events")
        for name, address, scheme, size in SHOTS:
            options = {"color_scheme": scheme, "viewport": size, "timezone_id": "Europe/Berlin"}
            async with window(browser, client, **options) as page:
                await page.goto(address)
                if name == "overview":
                    await shows(page, ".note", f"since {first_day():%Y-%m-%d}")
                    monkeypatch.setattr(summary, "MIN_PAUSE", PATIENCE)
                await shows(page, "#state", "Live")
                if name == "sequence":  # what only a goal leads to is apart, with its own end
                    assert await page.locator("#graph .drawing .end").count() == 2
                shot = folder / f"console-{name}.png"
                await page.screenshot(path=shot)
                assert 10_000 < shot.stat().st_size < 150_000


def first_day() -> date:
    return datetime.now(UTC).date() - timedelta(days=HISTORY_DAYS - 1)


WIDE = {"width": 1200, "height": 780}
SHOTS = (
    ("overview", "/console/", "light", WIDE),
    ("sequence", "/console/sequence?sequence=onboarding&step=a-few-days", "light", WIDE),
    ("enrollment", "/console/enrollments/6", "dark", WIDE),
    ("phone", "/console/sequence?sequence=onboarding", "dark", {"width": 390, "height": 780}),
)

MANY = """
INSERT INTO sequencer.enrollments (sequence, subject, data, step, entered_at, wake_at, created_at)
SELECT 'onboarding', 'user-' || n,
       jsonb_build_object('name', 'Ada', 'email', 'ada@example.com', 'score', n % 100,
                          'phone', '+4915112345678'),
       (ARRAY['welcome', 'a-few-days', 'a-few-days', 'two-weeks', 'two-weeks'])[1 + n % 5],
       now() - interval '1 day', now() + n * interval '7 minutes', now() - interval '1 day'
  FROM generate_series(1, 800) AS n;
INSERT INTO sequencer.enrollments (sequence, subject, step, status, failure, last_error)
SELECT 'onboarding', 'lost-' || n, 'welcome', 'failed', 'error',
       'to lost-' || n || '@example.com: 550 no such user'
  FROM generate_series(1, 7) AS n;
INSERT INTO sequencer.events (enrollment_id, at, sequence, step, visit, action)
SELECT 10000 + n,
       now() - (n % 13) * interval '1 day' - hours * interval '1 hour' - n * interval '9 seconds',
       'onboarding', step, visit, action
  FROM generate_series(1, 400) AS n,
       (VALUES ('welcome', 1, 'enrolled', 40), ('welcome', 1, 'next', 39),
               ('a-few-days', 2, 'next', 30), ('in-the-morning', 3, 'next', 22),
               ('score', 4, 'next', 21), ('has-begun', 5, 'next', 20), ('tips', 6, 'next', 19),
               ('two-weeks', 7, 'next', 8), ('last-call', 8, 'next', 7),
               ('last-call', 8, 'completed', 7)) AS e (step, visit, action, hours)
 WHERE n % 5 > 1 OR visit < 5;
INSERT INTO sequencer.events (enrollment_id, at, sequence, step, visit, action, message)
SELECT 6, now() - hours * interval '1 hour', 'onboarding', step, visit, action, message
  FROM (VALUES ('welcome', 1, 'enrolled', 24.4, NULL),
               ('welcome', 1, 'retry', 24.3, 'attempt 1 failed: 421 come again later'),
               ('welcome', 1, 'next', 24, 'sent to ada@example.com')
       ) AS e (step, visit, action, hours, message);
"""
