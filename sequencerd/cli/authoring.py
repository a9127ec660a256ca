"""Commands for authors of sequences: check, schema."""

from __future__ import annotations

import argparse

from sequencerd.cli.output import say, say_json
from sequencerd.definitions import files, json_schema
from sequencerd.runners import registry
from sequencerd.settings import Settings


def check_command(arguments: argparse.Namespace, settings: Settings) -> int:
    found, findings = files.read_files(arguments.files, registry.make_runners(settings))
    errors = sum(finding.is_error for finding in findings)
    if arguments.json:
        say_json([_plain(finding) for finding in findings])
    else:
        for finding in findings:
            say(finding)
        warnings = len(findings) - errors
        counts = (len(found), "valid sequence"), (errors, "error"), (warnings, "warning")
        say(", ".join(f"{count} {word}{'s' * (count != 1)}" for count, word in counts))
    return 1 if errors or (findings and arguments.strict) else 0


def _plain(finding: files.Finding) -> dict[str, object]:
    return {
        "file": str(finding.path),
        "line": finding.line,
        "severity": "error" if finding.is_error else "warning",
        "sequence": finding.sequence,
        "step": finding.step,
        "message": finding.message,
    }


def schema_command(_: argparse.Namespace, __: Settings) -> int:
    say_json(json_schema.make(), indent=2)
    return 0
