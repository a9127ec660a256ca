"""Messages that take long to render leave time to everything else."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest

from sequencerd.core.javascript import sandbox
from sequencerd.core.javascript.templates import compile_template
from sequencerd.runners.fields import RenderError, Translations
from sequencerd.runners.slow_rendering import SlowRendering
from tests.helpers.waiting import PATIENCE, eventually


async def test_between_slow_messages_other_work_runs() -> None:
    rendering = SlowRendering()
    log: list[str] = []

    async def message() -> None:
        await rendering.turn({}, {})
        with rendering.measured():
            time.sleep(0.03)  # noqa: ASYNC251 - as a template blocks the loop
        log.append("message")

    async def other() -> None:
        while log.count("message") < 3:
            log.append("other")
            await asyncio.sleep(0.001)

    await asyncio.gather(other(), *(message() for _ in range(3)))
    between = "".join(one[0] for one in log).split("m")
    assert all(part.count("o") > 2 for part in between[1:3]), log


async def test_a_message_that_fails_is_measured_too() -> None:
    rendering = SlowRendering()
    with suppress(ValueError), rendering.measured():
        time.sleep(0.03)  # noqa: ASYNC251 - as above
        raise ValueError
    began = time.perf_counter()
    await rendering.turn({}, {})
    assert time.perf_counter() - began > 0.01


async def test_fast_messages_wait_for_nothing() -> None:
    rendering = SlowRendering()
    with rendering.measured():
        pass
    turn = rendering.turn({}, {})
    with pytest.raises(StopIteration):
        turn.send(None)


def large(word: str) -> str:
    return f"{{{{data.{word}}}}} " * 200


@contextmanager
def made_in_loop(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[Any, ...]]]:
    """Collect what the sandbox of this thread makes: the maker, the text and its translation."""
    found: list[tuple[Any, ...]] = []
    make = sandbox._Sandbox.make

    def counting(self: sandbox._Sandbox, *given: Any, **options: Any) -> object:
        if threading.current_thread() is threading.main_thread():
            found.append(given)
        return make(self, *given, **options)

    with monkeypatch.context() as patched:
        patched.setattr(sandbox._Sandbox, "make", counting)
        yield found


async def test_other_work_runs_while_a_large_template_is_translated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A thread does it once, for the language that is rendered, whatever many messages wait."""
    begun, go, translated = threading.Event(), threading.Event(), list[str]()
    ask = sandbox.ask

    def slowly(maker: Any, text: str, *more: Any) -> str:
        translated.append(text)
        begun.set()
        assert go.wait(PATIENCE)
        return ask(maker, text, *more)

    german = compile_template(large("hallo"), escape=True)
    english = compile_template(large("hello"), escape=True)
    html = Translations({"en": english, "de": german}, "data.language")
    view = {"data": {"hallo": "x", "language": "de"}}
    rendering = SlowRendering()
    with made_in_loop(monkeypatch) as made:
        with monkeypatch.context() as patched:
            patched.setattr(sandbox, "ask", slowly)
            turns = [
                asyncio.create_task(rendering.turn({"text": None, "html": html}, view))
                for _ in range(3)
            ]
            await eventually(begun.is_set)
            assert not any(turn.done() for turn in turns)
            go.set()
            await asyncio.gather(*turns)
        assert german.render(view) == "x " * 200
    assert translated == [german.program]
    ((maker, program, translation),) = made
    assert (maker, program) == ("template", german.program)
    assert translation is not None


async def test_a_template_that_cannot_be_translated_in_time_is_not_tried_in_the_loop(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    html = compile_template(large("never"), escape=True)
    rendering = SlowRendering()
    monkeypatch.setattr(sandbox, "TRANSLATION_SECONDS", 0.001)
    with made_in_loop(monkeypatch) as made:
        for _ in range(5):
            with pytest.raises(RenderError, match=r"html: more than 0\.001 seconds of computing"):
                await rendering.turn({"html": html}, {})
    assert not made


async def test_small_templates_are_compiled_where_they_are_rendered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    html = compile_template("{{data.small}}", escape=True)
    with made_in_loop(monkeypatch) as made:
        await SlowRendering().turn({"html": html}, {})
    assert not made
