"""What the answer to an HTTP call means: whose fault a refusal is, and whether it passes."""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass
from datetime import UTC, timedelta
from email.utils import parsedate_to_datetime

import httpx

from sequencerd.core.hiding import hiding
from sequencerd.core.task import Attribution, Failed, OutageCause
from sequencerd.runners.fields import one_line

MAX_WAIT = timedelta(days=366)
MAX_SECONDS = 1e9  # of a wait; more are a time


@dataclass(frozen=True, slots=True)
class HttpReply:
    """A server's answer."""

    status: int
    headers: httpx.Headers
    body: bytes
    secrets: frozenset[str] = frozenset()  # values that were sent, and that the answer may repeat

    def text(self) -> str:
        """Return the body of an answer in JSON as text. Some servers write Latin-1."""
        try:
            return self.body.decode(json.detect_encoding(self.body))
        except UnicodeDecodeError:
            return self.body.decode("latin-1")

    def excerpt(self) -> str:
        """Return the beginning of the body, for messages."""
        return one_line(self.hide(self.body[:1000].decode("utf-8", "replace")), 200)

    def hide(self, text: str) -> str:
        """Return a text of the answer without the secrets that were sent."""
        return hiding(self.secrets)(text)


PAYMENT_REQUIRED = 402
TOO_LARGE = 413
_OPERATORS = frozenset({401, PAYMENT_REQUIRED, 403, 405, 407, 421, 426})
_PASSING = frozenset({408, 409, 423, 425, 429})
_OF_GATEWAYS = frozenset({502, 504, 520, 522, 524, 598, 599})
"""The gateway got no usable answer; those that are not registered are Cloudflare's and others'."""


def judge(reply: HttpReply, message: str) -> Failed | None:
    """Return the failure that a status means; None for 2xx.

    4xx is permanent except for 408, 409, 423, 425 and 429. 429, and 503 with Retry-After, are the
    server's fault. So is what all requests get until an operator corrects it: 401, 403 and 407,
    which need another login; 402, which needs a payment; 405, 421 and 426, which are no answers of
    the endpoint; and redirects, which are not followed: if an endpoint moves, its settings change.
    Other 5xx and 408 may be the fault of the server or of one enrollment. 409 means that the same
    request is still in progress, 423 that what it changes is locked. After the
    failure of a gateway, the side effect may have taken place.
    """
    if 200 <= reply.status < 300:
        return None
    wait = retry_after(reply.headers)
    throttled = reply.status == 429 or (reply.status == 503 and wait is not None)
    is_operators = reply.status < 400 or reply.status in _OPERATORS
    permanent = reply.status < 500 and not is_operators and reply.status not in _PASSING
    fault: Attribution = "enrollment"
    cause: OutageCause = "failing"
    if throttled or reply.status == PAYMENT_REQUIRED:
        fault, cause = "server", "over quota"
    elif is_operators:
        fault, cause = "server", "refused"
    elif reply.status >= 500 or reply.status == 408:
        fault = "unclear"
    return Failed(
        message,
        permanent,
        wait,
        fault=fault,
        unknown=reply.status in _OF_GATEWAYS,
        cause=cause,
    )


def retry_after(headers: httpx.Headers) -> timedelta | None:
    """Return the wait that Retry-After asks for, in seconds or as a date; None if it cannot be
    parsed. Some servers write the seconds of Unix's clock. Of several, the longest counts; proxies
    join them with commas.
    """
    fields = headers.get_list("Retry-After")
    waits = [_wait(text.strip()) for field in fields for text in (field, *field.split(","))]
    return max((wait for wait in waits if wait is not None), default=None)


def _wait(text: str) -> timedelta | None:
    try:
        seconds = float(text)
    except ValueError:
        try:
            at = parsedate_to_datetime(text)
        except (ValueError, OverflowError):
            return None
        at = at if at.tzinfo is not None else at.replace(tzinfo=UTC)
        seconds = at.timestamp() - time.time()
    if not math.isfinite(seconds):
        return None
    if seconds > MAX_SECONDS:
        seconds -= time.time()
    return min(timedelta(seconds=max(0.0, min(seconds, MAX_SECONDS))), MAX_WAIT)
