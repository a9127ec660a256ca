"""Shards as schemas of Citus: a coordinator and two workers, by the recipe of docs/citus.md."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import asyncpg
import pytest

from sequencerd.core.model import RetryPolicy
from sequencerd.core.task import Answer, Failed, Result, Task
from sequencerd.storage import bulk, connections, limits
from sequencerd.storage.connections import Shard
from sequencerd.storage.statements import QUERIES
from tests.console.conftest import page_with
from tests.console.test_changes_of_shards import ENTRY, confirm, edited, post
from tests.console.test_shards import console
from tests.helpers.clusters import Cluster, citus_nodes
from tests.helpers.command_line import Command
from tests.helpers.databases import execute, with_login
from tests.helpers.engines import ALL_ENDED, Recorder, define, enroll, running_engine, until, way
from tests.helpers.waiting import PATIENCE, eventually
from tests.storage.test_explain import HOT

pytestmark = pytest.mark.slow

PAGE = Path(__file__).parents[2] / "docs/citus.md"
DAYS = '{"amount": 3, "unit": "days"}'
SEQUENCE = """
name: s
steps:
  - {name: wait, type: WaitForDuration, config: {amount: 3, unit: days}}
  - {name: note, type: GoTo}
"""


CRASHED = (asyncpg.PostgresError, asyncpg.InterfaceError, OSError)


UNUSED = {"write_unchanged", "write_alike_unchanged"}
"""Statements for rows that are known to be unchanged, which Citus does not tell."""


class Citus(NamedTuple):
    """The coordinator's URL, the workers by port, and a command with the shards a and b."""

    coordinator: str
    workers: dict[int, Cluster]
    command: Command


@pytest.fixture(scope="module")
def citus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Citus]:
    """A cluster made as the page says, with the shards a and b."""
    page = PAGE.read_text()
    sql, toml, commands = re.findall(r"^```\w+\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)[:3]
    with citus_nodes() as nodes:
        for number, node in enumerate(nodes):
            asyncio.run(execute(node.url, "CREATE EXTENSION citus"))
            sql = sql.replace(f"'db{number}', 5432", f"'127.0.0.1', {urlsplit(node.url).port}")
        for statement in sql.splitlines():
            asyncio.run(execute(nodes[0].url, statement))
        folder = tmp_path_factory.mktemp("citus")
        toml = re.sub(r"postgresql://\S+?/app", nodes[0].url, toml)
        (folder / "sequencerd.toml").write_text(toml)
        (folder / "onboarding.yaml").write_text(SEQUENCE)
        command = Command("", folder)
        command.without_database()
        command.variables["SEQUENCERD_CONFIG"] = str(folder / "sequencerd.toml")
        command.follow(commands)
        workers = {int(urlsplit(node.url).port or 0): node for node in nodes[1:]}
        yield Citus(nodes[0].url, workers, command)


@pytest.fixture
def shard(citus: Citus) -> Shard:
    return Shard(citus.coordinator, "a")


@pytest.fixture
async def connection(shard: Shard) -> AsyncIterator[asyncpg.Connection]:
    """A connection to the shard a, without definitions and enrollments of former tests."""
    opened = await connections.connect(shard)
    await opened.execute(
        "TRUNCATE sequencer.sequences, sequencer.steps, sequencer.enrollments, sequencer.events,"
        " sequencer.revisions, sequencer.brakes, sequencer.scheduled_runs"
    )
    yield opened
    await opened.close()


async def placement(connection: asyncpg.Connection) -> int:
    """The port of the worker that has the shard."""
    port: int = await connection.fetchval(
        "SELECT DISTINCT nodeport FROM citus_shards"
        " WHERE table_name = 'sequencer.enrollments'::regclass"
    )
    return port


def test_the_recipe_makes_a_schema_on_a_worker_for_each_shard(citus: Citus) -> None:
    seen = citus.command("doctor", "--shard", "b")
    assert "tables distributed by Citus: daemons poll every 10 to 100 ms" in seen
    assert "ERROR" not in seen
    for command in ("plan onboarding.yaml", "status", "list", "history s", "export s"):
        citus.command(*command.split(), "--shard", "a")


async def test_doctor_knows_that_several_nodes_generate_ids(
    citus: Citus, connection: asyncpg.Connection
) -> None:
    await define(connection, "s", ("wait", "WaitForDuration", DAYS, None))
    await enroll(connection, "s", "ada")
    assert "ERROR" not in citus.command("doctor", "--shard", "a")


def test_doctor_names_a_setting_that_is_missing(citus: Citus) -> None:
    url = f"{citus.coordinator}?options=-c%20citus.propagate_set_commands%3Dnone"
    command = Command(url, citus.command.folder)
    command.variables["SEQUENCERD_DATABASE_SCHEMA"] = "a"
    seen = command("doctor", code=1)
    assert "by Citus without citus.propagate_set_commands = 'local'" in seen
    assert "ALTER DATABASE ... SET citus.propagate_set_commands = 'local'" in seen


async def test_a_schema_whose_name_needs_quotes_is_rejected(citus: Citus) -> None:
    command = Command(citus.coordinator, citus.command.folder)
    command.variables["SEQUENCERD_DATABASE_SCHEMA"] = "Sales"
    command("migrate", code=1)
    assert "Citus cannot have the schema Sales, as it does not quote its name" in command.errors
    names = "SELECT nspname FROM pg_namespace WHERE nspname = 'Sales'"
    connection = await asyncpg.connect(citus.coordinator)
    assert not await connection.fetch(names)
    await connection.close()


async def test_enrollments_go_through_their_steps(
    shard: Shard, connection: asyncpg.Connection
) -> None:
    """With a side effect that fails once, changed data, a cancellation and an end."""
    known = set[str]()

    async def fail_once(task: Task) -> Result:
        if task.key not in known:
            known.add(task.key)
            return Failed("busy")
        return Answer()

    condition = {
        "lodashCommand": "eq",
        "value": {"type": "get", "value": "data.paid"},
        "compareTo": {"type": "raw", "value": True},
    }
    await define(
        connection,
        "s",
        ("send", "Note", "{}", "paid"),
        ("paid", "WaitForCondition", json.dumps(condition), "end"),
        ("end", "UpdateData", '{"data": {"done": true}}', None),
    )
    runner = Recorder(fail_once, batch_size=100)
    runner.retry = RetryPolicy(first_delay=0.01)
    async with running_engine(shard, {"Note": runner}):
        rows = await connection.fetch(
            "INSERT INTO sequencer.enrollments (sequence, subject)"
            " SELECT 's', 'user-' || n FROM generate_series(1, 100) AS n RETURNING id"
        )
        ids = [row["id"] for row in rows]
        waiting = "SELECT count(*) = 100 FROM sequencer.enrollments WHERE step = 'paid'"
        await until(connection, waiting)
        async with connection.transaction():
            await bulk.set_reason(connection, "it's over")
            await connection.execute(
                "UPDATE sequencer.enrollments SET status = 'cancelled' WHERE id = $1", ids[0]
            )
        await connection.execute("""UPDATE sequencer.enrollments SET data = '{"paid": true}'""")
        await until(connection, ALL_ENDED)
    assert len(runner.keys) == len(set(runner.keys)) + 100 == 200
    assert await way(connection, ids[1]) == [
        "send enrolled",
        "send retry",
        "send next",
        "paid next",
        "end next",
        "end completed",
    ]
    message = await connection.fetchval(
        "SELECT message FROM sequencer.events WHERE action = 'cancelled' AND enrollment_id = $1",
        ids[0],
    )
    assert message == "by postgres: it's over"


async def test_hot_statements_are_executed(connection: asyncpg.Connection) -> None:
    """Citus cannot execute all that PostgreSQL can; a claim that fails is repeated in parts."""
    await define(connection, "s", ("a", "GoTo", "{}", None))
    for name in HOT.keys() - UNUSED:
        await connection.execute(f"PREPARE hot_{name} AS {QUERIES[name]}")
        await connection.execute(f"EXECUTE hot_{name} {f'({HOT[name]})' if HOT[name] else ''}")


async def test_changed_definitions_are_polled_and_waiting_enrollments_follow(
    shard: Shard, connection: asyncpg.Connection
) -> None:
    await define(connection, "s", ("wait", "WaitForDuration", DAYS, None))
    async with running_engine(shard):
        id_ = await enroll(connection, "s", "ada")
        await until(connection, "SELECT entered_at IS NOT NULL FROM sequencer.enrollments")
        await connection.execute(
            "UPDATE sequencer.steps SET config = $1", '{"amount": 0, "unit": "days"}'
        )
        await until(connection, ALL_ENDED)
        await define(connection, "new", ("end", "GoTo", "{}", None))
        await enroll(connection, "new", "bob")
        await until(connection, ALL_ENDED)
    revisions = await connection.fetch("SELECT revision FROM sequencer.revisions ORDER BY at")
    assert [row[0] for row in revisions] == [1, 2, 3]
    assert await way(connection, id_) == ["wait enrolled", "wait next", "wait completed"]


async def test_permits_of_a_rate_are_taken_once(connection: asyncpg.Connection) -> None:
    first, _ = await limits.take_permits(connection, "Note", 10.0, 50)
    second, _ = await limits.take_permits(connection, "Note", 10.0, 50)
    assert second == pytest.approx(first + 5, abs=0.001)


async def test_a_request_by_notify_is_heard(shard: Shard, connection: asyncpg.Connection) -> None:
    await define(connection, "s", ("wait", "WaitForDuration", DAYS, None))
    async with running_engine(shard):
        await enroll(connection, "s", "ada")
        await until(connection, "SELECT entered_at IS NOT NULL FROM sequencer.enrollments")
        await connection.execute("NOTIFY sequencer")
        await until(
            connection,
            "SELECT NOT EXISTS (SELECT FROM sequencer.steps WHERE reschedule_from IS NOT NULL)",
        )


async def test_applications_use_the_privileges_of_their_roles(
    citus: Citus, shard: Shard, connection: asyncpg.Connection
) -> None:
    await define(connection, "s", ("wait", "WaitForDuration", DAYS, None))
    await connection.execute("CREATE ROLE app_user LOGIN")
    await connection.execute("GRANT sequencer_enroller TO app_user")
    app = await connections.connect(Shard(with_login(citus.coordinator, "app_user"), "a"))
    try:
        assert await app.fetchval("SELECT sequencer.enroll('s', 'ada')")
        assert await app.fetchval("SELECT sequencer.enroll('s', 'ada')") is None
        await enroll(app, "s", "bob")
        assert await app.fetchval("SELECT sequencer.reevaluate(subject => 'bob')") == 1
        assert await app.fetchval("SELECT sequencer.merge('bob', 'eve')") == 1
        with pytest.raises(asyncpg.InsufficientPrivilegeError, match="begins as active"):
            await app.execute(
                "INSERT INTO sequencer.enrollments (sequence, subject, visit) VALUES ('s', 'x', 7)"
            )
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await app.execute("DELETE FROM sequencer.enrollments")
        with pytest.raises(asyncpg.UniqueViolationError):
            await enroll(app, "s", "eve")
    finally:
        await app.close()


async def test_a_daemon_needs_no_superuser(
    citus: Citus, shard: Shard, connection: asyncpg.Connection
) -> None:
    """Its login has sequencer_daemon alone, on all nodes."""
    await define(
        connection, "s", ("send", "Note", "{}", "wait"), ("wait", "WaitForDuration", DAYS, None)
    )
    await connection.execute("CREATE ROLE daemon_user LOGIN")
    await connection.execute("GRANT sequencer_daemon TO daemon_user")
    runner = Recorder()
    login = Shard(with_login(citus.coordinator, "daemon_user"), "a")
    async with running_engine(login, {"Note": runner}, sweep=0.5):
        ids = [await enroll(connection, "s", f"user-{number}") for number in range(20)]
        await until(
            connection, "SELECT count(*) = 20 FROM sequencer.enrollments WHERE step = 'wait'"
        )
        await connection.execute(
            "UPDATE sequencer.steps SET config = $1 WHERE name = 'wait'",
            '{"amount": 0, "unit": "days"}',
        )
        await until(connection, ALL_ENDED)
    assert len(runner.keys) == 20
    assert (await way(connection, ids[0]))[-1] == "wait completed"


async def test_the_console_reads_and_changes(citus: Citus, connection: asyncpg.Connection) -> None:
    await connection.execute("CREATE ROLE console_user LOGIN")
    await connection.execute("GRANT sequencer_daemon, sequencer_editor TO console_user")
    other = await connections.connect(Shard(citus.coordinator, "b"))
    await other.execute("TRUNCATE sequencer.enrollments, sequencer.events, sequencer.suppressions")
    for one in (connection, other):
        await one.execute("DELETE FROM sequencer.sequences")
        await define(
            one, "s", ("wait", "WaitForDuration", DAYS, "end"), ("end", "GoTo", "{}", None)
        )
        await enroll(one, "s", "ada")
    settings = (citus.command.folder / "sequencerd.toml").read_text()
    url = with_login(citus.coordinator, "console_user")
    (citus.command.folder / "console.toml").write_text(settings.replace(citus.coordinator, url))
    command = Command("", citus.command.folder)
    command.variables.pop("SEQUENCERD_DATABASE")
    command.variables["SEQUENCERD_CONFIG"] = str(citus.command.folder / "console.toml")
    async with console(command, "console", SEQUENCERD_CONSOLE_WRITE="true") as client:
        await page_with(client, "/", "<dd>2</dd>")
        for path in (
            "/sequence?sequence=s&step=wait",
            "/funnel?sequence=s",
            "/over-time?sequence=s",
            "/simulate?sequence=s",
            "/failures",
            "/health",
            "/search?q=ada",
            "/search?where=data.x+%3D+1",
            "/suppressions",
            "/shards/a/sequence?sequence=s",
            "/shards/b/funnel?sequence=s",
        ):
            page = await client.get(path)
            assert page.status_code == 200, (path, page.text)
            assert "is missing here" not in page.text, path
        id_ = await connection.fetchval("SELECT id FROM sequencer.enrollments")
        assert (await client.get(f"/shards/a/enrollments/{id_}")).status_code == 200
        for path in ("/suppress", "/suppression"):
            answer = await post(client, path, **ENTRY)
            assert answer.status_code == 303, answer.text
        enrolled = await post(client, "/enroll", sequence="s", subject="bob", reason="new")
        assert enrolled.status_code == 303, enrolled.text
        paused = await post(client, "/status", sequence="s", action="pause", reason="stop")
        assert paused.status_code == 303, paused.text
        form = await edited(client, 6)
        assert (await client.post("/edit", data=form)).status_code == 303
        for one in (connection, other):
            assert await one.fetchval("SELECT status FROM sequencer.sequences") == "paused"
            amount = "SELECT config->>'amount' FROM sequencer.steps WHERE name = 'wait'"
            assert await one.fetchval(amount) == "6"
        moved = await confirm(client, "action=move&sequence=s&status=active", to="end")
        assert "Moved to end 3 enrollments" in moved.text
        edit = await client.get(f"/data?id=a/{id_}", follow_redirects=True)
        assert edit.status_code == 200
    await other.close()


async def test_merges_beside_other_changes_of_their_subjects(
    shard: Shard, connection: asyncpg.Connection
) -> None:
    """Merges wait for each other, and for the others, without locks."""
    await define(connection, "s", ("wait", "WaitForDuration", DAYS, None))
    subjects = [f"user-{number}" for number in range(3)]
    ids = [await enroll(connection, "s", subject) for subject in subjects]

    async def change(work: str, *arguments: str) -> None:
        application = await connections.connect(shard)
        try:
            for _ in range(100):
                while True:
                    try:
                        await application.execute(work, *arguments)
                        break
                    except asyncpg.DeadlockDetectedError:  # with a change by ids
                        assert work == data
        finally:
            await application.close()

    async def reevaluate() -> None:
        operator = await connections.connect(shard)
        try:
            for _ in range(30):
                await bulk.change(
                    operator, "reevaluate", ids, reason="looked", progress=lambda _: None
                )
        finally:
            await operator.close()

    merge = "SELECT sequencer.merge($1, $2)"
    again = "SELECT sequencer.enroll('s', $1)"
    data = "UPDATE sequencer.enrollments SET data = data || '{\"x\": 1}' WHERE subject IN ($1, $2)"
    async with running_engine(shard):
        await asyncio.gather(
            change(merge, subjects[0], subjects[1]),
            change(merge, subjects[1], subjects[0]),
            change(merge, subjects[1], subjects[2]),
            change(again, subjects[0]),
            change(again, subjects[1]),
            change(data, subjects[0], subjects[1]),
            change(data, subjects[1], subjects[2]),
            reevaluate(),
        )
    active = "SELECT count(*) FROM sequencer.enrollments WHERE status = 'active' GROUP BY subject"
    assert {row[0] for row in await connection.fetch(active)} == {1}


async def test_a_merge_gives_way_to_a_transaction_that_waits_for_it(
    shard: Shard, connection: asyncpg.Connection
) -> None:
    """It is enrolling the subject, and changes a row that the merge locks now and then. (The
    search for deadlocks is off: once in two seconds, it could find the millisecond in which each
    waits for the other.)
    """
    await connection.execute("ALTER SYSTEM SET citus.distributed_deadlock_detection_factor = -1")
    await connection.execute("SELECT pg_reload_conf()")
    await define(connection, "s", ("wait", "WaitForDuration", DAYS, None))
    first = await enroll(connection, "s", "anonymous")
    merging = await connections.connect(shard)
    async with connection.transaction():
        await enroll(connection, "s", "ada")
        merge = asyncio.create_task(
            merging.fetchval("SELECT sequencer.merge('anonymous', 'ada')", timeout=PATIENCE)
        )
        await until(
            connection,
            "SELECT EXISTS (SELECT FROM citus_stat_activity WHERE wait_event = 'PgSleep')",
        )
        await connection.execute(
            "UPDATE sequencer.enrollments SET data = '{\"x\": 1}' WHERE id = $1", first
        )
    assert await merge == 1
    await merging.close()
    await connection.execute("ALTER SYSTEM RESET citus.distributed_deadlock_detection_factor")
    await connection.execute("SELECT pg_reload_conf()")


async def test_a_transaction_over_several_shards_is_atomic(
    citus: Citus, connection: asyncpg.Connection
) -> None:
    """On a node that notifies, it could not be prepared."""
    other = await connections.connect(Shard(citus.coordinator, "b"))
    await other.execute("TRUNCATE sequencer.sequences, sequencer.enrollments CASCADE")
    await other.close()
    names = ("a", "b")
    async with connection.transaction():
        for name in names:
            await connection.execute(
                f"INSERT INTO {name}.sequences (name, first_step) VALUES ('s', 'wait')"
            )
            await connection.execute(
                f"INSERT INTO {name}.steps (sequence, name, type) VALUES ('s', 'wait', 'GoTo')"
            )
            await connection.execute(
                f"INSERT INTO {name}.enrollments (sequence, subject) VALUES ('s', 'ada')"
            )
    for name in names:
        assert (
            await connection.fetchval(f"SELECT count(*) FROM {name}.revisions WHERE sequence = 's'")
            >= 1
        )


async def test_retention_drops_and_deletes(connection: asyncpg.Connection) -> None:
    await define(connection, "s", ("wait", "WaitForDuration", DAYS, None))
    await enroll(connection, "s", "ada")
    await connection.execute("UPDATE sequencer.enrollments SET status = 'cancelled'")
    await connection.execute(
        "UPDATE sequencer.enrollments SET ended_at = now() - interval '1 year'"
    )
    assert await connection.fetchval("SELECT deleted FROM sequencer.delete_ended(now(), 10)") == 1
    await connection.execute("SELECT sequencer.add_event_partitions(6)")
    await connection.execute(
        "INSERT INTO sequencer.events (enrollment_id, at, sequence, step, visit, action)"
        " VALUES (1, now() - interval '3 years', 's', 'wait', 1, 'next')"
    )
    drop = "SELECT sequencer.drop_event_partition(now())"
    assert await connection.fetchval(drop) == "events_other"
    assert await connection.fetchval(drop) is None


async def test_a_shard_moves_to_another_worker_under_load(
    citus: Citus, shard: Shard, connection: asyncpg.Connection
) -> None:
    await define(connection, "s", ("send", "Note", "{}", "again"), ("again", "Note", "{}", None))
    runner = Recorder()
    subjects = 0
    stop = asyncio.Event()

    async def load() -> None:
        nonlocal subjects
        application = await connections.connect(shard)
        while not stop.is_set():
            await enroll(application, "s", f"user-{subjects}")
            subjects += 1
        await application.close()

    async with running_engine(shard, {"Note": runner}):
        loading = asyncio.create_task(load())
        for _ in range(2):
            before = await placement(connection)
            (there,) = citus.workers.keys() - {before}
            enough = subjects + 50
            await eventually(partial(lambda number: subjects > number, enough))
            mover = await connections.connect(shard)
            await mover.execute("SELECT citus_schema_move('a', '127.0.0.1', $1::integer)", there)
            await mover.close()
            assert await placement(connection) == there
        stop.set()
        await loading
        await until(connection, ALL_ENDED)
    ended = "SELECT count(*) FROM sequencer.enrollments WHERE status = 'completed'"
    assert await connection.fetchval(ended) == subjects
    assert len(runner.keys) == len(set(runner.keys)) == 2 * subjects
    await connection.execute("UPDATE sequencer.sequences SET description = 'moved'")
    revisions = await connection.fetch("SELECT revision FROM sequencer.revisions ORDER BY at")
    assert [row[0] for row in revisions] == [1, 2]


async def test_the_crash_of_a_worker_loses_nothing(
    citus: Citus, shard: Shard, connection: asyncpg.Connection
) -> None:
    await define(connection, "s", ("send", "Note", "{}", "again"), ("again", "Note", "{}", None))
    runner = Recorder()
    worker = citus.workers[await placement(connection)]
    async with running_engine(shard, {"Note": runner}, lease=3):
        enrolled = [await enroll(connection, "s", f"user-{number}") for number in range(200)]
        await eventually(lambda: len(runner.keys) > 20)
        crashing = asyncio.create_task(asyncio.to_thread(worker.crash))
        while not crashing.done():
            try:
                enrolled.append(await enroll(connection, "s", f"user-{len(enrolled)}"))
            except CRASHED:
                await asyncio.sleep(0.01)
        await crashing
        await until(connection, ALL_ENDED)
    rows = await connection.fetch("SELECT id, status FROM sequencer.enrollments")
    assert {row["id"] for row in rows} >= set(enrolled)
    assert {row["status"] for row in rows} == {"completed"}
    repeated = {key for key in runner.keys if runner.keys.count(key) > 1}
    expired = await connection.fetch(
        "SELECT enrollment_id FROM sequencer.events WHERE action = 'lease_expired'"
    )
    assert {int(key.split(":")[0]) for key in repeated} <= {row[0] for row in expired}
