"""Custom runners whose steps name a recipient: suppressed recipients get no message."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, NamedTuple

from pydantic import Field

from sequencerd.core.config import Config, Faults, parse_config
from sequencerd.core.javascript.templates import Template
from sequencerd.core.task import Failed, NotStarted, Result, Suppressed, Task
from sequencerd.runners.fields import RenderError, compile_field, render
from sequencerd.runners.protocol import Runner
from sequencerd.runners.suppression_check import Suppressions, describe

KEYS = frozenset({"channel", "address"})
"""The config keys of a recipient. A step with both is checked against the suppressions; a step with
one of them is not, because the key then belongs to the runner.
"""


class RecipientConfig(Config):
    """The recipient of a custom runner's message, which is checked against the suppressions."""

    channel: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,99}$")]
    """A channel, such as push, as in `sequencer.suppressions`."""
    address: str
    """A template, such as {{data.token}}."""


class Recipient(NamedTuple):
    """The compiled recipient of a step."""

    channel: str
    address: Template


class AddressedProgram(NamedTuple):
    """A compiled config: the runner's own program, and the recipient if the step names one."""

    own: object
    recipient: Recipient | None


class AddressedRunner:
    """A custom runner that is not called for suppressed recipients."""

    def __init__(self, runner: Runner, suppressions: Suppressions | None) -> None:
        self.limits = runner.limits
        self.retry = runner.retry
        self._runner = runner
        self._suppressions = suppressions

    def compile(self, config: Mapping[str, Any]) -> AddressedProgram:
        """Compile the recipient, and the whole config for the runner. Raises DefinitionError."""
        faults = Faults()
        recipient, own = None, None
        if config.keys() >= KEYS:
            with faults.at():
                parsed = parse_config(RecipientConfig, {key: config[key] for key in KEYS})
                template = compile_field("address", parsed.address)
                recipient = Recipient(parsed.channel, template)
        with faults.at():
            own = self._runner.compile(config)
        faults.check()
        return AddressedProgram(own, recipient)

    async def run(self, program: object, tasks: Sequence[Task]) -> Sequence[Result]:
        """Call the runner for the tasks whose recipients are not suppressed."""
        assert isinstance(program, AddressedProgram)
        if program.recipient is None or self._suppressions is None:
            return await self._runner.run(program.own, tasks)
        checks = (self._check(program.recipient, task, self._suppressions) for task in tasks)
        held = await asyncio.gather(*checks)
        rest = [task for task, result in zip(tasks, held, strict=True) if result is None]
        if not rest:
            return [result for result in held if result is not None]
        answers = await self._runner.run(program.own, rest)
        by_key = {task.key: answer for task, answer in zip(rest, answers, strict=True)}
        return [result or by_key[task.key] for task, result in zip(tasks, held, strict=True)]

    async def _check(
        self, recipient: Recipient, task: Task, suppressions: Suppressions
    ) -> Result | None:
        try:
            address = render("address", recipient.address, task.view)
        except RenderError as error:
            return Failed(str(error), permanent=True, asked=False, failure="bad_data")
        asked = (address, str(task.view["subject"]))
        found = await suppressions.find_suppressed(recipient.channel, asked, task.topic)
        if found:
            return Suppressed(f"not sent to {describe(found)}")
        return NotStarted() if task.is_late(asyncio.get_running_loop().time()) else None

    async def close(self) -> None:
        """Release the runner's connections."""
        await self._runner.close()
