"""Commands for the messages of steps, outside of any journey: preview, send-test."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple
from uuid import UUID, uuid4

import asyncpg

from sequencerd.cli.commands import connect, on_database, read_settings
from sequencerd.cli.output import is_terminal, say, say_lines, say_raw, warn
from sequencerd.cli.preview import is_file
from sequencerd.core.calendar import dates
from sequencerd.core.config import nearest
from sequencerd.core.languages import DEFAULT_LOCALE
from sequencerd.core.model import (
    DefinitionError,
    Enrollment,
    Failed,
    Problem,
    Sequence,
    SideEffect,
    Step,
    Suppressed,
    Task,
    parse_data,
    view,
)
from sequencerd.definitions import files
from sequencerd.definitions.check import known_paths, unknown_paths
from sequencerd.definitions.compiler import compile_behaviour
from sequencerd.definitions.options import read_object
from sequencerd.definitions.simulator import choose
from sequencerd.definitions.stored import read_sequences
from sequencerd.errors import UsageError
from sequencerd.runners import registry
from sequencerd.runners.email.page import page
from sequencerd.runners.protocol import MessageRunner, Runner
from sequencerd.settings import Settings
from sequencerd.storage.connections import Shard
from sequencerd.storage.statements import QUERIES
from sequencerd.testing import make_runners


class _Message(NamedTuple):
    """A step that sends a message, what would send it, and the enrollment for it."""

    sequence: Sequence
    step: Step
    runner: MessageRunner
    program: object
    task: Task


def preview_command(arguments: argparse.Namespace, settings: Settings) -> int:
    message = _read(arguments, settings)
    try:
        content = asyncio.run(_write(message))
    except ValueError as error:
        raise UsageError(f"{_place(message.step)} cannot be sent: {error}") from error
    if arguments.html:
        content = page(content).encode()
    if arguments.output is not None:
        try:
            arguments.output.write_bytes(content)
        except OSError as error:
            raise UsageError(f"{arguments.output}: {error.strerror}") from error
    elif is_terminal(sys.stdout):
        say_lines(content.decode(errors="replace").replace("\r\n", "\n"))
    else:
        say_raw(content.decode(errors="replace"))
    return 0


async def _write(message: _Message) -> bytes:
    try:
        return await message.runner.write(message.program, message.task)
    finally:
        await message.runner.close()


def send_test_command(arguments: argparse.Namespace, settings: Settings) -> int:
    message = _read(arguments, settings)
    config = message.step.config
    try:
        config = message.runner.as_test(config, arguments.to)
    except ValueError as error:
        raise UsageError(f"--{error}") from error
    runners = registry.make_runners(read_settings(arguments, "email", "sms", "unsubscribe"))
    behaviour = compile_behaviour(message.step.type, config, runners, message.sequence.shared)
    if isinstance(behaviour, Problem):
        raise UsageError(f"{_place(message.step)}: {behaviour.message}")
    assert isinstance(behaviour, SideEffect)
    (result,) = asyncio.run(_send(runners, message, behaviour.program))
    if isinstance(result, Failed | Suppressed):
        raise UsageError(result.message)
    say(getattr(result, "message", None) or f"sent to {arguments.to}")
    return 0


async def _send(runners: Mapping[str, Runner], message: _Message, program: object) -> Any:
    try:
        return await runners[message.step.type].run(program, [message.task])
    finally:
        for runner in runners.values():
            await runner.close()


def _read(arguments: argparse.Namespace, settings: Settings) -> _Message:
    """Read the definition and the enrollment, from a file, the database, or both."""
    path = Path(arguments.target)
    if arguments.enrollment is not None:
        for option in ("data", "subject", "timezone"):
            if getattr(arguments, option) is not None:
                raise UsageError(f"--{option} does not go with --enrollment")
    runners = make_runners(settings, files.types(path) if is_file(path) else ())
    definitions: dict[str, Sequence] = {}
    found: list[asyncpg.Record] = []
    if is_file(path):
        definitions = {one.sequence.name: one.sequence for one in files.read_file(path, runners)}

    async def read(_: argparse.Namespace, __: Settings, shard: Shard) -> int:
        connection = await connect(shard)
        try:
            if not definitions:
                definitions.update(await read_sequences(connection, runners))
            if arguments.enrollment is not None:
                found.extend(await connection.fetch(QUERIES["simulated"], arguments.enrollment))
        finally:
            await connection.close()
        return 0

    if not definitions or arguments.enrollment is not None:
        on_database(read)(arguments, settings)
    if arguments.enrollment is not None and not found:
        raise UsageError(f"enrollment {arguments.enrollment} does not exist")
    name = arguments.sequence if is_file(path) else arguments.target
    sequence = definitions[choose(definitions, name)]
    step, program = _message_step(sequence, arguments.step)
    runner = runners[step.type]
    if not isinstance(runner, MessageRunner):
        raise UsageError(f"{_place(step)} is a {step.type}, which sends no message")
    enrollment = Enrollment(*found[0][:-1]) if found else _enrollment(arguments)
    external = {} if arguments.lookup is None else read_object(arguments.lookup, "--lookup")
    if arguments.locale is not None:
        place = sequence.shared.locale or DEFAULT_LOCALE
        enrollment, external = _in_language(enrollment, external, place, arguments.locale)
    if arguments.data is not None:
        _warn_of_paths(sequence, step, read_object(arguments.data, "--data"), external)
    return _Message(sequence, step, runner, program, _task(enrollment, sequence, step, external))


def _in_language(
    enrollment: Enrollment, external: dict[str, Any], path: str, language: str
) -> tuple[Enrollment, dict[str, Any]]:
    """Return the same with a language at the path where it is read."""
    data = parse_data(enrollment.data)
    read = {"data": data, "external": external}
    holder: dict[str, Any] = read
    *keys, last = path.split(".")
    for key in keys:
        if not isinstance(holder.get(key), dict):
            holder[key] = {}
        holder = holder[key]
    holder[last] = language
    return enrollment._replace(data=json.dumps(read["data"])), read["external"]


def _message_step(sequence: Sequence, name: str) -> tuple[Step, object]:
    """Return a step, and what its runner has made of its config."""
    if name not in sequence.steps:
        hint = nearest(name, list(sequence.steps))
        raise UsageError(f"sequence {sequence.name!r} has no step {name!r}; {hint}")
    step = sequence.steps[name]
    match step.behaviour:
        case SideEffect(program):
            return step, program
        case Problem(problem):
            raise UsageError(f"{_place(step)}: {problem}")
    raise UsageError(f"{_place(step)} is a {step.type}, which sends no message")


def _enrollment(arguments: argparse.Namespace) -> Enrollment:
    """Return one with the data of the command line."""
    if arguments.timezone is not None:
        try:
            dates.zone(arguments.timezone)
        except DefinitionError as error:
            raise UsageError(f"--timezone: {error}") from error
    data = arguments.data or "{}"
    read_object(data, "--data")
    now = datetime.now(UTC)
    return Enrollment(
        1,
        arguments.subject or "subject",
        data,
        now,
        UUID(int=0),
        None,
        "",
        "",
        arguments.timezone,
        now,
    )


def _task(
    enrollment: Enrollment, sequence: Sequence, step: Step, external: Mapping[str, Any]
) -> Task:
    """Return what a runner gets for the first attempt of a visit that has just begun.

    The key is a new one, as a server may leave out what it has got under the same one.
    """
    now = datetime.now(UTC)
    here = enrollment._replace(
        sequence=sequence.name, step=step.name, tag=uuid4(), entered_at=now, attempt=1
    )
    effect = step.behaviour
    assert isinstance(effect, SideEffect)
    topic = sequence.topic if effect.follows_topic else effect.topic
    seen = view(here, here.timezone or sequence.timezone, now, external)
    return Task(here.key, seen, topic=topic)


def _warn_of_paths(
    sequence: Sequence, step: Step, data: Mapping[str, Any], external: Mapping[str, Any]
) -> None:
    for remark in unknown_paths(sequence, known_paths([data], external or None)):
        if remark.step == step.name:
            path = ".".join(map(str, remark.keys[1:]))
            warn(f"warning: {_place(step)}: {path}: {remark.message}")


def _place(step: Step) -> str:
    return f"{step.sequence}/{step.name}"
