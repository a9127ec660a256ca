"""The journey of a sequence in a real browser: the graph, the panel beside it, and messages. With
PICTURES=folder, pictures of every page are written there.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import asyncpg
import pytest

from sequencerd.console import summary
from sequencerd.definitions import apply_plan
from sequencerd.definitions.files import read_file
from sequencerd.runners import Runner
from tests.console.conftest import console, waiting_and_failing, window
from tests.console.test_browser import (
    MANY,
    REPOSITORY,
    SCHEMES,
    WIDTHS,
    _in_short_intervals,
    check_page,
    shows,
)
from tests.console.test_panel import arms
from tests.helpers.engines import Recorder, until
from tests.helpers.runners import email_runner
from tests.helpers.waiting import PATIENCE

if TYPE_CHECKING:
    from playwright.async_api import Browser, Page

__all__ = ["_in_short_intervals", "arms"]  # fixtures

SEQUENCE = "/console/sequence?sequence=onboarding"
PAGES = (
    SEQUENCE,
    f"{SEQUENCE}&step=a-few-days",
    f"{SEQUENCE}&step=welcome&way=next&range=30d",
    "/console/message?sequence=onboarding&step=welcome",
    "/console/funnel?sequence=onboarding&range=30d",
    "/console/simulate?sequence=onboarding&data=%7B%22email%22%3A%22ada%40example.com%22%7D",
)


async def test_the_journey_of_a_sequence(
    database: str,
    connection: asyncpg.Connection,
    browser: Browser,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runners: dict[str, Runner] = {
        "Email": email_runner("smtp://127.0.0.1:9"),
        "SMS": Recorder(),
        "Score": Recorder(),
    }
    found = read_file(REPOSITORY / "examples/onboarding.yaml", runners)
    async with connection.transaction():
        await apply_plan.apply(connection, found, runners)
    await connection.execute("UPDATE sequencer.sequences SET status = 'paused'")
    await connection.execute(MANY)
    async with console(
        database, runners, own=lambda: runners, write=True, is_served=True
    ) as client:
        await until(connection, "SELECT count(*) > 100 FROM sequencer.events")
        async with window(browser, client) as page:
            await page.goto(SEQUENCE)
            await shows(page, "#graph .count", "320")
            box = await page.locator(".tools > a").bounding_box()
            assert box is not None
            assert box["height"] >= 24
            monkeypatch.setattr(summary, "MIN_PAUSE", PATIENCE)
            await _opens_beside_the_graph(page)
            await _zooms_and_moves(page)
            await _by_keyboard(page)
        async with window(browser, client, java_script_enabled=False) as page:
            await page.goto(f"{SEQUENCE}&step=welcome")
            await shows(page, "#step", "The message")
            await page.locator("#step .close").click()
            assert await page.locator("#step").count() == 0
        async with window(browser, client) as page:
            for number, path in enumerate(PAGES):
                await _looks_well(page, path, number)


async def _opens_beside_the_graph(page: Page) -> None:
    place = await page.evaluate("document.getElementById('graph').getBoundingClientRect().top")
    await page.locator("#graph .node", has_text="welcome").click()
    await shows(page, "#step h2", "welcome")
    await shows(page, "#step .preview", "Subject")
    await page.wait_for_url("**step=welcome")
    assert await page.evaluate("scrollY") == 0
    assert place == await page.evaluate(
        "document.getElementById('graph').getBoundingClientRect().top"
    )
    await page.locator("#graph .edge .wide").first.dispatch_event("click")
    await page.wait_for_url("**way=next")
    await shows(page, "#step .ways li[aria-current]", "next")
    await page.locator(".ranges a", has_text="30d").click()
    await page.wait_for_url("**range=30d")
    await page.locator("#step .close").click()
    await page.locator("#step").wait_for(state="detached")


BOX = "document.querySelector('#graph .drawing').getAttribute('viewBox')"


async def _zooms_and_moves(page: Page) -> None:
    before = await page.evaluate(BOX)
    await page.get_by_role("button", name="Zoom in").click()
    closer = await page.evaluate(BOX)
    assert float(closer.split()[2]) < float(before.split()[2])
    assert await page.locator("#graph .map:not(.hidden)").count() == 1
    graph = await page.locator("#graph").bounding_box()
    assert graph is not None
    x, y = graph["x"] + 60, graph["y"] + 140  # its end may be below the window
    await page.mouse.move(x, y)
    await page.mouse.down()
    await page.mouse.move(x, y - 100, steps=4)
    await page.mouse.up()
    moved = await page.evaluate(BOX)
    assert float(moved.split()[1]) > float(closer.split()[1])
    assert "step=" not in page.url  # what was dragged was not clicked
    await page.get_by_role("button", name="Fit").click()
    assert await page.locator("#graph .map.hidden").count() == 1


async def _by_keyboard(page: Page) -> None:
    await page.locator("#graph").focus()
    whole = await page.evaluate(BOX)
    await page.keyboard.press("+")
    assert await page.evaluate(BOX) != whole
    await page.keyboard.press("0")
    assert await page.evaluate(BOX) == whole
    await page.keyboard.press("Tab")
    assert await page.evaluate("document.activeElement.closest('#graph a.node') !== null")
    await page.keyboard.press("Enter")
    await page.locator("#step").wait_for()
    await page.wait_for_function("document.activeElement.id === 'step'")


async def _looks_well(page: Page, path: str, number: int) -> None:
    await page.set_viewport_size({"width": 1280, "height": 900})
    await page.goto(path)
    if "sequence?" in path:
        await page.locator("#graph .node").first.wait_for()
        await shows(page, "#state", "Live")
    await check_page(page, path)
    if folder := os.environ.get("PICTURES"):
        for width in WIDTHS:
            await page.set_viewport_size({"width": width, "height": 900})
            for scheme in SCHEMES.values():
                await page.emulate_media(color_scheme=scheme)
                await page.screenshot(path=Path(folder) / f"{number}-{width}-{scheme}.png")


async def test_two_fingers_zoom_and_an_arm_opens(
    database: str, connection: asyncpg.Connection, browser: Browser, arms: None
) -> None:
    phone = {"viewport": {"width": 390, "height": 800}, "has_touch": True, "is_mobile": True}
    async with (
        console(database, is_served=True) as client,
        window(browser, client, **phone) as page,
    ):
        await page.goto("/console/sequence?sequence=s")
        await page.locator("#graph .node").first.wait_for()
        await page.locator("#graph").scroll_into_view_if_needed()
        whole = await page.evaluate(BOX)
        for upright in (False, True):  # a page is scrolled up and down by one finger, not by two
            await _pinch(page, 60, 200, upright=upright)
            closer = await page.evaluate(BOX)
            assert float(closer.split()[2]) < 0.6 * float(whole.split()[2]), upright
            assert await page.evaluate("visualViewport.scale") == 1
            await _pinch(page, 200, 20, upright=upright)
            assert float((await page.evaluate(BOX)).split()[2]) > float(closer.split()[2])
            await page.get_by_role("button", name="Fit").click()
        assert "step=" not in page.url
        await (
            page.locator("#graph .edge", has_text="holdout")
            .locator(".wide")
            .dispatch_event("click")
        )
        await page.wait_for_url("**step=split&way=holdout")
        await shows(page, "#step .ways li[aria-current]", "the end")


async def _pinch(page: Page, start: int, end: int, *, upright: bool) -> None:
    """Move two fingers apart or together around the middle of the graph."""
    box = await page.locator("#graph").bounding_box()
    assert box is not None
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    session = await page.context.new_cdp_session(page)

    async def touch(kind: str, distance: float | None) -> None:
        half = 0 if distance is None else distance / 2
        points = [] if distance is None else [(-half, 0), (half, 1)]
        await session.send(
            "Input.dispatchTouchEvent",
            {
                "type": kind,
                "touchPoints": [
                    {"x": x if upright else x + by, "y": y + by if upright else y, "id": number}
                    for by, number in points
                ],
            },
        )

    await touch("touchStart", start)
    for step in range(1, 11):
        await touch("touchMove", start + (end - start) * step / 10)
    await touch("touchEnd", None)
    await session.detach()


async def test_a_page_is_printed_dark_on_white_and_nothing_is_covered(
    database: str, connection: asyncpg.Connection, browser: Browser
) -> None:
    await waiting_and_failing(connection)
    async with (
        console(database, is_served=True) as client,
        window(browser, client, viewport={"width": 794, "height": 1123}) as page,
    ):
        await page.goto("/console/sequence?sequence=s&step=wait")
        await page.locator("#graph .node").first.wait_for()
        await page.emulate_media(media="print", color_scheme="dark")
        colour, position = await page.evaluate(
            "[getComputedStyle(document.body).backgroundColor,"
            " getComputedStyle(document.getElementById('step')).position]"
        )
        assert colour == "rgb(255, 255, 255)"
        assert position not in ("fixed", "absolute")
        assert await page.evaluate("document.documentElement.scrollWidth") <= 794
