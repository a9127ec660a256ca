"""HTTP runners with endpoints that have limits, and with unusual answers."""

from __future__ import annotations

import gzip
import json
import zlib
from typing import Any

import pytest

from sequencerd.core.task import Answer, Failed, NotStarted, Result
from sequencerd.runners.encodings import MAX_MEMBERS
from sequencerd.runners.http_client import MAX_ANSWER
from tests.helpers import servers
from tests.helpers.runners import http_runner
from tests.helpers.servers import HttpServer, Request, http_server, task


def ids(request: Request) -> list[int]:
    """Return the ids in a request."""
    return [runner["id"] for runner in json.loads(request.body)["runners"]]


def answer_all(request: Request, **headers: str) -> servers.Answer:
    """`next` for all."""
    items = [{"id": id_, "action": "next"} for id_ in ids(request)]
    return servers.Answer(body=json.dumps(items).encode(), headers=headers)


async def run(server: HttpServer, count: int, size: int = 10, **options: Any) -> list[Result]:
    """One batch of enrollments with so much data each."""
    made = http_runner(server.url, **options)
    tasks = [task(n, text="x" * size) for n in range(count)]
    results = await made.run(made.compile({"a": 1}), tasks)
    await made.close()
    return list(results)


def limited(limit: int) -> Any:
    """An endpoint like Express with a limit for the body."""

    async def respond(request: Request) -> servers.Answer:
        if len(request.body) > limit:
            return servers.Answer(413, b"request entity too large")
        return answer_all(request)

    return respond


async def test_a_batch_is_split_below_the_usual_limit() -> None:
    async with http_server(limited(100 * 1000)) as server:
        results = await run(server, 100, size=5_000)
    assert results == [Answer()] * 100
    assert [id_ for request in server.requests for id_ in ids(request)] == list(range(100))
    assert 5 <= len(server.requests) <= 8
    assert all("413" not in str(result) for result in results)


async def test_plain_answers_are_one_object_so_that_their_enrollments_move_together() -> None:
    async with http_server(limited(100 * 1000)) as server:
        results = await run(server, 30, size=5_000)
    assert len(server.requests) > 1
    assert all(result is results[0] for result in results)


async def test_a_batch_of_small_enrollments_is_one_call() -> None:
    async with http_server(limited(100 * 1000)) as server:
        assert await run(server, 100) == [Answer()] * 100
    assert len(server.requests) == 1


async def test_too_large_a_batch_is_halved_until_it_fits() -> None:
    async with http_server(limited(3_000)) as server:
        made = http_runner(server.url)
        tasks = [task(n, text="x" * 100) for n in range(100)]
        program = made.compile({})
        assert await made.run(program, tasks) == [Answer()] * 100
        refused = len(server.requests)
        assert await made.run(program, tasks) == [Answer()] * 100
        await made.close()
        again = len(server.requests) - refused
    assert again < refused  # the limit was learned


async def test_a_too_large_enrollment_fails_alone() -> None:
    async with http_server(limited(3_000)) as server:
        made = http_runner(server.url)
        tasks = [task(n, text="x" * (5_000 if n == 7 else 100)) for n in range(20)]
        results = await made.run(made.compile({}), tasks)
        await made.close()
    (bad,) = [result for result in results if result != Answer()]
    assert isinstance(bad, Failed)
    assert results[7] is bad
    assert (bad.permanent, bad.fault) == (True, "enrollment")


async def test_a_call_returns_enrollments_that_do_not_fit_its_time() -> None:
    async def respond(request: Request) -> servers.Answer:
        return answer_all(request)

    async with http_server(respond) as server:
        results = await run(server, 10, size=900, batch_bytes=1_000, timeout=2, per_second=0.4)
    assert results[0] == Answer()
    assert results[-1] == NotStarted()
    assert len(server.requests) == results.count(Answer()) < 10


async def test_a_server_that_is_down_is_called_once() -> None:
    async def respond(_: Request) -> servers.Answer:
        return servers.Answer(429, headers={"Retry-After": "7"})

    async with http_server(respond) as server:
        results = await run(server, 10, size=900, batch_bytes=1_000)
    assert len(server.requests) == 1
    assert {result.fault for result in results if isinstance(result, Failed)} == {"server"}
    assert [isinstance(result, Failed) and result.asked for result in results] == [True] + [
        False
    ] * 9


async def test_the_bound_of_an_answer_grows_with_the_batch() -> None:
    async def respond(request: Request) -> servers.Answer:
        items = [{"id": id_, "action": "next", "data": {"a": "x" * 50_000}} for id_ in ids(request)]
        return servers.Answer(body=json.dumps(items).encode())

    async with http_server(respond) as server:
        results = await run(server, 100)
    assert all(isinstance(result, Answer) for result in results)


@pytest.mark.parametrize("id_", ["7", "7.0", '"7"'])
async def test_an_id_is_a_number_or_its_text(id_: str) -> None:
    async def respond(_: Request) -> servers.Answer:
        return servers.Answer(body=f'[{{"id": {id_}, "action": "next"}}]'.encode())

    async with http_server(respond) as server:
        made = http_runner(server.url)
        assert await made.run(made.compile({}), [task(7)]) == [Answer()]
        await made.close()


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b'[{"id": 8}, {"id": "n-9"}]', "nothing for the id 7; ids received: 8, n-9"),
        (b'[{"action": "next"}]', "nothing for the id 7; ids received: none"),
        (b'[{"id": true}, {"id": 7.5}]', "ids received: none"),
        (
            json.dumps([{"id": n} for n in range(10, 20)]).encode(),
            "received: 10, 11, 12, 13, 14, ...",
        ),
    ],
)
async def test_an_answer_with_other_ids_is_reported_with_these_ids(body: bytes, says: str) -> None:
    async def respond(_: Request) -> servers.Answer:
        return servers.Answer(body=body)

    async with http_server(respond) as server:
        made = http_runner(server.url)
        (result,) = await made.run(made.compile({}), [task(7)])
        await made.close()
    assert isinstance(result, Failed)
    assert says in result.message


def raw_deflate(body: bytes) -> bytes:
    """Deflate without zlib's header, as some send it."""
    packer = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return packer.compress(body) + packer.flush()


@pytest.mark.parametrize(
    ("encoding", "pack"),
    [
        ("gzip", gzip.compress),
        ("x-gzip", gzip.compress),
        ("GZIP", lambda body: gzip.compress(body[:5]) + gzip.compress(body[5:])),
        ("deflate", zlib.compress),
        ("deflate", raw_deflate),
        ("deflate, gzip", lambda body: gzip.compress(zlib.compress(body))),
        ("identity", bytes),
        ("utf-8", bytes),  # as some servers call what is no encoding
        ("none", bytes),
        ("aws-chunked,gzip", gzip.compress),
        ("gzip", lambda body: gzip.compress(b"") * (MAX_MEMBERS - 1) + gzip.compress(body)),
        ("gzip", lambda body: gzip.compress(body) + b"\0" * 512),  # padding
    ],
)
async def test_compressed_answers_are_unpacked(encoding: str, pack: Any) -> None:
    async def respond(request: Request) -> servers.Answer:
        plain = answer_all(request)
        return servers.Answer(body=pack(plain.body), headers={"Content-Encoding": encoding})

    async with http_server(respond) as server:
        assert await run(server, 3) == [Answer()] * 3


@pytest.mark.parametrize(
    ("encoding", "body", "says"),
    [
        ("gzip", gzip.compress(b" " * (MAX_ANSWER + 1), 1, mtime=0), "when it is unpacked"),
        ("deflate", zlib.compress(b" " * MAX_ANSWER * 4, 1), "when it is unpacked"),
        (
            "gzip, gzip",
            gzip.compress(gzip.compress(b" " * MAX_ANSWER * 4, 1, mtime=0), mtime=0),
            "when it is unpacked",
        ),
        ("gzip", gzip.compress(b"[]" * 100, mtime=0)[:-20], "truncated"),
        ("gzip", b"nonsense", "cannot be read"),
        ("deflate", b"nonsense", "cannot be read"),
        ("br", b"whatever", "encoded as 'br'"),
        ("gzip", gzip.compress(b"") * (MAX_MEMBERS + 1), "more than 1000 parts"),
    ],
)
async def test_an_answer_that_cannot_be_decompressed_is_a_failure(
    encoding: str, body: bytes, says: str
) -> None:
    async def respond(_: Request) -> servers.Answer:
        return servers.Answer(body=body, headers={"Content-Encoding": encoding})

    async with http_server(respond) as server:
        (result, *_) = await run(server, 2)
    assert isinstance(result, Failed)
    assert says in result.message
    assert (result.permanent, result.unknown) == (False, True)
