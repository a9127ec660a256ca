"""Sequences that are paused, edited, planned and applied in the console."""

from __future__ import annotations

import asyncio
import html
import re
from threading import Event
from time import process_time
from typing import Any

import asyncpg
import httpx
import pytest

from sequencerd.console import stored_sequence, summary
from sequencerd.console.stored_sequence import side_by_side
from tests.console.conftest import (
    BEGUN,
    DAY,
    Fixable,
    console,
    page_with,
    token,
    waiting_and_failing,
)
from tests.console.test_users import USERS, log_in
from tests.helpers.engines import define, until
from tests.helpers.waiting import PATIENCE

REVISION = "SELECT revision FROM sequencer.sequences WHERE name = 's'"


def text_of(page: httpx.Response) -> str:
    """The YAML in the editor."""
    found = re.search(r"<textarea[^>]*>(.*?)</textarea>", page.text, re.DOTALL)
    assert found
    return html.unescape(found[1]).lstrip("\n")


def form_of(page: httpx.Response, **changes: str) -> dict[str, str]:
    hidden = re.findall(r'type="hidden" name="(\w+)" value="([^"]*)"', page.text)
    return {**dict(hidden), "text": text_of(page), **changes}


async def test_a_sequence_is_paused_with_a_reason(
    database: str, connection: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    await waiting_and_failing(connection)
    async with console(database, {"Note": Fixable()}, users=USERS, write=True) as client:
        await log_in(client, "otto")
        await page_with(client, "/", ">s</a>")  # the status is counted, and not again
        monkeypatch.setattr(summary, "MIN_PAUSE", PATIENCE)
        await page_with(client, "/", ">s</a>")
        assert "Pause…" not in (await client.get("/sequence?sequence=s")).text
        refused = await client.get("/status?sequence=s&action=pause")
        assert refused.status_code == 403
        assert "This needs the role editor; otto has the role operator." in refused.text
        client.cookies.clear()
        await log_in(client, "edda")
        assert "Pause…" in (await client.get("/sequence?sequence=s")).text
        page = await client.get("/status?sequence=s&action=pause")
        for action, effect in (("pause", "wait; nothing is"), ("resume", "continue.")):
            asked = await client.get(f"/status?sequence=s&action={action}")
            assert f"<p>Its enrollments {effect}" in asked.text
        form = {"token": token(page), "sequence": "s", "action": "pause"}
        assert (await client.post("/status", data=form)).status_code == 422
        wrong = {**form, "action": "drop", "reason": "x"}
        assert (await client.post("/status", data=wrong)).status_code == 422
        nowhere = {**form, "sequence": "t", "reason": "x"}
        assert (await client.post("/status", data=nowhere)).status_code == 422
        done = await client.post("/status", data={**form, "reason": "a holiday"})
        assert done.status_code == 303
        page = await client.get(done.headers["location"].removeprefix("/console"))
        assert 'data-tag="paused"' in page.text
        assert "Resume…" in page.text
        assert "Pause…" not in page.text
        row = await connection.fetchrow(
            "SELECT s.status, r.reason FROM sequencer.sequences AS s"
            " JOIN sequencer.revisions AS r USING (revision) WHERE s.name = 's'"
        )
        assert tuple(row) == ("paused", "edda in the console: a holiday")


async def test_a_sequence_is_edited_by_a_plan(
    database: str, connection: asyncpg.Connection
) -> None:
    await waiting_and_failing(connection)
    before = await connection.fetchval(REVISION)
    async with console(database, {"Note": Fixable()}, users=USERS, write=True) as client:
        await until(connection, BEGUN)
        await log_in(client, "edda")
        page = await client.get("/edit?sequence=s")
        assert "amount: 1" in text_of(page)
        # what is wrong is said with its line
        wrong = form_of(page, action="plan", text=text_of(page).replace("amount", "amuont"))
        refused = await client.post("/edit", data=wrong)
        assert refused.status_code == 422
        assert re.search(r"Line \d+, wait: .*amuont", refused.text)
        assert "amuont" in text_of(refused)
        for text, words in (
            ("a: [", "Line 1"),
            ("", "it contains no sequence"),
            (text_of(page).replace("name: s\n", "name: t\n", 1), "This page edits only s"),
        ):
            refused = await client.post("/edit", data=form_of(page, action="plan", text=text))
            assert refused.status_code == 422
            assert words in refused.text
        # the plan says what happens to those who wait
        edited = text_of(page).replace("amount: 1", "amount: 2")
        planned = await client.post("/edit", data=form_of(page, action="plan", text=edited))
        assert "changed wait: config.amount 1 → 2" in planned.text
        assert "1 waits at wait: 1 waits until another time" in planned.text
        assert await connection.fetchval(REVISION) == before
        apply = form_of(planned, action="apply")
        refused = await client.post("/edit", data=apply)
        assert "Write a reason" in refused.text
        for brake in ("0", "x", "1000001", "-1", "1" * 400):
            wrong = {**apply, "reason": "longer", "brake": brake}
            refused = await client.post("/edit", data=wrong)
            assert refused.status_code == 422
            assert "The brake is a number from 1 to 1,000,000" in refused.text
            assert f'value="{brake}"' in refused.text
        assert await connection.fetchval(REVISION) == before
        braked = "SELECT apply_brake, apply_brake_until > now() + interval '23 hours' AS is_on"
        braked += " FROM sequencer.sequences WHERE name = 's'"
        done = await client.post("/edit", data={**apply, "reason": "longer", "brake": "500"})
        assert done.status_code == 303, done.text
        row = await connection.fetchrow(
            "SELECT s.from_file, s.revision, r.reason FROM sequencer.sequences AS s"
            " JOIN sequencer.revisions AS r USING (revision) WHERE s.name = 's'"
        )
        assert row["reason"] == "edda in the console: longer"
        assert not row["from_file"]
        assert tuple(await connection.fetchrow(braked)) == (500, True)
        # the page says who has changed it, and leads to what
        page = await client.get("/sequence?sequence=s")
        assert re.search(
            r"Changed</a> <time .*> by postgres: edda in the console: longer<", page.text
        )
        older = await client.get(f"/sequence?sequence=s&before={row['revision']}")
        assert "Changed</a>" not in older.text
        # side by side, and back
        page = await client.get(f"/revision?sequence=s&revision={row['revision']}")
        assert "<del>      amount: 1</del>" in page.text
        assert "<ins>      amount: 2</ins>" in page.text
        assert "edda in the console: longer" in page.text
        back = await client.get(f"/edit?sequence=s&revision={before}")
        assert "amount: 1" in text_of(back)
        planned = await client.post("/edit", data=form_of(back, action="plan"))
        assert "changed wait: config.amount 2 → 1" in planned.text
        done = await client.post("/edit", data=form_of(planned, action="apply", reason="roll back"))
        assert done.status_code == 303
        assert (await client.get("/revision?sequence=s&revision=999999")).status_code == 404


async def test_a_change_meanwhile_is_not_undone(
    database: str, connection: asyncpg.Connection
) -> None:
    await waiting_and_failing(connection)
    async with console(database, {"Note": Fixable()}, write=True) as client:
        page = await client.get("/edit?sequence=s")
        edited = text_of(page).replace("amount: 1", "amount: 2")
        planned = await client.post("/edit", data=form_of(page, action="plan", text=edited))
        await connection.execute(
            "BEGIN; SET LOCAL sequencer.reason = 'Bob was here';"
            " UPDATE sequencer.sequences SET description = 'new' WHERE name = 's'; COMMIT"
        )
        for form in (
            form_of(page, action="plan", text=edited),
            form_of(planned, action="apply", reason="x"),
        ):
            refused = await client.post("/edit", data=form)
            assert refused.status_code == 409
            assert "Bob was here" in refused.text
        assert "amount: 2" in text_of(refused)
        # planned again, it says what would be undone
        planned = await client.post("/edit", data=form_of(refused, action="plan"))
        assert "description: new → none" in planned.text
        forged = form_of(planned, action="apply", reason="x", plan="000000000000")
        assert (await client.post("/edit", data=forged)).status_code == 409
        other = form_of(planned, action="apply", reason="x", token="x")
        assert (await client.post("/edit", data=other)).status_code == 403


async def test_a_removed_step_asks_where_to_go(
    database: str, connection: asyncpg.Connection
) -> None:
    waiting, _ = await waiting_and_failing(connection)
    async with console(database, {"Note": Fixable()}, write=True) as client:
        await until(connection, BEGUN)
        page = await client.get("/edit?sequence=s")
        text = "name: s\nsteps:\n  - name: pause\n    type: WaitForDuration\n    config: " + DAY
        text += "\n  - name: note\n    type: Note\n"
        planned = await client.post("/edit", data=form_of(page, action="plan", text=text))
        assert "1 enrollment at wait, which is removed" in html.unescape(planned.text)
        assert 'name="plan"' not in planned.text
        # a move from a step that the text has again is left out
        moved = form_of(planned, action="plan") | {"move.wait": "pause", "move.note": "pause"}
        planned = await client.post("/edit", data=moved)
        assert "1 moves from wait to pause" in planned.text
        apply = form_of(planned, action="apply", reason="renamed") | {"move.wait": "pause"}
        assert (await client.post("/edit", data=apply)).status_code == 303
        step = await connection.fetchval(
            "SELECT step FROM sequencer.enrollments WHERE id = $1", waiting
        )
        assert step == "pause"


async def test_files_stay_the_authority(database: str, connection: asyncpg.Connection) -> None:
    await waiting_and_failing(connection)
    await connection.execute("UPDATE sequencer.sequences SET from_file = true")
    before = await connection.fetchval(REVISION)
    async with console(database, {"Note": Fixable()}, write=True) as client:
        page = await client.get("/edit?sequence=s")
        assert "managed by files" in page.text
        edited = text_of(page).replace("amount: 1", "amount: 2")
        planned = await client.post("/edit", data=form_of(page, action="plan", text=edited))
        assert "config.amount 1 → 2" in planned.text
        assert "Apply this plan" not in planned.text
        forged = form_of(planned, action="apply", reason="x", plan="x")
        assert (await client.post("/edit", data=forged)).status_code == 409
        file = await client.post("/edit", data=form_of(planned, action="download"))
        assert file.headers["content-disposition"] == 'attachment; filename="s.yaml"'
        assert file.text == edited
        assert await connection.fetchval(REVISION) == before


async def test_the_daemon_s_role_is_not_enough_to_edit(
    logins: dict[str, str], connection: asyncpg.Connection
) -> None:
    await define(connection, "s", ("wait", "WaitForDuration", DAY, None))
    changes: dict[str, Any] = {"sequence": "s", "action": "pause", "reason": "x"}
    async with console(logins["daemon"], write=True) as client:
        page = await client.get("/status?sequence=s&action=pause")
        refused = await client.post("/status", data={**changes, "token": token(page)})
        assert refused.status_code == 422
        assert "GRANT sequencer_editor" in refused.text


@pytest.mark.parametrize(
    ("before", "after", "kinds"),
    [
        ("a", "a", []),
        ("a\nb\nc", "a\nx\nc", ["equal", "replace", "equal"]),
        ("", "a", ["insert"]),
        ("a", "", ["delete"]),
        (
            "\n".join("a123456789b"),
            "\n".join("x123456789y"),
            ["replace", *["equal"] * 3, "gap", *["equal"] * 3, "replace"],
        ),
    ],
)
def test_side_by_side(before: str, after: str, kinds: list[str]) -> None:
    assert [row["kind"] for row in side_by_side(before, after)] == kinds


async def test_errors_are_found_while_a_sequence_is_edited(
    database: str, connection: asyncpg.Connection
) -> None:
    await waiting_and_failing(connection)
    async with console(database, {"Note": Fixable()}, users=USERS, write=True) as client:
        await log_in(client, "otto")
        assert (await client.get("/edit/schema")).status_code == 403
        page = await client.get("/")
        form = {"token": token(page), "text": "name: s"}
        assert (await client.post("/edit/check", data=form)).status_code == 403
        client.cookies.clear()
        await log_in(client, "edda")
        schema = (await client.get("/edit/schema")).json()
        assert "steps" in schema["properties"]
        page = await client.get("/edit?sequence=s")
        text = text_of(page)
        for wrong, line, column, words in (
            (text.replace("amount: 1", "amuont: 1"), 6, 7, "amuont"),
            (text.replace("type: Note", "type: Nope"), 9, 5, "Nope"),
            ("name: s\nsteps: [", 2, 9, "end"),
            ("name: s\n\tsteps: 1", 2, 1, "cannot start any token"),
            ("", 1, 1, "it contains no sequence"),
            ("name: s\n" + "#" * 1_100_000, 1, 1, "has more than 1048576 bytes"),
        ):
            answer = await client.post("/edit/check", data=form_of(page, text=wrong))
            assert answer.status_code == 200
            assert [
                one
                for one in answer.json()
                if (one["line"], one["column"]) == (line, column) and words in one["message"]
            ], answer.text
        assert (await client.post("/edit/check", data={**form, "token": "x"})).status_code == 403
        policy = page.headers["content-security-policy"]
        nonce = re.search(r'data-nonce="([^"]+)"', page.text)
        assert nonce
        assert f"style-src 'self' 'nonce-{nonce[1]}'" in policy
        assert "script-src 'self';" in policy


def test_many_changes_in_a_long_sequence_are_compared_in_little_time() -> None:
    """Lines such as "type: Email" occur once in each step, and any of them may begin a match."""

    def text(amount: int) -> str:
        steps = (f"  - name: step{n}\n    amount: {amount if n % 7 else 1}" for n in range(3000))
        return "steps:\n" + "\n    type: WaitForDuration\n    unit: day\n".join(steps)

    before = process_time()
    lines = side_by_side(text(1), text(2))
    assert process_time() - before < 10  # usually one
    assert sum(line["kind"] == "replace" for line in lines) == 3000 - -(-3000 // 7)


async def test_other_pages_are_served_while_revisions_are_compared(
    database: str, connection: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    await waiting_and_failing(connection)
    revision = await connection.fetchval(REVISION)
    begun, other_served = Event(), Event()

    def compare(_: str, __: str) -> list[dict[str, Any]]:
        begun.set()
        assert other_served.wait(PATIENCE)
        return []

    monkeypatch.setattr(stored_sequence, "side_by_side", compare)
    async with console(database, {"Note": Fixable()}) as client:
        url = f"/revision?sequence=s&revision={revision}"
        comparing = asyncio.create_task(client.get(url))
        await asyncio.to_thread(begun.wait, PATIENCE)
        assert (await client.get("/search")).status_code == 200
        other_served.set()
        assert (await comparing).status_code == 200
