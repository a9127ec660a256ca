"""A server that may be broken, and a world on it for each test."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests.chaos.world import FIRST, ROUNDS, Server, World, copy, create, living, serving
from tests.helpers.databases import server_folder


@pytest.fixture(scope="session")
def breakable() -> Iterator[Server]:
    with server_folder() as folder, serving(folder) as started:
        yield started


@pytest.fixture(scope="session")
def empty_world(breakable: Server) -> str:
    """The name of a database with the sequence."""
    name = "empty_world"
    asyncio.run(create(breakable.url, name))
    return name


@pytest.fixture(params=range(FIRST, FIRST + ROUNDS))
async def world(
    breakable: Server, empty_world: str, tmp_path: Path, request: pytest.FixtureRequest
) -> AsyncIterator[World]:
    database = await copy(breakable.url, empty_world, tmp_path.name)
    async with living(database, tmp_path, request.param) as made:
        made.server = breakable
        yield made
