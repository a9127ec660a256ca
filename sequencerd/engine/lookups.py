"""Lookups: read external data about subjects, in one request for a whole batch."""

from __future__ import annotations

import asyncio
import inspect
import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import replace
from datetime import timedelta
from importlib.metadata import entry_points
from math import isfinite
from typing import Any

import asyncpg

from sequencerd.core import exact_json
from sequencerd.core.model import LOOKUP_LIMITS, Limits
from sequencerd.core.task import LookupAnswer, Task
from sequencerd.core.view import External
from sequencerd.runners.fields import one_line, text_of
from sequencerd.runners.http import Endpoint, read_id, read_list
from sequencerd.runners.http_client import AnswerTooLarge
from sequencerd.runners.http_reply import TOO_LARGE, judge
from sequencerd.runners.registry import make_endpoint
from sequencerd.settings import LookupSettings
from sequencerd.storage import connections, sources

GROUP = "sequencerd.lookups"

QuerySubjects = Callable[[list[str]], Awaitable[Mapping[str, External]]]
"""A function from subjects to their data, which may raise anything."""


class _FailedStatusError(Exception):
    """A status that is none of success, with the least wait that the server asks for."""

    def __init__(self, message: str, retry_after: timedelta | None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Lookup:
    """One source of external data, in the form that executors run."""

    def __init__(self, name: str, ask: QuerySubjects, limits: Limits) -> None:
        self.limits = replace(limits, timeout=limits.timeout + 1)
        self._name = name
        self._ask = ask
        self._time = limits.timeout

    async def run(self, _program: object, tasks: Sequence[Task]) -> Sequence[LookupAnswer]:
        """Request data once for the whole batch. Subjects that the source omits get no data."""
        subjects = list(dict.fromkeys(str(task.view["subject"]) for task in tasks))
        try:
            async with asyncio.timeout(self._time):
                found = await self._ask(subjects)
        except TimeoutError:
            return self._failed(f"no answer within {self._time:g} seconds", len(tasks))
        except _FailedStatusError as error:
            return self._failed(str(error), len(tasks), error.retry_after)
        except Exception as error:  # an error of the user's function or server, or of the database
            return self._failed(text_of(error) or type(error).__name__, len(tasks))
        answers = {subject: self._answer(found.get(subject, {})) for subject in subjects}
        return [answers[str(task.view["subject"])] for task in tasks]

    def _answer(self, data: object) -> LookupAnswer:
        """Return the data of a subject, or the failure if JSON cannot hold them, or no step could
        read them.
        """
        if not isinstance(data, Mapping):
            what = f"the data are of type {type(data).__name__} instead of an object"
            return self._failed(what, 1)[0]
        try:
            exact_json.check_depth(json.dumps(given := dict(data), allow_nan=False))
        except (TypeError, ValueError, RecursionError) as error:
            return self._failed(_fault("external", data) or text_of(error), 1)[0]
        return LookupAnswer(given)

    def _failed(
        self, why: str, count: int, retry_after: timedelta | None = None
    ) -> list[LookupAnswer]:
        message = one_line(f"lookup {self._name!r} failed: {why}")
        return [LookupAnswer(None, message, retry_after)] * count


class Lookups:
    """The sources by name: an endpoint in the settings, a Python function of a package, or an SQL
    function.
    """

    def __init__(
        self,
        pool: asyncpg.Pool,
        endpoints: Mapping[str, LookupSettings],
        *,
        timeout: float = 30.0,
    ) -> None:
        """Make the lookups. `pool` is only for SQL functions, so that slow ones delay nothing else.
        `timeout` is the number of seconds for each. Raises SettingsError.
        """
        self._pool = pool
        self._timeout = timeout
        self._endpoints: list[Endpoint] = []
        self._installed = {
            point.name: _by_python(point.load()) for point in entry_points(group=GROUP)
        }
        self._set_up = {
            name: self._by_endpoint(name, settings) for name, settings in endpoints.items()
        }

    def get(self, name: str) -> Lookup:
        """Return the source that a definition names. Requests to an unknown source fail."""
        if name in self._set_up:
            return self._set_up[name]
        if name in self._installed:
            return Lookup(name, self._installed[name], LOOKUP_LIMITS)

        async def ask(subjects: list[str]) -> dict[str, External]:
            return await self._by_sql(name, subjects)

        # the server ends the statement; this is for what it cannot, and the wait for a connection
        timeout = 2 * self._timeout + 5
        return Lookup(name, ask, replace(LOOKUP_LIMITS, timeout=timeout))

    async def _by_sql(self, name: str, subjects: list[str]) -> dict[str, External]:
        async with AsyncExitStack() as stack:
            try:
                async with asyncio.timeout(self._timeout):
                    connection = await stack.enter_async_context(connections.borrow(self._pool))
            except TimeoutError:
                raise RuntimeError(
                    "other lookups have held all of database.lookup_connections "
                    f"({self._pool.get_max_size()}) for {self._timeout:g} seconds"
                ) from None
            try:
                return await sources.look_up(connection, name, subjects, self._timeout)
            except asyncpg.QueryCanceledError:
                raise RuntimeError(f"no answer within {self._timeout:g} seconds") from None

    def _by_endpoint(self, name: str, settings: LookupSettings) -> Lookup:
        endpoint = make_endpoint(f"lookups.{name}", settings)
        self._endpoints.append(endpoint)
        form = settings.form or ("original" if settings.arn else "list")

        async def halves(subjects: list[str]) -> dict[str, External]:
            middle = len(subjects) // 2
            return await ask(subjects[:middle]) | await ask(subjects[middle:])

        async def ask(subjects: list[str]) -> dict[str, External]:
            question = {"runners": subjects} if form == "original" else subjects
            is_one = len(subjects) == 1
            try:
                reply = await endpoint.post(json.dumps(question).encode())
            except AnswerTooLarge:
                if is_one:
                    raise
                return await halves(subjects)
            if reply.status == TOO_LARGE and not is_one:
                return await halves(subjects)
            text = f"it answered {reply.status} {reply.excerpt()}".rstrip()
            if (failed := judge(reply, text)) is not None:
                raise _FailedStatusError(text, failed.retry_after)
            try:
                answer = read_list(reply)
            except ValueError as error:
                raise ValueError(f"it {error}") from None
            return by_id(answer)

        return Lookup(name, ask, settings.limits)

    async def close(self) -> None:
        """Close the connections."""
        for endpoint in self._endpoints:
            await endpoint.close()


def _by_python(function: Callable[[list[str]], Any]) -> QuerySubjects:
    """Adapt a function of a package, which returns a mapping or a list of objects with `id`."""

    async def ask(subjects: list[str]) -> Mapping[str, External]:
        if inspect.iscoroutinefunction(function):
            answer = await function(subjects)
        else:
            answer = await asyncio.to_thread(function, subjects)
        if isinstance(answer, Mapping):
            return {str(subject): data for subject, data in answer.items()}
        return by_id(answer)

    return ask


def by_id(answer: object) -> dict[str, External]:
    """Return objects by the `id` of their subject. Raises ValueError for any other list."""
    if not isinstance(answer, list) or not all(isinstance(item, dict) for item in answer):
        raise ValueError("the answer is not a list of objects with id")
    found: dict[str, External] = {}
    for item in answer:
        id_ = read_id(item)
        if id_ is None:
            raise ValueError("an object of the answer has no id")
        if id_ in found:
            raise ValueError(f"the answer has the id {one_line(id_, 50)} twice")
        found[id_] = item
    return found


def _fault(path: str, value: object) -> str | None:
    """Return which value JSON cannot hold, and why; None if all can be held."""
    match value:
        case Mapping() | list() | tuple():
            parts = value.items() if isinstance(value, Mapping) else enumerate(value)
            with suppress(RecursionError):
                return next(filter(None, (_fault(f"{path}.{key}", v) for key, v in parts)), None)
            return f"{path} is nested too deeply"
        case float() if not isfinite(value):
            return f"{path} is {value}: the number is too large, or not a number"
        case None | str() | int() | float():
            return None
        case _:
            return f"{path} is of type {type(value).__name__}, which JSON does not have"
