"""Several shards: one daemon, one command for all of them, and one that is away."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import asyncpg
import httpx
import pytest
import structlog
from pydantic import SecretStr

from sequencerd import daemon as composition
from sequencerd.core.routing import shard_of
from sequencerd.errors import SettingsError
from sequencerd.service.health import MAX_BLOCKED, Health
from sequencerd.service.metrics import Metrics
from sequencerd.settings import Settings, ShardSettings
from sequencerd.settings_file import load
from sequencerd.storage import connections
from sequencerd.storage.connections import Shard
from sequencerd.storage.embedded import PostgresPrograms
from tests.helpers.clusters import Cluster, stoppable
from tests.helpers.command_line import Command, start_sequencerd
from tests.helpers.databases import make_login
from tests.helpers.engines import ALL_ENDED, define, enroll, until
from tests.helpers.waiting import PATIENCE, eventually
from tests.service.test_http_server import free_port

SEQUENCE = """
name: s
steps:
  - {name: wait, type: WaitForDuration, config: {amount: 3, unit: days}}
  - {name: note, type: GoTo}
"""


AWAY = "the shard is unavailable, trying again"


def write_settings(command: Command, url: str, *names: str) -> None:
    """Write the settings of shards; "x=a" is the shard x in the schema of a."""
    pairs = [name.split("=") for name in names]
    (command.folder / "sequencerd.toml").write_text(
        "".join(
            f'[shards.{pair[0]}]\nurl = "{url}"\nschema = "shard-{pair[-1]}"\n' for pair in pairs
        )
    )


@pytest.fixture
def configure(sequencerd: Command, tmp_path: Path, database: str) -> Callable[..., None]:
    """Writes the settings of shards in the test's database, which has no schema of theirs."""
    sequencerd.without_database()
    sequencerd.variables["SEQUENCERD_CONFIG"] = str(tmp_path / "sequencerd.toml")
    return partial(write_settings, sequencerd, database)


@pytest.fixture
async def new_shards(
    database: str, configure: Callable[..., None], tmp_path: Path
) -> AsyncIterator[dict[str, asyncpg.Connection]]:
    """Two shards in two schemas of the test's database, without their tables yet."""
    configure("a", "b")
    (tmp_path / "s.yaml").write_text(SEQUENCE)
    opened = {
        name: await connections.connect(Shard(database, f"shard-{name}", name)) for name in "ab"
    }
    yield opened
    for connection in opened.values():
        await connection.close()


@asynccontextmanager
async def running(command: Command, *arguments: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """A daemon that is stopped in good order at the end."""
    process = await start_sequencerd(
        "run",
        *arguments,
        env={**command.variables, "SEQUENCERD_LOG_FORMAT": "json"},
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stderr is not None
    try:
        async with asyncio.timeout(PATIENCE):
            yield process
    finally:
        process.send_signal(signal.SIGTERM)
        rest = (await process.stderr.read()).decode()
        assert await process.wait() == 0, rest


async def logged(daemon: asyncio.subprocess.Process, event: str, shard: str) -> dict[str, str]:
    """The next line of a shard with an event."""
    assert daemon.stderr is not None
    while line := await daemon.stderr.readline():
        found: dict[str, str] = json.loads(line)
        if found["event"] == event and found.get("shard") == shard:
            return found
    raise AssertionError(f"no line {event!r} of {shard}")


async def test_one_daemon_serves_all_shards_and_a_missing_one_disturbs_no_other(
    new_shards: dict[str, asyncpg.Connection], sequencerd: Command, tmp_path: Path, database: str
) -> None:
    a, b = new_shards["a"], new_shards["b"]
    listen = f"127.0.0.1:{free_port()}"
    sequencerd.variables["SEQUENCERD_HTTP_LISTEN"] = listen
    assert "a: applied 0001" in sequencerd("migrate", "--shard", "a")
    async with running(sequencerd) as daemon, httpx.AsyncClient(base_url=f"http://{listen}") as web:
        away = await logged(daemon, AWAY, "b")
        assert "no schema shard-b yet" in away["error"]
        await logged(daemon, "ready", "a")
        await define_and_enroll(a)
        await until(a, ALL_ENDED)
        ready = await web.get("/readyz")
        assert ready.status_code == 503
        assert [reason[:2] for reason in ready.json()["reasons"]] == ["b:"]
        assert (await web.get("/healthz")).status_code == 200

        assert sequencerd("migrate").startswith("a: the schema is up to date\nb: applied 0001")
        await logged(daemon, "ready", "b")
        await define_and_enroll(b)
        await until(b, ALL_ENDED)
        await until_ready(web)
        metrics = (await web.get("/metrics")).text
        for name in new_shards:
            assert f'sequencerd_ready{{shard="{name}"}} 1.0' in metrics
        assert metrics.count("# TYPE sequencerd_ready gauge") == 1
        assert metrics.count("\nprocess_start_time_seconds ") == 1


async def test_a_shard_that_refuses_the_login_disturbs_no_other(
    new_shards: dict[str, asyncpg.Connection], sequencerd: Command, tmp_path: Path, database: str
) -> None:
    sequencerd("migrate")
    stranger = await make_login(new_shards["a"], database, "stranger")
    file = tmp_path / "sequencerd.toml"
    a, b = file.read_text().split("[shards.b]")
    file.write_text(f"{a}[shards.b]{b.replace(database, stranger)}")
    async with running(sequencerd) as daemon:
        assert "permission denied" in (await logged(daemon, AWAY, "b"))["error"]
        await define_and_enroll(new_shards["a"])
        await until(new_shards["a"], ALL_ENDED)


async def define_and_enroll(connection: asyncpg.Connection) -> None:
    await define(connection, "s", ("note", "GoTo", "{}", None))
    await enroll(connection, "s", "ada")


@pytest.fixture
def servers(
    sequencerd: Command, configure: Callable[..., None], tmp_path: Path, database: str
) -> Iterator[Cluster]:
    """The shard a in the test's database, and b on a server that can stop, which is returned."""
    with stoppable(PostgresPrograms.find(), synchronous_commit="on") as made:
        configure("a", "b")
        file = tmp_path / "sequencerd.toml"
        before, b = file.read_text().split("[shards.b]")
        file.write_text(f"{before}[shards.b]{b.replace(database, made.url)}")
        sequencerd("migrate")
        yield made


async def test_a_server_that_is_away_comes_back_and_disturbs_no_other(
    servers: Cluster, sequencerd: Command, database: str, tmp_path: Path
) -> None:
    """It is dead at the start, has another number at first, is silent, and dies again."""
    listen = f"127.0.0.1:{free_port()}"
    sequencerd.variables["SEQUENCERD_HTTP_LISTEN"] = listen
    sequencerd.variables["NOTIFY_SOCKET"] = str(tmp_path / "notify")
    async with (
        manager(tmp_path / "notify") as told,
        connected(database, "shard-a") as a,
        httpx.AsyncClient(base_url=f"http://{listen}") as web,
    ):
        await define_and_enroll(a)
        async with connected(servers.url, "shard-b") as b:
            await define_and_enroll(b)
            await b.execute("UPDATE sequencer.shard SET shards = 3")
        servers.stop()
        async with running(sequencerd) as daemon:
            error = (await logged(daemon, AWAY, "b"))["error"]
            assert "cannot connect" in error
            await until(a, ALL_ENDED)
            servers.start()
            while "its schema says number 1 of 3" not in error:
                error = (await logged(daemon, AWAY, "b"))["error"]
            metrics = (await web.get("/metrics")).text
            assert 'sequencerd_ready{shard="a"} 1.0' in metrics
            assert 'sequencerd_ready{shard="b"} 0.0' in metrics
            async with connected(servers.url, "shard-b") as b:
                await b.execute("UPDATE sequencer.shard SET shards = 2")
                await logged(daemon, "ready", "b")
                await until(b, ALL_ENDED)
            with servers.silent():
                await until_away(web, "b")
                await enroll_and_wait(a, "silent")
                assert (await web.get("/healthz")).status_code == 200
                await until_told(told, "WATCHDOG=1")
            servers.stop()
            await enroll_and_wait(a, "dead")
            servers.start()
            await logged(daemon, "ready", "b")
            async with connected(servers.url, "shard-b") as b:
                await enroll_and_wait(b, "again")
            metrics = (await web.get("/metrics")).text
            assert 'sequencerd_listener_reconnects_total{shard="a"} 0.0' in metrics
            await until_ready(web)


@asynccontextmanager
async def connected(url: str, schema: str) -> AsyncIterator[asyncpg.Connection]:
    connection = await connections.connect(Shard(url, schema))
    yield connection
    await connection.close()


async def enroll_and_wait(connection: asyncpg.Connection, subject: str) -> None:
    await enroll(connection, "s", subject)
    await until(connection, ALL_ENDED)


async def until_away(web: httpx.AsyncClient, shard: str) -> None:
    async def others() -> list[str]:
        """Return the shards of which it is said that they are not ready."""
        found = (await web.get("/readyz")).json()["reasons"]
        return [reason.partition(":")[0] for reason in found]

    while await others() != [shard]:  # noqa: ASYNC110 - it sets no event
        await asyncio.sleep(0.05)


@asynccontextmanager
async def manager(path: Path) -> AsyncIterator[list[str]]:
    """What the daemon tells systemd, which reads all of it: or else it would block."""
    told: list[str] = []
    loop = asyncio.get_running_loop()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as end:
        end.bind(str(path))
        loop.add_reader(end, lambda: told.append(end.recv(1000).decode()))
        try:
            yield told
        finally:
            loop.remove_reader(end)


async def until_told(told: list[str], start: str) -> None:
    """Wait until systemd is notified of this, from now on."""
    before = len(told)
    await eventually(lambda: any(message.startswith(start) for message in told[before:]))


def test_a_stuck_engine_stops_the_watchdog_and_a_missing_shard_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fed: list[str] = []
    monkeypatch.setattr(composition, "notify", fed.append)
    monkeypatch.setattr("sequencerd.service.health.notify", lambda *_: None)
    names = ("a", "b", "away")
    process = composition._Process(
        [Shard("", name=name) for name in names],
        Settings(shards={name: ShardSettings(url=SecretStr(name)) for name in names}),
        structlog.get_logger(),
        Settings,
        asyncio.Event(),
    )
    a, b = (
        Health(Metrics(of_process=False), process.status, process.feed, sweep=60, lease=30)
        for _ in range(2)
    )
    for served, health in zip(process._shards, (a, b), strict=False):
        served.daemon = cast("composition._Daemon", SimpleNamespace(health=health, status=str))
    a.turned()
    assert fed == ["WATCHDOG=1"]
    now = time.monotonic() + MAX_BLOCKED
    monkeypatch.setattr(time, "monotonic", lambda: now)
    a.turned()
    assert fed == ["WATCHDOG=1"]
    b.turned()
    assert fed == ["WATCHDOG=1"] * 2


async def test_a_hangup_reloads_the_settings_of_all_and_changes_no_shards(
    shards: dict[str, asyncpg.Connection], sharded: Command, tmp_path: Path
) -> None:
    file = tmp_path / "sequencerd.toml"
    text = file.read_text()
    runner = '[runners.Score]\nurl = "http://127.0.0.1:9/"\n'
    for connection in shards.values():
        await define(connection, "s", ("score", "Score", "{}", None))
        await enroll(connection, "s", "ada")
    async with running(sharded) as daemon:
        for connection in shards.values():
            await until(connection, FAILED)
        file.write_text(runner + text)
        daemon.send_signal(signal.SIGHUP)
        for connection in shards.values():
            await until(connection, ACTIVE)
        for names, settings in (
            ("a, b, c", f'{text}[shards.c]\nurl = "postgresql://db3/app"\n'),
            ("a", text.partition("[shards.b]")[0]),
            ("a, x", text.replace("[shards.b]", "[shards.x]")),
        ):
            file.write_text(settings)
            daemon.send_signal(signal.SIGHUP)
            error = (await logged(daemon, "invalid settings, the old ones remain", "b"))["error"]
            assert error == f"changed shards (now {names}) require a restart"


FAILED = "SELECT failure = 'invalid_step' FROM sequencer.enrollments"
ACTIVE = "SELECT status = 'active' FROM sequencer.enrollments"


async def until_ready(web: httpx.AsyncClient) -> None:
    while (await web.get("/readyz")).status_code != 200:  # noqa: ASYNC110 - it sets no event
        await asyncio.sleep(0.05)


@pytest.mark.parametrize("by", ["argument", "instance"])
async def test_a_daemon_serves_the_shard_of_its_option(
    shards: dict[str, asyncpg.Connection], sharded: Command, by: str
) -> None:
    arguments = ("--shard", "b") if by == "argument" else ()
    if by == "instance":
        sharded.variables["SEQUENCERD_INSTANCE"] = "b"
    async with running(sharded, *arguments) as daemon:
        await logged(daemon, "ready", "b")
        await define_and_enroll(shards["a"])
        await define_and_enroll(shards["b"])
        await until(shards["b"], ALL_ENDED)
        assert not await shards["a"].fetchval(ALL_ENDED)
        assert await shards["a"].fetchval("SELECT count(*) FROM sequencer.daemons") == 0


def test_invalid_settings_of_shards(tmp_path: Path) -> None:
    file = tmp_path / "sequencerd.toml"
    for text, message in (
        ('[shards.a]\nschema = "x"', "shards.a.url"),
        ('[shards.a]\nurl = "x"\nschma = "x"', "did you mean 'schema'"),
        ('[shards."a/b"]\nurl = "x"', "shards.a/b"),
        ('[shards]\na = {url = "x"}\nb = {url = "x"}', "a and b are the same schema"),
        ('[database]\nurl = "y"\n[shards.a]\nurl = "x"', "not both"),
    ):
        file.write_text(text)
        with pytest.raises(SettingsError, match=message):
            load({}, file)
    file.write_text('[shards]\na = {url = {file = "a"}}\nb = {url = {file = "b"}}')
    assert set(load({}, file, secrets=()).shards) == {"a", "b"}
    for url, message in (
        ("mysql://db/app", "begins with mysql://"),
        ("postgresql://db:x/app", "has a port that is not a number"),
    ):
        file.write_text(f'[shards]\na = {{url = "postgresql://db/app"}}\nb = {{url = "{url}"}}')
        with pytest.raises(SettingsError, match=f"^shard b: the database's URL {message}"):
            composition.check_settings(load({}, file))


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (("b", "a"), "says number 1 of 2 shards, the settings say number 0 of 2 shards"),
        (("a", "b", "c"), "says number 0 of 2 shards, the settings say number 0 of 3 shards"),
        (("a",), "says number 0 of 2 shards, the settings say number 0 of 1 shards"),
        (("a=b", "b=a"), "says number 1 of 2 shards, the settings say number 0 of 2 shards"),
    ],
    ids=["reordered", "grown", "shrunk", "exchanged"],
)
async def test_another_number_or_order_of_shards_is_refused(
    shards: dict[str, asyncpg.Connection],
    sharded: Command,
    shards_url: str,
    names: tuple[str, ...],
    said: str,
) -> None:
    write_settings(sharded, shards_url, *names)
    for command in ("migrate", "fdw", f"status --shard {names[0][0]}"):
        sharded(*command.split(), code=2)
        assert f"shard {names[0][0]}: its schema {said}" in sharded.errors, command
    sharded("enroll", "s", "ada", code=2)
    assert "restore it, leave none out, and let no two lead to the same" in sharded.errors
    assert f"shard: its schema {said}" in sharded("doctor", "--shard", names[0][0], code=1)
    assert not await shards["a"].fetchval("SELECT to_regnamespace('shard-c') IS NOT NULL")


def test_a_daemon_ends_with_such_settings(sharded: Command, shards_url: str) -> None:
    write_settings(sharded, shards_url, "b", "a")
    sharded.program("run", code=2)
    assert "of 2 shards, the settings say number" in sharded.errors
    assert "Traceback" not in sharded.errors


async def test_a_shard_may_have_another_name(
    shards: dict[str, asyncpg.Connection], sharded: Command, shards_url: str
) -> None:
    write_settings(sharded, shards_url, "x=a", "b")
    assert sharded("migrate").startswith("x: the schema is up to date\n")
    assert "number 0 of 2 shards, as in the settings" in sharded("doctor", "--shard", "x")
    read = "SELECT number, shards FROM sequencer.shard"
    assert [tuple(await one.fetchrow(read)) for one in shards.values()] == [(0, 2), (1, 2)]


async def test_a_new_shard_gets_its_number_only_when_all_answer(
    new_shards: dict[str, asyncpg.Connection], sequencerd: Command, tmp_path: Path
) -> None:
    """Otherwise it would be unknown whether the others are of as many."""
    with (tmp_path / "sequencerd.toml").open("a") as file:
        file.write('[shards.c]\nurl = "postgresql://127.0.0.1:1/nowhere"\n')
    sequencerd("migrate", "--shard", "a", code=1)
    assert (
        "it gets its number when all other shards answer: shard c: cannot connect"
        in sequencerd.errors
    )
    assert not await new_shards["a"].fetchval("SELECT to_regnamespace('sequencer') IS NOT NULL")


async def test_a_shard_is_migrated_with_the_login_of_its_owner(
    new_shards: dict[str, asyncpg.Connection], sequencerd: Command, tmp_path: Path, database: str
) -> None:
    file = tmp_path / "sequencerd.toml"
    there = database.replace("postgres@", "nobody@")
    sequencerd("--database", database, "migrate", "--shard", "a,b", code=2)
    assert "specify the shard with --shard" in sequencerd.errors
    file.write_text(file.read_text().replace(f'"{database}"', f'"{there}"', 1))
    assert "a: applied" in sequencerd("--database", database, "migrate", "--shard", "a")


def test_an_unknown_shard_is_refused(sequencerd: Command, configure: Callable[..., None]) -> None:
    configure("a", "b")
    for command in ("status --shard", "run --shard", "run --check --shard"):
        for names, unknown in (("c", "c"), ("a,c", "c"), ("", ""), ("a,", "")):
            sequencerd(*command.split(), names, code=1)
            assert f"no shard {unknown!r} in the settings; available: a, b" in sequencerd.errors
    sequencerd.variables["SEQUENCERD_INSTANCE"] = "c"  # of sequencerd@c.service
    for command in ("run", "run --check"):
        sequencerd(*command.split(), code=2)
        assert "sequencerd@c serves the shard 'c', which is not in the" in sequencerd.errors
        assert "available: a, b" in sequencerd.errors
    assert "valid" in sequencerd("run", "--check", "--shard", "a")


async def test_shards_are_used_in_the_order_of_the_settings(
    shards: dict[str, asyncpg.Connection], sharded: Command
) -> None:
    """Otherwise two of `apply` could wait for each other."""
    for names in (["b,a"], ["b", "--shard", "a"], ["b,a,b"]):
        printed = sharded("migrate", "--shard", *names)
        assert printed == "a: the schema is up to date\nb: the schema is up to date\n"


async def test_enroll_finds_the_shard_of_the_subject(
    shards: dict[str, asyncpg.Connection], sharded: Command
) -> None:
    for connection in shards.values():
        await define(
            connection, "s", ("wait", "WaitForDuration", '{"amount": 3, "unit": "days"}', None)
        )
    names = [f"user-{number}" for number in range(8)]
    own = {name: "ab"[shard_of(name, 2)] for name in names}
    for name in names:
        assert sharded("enroll", "s", name).startswith(f"enrolled as {own[name]}/")
    for shard, connection in shards.items():
        rows = await connection.fetch("SELECT subject FROM sequencer.enrollments")
        assert {subject for (subject,) in rows} == {name for name in names if own[name] == shard}
    sharded("enroll", "s", "elsewhere", "--shard", "b")
    sharded("enroll", "s", "elsewhere", "--shard", "a,b", code=2)
    assert "the single shard of the subject" in sharded.errors
