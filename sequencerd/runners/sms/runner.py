"""The step type SMS: sent with Twilio's Messages resource, or any gateway with a JSON API."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import quote

from pydantic import BaseModel, ValidationError, model_validator

from sequencerd.core.config import Faults, parse_config
from sequencerd.core.faults import DefinitionError, Fault
from sequencerd.core.javascript.templates import Template
from sequencerd.core.languages import DEFAULT_LOCALE
from sequencerd.core.model import NOTHING_SHARED, MessageContext
from sequencerd.core.step_types.effects import SMS, SmsConfig
from sequencerd.core.task import (
    Answer,
    Failed,
    NotStarted,
    OutageCause,
    Result,
    Suppressed,
    Task,
    Undeliverable,
)
from sequencerd.runners.fields import (
    RenderError,
    Translations,
    compile_field,
    compile_texts,
    marked_as_test,
    one_line,
    render,
)
from sequencerd.runners.http_client import HttpClient, Unreachable, check_headers
from sequencerd.runners.http_reply import HttpReply, judge, retry_after
from sequencerd.runners.only_to import OnlyTo
from sequencerd.runners.pace import Pace, TakePermits
from sequencerd.runners.slow_rendering import SlowRendering
from sequencerd.runners.sms import segments
from sequencerd.runners.sms.numbers import read_number
from sequencerd.runners.suppression_check import Suppressions, describe
from sequencerd.runners.unsubscribe import UnsubscribeLinks, check_reads
from sequencerd.settings import SmsSettings, secret_values

# Error codes that say more than the status: https://www.twilio.com/docs/api/errors
_THROTTLED = frozenset({14107, 20429, 21611, 30001, 30017, 30022, 63017, 63018})
_DAILY = frozenset({63038})  # the account's daily number of messages
_OPERATORS = frozenset(  # the login, or the account
    {10001, 20003, 20005, 20008, 20404, 30002, 90010}
)
_SENDERS = frozenset(
    {
        *{21212, 21603, 21606, 21659, 21660, 21661, 63002, 63007},  # the sender
        *{21701, 21703, 21704, 21705},  # the messaging service
        *{21219, 21267, 21607, 21608},  # a trial account
        21609,  # the URL for reports
    }
)
"""Perhaps the same for all messages."""
_MAINTENANCE = 21730
_ABOUT_MESSAGE = range(21200, 21800)  # its numbers, text or region; also with 403
_CARRIERS_DAY = frozenset({30023, 30027})  # a carrier's daily number of messages
_PASSING = _CARRIERS_DAY | {30008}  # of unknown kind
OPTED_OUT = 21610  # the recipient answered STOP
_UNREACHABLE = frozenset(  # invalid, no mobile, landline, unknown, landline
    {21211, 21614, 21635, 30005, 30006}
)
NO_TIME = timedelta(0)


class TwilioConfig(SmsConfig):
    """The config for Twilio, which needs a sender, a messaging service, or a sender of a messaging
    service.
    """

    @model_validator(mode="after")
    def _check(self) -> TwilioConfig:
        if not self.from_ and not self.messaging_service_sid:
            raise ValueError("write from or messagingServiceSid, or both")
        return self


class _Receipt(BaseModel):
    """Twilio's answer about a message, or an error."""

    sid: str | None = None
    status: str | int | None = None
    error_code: int | None = None
    error_message: str | None = None
    code: int | None = None
    message: str | None = None


@dataclass(frozen=True, slots=True)
class SmsProgram:
    """A compiled config: the templates by field, and the path of the subject's language."""

    fields: Mapping[str, Template | Translations]
    locale: str


class SmsRunner:
    """Sends a message for each enrollment of a step, by the provider of the settings. `links` makes
    the links to unsubscribe. Raises ValueError for settings that cannot be used; with incomplete
    ones, its steps have a problem.
    """

    def __init__(
        self,
        settings: SmsSettings,
        *,
        suppressions: Suppressions | None = None,
        links: UnsubscribeLinks | None = None,
        take: TakePermits | None = None,
    ) -> None:
        limits = settings.limits
        self._lacking = _lacking(settings)
        self.lacks_settings = self._lacking is not None
        self.retry = settings.retry
        self._links = links
        self._suppressions = suppressions
        self._only_to = OnlyTo("sms.only_to", settings.only_to)
        self._rendering = SlowRendering()
        self._pace = Pace(limits, SMS.name, take)
        self.limits = replace(limits, timeout=limits.timeout + self._pace.longest_wait + 1)
        is_twilio = settings.provider == "twilio"
        self._gateway = _Twilio(settings) if is_twilio else _HttpGateway(settings)
        self._web = HttpClient(
            timeout=limits.timeout,
            connections=limits.concurrency,
            allow_private=is_twilio or settings.allow_private,
        )

    def compile(
        self, config: Mapping[str, Any], shared: MessageContext = NOTHING_SHARED
    ) -> SmsProgram:
        """Compile all templates, and check a literal number. Raises DefinitionError."""
        faults = Faults()
        if self._lacking is not None:
            with faults.at():
                parse_config(SmsConfig, config, SMS.name)
            raise DefinitionError([*faults.found, Fault((), self._lacking)])
        parsed = parse_config(self._gateway.model, config, SMS.name)
        fields = parsed.model_dump(by_alias=True, exclude_none=True, exclude={"strict"})
        program = {}
        for name, source in fields.items():
            with faults.at():
                program[name] = compile_texts(name, source, shared, strict=parsed.strict)
        if "{{" not in parsed.to:
            try:
                read_number(parsed.to)
            except RenderError as error:
                faults.found.append(Fault(("to",), str(error).removeprefix("to: ")))
        if self._links is None:
            with faults.at():
                check_reads(program, dict(shared.partials))
        faults.check()
        return SmsProgram(program, shared.locale or DEFAULT_LOCALE)

    async def run(self, program: object, tasks: Sequence[Task]) -> Sequence[Result]:
        """Send the messages concurrently."""
        assert isinstance(program, SmsProgram)
        return await asyncio.gather(*(self._send(program, task) for task in tasks))

    def preview(self, program: object, task: Task) -> Mapping[str, str]:
        """Return what `run` would send, by field. Raises RenderError."""
        assert isinstance(program, SmsProgram)
        view = task.view
        to = read_number(render("to", program.fields["to"], view))
        if self._links is not None:
            view = self._links.added(view, "sms", [to], task.topic, program.locale)
        values = {name: render(name, field, view) for name, field in program.fields.items()}
        values["to"] = to
        if not values["message"].strip():
            raise RenderError("message: empty")
        return values

    async def write(self, program: object, task: Task) -> bytes:
        """Return the finished message of an enrollment. Raises RenderError."""
        values = self.preview(program, task)
        number, encoding = segments.count(values["message"])
        fields = {"From": values.get("from"), "To": values["to"]}
        fields["Segments"] = f"{number} ({encoding})"
        head = "".join(f"{name}: {value}\n" for name, value in fields.items() if value)
        return f"{head}\n{values['message']}\n".encode()

    def as_test(self, config: Mapping[str, Any], address: str) -> dict[str, Any]:
        """Return a config that sends the message only to this number, marked as a test. Raises
        RenderError.
        """
        kept = {k: v for k, v in config.items() if k != "statusCallback"}
        message = marked_as_test(config["message"])
        return {**kept, "to": read_number(address), "message": message}

    async def _send(self, program: SmsProgram, task: Task) -> Result:
        try:
            await self._rendering.turn({"message": program.fields["message"]}, task.view)
            with self._rendering.measured():
                values = self.preview(program, task)
            if outside := self._only_to.outside([values["to"]]):
                return Suppressed(f"not sent to {self._only_to.describe(outside)}")
            if not await self._pace.turn(task.expires):
                return NotStarted()
            if self._suppressions is not None:
                asked = (values["to"], str(task.view["subject"]))
                if without := await self._suppressions.find_suppressed("sms", asked, task.topic):
                    return Suppressed(f"not sent to {describe(without)}")
            if task.is_late(asyncio.get_running_loop().time()):
                return NotStarted()
            return await self._gateway.post(self._web, values, task)
        except RenderError as error:
            return Failed(str(error), permanent=True, asked=False, failure="bad_data")
        except Unreachable as error:
            return error.failed(str(error))

    async def close(self) -> None:
        """Close the connections."""
        await self._web.close()


def _lacking(settings: SmsSettings) -> str | None:
    """Return what has to be set before messages can be sent, if anything."""
    if settings.provider == "http" and not (settings.url and settings.body):
        return "SMS needs a gateway: set sms.url and sms.body"
    if settings.provider == "twilio" and not (settings.account_sid and settings.auth_token):
        return "SMS needs an account: set sms.account_sid and sms.auth_token"
    return None


class _Twilio:
    """Twilio's Messages resource; each call sends one message."""

    model: type[SmsConfig] = TwilioConfig

    def __init__(self, settings: SmsSettings) -> None:
        token = settings.auth_token
        self._suppress_bounces = settings.suppress_bounces
        self._status_callback = settings.hook_url
        self._auth = (settings.account_sid or "", token.get_secret_value() if token else "")
        account = quote(settings.account_sid or "", safe="")
        self._url = f"{settings.base_url.rstrip('/')}/2010-04-01/Accounts/{account}/Messages.json"

    async def post(self, web: HttpClient, values: Mapping[str, str], _: Task) -> Result:
        """Send a message, and return its result. Raises Unreachable."""
        form = {
            name: values[field]
            for field, name in (
                ("to", "To"),
                ("from", "From"),
                ("messagingServiceSid", "MessagingServiceSid"),
                ("message", "Body"),
                ("statusCallback", "StatusCallback"),
            )
            if field in values
        }
        if self._status_callback is not None:
            form.setdefault("StatusCallback", self._status_callback)
        reply = await web.call("POST", self._url, headers={}, form=form, auth=self._auth)
        result = _judge_twilio(reply, values["to"], datetime.now(UTC))
        return result if self._suppress_bounces else replace(result, undeliverable=())


def rest_of_day(now: datetime) -> timedelta:
    """Return the time until the next day in UTC, when daily limits are reset."""
    return timedelta(days=1) - timedelta(
        hours=now.hour, minutes=now.minute, seconds=now.second, microseconds=now.microsecond
    )


def undeliverable(code: int | None, to: str, text: str) -> Undeliverable | None:
    """Return what an error code of Twilio says about a number permanently; None if nothing."""
    if code == OPTED_OUT:
        return Undeliverable("sms", to, one_line(f"Twilio: {code} {text}"), "stop")
    if code in _UNREACHABLE:
        return Undeliverable("sms", to, one_line(f"Twilio: {code} {text}"))
    return None


def _judge_twilio(reply: HttpReply, to: str, now: datetime) -> Answer | Failed:
    """Classify Twilio's answer: by its error code if there is one, otherwise by the status."""
    try:
        receipt = _Receipt.model_validate_json(reply.text())
    except ValidationError:
        receipt = _Receipt()
    code = receipt.code if receipt.code is not None else receipt.error_code
    text = reply.hide(receipt.message or receipt.error_message or "") or reply.excerpt()
    message = one_line(f"Twilio refuses {to}: {code or reply.status} {text}")
    asked = retry_after(reply.headers)
    if code in _DAILY:
        wait = max(asked or NO_TIME, rest_of_day(now))
        return Failed(message, retry_after=wait, fault="server", cause="over quota")
    if code in _THROTTLED or code in _OPERATORS:
        cause: OutageCause = "over quota" if code in _THROTTLED else "refused"
        return Failed(message, retry_after=asked, fault="server", cause=cause)
    if code == _MAINTENANCE:
        return Failed(message, retry_after=asked, fault="server", cause="unavailable")
    if code in _SENDERS:
        return Failed(message, retry_after=asked, fault="unclear")
    if code in _PASSING:
        return Failed(message, retry_after=rest_of_day(now) if code in _CARRIERS_DAY else asked)
    failed = judge(reply, message)
    if failed is not None and code in _ABOUT_MESSAGE and reply.status < 500:
        failed = replace(failed, permanent=True, fault="enrollment")
    if failed is None and receipt.status in ("failed", "undelivered"):
        failed = Failed(message, permanent=code is not None)
    if failed is not None and (gone := undeliverable(code, to, text)) is not None:
        return replace(failed, undeliverable=(gone,))
    status = reply.status if receipt.status is None else receipt.status
    return failed or Answer(message=one_line(f"sent to {to}: {receipt.sid or 'no sid'} {status}"))


class _HttpGateway:
    """Any gateway that accepts JSON.

    The template of the request's body reads `from`, `to`, `message`, `key`, and the enrollment as
    `enrollment`: `{"recipient": {{json to}}, "text": {{json message}}}`.
    """

    model = SmsConfig

    def __init__(self, settings: SmsSettings) -> None:
        headers = check_headers(secret_values(settings.headers))
        self._url = settings.url or ""
        self._body = compile_field("body", settings.body or "")
        self._headers = {"Content-Type": "application/json", **headers}

    async def post(self, web: HttpClient, values: Mapping[str, str], task: Task) -> Result:
        """Send a message, and return its result. Raises RenderError and Unreachable."""
        context = {**values, "key": task.key, "enrollment": dict(task.view)}
        body = render("body", self._body, context)
        try:
            json.loads(body)
        except (ValueError, RecursionError):
            raise RenderError("body: not JSON (write {{json message}} to quote a value)") from None
        headers = {**self._headers, "Idempotency-Key": task.key}
        reply = await web.call("POST", self._url, headers=headers, content=body.encode())
        answer = f"{reply.status} {reply.excerpt()}".rstrip()
        failed = judge(reply, f"the SMS gateway refuses {values['to']}: {answer}")
        return failed or Answer(message=f"sent to {values['to']}: {answer}")
