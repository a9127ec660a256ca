"""What tests of the SQL interface begin with."""

from __future__ import annotations

import asyncpg
import pytest

from tests.helpers.engines import define

DAYS = '{"amount": 3, "unit": "days"}'


@pytest.fixture
async def defined(connection: asyncpg.Connection) -> asyncpg.Connection:
    """A sequence "s" of the steps first and second."""
    await define(
        connection,
        "s",
        ("first", "WaitForDuration", DAYS, "second"),
        ("second", "WaitForDuration", DAYS, None),
    )
    return connection
