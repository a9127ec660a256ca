"""AWS Lambda for tests: it verifies each signature by itself, and runs functions by their ARNs."""

from __future__ import annotations

import hashlib
import hmac
import json
import re
from collections.abc import Awaitable, Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import pytest

from tests.helpers import servers
from tests.helpers.servers import Request

ARN = "arn:aws:lambda:eu-west-1:123456789012:function:sequencer-prod-Score"
KEY_ID, SECRET, TOKEN = "AKIDEXAMPLE", "a/secret+key", "a-session-token"

Function = Callable[[Any], Awaitable[servers.Answer]]


def signature(request: Request, names: str, date: str, scope: str) -> str:
    """The signature of a request by AWS's specification, version 4."""
    canonical = "\n".join(
        [
            request.method,
            quote(request.target, safe="/-_.~"),  # each segment is encoded twice
            "",
            *(f"{name}:{request.headers[name].strip()}" for name in names.split(";")),
            "",
            names,
            hashlib.sha256(request.body).hexdigest(),
        ]
    )
    text = f"AWS4-HMAC-SHA256\n{date}\n{scope}\n{hashlib.sha256(canonical.encode()).hexdigest()}"
    key = f"AWS4{SECRET}".encode()
    for part in scope.split("/"):
        key = hmac.digest(key, part.encode(), "sha256")
    return hmac.new(key, text.encode(), "sha256").hexdigest()


def is_signed(request: Request) -> bool:
    """Whether Lambda would accept a request."""
    given = re.fullmatch(
        rf"AWS4-HMAC-SHA256 Credential={KEY_ID}/(\d{{8}}/eu-west-1/lambda/aws4_request), "
        r"SignedHeaders=([a-z0-9;-]+), Signature=([0-9a-f]{64})",
        request.headers.get("authorization", ""),
    )
    if given is None:
        return False
    scope, names, sent = given.groups()
    date = request.headers["x-amz-date"]
    at = datetime.strptime(date, "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
    return (
        {"host", "x-amz-date", "x-amz-invocation-type"} <= set(names.split(";"))
        and abs((datetime.now(UTC) - at).total_seconds()) < 300
        and scope.startswith(date[:8])
        and hmac.compare_digest(sent, signature(request, names, date, scope))
    )


def aws(functions: Mapping[str, Function]) -> Callable[[Request], Awaitable[servers.Answer]]:
    """Lambda's own part, with functions by their ARNs: 403 for what is not signed, 404 for other
    functions, dry runs.
    """

    async def respond(request: Request) -> servers.Answer:
        if not is_signed(request):
            return refusal(403, "InvalidSignatureException")
        found = re.fullmatch("/2015-03-31/functions/([^/]+)/invocations", request.target)
        function = functions.get(unquote(found[1])) if found else None
        if function is None:
            return refusal(404, "ResourceNotFoundException")
        if request.headers["x-amz-invocation-type"] == "DryRun":
            return servers.Answer(204)
        return await function(json.loads(request.body))

    return respond


def refusal(status: int, kind: str, **headers: str) -> servers.Answer:
    body = json.dumps({"Type": "User", "message": "Rate Exceeded."}).encode()
    return servers.Answer(status, body, {"x-amzn-ErrorType": f"{kind}:http://aws/", **headers})


async def score(event: Any) -> servers.Answer:
    """A function as it was deployed for the original."""
    assert set(event) == {"config", "runners"}
    answers = [{"id": runner["id"], "action": "next"} for runner in event["runners"]]
    return servers.Answer(body=json.dumps(answers).encode())


def use_credentials(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Give this process the credentials that it accepts, and no others."""
    for name in ("AWS_PROFILE", "AWS_ENDPOINT_URL", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY_ID)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(folder / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(folder / "credentials"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
