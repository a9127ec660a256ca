"""What tests of single parts of the engine need."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import timedelta

import asyncpg
import pytest

from sequencerd.storage import activity, connections
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
