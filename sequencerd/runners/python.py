"""Custom runners in Python: functions under the entry point group `sequencerd.runners`.

A runner is a function of a step's config and one enrollment, both as plain JSON data:

    def give_coupon(config, runner):
        issue(config["percent"], to=runner["subject"], once=runner["idempotencyKey"])

It may be async; otherwise it runs in a thread. Its return value moves the enrollment:

- None or "next": to the next step; "altNext": to the other; "noop": stay, and be executed again
- {"action": ..., "message": ..., "data": {...}, "retryAfter": seconds, "wakeAt": "2030-01-01T09Z"}

After an exception the enrollment is retried by the step's retry policy, unless the exception is
`sequencerd.runners.Refused`. The options of `@runner(...)` are a pydantic model of the config, and
limits. With `batch_size`, the function takes a list of enrollments and returns a list in the same
order, or None.
"""

from __future__ import annotations

import asyncio
import inspect
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import entry_points
from typing import Any, TypeVar

from pydantic import BaseModel

from sequencerd.core.config import parse_config
from sequencerd.core.describe import counted
from sequencerd.core.model import DEFAULT_RETRY, Limits, RetryPolicy
from sequencerd.core.task import Answer, Attribution, Failed, Result, Task
from sequencerd.runners.answers import (
    ANSWERS_OF_WORDS,
    StrictActionAnswer,
    check_result,
    read_outcome,
)
from sequencerd.runners.error_causes import is_exhausted
from sequencerd.runners.fields import one_line, text_of
from sequencerd.runners.protocol import Refused, Runner

GROUP = "sequencerd.runners"

COMMON_KEYS = frozenset({"topic", "channel", "address"})
"""The keys that every custom step may have without declaring them in its model."""

LIMITS = Limits(timeout=60.0)
"""The default limits of functions."""

Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class FunctionOptions:
    """The options that a function declares."""

    config: type[BaseModel] | None = None
    limits: Limits = LIMITS
    in_batches: bool = False
    retry: RetryPolicy = DEFAULT_RETRY


def runner(
    *,
    config: type[BaseModel] | None = None,
    batch_size: int | None = None,
    concurrency: int = LIMITS.concurrency,
    timeout: float = LIMITS.timeout,
    retry: RetryPolicy = DEFAULT_RETRY,
) -> Callable[[Function], Function]:
    """Describe a runner function: see the module. `timeout` is in seconds, for one call."""
    in_batches = batch_size is not None
    limits = Limits(concurrency, timeout, 1 if batch_size is None else batch_size)
    options = FunctionOptions(config, limits, in_batches, retry)

    def describe(function: Function) -> Function:
        vars(function)["sequencerd_runner"] = options
        return function

    return describe


class PythonRunner:
    """Calls a function for each enrollment, or for each batch."""

    def __init__(self, function: Callable[..., Any], *, name: str) -> None:
        options = getattr(function, "sequencerd_runner", FunctionOptions())
        assert isinstance(options, FunctionOptions)
        self.limits = options.limits
        self.retry = options.retry
        self._function = function
        self._name = name
        self._in_batches = options.in_batches
        self._model = options.config
        self._is_async = inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
            type(function).__call__
        )
        self._threads = asyncio.Semaphore(options.limits.concurrency)

    def compile(self, config: Mapping[str, Any]) -> object:
        """Return the config, as the function's model if it has one. Raises DefinitionError."""
        if self._model is None:
            return config
        fields = self._model.model_fields
        known = fields.keys() | {field.alias for field in fields.values()}
        own = {
            key: value for key, value in config.items() if key in known or key not in COMMON_KEYS
        }
        return parse_config(self._model, own, self._name)

    async def run(self, program: object, tasks: Sequence[Task]) -> Sequence[Result]:
        """Call the function: once for all tasks, or once for each."""
        views = [{**task.view, "idempotencyKey": task.key} for task in tasks]
        if self._in_batches:
            answer = await self._call(program, views)
            return self._results(answer, len(tasks))
        answers = [await self._call(program, view) for view in views]
        return [self._result(answer) for answer in answers]

    async def _call(self, program: object, argument: object) -> object:
        """Return the function's answer, or Failed if it raises an exception."""
        if not self._is_async:
            return await self._call_in_thread(program, argument)
        try:
            answer: object = await self._function(program, argument)
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            return self._failed(error)  # the function raised it: the call was not cancelled
        except (Exception, SystemExit) as error:
            return self._failed(error)
        return answer

    async def _call_in_thread(self, program: object, argument: object) -> object:
        """Call the function in a thread of its own.

        The default thread pool is not used: a call that hangs, which cannot be stopped, would
        occupy one of its threads. Here it occupies a thread of this function only, and ends with
        the process.
        """
        loop = asyncio.get_running_loop()
        done: asyncio.Future[object] = loop.create_future()

        def finish(answer: object) -> None:
            self._threads.release()
            if not done.done():
                done.set_result(answer)

        def work() -> None:
            try:
                answer = self._function(program, argument)
            except BaseException as error:  # no exception may get lost in a thread
                answer = self._failed(error)
            try:
                loop.call_soon_threadsafe(finish, answer)
            except RuntimeError:
                return  # the daemon has ended in the meantime

        await self._threads.acquire()
        try:
            threading.Thread(target=work, name=f"runner {self._name}", daemon=True).start()
        except RuntimeError as error:  # the system allows no more threads
            finish(self._failed(error))
        return await done

    def _results(self, answer: object, count: int) -> list[Result]:
        if answer is None:
            return [ANSWERS_OF_WORDS[None]] * count
        if isinstance(answer, Failed):
            return [answer] * count
        if not isinstance(answer, list | tuple):
            text = f"{self._name} answered {type(answer).__name__}, not a list or None"
            return [Failed(text, fault="unclear", unknown=True)] * count
        if len(answer) != count:
            items, wanted = counted(len(answer), "item"), counted(count, "enrollment")
            text = f"{self._name} returned {items} for {wanted}"
            return [Failed(text, fault="unclear", unknown=True)] * count
        return [self._result(item) for item in answer]

    def _result(self, answer: object) -> Result:
        if isinstance(answer, Failed) and (result := check_result(answer)) is answer:
            return answer  # in the words of the author
        if isinstance(answer, Answer | Failed):
            result = check_result(answer)
        else:
            result = read_outcome(answer, StrictActionAnswer)
        if isinstance(result, Failed):
            return replace(result, message=f"{self._name}: {result.message}")
        return result

    def _failed(self, error: BaseException) -> Failed:
        text = one_line(text_of(error))
        if isinstance(error, Refused):
            return Failed(text or "refused", permanent=True)
        frames = traceback.extract_tb(error.__traceback__)
        place = f" ({frames[-1].name}, line {frames[-1].lineno})" if frames else ""
        message = f"{self._name}: {type(error).__name__}: {text}{place}"
        fault: Attribution = "server" if is_exhausted(error) else "unclear"
        return Failed(message, fault=fault, unknown=True)

    async def close(self) -> None:
        """Do nothing: there is nothing to release."""


class CheckedRunner:
    """A Runner of a plug-in, whose results are checked."""

    def __init__(self, runner: Runner) -> None:
        self.limits = runner.limits
        self.retry = runner.retry
        self.compile = runner.compile
        self.close = runner.close
        self._run = runner.run

    async def run(self, program: object, tasks: Sequence[Task]) -> Sequence[Result]:
        """Call the runner, and check its results."""
        results = await self._run(program, tasks)
        if not isinstance(results, Sequence) or isinstance(results, str):
            return results  # the executor says what is wrong
        return [check_result(one) if isinstance(one, Answer | Failed) else one for one in results]


def load(group: str = GROUP) -> dict[str, Runner]:
    """Return the runners of all installed packages, by step type.

    An entry point names a function or a Runner object. Raises ValueError for one that cannot be
    loaded, and for a name that two packages use.
    """
    found: dict[str, Runner] = {}
    for point in entry_points(group=group):
        if point.name in found:
            raise ValueError(f"two packages have a Python runner {point.name!r}")
        try:
            loaded = point.load()
        except Exception as error:
            raise ValueError(
                f"the Python runner {point.name!r} ({point.value}) cannot be loaded: "
                f"{type(error).__name__}: {one_line(text_of(error))}"
            ) from error
        found[point.name] = as_runner(loaded, name=point.name)
    return found


def as_runner(loaded: Any, *, name: str) -> Runner:
    """Convert a function, or an object with all attributes of a Runner, to a Runner. Raises
    ValueError.
    """
    wanted = ("compile", "run", "close", "limits", "retry")
    if not inspect.isclass(loaded) and all(hasattr(loaded, part) for part in wanted):
        return CheckedRunner(loaded)
    if inspect.isclass(loaded) or not callable(loaded):
        raise ValueError(f"the Python runner {name!r} is not a function: name one, or an instance")
    return PythonRunner(loaded, name=name)
