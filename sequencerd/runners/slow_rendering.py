"""Keep messages that take long to render from holding up everything else in the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from sequencerd.core.faults import EvaluationError
from sequencerd.core.javascript.sandbox import SLOW_SECONDS
from sequencerd.core.javascript.templates import Template
from sequencerd.runners.fields import RenderError, Translations, chosen


class SlowRendering:
    """Leaves as much time to everything else as slow messages take."""

    def __init__(self) -> None:
        self._next_at = 0.0  # a time of the event loop
        self._translating = asyncio.Lock()

    async def turn(
        self, texts: Mapping[str, Template | Translations | None], view: Mapping[str, Any]
    ) -> None:
        """Wait until the next message may be rendered, and a thread has translated its large
        templates, which takes seconds at worst. Raises RenderError.
        """
        for name, text in texts.items():
            if text is not None:
                await self._prepare(*chosen(name, text, view))
        loop = asyncio.get_running_loop()
        while (seconds := self._next_at - loop.time()) > 0:  # noqa: ASYNC110 - a time
            await asyncio.sleep(seconds)

    async def _prepare(self, name: str, template: Template) -> None:
        if template.is_slow_at_first:
            async with self._translating:  # the others wait for the first one
                if template.is_slow_at_first:
                    try:
                        template.compile(await asyncio.to_thread(template.translate))
                    except EvaluationError as error:
                        raise RenderError(f"{name}: {error}") from error

    @contextmanager
    def measured(self) -> Iterator[None]:
        """Measure how long a message takes."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        try:
            yield
        finally:
            ended = loop.time()
            if ended - began > SLOW_SECONDS:
                self._next_at = ended + (ended - began)
