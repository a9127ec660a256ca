"""Connections to a mail server: kept and reused, and no more than the server allows at a time."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from time import monotonic

from sequencerd.runners.email.refusals import CONNECTIONS, SHORT_WAIT, RefusalMeaning, read_refusal
from sequencerd.runners.email.smtp_dialogue import (
    SHUTTING_DOWN,
    Dialogue,
    SmtpError,
    SmtpRefused,
)


class WornConnectionError(SmtpError):
    """A connection has failed before the message was sent, and another one may work."""


class ConnectionPool:
    """Connections, opened by `connect` and closed when they were idle for `idle` seconds.

    If the server refuses a connection while others are open, it allows no more at the moment: the
    message waits for one of the others, and no further one is opened for a while.
    """

    def __init__(self, connect: Callable[[], Awaitable[Dialogue]], *, idle: float) -> None:
        self._connect = connect
        self._idle_for = idle
        self._idle: list[tuple[Dialogue, float]] = []  # with the time at which each was last used
        self._used = 0  # connections in use, or being opened
        self._allowed = math.inf  # connections that the server allows until `_full_until`
        self._full_until = 0.0
        self._changed = asyncio.Event()  # a connection was released, or there is room for another
        self._timer: asyncio.TimerHandle | None = None
        self._quitting: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def borrow(self) -> AsyncIterator[Dialogue]:
        """Borrow a connection. Raises WornConnectionError, and the errors of `connect`."""
        dialogue = await self._acquire()
        try:
            yield dialogue
        except (SmtpError, OSError) as error:
            if self._is_worn(dialogue, error):
                raise WornConnectionError from error
            if isinstance(error, SmtpRefused):
                await self._give_back(dialogue)
            else:
                self._discard(dialogue)
            raise
        except BaseException:
            self._discard(dialogue)
            raise
        else:
            await self._give_back(dialogue)

    async def _acquire(self) -> Dialogue:
        is_refused = False
        while (idle := self._take()) is None:
            if self._used and (is_refused or self._is_full):
                self._changed.clear()
                await self._changed.wait()
                is_refused = False
                continue
            self._used += 1
            try:
                return await self._connect()
            except BaseException as error:
                is_refused = self._is_limit(error)
                self._lost(has_room=False)
                if not is_refused:
                    raise
        return idle

    @property
    def _is_full(self) -> bool:
        return self._used >= self._allowed and monotonic() < self._full_until

    def _take(self) -> Dialogue | None:
        while self._idle:
            dialogue, since = self._idle.pop()
            if dialogue.is_open and monotonic() - since < self._idle_for:
                self._used += 1
                dialogue.is_reused = True
                return dialogue
            self._quit(dialogue)
        return None

    async def _give_back(self, dialogue: Dialogue) -> None:
        """Keep a connection for the next message; reset it first if a message was begun."""
        try:
            if dialogue.has_envelope and (await dialogue.say("RSET")).is_refusal:
                dialogue.close()
        except (SmtpError, OSError):
            dialogue.close()
        except BaseException:
            self._discard(dialogue)
            raise
        dialogue.has_envelope = False
        if not dialogue.is_open:
            self._discard(dialogue)
            return
        self._used -= 1
        self._idle.append((dialogue, monotonic()))
        self._changed.set()
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._idle_for, self._drop)

    def _discard(self, dialogue: Dialogue, *, has_room: bool = True) -> None:
        """Close a connection. `has_room`: the server allows another one in its place."""
        dialogue.close()
        self._lost(has_room=has_room)

    def _is_worn(self, dialogue: Dialogue, error: Exception) -> bool:
        """Return whether another connection may work, and close this one then. One that refuses a
        sender may have reached its limit of messages, or lost its login or its state.
        """
        if dialogue.is_handed_over:
            return False
        ends = (
            not isinstance(error, SmtpRefused)
            or error.reply.code == SHUTTING_DOWN
            or error.stage == "sender"
        )
        is_old = dialogue.is_reused and ends
        is_limit = not is_old and self._is_limit(error)
        if is_old or is_limit:
            self._discard(dialogue, has_room=not is_limit)
        return is_old or is_limit

    def _is_limit(self, error: BaseException) -> bool:
        """Return whether the server refuses this connection because of the others."""
        if not isinstance(error, SmtpRefused):
            return False
        meaning, wait = read_refusal(*error.reply, error.stage)
        if error.stage == "connection":
            is_limit = meaning in (RefusalMeaning.QUOTA, RefusalMeaning.UNAVAILABLE)
        else:
            is_limit = meaning is RefusalMeaning.QUOTA and bool(CONNECTIONS.search(str(error)))
        others = self._used - 1 + len(self._idle)
        if not is_limit or not others:
            return False
        self._allowed = others
        self._full_until = monotonic() + (SHORT_WAIT if wait is None else wait).total_seconds()
        return True

    def _lost(self, *, has_room: bool) -> None:
        self._used -= 1
        if has_room or not self._used:  # without any, the next one finds out why
            self._changed.set()

    def _drop(self) -> None:
        """Close connections that have been idle too long."""
        kept = [(c, since) for c, since in self._idle if monotonic() - since < self._idle_for]
        for entry in self._idle:
            if entry not in kept:
                self._quit(entry[0])
        self._idle = kept
        self._timer = None
        if kept:
            wait = kept[0][1] + self._idle_for - monotonic()
            self._timer = asyncio.get_running_loop().call_later(wait, self._drop)

    def _quit(self, dialogue: Dialogue) -> None:
        task = asyncio.get_running_loop().create_task(_say_goodbye(dialogue))
        self._quitting.add(task)
        task.add_done_callback(self._quitting.discard)

    async def close(self) -> None:
        """Close the idle connections."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for dialogue, _ in self._idle:
            self._quit(dialogue)
        self._idle.clear()
        await asyncio.gather(*self._quitting)


async def _say_goodbye(dialogue: Dialogue) -> None:
    with suppress(SmtpError, OSError):
        async with asyncio.timeout(2):
            await dialogue.quit()
    dialogue.close()
