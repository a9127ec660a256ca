"""Custom runners in any language: a batch goes to an endpoint, which answers for each."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from sequencerd import tracing
from sequencerd.core.model import RETRY, DefinitionError, Failed, Result, RetryPolicy, Task
from sequencerd.runners.answers import check_json, read_outcome
from sequencerd.runners.pace import Pace
from sequencerd.runners.web import Reply, Unreachable, Web, check_headers, check_url, judge


class HttpRunner:
    """POSTs `{"config": ..., "runners": [...]}` and expects a list of `{"id", "action", ...}`.

    `name` is the step type, for messages; `timeout` (seconds) is for a whole call, `per_second`
    limits the calls, `secret` (whsec_...) signs them. Raises ValueError for settings that can't
    work.
    """

    def __init__(
        self,
        url: str,
        *,
        name: str,
        timeout: float = 30.0,
        batch_size: int = 100,
        concurrency: int = 4,
        per_second: float | None = None,
        secret: str | None = None,
        headers: Mapping[str, str] | None = None,
        allow_private: bool = False,
        http2: bool = True,
        retry: RetryPolicy = RETRY,
    ) -> None:
        self.retry = retry
        self.batch_size = batch_size
        self.concurrency = concurrency
        self._pace = Pace(per_second)
        self.timeout = timeout + self._pace.longest_wait(concurrency) + 1
        self._url = check_url(url)
        self._name = name
        self._key = None if secret is None else read_secret(secret)
        self._headers = check_headers(headers or {})
        self._web = Web(
            timeout=timeout, connections=concurrency, allow_private=allow_private, http2=http2
        )

    def compile(self, config: Mapping[str, Any]) -> str:
        """The config as JSON: the endpoint alone knows what it means. Raises DefinitionError."""
        try:
            check_json(config)
        except ValueError as error:
            raise DefinitionError(f"config: {error}") from error
        return json.dumps(config)

    async def run(self, program: object, tasks: Sequence[Task]) -> Sequence[Result]:
        """One call for all tasks; each is judged by its own part of the answer."""
        assert isinstance(program, str)
        written = {task.key: _write(task) for task in tasks}
        asked = [task for task in tasks if written[task.key] is not None]
        answered: dict[str, Result] = {}
        if asked:
            events = ",".join(written[task.key] or "" for task in asked)
            body = f'{{"config":{program},"runners":[{events}]}}'.encode()
            await self._pace.turn()
            try:
                reply = await self._call(body, [task.key for task in asked])
            except Unreachable as error:
                failed: Result = error.failed(f"{self._name}: {error}")
                answered = {task.key: failed for task in asked}
            else:
                answered = self._judge(reply, asked)
        text = "data holds a number that can't be written as JSON"
        bad = Failed(text, permanent=True, asked=False)
        return [answered.get(task.key, bad) for task in tasks]

    async def _call(self, body: bytes, keys: Sequence[str]) -> Reply:
        id_ = keys[0] if len(keys) == 1 else batch_key(keys)
        headers = {
            **self._headers,
            "Content-Type": "application/json",
            "Accept": "application/json",
            "Idempotency-Key": id_,
            **tracing.headers(),
        }
        if self._key is not None:
            headers |= sign(self._key, id_, int(time.time()), body)
        return await self._web.call("POST", self._url, headers=headers, content=body)

    def _judge(self, reply: Reply, tasks: Sequence[Task]) -> dict[str, Result]:
        failed = judge(reply, f"{self._name} answered {reply.status} {reply.excerpt()}".rstrip())
        if failed is None:
            try:
                items = json.loads(reply.body)
            except (ValueError, RecursionError):
                items = None
            if isinstance(items, list):
                by_id = _by_id(items)
                return {task.key: self._result(task, by_id) for task in tasks}
            text = f"{self._name} answered no JSON list: {reply.excerpt()}"
            failed = Failed(text, fault="unclear", unknown=True)
        return {task.key: failed for task in tasks}

    def _result(self, task: Task, by_id: Mapping[str, list[Mapping[str, Any]]]) -> Result:
        id_ = str(task.view["id"])
        items = by_id.get(id_, [])
        if len(items) != 1:
            said = "nothing" if not items else f"{len(items)} times"
            return Failed(f"{self._name} answered {said} for the id {id_}", unknown=True)
        if items[0].get("action") is None:
            return Failed(f"{self._name} answered no action for the id {id_}", unknown=True)
        result = read_outcome(items[0])
        if isinstance(result, Failed):
            return replace(result, message=f"{self._name}: {result.message}")
        return result

    async def close(self) -> None:
        """Closes the connections."""
        await self._web.close()


def _write(task: Task) -> str | None:
    """What the endpoint sees of an enrollment; None for numbers beyond JSON (1e999 in data)."""
    try:
        return json.dumps({**task.view, "idempotencyKey": task.key}, allow_nan=False)
    except ValueError:
        return None


def _by_id(items: list[Any]) -> dict[str, list[Mapping[str, Any]]]:
    """The answers by id, which may come as a number or as text."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for item in items:
        if isinstance(item, dict) and isinstance(item.get("id"), int | str):
            found.setdefault(str(item["id"]), []).append(item)
    return found


def batch_key(keys: Sequence[str]) -> str:
    """The idempotency key of a batch: the same for the same keys in the same order."""
    return f"batch_{hashlib.sha256(' '.join(keys).encode()).hexdigest()[:32]}"


def read_secret(secret: str) -> bytes:
    """The key in a Standard Webhooks secret, `whsec_` and base64. Raises ValueError."""
    try:
        key = base64.b64decode(secret.removeprefix("whsec_"), validate=True)
    except (binascii.Error, ValueError):
        key = b""
    if not key:
        raise ValueError("the secret is not whsec_ and a base64 text")
    return key


def sign(key: bytes, id_: str, timestamp: int, body: bytes) -> dict[str, str]:
    """The headers of Standard Webhooks: HMAC-SHA256 of `id.timestamp.body`."""
    signed = f"{id_}.{timestamp}.".encode() + body
    digest = base64.b64encode(hmac.digest(key, signed, "sha256")).decode()
    return {
        "webhook-id": id_,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": f"v1,{digest}",
    }
