"""Keep messages that take long to render from holding up everything else in the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from sequencerd.core.javascript.sandbox import SLOW_SECONDS


class SlowRendering:
    """Leaves as much time to everything else as slow messages take."""

    def __init__(self) -> None:
        self._next_at = 0.0  # a time of the event loop

    async def turn(self) -> None:
        """Wait until the next message may be rendered."""
        loop = asyncio.get_running_loop()
        while (seconds := self._next_at - loop.time()) > 0:  # noqa: ASYNC110 - a time
            await asyncio.sleep(seconds)

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
