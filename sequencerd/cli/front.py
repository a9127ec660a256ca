"""The command that prints the SQL of one table over all shards."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from sequencerd.cli.commands import connect, explain, on_shards
from sequencerd.cli.output import say_lines
from sequencerd.errors import ArgumentError, UsageError
from sequencerd.settings import Settings
from sequencerd.storage import fdw
from sequencerd.storage.connections import Shard
from sequencerd.storage.every_shard import ask_all


def fdw_command(arguments: argparse.Namespace, settings: Settings) -> int:
    if arguments.shard:
        raise ArgumentError("leave out --shard: the front has all shards, numbered in their order")
    if not settings.shards:
        raise UsageError("there are no [shards] in the settings; see docs/shards.md")
    return _print(arguments, settings)


@on_shards
async def _print(arguments: argparse.Namespace, settings: Settings, shards: Sequence[Shard]) -> int:
    async def check(shard: Shard) -> None:
        await (await connect(shard)).close()

    # each shard must have the number that the front gives it
    await ask_all(explain(arguments), shards, check, otherwise="the front needs all shards")
    say_lines(
        fdw.front(
            {
                name: Shard(shard.url.get_secret_value(), shard.schema_name)
                for name, shard in settings.shards.items()
            }
        )
    )
    return 0
