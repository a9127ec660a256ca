"""Traces: a span for each side effect, and the context that HTTP runners get."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import asyncpg
import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from sequencerd.core.task import Answer, Failed, Result, Task
from sequencerd.runners import tracing
from tests import test_daemon
from tests.helpers import servers
from tests.helpers.engines import ALL_ENDED, Recorder, define, enroll, running_engine, until
from tests.helpers.runners import http_runner
from tests.helpers.servers import Request, all_next, http_server

mailbox = test_daemon.mailbox


@pytest.fixture
def spans() -> Iterator[InMemorySpanExporter]:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    tracing.use(provider)
    yield exporter
    tracing.use(None)
    provider.shutdown()


async def test_each_side_effect_has_a_span(
    database: str, connection: asyncpg.Connection, spans: InMemorySpanExporter
) -> None:
    async def behave(task: Task) -> Result:
        secret = Failed("ada@example.com does not exist", permanent=True)
        return secret if task.view["subject"] == "ada" else Answer()

    await define(connection, "s", ("hello", "Note", "{}", None))
    enrollments = {await enroll(connection, "s", name): name for name in ("ada", "bob")}
    async with running_engine(database, {"Note": Recorder(behave)}):
        await until(connection, ALL_ENDED)
    found = [span for span in spans.get_finished_spans() if span.name == "execute Note"]
    assert len(found) == 2
    for span in found:
        attributes = dict(span.attributes or {})
        failed = enrollments[int(str(attributes.pop("sequencerd.enrollment")))] == "ada"
        assert attributes == {
            "sequencerd.sequence": "s",
            "sequencerd.step": "hello",
            "sequencerd.visit": 1,
            "sequencerd.attempt": 1,
            "sequencerd.outcome": "refused" if failed else "next",
        }
        assert span.status.is_ok is not failed
        assert "example.com" not in span.to_json()


@pytest.mark.parametrize(("enrollments", "name"), [(1, "execute Crm"), (3, "execute Crm batch")])
async def test_an_http_runner_gets_the_context(
    database: str,
    connection: asyncpg.Connection,
    spans: InMemorySpanExporter,
    enrollments: int,
    name: str,
) -> None:
    await define(connection, "s", ("call", "Crm", "{}", None))
    async with connection.transaction():
        for number in range(enrollments):
            await enroll(connection, "s", f"u{number}")
    async with http_server(all_next) as server:
        runner = http_runner(server.url, allow_private=True)
        async with running_engine(database, {"Crm": runner}):
            await until(connection, ALL_ENDED)
        await runner.close()
    (request,) = server.requests
    _, trace_id, span_id, _ = request.headers["traceparent"].split("-")
    (called,) = [s for s in spans.get_finished_spans() if s.context.span_id == int(span_id, 16)]
    assert called.name == name
    assert called.context.trace_id == int(trace_id, 16)


async def test_without_the_setting_nothing_is_sent(
    database: str, connection: asyncpg.Connection
) -> None:
    await define(connection, "s", ("call", "Crm", "{}", None))
    await enroll(connection, "s", "ada")
    async with http_server(all_next) as server:
        runner = http_runner(server.url, allow_private=True)
        async with running_engine(database, {"Crm": runner}):
            await until(connection, ALL_ENDED)
        await runner.close()
    assert "traceparent" not in server.requests[0].headers


@pytest.mark.slow
async def test_the_daemon_exports_spans_to_the_configured_endpoint(
    database: str, connection: asyncpg.Connection, mailbox: tuple[test_daemon.Mailbox, str]
) -> None:
    async def collect(_: Request) -> servers.Answer:
        return servers.Answer()

    async with http_server(collect) as collector:
        endpoint = {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.url}
        async with test_daemon.daemon(database, mailbox[1], **endpoint):
            await test_daemon.mail_sequence(connection, 1)
            await until(connection, ALL_ENDED)
    assert {request.target for request in collector.requests} == {"/v1/traces"}
    sent = b"".join(request.body for request in collector.requests)
    assert b"execute Email" in sent
    assert b"sequencerd" in sent


def test_an_extra_that_is_missing_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http", None)
    with pytest.raises(ModuleNotFoundError):
        tracing.start({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://localhost:1"})
