"""Other runners are taken over while the engine works: nothing is lost, nothing begins twice."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any, cast

import asyncpg
import pytest
from pydantic import SecretStr

from sequencerd.core.model import Answer, Result, Task
from sequencerd.daemon import Parts, make_runners
from sequencerd.errors import SettingsError
from sequencerd.runners.suppressions import Suppressions
from sequencerd.settings import Email, HttpEndpoint, LookupEndpoint, Settings
from tests.engines import ALL_ENDED, Recorder, define, enroll, running_engine, until


class Strict(Recorder):
    """Executes only what it has compiled itself."""

    def compile(self, config: Mapping[str, Any]) -> object:
        super().compile(config)
        return self

    async def run(self, program: object, tasks: Sequence[Task]) -> Sequence[Result]:
        assert program is self
        return await super().run(program, tasks)


async def test_what_is_in_flight_ends_with_the_runner_that_began_it(
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
        await until(connection, "SELECT count(*) = 4 FROM sequencer.enrollments"
                    " WHERE leased_by IS NOT NULL")  # fmt: skip
        kept = engine._writer.lanes["Other"]
        drained = asyncio.ensure_future(
            await engine.use({"Work": new, "Other": same}, engine._writer._lookups)
        )
        assert engine._writer.lanes["Other"] is kept
        # those who found no room go on with the new one, while the old one still works
        await until(connection, "SELECT count(*) = 6 FROM sequencer.enrollments"
                    " WHERE status = 'completed'")  # fmt: skip
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


async def test_a_stop_while_the_old_one_still_works_gives_back_what_is_not_done(
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
            await engine.use({"Work": Strict()}, engine._writer._lookups)
        )
    await drained
    assert await connection.fetchval(leased) == 0
    assert await connection.fetchval("SELECT attempt FROM sequencer.enrollments") == 0


async def test_a_type_that_goes_is_a_problem_until_it_comes_back(
    database: str, connection: asyncpg.Connection
) -> None:
    async with running_engine(database, {"Work": Strict()}) as engine:
        await define(connection, "s", ("w", "Work", "{}", None))
        await until(connection, "SELECT true")
        await (await engine.use({}, engine._writer._lookups))
        id_ = await enroll(connection, "s", "u")
        await until(connection, "SELECT failure = 'invalid_step' FROM sequencer.enrollments"
                    " WHERE id = $1", id_)  # fmt: skip
        await (await engine.use({"Work": Strict()}, engine._writer._lookups))
        await until(connection, "SELECT status = 'completed' FROM sequencer.enrollments"
                    " WHERE id = $1", id_)  # fmt: skip


async def test_only_what_the_settings_change_is_made_anew() -> None:
    suppressions = Suppressions(lambda _: asyncio.sleep(0, frozenset()))
    pool = cast("asyncpg.Pool", None)
    url = "http://127.0.0.1:9/"
    before = Settings(
        runners={
            "A": HttpEndpoint(url=url),
            "B": HttpEndpoint(url=url),
            "C": HttpEndpoint(url=url),
        },
        lookups={"plans": LookupEndpoint(url=url)},
    )
    old = Parts(before, make_runners(before, suppressions), pool)
    after = before.model_copy(
        update={
            "email": Email(per_second=5),
            "runners": {
                "A": HttpEndpoint(url=url),
                "B": HttpEndpoint(url=url, secret=SecretStr("whsec_c2VjcmV0")),
                "D": HttpEndpoint(url=url),
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
    other = {"lookups": {"plans": LookupEndpoint(url=url, timeout=1)}}
    assert new.renewed(after.model_copy(update=other), suppressions).lookups is not new.lookups
    wrong = before.model_copy(update={"email": Email(url=SecretStr("smtp://x:y:z"))})
    with pytest.raises(SettingsError):
        old.renewed(wrong, suppressions)
    await new.close()
