"""What a runner is to the daemon: the protocol, and what a runner may raise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from sequencerd.core.model import Result, RetryPolicy, Task


class Refused(Exception):  # noqa: N818 - what an author raises reads as what has happened
    """Raised by a custom runner: this will never work, so it is not tried again."""


class NotNow(Exception):  # noqa: N818 - as above
    """Raised by a runner that could not begin, by nobody's fault: no attempt is spent."""


class Runner(Protocol):
    """What executes the steps of one type.

    `batch_size` is how many enrollments one call of `run` gets at most, `concurrency` how many
    calls run at the same time, `timeout` how many seconds a call may take, with the time that it
    waits for its turn where a rate is limited. `retry` holds for steps that say nothing of it.
    """

    batch_size: int
    concurrency: int
    timeout: float
    retry: RetryPolicy

    def compile(self, config: Mapping[str, Any]) -> object:
        """Makes of a step's config what `run` needs. Raises DefinitionError."""
        ...

    async def run(self, program: object, tasks: Sequence[Task]) -> Sequence[Result]:
        """Executes one step for a batch: one result for each task, in their order.

        What it raises counts as a passing failure of every task of the batch, which may have taken
        place all the same. It may be cancelled at any time.
        """
        ...

    async def close(self) -> None:
        """Gives connections back; no call is running any more."""
        ...
