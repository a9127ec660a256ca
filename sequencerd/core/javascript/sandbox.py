"""The engine that runs lodash and handlebars: one context per thread, created on first use.

A context has no I/O, no clock and no randomness, and nothing in it can be changed: the same texts
give the same result, whatever was evaluated before. CPU time, memory and stack are limited. When
an evaluation exceeds a limit, the next one gets a new context.
"""

from __future__ import annotations

import re
import threading
from collections import OrderedDict
from functools import cache
from importlib.resources import files
from typing import Any, Literal

EVALUATION_SECONDS = 0.25  # CPU time of the process
COMPILE_SECONDS = 4.0  # at the first evaluation, the loop waits for it unless it is translated
TRANSLATION_SECONDS = 3 * COMPILE_SECONDS  # other threads work at the same time
SLOW_SECONDS = 0.02  # evaluations that take longer leave time to everything else in the loop
MEMORY_LIMIT = 96 * 1024 * 1024  # bytes, of which lodash and handlebars take 3 million
STACK_LIMIT = 2 * 1024 * 1024  # bytes; a thread has 8 MB
MAX_PROGRAMS = 1000  # compiled conditions and templates

_FRAMES = re.compile(r"\n    at .*", re.DOTALL)


class LimitError(Exception):
    """An evaluation exceeded a limit, which the message names."""


class ThrownError(Exception):
    """An error thrown by lodash, handlebars or a helper, with its message."""


def evaluate(maker: Literal["condition", "operands", "template"], program: str, *texts: str) -> Any:
    """Run a program on texts and return its result. Raises LimitError and ThrownError."""
    _check(program)
    sandbox = _current()
    sandbox.seconds = EVALUATION_SECONDS
    try:
        return sandbox.program(maker, program)(*texts)
    except Exception as error:
        _judge(sandbox, program, error)
    return evaluate(maker, program, *texts)


def ask(
    maker: Literal["analyse", "keys", "rename", "translate"],
    text: str,
    seconds: float | None = None,
) -> str:
    """Analyse or convert a text without evaluating it. Raises LimitError and ThrownError."""
    _check(text)
    sandbox = _current()
    try:
        return str(sandbox.make(maker, text, seconds=seconds))
    except Exception as error:
        _judge(sandbox, text, error)
    return ask(maker, text, seconds)


def translate(template: str) -> str:
    """Do the longest part of compiling a template, for `add` in another thread. Raises LimitError
    and ThrownError.
    """
    return ask("translate", template, TRANSLATION_SECONDS)


def add(template: str, translated: str) -> None:
    """Compile a template that was translated, unless this thread has compiled it. Raises LimitError
    and ThrownError.
    """
    sandbox = _current()
    try:
        sandbox.program("template", template, translated)
    except Exception as error:
        _judge(sandbox, template, error)


def has(template: str) -> bool:
    """Return whether this thread has compiled a template."""
    return _THREAD.sandbox is not None and ("template", template) in _THREAD.sandbox.programs


def refusals() -> int:
    """Return how often this thread could not compile or analyse a text within the limits. A caller
    of something that has increased it may try again later.
    """
    return _THREAD.refusals


class _Sandbox:
    """A context with lodash and handlebars, and the programs compiled in it."""

    def __init__(self) -> None:
        # Imported on first use, because most commands do not need it; and not from `quickjs`,
        # which starts a thread on import.
        from _quickjs import Context  # noqa: PLC0415

        self._context = Context()
        self._context.set_max_stack_size(STACK_LIMIT)
        for name in ("prepare.js", "vendor/lodash.js", "vendor/handlebars.js"):
            self._context.eval(_read(name))
        offer = self._context.eval(_read("evaluate.js"))
        self._maker = offer(_read("vendor/locales.json"))
        self._context.set_memory_limit(MEMORY_LIMIT)
        self._context.set_time_limit(EVALUATION_SECONDS)
        self.seconds = EVALUATION_SECONDS  # the limit when an error was raised
        self.is_new = True  # whether only the current evaluation has used the context
        self._made = 0
        self.programs: OrderedDict[tuple[str, str], Any] = OrderedDict()  # the last used one last

    def program(self, maker: str, text: str, translated: str | None = None) -> Any:
        """Return what a function of evaluate.js makes of a text, which is kept."""
        key = (maker, text)
        try:
            self.programs.move_to_end(key)
        except KeyError:
            self.programs[key] = self.make(maker, text, translated)
            if len(self.programs) > MAX_PROGRAMS:
                self.programs.popitem(last=False)
        else:
            self.is_new = False
        return self.programs[key]

    def make(
        self,
        maker: str,
        text: str,
        translated: str | None = None,
        *,
        seconds: float | None = None,
    ) -> Any:
        """Call a function of evaluate.js on a text."""
        self._made += 1
        self.is_new = self.is_new and self._made <= 1
        self.seconds = seconds or COMPILE_SECONDS
        self._context.set_time_limit(self.seconds)
        try:
            made = self._maker(maker, text, translated)
        finally:
            self._context.set_time_limit(EVALUATION_SECONDS)
        self.seconds = EVALUATION_SECONDS
        _REFUSED.pop(text, None)
        return made


class _RefusedText:
    """A text that could not be compiled or analysed within the limits. It may succeed later,
    because the limit counts the CPU time of all threads. So it is tried again, each time after
    twice as many uses: a thousand uses cost ten attempts.
    """

    def __init__(self) -> None:
        self.reason = ""
        self._uses = 2

    def is_due(self) -> bool:
        """Return whether it is to be tried again."""
        self._uses += 1
        return self._uses & (self._uses - 1) == 0  # a power of two


_REFUSED: dict[str, _RefusedText] = {}
"""Texts that could not be compiled or analysed within the limits."""


class _Thread(threading.local):
    """The context of each thread: QuickJS must be called by the thread that created it."""

    sandbox: _Sandbox | None = None
    refusals = 0


_THREAD = _Thread()


def _current() -> _Sandbox:
    if _THREAD.sandbox is None:
        _THREAD.sandbox = _Sandbox()
    return _THREAD.sandbox


def _check(text: str) -> None:
    """Raise LimitError if a text was refused, unless it is to be tried again."""
    refused = _REFUSED.get(text)
    if refused is not None and not refused.is_due():
        _THREAD.refusals += 1
        raise LimitError(refused.reason)


def _judge(sandbox: _Sandbox, text: str, error: Exception) -> None:
    """Raise the error that an exception means, unless earlier evaluations used up the memory.
    Raises MemoryError if it is the machine's that is exhausted.
    """
    from _quickjs import JSException, StackOverflow  # noqa: PLC0415 -- as above

    if not isinstance(error, JSException):
        raise error
    message = _FRAMES.sub("", str(error)).strip()
    if isinstance(error, StackOverflow):
        reached = "the data or the template is nested too deeply"
    elif message == "InternalError: interrupted":
        reached = f"more than {sandbox.seconds:g} seconds of computing"
    elif message in ("InternalError: out of memory", "null"):
        reached = f"more than {MEMORY_LIMIT // 1024 // 1024} MB of memory"
    else:
        raise ThrownError(re.sub(r"^(?:\w*Error|Exception): ", "", message)) from None
    _THREAD.sandbox = None
    if "memory" in reached:
        bytearray(MEMORY_LIMIT)  # raises MemoryError if the limit could not be reached
    if sandbox.is_new or "memory" not in reached:
        if sandbox.seconds != EVALUATION_SECONDS:
            _THREAD.refusals += 1
            if len(_REFUSED) < MAX_PROGRAMS:
                _REFUSED.setdefault(text, _RefusedText()).reason = reached
        raise LimitError(reached) from None


@cache
def _read(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")
