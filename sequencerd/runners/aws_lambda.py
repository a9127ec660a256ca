"""AWS Lambda functions as custom runners and lookups.

This is an extra, `pip install 'sequencerd[aws]'`. botocore finds the credentials and signs
requests, as in every AWS tool; the request itself is sent like all others, with the same limits.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
from typing import Any
from urllib.parse import quote

from sequencerd.runners import tracing
from sequencerd.runners.fields import one_line
from sequencerd.runners.http_client import MAX_ANSWER, HttpClient, Unreachable
from sequencerd.runners.http_reply import HttpReply
from sequencerd.urls import check_url

MAX_EVENT = 6_000_000
"""The largest event in bytes, slightly below Lambda's limit of 6 MB."""

_ARN = re.compile(
    r"arn:(?P<partition>aws[a-z-]*):lambda:(?P<region>[a-z0-9-]+):\d{12}:function:[\w-]{1,64}"
    r"(?::[\w$-]{1,128})?",
    re.ASCII,
)
_SUFFIXES = {"aws-cn": "amazonaws.com.cn"}
_OPERATORS = (404, 409, 412)
"""Statuses that come from Lambda, not from the function: it does not exist, or is being changed."""


class LambdaFunction:
    """A function, identified by its ARN. Raises ValueError for an invalid ARN, and without the
    extra.

    As in other AWS tools, AWS_ENDPOINT_URL_LAMBDA and AWS_ENDPOINT_URL name another endpoint.
    """

    def __init__(
        self, arn: str, *, timeout: float, connections: int, allow_private: bool = False
    ) -> None:
        found = _ARN.fullmatch(arn)
        if found is None:
            raise ValueError(
                "lambda: write the ARN of a function, arn:aws:lambda:REGION:ACCOUNT:function:NAME"
            )
        try:
            from botocore.session import Session  # noqa: PLC0415 - an extra, slow to import
        except ModuleNotFoundError:
            raise ValueError("lambda needs the extra aws: pip install 'sequencerd[aws]'") from None
        self._region = found["region"]
        suffix = _SUFFIXES.get(found["partition"], "amazonaws.com")
        endpoint = (
            os.getenv("AWS_ENDPOINT_URL_LAMBDA")
            or os.getenv("AWS_ENDPOINT_URL")
            or f"https://lambda.{self._region}.{suffix}"
        )
        path = f"/2015-03-31/functions/{quote(arn, safe='')}/invocations"
        self._url = check_url(endpoint.rstrip("/") + path)
        self._session = Session()
        self._finding = asyncio.Lock()  # the session is not thread-safe
        self._web = HttpClient(
            timeout=timeout, connections=connections, allow_private=allow_private
        )

    async def post(
        self, event: bytes, _key: str | None = None, max_answer: int = MAX_ANSWER
    ) -> HttpReply:
        """Invoke the function and wait for its answer. Raises Unreachable, also if the function
        fails.
        """
        return _judged(await self._invoke(event, "RequestResponse", max_answer))

    async def check(self) -> HttpReply:
        """Check with Lambda whether the function can be invoked. Raises Unreachable."""
        return _judged(await self._invoke(b"", "DryRun", MAX_ANSWER))

    async def _invoke(self, event: bytes, kind: str, max_answer: int) -> HttpReply:
        async with self._finding:
            headers = await asyncio.to_thread(self._signed, event, kind)
        headers |= {"Accept": "application/json", **tracing.headers()}
        return await self._web.call(
            "POST", self._url, headers=headers, content=event, max_answer=max_answer
        )

    def _signed(self, event: bytes, kind: str) -> dict[str, str]:
        """Return the headers of an invocation. This blocks: credentials may come from a file or a
        service.
        """
        from botocore.auth import SigV4Auth  # noqa: PLC0415 - as above
        from botocore.awsrequest import AWSRequest  # noqa: PLC0415
        from botocore.exceptions import BotoCoreError  # noqa: PLC0415

        headers = {"Content-Type": "application/json", "X-Amz-Invocation-Type": kind}
        request = AWSRequest("POST", self._url, headers, event)
        try:
            credentials = self._session.get_credentials()
            if credentials is None:
                raise Unreachable(
                    "no AWS credentials: give the daemon a role, AWS_ACCESS_KEY_ID and "
                    "AWS_SECRET_ACCESS_KEY, or AWS_PROFILE",
                    cause="refused",
                )
            frozen = credentials.get_frozen_credentials()
        except BotoCoreError as error:
            raise Unreachable(
                f"AWS credentials: {one_line(str(error))}", cause="refused"
            ) from error
        SigV4Auth(frozen, "lambda", self._region).add_auth(request)
        return dict(request.headers.items())

    async def close(self) -> None:
        """Close the connections."""
        await self._web.close()


def _judged(reply: HttpReply) -> HttpReply:
    """Return the answer of a function that ran to its end, or one that `judge` can classify."""
    if "X-Amz-Function-Error" in reply.headers:
        raise Unreachable(f"the function failed: {_failure(reply)}", sent=True)
    if reply.status in _OPERATORS:
        kind = reply.headers.get("X-Amzn-ErrorType", "").partition(":")[0]
        text = one_line(f"Lambda answered {reply.status} {kind} {reply.excerpt()}")
        raise Unreachable(text.rstrip(), cause="refused")
    return reply


def _failure(reply: HttpReply) -> str:
    """Return the error that a function raised, as one line."""
    try:
        error: Any = json.loads(reply.body)
    except (ValueError, RecursionError):
        error = None
    if not isinstance(error, dict):
        return reply.excerpt()
    parts = [str(error[key]) for key in ("errorType", "errorMessage") if error.get(key)]
    return one_line(": ".join(parts), 300) or reply.excerpt()
