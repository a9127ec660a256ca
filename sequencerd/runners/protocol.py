"""The protocol of runners, and what a runner may raise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from sequencerd.core.model import NOTHING_SHARED, Limits, MessageContext, Result, RetryPolicy, Task


class Refused(Exception):  # noqa: N818 - what an author raises reads as what has happened
    """Raised by a custom runner: this will never work, so it is not retried."""


class NotNow(Exception):  # noqa: N818 - as above
    """Raised by a runner that could not start, by no enrollment's fault: no attempt is spent."""


class Runner(Protocol):
    """What executes the steps of one type.

    `limits` are those of `run`: the time of a call includes the wait for its turn, if the rate is
    limited. `retry` applies to steps without a retry policy.
    """

    limits: Limits
    retry: RetryPolicy

    def compile(self, config: Mapping[str, Any]) -> object:
        """Make of a step's config what `run` needs. Raises DefinitionError."""
        ...

    async def run(self, program: object, tasks: Sequence[Task]) -> Sequence[Result]:
        """Execute one step for a batch. Return one result for each task, in their order.

        What it raises is a temporary failure of every task of the batch, which may have taken place
        nevertheless. It may be cancelled at any time.
        """
        ...

    async def close(self) -> None:
        """Release connections; no call is in progress any more."""
        ...


@runtime_checkable
class MessageRunner(Runner, Protocol):
    """A runner whose messages can be shown before they are sent, and sent as a test."""

    def compile(self, config: Mapping[str, Any], shared: MessageContext = NOTHING_SHARED) -> object:
        """Make of a step's config, and what the messages of its sequence share, what `run` needs.
        Raises DefinitionError.
        """
        ...

    async def write(self, program: object, task: Task) -> bytes:
        """Return the finished message of an enrollment. Raises ValueError if it cannot be sent."""
        ...

    def as_test(self, config: Mapping[str, Any], address: str) -> dict[str, Any]:
        """Return a config that sends the same message to this address alone, marked as a test.
        Raises ValueError for what is not an address.
        """
        ...
