"""What tests of single parts of the engine need."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import timedelta

import asyncpg
import pytest

from sequencerd.engine.loop import Engine
from sequencerd.storage import activity, connections
from sequencerd.storage.listener import DueSteps
from tests.helpers.databases import shard


@pytest.fixture
async def pool(database: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[asyncpg.Pool]:
    """Connections for retention, which counts the past by months: by days it takes longer than all
    else.
    """
    monkeypatch.setattr(activity, "CATCH_UP_SPAN", timedelta(days=31))
    pool = await connections.connect_pool(shard(database), 3)
    yield pool
    await pool.close()


@pytest.fixture
def no_polls(monkeypatch: pytest.MonkeyPatch) -> None:
    """No poll finds what claims have lost; `sweep=3600` keeps sweeps from finding it."""

    async def found(_engine: Engine, whole: bool) -> DueSteps:
        return DueSteps(0, frozenset())

    monkeypatch.setattr(Engine, "find_due", found)
