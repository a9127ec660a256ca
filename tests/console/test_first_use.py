"""A user who has not read the manual, in a real browser: copying from a row, names in other
scripts, long names, and long lists above a question.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import asyncpg

from tests.console.conftest import (
    DAY,
    FAILED,
    Fixable,
    console,
    report,
    waiting_and_failing,
    window,
)
from tests.console.test_access import HASH, PASSWORD
from tests.console.test_browser import (
    LAYOUT,
    check_accessible,
    check_page,
    shows,
    text_of,
)
from tests.helpers.engines import define, enroll, until

if TYPE_CHECKING:
    from playwright.async_api import Browser, Page

PARTS = "[...document.querySelectorAll('#graph .step')].map((one) => one.textContent)"


async def test_a_row_is_opened_and_its_text_can_be_copied(
    database: str, connection: asyncpg.Connection, browser: Browser
) -> None:
    await waiting_and_failing(connection)
    async with console(database, is_served=True) as client, window(browser, client) as page:
        await page.goto("/console/search")
        cell = page.locator("td.subject .value", has_text="ada")
        box = await cell.bounding_box()
        assert box is not None
        middle = box["y"] + box["height"] / 2
        await page.mouse.move(box["x"] + 1, middle)
        await page.mouse.down()
        await page.mouse.move(box["x"] + box["width"] - 1, middle, steps=4)
        await page.mouse.up()
        assert await page.evaluate("getSelection().toString()") == "ada"
        assert page.url.endswith("/search")
        await page.mouse.click(box["x"] + box["width"] + 40, middle)  # beside the text
        await page.wait_for_url("**/enrollments/1")
        await page.go_back()
        await page.locator("td.step .value", has_text="wait").click()
        await page.wait_for_url("**/enrollments/1")


async def test_the_number_of_failures_leads_to_their_list(writable: Page) -> None:
    await writable.goto("/console/")
    await writable.locator("td.failed a", has_text="1").click()
    await writable.wait_for_url("**/console/search?sequence=s&status=failed")
    await shows(writable, "td.subject", "bob")
    await writable.goto("/console/sequence?sequence=s")
    await writable.locator("td.failed a", has_text="1").click()
    await writable.wait_for_url("**/console/search?sequence=s&step=note&status=failed")
    await writable.goto("/console/")
    await writable.locator(".facts .failed a").click()
    await writable.wait_for_url("**/console/failures")


async def test_names_in_other_scripts(
    database: str, connection: asyncpg.Connection, browser: Browser
) -> None:
    family = "👩‍👩‍👧‍👦"
    await define(
        connection,
        "ترحيب (2026)!",
        ("تذكير!", "WaitForDuration", DAY, family * 8),
        (family * 8, "WaitForDuration", DAY, None),
    )
    await enroll(connection, "ترحيب (2026)!", "مستخدم-1!")
    async with console(database, is_served=True) as client, window(browser, client) as page:
        await page.goto("/console/sequence?sequence=ترحيب (2026)!")
        await page.locator("#graph .node").first.wait_for()
        reminder, families = await page.evaluate(PARTS)
        assert reminder == "\u2068تذكير!\u2069"
        # it is cut off between two families
        assert set(families.strip("\u2068\u2069").split(family)) == {"", "…"}
        await shows(page, "td.step", "تذكير!")
        for selector in ("h1", "td.step > a"):
            style = "(one) => getComputedStyle(one).unicodeBidi"
            assert await page.locator(selector).first.evaluate(style) == "plaintext"
        await check_page(page, page.url)


async def test_many_causes_and_codes_fit_the_page(
    database: str, connection: asyncpg.Connection, browser: Browser
) -> None:
    names = [f"a-sequence-with-quite-a-long-name-{n}" for n in range(5)]
    for name in names:
        await define(connection, name, ("wait-for-something", "WaitForDuration", DAY, None))
    await connection.execute(
        "INSERT INTO sequencer.enrollments (sequence, subject, status, failure, last_error)"
        " SELECT name, failure, 'failed', failure, '550 no such user: ' || name || '@home.example'"
        " FROM unnest($1::text[]) AS name,"
        " unnest('{bad_data,error,already_enrolled,loop,outcome_unknown}'::text[]) AS failure",
        names,
    )
    async with (
        console(database, write=True, is_served=True) as client,
        window(browser, client) as page,
    ):
        await page.goto("/console/failures")
        await shows(page, "td.steps", "and 2 more")
        await check_page(page, page.url)
        for width in (1280, 1920):
            await page.set_viewport_size({"width": width, "height": 844})
            scroll = await page.locator(".scroll").first.evaluate(
                "(one) => one.scrollWidth - one.clientWidth"
            )
            assert scroll <= 0, "all columns are seen"
        await page.set_viewport_size({"width": 1000, "height": 844})
        for time in await page.locator(".failures time").all():  # a day and an hour
            assert len(await time.evaluate("(one) => [...one.getClientRects()]")) <= 2
        await page.set_viewport_size({"width": 360, "height": 780})
        assert await page.evaluate(LAYOUT, True) == []
        # the question is seen before what it is about
        await page.set_viewport_size({"width": 1280, "height": 844})
        await page.goto("/console/change?action=move&status=failed")
        assert await page.evaluate("document.activeElement.name") == "to"
        button = await page.get_by_role("button", name="Move 25 enrollments").bounding_box()
        assert button is not None
        assert button["y"] < 600
        await page.locator("summary", has_text="25 rows").click()
        await shows(page, "td", names[4])


async def test_a_search_is_announced_by_one_sentence(
    database: str, connection: asyncpg.Connection, browser: Browser
) -> None:
    await waiting_and_failing(connection)
    async with console(database, is_served=True) as client, window(browser, client) as page:
        await page.goto("/console/search")
        await page.locator("#q").fill("ad")
        await shows(page, "#said", "1 enrollment")
        await page.locator("#q").fill("Ad")
        await shows(page, "#said", "Is the subject written as here")
        assert await page.locator("[aria-live]").count() == 0


async def test_a_waiting_enrollment_is_reevaluated(
    connection: asyncpg.Connection, writable: Page
) -> None:
    await until(connection, FAILED)
    await writable.goto("/console/enrollments/1")
    await writable.get_by_role("button", name="Reevaluate").click()
    await writable.get_by_label("Reason").fill("the CRM has changed")
    await writable.get_by_role("button", name="Reevaluate 1 enrollment").click()
    await shows(writable, ".done", "Reevaluated 1 enrollment.")
    await _has_buttons(writable, "Move…", "Cancel…", "Reevaluate…")
    # what was done to one is not said of another
    await writable.goto("/console/enrollments/2")
    await _has_buttons(writable, "Retry…", "Skip the step…", "Move…", "Cancel…")
    assert await writable.locator(".done").count() == 0


async def test_a_change_of_one_row_is_confirmed_above_its_list(writable: Page) -> None:
    await writable.goto("/console/search?sequence=s")
    await writable.get_by_label("Select enrollment 1").check()
    await writable.get_by_role("button", name="Cancel…").click()
    await writable.get_by_label("Reason").fill("asked")
    await writable.get_by_role("button", name="Cancel 1 enrollment").click()
    await shows(writable, ".done", "Cancelled 1 enrollment.")
    assert "/console/search?sequence=s" in writable.url


async def test_back_leads_to_what_a_form_has_shown(writable: Page) -> None:
    await writable.goto("/console/data?id=1")
    await writable.get_by_label("JSON").fill('{"name": "Grace"}')
    await writable.get_by_role("button", name="Check").click()
    await shows(writable, "h2", "Changes")
    await writable.get_by_label("Reason").fill("asked")
    await writable.get_by_role("button", name="Change the data").click()
    await shows(writable, ".timeline .tag", "edited")
    await writable.go_back()  # the browser asks nothing
    await shows(writable, "h2", "Changes")


async def test_back_leads_to_a_form_whose_session_had_ended(
    database: str, connection: asyncpg.Connection, browser: Browser
) -> None:
    waiting, _ = await waiting_and_failing(connection)
    async with (
        console(database, write=True, password_hash=HASH, is_served=True) as client,
        window(browser, client) as page,
    ):
        await page.goto(f"/console/data?id={waiting}")
        await page.get_by_label("Name").fill("Ada Lovelace")
        await page.get_by_label("Password").fill(PASSWORD)
        await page.get_by_role("button", name="Log in").click()
        await page.get_by_label("JSON").fill('{"name": "Grace"}')
        await connection.execute("DELETE FROM sequencer.console_sessions")
        await page.get_by_role("button", name="Check").click()
        await shows(page, "p", "Your session has ended")
        await page.goto("/console/")
        await shows(page, "h1", "Log in")
        await page.go_back()  # the browser asks nothing
        await shows(page, "p", "Your session has ended")


async def _has_buttons(page: Page, *names: str) -> None:
    found = await page.locator(".actions button").all_text_contents()
    assert found == [*names], await text_of(page, ".actions")


async def test_rows_and_timelines_with_more_than_fits(
    database: str, connection: asyncpg.Connection, browser: Browser
) -> None:
    waiting, _ = await waiting_and_failing(connection)
    await connection.execute(
        "INSERT INTO sequencer.enrollments (sequence, subject, step, status, ended_at)"
        " SELECT 's', 'some.address' || n || '@example.com', 'note', 'completed',"
        " now() FROM generate_series(1, 60) AS n"
    )
    await connection.execute(
        "INSERT INTO sequencer.events (enrollment_id, at, sequence, step, visit, action, message)"
        " SELECT $1, now() - n * interval '1 hour', 's', 'wait', 1, 'next', 'answer ' || n"
        " FROM generate_series(1, 60) AS n",
        waiting,
    )
    async with console(database, is_served=True) as client, window(browser, client) as page:
        for path in ("/console/search?q=some.address", f"/console/enrollments/{waiting}"):
            await page.goto(path)
            await shows(page, ".more", "Next page")
            await check_page(page, path)


async def test_a_long_text_is_edited_by_keyboard(
    database: str, connection: asyncpg.Connection, browser: Browser
) -> None:
    steps = [(f"w{n}", "WaitForDuration", DAY, f"w{n + 1}") for n in range(40)]
    await define(connection, "s", *steps, ("w40", "WaitForDuration", DAY, None))
    async with (
        console(database, write=True, is_served=True) as client,
        window(browser, client) as page,
    ):
        await page.goto("/console/edit?sequence=s")
        await page.locator(".cm-scroller").wait_for()
        await check_accessible(page)


async def test_a_phone_shows_what_was_found_before_the_filters(
    database: str, connection: asyncpg.Connection, browser: Browser
) -> None:
    await waiting_and_failing(connection)
    async with (
        console(database, {"Note": Fixable()}, write=True, is_served=True) as client,
        window(browser, client, viewport={"width": 360, "height": 780}) as page,
    ):
        await until(connection, FAILED)
        await page.goto("/console/failures")
        await page.get_by_role("link", name="refused").click()
        await shows(page, ".filtered", "cause refused")
        first = await page.locator("#found tbody tr").first.bounding_box()
        assert first is not None
        assert first["y"] < 780
        assert not await page.get_by_label("Failure code").is_visible()
        await page.goto(
            "/console/search?sequence=s&status=failed&where=data.email = bob@example.com"
        )
        words = "Filters: sequence s; status failed; data data.email = bob@example.com"
        assert await text_of(page, ".filtered") == words
        await page.goto("/console/search?age=nonsense")  # which is to be corrected
        assert await page.get_by_label("At the step for more than").is_visible()


async def test_steps_whose_names_begin_alike_differ_in_the_graph(
    database: str, connection: asyncpg.Connection, browser: Browser
) -> None:
    names = [f"winter-campaign-of-all-customers-mail-{n}" for n in range(2)]
    await define(
        connection,
        "s",
        (names[0], "WaitForDuration", DAY, names[1]),
        (names[1], "WaitForDuration", DAY, None),
    )
    async with console(database, is_served=True) as client, window(browser, client) as page:
        await page.goto("/console/sequence?sequence=s")
        await page.locator("#graph .node").first.wait_for()
        for name, shown in zip(names, await page.evaluate(PARTS), strict=True):
            first, last = shown.strip("\u2068\u2069").split("…")
            assert name.startswith(first)
            assert name.endswith(last)
            assert last.endswith(f"mail-{name[-1]}")


async def test_a_median_stay_is_not_cut_off_in_the_graph(
    database: str, connection: asyncpg.Connection, browser: Browser
) -> None:
    at_nine = '{"attribute": "hour", "values": [9]}'
    await define(connection, "s", ("at-nine", "WaitForDateComparison", at_nine, None))
    async with console(database, is_served=True) as client, window(browser, client) as page:
        await page.goto("/console/sequence?sequence=s")
        await page.locator("#graph .node").first.wait_for()
        await page.evaluate(COUNTED, {"stay": "12 h 34 min", "failed": "12"})
        kind, stay = (await text_of(page, "#graph .small")).split(" · ")
        assert stay == "12 h 34 min"
        assert kind.startswith("\u2068W")
        assert "…" in kind


COUNTED = """(counts) => {
    const source = document.getElementById("graph-data");
    const data = JSON.parse(source.dataset.graph);
    Object.assign(data.nodes[0], counts);
    source.dataset.graph = JSON.stringify(data);
    document.dispatchEvent(new Event("shown"));
}"""
"""Let the first step of the graph have these counts."""


async def test_problems_come_before_many_sequences(
    database: str, connection: asyncpg.Connection, browser: Browser
) -> None:
    for n in range(30):
        await define(connection, f"s{n}", ("wait", "WaitForDuration", DAY, None))
    message = "the server refuses the login"
    await report(connection, {"kind": "runner", "about": "Email", "message": message})
    async with (
        console(database, is_served=True) as client,
        window(browser, client, viewport={"width": 360, "height": 780}) as page,
    ):
        await page.goto("/console/")
        await shows(page, ".problems", message)
        box = await page.locator(".problems").bounding_box()
        assert box is not None
        assert box["y"] + box["height"] < 780


async def test_no_panel_covers_what_has_the_focus(
    database: str, connection: asyncpg.Connection, browser: Browser
) -> None:
    """On a narrow screen, or at 400%, the panel of a step is in front of the page."""
    await waiting_and_failing(connection)
    async with console(database, {"Note": Fixable()}, write=True, is_served=True) as client:
        await until(connection, FAILED)
        for width, height in ((360, 640), (320, 256)):
            options = {"viewport": {"width": width, "height": height}}
            async with window(browser, client, **options) as page:
                await page.goto("/console/sequence?sequence=s&step=note")
                await page.locator("#graph .node").first.wait_for()
                await shows(page, "h2", "Steps")
                covered, seen = [], 0
                while seen < 100:
                    await page.keyboard.press("Tab")
                    name, is_covered = await page.evaluate(COVERED)
                    if not name:
                        break
                    seen += 1
                    covered += [name] if is_covered else []
                assert seen > 20
                assert covered == [], width


COVERED = """() => {
    const focused = document.activeElement;
    const panel = document.getElementById("step");
    if (focused === document.body) return ["", false];
    const [box, above] = [focused, panel].map((one) => one.getBoundingClientRect());
    const isCovered = !panel.contains(focused) && box.top >= above.top - 1;
    return [focused.outerHTML.slice(0, 100), isCovered];
}"""
"""Whether all of what has the focus is behind the panel."""
