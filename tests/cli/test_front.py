"""The command that prints the SQL of one table over all shards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from sequencerd.storage import connections
from sequencerd.storage.connections import Shard
from tests.helpers.command_line import Command


@pytest.fixture
def write(sequencerd: Command, tmp_path: Path) -> Callable[[str], object]:
    """Writes the settings."""
    file = tmp_path / "sequencerd.toml"
    sequencerd.without_database()
    sequencerd.variables["SEQUENCERD_CONFIG"] = str(file)
    return file.write_text


@pytest.mark.slow
async def test_all_shards_are_printed_in_their_order(
    sequencerd: Command, write: Callable[[str], object], database: str
) -> None:
    url = database.replace("postgres@", "postgres:secret@")
    write(f'[shards]\nb = {{url = "{url}", schema = "x"}}\na = {{url = "{url}", schema = "y"}}\n')
    sequencerd("fdw", code=1)
    assert "shard b: the database has no schema x yet; run: sequencerd migrate" in sequencerd.errors
    sequencerd("migrate")
    printed = sequencerd("fdw")
    assert "(sequencer.shard_of(subject, 2))" in printed
    assert 0 < printed.index("schema_name 'x'") < printed.index("schema_name 'y'")
    assert "secret" not in printed
    sequencerd("fdw", "--shard", "a", code=2)
    assert "leave out --shard" in sequencerd.errors

    connection = await connections.connect(Shard(database, "y"))
    await connection.execute("DELETE FROM sequencer.shard")
    await connection.close()
    sequencerd("fdw", code=1)
    assert "shard a: the schema has no shard number yet; run: sequencerd migrate" in (
        sequencerd.errors
    )


def test_a_front_needs_shards(sequencerd: Command, write: Callable[[str], object]) -> None:
    write("")
    sequencerd("fdw", code=1)
    assert "there are no [shards] in the settings" in sequencerd.errors
