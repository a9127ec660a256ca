"""The command that prints the SQL of one table over all shards."""

from __future__ import annotations

import argparse

from sequencerd.cli.commands import read_settings
from sequencerd.cli.output import say_lines
from sequencerd.errors import UsageError
from sequencerd.settings import Settings
from sequencerd.storage import fdw
from sequencerd.storage.connections import Shard


def fdw_command(arguments: argparse.Namespace, _: Settings) -> int:
    if arguments.shard:
        raise UsageError("leave out --shard: the front has all shards, numbered in their order")
    settings = read_settings(arguments, "shards")
    if not settings.shards:
        raise UsageError("there are no [shards] in the settings; see docs/scaling.md")
    shards = {
        name: Shard(shard.url.get_secret_value(), shard.schema_name, name)
        for name, shard in settings.shards.items()
    }
    say_lines(fdw.front(shards))
    return 0
