"""Runners and lookups on AWS Lambda, against a server that verifies signatures."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from sequencerd.cli import doctor_endpoints
from sequencerd.core.task import Answer, Failed, NotStarted, Result
from sequencerd.errors import SettingsError
from sequencerd.runners import registry
from sequencerd.runners.aws_lambda import MAX_EVENT
from sequencerd.settings import LookupSettings, Settings
from sequencerd.settings_file import load
from tests.helpers import servers
from tests.helpers.aws import (
    ARN,
    KEY_ID,
    SECRET,
    TOKEN,
    aws,
    refusal,
    score,
    use_credentials,
)
from tests.helpers.engines import define, enroll, running_engine, until
from tests.helpers.servers import HttpServer, http_server, task


def function_error(**told: str) -> servers.Answer:
    return servers.Answer(200, json.dumps(told).encode(), {"X-Amz-Function-Error": "Unhandled"})


@pytest.fixture(autouse=True)
def credentials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    use_credentials(monkeypatch, tmp_path)


async def run(
    server: HttpServer, monkeypatch: pytest.MonkeyPatch, *ids: int, arn: str = ARN, **data: Any
) -> list[Result]:
    monkeypatch.setenv("AWS_ENDPOINT_URL_LAMBDA", server.url)
    settings = Settings.model_validate({"runners": {"Score": {"lambda": arn}}})
    runner = registry.make_runners(settings)["Score"]
    try:
        program = runner.compile({"model": "activity"})
        return list(await runner.run(program, [task(id_, **data) for id_ in ids or (7,)]))
    finally:
        await runner.close()


async def test_a_deployed_function_works_unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    async with http_server(aws({ARN: score})) as server:
        assert await run(server, monkeypatch, 7, 8) == [Answer(), Answer()]
        monkeypatch.setenv("AWS_SESSION_TOKEN", TOKEN)
        assert await run(server, monkeypatch) == [Answer()]
    first, second = server.requests
    assert first.headers["x-amz-invocation-type"] == "RequestResponse"
    assert json.loads(first.body)["config"] == {"model": "activity"}
    assert "x-amz-security-token" not in first.headers
    assert second.headers["x-amz-security-token"] == TOKEN
    assert "x-amz-security-token" in second.headers["authorization"]


async def test_credentials_come_from_where_aws_tools_look(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    async with http_server(aws({ARN: score})) as server:
        (missing,) = await run(server, monkeypatch)
        assert isinstance(missing, Failed)
        assert missing.message.startswith("Score: no AWS credentials: give the daemon a role")
        assert (missing.fault, missing.cause, missing.unknown) == ("server", "refused", False)
        assert not server.requests
        monkeypatch.setenv("AWS_PROFILE", "jobs")
        (unknown,) = await run(server, monkeypatch)
        assert isinstance(unknown, Failed)
        assert "Score: AWS credentials: The config profile (jobs)" in unknown.message
        assert unknown.fault == "server"
        (tmp_path / "credentials").write_text(
            f"[jobs]\naws_access_key_id = {KEY_ID}\naws_secret_access_key = {SECRET}\n"
        )
        assert await run(server, monkeypatch) == [Answer()]


async def test_a_wrong_key_is_the_operators_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "other")
    async with http_server(aws({ARN: score})) as server:
        (failed,) = await run(server, monkeypatch)
    assert isinstance(failed, Failed)
    assert (failed.fault, failed.cause, failed.permanent) == ("server", "refused", False)
    assert "other" not in failed.message


async def test_a_function_that_does_not_exist_is_the_operators_fault(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with http_server(aws({ARN: score})) as server:
        (failed,) = await run(server, monkeypatch, arn=f"{ARN}:live")
    assert isinstance(failed, Failed)
    assert (failed.fault, failed.cause, failed.permanent) == ("server", "refused", False)
    assert "Lambda answered 404 ResourceNotFoundException" in failed.message


@pytest.mark.parametrize(
    ("answer", "fault", "unknown", "words"),
    [
        (
            function_error(errorType="TypeError", errorMessage="x is undefined", trace="..."),
            "unclear",
            True,
            "Score: the function failed: TypeError: x is undefined",
        ),
        (
            function_error(errorMessage="2026-01-01 Task timed out after 3.00 seconds"),
            "unclear",
            True,
            "the function failed: 2026-01-01 Task timed out after 3.00 seconds",
        ),
        (
            servers.Answer(200, b"?", {"X-Amz-Function-Error": "Handled"}),
            "unclear",
            True,
            "the function failed: ?",
        ),
        (servers.Answer(200, b'"next"'), "unclear", True, "Score did not answer with a JSON list"),
        (refusal(409, "ResourceConflictException"), "server", False, "409 ResourceConflict"),
        (refusal(429, "TooManyRequestsException"), "server", False, "429"),
        (refusal(500, "ServiceException"), "unclear", False, "500"),
        (refusal(502, "EC2UnexpectedException"), "unclear", True, "502"),
        (refusal(400, "InvalidRequestContentException"), "enrollment", False, "400"),
    ],
)
async def test_the_fault_of_a_failure(
    monkeypatch: pytest.MonkeyPatch, answer: servers.Answer, fault: str, unknown: bool, words: str
) -> None:
    async def fails(_event: Any) -> servers.Answer:
        return answer

    async with http_server(aws({ARN: fails})) as server:
        (failed,) = await run(server, monkeypatch)
    assert isinstance(failed, Failed)
    assert words in failed.message
    assert (failed.fault, failed.unknown) == (fault, unknown)
    assert failed.permanent == (fault == "enrollment")


async def test_a_throttle_says_when_to_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    async def throttles(_event: Any) -> servers.Answer:
        return refusal(429, "TooManyRequestsException", **{"Retry-After": "7"})

    async with http_server(aws({ARN: throttles})) as server:
        first, second = await run(server, monkeypatch, 7, 8)
    assert isinstance(first, Failed)
    assert first.retry_after is not None
    assert (first.retry_after.total_seconds(), first.cause) == (7, "over quota")
    assert isinstance(second, Failed | NotStarted)


async def test_an_event_is_no_larger_than_lambda_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    async with http_server(aws({ARN: score})) as server:
        text = "x" * 900_000
        assert await run(server, monkeypatch, *range(1, 15), text=text) == [Answer()] * 14
        assert max(len(request.body) for request in server.requests) <= MAX_EVENT
        assert len(server.requests) == 3

    async def takes_little(event: Any) -> servers.Answer:
        if len(event["runners"]) > 1:
            return refusal(413, "RequestTooLargeException")
        return await score(event)

    async with http_server(aws({ARN: takes_little})) as server:
        assert await run(server, monkeypatch, 7, 8, 9) == [Answer()] * 3


@pytest.mark.parametrize("form", [None, "original", "list"])
async def test_a_lookup_by_a_function(
    monkeypatch: pytest.MonkeyPatch,
    database: str,
    connection: asyncpg.Connection,
    form: str | None,
) -> None:
    asked: list[Any] = []

    async def plans(event: Any) -> servers.Answer:
        asked.append(event)
        subjects = event if form == "list" else event["runners"]
        answers = [{"id": subject, "plan": "pro"} for subject in subjects]
        return servers.Answer(body=json.dumps(answers).encode())

    is_pro = {
        "lodashCommand": "eq",
        "value": {"type": "get", "value": "external.plan"},
        "compareTo": {"type": "raw", "value": "pro"},
    }
    await define(connection, "s", ("pro", "WaitForCondition", json.dumps(is_pro), None))
    await connection.execute("UPDATE sequencer.sequences SET lookup = 'plans'")
    async with http_server(aws({ARN: plans})) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL_LAMBDA", server.url)
        endpoint = LookupSettings.model_validate({"lambda": ARN, "form": form})
        async with running_engine(database, endpoints={"plans": endpoint}):
            await enroll(connection, "s", "ada")
            await until(connection, "SELECT status = 'completed' FROM sequencer.enrollments")
    assert asked == [["ada"] if form == "list" else {"runners": ["ada"]}]


async def test_the_doctor_asks_without_invoking(monkeypatch: pytest.MonkeyPatch) -> None:
    async def never(_event: Any) -> servers.Answer:
        raise AssertionError

    async with http_server(aws({ARN: never})) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL_LAMBDA", server.url)
        settings = Settings.model_validate({"runners": {"Score": {"lambda": ARN}}})
        found = [one async for one in doctor_endpoints.examine_endpoints(settings, set(), {})]
        assert [(one.level, one.seen) for one in found] == [("ok", "can be invoked")]
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "other")
        found = [one async for one in doctor_endpoints.examine_endpoints(settings, set(), {})]
        assert found[0].level == "error"
        assert "403" in found[0].seen


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ("", "write url, or lambda with the ARN"),
        (f'lambda = "{ARN}"\nurl = "http://x"', "write url, or lambda with the ARN"),
        (f'lambda = "{ARN}"\nsecret = "whsec_eA=="', "secret is for a url"),
        (f'lambda = "{ARN}"\nlamda = "x"', "did you mean 'lambda'?"),
        ('lambda = "sequencer-prod-Score"', "lambda: write the ARN of a function"),
    ],
)
def test_settings_that_cannot_work(tmp_path: Path, table: str, words: str) -> None:
    (tmp_path / "x.toml").write_text(f"[runners.Score]\n{table}\n")
    with pytest.raises(SettingsError, match=re.escape(words)):
        registry.make_runners(load({}, tmp_path / "x.toml"))


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "botocore.session", None)
    settings = Settings.model_validate({"runners": {"Score": {"lambda": ARN}}})
    with pytest.raises(SettingsError, match=r"pip install 'sequencerd\[aws\]'"):
        registry.make_runners(settings)
