"""Health checks and metrics, asked of the real daemon over HTTP."""

from __future__ import annotations

import asyncio
import json
import os
import re
import resource
import socket
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import asyncpg
import httpx
import pytest
import yaml
from prometheus_client import CollectorRegistry
from prometheus_client import parser as text_format
from prometheus_client.openmetrics import parser as openmetrics
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.routing import Route

from sequencerd.core.decision import Event
from sequencerd.core.task import Answer, Failed, Result
from sequencerd.daemon import raise_descriptor_limit
from sequencerd.service import http_server
from sequencerd.service.http_server import make_app, serving
from sequencerd.service.metrics import MAX_PLACES, Metrics
from tests.helpers.command_line import start_sequencerd
from tests.helpers.databases import execute, make_login
from tests.helpers.engines import ALL_ENDED, define, enroll, stuck_package, until
from tests.helpers.waiting import PATIENCE

DOCS = Path(__file__).parents[2] / "docs"
AT = datetime(2030, 1, 1, tzinfo=UTC)
MAIL = (
    '{"from": "a@example.com", "to": "{{data.nothing}}", "subject": "x", "text": "x",'
    ' "retry": {"attempts": 1}}'
)
DAY = '{"amount": 1, "unit": "day"}'


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
    return port


@asynccontextmanager
async def daemon(
    url: str, folder: Path | None = None, **settings: str
) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the listener of a daemon that runs in a folder."""
    port = free_port()
    variables = {"SEQUENCERD_DATABASE": url, "SEQUENCERD_HTTP_LISTEN": f"127.0.0.1:{port}"}
    process = await start_sequencerd("run", cwd=folder, env={**os.environ, **variables, **settings})
    try:
        async with httpx.AsyncClient(
            base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE
        ) as client:
            yield client
    finally:
        process.terminate()
        assert await process.wait() == 0


async def answers(
    client: httpx.AsyncClient, path: str, wanted: Callable[[httpx.Response], bool]
) -> httpx.Response:
    """Asks until the answer is the wanted one."""
    response = None
    async with asyncio.timeout(PATIENCE):
        while True:
            try:
                response = await client.get(path)
            except httpx.TransportError:
                pass  # it has only just begun
            else:
                if wanted(response):
                    return response
            await asyncio.sleep(0.1)


def is_ok(response: httpx.Response) -> bool:
    return response.status_code == 200


def is_down(response: httpx.Response) -> bool:
    return response.status_code == 503


def samples(text: str) -> dict[tuple[str, str], float]:
    """The values of metrics by their names and labels, in the order of the labels' names."""
    return {
        (sample.name, " ".join(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_format.text_string_to_metric_families(text)
        for sample in family.samples
    }


async def test_a_ready_daemon_serves_its_metrics(
    database: str, connection: asyncpg.Connection
) -> None:
    await define(
        connection,
        "s",
        ("a", "GoTo", "{}", "mail"),
        ("mail", "Email", MAIL, None),
    )
    await define(connection, "held", ("pause", "WaitForDuration", DAY, None))
    await connection.execute("UPDATE sequencer.sequences SET status = 'paused' WHERE name = 'held'")
    await enroll(connection, "held", "u")
    await connection.execute(
        "INSERT INTO sequencer.enrollments (sequence, subject)"
        " SELECT 's', 'u' || n FROM generate_series(1, 3) AS n"
    )
    async with daemon(
        database, SEQUENCERD_SMTP_URL="smtp://127.0.0.1:9", SEQUENCERD_ENGINE_SWEEP="0.5"
    ) as client:
        assert (await answers(client, "/readyz", is_ok)).json() == {"status": "ok", "reasons": []}
        assert (await client.get("/healthz")).json() == {"status": "ok", "reasons": []}
        await until(
            connection, "SELECT count(*) = 3 FROM sequencer.enrollments WHERE failure = 'bad_data'"
        )
        response = await answers(
            client, "/metrics", lambda response: "sequencerd_due{" not in response.text
        )
        assert response.headers["content-type"].startswith("text/plain")
        found = samples(response.text)
        assert found["sequencerd_claims_total", "s a"] == 3
        assert found["sequencerd_transitions_total", "enrolled s a"] == 3
        assert found["sequencerd_transitions_total", "next s a"] == 3
        assert found["sequencerd_failures_total", "bad_data s mail"] == 3
        assert found["sequencerd_effects_total", "refused Email"] == 3
        assert found["sequencerd_effect_latency_seconds_count", "Email"] == 3
        assert found["sequencerd_in_flight", "Email"] == 0
        assert found["sequencerd_lateness_seconds_count", ""] == 3
        assert found["sequencerd_lateness_seconds_bucket", "+Inf"] == 3
        assert found["sequencerd_batch_size_sum", ""] == 6
        assert found["sequencerd_ready", ""] == 1
        assert found["sequencerd_listener_reconnects_total", ""] == 0
        assert abs(found["sequencerd_clock_offset_seconds", ""]) < 60
        assert "held" not in response.text  # it is paused, so none there is late

        accepts = {"Accept": "application/openmetrics-text; version=1.0.0"}
        text = (await client.get("/metrics", headers=accepts)).text
        assert list(openmetrics.text_string_to_metric_families(text))
        assert (await client.get("/nothing")).status_code == 404


async def test_due_enrollments_are_counted_by_step(
    database: str, connection: asyncpg.Connection, tmp_path: Path
) -> None:
    """A gateway that is not there keeps them waiting: one is tried, the others have no room."""
    await define(connection, "s", ("x", "Slow", "{}", None))
    await connection.execute(
        "INSERT INTO sequencer.enrollments (sequence, subject, wake_at)"
        " SELECT 's', 'u' || n, now() - n * interval '1 minute' FROM generate_series(1, 300) AS n"
    )

    async def never(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await over.wait()
        writer.close()

    over = asyncio.Event()
    server = await asyncio.start_server(never, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    config = tmp_path / "sequencerd.toml"
    config.write_text(
        f'[runners.Slow]\nurl = "http://127.0.0.1:{port}/"\nbatch_size = 1\nconcurrency = 2\n'
        "[engine]\nsweep = 0.5\nstop_timeout = 0\n"
    )
    try:
        async with daemon(database, SEQUENCERD_CONFIG=str(config)) as client:
            response = await answers(
                client, "/metrics", lambda response: 'step="x"} 296.0' in response.text
            )
            found = samples(response.text)
            assert found["sequencerd_due", "s x"] == 296
            assert 290 <= found["sequencerd_overdue", "s x"] <= 296
            assert found["sequencerd_in_flight", "Slow"] == 4
            assert found["sequencerd_oldest_overdue_seconds", ""] >= 296 * 60
    finally:
        over.set()
        server.close()


async def test_a_daemon_without_its_database_is_alive_and_not_ready(
    server: str, database: str, connection: asyncpg.Connection
) -> None:
    async with daemon(database) as client:
        await answers(client, "/readyz", is_ok)
        name = await connection.fetchval("SELECT current_database()")
        await execute(server, f"ALTER DATABASE {name} WITH ALLOW_CONNECTIONS false")
        await connection.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE datname = $1 AND pid <> pg_backend_pid()",
            name,
        )
        down = await answers(client, "/readyz", is_down)
        assert down.json()["reasons"] == ["the database cannot be reached: LISTEN is not on"]
        assert is_ok(await client.get("/healthz"))
        await execute(server, f"ALTER DATABASE {name} WITH ALLOW_CONNECTIONS true")
        await answers(client, "/readyz", is_ok)
        found = samples((await client.get("/metrics")).text)
        assert found["sequencerd_listener_reconnects_total", ""] >= 1


async def test_a_daemon_that_may_write_no_heartbeat_is_not_ready(
    database: str, connection: asyncpg.Connection, capfd: pytest.CaptureFixture[str]
) -> None:
    """As its user is that of an application."""
    login = await make_login(connection, database, "login_enroller", "enroller")
    async with daemon(login, SEQUENCERD_ENGINE_LEASE="1") as client:
        down = await answers(client, "/readyz", lambda found: "no heartbeat" in found.text)
        assert is_down(down)
        assert is_ok(await client.get("/healthz"))
    log = capfd.readouterr().err
    assert "GRANT sequencer_daemon TO login_enroller" in log
    login = await make_login(connection, database, "login_daemon", "daemon")
    async with daemon(login, SEQUENCERD_ENGINE_LEASE="1") as client:
        await answers(client, "/readyz", is_ok)
    assert "GRANT" not in capfd.readouterr().err


async def test_a_loop_that_is_blocked_is_reported(
    database: str, connection: asyncpg.Connection, tmp_path: Path
) -> None:
    site = stuck_package(tmp_path)
    await define(connection, "s", ("x", "Stuck", json.dumps({"go": str(tmp_path / "go")}), None))
    async with daemon(database, site) as client:
        await answers(client, "/readyz", is_ok)
        await enroll(connection, "s", "u")
        down = await answers(client, "/healthz", is_down)
        assert "the event loop has been blocked for" in down.json()["reasons"][0]
        assert is_down(await client.get("/readyz"))
        (tmp_path / "go").touch()
        await answers(client, "/healthz", is_ok)
        await until(connection, ALL_ENDED)


async def test_a_daemon_without_its_address_continues_and_logs_it_once(database: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        process = await start_sequencerd(
            "run",
            env={**os.environ, "SEQUENCERD_DATABASE": database, "SEQUENCERD_HTTP_LISTEN": address},
            stderr=asyncio.subprocess.PIPE,
        )
        assert process.stderr is not None
        lines: list[str] = []
        async with asyncio.timeout(PATIENCE):
            while not lines or '"ready"' not in lines[-1]:
                line = await process.stderr.readline()
                assert line, lines
                lines.append(line.decode())
            process.terminate()
            _, rest = await process.communicate()
    assert process.returncode == 0
    (taken_line,) = [line for line in (*lines, rest.decode()) if "address in use" in line]
    assert address in taken_line


async def test_an_application_that_cannot_start_is_an_error_of_the_start() -> None:
    console = Starlette(lifespan=_that_fails)
    app = make_app(list, list, CollectorRegistry(), console)
    port, begun = free_port(), False
    with pytest.raises(ValueError, match="a broken template"):
        async with serving(app, f"127.0.0.1:{port}"):
            begun = True
    assert not begun
    socket.create_server(("127.0.0.1", port)).close()


@asynccontextmanager
async def _that_fails(app: Starlette) -> AsyncIterator[None]:
    raise ValueError("a broken template")
    yield


def test_labels_are_bounded() -> None:
    metrics = Metrics()
    for n in range(MAX_PLACES + 5):
        event = Event(AT, f"s{n}", "x", 1, "next")
        metrics.written(1, {event: [1]}, [(f"s{n}", "x", "error")])
        metrics.swept(lambda: AT, 1, AT, [(f"s{n}", "x", 2, 1)])
    metrics.swept(lambda: AT, 2, AT, [("s0", "x", 2, 1), ("t1", "x", 2, 1), ("t2", "x", 3, 2)])
    value = metrics.registry.get_sample_value
    other = {"sequence": "other", "step": "other"}
    assert value("sequencerd_transitions_total", {**other, "action": "next"}) == 5
    assert value("sequencerd_failures_total", {**other, "failure": "error"}) == 5
    assert value("sequencerd_due", other) == 5
    assert value("sequencerd_overdue", other) == 3
    assert value("sequencerd_due", {"sequence": "s0", "step": "x"}) == 2
    assert metrics.overdue == 4


def test_lateness_is_exact() -> None:
    metrics = Metrics()
    late = [7200.0, 70.0, 10.0, 0.3, 0.005, 0.0]
    due = [AT - timedelta(seconds=seconds) for seconds in late]
    metrics.claimed(("s", "x"), due, AT)
    metrics.claimed(("s", "x"), [], AT)
    value = metrics.registry.get_sample_value

    def bucket(bound: str) -> float | None:
        return value("sequencerd_lateness_seconds_bucket", {"le": bound})

    assert [bucket(b) for b in ("0.005", "0.25", "0.5", "10.0", "60.0", "600.0", "3600.0")] == [
        2,
        2,
        3,
        4,
        4,
        5,
        5,
    ]
    assert bucket("+Inf") == value("sequencerd_lateness_seconds_count") == 6
    assert value("sequencerd_lateness_seconds_sum") == pytest.approx(sum(late))


def test_outcomes_are_counted_apart() -> None:
    metrics = Metrics()
    metrics.begun("Email", 5)
    results: list[Result] = [
        Answer(),
        Failed("550", permanent=True),
        Failed("x"),
        Failed("x", fault="server"),
    ]
    metrics.ended("Email", results, 0.01)
    metrics.ended("Email", [Failed("x", fault="server")], None)
    value = metrics.registry.get_sample_value
    for outcome, times in {"next": 1, "refused": 1, "failed": 1, "postponed": 2}.items():
        labels = {"type": "Email", "outcome": outcome}
        assert value("sequencerd_effects_total", labels) == times
    assert value("sequencerd_in_flight", {"type": "Email"}) == 0
    assert value("sequencerd_effect_latency_seconds_count", {"type": "Email"}) == 1


NAME = re.compile(r"\bsequencerd_[a-z_]+")


def exported() -> set[str]:
    """The names of all metrics, as Prometheus has them."""
    names = set()
    for family in Metrics().registry.collect():
        names |= {
            "counter": {f"{family.name}_total"},
            "histogram": {f"{family.name}_{part}" for part in ("bucket", "sum", "count")},
        }.get(family.type, {family.name})
    return {name for name in names if name.startswith("sequencerd_")}


def test_the_dashboard_shows_metrics_that_exist() -> None:
    board = json.loads((DOCS / "grafana.json").read_text())
    queries = [target["expr"] for panel in board["panels"] for target in panel.get("targets", ())]
    shown = {name for query in queries for name in NAME.findall(query)}
    assert shown <= exported(), shown - exported()
    # and leaves none out but the one that says how many were in a transaction on the whole
    left_out = exported() - shown
    assert {name for name in left_out if not name.endswith(("_sum", "_count"))} == set()
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])


def test_the_dashboard_distinguishes_shards() -> None:
    """Figures of a whole database are those of one shard: the greatest of its daemons counts."""
    board = json.loads((DOCS / "grafana.json").read_text())
    assert "shard" in {variable["name"] for variable in board["templating"]["list"]}
    queries = [target["expr"] for panel in board["panels"] for target in panel.get("targets", ())]
    for query in queries:
        if "sequencerd_" in query:
            assert query.count('shard=~"$shard"') == len(NAME.findall(query)), query
        for labels in re.findall(r"max by \((.*?)\)", query):
            assert "shard" in labels.split(", "), query


def test_the_alerts_distinguish_shards() -> None:
    (group,) = yaml.safe_load((DOCS / "alerts.yaml").read_text())["groups"]
    for rule in group["rules"]:
        for labels in re.findall(r" by \((.*?)\)", rule["expr"]):
            assert {"job", "shard"} <= set(labels.split(", ")), rule["alert"]
        if rule["alert"] != "SequencerdDown":
            assert "$labels.shard" in rule["annotations"]["summary"], rule["alert"]


def test_the_alerts_watch_metrics_that_exist() -> None:
    (group,) = yaml.safe_load((DOCS / "alerts.yaml").read_text())["groups"]
    for rule in group["rules"]:
        used = set(NAME.findall(rule["expr"]))
        assert used <= exported(), used - exported()
        assert used or "up" in rule["expr"]
        assert rule["annotations"]["summary"]
        assert rule["annotations"]["description"]


def test_increases_include_the_first_event_of_a_series() -> None:
    """A series with labels appears with its first event, in which increase() sees nothing."""
    (group,) = yaml.safe_load((DOCS / "alerts.yaml").read_text())["groups"]
    board = json.loads((DOCS / "grafana.json").read_text())
    queries = [target["expr"] for panel in board["panels"] for target in panel.get("targets", ())]
    queries += [rule["expr"] for rule in group["rules"]]
    present = {sample.name for family in Metrics().registry.collect() for sample in family.samples}
    increases = {
        (query, *found)
        for query in queries
        for found in re.findall(r"increase\((.+?)\[(.+?)\]", query)
    }
    assert increases
    for query, series, period in increases:
        if series.partition("{")[0] not in present:
            counted = f"{series} unless {series} offset {period} or increase({series}[{period}])"
            assert counted in query


def test_the_page_names_every_metric() -> None:
    page = set(NAME.findall((DOCS / "service.md").read_text()))
    families = {re.sub("_(bucket|sum|count)$", "", name) for name in exported()}
    assert families <= page, families - page


# --- connections


async def endless(_: Request) -> StreamingResponse:
    async def never() -> AsyncIterator[bytes]:
        yield b"begun"
        await asyncio.Event().wait()

    return StreamingResponse(never())


@asynccontextmanager
async def listening(patience: float = 0.3) -> AsyncIterator[int]:
    """A listener in this process, and its port."""
    port = free_port()
    app = make_app(list, list, CollectorRegistry(), public=[Route("/endless", endless)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(http_server, "REQUEST_TIMEOUT", patience)
        async with serving(app, f"127.0.0.1:{port}"):
            async with httpx.AsyncClient(transport=httpx.AsyncHTTPTransport(retries=50)) as client:
                await client.get(f"http://127.0.0.1:{port}/healthz")
            yield port


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"GET /healthz HT",
        b"GET /healthz HTTP/1.1\r\nHost: x\r\n",
        b"POST /healthz HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\nabc",
        b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\nGET /he",
    ],
)
async def test_a_client_that_keeps_us_waiting_is_closed(sent: bytes) -> None:
    async with listening() as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(sent)
        with suppress(ConnectionError):
            async with asyncio.timeout(PATIENCE):
                await reader.read()
        writer.close()


async def test_headers_that_come_byte_by_byte_are_not_waited_for() -> None:
    async with listening() as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        ended = asyncio.create_task(reader.read())
        with suppress(ConnectionError):
            async with asyncio.timeout(PATIENCE):
                while not ended.done():
                    writer.write(b"x")
                    await writer.drain()
                    await asyncio.sleep(0.01)
        await asyncio.gather(ended, return_exceptions=True)
        writer.close()


def descriptors() -> int:
    """How many this process has open."""
    return len(list(Path("/proc/self/fd").iterdir()))


async def test_many_idle_connections_keep_no_client_out() -> None:
    async with listening(patience=3600) as port:
        idle: list[asyncio.StreamWriter] = []
        before = descriptors()
        for _ in range(4):
            most = range(http_server.MAX_CONNECTIONS)
            many = (asyncio.open_connection("127.0.0.1", port) for _ in most)
            idle += [writer for _, writer in await asyncio.gather(*many)]
        async with httpx.AsyncClient() as client:
            for _ in range(3):
                answer = await client.get(f"http://127.0.0.1:{port}/healthz")
                assert answer.status_code == 200
        ours = descriptors() - before - len(idle)
        assert ours <= http_server.MAX_CONNECTIONS + 10
        for writer in idle:
            writer.transport.abort()


async def test_streams_keep_no_client_out() -> None:
    async with listening(patience=3600) as port, httpx.AsyncClient() as client:
        streams = []
        for _ in range(http_server.MAX_CONNECTIONS + 2):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"GET /endless HTTP/1.1\r\nHost: x\r\n\r\n")
            await reader.readuntil(b"begun")
            streams.append(writer)
        answer = await client.get(f"http://127.0.0.1:{port}/healthz")
        assert answer.status_code == 200
        for writer in streams:
            writer.transport.abort()


@pytest.mark.parametrize("first", [0, 1])
async def test_a_request_with_two_lengths_is_refused(first: int) -> None:
    lengths = ["Content-Length: 4\r\n", "Transfer-Encoding: chunked\r\n"]
    head = f"POST /healthz HTTP/1.1\r\nHost: x\r\n{lengths[first]}{lengths[1 - first]}\r\n0\r\n\r\n"
    async with listening(patience=PATIENCE) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(f"{head}GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        answer = await reader.read()
        assert answer.startswith(b"HTTP/1.1 400")
        assert answer.count(b"HTTP/1.1") == 1
        writer.close()


async def test_the_daemon_works_beside_idle_connections(
    database: str, connection: asyncpg.Connection
) -> None:
    """With few descriptors, as many as it had by default would take them all."""
    await define(connection, "s", ("wait", "WaitForDuration", DAY, None))
    port = free_port()
    process = await asyncio.create_subprocess_exec(
        "sh",
        "-c",
        f"ulimit -n 256; exec {sys.executable} -m sequencerd run",
        env={
            **os.environ,
            "SEQUENCERD_DATABASE": database,
            "SEQUENCERD_HTTP_LISTEN": f"127.0.0.1:{port}",
        },
        stderr=asyncio.subprocess.DEVNULL,
    )
    writers: list[asyncio.StreamWriter] = []
    try:
        while True:
            with suppress(ConnectionError):
                writers.append((await asyncio.open_connection("127.0.0.1", port))[1])
                break
            await asyncio.sleep(0.05)
        for _ in range(400):
            with suppress(ConnectionError):
                writers.append((await asyncio.open_connection("127.0.0.1", port))[1])
        await enroll(connection, "s", "ada")
        await until(
            connection, "SELECT count(*) = 1 FROM sequencer.events WHERE action = 'enrolled'"
        )
        async with httpx.AsyncClient() as client:
            assert is_ok(await client.get(f"http://127.0.0.1:{port}/healthz"))
        process.terminate()
        assert await process.wait() == 0
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        for writer in writers:
            writer.transport.abort()


def test_the_limit_of_descriptors_is_raised() -> None:
    _, hard = before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        raise_descriptor_limit()
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > 256
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
