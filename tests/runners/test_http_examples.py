"""The example runners in other languages execute a step, and reject calls without a valid
signature.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
from pathlib import Path

import asyncpg
import httpx
import pytest

from tests.helpers.engines import ALL_ENDED, define, enroll, running_engine, until
from tests.helpers.runners import http_runner
from tests.helpers.waiting import PATIENCE

SECRET = "whsec_c2VjcmV0LXNlY3JldC1zZWNyZXQ="


@pytest.mark.parametrize(
    ("program", "arguments"), [("node", ["score.mjs"]), ("go", ["run", "score.go"])]
)
async def test_an_example_serves_a_step(
    database: str,
    connection: asyncpg.Connection,
    repository: Path,
    program: str,
    arguments: list[str],
) -> None:
    if shutil.which(program) is None:
        pytest.skip(f"{program} is not installed")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    url = f"http://127.0.0.1:{port}/"
    process = await asyncio.create_subprocess_exec(
        program,
        *arguments,
        cwd=repository / "examples/http-runners",
        env={**os.environ, "SECRET": SECRET, "PORT": str(port)},
    )
    try:
        async with httpx.AsyncClient() as stranger, asyncio.timeout(PATIENCE):
            while True:
                try:
                    refused = await stranger.post(url, json={"config": {}, "runners": []})
                    break
                except httpx.ConnectError:
                    await asyncio.sleep(0.05)
        assert refused.status_code == 401
        await define(connection, "s", ("score", "Score", '{"perVisit": 30}', None))
        for subject, visits in (("ada", "[1, 2]"), ("bob", "[]")):
            await enroll(connection, "s", subject, f'{{"visits": {visits}}}')
        runner = http_runner(url, name="Score", secret=SECRET, allow_private=True)
        async with running_engine(database, {"Score": runner}):
            await until(connection, ALL_ENDED)
        await runner.close()
    finally:
        process.terminate()
        await process.wait()
    rows = await connection.fetch(
        "SELECT e.subject, v.action, (e.data->>'score')::integer AS score"
        " FROM sequencer.enrollments AS e JOIN sequencer.events AS v ON v.enrollment_id = e.id"
        " WHERE v.action IN ('next', 'altNext') ORDER BY e.subject"
    )
    assert [tuple(row) for row in rows] == [("ada", "next", 60), ("bob", "altNext", 0)]
