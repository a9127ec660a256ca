"""What UpdateData writes: keys merged, counted and removed, while an application changes others."""

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


NUMBERS = {
    "huge": "1e400",
    "nested": '{"in": [12345678901234567.891]}',
    "list": "[0.1000000000000000000001, -1e400]",
}
COPIES = {
    "huge": {"get": "data.huge"},
    "nested": {"in": [{"get": "data.nested.in[0]"}]},
    "list": {"get": ["data", "list"]},
}


async def test_numbers_that_no_float_holds_are_copied_to_the_last_digit(
    database: str, connection: asyncpg.Connection
) -> None:
    text = "{" + ", ".join(f'"{key}": {value}' for key, value in NUMBERS.items()) + "}"
    async with running_engine(database):
        await define(
            connection, "other", ("same", "UpdateData", json.dumps({"data": COPIES}), None)
        )
        config = json.dumps({"sequence": "other", "data": COPIES})
        await define(
            connection,
            "s",
            ("collect", "Collect", '{"quiet": {"milliseconds": 1}}', "enroll"),
            ("enroll", "Enroll", config, None),
        )
        await enroll(connection, "s", "ada", f'{text[:-1]}, "items": [{text}]}}')
        ended = "SELECT count(*) = 2 FROM sequencer.enrollments WHERE status <> 'active'"
        await until(connection, ended)
    rows = await connection.fetch(
        "SELECT sequence, status, data = $1 AS same, data->'batch'->0 = $1 AS is_batch"
        " FROM sequencer.enrollments ORDER BY sequence",
        text,
    )
    assert [tuple(row) for row in rows] == [
        ("other", "completed", True, None),
        ("s", "completed", False, True),
    ]
