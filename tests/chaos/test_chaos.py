"""Break everything while enrollments are in progress: none is lost. `make chaos` takes longer:
CHAOS_SECONDS is how long each scenario takes, CHAOS_SEED the first seed of its faults, CHAOS_ROUNDS
how many seeds are tried. Faults that have scenarios of their own there, and differ in nothing else,
share one here, because starting daemons takes the longest.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import math
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import ExitStack, suppress
from datetime import UTC, datetime, timedelta
from itertools import chain
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import asyncpg
import pytest

from sequencerd.cli import doctor
from sequencerd.settings import Settings
from sequencerd.storage.migrations import Migration, available
from tests.chaos.checker import check
from tests.chaos.world import (
    CONNECT,
    FIRST,
    IS_SHORT,
    LEASE,
    SECONDS,
    Proxy,
    Server,
    World,
    create,
    living,
    pair_of_servers,
)
from tests.helpers.command_line import start_sequencerd
from tests.helpers.databases import shard
from tests.helpers.engines import until
from tests.helpers.pooler import pgbouncer
from tests.helpers.releases import commit_of, copy_release, next_migration, previous_release
from tests.helpers.waiting import PATIENCE, eventually

REPOSITORY = Path(__file__).parent.parent.parent

Fault = Callable[[World], Coroutine[None, None, None]]


async def breaking(
    world: World, *faults: Fault, every: float, daemons: int = 2, times: int | None = None
) -> None:
    """Enroll, cause each of the faults at least once meanwhile, then wait until all enrollments are
    done.
    """
    loop = asyncio.get_running_loop()
    await world.keep(daemons)
    app = asyncio.create_task(world.enroll(math.inf))
    end = loop.time() + SECONDS
    done, round_ = 0, list[Fault]()
    while (loop.time() < end or done < len(faults)) and done != times:
        done += 1
        await asyncio.sleep(world.rng.uniform(0.5, 1.5) * every)
        round_ = round_ or world.rng.sample(faults, len(faults))
        fault = round_.pop()
        world.note(fault.__name__)
        await fault(world)
        await world.keep(daemons)
    await asyncio.sleep(end - loop.time())
    world.is_enough = True
    await app
    try:
        await world.drain(daemons)
    except TimeoutError:
        world.note("an enrollment stays active")
    await check(world)


def scenarios(*groups: tuple[Fault, ...]) -> pytest.MarkDecorator:
    """Parametrize a test: one scenario for each group of faults, or one with all of them in the
    short form.
    """
    divided = [tuple(chain(*groups))] if IS_SHORT else groups
    names = ["-".join(fault.__name__ for fault in faults) for faults in divided]
    return pytest.mark.parametrize("faults", divided, ids=names)


# --- daemons


async def kill(world: World) -> None:
    daemon = world.rng.choice(world.daemons)
    daemon.send(signal.SIGKILL)
    await daemon.process.wait()


async def freeze(world: World) -> None:
    """Freeze a daemon for longer than its leases last: others take over, and the fence rejects its
    results afterwards.
    """
    daemon = world.rng.choice(world.daemons)
    daemon.send(signal.SIGSTOP)
    await asyncio.sleep(LEASE + 1)
    daemon.send(signal.SIGCONT)


@scenarios((kill,), (freeze,))
async def test_daemons_are_killed_and_freeze(world: World, faults: tuple[Fault, ...]) -> None:
    world.sink.slow = 0.05
    await breaking(world, *faults, every=1)


async def test_daemons_are_restarted_and_nothing_is_done_twice(world: World) -> None:
    world.sink.slow = 0.1
    await world.keep(2)
    app = asyncio.create_task(world.enroll(SECONDS))
    while not app.done():
        await asyncio.sleep(1)
        daemon = world.daemons[0]
        world.note("SIGTERM")
        daemon.send(signal.SIGTERM)
        await daemon.process.wait()
        await world.keep(2)
    await app
    await world.drain(2)
    await check(world, duplicates=False)


async def test_no_fault_of_one_enrollment_reaches_another(world: World) -> None:
    """A trigger refuses some rows, another session locks others for longer than a lease, and a
    lock_timeout ends statements that wait. All other enrollments continue, and each of their side
    effects is done once.
    """
    connection = await asyncpg.connect(world.database)
    name = await connection.fetchval("SELECT current_database()")
    await connection.execute(f"ALTER DATABASE \"{name}\" SET lock_timeout = '500ms'")
    world.sink.slow = 0.1
    world.faulty = {f"u{number}" for number in range(100_000) if number % 10 in (3, 7)}
    await world.keep(2)
    app = asyncio.create_task(world.enroll(SECONDS))
    held = await asyncpg.connect(world.database)
    while not app.done():
        code = world.rng.choice(["P0001", "42501", "23514", "40001", "57014", "XX001"])
        timing = world.rng.choice(["BEFORE", "AFTER"])
        world.note(f"{timing} {code}")
        await connection.execute(
            "CREATE OR REPLACE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
            f" RAISE 'refused' USING ERRCODE = '{code}'; END $$;"
            f"CREATE TRIGGER fail {timing} UPDATE ON sequencer.enrollments FOR EACH ROW"
            " WHEN (NEW.subject LIKE '%3') EXECUTE FUNCTION fail()"
        )
        async with held.transaction():
            await held.execute(
                "SELECT FROM sequencer.enrollments WHERE subject LIKE '%7'"
                " ORDER BY id DESC LIMIT 20 FOR UPDATE SKIP LOCKED"
            )
            await asyncio.sleep(LEASE + 1)
        await connection.execute("DROP TRIGGER fail ON sequencer.enrollments")
        async with held.transaction():
            await held.execute("LOCK TABLE sequencer.events IN SHARE MODE")
            await asyncio.sleep(1)
    await app
    await held.close()
    await connection.close()
    await world.drain(2)
    await check(world)


# --- what it talks to


async def test_servers_refuse_and_answers_are_lost(world: World) -> None:
    world.sink.lose, world.sink.refuse = 0.1, 0.2
    await breaking(world, kill, every=SECONDS)


# --- the database


async def terminate(world: World) -> None:
    """A connection of a daemon, of whatever kind."""
    with suppress(*CONNECT):
        connection = await asyncpg.connect(world.database, timeout=5)
        rows = await connection.fetch(
            "SELECT pid, application_name FROM pg_stat_activity WHERE datname = current_database()"
            " AND pid <> pg_backend_pid()"
        )
        if rows:
            row = world.rng.choice(rows)
            world.note(f"  {row['application_name']}")
            await connection.execute("SELECT pg_terminate_backend($1)", row["pid"])
        await connection.close()


async def restart(world: World) -> None:
    await _restart(world, signal.SIGINT)


async def restart_immediately(world: World) -> None:
    await _restart(world, signal.SIGQUIT)


async def crash(world: World) -> None:
    await _restart(world, signal.SIGKILL)


async def _restart(world: World, number: signal.Signals) -> None:
    world.server.kill(number)
    await asyncio.sleep(world.rng.uniform(0, 1))
    await asyncio.to_thread(world.server.start)


async def conflict(world: World) -> None:
    """Let a trigger fail now and then for a second, as in a conflict of serializable transactions,
    a deadlock, or with a full or faulty disk.
    """
    connection = await asyncpg.connect(world.database)
    code = world.rng.choice(["40001", "40P01", "53100", "58030"])
    await connection.execute(
        "CREATE OR REPLACE FUNCTION fail() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
        f" IF random() < 0.02 THEN RAISE 'injected' USING ERRCODE = '{code}'; END IF;"
        " RETURN NEW; END $$;"
        "CREATE TRIGGER fail BEFORE UPDATE ON sequencer.enrollments FOR EACH ROW"
        " EXECUTE FUNCTION fail()"
    )
    await asyncio.sleep(1)
    await connection.execute("DROP TRIGGER fail ON sequencer.enrollments")
    await connection.close()


async def time_out(world: World) -> None:
    """Statements may take no time at all for a while: new connections do nothing."""
    connection = await asyncpg.connect(world.database)
    name = await connection.fetchval("SELECT current_database()")
    await connection.execute(f"ALTER DATABASE \"{name}\" SET statement_timeout = '1ms'")
    await connection.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE datname = current_database() AND pid <> pg_backend_pid()"
    )
    await asyncio.sleep(1)
    await connection.execute(f'ALTER DATABASE "{name}" RESET statement_timeout')
    await connection.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE datname = current_database() AND pid <> pg_backend_pid()"
    )
    await connection.close()


async def crowd(world: World) -> None:
    """Take all connections that are left."""
    taken: list[asyncpg.Connection] = []
    with suppress(*CONNECT):
        while len(taken) < 100:
            taken.append(await asyncpg.connect(world.server.url, timeout=5))
    await terminate(world)
    await asyncio.sleep(1)
    for connection in taken:
        connection.terminate()


async def crowd_out(world: World) -> None:
    """The same, while a daemon starts."""
    taken: list[asyncpg.Connection] = []
    await kill(world)
    with suppress(*CONNECT):
        while len(taken) < 100:
            taken.append(await asyncpg.connect(world.server.url, timeout=5))
    started = await world.start()
    await asyncio.sleep(1)
    for connection in taken:
        connection.terminate()
    if started.process.returncode is not None:
        (line,) = started.log.read_text().splitlines()
        assert "too many clients" in line or "remaining connection slots" in line, line


@pytest.mark.skipif(IS_SHORT, reason="test_no_log_can_be_written terminates as many")
async def test_connections_are_terminated(world: World) -> None:
    await breaking(world, terminate, every=0.3)


class Pair:
    """A server and its standby, which has every commit before it is answered."""

    def __init__(self, primary: Server, standby: Server) -> None:
        self.primary, self.standby = primary, standby

    @property
    def url(self) -> str:
        """That of the one that takes writes, whichever it is."""
        hosts = [
            parse_qs(urlsplit(one.url).query)["host"][0] for one in (self.primary, self.standby)
        ]
        return (
            f"postgresql://postgres@/postgres?host={','.join(hosts)}&port=5432,5432"
            "&target_session_attrs=read-write"
        )

    def fail_over(self) -> None:
        """The server dies, and its standby takes over."""
        self.primary.kill(signal.SIGKILL)
        self.standby.control("promote", "-w")


@pytest.fixture
def pair() -> Iterator[Pair]:
    with pair_of_servers() as (primary, standby):
        yield Pair(primary, standby)


async def test_a_standby_takes_over(pair: Pair, tmp_path: Path) -> None:
    async def fail_over(world: World) -> None:
        await asyncio.to_thread(pair.fail_over)

    database = await create(pair.url, "chaos")
    async with living(database, tmp_path, FIRST) as world:
        await breaking(world, fail_over, every=SECONDS / 2, daemons=2, times=1)


@scenarios((restart, restart_immediately, crash), (conflict, time_out, crowd), (crowd_out,))
async def test_the_database_crashes_and_refuses(world: World, faults: tuple[Fault, ...]) -> None:
    await breaking(world, *faults, every=0.75)


@pytest.fixture
def small_disk() -> Iterator[Path]:
    """A file system of its own, which an administrator alone can make."""
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    mount = ["mount", "-t", "tmpfs", "-o", "size=160m,mode=755", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, check=False).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)
        folder.rmdir()


async def test_the_disk_is_full(small_disk: Path, tmp_path: Path) -> None:
    """First tables cannot grow, then the server gives up, for want of a log."""
    filler = small_disk / "filler"
    settings = {"max_wal_size": "32MB", "min_wal_size": "32MB", "wal_recycle": "off"}
    stack = ExitStack()
    small = Server(small_disk / "server", stack, **settings)

    async def fill(world: World) -> None:
        with suppress(OSError), filler.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(65536))
        await asyncio.sleep(2)
        filler.unlink(missing_ok=True)
        if not small.is_alive():
            world.note("  the server has given up")
            await asyncio.to_thread(small.start)

    with stack:
        database = await create(small.url, "chaos")
        async with living(database, tmp_path, FIRST) as world:
            await breaking(world, fill, every=1)
        assert "No space left on device" in (small_disk / "server/log").read_text()


async def test_no_log_can_be_written(world: World) -> None:
    """As with a full disk under the daemon: it continues, and is not restarted."""
    world.stderr = Path("/dev/full")
    await world.keep(2)
    daemons = list(world.daemons)
    await world.started(2)
    await breaking(world, terminate, every=0.3)
    assert world.daemons == daemons
    await world.stop()
    assert [daemon.process.returncode for daemon in daemons] == [0, 0]
    world.daemons.clear()


# --- a pooler between


@pytest.mark.parametrize("listening", ["direct", "off"])
async def test_daemons_work_through_a_pooler(world: World, tmp_path: Path, listening: str) -> None:
    option = f'listen_url = "{world.database}"' if listening == "direct" else "listen = false"
    world.settings += f"[database]\n{option}\n"
    with pgbouncer(world.database, tmp_path) as world.used:
        await breaking(world, terminate, every=1)
        found = [
            finding
            async for _, finding in doctor.examine([shard(world.used)], Settings())
            if finding.about == "pooler"
        ]
        assert [finding.level for finding in found] == ["error"]
        await world.stop()
        world.daemons.clear()


# --- another version


def next_version(folder: Path) -> tuple[Path, Migration]:
    """The package as it may be one day: with one more migration, which takes its time."""
    shutil.copytree(REPOSITORY / "sequencerd", folder / "sequencerd")
    shutil.copytree(REPOSITORY / "sql", folder / "sql")
    migration = next_migration()
    (folder / "sql" / migration.name).write_text(migration.sql + "SELECT pg_sleep(1);\n")
    return folder, migration


@pytest.fixture
async def released(breakable: Server, tmp_path: Path) -> AsyncIterator[World]:
    """Start with the schema and the daemons of the last release; before the first release, with
    those of this tree.
    """
    release = previous_release((REPOSITORY / "CHANGELOG.md").read_text("utf-8"))
    code = REPOSITORY
    if release is not None:
        commit = commit_of(release)
        if commit is None:
            pytest.skip(f"the history of git does not reach to {release}: git fetch --unshallow")
        code = copy_release(commit, tmp_path / "release")
    migrations = [one for one in available() if (code / "sql" / one.name).exists()]
    database = await create(breakable.url, tmp_path.name, migrations)
    async with living(database, tmp_path, FIRST) as made:
        made.server = breakable
        made.code = code
        yield made


async def start_migrating(world: World, code: Path) -> asyncio.subprocess.Process:
    return await start_sequencerd(
        "--database",
        world.database,
        "migrate",
        cwd=code,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )


MIGRATES = "SELECT EXISTS (SELECT FROM pg_stat_activity WHERE wait_event = 'PgSleep')"


async def test_an_upgrade_under_load(released: World, tmp_path: Path) -> None:
    """First the schema is upgraded, by a process that is killed and another one, then one daemon
    after the other. The old daemons continue until then.
    """
    world = released
    code, migration = next_version(tmp_path / "next")
    await world.keep(2)
    connection = await asyncpg.connect(world.database)
    # once they run, they need not know the schema
    await until(connection, "SELECT count(*) = 2 FROM sequencer.daemons")
    app = asyncio.create_task(world.enroll(SECONDS))
    await asyncio.sleep(SECONDS / 3)
    killed = await start_migrating(world, code)
    await until(connection, MIGRATES)
    world.note("migrate is killed")
    killed.kill()
    await killed.communicate()
    out = b""
    while migration.name.encode() not in out:
        migrated = await start_migrating(world, code)
        out, errors = await migrated.communicate()
        world.note(f"migrate: {out!r} {errors!r}")
        assert not errors or b"nothing was applied: run it again" in errors
    assert await connection.fetchval("SELECT max(version) FROM sequencer.migrations") == (
        migration.version
    )
    await connection.close()
    await asyncio.sleep(SECONDS / 6)
    old = await world.start()
    assert await old.process.wait() == 1
    assert "newer than this version of sequencerd: it has 0" in old.log.read_text()
    world.daemons.remove(old)
    world.code = code
    for daemon in list(world.daemons):
        await world.start()  # both versions work side by side
        await asyncio.sleep(SECONDS / 6)
        daemon.send(signal.SIGTERM)
        assert await daemon.process.wait() == 0
        world.daemons.remove(daemon)
    await app
    await world.drain(2)
    await check(world, duplicates=False)


# --- clocks


async def test_the_clock_is_wrong_and_jumps(world: World, tmp_path: Path) -> None:
    library = importlib.util.find_spec("libfaketime")
    if library is None or library.origin is None:
        pytest.skip("there is no libfaketime")
    offset = tmp_path / "offset"
    offset.write_text("+3600")
    world.environment = {
        "LD_PRELOAD": str(Path(library.origin).parent / "vendor/libfaketime/src/libfaketime.so.1"),
        "FAKETIME_TIMESTAMP_FILE": str(offset),
        "FAKETIME_NO_CACHE": "1",
        "DONT_FAKE_MONOTONIC": "1",
    }

    async def jump(_: World) -> None:
        offset.write_text(world.rng.choice(["+3600", "-3600", "-90000"]))

    # a second daemon, which judges the leases of the first, takes an interpreter of its own
    await breaking(world, jump, every=0.5, daemons=1 if IS_SHORT else 2)
    for daemon in world.daemons:
        told = datetime.fromisoformat(
            json.loads(daemon.log.read_text().split("\n")[0])["timestamp"]
        )
        assert abs(told - datetime.now(UTC)) > timedelta(minutes=30), "its clock was right"


# --- the network between


NETWORK = ("delay", "cut", "half_close", "swallow")


@pytest.mark.parametrize("kinds", [NETWORK] if IS_SHORT else [(kind,) for kind in NETWORK])
async def test_the_network_fails(world: World, kinds: tuple[str, ...]) -> None:
    proxy = Proxy(world.database)

    async def delay(_: World) -> None:
        proxy.delay = world.rng.uniform(0, 0.1)

    async def cut(_: World) -> None:
        proxy.cut()

    async def half_close(_: World) -> None:
        proxy.half_close()

    async def swallow(_: World) -> None:
        proxy.swallow = True
        await asyncio.sleep(2)
        proxy.swallow = False

    async def calm(_: World) -> None:
        proxy.delay = 0

    faults = [fault for fault in (delay, cut, half_close, swallow) if fault.__name__ in kinds]
    async with proxy.running() as world.used:
        await breaking(world, *faults, calm, every=1)
        await world.stop()
        world.daemons.clear()


async def test_a_daemon_ends_while_the_database_is_silent(world: World) -> None:
    world.settings = world.settings.replace("stop_timeout = 20", "stop_timeout = 1")
    world.sink.slow = 0.5
    proxy = Proxy(world.database)
    async with proxy.running() as world.used:
        await world.keep(1)
        await world.enroll(2)
        await eventually(lambda: world.sink.mails)
        proxy.swallow = True
        await asyncio.sleep(1)
        (daemon,) = world.daemons
        daemon.send(signal.SIGTERM)
        async with asyncio.timeout(PATIENCE):
            assert await daemon.process.wait() == 0, daemon.log.read_text()
    world.used = world.database
    await world.drain(1)
    await check(world)
