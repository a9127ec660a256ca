"""The console as a process of its own."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import asyncpg
import httpx
import pytest

from sequencerd.core.routing import shard_of
from sequencerd.storage import migrate
from tests.chaos.world import Server, pair_of_servers
from tests.console.conftest import DAY, page_once, page_with, token
from tests.console.test_access import HASH, log_in
from tests.console.test_shards import console
from tests.helpers.command_line import Command, start_sequencerd
from tests.helpers.engines import define, enroll
from tests.helpers.shards import NAMES, SEQUENCE, configure
from tests.helpers.waiting import PATIENCE
from tests.service.test_http_server import free_port


@asynccontextmanager
async def process(url: str, **variables: str) -> AsyncIterator[tuple[httpx.AsyncClient, list[str]]]:
    """A client of `sequencerd console`, and the lines of its log."""
    listen = f"127.0.0.1:{free_port()}"
    variables |= {"SEQUENCERD_DATABASE": url, "SEQUENCERD_LOG_FORMAT": "json"}
    process = await start_sequencerd(
        "console",
        "--listen",
        listen,
        env={**os.environ, **variables},
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stderr is not None
    lines = [""]
    async with asyncio.timeout(PATIENCE):
        while '"ready"' not in lines[-1]:
            lines.append((await process.stderr.readline()).decode())
            assert lines[-1], lines
    reader = asyncio.create_task(process.stderr.read())
    try:
        async with httpx.AsyncClient(base_url=f"http://{listen}/console") as client:
            yield client, lines
    finally:
        process.send_signal(signal.SIGTERM)
        code = await process.wait()
        errors = (await reader).decode()
    assert code == 0, errors
    assert '"stopped"' in errors


@pytest.fixture
def pair() -> Iterator[tuple[Server, Server]]:
    with pair_of_servers() as found:
        yield found


async def test_the_console_reads_from_a_standby(pair: tuple[Server, Server]) -> None:
    """It follows the definitions, and changes nothing: not even a logout is written."""
    primary, standby = pair
    connection = await asyncpg.connect(primary.url)
    await migrate.migrate(connection)
    await define(connection, "s", ("wait", "WaitForDuration", DAY, None))
    id_ = await enroll(connection, "s", "ada")
    variables = {"SEQUENCERD_CONSOLE_WRITE": "true", "SEQUENCERD_CONSOLE_PASSWORD_HASH": HASH}
    async with process(standby.url, **variables) as (client, lines):
        assert sum("the server is a standby" in line for line in lines) == 1
        assert (await client.get("/", follow_redirects=True)).url.path == "/console/login"
        await log_in(client)
        assert "ada" in (await client.get("/sequence?sequence=s&step=wait")).text
        assert "ada" in (await client.get(f"/enrollments/{id_}")).text
        assert "completed" in (await client.get("/simulate?sequence=s")).text
        await define(connection, "later", ("a", "WaitForDuration", DAY, None))
        page = await page_once(client, "/sequence?sequence=later", 200)
        form = {"token": token(page), "action": "cancel", "id": str(id_)}
        assert (await client.post("/change", data=form)).status_code == 403
        assert (await client.get(client.base_url.join("/readyz"))).status_code == 200
        cookies = dict(client.cookies)
        await client.post("/logout", data={"token": token(page)})
        client.cookies.clear()
        client.cookies.update(cookies)
        again = await client.get("/sequence?sequence=s")
        assert again.headers["location"].startswith("/console/login")
    await connection.close()


async def test_of_several_shards_only_a_standby_is_not_changed(
    pair: tuple[Server, Server], tmp_path: Path
) -> None:
    """Each change that concerns it says so, with its name."""
    primary, standby = pair
    command = Command("", tmp_path)
    command.without_database()
    command.variables["SEQUENCERD_CONFIG"] = str(tmp_path / "sequencerd.toml")
    configure(command, a=primary.url, b=primary.url)
    command("migrate")
    (tmp_path / "s.yaml").write_text(SEQUENCE)
    command("apply", "s.yaml")
    for name in NAMES:
        command("enroll", "s", f"{name}1", "--shard", name)
    configure(command, a=primary.url, b=standby.url)
    async with console(command, "console", SEQUENCERD_CONSOLE_WRITE="true") as client:
        await page_with(client, "/", "<dd>2</dd>")
        ours = {"token": token(await client.get("/suppress")), "reason": "x"}

        async def post(path: str, **form: str) -> httpx.Response:
            return await client.post(path, data={**ours, **form})

        question = await client.get("/change?action=cancel&sequence=s")
        assert "<h1>Cancel 1 enrollment?</h1>" in question.text
        assert "The shard b is missing here: the database is read-only" in question.text
        named = await post("/change", action="cancel", id="a/1,b/1", number="2")
        assert "cannot be changed: shard b: the database is read-only" in named.text
        assert (await post("/change", action="cancel", id="a/1", number="1")).status_code == 303
        subjects = {shard_of(f"new-{n}", 2): f"new-{n}" for n in range(20)}
        for number, status in ((0, 303), (1, 503)):
            answer = await post("/enroll", sequence="s", subject=subjects[number])
            assert answer.status_code == status, answer.text
        assert "Nothing was changed: shard b: the database is read-only" in answer.text
        paused = await post("/status", sequence="s", action="pause")
        assert "s is paused in a. Not everywhere: shard b: the database is read" in paused.text
        form = {"channel": "email", "address": "ada@example.com", "topic": "*"}
        assert "Suppressed in a, not in b" in (await post("/suppress", **form)).text
        assert (await post("/shards/a/status", sequence="s", action="resume")).status_code == 303
        assert (await post("/shards/b/status", sequence="s", action="pause")).status_code == 403
    command("apply", "s.yaml", code=1)
    assert "shard b: the database is read-only" in command.errors
    assert "nothing was changed in any shard" in command.errors


def test_wrong_settings_prevent_the_start(sequencerd: Command) -> None:
    sequencerd("console", "--listen", "nowhere", code=2)
    assert "--listen 'nowhere': write a host and a port" in sequencerd.errors
    sequencerd("console", "--listen", "0.0.0.0:0", code=2)
    assert "the console would be open to everyone at 0.0.0.0:0" in sequencerd.errors
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        sequencerd.program("console", "--listen", address, code=2)
    assert f"another process listens on {address}" in sequencerd.errors
    assert "--listen" in sequencerd.errors
