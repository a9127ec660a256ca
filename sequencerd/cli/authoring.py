"""Commands for authors of sequences: check, schema."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from sequencerd.cli.commands import connected, explain, has_database, on_shards, report_missing
from sequencerd.cli.output import say, say_json, warn
from sequencerd.core.describe import counted
from sequencerd.definitions import files, json_schema
from sequencerd.definitions.check import KnownPaths, known_paths
from sequencerd.definitions.options import read_object
from sequencerd.errors import SequencerdError
from sequencerd.runners import registry
from sequencerd.settings import Settings
from sequencerd.storage.connections import Shard
from sequencerd.storage.every_shard import ask
from sequencerd.storage.statements import QUERIES


def check_command(arguments: argparse.Namespace, settings: Settings) -> int:
    """Check files; their paths against an example of data, or else against the data in the
    database.
    """
    runners = registry.make_runners(settings)
    if arguments.data is not None:
        example = read_object(arguments.data, "--data")
        known = dict.fromkeys(files.names(arguments.files), known_paths([example]))
    else:
        known = _known_in_database(arguments, settings)
    found, findings = files.read_files(arguments.files, runners, known)
    errors = sum(finding.is_error for finding in findings)
    if arguments.json:
        say_json([_plain(finding) for finding in findings])
    else:
        for finding in findings:
            say(finding)
        warnings = len(findings) - errors
        counts = (len(found), "valid sequence"), (errors, "error"), (warnings, "warning")
        say(", ".join(counted(count, word) for count, word in counts))
    return 1 if errors or (findings and arguments.strict) else 0


def _known_in_database(arguments: argparse.Namespace, settings: Settings) -> dict[str, KnownPaths]:
    """Return the paths of data in the database, if one is configured, by sequence."""
    known: dict[str, KnownPaths] = {}
    names = files.names(arguments.files)

    async def read(shard: Shard) -> dict[str, list[dict[str, Any]]]:
        async with connected(shard) as connection:
            found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
            for name, examples in found.items():
                for row in await connection.fetch(QUERIES["sample_data"], name):
                    with suppress(ValueError, RecursionError):  # others have the same paths
                        examples.append(json.loads(row["data"]))
            return found

    async def read_all(arguments: argparse.Namespace, _: Settings, shards: Sequence[Shard]) -> int:
        answers = await ask(explain(arguments), shards, read)
        for name in names:
            if examples := [one for found in answers.found.values() for one in found[name]]:
                with suppress(RecursionError):
                    known[name] = known_paths(examples)
        return report_missing(answers)

    if has_database(settings):
        try:
            on_shards(read_all)(arguments, settings)
        except SequencerdError as error:
            warn(f"sequencerd: paths are not compared with data: {error}")
    return known


def _plain(finding: files.FileFinding) -> dict[str, object]:
    return {
        "file": finding.origin,
        "line": finding.line,
        "severity": "error" if finding.is_error else "warning",
        "sequence": finding.sequence,
        "step": finding.step,
        "message": finding.message,
    }


def schema_command(_: argparse.Namespace, __: Settings) -> int:
    say_json(json_schema.make(), indent=2)
    return 0
