"""Commands for who writes sequences: apply."""

from __future__ import annotations

import argparse
from pathlib import Path

from sequencerd import daemon, definitions, files
from sequencerd.cli.commands import Commands, connect, on_database
from sequencerd.settings import Settings


def add_to(commands: Commands) -> None:
    """Adds these commands."""
    apply = commands.add(
        "apply", on_database(_apply), "make the sequences of a file", "apply onboarding.yaml"
    )
    apply.add_argument("files", nargs="+", type=Path, metavar="FILE", help="YAML or JSON")


async def _apply(arguments: argparse.Namespace, settings: Settings, url: str) -> int:
    runners = daemon.make_runners(settings)
    found = [d for file in arguments.files for d in files.read_file(file, runners)]
    connection = await connect(url)
    try:
        async with connection.transaction():
            applied = [await definitions.apply(connection, definition) for definition in found]
    finally:
        await connection.close()
    for one in applied:
        changes = [
            f"{word} {', '.join(names)}"
            for word, names in (
                ("added", one.added),
                ("changed", one.changed),
                ("removed", one.removed),
            )
            if names
        ]
        print(f"{one.sequence}: {'; '.join(changes) or 'nothing changed'}")
    return 0
