"""Renders what a template's tags mean, by handlebars' rules, and counts the work.

Each function here takes the parts of one kind of tag and answers a function of a scope: one that
gives a value, or one that writes. Rules: handlebars, lib/handlebars/helpers and runtime.js.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from sequencerd.core.javascript import is_truthy
from sequencerd.core.model import EvaluationError
from sequencerd.core.template_helpers import Helper, Request
from sequencerd.core.template_values import entries, is_empty, own_property
from sequencerd.core.template_values import text as text_of

MAX_WORK = 1024 * 1024  # one per character written and value read, ten per tag and repetition
TAG_WORK = 10


@dataclass(slots=True)
class Rendering:
    """One rendering: what is written so far and what may still be spent."""

    root: object
    out: list[str] = field(default_factory=list)
    left: int = MAX_WORK

    def spend(self, work: int) -> None:
        self.left -= work
        if self.left < 0:
            raise EvaluationError(
                "bad_data",
                f"the template writes or repeats too much (more than {MAX_WORK} characters, "
                "counting ten for a tag): shorten the lists that it goes through",
            )

    def write(self, piece: str) -> None:
        self.spend(len(piece))
        self.out.append(piece)


@dataclass(slots=True)
class Frame:
    """What {{@index}} and the like read; `outer` is what {{@../index}} reads."""

    values: dict[str, object]
    outer: Frame | None = None


@dataclass(slots=True)
class Scope:
    """Where a tag is rendered: the current value, and the scope that `../` leads to."""

    run: Rendering
    this: object
    outer: Scope | None
    frame: Frame
    params: dict[str, object]  # block parameters: {{#each list as |item index|}}

    def enter(self, value: object, params: dict[str, object], frame: Frame) -> Scope:
        """The scope within a block. Entering the current value again adds no level for `../`."""
        again = value is self.this if isinstance(value, dict | list) else value == self.this
        outer = self.outer if again else self
        return Scope(self.run, value, outer, frame, {**self.params, **params})

    def stay(self) -> Scope:
        """The scope within a block that keeps the current value; JavaScript has no null there."""
        if self.this is not None:
            return self
        return Scope(self.run, {}, self.outer, self.frame, self.params)


Value = Callable[[Scope], object]
Write = Callable[[Scope], None]


def constant(value: object) -> Value:
    return lambda _scope: value


def _follow(value: object, parts: tuple[str, ...], run: Rendering) -> object:
    run.spend(len(parts) + 1)
    for part in parts:
        if value is None:
            return None
        value = own_property(value, part, run.spend)
    return value


def context_path(up: int, parts: tuple[str, ...]) -> Value:
    """a.b, ../a, this"""

    def read(scope: Scope) -> object:
        at: Scope | None = scope
        for _ in range(up):
            at = at.outer if at else None
        return _follow(at.this, parts, scope.run) if at else None

    return read


def data_path(up: int, parts: tuple[str, ...]) -> Value:
    """@index, @../index, @root.a. A false or empty value along the way is the result itself."""

    def read(scope: Scope) -> object:
        frame: Frame | None = scope.frame
        for _ in range(up):
            frame = frame.outer if frame else None
        value: object = frame.values if frame else None
        scope.run.spend(len(parts) + 1)
        for part in parts:
            if not is_truthy(value):
                return value
            value = own_property(value, part, scope.run.spend)
        return value

    return read


def param_path(name: str, parts: tuple[str, ...]) -> Value:
    """A block parameter; a block that does not set it can't be asked for it."""

    def read(scope: Scope) -> object:
        if name not in scope.params:
            raise EvaluationError("bad_data", f"{name} has no value in this block")
        return _follow(scope.params[name], parts, scope.run)

    return read


def call_helper(
    helper: Helper, args: list[Value], options: dict[str, Value], label: str, *, html: bool
) -> Value:
    def read(scope: Scope) -> object:
        run = scope.run
        run.spend(TAG_WORK + len(args) + len(options))
        timezone = own_property(run.root, "timezone", run.spend)
        return helper.run(
            Request(
                [arg(scope) for arg in args],
                {key: option(scope) for key, option in options.items()},
                label,
                timezone,
                html,
                run.spend,
            )
        )

    return read


def sequence(writes: list[Write]) -> Write:
    def write(scope: Scope) -> None:
        for part in writes:
            part(scope)

    return write


def write_text(value: str) -> Write:
    def write(scope: Scope) -> None:
        scope.run.spend(TAG_WORK)
        scope.run.write(value)

    return write


_UNSAFE = re.compile(r"[&<>\"'`=]")
_ESCAPES = str.maketrans(
    {
        "&": "&amp;",
        "<": "&lt;",
        ">": "&gt;",
        '"': "&quot;",
        "'": "&#x27;",
        "`": "&#x60;",
        "=": "&#x3D;",
    }
)


def write_value(value: Value, *, escape: bool) -> Write:
    """{{x}}. Rule of escaping: handlebars' Utils.escapeExpression."""

    def write(scope: Scope) -> None:
        run = scope.run
        run.spend(TAG_WORK)
        printed = text_of(value(scope), run.spend)
        if escape and _UNSAFE.search(printed):
            printed = printed.translate(_ESCAPES)
        run.write(printed)

    return write


def if_block(value: Value, include_zero: Value, then: Write, otherwise: Write) -> Write:
    """{{#if}}: 0 is false unless includeZero=true; [] is false, {} is true."""

    def write(scope: Scope) -> None:
        scope.run.spend(TAG_WORK)
        found = value(scope)
        zero = not is_truthy(found) and not is_truthy(include_zero(scope))
        branch = otherwise if zero or is_empty(found) else then
        branch(scope.stay())

    return write


def with_block(value: Value, then: Write, otherwise: Write, params: tuple[str, ...]) -> Write:
    """{{#with}}: enters a value that is not empty; 0 and {} are not."""

    def write(scope: Scope) -> None:
        scope.run.spend(TAG_WORK)
        found = value(scope)
        if is_empty(found):
            otherwise(scope.stay())
        else:
            then(scope.enter(found, _bind(params, found), scope.frame))

    return write


def each_block(value: Value, then: Write, otherwise: Write, params: tuple[str, ...]) -> Write:
    """{{#each}}: the items of an array or the values of an object, else the {{else}} branch."""

    def write(scope: Scope) -> None:
        scope.run.spend(TAG_WORK)
        _repeat(value(scope), then, otherwise, params, scope)

    return write


def _repeat(
    items: object, then: Write, otherwise: Write, params: tuple[str, ...], scope: Scope
) -> None:
    run = scope.run
    pairs: Iterable[tuple[str | int, object]] = ()
    if isinstance(items, dict):
        pairs = entries(items, run.spend)
    elif isinstance(items, list):
        pairs = enumerate(items)
    if not isinstance(items, dict | list) or not items:
        otherwise(scope.stay())
        return
    for index, (key, item) in enumerate(pairs):
        run.spend(TAG_WORK + len(params))
        position = {
            "key": key,
            "index": index,
            "first": index == 0,
            "last": index == len(items) - 1,
        }
        frame = Frame({**scope.frame.values, **position}, scope.frame)
        then(scope.enter(item, _bind(params, item, key), frame))


def section(value: Value, then: Write, otherwise: Write, params: tuple[str, ...]) -> Write:
    """{{#name}}: repeats for an array, enters any other value but true, false and null."""

    def write(scope: Scope) -> None:
        scope.run.spend(TAG_WORK)
        found = value(scope)
        if isinstance(found, list):
            _repeat(found, then, otherwise, params, scope)
        elif found is None or found is False:
            otherwise(scope.stay())
        elif found is True:
            then(scope.stay())
        else:
            then(scope.enter(found, _bind(params), scope.frame))

    return write


def _bind(params: tuple[str, ...], *values: object) -> dict[str, object]:
    """Block parameters and their values; those beyond have none, which prints as nothing."""
    return dict.fromkeys(params) | dict(zip(params, values, strict=False))
