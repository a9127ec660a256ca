"""Compile the sequences in a database."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import asyncpg

from sequencerd.core import model
from sequencerd.definitions.compiler import from_rows
from sequencerd.runners import Runner
from sequencerd.storage.sequences import read_definitions, read_revisions


async def read_sequences(
    connection: asyncpg.Connection, runners: Mapping[str, Runner]
) -> dict[str, model.Sequence]:
    """Return all sequences by name."""
    sequences, steps = await read_definitions(connection, await read_revisions(connection))
    of = defaultdict(list)
    for step in steps:
        of[step["sequence"]].append(step)
    return {row["name"]: from_rows(row, of[row["name"]], runners) for row in sequences}
