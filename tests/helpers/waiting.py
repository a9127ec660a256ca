"""How long tests wait: for a condition, and never for a time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from inspect import isawaitable
from typing import TypeVar

T = TypeVar("T")

PATIENCE = 180.0  # seconds; only a test that fails takes as long, however busy the machine


async def eventually(condition: Callable[[], T | Awaitable[T | None] | None]) -> T:
    """Return the condition's value, once it is true.

    The pauses grow with the time already waited: a long wait costs little, and ends little later.
    """
    loop = asyncio.get_running_loop()
    begun = loop.time()
    async with asyncio.timeout(PATIENCE):
        while True:
            found = condition()
            value = await found if isawaitable(found) else found
            if value:
                return value
            await asyncio.sleep(min(max(0.01, (loop.time() - begun) / 20), 0.1))
