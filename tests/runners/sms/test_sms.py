"""The SMS runners against a real HTTP server."""

from __future__ import annotations

import base64
import json
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import parse_qs

import pytest

from sequencerd.core.faults import DefinitionError
from sequencerd.core.task import Answer, Failed, Result
from sequencerd.runners.sms.runner import rest_of_day
from tests.helpers import servers
from tests.helpers.runners import failed, sms_runner
from tests.helpers.servers import KEY, HttpServer, Request, http_server, task

BASIC = {"from": "+11231231234", "to": "{{data.phone}}", "message": "Hello <{{data.name}}>"}
SENT = servers.Answer(201, json.dumps({"sid": "SM123", "status": "queued"}).encode())


def answering(answer: servers.Answer) -> Any:
    """What answers always the same."""

    async def respond(_: Request) -> servers.Answer:
        return answer

    return respond


async def send(
    answer: servers.Answer, config: dict[str, Any] | None = None, **data: Any
) -> tuple[Result, HttpServer]:
    """Sends one message by a Twilio that answers always the same."""
    data = {"phone": "+4915112345678", "name": "Ada & Söhne", **data}
    async with http_server(answering(answer)) as server:
        made = sms_runner(base_url=server.url + "/")
        (result,) = await made.run(made.compile(config or BASIC), [task(**data)])
        await made.close()
    return result, server


async def test_a_message_as_twilio_wants_it() -> None:
    config = {**BASIC, "statusCallback": "https://example.com/{{id}}"}
    result, server = await send(SENT, config)
    assert result == Answer(message="sent to +4915112345678: SM123 queued")
    (request,) = server.requests
    assert request.target == "/2010-04-01/Accounts/AC1/Messages.json"
    assert request.headers["content-type"] == "application/x-www-form-urlencoded"
    login = base64.b64decode(request.headers["authorization"].removeprefix("Basic ")).decode()
    assert login == "AC1:the-token"
    assert parse_qs(request.body.decode()) == {
        "To": ["+4915112345678"],
        "From": ["+11231231234"],
        "Body": ["Hello <Ada & Söhne>"],
        "StatusCallback": ["https://example.com/7"],
    }


async def test_a_message_in_the_language_of_the_subject() -> None:
    config = {**BASIC, "message": {"en": "Hello", "de": "Hallo"}}
    _, server = await send(SENT, config, locale="de_AT")
    assert parse_qs(server.requests[0].body.decode())["Body"] == ["Hallo"]
    _, server = await send(SENT, config)
    assert parse_qs(server.requests[0].body.decode())["Body"] == ["Hello"]


async def test_a_messaging_service_instead_of_a_sender() -> None:
    config = {"to": "+49 (151) 123-456", "message": "x", "messagingServiceSid": "MG1"}
    _, server = await send(SENT, config)
    form = parse_qs(server.requests[0].body.decode())
    assert form == {"To": ["+49151123456"], "Body": ["x"], "MessagingServiceSid": ["MG1"]}
    _, server = await send(SENT, config | {"from": "Shop"})  # one of the service's senders
    assert parse_qs(server.requests[0].body.decode()) == form | {"From": ["Shop"]}


@pytest.mark.parametrize(
    ("status", "code", "permanent", "fault"),
    [
        (400, 21211, True, "enrollment"),  # not a number
        (400, 21610, True, "enrollment"),  # unsubscribed
        (400, 21614, True, "enrollment"),  # not a mobile number
        (400, None, True, "enrollment"),
        (404, 20404, False, "server"),  # there is no such account
        (404, None, True, "enrollment"),
        (400, 21635, True, "enrollment"),  # a landline
        (400, 21606, False, "unclear"),  # the sender cannot send messages
        (400, 21608, False, "unclear"),  # a trial account writes to verified numbers alone
        (400, 21267, False, "unclear"),  # a trial account has no sender of letters
        (400, 21609, False, "unclear"),  # hook_url is no public URL
        (400, 63007, False, "unclear"),  # the channel has no such sender
        (404, 21703, False, "unclear"),  # the messaging service has no sender
        (401, 20003, False, "server"),
        (403, None, False, "server"),
        (408, None, False, "unclear"),
        (429, 20429, False, "server"),
        (429, None, False, "server"),
        (403, 21408, True, "enrollment"),  # a region that is not enabled
        (403, 20005, False, "server"),  # the account is not active
        (400, 10001, False, "server"),
        (400, 90010, False, "server"),
        (400, 14107, False, "server"),
        (400, 30022, False, "server"),
        (429, 63017, False, "server"),
        (400, 21730, False, "server"),  # Twilio's maintenance
        (402, None, False, "server"),
        (500, 20500, False, "unclear"),
        (503, None, False, "unclear"),
    ],
)
async def test_a_refusal_is_attributed_by_its_code(
    status: int, code: int | None, permanent: bool, fault: str
) -> None:
    body = {"code": code, "message": "the reason", "status": status}
    answer = servers.Answer(status, json.dumps(body).encode(), {"Retry-After": "30"})
    if status == 503:
        answer.headers = {}
    bad = failed((await send(answer))[0])
    assert (bad.permanent, bad.fault) == (permanent, fault)
    assert bad.message == f"Twilio refuses +4915112345678: {code or status} the reason"
    assert bad.retry_after == (None if status == 503 else timedelta(seconds=30))
    assert "the-token" not in bad.message


@pytest.mark.parametrize(
    ("status", "code", "fault"),
    [(429, 63038, "server"), (400, 30023, "enrollment"), (400, 30027, "enrollment")],
)
async def test_a_daily_cap_is_retried_on_the_next_day(status: int, code: int, fault: str) -> None:
    message = "Account exceeded the 50 daily messages limit"
    body = {"code": code, "message": message, "status": status}
    before = rest_of_day(datetime.now(UTC))
    bad = failed((await send(servers.Answer(status, json.dumps(body).encode())))[0])
    assert (bad.permanent, bad.fault) == (False, fault)
    assert bad.retry_after is not None
    assert abs(bad.retry_after - before) < timedelta(minutes=5) or before < timedelta(minutes=5)


def test_the_rest_of_a_day() -> None:
    assert rest_of_day(datetime(2026, 1, 2, 23, 59, 30, tzinfo=UTC)) == timedelta(seconds=30)
    assert rest_of_day(datetime(2026, 1, 2, tzinfo=UTC)) == timedelta(days=1)


@pytest.mark.parametrize(
    "to", ["whatsapp:+49 (0)151 12345678", "rcs:+4915112345678", "\u202a+49 (0)151 12345678\u202c"]
)
async def test_numbers_and_channels_as_twilio_wants_them(to: str) -> None:
    result, server = await send(SENT, phone=to)
    assert isinstance(result, Answer)
    sent_to = parse_qs(server.requests[0].body.decode())["To"]
    channel = to.partition(":")[0] + ":" if ":" in to else ""
    assert sent_to == [f"{channel}+4915112345678"]


@pytest.mark.parametrize(
    ("body", "permanent", "fault"),
    [
        ({"sid": "SM1", "status": "failed", "error_code": 30006}, True, "enrollment"),
        ({"sid": "SM1", "status": "undelivered", "error_code": 30008}, False, "enrollment"),
        ({"sid": "SM1", "status": "failed", "error_code": 30001}, False, "server"),
        ({"sid": "SM1", "status": "failed"}, False, "enrollment"),
    ],
)
async def test_accepted_and_failed_at_once(body: Any, permanent: bool, fault: str) -> None:
    bad = failed((await send(servers.Answer(201, json.dumps(body).encode())))[0])
    assert (bad.permanent, bad.fault) == (permanent, fault)


@pytest.mark.parametrize(
    ("answer", "sent", "permanent"),
    [
        (servers.Answer(201, b"<html>"), True, False),
        (servers.Answer(502, b"<html>bad gateway"), False, False),
        (servers.Answer(400, b"[]"), False, True),
        (servers.Answer(201, b"x" * 2_000_000), False, False),
        (servers.Answer(raw=b""), False, False),
    ],
)
async def test_an_answer_without_json_is_judged_by_the_status(
    answer: servers.Answer, sent: bool, permanent: bool
) -> None:
    result, _ = await send(answer)
    assert isinstance(result, Answer) == sent
    assert sent or failed(result).permanent == permanent


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ({"phone": ""}, "to: '' is not an international number"),
        ({"phone": "015112345678"}, "to: "),
        ({"phone": "+0151"}, "to: "),
        ({"phone": "+1234567890123456"}, "to: "),
        ({"phone": "+49x"}, "to: "),
        ({"phone": "+\u0be7\u0be8151123"}, "to: "),
    ],
)
async def test_invalid_numbers_fail_permanently(data: dict[str, Any], says: str) -> None:
    result, server = await send(SENT, **data)
    assert failed(result).permanent
    assert says in failed(result).message
    assert server.requests == []


async def test_empty_texts_fail() -> None:
    result, server = await send(SENT, {**BASIC, "message": " {{data.nothing}} "})
    assert failed(result) == Failed(
        "message: empty", permanent=True, asked=False, failure="bad_data"
    )
    assert server.requests == []


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"from": None}, "from or messagingServiceSid"),
        ({"from": ""}, "from or messagingServiceSid"),
        ({"to": "0151"}, "to: "),
        ({"to": None}, "to"),
        ({"message": "{{#if"}, "message: "),
        ({"text": "x"}, "text"),
    ],
)
def test_a_config_that_cannot_work_is_refused(change: dict[str, Any], says: str) -> None:
    with pytest.raises(DefinitionError, match=says):
        sms_runner().compile(BASIC | change)


@pytest.mark.parametrize(
    ("code", "source"),
    [
        *((code, "refused") for code in (21211, 21614, 21635, 30005, 30006)),
        (21610, "stop"),
        *((code, None) for code in (21408, 21617, 30003, 30007, 30034, None)),
    ],
)
async def test_numbers_that_nothing_reaches_are_named_in_the_result(
    code: int | None, source: str | None
) -> None:
    answer = servers.Answer(400, json.dumps({"code": code, "message": "why"}).encode())
    for suppress in (True, False):
        async with http_server(answering(answer)) as server:
            made = sms_runner(base_url=server.url, suppress_bounces=suppress)
            (result,) = await made.run(made.compile(BASIC), [task(phone="+49151123456")])
            await made.close()
        named = [(one.address, one.source) for one in failed(result).undeliverable]
        assert named == ([("+49151123456", source)] if source and suppress else [])


async def test_the_hook_receives_the_status_of_messages_without_a_callback() -> None:
    hook, own = "https://mail.example.com/hooks/twilio", "https://shop.example.com/sms"
    answer = servers.Answer(201, json.dumps({"sid": "SM1", "status": "queued"}).encode())
    async with http_server(answering(answer)) as server:
        made = sms_runner(base_url=server.url, hook_url=hook)
        for config in (BASIC, {**BASIC, "statusCallback": own}):
            await made.run(made.compile(config), [task(phone="+49151123456")])
        await made.close()
    told = [parse_qs(one.body.decode())["StatusCallback"] for one in server.requests]
    assert told == [[hook], [own]]


async def test_any_gateway_gets_the_rendered_body() -> None:
    body = '{"to": {{json to}}, "text": {{json message}}, "ref": "{{key}} {{enrollment.id}}"}'
    async with http_server(answering(servers.Answer(202, b"ok"))) as server:
        made = sms_runner(
            provider="http", url=f"{server.url}/send", body=body, headers={"X-Key": "k"}
        )
        program = made.compile({"to": "{{data.phone}}", "message": 'say "hi"\n{{data.name}}'})
        (result,) = await made.run(program, [task(phone="+49151123456", name="Söhne")])
        await made.close()
    assert result == Answer(message="sent to +49151123456: 202 ok")
    (request,) = server.requests
    assert json.loads(request.body) == {
        "to": "+49151123456",
        "text": 'say "hi"\nSöhne',
        "ref": f"{KEY} 7",
    }
    assert request.headers["x-key"] == "k"
    assert request.headers["idempotency-key"] == KEY


@pytest.mark.parametrize(
    ("body", "sent"),
    [
        (
            '{"recipient": {{json to}}, "text": {{json message}}}',
            {"recipient": "+49151123456", "text": "Hi"},
        ),
        ('[{"to":{"number":{{json to}}}}]', [{"to": {"number": "+49151123456"}}]),
        (
            '{"to":"{{{to}}}","x":{"text":{{{json message}}}}}',
            {"to": "+49151123456", "x": {"text": "Hi"}},
        ),
    ],
)
async def test_braces_of_json_may_follow_those_of_a_tag(body: str, sent: object) -> None:
    async with http_server(answering(servers.Answer(202, b"ok"))) as server:
        made = sms_runner(provider="http", url=server.url, body=body)
        program = made.compile({"to": "{{data.phone}}", "message": "Hi"})
        (result,) = await made.run(program, [task(phone="+49151123456")])
        await made.close()
    assert isinstance(result, Answer)
    assert json.loads(server.requests[0].body) == sent


@pytest.mark.parametrize(
    ("status", "permanent", "fault"),
    [
        (400, True, "enrollment"),
        (401, False, "server"),
        (429, False, "server"),
        (500, False, "unclear"),
    ],
)
async def test_a_gateway_that_refuses(status: int, permanent: bool, fault: str) -> None:
    async with http_server(answering(servers.Answer(status, b"why"))) as server:
        made = sms_runner(provider="http", url=server.url, body="{{json to}}")
        program = made.compile({"to": "+49151123456", "message": "x"})
        bad = failed((await made.run(program, [task()]))[0])
        await made.close()
    assert (bad.permanent, bad.fault) == (permanent, fault)
    assert bad.message == f"the SMS gateway refuses +49151123456: {status} why"


async def test_a_body_that_is_no_json() -> None:
    made = sms_runner(provider="http", url="http://127.0.0.1:9", body='{"text": "{{message}}"}')
    program = made.compile({"to": "+49151123456", "message": '"'})
    bad = failed((await made.run(program, [task()]))[0])
    await made.close()
    assert bad.permanent
    assert "body: not JSON" in bad.message
