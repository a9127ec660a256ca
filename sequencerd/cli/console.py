"""The console as a separate process."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from sequencerd.cli.commands import on_shards
from sequencerd.console import process
from sequencerd.errors import ArgumentError
from sequencerd.service.logs import make_log
from sequencerd.settings import Settings, split_address
from sequencerd.storage.connections import Shard


@on_shards
async def console_command(
    arguments: argparse.Namespace, settings: Settings, shards: Sequence[Shard]
) -> int:
    if arguments.listen is not None:
        try:
            split_address(arguments.listen)
        except ValueError as error:
            raise ArgumentError(f"--listen {arguments.listen!r}: {error}") from error
    await process.run(shards, settings, arguments.listen, make_log(settings))
    return 0
