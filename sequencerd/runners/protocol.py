"""The protocol of runners, and the errors that a runner may raise."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from sequencerd.core.model import NOTHING_SHARED, Limits, MessageContext, RetryPolicy
from sequencerd.core.task import Result, Task


class Refused(Exception):  # noqa: N818 - what an author raises reads as what has happened
    """Raised by a custom runner if the side effect can never succeed, so it is not retried."""


class NotNow(Exception):  # noqa: N818 - as above
    """Raised by a runner that could not begin, through no fault of an enrollment: no attempt is
    spent.
    """


class Runner(Protocol):
    """Executes the steps of one type.

    `limits` apply to `run`: if the rate is limited, the timeout of a call includes the wait for its
    turn. `retry` applies to steps without a retry policy.
    """

    limits: Limits
    retry: RetryPolicy

    def compile(self, config: Mapping[str, Any]) -> object:
        """Convert a step's config to the program that `run` needs. Raises DefinitionError. Large
        configs are converted in another thread.
        """
        ...

    async def run(self, program: object, tasks: Sequence[Task]) -> Sequence[Result]:
        """Execute one step for a batch. Return one result for each task, in the same order.

        An exception is a temporary failure of every task in the batch, which may have taken place
        nevertheless. The call may be cancelled at any time.
        """
        ...

    async def close(self) -> None:
        """Release connections, when no call is in progress any more."""
        ...


async def close_all(runners: Iterable[Runner]) -> None:
    """Release the connections of runners."""
    for runner in runners:
        await runner.close()


@runtime_checkable
class MessageRunner(Runner, Protocol):
    """A runner whose messages can be previewed, and sent as a test."""

    def compile(self, config: Mapping[str, Any], shared: MessageContext = NOTHING_SHARED) -> object:
        """Convert a step's config, and the parts that messages of its sequence share, to the
        program that `run` needs. Raises DefinitionError.
        """
        ...

    async def write(self, program: object, task: Task) -> bytes:
        """Return the finished message of an enrollment. Raises ValueError if it cannot be sent."""
        ...

    def as_test(self, config: Mapping[str, Any], address: str) -> dict[str, Any]:
        """Return a config that sends the same message only to this address, marked as a test.
        Raises ValueError for an invalid address.
        """
        ...
