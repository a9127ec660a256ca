"""External data: asked for in batches, only where it is read, and never taken for false."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Mapping
from contextlib import nullcontext
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from importlib.metadata import EntryPoint
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

import asyncpg
import pytest

from sequencerd.core.task import LookupAnswer, Task
from sequencerd.engine import lookups
from sequencerd.runners.http_client import MAX_ANSWER
from sequencerd.service.health import Health
from sequencerd.service.metrics import Metrics
from sequencerd.settings import LookupSettings
from sequencerd.storage import connections, sources
from tests.helpers.databases import shard
from tests.helpers.engines import ALL_ENDED, Recorder, define, enroll, running_engine, until, way
from tests.helpers.pooler import pgbouncer
from tests.helpers.servers import Answer, Request, http_server, task
from tests.helpers.waiting import PATIENCE, eventually

ACCOUNTS = """
    CREATE SCHEMA app;
    CREATE TABLE app.accounts (name text, plan text);
    CREATE TABLE app.questions (subjects text[]);
    CREATE FUNCTION app.plans(subjects text[]) RETURNS TABLE (subject text, data jsonb)
    LANGUAGE sql STABLE AS $$
        SELECT name, jsonb_build_object('plan', plan) FROM app.accounts WHERE name = ANY (subjects)
    $$;
"""
PRO = json.dumps(
    {
        "lodashCommand": "eq",
        "value": {"type": "get", "value": "external.plan"},
        "compareTo": {"type": "raw", "value": "pro"},
    }
)
DAYS = '{"amount": 3, "unit": "days"}'


async def use(connection: asyncpg.Connection, lookup: str, recheck: str = "1 minute") -> None:
    await connection.execute(
        "UPDATE sequencer.sequences SET lookup = $1, recheck = $2::text::interval", lookup, recheck
    )


async def ask_plan(connection: asyncpg.Connection) -> None:
    """A sequence that asks for the plan, and gives it to a runner where it is "pro"."""
    await define(
        connection,
        "s",
        ("has-pro", "Conditional", PRO, "tell"),
        ("tell", "Note", '{"text": "{{external.plan}}"}', "plain"),
        ("plain", "Note", "{}", None),
    )


async def test_an_sql_function_is_called_once_for_a_batch(
    database: str, connection: asyncpg.Connection
) -> None:
    await connection.execute(ACCOUNTS)
    await connection.execute(
        "INSERT INTO app.accounts SELECT 'u' || n, CASE WHEN n <= 10 THEN 'pro' ELSE 'free' END"
        " FROM generate_series(1, 500) AS n"
    )
    recorder = Recorder()
    await ask_plan(connection)
    await use(connection, "app.plans")
    async with running_engine(database, {"Note": recorder}):
        await connection.execute(
            "INSERT INTO sequencer.enrollments (sequence, subject)"
            " SELECT 's', 'u' || n FROM generate_series(1, 500) AS n"
        )
        await until(connection, ALL_ENDED)
    told = [view for view in recorder.views if view["step"] == "tell"]
    assert {view["subject"] for view in told} == {f"u{n}" for n in range(1, 11)}
    assert all(view["external"] == {"plan": "pro"} for view in told)
    plain = [view for view in recorder.views if view["step"] == "plain"]
    assert len(plain) == 10
    assert all(
        view["external"] == {} for view in plain
    )  # it does not read them: none were requested


async def test_a_goal_in_external_data_is_evaluated_repeatedly(
    database: str, connection: asyncpg.Connection
) -> None:
    await connection.execute(ACCOUNTS)
    await define(
        connection, "s", ("pause", "WaitForDuration", DAYS, None), ("pro", "Goal", PRO, None)
    )
    await use(connection, "app.plans", "1 second")
    async with running_engine(database):
        id_ = await enroll(connection, "s", "ada")
        await until(
            connection, "SELECT wake_at > now() AND leased_by IS NULL FROM sequencer.enrollments"
        )
        ends = "waits_until = entered_at + interval '3 days' AND wake_at < waits_until"
        assert await connection.fetchval(f"SELECT {ends} FROM sequencer.enrollments")
        await connection.execute("INSERT INTO app.accounts VALUES ('ada', 'pro')")
        await until(connection, ALL_ENDED)
    assert (await way(connection, id_))[-2:] == ["pause goal", "pause completed"]
    assert await connection.fetchval("SELECT waits_until IS NULL FROM sequencer.enrollments")


@pytest.mark.slow
async def test_a_request_for_all_looks_up_each_subject_once(
    database: str, connection: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where more wait than a lookup takes on at a time."""
    asked: Counter[str] = Counter()
    original = sources.look_up

    async def counting(*arguments: Any) -> Any:
        asked.update(arguments[2])
        return await original(*arguments)

    monkeypatch.setattr(sources, "look_up", counting)
    await connection.execute(ACCOUNTS)
    await define(
        connection, "s", ("pause", "WaitForDuration", DAYS, None), ("pro", "Goal", PRO, None)
    )
    await use(connection, "app.plans", "1 hour")
    count = 1500
    waiting = "SELECT bool_and(wake_at > now() AND leased_by IS NULL AND entered_at IS NOT NULL)"
    async with running_engine(database):
        await connection.execute(
            "INSERT INTO sequencer.enrollments (sequence, subject)"
            " SELECT 's', 'u' || n FROM generate_series(1, $1::int) AS n",
            count,
        )
        await until(connection, f"{waiting} FROM sequencer.enrollments")
        assert set(asked.values()) == {1}
        await connection.execute("NOTIFY sequencer")
        await eventually(lambda: asked.total() >= 2 * count)
        await until(connection, f"{waiting} FROM sequencer.enrollments")
        await until(connection, "SELECT bool_and(reschedule_from IS NULL) FROM sequencer.steps")
    assert set(asked.values()) == {2}


async def test_a_failed_lookup_is_repeated_and_is_not_false(
    database: str, connection: asyncpg.Connection
) -> None:
    await ask_plan(connection)
    await use(connection, "app.plans")
    async with running_engine(database, {"Note": Recorder()}):
        id_ = await enroll(connection, "s", "ada")
        await until(
            connection, "SELECT EXISTS (SELECT FROM sequencer.events WHERE action = 'retry')"
        )
        row = await connection.fetchrow("SELECT * FROM sequencer.enrollments WHERE id = $1", id_)
        assert (row["status"], row["step"], row["attempt"]) == ("active", "has-pro", 0)
        assert "app" in row["last_error"]
        await connection.execute(ACCOUNTS)
        await connection.execute("INSERT INTO app.accounts VALUES ('ada', 'pro')")
        await connection.execute("SELECT sequencer.reevaluate(subject => 'ada')")
        await until(connection, ALL_ENDED)
    assert (await way(connection, id_))[-2:] == ["plain next", "plain completed"]


async def test_a_function_can_neither_write_nor_be_of_a_system_schema(
    connection: asyncpg.Connection,
) -> None:
    await connection.execute(ACCOUNTS)
    await connection.execute(
        "CREATE FUNCTION app.noting(subjects text[]) RETURNS TABLE (subject text, data jsonb)"
        " LANGUAGE sql AS $$ INSERT INTO app.questions VALUES ($1) RETURNING 'x', '{}'::jsonb $$"
    )
    with pytest.raises(asyncpg.ReadOnlySQLTransactionError):
        await sources.look_up(connection, "app.noting", ["ada"], 60)
    for name in ("plans", "pg_catalog.unnest", "sequencer.enroll", 'app."x"', "app.f(); --"):
        with pytest.raises(ValueError, match="SQL function"):
            await sources.look_up(connection, name, ["ada"], 60)


@pytest.mark.parametrize("form", ["list", "original"])
async def test_an_endpoint_gets_the_ids_and_answers_with_objects(
    database: str, connection: asyncpg.Connection, form: str
) -> None:
    asked: list[Any] = []

    async def respond(request: Request) -> Answer:
        asked.append((json.loads(request.body), request.headers["x-key"]))
        return Answer(200, json.dumps([{"id": "ada", "plan": "pro"}]).encode())

    recorder = Recorder()
    await ask_plan(connection)
    await use(connection, "plans")
    async with http_server(respond) as server:
        endpoint = LookupSettings.model_validate(
            {"url": server.url, "headers": {"X-Key": "k"}, "form": form}
        )
        async with running_engine(database, {"Note": recorder}, {"plans": endpoint}):
            await enroll(connection, "s", "ada")
            await enroll(connection, "s", "bob")
            await until(connection, ALL_ENDED)
    if form == "original":  # what its function for external data gets
        assert {frozenset(body) for body, _ in asked} == {frozenset({"runners"})}
        asked = [(body["runners"], key) for body, key in asked]
    assert sorted({name for names, _ in asked for name in names}) == ["ada", "bob"]
    assert {key for _, key in asked} == {"k"}
    (told,) = [view for view in recorder.views if view["step"] == "tell"]
    assert told["external"] == {"id": "ada", "plan": "pro"}


@pytest.mark.parametrize(
    "answer",
    [
        Answer(500, b"[]"),
        Answer(404, b"[]"),
        Answer(200, b"no JSON"),
        Answer(200, b'{"id": "ada"}'),
        Answer(200, b'[{"plan": "pro"}]'),
        Answer(200, b'[{"id": "ada"}, {"id": "ada", "plan": "pro"}]'),
    ],
)
async def test_an_answer_that_cannot_be_used_is_a_failure(
    database: str, connection: asyncpg.Connection, answer: Answer
) -> None:
    async def respond(_: Request) -> Answer:
        return answer

    await ask_plan(connection)
    await use(connection, "plans")
    async with http_server(respond) as server:
        endpoint = LookupSettings(url=server.url)
        async with running_engine(database, {"Note": Recorder()}, {"plans": endpoint}):
            await enroll(connection, "s", "ada")
            await until(connection, "SELECT last_error LIKE 'lookup%' FROM sequencer.enrollments")
    assert await connection.fetchval("SELECT status FROM sequencer.enrollments") == "active"


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"<html>", "it did not answer with a JSON list (Expecting value: line 1 column 1"),
        (b"[" * 100_000, "it did not answer with a JSON list (maximum recursion depth exceeded"),
        (b'[{"id": true}]', "an object of the answer has no id"),
        (b'[{"id": "user-7", "n": 1e400}]', "external.n is inf: the number is too large"),
        (b'[{"id": 7}, {"id": "user-7", "of": [1, {"n": NaN}]}]', "external.of.1.n is nan"),
        (b'[{"id": "user-7", "of": %s1%s}]' % (b"[" * 200, b"]" * 200), "it is nested more than"),
    ],
)
async def test_a_failure_tells_what_an_endpoint_answers(body: bytes, says: str) -> None:
    (answer,) = await ask_endpoint(body, 7)
    assert answer.external is None
    assert answer.message.startswith(f"lookup 'plans' failed: {says}")


async def test_a_server_may_ask_for_a_wait() -> None:
    async def respond(_: Request) -> Answer:
        return Answer(429, b"slow down", {"Retry-After": "600"})

    async with http_server(respond) as server:
        pool: Any = None
        made = lookups.Lookups(pool, {"plans": LookupSettings(url=server.url)})
        (answer,) = await made.get("plans").run(None, [task(7)])
        await made.close()
    text = "lookup 'plans' failed: it answered 429 slow down"
    assert answer == LookupAnswer(None, text, timedelta(seconds=600))


async def ask_endpoint(body: bytes, *ids: int) -> list[LookupAnswer]:
    """The answers for users with these numbers."""

    async def respond(_: Request) -> Answer:
        return Answer(body=body)

    async with http_server(respond) as server:
        pool: Any = None  # no SQL function is asked
        made = lookups.Lookups(pool, {"plans": LookupSettings(url=server.url)})
        answers = await made.get("plans").run(None, [task(id_) for id_ in ids])
        await made.close()
    return list(answers)


@pytest.mark.parametrize("limit", ["question", "answer"])
async def test_too_large_a_batch_is_halved_until_it_fits(limit: str) -> None:
    async def respond(request: Request) -> Answer:
        subjects = json.loads(request.body)
        if limit == "question" and len(subjects) > 2:
            return Answer(413, b"request entity too large")
        large = "x" * (MAX_ANSWER // 3)
        return Answer(body=json.dumps([{"id": one, "of": large} for one in subjects]).encode())

    async with http_server(respond) as server:
        pool: Any = None
        made = lookups.Lookups(pool, {"plans": LookupSettings(url=server.url)})
        answers = await made.get("plans").run(None, [task(id_) for id_ in range(7)])
        await made.close()
    assert [one.external and one.external["id"] for one in answers] == [
        f"user-{id_}" for id_ in range(7)
    ]


@pytest.mark.parametrize("answer", [Answer(413), Answer(body=b"x" * (MAX_ANSWER + 1))])
async def test_one_subject_that_is_too_large_is_a_failure(answer: Answer) -> None:
    async def respond(_: Request) -> Answer:
        return answer

    async with http_server(respond) as server:
        pool: Any = None
        made = lookups.Lookups(pool, {"plans": LookupSettings(url=server.url)})
        (found,) = await made.get("plans").run(None, [task(7)])
        await made.close()
    assert found.external is None
    assert len(server.requests) == 1


async def test_data_that_cannot_be_used_concern_their_subject_only() -> None:
    first, second = await ask_endpoint(b'[{"id": "user-7", "n": 1e400}, {"id": "user-8"}]', 7, 8)
    assert first.external is None
    assert second.external == {"id": "user-8"}


@pytest.mark.parametrize("id_", ["7.0", '"7"', "7"])
def test_an_id_is_a_number_or_its_text(id_: str) -> None:
    assert list(lookups.by_id(json.loads(f'[{{"id": {id_}}}]'))) == ["7"]


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ({"since": datetime(2026, 1, 1, tzinfo=UTC)}, "external.since is of type datetime, which"),
        ({"sum": Decimal("1.5")}, "external.sum is of type Decimal, which JSON does not have"),
        ({"a": [{"b": {1, 2}}]}, "external.a.0.b is of type set, which JSON does not have"),
        ({("a", "b"): 1}, "keys must be str, int, float, bool or None, not tuple"),
        (None, "the data are of type NoneType instead of an object"),
        (["pro"], "the data are of type list instead of an object"),
        (json.loads('{"a":' * 200 + "{}" + "}" * 200), "it is nested more than 200 levels"),
    ],
)
async def test_data_of_python_that_json_cannot_hold(
    monkeypatch: pytest.MonkeyPatch, data: object, says: str
) -> None:
    def of_python(_: list[str]) -> dict[str, object]:
        return {"user-7": data}

    point = SimpleNamespace(name="plans", load=lambda: of_python)
    monkeypatch.setattr(lookups, "entry_points", lambda group: [point])
    pool: Any = None
    (answer,) = await lookups.Lookups(pool, {}).get("plans").run(None, [task(7)])
    assert answer.external is None
    assert answer.message.startswith(f"lookup 'plans' failed: {says}")


async def test_what_python_has_instead_of_json(monkeypatch: pytest.MonkeyPatch) -> None:
    def of_python(_: list[str]) -> dict[int, object]:
        return {7: MappingProxyType({"plans": ("pro", "team")})}

    point = SimpleNamespace(name="plans", load=lambda: of_python)
    monkeypatch.setattr(lookups, "entry_points", lambda group: [point])
    pool: Any = None
    asked = Task("7:1:x", {"subject": "7"})
    (answer,) = await lookups.Lookups(pool, {}).get("plans").run(None, [asked])
    assert answer.external == {"plans": ("pro", "team")}


def of_lists(subjects: list[str]) -> list[dict[str, str]]:
    return [{"id": subject, "plan": "pro"} for subject in subjects]


async def of_mappings(subjects: list[str]) -> Mapping[str, Mapping[str, str]]:
    return {subject: {"plan": "pro"} for subject in subjects}


@pytest.mark.parametrize("function", ["of_lists", "of_mappings"])
async def test_a_python_function_is_called(
    database: str,
    connection: asyncpg.Connection,
    monkeypatch: pytest.MonkeyPatch,
    function: str,
) -> None:
    point = EntryPoint("plans", f"tests.engine.test_lookups:{function}", lookups.GROUP)
    monkeypatch.setattr(lookups, "entry_points", lambda group: [point])
    recorder = Recorder()
    await ask_plan(connection)
    await use(connection, "plans")
    async with running_engine(database, {"Note": recorder}):
        await enroll(connection, "s", "ada")
        await until(connection, ALL_ENDED)
    assert recorder.views[0]["external"]["plan"] == "pro"


SLOW = "CREATE SCHEMA slow;" + "".join(
    f"CREATE FUNCTION slow.{name}(subjects text[]) RETURNS TABLE (subject text, data jsonb)"
    " LANGUAGE sql AS $$ SELECT 'x', '{}'::jsonb FROM pg_sleep(3600) $$;"
    for name in ("one", "two", "three", "four", "five", "six")
)
SLEEPING = (
    "SELECT count(*) = 3 FROM pg_stat_activity"
    " WHERE datname = current_database() AND wait_event = 'PgSleep'"
)


async def ask_slow(connection: asyncpg.Connection) -> None:
    """Sequences whose lookups hang: more than the engine has connections."""
    await connection.execute(SLOW)
    for name in ("one", "two", "three", "four", "five", "six"):
        await define(connection, name, ("has-pro", "Conditional", PRO, None))
        await connection.execute(
            "UPDATE sequencer.sequences SET lookup = $1 WHERE name = $2", f"slow.{name}", name
        )
        for n in range(3):
            await enroll(connection, name, f"u{n}")


@pytest.mark.slow
async def test_slow_lookups_delay_nothing_else(
    database: str, connection: asyncpg.Connection
) -> None:
    note = Recorder()
    async with running_engine(database, {"Note": note}):
        await ask_slow(connection)
        await until(connection, SLEEPING)
        await define(connection, "s", ("note", "Note", "{}", None))
        await enroll(connection, "s", "ada")
        await until(
            connection,
            "SELECT status = 'completed' FROM sequencer.enrollments WHERE sequence = 's'",
        )
        assert await connection.fetchval(SLEEPING)


async def test_a_stop_waits_for_no_lookup_and_gives_its_enrollments_back(
    database: str, connection: asyncpg.Connection
) -> None:
    """As if never leased: another daemon looks up at once, and no attempt is lost."""
    await ask_slow(connection)
    await connection.execute("UPDATE sequencer.enrollments SET attempt = 2")
    async with (
        asyncio.timeout(PATIENCE),
        running_engine(database, {"Note": Recorder()}, stop_timeout=3600),
    ):
        await until(connection, SLEEPING)
    rows = await connection.fetch("SELECT *, wake_at <= now() AS is_due FROM sequencer.enrollments")
    states = {(row["attempt"], row["leased_by"], row["is_due"], row["last_error"]) for row in rows}
    assert states == {(2, None, True, None)}
    assert not await connection.fetchval(
        "SELECT EXISTS (SELECT FROM sequencer.events WHERE action <> 'enrolled')"
    )


@pytest.mark.parametrize("through_pooler", [False, True])
async def test_the_server_ends_a_slow_lookup(
    database: str, connection: asyncpg.Connection, tmp_path: Path, through_pooler: bool
) -> None:
    await connection.execute(ACCOUNTS + SLOW)
    with pgbouncer(database, tmp_path) if through_pooler else nullcontext(database) as url:
        pool = await connections.connect_pool(shard(url), 1, pooled=through_pooler)
        made = lookups.Lookups(pool, {}, timeout=0.2)
        (found,) = await made.get("slow.one").run(None, [task()])
        assert found.message == "lookup 'slow.one' failed: no answer within 0.2 seconds"
        # what holds for it holds for no other
        async with pool.acquire() as other:
            assert await other.fetchval("SHOW statement_timeout") == "0"
            (found,) = await made.get("app.plans").run(None, [task()])
            assert "have held all of database.lookup_connections (1) for 0.2 s" in found.message
            waiting = asyncio.create_task(made._by_sql("app.plans", []))
            while connections.longest_wait(pool) == 0:  # noqa: ASYNC110 - it sets no event
                await asyncio.sleep(0.01)
        assert await waiting == {}
        assert connections.longest_wait(pool) == 0
        await pool.close()


def test_exhausted_connections_are_a_reason() -> None:
    health = Health(Metrics(), str, lambda: None, sweep=60, lease=30)
    waited = 4.0
    health.waits = {"lookups": lambda: waited}
    reason = "all connections for lookups have been in use for 6 s"
    assert reason not in health.why_not_ready()
    waited = 6.0
    assert reason in health.why_not_ready()
