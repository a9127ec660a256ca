"""The editor of a sequence's YAML, in a real browser."""

from __future__ import annotations

from typing import TYPE_CHECKING

import asyncpg

from tests.console.conftest import BEGUN, Fixable, console, waiting_and_failing, window
from tests.console.test_browser import check_accessible, check_page, shows, text_of
from tests.helpers.engines import until

if TYPE_CHECKING:
    from playwright.async_api import Browser, Page

CONTENT = ".cm-content"

OPTIONS = """([text, known]) => {
    const position = text.indexOf("@@");
    return fetch("/console/edit/schema").then((answer) => answer.json()).then((root) =>
        Completion.complete(text.replace("@@", ""), position, root, known)?.options
            .map((one) => one.label) ?? null);
}"""
STEPS = "steps:\n  - name: first\n    type: {}\n    config:\n      {}\n  - name: second\n"


async def options(page: Page, text: str) -> list[str] | None:
    known = {"types": ["Note"], "sequences": ["other"]}
    found: list[str] | None = await page.evaluate(OPTIONS, [text, known])
    return found


async def test_the_editor_completes_checks_and_plans(
    database: str, connection: asyncpg.Connection, browser: Browser
) -> None:
    await waiting_and_failing(connection)
    async with console(database, {"Note": Fixable()}, write=True, is_served=True) as client:
        await until(connection, BEGUN)
        async with window(browser, client) as page:
            await page.goto("/console/edit?sequence=s")
            await page.locator(CONTENT).wait_for()
            assert not await page.locator("#text").is_visible()
            name = page.get_by_role("textbox", name="YAML")
            assert await name.count() == 1
            # what is wrong is underlined where it is
            await page.locator(".cm-line", has_text="amount: 1").click()
            await page.keyboard.press("End")
            await page.keyboard.type("x")
            await page.locator(".cm-lintRange-error").wait_for()
            assert await text_of(page, ".cm-lintRange-error") == "amount: 1x"
            await page.keyboard.press("Control+Shift+M")
            await shows(page, ".cm-panel-lint", "wait: ")
            for scheme in ("light", "dark"):
                await page.emulate_media(color_scheme=scheme)
                await check_accessible(page)
            await page.keyboard.press("Escape")
            await page.locator(CONTENT).focus()
            await page.keyboard.press("Control+z")
            await page.locator(".cm-lintRange-error").wait_for(state="detached")
            # completion, by keyboard alone
            await page.locator(".cm-line", has_text="amount: 1").click()
            await page.keyboard.press("End")
            await page.keyboard.press("Enter")
            await page.keyboard.type("holi")
            await shows(page, ".cm-tooltip-autocomplete", "holidays")
            await check_accessible(page)
            await page.keyboard.press("Escape")
            await page.keyboard.press("Shift+Home")
            await page.keyboard.press("Shift+Home")
            await page.keyboard.press("Backspace")
            await page.keyboard.press("Backspace")
            # Tab indents, and does not trap
            await page.keyboard.press("Escape")
            await page.keyboard.press("Tab")
            focused = "document.activeElement.textContent"
            assert await page.evaluate(focused) == "Check and plan"
            await page.locator(".cm-line", has_text="amount: 1").click()
            await page.keyboard.press("End")
            await page.keyboard.type("5")
            await page.get_by_role("button", name="Check and plan").click()
            await shows(page, ".plan", "changed wait: config.amount 1 → 15")
            # what the form sends comes back
            await shows(page, CONTENT, "amount: 15")
            await check_page(page, "the plan")


async def test_back_leads_to_the_plan_and_to_what_was_typed_since(writable: Page) -> None:
    await writable.goto("/console/edit?sequence=s")
    for words in ("# before the plan", "# and after it"):
        await writable.locator(CONTENT).click()
        await writable.keyboard.press("Control+End")
        await writable.keyboard.type(words)
        if "before" in words:
            await writable.get_by_role("button", name="Check and plan").click()
            await shows(writable, "h2", "Plan")
    await writable.get_by_role("link", name="Failures").click()
    await shows(writable, "h1", "Failures")
    await writable.go_back()  # the browser asks nothing
    await shows(writable, "h2", "Plan")
    await shows(writable, CONTENT, "# before the plan# and after it")


async def test_the_editor_completes_keys_and_names(writable: Page) -> None:
    await writable.goto("/console/edit?sequence=s")
    for text, some in (
        ("name: s\n@@", {"timezone", "steps"}),
        (STEPS.format("Wait@@", ""), {"WaitForDuration", "Email", "Note"}),
        (STEPS.format("WaitForDuration", "@@"), {"amount", "unit"}),
        (STEPS.format("WaitForDuration", "unit: @@"), {"days", "hours"}),
        (STEPS.format("GoTo", "step: @@"), {"first", "second"}),
        (STEPS.format("GoTo", "sequence: @@"), {"other"}),
        (STEPS.format("Switch", "cases:\n        - @@"), {"when", "step"}),
        (STEPS.format("Email", "strict: @@"), {"true", "false"}),
        ("steps:\n- name: first\n  next: @@\n- name: second", {"first", "second", "null"}),
        ("reentry: a@@", {"after_end", "always", "never"}),
        ("enroll:\n  @@", {"from", "schedule"}),
        # in {} and [], in quotes, and in lists
        (
            STEPS.format("WaitForDuration", "").replace("config:\n", "config: {amount: 1, @@}\n"),
            {"unit"},
        ),
        (
            "steps:\n- name: a\n  type: WaitForDuration\n  config: {unit: da@@, amount: 1}",
            {"days", "hours"},
        ),
        (
            'steps:\n  - name: a\n    type: WaitForDuration\n    config: {unit: "da@@"}',
            {"days"},
        ),
        ("steps:\n  - {name: a, type: Wai@@}", {"WaitForDuration", "Note"}),
        ("steps:\n  - {name: a, type: GoTo, next: @@}\n  - {name: b}", {"a", "b"}),
        ("steps:\n  - {name: a, type: GoTo, config: {step: @@}}", {"a"}),
        ("steps:\n  - {name: a, type: GoTo, co@@}", {"config", "next"}),
        ("window: {days: [mon, t@@]}", {"tue", "thu"}),
        ("window: {@@", {"days", "from"}),
        ("window:\n  days:\n    - mon\n    - t@@", {"tue", "thu"}),
        ("window:\n  days: [@@", {"tue", "thu"}),
        ("reentry: 'a@@'", {"after_end", "always"}),
        ('"reentry": a@@', {"after_end", "always"}),
        ("steps:\n- name: first one\n  next: first o@@\n", {"first one"}),
    ):
        found = await options(writable, text)
        assert found is not None, text
        assert some <= {*found}, text
    # what is there already, what another sequence has, texts and comments
    found = await options(writable, STEPS.format("WaitForDuration", "amount: 1\n      @@"))
    assert found is not None
    assert "amount" not in found
    assert "unit" in found
    found = await options(writable, "window: {days: [mon], fr@@om: '09:00', to: '17:00'}")
    assert found is not None
    assert "from" in found
    assert not {"days", "to"} & {*found}
    for text in (
        "steps:\n  - {name: first, type: GoTo, config: {sequence: t, step: @@}}",
        "steps:\n  - {name: first, type: Email, config: {text: 'Dear, [@@'}}",
        "steps:\n  - {name: first}  # {@@",
        STEPS.format("GoTo", "sequence: t\n      step: f@@"),
        STEPS.format("Email", "text: |\n        Dear @@"),
        "# na@@",
        "nonsense:\n  @@",
    ):
        assert "first" not in (await options(writable, text) or []), text


async def test_without_scripts_the_text_is_edited_as_it_is(
    database: str, connection: asyncpg.Connection, browser: Browser
) -> None:
    await waiting_and_failing(connection)
    async with (
        console(database, {"Note": Fixable()}, write=True, is_served=True) as client,
        window(browser, client, java_script_enabled=False) as page,
    ):
        await page.goto("/console/edit?sequence=s")
        assert await page.locator("#text").is_visible()
        assert await page.locator(CONTENT).count() == 0
        text = await page.locator("#text").input_value()
        await page.locator("#text").fill(text.replace("amount: 1", "amount: 2"))
        await page.get_by_role("button", name="Check and plan").click()
        await shows(page, ".plan", "changed wait: config.amount 1 → 2")
