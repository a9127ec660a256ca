"""Runners for the servers of tests, and their results."""

from __future__ import annotations

from dataclasses import asdict, fields, replace
from typing import Any

from sequencerd.core.model import CALL_LIMITS, DEFAULT_RETRY, Limits, RetryPolicy
from sequencerd.core.task import Failed, Result
from sequencerd.runners.email.runner import EmailRunner
from sequencerd.runners.http import BATCH_BYTES, BatchRunner, HttpEndpoint
from sequencerd.runners.sms.runner import SmsRunner
from sequencerd.runners.suppression_check import Suppressions
from sequencerd.runners.unsubscribe import UnsubscribeLinks
from sequencerd.settings import EmailSettings, SmsSettings


def http_runner(
    url: str,
    *,
    name: str = "Crm",
    batch_bytes: int = BATCH_BYTES,
    http2: bool = True,
    retry: RetryPolicy = DEFAULT_RETRY,
    **options: Any,
) -> BatchRunner:
    """A runner behind a URL; `options` are those of the endpoint, and single limits."""
    given = {one.name: options.pop(one.name) for one in fields(Limits) if one.name in options}
    limits = replace(CALL_LIMITS, **given)
    endpoint = HttpEndpoint(
        url, timeout=limits.timeout, connections=limits.concurrency, http2=http2, **options
    )
    return BatchRunner(endpoint, name=name, limits=limits, batch_bytes=batch_bytes, retry=retry)


def email_runner(
    url: str,
    *,
    suppressions: Suppressions | None = None,
    links: UnsubscribeLinks | None = None,
    **options: Any,
) -> EmailRunner:
    """A runner for a mail server; `options` are its settings, its limits and its retries."""
    settings = EmailSettings.model_validate({"url": url, **_as_settings(options)})
    return EmailRunner(settings, suppressions=suppressions, links=links)


def sms_runner(
    *,
    suppressions: Suppressions | None = None,
    links: UnsubscribeLinks | None = None,
    **options: Any,
) -> SmsRunner:
    """A runner for Twilio, or for the gateway in the settings that `options` are."""
    account = {"account_sid": "AC1", "auth_token": "the-token"}
    settings = SmsSettings.model_validate(account | _as_settings(options))
    return SmsRunner(settings, suppressions=suppressions, links=links)


def _as_settings(options: dict[str, Any]) -> dict[str, Any]:
    parts = [asdict(options.pop(name)) for name in ("limits", "retry") if name in options]
    given = {key: value for part in parts for key, value in part.items() if key != "batch_size"}
    return given | options


def failed(result: Result) -> Failed:
    """The result, which is a failure."""
    assert isinstance(result, Failed), result
    return result
