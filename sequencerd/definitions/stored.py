"""Compile the sequences in a database."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace

import asyncpg

from sequencerd.core import model
from sequencerd.definitions.compiler import from_rows, parse_holidays, parse_topic_limits
from sequencerd.runners import Runner
from sequencerd.storage.sequences import read_definitions, read_revisions
from sequencerd.storage.statements import QUERIES


async def read_sequences(
    connection: asyncpg.Connection, runners: Mapping[str, Runner]
) -> dict[str, model.Sequence]:
    """Return all sequences by name."""
    sequences, steps = await read_definitions(connection, await read_revisions(connection))
    of = defaultdict(list)
    for step in steps:
        of[step["sequence"]].append(step)
    return {row["name"]: from_rows(row, of[row["name"]], runners) for row in sequences}


async def as_stored(
    connection: asyncpg.Connection, sequences: Iterable[model.Sequence]
) -> dict[str, model.Sequence]:
    """Return sequences of files by name, with what the database has for all sequences: holidays,
    and limits of topics.
    """
    holidays = parse_holidays(await connection.fetchval(QUERIES["holidays"]))
    topic_limits = parse_topic_limits(await connection.fetchval(QUERIES["topic_limits"]))
    return {
        one.name: replace(one, holidays=holidays, topic_limits=topic_limits) for one in sequences
    }
