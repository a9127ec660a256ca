"""Waits and texts that are changed by a form."""

from __future__ import annotations

import html
import re

import asyncpg
import httpx

from tests.console.conftest import BEGUN, Fixable, console, token
from tests.console.test_editing import form_of, text_of
from tests.console.test_users import USERS, log_in
from tests.helpers.engines import define, enroll, until

NOTE = '{"subject": {"en": "Hello", "de": "Hallo"}, "text": "Dear Ada,\\n\\nbye.\\n"}'
WAIT = '{"amount": 1, "unit": "day"}'


def fields_of(page: httpx.Response) -> dict[str, str]:
    """What the form has in it."""
    inputs = re.findall(
        r'<input (?:type="hidden" |id="\S+" )name="(\S+)" value="([^"]*)"', page.text
    )
    areas = re.findall(
        r'<textarea (?:id="\S+" )?name="(\S+)"[^>]*>\n(.*?)</textarea>', page.text, re.DOTALL
    )
    units = re.findall(r'name="(config\.\S*unit)">.*?<option selected>(.*?)</option>', page.text)
    return {name: html.unescape(value) for name, value in (*inputs, *areas, *units)}


async def sequence(connection: asyncpg.Connection) -> None:
    await define(
        connection,
        "s",
        ("wait", "WaitForDuration", WAIT, "note"),
        ("note", "Note", NOTE, "go"),
        ("go", "GoTo", "{}", None),
    )
    await enroll(connection, "s", "ada")


async def test_a_wait_and_a_text_are_changed_by_a_plan(
    database: str, connection: asyncpg.Connection
) -> None:
    await sequence(connection)
    async with console(database, {"Note": Fixable()}, users=USERS, write=True) as client:
        await until(connection, BEGUN)
        await log_in(client, "otto")
        panel = await client.get("/sequence?sequence=s&step=wait")
        assert "/console/step" not in panel.text
        assert (await client.get("/step?sequence=s&step=wait")).status_code == 403
        asked = {"token": token(panel), "sequence": "s", "step": "wait"}
        for path in ("/step", "/step/edited"):
            assert (await client.post(path, data=asked)).status_code == 403
        client.cookies.clear()
        await log_in(client, "edda")
        assert "Edit in a form…" in (await client.get("/sequence?sequence=s&step=wait")).text
        assert "Edit in a form…" not in (await client.get("/sequence?sequence=s&step=go")).text
        page = await client.get("/step?sequence=s&step=wait")
        form = fields_of(page)
        assert (form["config.amount"], form["config.unit"]) == ("1", "day")
        assert (await client.post("/step", data={**form, "token": "x"})).status_code == 403
        planned = await client.post(
            "/step", data={**form, "config.amount": "3", "config.unit": "hours"}
        )
        plan = html.unescape(planned.text)
        assert "config.amount 1 → 3" in plan
        assert "config.unit day → hours" in plan
        assert "1 waits at wait" in planned.text
        assert text_of(planned) == form["text"].replace("amount: 1", "amount: 3").replace(
            "unit: day", "unit: hours"
        )
        done = await client.post("/edit", data=form_of(planned, action="apply", reason="sooner"))
        assert done.status_code == 303, done.text
        config = await connection.fetchval("SELECT config FROM sequencer.steps WHERE name = 'wait'")
        assert config == '{"unit": "hours", "amount": 3}'
        # the texts of a message, in each language
        form = fields_of(await client.get("/step?sequence=s&step=note"))
        assert form["config.subject.de"] == "Hallo"
        assert form["config.text"] == "Dear Ada,\n\nbye.\n"
        changes = {"config.subject.de": 'Guten "Tag"', "config.text": "Dear Ada,\r\nsee you.\r\n"}
        planned = await client.post("/step", data={**form, **changes})
        assert "changed note" in planned.text
        assert 'de: Guten "Tag"' in text_of(planned)
        assert "text: |\n        Dear Ada,\n        see you.\n" in text_of(planned)
        # nothing, or what the check refuses
        page = await client.post("/step", data=form)
        assert "Nothing changes." in page.text
        form = fields_of(await client.get("/step?sequence=s&step=wait"))
        refused = await client.post("/step", data={**form, "config.amount": "many"})
        assert refused.status_code == 422
        assert "amount: many" in text_of(refused)
        nothing = await client.get("/step?sequence=s&step=go")
        assert "config of this step has no waits or texts that a form can edit" in nothing.text
        assert (await client.get("/step?sequence=s&step=nowhere")).status_code == 404
        assert (await client.get("/step?sequence=t&step=wait")).status_code == 404


async def test_an_edited_sequence_keeps_its_comments(
    database: str, connection: asyncpg.Connection
) -> None:
    await sequence(connection)
    await connection.execute("UPDATE sequencer.sequences SET from_file = true")
    async with console(database, {"Note": Fixable()}, write=True) as client:
        page = await client.get("/edit?sequence=s")
        text = "# ours\n" + text_of(page).replace("amount: 1", "amount: 1   # a day")
        asked = form_of(page, text=text, step="wait")
        form = fields_of(await client.post("/step/edited", data=asked))
        planned = await client.post("/step", data={**form, "config.amount": "2"})
        assert text_of(planned) == text.replace("amount: 1 ", "amount: 2 ")
        # files manage it: it is offered as a file
        assert "managed by files" in planned.text
        assert "Apply this plan" not in planned.text
        file = await client.post("/edit", data=form_of(planned, action="download"))
        assert file.text == text.replace("amount: 1 ", "amount: 2 ")
        # what the form cannot change, and what it cannot read
        alias = text.replace("amount: 1", "amount: &a 1\n      holidays: *a")
        form = fields_of(await client.post("/step/edited", data={**asked, "text": alias}))
        refused = await client.post("/step", data={**form, "config.amount": "2"})
        assert refused.status_code == 422
        assert "Use the editor: a value is written in a way" in refused.text
        assert 'value="2"' in refused.text
        for wrong in ("a: [", "", "[]", "steps: 1", "steps: [1]"):
            refused = await client.post("/step/edited", data={**asked, "text": wrong})
            assert refused.status_code in (404, 422), wrong
        # the sequence has changed since
        await connection.execute("UPDATE sequencer.sequences SET description = 'new'")
        late = await client.post("/step", data={**form, "text": text, "config.amount": "2"})
        assert late.status_code == 409
