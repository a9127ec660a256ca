"""A console on a listener of its own, with a database and an engine."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import asyncpg
import httpx
import pytest
import pytest_asyncio
import structlog
from prometheus_client import CollectorRegistry
from starlette.routing import Route

from sequencerd.console import actions, summary
from sequencerd.console.app import ServedShard, make_console
from sequencerd.core.task import Answer, Failed, Result, Task
from sequencerd.definitions.simulator import Simulator
from sequencerd.runners import Runner
from sequencerd.service.http_server import make_app, serving
from sequencerd.service.redaction import make_redaction
from sequencerd.settings import ConsoleSettings, Settings
from sequencerd.storage.connections import Shard
from tests.helpers.databases import connect_streams, shard, through_port
from tests.helpers.engines import Recorder, define, enroll, running_engine
from tests.helpers.shards import connections_to_shards
from tests.helpers.waiting import PATIENCE, eventually
from tests.service.test_http_server import free_port
from tests.sql.test_roles import make_logins

if TYPE_CHECKING:
    from playwright.async_api import Browser, Page

DAY = '{"amount": 1, "unit": "day"}'

# --- one event loop for all tests of the console, as they share a browser

FOLDER = f"{Path(__file__).parent}/"
fixture = partial(pytest_asyncio.fixture, loop_scope="session")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if str(item.path).startswith(FOLDER) and pytest_asyncio.is_async_test(item):
            item.add_marker(pytest.mark.asyncio(loop_scope="session"), append=False)


@fixture
async def connection(database: str) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(database)
    yield connection
    await connection.close()


@fixture
async def shards(shards_url: str) -> AsyncIterator[dict[str, asyncpg.Connection]]:
    async with connections_to_shards(shards_url) as made:
        yield made


@fixture
async def logins(connection: asyncpg.Connection, database: str) -> dict[str, str]:
    return await make_logins(connection, database)


# without what a browser does on its own
OPTIONS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--renderer-process-limit=1",
]
USUAL = {
    "viewport": {"width": 1280, "height": 900},
    "timezone_id": "Asia/Tokyo",
    "reduced_motion": "reduce",  # colours on their way to others are judged by no test
}
"""The options of a context."""


@fixture(scope="session")
async def browser() -> AsyncIterator[Browser]:
    """Chromium, as the shell without a window if there is one: pages cost it a third."""
    playwright = pytest.importorskip(
        "playwright.async_api", reason="playwright is missing: run bin/browser"
    )
    path = shutil.which("chromium-headless-shell") or shutil.which("chromium")
    if path is None:
        pytest.skip("there is no chromium: run bin/browser")
    async with playwright.async_playwright() as started:
        found = await started.chromium.launch(executable_path=path, args=OPTIONS)
        await found.new_context(**USUAL)
        yield found
        await found.close()


# --- the console


@pytest.fixture(autouse=True)
def counting_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the second count of a page come soon: some figures are not in the first."""
    monkeypatch.setattr(summary, "MIN_PAUSE", 0.05)


@pytest.fixture(autouse=True)
def changes_from_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the pages of changes have addresses that tests know."""
    monkeypatch.setattr(actions, "first_number", lambda: 1)


@asynccontextmanager
async def console(
    url: str,
    runners: Mapping[str, Runner] | None = None,
    *,
    through: str | None = None,
    own: Callable[[], Mapping[str, Runner]] | None = None,
    is_served: bool = False,
    others: Mapping[str, Any] = MappingProxyType({}),
    **settings: Any,
) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a console that an engine runs beside. The console's own connections can go
    `through` another URL. `own` makes the runners of its thread. `others` are the sections of
    settings beside the console's, whose secrets it may not show.

    It is called without HTTP, which takes a fifth of the time, unless it `is_served` for a browser
    or for a stream.
    """
    all_settings = Settings.model_validate({"console": settings, **others})
    found = all_settings.console
    assert found is not None
    runners = runners or {"Note": Recorder()}
    async with running_engine(url, runners, sweep=3600) as engine:
        app = make_app(
            list,
            list,
            CollectorRegistry(),
            make_console(
                ServedShard(
                    shard(through or url),
                    found,
                    lambda: Simulator(dict(engine.catalog.sequences), runners),
                    lambda: datetime.now(UTC),
                    own or (lambda: runners),
                    make_redaction(all_settings),
                ),
                structlog.get_logger(),
            ),
        )
        listen = f"127.0.0.1:{free_port()}" if is_served else "127.0.0.1:8080"
        transport = None if is_served else httpx.ASGITransport(app)
        running = serving(app, listen) if is_served else app.router.lifespan_context(app)
        client = httpx.AsyncClient(
            base_url=f"http://{listen}/console", timeout=PATIENCE, transport=transport
        )
        async with running, client:
            while is_served:
                try:
                    await client.get("/static/icon.svg")
                except httpx.TransportError:
                    await asyncio.sleep(0.02)
                else:
                    break
            yield client


def routes(method: str) -> list[Route]:
    """What the console serves, of the requests with one method."""
    app = make_console(
        ServedShard(
            Shard("postgresql:///"),
            ConsoleSettings(),
            lambda: Simulator({}, {}),
            lambda: datetime.now(UTC),
            dict,
            str,
        ),
        structlog.get_logger(),
    )
    found = [route for route in app.routes if isinstance(route, Route)]
    assert len(found) == len(app.routes)
    return [route for route in found if method in (route.methods or ())]


@asynccontextmanager
async def window(
    browser: Browser, client: httpx.AsyncClient, **options: Any
) -> AsyncIterator[Page]:
    """A window on a console. What the page complains of fails the test.

    Windows without options share a context, without cookies of a test before: pages of one context
    share a process, which has compiled their scripts.
    """
    context = await browser.new_context(**USUAL | options) if options else browser.contexts[0]
    page = await context.new_page()
    page.set_default_timeout(PATIENCE * 1000)
    base, goto = str(client.base_url).removesuffix("/console/"), page.goto
    vars(page)["goto"] = lambda path: goto(f"{base}{path}")  # a context has one base alone
    wrong: list[str] = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda said: wrong.append(said.text) if is_complaint(said.text) else None)
    try:
        yield page
    finally:
        await page.close()
        await (context.close() if options else context.clear_cookies())
    assert wrong == []


def is_complaint(text: str) -> bool:
    """Return whether a message is a complaint; some tests make the server unreachable."""
    return "Content Security Policy" in text or ("Error:" in text and "Failed to fetch" not in text)


class Line:
    """A way to the database that can be cut."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._writers: list[asyncio.StreamWriter] = []
        self.is_cut = False

    @asynccontextmanager
    async def open(self) -> AsyncIterator[str]:
        """The URL of this way."""
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        try:
            yield through_port(self._url, port)
        finally:
            self.cut()
            server.close()

    def cut(self) -> None:
        self.is_cut = True
        for writer in self._writers:
            writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.is_cut:
            writer.close()
            return
        above, below = await connect_streams(self._url)
        self._writers += [writer, below]

        async def copy(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
            with suppress(OSError):
                while data := await source.read(65536):
                    target.write(data)
            target.close()

        await asyncio.gather(copy(above, writer), copy(reader, below))


def token(page: httpx.Response) -> str:
    """What proves that a form comes from there."""
    found = re.search(r'name="token" value="(\w+)"', page.text)
    assert found, page.text
    return found[1]


async def counted(client: httpx.AsyncClient, table: str, **query: str) -> list[dict[str, Any]]:
    """Return the rows of a table that is made of counts, as soon as there are any."""

    async def rows() -> list[dict[str, Any]]:
        answer = await client.get(f"/tables/{table}.json", params=query)
        return answer.json()["rows"] if answer.status_code == 200 else []

    return await eventually(rows)


async def page_once(client: httpx.AsyncClient, path: str, status: int) -> httpx.Response:
    """The page, once it has this status."""

    async def page() -> httpx.Response | None:
        found = await client.get(path)
        return found if found.status_code == status else None

    return await eventually(page)


async def page_with(client: httpx.AsyncClient, path: str, words: str) -> httpx.Response:
    """The page, once it has these words."""

    async def page() -> httpx.Response | None:
        found = await client.get(path)
        return found if words in found.text else None

    return await eventually(page)


class Fixable(Recorder):
    """A runner that refuses until it is fixed."""

    def __init__(self) -> None:
        super().__init__(self._answer)
        self.is_fixed = False

    async def _answer(self, task: Task) -> Result:
        text = json.dumps(task.view["data"])
        return Answer() if self.is_fixed else Failed(f"refused: {text}", permanent=True)


async def waiting_and_failing(connection: asyncpg.Connection) -> tuple[int, int]:
    """Enroll a subject that waits and one that fails at its note, and return the ids."""
    await define(
        connection,
        "s",
        ("wait", "WaitForDuration", DAY, "note"),
        ("note", "Note", "{}", None),
    )
    waiting = await enroll(connection, "s", "ada", '{"email": "ada@example.com", "name": "Ada"}')
    failing = await connection.fetchval(
        "INSERT INTO sequencer.enrollments (sequence, subject, data, step)"
        " VALUES ('s', 'bob', '{\"email\": \"bob@example.com\"}', 'note') RETURNING id"
    )
    return waiting, failing


@fixture
async def writable(
    database: str, connection: asyncpg.Connection, browser: Browser
) -> AsyncIterator[Page]:
    """A window on a console that can make changes, with two enrollments."""
    await waiting_and_failing(connection)
    async with (
        console(database, {"Note": Fixable()}, write=True, is_served=True) as client,
        window(browser, client) as page,
    ):
        yield page


async def report(connection: asyncpg.Connection, *problems: dict[str, Any]) -> None:
    """Report problems as a daemon that is alive."""
    await connection.execute(
        "INSERT INTO sequencer.daemons (name, started_at, alive_until)"
        " VALUES ('d', now(), now() + interval '1 hour')"
    )
    await connection.execute(
        "INSERT INTO sequencer.problems SELECT (jsonb_populate_record(NULL::sequencer.problems,"
        " jsonb_build_object('daemon', 'd', 'since', now()) || problem)).*"
        " FROM jsonb_array_elements($1) AS problem",
        json.dumps(problems),
    )


FAILED = "SELECT count(*) = 1 FROM sequencer.enrollments WHERE status = 'failed'"
BEGUN = "SELECT count(*) = 1 FROM sequencer.enrollments WHERE entered_at < wake_at"
