"""The command that runs the daemon. It imports all of it, which no other command needs."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from sequencerd import daemon
from sequencerd.cli.commands import on_shards, read_settings, wanted_shards
from sequencerd.cli.output import say
from sequencerd.service.logs import make_log
from sequencerd.settings import Settings
from sequencerd.storage.connections import Shard


def run_command(arguments: argparse.Namespace, settings: Settings) -> int:
    if arguments.check:
        daemon.check_settings(settings)
        wanted_shards(arguments, settings)
        say("the settings are valid")
        return 0
    return on_shards(_run)(arguments, settings)


async def _run(arguments: argparse.Namespace, settings: Settings, shards: Sequence[Shard]) -> int:
    await daemon.run(shards, settings, make_log(settings), lambda: read_settings(arguments))
    return 0
