"""Changes in the console over several shards, also while one is away."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Mapping
from html import unescape
from pathlib import Path

import asyncpg
import httpx

from sequencerd.core.routing import shard_of
from tests.cli.test_shards import COMMITTING, KILL, MESSAGE, commits_wait
from tests.console.conftest import Line, counted, fixture, page_with, token
from tests.console.test_editing import text_of
from tests.console.test_shards import console
from tests.helpers.command_line import Command
from tests.helpers.engines import until
from tests.helpers.servers import smtp_server
from tests.helpers.shards import configure
from tests.helpers.waiting import eventually

WRITE = {"SEQUENCERD_CONSOLE_WRITE": "true"}
STATUSES = "SELECT string_agg(status, ' ' ORDER BY id) FROM sequencer.enrollments"
STATUS = "SELECT status FROM sequencer.sequences"
AMOUNT = "SELECT config->>'amount' FROM sequencer.steps WHERE name = 'first'"
SUPPRESSED = "SELECT count(*) FROM sequencer.suppressions"
ENTRY = {"channel": "email", "address": "ada@example.com", "topic": "*", "reason": "asked"}
SUBJECTS = [
    next(f"new-{n}" for n in range(100) if shard_of(f"new-{n}", 2) == number) for number in (0, 1)
]

Shards = Mapping[str, asyncpg.Connection]


async def of_each(shards: Shards, query: str) -> list[object]:
    return [await connection.fetchval(query) for connection in shards.values()]


@fixture(autouse=True)
async def editable(filled: Command, shards: Shards) -> None:
    """Let the console edit the sequence, which no file manages."""
    for connection in shards.values():
        await connection.execute("UPDATE sequencer.sequences SET from_file = false")


@fixture
async def client(filled: Command) -> AsyncIterator[httpx.AsyncClient]:
    async with console(filled, "console", **WRITE) as client:
        yield client


@fixture
async def line(filled: Command, shards_url: str) -> AsyncIterator[Line]:
    """The way to the shard b."""
    line = Line(shards_url)
    async with line.open() as url:
        configure(filled, a=shards_url, b=url)
        yield line


async def post(client: httpx.AsyncClient, path: str, **form: str) -> httpx.Response:
    page = await client.get("/suppress")
    return await client.post(path, data={"token": token(page), **form})


async def confirm(client: httpx.AsyncClient, query: str, **form: str) -> httpx.Response:
    """Answer the question of a change, and follow it."""
    page = await client.get(f"/change?{query}")
    fields = re.findall(r'type="hidden" name="(\w+)" value="([^"]*)"', page.text)
    assert dict(fields).get("number"), page.text
    answer = await client.post("/change", data={**dict(fields), "reason": "asked", **form})
    assert answer.status_code == 303, answer.text
    path = answer.headers["location"].removeprefix("/console")

    async def ended() -> httpx.Response | None:
        found = await client.get(path)
        assert found.status_code == 200, found.text
        return None if "<progress" in found.text else found

    return await eventually(ended)


async def edited(client: httpx.AsyncClient, amount: int, **form: str) -> dict[str, str]:
    """Return the form that applies a plan of another wait."""
    page = await client.get("/edit?sequence=s")
    return await planned_form(
        client, page, re.sub(r"amount: \d+", f"amount: {amount}", text_of(page)), **form
    )


async def rolled_back(client: httpx.AsyncClient) -> dict[str, str]:
    """Return the form that applies the oldest revision, by the links of the pages."""
    page = await client.get("/sequence?sequence=s")
    *_, oldest = re.findall(r'href="/console(/shards/a/revision[^"]*)"', page.text)
    compared = await client.get(unescape(oldest))
    form = compared.text.partition("Roll back to this revision")[0].rpartition("<form")[2]
    fields = re.findall(r'name="(\w+)" value="([^"]*)"', form)
    page = await client.get("/edit", params=dict(fields))
    return await planned_form(client, page, text_of(page))


async def planned_form(
    client: httpx.AsyncClient, page: httpx.Response, text: str, **form: str
) -> dict[str, str]:
    fields = dict(re.findall(r'type="hidden" name="(\w+)" value="([^"]*)"', page.text))
    planned = await client.post("/edit", data={**fields, "text": text, "action": "plan"})
    assert planned.status_code == 200, planned.text
    found = re.search(r'name="plan" value="(\w+)"', planned.text)
    assert found, planned.text
    return {**fields, "text": text, "action": "apply", "plan": found[1], "reason": "slower", **form}


async def test_enrollments_of_all_shards_are_changed_by_one_question(
    client: httpx.AsyncClient, shards: Shards
) -> None:
    asked = await client.get("/change?action=move&sequence=s")
    assert "<h1>Move 4 enrollments?</h1>" in asked.text
    assert asked.text.count('<td data-label="Sequence">') == 1
    moved = await confirm(client, "action=move&sequence=s&step=first", to="second")
    assert "Moved to second 4 enrollments" in moved.text
    assert "4 waiting or executing" in moved.text
    assert (
        "More enrollments match now"
        in (
            await post(client, "/change", action="cancel", sequence="s", number="3", reason="x")
        ).text
    )
    done = await confirm(client, "action=cancel&id=a/1&id=b/2")
    assert "Cancelled 2 enrollments" in done.text
    assert await of_each(shards, STATUSES) == ["cancelled active", "active cancelled"]
    one = await client.get("/change?action=cancel&q=b/1")
    assert "<h1>Cancel 1 enrollment?</h1>" in one.text
    wrong = await post(
        client, "/change", action="move", id="a/2,b/1", number="2", reason="x", to="third"
    )
    assert "no step &#39;third&#39;" in wrong.text
    assert (await client.get("/change?action=cancel&id=c/1")).status_code == 422


async def test_failures_of_all_shards_are_retried_by_their_cause(
    filled: Command, client: httpx.AsyncClient, shards: Shards
) -> None:
    for connection in shards.values():
        await connection.execute(
            "UPDATE sequencer.enrollments SET status = 'failed', failure = 'error',"
            " last_error = 'no route to 10.0.0.' || id"
        )
    page = await page_with(client, "/failures", "cause=")
    found = re.search(r"cause=(\w+)", page.text)
    assert found
    assert [row["failed"] for row in await counted(client, "failures")] == [4]
    listed = await client.get(f"/search?status=failed&cause={found[1]}")
    assert listed.text.count("Select enrollment") == 4
    done = await confirm(client, f"action=retry&status=failed&cause={found[1]}")
    assert "Retried 4 enrollments" in done.text
    assert await of_each(shards, STATUSES) == ["active active", "active active"]


async def test_a_sequence_is_paused_and_edited_in_all_shards(
    client: httpx.AsyncClient, shards: Shards
) -> None:
    paused = await post(client, "/status", sequence="s", action="pause", reason="stop")
    assert paused.headers["location"] == "/console/sequence?sequence=s"
    assert await of_each(shards, STATUS) == ["paused", "paused"]
    await shards["a"].execute("UPDATE sequencer.sequences SET status = 'active'")
    page = await page_with(client, "/sequence?sequence=s", "a: active; b: paused")
    assert "Pause…" in page.text
    assert "Resume…" in page.text
    await post(client, "/status", sequence="s", action="resume", reason="go")

    form = await edited(client, 5)
    stale = await client.post("/edit", data={**form, "plan": "0" * 12})
    assert "Nothing was applied: plan" in stale.text
    assert await of_each(shards, AMOUNT) == ["3", "3"]
    assert (await client.post("/edit", data=form)).status_code == 303
    assert await of_each(shards, AMOUNT) == ["5", "5"]
    revisions = await client.get("/tables/revisions.json?sequence=s")
    assert "slower" in revisions.json()["rows"][0]["reason"] + revisions.text
    assert (await client.post("/edit", data=form)).status_code == 303  # sent twice, applied once
    again = await client.post("/edit", data={**form, "once": "another"})
    assert "The sequence has changed" in again.text

    removed = text_of(await client.get("/edit?sequence=s")).replace("name: first", "name: other")
    fields = {key: form[key] for key in ("token", "sequence")}
    base = re.search(r'name="base" value="([^"]*)"', (await client.get("/edit?sequence=s")).text)
    assert base
    planned = await client.post(
        "/edit", data={**fields, "base": base[1], "text": removed, "action": "plan"}
    )
    assert "New step of the 4 enrollments at first" in planned.text
    of_one = await client.post(
        "/shards/a/edit", data={**form, "base": base[1].split()[0].partition(":")[2]}
    )
    assert of_one.status_code in (409, 422)


async def test_a_subject_is_enrolled_in_its_shard(
    client: httpx.AsyncClient, shards: Shards
) -> None:
    for name, subject in zip(shards, SUBJECTS, strict=True):
        form = {"sequence": "s", "subject": subject, "reason": "new"}
        answer = await post(client, "/enroll", **form)
        assert answer.headers["location"].startswith(f"/console/shards/{name}/enrollments/")
        again = await post(client, "/enroll", **form)
        assert again.status_code == 409
        assert re.search(rf"enrollment {name}/\d+</a> \(active\)", again.text)


async def test_the_message_and_the_data_of_an_enrollment_are_those_in_its_shard(
    filled: Command, shards: Shards, tmp_path: Path
) -> None:
    """Its id leads there from the pages of all shards, and from those of another."""
    (tmp_path / "m.yaml").write_text(MESSAGE)
    filled("apply", "m.yaml")
    filled("enroll", "m", "ada", "--shard", "b")
    at_step = "/message?sequence=m&step=hello"
    async with smtp_server() as mailbox:
        url = f"smtp://127.0.0.1:{mailbox.port}"
        async with console(filled, "console", **WRITE, SEQUENCERD_EMAIL_URL=url) as client:
            await page_with(client, "/", "<dd>5</dd>")
            shown = await client.get(at_step, follow_redirects=True)
            assert shown.url.path == "/console/shards/b/message"
            assert "ada@example.com" in shown.text
            for page in (at_step, f"/shards/a{at_step}", f"/shards/b{at_step}"):
                shown = await client.get(f"{page}&enrollment=b/3", follow_redirects=True)
                assert "ada@example.com" in shown.text, shown.text
                assert 'value="b/3"' in shown.text
            assert (await client.get(f"{at_step}&enrollment=3")).status_code == 422
            assert (await client.get(f"/shards/a{at_step}&enrollment=3")).status_code == 404
            form = dict(re.findall(r'type="hidden" name="(\w+)" value="([^"]*)"', shown.text))
            sent = await client.post("/shards/b/message/test", data={**form, "address": "me@x.org"})
            assert sent.status_code == 303, sent.text
            assert len(mailbox.messages) == 1

            for page in ("/data", "/shards/a/data"):
                edit = await client.get(f"{page}?id=b/3", follow_redirects=True)
                assert edit.url.path == "/console/shards/b/data"
            form = dict(re.findall(r'type="hidden" name="(\w+)" value="([^"]*)"', edit.text))
            form |= {"text": '{"x": 2}', "reason": "asked", "action": "apply"}
            done = await client.post("/shards/b/data", data=form)
            assert done.headers["location"] == "/console/shards/b/enrollments/3"
    changed = "SELECT string_agg(subject, ' ') FROM sequencer.enrollments WHERE data->>'x' = '2'"
    assert await of_each(shards, changed) == [None, "ada"]


async def test_an_address_is_suppressed_in_all_shards(
    client: httpx.AsyncClient, shards: Shards
) -> None:
    await shards["b"].execute(
        "INSERT INTO sequencer.suppressions (channel, address, topic)"
        " VALUES ('email', 'bob@example.com', '*')"
    )
    added = await post(client, "/suppress", **ENTRY)
    assert added.status_code == 303, added.text
    assert await of_each(shards, SUPPRESSED) == [1, 2]
    listed = (await client.get("/tables/suppressions.json")).json()["rows"]
    assert [row["address"] for row in listed] == ["ada@example.com", "bob@example.com"]
    first = (await client.get("/tables/suppressions.json?limit=1")).json()
    second = await client.get(first["next"].removeprefix("/console"))
    assert [row["address"] for row in second.json()["rows"]] == ["bob@example.com"]
    assert (await post(client, "/suppress", **ENTRY)).status_code == 409
    entry = await client.get("/suppression", params=ENTRY)
    assert entry.text.count("<dt>Source</dt>") == 1
    assert (await post(client, "/suppression", **ENTRY)).status_code == 303
    assert await of_each(shards, SUPPRESSED) == [0, 1]
    page = await client.get("/suppressions")
    assert page.text.count('data-label="Removed"') == 1


# --- a shard that is away


async def test_a_shard_lost_during_a_change_is_named(
    filled: Command, line: Line, shards: Shards
) -> None:
    async with console(filled, "console", **WRITE) as client:
        await page_with(client, "/", "<dd>4</dd>")
        form = await edited(client, 6)
        line.cut()
        for path in (
            "/sequence?sequence=s&step=first",
            "/funnel?sequence=s",
            "/over-time",
            "/suppressions",
            "/search",
            "/change?action=cancel&sequence=s",
        ):
            page = await client.get(path)
            assert page.status_code == 200, page.text
            assert "The shard b is missing here" in page.text, path
        assert "<h1>Cancel 2 enrollments?</h1>" in page.text
        rows = await client.get("/tables/enrollments.json?sequence=s&step=first")
        assert rows.headers["x-missing-shards"] == "b"
        assert len(rows.json()["rows"]) == 2

        applied = await client.post("/edit", data=form)
        assert applied.status_code == 503
        assert "Nothing can be applied: shard b: " in applied.text
        paused = await post(client, "/status", sequence="s", action="pause", reason="stop")
        assert paused.status_code == 503
        assert "s is paused in a. Not everywhere: shard b: " in paused.text
        assert await of_each(shards, STATUS) == ["paused", "active"]
        suppressed = await post(client, "/suppress", **ENTRY)
        assert "Suppressed in a, not in b: repeat the change" in suppressed.text
        named = await post(client, "/change", action="cancel", id="a/1,b/1", number="2", reason="x")
        assert "of the chosen enrollments cannot be changed: shard b: " in named.text
        for number, status in ((0, 303), (1, 503)):
            given = {"sequence": "s", "subject": SUBJECTS[number], "reason": "new"}
            await shards["a"].execute("UPDATE sequencer.sequences SET status = 'active'")
            assert (await post(client, "/enroll", **given)).status_code == status
        done = await confirm(client, "action=cancel&sequence=s")
        assert "Cancelled 3 enrollments" in done.text
        assert "Nothing was changed in the shard b" in done.text
        assert await of_each(shards, STATUSES) == [
            "cancelled cancelled cancelled",
            "active active",
        ]

        line.is_cut = False
        assert (await post(client, "/suppress", **ENTRY)).status_code == 303
        assert await of_each(shards, SUPPRESSED) == [1, 1]
        again = await post(client, "/status", sequence="s", action="pause", reason="stop")
        assert again.status_code == 303
        assert await of_each(shards, STATUS) == ["paused", "paused"]
        applied = await client.post("/edit", data=await edited(client, 6))
        assert applied.status_code == 303
        assert await of_each(shards, AMOUNT) == ["6", "6"]
        assert (
            "Cancel 2 enrollments?" in (await client.get("/change?action=cancel&sequence=s")).text
        )


async def test_a_rollback_reports_a_shard_that_dies_before_its_commit(
    filled: Command, shards: Shards, shards_url: str
) -> None:
    """As after any edit, it is repeated, and completes what is missing."""
    async with commits_wait(shards_url) as slow:
        configure(filled, a=slow, b=shards_url)
        async with console(filled, "console", **WRITE) as client:
            await commit_slowly(shards, False)
            assert (await client.post("/edit", data=await edited(client, 6))).status_code == 303
            form = await rolled_back(client)
            await commit_slowly(shards, True)
            applying = asyncio.create_task(client.post("/edit", data=form))
            await until(shards["b"], COMMITTING)
            assert await shards["b"].fetchval(KILL) == 1
            await commit_slowly(shards, False)
            answer = await applying
            assert answer.status_code == 503
            assert "the revision is in a, not in b; repeat the change" in answer.text
            assert await of_each(shards, AMOUNT) == ["3", "6"]
            page = await page_with(client, "/sequence?sequence=s", "different definitions")
            assert page.status_code == 200
            form = await rolled_back(client)
            assert (await client.post("/edit", data=form)).status_code == 303
    assert await of_each(shards, AMOUNT) == ["3", "3"]


async def commit_slowly(shards: Shards, slowly: bool) -> None:
    value = "'nobody'" if slowly else "''"
    await shards["a"].execute(f"ALTER SYSTEM SET synchronous_standby_names = {value}")
    await shards["a"].execute("SELECT pg_reload_conf()")
