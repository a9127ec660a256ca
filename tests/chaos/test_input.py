"""Random input from files, servers, applications and the network is accepted, or rejected with a
message, and all else continues. CHAOS_INPUTS is how many inputs of each kind are tried.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import asyncpg
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sequencerd.core.model import Limits
from sequencerd.core.step_types import BUILT_IN
from sequencerd.core.task import Answer, Failed, Result
from sequencerd.definitions.files import read_files
from sequencerd.runners import Runner
from sequencerd.runners.registry import make_runners
from sequencerd.settings_file import load
from tests.helpers import servers
from tests.helpers.engines import Recorder, define, enroll, running_engine, until, way
from tests.helpers.runners import email_runner, http_runner
from tests.helpers.servers import Request, http_server, task

INPUTS = int(os.environ.get("CHAOS_INPUTS", "50"))
SIZE = 10_000 if "CHAOS_SECONDS" in os.environ else 300
some = settings(
    max_examples=INPUTS,
    deadline=None,
    derandomize="CHAOS_INPUTS" not in os.environ,
    suppress_health_check=list(HealthCheck),
)

RUNNERS: dict[str, Runner] = {
    **make_runners(load({"SEQUENCERD_SMS_ACCOUNT_SID": "AC1", "SEQUENCERD_SMS_AUTH_TOKEN": "x"})),
    "Note": Recorder(),
}
TYPES = (*BUILT_IN, "Note", "Nothing")
NESTED = ("retry", "attempts", "firstDelay", "onError", "delivery", "type", "a.b", "")
KEYS = sorted(
    {
        key.alias or name
        for step_type in BUILT_IN.values()
        for name, key in step_type.config.model_fields.items()
    }.union(NESTED)
)
TEXTS = st.one_of(
    st.text(max_size=20),
    st.sampled_from(
        ["{{", "{{data.a}}", "get", "gt", "hours", "2026-01-01", "\x00", "\ud800", "a@b"]
    ),
)
ANY = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), TEXTS),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(st.one_of(st.sampled_from(KEYS), TEXTS), inner, max_size=4),
    ),
    max_leaves=15,
)


# --- files


@some
@given(type_=st.sampled_from(TYPES), config=st.dictionaries(st.sampled_from(KEYS), ANY, max_size=6))
def test_any_config_is_taken_or_refused_in_words(
    tmp_path_factory: pytest.TempPathFactory, type_: str, config: dict[str, Any]
) -> None:
    file = tmp_path_factory.mktemp("config") / "f.json"
    file.write_text(
        json.dumps({"name": "s", "steps": [{"name": "a", "type": type_, "config": config}]})
    )
    for finding in read_files([file], RUNNERS)[1]:
        assert str(finding).startswith(f"{file}:"), finding


@some
@given(
    st.one_of(
        st.binary(max_size=200),
        st.text(st.sampled_from("-{}[]:,&*!|>'\"%@`#? \n\tabname steps1"), max_size=80).map(
            str.encode
        ),
        ANY.map(lambda value: yaml.safe_dump(value, allow_unicode=True).encode(errors="replace")),
    )
)
def test_any_file_is_read_or_refused_in_words(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    file = tmp_path_factory.mktemp("file") / "f.yaml"
    file.write_bytes(content)
    for finding in read_files([file], RUNNERS)[1]:
        assert str(finding).startswith(f"{file}:"), finding


# --- answers of servers


@some
@given(
    status=st.sampled_from([200, 200, 200, 204, 302, 400, 404, 429, 500, 503]),
    body=st.one_of(
        st.binary(max_size=100),
        ANY.map(lambda value: json.dumps(value).encode()),
        st.lists(
            st.fixed_dictionaries(
                {"id": st.sampled_from([1, 2, "1", 3, None, True])},
                optional={
                    "action": st.one_of(st.sampled_from(["next", "noop"]), ANY),
                    "data": ANY,
                    "message": ANY,
                    "retryAfter": ANY,
                    "wakeAt": ANY,
                },
            ),
            max_size=4,
        ).map(lambda value: json.dumps(value).encode()),
        st.just(b"[" * 100_000),
    ),
    headers=st.dictionaries(
        st.sampled_from(["Retry-After", "Content-Type", "Content-Encoding"]),
        st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=20),
        max_size=2,
    ),
)
def test_any_answer_of_an_endpoint_is_a_result_for_each(
    status: int, body: bytes, headers: dict[str, str]
) -> None:
    async def respond(_: Request) -> servers.Answer:
        return servers.Answer(status, body, headers)

    async def ask() -> Sequence[Result]:
        async with http_server(respond) as server:
            runner = http_runner(server.url, name="Any", timeout=5)
            try:
                return await runner.run(runner.compile({}), [task(1), task(2)])
            finally:
                await runner.close()

    results = asyncio.run(ask())
    assert len(results) == 2
    assert all(isinstance(result, Answer | Failed) for result in results)


@asynccontextmanager
async def says(replies: list[bytes]) -> AsyncIterator[int]:
    """A server that sends its replies one after the other, whatever it receives, and hangs up."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            for reply in replies:
                writer.write(reply)
                await writer.drain()
                if not await reader.read(65536):
                    break
        except OSError:
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]


CODES = st.sampled_from([220, 221, 235, 250, 250, 354, 421, 450, 451, 500, 503, 550, 552, 571])
REPLIES = st.one_of(
    st.builds(
        lambda code, mark, text: f"{code}{mark}{text}\r\n".encode("latin-1", "replace"),
        CODES,
        st.sampled_from([" ", " ", " ", "-"]),
        st.text(max_size=20),
    ),
    st.binary(max_size=40),
)


@some
@given(st.lists(REPLIES, max_size=8))
def test_any_reply_of_a_mail_server_is_a_result(replies: list[bytes]) -> None:
    async def send() -> Sequence[Result]:
        async with says(replies) as port:
            runner = email_runner(f"smtp://127.0.0.1:{port}", limits=Limits(timeout=0.5))
            mail = {"from": "a@b.org", "to": "c@d.org", "subject": "x", "text": "x"}
            try:
                return await runner.run(runner.compile(mail), [task(1)])
            finally:
                await runner.close()

    (result,) = asyncio.run(send())
    assert isinstance(result, Answer | Failed)


# --- very much of it


async def test_huge_data_delay_no_other_enrollment(
    database: str, connection: asyncpg.Connection
) -> None:
    await define(connection, "s", ("a", "Note", "{}", "b"), ("b", "GoTo", "{}", None))
    await connection.execute("SET sequencer.max_data = '1GB'")
    huge = json.dumps({"a": "x" * (SIZE * 10_000)})  # 100 MB in `make chaos`
    async with running_engine(database, {"Note": Recorder()}):
        id_ = await enroll(connection, "s", "huge", huge)
        for number in range(20):
            await enroll(connection, "s", f"u{number}")
        await until(
            connection,
            "SELECT NOT EXISTS (SELECT FROM sequencer.enrollments"
            " WHERE status = 'active' AND id <> $1)",
            id_,
        )
        ended = "SELECT status <> 'active' FROM sequencer.enrollments WHERE id = $1"
        await until(connection, ended, id_)
    assert (await way(connection, id_))[-1] in ("b completed", "a failed")


async def test_very_many_sequences(database: str, connection: asyncpg.Connection) -> None:
    await connection.execute(
        f"""
        BEGIN;
        INSERT INTO sequencer.sequences (name, first_step)
            SELECT 'q' || n, 'a' FROM generate_series(1, {SIZE}) AS n;
        INSERT INTO sequencer.steps (sequence, name, type)
            SELECT 'q' || n, 'a', 'GoTo' FROM generate_series(1, {SIZE}) AS n;
        COMMIT;
        INSERT INTO sequencer.enrollments (sequence, subject)
            SELECT 'q' || n, 'ada' FROM generate_series(1, {SIZE}) AS n;
        """
    )
    async with running_engine(database):
        await until(
            connection,
            "SELECT NOT EXISTS (SELECT FROM sequencer.enrollments WHERE status = 'active')",
        )


async def test_an_endless_loop_leaves_slots_for_others(
    database: str, connection: asyncpg.Connection
) -> None:
    wait = '{"amount": 1, "unit": "milliseconds"}'
    await define(
        connection, "circle", ("a", "WaitForDuration", wait, "b"), ("b", "GoTo", "{}", "a")
    )
    await define(connection, "straight", ("a", "GoTo", "{}", None))
    async with running_engine(database):
        await connection.execute(
            "INSERT INTO sequencer.enrollments (sequence, subject)"
            " SELECT 'circle', 'u' || n FROM generate_series(1, $1::int) AS n",
            SIZE,
        )
        for number in range(20):
            id_ = await enroll(connection, "straight", f"u{number}")
            ended = "SELECT status = 'completed' FROM sequencer.enrollments WHERE id = $1"
            await until(connection, ended, id_)
        assert await connection.fetchval("SELECT min(visit) FROM sequencer.enrollments") >= 1
        await until(connection, "SELECT max(visit) > 3 FROM sequencer.enrollments")


def test_texts_that_no_database_accepts_are_refused_by_a_command(tmp_path: Path) -> None:
    """Lone surrogates and NUL: no database takes them."""
    file = tmp_path / "f.json"
    for text in ("\\ud800", "\\u0000"):
        step = f'{{"name": "a", "type": "Note", "config": {{"x": "{text}"}}}}'
        file.write_text(f'{{"name": "s", "steps": [{step}]}}')
        assert read_files([file], RUNNERS)[1], text
