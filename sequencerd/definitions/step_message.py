"""Make the message of a step outside of a journey, for `preview`, `send-test` and the console."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any, NamedTuple
from uuid import UUID, uuid4

from sequencerd.core.config import nearest
from sequencerd.core.enrollment import Enrollment
from sequencerd.core.faults import EvaluationError
from sequencerd.core.model import InvalidStep, Sequence, SideEffect, Step
from sequencerd.core.task import Failed, Suppressed, Task
from sequencerd.core.view import view
from sequencerd.definitions.compiler import compile_behaviour
from sequencerd.definitions.options import read_zone
from sequencerd.errors import UsageError
from sequencerd.runners.protocol import MessageRunner, Runner


class StepMessage(NamedTuple):
    """A step that sends a message, its compiled config, and the enrollment of the message."""

    sequence: Sequence
    step: Step
    runner: MessageRunner
    program: object
    task: Task


def make_message(
    sequence: Sequence,
    name: str,
    runners: Mapping[str, Runner],
    enrollment: Enrollment,
    external: Mapping[str, Any],
) -> StepMessage:
    """Return the message of a step for an enrollment. Raises UsageError."""
    step, program = _message_step(sequence, name)
    runner = runners.get(step.type)
    if not isinstance(runner, MessageRunner):
        raise UsageError(f"{place(step)} is a {step.type}, which sends no message")
    try:
        task = _task(enrollment, sequence, step, external)
    except EvaluationError as error:
        raise UsageError(str(error)) from error
    return StepMessage(sequence, step, runner, program, task)


def sample(data: str, subject: str | None = None, timezone: str | None = None) -> Enrollment:
    """Return an enrollment with the given data. Raises UsageError."""
    if timezone is not None:
        read_zone(timezone)
    now = datetime.now(UTC)
    tag = UUID(int=0)
    return Enrollment(1, subject or "subject", data, now, tag, None, now, "", "", timezone)


async def write(message: StepMessage) -> bytes:
    """Return the finished message. Raises UsageError if it cannot be sent."""
    try:
        return await message.runner.write(message.program, message.task)
    except ValueError as error:
        raise UsageError(f"{place(message.step)} cannot be sent: {error}") from error


class TestMessage(NamedTuple):
    """A message to one address, marked as a test."""

    runner: Runner
    program: object
    task: Task


def make_test(message: StepMessage, address: str, runners: Mapping[str, Runner]) -> TestMessage:
    """Return the message as a test. Raises UsageError; ValueError for an invalid address."""
    config = message.runner.as_test(message.step.config, address)
    behaviour = compile_behaviour(message.step.type, config, runners, message.sequence.shared)
    if isinstance(behaviour, InvalidStep):
        raise UsageError(f"{place(message.step)}: {behaviour.message}")
    assert isinstance(behaviour, SideEffect)
    return TestMessage(runners[message.step.type], behaviour.program, message.task)


async def send(test: TestMessage, address: str, redact: Callable[[str], str]) -> str:
    """Send a test and describe the result in a sentence. Raises UsageError if it is refused.
    `redact` removes secrets, which a server may repeat.
    """
    (result,) = await test.runner.run(test.program, [test.task])
    if isinstance(result, Failed | Suppressed):
        raise UsageError(redact(result.message))
    return redact(getattr(result, "message", None) or f"sent to {address}")


def place(step: Step) -> str:
    """Return the names of a sequence and a step."""
    return f"{step.sequence}/{step.name}"


def _message_step(sequence: Sequence, name: str) -> tuple[Step, object]:
    """Return a step with its compiled config."""
    if name not in sequence.steps:
        hint = nearest(name, list(sequence.steps))
        raise UsageError(f"sequence {sequence.name!r} has no step {name!r}; {hint}")
    step = sequence.steps[name]
    match step.behaviour:
        case SideEffect(program):
            return step, program
        case InvalidStep(problem):
            raise UsageError(f"{place(step)}: {problem}")
    raise UsageError(f"{place(step)} is a {step.type}, which sends no message")


def _task(
    enrollment: Enrollment, sequence: Sequence, step: Step, external: Mapping[str, Any]
) -> Task:
    """Return the task for the first attempt of a visit that has just begun.

    Its key is new, because a server may drop a message with a key that it has already received.
    """
    now = datetime.now(UTC)
    here = enrollment._replace(
        sequence=sequence.name, step=step.name, tag=uuid4(), entered_at=now, attempt=1
    )
    effect = step.behaviour
    assert isinstance(effect, SideEffect)
    topic = sequence.topic_of(effect)
    seen = view(here, here.timezone or sequence.timezone, now, external)
    return Task(here.key, seen, topic=topic)
