"""Commands for the messages of steps, outside of a journey: preview, send-test."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Rows
from pathlib import Path
from typing import Any

import asyncpg

from sequencerd.cli.commands import connected, explain, on_shards, read_settings, report_missing
from sequencerd.cli.ids import shard_of_id
from sequencerd.cli.output import say, say_lines, say_raw
from sequencerd.cli.preview import check_one_sequence, is_file, merged_definitions, warn_of_paths
from sequencerd.core.enrollment import Enrollment
from sequencerd.core.languages import DEFAULT_LOCALE
from sequencerd.core.model import Sequence
from sequencerd.core.view import parse_data
from sequencerd.definitions import files, step_message
from sequencerd.definitions.options import read_object
from sequencerd.definitions.simulator import check_lookup, choose
from sequencerd.definitions.step_message import StepMessage
from sequencerd.definitions.stored import read_sequences
from sequencerd.errors import ArgumentError, UsageError
from sequencerd.runners import registry
from sequencerd.runners.email.page import page
from sequencerd.runners.protocol import Runner, close_all
from sequencerd.service.redaction import make_redaction
from sequencerd.settings import Settings
from sequencerd.storage.connections import Shard
from sequencerd.storage.every_shard import ask
from sequencerd.storage.statements import QUERIES
from sequencerd.testing import make_runners


def preview_command(arguments: argparse.Namespace, settings: Settings) -> int:
    message = _read(arguments, settings)
    content = asyncio.run(_write(message))
    if arguments.html:
        content = page(content).encode()
    if arguments.output is not None:
        try:
            arguments.output.write_bytes(content)
        except OSError as error:
            raise UsageError(f"{arguments.output}: {error.strerror}") from error
    elif sys.stdout.isatty():
        say_lines(content.decode(errors="replace").replace("\r\n", "\n"))
    else:
        say_raw(content.decode(errors="replace"))
    return 0


async def _write(message: StepMessage) -> bytes:
    try:
        return await step_message.write(message)
    finally:
        await message.runner.close()


def send_test_command(arguments: argparse.Namespace, settings: Settings) -> int:
    message = _read(arguments, settings)
    settings = read_settings(arguments, "email", "sms", "unsubscribe")
    runners = registry.make_runners(settings)
    try:
        test = step_message.make_test(message, arguments.to, runners)
    except ValueError as error:
        raise ArgumentError(f"--{error}") from error
    say(asyncio.run(_send(runners, test, arguments.to, make_redaction(settings))))
    return 0


async def _send(
    runners: Mapping[str, Runner],
    test: step_message.TestMessage,
    address: str,
    redact: Callable[[str], str],
) -> str:
    try:
        return await step_message.send(test, address, redact)
    finally:
        await close_all(runners.values())


def _read(arguments: argparse.Namespace, settings: Settings) -> StepMessage:
    """Read the definition and the enrollment, from a file, the database, or both."""
    path = Path(arguments.target)
    reads_file = is_file(path)
    if arguments.enrollment is not None:
        for option in ("data", "subject", "timezone"):
            if getattr(arguments, option) is not None:
                raise ArgumentError(f"--{option} does not go with --enrollment")
    if not reads_file:
        check_one_sequence(path, arguments.sequence)
    runners = make_runners(settings, files.types(path) if reads_file else ())
    definitions: dict[str, Sequence] = {}
    found: list[asyncpg.Record] = []
    if reads_file:
        definitions = {one.sequence.name: one.sequence for one in files.read_file(path, runners)}

    async def read_one(shard: Shard) -> tuple[dict[str, Sequence], list[asyncpg.Record]]:
        async with connected(shard) as connection:
            return (
                definitions or await read_sequences(connection, runners),
                await connection.fetch(QUERIES["simulated"], arguments.enrollment.number)
                if arguments.enrollment is not None
                else [],
            )

    async def read(arguments: argparse.Namespace, _: Settings, shards: Rows[Shard]) -> int:
        if arguments.enrollment is not None:
            shards = [shard_of_id(shards, arguments.enrollment)]
        answers = await ask(explain(arguments), shards, read_one)
        definitions.update(merged_definitions(one[0] for one in answers.found.values()))
        found.extend(row for one in answers.found.values() for row in one[1])
        if not reads_file and arguments.target not in definitions:
            report_missing(answers)
        return 0

    if not definitions or arguments.enrollment is not None:
        on_shards(read)(arguments, settings)
    if arguments.enrollment is not None and not found:
        raise UsageError(f"enrollment {arguments.enrollment} does not exist")
    name = arguments.sequence if reads_file else arguments.target
    sequence = definitions[choose(definitions, name)]
    enrollment = Enrollment(*found[0][:-1]) if found else _enrollment(arguments)
    external = {}
    if arguments.lookup is not None:
        check_lookup(definitions, sequence.name, [sequence])
        external = read_object(arguments.lookup, "--lookup")
    if arguments.locale is not None:
        place = sequence.shared.locale or DEFAULT_LOCALE
        enrollment, external = _in_language(enrollment, external, place, arguments.locale)
    message = step_message.make_message(sequence, arguments.step, runners, enrollment, external)
    if arguments.data is not None:
        example = read_object(arguments.data, "--data")
        warn_of_paths(sequence, [example], external or None, message.step.name)
    return message


def _in_language(
    enrollment: Enrollment, external: dict[str, Any], path: str, language: str
) -> tuple[Enrollment, dict[str, Any]]:
    """Return the data with a language at the path from which it is read."""
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


def _enrollment(arguments: argparse.Namespace) -> Enrollment:
    """Return an enrollment with the data of the command line."""
    data = arguments.data or "{}"
    read_object(data, "--data")
    try:
        return step_message.sample(data, arguments.subject, arguments.timezone)
    except UsageError as error:
        raise ArgumentError(f"--{error}") from error
