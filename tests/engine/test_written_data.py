"""What UpdateData writes: keys merged, counted and removed, beside what an application changes."""

from __future__ import annotations

import json

import asyncpg

from tests.helpers.engines import ALL_ENDED, Recorder, define, enroll, running_engine, until

CHANGES = {
    "tries": {"add": 1},
    "tags": {"append": "x"},
    "score": {"get": "data.points"},
    "note": {"remove": True},
}


async def test_operations_are_written_and_other_keys_stay_as_they_are(
    database: str, connection: asyncpg.Connection
) -> None:
    async with running_engine(database, {"Work": Recorder()}):
        await define(
            connection,
            "s",
            ("count", "UpdateData", json.dumps({"data": CHANGES}), "work"),
            ("work", "Work", "{}", None),
        )
        for n in range(20):
            data = f'{{"points": {n}, "tries": {n}, "note": "n", "exact": 1.10000000000000000001}}'
            await enroll(connection, "s", f"user-{n}", data)
        await until(connection, ALL_ENDED)
        rows = await connection.fetch("SELECT subject, data FROM sequencer.enrollments")
        for row in rows:
            n = int(row["subject"].removeprefix("user-"))
            assert '"exact": 1.10000000000000000001' in row["data"]
            data = json.loads(row["data"])
            del data["exact"]
            assert data == {"points": n, "tries": n + 1, "tags": ["x"], "score": n}
