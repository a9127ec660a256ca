"""The console as a process of its own."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import asyncpg
import httpx
import pytest

from sequencerd.storage import migrate
from tests.chaos.world import Server, serving
from tests.console.conftest import DAY, page_once, token
from tests.console.test_access import HASH, log_in
from tests.helpers.command_line import Command, start_sequencerd
from tests.helpers.engines import define, enroll
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
    """A server and its standby."""
    folder = Path(tempfile.mkdtemp(prefix="console-"))
    folder.chmod(0o755)
    try:
        with serving(folder / "a") as primary, primary.standby(folder / "b") as standby:
            yield primary, standby
    finally:
        shutil.rmtree(folder)


async def test_on_a_standby_it_reads(pair: tuple[Server, Server]) -> None:
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


def test_it_does_not_start(sequencerd: Command) -> None:
    sequencerd("console", "--listen", "nowhere", code=2)
    assert "--listen 'nowhere': write a host and a port" in sequencerd.errors
    sequencerd("console", "--listen", "0.0.0.0:0", code=2)
    assert "the console would be open to everyone at 0.0.0.0:0" in sequencerd.errors
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        sequencerd.program("console", "--listen", address, code=2)
    assert f"another process listens on {address}" in sequencerd.errors
    assert "--listen" in sequencerd.errors
