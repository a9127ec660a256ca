"""Commands for who runs the daemon: run, migrate."""

from __future__ import annotations

import argparse

from sequencerd import daemon
from sequencerd.cli.commands import Commands, apply_migrations, on_database, read_settings
from sequencerd.logs import make_log
from sequencerd.settings import Settings


def add_to(commands: Commands) -> None:
    """Adds these commands."""
    commands.add(
        "run", on_database(_run), "run the daemon until SIGTERM", "--config sequencerd.toml run"
    )
    commands.add("migrate", on_database(_migrate), "make or update the schema", "migrate")


async def _run(arguments: argparse.Namespace, settings: Settings, url: str) -> int:
    await daemon.run(url, settings, make_log(settings), lambda: read_settings(arguments))
    return 0


async def _migrate(_: argparse.Namespace, __: Settings, url: str) -> int:
    applied = await apply_migrations(url)
    for migration in applied:
        print(f"applied {migration.name}")
    if not applied:
        print("nothing to apply")
    return 0
