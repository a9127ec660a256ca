"""Commands for who writes sequences: check, schema."""

from __future__ import annotations

import argparse
from pathlib import Path

from sequencerd import daemon, files, schema
from sequencerd.cli.commands import Commands, add_json
from sequencerd.cli.output import say, say_json
from sequencerd.settings import Settings


def add_to(commands: Commands) -> None:
    """Adds these commands."""
    check = commands.add(
        "check", _check, "say what is wrong with files, without a database", "check *.yaml"
    )
    check.add_argument("files", nargs="+", type=Path, metavar="FILE", help="YAML or JSON")
    check.add_argument("--strict", action="store_true", help="fail for warnings, too")
    add_json(check)
    commands.add(
        "schema",
        _schema,
        "print the JSON Schema of files, for an editor",
        "schema > sequencerd.schema.json",
    )


def _check(arguments: argparse.Namespace, settings: Settings) -> int:
    found, findings = files.read_files(arguments.files, daemon.make_runners(settings))
    errors = sum(finding.is_error for finding in findings)
    if arguments.json:
        say_json([_plain(finding) for finding in findings])
    else:
        for finding in findings:
            say(finding)
        warnings = len(findings) - errors
        counts = (len(found), "good sequence"), (errors, "error"), (warnings, "warning")
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


def _schema(_: argparse.Namespace, __: Settings) -> int:
    say_json(schema.make(), indent=2)
    return 0
