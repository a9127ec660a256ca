"""Forms of the console with the keyboard alone, and a hasty user: sent twice, with errors, and with
the back button.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import asyncpg

from tests.console.conftest import BEGUN, DAY, Fixable, console, waiting_and_failing, window
from tests.console.test_browser import check_accessible, shows
from tests.helpers.engines import define, enroll, until
from tests.helpers.runners import email_runner
from tests.helpers.servers import HOST

if TYPE_CHECKING:
    from playwright.async_api import Browser, Page

FOCUSED = """() => {
    const one = document.activeElement;
    return [one.name || "", one.textContent.trim(), getComputedStyle(one).outlineStyle];
}"""


async def tab_to(page: Page, wanted: str) -> None:
    """Press Tab until the field or button with this name or text has the focus, which is seen."""
    for _ in range(80):
        name, text, outline = await page.evaluate(FOCUSED)
        if wanted in (name, text):
            assert outline != "none", f"the focus on {wanted} is not seen"
            return
        await page.keyboard.press("Tab")
    raise AssertionError(f"no Tab leads to {wanted}")


async def fill(page: Page, **fields: str) -> None:
    for name, text in fields.items():
        await tab_to(page, name)
        await page.keyboard.press("Control+a")
        await page.keyboard.type(text)


async def press(page: Page, button: str) -> None:
    await tab_to(page, button)
    await page.keyboard.press("Enter")


async def test_forms_by_keyboard(
    database: str, connection: asyncpg.Connection, browser: Browser
) -> None:
    await waiting_and_failing(connection)
    async with (
        console(database, {"Note": Fixable()}, write=True, is_served=True) as client,
        window(browser, client) as page,
    ):
        await until(connection, BEGUN)
        await page.goto("/console/enroll?sequence=s")
        await fill(page, subject="zoë 😀 \u202egnp.js", email="zoë.example", reason="by hand")
        await press(page, "Enroll")  # the browser refuses what is no address
        await fill(page, email="zoë@exämple.com")
        await press(page, "Enroll")
        await shows(page, "h1", "zoë 😀")
        await shows(page, "pre", '"email": "zoë@exämple.com"')
        await check_accessible(page)

        await page.goto("/console/suppressions")
        await press(page, "Suppress an address…")
        await page.wait_for_url("**/suppress?")
        await fill(page, address="zoe@example.com", reason="asked")
        await press(page, "Suppress")
        await shows(page, "td.address", "zoe@example.com")
        await tab_to(page, "zoe@example.com")
        await page.keyboard.press("Enter")
        await page.wait_for_url("**/suppression?**")
        await fill(page, reason="a mistake")
        await press(page, "Remove")
        await shows(page, "h2", "Recently removed")
        await check_accessible(page)

        await page.goto("/console/simulate?sequence=s")
        await fill(page, start="2030-01-31 09:00", data='{"name": "<b>Zoë</b>"}')
        await press(page, "Simulate")
        await shows(page, "#simulate", "2030-02-01")
        await check_accessible(page)

        await page.goto("/console/edit?sequence=s")
        await page.locator(".cm-content").wait_for()
        await page.locator("h1").click()
        while not await page.evaluate("document.activeElement.matches('.cm-content')"):
            await page.keyboard.press("Tab")
        await page.keyboard.press("Control+End")
        await page.keyboard.type("description: by keyboard, j k x /")
        await page.keyboard.press("Escape")  # the options, if there are any
        await page.keyboard.press("Escape")
        await page.keyboard.press("Tab")
        await press(page, "Check and plan")
        await shows(page, ".plan", "description: none → by keyboard, j k x /")
        await fill(page, reason="a test")
        await press(page, "Apply this plan")
        await page.wait_for_url("**/sequence?sequence=s")
        await shows(page, "main", "by keyboard")


async def test_a_message_that_has_the_focus_is_marked(
    database: str, connection: asyncpg.Connection, browser: Browser
) -> None:
    """It is in a frame, so that the keyboard can scroll it."""
    await define(
        connection,
        "s",
        (
            "letter",
            "Email",
            '{"from": "us@example.com", "to": "a@example.com", "subject": "x", "html": "<p>x</p>"}',
            None,
        ),
    )
    runners = {"Email": email_runner(f"smtp://{HOST}:9")}
    async with (
        console(database, runners, own=lambda: runners, is_served=True) as client,
        window(browser, client) as page,
    ):
        await page.goto("/console/message?sequence=s&step=letter")
        frame = page.locator("iframe")
        outline = "(one) => getComputedStyle(one).outlineStyle"
        assert await frame.evaluate(outline) == "none"
        await page.locator("h1").click()
        while not await page.evaluate("document.activeElement.matches('iframe')"):
            await page.keyboard.press("Tab")
        await page.locator("iframe.focused").wait_for()
        assert await frame.evaluate(outline) == "solid"
        await page.keyboard.press("Tab")
        await page.locator("iframe:not(.focused)").wait_for()


async def test_what_colours_say_is_also_said_where_the_system_chooses_them(
    database: str, connection: asyncpg.Connection, browser: Browser
) -> None:
    waiting, _ = await waiting_and_failing(connection)
    line = "(one) => getComputedStyle(one).textDecorationLine"
    async with (
        console(database, write=True, is_served=True) as client,
        window(browser, client, forced_colors="active") as page,
    ):
        await page.goto("/console/search")
        lines = [await one.evaluate(line) for one in await page.locator("header nav a").all()]
        assert lines == ["none", "none", "underline", "none", "none", "none", "none"]
        await page.goto(f"/console/data?id={waiting}")
        await fill(page, text='{"email": "zoe@example.com"}')
        await press(page, "Check")
        assert await page.locator("del").first.evaluate(line) == "line-through"
        assert await page.locator("ins").first.evaluate(line) == "underline"


async def test_lateness_is_read_by_keyboard(
    database: str, connection: asyncpg.Connection, browser: Browser
) -> None:
    await define(connection, "s", ("wait", "WaitForDuration", DAY, None))
    await connection.execute(
        "INSERT INTO sequencer.lateness VALUES ('s', 'wait', $1, 7, 3, 1, 3700, false)",
        datetime.now(UTC) - timedelta(hours=1),
    )
    async with console(database, is_served=True) as client, window(browser, client) as page:
        await page.goto("/console/over-time")
        await shows(page, "figcaption", "Began late 7")
        await shows(page, "figcaption", "Longest delay 1 h 1 min")
        await shows(page, "thead", "Over 10 min late")
        await check_accessible(page)
        await tab_to(page, "s")
        await page.keyboard.press("Enter")
        await page.wait_for_url("**sequence=s")
        await fill(page, **{"from": "yesterday"})
        await press(page, "Show")
        await shows(page, "[role=alert]", "From is not a time such as 2026-03-02 09:00.")
        await check_accessible(page)
        assert await page.locator("#sequence").input_value() == "s"
        await page.go_back()
        await shows(page, "figcaption", "Began late 7")


async def test_a_wrong_filter_is_corrected(
    database: str, connection: asyncpg.Connection, browser: Browser
) -> None:
    await waiting_and_failing(connection)
    async with console(database, is_served=True) as client, window(browser, client) as page:
        await page.goto("/console/search")
        await shows(page, "td.subject", "ada")
        await page.locator("summary").click()
        await page.locator("#where").fill("name is Ada")
        await page.keyboard.press("Enter")
        await shows(page, "#found [role=alert]", "Write the data filter as in")
        await check_accessible(page)
        assert await page.locator("#where").input_value() == "name is Ada"
        await page.locator("#where").fill("data.name = Ada")
        await page.keyboard.press("Enter")
        await page.locator("#found [role=alert]").wait_for(state="detached")
        await shows(page, "td.subject", "ada")
        assert await page.locator("td.subject").count() == 1


async def test_a_double_click_changes_once(
    database: str, connection: asyncpg.Connection, browser: Browser
) -> None:
    await define(
        connection, "s", ("wait", "WaitForDuration", DAY, "note"), ("note", "Note", "{}", "wait")
    )
    id_ = await enroll(connection, "s", "ada", json.dumps({"name": "<i>Ada</i>"}))
    runner = Fixable()
    runner.is_fixed = True
    async with (
        console(database, {"Note": runner}, write=True, is_served=True) as client,
        window(browser, client) as page,
    ):
        await until(connection, "SELECT entered_at < wake_at FROM sequencer.enrollments")
        await page.goto(f"/console/change?action=move&id={id_}&back=/console/enrollments/{id_}")
        await page.locator("#to").select_option("note")
        await page.locator("#reason").fill("twice")
        await page.get_by_role("button", name="Move 1 enrollment").dblclick()
        await shows(page, ".done", "Moved to note 1 enrollment.")
        # the answer to the first is a page that comes back as it is now
        await page.go_back()
        await shows(page, "h1", "Move 1 enrollment?")
    assert await connection.fetchval(
        "SELECT count(*) = 1 FROM sequencer.events WHERE action = 'moved'"
    )
    assert len(runner.keys) == 1
