"""Runners are replaced while the engine works: nothing is lost, and nothing begins twice."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

import asyncpg
import pytest
from pydantic import SecretStr

from sequencerd.core import faults, model
from sequencerd.core.javascript import sandbox
from sequencerd.core.javascript.templates import compile_template
from sequencerd.core.model import Action, InstantStep, InvalidStep, ServedElsewhere, Step
from sequencerd.core.task import Answer, Result, Task
from sequencerd.daemon import ReloadableParts
from sequencerd.definitions.compiler import build
from sequencerd.engine import catalog, loop
from sequencerd.engine.catalog import MAX_BLOCKING, Catalog
from sequencerd.engine.loop import Engine
from sequencerd.errors import SettingsError
from sequencerd.runners.registry import make_runners
from sequencerd.runners.suppression_check import Suppressions
from sequencerd.settings import EmailSettings, HttpRunnerSettings, LookupSettings, Settings
from sequencerd.storage import evaluations, sequences, wakes
from sequencerd.storage.statements import QUERIES
from tests.helpers.engines import (
    ALL_ENDED,
    LOCK_IS_HELD,
    Held,
    Recorder,
    define,
    enroll,
    running_engine,
    until,
)
from tests.helpers.waiting import PATIENCE, eventually


class Writer(Recorder):
    """Has a template."""

    def compile(self, config: Mapping[str, Any]) -> object:
        return compile_template(config["text"], escape=False)


class Strict(Recorder):
    """Executes only what it has compiled itself."""

    def compile(self, config: Mapping[str, Any]) -> object:
        super().compile(config)
        return self

    async def run(self, program: object, tasks: Sequence[Task]) -> Sequence[Result]:
        assert program is self
        return await super().run(program, tasks)


async def test_side_effects_in_flight_end_with_their_runner(
    database: str, connection: asyncpg.Connection
) -> None:
    finish = asyncio.Event()

    async def wait(_: Task) -> Result:
        await finish.wait()
        return Answer(message="old")

    async def answer(_: Task) -> Result:
        return Answer(message="new")

    old = Strict(wait, batch_size=1, concurrency=2)
    new = Strict(answer, batch_size=3, concurrency=1)
    same = Strict()
    async with running_engine(database, {"Work": old, "Other": same}) as engine:
        await define(connection, "s", ("w", "Work", "{}", "o"), ("o", "Other", "{}", None))
        for n in range(10):
            await enroll(connection, "s", f"u{n}")
        await until(
            connection, "SELECT count(*) = 4 FROM sequencer.enrollments WHERE leased_by IS NOT NULL"
        )
        kept = engine.executors.by_key["Other"]
        drained = asyncio.ensure_future(
            await engine.use({"Work": new, "Other": same}, engine.executors.lookups)
        )
        assert engine.executors.by_key["Other"] is kept
        # those that found no free slot continue with the new one, while the old one still works
        await until(
            connection, "SELECT count(*) = 6 FROM sequencer.enrollments WHERE status = 'completed'"
        )
        assert not drained.done()
        finish.set()
        await until(connection, ALL_ENDED)
        await drained
    said = await connection.fetch(
        "SELECT message, count(*) FROM sequencer.events WHERE step = 'w' AND action = 'next'"
        " GROUP BY message ORDER BY message"
    )
    assert [tuple(row) for row in said] == [("new", 6), ("old", 4)]
    assert len(old.keys) == 4
    assert len({*old.keys, *new.keys}) == len(old.keys) + len(new.keys) == 10


async def test_a_stop_during_a_reload_releases_unfinished_leases(
    database: str, connection: asyncpg.Connection
) -> None:
    async def hang(_: Task) -> Result:
        await asyncio.Event().wait()
        raise AssertionError

    async with running_engine(database, {"Work": Strict(hang)}, stop_timeout=0) as engine:
        await define(connection, "s", ("w", "Work", "{}", None))
        await enroll(connection, "s", "u")
        leased = "SELECT count(*) FROM sequencer.enrollments WHERE leased_by IS NOT NULL"
        await until(connection, f"SELECT ({leased}) = 1")
        drained = asyncio.ensure_future(
            await engine.use({"Work": Strict()}, engine.executors.lookups)
        )
    await drained
    assert await connection.fetchval(leased) == 0
    assert await connection.fetchval("SELECT attempt FROM sequencer.enrollments") == 0


async def test_a_removed_type_is_a_problem_until_it_returns(
    database: str, connection: asyncpg.Connection
) -> None:
    async with running_engine(database, {"Work": Strict()}) as engine:
        await define(connection, "s", ("w", "Work", "{}", None))
        await (await engine.use({}, engine.executors.lookups))
        id_ = await enroll(connection, "s", "u")
        await until(
            connection,
            "SELECT failure = 'invalid_step' FROM sequencer.enrollments WHERE id = $1",
            id_,
        )
        await (await engine.use({"Work": Strict()}, engine.executors.lookups))
        await until(
            connection, "SELECT status = 'completed' FROM sequencer.enrollments WHERE id = $1", id_
        )


async def test_only_changed_settings_replace_runners() -> None:
    suppressions = Suppressions(lambda _: asyncio.sleep(0, frozenset()))
    pool = cast("asyncpg.Pool", None)
    url = "http://127.0.0.1:9/"
    before = Settings(
        runners={
            "A": HttpRunnerSettings(url=url),
            "B": HttpRunnerSettings(url=url),
            "C": HttpRunnerSettings(url=url),
        },
        lookups={"plans": LookupSettings(url=url)},
    )
    old = ReloadableParts(before, make_runners(before, suppressions), pool)
    after = before.model_copy(
        update={
            "email": EmailSettings(per_second=5),
            "runners": {
                "A": HttpRunnerSettings(url=url),
                "B": HttpRunnerSettings(url=url, secret=SecretStr("whsec_c2VjcmV0")),
                "D": HttpRunnerSettings(url=url),
            },
        }
    )
    new = old.renewed(after, suppressions)
    kept = {name for name in new.runners if new.runners[name] is old.runners.get(name)}
    assert {"A", "SMS"} <= kept
    assert kept.isdisjoint({"Email", "B", "D"})
    assert "C" not in new.runners
    assert new.lookups is old.lookups
    await old.close(but=new)
    other = {"lookups": {"plans": LookupSettings(url=url, timeout=1)}}
    assert new.renewed(after.model_copy(update=other), suppressions).lookups is not new.lookups
    wrong = before.model_copy(update={"email": EmailSettings(url=SecretStr("smtp://x:y:z"))})
    with pytest.raises(SettingsError):
        old.renewed(wrong, suppressions)
    await new.close()


@pytest.mark.slow
async def test_only_changed_steps_are_compiled_without_blocking_the_loop(
    database: str, connection: asyncpg.Connection
) -> None:
    """A sequence of many steps delays no other while it is read."""
    compiled: list[str] = []
    in_turn: Counter[int] = Counter()
    turns = 0

    class Slow(Recorder):
        def compile(self, config: Mapping[str, Any]) -> object:
            compiled.append(config["subject"])
            in_turn[turns] += 1
            until = time.perf_counter() + 0.002
            while time.perf_counter() < until:
                pass
            return config

    count = 200
    await connection.execute(
        "INSERT INTO sequencer.sequences (name, first_step) VALUES ('s', 'step-1')"
    )
    async with running_engine(database, {"Note": Slow()}) as engine:

        async def turn() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        turning = asyncio.create_task(turn())
        await connection.execute(
            "INSERT INTO sequencer.steps (sequence, name, type, config)"
            " SELECT 's', 'step-' || n, 'Note', jsonb_build_object('subject', 'Hello ' || n)"
            " FROM generate_series(1, $1::int) AS n",
            count,
        )
        await engine.reload()
        assert sorted(compiled) == sorted(f"Hello {n}" for n in range(1, count + 1))
        assert max(in_turn.values()) <= MAX_BLOCKING / 0.002 + 1
        compiled.clear()
        edit = "UPDATE sequencer.steps SET config = '{\"subject\": \"Hi\"}' WHERE name = 'step-7'"
        async with connection.transaction():
            await connection.execute(edit)
            finish_rescheduling = await connection.fetch(
                "SELECT name FROM sequencer.steps WHERE reschedule_from IS NOT NULL"
            )
            assert [row["name"] for row in finish_rescheduling] == ["step-7"]
        await engine.reload()
        turning.cancel()
        assert compiled == ["Hi"]
        assert engine.catalog.sequences["s"].steps["step-7"].config == {"subject": "Hi"}
        assert len(engine.catalog.sequences["s"].steps) == count


async def test_sequences_that_swap_names_are_loaded_by_the_new_names(
    database: str, connection: asyncpg.Connection
) -> None:
    recorder = Recorder()
    async with running_engine(database, {"Note": recorder}):
        for name in ("t1", "t2", "t3"):
            await define(connection, name, ("send", "Note", f'{{"text": "{name}"}}', None))
        for swap in (
            [("t1", "x"), ("t2", "t1"), ("x", "t2")],
            [("t1", "x"), ("t2", "t1"), ("t3", "t2"), ("x", "t3")],
        ):
            async with connection.transaction():
                for names in swap:
                    await connection.execute(
                        "UPDATE sequencer.sequences SET name = $2 WHERE name = $1", *names
                    )
            recorder.programs.clear()
            for name in ("t1", "t2", "t3"):
                id_ = await enroll(connection, name, f"{name}-{len(swap)}")
                await until(
                    connection,
                    "SELECT status = 'completed' FROM sequencer.enrollments WHERE id = $1",
                    id_,
                )
            steps = await connection.fetch("SELECT config FROM sequencer.steps ORDER BY sequence")
            assert recorder.programs == [json.loads(row["config"]) for row in steps]
        async with connection.transaction():
            await connection.execute("DELETE FROM sequencer.sequences WHERE name = 't1'")
            await define(connection, "t1", ("send", "Note", '{"text": "new"}', None))
        recorder.programs.clear()
        await enroll(connection, "t1", "last")
        await until(connection, ALL_ENDED)
    assert recorder.programs == [{"text": "new"}]


async def test_renamed_steps_keep_their_enrollments(
    database: str, connection: asyncpg.Connection
) -> None:
    recorder = Recorder()
    days = '{"amount": 3, "unit": "days"}'
    async with running_engine(database, {"Note": recorder}):
        await define(
            connection,
            "s",
            ("wait", "WaitForDuration", days, "a"),
            ("a", "Note", '{"text": "A"}', "b"),
            ("b", "Note", '{"text": "B"}', None),
        )
        id_ = await enroll(connection, "s", "ada")
        await until(
            connection,
            "SELECT entered_at IS NOT NULL AND wake_at > now() FROM sequencer.enrollments",
        )
        async with connection.transaction():
            for names in (("a", "x"), ("b", "a"), ("x", "b"), ("wait", "a2"), ("a2", "wait")):
                await connection.execute(
                    "UPDATE sequencer.steps SET name = $2 WHERE name = $1", *names
                )
        await connection.execute("UPDATE sequencer.enrollments SET step = 'b' WHERE id = $1", id_)
        await until(connection, ALL_ENDED)
    assert recorder.programs == [{"text": "A"}, {"text": "B"}]


@pytest.mark.parametrize(
    "rename",
    ["UPDATE sequencer.sequences SET name = 't'", "UPDATE sequencer.steps SET name = 'x'"],
    ids=["sequence", "step"],
)
@pytest.mark.parametrize("meanwhile", [False, True])
async def test_a_rename_discards_no_result(
    database: str,
    connection: asyncpg.Connection,
    monkeypatch: pytest.MonkeyPatch,
    rename: str,
    meanwhile: bool,
) -> None:
    """A side effect has ended, and its sequence or step is renamed before its row is locked to
    write the result, or `meanwhile`: by the statement that locks it, with an older snapshot.
    """
    held, known = Held(Answer(data={"a": 1})), asyncio.Event()
    known.set()
    reload = Catalog.reload

    async def late(self: Catalog) -> list[str]:
        await known.wait()
        return await reload(self)

    monkeypatch.setattr(Catalog, "reload", late)
    recorder = Recorder(held)
    await define(connection, "s", ("a", "Note", '{"delivery": "at_most_once"}', None))
    lock = QUERIES["lock"].replace("WHERE", "WHERE pg_advisory_lock_shared(7) IS NOT NULL AND", 1)
    monkeypatch.setitem(cast("dict[str, str]", QUERIES), "lock", lock)
    waits = "SELECT EXISTS (SELECT FROM pg_stat_activity WHERE wait_event = 'advisory')"
    async with running_engine(database, {"Note": recorder}):
        await enroll(connection, "s", "ada")
        await asyncio.wait_for(held.begun.wait(), PATIENCE)
        known.clear()
        await connection.execute("SELECT pg_advisory_lock(7)")
        if meanwhile:
            held.released.set()
            await until(connection, waits)
        await connection.execute(rename)
        held.released.set()
        await until(connection, waits)
        await connection.execute("SELECT pg_advisory_unlock(7)")
        await until(connection, f"SELECT NOT ({waits})")
        known.set()
        await until(connection, ALL_ENDED)
    assert len(recorder.keys) == 1
    actions = await connection.fetch("SELECT action FROM sequencer.events ORDER BY at")
    assert [row["action"] for row in actions] == ["enrolled", "next", "completed"]


@pytest.mark.slow
def test_a_long_chain_that_never_waits_is_found_in_linear_time() -> None:
    """10,000 steps delay no enrollment."""
    links = 10_000

    def chain(end: str | None) -> dict[str, Step]:
        return {
            str(n): Step(
                "s",
                str(n),
                "GoTo",
                {},
                str(n + 1) if n + 1 < links else end,
                None,
                InstantStep(lambda _: Action.NEXT),
                n,
            )
            for n in range(links)
        }

    open_, closed = (build(model.Sequence("s", "0", "UTC", chain(end))) for end in (None, "5000"))
    assert not any(isinstance(step.behaviour, InvalidStep) for step in open_.steps.values())
    assert all(isinstance(step.behaviour, InvalidStep) for step in closed.steps.values())


@pytest.mark.slow
async def test_a_sequence_has_a_bounded_number_of_steps(connection: asyncpg.Connection) -> None:
    await connection.execute(
        "INSERT INTO sequencer.sequences (name, first_step) VALUES ('s', 'step-1')"
    )
    insert = (
        "INSERT INTO sequencer.steps (sequence, name, type)"
        " SELECT 's', 'step-' || n, 'GoTo' FROM generate_series($1::int, $2::int) AS n"
    )
    await connection.execute(insert, 1, 20_000)
    with pytest.raises(asyncpg.PostgresError, match="has 20001 steps; at most 20000"):
        await connection.execute(insert, 20_001, 20_001)


@pytest.mark.parametrize(("count", "steps"), [(150, 1), (8, 20)])
async def test_definitions_are_read_in_pages_of_about_as_many_steps(
    database: str,
    connection: asyncpg.Connection,
    monkeypatch: pytest.MonkeyPatch,
    count: int,
    steps: int,
) -> None:
    """Many small sequences take few queries, and a few large ones little memory."""
    sizes: list[int] = []
    read_some = sequences.read_some

    async def counted(connection: asyncpg.Connection, names: Sequence[str]) -> Any:
        found = await read_some(connection, names)
        sizes.append(len(found[1]))
        return found

    monkeypatch.setattr(sequences, "read_some", counted)
    monkeypatch.setattr(catalog, "STEPS_PER_READ", 50)
    await connection.execute(
        "INSERT INTO sequencer.sequences (name, first_step) SELECT 's' || n,"
        " '1' FROM generate_series(1, $1::int) AS n",
        count,
    )
    await connection.execute(
        "INSERT INTO sequencer.steps (sequence, name, type)"
        " SELECT 's' || n, m, 'GoTo' FROM generate_series(1, $1::int) AS n,"
        " generate_series(1, $2::int) AS m",
        count,
        steps,
    )
    async with running_engine(database, {}) as engine:
        assert len(engine.catalog.sequences) == count
    assert sum(sizes) == count * steps
    assert len(sizes) < 12
    assert max(sizes) <= catalog.STEPS_PER_READ


async def many_sequences(connection: asyncpg.Connection, count: int) -> None:
    """Define sequences "s1" to "s100", each with a step "wait"."""
    async with connection.transaction():
        await connection.execute(
            "INSERT INTO sequencer.sequences (name, first_step)"
            " SELECT 's' || n, 'wait' FROM generate_series(1, $1::int) AS n",
            count,
        )
        await connection.execute(
            "INSERT INTO sequencer.steps (sequence, name, type, config)"
            " SELECT 's' || n, 'wait', 'WaitForDuration', $2 FROM generate_series(1, $1::int) AS n",
            count,
            DAYS,
        )


DAYS = '{"amount": 3, "unit": "days"}'
EDIT = (
    "UPDATE sequencer.steps SET config = jsonb_set(config, '{amount}', to_jsonb($2::int))"
    " WHERE sequence = $1"
)


def amount(engine: Engine, sequence: str) -> object:
    """Return the amount in the config of a sequence's step."""
    step = engine.catalog.step((sequence, "wait"))
    return step and step.config["amount"]


class Reads(NamedTuple):
    """The numbers of rows that each read of definitions has returned."""

    revisions: list[int]
    sequences: list[int]


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Reads:
    found = Reads([], [])
    read_revisions, read_some = sequences.read_revisions, sequences.read_some

    async def revisions(*arguments: Any) -> dict[str, int]:
        rows = await read_revisions(*arguments)
        found.revisions.append(len(rows))
        return rows

    async def some(*arguments: Any) -> Any:
        rows = await read_some(*arguments)
        found.sequences.append(len(rows[0]))
        return rows

    monkeypatch.setattr(sequences, "read_revisions", revisions)
    monkeypatch.setattr(sequences, "read_some", some)
    return found


async def test_an_edit_reads_its_sequence_alone(
    database: str, connection: asyncpg.Connection, reads: Reads
) -> None:
    """An edit costs the same beside ten thousand other sequences."""
    await many_sequences(connection, 100)
    async with running_engine(database, sweep=3600) as engine:
        assert sum(reads.sequences) == 100
        # while other sessions of the server commit, earlier notifications arrive after LISTEN
        await connection.execute(EDIT, "s7", 4)
        await eventually(lambda: amount(engine, "s7") == 4)
        reads.revisions.clear()
        reads.sequences.clear()
        await connection.execute(EDIT, "s7", 5)
        await eventually(lambda: amount(engine, "s7") == 5)
        await connection.execute("UPDATE sequencer.sequences SET name = 'x' WHERE name = 's8'")
        await eventually(lambda: {"s8", "x"} & engine.catalog.sequences.keys() == {"x"})
        await connection.execute("DELETE FROM sequencer.sequences WHERE name = 's9'")
        await eventually(lambda: "s9" not in engine.catalog.sequences)
        assert len(engine.catalog.sequences) == 99
    assert max(reads.revisions) <= 2
    assert max(reads.sequences) <= 2


async def test_a_claim_without_a_result_reads_its_sequence_alone(
    database: str, connection: asyncpg.Connection, reads: Reads
) -> None:
    await many_sequences(connection, 100)
    await enroll(connection, "s7", "ada")
    async with running_engine(database) as engine:
        await until(connection, "SELECT entered_at IS NOT NULL FROM sequencer.enrollments")
        reads.revisions.clear()
        engine._push_now(("s7", "wait"))
        await eventually(lambda: reads.revisions)
    assert max(reads.revisions) == 1


async def test_too_many_changed_sequences_are_read_at_once(
    database: str,
    connection: asyncpg.Connection,
    monkeypatch: pytest.MonkeyPatch,
    reads: Reads,
) -> None:
    monkeypatch.setattr(catalog, "MAX_WANTED", 10)
    await many_sequences(connection, 100)
    names = [f"s{n}" for n in range(1, 12)]
    async with running_engine(database, sweep=3600) as engine:
        await connection.execute(EDIT, "s7", 4)
        await eventually(lambda: amount(engine, "s7") == 4)
        for count, read in ((10, 10), (11, 100)):
            reads.revisions.clear()
            await engine.reload(names[:count])
            assert max(reads.revisions) == read


def test_names_that_may_be_anything_are_searched_once_and_not_without_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(catalog, "MAX_UNKNOWN", 2)
    unread = Catalog(cast("Any", None), {}, lambda _: None, lambda: None)
    assert [unread.should_load(name) for name in "aabbc"] == [True, False, True, False, False]


async def test_edits_that_commit_while_definitions_are_read_are_read_as_well(
    database: str, connection: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One commits before the snapshot of the definitions, one after it."""
    await many_sequences(connection, 3)
    read_revisions, read_some = sequences.read_revisions, sequences.read_some
    edits = [("s1", 6), ("s1", 7), ("s2", 8)]

    async def edit_next() -> None:
        if edits:
            await connection.execute(EDIT, *edits.pop(0))

    async def revisions(*arguments: Any) -> dict[str, int]:
        found = await read_revisions(*arguments)
        await edit_next()
        return found

    async def some(*arguments: Any) -> Any:
        found = await read_some(*arguments)
        await edit_next()
        return found

    async with running_engine(database) as engine:
        monkeypatch.setattr(sequences, "read_revisions", revisions)
        monkeypatch.setattr(sequences, "read_some", some)
        await connection.execute(EDIT, "s1", 5)
        await eventually(lambda: (amount(engine, "s1"), amount(engine, "s2")) == (7, 8))
    assert edits == []


async def test_edits_that_commit_in_another_order_than_they_began_are_read(
    database: str, connection: asyncpg.Connection
) -> None:
    """The later revision is visible first."""
    await many_sequences(connection, 2)
    other = await asyncpg.connect(database)
    async with running_engine(database) as engine:
        async with other.transaction():
            await other.execute(EDIT, "s1", 5)
            await connection.execute(EDIT, "s2", 6)
            await eventually(lambda: amount(engine, "s2") == 6)
            assert amount(engine, "s1") == 3
        await eventually(lambda: amount(engine, "s1") == 5)
        known = engine.catalog.sequences
        assert known["s1"].revision < known["s2"].revision
    await other.close()


async def test_a_sequence_that_is_deleted_while_it_is_read_is_forgotten(
    database: str, connection: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    await many_sequences(connection, 2)
    read_revisions = sequences.read_revisions

    async def deleting(*arguments: Any) -> dict[str, int]:
        found = await read_revisions(*arguments)
        await connection.execute("DELETE FROM sequencer.sequences WHERE name = 's1'")
        return found

    async with running_engine(database) as engine:
        monkeypatch.setattr(sequences, "read_revisions", deleting)
        await connection.execute(EDIT, "s1", 5)
        await eventually(lambda: "s1" not in engine.catalog.sequences)
        assert amount(engine, "s2") == 3


def failing_once(
    function: Callable[..., Awaitable[Any]],
) -> tuple[Callable[..., Awaitable[Any]], list[ConnectionResetError]]:
    """Return a function that loses its connection at its first call, and the errors so far."""
    failures: list[ConnectionResetError] = []

    async def failing(*arguments: Any) -> Any:
        if not failures:
            failures.append(ConnectionResetError())
            raise failures[0]
        return await function(*arguments)

    return failing, failures


async def test_edits_are_not_forgotten_if_they_cannot_be_read(
    database: str, connection: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    await many_sequences(connection, 2)
    failing, failures = failing_once(sequences.read_some)
    async with running_engine(database) as engine:
        monkeypatch.setattr(sequences, "read_some", failing)
        await connection.execute(EDIT, "s1", 5)
        await eventually(lambda: amount(engine, "s1") == 5)
    assert len(failures) == 1


async def test_what_a_fixed_step_had_failed_is_resumed_after_an_error_of_the_database(
    database: str, connection: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new definition is known by then, and its report is repeated."""
    failing, failures = failing_once(sequences.failed_steps)
    await define(connection, "s", ("a", "Note", '{"bad": true}', None))
    async with running_engine(database, {"Note": Recorder()}):
        await enroll(connection, "s", "ada")
        await until(connection, "SELECT failure = 'invalid_step' FROM sequencer.enrollments")
        monkeypatch.setattr(sequences, "failed_steps", failing)
        await connection.execute("UPDATE sequencer.steps SET config = '{}'")
        await until(connection, "SELECT status = 'completed' FROM sequencer.enrollments")
    assert len(failures) == 1


@pytest.mark.usefixtures("no_polls")
async def test_a_resumed_sequence_continues_after_an_error_of_the_database(
    database: str, connection: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its definition is known by then, and its wake times are read again."""
    failing, failures = failing_once(wakes.first_wakes_of)
    await define(connection, "s", ("a", "Note", "{}", None))
    await connection.execute("UPDATE sequencer.sequences SET status = 'paused'")
    await enroll(connection, "s", "ada")
    async with running_engine(database, {"Note": Recorder()}, sweep=3600):
        await until(connection, LOCK_IS_HELD)  # before, only a poll finds what has changed
        monkeypatch.setattr(loop, "first_wakes_of", failing)
        await connection.execute("UPDATE sequencer.sequences SET status = 'active'")
        await until(connection, ALL_ENDED)
    assert len(failures) == 1


@pytest.mark.usefixtures("no_polls")
async def test_a_sequence_that_a_sweep_finds_resumed_continues_after_an_error_of_the_database(
    database: str, connection: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next sweep knows its definition, and is a minute away."""
    failing, failures = failing_once(evaluations.unfinished_rescheduling)
    await define(connection, "s", ("a", "Note", "{}", None))
    await connection.execute("UPDATE sequencer.sequences SET status = 'paused'")
    await enroll(connection, "s", "ada")
    async with running_engine(database, {"Note": Recorder()}, sweep=3600) as engine:
        await until(connection, LOCK_IS_HELD)  # before, only a poll finds what has changed
        monkeypatch.setattr(evaluations, "unfinished_rescheduling", failing)
        await connection.execute("SET sequencer.notify = off")
        await connection.execute("UPDATE sequencer.sequences SET status = 'active'")
        with pytest.raises(ConnectionError):
            await engine.sweep(whole=False)
        await until(connection, ALL_ENDED)
    assert len(failures) == 1


async def test_silent_edits_are_found_by_the_sweep(
    database: str, connection: asyncpg.Connection
) -> None:
    await many_sequences(connection, 2)
    async with running_engine(database, sweep=3600) as engine:
        async with connection.transaction():
            await connection.execute("SET LOCAL sequencer.notify = off")
            await connection.execute(EDIT, "s1", 5)
            await connection.execute("DELETE FROM sequencer.sequences WHERE name = 's2'")
        await connection.execute("SELECT pg_notify('sequencer', '{\"definitions\": \"s0\"}')")
        await engine.reload(())
        assert amount(engine, "s1") == 3
        await engine.sweep()
        assert amount(engine, "s1") == 5
        assert engine.catalog.sequences.keys() == {"s1"}


@pytest.fixture
def slow_template(monkeypatch: pytest.MonkeyPatch) -> Iterator[Compiling]:
    """Large templates are not compiled until `go` is set."""
    one = Compiling(threading.Event(), threading.Event(), [])
    ask = sandbox.ask

    def slowly(maker: Any, text: str) -> str:
        one.begun.set()
        if threading.current_thread() is threading.main_thread():
            one.held_up.append(text)
        else:
            assert one.go.wait(PATIENCE)
        return ask(maker, text)

    monkeypatch.setattr(sandbox, "ask", slowly)
    yield one
    one.go.set()


class Compiling(NamedTuple):
    """A template that is compiled: what has `begun`, may `go` on, and was compiled in the loop."""

    begun: threading.Event
    go: threading.Event
    held_up: list[str]


def large_template(word: str) -> tuple[str, str, str, None]:
    """A step with a template, which is compiled once in each process."""
    return "a", "Write", json.dumps({"text": f"{{{{data.{word}}}}}" * 500}), None


async def test_others_proceed_while_a_large_template_is_read(
    database: str,
    connection: asyncpg.Connection,
    monkeypatch: pytest.MonkeyPatch,
    slow_template: Compiling,
) -> None:
    """Also at a step of which a claim finds nothing, as if the clock were behind."""
    await define(connection, "other", ("a", "GoTo", "{}", None))
    async with running_engine(database, {"Write": Writer()}, sweep=3600) as engine:
        await define(connection, "s", large_template("large"))
        await eventually(slow_template.begun.is_set)
        found_nothing, request = asyncio.Event(), engine.catalog.request

        def request_reload(names: Iterable[str]) -> None:
            found_nothing.set()
            request(names)

        monkeypatch.setattr(engine.catalog, "request", request_reload)
        engine._push_now(("other", "a"))
        await found_nothing.wait()
        other = await enroll(connection, "other", "ada")
        ended = "SELECT status = 'completed' FROM sequencer.enrollments WHERE id = $1"
        await until(connection, ended, other)
        slow_template.go.set()
        await enroll(connection, "s", "ada")
        await until(connection, ALL_ENDED)
    assert await connection.fetchval("SELECT bool_and(failure IS NULL) FROM sequencer.enrollments")
    assert not slow_template.held_up


async def test_results_of_others_are_written_while_a_large_template_is_read(
    database: str, connection: asyncpg.Connection, slow_template: Compiling
) -> None:
    """Though they end together with those of a sequence that has changed."""
    work = Held()
    await define(connection, "edited", ("a", "Work", "{}", None))
    await define(connection, "other", ("a", "Work", "{}", None))
    runners = {"Write": Writer(), "Work": Recorder(work, batch_size=1, concurrency=20)}
    async with running_engine(database, runners, sweep=3600):
        for n in range(5):
            await enroll(connection, "edited", f"u{n}")
            await enroll(connection, "other", f"u{n}")
        await until(
            connection,
            "SELECT count(*) = 10 FROM sequencer.enrollments WHERE leased_by IS NOT NULL",
        )
        await define(connection, "s", large_template("larger"))
        await eventually(slow_template.begun.is_set)
        await connection.execute(
            "UPDATE sequencer.steps SET config = '{\"new\": 1}' WHERE sequence = 'edited'"
        )
        work.released.set()
        ended = "SELECT count(*) = 5 FROM sequencer.events WHERE action = 'next' AND sequence = $1"
        await until(connection, ended, "other")
        slow_template.go.set()
        await until(connection, ended, "edited")
        await until(connection, ALL_ENDED)


class Permits(NamedTuple):
    """Large templates are compiled one after the other, when each is permitted; and how often."""

    semaphore: threading.Semaphore
    compiled: Counter[str]


@pytest.fixture
def permits(monkeypatch: pytest.MonkeyPatch) -> Permits:
    """Each reading of definitions compiles only one large template that contains "slow"."""
    one = Permits(threading.Semaphore(0), Counter())
    ask = sandbox.ask

    def slowly(maker: Any, text: str) -> str:
        if "slow" in text:
            one.compiled[text] += 1
            assert one.semaphore.acquire(timeout=PATIENCE)
        return ask(maker, text)

    monkeypatch.setattr(sandbox, "ask", slowly)
    monkeypatch.setattr(catalog, "MAX_COMPILING", 0.0)
    return one


def slow_steps(word: str, count: int) -> list[tuple[str, str, str, None]]:
    """Steps with templates that no other test has compiled."""
    return [(f"{n}", *large_template(f"slow{word}{n}")[1:]) for n in range(count)]


@pytest.mark.parametrize("another", ["wait", "template"])
async def test_others_are_read_between_the_large_templates_of_a_sequence(
    database: str, connection: asyncpg.Connection, permits: Permits, another: str
) -> None:
    """The others have changed meanwhile. What was compiled is not compiled again."""
    count = 6
    async with running_engine(database, {"Write": Writer()}, sweep=3600) as engine:
        await define(connection, "hostile", *slow_steps(another, count))
        await eventually(lambda: permits.compiled)
        if another == "wait":
            await define(connection, "other", ("a", "WaitForDuration", DAYS, None))
        else:
            await define(connection, "other", large_template(another))
        await enroll(connection, "other", "ada")
        permits.semaphore.release(2)  # the one that is compiled, and the next one
        await eventually(lambda: engine.catalog.step(("other", "a")))
        await until(connection, "SELECT entered_at IS NOT NULL FROM sequencer.enrollments")
        assert "hostile" not in engine.catalog.sequences
        permits.semaphore.release(count)
        await eventually(lambda: "hostile" in engine.catalog.sequences)
        assert not engine.catalog.is_due
    assert set(permits.compiled.values()) == {1}
    assert len(permits.compiled) == count


async def test_sequences_with_large_templates_take_turns(
    database: str, connection: asyncpg.Connection, permits: Permits
) -> None:
    async with running_engine(database, {"Write": Writer()}, sweep=3600) as engine:
        async with connection.transaction():
            await define(connection, "a", *slow_steps("a", 6))
            await define(connection, "b", *slow_steps("b", 2))
        permits.semaphore.release(5)
        await eventually(lambda: "b" in engine.catalog.sequences)
        assert "a" not in engine.catalog.sequences
        permits.semaphore.release(5)
        await eventually(lambda: "a" in engine.catalog.sequences)


async def test_a_changed_step_is_rescheduled_when_its_sequence_is_read(
    database: str, connection: asyncpg.Connection, permits: Permits
) -> None:
    async with running_engine(database, {"Write": Writer()}, sweep=3600) as engine:
        await define(connection, "s", ("wait", "WaitForDuration", DAYS, None))
        await enroll(connection, "s", "ada")
        await until(connection, "SELECT entered_at IS NOT NULL FROM sequencer.enrollments")
        async with connection.transaction():
            await connection.execute(EDIT, "s", 9)
            await connection.executemany(
                "INSERT INTO sequencer.steps (sequence, name, type, config)"
                " VALUES ('s', $1, $2, $3)",
                [step[:3] for step in slow_steps("later", 3)],
            )
        for number in range(3):
            await eventually(lambda number=number: len(permits.compiled) > number)  # type: ignore[misc]
            assert amount(engine, "s") == 3
            permits.semaphore.release()
        await until(
            connection,
            "SELECT wake_at - entered_at > interval '8 days' FROM sequencer.enrollments",
        )


async def test_other_runners_are_used_when_all_large_templates_are_compiled(
    database: str, connection: asyncpg.Connection, permits: Permits
) -> None:
    async with running_engine(database, {"Write": Writer()}, sweep=3600) as engine:
        await define(connection, "s", *slow_steps("anew", 3))
        permits.semaphore.release(3)
        await eventually(lambda: "s" in engine.catalog.sequences)
        await (await engine.use({"Write": Writer()}, engine.executors.lookups))
        assert engine.catalog.sequences.keys() == {"s"}


async def test_a_type_that_another_daemon_serves_meanwhile_is_compiled_again(
    database: str, connection: asyncpg.Connection, permits: Permits
) -> None:
    async with running_engine(database, {"Write": Writer()}, sweep=3600) as engine:
        await define(connection, "s", ("x", "Elsewhere", "{}", None), *slow_steps("shared", 3))
        await eventually(lambda: permits.compiled)
        await connection.execute(
            "INSERT INTO sequencer.daemons (name, alive_until, types)"
            " VALUES ('other', now() + interval '1 hour', '{Elsewhere}')"
        )
        permits.semaphore.release(3)
        await eventually(lambda: "s" in engine.catalog.sequences)
        step = engine.catalog.step(("s", "x"))
        assert step is not None
        assert isinstance(step.behaviour, ServedElsewhere)


SILENTLY = "SET sequencer.notify = off"


async def test_a_result_has_a_changed_definition_read_that_was_not_notified(
    database: str, connection: asyncpg.Connection
) -> None:
    work = Held()
    await define(connection, "s", ("a", "Work", "{}", None))
    await enroll(connection, "s", "ada")
    async with running_engine(database, {"Work": Recorder(work)}, sweep=3600):
        await work.begun.wait()
        await connection.execute(SILENTLY)
        await connection.execute("UPDATE sequencer.steps SET config = '{\"new\": 1}'")
        work.released.set()
        await until(connection, ALL_ENDED)


async def test_a_claim_has_a_definition_read_that_was_not_notified(
    database: str, connection: asyncpg.Connection
) -> None:
    async with running_engine(database, {"Note": Recorder()}, sweep=3600) as engine:
        await connection.execute(SILENTLY)
        await define(connection, "s", ("a", "Note", "{}", None))
        await enroll(connection, "s", "ada")
        await engine.rebuild()
        await until(connection, ALL_ENDED)


async def test_a_template_that_once_took_too_long_is_read_again_by_the_sweep(
    database: str, connection: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a machine that was busy for a moment. What has failed meanwhile continues."""
    reads: list[str] = []
    ask = sandbox.ask

    def counting(maker: Any, text: str) -> str:
        reads.append(text)
        return ask(maker, text)

    monkeypatch.setattr(sandbox, "ask", counting)
    step = ("a", "Write", json.dumps({"text": "{{data.seldom}}" * 500}), None)
    failed = "SELECT count(*) = 1 FROM sequencer.failures WHERE failure = 'invalid_step'"
    async with running_engine(database, {"Write": Writer()}) as engine:
        with monkeypatch.context() as busy:
            busy.setattr(sandbox, "COMPILE_SECONDS", 0.01)
            await define(connection, "s", step)
            await enroll(connection, "s", "ada")
            await until(connection, failed)
            first = len(reads)
            for _ in range(8):
                await engine.sweep(whole=False)
        assert first < len(reads)
        for _ in range(8 + len(reads)):  # it is due after twice as many attempts
            await engine.sweep(whole=False)
        await until(connection, ALL_ENDED)
        assert not await connection.fetchval("SELECT count(*) FROM sequencer.problems")
        before = len(reads)
        await engine.sweep(whole=False)
        assert len(reads) == before


async def test_the_first_wake_times_are_searched_while_definitions_are_read(
    database: str, connection: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With many of both, the server and the daemon work at the same time."""
    await many_sequences(connection, 2)
    await enroll(connection, "s1", "ada")
    search, read_some = wakes.first_wakes, sequences.read_some
    searching, reading = asyncio.Event(), asyncio.Event()

    async def first_wakes(*arguments: Any) -> Any:
        searching.set()
        await reading.wait()
        return await search(*arguments)

    async def some(*arguments: Any) -> Any:
        reading.set()
        await searching.wait()
        return await read_some(*arguments)

    monkeypatch.setattr("sequencerd.engine.loop.first_wakes", first_wakes)
    monkeypatch.setattr(sequences, "read_some", some)
    async with running_engine(database):
        await until(connection, "SELECT entered_at IS NOT NULL FROM sequencer.enrollments")


async def test_the_problem_of_a_step_with_very_many_errors_is_limited(
    database: str, connection: asyncpg.Connection
) -> None:
    config = json.dumps({"any": [{"bad": number} for number in range(1000)]})
    await define(connection, "s", ("a", "Conditional", config, None))
    async with running_engine(database) as engine:
        problem = await connection.fetchval("SELECT problem FROM sequencer.steps")
        assert problem.startswith("any.0.bad: an any has no key 'bad'")
        assert len(problem) == faults.MAX_MESSAGE + len("...")
        # it is known, and not reported again
        version = "SELECT xmin::text FROM sequencer.steps"
        before = await connection.fetchval(version)
        engine.catalog._unfinished.add("s")
        await engine.reload()
        assert await connection.fetchval(version) == before


async def test_no_limit_of_transactions_ends_a_reload_whose_definitions_compile_for_long(
    database: str, connection: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Slow(Recorder):
        def compile(self, config: Mapping[str, Any]) -> object:
            time.sleep(0.6)  # longer than the limits
            return config

    idle = "idle_in_transaction_session_timeout', '{}"
    soon = QUERIES["prepare_session"].replace(idle.format("30s"), idle.format("300ms"))
    assert soon != QUERIES["prepare_session"]
    monkeypatch.setitem(cast("dict[str, str]", QUERIES), "prepare_session", soon)
    limit = "transaction_timeout"  # since PostgreSQL 17
    if await connection.fetchval("SELECT current_setting($1, true) IS NOT NULL", limit):
        name = await connection.fetchval("SELECT current_database()")
        await connection.execute(f"ALTER DATABASE \"{name}\" SET {limit} = '300ms'")
    await define(connection, "s", ("a", "Note", "{}", None))
    recorder = Slow()
    async with running_engine(database, {"Note": Recorder()}) as one:
        async with asyncio.timeout(PATIENCE):
            await (await one.use({"Note": recorder}, one.executors.lookups))
        await enroll(connection, "s", "ada")
        await until(connection, ALL_ENDED)
    assert len(recorder.keys) == 1


async def test_a_change_that_is_reported_during_a_reload_is_not_forgotten(
    database: str, connection: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    await many_sequences(connection, 2)
    read = wakes.first_wakes_of
    names: list[set[str]] = []
    async with running_engine(database, sweep=3600) as engine:

        async def noted(reading: asyncpg.Connection, changed: Iterable[str]) -> object:
            names.append({*changed})
            if len(names) == 1:  # as a sweep does that reads another change
                engine._changed.add("s1")
                engine.catalog.request(["s1"])
            return await read(reading, changed)

        await until(connection, LOCK_IS_HELD)
        monkeypatch.setattr(loop, "first_wakes_of", noted)
        await connection.execute(EDIT, "s1", 5)
        await eventually(lambda: len(names) == 2)
    assert names == [{"s1"}, {"s1"}]
