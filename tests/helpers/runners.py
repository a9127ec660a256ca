"""Runners for the servers of tests, and their results."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from sequencerd.core.model import CALL_LIMITS, DEFAULT_RETRY, Limits, RetryPolicy
from sequencerd.core.task import Failed, Result
from sequencerd.runners.http import BATCH_BYTES, BatchRunner, HttpEndpoint


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


def failed(result: Result) -> Failed:
    """The result, which is a failure."""
    assert isinstance(result, Failed), result
    return result
