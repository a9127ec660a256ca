"""Custom runners in any language: an endpoint receives a batch, and answers for each enrollment."""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import hmac
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from sequencerd.core import exact_json
from sequencerd.core.faults import DefinitionError
from sequencerd.core.model import DEFAULT_RETRY, Limits, RetryPolicy
from sequencerd.core.task import Answer, Failed, NotStarted, Result, Task
from sequencerd.core.view import View
from sequencerd.runners import tracing
from sequencerd.runners.answers import ANSWERS_OF_WORDS, check_json, read_outcome
from sequencerd.runners.aws_lambda import LambdaFunction
from sequencerd.runners.fields import one_line
from sequencerd.runners.http_client import MAX_ANSWER, HttpClient, Unreachable, check_headers
from sequencerd.runners.http_reply import TOO_LARGE, HttpReply, judge
from sequencerd.runners.pace import Pace, TakePermits

BATCH_BYTES = 96_000
"""Express, and proxies by default, accept no more than 100 kB."""

MAX_ITEM = 64 * 1024  # bytes of the answer per enrollment, if that is more than MAX_ANSWER
MAX_IDS = 5
NO_JSON = "data holds a number that cannot be written as JSON"


class HttpEndpoint:
    """A URL that accepts JSON. `secret` (whsec_...) signs the calls. Raises ValueError for invalid
    settings.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout: float,
        connections: int,
        secret: str | None = None,
        headers: Mapping[str, str] | None = None,
        allow_private: bool = False,
        http2: bool = False,
    ) -> None:
        self._url = url
        self._key = None if secret is None else read_secret(secret)
        self._headers = {"Content-Type": "application/json", "Accept": "application/json"}
        self._headers |= check_headers(headers or {})
        self._web = HttpClient(
            timeout=timeout, connections=connections, allow_private=allow_private, http2=http2
        )

    async def post(
        self, body: bytes, key: str | None = None, max_answer: int = MAX_ANSWER
    ) -> HttpReply:
        """Send JSON, with its idempotency key, and return the answer. Raises Unreachable."""
        headers = {**self._headers, **tracing.headers()}
        if key is not None:
            headers["Idempotency-Key"] = key
            if self._key is not None:
                headers |= sign(self._key, key, int(time.time()), body)
        return await self._web.call(
            "POST", self._url, headers=headers, content=body, max_answer=max_answer
        )

    async def close(self) -> None:
        """Close the connections."""
        await self._web.close()


Endpoint = HttpEndpoint | LambdaFunction
"""The destination of calls."""


class BatchRunner:
    """Posts `{"config": ..., "runners": [...]}` and expects a list of `{"id", "action", ...}`.

    `name` is the step type, for messages. `limits` apply to the endpoint; no call is larger than
    `batch_bytes`.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        name: str,
        limits: Limits,
        batch_bytes: int = BATCH_BYTES,
        retry: RetryPolicy = DEFAULT_RETRY,
        take: TakePermits | None = None,
    ) -> None:
        self.retry = retry
        self._pace = Pace(limits, name, take)
        self._call_timeout = limits.timeout
        # a batch that needs several calls begins no further call after the time of one
        longest = 2 * limits.timeout + self._pace.longest_wait + 1
        self.limits = replace(limits, timeout=longest)
        self._batch_bytes = batch_bytes
        self._name = name
        self._endpoint = endpoint

    def compile(self, config: Mapping[str, Any]) -> str:
        """Return the config as JSON; the endpoint interprets it. Raises DefinitionError."""
        try:
            check_json(config)
        except ValueError as error:
            raise DefinitionError(f"config: {error}") from error
        return json.dumps(config)

    async def run(self, program: object, tasks: Sequence[Task]) -> Sequence[Result]:
        """Make one call for all tasks, or several if it would be too large. The result of each task
        depends only on its own part of the answer.
        """
        assert isinstance(program, str)
        written = {task.key: event for task in tasks if (event := _write(task)) is not None}
        bad = Failed(NO_JSON, permanent=True, asked=False)
        results: dict[str, Result] = {task.key: bad for task in tasks if task.key not in written}
        left = [task for task in tasks if task.key in written]
        size = len(left)
        since = _now()
        while left:
            batch = left[: min(size, self._fitting(program, left, written))]
            if not await self._pace.turn():
                results |= {task.key: NotStarted() for task in left}
                break
            answered = await self._ask(program, batch, written)
            if answered is None:
                size = max(len(batch) // 2, 1)
                continue
            results |= answered
            left = left[len(batch) :]
            failed = answered[batch[0].key]
            if isinstance(failed, Failed) and failed.fault == "server":
                rest: Result = replace(failed, unknown=False, asked=False)
            elif _now() - since > self._call_timeout:
                rest = NotStarted()
            else:
                continue
            results |= {task.key: rest for task in left}
            break
        return [results[task.key] for task in tasks]

    def _fitting(self, program: str, tasks: Sequence[Task], written: Mapping[str, str]) -> int:
        """Return how many of the tasks fit into one call, at least one."""
        room = self._batch_bytes - len(_body(program, []))
        for count, task in enumerate(tasks):
            room -= len(written[task.key]) + 1
            if room < 0:
                return max(count, 1)
        return len(tasks)

    async def _ask(
        self, program: str, tasks: Sequence[Task], written: Mapping[str, str]
    ) -> dict[str, Result] | None:
        """Make one call. Return None if it was too large and could be made with fewer tasks."""
        now = _now()
        late: dict[str, Result] = {task.key: NotStarted() for task in tasks if task.is_late(now)}
        if late:
            tasks = [task for task in tasks if task.key not in late]
            if not tasks:
                return late
        body = _body(program, [written[task.key] for task in tasks])
        try:
            reply = await self._call(body, [task.key for task in tasks])
        except Unreachable as error:
            failed = error.failed(f"{self._name}: {error}")
            return late | dict.fromkeys((task.key for task in tasks), failed)
        if reply.status == TOO_LARGE and len(tasks) > 1:
            self._batch_bytes = min(self._batch_bytes, len(body) // 2)
            return None
        return late | self._judge(reply, tasks)

    async def _call(self, body: bytes, keys: Sequence[str]) -> HttpReply:
        key = keys[0] if len(keys) == 1 else batch_key(keys)
        return await self._endpoint.post(body, key, max(MAX_ANSWER, len(keys) * MAX_ITEM))

    def _judge(self, reply: HttpReply, tasks: Sequence[Task]) -> dict[str, Result]:
        failed = judge(reply, f"{self._name} answered {reply.status} {reply.excerpt()}".rstrip())
        if failed is None:
            try:
                by_id = _by_id(read_list(reply, exact_json.loads))
                return {task.key: _hidden(self._result(task, by_id), reply) for task in tasks}
            except ValueError as error:
                failed = Failed(f"{self._name} {error}", fault="unclear", unknown=True)
        return {task.key: failed for task in tasks}

    def _result(self, task: Task, by_id: Mapping[str, list[Mapping[str, Any]]]) -> Result:
        id_ = str(task.view["id"])
        items = by_id.get(id_, [])
        if len(items) != 1:
            said = f"{len(items)} times" if items else "nothing"
            said += f" for the id {id_}"
            if not items:
                came = ", ".join(list(by_id)[:MAX_IDS]) or "none"
                more = ", ..." if len(by_id) > MAX_IDS else ""
                said += f"; ids received: {one_line(came, 200)}{more}"
            return Failed(f"{self._name} answered {said}", unknown=True)
        (item,) = items
        action = item.get("action")
        if action is None:
            return Failed(f"{self._name} answered no action for the id {id_}", unknown=True)
        is_plain = isinstance(action, str) and len(item) == 2
        result = (ANSWERS_OF_WORDS.get(action) if is_plain else None) or read_outcome(item)
        if isinstance(result, Failed):
            return replace(result, message=f"{self._name}: {result.message}")
        return result

    async def close(self) -> None:
        """Close the connections."""
        await self._endpoint.close()


def _hidden(result: Result, reply: HttpReply) -> Result:
    """Return a result without secrets; usually the same object, so that results are shared."""
    if not isinstance(result, Answer | Failed) or not result.message:
        return result
    message = reply.hide(result.message)
    return result if message == result.message else replace(result, message=message)


def _write(task: Task) -> str | None:
    """Return what the endpoint receives for an enrollment, with the numbers of its data as in
    PostgreSQL; None if a lookup returned a number that JSON does not have (1e999).
    """
    view = task.view
    unchecked = view["external"] if isinstance(view, View) else view
    if unchecked:
        try:
            json.dumps(unchecked, allow_nan=False)
        except ValueError:
            return None
    text = view.text if isinstance(view, View) else json.dumps(view)
    return f'{text[:-1]}, "idempotencyKey": {json.dumps(task.key)}}}'


def _body(program: str, events: Sequence[str]) -> bytes:
    return f'{{"config":{program},"runners":[{",".join(events)}]}}'.encode()


def read_list(reply: HttpReply, loads: Callable[[str], Any] = json.loads) -> list[Any]:
    """Return the list that an answer contains. Raises ValueError."""
    reason = ""
    try:
        items = loads(reply.text())
        if isinstance(items, list):
            return items
    except (ValueError, RecursionError) as error:
        reason = f" ({one_line(str(error), 100)})"
    raise ValueError(f"did not answer with a JSON list{reason}: {reply.excerpt()}")


def read_id(item: Mapping[str, Any]) -> str | None:
    """Return the id of an answer as text. Some languages write a number as a text or as 7.0."""
    id_ = item.get("id")
    if isinstance(id_, float) and id_.is_integer():
        id_ = int(id_)
    return str(id_) if isinstance(id_, int | str) and not isinstance(id_, bool) else None


def _by_id(items: list[Any]) -> dict[str, list[Mapping[str, Any]]]:
    found: dict[str, list[Mapping[str, Any]]] = {}
    for item in items:
        if isinstance(item, dict) and (id_ := read_id(item)) is not None:
            found.setdefault(id_, []).append(item)
    return found


def _now() -> float:
    return asyncio.get_running_loop().time()


def batch_key(keys: Sequence[str]) -> str:
    """Return the idempotency key of a batch: the same for the same keys in the same order."""
    return f"batch_{hashlib.sha256(' '.join(keys).encode()).hexdigest()[:32]}"


def read_secret(secret: str) -> bytes:
    """Return the key of a Standard Webhooks secret, `whsec_` and base64. Raises ValueError."""
    try:
        key = base64.b64decode(secret.removeprefix("whsec_"), validate=True)
    except (binascii.Error, ValueError):
        key = b""
    if not key:
        raise ValueError("the secret is not whsec_ and a base64 text")
    return key


def sign(key: bytes, id_: str, timestamp: int, body: bytes) -> dict[str, str]:
    """Return the headers of Standard Webhooks: HMAC-SHA256 of `id.timestamp.body`."""
    signed = f"{id_}.{timestamp}.".encode() + body
    digest = base64.b64encode(hmac.digest(key, signed, "sha256")).decode()
    return {
        "webhook-id": id_,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": f"v1,{digest}",
    }
